"""A net cut at the layer to prune: where to cut it, its trunk and head, what pruning does to it.

Everything here works on Keras models in memory; no function reads or writes a file.
"""

import collections
import contextlib
import dataclasses

import numpy as np

from defence.startup import import_keras

# Layers that act on each channel alone and have neither weights nor randomness: what they do to a
# pruned channel does not depend on the image, so they belong to the trunk, whose output is cached.
PER_CHANNEL = {
    *("MaxPooling2D", "AveragePooling2D", "GlobalMaxPooling2D", "GlobalAveragePooling2D"),
    *("ReLU", "LeakyReLU", "ELU", "Activation"),
}
# Layers that only rearrange, select or combine scores: probabilities go in, probabilities come out.
KEEP_PROBABILITIES = {
    *("Reshape", "Flatten", "Permute", "Cropping2D", "UpSampling2D", "Concatenate"),
    *("Dropout", "SpatialDropout2D", "GaussianNoise", "GaussianDropout", "AlphaDropout"),
    *("Add", "Average", "Maximum", "Minimum", "Multiply"),
    *("MaxPooling2D", "AveragePooling2D", "GlobalMaxPooling2D", "GlobalAveragePooling2D"),
}


class UnfitNet(ValueError):
    """A net that the method cannot be applied to. The message continues after the net's name."""


@dataclasses.dataclass
class Split:
    """A net cut in two at the layer to prune; both parts share their layers with the net.

    net: the whole, scaled images → scores (n, N).
    layer: the convolution to prune, with C channels.
    trunk: scaled images (n, height, width, channels) → [features (n, …, C), each channel's mean
        activation over the image (n, C)].
    head: features (n, …, C) → scores (n, N).
    """

    net: object
    layer: object
    trunk: object
    head: object


# ------------------------------------------------------------------------------- the net's graph


def call_of(tensor):
    """The operation that a Keras tensor comes from, and the tensors that it was called on."""
    operation, node, _ = tensor._keras_history
    return operation, operation._inbound_nodes[node].input_tensors


def on_every_path(tensor, net):
    """Whether every path from the input of `net` to its output goes through `tensor`.

    Walks the graph itself: whether Keras notices a path around depends on its version.
    """
    waiting, seen = [net.output], {id(tensor)}
    while waiting:
        current = waiting.pop()
        if id(current) not in seen:
            seen.add(id(current))
            _, inputs = call_of(current)
            if not inputs:
                return False  # at the image, without having met `tensor`
            waiting += inputs
    return True


def layer_used_twice(net):
    """The name of a layer that `net` calls more than once, or None."""
    waiting, calls = [net.output], set()
    while waiting:
        operation, node, _ = waiting.pop()._keras_history
        if (operation, node) not in calls:
            calls.add((operation, node))
            waiting += operation._inbound_nodes[node].input_tensors
    counts = collections.Counter(operation.name for operation, _ in calls)
    return next((name for name, count in sorted(counts.items()) if count > 1), None)


def leaves(model):
    """The layers of a model, those of nested models in their place, at any depth."""
    for layer in model.layers:
        yield from leaves(layer) if hasattr(layer, "layers") else [layer]


def last_dense(head):
    """The last Dense layer of a head, at any nesting. Raises UnfitNet where there is none."""
    keras = import_keras()
    dense = [layer for layer in leaves(head) if isinstance(layer, keras.layers.Dense)]
    if not dense:
        raise UnfitNet("has no Dense layer behind the convolution to retrain")
    return dense[-1]


def gives_logits(model):
    """Whether a classifier's scores are logits, of which softmax makes probabilities.

    They are not where each path back from the output meets a softmax or a sigmoid, and up to there
    only layers of KEEP_PROBABILITIES. The path goes into nested models and out again.
    """
    activations = import_keras().activations
    final = (activations.softmax, activations.sigmoid, activations.hard_sigmoid)
    waiting, seen = [(model.output, ())], set()
    while waiting:
        tensor, outside = waiting.pop()  # outside: what the nested model was called on
        if (id(tensor), id(outside)) in seen:
            continue
        seen.add((id(tensor), id(outside)))
        operation, inputs = call_of(tensor)
        kind, activation = type(operation).__name__, getattr(operation, "activation", None)
        beyond = [(each, outside) for each in inputs]
        if not inputs and outside:
            waiting += outside
        elif hasattr(operation, "layers"):
            place = tensor._keras_history.tensor_index
            waiting.append((operation.outputs[place], beyond))
        elif kind in KEEP_PROBABILITIES or (
            kind == "Activation" and activation is activations.linear
        ):
            waiting += beyond
        elif kind != "Softmax" and activation not in final:
            return True
    return False


# -------------------------------------------------------------------------------------- cutting


def find_layer(net, name=None):
    """The convolution to prune: the last one that every path from input to output goes through.

    name: the layer to take instead. Raises UnfitNet where there is no such convolution, or a layer
    is used twice.
    """
    keras = import_keras()
    if twice := layer_used_twice(net):
        raise UnfitNet(f"uses the layer {twice!r} more than once; such a net cannot be repaired")
    convolutions = [layer for layer in net.layers if isinstance(layer, keras.layers.Conv2D)]
    candidates = [layer for layer in convolutions if on_every_path(layer.output, net)]
    if not candidates:
        raise UnfitNet("has no convolution that every path from input to output goes through")
    if name is None:
        return candidates[-1]
    named = [layer for layer in candidates if layer.name == name]
    if not named:
        known = ", ".join(layer.name for layer in candidates)
        bypassed = name in [layer.name for layer in convolutions]
        problem = "a path bypasses" if bypassed else "has no convolution named"
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
    # Named, here and below, as no layer of a net is: Keras counts the names it gives from 0.
    mean = keras.layers.GlobalAveragePooling2D(name="mean-activation")(activation)
    trunk = keras.Model(net.input, [features, mean], name="trunk-of-net")
    return Split(net, layer, trunk, keras.Model(features, net.output, name="head-of-net"))


def cut_before(layer, parts):
    """Cut the head of a Split before a layer: (features → the layer's input, that → scores).

    None where a path leads around the layer's input, or a layer of the first part draws at random:
    then what goes into the layer cannot be computed once for all epochs.
    """
    keras = import_keras()
    drop = any(hasattr(each, "seed_generator") for each in leaves(parts.head))
    if drop or not on_every_path(layer.input, parts.net):
        return None
    before = keras.Model(parts.trunk.output[0], layer.input, name="before-layer")
    return before, keras.Model(layer.input, parts.net.output, name="from-layer")


# -------------------------------------------------------------------------------------- pruning


def prune_channels(layer, channels):
    """Set kernel and bias of these channels of a convolution to zero."""
    weights = layer.get_weights()
    for values in weights:  # the channel is the last axis of kernel and bias
        values[..., channels] = 0
    layer.set_weights(weights)


@contextlib.contextmanager
def kept_pruned(layer, channels):
    """A block in which these channels of a convolution stay zero, whatever trains its layer."""
    keep = np.ones(layer.filters, np.float32)
    keep[channels] = 0
    before = [(variable, variable.constraint) for variable in layer.weights]
    for variable in layer.weights:
        variable.constraint = lambda values: values * keep
    yield
    for variable, constraint in before:
        variable.constraint = constraint


def masked_features(parts):
    """What the trunk gives where every channel is pruned, whatever the image: (1, …, C).

    All zero with ReLU; not with an activation such as sigmoid, which gives one half for zero.
    """
    weights = parts.layer.get_weights()
    parts.layer.set_weights([np.zeros_like(values) for values in weights])
    features, _ = parts.trunk(np.zeros((1, *parts.trunk.input_shape[1:]), np.float32))
    parts.layer.set_weights(weights)
    return np.asarray(features)
