"""Whatever is public says what it is: every public class and function of the package has a docstring."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_scratch_gpt"
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def undocumented(source: str) -> list[tuple[int, str]]:
    """Line and name of every public definition without a docstring, methods as `Class.method`."""
    found = []
    tree = ast.parse(source)
    for node in tree.body:
        if not isinstance(node, Definition) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            found.append((node.lineno, node.name))
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if not isinstance(method, Definition) or method.name.startswith("_") or ast.get_docstring(method):
                    continue
                if not any(ast.unparse(decorator).endswith(".setter") for decorator in method.decorator_list):
                    found.append((method.lineno, f"{node.name}.{method.name}"))
    return found


def documented_by_a_base(path: Path, name: str) -> bool:
    """Whether `Class.method` overrides a method that has a docstring, as `forward` does torch's."""
    owner, _, method = name.partition(".")
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    bases = getattr(module, owner).__mro__[1:] if method else ()
    return any(inspect.getdoc(vars(base)[method]) for base in bases if method in vars(base))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_public_names_have_docstrings(path):
    source = path.read_text(encoding="utf-8")
    missing = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for line, name in undocumented(source)
        if not documented_by_a_base(path, name)
    ]
    if source.strip() and not ast.get_docstring(ast.parse(source)):
        missing.insert(0, f"{path.relative_to(ROOT)}:1: the module itself")
    assert not missing, "no docstring:\n" + "\n".join(missing)


def test_the_check_finds_what_is_missing_and_nothing_else():
    source = """
def told(): "What it does."
def untold(): pass
def _private(): pass
class Told:
    "What it is."
    def method(self): pass
    def __len__(self): return 0
class Untold(Told):
    def method(self): pass
"""
    assert undocumented(source) == [(3, "untold"), (7, "Told.method"), (9, "Untold"), (10, "Untold.method")]
    modeling = PACKAGE / "model" / "modeling_scratch_gpt.py"
    assert documented_by_a_base(modeling, "ScratchGPTMLP.forward")
    assert not documented_by_a_base(modeling, "ScratchGPTConfig.from_preset")
    assert not documented_by_a_base(modeling, "rotate_half")
