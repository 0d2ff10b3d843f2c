"""What a Keras model's file may contain: its config, its weights, and the resulting net.

guard.py has the list of all guards, in the order in which they run.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from defence.base.errors import InputError
from defence.base.limits import DEFAULT_MAX_BYTES, Name, check_fits
from defence.load.guard_hdf5 import check_links, check_stored, is_array, read_text, read_texts
from defence.net import graph
from defence.net.arithmetic import OPERATIONS

LAYER_COUNT = 2_000  # keras.applications.EfficientNetV2L has 1,031
CALLS = 10_000  # inputs of all layers together; that net has 1,164
DEPTH = 64  # levels of a config
UNREAD = {"compile_config"}  # the optimizer's; architecture.make_portable removes it
UNBOUNDED = {"seed", "shared_object_id"}  # numbers that only identify
NUMBER = 10**6  # far above any unit count, kernel or image size of a classifier
SPANS = {"kernel_size", "pool_size", "strides", "dilation_rate", "padding", "cropping", "size"}
SPAN = 1_000  # pixels in one of SPANS
NAME_LENGTH = 1_000  # characters

# The parts of a feed-forward image classifier. A config may name anything importable, and Keras
# would look it up, so every other name is refused before Keras sees the file.
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
PARTS = """
    Zeros Ones Constant RandomNormal RandomUniform TruncatedNormal VarianceScaling Orthogonal
    Identity GlorotNormal GlorotUniform HeNormal HeUniform LecunNormal LecunUniform L1 L2 L1L2
    OrthogonalRegularizer MaxNorm NonNeg UnitNorm MinMaxNorm DTypePolicy __keras_tensor__
    __tuple__ TensorShape
"""
ALLOWED = frozenset((LAYERS + PREPARE + PARTS).split())
RUN_CODE = {"Lambda", "TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer"}
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
Shape = tuple[int, ...]
Shapes = dict[str, list[Shape]] | list[Shape]


# ---------------------------------------------------------------------------------- the weights


def read_shapes(file: Any, path: Name, max_bytes: int = DEFAULT_MAX_BYTES) -> Shapes:
    """Return the shapes of a model's weights from an open HDF5 file, without reading the weights.

    They are {layer: [shape, …]} in the order of the file, in which Keras loads an .h5 file, or a
    list where Keras loads by paths (.weights.h5, .keras).
    """
    objects = check_links(file, path)
    arrays = {
        name: item
        for name, item in objects.items()
        if is_array(item) and not name.startswith("optimizer")
    }
    for array in arrays.values():
        check_stored(array, path, max_bytes)
    check_fits(path, "its weights", sum(array.nbytes for array in arrays.values()), max_bytes)
    within = "model_weights/" * ("layer_names" not in file.attrs and "model_weights" in objects)
    group = objects[within.rstrip("/")]
    for name in ("keras_version", "backend"):  # attributes that Keras reads
        read_text(group, name, path)
    layers = _read_names(group, "layer_names", path)
    if not layers:
        for array in arrays.values():
            read_text(array, "dtype", path)  # Keras reads it too
        return [array.shape for name, array in arrays.items() if "seed_generator" not in name]
    if f"{within}top_level_model_weights" in objects:
        layers.append("top_level_model_weights")
    declared = {}
    for layer in layers:
        names = _read_names(objects[within + layer], "weight_names", path)
        if names:
            declared[layer] = [arrays[f"{within}{layer}/{name}"].shape for name in names]
    return declared


def _read_names(group: Any, attribute: str, path: Name) -> list[str]:
    """Return a row of names. Keras splits a long one into attributes whose names end in 0, 1, …"""
    names, parts = read_texts(group, attribute, path), 0
    if names is None:
        names = []
        while (part := read_texts(group, f"{attribute}{parts}", path)) is not None:
            names += part
            parts += 1
    return names


# ----------------------------------------------------------------------------------- the config


def check_config(config: Any, path: Name) -> None:
    """Raise InputError unless a model's config, at every depth, describes an image classifier."""
    unread, layers, inputs = [(config, "", "", 0)], 0, 0
    while unread:
        value, key, layer, depth = unread.pop()
        if depth > DEPTH:
            raise InputError(f"{path}: its config is nested deeper than {DEPTH} levels")
        if isinstance(value, dict):
            if "class_name" in value:
                inner, name = value.get("config"), value["class_name"]
                if name not in PARTS.split() and isinstance(inner, dict):
                    layer = str(inner.get("name", layer))[:NAME_LENGTH]
                    layers += 1
                _check_class(value, layer, path)
                inputs += name == "__keras_tensor__"
            elif key == "kwargs" or (key == "inbound_nodes" and "args" not in value):
                switch = value.get("training")
                options = {**value, "training": None if isinstance(switch, bool) else switch}
                _check_call(options.values(), layer, path)
            for name, part in value.items():
                if name == "inbound_nodes" and value.get("module") in OPERATIONS:
                    part, numbers = _separate_numbers(part)
                    unread += [(number, name, layer, depth + 1) for number in numbers]
                if name not in UNREAD:
                    unread.append((part, name, layer, depth + 1))
        elif isinstance(value, list):
            if key == "args":
                _check_call([part for part in value if not isinstance(part, list)], layer, path)
            inputs += key == "inbound_nodes"
            unread += [(part, key, layer, depth + 1) for part in value]
        else:
            _check_value(value, key, layer, path)
    if layers > LAYER_COUNT or inputs > CALLS:
        raise InputError(
            f"{path}: has more than {LAYER_COUNT:,} layers or {CALLS:,} inputs of layers"
        )


def _check_class(value: dict[str, Any], layer: str, path: Name) -> None:
    name, module, registered = map(value.get, ("class_name", "module", "registered_name"))
    if name in ("__lambda__", *RUN_CODE):
        kind = "Lambda" if name == "__lambda__" else name
        raise InputError(
            f"{path}: contains a {kind} layer (layer {layer!r}): it could run code from the file"
        )
    operations = OPERATIONS.get(module, set()) if isinstance(module, str) else set()
    if not isinstance(name, str) or name not in (operations or ALLOWED):
        raise InputError(
            f"{path}: contains {name!r} (layer {layer!r}), which is not among the layers that "
            "this tool loads"
        )
    valid = module is None or operations or (isinstance(module, str) and MODULE.fullmatch(module))
    if not valid or registered not in (None, name):
        raise InputError(
            f"{path}: contains a {name} of {module!r}, registered as {registered!r} (layer "
            f"{layer!r}): it could run code from the file"
        )
    if name == "DTypePolicy":
        _check_value(value["config"]["name"], "dtype", layer, path)


def _separate_numbers(calls: Any) -> tuple[list[Any], list[Any]]:
    """Return the calls of a plain operation with None in place of numbers, and the numbers."""
    numbers = []

    def separate(value: Any) -> Any:
        if isinstance(value, int | float):
            numbers.append(value)
            return None
        return value

    for_layers = [
        {**call, "args": list(map(separate, call["args"]))}
        if isinstance(call, dict) and isinstance(call.get("args"), list)
        else call
        for call in (calls if isinstance(calls, list) else [calls])
    ]
    return for_layers, numbers


def _check_call(arguments: Iterable[Any], layer: str, path: Name) -> None:
    """Raise InputError unless every argument of a layer's call is a tensor or None."""
    for value in arguments:
        if isinstance(value, dict) and "class_name" in value:
            _check_class(value, layer, path)
        tensor = isinstance(value, dict) and value.get("class_name") == "__keras_tensor__"
        if not (tensor or value is None):
            raise InputError(
                f"{path}: calls a layer on something other than a tensor (layer {layer!r})"
            )


def _check_value(value: Any, key: str, layer: str, path: Name) -> None:
    if isinstance(value, str):
        allowed = {"activation": ACTIVATIONS.split(), "dtype": TYPES, "variable_dtype": TYPES}.get(
            key
        )
        if allowed is not None and value not in allowed:
            raise InputError(f"{path}: contains the {key} {value!r} (layer {layer!r})")
        valid = len(value) <= NAME_LENGTH and value.isprintable()
        if not valid or (key == "name" and not NAME(value)):
            raise InputError(f"{path}: its config contains an invalid name (layer {layer!r})")
    elif key == "pad_to_aspect_ratio" and value:
        raise InputError(f"{path}: pads an image to another aspect ratio (layer {layer!r})")
    elif isinstance(value, int | float) and key not in UNBOUNDED:
        if abs(value) <= (SPAN if key in SPANS else NUMBER):
            return
        raise InputError(f"{path}: its config contains the number {value:.3g} (layer {layer!r})")


# -------------------------------------------------------------------------------------- the net


@contextlib.contextmanager
def limit_weights(
    layer_class: Any, path: Name, max_bytes: int = DEFAULT_MAX_BYTES
) -> Iterator[None]:
    """Allocate at most `max_bytes` of weights, all zero, while the block builds a model.

    layer_class: keras.layers.Layer, whose add_weight every layer calls.
    """
    allocate, total = layer_class.add_weight, 0

    def add_weight(
        layer: Any,
        shape: Shape | None = None,
        initializer: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> Any:
        nonlocal total
        total += 4 * math.prod(shape or ())
        check_fits(path, f"the weights up to layer {layer.name!r}", total, max_bytes)
        return allocate(layer, shape=shape, initializer="zeros", dtype=dtype, **options)

    layer_class.add_weight = add_weight
    try:
        yield
    finally:
        layer_class.add_weight = allocate


def check_classifier(model: Any, path: Name) -> None:
    """Raise InputError unless a Keras model maps one image to the scores of N ≥ 2 classes."""
    unfit = f"{path}: not a classifier of images:"
    for kind, tensors in (("inputs", model.inputs), ("outputs", model.outputs)):
        if len(tensors) != 1:
            raise InputError(f"{unfit} it has {len(tensors)} {kind}")
    shape = tuple(model.inputs[0].shape[1:])
    if len(shape) != 3:
        raise InputError(f"{unfit} its input is not one image")
    if None in shape:
        raise InputError(f"{unfit} its input has no fixed height, width and channels")
    shape = tuple(model.outputs[0].shape[1:])
    if len(shape) != 1 or shape[0] is None:
        size = "×".join(map(str, shape))
        raise InputError(f"{unfit} its output, of shape {size}, is not a row of class scores")
    if shape[0] < 2:
        raise InputError(f"{unfit} it gives one score; even two classes need one each")


def check_prepared(model: Any, path: Name) -> None:
    """Raise InputError unless the layers of PREPARE, at any depth, give the shapes they declare.

    Run the model on one image, if it has such layers.
    """
    kinds = PREPARE.split()
    layers = [layer for layer in graph.list_layers(model) if type(layer).__name__ in kinds]
    for layer in layers:
        for name in ("scale", "offset"):
            channels = layer._inbound_nodes[0].input_tensors[0].shape[-1]
            values = np.shape(getattr(layer, name, 0))
            if values not in ((), (1,), (channels,)):
                raise InputError(f"{path}: layer {layer.name!r} has a {name} of shape {values}")
    if layers:
        image = np.zeros((1, *model.inputs[0].shape[1:]), np.float32)
        scores = model(image, training=False)
        if scores.shape[1:] != model.outputs[0].shape[1:]:
            raise InputError(f"{path}: its output does not have the shape that its config declares")


def check_outputs(model: Any, path: Name, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
    """Raise InputError where a layer's output for one image takes more than `max_bytes`."""
    largest = 4 * max(graph.list_output_sizes(model))
    check_fits(path, "the largest output of a layer", largest, max_bytes)


def check_shapes(model: Any, declared: Shapes, path: Name) -> None:
    """Raise InputError unless a model's weights have the declared shapes.

    declared: read_shapes of its file.
    """

    def list_shapes(weights: Iterable[Any]) -> list[Shape]:
        return [tuple(weight.shape) for weight in weights]

    if not isinstance(declared, dict):
        if sorted(list_shapes(model.weights)) != sorted(declared):
            raise InputError(f"{path}: the shapes of its weights do not match its config")
        return
    layers = [layer for layer in model.layers if layer.weights]
    if len(layers) != len(declared):
        raise InputError(
            f"{path}: has weights of {len(declared)} layers, but its config describes {len(layers)}"
        )
    for layer, (name, in_file) in zip(layers, declared.items()):
        in_config = list_shapes(layer.trainable_weights + layer.non_trainable_weights)
        if in_file != in_config:
            raise InputError(
                f"{path}: the weights of layer {name!r} are of shape {in_file}, but its config "
                f"says {in_config}"
            )


def check_finite(model: Any, path: Name) -> None:
    """Raise InputError where a weight is NaN or infinite."""
    for layer in model.layers:
        if not all(np.isfinite(values).all() for values in layer.get_weights()):
            raise InputError(f"{path}: layer {layer.name!r} has weights that are NaN or infinite")
