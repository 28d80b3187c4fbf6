"""What a saved model is after loading it again: run in a process of its own, where nothing is left from the first.

`python -m hf_scratch_gpt.hub.doctor.reload [--trust-remote-code] FOLDER...` reads FOLDER/model and FOLDER/inputs.json
and writes FOLDER/record.json and FOLDER/logits.safetensors.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_SECONDS = 600


def fingerprints(model: Any) -> dict[str, str]:
    """A hash of type, shape and bits of every parameter and every buffer, also of those that are not saved."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: fingerprint(tensor) for name, tensor in tensors}


def fingerprint(tensor: Any) -> str:
    """Type, shape and a hash of the bits of one tensor."""
    import torch

    plain = tensor.detach().cpu().contiguous()
    bits = plain.reshape(-1).view(torch.uint8).numpy() if plain.numel() else b""
    return f"{plain.dtype} {tuple(plain.shape)} {hashlib.sha256(bits).hexdigest()[:16]}"


def is_tied(model: Any) -> bool:
    """Whether input and output embedding are one storage."""
    head = model.get_output_embeddings()
    if head is None:
        return False
    return model.get_input_embeddings().weight.data_ptr() == head.weight.data_ptr()


def reload(folder: Path, trust_remote_code: bool) -> None:
    """Load `folder`/model and write beside it what it has become."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    import hf_scratch_gpt.model  # noqa: F401  registers our classes with the Auto classes
    from hf_scratch_gpt.runs.loading import quiet

    with quiet(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(
            folder / "model", dtype=torch.float32, trust_remote_code=trust_remote_code
        ).eval()
        # Before the first forward, which may grow a buffer.
        record = {"tensors": fingerprints(model), "tied": is_tied(model)}
        inputs = torch.tensor(json.loads((folder / "inputs.json").read_text(encoding="utf-8")))
        save_file({"logits": model(inputs, use_cache=False).logits.contiguous()}, folder / "logits.safetensors")
    (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")


def reload_in_fresh_process(folders: list[Path], trust_remote_code: bool = False) -> None:
    """`reload` each folder in one new process.

    Raises:
        RuntimeError: if loading fails there; its text is the process's last line.
    """
    package_parent = str(Path(__file__).resolve().parents[3])
    paths = [package_parent, *filter(None, [os.environ.get("PYTHONPATH")])]
    flags = ["--trust-remote-code"] if trust_remote_code else []
    command = [sys.executable, "-m", "hf_scratch_gpt.hub.doctor.reload", *flags, *map(str, folders)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_SECONDS)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(f"loading in a fresh process failed: {lines[-1] if lines else 'no message'}")


if __name__ == "__main__":
    trust = "--trust-remote-code" in sys.argv
    for argument in sys.argv[1:]:
        if argument != "--trust-remote-code":
            reload(Path(argument), trust)
