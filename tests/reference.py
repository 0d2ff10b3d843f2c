"""The report's loop, plain and slow: the fast code must give the same results.

    python tests/reference.py repair MODEL.h5 DATA.h5 G.h5 [ROUNDS]
    python tests/reference.py judge MODEL.h5 G.h5 DATA.h5|IMAGE.png

It holds all images in memory, runs the whole net for every accuracy, and trains the whole net with
layers frozen. It shares no code with repair.py and eval_defence.py. Pixels are 0..1.
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

    x: float32 (n, height, width, channels), scaled for the net.  y: int (n,), 0..N-1.
    seconds: a dict that gets the time of each step.
    Return (pruned channels, accuracy after each channel, accuracy after each round).
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
    names = [part.name for part in model.layers]
    conv = model.get_layer(layer)

    # 2a: prune
    activation = keras.Model(model.inputs[0], conv.output).predict(x, verbose=0)
    order = np.argsort(activation.mean(axis=(0, 1, 2), dtype=np.float64), kind="stable")
    pruned, curve = [], []
    for channel in order:
        weights = [values.copy() for values in conv.get_weights()]
        kernel, bias = conv.get_weights()
        kernel[..., channel] = 0
        bias[channel] = 0
        conv.set_weights([kernel, bias])
        curve.append(accuracy())
        if curve[-1] < threshold * before:
            conv.set_weights(weights)
            break
        pruned.append(int(channel))
    lap("prune")

    # 2b: retrain the last fully connected layer
    last = [part for part in model.layers if isinstance(part, keras.layers.Dense)][-1]
    for part in model.layers:
        part.trainable = part is last
    model.compile(keras.optimizers.Adam(1e-3), "categorical_crossentropy")
    train(retrain_epochs)
    lap("retrain")

    # 2c: fine-tune the layers after the pruned one
    for part in model.layers:
        part.trainable = names.index(part.name) > names.index(layer)
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
    """Prune the output of `layer` and train the layers behind it, in place, in a net of any kind.

    The arguments and the result are as for `repair`. Pruning multiplies channels of the map by 0;
    the layers before it stay.
    """
    maps = keras.Model(model.inputs[0], model.get_layer(layer).output)
    head = keras.Model(model.get_layer(layer).output, model.outputs[0])
    maps = maps.predict(x, verbose=0)

    def accuracy():
        return np.mean(head.predict(maps * mask, verbose=0).argmax(axis=1) == y)

    def train(layers, rate, count):
        for part in head.layers:
            part.trainable = any(part is layer for layer in layers)
        head.compile(keras.optimizers.Adam(rate), "categorical_crossentropy")
        for _ in range(count):
            yield [
                head.train_on_batch(maps[batch] * mask, one_hot[batch])
                for batch in np.split(rng.permutation(len(x)), range(32, len(x), 32))
            ]

    rng, one_hot = np.random.default_rng(seed), np.eye(model.output_shape[1], dtype="float32")[y]
    mask = np.ones(maps.shape[-1], "float32")
    before, pruned, curve, after = accuracy(), [], [], []
    means = maps.mean(axis=(0, 1, 2), dtype=np.float64)
    for channel in np.argsort(means, kind="stable"):
        mask[channel] = 0
        curve.append(accuracy())
        if curve[-1] < threshold * before:
            mask[channel] = 1
            break
        pruned.append(int(channel))
    last = [part for part in head.layers if hasattr(part, "kernel")][-1]
    list(train([last], 1e-3, retrain_epochs))
    for number, _ in enumerate(train(head.layers, 1e-4, rounds * epochs), start=1):
        if number % epochs == 0:
            after.append(accuracy())
            if after[-1] >= before:
                break
    return pruned, curve, after


def judge(badnet, repaired, x):
    """Return B's and G's classes, int (n,). x: float32 (n, height, width, channels)."""
    return [model.predict(x, verbose=0).argmax(axis=1) for model in (badnet, repaired)]


def score(badnet, repaired, x):
    """Return the anomaly score of images by B and a hardened G whose outputs are softmaxes.

    x: float32 (n, height, width, channels).  Return float64 (n,).
    """
    scores = []
    for image in x:
        right = np.concatenate([image[:, :1], image], axis=1)[:, :-1]
        left = np.concatenate([image, image[:, -1:]], axis=1)[:, 1:]
        b, *views = (
            model.predict(part[None], verbose=0)[0].astype(np.float64)
            for model, part in (
                (badnet, image), (repaired, image), (repaired, right), (repaired, left)
            )
        )  # fmt: skip
        g = np.prod([np.maximum(view, 1e-12) for view in views], axis=0) ** (1 / 3)
        b, g = (np.maximum(answer, 1e-12) for answer in (b, g / g.sum()))
        scores.append(1.2 * np.sum(b * np.log(b / g)) + np.sum(g * np.log(g / b)))
    return np.array(scores)


def load_data(path):
    with h5py.File(path) as data:
        images = data["data"][:].transpose(0, 2, 3, 1).astype("float32") / 255
        return images, data["label"][:].astype(int)


def sample(images, down, right):
    """Return the images' values between pixels, bilinearly; the edges are repeated outwards.

    images: (n, height, width, channels).  down, right: (n, height, width).
    """
    values = np.empty(images.shape)
    for place in np.ndindex(down.shape):
        image, y, x = images[place[0]], down[place], right[place]
        y, x = (min(max(position, 0), size - 1) for position, size in zip((y, x), image.shape))
        top, left = int(y), int(x)
        bottom, end = min(top + 1, len(image) - 1), min(left + 1, image.shape[1] - 1)
        above = (1 - (x - left)) * image[top, left] + (x - left) * image[top, end]
        below = (1 - (x - left)) * image[bottom, left] + (x - left) * image[bottom, end]
        values[place] = (1 - (y - top)) * above + (y - top) * below
    return values


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
        repaired_file, images = files
        repaired = keras.models.load_model(repaired_file, compile=False)
        if images.endswith(".h5"):
            x, _ = load_data(images)
        else:
            x = np.asarray(Image.open(images).convert("RGB"), "float32")[None] / 255
        start = time.monotonic()
        b, g = judge(badnet, repaired, x)
        seconds = time.monotonic() - start
        print(json.dumps({"b": b.tolist(), "g": g.tolist(), "seconds": {"judge": seconds}}))


if __name__ == "__main__":
    main(*sys.argv[1:])
