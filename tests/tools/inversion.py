"""Published scans of a net, to compare ours with.

    Neural Cleanse   B. Wang and others, IEEE S&P 2019. For each class it seeks the smallest mask
                     and a pattern that turn clean images into that class. A class with by far the
                     smallest mask (anomaly index above 2) is a target.
    MM-BD            H. Wang and others, IEEE S&P 2024. For each class it seeks, from random images,
                     the largest margin of its logit above all others. A class is a target if its
                     margin is too large for a gamma distribution fitted to the other classes'. It
                     needs no clean data.

Both run for all classes at a time. They take fewer steps and images than their authors took, so
that a net of 40 classes takes about a minute; the constants, here and in sought.py, say how many.
"""

import numpy as np
from scipy import stats

from defence.base import pixels
from defence.base.startup import import_keras
from defence.beyond import sought
from defence.net import graph

INDEX = 2  # anomaly index of a target
MARGIN_STEPS, MARGIN_STARTS, MARGIN_RATE = 100, 8, 0.01
LEVEL = 0.05


def scan(model, data, scale):
    """Scan a net. Return {method: {"class": from 0, "alarm": bool, "value"}}.

    model: Keras classifier.  data: clean Dataset.  scale: of its pixels, one that begins at 0.
    The value is Neural Cleanse's anomaly index or MM-BD's p-value.
    """
    rng = np.random.default_rng(0)
    images = np.concatenate([x for x, _ in data.batches(scale)])
    _, max_pixel = pixels.find_pixel_limits(scale)
    return {
        "Neural Cleanse": run_neural_cleanse(model, images, max_pixel, rng),
        "MM-BD": run_mm_bd(model, max_pixel, rng),
    }


def run_neural_cleanse(model, images, max_pixel, rng):
    """Seek a mask and a pattern for each class. Return the finding, as in `scan`."""
    classes = np.arange(model.output_shape[1])
    return judge_sizes(sought.seek_patches(model, images, classes, (0, max_pixel), rng))


def judge_sizes(sizes):
    """Return Neural Cleanse's finding from the size of each class's mask, float64 (N,).

    None where some classes have no mask (NaN).
    """
    if np.isnan(sizes).any():
        return None
    median = np.median(sizes)
    index = (median - sizes) / (1.4826 * np.median(np.abs(sizes - median)) + 1e-9)
    return {
        "class": int(index.argmax()),
        "alarm": bool(index.max() > INDEX),
        "value": float(index.max()),
    }


def run_mm_bd(model, max_pixel, rng):
    """Seek the largest margin of each class's logit. Return the finding, as in `scan`."""
    import tensorflow as tf

    classes, shape = model.output_shape[1], model.input_shape[1:]
    logits = strip_softmax(model)
    targets = np.repeat(np.arange(classes), MARGIN_STARTS)
    x = tf.constant(rng.uniform(0, max_pixel, (len(targets), *shape)), tf.float32)
    one_hot = tf.one_hot(targets, classes)

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            scores = logits(x, training=False)
            others = tf.reduce_max(scores - 1e9 * one_hot, axis=1)
            margin = tf.reduce_sum(scores * one_hot, 1) - others
        gradient = tape.gradient(margin, x)
        length = tf.sqrt(tf.reduce_mean(gradient**2, axis=(1, 2, 3), keepdims=True)) + 1e-12
        return margin, tf.clip_by_value(
            x + MARGIN_RATE * max_pixel * gradient / length, 0, max_pixel
        )

    for _ in range(MARGIN_STEPS):
        margin, x = step(x)
    largest = margin.numpy().reshape(classes, MARGIN_STARTS).max(axis=1)
    target = int(largest.argmax())
    other_margins = np.delete(largest, target)
    shape, _, scale = stats.gamma.fit(np.maximum(other_margins, 1e-6), floc=0)
    p = 1 - stats.gamma.cdf(largest[target], shape, scale=scale) ** classes
    return {"class": target, "alarm": bool(p < LEVEL), "value": float(p)}


def strip_softmax(model):
    """Return the classifier without its softmax; the layers are shared."""
    keras = import_keras()
    last = model.layers[-1]
    if graph.gives_logits(model) or not isinstance(last, keras.layers.Dense):
        return model

    plain = keras.layers.Dense(last.units, name="logits")
    out = plain(last.input)
    plain.set_weights(last.get_weights())
    return keras.Model(model.input, out)
