"""The rows of transformers' `Trainer` at its defaults, but for the learning rate and where it writes."""

from pathlib import Path
from typing import Any

import torch
from pretrain_request import HeldOut, Request, describe, finish, modern_fields, peak_memory
from pretrain_watch import Watch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_scratch_gpt.data.shards import TokenShards


class Windows(torch.utils.data.Dataset):
    """The training tokens cut into windows that follow each other; labels are the inputs.

    Args:
        dataset_dir (`str`): A prepared folder.
        context_length (`int`): Tokens of a window.
    """

    def __init__(self, dataset_dir: str, context_length: int):
        self.shards, self.context_length = TokenShards(dataset_dir, "train", verify=False), context_length

    def __len__(self) -> int:
        return len(self.shards) // self.context_length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = self.shards.read(index * self.context_length, self.context_length).astype("int64")
        ids = torch.from_numpy(tokens)
        return {"input_ids": ids, "labels": ids}


class WatchCallback(TrainerCallback):
    """Tells the watch of each step, and stops when its time is over."""

    def __init__(self, watch: Watch):
        self.watch = watch

    def on_train_begin(self, args, state, control, **kwargs):
        self.watch.start()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.watch.note_step()
        control.should_training_stop = control.should_training_stop or self.watch.finished


def make_model(request: Request, kind: str) -> Any:
    """GPT2LMHeadModel (`"gpt2"`) or Qwen3ForCausalLM (`"qwen3"`) of the request's shape, freshly initialised."""
    torch.manual_seed(request.seed)
    fields = modern_fields(request)
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**fields))
    shape = request.size
    config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.context_length,
        n_embd=shape.hidden_size,
        n_layer=shape.num_hidden_layers,
        n_head=shape.num_attention_heads,
        resid_pdrop=request.dropout,
        embd_pdrop=request.dropout,
        attn_pdrop=request.dropout,
        bos_token_id=fields["bos_token_id"],
        eos_token_id=fields["eos_token_id"],
    )
    return GPT2LMHeadModel(config)


def train_with_trainer(request: Request, kind: str) -> dict[str, Any]:
    """Train under `Trainer`; a time budget needs `expected_steps`, over which its linear schedule falls."""
    model = make_model(request, kind)
    heldout = HeldOut(request) if request.seconds else None
    evaluate = (lambda: heldout.measure(model, heldout.some)) if heldout else None
    watch = Watch(request.total_steps, request.seconds, request.interval, evaluate)
    arguments = TrainingArguments(
        output_dir=str(Path(request.work) / "trainer"),
        max_steps=request.expected_steps if request.seconds else request.total_steps,
        per_device_train_batch_size=request.batch_size // request.accumulation,
        gradient_accumulation_steps=request.accumulation,
        learning_rate=request.learning_rate,
        seed=request.seed,
        use_cpu=request.device == "cpu",
        save_strategy="no",
        disable_tqdm=True,
    )
    data = Windows(request.dataset_dir, request.size.context_length)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[WatchCallback(watch)])
    trainer.train()
    memory = peak_memory(request.device)
    result = {**describe(model, request.size), **finish(request, watch, False), "peak_rss_bytes": memory}
    if heldout is not None:
        watch.note_point()
        result |= {"curve": watch.curve, "bits_per_byte": heldout.measure(model, heldout.all)}
    return result
