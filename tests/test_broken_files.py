"""Data and models that are broken or unfit for the commands are refused."""

import json
import os
import shutil

import h5py
import keras
import numpy as np
import pytest
from conftest import ROOT, SHAPE, B, assert_refused, command, draw_images, write_data

import utils
from defence.base.errors import InputError


def test_every_broken_data_file_is_refused(deepid_world, tmp_path):
    images, labels = draw_images(12, 6, SHAPE, seed=0)
    valid = (deepid_world / "clean.h5").read_bytes()

    def write(images=images, labels=labels, **options):
        path = tmp_path / f"{len(os.listdir(tmp_path))}.h5"
        return write_data(path, images, labels, **options)

    def write_bytes(contents):
        path = tmp_path / f"{len(os.listdir(tmp_path))}.h5"
        path.write_bytes(contents)
        return path

    def write_keys(**values):
        path = tmp_path / f"{len(os.listdir(tmp_path))}.h5"
        with h5py.File(path, "w") as file:
            for name, value in values.items():
                file[name] = value
        return path

    def write_pixel(value, kind="f4"):
        changed = images.astype(kind)
        changed[5, 3, 3, 1] = value
        return write(changed)

    def write_label(value):
        changed = labels.astype("f8")
        changed[5] = value
        return write(labels=changed)

    corrupt = bytearray(write(compression="gzip").read_bytes())
    start = corrupt.index(b"\x78\x5e") if b"\x78\x5e" in corrupt else len(corrupt) // 2
    corrupt[start + 50 : start + 5000] = b"\xff" * 4950
    cases = [
        (tmp_path / "absent.h5", "no such file"),
        (tmp_path, "has no subfolder of images for each class"),
        (write_bytes(b""), "empty"),
        (write_bytes(b"not HDF5" * 99), "not an HDF5 file"),
        (write_bytes(valid[: len(valid) // 2]), "cut short"),
        (write_bytes(bytes(corrupt)), "damaged"),
        (write_keys(label=labels), "'data'"),
        (write_keys(data=images), "'label'"),
        (write_keys(data=images[0], label=labels), "not an array of images"),
        (write_keys(data=images.astype("S"), label=labels), "not an array of numbers"),
        (write(labels=labels[:-1]), "12 images, but 11 labels"),
        (write(images[:0], labels[:0]), "no images"),
        (write(images[:, :30]), "3×30×31"),
        (write_pixel(np.nan), "is nan, not within 0..255"),
        (write_pixel(-1), "is -1, not within 0..255"),
        (write_pixel(256), "is 256, not within 0..255"),
        (write(images / 255), "must be 0..255, so multiply by 255"),
        (write_label(6), "label 6 is outside 0..5, the labels of the model's 6 classes"),
        (write(labels=np.arange(12) % 6 + 1), "labels seem to count from 1: subtract 1"),
        (write(labels=np.eye(6)[labels.astype(int)]), "convert one-hot labels with argmax(axis=1)"),
        (write_label(-1), "label -1 is not"),
        (write_label(0.5), "label 0.5"),
        (write_label(np.nan), "label nan"),
        (write(labels=labels.astype("S")), "not an array of numbers"),
        (write(labels=(labels + 1) % 6), "answers none of its images"),
    ]
    world = tmp_path.with_name(f"{tmp_path.name} world")  # other tests write into deepid_world
    (world / "models").mkdir(parents=True)
    shutil.copy(deepid_world / B, world / B)
    for path, words in cases:
        output = world / "models" / "never.h5"
        process = command("repair.py", B, path, "--output", output, cwd=world)
        assert_refused(process, words, str(path))
        assert (
            process.stderr.startswith("repair.py: error: ")
            or "\nrepair.py: error: " in process.stderr
        )
        assert not output.exists()
    assert not [name for name in os.listdir(world / "models") if name.startswith(".")]


def test_every_unfit_model_is_refused(deepid_world, tmp_path):
    layers, image = keras.layers, keras.Input(SHAPE)

    def save(net, name):
        net.save(tmp_path / name)
        return tmp_path / name

    flat = layers.Dense(6, activation="softmax")(layers.Flatten()(image))
    hidden = keras.Model(image, layers.Lambda(lambda x: x)(flat))
    conv = layers.Conv2D(4, 3)(image)
    pooled = layers.Softmax()(layers.GlobalAveragePooling2D()(layers.Conv2D(6, 3)(image)))
    with h5py.File(tmp_path / "other_weights.h5", "w") as file:
        file["some/kernel"] = np.zeros(3)
    with h5py.File(tmp_path / "config.h5", "w") as file:
        file.attrs["model_config"] = '{"class_name": "Functional"'
    (tmp_path / "zip.keras").write_bytes(b"PK nothing")
    (tmp_path / "net.txt").write_text("text")
    cases = [
        (tmp_path / "absent.h5", "no such file"),
        (save(keras.Model(image, conv), "image.h5"), "not a classifier"),
        (save(keras.Model(image, [flat, conv]), "two.h5"), "it has 2 outputs"),
        (
            save(keras.Model(image, layers.Dense(1)(layers.Flatten()(image))), "one.h5"),
            "not a class",
        ),
        (save(keras.Model(image, flat), "dense.h5"), "no feature map to prune"),
        (save(keras.Model(image, pooled), "no_dense.h5"), "no feature map to prune"),
        (save(hidden, "lambda.h5"), "Lambda layer (layer 'lambda'): it could run code"),
        (save(hidden, "lambda.keras"), "Lambda layer (layer 'lambda'): it could run code"),
        (
            save(keras.Model(image, layers.RandomFlip()(flat[:, None, :, None])), "f.h5"),
            "GetItem",
        ),
        (tmp_path / "other_weights.h5", "no model config"),
        (tmp_path / "config.h5", "its JSON cannot be read"),
        (tmp_path / "zip.keras", "not a .keras archive"),
        (tmp_path / "net.txt", "a model is a .h5 or a .keras file"),
        (deepid_world / "clean.h5", "is a dataset, not a model"),
    ]
    for path, words in cases:
        process = command(
            "repair.py", path, "clean.h5", "--output", tmp_path / "g.h5", cwd=deepid_world
        )
        assert_refused(process, words)
        assert not (tmp_path / "g.h5").exists()


def test_lambdas_hidden_in_nested_models_and_wrappers_are_found(tmp_path):
    layers, image = keras.layers, keras.Input(SHAPE)
    part = keras.Sequential([keras.Input(SHAPE), layers.Lambda(lambda x: x, name="hidden")])
    nested = keras.Model(image, layers.Dense(6)(layers.Flatten()(part(image))))
    nested.save(tmp_path / "nested.h5")
    with pytest.raises(InputError, match="Lambda layer .layer 'hidden'"):
        utils.load_badnet(tmp_path / "nested.h5")
    wrapped = layers.TimeDistributed(layers.Lambda(lambda x: x))(image)
    keras.Model(image, wrapped).save(tmp_path / "wrapped.keras")
    with pytest.raises(InputError, match="TimeDistributed|Lambda"):
        utils.load_badnet(tmp_path / "wrapped.keras")


def write_layer(path, kind, options):
    """Write a net as tf.keras 2.16 does, with a layer of this class before the first."""
    image = keras.Input(SHAPE, name="image")
    first = keras.layers.Activation("linear", name="prepare")(image)
    flat = keras.layers.Flatten()(keras.layers.Conv2D(4, 3)(first))
    keras.Model(image, keras.layers.Dense(6, activation="softmax")(flat)).save(path)
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        layer = next(part for part in config["config"]["layers"] if part["name"] == "prepare")
        layer |= {
            "class_name": kind,
            "config": {"name": "prepare", "trainable": True, "dtype": "float32", **options},
            "inbound_nodes": [["image", 0, 0, {"y": 127.5, "name": None}]],
        }
        file.attrs["model_config"] = json.dumps(config)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("TFOpLambda", {"function": "math.truediv"}, "arithmetic that only Keras 2 reads"),
        ("SlicingOpLambda", {"function": "getitem"}, "arithmetic that only Keras 2 reads"),
        ("Lambda", {"function": ["4wI=", None, None]}, "it could run code from the file"),
    ],
)
def test_a_net_of_keras_2_with_preprocess_input_says_how_to_do_without(
    tmp_path, kind, options, reason
):
    write_layer(tmp_path / "net.h5", kind, options)
    process = command("repair.py", tmp_path / "net.h5", "x.h5", "--check")
    assert_refused(
        process,
        f"net.h5: contains a {kind} layer (layer 'prepare'): {reason}; build the net without it, "
        "copy the weights with set_weights, and save it again; this tool does what "
        "preprocess_input does (docs/nets.md, Pixels)",
    )
    assert "preprocess_input" in (ROOT / "docs" / "nets.md").read_text()
