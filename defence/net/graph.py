"""The graph of a Keras net: its calls in order, the tensors on every path, a copy without nesting.

Keras has no public way to walk a graph, so only this file reads its private fields.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from defence.base.startup import import_keras
from defence.net.arithmetic import convert_normalization, convert_operation

# Layers that rearrange, select or combine scores: given probabilities, they return probabilities.
KEEP_PROBABILITIES = {
    *("Reshape", "Flatten", "Permute", "Cropping2D", "UpSampling2D", "Concatenate"),
    *("Dropout", "SpatialDropout2D", "GaussianNoise", "GaussianDropout", "AlphaDropout"),
    *("Add", "Average", "Maximum", "Minimum", "Multiply", "Identity"),
    *("MaxPooling2D", "AveragePooling2D", "GlobalMaxPooling2D", "GlobalAveragePooling2D"),
}

# Layers that change images at random in training and do nothing in inference. `flatten` removes
# them, because Keras fails to write some of them as .h5.
AUGMENTATION = {
    *("RandomFlip", "RandomRotation", "RandomZoom", "RandomTranslation"),
    *("RandomContrast", "RandomBrightness"),
}


def find_call(tensor: Any) -> tuple[Any, list[Any]]:
    """Return the operation that made a Keras tensor, and the tensors that it was called on."""
    operation, node, _ = tensor._keras_history
    return operation, operation._inbound_nodes[node].input_tensors


def sort_tensors(*outputs: Any) -> list[Any]:
    """Return these outputs and all tensors that they depend on, in the order of computation."""
    order: list[Any] = []
    visited: set[int] = set()
    waiting = [(tensor, False) for tensor in reversed(outputs)]
    while waiting:
        tensor, complete = waiting.pop()
        if complete:
            order.append(tensor)
        elif id(tensor) not in visited:
            visited.add(id(tensor))
            waiting.append((tensor, True))
            waiting += [(source, False) for source in find_call(tensor)[1]]
    return order


def find_waypoints(net: Any) -> list[Any]:
    """Return the tensors on every path from the input of `net` to its output, in order.

    No call bypasses such a tensor: the calls behind it take no tensor from before it.
    """
    order, waypoints, furthest = sort_tensors(net.output), [], 0
    place = {id(tensor): number for number, tensor in enumerate(order)}
    last_use = list(range(len(order)))
    for number, tensor in enumerate(order):
        for source in find_call(tensor)[1]:
            last_use[place[id(source)]] = number
    for number, tensor in enumerate(order):
        if furthest <= number:
            waypoints.append(tensor)
        furthest = max(furthest, last_use[number])
    return waypoints


def is_on_every_path(tensor: Any, net: Any) -> bool:
    """Return whether every path from the input of `net` to its output goes through `tensor`."""
    return any(tensor is waypoint for waypoint in find_waypoints(net))


def find_layer_used_twice(net: Any) -> str | None:
    """Return the name of a layer that `net` calls more than once, or None."""
    calls = {tensor._keras_history[:2] for tensor in sort_tensors(net.output)}
    counts = collections.Counter(operation.name for operation, _ in calls)
    return next((name for name, count in sorted(counts.items()) if count > 1), None)


def adds_maps(model: Any) -> bool:
    """Return whether a layer of a model, at any depth, adds feature maps."""
    return any(
        type(layer).__name__ == "Add"
        and any(len(node.output_tensors[0].shape) == 4 for node in layer._inbound_nodes)
        for layer in list_layers(model)
    )


def list_layers(model: Any) -> Iterator[Any]:
    """Yield the layers of a model, with the layers of nested models in place of these models."""
    for layer in model.layers:
        yield from list_layers(layer) if hasattr(layer, "layers") else [layer]


def gives_logits(model: Any) -> bool:
    """Return whether a classifier's scores are logits, which softmax turns into probabilities.

    They are probabilities where each path back from the output meets a softmax or a sigmoid after
    nothing but layers of KEEP_PROBABILITIES. The path enters nested models and leaves them.
    """
    activations = import_keras().activations
    final = (activations.softmax, activations.sigmoid, activations.hard_sigmoid)
    waiting: list[tuple[Any, Sequence[Any]]] = [(model.output, ())]
    visited = set()
    while waiting:
        tensor, outside = waiting.pop()  # outside: where to go on before the nested model
        if (id(tensor), id(outside)) in visited:
            continue
        visited.add((id(tensor), id(outside)))
        operation, inputs = find_call(tensor)
        kind, activation = type(operation).__name__, getattr(operation, "activation", None)
        kinds = kind, type(activation).__name__  # a layer can be another layer's activation
        sources = [(source, outside) for source in inputs]
        if not inputs and outside:
            waiting += outside
        elif hasattr(operation, "layers"):
            place = tensor._keras_history.tensor_index
            waiting.append((operation.outputs[place], sources))
        elif kind in KEEP_PROBABILITIES or (
            kind == "Activation" and activation is activations.linear
        ):
            waiting += sources
        elif "Softmax" not in kinds and activation not in final:
            return True
    return False


def list_output_sizes(model: Any) -> Iterator[int]:
    """Yield the number of values in each output of each layer, at any depth, for one image.

    Also yield the size of what a layer computes on the way to its output, where that can be larger.
    """
    for layer in model.layers:
        for node in layer._inbound_nodes:
            for tensor in node.output_tensors:
                yield math.prod(size or 1 for size in tensor.shape[1:])
            yield from _list_inner_sizes(layer, node)
        if hasattr(layer, "layers"):
            yield from list_output_sizes(layer)


def _list_inner_sizes(layer: Any, node: Any) -> Iterator[int]:
    """Yield the sizes of the maps between the steps of one call of a layer, for one image."""
    kind = type(layer).__name__
    if np.max(getattr(layer, "dilation_rate", 1)) > 1:  # TensorFlow pads the input
        reach = np.multiply(layer.dilation_rate, np.subtract(layer.kernel_size, 1))
        channels, *sizes = _put_channels_first(layer, node.input_tensors[0])
        yield channels * math.prod(np.add(sizes, reach).tolist())
    if kind == "SeparableConv2D":  # the map between its two convolutions
        channels, *_ = _put_channels_first(layer, node.input_tensors[0])
        _, *sizes = _put_channels_first(layer, node.output_tensors[0])
        yield channels * layer.depth_multiplier * math.prod(sizes)
    if kind == "Resizing":  # some interpolations resize one side, then the other
        channels, height, width = _put_channels_first(layer, node.input_tensors[0])
        yield channels * max(layer.height * width, height * layer.width)


def _put_channels_first(layer: Any, tensor: Any) -> list[int]:
    """Return the shape of a layer's map without the batch: [channels, height, width].

    A side of any size, as a nested model may have, counts as 1.
    """
    sizes = [size or 1 for size in tensor.shape[1:]]
    return sizes if layer.data_format == "channels_first" else [sizes[-1], *sizes[:-1]]


def find_mixing_layer(model: Any) -> Any:
    """Return a layer of a model, at any depth, that computes across images, or None.

    It would answer an image by the other images of a batch, or give several rows for one image.
    """
    for layer in list_layers(model):
        axis = getattr(layer, "axis", None)
        axes = [] if axis is None else np.ravel(axis).tolist()
        ranks = [len(t.shape) for node in layer._inbound_nodes for t in node.input_tensors]
        if any(axis % rank == 0 for axis in axes for rank in ranks):
            return layer
    return None


# -------------------------------------------------------------------------------------- copying


def is_flat(net: Any) -> bool:
    """Return whether `flatten` has nothing to change in a Functional model."""
    return all(
        isinstance(operation, import_keras().Layer)
        and not hasattr(operation, "layers")
        and type(operation).__name__ not in AUGMENTATION | {"Normalization"}
        and not any(node.arguments.kwargs.get("training") for node in operation._inbound_nodes)
        for operation in net.operations
    )


def flatten(net: Any, additions: dict[int, Any] | None = None) -> Any:
    """Return a copy of a net, with the same answers, as a Functional model of layers alone.

    The layers of nested models are copied out, and keep their names unless a name is in use.
    Identity replaces the layers of AUGMENTATION, Rescaling replaces Normalization. No call sets
    training=True, as calls of Resizing do: Keras would pass it on to the layers behind. Layers
    replace plain operations (arithmetic.py), which Keras cannot read from an .h5 file. The copy
    calls each layer as often as the net does.
    additions: {id of a tensor of the net: the layer to insert behind it}.
    """
    keras = import_keras()
    name = find_call(net.inputs[0])[0].name
    image = keras.Input(net.input_shape[1:], name=name)
    (scores,) = _Copier(name, additions or {}).run(net, [image])
    return keras.Model(image, scores, name=net.name)


class _Copier:
    """Copies layers and calls the copies. additions: as for `flatten`."""

    def __init__(self, input_name: str, additions: dict[int, Any]) -> None:
        self.names, self.additions = {input_name}, additions
        self.copies: dict[int, Any] = {}

    def run(self, model: Any, inputs: list[Any]) -> list[Any]:
        """Return the outputs of copies of a model's layers on these tensors."""
        if isinstance(model, import_keras().Sequential):
            for layer in model.layers:
                inputs = self.call(layer, model, inputs, {})
            return inputs
        copies, calls = dict(zip(map(id, model.inputs), inputs)), {}
        for tensor in sort_tensors(*model.outputs):
            operation, node, place = tensor._keras_history
            if id(tensor) not in copies:
                if (operation, node) not in calls:
                    arguments, options = operation._inbound_nodes[node].arguments.fill_in(copies)
                    calls[operation, node] = self.call(operation, model, arguments, options)
                copies[id(tensor)] = calls[operation, node][place]
            if id(tensor) in self.additions:
                copies[id(tensor)] = self.additions[id(tensor)](copies[id(tensor)])
        return [copies[id(tensor)] for tensor in model.outputs]

    def call(
        self, operation: Any, model: Any, arguments: Sequence[Any], options: dict[str, Any]
    ) -> list[Any]:
        """Return the outputs of one call of the copy of an operation of `model`."""
        keras = import_keras()
        if hasattr(operation, "layers"):
            return self.run(operation, keras.tree.flatten(arguments))
        if not isinstance(operation, keras.Layer):
            name = self.choose_name(operation, model)
            layer, tensors = convert_operation(operation, arguments, name)
            return [layer(tensors)]
        first = id(operation) not in self.copies
        if first:
            self.copies[id(operation)] = _copy_layer(operation, self.choose_name(operation, model))
        layer = self.copies[id(operation)]
        same_type = type(layer) is type(operation)
        options = {key: False if key == "training" else value for key, value in options.items()}
        outputs = layer(*arguments, **(options if same_type else {}))
        if first and same_type:
            variables: dict[str, Any] = {}
            operation.save_own_variables(variables)
            layer.load_own_variables({key: np.array(value) for key, value in variables.items()})
        return keras.tree.flatten(outputs)

    def choose_name(self, operation: Any, model: Any) -> str:
        """Return a name that no layer of the copy has, the operation's own if possible."""
        name, count = operation.name, 1
        while name in self.names:
            name = f"{model.name}-{operation.name}" + f"-{count}" * (count > 1)
            count += 1
        self.names.add(name)
        return name


def _copy_layer(layer: Any, name: str) -> Any:
    """Return a layer that does the same in inference. The caller copies the weights."""
    kind = type(layer).__name__
    if kind in AUGMENTATION:
        return import_keras().layers.Identity(name=name)
    if kind == "Normalization" and (rescaling := convert_normalization(layer, name)):
        return rescaling
    return type(layer).from_config(layer.get_config() | {"name": name})
