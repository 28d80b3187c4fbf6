"""What the standard library says about its own functions and classes, read from its sources without importing them.

Only the syntax tree is looked at (`ast`): signatures, first lines of docstrings, base classes, what is returned and
raised. Text that would make an ugly question is left out here, so that everything downstream can be asked as it is.
"""

import ast
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from hf_scratch_gpt.data.python_docs import source_files

# Applications and vendored copies inside the standard library: not its documented part.
SKIPPED_MODULES = {"ensurepip", "idlelib", "lib2to3", "turtledemo"}
LONGEST_HEADER = 84
LONGEST_SUMMARY = 76
LONGEST_EXPRESSION = 40
_PROPERTY_LIKE = {"property", "setter", "getter", "deleter", "overload", "cached_property", "abstractproperty"}


@dataclass(frozen=True)
class Definition:
    """One public function, method or class of the standard library.

    Fields that a definition lacks, or whose text is too long or too odd to be asked about, are empty.

    Args:
        module (`str`): dotted name of the module, such as `os.path` or `shutil`.
        name (`str`): the bare name.
        owner (`str`): the class that a method belongs to; empty for functions and classes.
        header (`str`): the first line as source, annotations removed: `def copy(src, dst):` or `class Barrier:`.
        summary (`str`): first line of the docstring.
        parameters (`tuple[str, ...]`): names in order, without `self`; empty where there is `*args` or `**kwargs`.
        required (`tuple[str, ...]`): those of the positional parameters that have no default.
        defaults (`tuple[tuple[str, str], ...]`): parameter and default, as source.
        base (`str`): the only base class of a class, as source.
        returned (`str`): the expression of the only return statement, as source.
        raised (`tuple[str, str]`): the only exception that is raised and the raise statement, as source.
    """

    module: str
    name: str
    kind: str
    owner: str = ""
    header: str = ""
    summary: str = ""
    parameters: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    defaults: tuple[tuple[str, str], ...] = ()
    base: str = ""
    returned: str = ""
    raised: tuple[str, str] = ("", "")

    @property
    def signature(self) -> str:
        """`copy(src, dst)`: the header without its keyword and its colon."""
        return re.sub(r"^(async )?(def|class) ", "", self.header).removesuffix(":")

    @property
    def text(self) -> str:
        """All the text that a question about this definition may show."""
        return " ".join([self.module, self.owner, self.header, self.summary, self.base, self.returned, self.raised[1]])


def library_files(root: Path) -> list[tuple[str, Path]]:
    """Public modules among the sources of the corpus `python-docs`: (dotted name, source file), ordered by name."""
    return [
        (module, path)
        for module, path in source_files(root)
        if not any(part in SKIPPED_MODULES or part.startswith("_") for part in module.split("."))
    ]


@lru_cache(maxsize=2)
def read_definitions(root: Path | None = None) -> tuple[Definition, ...]:
    """Every public definition of the standard library under `root`, in a fixed order.

    Raises:
        ValueError: if there are no sources: some installations carry compiled files only.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    definitions: list[Definition] = []
    for module, path in library_files(root):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # sources kept broken on purpose, or in another encoding
            continue
        definitions.extend(_definitions_in(tree.body, module, owner=""))
    if not definitions:
        place = root or sysconfig.get_paths()["stdlib"]
        raise ValueError(
            f"{place}: no standard library sources (*.py) found; python-docs needs an interpreter with them"
        )
    return tuple(dict.fromkeys(definitions))


def _definitions_in(body: list[ast.stmt], module: str, owner: str) -> Iterator[Definition]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if _is_public(node.name) and not _is_property_like(node):
                yield _function(node, module, owner)
        elif isinstance(node, ast.ClassDef) and not owner and _is_public(node.name):
            yield _class(node, module)
            yield from _definitions_in(node.body, module, owner=node.name)


def _is_public(name: str) -> bool:
    return not name.startswith("_") and 3 <= len(name) <= 24 and name.isascii()


def _is_property_like(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    names = {ast.unparse(decorator).split("(")[0].split(".")[-1] for decorator in node.decorator_list}
    return bool(names & _PROPERTY_LIKE)


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, module: str, owner: str) -> Definition:
    arguments = _without_annotations(node.args)
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    header = f"{keyword} {node.name}({ast.unparse(arguments)}):"
    positional = [argument.arg for argument in arguments.posonlyargs + arguments.args]
    optional = positional[len(positional) - len(arguments.defaults) :]
    pairs = list(zip(optional, arguments.defaults, strict=True))
    pairs += [(a.arg, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is not None]
    is_bound = bool(owner) and positional[:1] in (["self"], ["cls"])
    required = positional[: len(positional) - len(optional)][1 if is_bound else 0 :]
    parameters = (positional + [argument.arg for argument in arguments.kwonlyargs])[1 if is_bound else 0 :]
    if arguments.vararg or arguments.kwarg:
        parameters = []
    if any(
        d is None for d in arguments.kw_defaults
    ):  # a required keyword: a call with positions alone is not complete
        required = []
    if len(header) > LONGEST_HEADER or not header.isascii():
        return Definition(module, node.name, "method" if owner else "function", owner, summary=_summary(node))
    return Definition(
        module,
        node.name,
        "method" if owner else "function",
        owner,
        header,
        _summary(node),
        tuple(parameters),
        tuple(required),
        tuple((name, text) for name, default in pairs if (text := _expression(default)) and len(text) <= 16),
        returned=_returned(node),
        raised=_raised(node),
    )


def _class(node: ast.ClassDef, module: str) -> Definition:
    base = _expression(node.bases[0]) if len(node.bases) == 1 and not node.keywords else ""
    if not re.fullmatch(r"[A-Za-z][\w.]*", base) or base == "object":
        base = ""
    header = f"class {node.name}({base}):" if base else f"class {node.name}:"
    return Definition(module, node.name, "class", header=header, summary=_summary(node), base=base)


def _without_annotations(arguments: ast.arguments) -> ast.arguments:
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return arguments


def _expression(node: ast.expr) -> str:
    """The source of an expression, or nothing where it is too long or would confuse the quotes around it."""
    text = ast.unparse(node)
    if (
        len(text) > LONGEST_EXPRESSION
        or not text.isascii()
        or not text.isprintable()
        or "`" in text
        or "lambda" in text
    ):
        return ""
    return text if text == " ".join(text.split()) else ""


def _summary(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    """First line of the docstring, or nothing where that line is no complete statement in prose."""
    lines = (ast.get_docstring(node) or "").split("\n")
    first = lines[0].strip()
    goes_on = len(lines) > 1 and lines[1].strip() != ""
    if not 12 <= len(first) <= LONGEST_SUMMARY or (goes_on and first[-1] != ".") or not first.isascii():
        return ""
    looks_like_code = re.match(r"[\w.]+\s*\(|[\w.]+ *(->|=|:)|[^A-Za-z]", first) or re.search(
        r'"""|\\|`|>>>|->|  ', first
    )
    if looks_like_code or first.endswith((":", ",", "-", ";")) or len(first.split()) < 3:
        return ""
    return first


def _own_statements(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a function's body but those of functions and classes inside it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield child
            yield from _own_statements(child)


def _returned(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    returns = [child for child in _own_statements(node) if isinstance(child, ast.Return)]
    if len(returns) != 1 or returns[0].value is None or isinstance(returns[0].value, ast.Constant):
        return ""
    text = _expression(returns[0].value)
    return text if len(text) >= 4 else ""


def _raised(node: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[str, str]:
    statements = [child for child in _own_statements(node) if isinstance(child, ast.Raise)]
    calls = [child.exc for child in statements if isinstance(child.exc, ast.Call)]
    names = {ast.unparse(call.func) for call in calls}
    if len(names) != 1 or len(calls) != len(statements):
        return "", ""
    name, text = names.pop(), _expression(calls[0])
    if not re.fullmatch(r"([A-Za-z]\w*\.)*[A-Z]\w+", name) or len(name) > 30:  # else perhaps a function that makes one
        return "", ""
    return name, f"raise {text or name + '(...)'}"
