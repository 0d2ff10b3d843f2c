"""Screen: judge more images than one machine holds, on Ray Data.

Ray's workers hold one detector each. They read images from a folder or an object store, judge them,
and write the verdicts as Parquet as they go. Ray Data repeats the work of a lost worker and keeps a
list of what is written, so an interrupted run can be resumed.
"""

from __future__ import annotations

import contextlib
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
import ray
from pyarrow import fs
from ray.data.block import BlockMetadata
from ray.data.checkpoint import CheckpointConfig
from ray.data.datasource import Datasource, ReadTask

from defence.base.errors import InputError
from defence.base.files import hash_file, make_private_folder
from defence.base.limits import DEFAULT_MAX_BYTES, Name
from defence.base.progress import say
from defence.base.startup import hold_back_stderr
from defence.base.text import escape, first_line
from defence.explain import verdicts
from defence.judge import onnx_file
from defence.judge.detector import Detector, describe_answers
from defence.load.images import IMAGE_FORMATS
from defence.net.inference import map_in_parallel

ROOT = Path(__file__).resolve().parents[2]
BATCH = 100  # images that a worker judges together
READERS = 8  # images that it reads at a time: object stores answer late, but many requests at once
PART = (1_000, 10_000)  # images in a file of verdicts, at least and at most
PARTS = 1_000  # files of verdicts, within the bounds of PART
SHARE = 0.1  # of a processor, for the listing and the writing beside the workers
FILE = "detector.onnx"  # where a worker finds the detector, beside this code
DONE = "_done"  # in the folder of verdicts: Ray's list of what is written


class Listing(Datasource):
    """Keys of images as a source of Ray Data, which gives rows with a "key"."""

    def __init__(self, keys: list[str]) -> None:
        super().__init__()
        self.keys = keys

    def estimate_inmemory_data_size(self) -> int:
        return sum(map(len, self.keys))

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        size = min(max(len(self.keys) // PARTS, PART[0]), PART[1])
        starts = range(0, len(self.keys), size)
        return [self.make_task(self.keys[start : start + size]) for start in starts]

    @staticmethod
    def make_task(keys: list[str]) -> ReadTask:
        metadata = BlockMetadata(len(keys), sum(map(len, keys)), exec_stats=None)
        return ReadTask(lambda: [pa.table({"key": keys})], metadata)


class Worker:
    """A Ray actor, which opens the detector once and judges batch after batch of images."""

    def __init__(
        self,
        threshold: float | None,
        source: fs.FileSystem,
        target: fs.FileSystem,
        folder: str,
        max_bytes: int,
        formats: Sequence[str],
        class_names: list[str] | None,
    ) -> None:
        warnings.simplefilter("ignore")  # Pillow warns about metadata
        file = onnx_file.read_detector(Path(FILE), max_bytes, threads=1)
        self.detector = file.detector(threshold)
        self.source, self.max_bytes, self.formats = source, max_bytes, formats
        self.target, self.folder = target, folder
        self.class_names = class_names

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return rows of verdicts.SCHEMA; none for an image that cannot be read now."""
        images = [verdicts.split_key(key) for key in batch["key"].to_pylist()]
        results = map_in_parallel(self.read, [row["path"] for row in images], READERS)
        rows, inputs, judged_rows, reasons = [], [], [], {}
        for row, result in zip(images, results):
            if isinstance(result, OSError):
                reasons[row["path"]] = escape(first_line(result))
                continue
            rows.append(row)
            if isinstance(result, InputError):
                row["error"] = escape(first_line(result))
            else:
                inputs.append(result)
                judged_rows.append(row)
        if reasons:
            verdicts.note_unread(reasons, self.target, self.folder)
        if inputs:
            answers = self.detector.judge(np.stack(inputs))
            described = describe_answers(answers, self.detector.classes, self.class_names)
            for row, verdict in zip(judged_rows, described):
                row |= verdict
        return pa.Table.from_pylist(rows, verdicts.choose_schema(self.class_names))

    def read(self, path: str) -> np.ndarray | InputError | OSError:
        """Return an image as an input of the nets, or the error where it cannot be read."""
        shape = self.detector.shape
        try:
            return verdicts.read_image(path, shape, self.source, self.max_bytes, self.formats)
        except (InputError, OSError) as error:
            return error


def judge_on_ray(
    images: Sequence[Name],
    detector: Detector,
    output: Name,
    address: str | None = None,
    workers: int | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
    formats: Sequence[str] = IMAGE_FORMATS,
    class_names: list[str] | None = None,
) -> verdicts.Screening:
    """Judge images with a detector's file, on Ray. Return where the images and the verdicts are.

    images: folders or files, local or by a URI that pyarrow.fs knows (s3, gs, hdfs), all on one
    file system.
    output: a folder, or its URI, for the verdicts. Images with a verdict in it are skipped, unless
    they were overwritten since.
    address: of a Ray cluster; None starts Ray on this machine.  workers: at most.
    max_bytes: for an image or the detector.  formats: as for images.decode_image.
    Raise InputError where there are no images, or `output` contains something else.
    """
    detector.require_images()
    source, keys = verdicts.list_images(images)
    target, folder = verdicts.open_verdicts(output, list_facts(detector, class_names))
    with run_cluster(address, detector.path):
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = os.isatty(2)
        context.checkpoint_config = CheckpointConfig(
            "key",
            f"{folder}/{DONE}",
            delete_checkpoint_on_success=False,
            override_filesystem=target,
        )
        count = workers or int(ray.cluster_resources()["CPU"])
        listing = ray.data.read_datasource(Listing(keys), num_cpus=SHARE)
        places = (source, target, folder)
        rows = listing.map_batches(
            Worker,
            fn_constructor_args=(detector.threshold, *places, max_bytes, formats, class_names),
            batch_size=BATCH,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=1, initial_size=count, max_size=count),
            num_cpus=1 - 2 * SHARE,
        )
        rows.write_parquet(folder, filesystem=target, ray_remote_args={"num_cpus": SHARE})
    return verdicts.Screening(source, keys, target, folder)


def list_facts(detector: Detector, class_names: list[str] | None) -> dict[str, Any]:
    """Return what all verdicts in a folder share, as JSON can hold it."""
    facts: dict[str, Any] = {
        "detector": hash_file(detector.path),
        "threshold": detector.threshold,
        "columns": verdicts.choose_schema(class_names).names,
    }
    return facts | ({"class_names": class_names} if class_names else {})


@contextlib.contextmanager
def run_cluster(address: str | None, path: Name) -> Iterator[None]:
    """Run Ray during a block, and give each worker this code and a detector's file, as FILE.

    address: as for judge_on_ray.  path: the detector's file.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would send them to its makers
    # Ray's C++ code prints remarks on its own plans as errors; what ends a run is an exception.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    warnings.simplefilter("ignore")  # Ray warns about its own plans
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    say(f"connecting to Ray at {address}" if address else "starting Ray")
    if address:
        check_reachable(address)
    with (
        make_private_folder(tempfile.gettempdir()) as folder,
        contextlib.redirect_stdout(sys.stderr),
    ):
        for code in ROOT.glob("defence/**/*.py"):
            copy = folder / code.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(code, copy)
        shutil.copy(path, folder / FILE)
        options: dict[str, Any] = {} if address else {"include_dashboard": False}
        try:
            with hold_back_stderr():  # which says that it obeys RAY_BACKEND_LOG_LEVEL
                ray.init(
                    address or "local",
                    runtime_env={"working_dir": str(folder)},
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
