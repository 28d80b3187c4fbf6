"""`python -m hf_scratch_gpt`, which is also what `accelerate launch -m hf_scratch_gpt` runs."""

import sys

from hf_scratch_gpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
