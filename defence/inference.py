"""Run a Keras model over many images: one graph, batches in bounded memory, two at a time."""

import collections
import concurrent.futures
import functools

import numpy as np

from defence.graph import adds_maps
from defence.guard_model import output_sizes
from defence.startup import import_keras
from utils import BATCH_VALUES

OUTPUT_VALUES = 2**26  # 256 MB as float32, of one layer; nets as small as DeepID stay far below


@functools.lru_cache(maxsize=8)
def compiled(model):
    """A model in inference mode as one TensorFlow graph, for float32 batches (b, …) of any size.

    A batch of which a layer would give more than OUTPUT_VALUES is run in parts.
    `model.predict_on_batch` makes another graph for each of the first sizes, and after `compile`.
    """
    import_keras()
    import tensorflow as tf

    signature = [tf.TensorSpec(model.input.shape)]

    def make():
        return tf.function(
            lambda x: model(x, training=False), input_signature=signature, autograph=False
        )

    call = _one_at_a_time(make) if adds_maps(model) else make()
    most = max(1, OUTPUT_VALUES // max(output_sizes(model)))

    def run(x):
        if len(x) <= most:
            return call(x)
        parts = [call(x[start : start + most]) for start in range(0, len(x), most)]
        return tf.nest.map_structure(lambda *part: tf.concat(part, axis=0), *parts)

    return run


def _one_at_a_time(make):
    """A function that calls what `make` makes, each in one thread at a time, as many as it takes.

    The kernel that oneDNN runs for a convolution, its bias and a sum must not run twice at once:
    with TensorFlow 2.21 that ends the process, or gives other numbers.
    """
    idle = [make()]

    def call(x):
        function = idle.pop() if idle else make()
        try:
            return function(x)
        finally:
            idle.append(function)

    return call


def parallel_map(function, items, count=2):
    """Yield function(item) for every item, in order, `count` at a time in threads.

    While that many are running the next item is fetched, and no more.
    """
    with concurrent.futures.ThreadPoolExecutor(count) as threads:
        running = collections.deque()
        for item in items:
            running.append(threads.submit(function, item))
            if len(running) > count:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def predict(model, inputs, rows=None):
    """Iterate over a model's output, float32 (b, …), for batch after batch of `inputs`.

    inputs: float32 (n, …).  rows: int (k,), those to take, in this order; all if None.
    """
    rows = np.arange(len(inputs)) if rows is None else rows
    size = max(1, BATCH_VALUES // inputs[0].size)
    parts = (inputs[rows[start : start + size]] for start in range(0, len(rows), size))
    return map(np.asarray, parallel_map(compiled(model), parts))


def classify(model, inputs, rows=None):
    """The class of rows of `inputs`, as for `predict`: int64 (k,), 0..N-1, of the largest score."""
    classes = [scores.argmax(axis=1) for scores in predict(model, inputs, rows)]
    return np.concatenate([np.empty(0, np.int64), *classes])
