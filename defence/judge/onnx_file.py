"""A detector as one ONNX file, and back: pictures in, verdicts out, no TensorFlow needed."""

import dataclasses
import importlib.util
import logging
import math
import warnings
from pathlib import Path

import numpy as np

from defence.base import pixels
from defence.base.errors import InputError
from defence.base.files import replace_file, require_file
from defence.base.limits import BATCH_VALUES, DEFAULT_MAX_BYTES, OUTPUT_VALUES, check_fits
from defence.base.startup import count_processors, import_onnxruntime
from defence.base.text import first_line
from defence.judge import detector, record
from defence.load import guard_onnx

RUN_PACKAGES, EXPORT_PACKAGES = ("onnx", "onnxruntime"), ("onnx", "onnxruntime", "tf2onnx")
OPSET = 18  # the latest that tf2onnx 1.17 writes
TRIALS, LEAST_TRIALS = 64, 4  # images of noise on which a new file must answer as the nets do
MOST_CLASSES = 10**6


class NotWhole(InputError):
    """Pixels that are no whole numbers, which a detector's file does not take."""


@dataclasses.dataclass
class DetectorFile:
    """An open detector's file.

    run: float32 (n, height, width, channels), whole numbers 0..255 → {name: array (n,)}, the
    outputs that `write` describes.
    shape: (height, width, channels).  classes: N.  threshold: as for detector.is_flagged.
    made_of: (SHA-256 of B, of G, input scale).  record: G's RepairRecord, or None.
    """

    path: Path
    run: object
    shape: tuple
    classes: int
    threshold: float
    made_of: tuple
    record: record.RepairRecord

    def detector(self, threshold):
        """The Detector of the file, with a threshold that may differ from the file's."""

        def run(images):
            found = self.run(images)
            return found["badnet_class"] - 1, found["repaired_class"] - 1, found["score"]

        sha256 = dict(zip(("badnet", "repaired"), self.made_of))
        known = threshold is not None and self.record is not None
        held_out = self.record.held_out(self.path) if known else None
        data = self.record and self.record.data
        facts = self.classes, self.shape, threshold, self.path, sha256, held_out, data
        return detector.Detector(run, *facts)

    def made_from(self, badnet):
        """Whether the record is of a G that was made of this B, a ModelFile, and of this file."""
        made = self.record and (self.record.badnet["sha256"], self.record.input_scale)
        return made == (badnet.sha256, self.made_of[2])

    def find_threshold(self, rate):
        """The threshold for a false-positive rate. Raises InputError as RepairRecord does."""
        if self.record is None:
            raise record.no_threshold_error(self.path)
        return self.record.threshold(rate, self.path)


def default_detector_path(repaired_path):
    """Where the detector's file is put, and looked for: beside G, whose name it has."""
    path = Path(repaired_path)
    return path.with_name(f"{path.stem.removesuffix('_defence')}_detector.onnx")


def require_packages(*names, packages="requirements.txt"):
    """Raise InputError unless modules are installed.

    packages: the file that lists what to install.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"{name} is not installed; install it: pip install -r {packages}")


# -------------------------------------------------------------------------------------- writing


def write_detector(model, metadata, path, max_bytes=DEFAULT_MAX_BYTES):
    """Write a detector as an ONNX file, check it beside Keras, and return it as a DetectorFile.

    model: as detector.build gives it.  metadata: {name: text}: badnet_sha256, repaired_sha256,
    classes, threshold (empty where disagreement counts), input_scale, repair_record (JSON).
    The file maps "pixels", uint8 (n, height, width, channels), to "class", int32 (n,), the verdict;
    "badnet_class" and "repaired_class", int32 (n,), 1..N, 0 where the net gave NaN; and "score",
    float32 (n,).
    Raises InputError where a layer cannot be exported, or the file does not answer as the nets do.
    """
    whole = _add_verdict(model, int(metadata["classes"]), metadata["threshold"])
    shape = model.input_shape[1:]
    count = max(LEAST_TRIALS, min(TRIALS, BATCH_VALUES // math.prod(shape)))
    noise = np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)
    wanted = {name: np.asarray(values) for name, values in whole(noise).items()}
    problem = f"{path}: cannot be made of these nets"
    with replace_file(path) as beside:
        try:
            beside.write_bytes(_convert_to_onnx(whole, metadata))
            file = read_detector(beside, max_bytes)
            found = file.run(np.float32(noise))
        except OSError:  # such as a full disk
            raise
        except Exception as error:  # tf2onnx raises whatever its parts raise
            why = first_line(error).removeprefix(f"{beside}: ")
            raise InputError(f"{problem}: {why}") from error
        for name, values in found.items():
            if not np.allclose(values, wanted[name], rtol=1e-3, atol=1e-3):
                raise InputError(f"{problem}: its {name} differs from theirs")
    return dataclasses.replace(file, path=path)


def _add_verdict(model, classes, threshold):
    """A detector's Keras model as a TensorFlow function: uint8 pixels → the outputs of `write`."""
    import tensorflow as tf

    threshold = float(threshold) if threshold else None
    pixels = tf.TensorSpec((None, *model.input_shape[1:]), tf.uint8, name="pixels")

    @tf.function(input_signature=[pixels], autograph=False)
    def run(pixels):
        badnet, repaired, score = model(tf.cast(pixels, tf.float32), training=False)
        flagged = detector.is_flagged(badnet, repaired, score, threshold)
        return {
            "class": detector.compute_verdict(badnet, flagged, classes, tf.where),
            "badnet_class": badnet + 1,
            "repaired_class": repaired + 1,
            "score": score,
        }

    return run


def _convert_to_onnx(run, metadata):
    """A TensorFlow function of one input as an ONNX file's contents.

    Keras's own export calls tf2onnx too, but tracks every object of the model first, which takes
    longer than all the rest.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy's about tf2onnx
        import_onnxruntime()  # before tf2onnx may
        import onnx
        import tf2onnx

        logging.getLogger("tf2onnx").setLevel(logging.CRITICAL)  # its failures are noticed
        written, _ = tf2onnx.convert.from_function(run, run.input_signature, opset=OPSET)
    onnx.helper.set_model_props(written, metadata)
    return written.SerializeToString(deterministic=True)


# -------------------------------------------------------------------------------------- reading


def read_detector(path, max_bytes=DEFAULT_MAX_BYTES, threads=None):
    """Open a detector's ONNX file. Returns a DetectorFile.

    max_bytes: as for guard_onnx.check_onnx.
    threads: of processors; half of them if None, since two batches are judged at a time.
    Raises InputError where the file is damaged or contains what the guards do not allow.
    """
    require_packages(*RUN_PACKAGES)
    path = require_file(path)
    check_fits(path, "the file", path.stat().st_size, max_bytes)
    contents = path.read_bytes()
    shape, largest, in_blocks, metadata = guard_onnx.check_onnx(contents, path, max_bytes)
    facts = read_metadata(metadata, path)
    threads = threads or max(1, count_processors() // 2)
    most = max(1, OUTPUT_VALUES // largest)
    run = _open_session(contents, path, most, threads, in_blocks)
    return DetectorFile(path, run, shape, **facts)


def _open_session(contents, path, most, threads, in_blocks):
    """The function that an ONNX file is, for at most so many images at a time: DetectorFile.run.

    in_blocks: as guard_onnx.check_onnx returns it. Channels in other numbers are filled up in
    blocks, so that a plain layout is faster; where they fill the blocks, it is slower.
    """
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if not in_blocks:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    try:
        session = onnxruntime.InferenceSession(
            contents, options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # it raises whatever its parts raise
        raise InputError(f"{path}: ONNX Runtime cannot open it: {first_line(error)}") from error
    name, names = session.get_inputs()[0].name, list(guard_onnx.OUTPUTS)

    def run(images):
        pixels = images.astype(np.uint8)
        if not np.array_equal(pixels, images):
            raise NotWhole(f"{path}: takes whole-number pixels, and an image has others")
        starts = range(0, len(pixels), most)
        parts = [session.run(names, {name: pixels[i : i + most]}) for i in starts]
        return dict(zip(names, map(np.concatenate, zip(*parts))))

    return run


def read_metadata(metadata, path):
    """The metadata of a detector's file, {name: text}, as DetectorFile has them.

    Raises InputError where they are damaged.
    """
    try:
        classes, threshold = int(metadata["classes"]), metadata["threshold"]
        threshold = float(threshold) if threshold else None
        made_of = tuple(metadata[n] for n in ("badnet_sha256", "repaired_sha256", "input_scale"))
        text = metadata["repair_record"]
        damaged = not 2 <= classes <= MOST_CLASSES or made_of[2] not in pixels.SCALES
        damaged |= threshold is not None and not 0 <= threshold <= detector.MOST
    except (KeyError, ValueError):
        damaged = True
    if damaged:
        raise InputError(f"{path}: its metadata are damaged; export the detector again")
    found = record.parse_record(text, path)
    return {"classes": classes, "threshold": threshold, "made_of": made_of, "record": found}
