"""Saved folders load by `trust_remote_code` on the oldest and the newest transformers that we declare.

    python tests/conformance/versions.py               # the lower bound of pyproject.toml, and what pip finds newest
    python tests/conformance/versions.py 5.23.0 5.24.0 # these: on either side of the cache's new name

Makes a virtual environment for each, in a temporary folder, with torch, transformers, tokenizers and safetensors and
without this package; writes the folders here; and runs there, offline, what tests/model/test_model_loading.py runs.
"""

import os
import re
import subprocess
import sys
import tempfile
import venv
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "model")]


def declared() -> tuple[str, str]:
    """Requirements for the oldest and the newest transformers that pyproject.toml allows."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lower, upper = re.search(r'"transformers>=([\d.]+),<([\d.]+)"', text).groups()
    oldest = lower if lower.count(".") == 2 else f"{lower}.0"
    return f"transformers=={oldest}", f"transformers>={lower},<{upper}"


def make_environment(folder: Path, requirement: str) -> str:
    """A virtual environment with that transformers and nothing of ours; returns its interpreter."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    torch = f"torch=={version('torch').split('+')[0]}"
    command = [python, "-m", "pip", "install", "--quiet", torch, requirement, "safetensors", "tokenizers", "jinja2"]
    subprocess.run(command, check=True)
    return python


def main(versions: list[str]) -> int:
    """Check each version and say which passed; 1 if any failed."""
    from model_tiny import make_model
    from test_model_loading import assert_works_without_the_package, save_every_class
    from transformers.utils import logging

    from hf_scratch_gpt.model import ScratchGPTTokenizer

    os.environ.pop("PYTHONPATH", None)  # pip would take what lies there for installed
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    checked, failed = set(), []
    tokenizer = ScratchGPTTokenizer.train(["The user asks and the assistant answers.\n"] * 20, 300)
    for requirement in [f"transformers=={name}" for name in versions] or declared():
        with tempfile.TemporaryDirectory() as temporary:
            python = make_environment(Path(temporary) / "venv", requirement)
            asked = "from importlib.metadata import version; print(version('transformers'))"
            found = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip()
            if found in checked:
                print(f"{requirement} is {found} too", flush=True)
                continue
            checked.add(found)
            folder = Path(temporary) / "models"
            folder.mkdir()
            expected = save_every_class(folder, make_model, tokenizer)
            try:
                assert_works_without_the_package(folder, python, expected, tokenizer)
            except AssertionError as error:
                failed.append(found)
                print(f"{requirement} ({found}): FAILED\n{error}", flush=True)
            else:
                print(f"{requirement} ({found}): {len(expected)} models and the tokenizer agree", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
