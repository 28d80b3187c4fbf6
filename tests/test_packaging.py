"""What the package promises about itself: each sub-package travels in the wheel, and imports run one way."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_scratch_gpt"
# A package may import those in its own row of the design page and in the rows before.
LAYERS = [
    {"model", "runs"},
    {"data"},
    {"evaluation"},
    {"pretraining", "finetuning"},
    {"alignment"},
    {"reporting", "hub", "chat"},
    {"pipeline"},
    {"cli", "__main__"},
]
# The pipeline runs what the command line names: the table of stages lives in `cli`, which imports nothing at the top.
ALLOWED = {("pipeline", "cli"), ("__main__", "cli")}


def layer_of(name: str) -> int:
    return next(index for index, names in enumerate(LAYERS) if name in names)


def imported_rooms(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    rooms = {module.split(".")[1] for module in modules if re.match(r"hf_scratch_gpt\.\w", module)}
    return {room for room in rooms if any(room in names for names in LAYERS)}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_run_one_way(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    for imported in imported_rooms(path) - {room}:
        if (room, imported) not in ALLOWED:
            assert layer_of(imported) < layer_of(room) or {room, imported} == {"model", "runs"}, (
                f"{room} imports {imported}"
            )


def test_every_sub_package_travels_in_the_wheel():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = set(re.findall(r'^    "(hf_scratch_gpt[\w.]*)",$', text, flags=re.MULTILINE))
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}
    assert named == found | {"hf_scratch_gpt.recipes", "hf_scratch_gpt.model_cards"}
