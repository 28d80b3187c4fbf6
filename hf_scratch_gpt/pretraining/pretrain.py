"""The stage `pretrain`: train a base model from token shards, with an Accelerate loop of our own.

    scratch-gpt pretrain recipes/quickstart/pretrain.yaml [--max_minutes 5]
    scratch-gpt pretrain recipes/masked/pretrain.yaml       (--objective masked: BERT's, read both ways)
    accelerate launch --config_file recipes/accelerate/gpu-8-ddp.yaml -m hf_scratch_gpt pretrain RECIPE

A batch is a pure function of (seed, step, rank), so a run that was killed goes on from its newest whole checkpoint as
if nothing had happened: with `max_steps`, on a CPU in fp32, the weights are equal bit for bit. With `max_minutes` the
schedule follows the clock, and a rerun is as long but not identical.
"""

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

from hf_scratch_gpt.pretraining.arguments import PretrainArguments
from hf_scratch_gpt.runs import StageRun, StopRequest, given_settings
from hf_scratch_gpt.runs.checkpoints import newest_checkpoint
from hf_scratch_gpt.runs.hardware import rank_and_world_size
from hf_scratch_gpt.runs.process import set_up_process, tell_setup

logger = logging.getLogger(__name__)

Arguments = PretrainArguments

_SAVING_SECONDS = 3.0  # kept free at the end for the last checkpoint and the model's files


def run(arguments: PretrainArguments) -> Path:
    """Train a base model and write it, its tokenizer and its metrics to `arguments.output_dir`.

    Raises:
        FileNotFoundError: if `dataset_dir` is not a prepared folder.
        ValueError: for settings that are out of range or do not fit the data, or a loss that stays non-finite.
        Interrupted: if a signal stopped it, after a checkpoint; the same call continues.
    """
    started = time.monotonic()
    arguments.check()
    if arguments.tokens:
        arguments = _choose_settings(arguments)
    from hf_scratch_gpt.pretraining.setup import load_dataset, make_accelerator

    accelerator = make_accelerator(arguments)
    # Of a stream's prepared folder the shards are not read: they may be as short as they like.
    dataset = load_dataset(arguments.dataset_dir, 0 if arguments.stream else arguments.context_length)
    with StageRun(arguments, "pretrain") as run:
        if not run.finished:
            if arguments.report_to != "none":
                accelerator.init_trackers("hf_scratch_gpt", config=_flat(given_settings(arguments)))
            metrics = _Pretraining(arguments, accelerator, dataset, run, started).run_all()
            run.finish(metrics)
        accelerator.wait_for_everyone()
        accelerator.end_training()
    return run.folder


def _choose_settings(arguments: PretrainArguments) -> PretrainArguments:
    """Turn `tokens` into steps and all that follows, and say what was chosen."""
    from hf_scratch_gpt.pretraining.dial import with_chosen_settings

    chosen, lines = with_chosen_settings(arguments)
    if rank_and_world_size()[0] == 0:
        print("\n".join(f"pretrain: {line}" for line in lines), flush=True)
    return chosen


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Trackers take numbers and texts only."""
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in settings.items()
    }


class _Pretraining:
    """One try at the stage: set up, train from the newest checkpoint, evaluate, save."""

    def __init__(self, arguments: PretrainArguments, accelerator: Any, dataset: Any, run: StageRun, started: float):
        from hf_scratch_gpt.evaluation.questions import pick_texts
        from hf_scratch_gpt.pretraining import distributed, setup
        from hf_scratch_gpt.pretraining.interim import encode_sample_prompts
        from hf_scratch_gpt.pretraining.objectives import make_objective

        self.arguments, self.accelerator, self.dataset = arguments, accelerator, dataset
        self.run, self.started = run, started
        documents = [text for text in dataset.heldout if text]
        drawn_by = arguments.seed if arguments.evaluation_seed is None else arguments.evaluation_seed
        self.documents = pick_texts(documents, arguments.evaluation_bytes, drawn_by)
        if not self.documents:
            logger.warning("%s: there is no held-out text, so nothing is measured on it", dataset.folder)
        self.objective = make_objective(arguments.objective, dataset)
        self.model = distributed.place_model(setup.make_model(arguments, dataset), accelerator)
        setup.use_fast_attention(self.model, accelerator.device.type)
        self.distributed = distributed.launched_kind()
        self.sharded = self.distributed == "fsdp"
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.setup = set_up_process(arguments.precision, accelerator.device.type)
        self.bf16 = self.setup.precision == "bf16"
        self.fp16 = self.setup.precision == "fp16"
        self.loss_module = setup.LanguageModelLoss(self.model, self.bf16, arguments.z_loss, self.fp16)
        prompts = arguments.sample_prompts or []
        sizes = (arguments.sample_tokens, arguments.context_length)
        self.sample_prompts = encode_sample_prompts(dataset.tokenizer, prompts, *sizes)

    def run_all(self) -> dict[str, Any]:
        from hf_scratch_gpt.pretraining.averaging import find_average
        from hf_scratch_gpt.pretraining.setup import cpu_training_of
        from hf_scratch_gpt.pretraining.sharding import save_model

        self._restore()
        if self.state.untrained is None:
            self.state.untrained = self._evaluate()
        with cpu_training_of(self.model, self.accelerator.device.type, self.bf16, self.sharded):
            self._train()
        average = find_average(self.optimizers)
        if average is not None:
            average.write_into_model()
        trained = self._evaluate()
        save_model(self.model, self.run.folder, self.accelerator.is_main_process)
        if self.accelerator.is_main_process:
            self.dataset.tokenizer.save_pretrained(self.run.folder)
        return self._metrics(trained)

    def _train(self) -> None:
        from hf_scratch_gpt.pretraining.distributed import prepare_module
        from hf_scratch_gpt.pretraining.loop import PretrainingLoop
        from hf_scratch_gpt.pretraining.telemetry import make_telemetry

        arguments, state, accelerator = self.arguments, self.state, self.accelerator
        if not state.done:
            state.compiled = self._compile()
        tell_setup(self.run, dataclasses.replace(self.setup, compiled=state.compiled))
        sizes = (arguments.batch_size * arguments.context_length, arguments.context_length)
        self.telemetry = make_telemetry(
            self.model, *sizes, self.setup.precision, accelerator.num_processes, accelerator.device
        )
        module = prepare_module(self.loss_module, self.model, accelerator)
        if state.step:
            # Setting up again cannot be had back: a second try counts only training, or the rate would not decay.
            self.started = time.monotonic()
        loop = PretrainingLoop(
            arguments,
            accelerator,
            self.run,
            module,
            self.model,
            self.optimizers,
            self._read_batch,
            state,
            self._make_budget(),
            self._clock,
            self.telemetry,
            self._make_interim(),
            self._count_padding,
            self.fp16,
        )
        with StopRequest() as stop:
            loop.train(stop)

    def _restore(self) -> None:
        from accelerate.utils import broadcast_object_list

        from hf_scratch_gpt.data.loader import TokenShards, make_mixture
        from hf_scratch_gpt.data.packed_windows import pack_windows
        from hf_scratch_gpt.pretraining.averaging import with_average
        from hf_scratch_gpt.pretraining.checkpointing import TrainingState, load_checkpoint
        from hf_scratch_gpt.pretraining.interim import truncate_samples
        from hf_scratch_gpt.pretraining.live_stream import make_stream
        from hf_scratch_gpt.pretraining.optimizers import make_optimizers

        arguments = self.arguments
        self.stream = make_stream(arguments, self.dataset)
        self.shards: Any = None
        self.mixture = self.packed = None
        if self.stream is None:
            self.shards = TokenShards(self.dataset.folder, "train")
            sizes = (arguments.context_length, arguments.mixture)
            if arguments.packing == "best_fit":
                self.packed = pack_windows(self.shards, *sizes, self.dataset.tokenizer.pad_token_id)
            else:
                self.mixture = make_mixture(self.shards, *sizes)
        optimizers = make_optimizers(
            self.model,
            arguments.optimizer,
            arguments.learning_rate,
            arguments.muon_learning_rate,
            arguments.momentum,
            (arguments.adam_beta1, arguments.adam_beta2),
            arguments.weight_decay,
            arguments.cautious_weight_decay,
        )
        self.optimizers = with_average(optimizers, self.model, arguments.ema_decay)
        checkpoint = newest_checkpoint(self.run.checkpoints) if self.run.is_main and self.run.resumed else None
        (checkpoint,) = broadcast_object_list([checkpoint])
        self.state = TrainingState()
        if checkpoint is not None:
            self.state = load_checkpoint(checkpoint, self.model, self.optimizers)
        self.run.truncate_curve(self.state.step)
        if self.run.is_main:
            truncate_samples(self.run.folder, self.state.step)
        self._earlier_seconds = self.state.elapsed

    def _clock(self) -> float:
        """Seconds of the stage: of this try, and of earlier ones up to the checkpoint that it starts from."""
        return self._earlier_seconds + time.monotonic() - self.started

    def _read_batch(self, step: int) -> dict[str, Any]:
        from hf_scratch_gpt.data.loader import batch_windows, sample_numbers
        from hf_scratch_gpt.pretraining.live_stream import read_stream

        arguments, accelerator = self.arguments, self.accelerator
        rows, rank = arguments.batch_size // accelerator.num_processes, accelerator.process_index
        place = (step, rank, accelerator.num_processes)
        chosen = self.packed or self.mixture
        if self.stream is not None:
            windows = read_stream(self.stream, self.state, *place)
        elif chosen is None:
            windows = batch_windows(self.shards, arguments.context_length, rows, arguments.seed, *place)
        else:
            windows = chosen.batch(rows, arguments.seed, *place)
        if not arguments.separate_documents:
            del windows["position_ids"]
        batch = self.objective.make_batch(windows, arguments.seed, sample_numbers(rows, *place))
        return {name: tensor.to(accelerator.device) for name, tensor in batch.items()}

    def _count_padding(self, step: int) -> int:
        """Padding in the windows that all processes read in a step, in tokens."""
        arguments = self.arguments
        return self.packed.count_padding(arguments.batch_size, arguments.seed, step) if self.packed else 0

    def _compile(self) -> bool:
        """Compile if it is wanted and can be had, and say in one line how this run trains."""
        from hf_scratch_gpt.pretraining.setup import try_compile, wants_compile

        arguments, begin = self.arguments, time.monotonic()
        compiled = not self.sharded and wants_compile(arguments, self.parameters, self.accelerator.device.type)
        if compiled:
            if self.accelerator.is_main_process:
                print("pretrain: compiling, which takes up to a minute ...", flush=True)
            rows = arguments.batch_size // self.accelerator.num_processes // arguments.gradient_accumulation_steps
            batch = {name: tensor[:rows] for name, tensor in self._read_batch(self.state.step).items()}
            compiled = try_compile(self.loss_module, batch, required=arguments.compile == "true")
            self.state.compile_seconds += time.monotonic() - begin
        if self.accelerator.is_main_process:
            processes = self.accelerator.num_processes
            print(
                f"pretrain: {self.parameters / 1e6:.2f}M parameters on {self.accelerator.device.type}, "
                f"{processes} process{'es' if processes > 1 else ''}, {arguments.optimizer}, "
                f"{arguments.batch_size} x {arguments.context_length} tokens a step",
                flush=True,
            )
        return compiled

    def _make_budget(self) -> Any:
        from hf_scratch_gpt.pretraining.schedules import Budget

        if self.arguments.max_steps:
            return Budget(steps=self.arguments.max_steps)
        # The random model's evaluation took as long as the trained one's will.
        reserved = _SAVING_SECONDS + 1.1 * (self.state.untrained or {}).get("seconds", 0.0)
        seconds = self.arguments.max_minutes * 60
        if self.state.step == 0 and self._clock() + reserved >= seconds:
            raise ValueError(
                f"'max_minutes' {self.arguments.max_minutes}: {self._clock():.0f} s have gone and evaluation and "
                f"saving need {reserved:.0f} s, which leaves no time to train; raise it, or set 'evaluation_bytes'"
            )
        return Budget(seconds=seconds - reserved)

    def _evaluate(self) -> dict[str, Any]:
        """The objective's measure of the held-out documents, by the main process in fp32; empty without documents.

        With an average of the weights, of that.
        """
        from accelerate.utils import broadcast_object_list

        from hf_scratch_gpt.pretraining.averaging import averaged_weights

        measured: dict[str, Any] = {}
        # A sharded model runs in all processes or in none; they measure the same.
        if (self.accelerator.is_main_process or self.sharded) and self.documents:
            begin = time.monotonic()
            sizes = (self.arguments.context_length, self.arguments.evaluation_batch_size)
            with averaged_weights(self.optimizers):
                measured = self.objective.measure(self.model, self.documents, *sizes)
            measured["seconds"] = time.monotonic() - begin
        (measured,) = broadcast_object_list([measured])
        return measured

    def _make_interim(self) -> Any:
        from hf_scratch_gpt.pretraining.interim import Interim

        arguments = self.arguments
        sample = self._sample if self.sample_prompts else None
        prompts = arguments.sample_prompts
        return Interim(self.accelerator, self.run, arguments.evaluation_steps, self._evaluate, sample, prompts)

    def _sample(self) -> list[str]:
        """The likeliest continuation of each of `sample_prompts`."""
        from hf_scratch_gpt.evaluation.generation import generate_from_ids
        from hf_scratch_gpt.pretraining.averaging import averaged_weights

        tokenizer, tokens = self.dataset.tokenizer, self.arguments.sample_tokens
        with averaged_weights(self.optimizers):
            return [answer.text for answer in generate_from_ids(self.model, tokenizer, self.sample_prompts, tokens)]

    def _metrics(self, trained: dict[str, Any]) -> dict[str, Any]:
        from hf_scratch_gpt.pretraining.spike_guard import data_step

        state, untrained = self.state, self.state.untrained or {}
        tokens_per_second = state.tokens / max(state.train_seconds, 1e-9)
        recent = state.recent_losses
        drawn = data_step(state.step, state.skipped_data) * self.arguments.batch_size
        return {
            "parameters": self.parameters,
            "steps": state.step,
            "tokens": state.tokens,
            "seconds": state.train_seconds,
            "tokens_per_second": tokens_per_second,
            **self.telemetry.summary(tokens_per_second),
            "data_share": state.data_seconds / max(state.train_seconds, 1e-9),
            "compile_seconds": state.compile_seconds,
            "checkpoint_wait_seconds": state.checkpoint_wait_seconds,
            "evaluation_seconds": untrained.get("seconds", 0.0)
            + state.evaluation_seconds
            + trained.get("seconds", 0.0),
            "train_loss": sum(recent) / len(recent) if recent else None,
            "skipped_updates": state.skipped,
            "rollbacks": state.rollbacks,
            "skipped_batches": sum(count for _, count in state.skipped_data),
            **self.objective.metrics(trained, untrained),
            "heldout_documents": len(self.documents),
            "heldout_bytes": sum(len(text.encode("utf-8")) for text in self.documents),
            "distributed": self.distributed,
            "precision": self.setup.precision,
            **({"overflows": state.overflows, "loss_scale": state.loss_scale} if self.fp16 else {}),
            "compiled": state.compiled,
            "objective": self.arguments.objective,
            "optimizer": self.arguments.optimizer,
            "processes": self.accelerator.num_processes,
            # What the spike guard passed over was drawn too: the position in the data, not the steps, counts.
            **self._data_metrics(drawn),
        }

    def _data_metrics(self, drawn: int) -> dict[str, Any]:
        """How windows were filled, and what the `drawn` ones took of the text."""
        from hf_scratch_gpt.data.loader import data_usage
        from hf_scratch_gpt.pretraining.live_stream import stream_usage

        arguments, state = self.arguments, self.state
        room = state.step * arguments.batch_size * arguments.context_length
        if self.stream is not None:
            usage = stream_usage(state, arguments.batch_size * arguments.context_length)
        elif self.packed:
            usage = self.packed.usage(drawn, arguments.seed)
        else:
            usage = data_usage(self.shards, self.mixture, drawn, arguments.context_length)
        return {"packing": arguments.packing, "padding_share": 1 - state.tokens / room if room else 0.0, **usage}
