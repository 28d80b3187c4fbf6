"""The tables of the pretraining benchmarks, in Markdown."""

import statistics
from argparse import Namespace
from typing import Any

from pretrain_shapes import Shape


def describe(options: Namespace, shape: Shape) -> str:
    """One line of what is compared."""
    share = shape.modern_parameters(shape.intermediate_size) / shape.classic_parameters - 1
    return (
        f"{options.shape}: {shape.num_hidden_layers} layers, width {shape.hidden_size}, vocabulary "
        f"{shape.vocab_size:,}, context {shape.context_length}; {shape.classic_parameters / 1e6:.2f}M parameters "
        f"(the modern maths {share:+.1%}, MLP of {shape.intermediate_size}); {options.batch_size} x "
        f"{shape.context_length} tokens a step in {options.accumulation} part{'s' * (options.accumulation > 1)}"
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def speed_table(rows: list[dict[str, Any]]) -> str:
    """Speed, share of the peak, memory; times faster and share of memory are ours against the row."""
    ours = next((row for row in rows if row["name"] == "ours"), None)
    lines = []
    for row in rows:
        factor = f"{ours['tokens_per_second'] / row['tokens_per_second']:.2f}×" if ours else ""
        memory = f"{ours['peak_rss_bytes'] / row['peak_rss_bytes']:.2f}×" if ours else ""
        spread = f"{min(row['repeats']):,.0f} – {max(row['repeats']):,.0f}"
        lines.append(
            [
                row["name"],
                f"{row['parameters'] / 1e6:.2f}M",
                f"{row['tokens_per_second']:,.0f}",
                spread,
                factor,
                f"{row['share_of_peak']:.0%}",
                f"{row['peak_rss_bytes'] / 2**30:.2f}",
                memory,
                f"{row['compile_seconds']:.0f}" if row["compile_seconds"] else "–",
            ]
        )
    header = ["row", "parameters", "tokens/s", "range", "ours is", "of the bf16 peak", "peak GiB", "ours takes"]
    text = table([*header, "compiling, s"], lines)
    if ours and ours["chosen"]:
        text += f"ours: {', '.join(f'{name} {value}' for name, value in ours['chosen'].items())}\n"
    peak = statistics.median(row["bf16_peak_flops"] for row in rows)
    return f"{text}bf16 peak {peak / 1e9:,.0f} GFLOP/s, {rows[0]['threads']} threads\n"


def time_table(timed: dict[str, Any], seconds: float) -> str:
    """Final bits per byte of each seed, and when each row came to the baselines' final figures."""
    baselines = [name for name in timed["rows"] if name.startswith("nanogpt")]
    lines = []
    for name, row in timed["rows"].items():
        shares = [
            f"{row['share_of_time'][other]:.2f}×" if other in row["share_of_time"] else "never" for other in baselines
        ]
        lines.append(
            [
                name,
                " ".join(f"{value:.3f}" for value in row["bits_per_byte"]),
                f"{statistics.mean(row['bits_per_byte']):.3f}",
                f"{statistics.mean(row['tokens']) / 1e6:.2f}M",
                f"{row['tokens_per_second']:,.0f}",
                *shares,
                f"{row['seconds_to_loss']:.0f}" if row["seconds_to_loss"] is not None else "–",
            ]
        )
    header = [f"{timed['corpus']}, {seconds:g} s", "bits per byte, each seed", "mean", "tokens", "tokens/s"]
    header += [f"time to {other}'s" for other in baselines]
    notes = [f"{name}: no time to loss: {row['reason']}" for name, row in timed["rows"].items() if row["reason"]]
    return table([*header, "seconds to the target"], lines) + "".join(f"{note}\n" for note in notes)


def gpu_table(rows: list[dict[str, Any]], data_sheet_tflops: float | None) -> str:
    """Speed, MFU and memory of each row, and its speed over that of the baseline of its preset and context."""
    lines = []
    for row in rows:
        place = (row["preset"], row["context_length"])
        against = [other for other in rows if (other["preset"], other["context_length"]) == place]
        rates = [other["tokens_per_second"] for other in against if other["name"] == "baseline"]
        factor = f"{row['tokens_per_second'] / rates[0]:.2f}×" if rates else ""
        sheet = (
            row["tokens_per_second"] * row["flops_per_token"] / (data_sheet_tflops * 1e12) if data_sheet_tflops else 0
        )
        lines.append(
            [
                f"{place[0]}, {place[1]}, {row['name']}",
                f"{row['parameters'] / 1e6:.0f}M",
                f"{row['tokens_per_second']:,.0f}",
                factor,
                f"{row['share_of_peak']:.1%}",
                f"{max(row['peak_flops']) / 1e12:,.0f}",
                f"{sheet:.1%}" if sheet else "–",
                f"{row['peak_rss_bytes'] / 2**30:.1f}",
                f"{row['compile_seconds']:.0f}",
            ]
        )
    header = ["preset, context, row", "parameters", "tokens/s", "over the baseline", "MFU, measured peak"]
    header += ["measured TFLOP/s", "MFU, data sheet", "peak GiB", "compiling, s"]
    return table(header, lines)
