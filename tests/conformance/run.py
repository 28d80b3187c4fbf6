"""Run transformers' own test mixins on our classes, one variant after the other: `python tests/conformance/run.py`.

    pip install -e ".[test,conformance]"
    python tests/conformance/run.py                         # all variants, the tokenizer, and the linter
    python tests/conformance/run.py TiedTest -k "not fsdp"  # one; what follows the names goes to pytest

The first run downloads the mixins (see fetch.py; pip, 10 MB); later ones need no network. Exit status 1 if any fails.
"""

import os
import subprocess
import sys
from pathlib import Path

from fetch import fetch

HERE = Path(__file__).resolve().parent
SUITES = {
    "TiedTest": "model_mixins.py",
    "UntiedTest": "model_mixins.py",
    "LearnedPositionsTest": "model_mixins.py",
    "PostNormTest": "model_mixins.py",
    "SlidingWindowTest": "model_mixins.py",
    "TokenizerTest": "tokenizer_mixins.py",
    "TestLinter": "linter.py",
}


def main(arguments: list[str]) -> int:
    """Run the named suites, or all, and return 0 if none has a failure."""
    names = [argument for argument in arguments if argument in SUITES]
    rest = [argument for argument in arguments if argument not in SUITES]
    paths = [str(fetch()), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    # The mixins' marks are not ours to declare, and their warnings not ours to mend.
    options = ["-q", "-rs", "--tb=short", "--timeout=600", "-p", "no:cacheprovider", "-o", "addopts=", "-W", "ignore"]
    failed = []
    for name in names or SUITES:
        print(f"== {name}", flush=True)
        target = f"{HERE / SUITES[name]}::{name}"
        command = [sys.executable, "-m", "pytest", target, *options, *rest]
        if subprocess.run(command, env=environment, cwd=HERE.parents[1]).returncode:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "no failure", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
