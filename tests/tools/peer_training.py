"""What the repairs of peer_repairs.py share: batches, gradients, an optimiser, masks of neurons."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "models"), str(ROOT / "data"), str(ROOT / "tests" / "tools")]

import numpy as np
from photo_nets import shift_images

from defence.base.startup import import_keras
from defence.net import graph
from defence.net.split import find_last_weighted

SCALE = "0..1"  # of the pixels of the nets of photographs
MOMENTUM = 0.9


def read_images(data):
    """Return a Dataset's images, float32 (n, height, width, channels), 0..1, and labels (n,)."""
    return np.concatenate([x for x, _ in data.batches(SCALE)]), data.labels


def copy_net(net):
    """Return a copy of a Keras model, all of whose weights can be trained."""
    copy = import_keras().models.clone_model(net)
    copy.set_weights(net.get_weights())
    copy.trainable = True
    return copy


def draw_batches(net, clean, size, steps, rng, smoothing=0.0):
    """Yield `steps` batches: shifted images, and their labels as probabilities (b, N).

    clean: (images, labels).  smoothing: the probability that the other classes share.
    The images of an epoch are in a new order, and each is shifted anew, as when B was trained.
    """
    images, labels = clean
    classes, rows = net.output_shape[1], np.empty(0, int)
    targets = np.full((classes, classes), smoothing / (classes - 1), np.float32)
    np.fill_diagonal(targets, 1 - smoothing)
    for _ in range(steps):
        if not len(rows):
            rows = rng.permutation(len(images))
        chosen, rows = rows[:size], rows[size:]
        yield shift_images(images[chosen], rng), targets[labels[chosen]]


def count_steps(clean, size, epochs):
    """Return the number of batches in some epochs over the (images, labels)."""
    return epochs * -(-len(clean[1]) // size)


def make_loss(net):
    """Return a function of images and probabilities (b, N): the cross-entropies (b,) of a net.

    training: of the net's layers, as Keras takes it.
    """
    cross_entropy = import_keras().losses.categorical_crossentropy
    logits = graph.gives_logits(net)

    def compute_losses(x, targets, training):
        return cross_entropy(targets, net(x, training=training), from_logits=logits)

    return compute_losses


def compile_gradient(net, weights, allowance=0.0):
    """Return a function of images and probabilities (b, N): the gradients by these weights.

    The loss is the mean of what each image's cross-entropy exceeds the allowance by.
    """
    import tensorflow as tf

    compute_losses = make_loss(net)
    signature = [tf.TensorSpec(net.input.shape), tf.TensorSpec(net.output.shape)]

    @tf.function(input_signature=signature, autograph=False)
    def compute_gradient(x, targets):
        with tf.GradientTape() as tape:
            losses = compute_losses(x, targets, training=True)
            loss = tf.reduce_mean(tf.nn.relu(losses - allowance))
        return tape.gradient(loss, weights)

    return compute_gradient


class Descent:
    """Gradient descent with momentum; its learning rate falls by cosine from `rate` to `last`.

    As in PyTorch, the decay adds that fraction of the weights to their gradients.
    """

    def __init__(self, weights, rate, steps, decay=0.0, momentum=MOMENTUM, last=0.0):
        optimizers, self.weights, self.decay = import_keras().optimizers, weights, decay
        schedule = optimizers.schedules.CosineDecay(rate, steps, alpha=last / rate)
        self.optimizer = optimizers.SGD(schedule, momentum)

    def step(self, gradients):
        if self.decay:
            gradients = [g + self.decay * w for g, w in zip(gradients, self.weights)]
        self.optimizer.apply(gradients, self.weights)


class Masks:
    """A factor for each neuron of a net, at first 1, by which its weights are multiplied.

    A neuron is a channel of batch normalisation, as in the authors' code of ANP and NFT. Where a
    net has none, it is a channel of any layer with weights but the last. Its last axis counts them.
    """

    def __init__(self, net):
        keras, last = import_keras(), find_last_weighted(net)
        layers = list(graph.list_layers(net))
        norms = [x for x in layers if isinstance(x, keras.layers.BatchNormalization)]
        units = [(x.gamma, x.beta) for x in norms] or [
            (x.kernel, x.bias) for x in layers if hasattr(x, "kernel") and x is not last
        ]
        self.variables = [variable for unit in units for variable in unit]
        self.originals = [variable.numpy() for variable in self.variables]
        self.values = [keras.Variable(np.ones(kernel.shape[-1])) for kernel, _ in units]

    def put(self, noise=None):
        """Multiply the weights by the masks. noise: arrays to add, of weights and biases by turns.

        A bias has the factor 1, to which its noise is added.
        """
        noise = noise or [0.0] * len(self.variables)
        factors = [factor for mask in self.values for factor in (mask.numpy(), 1.0)]
        for variable, original, factor, extra in zip(
            self.variables, self.originals, factors, noise
        ):
            variable.assign(original * np.float32(factor + extra))

    def convert(self, gradients):
        """Return the gradients by the factors, from those by the variables."""
        products = [np.asarray(g) * original for g, original in zip(gradients, self.originals)]
        return [x.reshape(-1, x.shape[-1]).sum(axis=0) for x in products]

    def clip(self, lowest):
        """Clip each layer's masks to its lowest value, one of the list, and to 1."""
        for mask, low in zip(self.values, lowest):
            mask.assign(np.clip(mask.numpy(), low, 1))
