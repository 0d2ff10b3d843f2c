"""What a Keras model's file may contain: its weights, and the net that its config describes.

guard.py has the list of all guards, in the order in which they run.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from defence.base.errors import InputError
from defence.base.limits import DEFAULT_MAX_BYTES, Name, check_fits
from defence.load.guard_config import PREPARE
from defence.load.guard_hdf5 import check_links, check_stored, is_array, read_text, read_texts
from defence.net import graph

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
    """Raise InputError where a layer's output for one image takes more than `max_bytes`.

    Raise it also where a layer computes across images, or a regularizer would multiply a weight by
    itself to a larger array.
    """
    if layer := graph.find_mixing_layer(model):
        raise InputError(
            f"{path}: layer {layer.name!r} computes across images; it must give one "
            "row for one image"
        )
    largest = 4 * max(graph.list_output_sizes(model))
    check_fits(path, "the largest output of a layer", largest, max_bytes)
    for layer in graph.list_layers(model):
        kinds = {type(value).__name__ for value in vars(layer).values()}
        if "OrthogonalRegularizer" in kinds:
            side = max(size for weight in layer.weights for size in weight.shape)
            check_fits(path, f"the regularizer of layer {layer.name!r}", 4 * side**2, max_bytes)


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
