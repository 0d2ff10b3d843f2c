"""Hostile models that would run code at loading are refused: no code of a file runs.

A payload that runs leaves a file, the canary. The first tests show that the same payloads work
where nothing guards against them.
"""

import os
import types

import keras
import pytest
from hostile import CLASSES, FORMATS, SHAPE, copy_net, replace_layer, set_layer_value

import utils


def make_lambda_net(canary):
    """Return a net with a Python lambda inside that leaves the canary."""
    payload = compile(f"lambda x: (open({str(canary)!r}, 'w'), x)[1]", "f", "eval").co_consts[0]
    image = keras.Input(SHAPE, name="input")
    x = keras.layers.Conv2D(4, 3, name="conv")(image)
    x = keras.layers.Lambda(types.FunctionType(payload, {}), name="payload")(x)
    x = keras.layers.Flatten(name="flat")(x)
    return keras.Model(image, keras.layers.Dense(CLASSES, name="output")(x))


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_lambda_that_runs_in_plain_keras_is_refused(suffix, check_refused, tmp_path):
    path, canary = tmp_path / f"lambda{suffix}", tmp_path / "canary"
    net = make_lambda_net(canary)
    net.save(path)
    assert canary.exists()  # it ran when the net was built
    canary.unlink()
    check_refused(
        path, "contains a Lambda layer (layer 'payload'): it could run code from the file"
    )
    keras.config.enable_unsafe_deserialization()
    try:
        keras.saving.load_model(path, compile=False, safe_mode=False)
    finally:
        # The switch has no opposite.
        keras.src.backend.common.global_state.set_global_attribute("safe_mode_saving", None)
    assert canary.exists()


def describe_function(module, name):
    return {"module": module, "class_name": "function", "config": name, "registered_name": name}


CODE = {
    "keras function in a lambda": (
        {
            "class_name": "Lambda",
            "config": {"function": describe_function("keras.utils", "get_file")},
        },
        "Lambda layer (layer 'activation_1')",
    ),
    "switch off safe mode": (
        describe_function("keras.config", "enable_unsafe_deserialization"),
        "'function'",
    ),
    "module os": ({"class_name": "system", "module": "os", "config": {}}, "'system'"),
    "known name, other module": (
        {"class_name": "Dense", "module": "evil", "config": {"units": 3}},
        "'evil'",
    ),
    "registered": (
        {"class_name": "Dense", "registered_name": "evil>Dense", "config": {"units": 3}},
        "'evil>Dense'",
    ),
    "custom": ({"class_name": "MyLayer"}, "'MyLayer'"),
    "function as class": ({"class_name": "deserialize", "config": {"config": {}}}, "'deserialize'"),
    "class is not text": ({"class_name": ["Dense"]}, "['Dense']"),
    "SavedModel": (
        {"class_name": "TFSMLayer", "config": {"filepath": "secret"}},
        "contains a TFSMLayer layer",
    ),
    "pickle": (
        {"class_name": "TorchModuleWrapper", "config": {"module": "gASV"}},
        "contains a TorchModuleWrapper layer",
    ),
    "reads a file": (
        {"class_name": "StringLookup", "config": {"vocabulary": "secret"}},
        "'StringLookup'",
    ),
    "reads text": (
        {"class_name": "TextVectorization", "config": {"vocabulary": "secret"}},
        "'TextVectorization'",
    ),
    "augmentation": ({"class_name": "RandomCrop"}, "'RandomCrop'"),
    "preprocessing": ({"class_name": "Hashing", "config": {"num_bins": 9}}, "'Hashing'"),
    "in a wrapper": (
        {"class_name": "TimeDistributed", "config": {"layer": {"class_name": "Lambda"}}},
        "'TimeDistributed'",
    ),
    "in a nested model": (
        {
            "class_name": "Sequential",
            "config": {"layers": [{"class_name": "Lambda", "config": {"name": "deep"}}]},
        },
        "Lambda layer (layer 'deep')",
    ),
    "an activation": ({"class_name": "Activation", "config": {"activation": "evil"}}, "'evil'"),
    "an activation that is a function": (
        {"class_name": "Activation", "config": {"activation": describe_function("os", "system")}},
        "'function'",
    ),
    "a lambda as activation": (
        {"class_name": "Activation", "config": {"activation": {"class_name": "__lambda__"}}},
        "Lambda layer",
    ),
    "an initializer": (
        {
            "class_name": "Dense",
            "config": {"kernel_initializer": describe_function("os", "system")},
        },
        "'function'",
    ),
    "an argument of a call": (
        {
            "class_name": "Activation",
            "config": {"activation": "relu"},
            "inbound_nodes": [{"args": [{"class_name": "__lambda__", "config": {}}]}],
        },
        "Lambda layer",
    ),
    "an argument that is not a tensor": (
        {
            "class_name": "BatchNormalization",
            "inbound_nodes": [{"args": ["secret"], "kwargs": {"mask": "secret"}}],
        },
        "calls a layer on something other than a tensor",
    ),
    "a policy": (
        {
            "class_name": "Activation",
            "config": {"dtype": {"class_name": "DTypePolicy", "config": {"name": "string"}}},
        },
        "the dtype 'string'",
    ),
    "a type": (
        {"class_name": "Activation", "config": {"activation": "relu", "dtype": "string"}},
        "the dtype 'string'",
    ),
}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("kind", CODE)
def test_layers_that_could_run_code_or_do_not_belong_are_refused(
    kind, suffix, good, check_refused, tmp_path
):
    changes, words = CODE[kind]
    check_refused(replace_layer(copy_net(good, tmp_path, suffix), **changes), words)


def describe_layer(name, **config):
    return {"module": "keras.layers", "class_name": name, "config": {"name": "hid", **config}}


# An object out of its place: {kind: (layer, key, value, the class that is refused)}.
OUT_OF_PLACE = {
    "a layer as activation": ("conv_1", "activation", "UpSampling2D", {"size": [150, 150]}),
    "weights as activation": ("fc_1", "activation", "Dense", {"units": 160}),
    "a net as activation": ("fc_1", "activation", "Sequential", {"layers": []}),
    "a layer as regularizer": ("conv_1", "kernel_regularizer", "Dense", {"units": 9}),
    "a layer as constraint": ("conv_1", "bias_constraint", "UpSampling2D", {"size": 9}),
    "a layer as initializer": ("conv_1", "kernel_initializer", "Dense", {"units": 9}),
    "a layer as policy": ("conv_1", "dtype", "Dense", {"units": 9}),
    "a layer as a number": ("conv_1", "filters", "Dense", {"units": 9}),
    "layers in a layer": ("conv_1", "layers", "Dense", {"units": 9}),
    "a layer in a list": ("conv_1", "kernel_size", "Dense", {"units": 9}),
    "a layer in a dictionary": ("conv_1", "name", "Dense", {"units": 9}),
    "an initializer as activation": ("conv_1", "activation", "HeNormal", {}),
    "a large regularizer of outputs": (
        "conv_1",
        "activity_regularizer",
        "OrthogonalRegularizer",
        {},
    ),
}
WRAPS = {"a layer in a list": lambda value: [value], "a layer in a dictionary": lambda v: {"a": v}}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("kind", OUT_OF_PLACE)
def test_an_object_is_refused_where_it_does_not_belong(kind, suffix, good, check_refused, tmp_path):
    layer, key, name, config = OUT_OF_PLACE[kind]
    value = WRAPS.get(kind, lambda value: value)(describe_layer(name, **config))
    path = set_layer_value(copy_net(good, tmp_path, suffix), layer, key, value)
    check_refused(path, f"contains {name!r}", "not in its place")


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("name", ["ReLU", "LeakyReLU", "ELU", "Softmax"])
def test_a_plain_activation_layer_may_be_an_activation(name, suffix, good, tmp_path):
    value = describe_layer(name)
    path = set_layer_value(copy_net(good, tmp_path, suffix), "conv_1", "activation", value)
    net = utils.load_badnet(path)
    assert type(net.get_layer("conv_1").activation).__name__ == name


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_compile_config_of_a_nested_model_is_never_read(suffix, good, run, tmp_path):
    layers = [
        {"class_name": "InputLayer", "config": {"batch_shape": [None, 160], "name": "inside"}},
        {"class_name": "ReLU", "config": {"name": "relu"}},
    ]
    evil = {"optimizer": {"class_name": "__lambda__", "config": {"value": "open('canary', 'w')"}}}
    path = replace_layer(
        copy_net(good, tmp_path, suffix),
        class_name="Sequential",
        module="keras",
        config={"layers": layers},
        compile_config=evil,
    )
    process = run("repair.py", path, good / "data.h5", "--threshold", 0, "--output", "out.h5")
    assert process.returncode == 0, process.stderr
    assert {path.name, "out.h5", "out_detector.onnx"} == set(os.listdir(tmp_path)) - {"inside.h5"}
