"""The wheel that this tree builds passes this tree's tests: `python tests/conformance/wheel.py [PYTEST ARGUMENTS]`.

Builds the wheel, installs it with its test extra in a fresh virtual environment, and runs the suite from a copy of
`tests/` (and of the files at the top that tests read) in a folder where the sources of the package are not.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What tests read beside the package. Those of `SOURCES_ONLY` are about the tree itself, so they stay out.
BESIDE = ["README.md", "pyproject.toml", "recipes", "model_cards"]
SOURCES_ONLY = ["test_packaging.py", "test_docstrings.py"]


def run(*command: object, **settings) -> None:
    """Run a command and stop here if it fails."""
    subprocess.run(list(map(str, command)), check=True, **settings)


def build(folder: Path) -> Path:
    """The wheel of the tree, built in `folder` from a copy, so that no build output is left in the tree."""
    copy = folder / "source"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, files.stdout.split("\0")):
        if not name.startswith("tests/") and (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, copy)
    shutil.rmtree(copy)
    return next(folder.glob("*.whl"))


def main(arguments: list[str]) -> int:
    """The exit status of pytest in the environment that has only the wheel."""
    os.environ.pop("PYTHONPATH", None)  # pip would take what lies there for installed
    os.environ.setdefault("SCRATCH_GPT_TEST_DATA", str(ROOT.parent / "shared" / "data"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wheel = build(folder)
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv" / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", f"{wheel}[test]")
        away = folder / "away"
        leave = shutil.ignore_patterns("__pycache__", "conformance", *SOURCES_ONLY)
        shutil.copytree(ROOT / "tests", away / "tests", ignore=leave)
        for name in BESIDE:
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, away / name)
        where = "import hf_scratch_gpt; print(hf_scratch_gpt.__file__)"
        found = subprocess.run([python, "-c", where], cwd=away, capture_output=True, text=True)
        assert str(folder / "venv") in found.stdout, f"not the wheel's package: {found.stdout}{found.stderr}"
        return subprocess.run([python, "-m", "pytest", *arguments], cwd=away).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
