"""The detector: B, G and all between pixels and verdict as one function.

Keras runs it from the two files of B and G, or ONNX Runtime from one file that `export` makes of
them, which needs no TensorFlow. Both give the same answers.
"""

import dataclasses
import importlib.util
import json
import logging
import math
import warnings
from pathlib import Path

import numpy as np

import guard
import metrics
import nets
import utils
from terminal import InputError, one_line, say

ENGINES = ("keras", "onnx")
RUNS, EXPORTS = ("onnx", "onnxruntime"), ("onnx", "onnxruntime", "tf2onnx")
OPSET = 18  # the latest that tf2onnx 1.17 writes
TRIALS = 64  # images of noise on which a new file must answer as the nets do


@dataclasses.dataclass
class Detector:
    """B and G as one function: float32 (n, height, width, channels), 0..255 → metrics.Answers.

    judge: those images → arrays or tensors (n,), as nets.judge describes them.
    classes: N.  shape: (height, width, channels).
    limit: flag an image whose score is above it; where None, one on which the nets disagree.
    """

    judge: object
    classes: int
    shape: tuple
    limit: float = None

    def __call__(self, images):
        said = {name: np.asarray(values) for name, values in self.judge(images).items()}
        of_b, of_g = said["badnet_class"] - 1, said["repaired_class"] - 1
        flagged = of_b != of_g if self.limit is None else said["score"] > self.limit
        return metrics.Answers(of_b, of_g, said["score"], flagged | (of_b < 0) | (of_g < 0))


def verdict(answers, classes):
    """What is printed: N + 1, "poisoned", for what is flagged, else B's class, 1..N.

    answers: metrics.Answers.  classes: N.  Without --fpr an image is flagged where the nets
    disagree, so this is the class of both.  Source: report, section 2, last paragraph.
    """
    return np.where(answers.flagged, classes + 1, answers.badnet + 1)


def rows(answers, classes):
    """Yield what is written about each image, a dict; classes and verdict as printed, from 1."""
    for b, g, score, said in zip(
        answers.badnet.tolist(),
        answers.repaired.tolist(),
        answers.score.tolist(),
        verdict(answers, classes).tolist(),
    ):
        b, g = (each + 1 if each >= 0 else None for each in (b, g))
        yield {"badnet_class": b, "repaired_class": g, "verdict": said, "score": score}


def find_models(model, repaired=None):
    """The paths of B and G, for a name in models/ or a path, or of a detector's .onnx file alone.

    G stands where repair.py puts it: in models/, as NAME_defence.h5.
    Raises InputError where one is missing.
    """
    path = Path(model)
    if path.suffix == ".onnx":
        if repaired:
            raise InputError(f"--repaired: {path} holds both nets")
        return [utils.require_file(path)]
    if path.suffix not in utils.MODEL_SUFFIXES:
        named = [utils.MODELS / f"{model}{suffix}" for suffix in utils.MODEL_SUFFIXES]
        path = next((p for p in named if p.exists()), named[0])
    utils.require_file(path)
    if repaired is None:
        repaired = utils.default_output(path)
        if not repaired.exists():
            raise InputError(
                f"{repaired}: no repaired net; make it with: python repair.py {path} CLEAN_DATA.h5"
            )
    return [path, utils.require_file(repaired)]


def require_pictures(judge, path):
    """Raise InputError unless a Detector takes what a picture can be made: grey or RGB.

    path: of the net, for the message.
    """
    if judge.shape[2] not in (1, 3):
        raise InputError(f"{path}: takes images of {judge.shape[2]} channels, not pictures")


def load(paths, memory=utils.MEMORY, engine=None, fpr=None, scale=None, force=False):
    """The Detector of B and G, or of an .onnx file alone.

    paths: as find_models returns them.  memory: bytes, as for utils.load_badnet.
    engine: of ENGINES; ONNX where there is a file and what runs it, if None.
    fpr, scale, force: as for `terms`.  Raises InputError as `terms`, load_nets and open_file do.
    """
    if len(paths) == 1:
        (path,) = paths
        if engine == "keras" or scale or force:
            raise InputError(f"{path}: goes without --engine keras, --scale and --force")
        judge, shape, facts = open_file(path, memory)
        limit = facts["threshold"]
        if fpr is not None:
            limit = held_out_threshold(facts["repair_record"], fpr, path)
        return Detector(judge, facts["classes"], shape, limit)
    scale, layer, limit = terms(*paths, fpr, scale, force)
    if engine != "keras" and (found := matching_file(*paths, scale, memory, engine)):
        judge, shape, facts = found
        return Detector(judge, facts["classes"], shape, limit)
    judge, classes = load_nets(*paths, scale, layer, memory)

    def run(images):
        # Compiling takes longer than running one image layer by layer.
        return judge(images, training=False) if len(images) == 1 else nets.compiled(judge)(images)

    return Detector(run, classes, judge.input_shape[1:], limit)


def terms(badnet_path, repaired_path, fpr=None, scale=None, force=False):
    """What G's repair record says of its use: (scale, layer name or None, threshold or None).

    fpr: above 0, at most 1, the false-positive rate that the threshold stands for; None for none.
    scale: a key of utils.SCALES, for a G without a record.  force: take a G of another B.
    Raises InputError where the record is of another B or scale, or has no threshold for `fpr`.
    """
    record = utils.read_record(repaired_path)
    layer = None
    if record is None:
        scale = scale or next(iter(utils.SCALES))
        say(f"{repaired_path}: no repair record; taking pixels {scale} (see --scale)")
    else:
        if record["badnet"]["sha256"] != utils.sha256(badnet_path):
            problem = (
                f"{repaired_path}: was made from another BadNet ({record['badnet']['file']}), not "
                f"from {badnet_path}"
            )
            if not force:
                raise InputError(f"{problem}; repair this one with repair.py, or --force")
            say(f"warning: {problem}; judging all the same")
        if scale not in (None, record["input_scale"]):
            raise InputError(f"--scale: {repaired_path} was made for {record['input_scale']}")
        scale, layer = record["input_scale"], record["layer"]
    limit = None
    if fpr is not None:
        limit = held_out_threshold(record, fpr, repaired_path)
    return scale, layer, limit


def held_out_threshold(record, rate, path):
    """The threshold of the score that flagged this share of the held-out clean images, 0..1.

    record: G's repair record, or None.  rate: above 0, at most 1.
    Raises InputError where no images were held out, or too few for the rate.
    """
    held_out = (record or {}).get("holdout")
    if held_out is None:
        raise InputError(
            f"{path}: --fpr needs clean images that the repair has not seen, and none were held "
            "out; repair the BadNet anew with: repair.py --holdout 0.1"
        )
    try:
        images, thresholds = held_out["images"], np.float64(held_out["thresholds"])
        damaged = held_out["score"] != nets.SCORE or not images >= 1
        damaged |= thresholds.shape != (metrics.THRESHOLDS + 1,)
        damaged |= not np.all((thresholds >= 0) & (thresholds <= nets.SCORE_MOST))
    except (KeyError, TypeError, ValueError):
        damaged = True
    if damaged:
        raise InputError(
            f"{path}: its repair record is damaged or of another version; repair the BadNet anew"
        )
    least = max(1 / images, 1 / metrics.THRESHOLDS)
    if rate < least:
        raise InputError(
            f"{path}: --fpr {rate:g}: can be {math.ceil(1e4 * least) / 1e4:g} or more, since "
            f"{images} clean images were held out"
        )
    return float(thresholds[math.floor(rate * metrics.THRESHOLDS + 1e-9)])


# --------------------------------------------------------------------------------------- Keras


def load_nets(badnet_path, repaired_path, scale, layer, memory=utils.MEMORY):
    """Load B and G as one Keras model. Returns (what nets.judge gives, N).

    scale, layer: as `terms` gives them.  memory: bytes, as for utils.load_badnet.
    Raises InputError where G does not belong to B.
    """
    for path in (badnet_path, repaired_path):  # before the seconds that the import takes
        utils.inspect_model(path, memory)
    badnet, repaired = (utils.load_badnet(path, memory) for path in (badnet_path, repaired_path))
    for what, ours, theirs in (
        ("images", badnet.input_shape[1:], repaired.input_shape[1:]),
        ("classes", badnet.output_shape[1:], repaired.output_shape[1:]),
    ):
        if ours != theirs:
            raise InputError(
                f"{repaired_path}: does not belong to {badnet_path}: it has {what} "
                f"{'×'.join(map(str, theirs))}, not {'×'.join(map(str, ours))}"
            )
    return nets.judge(badnet, repaired, scale, layer), badnet.output_shape[1]


# ---------------------------------------------------------------------------------------- ONNX


def file_path(badnet_path):
    """Where the detector's file of a BadNet is put, and looked for."""
    return utils.MODELS / f"{Path(badnet_path).stem}_detector.onnx"


def require(*names, packages="requirements-serve.txt"):
    """Raise InputError unless modules are installed that not every user has.

    packages: the file that lists what to install.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"{name} is not installed; install it: pip install -r {packages}")


def export(badnet_path, repaired_path, path, memory=utils.MEMORY, **how):
    """Write the detector of B and G as an ONNX file: pictures in, verdicts out.

    It maps "pixels", uint8 (n, height, width, channels), to what nets.judge gives and to "class",
    int32 (n,): N + 1 for what is flagged, else B's class, 1..N. Its metadata are texts: both nets'
    SHA-256, classes, threshold (empty where the nets' disagreement counts), input_scale, and
    repair_record, as JSON.
    memory: bytes, as for utils.load_badnet.  how: arguments of `terms`.
    Raises InputError as `terms` and load_nets do, and where a layer cannot be exported.
    """
    require(*EXPORTS)
    scale, layer, limit = terms(badnet_path, repaired_path, **how)
    judge, classes = load_nets(badnet_path, repaired_path, scale, layer, memory)
    keras = utils.import_keras()
    import onnx
    import tensorflow as tf

    def verdict(said):
        of_b, of_g = said["badnet_class"], said["repaired_class"]
        flagged = of_b != of_g if limit is None else said["score"] > limit
        trusted = ~flagged & (of_b > 0) & (of_g > 0)
        return {"class": tf.where(trusted, of_b, classes + 1), **said}

    pixels = keras.Input(judge.input_shape[1:], name="pixels", dtype="uint8")
    images = keras.layers.Lambda(lambda x: tf.cast(x, tf.float32), name="as-float")(pixels)
    whole = keras.Model(pixels, keras.layers.Lambda(verdict, name="verdict")(judge(images)))
    noise = np.random.default_rng(0).integers(0, 256, (TRIALS, *judge.input_shape[1:]), np.uint8)
    wanted = {name: np.asarray(values) for name, values in whole(noise).items()}
    facts = {
        "badnet_sha256": utils.sha256(badnet_path),
        "repaired_sha256": utils.sha256(repaired_path),
        "classes": str(classes),
        "threshold": "" if limit is None else repr(limit),
        "input_scale": scale,
        "repair_record": json.dumps(utils.read_record(repaired_path)),
    }
    logging.getLogger("tf2onnx").setLevel(logging.CRITICAL)  # what it cannot do is found out below
    with utils.replacing(path) as beside:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of Keras's about NumPy
                whole.export(beside, format="onnx", verbose=False, opset_version=OPSET)
            model = onnx.load(beside)
            onnx.helper.set_model_props(model, facts)
            onnx.save(model, beside)
            found = open_file(beside, memory)[0](np.float32(noise))
        except Exception as error:  # tf2onnx raises whatever its parts raise
            why = one_line(error).removeprefix(f"{beside}: ")
            raise InputError(f"{path}: cannot be made of these nets: {why}") from error
        for name, values in found.items():
            if not np.allclose(values, wanted[name], rtol=1e-3, atol=1e-3):
                raise InputError(f"{path}: cannot be made of these nets: its {name} is not theirs")


def matching_file(badnet_path, repaired_path, scale, memory=utils.MEMORY, engine=None):
    """What open_file gives for the file of B and G, or None where Keras is to judge.

    scale: that the nets are used with.  memory, engine: as for `load`.
    Raises InputError where `engine` is "onnx" and there is no such file.
    """
    path = file_path(badnet_path)
    try:
        require(*RUNS)
        if not path.exists():
            raise InputError(f"{path}: no such file; make it with: eval_defence.py --export NAME")
    except InputError:
        if engine == "onnx":
            raise
        return None
    found = open_file(path, memory)
    ours = [utils.sha256(badnet_path), utils.sha256(repaired_path), scale]
    if [found[2][name] for name in ("badnet_sha256", "repaired_sha256", "input_scale")] == ours:
        return found
    problem = f"{path}: was not made of these nets; make it anew with: eval_defence.py --export"
    if engine == "onnx":
        raise InputError(problem)
    say(f"warning: {problem}; judging with Keras")
    return None


def open_file(path, memory=utils.MEMORY, threads=None):
    """Open a detector's ONNX file. Returns (judge, image shape, facts).

    judge: float32 (n, height, width, channels), whole numbers 0..255 → {name: array (n,)}, as
    `export` describes them.  facts: the metadata, "classes", "threshold" (float or None) and
    "repair_record" (dict or None) read.
    memory: bytes, as for guard.check_onnx.
    threads: of processors; half of them if None, since two batches are judged at a time.
    Raises InputError where the file is damaged or holds what guard.py does not allow.
    """
    require(*RUNS)
    import onnxruntime

    path = utils.require_file(path)
    guard.require_fits(path, "the file", path.stat().st_size, memory)
    contents = path.read_bytes()
    shape, largest, facts = guard.check_onnx(contents, path, memory)
    facts = read_facts(facts, path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads or max(1, utils.processors() // 2)
    try:
        session = onnxruntime.InferenceSession(
            contents, options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # it raises whatever its parts raise
        raise InputError(f"{path}: ONNX Runtime cannot open it: {one_line(error)}") from error
    name, names = session.get_inputs()[0].name, list(guard.ANSWERS)
    most = max(1, nets.OUTPUT_VALUES // largest)

    def judge(images):
        pixels = images.astype(np.uint8)
        if not np.array_equal(pixels, images):
            raise InputError(
                f"{path}: takes pixels that are whole numbers, and an image has others; use "
                "--engine keras"
            )
        starts = range(0, len(pixels), most)
        parts = [session.run(names, {name: pixels[i : i + most]}) for i in starts]
        return dict(zip(names, map(np.concatenate, zip(*parts))))

    return judge, shape, facts


def read_facts(metadata, path):
    """The metadata of a detector's file as `open_file` gives it. Raises InputError if damaged."""
    try:
        classes, threshold = int(metadata["classes"]), metadata["threshold"]
        threshold = float(threshold) if threshold else None
        record = guard.parse_json(metadata["repair_record"], path)
        damaged = not 2 <= classes <= guard.NUMBER
        damaged |= threshold is not None and not 0 <= threshold <= nets.SCORE_MOST
        damaged |= metadata["input_scale"] not in utils.SCALES
        damaged |= not isinstance(record, dict | None)
        damaged |= not {"badnet_sha256", "repaired_sha256"} <= metadata.keys()
    except (KeyError, ValueError):
        damaged = True
    if damaged:
        raise InputError(f"{path}: its metadata are damaged; export the detector anew")
    return {**metadata, "classes": classes, "threshold": threshold, "repair_record": record}
