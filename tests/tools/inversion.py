"""Published scans of a net, to compare ours with.

    Neural Cleanse   B. Wang and others, IEEE S&P 2019. For each class it seeks the smallest mask
                     and a pattern that turn clean images into that class. A class with by far the
                     smallest mask (anomaly index above 2) is a target.
    MM-BD            H. Wang and others, IEEE S&P 2024. For each class it seeks, from random images,
                     the largest margin of its logit above all others. A class is a target if its
                     margin is too large for a gamma distribution fitted to the other classes'. It
                     needs no clean data.

Neural Cleanse judges the masks that our scan seeks (sought.py), which takes fewer steps and images
than its authors took. Each finding is {"class": from 0, "alarm": bool, "value"}.
"""

import numpy as np
from scipy import stats

from defence.base import pixels
from defence.base.startup import import_keras
from defence.net import graph

INDEX = 2  # anomaly index of a target
MOST_CLASSES = 100  # for MM-BD, which takes minutes with more
MARGIN_STEPS, MARGIN_STARTS, MARGIN_RATE = 100, 8, 0.01
LEVEL = 0.05


def judge_sizes(sizes):
    """Return Neural Cleanse's finding from the size of each class's mask, float64 (N,).

    The value is the anomaly index. None where some classes have no mask (NaN).
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


def run_mm_bd(model, scale, seed=0):
    """Seek the largest margin of each class's logit. Return MM-BD's finding.

    model: Keras classifier.  scale: of its pixels.  The value is a p-value. None where the model
    has more than MOST_CLASSES.
    """
    import tensorflow as tf

    if model.output_shape[1] > MOST_CLASSES:
        return None
    rng = np.random.default_rng(seed)
    min_pixel, max_pixel = pixels.find_pixel_limits(scale)
    classes, shape = model.output_shape[1], model.input_shape[1:]
    logits = strip_softmax(model)
    targets = np.repeat(np.arange(classes), MARGIN_STARTS)
    x = tf.constant(rng.uniform(min_pixel, max_pixel, (len(targets), *shape)), tf.float32)
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
        x += MARGIN_RATE * (max_pixel - min_pixel) * gradient / length
        return margin, tf.clip_by_value(x, min_pixel, max_pixel)

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
