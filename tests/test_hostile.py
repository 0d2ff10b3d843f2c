"""Hostile files: each kind is made here and given to the real commands, which must refuse it.

Refused is: status 2, one line on stderr that names what was found, nothing on stdout. The commands
run in one other process, with 2 GB of address space beyond what a good run takes. A payload that
ran would leave a file, the canary; the tests at the top show that the same payloads do their work
where nothing guards.
"""

import contextlib
import copy
import functools
import json
import multiprocessing
import os
import re
import resource
import shutil
import stat
import struct
import subprocess
import sys
import types
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from conftest import (
    ROOT,
    apart,
    assert_refused,
    command,
    draw_images,
    read_record,
    write_data,
    write_record,
)
from PIL import Image, PngImagePlugin

import utils
from defence import files, guard
from defence.architecture import deepid

SHAPE, CLASSES = (31, 31, 3), 6
FORMATS = [".h5", ".keras"]
SECRET = bytes(range(64, 128)) * 300


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with a valid net b.h5, b.keras, its repaired net, a dataset and a picture."""
    folder = tmp_path_factory.mktemp("good")
    keras.utils.set_random_seed(1)  # a net that answers no image right would not be repaired
    net = deepid(CLASSES, SHAPE)
    for suffix in FORMATS:
        net.save(folder / f"b{suffix}")
    images, labels = draw_images(12, CLASSES, SHAPE, seed=0)
    write_data(folder / "data.h5", images, labels)
    Image.fromarray(images[0]).save(folder / "face.png")
    net.set_weights([1.01 * values for values in net.get_weights()])
    utils.save_model(net, folder / "g.h5", repair_record=write_record(folder / "b.h5"))
    (folder / "secret").write_bytes(SECRET)
    return folder


def limit_memory(folder):
    """Make a good repair and a good verdict, and allow this process 2 GB beyond what they took."""
    for call in (
        ("repair.py", "b.h5", "data.h5", "--rounds", 1, "--threshold", 0, "--output", "x.h5"),
        ("eval_defence.py", "face.png", "b.h5", "--repaired", "g.h5"),
    ):
        process = command(*call, cwd=folder)
        assert process.returncode == 0, process.stderr
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        most = 1024 * int(re.search(r"VmPeak:\s+(\d+)", status)[1]) + 2 * 2**30
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


@pytest.fixture(scope="module")
def worker(good):
    """A function like conftest.command, that runs in another process with limited memory.

    A file that crashes it ends the tests that follow, too.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=limit_memory, initargs=[good]) as pool:
        yield lambda *call, cwd: pool.submit(command, *call, cwd=cwd).result(timeout=120)


@pytest.fixture
def run(worker, tmp_path):
    """Run a command in tmp_path on the files of `good` or others."""
    return functools.partial(worker, cwd=tmp_path)


@pytest.fixture
def refused(good, run, tmp_path):
    """Give a file to the command that reads it first; it must be refused with these words."""

    def refused(path, *words, **given):
        if given.get("data"):
            process = run("repair.py", good / "b.h5", path, "--output", "out.h5")
        elif path.suffix in FORMATS:
            process = run("repair.py", path, good / "data.h5", "--output", "out.h5")
        else:
            process = run("eval_defence.py", path, good / "b.h5", "--repaired", good / "g.h5")
        assert_refused(process, str(path), *words)
        assert len(process.stderr) < 2_000
        assert not (tmp_path / "out.h5").exists() and not (tmp_path / "canary").exists()

    return refused


# --------------------------------------------------------------------- making and changing files


def read_config(path):
    if path.suffix == ".keras":
        return json.loads(zipfile.ZipFile(path).read("config.json"))
    with h5py.File(path) as file:
        return json.loads(file.attrs["model_config"])


def write_config(path, config):
    """Replace the config in a model file; `config` may be text that is no JSON."""
    text = config if isinstance(config, str) else json.dumps(config)
    if path.suffix == ".keras":
        archive = zipfile.ZipFile(path)
        members = {name: archive.read(name) for name in archive.namelist()}
        write_archive(path, {**members, "config.json": text})
    else:
        with h5py.File(path, "r+") as file:
            file.attrs["model_config"] = text
    return path


def write_archive(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, contents in members.items() if isinstance(members, dict) else members:
            archive.writestr(name, contents)
    return path


def copied(good, folder, suffix=".h5"):
    return shutil.copy(good / f"b{suffix}", folder / f"evil{suffix}")


def with_layer(path, **changes):
    """Put another layer in place of 'activation_1', which has no weights: a model that builds."""
    config = read_config(path)
    layer = next(x for x in config["config"]["layers"] if x["config"]["name"] == "activation_1")
    inner = changes.get("config", {})
    named = {"name": "activation_1", **inner} if isinstance(inner, dict) else inner
    layer.update({**changes, "config": named})
    return write_config(path, config)


def with_value(path, layer, key, value):
    """Set one value in the config of a layer."""
    config = read_config(path)
    part = next(x for x in config["config"]["layers"] if x["config"]["name"] == layer)
    part["config"][key] = value
    return write_config(path, config)


def edited(path, change):
    """Open an HDF5 file, or the one in an archive, to `change(file)` it."""
    if path.suffix != ".keras":
        with h5py.File(path, "r+") as file:
            change(file)
        return path
    inside = path.with_name("inside.h5")
    archive = zipfile.ZipFile(path)
    members = {name: archive.read(name) for name in archive.namelist()}
    inside.write_bytes(members["model.weights.h5"])
    with h5py.File(inside, "r+") as file:
        change(file)
    return write_archive(path, {**members, "model.weights.h5": inside.read_bytes()})


KERNELS = {
    ".h5": "model_weights/conv_3/conv_3/kernel",
    ".keras": "layers/conv2d_2/vars/0",
}


def replace(path, put, name=None):
    """Replace an array of a file, conv_3's kernel unless named: put(group, key)."""

    def change(file):
        within, _, key = (name or KERNELS[path.suffix]).rpartition("/")
        group = file[within or "/"]
        del group[key]
        put(group, key)

    return edited(path, change)


# -------------------------------------------------------------------------- no code from a file


def lambda_net(canary):
    """A net with a Python lambda inside that leaves the canary."""
    payload = compile(f"lambda x: (open({str(canary)!r}, 'w'), x)[1]", "f", "eval").co_consts[0]
    image = keras.Input(SHAPE, name="input")
    x = keras.layers.Conv2D(4, 3, name="conv")(image)
    x = keras.layers.Lambda(types.FunctionType(payload, {}), name="payload")(x)
    x = keras.layers.Flatten(name="flat")(x)
    return keras.Model(image, keras.layers.Dense(CLASSES, name="output")(x))


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_lambda_is_refused_that_runs_where_nothing_guards(suffix, refused, tmp_path):
    path, canary = tmp_path / f"lambda{suffix}", tmp_path / "canary"
    net = lambda_net(canary)
    net.save(path)
    assert canary.exists()  # it ran when the net was built
    canary.unlink()
    refused(path, "contains a Lambda layer (layer 'payload'): it could run code from the file")
    keras.config.enable_unsafe_deserialization()
    try:
        keras.saving.load_model(path, compile=False, safe_mode=False)
    finally:
        # The switch has no opposite.
        keras.src.backend.common.global_state.set_global_attribute("safe_mode_saving", None)
    assert canary.exists()


def function(module, name):
    return {"module": module, "class_name": "function", "config": name, "registered_name": name}


CODE = {
    "keras function in a lambda": (
        {"class_name": "Lambda", "config": {"function": function("keras.utils", "get_file")}},
        "Lambda layer (layer 'activation_1')",
    ),
    "switch off safe mode": (
        function("keras.config", "enable_unsafe_deserialization"),
        "'function'",
    ),
    "module os": ({"class_name": "system", "module": "os", "config": {}}, "'system'"),
    "known name, other module": (
        {"class_name": "Dense", "module": "evil", "config": {"units": 3}},
        "'evil'",
    ),
    "registered": (
        {"class_name": "Dense", "registered_name": "evil>Dense", "config": {"units": 3}},
        "'evil>Dense'",
    ),
    "custom": ({"class_name": "MyLayer"}, "'MyLayer'"),
    "function as class": ({"class_name": "deserialize", "config": {"config": {}}}, "'deserialize'"),
    "no text as class": ({"class_name": ["Dense"]}, "['Dense']"),
    "SavedModel": (
        {"class_name": "TFSMLayer", "config": {"filepath": "secret"}},
        "contains a TFSMLayer layer",
    ),
    "pickle": (
        {"class_name": "TorchModuleWrapper", "config": {"module": "gASV"}},
        "contains a TorchModuleWrapper layer",
    ),
    "reads a file": (
        {"class_name": "StringLookup", "config": {"vocabulary": "secret"}},
        "'StringLookup'",
    ),
    "reads text": (
        {"class_name": "TextVectorization", "config": {"vocabulary": "secret"}},
        "'TextVectorization'",
    ),
    "augmentation": ({"class_name": "RandomCrop"}, "'RandomCrop'"),
    "preprocessing": ({"class_name": "Hashing", "config": {"num_bins": 9}}, "'Hashing'"),
    "in a wrapper": (
        {"class_name": "TimeDistributed", "config": {"layer": {"class_name": "Lambda"}}},
        "'TimeDistributed'",
    ),
    "in a nested model": (
        {
            "class_name": "Sequential",
            "config": {"layers": [{"class_name": "Lambda", "config": {"name": "deep"}}]},
        },
        "Lambda layer (layer 'deep')",
    ),
    "an activation": ({"class_name": "Activation", "config": {"activation": "evil"}}, "'evil'"),
    "an activation that is a function": (
        {"class_name": "Activation", "config": {"activation": function("os", "system")}},
        "'function'",
    ),
    "a lambda as activation": (
        {"class_name": "Activation", "config": {"activation": {"class_name": "__lambda__"}}},
        "Lambda layer",
    ),
    "an initializer": (
        {"class_name": "Dense", "config": {"kernel_initializer": function("os", "system")}},
        "'function'",
    ),
    "an argument of a call": (
        {
            "class_name": "Activation",
            "config": {"activation": "relu"},
            "inbound_nodes": [{"args": [{"class_name": "__lambda__", "config": {}}]}],
        },
        "Lambda layer",
    ),
    "an argument that is no tensor": (
        {
            "class_name": "BatchNormalization",
            "inbound_nodes": [{"args": ["secret"], "kwargs": {"mask": "secret"}}],
        },
        "calls a layer on something other than a tensor",
    ),
    "a policy": (
        {
            "class_name": "Activation",
            "config": {"dtype": {"class_name": "DTypePolicy", "config": {"name": "string"}}},
        },
        "the dtype 'string'",
    ),
    "a type": (
        {"class_name": "Activation", "config": {"activation": "relu", "dtype": "string"}},
        "the dtype 'string'",
    ),
}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("kind", CODE)
def test_what_could_run_code_or_is_no_part_of_a_classifier(kind, suffix, good, refused, tmp_path):
    changes, words = CODE[kind]
    refused(with_layer(copied(good, tmp_path, suffix), **changes), words)


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_a_nested_model_was_compiled_with_is_never_read(suffix, good, run, tmp_path):
    layers = [
        {"class_name": "InputLayer", "config": {"batch_shape": [None, 160], "name": "inside"}},
        {"class_name": "ReLU", "config": {"name": "relu"}},
    ]
    evil = {"optimizer": {"class_name": "__lambda__", "config": {"value": "open('canary', 'w')"}}}
    path = with_layer(
        copied(good, tmp_path, suffix),
        class_name="Sequential",
        module="keras",
        config={"layers": layers},
        compile_config=evil,
    )
    process = run("repair.py", path, good / "data.h5", "--threshold", 0, "--output", "out.h5")
    assert process.returncode == 0, process.stderr
    assert {path.name, "out.h5", "out_detector.onnx"} == set(os.listdir(tmp_path)) - {"inside.h5"}


# ----------------------------------------------------------------------------- no other file


def external_link(group, key):
    group[key] = h5py.ExternalLink("elsewhere.h5", "/kernel")


def soft_link(group, key):
    group[key] = h5py.SoftLink("/somewhere")


def external_storage(group, key):
    group.create_dataset(key, (3, 3, 40, 60), "f4", external=[("secret", 0, 86_400)])


def virtual(group, key):
    layout = h5py.VirtualLayout((3, 3, 40, 60), "f4")
    layout[:] = h5py.VirtualSource("elsewhere.h5", "kernel", (3, 3, 40, 60))
    group.create_virtual_dataset(key, layout)


def loop(group, key):
    group[key] = group.parent


def twice(group, key):
    group[key] = np.zeros((3, 3, 40, 60), "f4")
    group["again"] = group[key]


ELSEWHERE = {
    external_link: "is a soft or external link",
    soft_link: "is a soft or external link",
    external_storage: "is stored in another file",
    virtual: "is stored in another file",
    loop: "is a second name of another object",
    twice: "is a second name of another object",
}


def test_h5py_follows_what_is_refused_below(tmp_path):
    secret = np.frombuffer(SECRET[:64], "f4")
    (tmp_path / "secret").write_bytes(SECRET)
    with h5py.File(tmp_path / "elsewhere.h5", "w") as file:
        file["kernel"] = secret
    with h5py.File(tmp_path / "evil.h5", "w") as file:
        file["link"] = h5py.ExternalLink("elsewhere.h5", "/kernel")
        file.create_dataset("stored", (16,), "f4", external=[(str(tmp_path / "secret"), 0, 64)])
        layout = h5py.VirtualLayout((16,), "f4")
        layout[:] = h5py.VirtualSource("elsewhere.h5", "kernel", (16,))
        file.create_virtual_dataset("virtual", layout)
    with h5py.File(tmp_path / "evil.h5") as file:
        for name in ("link", "stored", "virtual"):
            assert np.array_equal(file[name][:], secret), name


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("put", ELSEWHERE, ids=lambda put: put.__name__)
def test_a_model_that_reads_elsewhere(put, suffix, good, refused, tmp_path):
    refused(replace(copied(good, tmp_path, suffix), put), ELSEWHERE[put])


@pytest.mark.parametrize("name", ["data", "label", "unread"])
@pytest.mark.parametrize("put", ELSEWHERE, ids=lambda put: put.__name__)
def test_a_dataset_that_reads_elsewhere(put, name, good, refused, tmp_path):
    path = shutil.copy(good / "data.h5", tmp_path / "evil.h5")
    with h5py.File(path, "r+") as file:
        file["unread"] = 1
    refused(replace(path, put, name), ELSEWHERE[put], data=True)


# --------------------------------------------------------------------------------- exhaustion


def chain(count):
    """The config of a Sequential of `count` layers."""
    layers = [{"class_name": "InputLayer", "config": {"batch_shape": [None, *SHAPE], "name": "i"}}]
    layers += [{"class_name": "ReLU", "config": {"name": f"r{i}"}} for i in range(count)]
    return {"class_name": "Sequential", "config": {"name": "s", "layers": layers}}


CONFIGS = {
    "a layer of 25 million units": (
        lambda path: with_value(path, "fc_1", "units", 25_000_000),
        "2.5e+07 (layer 'fc_1')",
    ),
    "layers that are too large together": (
        lambda path: with_value(path, "conv_3", "filters", 900_000),
        "GB of memory, more than --max-memory 1",
    ),
    "an input that is too large": (
        lambda path: with_value(path, "input", "batch_shape", [None, 20_000, 20_000, 3]),
        {
            ".h5": "weights up to layer 'fc_1' would take 223.16 GB",
            ".keras": "expected axis -1 of input shape",
        },
    ),
    "a window of a million pixels": (
        lambda path: with_value(path, "pool_1", "pool_size", [10**6, 10**6]),
        "the number 1e+06 (layer 'pool_1')",
    ),
    "too many inputs": (
        lambda path: with_layer(
            path, class_name="Add", inbound_nodes=[[["add_1", 0, 0, {}]] * 20_000]
        ),
        "10,000 inputs of layers",
    ),
    "too many layers": (lambda path: write_config(path, chain(3_000)), "more than 2,000 layers"),
    "deep nesting": (
        lambda path: write_config(path, '{"config":' + '{"a":' * 200 + "1" + "}" * 201),
        "nested deeper",
    ),
    "deeper nesting": (
        lambda path: write_config(path, '{"config":' + "[" * 100_000 + "]" * 100_000 + "}"),
        "JSON cannot be read",
    ),
    "long text": (
        lambda path: write_config(path, '{"config":"' + "a" * 9_000_000 + '"}'),
        "JSON is longer",
    ),
    "a number of many digits": (
        lambda path: write_config(path, '{"config":{"a":' + "9" * 5_000 + "}}"),
        "JSON cannot be read",
    ),
    "infinity": (
        lambda path: write_config(path, '{"config":{"a":Infinity}}'),
        "JSON cannot be read",
    ),
    "a name that steers the terminal": (
        lambda path: with_value(path, "fc_1", "name", "\x1b[2Jx\nrepair.py: all well"),
        "contains an invalid name",
    ),
}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_that_asks_for_too_much(kind, suffix, good, refused, tmp_path):
    change, words = CONFIGS[kind]
    words = words[suffix] if isinstance(words, dict) else words
    refused(change(copied(good, tmp_path, suffix)), words)


def enlarged(x):
    """471 million pixels, and no weight."""
    return keras.layers.MaxPooling2D(700)(keras.layers.UpSampling2D(700)(x))


def dilated(x):
    """TensorFlow adds 999 pixels on each side, to 70 channels."""
    x = keras.layers.Conv2D(70, 3)(x)
    return keras.layers.Conv2D(2, 3, dilation_rate=999, padding="same")(x)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("layers", [enlarged, dilated])
def test_a_layer_whose_output_is_too_large(layers, suffix, refused, tmp_path):
    image = keras.Input(SHAPE)
    x = keras.layers.Flatten()(keras.layers.Conv2D(2, 3)(layers(image)))
    keras.Model(image, keras.layers.Dense(CLASSES)(x)).save(tmp_path / f"evil{suffix}")
    refused(tmp_path / f"evil{suffix}", "the largest output of a layer would take")


def unstored(group, key):
    """A kilobyte that declares 4 GB."""
    group.create_dataset(key, (2**30,), "f4")


def sparse(group, key):
    group.create_dataset(key, (2**30,), "f4", chunks=(2**20,), compression="gzip")


def compressed(group, key):
    """2 MB of file, 2 GB of zeros."""
    array = group.create_dataset(key, (2**29,), "f4", chunks=(2**24,), compression="gzip")
    zeros = zlib.compress(bytes(2**26), 9)
    for start in range(0, 2**29, 2**24):
        array.id.write_direct_chunk((start,), zeros)


@functools.cache
def endless_zeros():
    """A deflate stream of 2 MB that inflates to 2 GB."""
    packer = zlib.compressobj(9)
    parts = [packer.compress(bytes(2**24)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2)]
    return parts[0] + parts[1] * 127  # what follows a full flush stands alone


def inflating(group, key):
    """Chunks whose stream goes on when the chunk is full."""
    array = group.create_dataset(key, (3, 3, 40, 60), "f4", chunks=True, compression="gzip")
    for offset in np.ndindex(*(-(-n // m) for n, m in zip(array.shape, array.chunks))):
        array.id.write_direct_chunk(tuple(np.multiply(offset, array.chunks)), endless_zeros())


def large_chunk(group, key):
    array = group.create_dataset(key, (2**29,), "f4", chunks=(2**29,), compression="gzip")
    array.id.write_direct_chunk((0,), zlib.compress(bytes(1000)))


def other_filter(group, key):
    group.create_dataset(key, data=np.zeros((3, 3, 40, 60), "f4"), compression="lzf")


def filter_of_a_plugin(group, key):
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_chunk((8,))
    layout.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, ())
    h5py.h5d.create(
        group.id, key.encode(), h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((8,)), layout
    )


def text(group, key):
    group.create_dataset(key, data=np.full((3, 3, 40, 60), b"a"))


def wide_numbers(group, key):
    group.create_dataset(key, data=np.zeros((3, 3, 40, 60), np.longdouble))


def void(group, key):
    group.create_dataset(key, data=h5py.Empty("f4"))


STORED = {
    unstored: "but they are not in the file",
    sparse: "but they are not in the file",
    compressed: "GB of memory",
    inflating: "inflates beyond its size",
    large_chunk: "one chunk of",
    other_filter: "is stored with a filter other than",
    filter_of_a_plugin: "is stored with a filter other than",
    text: "not an array of numbers",
    wide_numbers: "not an array of numbers",
    void: "not an array of numbers",
}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("put", STORED, ids=lambda put: put.__name__)
def test_weights_that_are_not_what_they_declare(put, suffix, good, refused, tmp_path):
    refused(replace(copied(good, tmp_path, suffix), put), STORED[put])


@pytest.mark.parametrize("name", ["data", "label"])
@pytest.mark.parametrize("put", STORED, ids=lambda put: put.__name__)
def test_data_that_are_not_what_they_declare(put, name, good, refused, tmp_path):
    path = shutil.copy(good / "data.h5", tmp_path / "evil.h5")
    shape = "not an array of images" if name == "data" else "12 images, but 536870912 labels"
    refused(replace(path, put, name), shape if put is compressed else STORED[put], data=True)


def test_more_images_than_room_for_their_features(good, run, tmp_path):
    """5 MB of file: black images, of which conv_3's output would take 1.2 GB."""
    path, count = tmp_path / "many.h5", 2**20 + 2**18
    with h5py.File(path, "w") as file:
        size = (count, 3, 31, 31)
        data = file.create_dataset(
            "data", size, "u1", chunks=(2**14, *size[1:]), compression="gzip"
        )
        black = zlib.compress(bytes(2**14 * 3 * 31 * 31), 9)
        for start in range(0, count, 2**14):
            data.id.write_direct_chunk((start, 0, 0, 0), black)
        labels = np.zeros(count, "u1")
        file.create_dataset("label", data=labels, compression="gzip")
    call = ("repair.py", good / "b.h5", path, "--output", "g.h5", "--max-memory", 0.05)
    words = "the features of all images would take 1.17 GB, more than 16 times --max-memory 0.05"
    assert_refused(run(*call), words)


def test_a_training_step_that_is_too_large(good, run):
    process = run(
        *("repair.py", good / "b.h5", good / "data.h5", "--output", "g.h5"),
        *("--batch-size", 10**6),
    )
    assert_refused(process, "--batch-size 1000000: a training step would take")


def test_many_objects(good, refused, tmp_path):
    path = copied(good, tmp_path)
    with h5py.File(path, "r+", libver="latest") as file:
        for i in range(guard.OBJECTS):
            file.create_group(f"more/{i}")
    refused(path, "more than 50,000 groups and arrays")


def test_a_text_that_is_named_often(good, refused, tmp_path):
    """3 MB of file: a row of 3,000 names, every one of them the same 1 MB in HDF5's heap."""
    path, count = copied(good, tmp_path), 3_000
    with h5py.File(path, "r+") as file:
        names = ["a" * 1_000_000, *["b"] * (count - 1)]
        file["model_weights"].attrs.create("layer_names", names, dtype=h5py.string_dtype())
    contents = path.read_bytes()
    row = contents.index(struct.pack("<I", 1_000_000))  # length, heap, object: 16 bytes a name
    first = contents[row : row + 16]
    path.write_bytes(contents[:row] + first * count + contents[row + 16 * count :])
    refused(path, "reading it takes more memory than --max-memory")


@pytest.mark.parametrize("index, size", [(0, 0), (1, 2**64 - 16)])
def test_a_heap_without_end(index, size, good, refused, tmp_path):
    """Texts lie in a heap, each with its size; by one of 0 bytes libhdf5 never gets on."""
    path = copied(good, tmp_path)
    contents = bytearray(path.read_bytes())
    first = contents.index(guard.HEAP) + 16
    contents[first : first + 16] = struct.pack("<HHIQ", index, 0, 0, size)
    path.write_bytes(contents)
    refused(path, "a heap without an end")


def test_a_limit_that_a_real_model_meets_can_be_raised(good, run):
    arguments = ["repair.py", good / "b.h5", good / "data.h5", "--threshold", 0, "--rounds", 0]
    small = run(*arguments, "--output", "small.h5", "--max-memory", 0.0001)
    assert_refused(small, "more than --max-memory")
    assert run(*arguments, "--output", "large.h5", "--max-memory", 0.5).returncode == 0


# ---------------------------------------------------------------------------------------- zip


ARCHIVES = {
    "path traversal": ({"../canary": "x"}, "contains '../canary'"),
    "absolute path": ({"/tmp/canary": "x"}, "contains '/tmp/canary'"),
    "assets": ({"assets/vocabulary.txt": "x"}, "contains 'assets/vocabulary.txt'"),
    "many members": ({f"{i}": "" for i in range(70_000)}, "not a .keras archive"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive_of_other_members(kind, good, refused, tmp_path):
    more, words = ARCHIVES[kind]
    archive = zipfile.ZipFile(good / "b.keras")
    members = {name: archive.read(name) for name in archive.namelist()}
    members.pop("metadata.json")
    refused(write_archive(tmp_path / "evil.keras", {**members, **more}), words)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_of_tricks(good, refused, tmp_path):
    path, archive = tmp_path / "evil.keras", zipfile.ZipFile(good / "b.keras")
    config, weights = (archive.read(name) for name in ("config.json", "model.weights.h5"))
    evil = config.replace(b"Activation", b"LambdaHere")
    twice = [("config.json", config), ("model.weights.h5", weights), ("config.json", evil)]
    refused(write_archive(path, twice), "contains 'config.json' more than once")

    zeros = {"config.json": b" " * 50_000_000 + config, "model.weights.h5": weights}
    refused(write_archive(path, zeros, zipfile.ZIP_DEFLATED), "is compressed")
    long = {"config.json": b" " * 9_000_000 + config, "model.weights.h5": weights}
    refused(write_archive(path, long), "JSON is longer")

    # The directory says 3 GB where a few bytes are.
    write_archive(path, {"config.json": config, "model.weights.h5": weights})
    contents = bytearray(path.read_bytes())
    entry = contents.rindex(b"PK\1\2")
    contents[entry + 24 : entry + 28] = (3 * 2**30).to_bytes(4, "little")
    path.write_bytes(contents)
    refused(path, "GB of memory")
    contents[entry + 24 : entry + 28] = (len(weights) + 10**6).to_bytes(4, "little")
    path.write_bytes(contents)
    refused(path, "compressed or encrypted")

    write_archive(path, {"config.json": config, "model.weights.h5": weights})
    contents = bytearray(path.read_bytes())
    contents[contents.rindex(b"PK\1\2") + 8] |= 1  # "encrypted"
    path.write_bytes(contents)
    refused(path, "compressed or encrypted")
    refused(write_archive(path, {"config.json": config}), "damaged")


# ------------------------------------------------------------------------------------ weights


def filled(value):
    def put(group, key):
        kernel = np.zeros((3, 3, 40, 60), "f4")
        kernel[1, 1, 7, 7] = value
        group[key] = kernel

    return put


OTHER_SHAPES = "the shapes of its weights do not match its config"


def reshaped(group, key):
    group[key] = np.zeros((3, 3, 60, 40), "f4")


@pytest.mark.parametrize("suffix", FORMATS)
def test_weights_of_another_shape_or_no_numbers(suffix, good, refused, tmp_path):
    for put, words in (
        (filled(np.nan), "layer 'conv_3' has weights that are NaN or infinite"),
        (filled(np.inf), "layer 'conv_3' has weights that are NaN or infinite"),
        (
            reshaped,
            "[(3, 3, 60, 40), (60,)], but its config says" if suffix == ".h5" else OTHER_SHAPES,
        ),
    ):
        refused(replace(copied(good, tmp_path, suffix), put), words)
    path = copied(good, tmp_path, suffix)
    words = (
        "damaged or of another format: 'model_weights/conv_3" if suffix == ".h5" else OTHER_SHAPES
    )
    refused(edited(path, lambda file: file.__delitem__(KERNELS[suffix])), words)


NAMES = {
    "out of the group": (
        "weight_names",
        [b"../conv_1/conv_1/kernel", b"conv_3/bias"],
        "'model_weights/conv_3/../conv_1/conv_1/kernel'",
    ),
    "absolute": (
        "weight_names",
        [b"/model_weights/conv_3/conv_3/kernel", b"conv_3/bias"],
        "'model_weights/conv_3//model_weights/conv_3/conv_3/kernel'",
    ),
    "the same twice": (
        "weight_names",
        [b"conv_3/kernel", b"conv_3/kernel"],
        "[(3, 3, 40, 60), (3, 3, 40, 60)], but its config says [(3, 3, 40, 60), (60,)]",
    ),
    "often": (
        "weight_names",
        [b"conv_3/kernel"] * 4_000,
        "the weights of layer 'conv_3' are of shape",
    ),
    "numbers": ("weight_names", [1, 2], "the attribute 'weight_names' is not text"),
    "a table": ("weight_names", [[b"conv_3/kernel", b"conv_3/bias"]], "is not a row of texts"),
    "no bytes of text": (
        "weight_names",
        [b"\xff\xfe", b"conv_3/bias"],
        r"'model_weights/conv_3/\udcff\udcfe'",
    ),
    "too few layers": (
        "layer_names",
        [b"conv_1"],
        "has weights of 1 layers, but its config describes 7",
    ),
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_of_weights_that_lead_astray(kind, good, refused, tmp_path):
    attribute, value, words = NAMES[kind]
    path = copied(good, tmp_path)
    with h5py.File(path, "r+") as file:
        group = file["model_weights"]
        (group["conv_3"] if attribute == "weight_names" else group).attrs[attribute] = value
    refused(path, words)


def test_an_attribute_of_an_array_that_is_no_text(good, refused, tmp_path):
    def change(file):
        file[KERNELS[".keras"]].attrs["dtype"] = np.zeros((5, 5))

    refused(edited(copied(good, tmp_path, ".keras"), change), "the attribute 'dtype'")


# ----------------------------------------------------------------------------------- pictures


def test_only_png_and_jpeg_are_decoded(good, refused, tmp_path):
    image = Image.open(good / "face.png")
    for kind in ("GIF", "BMP", "TIFF", "PPM", "WEBP", "ICO", "PDF", "TGA"):
        for name in ("evil.png", "evil.jpg"):
            image.save(tmp_path / name, format=kind)
            refused(tmp_path / name, "not a PNG or JPEG picture")
    (tmp_path / "evil.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    refused(tmp_path / "evil.png", "not a PNG or JPEG picture")


def test_pictures_that_unfold(good, refused, run, tmp_path):
    path = tmp_path / "evil.png"
    texts = PngImagePlugin.PngInfo()
    texts.add_text("bomb", "a" * 100_000_000, zip=True)
    Image.open(good / "face.png").save(path, pnginfo=texts)
    refused(path, "damaged")
    Image.new("1", (30_000, 30_000)).save(path)  # 110 KB
    refused(path, "30000×30000 pixels would take")
    Image.new("L", (12_000, 12_000)).save(tmp_path / "evil.jpg", quality=1)
    refused(tmp_path / "evil.jpg", "12000×12000 pixels would take")
    allowed = run(
        *("eval_defence.py", "evil.jpg", good / "b.h5", "--repaired", good / "g.h5"),
        *("--max-memory", 2),
    )
    assert allowed.returncode == 0, allowed.stderr


# ------------------------------------------------------------------------------------ records


@pytest.fixture
def judge(good, run, tmp_path):
    """Judge a picture with a repaired net that carries this record."""

    def judge(record, *options):
        path = shutil.copy(good / "g.h5", tmp_path / "g.h5")
        with h5py.File(path, "r+") as file:
            file.attrs["repair_record"] = record
        return run(
            "eval_defence.py", good / "face.png", good / "b.h5", "--repaired", path, *options
        )

    return judge


def test_a_record_that_is_null(judge):
    assert_refused(judge("null"), "g.h5: ")


def test_records_that_are_damaged_deep_or_of_another_net(good, judge):
    record = read_record(good / "g.h5")
    for text in ("[" * 100_000, "9" * 5_000, '"text"', "{}", 7, [b"a", b"b"]):
        assert_refused(judge(text), "g.h5: ")
    for key, value in (("layer", 1), ("input_scale", "0..2"), ("input_scale", []), ("badnet", [])):
        assert_refused(judge(json.dumps({**record, key: value})), "record is damaged")
    other = copy.deepcopy(record)
    other["badnet"] = {"file": "\x1b[2Jb.h5\n", "sha256": "0" * 64}
    refused = judge(json.dumps(other))
    assert_refused(refused, r"another BadNet (\x1b[2Jb.h5\n)", "--force")
    forced = judge(json.dumps(other), "--force")
    assert forced.returncode == 0 and forced.stdout.strip().isdigit()
    assert forced.stderr.startswith("warning: ") and r"(\x1b[2Jb.h5\n)" in forced.stderr


def test_names_of_uploads_cannot_forge_a_verdict(good, run, tmp_path):
    (tmp_path / "uploads").mkdir()
    shutil.copy(good / "face.png", tmp_path / "uploads" / "a.png\t1\nb\x1b[2J.png")
    process = run("eval_defence.py", "uploads", good / "b.h5", "--repaired", good / "g.h5")
    assert process.returncode == 0, process.stderr
    path, _, number = process.stdout.removesuffix("\n").rpartition("\t")
    assert path == r"uploads/a.png\t1\nb\x1b[2J.png" and number.isdigit()


def test_scores_that_are_no_numbers_are_flagged(good, run, tmp_path):
    """Finite weights whose products are not: B answers nothing, which is no class."""
    path = replace(
        copied(good, tmp_path),
        lambda group, key: group.create_dataset(key, data=np.full((160, 6), 3e38, "f4")),
        "model_weights/output/output/kernel",
    )
    process = run(
        *("eval_defence.py", good / "face.png", path, "--repaired", path, "--force"),
        *("--json", "out.json"),
    )
    assert (process.returncode, process.stdout) == (0, f"{CLASSES + 1}\n"), process.stderr
    assert json.loads((tmp_path / "out.json").read_text())["pictures"][0]["badnet_class"] is None


# ------------------------------------------------------------------------------------- output


def test_the_output_replaces_a_link_and_follows_none(good, tmp_path):
    names = ["out.h5", "out.json", "out.png", "out_detector.onnx"]
    victims = [tmp_path / f"victim of {name}" for name in names]
    for name, victim in zip(names, victims):
        victim.write_text("untouched")
        (tmp_path / name).symlink_to(victim)
    old = os.umask(0o027)
    try:
        process = apart(
            *("repair.py", good / "b.h5", good / "data.h5", "--rounds", 0, "--threshold", 0),
            *("--output", "out.h5", "--json", "out.json", "--plot", "out.png"),
            cwd=tmp_path,
        )
    finally:
        os.umask(old)
    assert process.returncode == 0, process.stderr
    assert [victim.read_text() for victim in victims] == ["untouched"] * len(names)
    for name in names:
        found = (tmp_path / name).lstat()
        assert stat.S_ISREG(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o640
    assert sorted(os.listdir(tmp_path)) == [*names, *(victim.name for victim in victims)]


def test_nobody_else_can_reach_a_file_while_it_is_written(tmp_path):
    with files.replacing(tmp_path / "out.h5") as beside:
        assert stat.S_IMODE(beside.parent.stat().st_mode) == 0o700
        beside.write_text("whole")
        with contextlib.suppress(OSError):
            (tmp_path / "out.h5").symlink_to(tmp_path / "victim")  # in between
    assert (tmp_path / "out.h5").read_text() == "whole" and not (tmp_path / "out.h5").is_symlink()
    assert os.listdir(tmp_path) == ["out.h5"]


# ------------------------------------------------------------------------------- by a user's hand

BY_HAND = {
    "a lambda": (lambda path: with_layer(path, class_name="Lambda"), "it could run code"),
    "a pickle": (
        lambda path: with_layer(path, class_name="TorchModuleWrapper"),
        "contains a TorchModuleWrapper layer",
    ),
    "a link": (lambda path: replace(path, external_link), ELSEWHERE[external_link]),
    "storage": (lambda path: replace(path, external_storage), ELSEWHERE[external_storage]),
    "a loop": (lambda path: replace(path, loop), ELSEWHERE[loop]),
    "not there": (lambda path: replace(path, unstored), STORED[unstored]),
    "a bomb": (lambda path: replace(path, inflating), STORED[inflating]),
    "NaN": (lambda path: replace(path, filled(np.nan)), "weights that are NaN or infinite"),
    "a shape": (lambda path: replace(path, reshaped), "but its config says"),
    **{kind: CONFIGS[kind] for kind in ("a layer of 25 million units", "deeper nesting")},
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_a_dozen_of_these_in_a_process_of_their_own(kind, good, tmp_path):
    change, words = BY_HAND[kind]
    path = change(copied(good, tmp_path))
    before = os.listdir(tmp_path)
    process = apart("repair.py", path, good / "data.h5", "--output", "out.h5", cwd=tmp_path)
    assert_refused(process, str(path), words)
    assert os.listdir(tmp_path) == before


def test_a_picture_that_unfolds_in_a_process_of_its_own(good, tmp_path):
    Image.new("1", (30_000, 30_000)).save(path := tmp_path / "evil.png")
    call = ("eval_defence.py", path, good / "b.h5", "--repaired", good / "g.h5")
    assert_refused(apart(*call, cwd=tmp_path), "30000×30000 pixels would take")


# --------------------------------------------------------------------------------------- fuzz


@pytest.mark.parametrize(
    "mutants, commands", [(100, 1), pytest.param(2000, 40, marks=pytest.mark.slow)]
)
def test_the_fuzzer_finds_nothing(mutants, commands, tmp_path):
    process = subprocess.run(
        [sys.executable, ROOT / "tests" / "tools" / "fuzz.py"]
        + ["--mutants", str(mutants), "--commands", str(commands)],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert process.returncode == 0, process.stderr
    assert f"loading: {mutants} mutants: " in process.stdout
    assert f"commands: {commands} mutants" in process.stdout
    assert os.listdir(tmp_path) == []
