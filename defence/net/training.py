"""One trainer for every step: an epoch as one graph, Adam, loss from logits or probabilities."""

import functools
import math

import numpy as np

from defence.base.errors import WorkError
from defence.base.limits import BATCH_VALUES
from defence.base.startup import import_keras
from defence.net import graph
from defence.net.inference import map_in_parallel


def make_trainer(model, layers, learning_rate, batch_size, rng, *, option, prepare=None):
    """Make a function that trains some layers of a classifier, with one Adam for all its calls.

    layers: those to train, none of them a model; the others stay as they are.
    learning_rate: a number or a Keras schedule.  rng: a NumPy Generator.
    option: that sets the learning rate, for the message when training diverges.
    prepare: a function of a batch x, in TensorFlow's graph, to train on what it returns instead.
    Loss: categorical cross-entropy.
    Returns train_epoch(x, y), which trains on every row of x, float32 (n, …), and y, int64 (n,),
    0..N-1, once, in the order rng.permutation(n), and returns the mean loss over the rows. x may be
    anything that gives rows for an array of their numbers.
    train_epoch raises WorkError where the loss or a weight is not finite.
    """
    keras = import_keras()
    model.trainable = True
    for layer in graph.list_layers(model):
        layer.trainable = any(layer is each for each in layers)
    adam = make_fused_adam()(learning_rate)
    adam.build(model.trainable_variables)
    model.compile(adam, keras.losses.CategoricalCrossentropy(from_logits=graph.gives_logits(model)))
    train = _compile_steps(model, adam, batch_size, prepare or (lambda x: x))

    def train_epoch(x, y):
        order = rng.permutation(len(x))
        steps = max(1, BATCH_VALUES // math.prod(model.input.shape[1:]) // batch_size)
        starts = range(0, len(x), steps * batch_size)
        parts = (order[start : start + steps * batch_size] for start in starts)
        batches = map_in_parallel(lambda part: (x[part], y[part]), parts, 1)  # ready when needed
        loss = sum(float(train(*batch)) for batch in batches) / len(x)
        weights = (np.isfinite(each).all() for each in model.get_weights())
        if not (math.isfinite(loss) and all(weights)):
            raise WorkError(f"training diverged: try a smaller {option}")
        return loss

    return train_epoch


def _compile_steps(model, adam, batch_size, prepare):
    """Many training steps as one graph: starting a step from here takes as long as a small net's.

    Returns a function of rows (x, y) that gives the sum of their losses.
    """
    import tensorflow as tf

    classes = model.output.shape[1]
    signature = [tf.TensorSpec(model.input.shape), tf.TensorSpec([None], tf.int64)]

    @tf.function(input_signature=signature, autograph=False)
    def train(x, y):
        def step(start, losses):
            rows = slice(start, start + batch_size)
            given = prepare(x[rows])
            with tf.GradientTape() as tape:
                wanted = tf.one_hot(y[rows], classes)
                loss = model.compute_loss(y=wanted, y_pred=model(given, training=True))
            adam.apply(tape.gradient(loss, model.trainable_variables))
            loss = tf.cast(loss, tf.float32) * tf.cast(tf.shape(x[rows])[0], tf.float32)
            return start + batch_size, losses + loss

        return tf.while_loop(lambda start, _: start < tf.shape(x)[0], step, [0, 0.0])[1]

    return train


@functools.cache
def make_fused_adam():
    """Keras's Adam with one kernel to update a weight, where Keras starts a dozen."""
    keras = import_keras()
    import tensorflow as tf

    class FusedAdam(keras.optimizers.Adam):
        def update_step(self, gradient, variable, learning_rate):
            index = self._get_variable_index(variable)
            step = tf.cast(self.iterations + 1, variable.dtype)
            tf.raw_ops.ResourceApplyAdam(
                var=variable.handle,
                m=self._momentums[index].value.handle,
                v=self._velocities[index].value.handle,
                beta1_power=self.beta_1**step,
                beta2_power=self.beta_2**step,
                lr=tf.cast(learning_rate, variable.dtype),
                beta1=self.beta_1,
                beta2=self.beta_2,
                epsilon=self.epsilon,
                grad=tf.cast(gradient, variable.dtype),
            )

    return FusedAdam
