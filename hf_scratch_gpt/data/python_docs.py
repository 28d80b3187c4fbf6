"""The corpus `python-docs`: the prose and code that every Python installation carries, read from the running one.

Three parts: the language reference's topics (`pydoc_data`), the sources of the standard library with their docstrings
and comments, and reference pages made of the signatures and docstrings of each module. No module of the library is
imported for it but a few that are part of the interpreter: sources are parsed, never run.
"""

import ast
import importlib
import inspect
import os
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_scratch_gpt.data.cleaning import remove_licence_headers
from hf_scratch_gpt.data.documents import Document

SOURCE = "python-docs"

# Left out: tests, installed packages, and what a program wrote (code tables, build settings, bundled wheels).
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "testmock", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
    | {"encodings", "_bundled", "__phello__", "pydoc_data", "msilib"}
)
_SKIPPED_FILES = re.compile(r"test_.*\.py|_sysconfigdata.*\.py|__phello__.*\.py|_aix_support\.py")
_SKIPPED_MODULES = frozenset({"html.entities", "stringprep", "nturl2path", "sre_constants"})

# Modules in C that are safe to import, with the name under which their users know them.
_COMPILED_MODULES = {
    **{name: name for name in ("builtins", "sys", "math", "cmath", "itertools", "array", "binascii", "zlib", "time")},
    **{name: name for name in ("gc", "marshal", "atexit", "select", "unicodedata", "mmap", "fcntl", "resource")},
    **{"posix": "os", "_thread": "_thread", "_socket": "socket", "_random": "random", "_csv": "csv"},
    **{"_collections": "collections", "_functools": "functools", "_re": "re", "_sre": "re", "_signal": "signal"},
}


def _paragraphs(text: str) -> set[str]:
    """The paragraphs of `text` that are long enough (120 characters) to be recognised anywhere, whitespace apart."""
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return {paragraph for paragraph in paragraphs if len(paragraph) >= 120}


def _read_topics() -> Iterator[Document]:
    """The reference's topics; one that is a part of a longer one ("if" of "compound") is left out."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions ship it in a package of its own
        return
    seen: set[str] = set()
    kept = []
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = _paragraphs(topics[name])
        if paragraphs and len(paragraphs & seen) >= 0.8 * len(paragraphs):
            continue
        seen |= paragraphs
        kept.append(name)
    for name in sorted(kept):
        yield Document(f"topic:{name}", topics[name], SOURCE)


def source_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """The modules below a library `folder` as `(dotted name, path)`, ordered by name."""
    found = []
    for directory, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS and "-" not in name]
        for file in files:
            path = Path(directory, file)
            module = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
            if path.suffix == ".py" and not _SKIPPED_FILES.fullmatch(file) and module not in _SKIPPED_MODULES:
                found.append((module, path))
    yield from sorted(found)


def module_group(module: str) -> str:
    """The group of a module: an accelerator or its Python twin (`_pydecimal`, `_io`) goes with what it serves."""
    return re.sub(r"^_(py)?(?=[a-z])", "", module)


def render_signature(node: ast.FunctionDef | ast.AsyncFunctionDef, prefix: str) -> str:
    """`prefix.name(arguments) -> result`, as the source has it, without `self` and `cls`."""
    arguments = ast.unparse(node.args)
    arguments = re.sub(r"^(self|cls)(, /)?(, |$)", "", arguments)
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{prefix}.{node.name}({arguments}){result}"


def _render_members(body: Iterable[ast.stmt], prefix: str) -> Iterator[str]:
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        docstring = ast.get_docstring(node)
        if isinstance(node, ast.ClassDef):
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            title = f"class {prefix}.{node.name}" + (f"({bases})" if bases else "")
            members = list(_render_members(node.body, f"{prefix}.{node.name}"))
            if docstring or members:
                yield "\n\n".join([title, *([docstring] if docstring else []), *members])
        elif docstring:
            yield f"{render_signature(node, prefix)}\n\n{docstring}"


def render_page(module: str, tree: ast.Module) -> str:
    """A reference page of a parsed module: its docstring, then each public function, class and method that has one."""
    title = f"Module {module}"
    docstring = ast.get_docstring(tree)
    entries = [title, *([docstring] if docstring else []), *_render_members(tree.body, module)]
    return "\n\n".join(entries) if len(entries) > 1 else ""


def _read_sources(folder: Path) -> Iterator[Document]:
    for module, path in source_files(folder):
        with tokenize.open(path) as file:  # heeds the file's own coding line
            text = file.read()
        group = module_group(module)
        yield Document(f"source:{module}", text, SOURCE, group)
        page = render_page(module, ast.parse(text))
        if page:
            yield Document(f"page:{module}", page, SOURCE, group, derived=True)


def _render_object(name: str, value: Any) -> str | None:
    docstring = inspect.getdoc(value)
    if not docstring:
        return None
    signature = getattr(value, "__text_signature__", None) or ""
    signature = re.sub(r"^\(\$(module|self|type)(, /)?(, )?", "(", signature)
    kind = "class " if isinstance(value, type) else ""
    return f"{kind}{name}{signature}\n\n{docstring}"


def _render_compiled(module: Any, known_as: str) -> str:
    """A reference page of a module in C, from the docstrings that it carries; values are never shown."""
    entries = [f"Module {known_as}"]
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or not (inspect.isbuiltin(value) or isinstance(value, type)):
            continue
        if name.endswith("hook"):  # a program may have put its own there
            continue
        if isinstance(value, type) and value.__module__ not in (module.__name__, known_as):
            continue
        entries.append(_render_object(f"{known_as}.{name}".removeprefix("builtins."), value) or "")
        for method, function in sorted(vars(value).items()) if isinstance(value, type) else ():
            if not method.startswith("_") and callable(function):
                title = f"{known_as}.{name}.{method}".removeprefix("builtins.")
                entries.append(_render_object(title, function) or "")
    return "\n\n".join(entry for entry in entries if entry)


def _read_compiled() -> Iterator[Document]:
    for name, known_as in sorted(_COMPILED_MODULES.items()):
        try:
            module = importlib.import_module(name)
        except ImportError:  # this platform has none
            continue
        yield Document(f"compiled:{name}", _render_compiled(module, known_as), SOURCE, known_as)


def join_groups(documents: list[Document]) -> Iterator[Document]:
    """Put documents that share a long paragraph in one group, so that no such paragraph is in both splits."""
    parents: dict[str, str] = {}

    def root(group: str) -> str:
        while parents.setdefault(group, group) != group:
            parents[group] = parents[parents[group]]
            group = parents[group]
        return group

    owners: dict[str, str] = {}
    for document in documents:
        for paragraph in _paragraphs(remove_licence_headers(document.text)[0]):
            first, second = sorted(
                (root(owners.setdefault(paragraph, document.split_group)), root(document.split_group))
            )
            parents[second] = first
    for document in documents:
        yield replace(document, group=root(document.split_group))


def read_python_docs() -> Iterator[Document]:
    """Stream the corpus, in one fixed order for one Python version.

    Raises:
        ValueError: if this Python has no readable sources of its standard library.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    if not (folder / "textwrap.py").is_file():
        raise ValueError(
            f"{folder}: this Python comes without the sources of its standard library, which 'python-docs' is made "
            "of; use another Python or name your own text in 'sources'"
        )
    yield from join_groups([*_read_topics(), *_read_compiled(), *_read_sources(folder)])
