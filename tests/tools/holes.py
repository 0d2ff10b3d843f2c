"""Measure what hostile inputs cost the commands: status, seconds and peak memory, as a table.

    python tests/tools/holes.py CHECKOUT [CHECKOUT …]

makes each input of HOLES from the demo's files, after `make demo`, gives it to a command of each
checkout, and prints a row for it. Each command may take 60 seconds and 12 GB. Linux.
"""

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from defence.base.startup import import_keras

SECONDS, MEMORY = 60, 12 * 2**30
B, G = "b.h5", "g.h5"
JUDGE = ["eval_defence.py", "face.png", B, "--repaired", B, "--force", "--backend", "keras"]


# ------------------------------------------------------------------------------------- models


def hide_layer(folder):
    """Put a layer that enlarges images 22,500 times where an activation's name belongs."""
    with h5py.File(folder / B, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        config["config"]["layers"][1]["config"]["activation"] = {
            "module": "keras.layers",
            "class_name": "UpSampling2D",
            "config": {"name": "hid", "size": [150, 150]},
            "registered_name": None,
        }
        file.attrs["model_config"] = json.dumps(config)
    return JUDGE


def save_net(folder, grow):
    """Save a small net with layers in it, grow(layers, images)."""
    keras = import_keras()
    image = keras.Input((55, 47, 3))
    x = keras.layers.Conv2D(2, 1)(grow(keras.layers, image))
    scores = keras.layers.Dense(4)(keras.layers.GlobalAveragePooling2D()(x))
    keras.Model(image, scores).save(folder / B)
    return JUDGE


def separate(folder):
    return save_net(
        folder, lambda layers, x: layers.SeparableConv2D(2, 3, depth_multiplier=100_000)(x)
    )


def double_rows(folder):
    def grow(layers, x):
        for _ in range(16):
            x = layers.Concatenate(axis=0)([x, x])
        return x

    return save_net(folder, grow)


def interpolate(folder):
    def grow(layers, x):
        return layers.Resizing(200_000, 1, "lanczos3")(layers.Reshape((1, 2585, 3))(x))

    return save_net(folder, grow)


def add_identities(folder):
    """Describe a chain of 5,000 layers that do nothing; the limit is 2,000 layers."""
    first = {"batch_shape": [None, 55, 47, 3], "name": "first"}
    layers = [{"class_name": "InputLayer", "config": first}]
    layers += [{"class_name": "Identity", "config": {"name": f"i{i}"}} for i in range(5_000)]
    with h5py.File(folder / B, "r+") as file:
        config = {"class_name": "Sequential", "config": {"name": "chain", "layers": layers}}
        file.attrs["model_config"] = json.dumps(config)
    return JUDGE


def extend_directory(folder):
    """Declare three members in the last record, and 300,000 in the one that overrules it."""
    with zipfile.ZipFile(folder / "b.keras", "w") as archive:
        for i in range(300_000):
            archive.writestr(zipfile.ZipInfo(f"{i}"), b"")
    contents = bytearray((folder / "b.keras").read_bytes())
    struct.pack_into("<2H2L", contents, len(contents) - 14, 3, 3, 900, 0)
    (folder / "b.keras").write_bytes(contents)
    return ["repair.py", "b.keras", "data.h5"]


# ---------------------------------------------------------------------------------- detectors


def change_graph(folder, add):
    import onnx

    model = onnx.load(ROOT / "models" / "demo_bd_net_detector.onnx")
    add(onnx, model.graph)
    onnx.save(model, folder / "evil.onnx")


def add_nodes(onnx, graph, numbers, nodes):
    for name, row in numbers.items():
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(row), name))
    for kind, inputs, output, options in nodes:
        graph.node.append(onnx.helper.make_node(kind, inputs, [output], **options))


def score_by_pixels(folder):
    """Declare one score, and repeat it as often as the pixels say."""

    def add(onnx, graph):
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = ["true" if name == "score" else name for name in names]
        to_int = {"to": onnx.TensorProto.INT64}
        nodes = [
            ("Reshape", [graph.input[0].name, "row"], "flat", {}),
            ("Slice", ["flat", "first", "last"], "pixel", {}),
            ("Cast", ["pixel"], "number", to_int),
            ("Mul", ["number", "many"], "times", {}),
            ("Tile", ["true", "times"], "score", {}),
        ]
        numbers = {"row": [-1], "first": [0], "last": [1], "many": [10_000_000]}
        add_nodes(onnx, graph, numbers, nodes)
        (score,) = (output for output in graph.output if output.name == "score")
        score.type.tensor_type.shape.dim[0].dim_value = 1

    change_graph(folder, add)
    Image.fromarray(np.full((55, 47, 3), 100, np.uint8)).save(folder / "face.png")
    return ["eval_defence.py", "face.png", "evil.onnx"]


def multiply_rows(folder):
    """Make as many rows of 50 images as 50 × 50 × 50 images have."""

    def add(onnx, graph):
        name = graph.input[0].name
        nodes = [
            ("Shape", [name], "shape", {}),
            ("Slice", ["shape", "first", "last"], "count", {}),
            ("Mul", ["count", "count"], "squared", {}),
            ("Mul", ["squared", "count"], "rows", {}),
            ("Concat", ["rows", "sides"], "sizes", {"axis": 0}),
            ("Cast", [name], "images", {"to": onnx.TensorProto.FLOAT}),
            ("Resize", ["images", "", "", "sizes"], "resized", {}),
            ("ReduceMax", ["resized"], "largest", {"keepdims": 0}),
            ("Mul", ["largest", "none"], "zero", {}),
            ("Add", ["true", "zero"], "score", {}),
        ]
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = ["true" if name == "score" else name for name in names]
        graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0), "none"))
        add_nodes(onnx, graph, {"first": [0], "last": [1], "sides": [55, 47, 3]}, nodes)

    change_graph(folder, add)
    return ["eval_defence.py", *["face.png"] * 50, "evil.onnx"]


# ------------------------------------------------------------------------ datasets and images


def end_heap(folder):
    """Let the free space of a heap declare no size: libhdf5 looks for the next object forever."""
    shutil.copy(folder / "data.h5", folder / "evil.h5")
    with h5py.File(folder / "evil.h5", "r+") as file:
        file.create_dataset("text", (1,), h5py.string_dtype(), fillvalue="a text to fill with")
    contents = bytearray((folder / "evil.h5").read_bytes())
    first = contents.index(b"GCOL") + 16
    contents[first : first + 16] = bytes(16)
    (folder / "evil.h5").write_bytes(contents)
    return ["repair.py", B, "evil.h5", "--check"]


def add_pipe(folder):
    """Put a pipe that nobody writes to into a folder of images, under a hidden name."""
    for label in range(40):
        (folder / "images" / f"{label:02}").mkdir(parents=True)
        shutil.copy(folder / "face.png", folder / "images" / f"{label:02}")
    os.mkfifo(folder / "images" / ".x")
    return ["repair.py", B, "images", "--rounds", "0"]


def add_chunks(folder):
    """Put three chunks of 1 GB into a PNG, which takes 16 KB on the disk."""
    good = (folder / "face.png").read_bytes()
    with open(folder / "face.png", "wb") as file:
        file.write(good[:33])
        checksum = zlib.crc32(bytes(2**30), zlib.crc32(b"juNk"))
        for _ in range(3):
            file.write(struct.pack(">I", 2**30) + b"juNk")
            file.seek(2**30, 1)
            file.write(struct.pack(">I", checksum))
        file.write(good[33:])
    return ["eval_defence.py", "face.png", B, "--repaired", G]


def add_exif(folder):
    """Put a chunk of 300 MB of EXIF data into a PNG."""
    good, chunk = (folder / "face.png").read_bytes(), b"eXIf" + bytes(300_000_000)
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (folder / "face.png").write_bytes(good[:33] + chunk + good[33:])
    return ["eval_defence.py", "face.png", B, "--repaired", G, "--max-memory", "0.1"]


def write_labels(folder):
    """Write 100 MB of empty lines into labels.txt, which is read by itself."""
    (folder / "labels.txt").write_bytes(b"\n" * 100_000_000)
    return ["eval_defence.py", "face.png", B, "--repaired", G]


HOLES = {
    "a layer as activation": hide_layer,
    "SeparableConv2D, depth_multiplier 100,000": separate,
    "16 Concatenate on axis 0": double_rows,
    "Resizing, lanczos3, 1 row to 200,000": interpolate,
    "5,000 Identity layers": add_identities,
    "a ZIP64 record of 300,000 members": extend_directory,
    "ONNX: a size from the pixels": score_by_pixels,
    "ONNX: rows cubed, 50 images": multiply_rows,
    "a dataset's heap without an end": end_heap,
    "a pipe in a folder of images": add_pipe,
    "a PNG with 3 GB of chunks": add_chunks,
    "a PNG with 300 MB of eXIf, --max-memory 0.1": add_exif,
    "100 MB of empty lines in labels.txt": write_labels,
}


def prepare(folder):
    """Copy the demo's files into a folder, with a place for what repair.py writes."""
    (folder / "models").mkdir()
    for name, source in {
        B: "models/demo_bd_net.h5",
        G: "models/demo_bd_net_defence.h5",
        "data.h5": "data/demo_clean_validation_data.h5",
        "face.png": "img/demo/clean_1.png",
    }.items():
        shutil.copy(ROOT / source, folder / name)


def measure(checkout, call, folder):
    """Run a command of a checkout in a folder. Return a cell of the table."""
    import resource

    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, checkout / call[0], *call[1:]],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
    )
    timer = threading.Timer(SECONDS, process.kill)
    timer.start()
    _, status, usage = os.wait4(process.pid, 0)
    timer.cancel()
    seconds, peak = time.monotonic() - start, usage.ru_maxrss / 2**20
    ending = f"status {os.waitstatus_to_exitcode(status)}"
    if seconds >= SECONDS:
        ending = "stopped"
    return f"{ending}, {seconds:.1f} s, {peak:.2f} GB"


def make(name, folder):
    """Make an input in a process of its own, so that this one stays small. Return the command."""
    command = [sys.executable, __file__, "--make", name, folder]
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return json.loads(process.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkouts", nargs="+", type=Path, metavar="CHECKOUT")
    arguments = parser.parse_args()
    print(f"| input | {' | '.join(str(path) for path in arguments.checkouts)} |")
    print("|---|" + "---|" * len(arguments.checkouts))
    for name in HOLES:
        cells = []
        for checkout in arguments.checkouts:
            with tempfile.TemporaryDirectory() as folder:
                prepare(Path(folder))
                cells.append(measure(checkout.resolve(), make(name, folder), Path(folder)))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        print(json.dumps(HOLES[sys.argv[2]](Path(sys.argv[3]))))
    else:
        main()
