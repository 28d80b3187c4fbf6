"""Fetch transformers' own test mixins: `python tests/conformance/fetch.py` prints the folder that holds them.

They are in the source distribution of transformers and not in its wheel. pip downloads the one of exactly the
installed version (and checks it against the index's sha256); only its `tests/` is unpacked, as the package
`transformers_tests` in a cache folder outside the repository (`SCRATCH_GPT_TEST_CACHE`, by default
`~/.cache/hf_scratch_gpt`). A few modules that the mixins import are left out of it: `stand_ins/` has ours.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

STAND_INS = Path(__file__).resolve().parent / "stand_ins"
PACKAGE = "transformers_tests"  # the mixins look for a folder above them whose name ends in "tests"


def download(transformers_version: str, folder: Path) -> Path:
    """The source distribution of one version of transformers, downloaded into `folder`.

    Raises:
        RuntimeError: if pip cannot get it; the message is pip's.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
    command += ["--dest", str(folder), f"transformers=={transformers_version}"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"pip could not download transformers {transformers_version}: {result.stderr.strip()}")
    return next(folder.glob("transformers-*.tar.gz"))


def unpack(archive: Path, target: Path) -> None:
    """Write the Python files below the archive's `tests/`, and our stand-ins, to `target`, all or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        with tarfile.open(archive) as tar:
            members = [m for m in tar.getmembers() if m.isfile() and m.name.split("/")[1] == "tests"]
            for member in members:
                member.name = member.name.split("/", maxsplit=2)[2]
            tar.extractall(temporary, members=members, filter="data")
        shutil.copytree(STAND_INS, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(temporary, target)


def fetch() -> Path:
    """The folder to put on `sys.path`, so that `transformers_tests` can be imported; downloads what is missing."""
    transformers_version = version("transformers")
    cache = Path(os.environ.get("SCRATCH_GPT_TEST_CACHE", Path.home() / ".cache" / "hf_scratch_gpt"))
    folder = cache / f"transformers-{transformers_version}"
    archive = folder / f"transformers-{transformers_version}.tar.gz"
    if not archive.exists():
        with tempfile.TemporaryDirectory() as temporary:
            downloaded = download(transformers_version, Path(temporary))
            folder.mkdir(parents=True, exist_ok=True)
            shutil.move(downloaded, archive)
    unpack(archive, folder / PACKAGE)
    return folder


if __name__ == "__main__":
    print(fetch())
