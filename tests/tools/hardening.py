"""Where the time of hardening goes: its steps, and the operations that they are made of.

    python tests/tools/hardening.py                     the demo's BadNet
    python tests/tools/hardening.py MODEL --batch 64    another, in batches of so many pictures

First the steps, of drawn pixels: with and without patterns, and pictures that are changed. Then,
for each convolution and Dense layer, its multiply-adds for a batch, and the rate of the operation
that runs it forward, of the one that gives the gradient of its weights, and of the one that gives
that of its input; the fastest of REPEAT. In the end, the sum for the batch beside what it would
take at the rate of a large matrix multiplication. No step that is made of these operations can be
faster than that sum.
"""

import argparse
import itertools
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tools")]

import numpy as np
from benchmark import table
from world import in_another_process

import utils
from defence.base.arguments import Parser
from defence.base.process import run_command
from defence.base.startup import count_processors, import_keras, make_reproducible
from defence.beyond import harden
from defence.net import graph, training

REPEAT, SIZE = 50, 2048
STEPS, EPOCHS = 40, 5  # in an epoch; of these the fastest counts
KINDS = "float32", "bfloat16"
RATE = 1e-3


def seconds(function, *given):
    """The least seconds that a function of tensors takes, as a graph."""
    import tensorflow as tf

    run, least = tf.function(function), np.inf
    for _ in range(REPEAT):
        start = time.perf_counter()
        run(*given).numpy()
        least = min(least, time.perf_counter() - start)
    return least


def of_convolution(layer, batch, kind):
    """The seconds of a Conv2D: forward, gradient of its weights, gradient of its input."""
    import tensorflow as tf

    shape, out = (batch, *layer.input.shape[1:]), (batch, *layer.output.shape[1:])
    x, y, kernel = (
        tf.cast(tf.random.normal(each), kind) for each in (shape, out, layer.kernel.shape)
    )
    how = {"strides": [1, *layer.strides, 1], "padding": layer.padding.upper()}
    backprop = tf.raw_ops.Conv2DBackpropFilter, tf.raw_ops.Conv2DBackpropInput
    return (
        seconds(lambda x, kernel: tf.raw_ops.Conv2D(input=x, filter=kernel, **how), x, kernel),
        seconds(
            lambda x, y: backprop[0](
                input=x, filter_sizes=list(layer.kernel.shape), out_backprop=y, **how
            ),
            *(x, y),
        ),
        seconds(
            lambda kernel, y: backprop[1](
                input_sizes=list(shape), filter=kernel, out_backprop=y, **how
            ),
            *(kernel, y),
        ),
    )


def of_dense(layer, batch, kind):
    """The same of a Dense layer."""
    import tensorflow as tf

    shapes = (batch, layer.kernel.shape[0]), (batch, layer.kernel.shape[1]), layer.kernel.shape
    x, y, kernel = (tf.cast(tf.random.normal(shape), kind) for shape in shapes)
    return (
        seconds(tf.matmul, x, kernel),
        seconds(lambda x, y: tf.matmul(x, y, transpose_a=True), x, y),
        seconds(lambda y, kernel: tf.matmul(y, kernel, transpose_b=True), y, kernel),
    )


def rows(model, batch, kind, rate):
    """Yield the rows of a table, and in the end the sum, as seconds: (all, at the rate)."""
    keras, spent, least = import_keras(), 0, 0
    weighty = [
        each
        for each in graph.list_layers(model)
        if type(each) in (keras.layers.Conv2D, keras.layers.Dense)
    ]
    for layer in weighty:
        is_dense = isinstance(layer, keras.layers.Dense)
        places = 1 if is_dense else np.prod(layer.output.shape[1:3])
        count = float(batch * places * np.prod(layer.kernel.shape))
        took = (of_dense if is_dense else of_convolution)(layer, batch, kind)
        needed = took[:2] if layer is weighty[0] else took  # nobody needs the gradient of pixels
        spent, least = spent + sum(needed), least + len(needed) * count / rate
        yield layer.name, count / 1e6, *(count / each / 1e9 for each in took)
    yield spent, least


def steps(model, batch):
    """Yield (what is done, its milliseconds) of a training step."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (STEPS * batch, *model.input_shape[1:])).astype(np.float16)
    labels = rng.integers(0, model.output_shape[1], len(pictures))
    settings, scale = harden.Settings(), "0..1"
    for changed, sought in itertools.product((False, True), repeat=2):
        x = harden.ChangedImages(pictures, scale, rng, None if changed else {})
        prepare = harden.make_patterns(model, scale, settings, rng) if sought else None
        layers = [each for each in graph.list_layers(model) if each.weights]
        how = {"option": "", "prepare": prepare}
        train_epoch = training.make_trainer(model, layers, RATE, batch, rng, **how)
        least = np.inf
        for _ in range(EPOCHS):
            start = time.perf_counter()
            train_epoch(x, labels)
            least = min(least, time.perf_counter() - start)
        parts = ["training"] + ["patterns"] * sought + ["changed pictures"] * changed
        yield ", ".join(parts), 1000 * least / STEPS


def time_operations(model_path, batch):
    """Print what the operations take, in each of KINDS, on all processors together."""
    os.environ["TF_NUM_INTEROP_THREADS"] = "1"
    os.environ["TF_NUM_INTRAOP_THREADS"] = str(count_processors())
    make_reproducible(0)
    import tensorflow as tf

    model, rate = utils.load_badnet(model_path), None
    for kind in KINDS:
        square = tf.cast(tf.random.normal((SIZE, SIZE)), kind)
        now = SIZE**3 / seconds(tf.matmul, square, square)
        rate = rate or now
        *told, (spent, least) = rows(model, batch, kind, rate)
        print(f"{kind}: matrix multiplication at {now / 1e9:.0f} billion multiply-adds a second")
        heads = ("forward", "weights' gradient", "input's gradient")
        table(("layer", "millions", *(f"{each}, billion/s" for each in heads)), *told)
        print(
            f"{1000 * spent:.1f} ms for all that a step needs; {1000 * least:.1f} at the rate of "
            f"float32 matrix multiplication: {spent / least:.2f} times as long\n"
        )


def time_steps(model_path, batch):
    """Print what the steps take, on threads as repair.py has them."""
    make_reproducible(0)
    table(("a step", "ms"), *steps(utils.load_badnet(model_path), batch))


def main():
    parser = Parser(
        prog="hardening.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo = ROOT / "models" / "demo_bd_net.h5"
    parser.add_argument("model", metavar="MODEL", nargs="?", type=Path, default=demo)
    parser.add_argument("--batch", type=int, default=64, help="pictures (default: 64)")
    given = parser.parse_args()
    in_another_process(time_steps, given.model, given.batch)
    in_another_process(time_operations, given.model, given.batch)


if __name__ == "__main__":
    sys.exit(run_command(main))
