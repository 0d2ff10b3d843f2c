"""Names of classes: of a dataset's folders, or a text file with a name on each line.

Both are in the order of the labels. A repaired net's record carries them on: see judge/record.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from defence.base import files
from defence.base.errors import InputError
from defence.base.limits import Name, check_fits
from defence.base.progress import say
from defence.base.text import format_count

FILE = "labels.txt"
NAME_LENGTH = 1_000  # characters, which are printed with every verdict
LINE_SIZE, COPIES = 100, 4  # bytes of a line in memory besides its text, and copies of the text


def find_class_names(
    model: Name,
    path: Name | None,
    classes: int,
    max_bytes: int,
    known: Sequence[str] | None = None,
) -> list[str] | None:
    """Return the names of a net's classes, or None where there are none.

    model: the net's path.  path: the file of names, of --labels; None for the known names, or else
    labels.txt beside the net. Neither counts where it does not have a name for each class.
    classes: N.  known: of the folders of the dataset, or of G's record.
    Raise InputError where the file at `path` cannot be read, or has another number of lines.
    """
    if path is None and known and len(known) == classes:
        return list(known)
    file = Path(model).with_name(FILE) if path is None else Path(path)
    if path is None and not (file.is_file() and file.stat().st_size):
        return None
    try:
        names = read_class_names(file, max_bytes)
    except InputError as error:
        if path is not None:
            raise
        say(f"{error}; not used")  # nobody named the file, and it may belong to something else
        return None
    if len(names) == classes:
        return names
    problem = f"{file}: has {format_count(len(names), 'name')}, but the net has {classes} classes"
    if path is not None:
        raise InputError(problem)
    if abs(len(names) - classes) == 1:  # a slip; otherwise it is the file of another net
        say(f"{problem}; not used")
    return None


def read_class_names(path: Path, max_bytes: int) -> list[str]:
    """Return the lines of a UTF-8 text file. Raise InputError where it is unreadable or large."""
    files.require_file(path)
    try:
        check_fits(path, "its names", COPIES * path.stat().st_size, max_bytes)
        contents = path.read_bytes().replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        size = COPIES * len(contents) + LINE_SIZE * contents.count(b"\n")
        check_fits(path, "its names", size, max_bytes)
        lines = contents.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"{path}: {files.describe_reason(error)}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not text in UTF-8") from error
    names = [line.strip() for line in (lines[:-1] if lines[-1] == "" else lines)]
    for number, name in enumerate(names, 1):
        if len(name) > NAME_LENGTH:
            raise InputError(f"{path}: line {number} has more than {NAME_LENGTH:,} characters")
    return names


def is_name(value: object) -> bool:
    """Return whether a value from an untrusted file can be a class's name."""
    if not isinstance(value, str) or len(value) > NAME_LENGTH:
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)  # not in UTF-8


def make_plain(name: str) -> str:
    """Return the name of a folder as text that every file can hold, with odd bytes as \\udcff."""
    return name.encode("utf-8", "backslashreplace").decode()


def name_class(verdict: int, names: Sequence[str]) -> str:
    """Return the name of a printed class, 1 to N + 1; the last is "poisoned"."""
    return [*names, "poisoned"][verdict - 1]
