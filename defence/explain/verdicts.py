"""Verdicts: the folder that screen.py fills, and the images that are given to it.

Both may be on any file system that pyarrow knows. A verdict is about an image's contents, not its
path. So a row has a key: the path, the size and the time of the last change. An image that was
overwritten has another key, and is judged again. An image that cannot be read now, though its
contents may be fine, gets no row; it is noted beside the rows until the next run tries it again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
from pyarrow import fs

from defence.base.errors import InputError
from defence.base.files import list_files, require_file
from defence.base.limits import DEFAULT_MAX_BYTES, Name, check_fits
from defence.base.progress import say, warn
from defence.base.text import first_line, format_count
from defence.explain import flagged
from defence.explain.streams import UNREAD, Stream
from defence.judge.detector import Answers, Detector
from defence.load.images import IMAGE_FORMATS, decode_image, make_input

DETECTOR = "_detector.json"  # in the folder: which detector gave the verdicts
NOTES = "_unread"  # in the folder: why the last run could not read images that it will try again
WAITS = (0.2, 2)  # seconds before an image that could not be read is read again
SCHEMA = pa.schema(
    {
        "path": pa.string(),
        "class": pa.int32(),
        "badnet_class": pa.int32(),
        "repaired_class": pa.int32(),
        "score": pa.float32(),
        "error": pa.string(),
        "size": pa.int64(),
        "modified": pa.timestamp("us", "UTC"),
        "key": pa.string(),
    }
)
NAMED_SCHEMA = SCHEMA.append(pa.field("class_name", pa.string()))


@dataclasses.dataclass
class Screening:
    """Images to judge, and the folder for their verdicts.

    source: the file system of the images.  keys: theirs, ascending.
    target, folder: the file system of the verdicts, and the path there.
    """

    source: fs.FileSystem
    keys: list[str]
    target: fs.FileSystem
    folder: str

    def open_rows(self) -> Any:
        """Open the rows in the folder as a pyarrow Dataset, whatever images they are about."""
        return pa.dataset.dataset(self.folder, SCHEMA, "parquet", self.target)


def choose_schema(class_names: list[str] | None) -> pa.Schema:
    """Return the columns of the rows, which depend on whether the classes have names."""
    return NAMED_SCHEMA if class_names else SCHEMA


# -------------------------------------------------------------------------------------- images


def list_images(images: Sequence[Name]) -> tuple[fs.FileSystem, list[str]]:
    """List files, and all files in folders, at any depth. Return (file system, keys).

    Raise InputError where there are none, or they are on several file systems.
    """
    source: fs.FileSystem | None = None
    keys: set[str] = set()
    for name in images:
        filesystem, path = locate(name)
        if source not in (None, filesystem):
            raise InputError(f"{name}: is on another file system than {images[0]}")
        source = filesystem
        try:
            info = filesystem.get_file_info(path)
            if info.type == fs.FileType.Directory and isinstance(filesystem, fs.LocalFileSystem):
                keys.update(map(make_key, filesystem.get_file_info(list_folder(path))))
            elif info.type == fs.FileType.Directory:
                entries = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
                keys.update(make_key(entry) for entry in entries if entry.type == fs.FileType.File)
            elif info.type == fs.FileType.File:
                keys.add(make_key(info))
            else:
                raise InputError(f"{name}: no such file")
        except (OSError, ValueError) as error:  # ValueError: a name of odd bytes
            raise InputError(f"{name}: cannot be read: {first_line(error)}") from error
    if not keys:
        raise InputError(f"{images[0]}: no file in the folder")
    return source, sorted(keys)


def list_folder(path: str) -> list[str]:
    """List the files in a local folder. It may be empty.

    pyarrow would pass over what it cannot open, and follow links, even in a circle. Parquet holds
    no odd bytes, so an image of such a name counts as unread.
    """
    with contextlib.suppress(InputError):  # it is empty
        names = map(os.fsencode, list_files([path]))
        return [name.decode("utf-8", "backslashreplace") for name in names]
    return []


def locate(path: Name) -> tuple[fs.FileSystem, str]:
    """Turn a path or a URI into (pyarrow file system, path there)."""
    try:
        if "://" in str(path):
            return fs.FileSystem.from_uri(str(path))
        return fs.LocalFileSystem(), os.path.abspath(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: unknown file system: {first_line(error)}") from error


def make_key(info: fs.FileInfo) -> str:
    """Return what identifies a file and its contents: path, size, nanoseconds of its last change.

    A file system may not know the last two.
    """
    return f"{info.path}|{info.size}|{info.mtime_ns}"


def split_key(key: str) -> dict[str, Any]:
    """Return the columns of a row that its key tells."""
    path, *numbers = key.rsplit("|", 2)
    size, changed = (None if number == "None" else int(number) for number in numbers)
    modified = None if changed is None else changed // 1000
    return {"path": path, "size": size, "modified": modified, "key": key}


def read_image(
    path: str,
    shape: tuple[int, ...],
    filesystem: fs.FileSystem,
    max_bytes: int,
    formats: Sequence[str],
) -> np.ndarray:
    """Read an image on a pyarrow file system as an input of the nets.

    Raise InputError where its contents are wrong, so that reading them again does not help, and
    OSError where it cannot be read now.
    """
    local = isinstance(filesystem, fs.LocalFileSystem)
    if local and os.path.lexists(path) and not os.path.isfile(path):
        require_file(path)  # pyarrow would wait for what a pipe says
    contents = read_contents(path, filesystem, max_bytes)
    try:
        image = decode_image(contents, path, max_bytes, formats)
    except InputError as error:
        cause = error.__cause__
        if isinstance(cause, MemoryError) or getattr(cause, "errno", None):  # not about the image
            raise OSError(f"{path}: {first_line(cause)}") from error
        raise
    return make_input(image, shape)


def read_contents(path: str, filesystem: fs.FileSystem, max_bytes: int) -> bytes:
    """Read a file, again after WAITS where that fails. Raise as read_image does."""

    def read_once() -> bytes:
        with filesystem.open_input_file(path) as file:
            check_fits(path, "the file", file.size(), max_bytes)
            return file.read()

    for wait in WAITS:
        try:
            return read_once()
        except (FileNotFoundError, PermissionError):  # which waiting does not mend
            raise
        except OSError:
            time.sleep(wait)
    return read_once()


# -------------------------------------------------------------------------------------- folder


def open_verdicts(output: Name, facts: dict[str, Any]) -> tuple[fs.FileSystem, str]:
    """Make the folder for verdicts, or resume in it. Return (pyarrow file system, path there).

    facts: what all verdicts in the folder share, as JSON can hold it.
    Raise InputError where the folder contains something else, or verdicts with other facts.
    """
    filesystem, folder = locate(output)
    try:
        filesystem.create_dir(folder)
        entries = filesystem.get_file_info(fs.FileSelector(folder))
        names = [entry.base_name for entry in entries]
        if DETECTOR in names:
            check_facts(read_facts(filesystem, f"{folder}/{DETECTOR}"), facts, output)
        elif names:
            raise InputError(f"{output}: has other files in it; choose another folder")
        else:
            with filesystem.open_output_stream(f"{folder}/{DETECTOR}") as file:
                file.write(json.dumps(facts).encode())
        filesystem.delete_dir_contents(f"{folder}/{NOTES}", missing_dir_ok=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{output}: cannot be written: {first_line(error)}") from error
    return filesystem, folder


def read_facts(filesystem: fs.FileSystem, path: str) -> Any:
    """Return the facts in a folder's file. Raise InputError where they are damaged."""
    with filesystem.open_input_file(path) as file:
        try:
            return json.loads(file.read())
        except ValueError as error:
            raise InputError(
                f"{path}: is damaged; choose another folder for the verdicts"
            ) from error


def check_facts(stored: Any, facts: dict[str, Any], output: Name) -> None:
    """Raise InputError where the facts that a folder holds are not those of this run."""
    if isinstance(stored, dict) and "columns" not in stored:
        raise InputError(
            f"{output}: contains verdicts of an older version, which do not tell an image from one "
            "that was overwritten; choose another folder"
        )
    if stored != facts:
        raise InputError(
            f"{output}: contains verdicts of another detector, threshold or names; "
            "choose another folder"
        )


def note_unread(reasons: dict[str, str], filesystem: fs.FileSystem, folder: str) -> None:
    """Note in the folder of verdicts why images cannot be read now. reasons: {path: why}."""
    with contextlib.suppress(OSError):  # then only their number is known
        filesystem.create_dir(f"{folder}/{NOTES}")
        with filesystem.open_output_stream(f"{folder}/{NOTES}/{uuid.uuid4()}.json") as file:
            file.write(json.dumps(reasons).encode())


def read_notes(screening: Screening, most: int) -> list[str]:
    """Return up to `most` of the reasons that were noted."""
    selector = fs.FileSelector(f"{screening.folder}/{NOTES}", allow_not_found=True)
    reasons: list[str] = []
    for entry in screening.target.get_file_info(selector):
        with contextlib.suppress(OSError, ValueError):  # a killed worker leaves a part of a note
            if len(reasons) < most:
                with screening.target.open_input_file(entry.path) as file:
                    reasons += json.loads(file.read()).values()
    return reasons[:most]


def find_given(keys: Any, wanted: set[str]) -> np.ndarray:
    """Return which rows are about wanted images, bool (n,), and remove these images from `wanted`.

    keys: of the rows, a pyarrow Array (n,).
    """
    given = np.zeros(len(keys), bool)
    for row, key in enumerate(keys.to_pylist()):
        if key in wanted:
            wanted.remove(key)
            given[row] = True
    return given


def summarise_verdicts(
    screening: Screening, classes: int
) -> tuple[dict[str, int], list[flagged.Candidate]]:
    """Count the verdicts on the images. Return (counts, the candidates).

    counts: {"images", "poisoned", "unread"}, and how many of the unread have no row, "untold", and
    how many rows in the folder are about other images or other contents, "others".  classes: N.
    """
    wanted, others = set(screening.keys), 0
    unread, hits, unflagged = 0, *np.zeros((2, classes + 1), int)  # class 0 stands for NaN
    for batch in screening.open_rows().to_batches(columns=["class", "badnet_class", "key"]):
        given = find_given(batch["key"], wanted)
        others += len(given) - int(given.sum())
        verdicts, badnet = (
            batch[name].fill_null(0).to_numpy()[given] for name in ("class", "badnet_class")
        )
        unread += int(np.sum(verdicts == 0))
        clean = (verdicts > 0) & (verdicts <= classes)
        hits += np.bincount(badnet[verdicts > classes], minlength=classes + 1)
        unflagged += np.bincount(badnet[clean], minlength=classes + 1)
    counts = {
        "images": len(screening.keys),
        "poisoned": int(hits.sum()),
        "unread": unread + len(wanted),
        "untold": len(wanted),
        "others": others,
    }
    return counts, flagged.find_candidates_in_counts(hits[1:], unflagged[1:])


def say_rest(screening: Screening, counts: dict[str, int]) -> None:
    """Say which images have no verdict yet, and that the folder has other verdicts.

    counts: as summarise_verdicts returns them.
    """
    if counts["untold"]:
        reasons = read_notes(screening, 1) or ["the reason was not noted"]
        warn(
            f"{format_count(counts['untold'], 'image')} could not be read for now, such as: "
            f"{reasons[0]}; all reasons are in {screening.folder}/{NOTES}; the same command tries "
            "again"
        )
    if counts["others"]:
        say(
            f"{screening.folder} has {format_count(counts['others'], 'more verdict')}: on other "
            "images, or on what these held before they were overwritten"
        )


def read_stream(
    screening: Screening,
    detector: Detector,
    max_bytes: int = DEFAULT_MAX_BYTES,
    formats: Sequence[str] = IMAGE_FORMATS,
) -> tuple[Stream, list[str]]:
    """Read the verdicts on the images. Return (the stream, errors).

    The arguments are as for screen.judge_on_ray.
    errors: why images could not be read, the first UNREAD of them.
    """
    rows, wanted = screening.open_rows(), set(screening.keys)
    keys = (batch["key"] for batch in rows.to_batches(columns=["key"]))  # they stay on the disk
    given = np.concatenate([np.zeros(0, bool), *(find_given(part, wanted) for part in keys)])
    table = rows.to_table(["class", "badnet_class", "repaired_class", "score"])
    has_class = table["class"].is_valid().to_numpy()
    judged, unread = np.flatnonzero(given & has_class), np.flatnonzero(given & ~has_class)
    verdicts, badnet, repaired, score = (
        column.fill_null(0).to_numpy()[judged] for column in table.itercolumns()
    )
    answers = Answers.from_columns(verdicts, badnet, repaired, score, detector.classes)

    def find_path(row: int) -> str:
        return rows.take([judged[row]], ["path"])["path"][0].as_py()

    def fetch(stream_rows: np.ndarray) -> np.ndarray:
        shape = detector.shape
        inputs = [
            read_image(find_path(row), shape, screening.source, max_bytes, formats)
            for row in stream_rows
        ]
        return np.array(inputs, np.float32).reshape(-1, *shape)

    errors = read_notes(screening, UNREAD) if wanted else []
    errors += rows.take(unread[: UNREAD - len(errors)], ["error"])["error"].to_pylist()
    stream = Stream(None, detector.shape, detector.classes, answers, fetch, find_path)
    return stream, errors
