"""Files, whatever is in them: found, compared, opened, and written whole or not at all."""

import contextlib
import csv
import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from defence.base.errors import InputError
from defence.base.process import unfinished_folders

STDOUT = "-"  # as the path of a text file to write


def require_file(path):
    """Return `path` as a Path. Raises InputError unless it is a file with something in it."""
    path = Path(path)
    if path.is_dir():
        if path.is_symlink():
            raise InputError(f"{path}: is a link to a folder, which is not followed")
        closed = "cannot be read: permission denied"
        raise InputError(
            f"{path}: {'is a folder, not a file' if os.access(path, os.R_OK | os.X_OK) else closed}"
        )
    if not path.exists():
        hint = "; a URI goes with --ray" if ":/" in str(path) else ""
        raise InputError(f"{path}: no such file{hint}")
    if path.is_file() and path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")
    if not path.is_file() or not os.access(path, os.R_OK):
        raise InputError(f"{path}: cannot be read")
    return path


def list_files(paths):
    """Replace each folder in `paths` by all that is in it, at any depth, by name. Returns Paths.

    A link to a folder is not followed, and what is no file is not left out either: both are listed,
    so that reading them fails. Raises InputError where a folder is empty.
    """
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(_walk(path))
            if not inside:
                raise InputError(f"{path}: no file in the folder")
            files += inside
        else:
            files.append(path)
    return files


def _walk(folder):
    """Yield the Path of each file in a folder, and of each folder that cannot be entered."""
    closed = []
    for place, folders, names in os.walk(folder, onerror=closed.append):
        links = (name for name in folders if os.path.islink(os.path.join(place, name)))
        yield from (Path(place, name) for name in (*names, *links))
    yield from (Path(error.filename) for error in closed)


def check_writable(outputs, inputs):
    """Raise InputError unless every output can be written, overwrites no input and no other output.

    outputs: {option: path or None}, such as {"--json": "out.json"}.  inputs: paths that are read.
    """
    if not any(outputs.values()):
        return  # before the inputs, of which there may be a million, are looked at
    taken = {Path(path).resolve(): "an input" for path in inputs}
    on_stdout = [option for option, path in outputs.items() if path == STDOUT]
    if len(on_stdout) > 1:
        raise InputError(f"{' and '.join(on_stdout)}: cannot both go to stdout")
    for option, path in outputs.items():
        if path in (None, STDOUT):
            continue
        path = Path(path)
        if not path.parent.is_dir():
            hint = "; choose another --output" if option == "--output" else ""
            raise InputError(f"{path}: there is no folder {path.parent}/ to write to{hint}")
        if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
            raise InputError(f"{path}: cannot be written")
        if path.is_relative_to("/dev") or (path.exists() and not path.is_file()):
            raise InputError(f"{path}: is no regular file; - stands for stdout")
        place = path.parent.resolve() / path.name  # a link there is replaced, not followed
        if other := taken.get(path.resolve()) or taken.get(place):
            raise InputError(f"{path}: would overwrite {other}; choose another {option}")
        taken[place] = f"what {option} writes"


@contextlib.contextmanager
def make_private_folder(near):
    """A new folder inside the folder `near` that nobody else can enter; deleted after the block."""
    folder = Path(tempfile.mkdtemp(prefix=".", suffix=".unfinished", dir=near))
    unfinished_folders.add(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        unfinished_folders.discard(folder)


@contextlib.contextmanager
def replace_file(path):
    """Give the name of a new file near `path`; if the block succeeds, move that file to `path`.

    Readers see the old file or the new one, never a part. It is written in a folder that nobody
    else can enter, so no one can put a link in its place; a link at `path` itself is replaced.
    """
    path = Path(path)
    try:
        with make_private_folder(path.parent) as folder:
            beside = folder / path.name
            yield beside
            with open(beside, "rb") as file:
                os.fsync(file.fileno())
            os.replace(beside, path)
    except OSError as error:  # such as a full disk, which names no file
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def open_output(path):
    """A text file to write to, which is to be at `path`; STDOUT stands for stdout."""
    if path == STDOUT:
        yield sys.stdout
        return
    how = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    with replace_file(path) as beside, open(beside, "w", **how) as file:
        yield file


def write_json(value, path):
    """Write `value` as indented JSON; path: as for opened_for. ValueError at NaN and infinity."""
    text = json.dumps(value, indent=1, allow_nan=False)
    with open_output(path) as file:
        file.write(text + "\n")


def write_csv(rows, path):
    """Write dicts of the same keys, at least one, as CSV (RFC 4180), the keys in the first line.

    rows: an iterable; one row is in memory at a time.  path: as for opened_for.
    """
    rows = iter(rows)
    first = next(rows)
    with open_output(path) as file:
        writer = csv.DictWriter(file, first)
        writer.writeheader()
        writer.writerow(first)
        writer.writerows(rows)


def fingerprint_file(path):
    """What tells whether a file was changed, or another put in its place, meanwhile."""
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns


def hash_file(path):
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
