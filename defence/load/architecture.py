"""From the config in a model's file to an untrained net, whichever Keras since 2.2 wrote it."""

from defence.base.errors import InputError
from defence.base.startup import import_keras
from defence.load import guard, guard_model
from defence.load.guard_hdf5 import is_array
from defence.net import graph


def build_deepid(classes, input_shape=(55, 47, 3)):
    """The DeepID net of the competition, untrained.

    classes: N ≥ 2.  input_shape: (height, width, channels), at least (31, 31, 1).
    Returns a Keras model, float32 (n, height, width, channels) → probabilities (n, N).
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


def count_deepid_classes(file, path):
    """N of the DeepID whose weights alone, without a config, are in an open HDF5 file.

    Raises InputError where they are not those of a DeepID.  path: the file's name, for messages.
    """
    for bias in ("output/output/bias:0", "output/output/bias", "layers/dense_2/vars/1"):
        if is_array(file.get(bias)) and file[bias].ndim == 1:
            return len(file[bias])
    if "data" in file and "label" in file:
        raise InputError(f"{path}: is a dataset, not a model; --help shows the order")
    raise InputError(f"{path}: contains no model config, and its weights are not those of a DeepID")


def read_config(text, path):
    """A model's config from its JSON, a dict. Raises InputError unless the guards allow it all."""
    config = guard.parse_json(text, path)
    if not (isinstance(config, dict) and isinstance(config.get("config"), dict | list)):
        raise InputError(f"{path}: not a Keras model: its config describes no model")
    guard_model.check_config(config, path)
    return config


def build_model(config):
    """Build an untrained model from a config, as read_config gives it."""
    keras = import_keras()
    config = make_portable(config)
    if config["class_name"] != "Sequential":
        return keras.Model.from_config(config["config"])
    inner = config["config"]
    if isinstance(inner, list):  # Keras before 2.2.3 saved the bare list of layers
        inner = {"name": "sequential", "layers": inner}
    layers = inner["layers"]
    if layers[0]["class_name"] != "InputLayer":
        # Keras 2 wrote the shape, with the batch, into the first layer; Keras 3 takes that for
        # the shape of one image, and the input gains a dimension.
        shape = layers[0]["config"].pop("batch_input_shape", None) or inner["build_input_shape"]
        layers.insert(0, {"class_name": "InputLayer", "config": {"batch_shape": shape}})
    return keras.Sequential.from_config(inner)


def make_portable(config):
    """A config less what keeps another version of Keras from reading it and changes nothing.

    Initializers are needless, since the weights are loaded; older versions do not know all of
    their keys, nor the mere mention of quantization.
    """
    if isinstance(config, dict):
        return {
            key: make_portable(part)
            for key, part in config.items()
            if key not in guard_model.UNREAD
            and not (key.endswith("_initializer") or (key == "quantization_config" and not part))
        }
    return [make_portable(part) for part in config] if isinstance(config, list) else config


def make_functional(model):
    """A classifier as a Functional model of layers alone, one tensor in, one out.

    A Sequential is built anew, since Keras calls its layers on several inputs each, and so is a
    net in which graph.flat has something to change.
    """
    keras = import_keras()
    if isinstance(model, keras.Sequential) or not graph.is_flat(model):
        return graph.flatten(model)
    return keras.Model(model.inputs[0], model.outputs[0], name=model.name)
