"""Change valid files at random and load them. Each must work or be refused with one line.

    python tests/tools/fuzz.py --mutants 2000 --commands 100

Mutants of a small net (.h5, .keras), a dataset and images go through the functions that load them,
in one process, and some through the commands. A mutant that ends otherwise (another exception, a
crash, 20 seconds) stays in --folder and makes the exit status 1.
"""

import argparse
import collections
import contextlib
import copy
import faulthandler
import io
import json
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
import warnings
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import utils
from defence.base.errors import InputError
from defence.base.startup import import_keras

SHAPE, CLASSES = (12, 12, 3), 4
SECONDS = 20
ODD = [None, True, -1, 0, 1, 2**31, 2**63, -0.5, 1e300, "", "x", "Lambda", "relu", [], {}, [[]]]


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
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (10, *SHAPE), np.uint8)
    for name, options in (("plain.h5", {}), ("packed.h5", {"compression": "gzip"})):
        with h5py.File(folder / name, "w") as file:
            file.create_dataset("data", data=images, shuffle=bool(options), **options)
            file.create_dataset("label", data=np.arange(10.0) % CLASSES)
    Image.fromarray(images[0]).save(folder / "face.png")
    Image.fromarray(images[0]).quantize(8).save(folder / "palette.png", transparency=1)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(images[0]).save(folder / "face.jpg", exif=exif)


# ------------------------------------------------------------------------------------- changing


def change_bytes(contents, rng):
    """Overwrite, insert, remove, repeat or cut off bytes at a few places."""
    contents = bytearray(contents)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at, size = rng.randrange(len(contents)), rng.choice([1, 1, 2, 4, 8, 100])
        new = rng.choice([rng.randbytes(size), bytes(size), b"\xff" * size, b"\x7f" + bytes(size)])
        action = rng.random()
        if action < 0.6:
            contents[at : at + len(new)] = new
        elif action < 0.7:
            contents[at:at] = new
        elif action < 0.8:
            del contents[at : at + size]
        elif action < 0.95:
            start = rng.randrange(len(contents))
            contents[at : at + size] = contents[start : start + size]
        else:
            del contents[at:]
        contents = contents or bytearray(b"\0")
    return bytes(contents)


def change_json(text, rng):
    """Replace, remove, add or move parts of a JSON document."""
    document = json.loads(text)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        places = []

        def walk(value, places=places):
            keys = value if isinstance(value, dict) else range(len(value))
            for key in keys:
                places.append((value, key))
                if isinstance(value[key], dict | list):
                    walk(value[key])

        walk(document)
        if not places:
            break
        holder, key = rng.choice(places)
        source, source_key = rng.choice(places)
        action = rng.random()
        if action < 0.5:
            holder[key] = copy.deepcopy(rng.choice(ODD))
        elif action < 0.7:
            holder[key] = copy.deepcopy(source[source_key])
        elif action < 0.85:
            del holder[key]
        elif isinstance(holder, list):
            holder.insert(key, copy.deepcopy(source[source_key]))
        else:
            holder[str(source_key)] = copy.deepcopy(source[source_key])
    return json.dumps(document)


def change_structure(contents, rng):
    """Remove, move, link or reshape objects of an HDF5 file, or change attributes."""
    path = Path(tempfile.gettempdir()) / f"fuzz-{rng.getrandbits(64):x}.h5"
    path.write_bytes(contents)
    try:
        with h5py.File(path, "r+") as file:
            for _ in range(rng.choice([1, 1, 2, 4])):
                names = []
                file.visit(names.append)
                if names:
                    with contextlib.suppress(Exception):  # not every change is possible
                        _change_object(file, rng.choice(names), rng.choice(names), rng)
        return path.read_bytes()
    finally:
        path.unlink()


def _change_object(file, name, other_name, rng):
    action, item = rng.randrange(9), file[name]
    if action == 0:
        del file[name]
    elif action == 1:
        file.move(name, rng.choice([f"{other_name}/moved", f"moved_{rng.random()}"]))
    elif action in (2, 3):
        del file[name]
        soft, external = h5py.SoftLink("/" + other_name), h5py.ExternalLink("x.h5", "/x")
        links = [soft, external, file.get(other_name)]
        file[name] = rng.choice(links)
    elif action in (4, 5, 6) and isinstance(item, h5py.Dataset):
        shape = list(item.shape) or [1]
        shape[rng.randrange(len(shape))] = rng.choice([0, 1, 7, 2**20])
        kind = rng.choice(["f2", "f4", "f8", "i1", "u8", "S3", "?", "c8", item.dtype.str])
        options = rng.choice([{}, {"chunks": True}, {"compression": "gzip"}, {"fletcher32": True}])
        del file[name]
        array = file.create_dataset(name, shape, kind, **options)
        if array.nbytes < 2**22:
            array[...] = np.full(shape, rng.choice([0, 1, 3]), kind)
    else:
        value = rng.choice([1, -1.5, "x", b"\xff", ["a", "b"], [[1]], [b"a"] * 50, [], "{}", "[]"])
        item.attrs[rng.choice([*item.attrs, "new"])] = value


def change_config(contents, rng):
    """Change the JSON that describes a net in an HDF5 file."""
    path = Path(tempfile.gettempdir()) / f"fuzz-{rng.getrandbits(64):x}.h5"
    path.write_bytes(contents)
    try:
        with h5py.File(path, "r+") as file:
            file.attrs["model_config"] = change_json(file.attrs["model_config"], rng)
        return path.read_bytes()
    finally:
        path.unlink()


def change_archive(contents, rng):
    """Change one member of a .keras archive, or its name."""
    archive = zipfile.ZipFile(io.BytesIO(contents))
    members = [(name, archive.read(name)) for name in archive.namelist()]
    at = rng.randrange(len(members))
    name, inside = members[at]
    if name == "config.json" or rng.random() < 0.4:
        at = next(i for i, (name, _) in enumerate(members) if name == "config.json")
        members[at] = ("config.json", change_json(members[at][1], rng))
    elif name == "model.weights.h5":
        members[at] = (name, rng.choice([change_bytes, change_structure])(inside, rng))
    else:
        members[at] = (rng.choice(["../x", "config.json", "x"]), inside)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", rng.choice([0, 0, 0, zipfile.ZIP_DEFLATED])) as archive:
        for name, inside in members:
            archive.writestr(name, inside)
    return out.getvalue()


def change_chunks(contents, rng):
    """Change bytes of a PNG and correct its checksums, so that the change is read."""
    out, at, contents = contents[:8], 8, bytearray(contents)
    while at + 12 <= len(contents):
        size = struct.unpack(">I", contents[at : at + 4])[0]
        body = bytes(contents[at + 4 : at + 8 + size])
        if rng.random() < 0.4:
            body = body[:4] + change_bytes(body[4:] or b"\0", rng)
        out += struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + size
    return out


CHANGES = {
    "net.h5": [change_bytes, change_config, change_config, change_structure],
    "net.keras": [change_bytes, change_archive, change_archive, change_archive],
    "plain.h5": [change_bytes, change_structure],
    "packed.h5": [change_bytes, change_structure],
    "face.png": [change_bytes, change_chunks, change_chunks],
    "palette.png": [change_bytes, change_chunks],
    "face.jpg": [change_bytes],
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
        net = utils.load_badnet(path)
        net(np.zeros((1, *net.input_shape[1:]), np.float32))
    elif path.suffix == ".h5":
        with utils.open_dataset(path) as data:
            data.fit_to(SHAPE, CLASSES)
            for _ in data.batches():
                pass
    else:
        utils.make_input(utils.read_image(path), SHAPE)


def work(folder, seed, start, end):
    """Load mutants start..end-1. Print a line for each: its number, a tab, its ending."""

    def raise_timeout(*_):
        raise TimeoutError(f"{SECONDS} seconds")

    signal.signal(signal.SIGALRM, raise_timeout)
    import_keras()
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
