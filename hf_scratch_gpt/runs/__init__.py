"""What a run's folder is: recipe, metrics, curve, lineage, atomic writes, lock, signals. Knows no stage."""

from hf_scratch_gpt.runs.arguments import StageArguments, given_settings, parse_arguments
from hf_scratch_gpt.runs.files import read_json, replace_folder, write_json, write_text
from hf_scratch_gpt.runs.folder import StageRun
from hf_scratch_gpt.runs.identity import read_metrics
from hf_scratch_gpt.runs.signals import Interrupted, StopRequest

__all__ = [
    "Interrupted",
    "StageArguments",
    "StageRun",
    "StopRequest",
    "given_settings",
    "parse_arguments",
    "read_json",
    "read_metrics",
    "replace_folder",
    "write_json",
    "write_text",
]
