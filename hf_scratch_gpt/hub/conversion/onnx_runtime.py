"""An exported graph in ONNX Runtime: logits, and greedy writing with its cache, compared with the model's."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

# Two fp32 computations in another order of sums, as a share of the logits' scale where that is above 1.
TOLERANCE = 1e-5


class OnnxModel:
    """A graph of `write_onnx` in ONNX Runtime, on one thread of the CPU.

    Args:
        path (`Path`): `model.onnx`, with its weights beside it.
    """

    def __init__(self, path: Path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        # All but the tokens: the cache, which transformers names `past_key_values` or, from 5.24 on, `cache`.
        plain = ("input_ids", "attention_mask")
        self._inputs = [value for value in self._session.get_inputs() if value.name not in plain]
        self._outputs = [value.name for value in self._session.get_outputs()]

    def empty_cache(self, rows: int) -> list[np.ndarray]:
        """Keys and values of no token: (rows, kv_heads, 0, head_dim) in fp32, two a layer."""
        return [np.zeros((rows, value.shape[1], 0, value.shape[3]), np.float32) for value in self._inputs]

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[np.ndarray]
    ) -> tuple[torch.Tensor, list[np.ndarray]]:
        """Logits (rows, tokens, vocab_size), and the cache with these tokens.

        `attention_mask` (rows, cached and new tokens) is 0 at padding.
        """
        feed = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        feed |= {value.name: array for value, array in zip(self._inputs, past, strict=True)}
        logits, *cache = self._session.run(self._outputs, feed)
        return torch.from_numpy(logits), cache

    def greedy(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, length: int) -> torch.Tensor:
        """The `length` ids that follow each row, (rows, length), each the likeliest, with the cache."""
        past, written = self.empty_cache(len(input_ids)), []
        for _ in range(length):
            logits, past = self.forward(input_ids, attention_mask, past)
            input_ids = logits[:, -1:].argmax(-1)
            attention_mask = torch.cat([attention_mask, torch.ones_like(input_ids)], dim=1)
            written.append(input_ids)
        return torch.cat(written, dim=1)


def compare_with_onnxruntime(path: Path, model: Any) -> dict[str, Any]:
    """Run the file in ONNX Runtime on several shapes, with padding on the left and in pieces with the cache.

    Returns:
        `dict[str, Any]`: `largest_logit_difference`, as a share of the logits' scale where that is above 1.

    Raises:
        ValueError: if a logit differs by more than `TOLERANCE`; the message has the shape.
    """
    graph = OnnxModel(path)
    context = model.config.max_position_embeddings
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for rows, length, pieces in ((1, 1, 1), (1, 48, 1), (3, 17, 1), (2, 33, 3), (2, 6, 6)):
        length = min(length, context)
        ids = torch.randint(model.config.vocab_size, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, : (length // 2) * (rows > 1)] = 0
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        found = _in_pieces(graph, ids, mask, pieces)[mask.bool()]
        difference = (found - expected).abs().max() / max(1.0, float(expected.abs().max()))
        if not difference <= TOLERANCE:
            raise ValueError(
                f"{path}: in onnxruntime the logits of {rows} x {length} tokens, read in {pieces} pieces, are "
                f"{float(difference):.2g} from the model's (at most {TOLERANCE:g} is rounding): not usable"
            )
        largest = max(largest, float(difference))
    return {"largest_logit_difference": largest}


def _in_pieces(graph: OnnxModel, ids: torch.Tensor, mask: torch.Tensor, pieces: int) -> torch.Tensor:
    """Logits of all tokens, read in that many pieces one after the other."""
    past, logits, end = graph.empty_cache(len(ids)), [], 0
    for piece in ids.tensor_split(pieces, dim=1):
        end += piece.shape[1]
        part, past = graph.forward(piece.contiguous(), mask[:, :end].contiguous(), past)
        logits.append(part)
    return torch.cat(logits, dim=1)
