"""Check any causal language model as the tools of its users would use it:
`scratch-gpt doctor MODEL [--json] [--trust-remote-code]`.

MODEL is a folder or a Hub id, made by this package or anybody. Everything runs on the CPU in fp32.
`scratch-gpt doctor --template PATH [--tokenizer FOLDER] [--json]` checks a chat template alone: that of a tokenizer's
folder or Hub id, or a .jinja file with the tokenizer of its folder or of FOLDER.
Exit status: 0 if nothing fails, 1 if something does, 2 if there is nothing to check.
"""

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from typing import Any

from hf_scratch_gpt.hub.doctor import (
    checks_attention,
    checks_chat,
    checks_forward,
    checks_generation,
    checks_loading,
    checks_template,
    checks_tokenizer,
    checks_training,
)
from hf_scratch_gpt.hub.doctor.loading import load_subject
from hf_scratch_gpt.hub.doctor.outcome import Check, Outcome
from hf_scratch_gpt.hub.doctor.report import as_json, as_table
from hf_scratch_gpt.hub.doctor.subject import Subject
from hf_scratch_gpt.hub.doctor.template import CHECKS as TEMPLATE_CHECKS
from hf_scratch_gpt.hub.doctor.template import TemplateSubject, load_template
from hf_scratch_gpt.runs.command_line import CommandParser

CHECKS: list[Check] = [
    *checks_loading.CHECKS,
    *checks_forward.CHECKS,
    *checks_attention.CHECKS,
    *checks_training.CHECKS,
    *checks_generation.CHECKS,
    *checks_tokenizer.CHECKS,
    *checks_chat.CHECKS,
    *checks_template.CHECKS,
]


def examine(subject: Subject) -> list[Outcome]:
    """Run every check on a loaded model, in the order of the report; the saved copy is removed afterwards."""
    try:
        return _run(CHECKS, subject)
    finally:
        subject.close()


def examine_template(subject: TemplateSubject) -> list[Outcome]:
    """Run every check of a chat template, in the order of the report."""
    return _run(TEMPLATE_CHECKS, subject)


def _run(checks: list[Check], subject: Any) -> list[Outcome]:
    from hf_scratch_gpt.runs.loading import quiet

    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [check.run(subject) for check in checks]


def main(arguments: Sequence[str]) -> int:
    """Entry point of `scratch-gpt doctor`."""
    parser = CommandParser(
        prog="scratch-gpt doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="a model folder or a Hub id")
    parser.add_argument(
        "--template", metavar="PATH", help="check a chat template: a tokenizer's folder or a .jinja file"
    )
    parser.add_argument("--tokenizer", metavar="FOLDER", help="the tokenizer of a .jinja file")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--trust-remote-code", action="store_true", help="let the model's own code run")
    options = parser.parse_args(arguments)
    if (options.model is None) == (options.template is None):
        parser.error("name one thing to check: a model, or a chat template with --template PATH")
    if options.tokenizer is not None and options.template is None:
        parser.error("--tokenizer goes with --template; a model has its own")
    start = time.perf_counter()
    if options.template is not None:
        outcomes = examine_template(load_template(options.template, options.tokenizer))
    else:
        outcomes = examine(load_subject(options.model, options.trust_remote_code))
    seconds, name = time.perf_counter() - start, options.template or options.model
    if options.json:
        print(json.dumps(as_json(name, outcomes, seconds), indent=2, ensure_ascii=False))
    else:
        print(as_table(name, outcomes, seconds))
    return int(any(outcome.status == "fail" for outcome in outcomes))
