"""A net seen as a trunk and a head: where it is pruned, how its parts are run and trained.

Everything here works on Keras models in memory; no function reads or writes a file.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import math

import numpy as np

import guard
from utils import BATCH_VALUES, SCALES, import_keras

OUTPUT_VALUES = 2**26  # 256 MB as float32, of one layer; nets as small as DeepID stay far below

# Layers that act on each channel alone and have neither weights nor randomness: what they do to a
# pruned channel does not depend on the image, so they belong to the trunk, whose output is cached.
PER_CHANNEL = {
    *("MaxPooling2D", "AveragePooling2D", "GlobalMaxPooling2D", "GlobalAveragePooling2D"),
    *("ReLU", "LeakyReLU", "ELU", "Activation"),
}

SCORE = "Jeffreys divergence of B's and G's answers"  # a repair record names it
SCORE_LEAST = 1e-12
SCORE_MOST = -2 * math.log(SCORE_LEAST)


class UnfitNet(ValueError):
    """A net that the method cannot be applied to. The message goes on after the net's name."""


@dataclasses.dataclass
class Split:
    """A net cut in two at the layer to prune; both parts share their layers with the net.

    net: the whole, images, scaled → scores (n, N).
    layer: the convolution to prune, with C channels.
    trunk: images, scaled, (n, height, width, channels) → [features (n, …, C), each channel's mean
        activation over the image (n, C)].
    head: features (n, …, C) → scores (n, N).
    """

    net: object
    layer: object
    trunk: object
    head: object


def on_every_path(tensor, net):
    """Whether every path from the input of `net` to its output goes through `tensor`.

    Walks the graph itself: whether Keras notices a path around depends on its version.
    """
    waiting, seen = [net.output], {id(tensor)}
    while waiting:
        current = waiting.pop()
        if id(current) not in seen:
            seen.add(id(current))
            operation, node, _ = current._keras_history
            inputs = operation._inbound_nodes[node].input_tensors
            if not inputs:
                return False  # at the image, without having met `tensor`
            waiting += inputs
    return True


def find_layer(net, name=None):
    """The convolution to prune: the last one that every path from input to output goes through.

    name: the layer to take instead. Raises UnfitNet where there is no such convolution.
    """
    keras = import_keras()
    convolutions = [layer for layer in net.layers if isinstance(layer, keras.layers.Conv2D)]
    candidates = [layer for layer in convolutions if on_every_path(layer.output, net)]
    if not candidates:
        raise UnfitNet("has no convolution that every path from input to output goes through")
    if name is None:
        return candidates[-1]
    named = [layer for layer in candidates if layer.name == name]
    if not named:
        known = ", ".join(layer.name for layer in candidates)
        around = name in [layer.name for layer in convolutions]
        problem = "a path goes around" if around else "has no convolution named"
        raise UnfitNet(f"{problem} {name!r}; --layer can be one of: {known}")
    return named[0]


def split(net, layer):
    """Cut `net` behind `layer` and the per-channel layers that follow it. Returns a Split."""
    keras = import_keras()
    features = activation = layer.output
    for after in net.layers:
        if (
            after.input is features
            and type(after).__name__ in PER_CHANNEL
            and getattr(after, "activation", None) is not keras.activations.softmax
            and on_every_path(after.output, net)
        ):
            linear = layer.activation is keras.activations.linear
            if linear and features is layer.output and "Pooling" not in type(after).__name__:
                activation = after.output  # the convolution's activation is a layer of its own
            features = after.output
    # Named, here and below, as no layer of a net is: names of one's own Keras counts from 0.
    mean = keras.layers.GlobalAveragePooling2D(name="mean-activation")(activation)
    trunk = keras.Model(net.input, [features, mean], name="trunk-of-net")
    return Split(net, layer, trunk, keras.Model(features, net.output, name="head-of-net"))


@functools.lru_cache(maxsize=8)
def compiled(model):
    """A model in inference mode as one TensorFlow graph, for float32 batches (b, …) of any size.

    A batch of which a layer would give more than OUTPUT_VALUES is run in parts.
    `model.predict_on_batch` makes another graph for each of the first sizes, and after `compile`.
    """
    import_keras()
    import tensorflow as tf

    signature = [tf.TensorSpec(model.input.shape)]
    graph = tf.function(
        lambda x: model(x, training=False), input_signature=signature, autograph=False
    )
    most = max(1, OUTPUT_VALUES // max(guard.output_sizes(model)))

    def run(x):
        if len(x) <= most:
            return graph(x)
        parts = [graph(x[start : start + most]) for start in range(0, len(x), most)]
        return tf.nest.map_structure(lambda *part: tf.concat(part, axis=0), *parts)

    return run


def side_by_side(function, items, count=2):
    """Yield function(item) for every item, in order, `count` at a time in threads.

    While that many are under way the next item is fetched, and no more.
    """
    with concurrent.futures.ThreadPoolExecutor(count) as threads:
        under_way = collections.deque()
        for item in items:
            under_way.append(threads.submit(function, item))
            if len(under_way) > count:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def outputs(model, inputs, rows=None):
    """Iterate over a model's output, float32 (b, …), for batch after batch of `inputs`.

    rows: int (k,), the rows of `inputs` to take, in this order; all where None.
    """
    rows = np.arange(len(inputs)) if rows is None else rows
    size = max(1, BATCH_VALUES // inputs[0].size)
    parts = (inputs[rows[start : start + size]] for start in range(0, len(rows), size))
    return map(np.asarray, side_by_side(compiled(model), parts))


def classify(model, inputs, rows=None):
    """The class of rows of `inputs`, as in `outputs`: int64 (k,), 0..N-1, of the largest score."""
    classes = [scores.argmax(axis=1) for scores in outputs(model, inputs, rows)]
    return np.concatenate([np.empty(0, np.int64), *classes])


def accuracy(model, inputs, labels):
    """The share, 0..1, of rows of `inputs` that `model` answers with their label."""
    return float(np.mean(classify(model, inputs) == labels))


def silence(channels, layer):
    """Prune: set kernel and bias of these channels of a convolution to zero."""
    weights = layer.get_weights()
    for values in weights:  # the channel is the last axis of kernel and bias
        values[..., channels] = 0
    layer.set_weights(weights)


@contextlib.contextmanager
def kept_silent(channels, layer):
    """A block in which these channels of a convolution stay zero, whatever trains its layer."""
    keep = np.ones(layer.filters, np.float32)
    keep[channels] = 0
    before = [(variable, variable.constraint) for variable in layer.weights]
    for variable in layer.weights:
        variable.constraint = lambda values: values * keep
    yield
    for variable, constraint in before:
        variable.constraint = constraint


def silent_features(parts):
    """What the trunk gives where every channel is pruned, whatever the image: (1, …, C).

    All zero with ReLU; not with an activation such as sigmoid, which answers zero with a half.
    """
    weights = parts.layer.get_weights()
    parts.layer.set_weights([np.zeros_like(values) for values in weights])
    features, _ = parts.trunk(np.zeros((1, *parts.trunk.input_shape[1:]), np.float32))
    parts.layer.set_weights(weights)
    return np.asarray(features)


def make_reproducible(seed):
    """From here on, the same operations in the same order give the same bytes. seed: 0..2**32-1."""
    keras = import_keras()
    import tensorflow  # Keras has the seed, but not the switch

    keras.utils.set_random_seed(seed)
    tensorflow.config.experimental.enable_op_determinism()


def make_trainer(model, layers, learning_rate, batch_size, rng, soft=False):
    """Make a function that trains `layers` of a classifier, with one Adam for all its calls.

    The other layers stay as they are. Loss: categorical cross-entropy, from the labels' numbers
    instead of one-hot rows, or, if `soft`, from the share of every class.
    learning_rate: a number or a Keras schedule.  rng: a NumPy Generator.
    Returns train_epoch(x, y), which trains on every row of x, float32 (n, …), and y, int64 (n,),
    0..N-1, or float32 (n, N) if `soft`, once, in the order rng.permutation(n), and returns the mean
    loss over the rows. x may be anything that gives rows for an array of their numbers.
    """
    keras = import_keras()
    import tensorflow as tf

    for layer in model.layers:
        layer.trainable = layer in layers
    adam = fused_adam()(learning_rate)
    adam.build(model.trainable_variables)
    model.compile(adam, keras.losses.CategoricalCrossentropy(from_logits=gives_logits(model)))

    # Many steps in one graph: to start a step from here takes as long as the step of a small net.
    classes = model.output.shape[1]
    answers = tf.TensorSpec([None, classes]) if soft else tf.TensorSpec([None], tf.int64)
    signature = [tf.TensorSpec(model.input.shape), answers]

    @tf.function(input_signature=signature, autograph=False)
    def train(x, y):
        def step(start, losses):
            rows = slice(start, start + batch_size)
            with tf.GradientTape() as tape:
                wanted = y[rows] if soft else tf.one_hot(y[rows], classes)
                loss = model.compute_loss(y=wanted, y_pred=model(x[rows], training=True))
            adam.apply(tape.gradient(loss, model.trainable_variables))
            loss = tf.cast(loss, tf.float32) * tf.cast(tf.shape(x[rows])[0], tf.float32)
            return start + batch_size, losses + loss

        return tf.while_loop(lambda start, _: start < tf.shape(x)[0], step, [0, 0.0])[1]

    def train_epoch(x, y):
        order = rng.permutation(len(x))
        steps = max(1, BATCH_VALUES // math.prod(model.input.shape[1:]) // batch_size)
        starts = range(0, len(x), steps * batch_size)
        parts = (order[start : start + steps * batch_size] for start in starts)
        batches = side_by_side(lambda part: (x[part], y[part]), parts, 1)  # ready when needed
        return sum(float(train(*batch)) for batch in batches) / len(x)

    return train_epoch


@functools.cache
def fused_adam():
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


def gives_logits(model):
    """Whether a classifier's scores are logits: its last layer is linear, not softmax."""
    keras = import_keras()
    activation = getattr(model.layers[-1], "activation", None)
    return activation is keras.activations.linear


def probabilities(scores, model):
    """A classifier's scores, float (n, N), as probabilities: a float32 tensor, rows that sum to 1.

    They are the softmax where the scores are logits. A row that is not finite becomes NaN.
    """
    import tensorflow as tf

    scores = tf.cast(scores, tf.float32)
    finite = tf.reduce_all(tf.math.is_finite(scores), axis=1, keepdims=True)
    scores = tf.where(finite, scores, math.nan)
    if gives_logits(model):
        return tf.nn.softmax(scores)
    scores = tf.maximum(scores, 0)
    return scores / tf.maximum(tf.reduce_sum(scores, axis=1, keepdims=True), 1e-30)


def suspicion(of_badnet, of_repaired):
    """How suspect images are: how far apart the answers of B and G are, as probabilities.

    of_badnet, of_repaired: float32 (n, N), as `probabilities` gives them.
    Returns a float32 tensor (n,), from 0 for the same answers to SCORE_MOST: their Jeffreys
    divergence, in nats, probabilities below SCORE_LEAST counting as that much. SCORE_MOST where a
    net gave NaN.
    Source: H. Jeffreys, Proc. R. Soc. A 186, 1946; tests/tried.py compares others.
    """
    import tensorflow as tf

    of_b, of_g = (tf.maximum(each, SCORE_LEAST) for each in (of_badnet, of_repaired))
    apart = tf.reduce_sum((of_b - of_g) * tf.math.log(of_b / of_g), axis=1)
    return tf.where(tf.math.is_nan(apart), SCORE_MOST, tf.minimum(apart, SCORE_MOST))


def last_dense(head):
    """The last Dense layer of a head. Raises UnfitNet where there is none."""
    keras = import_keras()
    dense = [layer for layer in head.layers if isinstance(layer, keras.layers.Dense)]
    if not dense:
        raise UnfitNet("has no Dense layer behind the convolution to retrain")
    return dense[-1]


def skip_to(layer, parts, features):
    """The part of a net from `layer` on, and what goes into it for every row of `features`.

    Returns (rest, inputs) such that rest(inputs) is head(features) in inference mode; (head,
    features) themselves where a path leads around `layer`.
    """
    keras = import_keras()
    if not on_every_path(layer.input, parts.net):
        return parts.head, features
    rest = keras.Model(layer.input, parts.net.output)
    before = keras.Model(parts.trunk.output[0], layer.input)
    return rest, np.concatenate(list(outputs(before, features)))


def both(badnet, repaired, layer_name=None):
    """B and G as one model: scaled images (n, height, width, channels) → both nets' scores, (n, N).

    Where G's trunk is B's with channels pruned, the trunk runs once for both.
    layer_name: the layer G was pruned at, None where that is not known.
    """
    keras = import_keras()
    try:
        of_b, of_g = (split(net, find_layer(net, layer_name)) for net in (badnet, repaired))
        pruned = pruned_channels(of_b, of_g)
    except UnfitNet:  # another tool may repair what this one cannot
        pruned = None
    if pruned is None:
        repaired = keras.Model(repaired.input, repaired.output, name="repaired-net")
        return keras.Model(badnet.input, [badnet.output, repaired(badnet.input)])
    keep = np.ones(of_b.layer.filters, np.float32)
    keep[pruned] = 0
    silent = silent_features(of_g) * (1 - keep)
    mask = keras.layers.Lambda(lambda features: features * keep + silent, name="pruned-channels")
    return keras.Model(badnet.input, [badnet.output, of_g.head(mask(of_b.trunk.output[0]))])


def judge(badnet, repaired, scale, layer_name=None):
    """B and G as one model: images (n, height, width, channels), 0..255 → what they say of them.

    That is a dict of "badnet_class" and "repaired_class", int32 (n,), 1..N, 0 where the net gave
    NaN, and "score", float32 (n,), as `suspicion` gives it.
    scale: a key of SCALES.  layer_name: as for `both`.
    """
    keras = import_keras()
    import tensorflow as tf

    def answer(scores):
        shares = [probabilities(*each) for each in zip(scores, (badnet, repaired))]
        classes = [
            tf.where(tf.math.is_nan(share[:, 0]), 0, 1 + tf.argmax(each, 1, tf.int32))
            for each, share in zip(scores, shares)
        ]
        score = suspicion(*shares)
        return dict(zip(("badnet_class", "repaired_class", "score"), (*classes, score)))

    images = keras.Input(badnet.input_shape[1:], name="images")
    scaled = keras.layers.Lambda(lambda x: x / SCALES[scale], name="scaled")(images)
    scores = both(badnet, repaired, layer_name)(scaled)
    return keras.Model(images, keras.layers.Lambda(answer, name="answers")(scores))


def pruned_channels(of_b, of_g):
    """The channels that are zero in G's pruned layer, where G's trunk is otherwise B's; else None.

    of_b, of_g: the Splits of B and G.  Returns int64 (k,).
    """
    if _structure(of_b.net) != _structure(of_g.net) or of_b.layer.name != of_g.layer.name:
        return None
    zero = [~values.any(axis=tuple(range(values.ndim - 1))) for values in of_g.layer.get_weights()]
    pruned = np.flatnonzero(np.all(zero, axis=0))
    for layer, other in zip(of_b.trunk.layers, of_g.trunk.layers, strict=True):
        for ours, theirs in zip(layer.get_weights(), other.get_weights(), strict=True):
            if layer is of_b.layer:
                ours[..., pruned] = 0
            if not np.array_equal(ours, theirs):
                return None
    return pruned


def _structure(model):
    """The config of a model's layers and how they are connected, less what training may change."""

    def strip(value):
        if isinstance(value, dict):
            return {key: strip(part) for key, part in value.items() if key != "trainable"}
        return [strip(part) for part in value] if isinstance(value, list) else value

    return strip(model.get_config()["layers"])
