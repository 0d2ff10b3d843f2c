"""Repair every architecture of keras.applications, and record how the repair fares.

    python tests/tools/applications.py [NAME …]    tests/results/applications.csv, docs/nets.md
    python tests/tools/applications.py --table     only the sentence in docs/nets.md

Each net is made without trained weights, for small images of 10 classes, with random statistics. It
is written as .h5 and as .keras, loaded by our code and repaired twice, on images labelled with its
own answers: by repair.py's code, and by the plain loop of tests/reference.py. A net that has a row
in applications.csv is not tried again. Nets of over MAX_WEIGHTS weights are left out.
"""

import argparse
import csv
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "tools")]

import h5py
import numpy as np
import reference
from conftest import do_repair
from records import RESULTS, write_tables

import utils
from defence.base import files, pixels
from defence.base.arguments import Parser
from defence.base.errors import InputError
from defence.base.process import run_command
from defence.base.progress import say
from defence.base.startup import import_keras, make_reproducible
from defence.base.text import first_line
from defence.beyond.settings import Settings
from defence.net.split import find_last_weighted, split_net

DOCUMENT, CSV = ROOT / "docs" / "nets.md", RESULTS / "applications.csv"
SIDE, CLASSES, IMAGES = 96, 10, 48
MAX_WEIGHTS = 12 * 10**7
SETTINGS = {"threshold": 0.5, "retrain_epochs": 1, "rounds": 1, "epochs": 1}
COLUMNS = (
    *("net", "weights", "h5", "keras", "feature_map", "channels", "pruned_by", "retrained_layer"),
    *("pruned_channels", "equals_reference"),
)
LOADS, DIFFERS = "loads", "loads with other answers"


def list_names():
    """Return the names of all architectures of the installed Keras."""
    applications = import_keras().applications
    return [name for name in dir(applications) if name[0].isupper()]


def make_net(name):
    """Return an architecture with random statistics, whose answers differ from image to image."""
    make_reproducible(0)
    model = getattr(import_keras().applications, name)(
        weights=None, input_shape=(SIDE, SIDE, 3), classes=CLASSES
    )
    spread_answers(model, pixels.scale_pixels(make_images(), find_scale(model)))
    return model


def spread_answers(model, x):
    """Give an untrained net random statistics, so that its answers to scaled images differ."""
    keras, rng = import_keras(), np.random.default_rng(0)
    for layer in model.layers:
        if type(layer).__name__ == "BatchNormalization":
            layer.set_weights([w + 0.1 * rng.random(w.shape) for w in layer.get_weights()])
    last = model.layers[-1]
    if type(last).__name__ == "Dense":
        features = keras.Model(model.inputs[0], last.input)(x, training=False)
        kernel = rng.normal(0, 10, last.kernel.shape) / np.std(features, axis=0).mean()
        last.set_weights([kernel, -np.mean(features, axis=0) @ kernel])


def find_scale(model):
    """Return the scale of an architecture's pixels: 0..255 where it scales them itself."""
    kinds = {type(layer).__name__ for layer in model.layers}
    return "0..255" if "Rescaling" in kinds else "0..1"


def make_images():
    """Return random images, coarse enough to differ after many strides: float32, 0..255."""
    rng = np.random.default_rng(1)
    coarse = rng.integers(0, 256, (IMAGES, SIDE // 16, SIDE // 16, 3))
    return np.float32(coarse.repeat(16, axis=1).repeat(16, axis=2))


def try_net(name):
    """Write, load and repair an architecture. Return its row, a dict with some of COLUMNS."""
    model = make_net(name)
    row = {"net": name, "weights": int(model.count_params())}
    if row["weights"] > MAX_WEIGHTS:
        reason = "left out: too large for this machine"
        return row | {"h5": reason, "keras": reason}
    x, loaded = pixels.scale_pixels(make_images(), find_scale(model)), None
    answers = model(x, training=False)
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("keras", "h5"):
            path = Path(folder, f"net.{kind}")
            try:
                model.save(path)
                our_answers = utils.load_badnet(path)(x, training=False)
                row[kind] = LOADS if np.allclose(our_answers, answers, atol=1e-3) else DIFFERS
                loaded = path if row[kind] == LOADS else loaded
            except InputError as error:
                row[kind] = first_line(error).removeprefix(f"{path}: ")[:120]
            except Exception as error:  # Keras raises whatever its parts raise
                row[kind] = f"Keras cannot write it: {first_line(error)[:80]}"
        return row | (compare_repairs(loaded, find_scale(model)) if loaded else {})


def compare_repairs(path, scale):
    """Compare the repair of a net's file with the reference. Return a part of its row, a dict."""
    model, plain = utils.load_badnet(path), utils.load_badnet(path)
    x = pixels.scale_pixels(make_images(), scale)
    labels = np.argmax(model(x, training=False), axis=1)
    with h5py.File(path.with_name("data.h5"), "w") as file:
        file["data"], file["label"] = np.uint8(make_images()), labels
    with utils.open_dataset(path.with_name("data.h5")) as clean:
        clean.fit_to(model.input_shape[1:], CLASSES)
        parts = split_net(model)
        record = do_repair(model, clean, Settings(scale=scale, **SETTINGS))
    pruned, curve, _ = reference.repair_map(plain, parts.name, x, labels, **SETTINGS)
    pruned_by = {"Conv2D": "kernel and bias", "BatchNormalization": "gamma and beta"}
    same_curve = np.allclose(record["accuracy"]["after_each_channel"], curve)
    return {
        "feature_map": parts.name,
        "channels": record["channels"],
        "pruned_by": pruned_by.get(type(parts.layer).__name__, "an added layer"),
        "retrained_layer": find_last_weighted(parts.head).name,
        "pruned_channels": len(record["pruned"]),
        "equals_reference": "yes" if record["pruned"] == pruned and same_curve else "no",
    }


def read_rows():
    """Return the rows of applications.csv, {net: row}; its values are texts."""
    if not CSV.exists():
        return {}
    with CSV.open(newline="") as file:
        return {row["net"]: row for row in csv.DictReader(file)}


def make_tables(rows):
    """Return the sentence of docs/nets.md, {name in the markers: text}."""
    equal = sum(row["equals_reference"] == "yes" for row in rows.values())
    return {"applications": f"{equal} of {len(rows)} are repaired as the reference repairs them."}


def main():
    parser = Parser(
        prog="applications.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="default: all")
    parser.add_argument("--table", action="store_true", help="only write docs/nets.md")
    arguments = parser.parse_args()
    rows = read_rows()
    for name in [] if arguments.table else arguments.names or list_names():
        if name not in rows:
            say(f"{name}: try")
            rows[name] = dict.fromkeys(COLUMNS, "") | try_net(name)
            files.write_csv((rows[net] for net in sorted(rows)), CSV)
            import_keras().backend.clear_session()
    write_tables(make_tables(rows), [DOCUMENT])


if __name__ == "__main__":
    sys.exit(run_command(main))
