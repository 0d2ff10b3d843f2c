"""A detector as one ONNX file, and back: images in, verdicts out, without TensorFlow."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from defence.base import pixels
from defence.base.errors import InputError
from defence.base.files import read_file, replace_file
from defence.base.limits import BATCH_VALUES, DEFAULT_MAX_BYTES, OUTPUT_VALUES, release_memory
from defence.base.startup import count_processors, import_onnxruntime
from defence.base.text import first_line
from defence.judge import detector, exports
from defence.judge.record import RepairRecord, no_threshold_error, parse_record
from defence.load import guard_onnx

if TYPE_CHECKING:
    from defence.load.models import ModelFile

RUN_PACKAGES, EXPORT_PACKAGES = ("onnx", "onnxruntime"), ("onnx", "onnxruntime", "tf2onnx")
OPSET = 18  # the latest that tf2onnx 1.17 writes
TRIALS, MIN_TRIALS = 64, 4  # images of noise on which a new file must answer as the nets do
TOLERANCE = 1e-3  # of its anomaly scores
MAX_CLASSES = 10**6

Run = Callable[[np.ndarray], dict[str, np.ndarray]]


class FractionalPixels(InputError):
    """Pixels that are not whole numbers, which a detector's file does not take."""


class OldScore(InputError):
    """A detector's file of an older version, with another anomaly score."""


@dataclasses.dataclass
class DetectorFile:
    """An open detector's file.

    run: float32 (n, height, width, channels), whole numbers 0..255 → {name: array (n,)}, the
    outputs that `write_detector` describes.
    shape: (height, width, channels).  classes: N.  threshold: as for detector.is_flagged.
    made_of: (SHA-256 of B, of G, input scale).  record: G's, or None.
    """

    path: Path
    run: Run
    shape: tuple[int, ...]
    classes: int
    threshold: float | None
    made_of: tuple[str, str, str]
    record: RepairRecord | None

    def detector(self, threshold: float | None) -> detector.Detector:
        """Return the file's Detector, with a threshold that may differ from the file's."""

        def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            outputs = self.run(images)  # in which classes count from 1, and 0 stands for NaN
            for name in ("badnet_class", "repaired_class"):
                if not 0 <= outputs[name].min() <= outputs[name].max() <= self.classes:
                    raise InputError(f"{self.path}: answers with a class outside 1..{self.classes}")
            return outputs["badnet_class"] - 1, outputs["repaired_class"] - 1, outputs["score"]

        sha256 = dict(zip(("badnet", "repaired"), self.made_of))
        facts = {}
        if self.record:
            facts = self.record.list_facts(self.classes, threshold, self.path)
        return detector.Detector(
            run, self.classes, self.shape, threshold, self.path, sha256, **facts
        )

    def made_from(self, badnet: ModelFile) -> bool:
        """Return whether the file's record says that G was made from this B, for this file."""
        if self.record is None:
            return False
        source = self.record.badnet["sha256"], self.record.input_scale
        return source == (badnet.sha256, self.made_of[2])

    def find_threshold(self, rate: float) -> float:
        """Return the threshold for a false-positive rate. Raise InputError as RepairRecord does."""
        if self.record is None:
            raise no_threshold_error(self.path)
        return self.record.threshold(rate, self.path)


def default_detector_path(repaired_path: str | PathLike) -> Path:
    """Return where the detector's file is written and looked for: beside G, with B's name."""
    path = Path(repaired_path)
    return path.with_name(f"{path.stem.removesuffix('_defence')}_detector.onnx")


def require_packages(*names: str, packages: str = "requirements.txt") -> None:
    """Raise InputError unless modules are installed.

    packages: the file that lists what to install.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"{name} is not installed; install it: pip install -r {packages}")


# -------------------------------------------------------------------------------------- writing


def write_detector(
    model: Any, metadata: dict[str, str], path: Path, max_bytes: int = DEFAULT_MAX_BYTES
) -> DetectorFile:
    """Write a detector as an ONNX file, check it against Keras, list it, and return it.

    model: from detector.build_detector.  metadata: badnet_sha256, repaired_sha256, classes,
    threshold (empty where disagreement counts), input_scale, score (its name), repair_record
    (JSON).
    The file maps "pixels", uint8 (n, height, width, channels), to "class", int32 (n,), the verdict;
    "badnet_class" and "repaired_class", int32 (n,), 1..N, 0 where the net gave NaN; and "score",
    float32 (n,).
    Raise InputError where a layer cannot be exported, or the file does not answer as the nets do.
    """
    function = _add_verdict(model, int(metadata["classes"]), metadata["threshold"])
    shape = model.input_shape[1:]
    count = max(MIN_TRIALS, min(TRIALS, BATCH_VALUES // math.prod(shape)))
    noise = np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)
    expected = {name: np.asarray(values) for name, values in function(noise).items()}
    problem = f"{path}: cannot be made from these nets"
    with replace_file(path) as beside:
        try:
            with _collect_often():
                contents = _convert_to_onnx(function, metadata)
            beside.write_bytes(contents)
            file = read_detector(beside, max_bytes)
            outputs = file.run(noise.astype(np.float32))
        except OSError:  # such as a full disk
            raise
        except Exception as error:  # tf2onnx raises whatever its parts raise
            reason = first_line(error).removeprefix(f"{beside}: ")
            raise InputError(f"{problem}: {reason}") from error
        for name, values in outputs.items():
            tolerance = (
                TOLERANCE if name == "score" else 0
            )  # a thousandth of a class may be a class
            if not np.allclose(values, expected[name], rtol=tolerance, atol=tolerance):
                raise InputError(f"{problem}: its {name} differs from theirs")
    exports.add_export(contents)
    return dataclasses.replace(file, path=path)


def _add_verdict(model: Any, classes: int, threshold: str) -> Any:
    """Turn a detector's Keras model into a TensorFlow function.

    It maps uint8 pixels to the outputs that `write_detector` describes.
    """
    import tensorflow as tf

    limit = float(threshold) if threshold else None
    pixels = tf.TensorSpec((None, *model.input_shape[1:]), tf.uint8, name="pixels")

    @tf.function(input_signature=[pixels], autograph=False)
    def run(pixels: Any) -> dict[str, Any]:
        badnet, repaired, score = model(tf.cast(pixels, tf.float32), training=False)
        flagged = detector.is_flagged(badnet, repaired, score, limit)
        return {
            "class": detector.compute_verdict(badnet, flagged, classes, tf.where),
            "badnet_class": badnet + 1,
            "repaired_class": repaired + 1,
            "score": score,
        }

    return run


@contextlib.contextmanager
def _collect_often() -> Iterator[None]:
    """Collect the block's garbage soon, and visit no older object for it.

    tf2onnx copies the whole graph, with its weights, before each of two dozen optimisations. The
    graphs refer to themselves, so a copy stays until it is collected, usually at the end.
    """
    usual = gc.get_threshold()
    release_memory()
    gc.freeze()
    gc.set_threshold(usual[0], 2, 1)
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        release_memory()


def _convert_to_onnx(run: Any, metadata: dict[str, str]) -> bytes:
    """Return a TensorFlow function of one input as an ONNX file's contents.

    Keras's own export calls tf2onnx too, but tracks every object of the model first, which takes
    longer than everything else.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's about tf2onnx
        import_onnxruntime()  # before tf2onnx may
        import onnx
        import tf2onnx

        logging.getLogger("tf2onnx").setLevel(logging.CRITICAL)  # its failures are noticed
        model, _ = tf2onnx.convert.from_function(run, run.input_signature, opset=OPSET)
    onnx.helper.set_model_props(model, metadata)
    return model.SerializeToString(deterministic=True)


# -------------------------------------------------------------------------------------- reading


def read_detector(
    path: Path, max_bytes: int = DEFAULT_MAX_BYTES, threads: int | None = None
) -> DetectorFile:
    """Open a detector's ONNX file, whoever made it.

    Return and raise what files.read_file and open_detector do.
    """
    return open_detector(read_file(path, max_bytes), path, max_bytes, threads)


def open_detector(
    contents: bytes, path: Path, max_bytes: int = DEFAULT_MAX_BYTES, threads: int | None = None
) -> DetectorFile:
    """Open the contents of a detector's ONNX file.

    max_bytes: as for guard_onnx.check_onnx.
    threads: by default half the processors, since two batches are judged at a time.
    Raise InputError where the file is damaged or contains what the guards do not allow, OldScore
    where another version wrote it.
    """
    require_packages(*RUN_PACKAGES)
    graph = guard_onnx.check_onnx(contents, path, max_bytes)
    facts = read_metadata(graph.metadata, path)
    run = _open_session(contents, path, graph, threads or max(1, count_processors() // 2))
    return DetectorFile(path, run, graph.shape, **facts)


def _open_session(contents: bytes, path: Path, graph: guard_onnx.CheckedGraph, threads: int) -> Run:
    """Return the function that an ONNX file is, for DetectorFile.run.

    ONNX Runtime fills other numbers of channels than those of graph.in_blocks up to whole blocks,
    so a plain layout is faster for these. Where the channels fill the blocks, it is slower.
    """
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if not graph.in_blocks:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    try:
        session = onnxruntime.InferenceSession(
            contents, options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # it raises whatever its parts raise
        raise InputError(f"{path}: ONNX Runtime cannot open it: {first_line(error)}") from error
    name, names = session.get_inputs()[0].name, list(guard_onnx.OUTPUTS)
    max_images = max(1, OUTPUT_VALUES // graph.largest)

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        pixels = images.astype(np.uint8)
        if not np.array_equal(pixels, images):
            raise FractionalPixels(
                f"{path}: takes only whole-number pixels, and an image has fractional ones"
            )
        parts = []
        for start in range(0, len(pixels), max_images):
            part = pixels[start : start + max_images]
            graph.check_batch(len(part))
            try:
                parts.append(session.run(names, {name: part}))
            except Exception as error:  # it raises whatever its parts raise
                raise InputError(f"{path}: cannot judge: {first_line(error)}") from error
        return dict(zip(names, map(np.concatenate, zip(*parts))))

    return run


def read_metadata(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    """Return the metadata of a detector's file as fields of DetectorFile.

    Raise InputError where they are damaged, OldScore where the file computes another score.
    """
    names = {detector.name_score(hardened) for hardened in (False, True)}
    if "classes" in metadata and metadata.get("score") not in names:
        raise OldScore(
            f"{path}: computes an older version of the anomaly score; export the detector again"
        )
    try:
        classes, text = int(metadata["classes"]), metadata["threshold"]
        threshold = float(text) if text else None
        made_of = tuple(
            metadata[name] for name in ("badnet_sha256", "repaired_sha256", "input_scale")
        )
        record_text = metadata["repair_record"]
        damaged = not 2 <= classes <= MAX_CLASSES or made_of[2] not in pixels.SCALES
        damaged |= threshold is not None and not 0 <= threshold <= detector.MAX_SCORE
    except (KeyError, ValueError):
        damaged = True
    if damaged:
        raise InputError(f"{path}: its metadata are damaged; export the detector again")
    record = parse_record(record_text, path)
    return {"classes": classes, "threshold": threshold, "made_of": made_of, "record": record}
