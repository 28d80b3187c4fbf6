"""The embedded corpus: a fixed text of some 10 MB whose splits share nothing, made without running the library."""

import ast
import hashlib
import os
import re
import subprocess
import sys

import pytest

from hf_scratch_gpt.data import python_docs
from hf_scratch_gpt.data.corpus import Corpus, CorpusArguments
from hf_scratch_gpt.data.documents import Document
from hf_scratch_gpt.data.python_docs import join_groups, module_group, read_python_docs, render_page, source_files


@pytest.fixture(scope="module")
def raw():
    return list(read_python_docs())


@pytest.fixture(scope="module")
def splits(raw):
    found: dict[str, list[Document]] = {"train": [], "heldout": []}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(python_docs, "read_python_docs", lambda: iter(raw))
        for split, document in Corpus(CorpusArguments()):
            found[split].append(document)
    return found


def paragraphs(text: str) -> set[str]:
    parts = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return {part for part in parts if len(part) >= 120}


def test_it_is_some_ten_megabytes_in_four_kinds(splits):
    documents = splits["train"] + splits["heldout"]
    size = sum(len(document.text.encode()) for document in documents)
    assert 6e6 < size < 16e6
    kinds = {document.id.split(":")[0] for document in documents}
    assert {"source", "page", "compiled"} <= kinds
    assert 0.01 < sum(len(d.text.encode()) for d in splits["heldout"]) / size < 0.08


def test_no_long_paragraph_is_in_both_splits(splits):
    train = set().union(*(paragraphs(document.text) for document in splits["train"]))
    heldout = set().union(*(paragraphs(document.text) for document in splits["heldout"]))
    assert len(heldout) > 300
    assert not train & heldout


def test_held_out_text_counts_once(splits):
    assert not any(document.derived for document in splits["heldout"])
    groups = {document.split_group for document in splits["heldout"]}
    assert not any(document.split_group in groups for document in splits["train"])


def digest(documents: list[Document]) -> str:
    return hashlib.sha256(repr(documents).encode("utf-8", "backslashreplace")).hexdigest()


def test_it_is_the_same_in_another_process_and_imports_nothing_of_the_library(raw):
    program = (
        "import hashlib, sys\nfrom hf_scratch_gpt.data.python_docs import read_python_docs\n"
        "documents = repr(list(read_python_docs())).encode('utf-8', 'backslashreplace')\n"
        "print(hashlib.sha256(documents).hexdigest())\n"
        "print([name for name in ('this', 'antigravity', 'turtle', 'idlelib') if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    assert result.stdout.splitlines() == [digest(raw), "[]"]


def test_it_holds_no_address_and_no_path_of_this_machine(splits):
    text = "\n".join(document.text for document in splits["train"] if not document.id.startswith("source:"))
    assert sys.prefix not in text
    assert not re.search(r" at 0x[0-9a-f]{8,}", text)


def test_tests_tables_and_installed_packages_are_left_out(tmp_path):
    for name in ("a.py", "test/b.py", "pkg/__init__.py", "pkg/tests/c.py", "encodings/cp1.py", "site-packages/d.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("x = 1")
    (tmp_path / "test_e.py").write_text("")
    (tmp_path / "_sysconfigdata_x.py").write_text("")
    assert [module for module, _ in source_files(tmp_path)] == ["a", "pkg"]


def test_a_page_shows_signatures_and_docstrings_of_what_is_public():
    source = '''"""About the module."""
def spam(a, /, b: int = 2, *, c=None) -> str:
    """Return spam."""
def _hidden(): "No."
def undocumented(): pass
class Eggs(Base):
    """Some eggs."""
    def boil(self, minutes=3):
        """Boil them."""
    @classmethod
    def lay(cls): "Lay one."
'''
    assert render_page("food.menu", ast.parse(source)).split("\n\n") == [
        "Module food.menu",
        "About the module.",
        "food.menu.spam(a, /, b: int=2, *, c=None) -> str",
        "Return spam.",
        "class food.menu.Eggs(Base)",
        "Some eggs.",
        "food.menu.Eggs.boil(minutes=3)",
        "Boil them.",
        "food.menu.Eggs.lay()",
        "Lay one.",
    ]
    assert render_page("empty", ast.parse("x = 1")) == ""


def test_a_twin_is_in_the_group_of_what_it_serves():
    assert module_group("_pydecimal") == module_group("_decimal") == module_group("decimal")
    assert module_group("_pyio") == module_group("io")
    assert module_group("json.decoder") == "json.decoder"


def test_documents_that_share_a_paragraph_are_in_one_group():
    shared, other = "same words " * 20, "other words " * 20
    documents = [
        Document("c", f"{other}\n\nand", "test"),
        Document("b", f"only b\n\n{shared}", "test"),
        Document("a", f"{shared}\n\n{other}", "test"),
        Document("d", "alone", "test"),
    ]
    assert [document.group for document in join_groups(documents)] == ["a", "a", "a", "d"]


def test_a_python_without_sources_is_an_error_that_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="comes without the sources"):
        list(read_python_docs())
