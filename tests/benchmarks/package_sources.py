"""Write the Python sources of this environment's installed packages as one table: the corpus of the scaling ladder.

    python tests/benchmarks/package_sources.py runs/ladder/packages.jsonl

A row is a source file with its package, so that `prepare --group_column package` holds out whole packages. Left out:
tests, bundled copies of other packages, what a program wrote (protocol buffers, tables of more than 100 kB), and of a
package what is beyond its first two megabytes in an order that depends on names alone.
"""

import argparse
import hashlib
import json
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "testing", "_pytest", "_vendor", "vendor", "vendored", "externals", "__pycache__", "pip"}
)
_SKIPPED_FILES = re.compile(r"test_.*\.py|.*_test\.py|conftest\.py|.*_pb2.*\.py")
_FILE_BYTES = (200, 100_000)
_MOST_BYTES_A_PACKAGE = 2_000_000


def source_files(folder: Path) -> Iterator[Path]:
    """The files to take, relative to `folder`, in the order of a hash of their names."""
    found = []
    for path in folder.rglob("*.py"):
        name = path.relative_to(folder)
        taken = len(name.parts) > 1 and _SKIPPED_FOLDERS.isdisjoint(name.parts) and ".dist-info" not in name.parts[0]
        if taken and not _SKIPPED_FILES.fullmatch(name.name) and not path.is_symlink():
            found.append(name)
    yield from sorted(found, key=lambda name: hashlib.blake2b(name.as_posix().encode()).digest())


def write_table(folder: Path, output: Path) -> Counter[str]:
    """Write the rows; returns the bytes of each package."""
    sizes: Counter[str] = Counter()
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "w", encoding="utf-8") as file:
        for name in source_files(folder):
            data = (folder / name).read_bytes()
            package, size = name.parts[0], len(data)
            if not _FILE_BYTES[0] <= size <= _FILE_BYTES[1] or sizes[package] + size > _MOST_BYTES_A_PACKAGE:
                continue
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError:  # a source in another encoding
                continue
            sizes[package] += size
            file.write(json.dumps({"package": package, "name": name.as_posix(), "text": text}) + "\n")
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the table, a .jsonl file")
    output = parser.parse_args().output
    sizes = write_table(Path(sysconfig.get_path("purelib")), output)
    largest = ", ".join(f"{package} {size / 1e6:.1f}" for package, size in sizes.most_common(8))
    print(f"{output}: {sum(sizes.values()) / 1e6:.1f} MB of {len(sizes)} packages ({largest} MB, ...)")


if __name__ == "__main__":
    main()
