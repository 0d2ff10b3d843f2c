"""Hostile files that would take too much memory or time are refused."""

import functools
import itertools
import shutil
import struct
import zlib

import h5py
import keras
import numpy as np
import pytest
from conftest import assert_refused
from hostile import (
    CLASSES,
    FORMATS,
    SHAPE,
    copy_net,
    read_config,
    replace,
    replace_layer,
    set_layer_value,
    write_config,
)

from defence.load.guard_hdf5 import HEAP, OBJECTS


def make_chain(count, name="ReLU"):
    """Return the config of a Sequential of `count` layers."""
    layers = [{"class_name": "InputLayer", "config": {"batch_shape": [None, *SHAPE], "name": "i"}}]
    layers += [{"class_name": name, "config": {"name": f"r{i}"}} for i in range(count)]
    return {"class_name": "Sequential", "config": {"name": "s", "layers": layers}}


CONFIGS = {
    "a layer of 25 million units": (
        lambda path: set_layer_value(path, "fc_1", "units", 25_000_000),
        "2.5e+07 (layer 'fc_1')",
    ),
    "layers that are too large together": (
        lambda path: set_layer_value(path, "conv_3", "filters", 900_000),
        "GB of memory, more than --max-memory 1",
    ),
    "an input that is too large": (
        lambda path: set_layer_value(path, "input", "batch_shape", [None, 20_000, 20_000, 3]),
        {
            ".h5": "weights up to layer 'fc_1' would take 223.16 GB",
            ".keras": "expected axis -1 of input shape",
        },
    ),
    "a window of a million pixels": (
        lambda path: set_layer_value(path, "pool_1", "pool_size", [10**6, 10**6]),
        "the number 1e+06 (layer 'pool_1')",
    ),
    "too many inputs": (
        lambda path: replace_layer(
            path, class_name="Add", inbound_nodes=[[["add_1", 0, 0, {}]] * 20_000]
        ),
        "10,000 inputs of layers",
    ),
    "too many layers": (
        lambda path: write_config(path, make_chain(3_000)),
        "more than 2,000 layers",
    ),
    "too many layers that do nothing": (
        lambda path: write_config(path, make_chain(3_000, "Identity")),
        "more than 2,000 layers",
    ),
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
        {".h5": "the attribute 'model_config' is too long", ".keras": "JSON is longer"},
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
        lambda path: set_layer_value(path, "fc_1", "name", "\x1b[2Jx\nrepair.py: all well"),
        "contains an invalid name",
    ),
}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_that_asks_for_too_much(kind, suffix, good, check_refused, tmp_path):
    change, words = CONFIGS[kind]
    words = words[suffix] if isinstance(words, dict) else words
    check_refused(change(copy_net(good, tmp_path, suffix)), words)


def enlarge(x):
    """Make 471 million pixels without any weight."""
    return keras.layers.MaxPooling2D(700)(keras.layers.UpSampling2D(700)(x))


def dilate(x):
    """Make TensorFlow add 999 pixels on each side, to 70 channels."""
    x = keras.layers.Conv2D(70, 3)(x)
    return keras.layers.Conv2D(2, 3, dilation_rate=999, padding="same")(x)


def separate(x):
    """Make a map of 360,000 channels between the two steps of a layer."""
    return keras.layers.SeparableConv2D(2, 3, depth_multiplier=120_000)(x)


def interpolate(x):
    """Make TensorFlow turn 1 row into 300,000, before it turns 961 columns into 1."""
    return keras.layers.Resizing(300_000, 1, "lanczos3")(keras.layers.Reshape((1, 961, 3))(x))


def enlarge_inside(x):
    """Hide the size in a nested model that takes images of any size."""
    image = keras.Input((None, None, 3))
    return keras.Model(image, enlarge(image))(x)


def separate_inside(x):
    image = keras.Input((None, None, 3))
    return keras.Model(image, separate(image))(x)


def multiply_sides(x):
    """Make 470 million values of three rows, by arithmetic that is no layer."""
    sides = (961, 1, 1), (1, 961, 1), (1, 1, 961)
    rows = [keras.layers.Reshape(side)(keras.layers.Conv2D(1, 1)(x)) for side in sides]
    return keras.layers.MaxPooling2D(961)(rows[0] + rows[1] + rows[2])


OUTPUTS = enlarge, enlarge_inside, dilate, separate, separate_inside, interpolate


@pytest.mark.parametrize(
    ("layers", "suffix"),
    [
        *itertools.product(OUTPUTS, FORMATS),
        (multiply_sides, ".keras"),  # the only format that has such arithmetic
    ],
)
def test_a_layer_whose_output_is_too_large(layers, suffix, check_refused, tmp_path):
    image = keras.Input(SHAPE)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(2, 1)(layers(image)))
    keras.Model(image, keras.layers.Dense(CLASSES)(x)).save(tmp_path / f"evil{suffix}")
    check_refused(tmp_path / f"evil{suffix}", "the largest output of a layer would take")


@pytest.mark.parametrize("suffix", FORMATS)
def test_nested_models_that_multiply_their_calls(suffix, good, check_refused, tmp_path):
    """A model of two layers that is called 6,000 times."""
    image, inside = keras.Input(SHAPE), keras.Input(SHAPE)
    x = keras.layers.Flatten()(keras.Model(inside, keras.layers.ReLU()(inside), name="in")(image))
    keras.Model(image, keras.layers.Dense(CLASSES)(x)).save(tmp_path / f"evil{suffix}")
    config = read_config(tmp_path / f"evil{suffix}")
    (nested,) = (part for part in config["config"]["layers"] if part["config"]["name"] == "in")
    nested["inbound_nodes"] *= 6_000
    write_config(tmp_path / f"evil{suffix}", config)
    check_refused(tmp_path / f"evil{suffix}", "calls its layers 12,00", "more than 10,000")


def double_rows(x):
    """Make 65,536 rows of one image."""
    for _ in range(16):
        x = keras.layers.Concatenate(axis=0)([x, x])
    return x


def double_rows_inside(x):
    inside = keras.Input(x.shape[1:])
    return keras.Model(inside, keras.layers.Concatenate(axis=-4)([inside, inside]))(x)


def compare_images(x):
    return keras.layers.UnitNormalization(axis=0)(x)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("layers", [double_rows, double_rows_inside, compare_images])
def test_a_layer_that_computes_across_images(layers, suffix, check_refused, tmp_path):
    image = keras.Input(SHAPE)
    x = keras.layers.Flatten()(keras.layers.Conv2D(2, 3)(layers(image)))
    keras.Model(image, keras.layers.Dense(CLASSES)(x)).save(tmp_path / f"evil{suffix}")
    check_refused(tmp_path / f"evil{suffix}", "computes across images")


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_regularizer_that_is_too_large(suffix, check_refused, tmp_path):
    """A kernel of 1×20,000 would be multiplied by itself to 20,000×20,000."""
    image = keras.Input(SHAPE)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(1, 3)(image))
    orthogonal = keras.regularizers.OrthogonalRegularizer(mode="columns")
    x = keras.layers.Dense(20_000, kernel_regularizer=orthogonal)(x)
    keras.Model(image, keras.layers.Dense(CLASSES)(x)).save(tmp_path / f"evil{suffix}")
    check_refused(tmp_path / f"evil{suffix}", "the regularizer of layer", "would take 1.49 GB")


def not_stored(group, key):
    """Declare 4 GB in a kilobyte."""
    group.create_dataset(key, (2**30,), "f4")


def sparse(group, key):
    group.create_dataset(key, (2**30,), "f4", chunks=(2**20,), compression="gzip")


def compressed(group, key):
    """Write 2 GB of zeros into 2 MB of file."""
    array = group.create_dataset(key, (2**29,), "f4", chunks=(2**24,), compression="gzip")
    zeros = zlib.compress(bytes(2**26), 9)
    for start in range(0, 2**29, 2**24):
        array.id.write_direct_chunk((start,), zeros)


@functools.cache
def endless_zeros():
    """Return a deflate stream of 2 MB that inflates to 2 GB."""
    packer = zlib.compressobj(9)
    parts = [packer.compress(bytes(2**24)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2)]
    return parts[0] + parts[1] * 127  # data after a full flush are independent


def endless_chunks(group, key):
    """Write chunks whose stream continues after the chunk is full."""
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
    not_stored: "but they are not in the file",
    sparse: "but they are not in the file",
    compressed: "GB of memory",
    endless_chunks: "inflates beyond its size",
    large_chunk: "one chunk of",
    other_filter: "is stored with a filter other than",
    filter_of_a_plugin: "is stored with a filter other than",
    text: "not an array of numbers",
    wide_numbers: "not an array of numbers",
    void: "not an array of numbers",
}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("put", STORED, ids=lambda put: put.__name__)
def test_weights_that_differ_from_their_declaration(put, suffix, good, check_refused, tmp_path):
    check_refused(replace(copy_net(good, tmp_path, suffix), put), STORED[put])


@pytest.mark.parametrize("name", ["data", "label"])
@pytest.mark.parametrize("put", STORED, ids=lambda put: put.__name__)
def test_data_that_differ_from_their_declaration(put, name, good, check_refused, tmp_path):
    path = shutil.copy(good / "data.h5", tmp_path / "evil.h5")
    shape = "not an array of images" if name == "data" else "12 images, but 536870912 labels"
    check_refused(replace(path, put, name), shape if put is compressed else STORED[put], data=True)


def test_more_images_than_room_for_their_features(good, run, tmp_path):
    """The file has 5 MB of black images, whose features of conv_3 would take 1.2 GB."""
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


def test_many_objects(good, check_refused, tmp_path):
    path = copy_net(good, tmp_path)
    with h5py.File(path, "r+", libver="latest") as file:
        for i in range(OBJECTS):
            file.create_group(f"more/{i}")
    check_refused(path, "more than 50,000 groups and arrays")


def test_a_text_that_is_referenced_often(good, check_refused, tmp_path):
    """The file has 3 MB: a row of 3,000 names, all the same 1 MB in HDF5's heap."""
    path, count = copy_net(good, tmp_path), 3_000
    with h5py.File(path, "r+") as file:
        names = ["a" * 1_000_000, *["b"] * (count - 1)]
        file["model_weights"].attrs.create("layer_names", names, dtype=h5py.string_dtype())
    contents = path.read_bytes()
    row = contents.index(struct.pack("<I", 1_000_000))  # length, heap, object: 16 bytes a name
    first = contents[row : row + 16]
    path.write_bytes(contents[:row] + first * count + contents[row + 16 * count :])
    check_refused(path, "reading it takes more memory than --max-memory")


@pytest.mark.parametrize("index, size", [(0, 0), (1, 2**64 - 16)])
def test_a_heap_without_end(index, size, good, check_refused, tmp_path):
    """Texts are in a heap, each with its size; libhdf5 loops forever at a size of 0."""
    path = copy_net(good, tmp_path)
    contents = bytearray(path.read_bytes())
    first = contents.index(HEAP) + 16
    contents[first : first + 16] = struct.pack("<HHIQ", index, 0, 0, size)
    path.write_bytes(contents)
    check_refused(path, "a heap without an end")


def test_a_limit_that_a_valid_model_exceeds_can_be_raised(good, run):
    arguments = ["repair.py", good / "b.h5", good / "data.h5", "--threshold", 0, "--rounds", 0]
    process = run(*arguments, "--output", "small.h5", "--max-memory", 0.0001)
    assert_refused(process, "more than --max-memory")
    assert run(*arguments, "--output", "large.h5", "--max-memory", 0.5).returncode == 0
