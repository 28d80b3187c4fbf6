"""The model under examination, with what many checks need: inputs, logits, their spread, a saved copy."""

import contextlib
import copy
import json
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from hf_scratch_gpt.hub.doctor.outcome import Skipped, in_one_line
from hf_scratch_gpt.hub.doctor.reload import reload, reload_in_fresh_process

# The first token has to change later ones' logits by this share of their spread, or faults do not show.
LEAST_INFLUENCE = 0.05
_TOKENS = 16


class Subject:
    """A loaded model and all that the checks ask of it.

    Args:
        model: A causal language model in fp32 on the CPU, as `from_pretrained` gave it.
        missing (`list[str]`): Names of weights that the checkpoint lacks or has in another shape.
        tokenizer (*optional*): Its tokenizer.
        no_tokenizer (`str`, *optional*): Why there is none.
        tokenizer_error (`str`, *optional*): Why there is none although its files are there.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Whether the model's own code may run.
        fresh_process (`bool`, *optional*, defaults to `True`): Load the saved copy in a new process; in this one it
            takes 4 seconds less, but what the process already holds may hide a fault.
    """

    def __init__(
        self,
        model: Any,
        missing: list[str],
        tokenizer: Any = None,
        no_tokenizer: str = "",
        tokenizer_error: str = "",
        trust_remote_code: bool = False,
        fresh_process: bool = True,
    ):
        self.model = model.eval()
        self.config = model.config.get_text_config()
        self.missing = missing
        self.tokenizer, self.no_tokenizer, self.tokenizer_error = tokenizer, no_tokenizer, tokenizer_error
        self.trust_remote_code, self.fresh_process = trust_remote_code, fresh_process
        self.folder = TemporaryDirectory(prefix="scratch-gpt-doctor-")
        self._examine_new_model()
        self.lost_buffers = self.restore_buffers(self.model)
        self.influence, self.forward_error = self._influence()
        # The second also holds where it is not a number.
        self.stirred = self._is_untrained() or not self.influence >= LEAST_INFLUENCE
        if self.stirred:
            self._stir()
            self.influence, self.forward_error = self._influence()

    def close(self) -> None:
        """Remove the saved copy."""
        self.folder.cleanup()

    def _examine_new_model(self) -> None:
        """Keep, of the model as its constructor makes it, the buffers and how large each new weight is."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            new = type(self.model)(copy.deepcopy(self.model.config))
        self.built_buffers = {name: buffer.clone() for name, buffer in new.named_buffers()}
        self.built_squares = {
            name: (weight.detach().float().pow(2).sum().item(), weight.numel())
            for name, weight in new.named_parameters()
        }

    def restore_buffers(self, model: Any) -> list[str]:
        """Names of unsaved buffers that loading left other than the constructor makes them, but for rounding.

        They are put right, so that the other checks tell about other things.
        """
        lost = []
        saved = set(model.state_dict())
        built = self.built_buffers
        for name, buffer in list(model.named_buffers()):
            if name in saved or name not in built:
                continue
            if buffer.shape != built[name].shape or not buffer.float().allclose(built[name].float(), rtol=1e-2):
                lost.append(name)
                owner, _, leaf = name.rpartition(".")
                model.get_submodule(owner)._buffers[leaf] = built[name].clone()
        return lost

    def _influence(self) -> tuple[float, str]:
        """How far the first token changes later ones' logits at most, as a share of their spread; the error if any."""
        changed = self.ids.clone()
        changed[:, 0] = self.random_ids(2, _TOKENS, seed=7)[:, 0]
        changed[:, 0] = torch.where(changed[:, 0] == self.ids[:, 0], self.random_ids(1, 40)[0, 39], changed[:, 0])
        try:
            before, after = self.logits(self.ids)[:, 1:], self.logits(changed)[:, 1:]
        except Exception as error:  # of the model's code: the checks tell it, each for itself
            return math.nan, in_one_line(error)
        return ((after - before).abs().max() / before.std()).item(), ""

    def _is_untrained(self) -> bool:
        """Whether all norms and biases are as they began: every vector holds one and the same number."""
        vectors = [parameter for parameter in self.model.parameters() if parameter.ndim == 1]
        return bool(vectors) and all(bool((vector == vector[0]).all()) for vector in vectors)

    @torch.no_grad()
    def _stir(self) -> None:
        """Add large random numbers to the weights, in memory.

        A new model attends to all tokens alike and hardly looks back, which would hide most faults.
        """
        generator = torch.Generator().manual_seed(0)
        for parameter in self.model.parameters():
            scale = 0.1 if parameter.ndim < 2 else min(parameter.shape) ** -0.5
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)

    @cached_property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.model.get_input_embeddings().weight.shape[0]

    @cached_property
    def context(self) -> int | None:
        """Positions that the model declares, or `None`."""
        return getattr(self.config, "max_position_embeddings", None)

    def special_ids(self) -> set[int]:
        """Ids that a model may treat apart, which random inputs therefore leave out."""
        found: set[int] = set()
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            for config in (self.config, self.model.generation_config):
                value = getattr(config, name, None)
                found.update(value if isinstance(value, list) else [] if value is None else [value])
        return found

    def random_ids(self, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
        """Seeded token ids, (rows, columns), without special ones."""
        plain = torch.tensor(sorted(set(range(self.vocab_size)) - self.special_ids()))
        generator = torch.Generator().manual_seed(seed)
        return plain[torch.randint(len(plain), (rows, columns), generator=generator)]

    @cached_property
    def ids(self) -> torch.Tensor:
        """The inputs of most checks, (2, 16) or as many tokens as the context has."""
        return self.random_ids(2, min(_TOKENS, self.context or _TOKENS))

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor, use_cache: bool = False, **inputs: Any) -> torch.Tensor:
        """Logits in fp32 of the model in evaluation mode."""
        return self.model(input_ids, use_cache=use_cache, **inputs).logits.float()

    @cached_property
    def reference(self) -> torch.Tensor:
        """The logits of `ids`, computed in the plainest way."""
        return self.logits(self.ids)

    @cached_property
    def spread(self) -> float:
        """Standard deviation of the reference logits."""
        return self.reference.std().item()

    def takes(self, argument: str) -> bool:
        """Whether `forward` names the argument."""
        import inspect

        return argument in inspect.signature(self.model.forward).parameters

    @cached_property
    def saved(self) -> Path:
        """A folder with a saved copy of the model and the inputs whose logits are compared."""
        folder = Path(self.folder.name)
        self.model.save_pretrained(folder / "model")
        (folder / "inputs.json").write_text(json.dumps(self.ids.tolist()), encoding="utf-8")
        return folder

    @cached_property
    def record(self) -> dict[str, Any]:
        """What the saved copy has become after loading: see `reload`."""
        if not (self.saved / "record.json").is_file():
            if self.fresh_process:
                reload_in_fresh_process([self.saved], self.trust_remote_code)
            else:
                reload(self.saved, self.trust_remote_code)
        return json.loads((self.saved / "record.json").read_text(encoding="utf-8"))

    @contextlib.contextmanager
    def attention(self, implementation: str) -> Iterator[None]:
        """Another attention implementation for a while.

        Raises:
            RuntimeError: if the model does not switch.
        """
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation(implementation)
        try:
            if self.model.config._attn_implementation != implementation:
                raise RuntimeError(f"set_attn_implementation('{implementation}') changed nothing")
            yield
        finally:
            self.model.set_attn_implementation(before)

    def needs_tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            Skipped: if there is none.
        """
        if self.tokenizer is None:
            raise Skipped(self.no_tokenizer or "the tokenizer does not load")
        return self.tokenizer

    def needs_chat_template(self) -> Any:
        """The tokenizer, which has a chat template.

        Raises:
            Skipped: if there is no tokenizer, or none with a chat template.
        """
        tokenizer = self.needs_tokenizer()
        if not tokenizer.chat_template:
            raise Skipped("the tokenizer has no chat template")
        if not tokenizer.is_fast:
            raise Skipped("a tokenizer without a fast version has no character offsets")
        return tokenizer

    def end_token_ids(self) -> set[int]:
        """Ids at which generation stops."""
        value = self.model.generation_config.eos_token_id
        return set(value) if isinstance(value, list) else set() if value is None else {value}
