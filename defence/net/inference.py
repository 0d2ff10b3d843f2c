"""Run a Keras model over many images: one graph, batches in bounded memory, two at a time."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np

from defence.base.limits import BATCH_VALUES, OUTPUT_VALUES, Name, allocate
from defence.base.progress import follow
from defence.base.startup import import_keras
from defence.net.graph import adds_maps, list_output_sizes

LAST_INPUTS = "the input of the last layer"
Item = TypeVar("Item")
Result = TypeVar("Result")


@functools.lru_cache(maxsize=8)
def compile_model(model: Any, copies: int = 1) -> Callable[[Any], Any]:
    """Return a model in inference mode as one TensorFlow graph, for float32 batches (b, …).

    It runs a batch in parts where a layer's output would exceed OUTPUT_VALUES.
    copies: how many of each input the model makes at most, to run on side by side.
    `model.predict_on_batch` is slower: it makes a graph for each of the first batch sizes, and
    another after `compile`.
    """
    import_keras()
    import tensorflow as tf

    signature = [tf.TensorSpec(model.input.shape)]

    def make_function() -> Callable[[Any], Any]:
        return tf.function(
            lambda x: model(x, training=False), input_signature=signature, autograph=False
        )

    call = _serialize_calls(make_function) if adds_maps(model) else make_function()
    most = max(1, OUTPUT_VALUES // max(list_output_sizes(model)) // copies)

    def run(x: Any) -> Any:
        if len(x) <= most:
            return call(x)
        parts = [call(x[start : start + most]) for start in range(0, len(x), most)]
        return tf.nest.map_structure(lambda *part: tf.concat(part, axis=0), *parts)

    return run


def _serialize_calls(make_function: Callable[[], Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """Return a function that never runs the same graph in two threads at once, but makes more.

    With TensorFlow 2.21, running oneDNN's fused convolution, bias and sum twice at once ends the
    process or gives other numbers.
    """
    idle = [make_function()]

    def call(x: Any) -> Any:
        function = idle.pop() if idle else make_function()
        try:
            return function(x)
        finally:
            idle.append(function)

    return call


def map_in_parallel(
    function: Callable[[Item], Result], items: Iterable[Item], count: int = 2
) -> Iterator[Result]:
    """Yield function(item) for every item, in order, with `count` calls at a time in threads.

    Fetch at most one item ahead of these calls.
    """
    with concurrent.futures.ThreadPoolExecutor(count) as threads:
        running: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
        for item in items:
            running.append(threads.submit(function, item))
            if len(running) > count:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def predict(model: Any, inputs: np.ndarray, rows: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Return an iterator over a model's output, float32 (b, …), batch after batch of `inputs`.

    inputs: float32 (n, …).  rows: int (k,), the inputs to take, in this order; None takes all.
    """
    rows = np.arange(len(inputs)) if rows is None else rows
    size = max(1, BATCH_VALUES // inputs[0].size)
    parts = (inputs[rows[start : start + size]] for start in range(0, len(rows), size))
    return map(np.asarray, map_in_parallel(compile_model(model), parts))


def classify(model: Any, inputs: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    """Return the class with the largest score for each input: int64 (k,), 0..N-1.

    inputs, rows: as for `predict`.
    """
    classes = [scores.argmax(axis=1) for scores in predict(model, inputs, rows)]
    return np.concatenate([np.empty(0, np.int64), *classes])


def run_model(model: Any, inputs: np.ndarray, path: Name, max_bytes: int) -> np.ndarray:
    """Return a model's output for all `inputs`, float32 (n, …), in memory or on disk.

    path: the dataset of the inputs, for messages.  max_bytes: of memory, as for limits.allocate.
    """
    shape, count = (len(inputs), *model.output_shape[1:]), 0
    outputs = allocate(shape, np.float32, path, LAST_INPUTS, max_bytes)
    with follow(LAST_INPUTS, len(inputs)) as advance:
        for part in predict(model, inputs):
            outputs[count : count + len(part)] = part
            count += len(part)
            advance(len(part))
    return outputs
