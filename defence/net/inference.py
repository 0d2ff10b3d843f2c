"""Run a Keras model over many images: one graph, batches in bounded memory, two at a time."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
from typing import Any

import numpy as np

from defence.base.limits import BATCH_VALUES, OUTPUT_VALUES, Name, allocate
from defence.base.startup import import_keras
from defence.net.graph import adds_maps, list_output_sizes

OUTPUT_OF_LAYERS = "the input of the last layer"


@functools.lru_cache(maxsize=8)
def compile_model(model):
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

    call = _serialize_calls(make) if adds_maps(model) else make()
    most = max(1, OUTPUT_VALUES // max(list_output_sizes(model)))

    def run(x):
        if len(x) <= most:
            return call(x)
        parts = [call(x[start : start + most]) for start in range(0, len(x), most)]
        return tf.nest.map_structure(lambda *part: tf.concat(part, axis=0), *parts)

    return run


def _serialize_calls(make):
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


def map_in_parallel(function, items, count=2):
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
    return map(np.asarray, map_in_parallel(compile_model(model), parts))


def classify(model, inputs, rows=None):
    """The class of rows of `inputs`, as for `predict`: int64 (k,), 0..N-1, of the largest score."""
    classes = [scores.argmax(axis=1) for scores in predict(model, inputs, rows)]
    return np.concatenate([np.empty(0, np.int64), *classes])


def run_model(model: Any, inputs: np.ndarray, path: Name, max_bytes: int) -> np.ndarray:
    """Return a model's output for all `inputs`, float32 (n, …), in memory or on disk.

    path: the dataset of the inputs, for messages.  max_bytes: of memory, as for limits.allocate.
    """
    shape, done = (len(inputs), *model.output_shape[1:]), 0
    outputs = allocate(shape, np.float32, path, OUTPUT_OF_LAYERS, max_bytes)
    for part in predict(model, inputs):
        outputs[done : done + len(part)] = part
        done += len(part)
    return outputs
