"""From files to a Detector: B's and G's, run by Keras, or an .onnx file, run by ONNX Runtime."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from defence.base import pixels
from defence.base.errors import InputError
from defence.base.files import hash_file, read_file, require_file
from defence.base.limits import DEFAULT_MAX_BYTES
from defence.base.progress import say, warn
from defence.judge import detector, exports, onnx_file
from defence.judge.record import RepairRecord, no_threshold_error, read_record, refuse_repaired
from defence.load.models import (
    MODEL_SUFFIXES,
    MODELS,
    ModelFile,
    default_repaired_path,
    read_model,
)
from defence.net.inference import compile_model

BACKENDS = ("keras", "onnx")


@dataclasses.dataclass
class Usage:
    """How B and G are used.

    scale: a key of pixels.SCALES.  layer: the pruned layer's name, or None where that is not known.
    threshold: as for detector.is_flagged.  record: G's, or None.
    """

    scale: str
    layer: str | None
    threshold: float | None
    record: RepairRecord | None

    def is_hardened(self) -> bool:
        """Return whether G was hardened, as far as its record tells."""
        return self.record is not None and self.record.is_hardened()


# ------------------------------------------------------------------------------ finding the files


def find_models(model: str | PathLike, repaired: str | PathLike | None = None) -> list[Path]:
    """Return the paths of B and G, or the path of a detector's .onnx file alone.

    model: a name in models/ or a path.  repaired: G's path. By default G is NAME_defence.h5, in
    models/, where repair.py puts it, or beside B.
    Raise InputError where a file is missing, or there are two different G's.
    """
    path = Path(model)
    if path.suffix == ".onnx":
        if repaired:
            raise InputError(f"--repaired: {path} contains both nets; leave --repaired out")
        return [require_file(path)]
    path = find_badnet(model)
    return [path, require_file(repaired or find_repaired(path))]


def find_repaired(badnet: Path) -> Path:
    """Return the path of the repaired net of a BadNet's file. Raise as find_models does."""
    default = default_repaired_path(badnet)
    paths = [path for path in (default, badnet.with_name(default.name)) if os.path.exists(path)]
    if not paths:
        model_file = read_model(badnet)
        _ = model_file.declared  # raises where it is not a model
        refuse_repaired(model_file)
        output = ""
        if not MODELS.is_dir():  # repair.py would refuse to write there
            default = badnet.with_name(default.name)
            output = f" --output {shlex.quote(str(default))}"
        command = f"python repair.py {shlex.quote(str(badnet))} CLEAN_DATA.h5{output}"
        raise InputError(f"{default}: no repaired net; make it with: {command}")
    if len({hash_file(require_file(path)) for path in paths}) > 1:  # which one is meant?
        raise InputError(f"{paths[1]}: differs from {paths[0]}; choose one with --repaired")
    return paths[0]


def find_badnet(model: str | PathLike) -> Path:
    """Return the path of a BadNet, from a path or a name in models/, with its suffix or without.

    Raise InputError where there is none; for a name, list the BadNets in models/.
    """
    path = Path(model)
    suffixes = ("",) if path.suffix in MODEL_SUFFIXES else MODEL_SUFFIXES
    is_name = path.name == str(model) and suffixes != ("",)
    for folder in (MODELS, Path()) if is_name else (Path(), MODELS):
        for suffix in suffixes:
            # Path.exists raises an error where a name is too long.
            if os.path.exists(candidate := folder / f"{path}{suffix}"):
                return require_file(candidate)
    if os.path.exists(path):
        raise InputError(f"{model}: is not a BadNet; MODEL comes last, after the images")
    if path.name != str(model):
        raise InputError(f"{model}: no such file")
    names = sorted(
        {
            path.stem
            for path in MODELS.glob("*")
            if path.suffix in MODEL_SUFFIXES and not path.stem.endswith("_defence")
        }
    )
    contents = f"{MODELS}/ has the BadNets {', '.join(names)}"
    if not names:
        problem = "has no BadNets" if MODELS.is_dir() else "does not exist"
        contents = f"the folder {MODELS.absolute()} {problem}; give the path of a BadNet"
    raise InputError(f"{MODELS / path.name}{suffixes[0]}: no such file; {contents}")


# ---------------------------------------------------------------------------- using B and G


def read_usage(
    badnet: ModelFile,
    repaired: ModelFile,
    fpr: float | None = None,
    scale: str | None = None,
    force: bool = False,
) -> Usage:
    """Read from G's repair record how B and G are used.

    fpr: above 0, at most 1, the false-positive rate that the threshold keeps; None for none.
    scale: a key of pixels.SCALES, for a G without a record.  force: take a G of another B.
    Raise InputError where B is a repaired net, or G itself; where the record names another B or
    scale, or has no threshold for `fpr`.
    """
    if not force:
        refuse_repaired(badnet)
        if badnet.sha256 == repaired.sha256:
            raise same_nets_error(badnet, repaired)
    record = read_record(repaired)
    if record is None:
        if fpr is not None:
            raise no_threshold_error(repaired.path)
        scale = scale or pixels.DEFAULT
        say(f"{repaired.path}: no repair record; assuming pixels {scale} (see --scale)")
        return Usage(scale, None, None, None)
    if record.badnet["sha256"] != badnet.sha256:
        problem = (
            f"{repaired.path}: was made from another BadNet ({record.badnet['file']}), not from "
            f"{badnet.path}"
        )
        if not force:
            raise InputError(f"{problem}; repair this one with repair.py, or use --force")
        warn(f"{problem}; judging with it because of --force")
    if scale not in (None, record.input_scale):
        raise InputError(f"--scale: {repaired.path} was made for pixels {record.input_scale}")
    threshold = None if fpr is None else record.threshold(fpr, repaired.path)
    return Usage(record.input_scale, record.layer, threshold, record)


def same_nets_error(badnet: ModelFile, repaired: ModelFile) -> InputError:
    """Return the InputError for a G that is B: they would agree on every image."""
    return InputError(
        f"{repaired.path}: is the same net as {badnet.path}, so no image would be flagged; give "
        "the net that repair.py made from it, or use --force"
    )


def load_detector(
    paths: Sequence[Path],
    max_bytes: int = DEFAULT_MAX_BYTES,
    backend: str | None = None,
    fpr: float | None = None,
    scale: str | None = None,
    force: bool = False,
) -> detector.Detector:
    """Load the Detector of B and G, or of an .onnx file alone.

    paths: as find_models returns them.  max_bytes: as for read_model.
    backend: of BACKENDS; by default ONNX where a detector's file and its packages are there.
    fpr, scale, force: as for read_usage.
    Raise InputError as read_usage, load_nets and onnx_file.read_detector do.
    """
    if len(paths) == 1:
        (path,) = paths
        if backend == "keras" or scale or force:
            raise InputError(f"{path}: --backend keras, --scale and --force do not apply to it")
        file = onnx_file.read_detector(path, max_bytes)
        return file.detector(file.threshold if fpr is None else file.find_threshold(fpr))
    badnet, repaired = (read_model(path, max_bytes) for path in paths)
    nets_file = None if backend == "keras" else find_detector_file(badnet, repaired, backend)
    if nets_file and nets_file.record and nets_file.made_from(badnet) and not (scale or force):
        # The file has G's record, too: B and G are only hashed, and libhdf5 is not imported.
        threshold = None if fpr is None else nets_file.record.threshold(fpr, repaired.path)
        return nets_file.detector(threshold)
    usage = read_usage(badnet, repaired, fpr, scale, force)
    if nets_file and nets_file.made_of[2] == usage.scale:
        return nets_file.detector(usage.threshold)
    if backend == "onnx":
        path = onnx_file.default_detector_path(repaired.path)
        if nets_file:
            made_for = f"was made for pixels {nets_file.made_of[2]}, not {usage.scale}"
            raise InputError(f"{path}: {made_for}; use --backend keras")
        again = suggest_export(badnet, repaired)
        raise InputError(f"{path}: was made from other nets; make it again with: {again}")
    return load_keras_detector(badnet, repaired, usage, force)


def load_keras_detector(
    badnet: ModelFile, repaired: ModelFile, usage: Usage, force: bool
) -> detector.Detector:
    """Load the Detector of B and G, run by Keras. Raise InputError as load_nets does."""
    model, classes = load_nets(badnet, repaired, usage, force)
    hardened = usage.is_hardened()

    def run(images: np.ndarray) -> Any:
        # Compiling takes longer than running one image layer by layer.
        if len(images) == 1:
            return model(images, training=False)
        return compile_model(model, detector.VIEWS if hardened else 1)(images)

    shape, hashes = model.input_shape[1:], {"badnet": badnet.sha256, "repaired": repaired.sha256}
    facts = {}
    if usage.record:
        facts = usage.record.list_facts(classes, usage.threshold, repaired.path)
    return detector.Detector(run, classes, shape, usage.threshold, badnet.path, hashes, **facts)


def load_nets(
    badnet: ModelFile, repaired: ModelFile, usage: Usage, force: bool = False
) -> tuple[Any, int]:
    """Load B and G as one Keras model. Return (the model from detector.build_detector, N).

    force: load them even if their weights are the same.
    Raise InputError where G does not belong to B, or is B.
    """
    for file in (badnet, repaired):  # before the seconds that the import takes
        _ = file.declared
    b, g = badnet.load(), repaired.load()
    pixels.check_scale(usage.scale, b.input_shape[3])
    for fact, b_shape, g_shape in (
        ("takes images of {}", b.input_shape[1:], g.input_shape[1:]),
        ("has {} classes", b.output_shape[1:], g.output_shape[1:]),
    ):
        if b_shape != g_shape:
            b_size, g_size = ("×".join(map(str, shape)) for shape in (b_shape, g_shape))
            raise InputError(
                f"{repaired.path}: does not belong to {badnet.path}: it {fact.format(g_size)}, "
                f"not {b_size}"
            )
    b_weights, g_weights = b.get_weights(), g.get_weights()
    same_count = len(b_weights) == len(g_weights)
    if not force and same_count and all(map(np.array_equal, b_weights, g_weights)):
        raise same_nets_error(badnet, repaired)
    model = detector.build_detector(b, g, usage.scale, usage.layer, usage.is_hardened())
    return model, b.output_shape[1]


# ------------------------------------------------------------------------- the detector's file


def find_detector_file(
    badnet: ModelFile, repaired: ModelFile, backend: str | None = None
) -> onnx_file.DetectorFile | None:
    """Return the open detector's file of B and G, or None where there is none.

    backend: as for load_detector.
    A file of other nets is left alone: others may judge with it. So is a file that this user did
    not export, unread: it could name B and G and answer anything.
    Raise InputError where `backend` is "onnx" and there is no such file.
    """
    path = onnx_file.default_detector_path(repaired.path)
    command = suggest_export(badnet, repaired)
    again = f"make it again with: {command}"
    try:
        onnx_file.require_packages(*onnx_file.RUN_PACKAGES)
        if not os.path.exists(path):  # Path.exists raises an error where a name is too long
            raise InputError(f"{path}: no such file; make it with: {command}")
        contents = read_file(path, badnet.max_bytes)
    except InputError:
        if backend == "onnx":
            raise
        return None
    if not exports.is_export(contents):
        problem = f"{path}: was not exported by you on this machine"
        if backend == "onnx":
            raise InputError(
                f"{problem}; {again}, or give the file as MODEL if you trust its maker"
            )
        say(f"{problem}, so Keras judges; {again}")
        return None
    try:
        file = onnx_file.open_detector(contents, path, badnet.max_bytes)
    except onnx_file.OldScore as error:
        if backend == "onnx":
            raise
        say(f"{error}: {command}; until then, Keras judges")
        return None
    return file if file.made_of[:2] == (badnet.sha256, repaired.sha256) else None


def suggest_export(badnet: ModelFile, repaired: ModelFile) -> str:
    """Return the command that writes the detector's file of B and G."""
    nets = name_nets(badnet.path, repaired.path)
    return shlex.join(["python", "eval_defence.py", *nets, "--export"])


def name_nets(badnet: Path, repaired: Path) -> list[str]:
    """Return the words that name B and G to eval_defence.py, which finds most G by B's name."""
    default = default_repaired_path(badnet)
    known = repaired in (default, badnet.with_name(default.name))
    return [str(badnet), *([] if known else ["--repaired", str(repaired)])]


def export_detector(
    badnet: ModelFile,
    repaired: ModelFile,
    path: Path,
    fpr: float | None = None,
    scale: str | None = None,
    force: bool = False,
) -> detector.Detector:
    """Write the detector of B and G as an ONNX file, which may judge for them from now on.

    Return the Detector that the file is.

    fpr, scale, force: as for read_usage.
    Raise InputError as read_usage, load_nets and onnx_file.write_detector do.
    """
    onnx_file.require_packages(*onnx_file.EXPORT_PACKAGES)
    usage = read_usage(badnet, repaired, fpr, scale, force)
    model, classes = load_nets(badnet, repaired, usage, force)
    metadata = {
        "badnet_sha256": badnet.sha256,
        "repaired_sha256": repaired.sha256,
        "classes": str(classes),
        "threshold": "" if usage.threshold is None else repr(usage.threshold),
        "input_scale": usage.scale,
        "score": detector.name_score(usage.is_hardened()),
        "repair_record": usage.record.to_json() if usage.record else json.dumps(None),
    }
    file = onnx_file.write_detector(model, metadata, path, badnet.max_bytes)
    return file.detector(file.threshold)


def discard_detector(repaired: Path) -> None:
    """Delete the detector's file of a repaired net, if there is one: the net was made anew."""
    path = onnx_file.default_detector_path(repaired)
    if path.is_file() or path.is_symlink():
        path.unlink()
        say(f"{path}: deleted, because it was made from an earlier repaired net")
