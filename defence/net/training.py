"""The trainer of every step: many steps in one graph, Adam, loss of logits or probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from defence.base.errors import WorkError
from defence.base.limits import BATCH_VALUES
from defence.base.progress import follow
from defence.base.startup import import_keras
from defence.net import graph
from defence.net.inference import map_in_parallel


def make_trainer(
    model: Any,
    layers: Sequence[Any],
    learning_rate: Any,
    batch_size: int,
    rng: np.random.Generator,
    *,
    option: str | None = None,
    prepare: Callable[[Any], Any] | None = None,
) -> Callable[..., float]:
    """Return a function that trains some layers of a classifier, with one Adam for all its calls.

    layers: the layers to train, not models; all others stay as they are.
    learning_rate: a number or a Keras schedule.  option: its name, for messages.
    prepare: a function in TensorFlow's graph; training replaces each batch x by prepare(x).
    The function, train_epoch(x, y), trains once on every row of x, float32 (n, …), and y,
    int64 (n,), 0..N-1, in the order rng.permutation(n). Its loss is categorical cross-entropy, and
    it returns the mean over the rows. x may be any object that gives rows for an array of indices.
    train_epoch(x, y, advance) calls advance(k) whenever k more rows are done.
    train_epoch raises WorkError where the loss or a weight is not finite.
    """
    keras = import_keras()
    model.trainable = True
    for layer in graph.list_layers(model):
        layer.trainable = any(layer is trained for trained in layers)
    adam = Adam(model.trainable_variables, learning_rate)
    model.compile(loss=keras.losses.CategoricalCrossentropy(from_logits=graph.gives_logits(model)))
    train = _compile_steps(model, adam, batch_size, prepare or (lambda x: x))

    def train_epoch(
        x: Any, y: np.ndarray, advance: Callable[[int], None] = lambda count: None
    ) -> float:
        order = rng.permutation(len(x))
        steps = max(1, BATCH_VALUES // math.prod(model.input.shape[1:]) // batch_size)
        starts = range(0, len(x), steps * batch_size)
        parts = (order[start : start + steps * batch_size] for start in starts)
        batches = map_in_parallel(lambda part: (x[part], y[part]), parts, 1)  # one batch ahead
        total = 0.0
        for batch in batches:
            total += float(train(*batch))
            advance(len(batch[1]))
        loss = total / len(x)
        finite = (np.isfinite(weights).all() for weights in model.get_weights())
        if not (math.isfinite(loss) and all(finite)):
            mend = f": try a smaller {option}" if option else ""
            raise WorkError(f"training diverged{mend}")
        return loss

    return train_epoch


def run_epochs(
    train_epoch: Callable[..., float], x: np.ndarray, y: np.ndarray, epochs: int, title: str
) -> Iterator[tuple[int, float]]:
    """Train for some epochs and show how far that is. Yield the number and the loss of each.

    train_epoch, x, y: as for make_trainer.  title: for the progress line.
    """
    with follow(title, epochs * len(x)) as advance:
        for epoch in range(1, epochs + 1):
            yield epoch, train_epoch(x, y, advance)


def _compile_steps(
    model: Any, adam: Adam, batch_size: int, prepare: Callable[[Any], Any]
) -> Callable[[Any, Any], Any]:
    """Return train(x, y), which takes many training steps and returns the sum of the rows' losses.

    It is one graph, because starting a step from Python takes as long as a small net's step.
    """
    import tensorflow as tf

    classes = model.output.shape[1]
    signature = [tf.TensorSpec(model.input.shape), tf.TensorSpec([None], tf.int64)]

    @tf.function(input_signature=signature, autograph=False)
    def train(x: Any, y: Any) -> Any:
        def take_step(start: Any, losses: Any) -> tuple[Any, Any]:
            rows = slice(start, start + batch_size)
            inputs = prepare(x[rows])
            with tf.GradientTape() as tape:
                targets = tf.one_hot(y[rows], classes)
                loss = model.compute_loss(y=targets, y_pred=model(inputs, training=True))
            adam.apply(tape.gradient(loss, model.trainable_variables))
            loss = tf.cast(loss, tf.float32) * tf.cast(tf.shape(x[rows])[0], tf.float32)
            return start + batch_size, losses + loss

        return tf.while_loop(lambda start, _: start < tf.shape(x)[0], take_step, [0, 0.0])[1]

    return train


class Adam:
    """Adam that updates a weight with one TensorFlow kernel; Keras's takes a dozen operations.

    Source: D. Kingma, J. Ba, ICLR 2015, with the constants that Keras has.
    """

    beta_1, beta_2, epsilon = 0.9, 0.999, 1e-7

    def __init__(self, weights: Sequence[Any], learning_rate: Any) -> None:
        """weights: Keras variables.  learning_rate: a number or a Keras schedule."""
        import tensorflow as tf

        self.weights, self.learning_rate = weights, learning_rate
        self.steps = tf.Variable(0, dtype=tf.int64)
        self.means, self.squares = (
            [tf.Variable(tf.zeros(weight.shape, weight.dtype)) for weight in weights]
            for _ in range(2)
        )

    def apply(self, gradients: Sequence[Any]) -> None:
        """Update the weights in place, and hold them to their constraints.

        gradients: one for each weight; None where the loss does not depend on it.
        """
        import tensorflow as tf

        rate = self.learning_rate
        rate = rate(self.steps) if callable(rate) else rate
        for weight, mean, square, gradient in zip(
            self.weights, self.means, self.squares, gradients, strict=True
        ):
            if gradient is None:
                continue
            step = tf.cast(self.steps + 1, weight.dtype)
            tf.raw_ops.ResourceApplyAdam(
                var=weight.value.handle,
                m=mean.handle,
                v=square.handle,
                beta1_power=self.beta_1**step,
                beta2_power=self.beta_2**step,
                lr=tf.cast(rate, weight.dtype),
                beta1=self.beta_1,
                beta2=self.beta_2,
                epsilon=self.epsilon,
                grad=tf.cast(gradient, weight.dtype),
            )
        for weight in self.weights:
            if weight.constraint is not None:
                weight.assign(weight.constraint(weight))
        self.steps.assign_add(1)
