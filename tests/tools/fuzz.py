"""Change valid files at random and load them. Each must work or be refused with one line.

    python tests/tools/fuzz.py --mutants 2000 --commands 100

Mutants of a small net (.h5, .keras), datasets, images and a detector (.onnx) go through the
functions that load them, in one process, and some through the commands. A mutant that ends
otherwise (another exception, a crash, 20 seconds, 2 GB) stays in --folder and makes the exit
status 1.
"""

import argparse
import collections
import faulthandler
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mutants import (
    change_archive,
    change_bytes,
    change_chunks,
    change_config,
    change_graph,
    change_heaps,
    change_structure,
)

import utils
from defence.base.errors import InputError
from defence.base.startup import import_keras
from defence.judge import backends, onnx_file
from defence.load.models import read_model

SHAPE, CLASSES = (12, 12, 3), 4
SECONDS, MAX_BYTES = 20, 2**28
ROOM = 8 * MAX_BYTES  # of address space that loading and running a mutant may take


def make_seeds(folder):
    """Write the valid files that mutants are made of."""
    keras = import_keras()
    layers = keras.layers
    image = x = keras.Input(SHAPE, name="image")
    for name in ("conv_1", "conv_2"):
        x = layers.Conv2D(3, 3, activation="relu", name=name)(x)
    x = layers.Dropout(0.1)(layers.BatchNormalization()(layers.MaxPooling2D(2)(x)))
    scores = layers.Dense(CLASSES, activation="softmax")(layers.Flatten()(x))
    net = keras.Model(image, scores)
    net.save(folder / "net.h5")
    net.save(folder / "net.keras")
    net.set_weights([-2 * values for values in net.get_weights()])
    net.save(folder / "other.h5")
    models = [read_model(folder / name) for name in ("net.h5", "other.h5")]
    backends.export_detector(*models, folder / "detector.onnx")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (10, *SHAPE), np.uint8)
    for name, options in (("plain.h5", {}), ("packed.h5", {"compression": "gzip"})):
        with h5py.File(folder / name, "w") as file:
            file.create_dataset("data", data=images, shuffle=bool(options), **options)
            file.create_dataset("label", data=np.arange(10.0) % CLASSES)
    with h5py.File(folder / "filled.h5", "w") as file:  # heaps of texts, and groups with both trees
        file.create_dataset("data", data=images)
        file.create_dataset("label", data=np.arange(10) % CLASSES)
        file.create_dataset("text", (4,), h5py.string_dtype(), fillvalue="a text to fill with")
        file.create_group("old/group").attrs["names"] = ["a", "bc"] * 9
        file.create_group("new", track_order=True).create_group("group")
    Image.fromarray(images[0]).save(folder / "face.png")
    Image.fromarray(images[0]).quantize(8).save(folder / "palette.png", transparency=1)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(images[0]).save(folder / "face.jpg", exif=exif)


# ------------------------------------------------------------------------------------- changing

CHANGES = {
    "net.h5": [change_bytes, change_config, change_config, change_structure],
    "net.keras": [change_bytes, change_archive, change_archive, change_archive],
    "plain.h5": [change_bytes, change_structure],
    "packed.h5": [change_bytes, change_structure],
    "filled.h5": [change_heaps],
    "face.png": [change_bytes, change_chunks, change_chunks],
    "palette.png": [change_bytes, change_chunks],
    "face.jpg": [change_bytes],
    "detector.onnx": [change_bytes, change_graph, change_graph],
}


def write_mutant(folder, seed, number):
    """Write mutant `number` of a run. Return its Path."""
    rng = random.Random(f"{seed} {number}")
    name = rng.choice([*["net.h5", "net.keras"] * 2, *CHANGES])
    change = rng.choice(CHANGES[name])
    path = folder / f"{number}-{change.__name__}-{name}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a duplicate name in an archive is intended
        path.write_bytes(change((folder / name).read_bytes(), rng))
    return path


# -------------------------------------------------------------------------------------- loading


def load(path):
    """Load a mutant and use it, as the commands do."""
    if "net" in path.name:
        net = utils.load_badnet(path, MAX_BYTES)
        for count in (1, 3):
            scores = net(np.zeros((count, *net.input_shape[1:]), np.float32))
            assert scores.shape == (count, net.output_shape[1])
    elif path.suffix == ".onnx":
        file = onnx_file.read_detector(path, MAX_BYTES)
        for count in (1, 3):
            answers = file.run(np.zeros((count, *file.shape), np.float32))
            assert all(values.shape == (count,) for values in answers.values())
    elif path.suffix == ".h5":
        with utils.open_dataset(path, MAX_BYTES) as data:
            data.fit_to(SHAPE, CLASSES)
            for _ in data.batches():
                pass
    else:
        utils.make_input(utils.read_image(path, MAX_BYTES), SHAPE)


def limit_address_space():
    """Let this process take ROOM more than it has: what takes more ends in an error."""
    if Path("/proc/self/statm").exists():
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))


def work(folder, seed, start, end):
    """Load mutants start..end-1. Print a line for each: its number, a tab, its ending."""

    def raise_timeout(*_):
        raise TimeoutError(f"{SECONDS} seconds")

    signal.signal(signal.SIGALRM, raise_timeout)
    import_keras()
    load(folder / "net.h5")  # which starts threads and reserves address space
    load(folder / "detector.onnx")
    limit_address_space()
    for number in range(start, end):
        path = write_mutant(folder, seed, number)
        signal.alarm(SECONDS)
        faulthandler.dump_traceback_later(SECONDS + 5, exit=True)  # if a library hangs
        try:
            load(path)
            ending = "works"
        except InputError as error:
            one_line = "\n" not in str(error) and str(error).startswith(str(path))
            ending = "refused" if one_line else f"refused badly: {str(error)!r}"
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            ending = f"{type(error).__name__} in {frame.filename}, line {frame.lineno}: {error}"
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        if ending in ("works", "refused"):
            path.unlink()
        print(number, ending.replace("\n", " "), sep="\t", flush=True)


def run_loading(folder, seed, count):
    """Yield the ending of each mutant. After a crash a new process goes on."""
    start = 0
    while start < count:
        process = subprocess.Popen(
            [sys.executable, __file__, "--work", str(folder), str(seed), str(start), str(count)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for line in process.stdout:
            start = int(line.split("\t")[0]) + 1
            yield line.split("\t", 1)[1].strip()
        if process.wait() and start < count:
            names = ", ".join(path.name for path in folder.glob(f"{start}-*"))
            yield f"the process ended with status {process.returncode}: {names}"
            start += 1


def run_commands(folder, seed, count):
    """Yield the ending of the command that reads each mutant."""
    net, data = folder / "net.h5", folder / "plain.h5"
    for number in range(count):
        path = write_mutant(folder, f"{seed} commands", number)
        if "net" in path.name:
            command = ["repair.py", path, data]
        elif path.suffix == ".h5":
            command = ["repair.py", net, path]
        elif path.suffix == ".onnx":
            command = ["eval_defence.py", folder / "face.png", path]
        else:
            command = ["eval_defence.py", path, net, "--repaired", net]
        if command[0] == "repair.py":
            command += ["--rounds", 1, "--threshold", 0.9, "--output", folder / "out.h5"]
        try:
            process = subprocess.run(
                [sys.executable, ROOT / command[0], *map(str, command[1:])],
                capture_output=True,
                text=True,
                timeout=60,
            )
            errors = [line for line in process.stderr.splitlines() if ": error: " in line]
            expected = {0: (0, "works"), 2: (1, "refused")}.get(process.returncode)
            if expected and expected[0] == len(errors) and "Traceback" not in process.stderr:
                path.unlink()
                yield expected[1]
            else:
                yield f"{path.name}: status {process.returncode}: {process.stderr[-300:]!r}"
        except subprocess.TimeoutExpired:
            yield f"{path.name}: 60 seconds"


def main():
    parser = argparse.ArgumentParser(description="Fuzz the loading of models, data and images.")
    parser.add_argument("--mutants", type=int, default=2000, help="through the loading functions")
    parser.add_argument("--commands", type=int, default=100, help="through the commands")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for mutants that fail")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="fuzz-"))
    folder.mkdir(exist_ok=True)
    os.environ["XDG_STATE_HOME"] = str(folder / "state")  # not the user's list of exports
    make_seeds(folder)
    failed = 0
    for part, run_mutants, count in (
        ("loading", run_loading, arguments.mutants),
        ("commands", run_commands, arguments.commands),
    ):
        endings = collections.Counter()
        for ending in run_mutants(folder, arguments.seed, count):
            endings[ending if ending in ("works", "refused") else "failed"] += 1
            if ending not in ("works", "refused"):
                print(f"{part}: {ending}", file=sys.stderr, flush=True)
        counts = ", ".join(f"{number} {ending}" for ending, number in endings.items())
        print(f"{part}: {count} mutants: {counts}")
        failed += endings["failed"]
    if failed:
        print(f"failed mutants are in {folder}")
    elif arguments.folder is None:
        shutil.rmtree(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        folder, seed, start, end = sys.argv[2:]
        sys.exit(work(Path(folder), seed, int(start), int(end)))
    sys.exit(main())
