"""From the config in a model's file, written by Keras 2.2 or later, to an untrained net."""

from __future__ import annotations

from typing import Any

from defence.base.errors import InputError
from defence.base.limits import Name
from defence.base.startup import import_keras
from defence.load import guard, guard_config
from defence.load.guard_hdf5 import is_array
from defence.net import graph


def build_deepid(classes: int, input_shape: tuple[int, int, int] = (55, 47, 3)) -> Any:
    """Build the DeepID net of the competition, untrained.

    classes: N ≥ 2.  input_shape: (height, width, channels), at least (31, 31, 1).
    Return a Keras model, float32 (n, height, width, channels) → probabilities (n, N).
    Source: Sun, Wang, Tang, CVPR 2014, in the sizes of CSAW-HackML-2020.
    """
    keras = import_keras()
    layers = keras.layers
    image = keras.Input(input_shape, name="input")
    x = image
    for i, (channels, kernel) in enumerate([(20, 4), (40, 3), (60, 3)], start=1):
        x = layers.Conv2D(channels, kernel, activation="relu", name=f"conv_{i}")(x)
        x = layers.MaxPooling2D(2, name=f"pool_{i}")(x)
    fine = layers.Flatten(name="flatten_1")(x)
    fine = layers.Dense(160, name="fc_1")(fine)
    coarse = layers.Conv2D(80, 2, activation="relu", name="conv_4")(x)
    coarse = layers.Flatten(name="flatten_2")(coarse)
    coarse = layers.Dense(160, name="fc_2")(coarse)
    x = layers.Add(name="add_1")([fine, coarse])
    x = layers.Activation("relu", name="activation_1")(x)
    return keras.Model(image, layers.Dense(classes, activation="softmax", name="output")(x))


def count_deepid_classes(file: Any, path: Name) -> int:
    """Return N of a DeepID from its weights in an open HDF5 file that has no config.

    path: the file's name, for messages.  Raise InputError where they are not a DeepID's.
    """
    for bias in ("output/output/bias:0", "output/output/bias", "layers/dense_2/vars/1"):
        if is_array(file.get(bias)) and file[bias].ndim == 1:
            return len(file[bias])
    if "data" in file and "label" in file:
        raise InputError(f"{path}: is a dataset, not a model; --help shows the order")
    raise InputError(f"{path}: contains no model config, and its weights are not a DeepID's")


def read_config(text: str | bytes, path: Name) -> dict[str, Any]:
    """Return a model's config from its JSON. Raise InputError unless the guards allow all of it."""
    config = guard.parse_json(text, path)
    if not (isinstance(config, dict) and isinstance(config.get("config"), dict | list)):
        raise InputError(f"{path}: not a Keras model: its config does not describe a model")
    guard_config.check_config(config, path)
    return config


def build_model(config: dict[str, Any]) -> Any:
    """Build an untrained model from a config that read_config returned."""
    keras = import_keras()
    config = make_portable(config)
    if config["class_name"] != "Sequential":
        return keras.Model.from_config(config["config"])
    inner = config["config"]
    if isinstance(inner, list):  # Keras before 2.2.3 saved the bare list of layers
        inner = {"name": "sequential", "layers": inner}
    layers = inner["layers"]
    if layers[0]["class_name"] != "InputLayer":
        # Keras 2 wrote the shape of a batch into the first layer. Keras 3 would take it for the
        # shape of one image, so that the input would gain a dimension.
        shape = layers[0]["config"].pop("batch_input_shape", None) or inner["build_input_shape"]
        layers.insert(0, {"class_name": "InputLayer", "config": {"batch_shape": shape}})
    return keras.Sequential.from_config(inner)


def make_portable(config: Any) -> Any:
    """Return a config without the parts that only prevent another version of Keras from reading it.

    Initializers are not needed, because the weights are loaded, and older versions do not know all
    their keys. Nor do they know the key of quantization, even where it is null.
    """
    if isinstance(config, dict):
        return {
            key: make_portable(part)
            for key, part in config.items()
            if key not in guard_config.UNREAD
            and not (key.endswith("_initializer") or (key == "quantization_config" and not part))
        }
    return [make_portable(part) for part in config] if isinstance(config, list) else config


def make_functional(model: Any) -> Any:
    """Return a classifier as a Functional model of layers alone, one tensor in, one out.

    A Sequential is copied, because Keras calls each of its layers on several inputs. So is a net
    that graph.flatten has to change.
    """
    keras = import_keras()
    if isinstance(model, keras.Sequential) or not graph.is_flat(model):
        return graph.flatten(model)
    return keras.Model(model.inputs[0], model.outputs[0], name=model.name)
