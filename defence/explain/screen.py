"""Screen: judge more images than one machine holds, on Ray Data.

Ray's workers hold one detector each. They read images from a folder or an object store, judge them,
and write the verdicts as Parquet as they go. Ray Data repeats the work of a lost worker and keeps a
list of what is written, so an interrupted run can be resumed.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.dataset
import ray
from pyarrow import fs
from ray.data.block import BlockMetadata
from ray.data.checkpoint import CheckpointConfig
from ray.data.datasource import Datasource, ReadTask

from defence.base.errors import InputError
from defence.base.files import hash_file, list_files, require_file
from defence.base.limits import DEFAULT_MAX_BYTES, Name, check_fits
from defence.base.process import unfinished_folders
from defence.base.progress import say
from defence.base.text import escape, first_line
from defence.explain import flagged
from defence.explain.streams import UNREAD, Stream
from defence.judge import onnx_file
from defence.judge.detector import Answers, Detector, describe_answers
from defence.load.images import IMAGE_FORMATS, decode_image, make_input
from defence.net.inference import map_in_parallel

ROOT = Path(__file__).resolve().parents[2]
BATCH = 100  # images that a worker judges together
READERS = 8  # images that it reads at a time: object stores answer late, but many requests at once
PART = (1_000, 10_000)  # images in a file of verdicts, at least and at most
PARTS = 1_000  # files of verdicts, within the bounds of PART
SHARE = 0.1  # of a processor, for the listing and the writing beside the workers
FILE = "detector.onnx"  # where a worker finds the detector, beside this code
DONE = "_done"  # in the folder of verdicts: Ray's list of what is written
DETECTOR = "_detector.json"  # in the folder of verdicts: which detector gave them
SCHEMA = pa.schema(
    {
        "path": pa.string(),
        "class": pa.int32(),
        "badnet_class": pa.int32(),
        "repaired_class": pa.int32(),
        "score": pa.float32(),
        "error": pa.string(),
    }
)
NAMED_SCHEMA = SCHEMA.append(pa.field("class_name", pa.string()))  # where classes have names


class Listing(Datasource):
    """Paths as a source of Ray Data, which gives rows with a "path"."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__()
        self.paths = paths

    def estimate_inmemory_data_size(self) -> int:
        return sum(map(len, self.paths))

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        size = min(max(len(self.paths) // PARTS, PART[0]), PART[1])
        starts = range(0, len(self.paths), size)
        return [self.make_task(self.paths[start : start + size]) for start in starts]

    @staticmethod
    def make_task(paths: list[str]) -> ReadTask:
        metadata = BlockMetadata(len(paths), sum(map(len, paths)), exec_stats=None)
        return ReadTask(lambda: [pa.table({"path": paths})], metadata)


class Worker:
    """A Ray actor, which opens the detector once and judges batch after batch of paths."""

    def __init__(
        self,
        threshold: float | None,
        filesystem: fs.FileSystem,
        max_bytes: int,
        formats: Sequence[str],
        class_names: list[str] | None,
    ) -> None:
        warnings.simplefilter("ignore")  # Pillow warns about metadata
        file = onnx_file.read_detector(Path(FILE), max_bytes, threads=1)
        self.detector = file.detector(threshold)
        self.filesystem, self.max_bytes, self.formats = filesystem, max_bytes, formats
        self.class_names = class_names

    def __call__(self, batch: pa.Table) -> pa.Table:
        paths = batch["path"].to_pylist()
        rows: list[dict] = [{"path": path} for path in paths]
        inputs, judged_rows = [], []
        for row, (image, error) in zip(rows, map_in_parallel(self.read, paths, READERS)):
            if error:
                row["error"] = error
            else:
                inputs.append(image)
                judged_rows.append(row)
        if inputs:
            answers = self.detector.judge(np.stack(inputs))
            verdicts = describe_answers(answers, self.detector.classes, self.class_names)
            for row, verdict in zip(judged_rows, verdicts):
                row |= verdict
        return pa.Table.from_pylist(rows, NAMED_SCHEMA if self.class_names else SCHEMA)

    def read(self, path: str) -> tuple[Any, str | None]:
        """Return an image as an input of the nets, and None; or None, and why it is unreadable."""
        shape = self.detector.shape
        try:
            return read_image(path, shape, self.filesystem, self.max_bytes, self.formats), None
        except (InputError, OSError) as error:
            return None, escape(first_line(error))


def read_image(
    path: str,
    shape: tuple[int, ...],
    filesystem: fs.FileSystem,
    max_bytes: int,
    formats: Sequence[str],
) -> np.ndarray:
    """Read an image on a pyarrow file system as an input of the nets.

    Raise InputError or OSError where it cannot be read.
    """
    if isinstance(filesystem, fs.LocalFileSystem):
        require_file(path)  # pyarrow would wait for what a pipe says
    with filesystem.open_input_file(path) as file:
        check_fits(path, "the file", file.size(), max_bytes)
        contents = io.BytesIO(file.read())
    return make_input(decode_image(contents, path, max_bytes, formats), shape)


def judge_on_ray(
    images: Sequence[Name],
    detector: Detector,
    output: Name,
    address: str | None = None,
    workers: int | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
    formats: Sequence[str] = IMAGE_FORMATS,
    class_names: list[str] | None = None,
) -> tuple[dict[str, int], list[flagged.Candidate]]:
    """Judge images with a detector's file, on Ray, and return what summarise_verdicts returns.

    images: folders or files, local or by a URI that pyarrow.fs knows (s3, gs, hdfs), all on one
    file system.
    output: a folder, or its URI, for the verdicts. Images with a verdict in it are skipped.
    address: of a Ray cluster; None starts Ray on this machine.  workers: at most.
    max_bytes: for an image or the detector.  formats: as for images.decode_image.
    Raise InputError where there are no images, or `output` contains something else.
    """
    detector.require_images()
    source, paths = list_images(images)
    facts: dict[str, Any] = {
        "detector": hash_file(detector.path),
        "threshold": detector.threshold,
    }
    if class_names:
        facts["class_names"] = class_names
    target, folder = open_verdicts(output, facts)
    with run_cluster(address, detector.path):
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = os.isatty(2)
        context.checkpoint_config = CheckpointConfig(
            "path",
            f"{folder}/{DONE}",
            delete_checkpoint_on_success=False,
            override_filesystem=target,
        )
        count = workers or int(ray.cluster_resources()["CPU"])
        listing = ray.data.read_datasource(Listing(paths), num_cpus=SHARE)
        verdicts = listing.map_batches(
            Worker,
            fn_constructor_args=(detector.threshold, source, max_bytes, formats, class_names),
            batch_size=BATCH,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=1, initial_size=count, max_size=count),
            num_cpus=1 - 2 * SHARE,
        )
        verdicts.write_parquet(folder, filesystem=target, ray_remote_args={"num_cpus": SHARE})
    return summarise_verdicts(target, folder, detector.classes)


def list_images(images: Sequence[Name]) -> tuple[fs.FileSystem, list[str]]:
    """List files, and all files in folders, at any depth. Return (file system, paths).

    Raise InputError where there are none, or they are on several file systems.
    """
    source: fs.FileSystem | None = None
    paths: set[str] = set()
    for name in images:
        filesystem, path = locate(name)
        if source not in (None, filesystem):
            raise InputError(f"{name}: is on another file system than {images[0]}")
        source = filesystem
        try:
            kind = filesystem.get_file_info(path).type
            if kind == fs.FileType.Directory and isinstance(filesystem, fs.LocalFileSystem):
                # pyarrow passes over what it cannot open, and follows links, even in a circle.
                with contextlib.suppress(InputError):  # it is empty
                    # Parquet holds no odd bytes: an image of such a name counts as unread.
                    names = (os.fsencode(file) for file in list_files([path]))
                    paths.update(name.decode("utf-8", "backslashreplace") for name in names)
            elif kind == fs.FileType.Directory:
                entries = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
                paths.update(entry.path for entry in entries if entry.type == fs.FileType.File)
            elif kind == fs.FileType.File:
                paths.add(path)
            else:
                raise InputError(f"{name}: no such file")
        except OSError as error:
            raise InputError(f"{name}: cannot be read: {first_line(error)}") from error
    if not paths:
        raise InputError(f"{images[0]}: no file in the folder")
    return source, sorted(paths)


def locate(path: Name) -> tuple[fs.FileSystem, str]:
    """Turn a path or a URI into (pyarrow file system, path there)."""
    try:
        if "://" in str(path):
            return fs.FileSystem.from_uri(str(path))
        return fs.LocalFileSystem(), os.path.abspath(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: unknown file system: {first_line(error)}") from error


def open_verdicts(output: Name, facts: dict[str, Any]) -> tuple[fs.FileSystem, str]:
    """Make the folder for verdicts, or resume in it. Return (pyarrow file system, path there).

    facts: what identifies the detector, as JSON can hold it.
    Raise InputError where the folder contains something else, or verdicts with other facts.
    """
    filesystem, folder = locate(output)
    try:
        filesystem.create_dir(folder)
        entries = filesystem.get_file_info(fs.FileSelector(folder))
        names = [entry.base_name for entry in entries]
        if DETECTOR in names:
            with filesystem.open_input_file(f"{folder}/{DETECTOR}") as file:
                if json.loads(file.read()) != facts:
                    raise InputError(
                        f"{output}: contains verdicts of another detector, threshold or names; "
                        "choose another folder"
                    )
        elif names:
            raise InputError(f"{output}: has other files in it; choose another folder")
        else:
            with filesystem.open_output_stream(f"{folder}/{DETECTOR}") as file:
                file.write(json.dumps(facts).encode())
    except (OSError, ValueError) as error:
        raise InputError(f"{output}: cannot be written: {first_line(error)}") from error
    return filesystem, folder


@contextlib.contextmanager
def run_cluster(address: str | None, path: Name) -> Iterator[None]:
    """Run Ray during a block, and give each worker this code and a detector's file, as FILE.

    address: as for judge_on_ray.  path: the detector's file.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would send them to its makers
    warnings.simplefilter("ignore")  # Ray warns about its own plans
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    say(f"connecting to Ray at {address}" if address else "starting Ray")
    if address:
        check_reachable(address)
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        folder = Path(name)
        unfinished_folders.add(folder)
        for code in ROOT.glob("defence/**/*.py"):
            copy = folder / code.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(code, copy)
        shutil.copy(path, folder / FILE)
        options: dict[str, Any] = {} if address else {"include_dashboard": False}
        try:
            ray.init(
                address or "local",
                runtime_env={"working_dir": name},
                logging_level=logging.CRITICAL,
                log_to_driver=False,
                **options,
            )
        except (ConnectionError, ValueError) as error:
            raise InputError(f"--ray-address {address}: {first_line(error)}") from error
        try:
            yield
        finally:
            processes = psutil.Process().children(recursive=True)
            ray.shutdown()
            end_processes(processes)
    unfinished_folders.discard(folder)


def end_processes(processes: Sequence[psutil.Process], seconds: float = 10) -> None:
    """Wait until processes have ended, and kill those that do not end in time.

    Ray gives its processes a second to end, which is too short on a busy machine.
    """
    for process in psutil.wait_procs(processes, seconds)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, seconds)


def check_reachable(address: str) -> None:
    """Raise InputError where nothing listens at an address; Ray would wait for minutes there."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host:
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, ValueError) as error:
            problem = f"--ray-address {address}: cannot be reached: {first_line(error)}"
            raise InputError(problem) from error


def summarise_verdicts(
    filesystem: fs.FileSystem, folder: str, classes: int
) -> tuple[dict[str, int], list[flagged.Candidate]]:
    """Count the verdicts in a folder. Return (counts, the candidates that stand out).

    counts: {"images", "poisoned", "unread"}.  classes: N.
    """
    rows = pa.dataset.dataset(folder, SCHEMA, "parquet", filesystem)
    unread, hits, unflagged = 0, *np.zeros((2, classes + 1), int)  # class 0 stands for NaN
    for batch in rows.to_batches(columns=["class", "badnet_class"]):
        verdicts, badnet = (column.fill_null(0).to_numpy() for column in batch.columns)
        unread += int(np.sum(verdicts == 0))
        clean = (verdicts > 0) & (verdicts <= classes)
        hits += np.bincount(badnet[verdicts > classes], minlength=classes + 1)
        unflagged += np.bincount(badnet[clean], minlength=classes + 1)
    poisoned = int(hits.sum())
    images = unread + poisoned + int(unflagged.sum())
    counts = {"images": images, "poisoned": poisoned, "unread": unread}
    candidates = flagged.find_candidates_in_counts(hits[1:], unflagged[1:])
    return counts, [candidate for candidate in candidates if candidate.stands_out]


def read_stream(
    images: Sequence[Name],
    detector: Detector,
    output: Name,
    max_bytes: int = DEFAULT_MAX_BYTES,
    formats: Sequence[str] = IMAGE_FORMATS,
) -> tuple[Stream, list[str]]:
    """Read the verdicts that judge_on_ray wrote. Return (the stream, errors).

    The arguments are as for judge_on_ray.
    errors: why images could not be read, the first UNREAD of them.
    """
    (source, _), (filesystem, folder) = locate(images[0]), locate(output)
    rows = pa.dataset.dataset(folder, SCHEMA, "parquet", filesystem)
    table = rows.to_table(["class", "badnet_class", "repaired_class", "score"])
    judged = np.flatnonzero(table["class"].is_valid())  # their paths stay on the disk
    verdicts, badnet, repaired, score = (
        column.fill_null(0).to_numpy()[judged] for column in table.itercolumns()
    )
    answers = Answers.from_columns(verdicts, badnet, repaired, score, detector.classes)

    def find_path(row: int) -> str:
        return rows.take([judged[row]], ["path"])["path"][0].as_py()

    def fetch(stream_rows: np.ndarray) -> np.ndarray:
        shape = detector.shape
        inputs = [
            read_image(find_path(row), shape, source, max_bytes, formats) for row in stream_rows
        ]
        return np.array(inputs, np.float32).reshape(-1, *shape)

    unread = rows.head(UNREAD, ["error"], filter=pa.dataset.field("class").is_null())
    stream = Stream(None, detector.shape, detector.classes, answers, fetch, find_path)
    return stream, unread["error"].to_pylist()
