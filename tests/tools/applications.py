"""Try every architecture of keras.applications, and write down what the tool makes of it.

    python tests/tools/applications.py [NAME …]    and the table in docs/nets.md
    python tests/tools/applications.py --table     only the table anew

Each net is made without weights, for small images of 10 classes, with random statistics, written as
.h5 and as .keras, loaded by the tool, and repaired: once by repair.py's code, once by the plain
loop of tests/reference.py, on images labelled with the net's own answers. What was tried, as
tests/results/applications/ tells, is not tried again. The nets of over MOST weights are left out.
"""

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "tools")]

import h5py
import numpy as np
import reference
from conftest import do_repair
from results import RESULTS, with_tables

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

DOCUMENT = ROOT / "docs" / "nets.md"
FOLDER = RESULTS / "applications"
SIDE, CLASSES, IMAGES = 96, 10, 48
MOST = 12 * 10**7  # weights
SETTINGS = {"threshold": 0.5, "retrain_epochs": 1, "rounds": 1, "epochs": 1}


def names():
    """The names of all architectures of the installed Keras."""
    applications = import_keras().applications
    return [name for name in dir(applications) if name[0].isupper()]


def make(name):
    """An architecture with random statistics, whose answers differ from image to image."""
    make_reproducible(0)
    model = getattr(import_keras().applications, name)(
        weights=None, input_shape=(SIDE, SIDE, 3), classes=CLASSES
    )
    differ(model, pixels.scale_pixels(pictures(), scale_of(model)))
    return model


def differ(model, x):
    """Make the answers of an untrained net to scaled pictures differ: random statistics."""
    keras, rng = import_keras(), np.random.default_rng(0)
    for layer in model.layers:
        if type(layer).__name__ == "BatchNormalization":
            layer.set_weights([each + 0.1 * rng.random(each.shape) for each in layer.get_weights()])
    last = model.layers[-1]
    if type(last).__name__ == "Dense":
        before = keras.Model(model.inputs[0], last.input)(x, training=False)
        kernel = rng.normal(0, 10, last.kernel.shape) / np.std(before, axis=0).mean()
        last.set_weights([kernel, -np.mean(before, axis=0) @ kernel])


def scale_of(model):
    """The pixels that an architecture takes: 0..255 where it scales them itself."""
    kinds = {type(layer).__name__ for layer in model.layers}
    return "0..255" if "Rescaling" in kinds else "0..1"


def pictures():
    """Random pictures, smooth enough to differ also where a net has made them small: float32."""
    rng = np.random.default_rng(1)
    coarse = rng.integers(0, 256, (IMAGES, SIDE // 16, SIDE // 16, 3))
    return np.float32(coarse.repeat(16, axis=1).repeat(16, axis=2))


def look(name):
    """What the tool makes of an architecture: a dict."""
    model = make(name)
    weights = int(model.count_params())
    if weights > MOST:
        return {"weights": weights, "problem": "left out: too large for this machine"}
    x, found, good = pixels.scale_pixels(pictures(), scale_of(model)), {"weights": weights}, None
    answers = model(x, training=False)
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".keras", ".h5"):
            path = Path(folder, f"net{suffix}")
            try:
                model.save(path)
                ours = utils.load_badnet(path)(x, training=False)
                found[suffix] = "loads" if np.allclose(ours, answers, atol=1e-3) else "differs"
                good = path if found[suffix] == "loads" else good
            except InputError as error:
                found[suffix] = first_line(error).removeprefix(f"{path}: ")[:120]
            except Exception as error:  # Keras raises whatever its parts raise
                found[suffix] = f"Keras cannot write it: {first_line(error)[:80]}"
        return found | (repaired(good, scale_of(model)) if good else {})


def repaired(path, scale):
    """How the repair of a net's file compares with the reference: a dict."""
    model, plain = utils.load_badnet(path), utils.load_badnet(path)
    x = pixels.scale_pixels(pictures(), scale)
    labels = np.argmax(model(x, training=False), axis=1)
    with h5py.File(path.with_name("data.h5"), "w") as file:
        file["data"], file["label"] = np.uint8(pictures()), labels
    with utils.open_dataset(path.with_name("data.h5")) as clean:
        clean.fit_to(model.input_shape[1:], CLASSES)
        split = split_net(model)
        record = do_repair(model, clean, Settings(scale=scale, **SETTINGS))
    pruned, curve, _ = reference.repair_map(plain, split.name, x, labels, **SETTINGS)
    return {
        "map": split.name,
        "channels": record["channels"],
        "pruned by": {"Conv2D": "kernel and bias", "BatchNormalization": "gamma and beta"}.get(
            type(split.layer).__name__, "a layer more"
        ),
        "retrained": find_last_weighted(split.head).name,
        "pruned": len(record["pruned"]),
        "equal": bool(
            record["pruned"] == pruned
            and np.allclose(record["accuracy"]["after_each_channel"], curve)
        ),
    }


def table():
    """The table of docs/nets.md, from what was found: {name: Markdown}."""
    heads = ["net", "weights", "loads", "feature map", "channels", "pruned by", "retrained"]
    lines = [[*heads, "as the reference"], ["---", "--:", *["---"] * 2, "--:", *["---"] * 3]]
    found = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
    for name, each in found.items():
        same = {True: "yes", False: "no", None: "–"}[each.get("equal")]
        if "pruned" in each:
            same += f", {each['pruned']} pruned"
        said = {each.get(key, each.get("problem")) for key in (".h5", ".keras")}
        loads = "; ".join(sorted(said)).replace("loads", "yes")
        facts = [str(each.get(key, "–")) for key in ("map", "channels", "pruned by", "retrained")]
        lines.append([name, f"{each['weights'] / 1e6:.1f} M", loads, *facts, same])
    good = sum(bool(each.get("equal")) for each in found.values())
    closing = f"\n\n{good} of {len(found)} are repaired as the reference repairs them."
    return {"applications": "\n".join(f"| {' | '.join(x)} |" for x in lines) + closing}


def main():
    parser = Parser(
        prog="applications.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="default: all")
    parser.add_argument("--table", action="store_true", help="only make the table anew")
    arguments = parser.parse_args()
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in [] if arguments.table else arguments.names or names():
        result = FOLDER / f"{name}.json"
        if not result.exists():
            say(f"{name}: try")
            files.write_json(look(name), result)
            import_keras().backend.clear_session()
    text = with_tables(DOCUMENT.read_text(), table())
    with files.replace_file(DOCUMENT) as beside:
        beside.write_text(text)


if __name__ == "__main__":
    sys.exit(run_command(main))
