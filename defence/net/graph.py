"""The graph of a Keras net: its calls in order, what lies on every path, nested nets opened up.

Keras has no public way to walk a graph, so this is the one place that reads its private fields.
"""

import collections
import math

import numpy as np

from defence.base.startup import import_keras
from defence.net.arithmetic import convert_normalization, convert_operation

# Layers that only rearrange, select or combine scores: probabilities go in, probabilities come out.
KEEP_PROBABILITIES = {
    *("Reshape", "Flatten", "Permute", "Cropping2D", "UpSampling2D", "Concatenate"),
    *("Dropout", "SpatialDropout2D", "GaussianNoise", "GaussianDropout", "AlphaDropout"),
    *("Add", "Average", "Maximum", "Minimum", "Multiply", "Identity"),
    *("MaxPooling2D", "AveragePooling2D", "GlobalMaxPooling2D", "GlobalAveragePooling2D"),
}

# Layers that change images at random while a net is trained, and do nothing when it judges. They
# are taken out: Keras fails to write some of them as .h5.
AUGMENTATION = {
    *("RandomFlip", "RandomRotation", "RandomZoom", "RandomTranslation"),
    *("RandomContrast", "RandomBrightness"),
}


def find_call(tensor):
    """The operation that a Keras tensor comes from, and the tensors that it was called on."""
    operation, node, _ = tensor._keras_history
    return operation, operation._inbound_nodes[node].input_tensors


def sort_tensors(*outputs):
    """The tensors that these outputs are made of and they themselves, each behind what it needs."""
    order, seen, waiting = [], set(), [(each, False) for each in reversed(outputs)]
    while waiting:
        tensor, complete = waiting.pop()
        if complete:
            order.append(tensor)
        elif id(tensor) not in seen:
            seen.add(id(tensor))
            waiting.append((tensor, True))
            waiting += [(each, False) for each in find_call(tensor)[1]]
    return order


def find_waypoints(net):
    """The tensors that every path from the input of `net` to its output goes through, in order.

    Such a tensor is one that no call spans: none of those behind it takes anything before it.
    """
    order, found, furthest = sort_tensors(net.output), [], 0
    place = {id(tensor): number for number, tensor in enumerate(order)}
    last_use = list(range(len(order)))
    for number, tensor in enumerate(order):
        for each in find_call(tensor)[1]:
            last_use[place[id(each)]] = number
    for number, tensor in enumerate(order):
        if furthest <= number:
            found.append(tensor)
        furthest = max(furthest, last_use[number])
    return found


def is_on_every_path(tensor, net):
    """Whether every path from the input of `net` to its output goes through `tensor`."""
    return any(tensor is each for each in find_waypoints(net))


def find_layer_used_twice(net):
    """The name of a layer that `net` calls more than once, or None."""
    calls = {tensor._keras_history[:2] for tensor in sort_tensors(net.output)}
    counts = collections.Counter(operation.name for operation, _ in calls)
    return next((name for name, count in sorted(counts.items()) if count > 1), None)


def adds_maps(model):
    """Whether a layer of a model adds feature maps, at any nesting."""
    return any(
        type(layer).__name__ == "Add"
        and any(len(node.output_tensors[0].shape) == 4 for node in layer._inbound_nodes)
        for layer in list_layers(model)
    )


def list_layers(model):
    """The layers of a model, those of nested models in their place, at any depth."""
    for layer in model.layers:
        yield from list_layers(layer) if hasattr(layer, "layers") else [layer]


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
        operation, inputs = find_call(tensor)
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


def list_output_sizes(model):
    """Yield the values that each output of each layer, at any nesting, has for one image.

    A dilated convolution counts as large as its input with the margin that TensorFlow adds.
    """
    for layer in model.layers:
        for node in layer._inbound_nodes:
            for tensor in node.output_tensors:
                yield math.prod(size or 1 for size in tensor.shape[1:])
            if np.max(getattr(layer, "dilation_rate", 1)) > 1:
                for tensor in node.input_tensors:
                    _, *sizes, channels = tensor.shape
                    reach = np.multiply(layer.dilation_rate, np.subtract(layer.kernel_size, 1))
                    yield channels * math.prod(np.add(sizes, reach).tolist())
        if hasattr(layer, "layers"):
            yield from list_output_sizes(layer)


# -------------------------------------------------------------------------------------- copying


def is_flat(net):
    """Whether `flat` has nothing to change in a Functional model."""
    return all(
        isinstance(each, import_keras().Layer)
        and not hasattr(each, "layers")
        and type(each).__name__ not in AUGMENTATION | {"Normalization"}
        and not any(node.arguments.kwargs.get("training") for node in each._inbound_nodes)
        for each in net.operations
    )


def flatten(net, behind=None):
    """A copy of a net as a Functional model of layers alone, whose answers are the same.

    Nested models are opened up: a layer of one keeps its name unless another has it. A layer
    of AUGMENTATION gives way to one that does nothing, Normalization to Rescaling. No call says
    that it is for training, as those of Resizing do: Keras hands that on to what is behind. Plain
    operations become layers (arithmetic.py): Keras cannot read an .h5 file that has some. Each
    layer of the copy is called as often as the net calls its own.
    behind: {id of a tensor of the net: a layer}, which is put in behind it; or None.
    """
    keras = import_keras()
    name = find_call(net.inputs[0])[0].name
    image = keras.Input(net.input_shape[1:], name=name)
    (scores,) = _Copier(name, behind or {}).run(net, [image])
    return keras.Model(image, scores, name=net.name)


class _Copier:
    """Calls copies of layers. image: the input's name.  behind: as for `flat`."""

    def __init__(self, image, behind):
        self.names, self.behind, self.copies = {image}, behind, {}

    def run(self, model, inputs):
        """The outputs of copies of a model's layers on these tensors, [tensor, …]."""
        if isinstance(model, import_keras().Sequential):
            for layer in model.layers:
                inputs = self.call(layer, model, inputs, {})
            return inputs
        known, made = dict(zip(map(id, model.inputs), inputs)), {}
        for tensor in sort_tensors(*model.outputs):
            operation, node, place = tensor._keras_history
            if id(tensor) not in known:
                if (operation, node) not in made:
                    given, options = operation._inbound_nodes[node].arguments.fill_in(known)
                    made[operation, node] = self.call(operation, model, given, options)
                known[id(tensor)] = made[operation, node][place]
            if id(tensor) in self.behind:
                known[id(tensor)] = self.behind[id(tensor)](known[id(tensor)])
        return [known[id(tensor)] for tensor in model.outputs]

    def call(self, operation, model, given, options):
        """The outputs of one call, [tensor, …], of an operation of `model`."""
        keras = import_keras()
        if hasattr(operation, "layers"):
            return self.run(operation, keras.tree.flatten(given))
        if not isinstance(operation, keras.Layer):
            layer, tensors = convert_operation(operation, given, self.name(operation, model))
            return [layer(tensors)]
        first = id(operation) not in self.copies
        if first:
            self.copies[id(operation)] = _like(operation, self.name(operation, model))
        alike = type(self.copies[id(operation)]) is type(operation)
        options = {key: False if key == "training" else each for key, each in options.items()}
        outputs = self.copies[id(operation)](*given, **(options if alike else {}))
        if first and alike:
            stored = {}
            operation.save_own_variables(stored)
            stored = {key: np.array(value) for key, value in stored.items()}
            self.copies[id(operation)].load_own_variables(stored)
        return keras.tree.flatten(outputs)

    def name(self, operation, model):
        """A name that no layer has yet, the operation's own if possible."""
        name, count = operation.name, 1
        while name in self.names:
            name = f"{model.name}-{operation.name}" + f"-{count}" * (count > 1)
            count += 1
        self.names.add(name)
        return name


def _like(layer, name):
    """A layer that does what another does, with weights as they come."""
    if type(layer).__name__ in AUGMENTATION:
        return import_keras().layers.Identity(name=name)
    if type(layer).__name__ == "Normalization" and (same := convert_normalization(layer, name)):
        return same
    return type(layer).from_config(layer.get_config() | {"name": name})
