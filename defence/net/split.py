"""Find the feature map to prune, cut a net there into trunk and head, prune its channels.

Everything here works on Keras models in memory; no function reads or writes a file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from defence.base.startup import import_keras
from defence.net import graph

# Layers that act on each channel alone and have neither weights nor randomness: their output for a
# pruned channel does not depend on the image. So they belong to the trunk, whose output is cached.
PER_CHANNEL = {
    *("MaxPooling2D", "AveragePooling2D", "GlobalMaxPooling2D", "GlobalAveragePooling2D"),
    *("ReLU", "LeakyReLU", "ELU", "Activation"),
}
# A feature map is measured and pruned behind the layers of FOLLOW that directly follow the layer
# that makes it, up to the first activation.
ACTIVATIONS = {
    *("Activation", "ReLU", "LeakyReLU", "PReLU", "ELU"),
    *("Relu", "Relu6", "Sigmoid", "HardSigmoid", "Silu", "HardSilu"),  # as plain operations
}
FOLLOW = {"BatchNormalization", *ACTIVATIONS}
MIX = {"softmax", "log_softmax"}  # activations across channels
# Layers that only pass on a feature map, resized, moved, in part or with noise.
PASS_ON = {
    *("MaxPooling2D", "AveragePooling2D", "ZeroPadding2D", "Cropping2D", "UpSampling2D"),
    *("Dropout", "SpatialDropout2D", "GaussianNoise", "GaussianDropout", "AlphaDropout"),
    "Identity",
}
REORDER = {"Permute", "Reshape"}
GLOBAL = {"GlobalMaxPooling2D", "GlobalAveragePooling2D"}
WEIGHTED = {"Dense", "Conv2D", "DepthwiseConv2D", "SeparableConv2D", "Conv2DTranspose"}
MASK = "pruned-channels"  # the name of the layer that `add_mask` inserts


class UnfitNet(ValueError):
    """The method cannot repair the net. The message continues after the net's name."""


@dataclasses.dataclass
class Split:
    """A net cut in two at the feature map to prune; both parts share their layers with the net.

    net: the whole, scaled images → scores (n, N).
    layer: the layer whose weights prune the map's C channels; see `list_channel_weights`.
    trunk: scaled images (n, height, width, channels) → [features (n, …, C), each channel's mean
        activation over the image (n, C)].
    head: features (n, …, C) → scores (n, N).
    name: the name of the layer that makes the map.
    """

    net: Any
    layer: Any
    trunk: Any
    head: Any
    name: str = ""


# -------------------------------------------------------------------------------- feature maps


@dataclasses.dataclass
class FeatureMap:
    """A feature map that every path goes through: tensor (n, height, width, C), and its layers.

    layers: the layer that makes it, then the layers of FOLLOW behind it; the last one names it.
    mask: the layer that `add_mask` inserted behind it, or None.
    """

    tensor: Any
    layers: list[Any]
    mask: Any = None

    @property
    def name(self) -> str:
        return self.layers[-1].name

    @property
    def activated(self) -> bool:
        own = getattr(self.layers[0], "activation", None)
        linear = own in (None, import_keras().activations.linear)
        return not linear or get_kind(self.layers[-1]) in ACTIVATIONS


def find_feature_maps(net: Any) -> list[FeatureMap]:
    """Return the feature maps of a net that can be pruned, in order.

    Every path from input to output goes through such a map. Weights come before it and behind it,
    so it is neither the image nor the scores. No global pooling comes before it.
    """
    order = graph.sort_tensors(net.output)
    place = {id(tensor): number for number, tensor in enumerate(order)}
    weighted = [
        number
        for number, tensor in enumerate(order)
        if get_kind(graph.find_call(tensor)[0]) in WEIGHTED
    ]
    maps: list[FeatureMap] = []
    for tensor in graph.find_waypoints(net):
        operation, inputs = graph.find_call(tensor)
        kind = get_kind(operation)
        last = maps[-1] if maps and inputs[0] is maps[-1].tensor else None  # directly before it
        if kind in GLOBAL or not weighted or place[id(tensor)] >= weighted[-1]:
            break
        if is_mask(operation):
            if last:
                last.tensor, last.mask = tensor, operation
        elif kind in FOLLOW:
            if last and not last.activated:
                last.tensor = tensor
                last.layers.append(operation)
        elif (
            len(tensor.shape) == 4
            and kind not in PASS_ON
            and not (kind in REORDER and has_channels_last(inputs[0]))
            and place[id(tensor)] >= weighted[0]
            and has_channels_last(tensor)
        ):
            maps.append(FeatureMap(tensor, [operation]))
    return maps


def has_channels_last(tensor: Any) -> bool:
    """Return whether the last axis of a map holds the channels that layers with weights made.

    The axis is followed back to these layers, through whatever moves it.
    """
    waiting, visited = [(tensor, frozenset([len(tensor.shape) - 1]))], set()
    while waiting:
        current, axes = waiting.pop()
        if (id(current), axes) in visited:
            continue
        visited.add((id(current), axes))
        operation, inputs = graph.find_call(current)
        kind, last = get_kind(operation), len(current.shape) - 1
        channels = 1 if works_channels_first(operation) else last
        if (kind in WEIGHTED or channels < last) and axes != {channels}:
            return False
        if kind in WEIGHTED:
            continue
        for source in inputs:
            before = trace_axes(operation, source.shape, current.shape, axes)
            if not before:
                return False
            waiting.append((source, before))
    return True


def trace_axes(
    operation: Any, before: tuple[int, ...], after: tuple[int, ...], axes: frozenset[int]
) -> frozenset[int]:
    """Return the axes of an operation's input that become these axes of its output, or none.

    before, after: the shapes of input and output.  axes: from 1, since 0 is the batch.
    """
    kind, first = get_kind(operation), min(axes)
    if kind == "Permute":
        return frozenset(operation.dims[axis - 1] for axis in axes)
    if kind == "Reshape":  # keeps the order of values, so what comes before the last axes, as well
        size = math.prod(after[1:first])
        starts = [place for place in range(1, len(before)) if math.prod(before[1:place]) == size]
        followed = starts and axes == {*range(first, len(after))}
        return frozenset(range(starts[-1], len(before))) if followed else frozenset()
    if len(before) != len(after):  # such as a pooling of all places
        return frozenset([len(before) - 1]) if axes == {len(after) - 1} else frozenset()
    return axes


def works_channels_first(operation: Any) -> bool:
    """Return whether an operation takes the first axis of an image for its channels."""
    return getattr(operation, "data_format", None) == "channels_first"


def get_kind(operation: Any) -> str:
    """Return the name of an operation's class, or "Mixing" for an activation across channels."""
    mixes = getattr(getattr(operation, "activation", None), "__name__", "") in MIX
    return "Mixing" if mixes and type(operation).__name__ in FOLLOW else type(operation).__name__


def is_mask(operation: Any) -> bool:
    """Return whether an operation is a layer that `add_mask` inserted."""
    named = operation.name == MASK and type(operation).__name__ == "DepthwiseConv2D"
    return named and operation.kernel.shape[:2] == (1, 1) and operation.depth_multiplier == 1


def find_map(net: Any, name: str | None = None) -> FeatureMap:
    """Return the feature map to prune: the last one of a net, or the map of a layer.

    name: of a layer that makes the map or follows it.
    Raise UnfitNet where there is no such map, or a layer is used twice.
    """
    if repeated := graph.find_layer_used_twice(net):
        raise UnfitNet(f"uses the layer {repeated!r} more than once; such a net cannot be repaired")
    maps = find_feature_maps(net)
    if not maps:
        raise UnfitNet(
            "has no feature map to prune: every path from input to output would have to go through "
            "the output of a convolution whose channels come last, with weights behind it"
        )
    if name is None:
        return maps[-1]
    for feature_map in maps:
        if name in [layer.name for layer in feature_map.layers]:
            return feature_map
    choices = ", ".join(map(describe_map, maps))
    names = [graph.find_call(tensor)[0].name for tensor in graph.sort_tensors(net.output)]
    problem = "cannot be pruned at" if name in names else "has no layer named"
    raise UnfitNet(f"{problem} {name!r}; --layer can be one of: {choices}")


def describe_map(feature_map: FeatureMap) -> str:
    """Describe a feature map by its name and size."""
    _, height, width, channels = feature_map.tensor.shape
    return f"{feature_map.name} ({channels} channels of {height}×{width})"


def find_pruning_layer(feature_map: FeatureMap) -> Any:
    """Return the layer whose zeroed weights make a channel of a feature map constant, or None.

    That is a batch normalisation. Without one it is the convolution, if only activations of each
    channel alone follow.
    """
    if feature_map.mask is not None:
        return feature_map.mask
    for layer in reversed(feature_map.layers):
        kind = get_kind(layer)
        if kind == "BatchNormalization":
            complete = layer.gamma is not None and layer.beta is not None
            return layer if complete and layer.axis in (-1, 3) else None
        if kind not in FOLLOW:
            mixes = getattr(getattr(layer, "activation", None), "__name__", "") in MIX
            return layer if kind == "Conv2D" and not mixes else None
    return None


def add_mask(net: Any, feature_map: FeatureMap) -> Any:
    """Return a copy of a net with a mask behind a feature map, which passes on every channel.

    The mask is a depthwise convolution with one weight a channel: 1, or 0 once it is pruned.
    """
    if MASK in [layer.name for layer in net.layers]:
        raise UnfitNet(f"has a layer named {MASK!r}, which only a repaired net may have")
    mask = import_keras().layers.DepthwiseConv2D(
        1, use_bias=False, depthwise_initializer="ones", trainable=False, name=MASK
    )
    return graph.flatten(net, {id(feature_map.tensor): mask})


# -------------------------------------------------------------------------------------- cutting


def split_net(net: Any, name: str | None = None) -> Split:
    """Cut a net behind the feature map to prune and the per-channel layers that follow it.

    name: as for find_map.  Where no weights of the net can prune the map, the Split's net is a
    copy with a mask.  Raise UnfitNet as find_map does.
    """
    keras = import_keras()
    feature_map = find_map(net, name)
    if find_pruning_layer(feature_map) is None:
        net = add_mask(net, feature_map)
        feature_map = find_map(net, feature_map.name)
    features, waypoints = feature_map.tensor, graph.find_waypoints(net)
    place = next(number for number, tensor in enumerate(waypoints) if tensor is features)
    for tensor in waypoints[place + 1 :]:
        operation, inputs = graph.find_call(tensor)
        per_channel = get_kind(operation) in PER_CHANNEL and not works_channels_first(operation)
        if inputs[0] is not features or not per_channel:
            break
        features = tensor
    # Names that no net uses, here and below: Keras counts its own names from 0, so they may clash.
    mean = keras.layers.GlobalAveragePooling2D(name="mean-activation")(feature_map.tensor)
    trunk = keras.Model(net.input, [features, mean], name="trunk-of-net")
    head = keras.Model(features, net.output, name="head-of-net")
    return Split(net, find_pruning_layer(feature_map), trunk, head, feature_map.name)


def find_last_weighted(head: Any) -> Any:
    """Return the last layer of a head, at any depth, that is Dense or a convolution."""
    return [layer for layer in graph.list_layers(head) if get_kind(layer) in WEIGHTED][-1]


def cut_before(layer: Any, parts: Split) -> tuple[Any, Any] | None:
    """Cut the head of a Split before a layer: (features → the layer's input, input → scores).

    Return None where the first part is empty or the layer's input cannot be computed once: a path
    bypasses it, or a layer of the head draws at random.
    """
    keras = import_keras()
    if layer.input is parts.trunk.output[0]:
        return None
    random = any(hasattr(part, "seed_generator") for part in graph.list_layers(parts.head))
    if random or not graph.is_on_every_path(layer.input, parts.net):
        return None
    before = keras.Model(parts.trunk.output[0], layer.input, name="before-layer")
    return before, keras.Model(layer.input, parts.net.output, name="from-layer")


# -------------------------------------------------------------------------------------- pruning


def list_channel_weights(layer: Any) -> list[tuple[Any, int]]:
    """Return the weights of a Split's layer that prune its channels, each with its channel axis."""
    kind = type(layer).__name__
    if kind == "BatchNormalization":
        return [(layer.gamma, 0), (layer.beta, 0)]
    return [(variable, 2 if kind == "DepthwiseConv2D" else -1) for variable in layer.weights]


def prune_channels(layer: Any, channels: Sequence[int]) -> None:
    """Set the weights of these channels of a Split's layer to zero."""
    for variable, axis in list_channel_weights(layer):
        values = np.array(variable)
        np.moveaxis(values, axis, -1)[..., channels] = 0
        variable.assign(values)


def find_pruned_channels(layer: Any) -> np.ndarray:
    """Return the channels of a Split's layer whose weights are all zero: int64 (k,)."""
    zero = [
        ~np.moveaxis(np.array(variable), axis, 0).reshape(variable.shape[axis], -1).any(axis=1)
        for variable, axis in list_channel_weights(layer)
    ]
    return np.flatnonzero(np.all(zero, axis=0))


@contextlib.contextmanager
def keep_pruned(layer: Any, channels: Sequence[int]) -> Iterator[None]:
    """Keep these channels of a Split's layer at zero while the block trains the net."""
    before = [(variable, variable.constraint) for variable, _ in list_channel_weights(layer)]
    for variable, axis in list_channel_weights(layer):
        keep = np.ones(variable.shape[axis], np.float32)
        keep[channels] = 0
        keep = np.moveaxis(keep.reshape((1,) * (len(variable.shape) - 1) + (-1,)), -1, axis)
        variable.constraint = lambda values, keep=keep: values * keep
    try:
        yield
    finally:
        for variable, constraint in before:
            variable.constraint = constraint


def make_trainable(parts: Split) -> None:
    """Make the whole net of a Split trainable, except for a mask."""
    parts.net.trainable = True
    if is_mask(parts.layer):
        parts.layer.trainable = False


def compute_masked_features(parts: Split) -> np.ndarray:
    """Return the trunk's output with every channel pruned, the same for any image: (1, …, C).

    ReLU makes it zero; an activation such as sigmoid does not, because sigmoid(0) is one half.
    """
    saved = [(variable, np.array(variable)) for variable, _ in list_channel_weights(parts.layer)]
    for variable, values in saved:
        variable.assign(np.zeros_like(values))
    image = np.zeros((1, *parts.trunk.input_shape[1:]), np.float32)
    features, _ = parts.trunk(image, training=False)
    for variable, values in saved:
        variable.assign(values)
    return np.asarray(features)
