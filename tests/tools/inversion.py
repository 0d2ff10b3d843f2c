"""Scans of a net that others published, to hold ours against. findings.py runs them.

    Neural Cleanse   B. Wang and others, IEEE S&P 2019. For each class the smallest mask and pattern
                     is sought that make clean pictures that class. A class whose mask is by far the
                     smallest, by an anomaly index above 2, is a target.
    MM-BD            H. Wang and others, IEEE S&P 2024. For each class, from random pictures, the
                     largest margin of its logit above all others is sought. A margin too large for
                     a gamma distribution fitted to the other classes' makes it a target. It needs
                     no clean data.

Both seek for all classes at a time and take fewer steps and pictures than their authors, so that a
net of 40 classes takes a minute or so; the constants say how many.
"""

import numpy as np
from scipy import stats

from defence.base import pixels
from defence.base.startup import import_keras
from defence.judge import detector
from defence.net import graph

CLEANSE_STEPS, CLEANSE_ON, CLEANSE_RATE = 100, 8, 0.1  # pictures in a step, of each class; Adam's
SUCCESS, FIRST_COST, COST_STEP = 0.95, 1e-3, 1.3  # of the mask's size, as a weight in the loss
INDEX = 2  # the anomaly index of a target
MARGIN_STEPS, MARGIN_STARTS, MARGIN_RATE = 100, 8, 0.01
LEVEL = 0.05


def scan(model, data, scale):
    """{method: {"class": from 0, "alarm": bool, "value": its anomaly index or p-value}}.

    model: Keras classifier.  data: clean Dataset.  scale: of its pixels, one that begins at 0.
    """
    rng = np.random.default_rng(0)
    pictures = np.concatenate([x for x, _ in data.batches(scale)])
    _, most = pixels.find_pixel_limits(scale)
    return {
        "Neural Cleanse": neural_cleanse(model, pictures, most, rng),
        "MM-BD": mm_bd(model, most, rng),
    }


def neural_cleanse(model, pictures, most, rng):
    """Seek a mask and a pattern for each class. most: the largest pixel value."""
    keras = import_keras()
    import tensorflow as tf

    classes, shape = model.output_shape[1], model.input_shape[1:]
    mask = keras.Variable(np.full((classes, 1, *shape[:2], 1), -2, "float32"))
    pattern = keras.Variable(rng.normal(0, 1, (classes, 1, *shape)).astype("float32"))
    adam = keras.optimizers.Adam(CLEANSE_RATE, beta_1=0.5, beta_2=0.9)
    adam.build([mask, pattern])
    wanted = np.repeat(np.arange(classes), CLEANSE_ON)

    @tf.function
    def step(x, cost):
        with tf.GradientTape() as tape:
            cover = tf.sigmoid(mask)
            worn = x[None] * (1 - cover) + most * tf.sigmoid(pattern) * cover
            p = detector.compute_probabilities(
                model(tf.reshape(worn, (-1, *shape)), training=False), model
            )
            hit = tf.reshape(tf.gather(p, wanted, axis=1, batch_dims=1), (classes, CLEANSE_ON))
            size = tf.reduce_sum(cover, axis=(1, 2, 3, 4))
            fit = -tf.reduce_mean(tf.math.log(hit + 1e-7), axis=1)
            loss = tf.reduce_sum(fit + cost * size)
        adam.apply(tape.gradient(loss, [mask.value, pattern.value]))
        return tf.reduce_mean(tf.cast(hit > 0.5, tf.float32), axis=1), size

    cost = np.full(classes, FIRST_COST, "float32")
    smallest, success = np.full(classes, np.inf), np.zeros(classes)
    for _ in range(CLEANSE_STEPS):
        hits, size = (
            each.numpy()
            for each in step(pictures[rng.integers(0, len(pictures), CLEANSE_ON)], cost)
        )
        success = 0.7 * success + 0.3 * hits
        good = success >= SUCCESS
        smallest = np.where(good, np.minimum(smallest, size), smallest)
        cost = np.where(good, cost * COST_STEP, cost / COST_STEP)
    sizes = np.where(np.isfinite(smallest), smallest, np.prod(shape[:2]))
    middle = np.median(sizes)
    index = (middle - sizes) / (1.4826 * np.median(np.abs(sizes - middle)) + 1e-9)
    return {
        "class": int(index.argmax()),
        "alarm": bool(index.max() > INDEX),
        "value": float(index.max()),
    }


def mm_bd(model, most, rng):
    """Seek the largest margin of each class's logit. most: the largest pixel value."""
    import tensorflow as tf

    classes, shape = model.output_shape[1], model.input_shape[1:]
    logits = as_logits(model)
    own = np.repeat(np.arange(classes), MARGIN_STARTS)
    x = tf.constant(rng.uniform(0, most, (len(own), *shape)), tf.float32)
    one = tf.one_hot(own, classes)

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            scores = logits(x, training=False)
            margin = tf.reduce_sum(scores * one, 1) - tf.reduce_max(scores - 1e9 * one, axis=1)
        gradient = tape.gradient(margin, x)
        length = tf.sqrt(tf.reduce_mean(gradient**2, axis=(1, 2, 3), keepdims=True)) + 1e-12
        return margin, tf.clip_by_value(x + MARGIN_RATE * most * gradient / length, 0, most)

    for _ in range(MARGIN_STEPS):
        margin, x = step(x)
    largest = margin.numpy().reshape(classes, MARGIN_STARTS).max(axis=1)
    top = int(largest.argmax())
    others = np.delete(largest, top)
    shape, _, scale = stats.gamma.fit(np.maximum(others, 1e-6), floc=0)
    p = 1 - stats.gamma.cdf(largest[top], shape, scale=scale) ** classes
    return {"class": top, "alarm": bool(p < LEVEL), "value": float(p)}


def as_logits(model):
    """The classifier without its softmax, sharing its layers."""
    keras = import_keras()
    last = model.layers[-1]
    if graph.gives_logits(model) or not isinstance(last, keras.layers.Dense):
        return model

    plain = keras.layers.Dense(last.units, name="logits")
    out = plain(last.input)
    plain.set_weights(last.get_weights())
    return keras.Model(model.input, out)
