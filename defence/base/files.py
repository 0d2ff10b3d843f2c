"""Files of any content: list, check, hash them, and write each whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from defence.base.errors import InputError
from defence.base.limits import Name, check_fits
from defence.base.process import saved_files, unfinished_folders
from defence.base.text import escape

STDOUT = "-"  # as the path of a text file to write
# A spreadsheet runs a cell of a CSV as a formula where it begins with one of these, or with its
# wide form.
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
PATHS = {"path", "dataset", "error"}  # columns whose texts begin with a path


def require_file(path: Name) -> Path:
    """Return `path` as a Path. Raise InputError unless it is a readable file that is not empty."""
    path = Path(path)
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a NUL
        hint = "; a URI goes with --ray" if ":/" in str(path) else ""
        raise InputError(f"{path}: no such file{hint}") from error
    except OSError as error:  # such as a link to itself, or a name that is too long
        raise InputError(f"{path}: cannot be read: {describe_reason(error)}") from error
    if stat.S_ISDIR(status.st_mode):
        if path.is_symlink():
            raise InputError(f"{path}: is a link to a folder, which is not followed")
        if not os.access(path, os.R_OK | os.X_OK):
            raise InputError(f"{path}: cannot be read: permission denied")
        raise InputError(f"{path}: is a folder, not a file")
    if not stat.S_ISREG(status.st_mode) or not os.access(path, os.R_OK):
        raise InputError(f"{path}: cannot be read")
    if status.st_size == 0:
        raise InputError(f"{path}: the file is empty")
    return path


def read_file(path: Name, max_bytes: int) -> bytes:
    """Read a file. Raise InputError where it cannot be read, or is larger than `max_bytes`."""
    path = require_file(path)
    check_fits(path, "the file", path.stat().st_size, max_bytes)
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {describe_reason(error)}") from error


def describe_reason(error: OSError) -> str:
    """Return why the system refused, in small letters: "permission denied"."""
    return (error.strerror or "the system refuses").lower()


def list_files(paths: Iterable[Name]) -> list[Path]:
    """Replace each folder in `paths` by all files in it, at any depth, sorted by name.

    A link to a folder is listed, not followed, and so is anything that is not a file: reading it
    fails.  Raise InputError where a folder is empty.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if os.path.isdir(path):  # Path.is_dir raises an OSError where a name is too long
            contents = sorted(_walk(path))
            if not contents:
                raise InputError(f"{path}: no file in the folder")
            files += contents
        else:
            files.append(path)
    return files


def _walk(folder: Path) -> Iterator[Path]:
    """Yield each file in a folder, each link to a folder, and each folder that is not readable."""
    errors: list[OSError] = []
    for place, folders, names in os.walk(folder, onerror=errors.append):
        links = (name for name in folders if os.path.islink(os.path.join(place, name)))
        yield from (Path(place, name) for name in (*names, *links))
    yield from (Path(error.filename) for error in errors)


def check_writable(outputs: Mapping[str, Name | None], inputs: Iterable[Name]) -> None:
    """Raise InputError unless every output can be written, overwrites no input and no other output.

    outputs: {option: path or None}, such as {"--json": "out.json"}.  inputs: paths that are read.
    """
    if not any(outputs.values()):
        return  # here, because there may be a million inputs to resolve
    # Path.resolve raises a RuntimeError at a link to itself, before Python 3.13.
    owners = {os.path.realpath(path): "an input" for path in inputs}
    on_stdout = [option for option, path in outputs.items() if path == STDOUT]
    if len(on_stdout) > 1:
        raise InputError(f"{' and '.join(on_stdout)}: cannot both go to stdout")
    for option, path in outputs.items():
        if path is None or path == STDOUT:
            continue
        path = Path(path)
        _check_place(option, path)
        # A link there is replaced, not followed.
        place = os.path.join(os.path.realpath(path.parent), path.name)
        if owner := owners.get(os.path.realpath(path)) or owners.get(place):
            raise InputError(f"{path}: would overwrite {owner}; choose another {option}")
        owners[place] = f"the output of {option}"


def _check_place(option: str, path: Path) -> None:
    """Raise InputError unless a file can be written at `path`, the value of an option."""
    if not os.path.isdir(path.parent):
        hint = "; make it" + (", or choose another --output" if option == "--output" else "")
        raise InputError(f"{path}: there is no folder {path.parent}/ to write to{hint}")
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {describe_reason(error)}") from error
    device = path.is_relative_to("/dev") and not path.is_relative_to("/dev/shm")
    odd = os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
    if device or odd:
        raise InputError(f"{path}: is not a regular file; - stands for stdout")
    if os.path.isdir(path) or not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"{path}: cannot be written")


@contextlib.contextmanager
def make_private_folder(parent: Name) -> Iterator[Path]:
    """Make a folder in `parent` that no other user can enter, and delete it after the block."""
    folder = Path(tempfile.mkdtemp(prefix=".", suffix=".unfinished", dir=parent))
    unfinished_folders.add(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        unfinished_folders.discard(folder)


@contextlib.contextmanager
def replace_file(path: Name) -> Iterator[Path]:
    """Yield a path for the block to write to; if the block succeeds, move that file to `path`.

    Readers see the old file or the new one, never a part. The block writes in a folder that no
    other user can enter, so nobody can put a link there. A link at `path` itself is replaced.
    """
    path = Path(path)
    try:
        with make_private_folder(path.parent) as folder:
            unfinished = folder / path.name
            yield unfinished
            with open(unfinished, "rb") as file:
                os.fsync(file.fileno())
            os.replace(unfinished, path)
            saved_files[path] = None
    except OSError as error:  # such as a full disk, whose message names no file
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def open_output(path: Name) -> Iterator[TextIO]:
    """Open a text file that appears at `path` after the block; STDOUT stands for stdout."""
    if path == STDOUT:
        yield sys.stdout
        return
    with (
        replace_file(path) as unfinished,
        open(unfinished, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        yield file


def write_json(value: Any, path: Name) -> None:
    """Write `value` as indented JSON. Raise ValueError at NaN and infinity.

    path: as for open_output.
    """
    text = json.dumps(value, indent=1, allow_nan=False)
    with open_output(path) as file:
        file.write(text + "\n")


def write_csv(rows: Iterable[dict[str, Any]], path: Name) -> None:
    """Write rows with the same keys as CSV (RFC 4180), with the keys in the first line.

    rows: at least one; only one is in memory at a time.  path: as for open_output.
    A text that a spreadsheet would run as a formula gets ./ in front where it is a path, which
    stays the same path, and ' elsewhere. On a terminal control characters are escaped.
    """
    on_terminal = path == STDOUT and sys.stdout.isatty()
    rows = (_make_harmless(row, on_terminal) for row in rows)
    first = next(rows)
    with open_output(path) as file:
        writer = csv.DictWriter(file, first)
        writer.writeheader()
        writer.writerow(first)
        writer.writerows(rows)


def _make_harmless(row: dict[str, Any], on_terminal: bool) -> dict[str, Any]:
    """Return a row of a CSV with its texts changed as `write_csv` says."""
    row = dict(row)
    for name, value in row.items():
        if isinstance(value, str):
            if value.startswith(FORMULA) and not _is_number(value):
                value = ("./" if name in PATHS else "'") + value
            row[name] = escape(value) if on_terminal else value
    return row


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def fingerprint_file(path: Name) -> tuple[int, int, int]:
    """Return numbers that differ once the file is changed or replaced by another."""
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


def hash_file(path: Name) -> str:
    """Return the SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
