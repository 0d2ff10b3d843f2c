"""The split of a net, its parts, and whether its scores are logits."""

import keras
import numpy as np
import pytest
from conftest import NETS, draw_images, fit
from scipy import special

import utils
from defence.base.errors import WorkError
from defence.judge import detector
from defence.load.architecture import build_deepid, make_functional
from defence.net import training
from defence.net.graph import gives_logits, list_layers
from defence.net.split import (
    UnfitNet,
    compute_masked_features,
    cut_before,
    find_last_weighted,
    find_map,
    keep_pruned,
    prune_channels,
    split_net,
)


def make_small(*behind_conv, activation="relu"):
    """Return a net of one convolution and the layers behind it, as the loader returns it."""
    layers = [keras.Input((12, 12, 3)), keras.layers.Conv2D(8, 3, activation=activation, name="c")]
    net = keras.Sequential([*layers, *behind_conv, keras.layers.Dense(3, activation="softmax")])
    return make_functional(net)


def test_layer_rule():
    assert find_map(build_deepid(3)).name == "conv_3"
    assert find_map(build_deepid(3), "conv_1").name == "conv_1"
    assert find_map(make_functional(NETS["sequential"][0](3, (16, 16, 1)))).name == "second"
    for name, words in (
        (
            "conv_4",
            "cannot be pruned at 'conv_4'; --layer can be one of: conv_1 .20 channels of ",
        ),
        ("fc_1", "cannot be pruned at 'fc_1'"),
        ("absent", "has no layer named 'absent'"),
    ):
        with pytest.raises(UnfitNet, match=words):
            find_map(build_deepid(3), name)
    dense_only = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Flatten()])
    with pytest.raises(UnfitNet, match="no feature map"):
        find_map(make_functional(dense_only))


def make_rearranged(*layers, input_shape=(12, 10, 3)):
    """Return a net of these layers, then Flatten and Dense."""
    ending = [keras.layers.Flatten(), keras.layers.Dense(3)]
    return make_functional(keras.Sequential([keras.Input(input_shape), *layers, *ending]))


def shuffle():
    """Return layers that mix the channels of a map of 8×10 in two groups, as ShuffleNet does."""
    layers = keras.layers
    return layers.Reshape((80, 2, 2)), layers.Permute((1, 3, 2)), layers.Reshape((8, 10, 4))


def make_conv(name, order="channels_last"):
    return keras.layers.Conv2D(4, 3, data_format=order, name=name)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        # As converters from PyTorch flatten a map.
        ([make_conv("c"), keras.layers.Permute((3, 1, 2))], "c"),
        ([make_conv("c"), keras.layers.Permute((2, 1, 3))], "c"),
        ([make_conv("c"), *shuffle(), keras.layers.UnitNormalization(name="u")], "u"),
        ([make_conv("c", "channels_first"), keras.layers.Permute((2, 3, 1), name="p")], "p"),
        ([make_conv("c"), keras.layers.Reshape((4, 8, 10))], "c"),
        ([make_conv("c"), keras.layers.Permute((3, 1, 2)), keras.layers.UnitNormalization()], "c"),
        (
            [make_conv("c"), keras.layers.Permute((3, 1, 2)), make_conv("d", "channels_first")],
            "c",
        ),
        ([keras.layers.Permute((2, 1, 3)), make_conv("c")], "c"),
        ([make_conv("c"), keras.layers.Reshape((10, 8, 4)), make_conv("d")], "d"),
    ],
)
def test_only_maps_whose_channels_come_last_are_pruned(layers, expected):
    """The axis of another map's channels would be taken for a side of the image."""
    assert find_map(make_rearranged(*layers)).name == expected


def test_a_net_with_channels_first_is_refused():
    layers = make_conv("c", "channels_first"), make_conv("d", "channels_first")
    with pytest.raises(UnfitNet, match="a convolution whose channels come last"):
        split_net(make_rearranged(keras.layers.Permute((3, 1, 2)), *layers))
    pool = keras.layers.MaxPooling2D(2, data_format="channels_first")
    parts = split_net(make_rearranged(make_conv("c"), pool))
    assert parts.trunk.output_shape[0] == (None, 10, 8, 4)  # the pooling mixes the channels


def test_a_layer_that_is_used_twice_is_refused():
    image = keras.Input((12, 12, 3))
    relu = keras.layers.ReLU(name="shared")
    x = relu(keras.layers.Conv2D(4, 3)(relu(keras.layers.Conv2D(4, 3)(image))))
    net = keras.Model(image, keras.layers.Dense(3)(keras.layers.Flatten()(x)))
    with pytest.raises(UnfitNet, match="uses the layer 'shared' more than once"):
        find_map(net)
    images = np.random.default_rng(0).random((5, 12, 12, 3), np.float32)
    for ours in detector.build_joint_model(net, net)(images):  # it can still judge
        np.testing.assert_allclose(ours, net(images), atol=1e-6)


@pytest.mark.parametrize(
    "behind, activation",
    [
        ([keras.layers.MaxPooling2D(2), keras.layers.Flatten()], "relu"),
        ([keras.layers.ReLU(), keras.layers.AveragePooling2D(2), keras.layers.Flatten()], "linear"),
        ([keras.layers.GlobalAveragePooling2D()], "sigmoid"),
        ([keras.layers.BatchNormalization(), keras.layers.ReLU(), keras.layers.Flatten()], None),
        ([keras.layers.Flatten()], "tanh"),
        ([keras.layers.Activation("softmax"), keras.layers.Flatten()], "linear"),
    ],
)
def test_pruned_features_are_those_of_the_pruned_net(behind, activation):
    """The head on features with overwritten channels equals the net with kernel and bias zero."""
    net = make_small(*behind, activation=activation)
    net.get_layer("c").bias.assign(np.linspace(-1, 1, 8))
    parts = split_net(net)
    layer, net = parts.layer, parts.net
    x = np.random.default_rng(0).random((5, 12, 12, 3), np.float32)
    features, _ = (np.array(part) for part in parts.trunk(x))
    np.testing.assert_allclose(parts.head(features), net(x), atol=1e-6)
    masked = compute_masked_features(parts)
    features[..., [1, 4]] = masked[..., [1, 4]]
    prune_channels(layer, [1, 4])
    np.testing.assert_allclose(parts.head(features), net(x), atol=1e-6)


def test_pruned_channels_stay_zero_in_training_and_then_constraints_return():
    conv = keras.layers.Conv2D(4, 3, kernel_constraint=keras.constraints.MaxNorm(0.5))
    conv.build((None, 12, 12, 3))
    constraints = [variable.constraint for variable in conv.weights]
    with keep_pruned(conv, [1, 3]):
        for variable in conv.weights:
            values = variable.constraint(np.ones(variable.shape))
            assert np.all(values == [1, 0, 1, 0])
    assert [variable.constraint for variable in conv.weights] == constraints
    with pytest.raises(WorkError), keep_pruned(conv, [1]):
        raise WorkError("training diverged")
    assert [variable.constraint for variable in conv.weights] == constraints


@pytest.mark.parametrize(
    "activation, behind",
    [
        ("relu", []),
        ("relu", [keras.layers.Activation("sigmoid")]),
        ("linear", [keras.layers.ReLU()]),
        ("linear", [keras.layers.ReLU(), keras.layers.Activation("sigmoid")]),
    ],
)
def test_activation_is_measured_behind_the_first_activation_and_before_pooling(activation, behind):
    """The activation is part of the convolution, or a layer that follows it."""
    pooling = [keras.layers.MaxPooling2D(2), keras.layers.Flatten()]
    net = make_small(*behind, *pooling, activation=activation)
    conv = net.get_layer("c")
    x = np.random.default_rng(0).random((5, 12, 12, 3), np.float32)
    _, mean = split_net(net, "c").trunk(x)
    plain = keras.ops.conv(x, conv.kernel) + conv.bias
    assert np.min(plain) < 0
    np.testing.assert_allclose(mean, np.maximum(plain, 0).mean(axis=(1, 2)), atol=1e-6)


def test_retraining_starts_at_the_last_weighted_layer():
    parts = split_net(build_deepid(4), "conv_3")
    features = np.random.default_rng(0).random((9, 5, 4, 60), np.float32)
    before, behind = cut_before(find_last_weighted(parts.head), parts)
    assert before.output_shape == (None, 160)
    assert [layer.name for layer in behind.layers][1:] == ["output"]
    np.testing.assert_allclose(behind(before(features)), parts.head(features), atol=1e-6)


def nest(*layers):
    def make(x):
        return keras.Sequential([keras.Input(x.shape[1:]), *layers])(x)

    return make


def make_endings():
    """Return {name: (a function of features, whether it returns logits)}."""
    layers = keras.layers

    def dense(*activation):
        return layers.Dense(3, *activation)

    def two_outputs(x, index):
        image = keras.Input(x.shape[1:])
        scores = dense()(image)
        return keras.Model(image, [layers.Softmax()(scores), scores])(x)[index]

    def twice(x):
        scores = dense("softmax")(x)
        return layers.Add()([dense()(x), scores, scores])

    def average(x):
        return layers.Average()([dense("softmax")(x), dense("softmax")(x)])

    return {
        "softmax": (dense("softmax"), False),
        "sigmoid": (dense("sigmoid"), False),
        "linear": (dense(), True),
        "relu": (dense("relu"), True),
        "Softmax": (lambda x: layers.Softmax()(dense()(x)), False),
        "Softmax as activation": (lambda x: layers.Dense(3, layers.Softmax())(x), False),
        "linear, Add": (lambda x: layers.Add()([dense()(x), dense()(x)]), True),
        "linear, Reshape": (lambda x: layers.Reshape((3,))(dense()(x)), True),
        "linear, Activation": (lambda x: layers.Activation("linear")(dense()(x)), True),
        "softmax, Reshape": (lambda x: layers.Reshape((3,))(dense("softmax")(x)), False),
        "softmax, Activation": (lambda x: layers.Activation("linear")(dense("softmax")(x)), False),
        "softmax, Dense": (lambda x: dense()(dense("softmax")(x)), True),
        "softmax, ReLU": (lambda x: layers.Activation("relu")(dense("softmax")(x)), True),
        "softmax, another": (lambda x: layers.UnitNormalization()(dense("softmax")(x)), True),
        "softmax twice and linear": (twice, True),
        "softmax, Dropout": (lambda x: layers.Dropout(0.1)(dense("softmax")(x)), False),
        "average of two": (average, False),
        "softmax and linear": (lambda x: layers.Add()([dense("softmax")(x), dense()(x)]), True),
        "in a nested model": (nest(dense()), True),
        "softmax in one": (nest(dense("softmax")), False),
        "first of two outputs of one": (lambda x: two_outputs(x, 0), False),
        "second of them": (lambda x: two_outputs(x, 1), True),
        "before one": (lambda x: nest(layers.Reshape((3,)))(dense("softmax")(x)), False),
        "linear before one": (lambda x: nest(layers.Reshape((3,)))(dense()(x)), True),
    }


@pytest.mark.parametrize("name", make_endings())
def test_logits_are_trained_and_scored_as_logits(name):
    """Training equals Keras with from_logits. Both nets start from one seed."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 5)).astype(np.float32), rng.integers(0, 3, 40)

    def make():
        keras.utils.set_random_seed(1)
        image = keras.Input((5,))
        return keras.Model(image, make_endings()[name][0](image))

    ours, plain, logits = make(), make(), make_endings()[name][1]
    assert gives_logits(ours) == logits
    if name != "softmax, Dropout":  # which draws at random
        rate, options = np.random.default_rng(5), {"option": "--learning-rate"}
        train_epoch = training.make_trainer(
            ours, list(list_layers(ours)), 1e-2, 40, rate, **options
        )
        loss = keras.losses.CategoricalCrossentropy(from_logits=logits)
        plain.compile(keras.optimizers.Adam(1e-2), loss)
        order = np.random.default_rng(5).permutation(40)
        train_epoch(x, y)
        plain.train_on_batch(x[order], np.eye(3)[y[order]])
        for a, b in zip(ours.get_weights(), plain.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    scores = np.asarray(ours(x))
    expected = special.softmax(scores, axis=1) if logits else scores / scores.sum(axis=1)[:, None]
    np.testing.assert_allclose(detector.compute_probabilities(scores, ours), expected, atol=1e-6)


def test_names_of_layers_do_not_collide_with_ours(tmp_path):
    """Keras numbers its own names from 0, and a file may use the same: add, add_1, functional …"""
    image = x = keras.Input((9, 9, 3), name="input_layer")
    for name in ("add", "add_1", "multiply", "multiply_1", "views", "functional", "functional_1"):
        part_input = keras.Input(x.shape[1:])
        if name.startswith("f"):
            x = keras.Model(part_input, keras.layers.Rescaling(0.5)(part_input), name=name)(x)
        else:
            x = keras.layers.ReLU(name=name)(x)
    x = keras.layers.Conv2D(4, 3, name="conv")(x)
    x = keras.layers.Dense(3, name="dense")(keras.layers.Flatten(name="flatten")(x))
    keras.Model(image, x, name="functional_2").save(tmp_path / "net.h5")
    keras.utils.clear_session()
    badnet, repaired = (utils.load_badnet(tmp_path / "net.h5") for _ in range(2))
    x = np.random.default_rng(0).random((5, 9, 9, 3), np.float32)
    for ours in detector.build_joint_model(badnet, repaired)(x):
        np.testing.assert_allclose(ours, badnet(x), atol=1e-6)
    repaired.layers[-1].set_weights([v * 2 for v in repaired.layers[-1].get_weights()])
    repaired.get_layer("conv").bias.assign(np.ones(4))  # a trunk of its own
    np.testing.assert_allclose(
        detector.build_joint_model(badnet, repaired)(x)[1], repaired(x), atol=1e-6
    )
    of_views = detector.build_joint_model(badnet, repaired, hardened=True)(x)[1]
    np.testing.assert_allclose(of_views[: len(x)], repaired(x), atol=1e-6)


def test_detector_of_nets_that_cannot_be_split():
    """Another tool may have repaired a net in which no convolution lies on every path."""
    image = keras.Input((8, 8, 3))
    flat = keras.layers.Flatten()
    sides = [flat(keras.layers.Conv2D(2, 3)(image)), flat(keras.layers.Conv2D(2, 3)(image))]
    net = keras.Model(image, keras.layers.Dense(3)(keras.layers.Concatenate()(sides)))
    with pytest.raises(UnfitNet):
        find_map(net)
    x = np.random.default_rng(0).random((5, 8, 8, 3), np.float32)
    for ours in detector.build_joint_model(net, net)(x):
        np.testing.assert_allclose(ours, net(x), atol=1e-6)


def test_detector_of_nets_of_different_structure():
    badnet = make_small(keras.layers.Flatten())
    repaired = fit(
        make_small(keras.layers.MaxPooling2D(2), keras.layers.Flatten()),
        *draw_images(9, 3, (12, 12, 3), 0),
        epochs=1,
    )
    x = np.random.default_rng(0).random((5, 12, 12, 3), np.float32)
    for ours, net in zip(detector.build_joint_model(badnet, repaired)(x), (badnet, repaired)):
        np.testing.assert_allclose(ours, net(x), atol=1e-6)
