"""The report's loop, plain and slow: what the fast code must equal.

    python tests/reference.py repair MODEL.h5 DATA.h5 G.h5 [ROUNDS]
    python tests/reference.py judge MODEL.h5 G.h5 DATA.h5|PICTURE.png

It holds all images in memory, runs the whole net for every accuracy, and trains the whole net with
layers frozen. Nothing in it is shared with repair.py and eval_defence.py. Pixels are taken 0..1.
"""

import json
import sys
import time

import h5py
import keras
import numpy as np
from PIL import Image


def repair(
    model,
    x,
    y,
    layer="conv_3",
    seed=0,
    threshold=0.95,
    retrain_epochs=5,
    rounds=6,
    epochs=5,
    seconds=None,
):
    """Turn a BadNet into G, in place.

    x: float32 (n, height, width, channels), scaled as the net takes it.  y: int (n,), 0..N-1.
    seconds: a dict; the time each step took is put there.
    Returns (pruned channels, accuracy after each, accuracy after each round).
    """
    seconds = {} if seconds is None else seconds
    start = time.monotonic()

    def lap(step):
        seconds[step] = time.monotonic() - start - sum(seconds.values())

    def accuracy():
        return np.mean(model.predict(x, verbose=0).argmax(axis=1) == y)

    def train(count):
        for _ in range(count):
            order = rng.permutation(len(x))
            for i in range(0, len(x), 32):
                batch = order[i : i + 32]
                model.train_on_batch(x[batch], one_hot[batch])

    rng = np.random.default_rng(seed)
    one_hot = np.eye(model.output_shape[1], dtype=np.float32)[y]
    before = accuracy()
    names = [each.name for each in model.layers]
    conv = model.get_layer(layer)

    # 2a: prune
    activation = keras.Model(model.inputs[0], conv.output).predict(x, verbose=0)
    order = np.argsort(activation.mean(axis=(0, 1, 2), dtype=np.float64), kind="stable")
    pruned, curve = [], []
    for channel in order:
        kept = [values.copy() for values in conv.get_weights()]
        kernel, bias = conv.get_weights()
        kernel[..., channel] = 0
        bias[channel] = 0
        conv.set_weights([kernel, bias])
        curve.append(accuracy())
        if curve[-1] < threshold * before:
            conv.set_weights(kept)
            break
        pruned.append(int(channel))
    lap("prune")

    # 2b: retrain the last fully connected layer
    last = [each for each in model.layers if isinstance(each, keras.layers.Dense)][-1]
    for each in model.layers:
        each.trainable = each is last
    model.compile(keras.optimizers.Adam(1e-3), "categorical_crossentropy")
    train(retrain_epochs)
    lap("retrain")

    # 2c: fine-tune the layers after the pruned one
    for each in model.layers:
        each.trainable = names.index(each.name) > names.index(layer)
    model.compile(keras.optimizers.Adam(1e-4), "categorical_crossentropy")
    after = []
    for _ in range(rounds):
        train(epochs)
        after.append(accuracy())
        if after[-1] >= before:
            break
    lap("fine_tune")
    return pruned, curve, after


def repair_map(model, layer, x, y, seed=0, threshold=0.95, retrain_epochs=5, rounds=6, epochs=5):
    """Turn a net of any kind into what G's head is, in place: `layer` gives the map to prune.

    The arguments and what is returned are those of `repair`. Channels of the map are multiplied by
    0, and what is behind it is trained on that; what comes before is not touched.
    """
    maps = keras.Model(model.inputs[0], model.get_layer(layer).output)
    head = keras.Model(model.get_layer(layer).output, model.outputs[0])
    maps = maps.predict(x, verbose=0)

    def accuracy():
        return np.mean(head.predict(maps * keep, verbose=0).argmax(axis=1) == y)

    def train(layers, rate, count):
        for each in head.layers:
            each.trainable = any(each is one for one in layers)
        head.compile(keras.optimizers.Adam(rate), "categorical_crossentropy")
        for _ in range(count):
            yield [
                head.train_on_batch(maps[batch] * keep, one_hot[batch])
                for batch in np.split(rng.permutation(len(x)), range(32, len(x), 32))
            ]

    rng, one_hot = np.random.default_rng(seed), np.eye(model.output_shape[1], dtype="float32")[y]
    keep = np.ones(maps.shape[-1], "float32")
    before, pruned, curve, after = accuracy(), [], [], []
    means = maps.mean(axis=(0, 1, 2), dtype=np.float64)
    for channel in np.argsort(means, kind="stable"):
        keep[channel] = 0
        curve.append(accuracy())
        if curve[-1] < threshold * before:
            keep[channel] = 1
            break
        pruned.append(int(channel))
    last = [each for each in head.layers if hasattr(each, "kernel")][-1]
    list(train([last], 1e-3, retrain_epochs))
    for number, _ in enumerate(train(head.layers, 1e-4, rounds * epochs), start=1):
        if number % epochs == 0:
            after.append(accuracy())
            if after[-1] >= before:
                break
    return pruned, curve, after


def judge(badnet, repaired, x):
    """The classes, int (n,), that B and G give images x, float32 (n, height, width, channels)."""
    return [model.predict(x, verbose=0).argmax(axis=1) for model in (badnet, repaired)]


def load_data(path):
    with h5py.File(path) as data:
        images = data["data"][:].transpose(0, 2, 3, 1).astype("float32") / 255
        return images, data["label"][:].astype(int)


def sample(pictures, down, right):
    """The pictures' values at places between pixels, bilinearly; beyond an edge is what is on it.

    pictures: (n, height, width, channels).  down, right: (n, height, width).
    """
    found = np.empty(pictures.shape)
    for at in np.ndindex(down.shape):
        picture, y, x = pictures[at[0]], down[at], right[at]
        y, x = (min(max(place, 0), size - 1) for place, size in zip((y, x), picture.shape))
        top, left = int(y), int(x)
        bottom, end = min(top + 1, len(picture) - 1), min(left + 1, picture.shape[1] - 1)
        above = (1 - (x - left)) * picture[top, left] + (x - left) * picture[top, end]
        below = (1 - (x - left)) * picture[bottom, left] + (x - left) * picture[bottom, end]
        found[at] = (1 - (y - top)) * above + (y - top) * below
    return found


def main(task, model, *files):
    badnet = keras.models.load_model(model, compile=False)
    if task == "repair":
        data, output, *rounds = files
        seconds = {}
        x, y = load_data(data)
        rounds = int(rounds[0]) if rounds else 6
        pruned, curve, after = repair(badnet, x, y, rounds=rounds, seconds=seconds)
        badnet.save(output)
        print(json.dumps({"pruned": pruned, "curve": curve, "rounds": after, "seconds": seconds}))
    else:
        g, images = files
        repaired = keras.models.load_model(g, compile=False)
        if images.endswith(".h5"):
            x, _ = load_data(images)
        else:
            x = np.asarray(Image.open(images).convert("RGB"), "float32")[None] / 255
        start = time.monotonic()
        of_b, of_g = judge(badnet, repaired, x)
        seconds = time.monotonic() - start
        print(json.dumps({"b": of_b.tolist(), "g": of_g.tolist(), "seconds": {"judge": seconds}}))


if __name__ == "__main__":
    main(*sys.argv[1:])
