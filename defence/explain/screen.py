"""Screen: judge more pictures than one machine holds, on Ray Data.

Pictures are read from a folder or an object store, judged by workers that each hold one detector,
and the verdicts written as Parquet while it goes. Ray Data does again what a lost worker had under
way, and keeps a list of what is written, so that a run that was cut off can be resumed.
"""

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
from pathlib import Path

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
from defence.base.files import hash_file
from defence.base.limits import DEFAULT_MAX_BYTES, check_fits
from defence.base.process import unfinished_folders
from defence.base.progress import say
from defence.base.text import escape, first_line
from defence.explain import flagged, streams
from defence.judge import detector, onnx_file
from defence.load.images import IMAGE_FORMATS, decode_image, make_input
from defence.net.inference import map_in_parallel

ROOT = Path(__file__).resolve().parents[2]
BATCH = 100  # pictures that a worker judges together
READERS = 8  # of them that it reads at a time: an object store answers late, but many at once
PART = (1_000, 10_000)  # pictures in a file of verdicts, at least and at most
PARTS = 1_000  # files of verdicts, if that is possible
SHARE = 0.1  # of a processor, for what lists and writes beside the workers
FILE = "detector.onnx"  # where a worker finds it, beside this code
DONE = "_done"  # in the folder of verdicts: Ray's list of what is written
DETECTOR = "_detector.json"  # there: which detector it was
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
NAMED = SCHEMA.append(pa.field("class_name", pa.string()))  # where classes have names


class Listing(Datasource):
    """Paths as a source of Ray Data: [str, …] → rows of "path"."""

    def __init__(self, paths):
        super().__init__()
        self.paths = paths

    def estimate_inmemory_data_size(self):
        return sum(map(len, self.paths))

    def get_read_tasks(self, parallelism, *_, **__):
        size = min(max(len(self.paths) // PARTS, PART[0]), PART[1])
        starts = range(0, len(self.paths), size)
        return [self.task(self.paths[start : start + size]) for start in starts]

    @staticmethod
    def task(paths):
        known = BlockMetadata(len(paths), sum(map(len, paths)), exec_stats=None)
        return ReadTask(lambda: [pa.table({"path": paths})], known)


class Worker:
    """A Ray actor: a detector, opened once, that judges batch after batch of paths."""

    def __init__(self, threshold, filesystem, max_bytes, formats, class_names):
        warnings.simplefilter("ignore")  # of Pillow's about metadata
        self.detector = onnx_file.read_detector(FILE, max_bytes, threads=1).detector(threshold)
        self.filesystem, self.max_bytes, self.formats = filesystem, max_bytes, formats
        self.class_names = class_names

    def __call__(self, batch):
        paths = batch["path"].to_pylist()
        rows = [{"path": path} for path in paths]
        inputs, judged = [], []
        for row, (image, error) in zip(rows, map_in_parallel(self.read, paths, READERS)):
            if error:
                row["error"] = error
            else:
                inputs.append(image)
                judged.append(row)
        if inputs:
            answers = self.detector.judge(np.stack(inputs))
            said = detector.describe_answers(answers, self.detector.classes, self.class_names)
            for row, more in zip(judged, said):
                row |= more
        return pa.Table.from_pylist(rows, NAMED if self.class_names else SCHEMA)

    def read(self, path):
        """A picture as an input of the nets, and None; or None, and why it cannot be read."""
        try:
            how = self.filesystem, self.max_bytes, self.formats
            return read_image(path, self.detector.shape, *how), None
        except (InputError, OSError) as error:
            return None, escape(first_line(error))


def read_image(path, shape, filesystem, max_bytes, formats):
    """A picture on a pyarrow file system as an input of the nets. Raises InputError, OSError."""
    with filesystem.open_input_file(path) as file:
        check_fits(path, "the file", file.size(), max_bytes)
        contents = io.BytesIO(file.read())
    return make_input(decode_image(contents, path, max_bytes, formats), shape)


def judge_on_ray(
    pictures,
    found,
    output,
    address=None,
    workers=None,
    max_bytes=DEFAULT_MAX_BYTES,
    formats=IMAGE_FORMATS,
    class_names=None,
):
    """Judge pictures with a detector's file, on Ray. Returns what `summary` does.

    pictures: folders or pictures, local or by a URI that pyarrow.fs knows (s3, gs, hdfs), all on
    one file system.  found: the Detector of the file.
    output: a folder, or its URI, for the verdicts. What is in it already is not done again.
    address: of a Ray cluster; if None, Ray is started on this machine.  workers: at most.
    max_bytes: what a picture or the detector may take.  formats: as for utils.decode_picture.
    called: the classes' names, or None.
    Raises InputError where there are no pictures, or `output` contains something else.
    """
    found.require_images()
    filesystem, paths = list_images(pictures)
    facts = {"detector": hash_file(found.path), "threshold": found.threshold}
    facts |= {"class_names": class_names} if class_names else {}
    kept, folder = open_verdicts(output, facts)
    with run_cluster(address, found.path):
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = os.isatty(2)
        context.checkpoint_config = CheckpointConfig(
            "path", f"{folder}/{DONE}", delete_checkpoint_on_success=False, override_filesystem=kept
        )
        workers = workers or int(ray.cluster_resources()["CPU"])
        listed = ray.data.read_datasource(Listing(paths), num_cpus=SHARE)
        judged = listed.map_batches(
            Worker,
            fn_constructor_args=(found.threshold, filesystem, max_bytes, formats, class_names),
            batch_size=BATCH,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=1, initial_size=workers, max_size=workers),
            num_cpus=1 - 2 * SHARE,
        )
        judged.write_parquet(folder, filesystem=kept, ray_remote_args={"num_cpus": SHARE})
    return summarise_verdicts(kept, folder, found.classes)


def list_images(pictures):
    """All files in folders, at any depth, and files: (file system, [path, …]).

    Raises InputError where there are none, or they are on several file systems.
    """
    filesystem, paths = None, set()
    for each in pictures:
        where, path = locate(each)
        if filesystem not in (None, where):
            raise InputError(f"{each}: is on another file system than {pictures[0]}")
        filesystem = where
        try:
            found = where.get_file_info(path)
            if found.type == fs.FileType.Directory:
                inside = where.get_file_info(fs.FileSelector(path, recursive=True))
                paths.update(file.path for file in inside if file.type == fs.FileType.File)
            elif found.type == fs.FileType.File:
                paths.add(path)
            else:
                raise InputError(f"{each}: no such file")
        except OSError as error:
            raise InputError(f"{each}: cannot be read: {first_line(error)}") from error
    if not paths:
        raise InputError(f"{pictures[0]}: no file in the folder")
    return filesystem, sorted(paths)


def locate(path):
    """A path, or a URI, as (pyarrow file system, path there)."""
    try:
        if "://" in str(path):
            return fs.FileSystem.from_uri(str(path))
        return fs.LocalFileSystem(), os.path.abspath(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: unknown file system: {first_line(error)}") from error


def open_verdicts(output, facts):
    """Make the folder for verdicts, or resume in it. Returns (pyarrow file system, path there).

    facts: a dict that JSON can hold, of the detector.
    Raises InputError where the folder contains something else, or verdicts with other facts.
    """
    filesystem, folder = locate(output)
    try:
        filesystem.create_dir(folder)
        inside = filesystem.get_file_info(fs.FileSelector(folder))
        names = [file.base_name for file in inside]
        if DETECTOR in names:
            with filesystem.open_input_file(f"{folder}/{DETECTOR}") as file:
                if json.loads(file.read()) != facts:
                    raise InputError(
                        f"{output}: contains verdicts of another detector, threshold or names"
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
def run_cluster(address, path):
    """A block in which Ray runs, and each worker has this code and a detector's file as FILE.

    address: as for `screen`.  path: of the detector's file.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would be sent over the network
    warnings.simplefilter("ignore")  # of Ray's about its own plans
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    say(f"connecting to Ray at {address}" if address else "starting Ray")
    if address:
        check_reachable(address)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        unfinished_folders.add(folder)
        for code in ROOT.glob("defence/**/*.py"):
            copy = Path(folder, code.relative_to(ROOT))
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(code, copy)
        shutil.copy(path, Path(folder, FILE))
        try:
            ray.init(
                address or "local",
                runtime_env={"working_dir": folder},
                logging_level=logging.CRITICAL,
                log_to_driver=False,
                **({} if address else {"include_dashboard": False}),
            )
        except (ConnectionError, ValueError) as error:
            raise InputError(f"--ray-address {address}: {first_line(error)}") from error
        try:
            yield
        finally:
            started = psutil.Process().children(recursive=True)
            ray.shutdown()
            end_processes(started)
    unfinished_folders.discard(folder)


def end_processes(processes, seconds=10):
    """End what does not end by itself: Ray gives its own a second to do so, on a busy machine less.

    processes: of psutil.
    """
    for each in psutil.wait_procs(processes, seconds)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(processes, seconds)


def check_reachable(address):
    """Raise InputError where nothing listens at an address, on which Ray would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host:
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, ValueError) as error:
            problem = f"--ray-address {address}: cannot be reached: {first_line(error)}"
            raise InputError(problem) from error


def summarise_verdicts(filesystem, folder, classes):
    """Count the verdicts in a folder. Returns (counts, the candidates that stand out).

    counts: a dict of "images", "poisoned", "unread".  classes: N.
    """
    rows = pa.dataset.dataset(folder, SCHEMA, "parquet", filesystem)
    unread, hits, others = 0, *np.zeros((2, classes + 1), int)  # class 0 stands for NaN
    for batch in rows.to_batches(columns=["class", "badnet_class"]):
        verdicts, badnet = (column.fill_null(0).to_numpy() for column in batch.columns)
        unread += int(np.sum(verdicts == 0))
        clean = (verdicts > 0) & (verdicts <= classes)
        hits += np.bincount(badnet[verdicts > classes], minlength=classes + 1)
        others += np.bincount(badnet[clean], minlength=classes + 1)
    poisoned = int(hits.sum())
    images = unread + poisoned + int(others.sum())
    counts = {"images": images, "poisoned": poisoned, "unread": unread}
    candidates = flagged.find_candidates_in_counts(hits[1:], others[1:])
    return counts, [candidate for candidate in candidates if candidate.stands_out]


def read_stream(images, judge, output, max_bytes=DEFAULT_MAX_BYTES, formats=IMAGE_FORMATS):
    """Read the verdicts that `judge_on_ray` wrote. Returns (Stream, [error, …]).

    The arguments are those of judge_on_ray.
    errors: why images could not be read, the first streams.UNREAD of them.
    """
    (source, _), (filesystem, folder) = locate(images[0]), locate(output)
    rows = pa.dataset.dataset(folder, SCHEMA, "parquet", filesystem)
    table = rows.to_table(["class", "badnet_class", "repaired_class", "score"])
    judged = np.flatnonzero(table["class"].is_valid())  # their paths stay on the disk
    columns = (column.fill_null(0).to_numpy()[judged] for column in table)
    answers = detector.Answers.from_columns(*columns, judge.classes)

    def find_name(row):
        return rows.take([judged[row]], ["path"])["path"][0].as_py()

    def fetch(chosen):
        how = judge.shape, source, max_bytes, formats
        images = [read_image(find_name(row), *how) for row in chosen]
        return np.array(images, np.float32).reshape(-1, *judge.shape)

    unread = rows.head(streams.UNREAD, ["error"], filter=pa.dataset.field("class").is_null())
    stream = streams.Stream(None, judge.shape, judge.classes, answers, fetch, find_name)
    return stream, unread["error"].to_pylist()
