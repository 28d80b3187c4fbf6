from textwrap import dedent

import pytest

from hf_scratch_gpt.data.tasks.functions import read_definitions


def definitions_of(folder, source, module="shelves"):
    (folder / f"{module}.py").write_text(dedent(source), encoding="utf-8")
    read_definitions.cache_clear()
    return {definition.name: definition for definition in read_definitions(folder)}


def test_a_function_is_read_as_its_source_has_it(tmp_path):
    found = definitions_of(
        tmp_path,
        '''
        def store(book: "Book", shelf, *, level: int = 3, name='top, left'):
            """Put a book on a shelf.

            More text.
            """
            def helper():
                return 1
            if level < 0:
                raise ValueError("level")
            return shelf.add(book)
        ''',
    )["store"]
    assert found.module == "shelves"
    assert found.header == "def store(book, shelf, *, level=3, name='top, left'):"
    assert found.signature == "store(book, shelf, *, level=3, name='top, left')"
    assert found.summary == "Put a book on a shelf."
    assert found.parameters == ("book", "shelf", "level", "name")
    assert found.required == ("book", "shelf")
    assert found.defaults == (("level", "3"), ("name", "'top, left'"))
    assert found.returned == "shelf.add(book)"
    assert found.raised == ("ValueError", "raise ValueError('level')")


def test_methods_leave_self_out_of_their_parameters_and_classes_name_their_base(tmp_path):
    found = definitions_of(
        tmp_path,
        """
        class Shelf(Furniture):
            def take(self, book, default=None):
                pass
            @property
            def height(self):
                return self._height
        class Plain(object): pass
        class Mixed(First, Second): pass
        """,
    )
    assert found["Shelf"].base == "Furniture"
    assert found["Shelf"].header == "class Shelf(Furniture):"
    assert (found["take"].owner, found["take"].parameters, found["take"].required) == (
        "Shelf",
        ("book", "default"),
        ("book",),
    )
    assert "height" not in found
    assert found["Plain"].base == found["Mixed"].base == ""


@pytest.mark.parametrize(
    "docstring",
    [
        "store(book) -> None",
        "store(book): put it away.",
        "Put a book on a shelf that",  # goes on in the next line
        "Put:",
        ">>> store(1)",
        "Put `book` on a shelf.",
        "A" + " long" * 30 + ".",
    ],
)
def test_a_first_line_that_is_no_sentence_is_no_summary(tmp_path, docstring):
    source = f'def store(book):\n    """{docstring}\n    is high.\n    """\n'
    assert definitions_of(tmp_path, source)["store"].summary == ""


def test_private_names_broken_files_and_applications_are_left_out(tmp_path):
    (tmp_path / "idlelib").mkdir()
    (tmp_path / "idlelib" / "window.py").write_text("def open_window(): pass")
    (tmp_path / "_private.py").write_text("def public_name(): pass")
    (tmp_path / "broken.py").write_text("def (")
    assert set(definitions_of(tmp_path, "def visible(): pass\ndef _hidden(): pass\n")) == {"visible"}


def test_an_interpreter_without_sources_is_named(tmp_path):
    read_definitions.cache_clear()
    with pytest.raises(ValueError, match="no standard library sources"):
        read_definitions(tmp_path)
