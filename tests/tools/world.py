"""Datasets and a BadNet of the competition's size, for the tools that measure time and memory."""

import contextlib
import multiprocessing
import sys
from pathlib import Path

import h5py
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

PEOPLE, VALIDATION, TEST = 1283, 9, 10  # the competition's; images of each person
EPOCHS, LEARNING_RATE = 12, 1e-3  # of B's head


def draw_world(folder, people):
    """Draw a validation set (float64) and a test set, and train B. Return B's and their paths."""
    print(f"drawing {people * (VALIDATION + TEST)} faces of {people} people, training a BadNet")
    data, test, model = folder / "validation.h5", folder / "test.h5", folder / "drawn_bd_net.h5"
    in_another_process(_draw, data, test, people)
    in_another_process(_train, model, data, people)
    return model, data, test


def _draw(data, test, people):
    sys.path.insert(0, str(ROOT / "data"))
    import faces

    with contextlib.redirect_stdout(sys.stderr):
        faces.write_dataset(data, "validation", people, VALIDATION, "float64")
        faces.write_dataset(test, "test", people, TEST, "float32")


def _train(path, data_path, people):
    import utils
    from defence.base.startup import make_reproducible
    from defence.load.architecture import build_deepid
    from defence.net import training
    from defence.net.cached_net import extract_features
    from defence.net.graph import list_layers
    from defence.net.split import split_net

    make_reproducible(0)
    demo, net = utils.load_badnet(ROOT / "models" / "demo_bd_net.h5"), build_deepid(people)
    for layer in demo.layers[:-1]:
        net.get_layer(layer.name).set_weights(layer.get_weights())
    parts = split_net(net)
    with utils.open_dataset(data_path) as data:
        data.fit_to(net.input_shape[1:], people)
        features, _ = extract_features(parts, data, "0..1")
    head, rng = parts.head, np.random.default_rng(0)
    train_epoch = training.make_trainer(
        head, list(list_layers(head)), LEARNING_RATE, 32, rng, option="LEARNING_RATE"
    )
    for _ in range(EPOCHS):
        train_epoch(features, data.labels)
    net.trainable = True
    net.save(path, include_optimizer=False)


def repeat_images(data, many, size):
    """Write a dataset of `size` images, which are another dataset's over and over. Paths."""
    with h5py.File(data) as source, h5py.File(many, "w") as target:
        stored = source["data"][:]
        images = target.create_dataset("data", (size, *stored.shape[1:]), stored.dtype)
        for start in range(0, size, len(stored)):
            images[start : start + len(stored)] = stored[: size - start]
        target["label"] = np.resize(source["label"][:], size)


def in_another_process(function, *arguments):
    """Call a function in a process of its own and return its result.

    A measured process starts as a copy of this one, and its peak memory counts from there. So this
    process must not import or hold much.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)
