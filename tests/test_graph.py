"""Nets of many kinds: the map that is pruned, and the same results as the plain reference."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import reference
from conftest import ROOT, do_repair, draw_images, write_data

import utils
from defence.base.limits import allocate
from defence.beyond.settings import Settings
from defence.judge import detector
from defence.net import graph
from defence.net.split import MASK, find_map, make_trainable, split_net

SHAPE = (16, 14, 3)
L = keras.layers


def convolution(x, channels=8, kernel=3, activation=None):
    x = L.Conv2D(channels, kernel, padding="same", use_bias=False)(x)
    return L.Activation("relu", name=activation)(L.BatchNormalization(momentum=0.7)(x))


def residual(x):
    """Like ResNet: the last map is a sum."""
    x = convolution(x)
    y = L.BatchNormalization(momentum=0.7)(L.Conv2D(8, 3, padding="same")(convolution(x)))
    x = L.Activation("relu", name="map")(L.Add()([x, y]))
    return L.GlobalAveragePooling2D()(x)


def preactivated(x):
    """Like ResNetV2 and DenseNet: normalised and activated behind the last sum."""
    x = L.Conv2D(8, 3, padding="same")(x)
    x = L.Concatenate()([x, L.Conv2D(8, 3, padding="same")(convolution(x))])
    x = L.ReLU(name="map")(L.BatchNormalization(momentum=0.7)(x))
    return L.Flatten()(L.AveragePooling2D(4)(x))


def separable(x):
    """Like Xception."""
    x = L.SeparableConv2D(12, 3)(convolution(x))
    return L.GlobalMaxPooling2D()(L.ReLU(name="map")(L.BatchNormalization(momentum=0.7)(x)))


def mixed(x):
    """Like Inception: maps side by side."""
    sides = [convolution(x, 4, kernel) for kernel in (1, 3, 5)]
    return L.GlobalAveragePooling2D()(L.Concatenate(name="map")(sides))


def squeezed(x):
    """Like MobileNetV3: two convolutions behind the global pooling, and weighted channels."""
    x = convolution(x, 12)
    weight = L.GlobalAveragePooling2D(keepdims=True)(x)
    weight = L.Conv2D(12, 1, activation="hard_sigmoid")(weight)
    x = convolution(L.Multiply()([x, weight]), 10, activation="map")
    x = L.GlobalAveragePooling2D(keepdims=True)(x)
    return L.Flatten()(L.Conv2D(16, 1, activation="relu")(x))


def added_only(x):
    """Like mini-XCEPTION: a sum without activation, and a convolution that gives the scores."""
    x = convolution(x)
    x = L.Add(name="map")([x, L.SeparableConv2D(8, 3, padding="same")(x)])
    return L.Softmax()(L.GlobalAveragePooling2D()(L.Conv2D(5, 3)(x)))


SLOW = [pytest.param(maker, marks=pytest.mark.slow) for maker in (preactivated, separable, mixed)]
MAKERS = [residual, squeezed, added_only, *SLOW]
# Whose weights prune the map: a normalisation's, or those of the layer that is put in.
OF_NORM = {"preactivated", "separable", "squeezed"}


def make(maker, classes=5):
    keras.utils.set_random_seed(1)
    image = keras.Input(SHAPE)
    x = maker(image)
    if maker is not added_only:
        x = L.Dense(classes, activation="softmax")(x)
    model = keras.Model(image, x)
    images, labels = draw_images(300, classes, SHAPE, seed=1)
    model.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy")
    model.fit(images / 255, labels, epochs=12, verbose=0)
    return model


@pytest.mark.parametrize("maker", MAKERS)
def test_a_repair_equals_the_reference(maker, tmp_path):
    """G in plain Keras, and the joint model of B and G, also answer like the parts."""
    make(maker).save(tmp_path / "b.h5")
    badnet = utils.load_badnet(tmp_path / "b.h5")
    assert find_map(badnet).name == "map"
    images, labels = draw_images(120, 5, SHAPE, seed=2)
    x = np.float32(images) / 255
    plain = keras.models.load_model(tmp_path / "b.h5", compile=False)
    settings = {"threshold": 0.5, "retrain_epochs": 1, "rounds": 1, "epochs": 2}
    ours = Settings(scale="0..1", **settings)
    pruned, curve, after = reference.repair_map(plain, "map", x, labels, **settings)
    with utils.open_dataset(write_data(tmp_path / "d.h5", images, labels)) as clean:
        clean.fit_to(SHAPE, 5)
        parts = split_net(badnet)
        record = do_repair(badnet, clean, ours)
        cached = do_repair.cached
    assert record["accuracy"]["before"] > 0.4  # chance: 0.2
    assert record["pruned"] == pruned and 0 < len(pruned) < record["channels"]
    np.testing.assert_allclose(record["accuracy"]["after_each_channel"], curve)
    np.testing.assert_allclose(record["accuracy"]["after_each_round"], after, atol=0.02)
    assert (type(parts.layer).__name__ == "BatchNormalization") == (maker.__name__ in OF_NORM)

    utils.save_model(cached.split.net, tmp_path / "g.h5")
    repaired = keras.models.load_model(tmp_path / "g.h5", compile=False)
    maps = keras.Model(repaired.input, repaired.get_layer("map").output)(x)
    if MASK in [layer.name for layer in repaired.layers]:
        maps = repaired.get_layer(MASK)(maps)
    assert not np.asarray(maps)[..., pruned].any() and np.asarray(maps).any()
    untrained = keras.models.load_model(tmp_path / "b.h5", compile=False)
    joint = detector.build_joint_model(
        utils.load_badnet(tmp_path / "b.h5"), utils.load_badnet(tmp_path / "g.h5"), "map"
    )
    shared = [layer.name for layer in graph.list_layers(joint)].count(badnet.layers[1].name)
    assert shared == 1  # one trunk for both
    for ours, theirs in zip(joint(x, training=False), (untrained, repaired)):
        np.testing.assert_allclose(ours, theirs(x, training=False), atol=1e-5)


def test_the_added_mask_layer_changes_no_bit_and_is_not_trained(tmp_path):
    model = make(residual)
    masked = split_net(model).net
    assert MASK in [layer.name for layer in masked.layers]
    x = np.random.default_rng(0).random((9, *SHAPE), np.float32)
    assert np.array_equal(masked(x), model(x))
    parts = split_net(masked)  # again: the mask is reused
    assert parts.net is masked and parts.layer.name == MASK
    make_trainable(parts)
    assert [layer.trainable for layer in masked.layers if layer.weights].count(False) == 1


def test_nested_models_augmentation_and_arithmetic_become_layers(tmp_path):
    """As in Keras's guides, a backbone is part of a model that prepares its images."""
    image = keras.Input(SHAPE)
    backbone = keras.Model(image, convolution(convolution(image)), name="backbone")
    norm = L.Normalization(mean=[0.4, 0.5, 0.6], variance=[0.2, 0.3, 0.4])
    image = keras.Input((20, 20, 3))
    x = L.RandomZoom(0.1)(L.RandomFlip()(image))
    x = norm(L.Resizing(16, 14)(x) / 127.5 - 1.0)
    x = backbone(x, training=False)
    x = keras.ops.relu6(x + x * 2.0) - 0.5
    x = keras.Sequential([L.GlobalAveragePooling2D(), L.Dense(5, name="conv2d")], name="top")(x)
    model = keras.Model(image, x)
    model.set_weights([np.random.default_rng(0).random(w.shape) + 0.1 for w in model.get_weights()])
    model.save(tmp_path / "net.keras")
    flat = utils.load_badnet(tmp_path / "net.keras")
    x = np.random.default_rng(0).random((9, 20, 20, 3), np.float32) * 255
    np.testing.assert_allclose(flat(x), model(x, training=False), rtol=1e-5)
    kinds = {type(layer).__name__ for layer in flat.operations}
    assert not kinds & {"Functional", "Sequential", "RandomZoom", "Normalization", "Relu6"}
    names = [layer.name for layer in flat.layers]
    assert len(set(names)) == len(names) and "backbone-conv2d" not in names
    # G is written as .h5, which any Keras opens.
    utils.save_model(flat, tmp_path / "g.h5")
    reloaded = keras.models.load_model(tmp_path / "g.h5", compile=False)
    assert np.array_equal(reloaded(x), flat(x))
    assert [layer.name for layer in utils.load_badnet(tmp_path / "g.h5").layers] == names


def test_waypoints_lie_on_every_path():
    """A search that leaves out one tensor agrees, on random graphs."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        tensors = [keras.Input((3,))]
        for _ in range(12):
            chosen = [tensors[i] for i in rng.integers(max(0, len(tensors) - 4), len(tensors), 2)]
            tensors.append(L.Add()(chosen) if rng.random() < 0.5 else L.ReLU()(chosen[0]))
        model = keras.Model(tensors[0], tensors[-1])
        waypoints = graph.find_waypoints(model)
        for tensor in graph.sort_tensors(model.output):
            visited, waiting = {id(tensor)}, [model.output]
            while waiting:
                current = waiting.pop()
                if id(current) not in visited:
                    visited.add(id(current))
                    waiting += graph.find_call(current)[1]
            bypassed = id(model.input) in visited and tensor is not model.input
            assert any(tensor is waypoint for waypoint in waypoints) != bypassed


RACE = """
import concurrent.futures
import keras
import numpy as np
from defence.net.inference import compile_model

L = keras.layers
image = x = keras.Input((15, 15, 16))
for _ in range(3):
    y = L.Conv2D(16, 3, padding="same", activation="relu")(x)
    x = L.ReLU()(L.Add()([x, L.Conv2D(16, 3, padding="same")(y)]))
run = compile_model(keras.Model(image, L.GlobalAveragePooling2D()(x)))
rng = np.random.default_rng(0)
images = [rng.random((n, 15, 15, 16), np.float32) for n in (64, 61, 40, 64)]
expected = [np.asarray(run(x)) for x in images]

def repeat(_):
    for _ in range(400):
        for x, scores in zip(images, expected):
            assert np.array_equal(run(x), scores)

with concurrent.futures.ThreadPoolExecutor(2) as threads:
    list(threads.map(repeat, range(2)))
"""


@pytest.mark.slow
def test_maps_are_added_in_two_threads_without_a_crash_or_another_number():
    """A process of its own runs them, since the crash ended it."""
    process = subprocess.run([sys.executable, "-c", RACE], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]


@pytest.mark.parametrize("hardened", [False, True])
def test_arrays_beyond_the_memory_limit_are_on_disk(hardened, tmp_path, monkeypatch):
    """Features, inputs of the last layer, and images may be on disk; G stays the same."""
    make(added_only).save(tmp_path / "b.h5")
    images, labels = draw_images(120, 5, SHAPE, seed=2)
    path, weights, arrays = write_data(tmp_path / "d.h5", images, labels), [], []

    def note_and_allocate(*call):
        arrays.append(allocate(*call))
        return arrays[-1]

    for room in ("net.cached_net", "net.inference", "beyond.harden"):
        monkeypatch.setattr(f"defence.{room}.allocate", note_and_allocate)
    extra = {"harden": True, "harden_steps": 2} if hardened else {}
    settings = Settings(scale="0..1", retrain_epochs=1, rounds=1, epochs=1, **extra)
    for max_bytes in (2**30, 60_000):
        with utils.open_dataset(path, max_bytes) as clean:
            clean.fit_to(SHAPE, 5)
            for room in (
                "load.guard",
                "load.guard_hdf5",
                "load.guard_model",
                "base.files",
                "load.datasets",
            ):
                monkeypatch.setattr(f"defence.{room}.check_fits", lambda *_: None)
            do_repair(utils.load_badnet(tmp_path / "b.h5"), clean, settings)
        weights.append(do_repair.cached.split.net.get_weights())
    assert all(map(np.array_equal, *weights))
    on_disk = [isinstance(array, np.memmap) for array in arrays]
    half = len(arrays) // 2
    assert not any(on_disk[:half]) and all(on_disk[half:]) and half >= 1 + hardened
