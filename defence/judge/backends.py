"""From files to a Detector: B's and G's, run by Keras, or an .onnx file, run by ONNX Runtime."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from defence.base import pixels
from defence.base.errors import InputError
from defence.base.files import hash_file, require_file
from defence.base.limits import DEFAULT_MAX_BYTES
from defence.base.progress import say, warn
from defence.judge import detector, onnx_file, record
from defence.load.models import MODEL_SUFFIXES, MODELS, default_repaired_path, read_model
from defence.net.inference import compile_model

BACKENDS = ("keras", "onnx")


@dataclasses.dataclass
class Usage:
    """How B and G are to be used.

    scale: a key of pixels.SCALES.  layer: the pruned layer's name, or None where that is not known.
    threshold: as for detector.is_flagged.  record: G's RepairRecord, or None.
    """

    scale: str
    layer: str
    threshold: float
    record: record.RepairRecord


def find_models(model, repaired=None):
    """The paths of B and G, for a name in models/ or a path, or of a detector's .onnx file alone.

    G is NAME_defence.h5, in models/, where repair.py puts it, or beside B.
    Raises InputError where one is missing, or there are two different G's.
    """
    path = Path(model)
    if path.suffix == ".onnx":
        if repaired:
            raise InputError(f"--repaired: {path} contains both nets")
        return [require_file(path)]
    path = find_badnet(model)
    return [path, require_file(repaired or find_repaired(path))]


def find_repaired(badnet):
    """The Path of the repaired net of a BadNet's file. Raises what find_models does."""
    made = default_repaired_path(badnet)
    found = [path for path in (made, badnet.with_name(made.name)) if path.exists()]
    if not found:
        model_file = read_model(badnet)
        _ = model_file.declared  # it is a model
        record.refuse_repaired(model_file)
        raise InputError(
            f"{made}: no repaired net; make it with: python repair.py {badnet} CLEAN_DATA.h5"
        )
    if len({hash_file(require_file(path)) for path in found}) > 1:  # who made the other?
        raise InputError(f"{found[1]}: is another repaired net than {found[0]}; give --repaired")
    return found[0]


def find_badnet(model):
    """The Path of a BadNet, from a path or a name in models/, with its suffix or without.

    Raises InputError where there is none; for a name, it lists those that are there.
    """
    path = Path(model)
    suffixes = [""] if path.suffix in MODEL_SUFFIXES else MODEL_SUFFIXES
    bare = path.name == str(model) and suffixes != [""]
    for folder in (MODELS, Path()) if bare else (Path(), MODELS):
        for suffix in suffixes:
            if (named := folder / f"{path}{suffix}").exists():
                return require_file(named)
    if path.exists():
        raise InputError(f"{model}: is no BadNet; MODEL comes last, after the pictures")
    if path.name != str(model):
        raise InputError(f"{model}: no such file")
    there = sorted(
        {
            path.stem
            for path in MODELS.glob("*")
            if path.suffix in MODEL_SUFFIXES and not path.stem.endswith("_defence")
        }
    )
    known = f"the BadNets there are {', '.join(there)}" if there else "there are no BadNets there"
    raise InputError(f"{MODELS / path.name}{suffixes[0]}: no such file; {known}")


def read_usage(badnet, repaired, fpr=None, scale=None, force=False):
    """The Usage of B and G, ModelFiles, from G's repair record.

    fpr: above 0, at most 1, the false-positive rate that the threshold stands for; None for none.
    scale: a key of pixels.SCALES, for a G without a record.  force: take a G of another B.
    Raises InputError where B is no BadNet but a repaired net, or G itself; where the record is of
    another B or scale, or has no threshold for `fpr`.
    """
    if not force:
        record.refuse_repaired(badnet)
        if badnet.sha256 == repaired.sha256:
            raise same_nets_error(badnet, repaired)
    found = record.read_record(repaired)
    if found is None:
        if fpr is not None:
            raise record.no_threshold_error(repaired.path)
        scale = scale or pixels.DEFAULT
        say(f"{repaired.path}: no repair record; assuming pixels {scale} (see --scale)")
        return Usage(scale, None, None, None)
    if found.badnet["sha256"] != badnet.sha256:
        problem = (
            f"{repaired.path}: was made from another BadNet ({found.badnet['file']}), not from "
            f"{badnet.path}"
        )
        if not force:
            raise InputError(f"{problem}; repair this one with repair.py, or use --force")
        warn(f"{problem}; judging with it because of --force")
    if scale not in (None, found.input_scale):
        raise InputError(f"--scale: {repaired.path} was made for pixels {found.input_scale}")
    threshold = None if fpr is None else found.threshold(fpr, repaired.path)
    return Usage(found.input_scale, found.layer, threshold, found)


def same_nets_error(badnet, repaired):
    """The InputError for a G, a ModelFile, that is B: they would agree on every image."""
    return InputError(
        f"{repaired.path}: is the same net as {badnet.path}, so no image would be flagged; give "
        "what repair.py made of it, or use --force"
    )


def load_detector(
    paths, max_bytes=DEFAULT_MAX_BYTES, backend=None, fpr=None, scale=None, force=False
):
    """The Detector of B and G, or of an .onnx file alone.

    paths: as find_models returns them.  max_bytes: as for utils.read_model.
    backend: of BACKENDS; if None, ONNX where there is a file and what runs it.
    fpr, scale, force: as for usage_from_record.
    Raises InputError as usage_from_record, load_nets and onnx_file.read do.
    """
    if len(paths) == 1:
        (path,) = paths
        if backend == "keras" or scale or force:
            raise InputError(f"{path}: --backend keras, --scale and --force do not apply to it")
        file = onnx_file.read_detector(path, max_bytes)
        return file.detector(file.threshold if fpr is None else file.find_threshold(fpr))
    badnet, repaired = (read_model(path, max_bytes) for path in paths)
    file = None if backend == "keras" else find_detector_file(badnet, repaired, backend)
    if file and file.made_from(badnet) and not (scale or force):
        # It has G's record, too: then B and G are hashed, and libhdf5 is not even imported.
        return file.detector(fpr and file.record.threshold(fpr, repaired.path))
    usage = read_usage(badnet, repaired, fpr, scale, force)
    if file and file.made_of[2] == usage.scale:
        return file.detector(usage.threshold)
    if backend == "onnx":
        path = onnx_file.default_detector_path(repaired.path)
        raise InputError(
            f"{path}: was not made of these nets; make it again with: eval_defence.py --export"
        )
    model, classes = load_nets(badnet, repaired, usage, force)

    def run(images):
        # Compiling takes longer than running one image layer by layer.
        return model(images, training=False) if len(images) == 1 else compile_model(model)(images)

    shape, hashes = model.input_shape[1:], {"badnet": badnet.sha256, "repaired": repaired.sha256}
    held_out = usage.record.held_out(repaired.path) if usage.threshold is not None else None
    data = usage.record and usage.record.data
    return detector.Detector(
        run, classes, shape, usage.threshold, badnet.path, hashes, held_out, data
    )


def load_nets(badnet, repaired, usage, force=False):
    """Load B and G, ModelFiles, as one Keras model. Returns (what detector.build gives, N).

    force: even if their weights are the same.
    Raises InputError where G does not belong to B, or is B.
    """
    for file in (badnet, repaired):  # before the seconds that the import takes
        _ = file.declared
    of_b, of_g = badnet.load(), repaired.load()
    for what, ours, theirs in (
        ("images", of_b.input_shape[1:], of_g.input_shape[1:]),
        ("classes", of_b.output_shape[1:], of_g.output_shape[1:]),
    ):
        if ours != theirs:
            raise InputError(
                f"{repaired.path}: does not belong to {badnet.path}: it has {what} "
                f"{'×'.join(map(str, theirs))}, not {'×'.join(map(str, ours))}"
            )
    ours, theirs = of_b.get_weights(), of_g.get_weights()
    if not force and len(ours) == len(theirs) and all(map(np.array_equal, ours, theirs)):
        raise same_nets_error(badnet, repaired)
    return detector.build_detector(of_b, of_g, usage.scale, usage.layer), of_b.output_shape[1]


def find_detector_file(badnet, repaired, backend=None):
    """The onnx_file.DetectorFile of B and G, ModelFiles, or None where there is none.

    backend: as for `load`.
    A file of other nets is left alone: it may be what others judge with.
    Raises InputError where `backend` is "onnx" and there is no such file.
    """
    path = onnx_file.default_detector_path(repaired.path)
    try:
        onnx_file.require_packages(*onnx_file.RUN_PACKAGES)
        if not path.exists():
            raise InputError(f"{path}: no such file; make it with: eval_defence.py NAME --export")
    except InputError:
        if backend == "onnx":
            raise
        return None
    file = onnx_file.read_detector(path, badnet.max_bytes)
    return file if file.made_of[:2] == (badnet.sha256, repaired.sha256) else None


def export_detector(badnet, repaired, path, **how):
    """Write the detector of B and G, ModelFiles, as an ONNX file. Returns the Detector that it is.

    how: arguments of usage_from_record.
    Raises InputError as usage_from_record, load_nets and onnx_file.write do.
    """
    onnx_file.require_packages(*onnx_file.EXPORT_PACKAGES)
    usage = read_usage(badnet, repaired, **how)
    model, classes = load_nets(badnet, repaired, usage, how.get("force", False))
    metadata = {
        "badnet_sha256": badnet.sha256,
        "repaired_sha256": repaired.sha256,
        "classes": str(classes),
        "threshold": "" if usage.threshold is None else repr(usage.threshold),
        "input_scale": usage.scale,
        "repair_record": usage.record.to_json() if usage.record else json.dumps(None),
    }
    file = onnx_file.write_detector(model, metadata, path, badnet.max_bytes)
    return file.detector(file.threshold)
