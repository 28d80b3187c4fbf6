"""PPO here against TRL 1.12.0's, the last release that had one: speed, reward at equal KL, and collapse.

    python tests/benchmarks/ppo_vs_trl.py --out DIR                       # some ten minutes on one idle core
    python tests/benchmarks/ppo_vs_trl.py --out DIR --episodes 256 --seeds 1

TRL gets an environment of its own below DIR (`pip`, once). Runs go one after another on one thread, in turn: each
seed runs every name, so that a machine that grows slower slows all of them. A run that is there already is kept.
`DIR/ppo.json` has a row a name: CPU milliseconds an episode (of everything, and of sampling), the reward where the
curve first comes to each KL, the last reward, and how many seeds collapsed: ended below 0.6 of their best reward, or
before their last episode, because the policy's probabilities became NaN.
"""

import argparse
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

NAMES = ("trl", "trl-no-pad", "trl-no-gc", "ours-separate", "ours-shared")
KLS = (2, 5, 10, 15)
REQUIREMENTS = ("trl==1.12.0", "transformers==4.57.6", "torch==2.13.0", "accelerate==1.15.0", "datasets==5.0.1")
_SMOOTHED = 4  # rollouts
_COLLAPSED_BELOW = 0.6  # of the best reward


def make_environment(folder: Path) -> Path:
    """The Python of an environment with TRL 1.12.0, made where it is not there yet."""
    python = folder / "bin" / "python"
    marker = folder / "installed.json"
    if not marker.is_file() or json.loads(marker.read_text()) != list(REQUIREMENTS):
        print(f"setting up TRL 1.12.0 in {folder}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
        marker.write_text(json.dumps(REQUIREMENTS), encoding="utf-8")
    return python


def smooth(values: list[float]) -> list[float]:
    """Means of each value and the few before it."""
    return [sum(part) / len(part) for n in range(len(values)) if (part := values[max(0, n + 1 - _SMOOTHED) : n + 1])]


def reward_at(curve: list[list[float]], kl: float) -> float | None:
    """The reward where the smoothed curve first comes to a KL, between two rollouts; `None` if it never does."""
    kls, rewards = smooth([point[0] for point in curve]), smooth([point[1] for point in curve])
    for number in range(1, len(kls)):
        if kls[number] >= kl > kls[number - 1]:
            share = (kl - kls[number - 1]) / (kls[number] - kls[number - 1])
            return rewards[number - 1] + share * (rewards[number] - rewards[number - 1])
    return None


def mean(values: list[float | None]) -> float | None:
    """Mean of the values that there are."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def summarise(name: str, runs: list[dict]) -> dict:
    """The row of one name, from the runs of all seeds."""
    curves = [smooth([point[1] for point in run["curve"]]) for run in runs]
    at = {str(kl): [reward_at(run["curve"], kl) for run in runs] for kl in KLS}
    last, best = [curve[-1] for curve in curves], [max(curve) for curve in curves]
    speed = [1000 * run["seconds"] / run["episodes"] for run in runs]
    generation = [1000 * run["generation_seconds"] / run["episodes"] for run in runs]
    collapsed = [
        seed
        for seed, (run, end, top) in enumerate(zip(runs, last, best, strict=True))
        if run.get("died") or not end >= _COLLAPSED_BELOW * top
    ]
    return {
        "name": name,
        "cpu_ms_per_episode": mean(speed),
        "generation_ms_per_episode": mean(generation),
        "reward_at_kl": {kl: mean(values) for kl, values in at.items()},
        "last_reward": mean(last),
        "collapsed_seeds": len(collapsed),
        "by_seed": {
            "cpu_ms_per_episode": speed,
            "generation_ms_per_episode": generation,
            "reward_at_kl": at,
            "last_reward": last,
            "best_reward": best,
            "collapsed": collapsed,
            "episodes": [run["episodes"] for run in runs],
        },
    }


def tell(rows: list[dict]) -> str:
    """The rows as a table, and what the speeds come to."""

    def show(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    lines = [
        "| name | CPU ms an episode | sampling | " + " | ".join(f"at KL {kl}" for kl in KLS) + " | last | collapsed |"
    ]
    lines.append("| --- |" + " ---: |" * (len(KLS) + 4))
    for row in rows:
        figures = [row["cpu_ms_per_episode"], row["generation_ms_per_episode"], *row["reward_at_kl"].values()]
        cells = [*map(show, figures), show(row["last_reward"]), str(row["collapsed_seeds"])]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    speeds = {row["name"]: row["cpu_ms_per_episode"] for row in rows}
    for name in ("trl", "trl-no-gc"):
        if {name, "ours-shared"} <= speeds.keys():
            lines.append(f"{name} / ours-shared: {speeds[name] / speeds['ours-shared']:.2f} times")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and write `ppo.json`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results and of TRL's environment")
    parser.add_argument("--episodes", type=int, default=4096)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minibatches", type=int, default=1, help="of a rollout of 64; TRL's default is 1")
    parser.add_argument("--names", nargs="+", choices=NAMES, default=NAMES)
    options = parser.parse_args()
    out = options.out.resolve()
    runs = out / f"runs-{options.episodes}-{options.minibatches}"
    runs.mkdir(parents=True, exist_ok=True)
    theirs = make_environment(out / "trl-1.12.0") if any(name.startswith("trl") for name in options.names) else None
    script = Path(__file__).with_name("ppo_vs_trl_run.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"TRL_EXPERIMENTAL_SILENCE": "1", "CUDA_VISIBLE_DEVICES": ""}
    for seed in range(options.seeds):
        for name in options.names:
            path = runs / f"{name}-{seed}.json"
            if path.is_file():
                continue
            python = theirs if name.startswith("trl") else sys.executable
            command = [python, script, name, "--seed", str(seed), "--episodes", str(options.episodes)]
            command += ["--minibatches", str(options.minibatches), "--out", path]
            subprocess.run([str(part) for part in command], check=True, env=environment)
            told = json.loads(path.read_text())
            print(f"{name}, seed {seed}: {1000 * told['seconds'] / told['episodes']:.2f} ms an episode", flush=True)
    rows = [
        summarise(name, [json.loads((runs / f"{name}-{seed}.json").read_text()) for seed in range(options.seeds)])
        for name in options.names
    ]
    (out / "ppo.json").write_text(json.dumps({"rows": rows}, indent=2) + "\n", encoding="utf-8")
    print(tell(rows))


if __name__ == "__main__":
    main()
