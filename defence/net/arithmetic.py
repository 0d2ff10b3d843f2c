"""Arithmetic between layers, as Keras 3 writes it into a config, as layers that do the same."""

import numpy as np

from defence.base.startup import import_keras

# The classes of plain operations that a net may have, by their modules.
OPERATIONS = {
    "keras.src.ops.numpy": {"Add", "Subtract", "Multiply", "Divide", "TrueDivide"},
    "keras.src.ops.nn": {"Relu", "Relu6", "Sigmoid", "HardSigmoid", "Silu", "HardSilu"},
}


def convert_operation(operation, given, name):
    """The layer that does what a plain operation does, and what to call it on.

    given: its arguments, tensors and numbers.  name: for the layer.
    Division by a number becomes multiplication, so that the last bit may differ.
    Raises ValueError where there is no such layer.
    """
    layers, kind = import_keras().layers, type(operation).__name__
    if kind in OPERATIONS["keras.src.ops.nn"]:
        return _make_activation(kind, name), given[0]
    first, second = given
    numbers = [isinstance(each, int | float) for each in given]
    if kind in ("Add", "Subtract", "Multiply") and not any(numbers):
        return getattr(layers, kind)(name=name), [first, second]
    if numbers == [False, True]:
        scale, offset = {
            "Add": (1, second),
            "Subtract": (1, -second),
            "Multiply": (second, 0),
        }.get(kind) or (1 / second, 0)
        return layers.Rescaling(scale, offset, name=name), first
    if numbers == [True, False] and kind in ("Add", "Subtract", "Multiply"):
        scale, offset = {"Add": (1, first), "Subtract": (-1, first), "Multiply": (first, 0)}[kind]
        return layers.Rescaling(scale, offset, name=name), second
    raise ValueError(f"{name!r} divides by what is not a number")


def convert_normalization(layer, name):
    """A Rescaling that does what a built Normalization of each channel does; of another, None.

    Keras keeps what it subtracts outside of the weights, where an export to ONNX does not find it.
    """
    if layer.axis not in ((-1,), (3,)) or layer.invert:
        return None
    mean, variance = (np.ravel(each).astype(float) for each in (layer.mean, layer.variance))
    keras = import_keras()
    scale = 1 / np.maximum(np.sqrt(variance), keras.config.epsilon())
    return keras.layers.Rescaling(scale.tolist(), (-mean * scale).tolist(), name=name)


def _make_activation(kind, name):
    layers = import_keras().layers
    if kind in ("Relu", "Relu6"):
        return layers.ReLU(6 if kind == "Relu6" else None, name=name)
    named = {"HardSigmoid": "hard_sigmoid", "HardSilu": "hard_silu"}.get(kind, kind.lower())
    return layers.Activation(named, name=name)
