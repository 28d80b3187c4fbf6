"""The runs that led to a model, found by their ids: each `metrics.json` names the runs that its stage read."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_scratch_gpt.reporting.ledger import Record
from hf_scratch_gpt.runs import read_metrics
from hf_scratch_gpt.runs.arguments import read_recipe
from hf_scratch_gpt.runs.folder import RECIPE
from hf_scratch_gpt.runs.identity import METRICS, model_files


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its folder, the folder's name in the card, and what its `metrics.json` says."""

    folder: Path
    name: str
    report: dict[str, Any]

    @property
    def stage(self) -> str:
        """The stage that made it."""
        return str(self.report.get("stage"))

    @property
    def run_id(self) -> str:
        """What other runs know it by."""
        return str(self.report["run_id"])

    @property
    def metrics(self) -> Record:
        """Its `metrics.json`, for the ledger."""
        return Record(f"{self.name}/{METRICS}", self.report)

    @property
    def recipe(self) -> Record:
        """Its `recipe.yaml`, for the ledger.

        Raises:
            FileNotFoundError, ValueError: if it is missing or damaged.
        """
        return Record(f"{self.name}/{RECIPE}", read_recipe(self.folder / RECIPE))

    def inputs(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """What it was made from, as `(setting, entry)`; an entry is `runs.folder.describe_input`'s."""
        for setting, entry in self.report.get("inputs", {}).items():
            for item in entry if isinstance(entry, list) else [entry]:
                yield setting, item


def last_part(path: str) -> str:
    """The last part of a path of any system, which tells nothing of the machine; a Hub id stays whole."""
    is_local = path.startswith(("/", ".", "~")) or "\\" in path or path.count("/") > 1 or Path(path).exists()
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2] if is_local else path


class Lineage:
    """A run and all runs that led to it, first to last.

    Args:
        folder (`str` or `Path`): Folder of the run.

    Attributes:
        run (`Run`): The run itself.
        runs (`list[Run]`): All of them; each comes after those that it was made from.

    Raises:
        FileNotFoundError: if one of them is missing, naming the file and who needs it.
        ValueError: if one is damaged or was made anew since.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.root = Path(folder.absolute()).parent
        self.run = self.open_run(folder)
        self._siblings = list(self._read_siblings())
        self.runs: list[Run] = []
        self._collect(self.run)

    def open_run(self, folder: Path) -> Run:
        """A finished run, named as the card names it: by its folder, and the folder above if that is another.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if its `metrics.json` is damaged.
        """
        absolute = Path(folder.absolute())
        is_sibling = absolute.parent == self.root
        return Run(folder, absolute.name if is_sibling else "/".join(absolute.parts[-2:]), read_metrics(folder))

    def _read_siblings(self) -> Iterator[Run]:
        for path in sorted(self.root.glob(f"*/{METRICS}")):
            if not path.parent.name.startswith("."):
                yield self.open_run(path.parent)

    def _collect(self, run: Run) -> None:
        for setting, entry in run.inputs():
            if "run_id" in entry and all(entry["run_id"] != other.run_id for other in self.runs):
                self._collect(self._find(run, setting, entry))
        if all(run.run_id != other.run_id for other in self.runs):
            self.runs.append(run)

    def _find(self, run: Run, setting: str, entry: dict[str, Any]) -> Run:
        """The run that `run` was made from: beside the model, or where it was when `run` read it."""
        for other in self._siblings:
            if other.run_id == entry["run_id"]:
                return other
        places = [self.root / last_part(entry["path"]), Path(entry["path"])]
        for place in places:
            if (place / METRICS).is_file() and read_metrics(place)["run_id"] == entry["run_id"]:
                return self.open_run(place)
        made_anew = [place for place in places if (place / METRICS).is_file()]
        told = f"{run.folder / METRICS}: '{setting}' is the run {entry['run_id']} at {entry['path']}"
        if made_anew:
            raise ValueError(
                f"{told}, but {made_anew[0] / METRICS} is of another run, made since; run the stage "
                f"'{run.stage}' again, or name a model whose lineage is whole"
            )
        raise FileNotFoundError(f"{places[0] / METRICS}: missing; {told}, and without it the card cannot be written")

    def source_of(self, entry: dict[str, Any]) -> Run | None:
        """The run of the lineage that an input's entry names, or `None` for what is no run."""
        return next((run for run in self.runs if run.run_id == entry.get("run_id")), None)

    def find_evaluation(self) -> Run | None:
        """The newest run of the stage `evaluate` beside the model that measured it, or `None`."""
        measured = [
            other
            for other in self._siblings
            if other.stage == "evaluate" and any(self.run.run_id == entry.get("run_id") for _, entry in other.inputs())
        ]
        return max(measured, key=lambda other: str(other.report.get("finished_at", "")), default=None)


def check_unchanged(run: Run) -> None:
    """Refuse a model whose files are no longer those that the run made and measured.

    Raises:
        ValueError: naming the first file that differs. A run that recorded no digests passes: the ledger tells of it.
    """
    recorded = run.report.get("files")
    if not isinstance(recorded, dict):
        return
    found = model_files(run.folder)
    for name in sorted(recorded.keys() | found.keys()):
        if recorded.get(name) != found.get(name):
            how = "is gone" if name not in found else "is new" if name not in recorded else "has changed"
            raise ValueError(
                f"{run.folder / name}: {how} since the run finished, so what {METRICS} says was not measured on this "
                "model; put the file back, or run the stage again"
            )
