"""Replace the plain arithmetic that Keras 3 writes between layers of a config by layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from defence.base.startup import import_keras

# The plain operations that a net may have: {module: classes}.
OPERATIONS = {
    "keras.src.ops.numpy": {"Add", "Subtract", "Multiply", "Divide", "TrueDivide"},
    "keras.src.ops.nn": {"Relu", "Relu6", "Sigmoid", "HardSigmoid", "Silu", "HardSilu"},
}


def convert_operation(operation: Any, arguments: Sequence[Any], name: str) -> tuple[Any, Any]:
    """Return the layer that does the same as a plain operation, and the tensors to call it on.

    arguments: the operation's, tensors and numbers.  name: for the layer.
    Division by a number becomes multiplication, so the last bit may differ.
    Raise ValueError where there is no such layer.
    """
    layers, kind = import_keras().layers, type(operation).__name__
    if kind in OPERATIONS["keras.src.ops.nn"]:
        return _make_activation(kind, name), arguments[0]
    first, second = arguments
    numbers = [isinstance(argument, int | float) for argument in arguments]
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
    raise ValueError(f"{name!r} divides by a tensor; only division by a number is supported")


def convert_normalization(layer: Any, name: str) -> Any:
    """Return a Rescaling that does the same as a built Normalization; None unless per channel.

    Keras keeps a Normalization's mean outside the weights, where an export to ONNX misses it.
    """
    if layer.axis not in ((-1,), (3,)) or layer.invert:
        return None
    mean, variance = (np.ravel(value).astype(float) for value in (layer.mean, layer.variance))
    keras = import_keras()
    scale = 1 / np.maximum(np.sqrt(variance), keras.config.epsilon())
    return keras.layers.Rescaling(scale.tolist(), (-mean * scale).tolist(), name=name)


def _make_activation(kind: str, name: str) -> Any:
    layers = import_keras().layers
    if kind in ("Relu", "Relu6"):
        return layers.ReLU(6 if kind == "Relu6" else None, name=name)
    activation = {"HardSigmoid": "hard_sigmoid", "HardSilu": "hard_silu"}.get(kind, kind.lower())
    return layers.Activation(activation, name=name)
