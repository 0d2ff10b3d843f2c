"""Repair a net for pictures of 224×224 with 10,000 of them: what it costs in time and memory.

    python tests/tools/large.py [--images N]

A MobileNetV2 (a third of the usual width) with random statistics, pictures of coarse noise that are
labelled with its own answers. It is repaired twice: at its last feature map, which is small behind
the global pooling, and at one whose features go to disk. Peak memory counts what of that file is
in memory, which the system takes back where others need it.
"""

import logging
import sys
import tempfile
from pathlib import Path

import applications  # first: it says where the others are
import h5py
import numpy as np
from benchmark import measure, table
from world import in_another_process

from defence.base.arguments import Parser, at_least
from defence.base.process import run_command
from defence.base.progress import say
from defence.base.startup import import_keras, make_reproducible

ROOT = Path(__file__).resolve().parents[2]
SIDE, CELL, BATCH = 224, 28, 100
LARGE_MAP = ("--layer", "block_13_expand_relu", "--threshold", 1, "--rounds", 1, "--epochs", 1)


def make(net_path, data_path, images):
    """Write the net and its pictures."""
    keras, rng = import_keras(), np.random.default_rng(1)
    logging.disable()  # of Keras about .h5
    make_reproducible(0)
    net = keras.applications.MobileNetV2(
        weights=None, input_shape=(SIDE, SIDE, 3), classes=applications.CLASSES, alpha=0.35
    )
    applications.differ(net, draw(rng, BATCH) / np.float32(255))
    net.save(net_path)
    with h5py.File(data_path, "w") as file:
        data = file.create_dataset("data", (images, SIDE, SIDE, 3), np.uint8)
        label = file.create_dataset("label", (images,), np.int64)
        for start in range(0, images, BATCH):
            part = draw(rng, min(BATCH, images - start))
            data[start : start + BATCH] = part
            answers = net.predict_on_batch(part / np.float32(255))
            label[start : start + BATCH] = answers.argmax(axis=1)


def draw(rng, count):
    """Pictures of cells of one colour each: uint8 (count, SIDE, SIDE, 3)."""
    coarse = rng.integers(0, 256, (count, SIDE // CELL, SIDE // CELL, 3), np.uint8)
    return coarse.repeat(CELL, axis=1).repeat(CELL, axis=2)


def main():
    parser = Parser(prog="large.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--images", metavar="N", type=at_least(BATCH, int), default=10_000, help="default: 10000")
    images = parser.parse_args().images
    with tempfile.TemporaryDirectory() as folder:
        net, data, repaired = (Path(folder, name) for name in ("b.h5", "data.h5", "g.h5"))
        in_another_process(make, net, data, images)
        say(f"{images} pictures, {data.stat().st_size / 2**30:.2f} GB")
        rows = [("pruned at", "seconds", "peak memory, MB")]
        for what, options in (("the last map", ()), ("block_13_expand_relu", LARGE_MAP)):
            call = [ROOT / "repair.py", net, data, "--output", repaired, "--scale", "0..1"]
            seconds, peak, said = measure([*call, *options])
            say("\n".join(said.splitlines()[:1]))
            rows.append((what, seconds, peak))
        table(*rows)


if __name__ == "__main__":
    sys.exit(run_command(main))
