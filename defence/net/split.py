"""A net cut at the feature map to prune: which that is, its trunk and head, how it is pruned.

Everything here works on Keras models in memory; no function reads or writes a file.
"""

import contextlib
import dataclasses

import numpy as np

from defence.base.startup import import_keras
from defence.net import graph

# Layers that act on each channel alone and have neither weights nor randomness: what they do to a
# pruned channel does not depend on the image, so they belong to the trunk, whose output is cached.
PER_CHANNEL = {
    *("MaxPooling2D", "AveragePooling2D", "GlobalMaxPooling2D", "GlobalAveragePooling2D"),
    *("ReLU", "LeakyReLU", "ELU", "Activation"),
}
# A feature map is measured and pruned behind those of these that follow what makes it at once, up
# to the first activation.
ACTIVATIONS = {
    *("Activation", "ReLU", "LeakyReLU", "PReLU", "ELU"),
    *("Relu", "Relu6", "Sigmoid", "HardSigmoid", "Silu", "HardSilu"),  # as plain operations
}
FOLLOW = {"BatchNormalization", *ACTIVATIONS}
MIX = {"softmax", "log_softmax"}  # activations that are not of each channel alone
# Layers that only pass a feature map on, at other places, or part of it.
PASS_ON = {
    *("MaxPooling2D", "AveragePooling2D", "ZeroPadding2D", "Cropping2D", "UpSampling2D"),
    *("Dropout", "SpatialDropout2D", "GaussianNoise", "GaussianDropout", "AlphaDropout"),
    "Identity",
}
GLOBAL = {"GlobalMaxPooling2D", "GlobalAveragePooling2D"}
WEIGHTED = {"Dense", "Conv2D", "DepthwiseConv2D", "SeparableConv2D", "Conv2DTranspose"}
MASK = "pruned-channels"  # the name of a layer that this tool puts in


class UnfitNet(ValueError):
    """A net that the method cannot be applied to. The message continues after the net's name."""


@dataclasses.dataclass
class Split:
    """A net cut in two at the feature map to prune; both parts share their layers with the net.

    net: the whole, scaled images → scores (n, N).
    layer: the layer whose weights prune the map's C channels, as `channel_weights` says.
    trunk: scaled images (n, height, width, channels) → [features (n, …, C), each channel's mean
        activation over the image (n, C)].
    head: features (n, …, C) → scores (n, N).
    name: of the layer that gives the map.
    """

    net: object
    layer: object
    trunk: object
    head: object
    name: str = ""


# -------------------------------------------------------------------------------- feature maps


@dataclasses.dataclass
class FeatureMap:
    """A feature map that every path goes through: tensor (n, height, width, C), and its layers.

    layers: the one that makes it, and those of FOLLOW behind it; the last has its name.
    mask: the layer of ours behind it, or None.
    """

    tensor: object
    layers: list
    mask: object = None

    @property
    def name(self):
        return self.layers[-1].name

    @property
    def activated(self):
        own = getattr(self.layers[0], "activation", None)
        linear = own in (None, import_keras().activations.linear)
        return not linear or get_kind(self.layers[-1]) in ACTIVATIONS


def find_feature_maps(net):
    """The FeatureMaps of a net that can be pruned, in order.

    A map can be pruned if every path from input to output goes through it, weights come before it
    and behind it, so that it is neither the image nor the scores, and no global pooling does.
    """
    order = graph.sort_tensors(net.output)
    place = {id(tensor): number for number, tensor in enumerate(order)}
    weighted = [i for i, each in enumerate(order) if get_kind(graph.find_call(each)[0]) in WEIGHTED]
    maps, last = [], None
    for tensor in graph.find_waypoints(net):
        operation, inputs = graph.find_call(tensor)
        kind, behind_last = get_kind(operation), last is not None and inputs[0] is last.tensor
        if kind in GLOBAL or not weighted or place[id(tensor)] >= weighted[-1]:
            break
        if is_mask(operation):
            if behind_last:
                last.tensor, last.mask = tensor, operation
        elif kind in FOLLOW:
            if behind_last and not last.activated:
                last.tensor = tensor
                last.layers.append(operation)
        elif len(tensor.shape) == 4 and kind not in PASS_ON and place[id(tensor)] >= weighted[0]:
            last = FeatureMap(tensor, [operation])
            maps.append(last)
    return maps


def get_kind(operation):
    """The class of an operation; "Mixing" where it is an activation across channels."""
    mixes = getattr(getattr(operation, "activation", None), "__name__", "") in MIX
    return "Mixing" if mixes and type(operation).__name__ in FOLLOW else type(operation).__name__


def is_mask(operation):
    """Whether an operation is the layer of ours that prunes a map."""
    ours = operation.name == MASK and type(operation).__name__ == "DepthwiseConv2D"
    return ours and operation.kernel.shape[:2] == (1, 1) and operation.depth_multiplier == 1


def find_map(net, name=None):
    """The FeatureMap to prune: the last one of a net, or that of a layer.

    name: of a layer that makes the map or follows it.
    Raises UnfitNet where there is no such map, or a layer is used twice.
    """
    if twice := graph.find_layer_used_twice(net):
        raise UnfitNet(f"uses the layer {twice!r} more than once; such a net cannot be repaired")
    maps = find_feature_maps(net)
    if not maps:
        raise UnfitNet(
            "has no feature map to prune: none of a convolution that every path from input to "
            "output goes through, with weights behind it"
        )
    if name is None:
        return maps[-1]
    for found in maps:
        if name in [layer.name for layer in found.layers]:
            return found
    known = ", ".join(map(describe_map, maps))
    there = name in [graph.find_call(tensor)[0].name for tensor in graph.sort_tensors(net.output)]
    problem = "cannot be pruned at" if there else "has no layer named"
    raise UnfitNet(f"{problem} {name!r}; --layer can be one of: {known}")


def describe_map(found):
    """A FeatureMap's name and size."""
    _, height, width, channels = found.tensor.shape
    return f"{found.name} ({channels} channels of {height}×{width})"


def find_pruning_layer(found):
    """The layer whose weights at zero make a channel of a FeatureMap constant, or None.

    That is a batch normalisation, or else the convolution, where only activations of each channel
    alone come behind it.
    """
    if found.mask is not None:
        return found.mask
    for layer in reversed(found.layers):
        kind = get_kind(layer)
        if kind == "BatchNormalization":
            both = layer.gamma is not None and layer.beta is not None
            return layer if both and layer.axis in (-1, 3) else None
        if kind not in FOLLOW:
            mixes = getattr(getattr(layer, "activation", None), "__name__", "") in MIX
            return layer if kind == "Conv2D" and not mixes else None
    return None


def add_mask(net, found):
    """A copy of a net with a layer behind a FeatureMap that passes every channel on, as it is.

    It is a convolution of each channel with one weight: 1, and 0 where the channel is pruned.
    """
    if MASK in [layer.name for layer in net.layers]:
        raise UnfitNet(f"has a layer named {MASK!r}, which only a repaired net may have")
    mask = import_keras().layers.DepthwiseConv2D(
        1, use_bias=False, depthwise_initializer="ones", trainable=False, name=MASK
    )
    return graph.flatten(net, {id(found.tensor): mask})


# -------------------------------------------------------------------------------------- cutting


def split_net(net, name=None):
    """Cut a net behind the feature map to prune and the per-channel layers behind it: a Split.

    name: as for find_map.  Where no weights of the net can prune the map, the Split's net is a
    copy that has a layer more.  Raises UnfitNet as find_map does.
    """
    keras = import_keras()
    found = find_map(net, name)
    if find_pruning_layer(found) is None:
        net = add_mask(net, found)
        found = find_map(net, found.name)
    features, points = found.tensor, graph.find_waypoints(net)
    for tensor in points[1 + next(i for i, each in enumerate(points) if each is features) :]:
        operation, inputs = graph.find_call(tensor)
        if inputs[0] is not features or get_kind(operation) not in PER_CHANNEL:
            break
        features = tensor
    # Named, here and below, as no layer of a net is: Keras counts the names it gives from 0.
    mean = keras.layers.GlobalAveragePooling2D(name="mean-activation")(found.tensor)
    trunk = keras.Model(net.input, [features, mean], name="trunk-of-net")
    head = keras.Model(features, net.output, name="head-of-net")
    return Split(net, find_pruning_layer(found), trunk, head, found.name)


def find_last_weighted(head):
    """The last layer of a head with weights to train, Dense or a convolution, at any nesting."""
    return [layer for layer in graph.list_layers(head) if get_kind(layer) in WEIGHTED][-1]


def cut_before(layer, parts):
    """Cut the head of a Split before a layer: (features → the layer's input, that → scores).

    None where the first part is empty, a path leads around the layer's input, or a layer of the
    first part draws at random, so that what goes into the layer cannot be computed once.
    """
    keras = import_keras()
    if layer.input is parts.trunk.output[0]:
        return None
    drop = any(hasattr(each, "seed_generator") for each in graph.list_layers(parts.head))
    if drop or not graph.is_on_every_path(layer.input, parts.net):
        return None
    before = keras.Model(parts.trunk.output[0], layer.input, name="before-layer")
    return before, keras.Model(layer.input, parts.net.output, name="from-layer")


# -------------------------------------------------------------------------------------- pruning


def list_channel_weights(layer):
    """The weights of a Split's layer that prune its channels: [(variable, axis of channels), …]."""
    kind = type(layer).__name__
    if kind == "BatchNormalization":
        return [(layer.gamma, 0), (layer.beta, 0)]
    return [(each, 2 if kind == "DepthwiseConv2D" else -1) for each in layer.weights]


def prune_channels(layer, channels):
    """Set the weights of these channels of a Split's layer to zero."""
    for variable, axis in list_channel_weights(layer):
        values = np.array(variable)
        np.moveaxis(values, axis, -1)[..., channels] = 0
        variable.assign(values)


def find_pruned_channels(layer):
    """The channels of a Split's layer whose weights are all zero: int64 (k,)."""
    zero = [
        ~np.moveaxis(np.array(variable), axis, 0).reshape(variable.shape[axis], -1).any(axis=1)
        for variable, axis in list_channel_weights(layer)
    ]
    return np.flatnonzero(np.all(zero, axis=0))


@contextlib.contextmanager
def keep_pruned(layer, channels):
    """A block in which these channels of a Split's layer stay zero, whatever trains it."""
    before = [(variable, variable.constraint) for variable, _ in list_channel_weights(layer)]
    for variable, axis in list_channel_weights(layer):
        keep = np.ones(variable.shape[axis], np.float32)
        keep[channels] = 0
        keep = np.moveaxis(keep.reshape((1,) * (len(variable.shape) - 1) + (-1,)), -1, axis)
        variable.constraint = lambda values, keep=keep: values * keep
    yield
    for variable, constraint in before:
        variable.constraint = constraint


def make_trainable(parts):
    """Make all of the net of a Split trainable, but for the layer of ours that prunes a map."""
    parts.net.trainable = True
    if is_mask(parts.layer):
        parts.layer.trainable = False


def compute_masked_features(parts):
    """What the trunk gives where every channel is pruned, whatever the image: (1, …, C).

    All zero with ReLU; not with an activation such as sigmoid, which gives one half for zero.
    """
    kept = [(variable, np.array(variable)) for variable, _ in list_channel_weights(parts.layer)]
    for variable, values in kept:
        variable.assign(np.zeros_like(values))
    image = np.zeros((1, *parts.trunk.input_shape[1:]), np.float32)
    features, _ = parts.trunk(image, training=False)
    for variable, values in kept:
        variable.assign(values)
    return np.asarray(features)
