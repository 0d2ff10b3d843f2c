"""The report's loop, plain and slow: what the fast code must equal.

    python tests/reference.py MODEL.h5 DATA.h5 OUTPUT.h5

It holds all images in memory, runs the whole net for every accuracy, and trains the whole net with
layers frozen. Nothing in it is shared with repair.py.
"""

import sys

import h5py
import keras
import numpy as np


def repair(
    model, x, y, layer="conv_3", seed=0, threshold=0.95, retrain_epochs=5, rounds=6, epochs=5
):
    """Turn a BadNet into G, in place.

    x: float32 (n, height, width, channels), scaled as the net takes it.  y: int (n,), 0..N-1.
    Returns (pruned channels, accuracy after each, accuracy after each round).
    """

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

    # 2b: retrain the last fully connected layer
    last = [each for each in model.layers if isinstance(each, keras.layers.Dense)][-1]
    for each in model.layers:
        each.trainable = each is last
    model.compile(keras.optimizers.Adam(1e-3), "categorical_crossentropy")
    train(retrain_epochs)

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
    return pruned, curve, after


if __name__ == "__main__":
    badnet = keras.models.load_model(sys.argv[1], compile=False)
    with h5py.File(sys.argv[2]) as data:
        images = data["data"][:].transpose(0, 2, 3, 1).astype("float32") / 255
        labels = data["label"][:].astype(int)
    print(*repair(badnet, images, labels), sep="\n")
    badnet.save(sys.argv[3])
