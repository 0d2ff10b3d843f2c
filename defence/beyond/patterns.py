"""Patterns: what G would take for a class, sought while it is hardened, and added to pictures.

An attacker may optimise a trigger on a net that is hardened like G. So a few patterns are kept,
each moved step by step towards what G takes for a class drawn at random, and G is taught the label
of pictures with a pattern. (Universal adversarial training: A. Shafahi and others, AAAI 2020, there
away from the label. Triggers sought on a surrogate: Narcissus, Y. Zeng and others, CCS 2023.)
"""

import numpy as np

from defence.base import pixels
from defence.base.startup import import_keras
from defence.net import graph

COUNT = 8  # patterns
COPIES = 4  # of them all, in memory while they move
LEVELS = 28  # grey levels that a pattern adds to a pixel, at most
STRIDE = 2  # grey levels that it moves in a step
SOUGHT_ON = 16  # pictures of a batch
RENEWED = 60  # steps after which the next pattern starts anew


class Patterns:
    """Patterns and their training step, as a function of a batch in a TensorFlow graph.

    model: a Keras classifier.  scale: a key of pixels.SCALES.
    rate: fraction of the pictures that get a pattern, 0..1.  seed: int, 0..2**31-1.
    """

    def __init__(self, model, scale, rate, seed):
        import tensorflow as tf

        self.model, self.rate, self.seed = model, rate, seed
        self.least, self.most = pixels.find_pixel_limits(scale)
        self.deviation = np.float32(pixels.SCALES[scale].deviation)
        self.classes = model.output_shape[1]
        self.loss = import_keras().losses.SparseCategoricalCrossentropy(
            from_logits=graph.gives_logits(model), reduction="sum"
        )
        self.patterns = tf.Variable(tf.zeros((COUNT, *model.input_shape[1:])), trainable=False)
        start = tf.random.stateless_uniform([COUNT], [seed, -1], 0, self.classes, tf.int64)
        self.targets = tf.Variable(start, trainable=False)
        self.step = tf.Variable(0, trainable=False)

    def __call__(self, x):
        """Move the patterns by a step, and add one to some pictures. Returns all pictures.

        x: float32 (n, height, width, channels), scaled.
        """
        import tensorflow as tf

        self.renew()
        self.move(x[:SOUGHT_ON])
        count, seed = tf.shape(x)[:1], [self.seed, 2 * self.step]
        which = tf.random.stateless_uniform(count, seed, 0, COUNT, tf.int32)
        chosen = tf.random.stateless_uniform(count, [self.seed, 2 * self.step + 1]) < self.rate
        self.step.assign_add(1)
        return tf.where(chosen[:, None, None, None], self.add(x, which), x)

    def renew(self):
        """When it is time, start the next pattern anew: from noise, towards another class."""
        import tensorflow as tf

        due = (self.step % RENEWED == 0) & (tf.range(COUNT) == self.step // RENEWED % COUNT)
        seed = [self.seed, -2 - self.step]
        most = LEVELS / self.deviation * tf.random.stateless_uniform([], seed)
        noise = tf.random.stateless_uniform(self.patterns.shape[1:], seed, -most, most)
        target = tf.random.stateless_uniform([], seed, 0, self.classes, tf.int64)
        self.patterns.assign(tf.where(due[:, None, None, None], noise, self.patterns))
        self.targets.assign(tf.where(due, target, self.targets))

    def move(self, x):
        """Move each pattern towards its class, by the sign of the gradient on some pictures."""
        import tensorflow as tf

        which = tf.range(tf.shape(x)[0]) % COUNT
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            worn = self.add(x, which)
            tape.watch(worn)
            loss = self.loss(tf.gather(self.targets, which), self.model(worn, training=False))
        of_worn = tape.gradient(loss, worn, unconnected_gradients="zero")
        gradient = tf.math.unsorted_segment_sum(of_worn, which, COUNT)
        most = LEVELS / self.deviation
        moved = self.patterns - STRIDE / self.deviation * tf.sign(gradient)
        self.patterns.assign(tf.clip_by_value(moved, -most, most))

    def add(self, x, which):
        """Add to each picture the pattern of its number, int32 (n,), within what pixels can be."""
        import tensorflow as tf

        return tf.clip_by_value(x + tf.gather(self.patterns, which), self.least, self.most)
