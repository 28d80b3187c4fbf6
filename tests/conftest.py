"""Settings of the whole test suite: one thread a process (busy cores lose more than they gain), and no network."""

import os
from pathlib import Path

# Before torch is imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the public data sets: SCRATCH_GPT_TEST_DATA or beside the repository; skips where it is missing."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SCRATCH_GPT_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"the public data sets are not at {folder} (set SCRATCH_GPT_TEST_DATA)")
    return folder
