"""Patterns: noise that G takes for a class, optimised while G is hardened, and added to images.

An attacker may optimise a trigger on a net that is hardened like G. So hardening keeps a few
patterns and moves each, step by step, towards what G takes for a class drawn at random. G is taught
the label of images with a pattern. (Universal adversarial training: A. Shafahi and others, AAAI
2020, there away from the label. Triggers optimised on a surrogate: Narcissus, Y. Zeng and others,
CCS 2023.)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from defence.base import pixels
from defence.base.startup import import_keras
from defence.net import graph

COUNT = 8  # patterns
COPIES = 4  # of all patterns, in memory while they move
LEVELS = 28  # grey levels that a pattern adds to a pixel, at most
STRIDE = 2  # grey levels that a pattern moves in a step
IMAGES_PER_STEP = 16  # images of a batch that move the patterns
RENEWAL_PERIOD = 60  # steps after which the next pattern starts anew


class Patterns:
    """Patterns and their training step, as a function of a batch in a TensorFlow graph.

    model: a Keras classifier.  scale: a key of pixels.SCALES.
    rate: fraction of the images that get a pattern, 0..1.  seed: 0..2**31-1.
    """

    def __init__(self, model: Any, scale: str, rate: float, seed: int) -> None:
        import tensorflow as tf

        self.model, self.rate, self.seed = model, rate, seed
        self.min_pixel, self.max_pixel = pixels.find_pixel_limits(scale)
        deviation: Any = pixels.SCALES[scale].deviation
        self.deviation = np.float32(deviation)
        self.classes = model.output_shape[1]
        self.loss = import_keras().losses.SparseCategoricalCrossentropy(
            from_logits=graph.gives_logits(model), reduction="sum"
        )
        self.patterns = tf.Variable(tf.zeros((COUNT, *model.input_shape[1:])), trainable=False)
        start = tf.random.stateless_uniform([COUNT], [seed, -1], 0, self.classes, tf.int64)
        self.targets = tf.Variable(start, trainable=False)
        self.step = tf.Variable(0, trainable=False)

    def __call__(self, x: Any) -> Any:
        """Move the patterns by a step, and add one to some images. Return all images.

        x: float32 (n, height, width, channels), scaled.
        """
        import tensorflow as tf

        self.renew()
        self.move(x[:IMAGES_PER_STEP])
        count, seed = tf.shape(x)[:1], [self.seed, 2 * self.step]
        numbers = tf.random.stateless_uniform(count, seed, 0, COUNT, tf.int32)
        chosen = tf.random.stateless_uniform(count, [self.seed, 2 * self.step + 1]) < self.rate
        self.step.assign_add(1)
        return tf.where(chosen[:, None, None, None], self.add(x, numbers), x)

    def renew(self) -> None:
        """When it is time, start the next pattern anew: from noise, towards another class."""
        import tensorflow as tf

        next_pattern = tf.range(COUNT) == self.step // RENEWAL_PERIOD % COUNT
        due = (self.step % RENEWAL_PERIOD == 0) & next_pattern
        # One seed for several draws would make the strength equal the first pixel's noise.
        seeds = tf.unstack(tf.random.split([self.seed, -2 - self.step], 3))
        limit = LEVELS / self.deviation * tf.random.stateless_uniform([], seeds[0])
        noise = tf.random.stateless_uniform(self.patterns.shape[1:], seeds[1], -limit, limit)
        target = tf.random.stateless_uniform([], seeds[2], 0, self.classes, tf.int64)
        self.patterns.assign(tf.where(due[:, None, None, None], noise, self.patterns))
        self.targets.assign(tf.where(due, target, self.targets))

    def move(self, x: Any) -> None:
        """Move each pattern towards its class, by the sign of the gradient on some images."""
        import tensorflow as tf

        numbers = tf.range(tf.shape(x)[0]) % COUNT
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            images = self.add(x, numbers)
            tape.watch(images)
            targets = tf.gather(self.targets, numbers)
            loss = self.loss(targets, self.model(images, training=False))
        image_gradients = tape.gradient(loss, images, unconnected_gradients="zero")
        gradient = tf.math.unsorted_segment_sum(image_gradients, numbers, COUNT)
        limit = LEVELS / self.deviation
        patterns = self.patterns - STRIDE / self.deviation * tf.sign(gradient)
        self.patterns.assign(tf.clip_by_value(patterns, -limit, limit))

    def add(self, x: Any, numbers: Any) -> Any:
        """Add to each image the pattern of its number, int32 (n,), within the range of pixels."""
        import tensorflow as tf

        images = x + tf.gather(self.patterns, numbers)
        return tf.clip_by_value(images, self.min_pixel, self.max_pixel)
