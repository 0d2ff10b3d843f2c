"""What the config of a Keras model may contain.

guard.py has the list of all guards, in the order in which they run.

Keras builds whatever object a config describes, wherever it stands: a layer in the place of an
activation's name would run with weights that no file has, and unseen by whoever walks the net. So
an object is allowed by its class and by its place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from defence.base.errors import InputError
from defence.base.limits import Name
from defence.net.arithmetic import OPERATIONS

LAYER_COUNT = 2_000  # keras.applications.EfficientNetV2L has 1,031
CALLS = 10_000  # of all layers together, and their inputs; that net has 1,164 inputs
DEPTH = 64  # levels of a config
UNREAD = {"compile_config"}  # the optimizer's; architecture.make_portable removes it
UNBOUNDED = {"seed", "shared_object_id"}  # numbers that only identify
NUMBER = 10**6  # far above any unit count, kernel or image size of a classifier
SPANS = {"kernel_size", "pool_size", "strides", "dilation_rate", "padding", "cropping", "size"}
SPAN = 1_000  # pixels in one of SPANS
NAME_LENGTH = 1_000  # characters

# The parts of a feed-forward image classifier. A config may name anything importable, and Keras
# would look it up, so every other name is refused before Keras sees the file.
MODELS = {"Functional", "Model", "Sequential"}
LAYERS = """
    Functional Model Sequential InputLayer Conv2D DepthwiseConv2D SeparableConv2D Conv2DTranspose
    Dense Flatten Reshape Permute Activation ReLU LeakyReLU PReLU ELU Softmax MaxPooling2D
    AveragePooling2D GlobalMaxPooling2D GlobalAveragePooling2D ZeroPadding2D Cropping2D
    UpSampling2D Dropout SpatialDropout2D GaussianNoise GaussianDropout AlphaDropout
    BatchNormalization LayerNormalization GroupNormalization UnitNormalization Identity Add Subtract
    Multiply Average Maximum Minimum Concatenate
"""
# Layers that prepare an image. When they run, they may fail or give another shape than declared.
PREPARE = """
    Rescaling Normalization Resizing CenterCrop RandomFlip RandomRotation RandomZoom
    RandomTranslation RandomContrast RandomBrightness
"""
LAYER_CLASSES = frozenset((LAYERS + PREPARE).split())
# What may stand under the other keys of a layer's config, by the last word of the key.
PLACES = {
    "activation": "ReLU LeakyReLU ELU Softmax",  # without weights, as large as their input
    "initializer": """
        Zeros Ones Constant RandomNormal RandomUniform TruncatedNormal VarianceScaling Orthogonal
        Identity GlorotNormal GlorotUniform HeNormal
        HeUniform LecunNormal LecunUniform
    """,
    "regularizer": "L1 L2 L1L2 OrthogonalRegularizer",
    "constraint": "MaxNorm NonNeg UnitNorm MinMaxNorm",
    "dtype": "DTypePolicy",
}
NUMBERS = {"__tuple__", "TensorShape"}  # rows of numbers, under any key
TENSOR = "__keras_tensor__"  # in a layer's calls
RUN_CODE = {"Lambda", "TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer"}
# What Keras 2 makes of arithmetic between layers, such as preprocess_input; Keras 3 cannot read it.
KERAS_2_ARITHMETIC = ("TFOpLambda", "SlicingOpLambda")
REBUILD = (
    "build the net without it, copy the weights with set_weights, and save it again; this tool "
    "does what preprocess_input does (docs/nets.md, Pixels)"
)
ACTIVATIONS = """
    linear relu relu6 leaky_relu elu selu celu gelu silu swish mish softplus softsign softmax
    log_softmax sigmoid hard_sigmoid log_sigmoid hard_silu hard_swish hard_tanh tanh exponential
"""
TYPES = {"float16", "bfloat16", "float32", "float64", "mixed_float16", "mixed_bfloat16"}
NAME = re.compile(r"(?!\.*$)[\w.>-]+", re.ASCII).fullmatch  # valid as a scope of TensorFlow
MODULE = re.compile(
    r"keras(\.src)?"
    r"(\.(engine|models|layers|initializers|regularizers|constraints|dtype_policies)(\.\w+)*)?"
)


def check_config(config: Any, path: Name) -> None:
    """Raise InputError unless a model's config, at every depth, describes an image classifier."""
    _check_depth(config, path)
    _Checker(path).check_object(config, frozenset(MODELS), "", "")
    if (count := _count_calls(config)) > CALLS:
        raise InputError(
            f"{path}: calls its layers {count:,} times, those of nested models at each call; that "
            f"is more than {CALLS:,}"
        )


def _check_depth(config: Any, path: Name) -> None:
    level, depth = [config], 0
    while level:
        if depth > DEPTH:
            raise InputError(f"{path}: its config is nested deeper than {DEPTH} levels")
        nested = [value.values() if isinstance(value, dict) else value for value in level]
        level = [part for parts in nested for part in parts if isinstance(part, dict | list)]
        depth += 1


def _count_calls(value: dict[str, Any]) -> int:
    """Return how often the layers of a model's object run, those of a nested model at each call."""
    inner, total = value.get("config"), 0
    layers = inner.get("layers") if isinstance(inner, dict) else inner
    for layer in layers if isinstance(layers, list) else []:
        nested = isinstance(layer, dict) and layer.get("class_name") in MODELS
        calls = layer.get("inbound_nodes") if isinstance(layer, dict) else None
        count = len(calls) if isinstance(calls, list) else 0
        total += max(1, count) * (_count_calls(layer) if nested else 1)
    return total


def _list_allowed(key: str, owner: str) -> frozenset[str]:
    """Return the classes of the objects that may stand under a key. owner: the class around it."""
    if key == "layers" and owner in MODELS:
        return LAYER_CLASSES
    if key == "activity_regularizer":  # an orthogonal one would multiply all outputs by themselves
        return frozenset(["L1", "L2", "L1L2"])
    return frozenset(PLACES.get(key.rpartition("_")[2], "").split()) | NUMBERS


class _Checker:
    """Checks the parts of one config of bounded depth. layer: always a name, for messages."""

    def __init__(self, path: Name) -> None:
        self.path, self.layers, self.inputs = path, 0, 0

    def check_object(
        self, value: dict[str, Any], allowed: frozenset[str], key: str, layer: str
    ) -> None:
        """Check an object of one of the `allowed` classes, under a key of a config."""
        kind, inner = value.get("class_name"), value.get("config")
        in_layers = allowed >= MODELS
        if in_layers:
            layer = str(inner.get("name", layer) if isinstance(inner, dict) else layer)
            layer = layer[:NAME_LENGTH]
            self.layers += 1
        self.check_class(value, allowed, layer)
        if in_layers and kind in MODELS and isinstance(inner, list):  # Keras before 2.2.3
            value = {**value, "config": {"layers": inner}}
        for name, part in value.items():
            if name == "inbound_nodes":
                self.check_calls(part, layer, value.get("module") in OPERATIONS)
            elif kind in NUMBERS:
                self.check_part(part, key, "", layer)
            elif name == "config" and isinstance(part, dict):
                for name_inside, inside in part.items():
                    self.check_part(inside, name_inside, str(kind), layer)
            else:
                self.check_part(part, name, "", layer)
        if self.layers > LAYER_COUNT or self.inputs > CALLS:
            raise InputError(
                f"{self.path}: has more than {LAYER_COUNT:,} layers or {CALLS:,} inputs of layers"
            )

    def check_part(self, value: Any, key: str, owner: str, layer: str) -> None:
        """Check what stands under a key of a config. owner: the class that has this config."""
        if key in UNREAD:
            return
        if isinstance(value, list):
            for part in value:
                self.check_part(part, key, owner, layer)
        elif isinstance(value, dict) and "class_name" in value:
            self.check_object(value, _list_allowed(key, owner), key, layer)
        elif isinstance(value, dict):
            for name, part in value.items():
                self.check_part(part, name, "", layer)
        else:
            self.check_value(value, "dtype" if owner == "DTypePolicy" else key, layer)

    def check_class(self, value: dict[str, Any], allowed: frozenset[str], layer: str) -> None:
        name, module, registered = map(value.get, ("class_name", "module", "registered_name"))
        if name in ("__lambda__", *RUN_CODE):
            kind = "Lambda" if name == "__lambda__" else name
            raise InputError(
                f"{self.path}: contains a {kind} layer (layer {layer!r}): it could run code from "
                f"the file; {REBUILD}"
            )
        if name in KERAS_2_ARITHMETIC:
            raise InputError(
                f"{self.path}: contains a {name} layer (layer {layer!r}): arithmetic that only "
                f"Keras 2 reads; {REBUILD}"
            )
        operations = OPERATIONS.get(module, set()) if isinstance(module, str) else set()
        if allowed != LAYER_CLASSES:
            operations = set()
        if not isinstance(name, str) or name not in (operations or allowed):
            raise InputError(
                f"{self.path}: contains {name!r} (layer {layer!r}), which is not among the layers "
                "that this tool loads, or not in its place"
            )
        known = isinstance(module, str) and MODULE.fullmatch(module)
        if not (module is None or operations or known) or registered not in (None, name):
            hint = "; if Keras 2 saved it, save it as .h5" * str(module).startswith("tf_keras.")
            raise InputError(
                f"{self.path}: contains a {name} of {module!r}, registered as {registered!r} "
                f"(layer {layer!r}): it could run code from the file{hint}"
            )

    def check_calls(self, calls: Any, layer: str, with_numbers: bool) -> None:
        """Check how a layer is called: on tensors, and with_numbers also on numbers.

        calls: as Keras 3 writes them, [{"args": […], "kwargs": {…}}, …], or as Keras 2 does, nested
        lists of [name, number, number, {…}].
        """
        for part in _list_leaves(calls):
            if not isinstance(part, dict):
                self.inputs += isinstance(part, str)
                self.check_value(part, "inbound_nodes", layer)
                continue
            options = part.get("kwargs", {}) if "args" in part else part
            values = [*_list_leaves(part.get("args")), options]
            if isinstance(options, dict):
                switch = options.get("training")
                options = {**options, "training": None if isinstance(switch, bool) else switch}
                values[-1:] = options.values()
            for value in values:
                number = isinstance(value, int | float) and with_numbers
                self.check_argument(value, layer, number)

    def check_argument(self, value: Any, layer: str, number: bool) -> None:
        """Check one argument of a call. number: whether it is a number in its place."""
        if number:
            self.check_value(value, "inbound_nodes", layer)
        elif isinstance(value, dict) and "class_name" in value:
            self.inputs += 1
            self.check_object(value, frozenset([TENSOR]), "inbound_nodes", layer)
        elif value is not None:
            raise InputError(
                f"{self.path}: calls a layer on something other than a tensor (layer {layer!r})"
            )

    def check_value(self, value: Any, key: str, layer: str) -> None:
        """Check a text, a number, or null."""
        if isinstance(value, str):
            names = {"activation": ACTIVATIONS.split(), "dtype": TYPES, "variable_dtype": TYPES}
            allowed = names.get(key)
            if allowed is not None and value not in allowed:
                raise InputError(f"{self.path}: contains the {key} {value!r} (layer {layer!r})")
            valid = len(value) <= NAME_LENGTH and value.isprintable()
            if not valid or (key == "name" and not NAME(value)):
                raise InputError(
                    f"{self.path}: its config contains an invalid name (layer {layer!r})"
                )
        elif key == "pad_to_aspect_ratio" and value:
            raise InputError(
                f"{self.path}: pads an image to another aspect ratio (layer {layer!r})"
            )
        elif isinstance(value, int | float) and key not in UNBOUNDED:
            if abs(value) <= (SPAN if key in SPANS else NUMBER):
                return
            raise InputError(
                f"{self.path}: its config contains the number {value:.3g} (layer {layer!r})"
            )


def _list_leaves(value: Any) -> Iterator[Any]:
    """Yield what is in nested lists and not a list."""
    if not isinstance(value, list):
        yield value
        return
    for part in value:
        yield from _list_leaves(part)
