"""The fast path equals the report's loop, and each rule of the method holds."""

import types
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import reference
from conftest import NETS, do_repair, draw_images, fit, make_world, write_data
from scipy import special, stats

import repair
import utils
from defence import detector, training
from defence.architecture import as_functional, deepid
from defence.cached_net import CachedNet
from defence.cli import InputError, WorkError
from defence.inference import classify, parallel_map
from defence.net import (
    Split,
    UnfitNet,
    cut_before,
    find_layer,
    gives_logits,
    last_dense,
    leaves,
    masked_features,
    prune_channels,
    split,
)
from defence.observer import Observer, hold_out
from defence.options import Settings


def repair_file(folder, settings=None):
    """Repair the net of a world. Returns (G, record)."""
    badnet = utils.load_badnet(folder / "models" / "small_bd_net.h5")
    with utils.open_dataset(folder / "clean.h5") as clean:
        clean.fit_to(badnet.input_shape[1:], badnet.output_shape[1])
        return badnet, do_repair(badnet, clean, settings)


def images_of(folder):
    with h5py.File(folder / "clean.h5") as file:
        return np.moveaxis(file["data"][:], 1, 3).astype(np.float32) / 255, file["label"][:]


@pytest.mark.parametrize("seed", [0, 7])
def test_fast_path_equals_reference(world, seed):
    """Same channels, same accuracies; weights to float32 rounding, which Adam carries along."""
    settings = Settings(seed=seed, epochs=2, rounds=2, learning_rate=1e-4)
    repaired, record = repair_file(world, settings)
    plain = keras.models.load_model(world / "models" / "small_bd_net.h5", compile=False)
    x, y = images_of(world)
    pruned, curve, rounds = reference.repair(
        plain, x, y.astype(int), record["layer"], seed, rounds=2, epochs=2
    )
    assert 0 < len(pruned) < record["channels"]
    assert record["pruned"] == pruned
    assert record["accuracy"]["after_each_channel"] == curve
    assert record["accuracy"]["after_each_round"] == rounds
    for ours, theirs in zip(repaired.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


def test_same_seed_same_bytes_other_seed_other_weights(deepid_world):
    first, second = (repair_file(deepid_world)[0].get_weights() for _ in range(2))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))
    other = repair_file(deepid_world, Settings(seed=1))[0].get_weights()
    assert any(a.tobytes() != b.tobytes() for a, b in zip(first, other, strict=True))


def test_pruned_channels_are_zero_and_the_trunk_is_untouched(world):
    before = keras.models.load_model(world / "models" / "small_bd_net.h5", compile=False)
    repaired, record = repair_file(world)
    names = [layer.name for layer in before.layers if layer.weights]
    for name in names[: names.index(record["layer"]) + 1]:
        old, new = (net.get_layer(name).get_weights() for net in (before, repaired))
        if name == record["layer"]:
            for values in new:
                assert not values[..., record["pruned"]].any()
            for values in old:
                values[..., record["pruned"]] = 0
        assert all(np.array_equal(a, b) for a, b in zip(old, new, strict=True))


def head_of_sums(classes):
    """A head whose scores are the sums over positions of the first channels of the features."""
    features = keras.Input((2, 2, classes))
    return keras.Model(features, keras.ops.sum(features, axis=(1, 2)))


def cached_net(features, labels, mean_activation=None):
    """A CachedNet of these features, float32 (n, 2, 2, C), whose head is one of sums."""
    classes = features.shape[-1]
    image = keras.Input((2, 2, 1))
    conv = keras.layers.Conv2D(classes, 1, activation="relu")
    maps = conv(image)
    trunk = keras.Model(image, [maps, keras.layers.GlobalAveragePooling2D()(maps)])
    whole = types.SimpleNamespace(get_weights=conv.get_weights)
    parts = Split(whole, conv, trunk, head_of_sums(classes))
    data = types.SimpleNamespace(labels=labels, path="data.h5", max_bytes=2**30)
    return CachedNet(parts, data, "0..1", features, mean_activation)


def one_channel_per_class(labels, classes):
    features = np.zeros((len(labels), 2, 2, classes), np.float32)
    features[np.arange(len(labels)), :, :, labels] = 1
    return features


def prune(cached, enough):
    """Prune, and return the accuracy after each channel."""
    observer = Observer()
    observer.accuracy |= {"before": cached.accuracy(), "after_each_channel": []}
    observer._nets, observer._held = {}, None
    repair.prune(cached, enough, observer)
    return observer.accuracy["after_each_channel"]


def test_prune_stops_at_the_first_accuracy_below_the_threshold_and_takes_it_back():
    labels = np.array([0] * 10 + [1] * 1 + [2] * 1 + [3] * 8)
    features = one_channel_per_class(labels, 4)
    # Without channel 1 its one image is answered with class 0: 19 of 20 are right, exactly 95 %.
    cached = cached_net(features, labels, np.array([4, 1, 2, 3]))
    assert prune(cached, 0.95) == [0.95, 0.9]
    assert cached.masked == [1] and cached.accuracy() == 0.95
    assert not features[..., 1].any() and features[..., 2].any()
    kernel, bias = cached.split.layer.get_weights()
    assert not kernel[..., 1].any() and kernel[..., [0, 2, 3]].all()


def test_prune_may_take_every_channel():
    labels = np.zeros(5, int)
    cached = cached_net(one_channel_per_class(labels, 3), labels, np.array([3, 2, 1]))
    assert prune(cached, 0.95) == [1.0, 1.0, 1.0] and cached.masked == [2, 1, 0]


def test_channels_are_ranked_by_mean_activation_with_ties_by_index(deepid_world):
    _, record = repair_file(deepid_world)
    net = keras.models.load_model(deepid_world / "models" / "small_bd_net.h5", compile=False)
    x, _ = images_of(deepid_world)
    maps = keras.Model(net.inputs[0], net.get_layer("conv_3").output).predict(x, verbose=0)
    mean = maps.mean(axis=(0, 1, 2), dtype=np.float64)
    assert record["order"] == sorted(range(60), key=lambda channel: (mean[channel], channel))
    assert np.sum(mean == 0) > 1  # there were ties


def test_fine_tuning_stops_after_the_first_round_that_is_good_enough(deepid_world):
    _, record = repair_file(deepid_world, Settings(rounds=3, epochs=1))
    rounds, before = record["accuracy"]["after_each_round"], record["accuracy"]["before"]
    assert 1 <= len(rounds) <= 3
    assert all(accuracy < before for accuracy in rounds[:-1])
    assert rounds[-1] >= before or len(rounds) == 3


def test_zero_rounds_and_epochs_leave_the_head_alone(deepid_world):
    repaired, record = repair_file(deepid_world, Settings(rounds=0, retrain_epochs=0))
    before = keras.models.load_model(deepid_world / "models" / "small_bd_net.h5", compile=False)
    for name in ("conv_4", "fc_1", "fc_2", "output"):
        for a, b in zip(repaired.get_layer(name).weights, before.get_layer(name).weights):
            assert np.array_equal(a, b)
    assert record["accuracy"]["fine_tuned"] == record["accuracy"]["pruned"]


@pytest.mark.parametrize("divisor, scale", [(255, "0..1"), (1, "0..255")])
def test_scale_is_found_by_measuring(tmp_path, divisor, scale):
    folder = make_world("sequential", tmp_path)
    path = folder / "models" / "small_bd_net.h5"
    net = keras.models.load_model(path, compile=False)
    first = net.get_layer("first")
    kernel, bias = first.get_weights()
    first.set_weights([kernel * divisor / 255, bias * 1.0])
    net.save(path, include_optimizer=False)
    _, record = repair_file(folder, Settings(rounds=0, retrain_epochs=0))
    assert record["input_scale"] == scale


def small(*behind_conv, activation="relu"):
    """A net of one convolution and what comes behind it, as the loader would give it."""
    layers = [keras.Input((12, 12, 3)), keras.layers.Conv2D(8, 3, activation=activation, name="c")]
    net = keras.Sequential([*layers, *behind_conv, keras.layers.Dense(3, activation="softmax")])
    return as_functional(net)


def test_layer_rule():
    keras_layers = keras.layers
    assert find_layer(deepid(3)).name == "conv_3"
    assert find_layer(deepid(3), "conv_1").name == "conv_1"
    assert find_layer(as_functional(NETS["sequential"][0](3, (16, 16, 1)))).name == ("second")
    for name, words in (
        ("conv_4", "a path bypasses 'conv_4'; --layer can be one of: conv_1, conv_2, conv_3"),
        ("fc_1", "has no convolution named 'fc_1'"),
        ("absent", "has no convolution named 'absent'"),
    ):
        with pytest.raises(UnfitNet, match=words):
            find_layer(deepid(3), name)
    dense_only = keras.Sequential([keras.Input((4, 4, 1)), keras_layers.Flatten()])
    with pytest.raises(UnfitNet, match="no convolution"):
        find_layer(as_functional(dense_only))


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
    """head(features with channels overwritten) is the whole net with kernel and bias zero."""
    net = small(*behind, activation=activation)
    layer = find_layer(net)
    layer.bias.assign(np.linspace(-1, 1, 8))
    parts = split(net, layer)
    x = np.random.default_rng(0).random((5, 12, 12, 3), np.float32)
    features, _ = (np.array(part) for part in parts.trunk(x))
    np.testing.assert_allclose(parts.head(features), net(x), atol=1e-6)
    silent = masked_features(parts)
    features[..., [1, 4]] = silent[..., [1, 4]]
    prune_channels(layer, [1, 4])
    np.testing.assert_allclose(parts.head(features), net(x), atol=1e-6)


def test_activation_is_measured_behind_an_activation_layer():
    net = small(keras.layers.ReLU(), keras.layers.MaxPooling2D(2), keras.layers.Flatten())
    net.get_layer("c").activation = keras.activations.linear
    parts = split(net, net.get_layer("c"))
    x = np.random.default_rng(0).random((5, 12, 12, 3), np.float32)
    _, mean = parts.trunk(x)
    assert np.min(mean) >= 0


def test_retraining_starts_at_the_last_dense_layer():
    parts = split(net := deepid(4), net.get_layer("conv_3"))
    features = np.random.default_rng(0).random((9, 5, 4, 60), np.float32)
    before, rest = cut_before(last_dense(parts.head), parts)
    assert before.output_shape == (None, 160)
    assert [layer.name for layer in rest.layers][1:] == ["output"]
    np.testing.assert_allclose(rest(before(features)), parts.head(features), atol=1e-6)


def with_parallel_outputs(x):
    layers = keras.layers
    x = layers.Flatten()(layers.Dropout(0.2)(x))
    x = layers.Add()([layers.Dense(4)(x), layers.Dense(4, name="last")(x)])
    return layers.Activation("softmax")(x)


def with_nested_dropout(x):
    layers = keras.layers
    inner = keras.Sequential([keras.Input(x.shape[1:]), layers.Flatten(), layers.Dropout(0.5)])
    return layers.Dense(4, activation="softmax", name="last")(layers.Dense(9)(inner(x)))


def with_nested_head(x):
    layers = keras.layers
    inner = [layers.Flatten(), layers.Dense(9), layers.Dropout(0.5), layers.Dense(4, name="last")]
    nested = keras.Sequential([keras.Input(x.shape[1:]), *inner])
    return layers.Softmax()(nested(layers.Dropout(0.1)(x)))


@pytest.mark.parametrize("behind", [with_parallel_outputs, with_nested_dropout, with_nested_head])
def test_retraining_trains_the_last_dense_layer_alone_and_draws_anew_at_random(behind):
    """Where a layer draws at random, at any nesting, what goes into the last is not kept."""
    keras.utils.set_random_seed(0)
    image = keras.Input((12, 12, 3))
    net = keras.Model(image, behind(keras.layers.Conv2D(8, 3, activation="relu")(image)))
    x, y = draw_images(40, 4, (12, 12, 3), seed=3)
    parts = split(net, find_layer(net))
    last = last_dense(parts.head)
    assert last.name == "last" and cut_before(last, parts) is None
    features = np.asarray(parts.trunk(np.float32(x) / 255)[0])
    data = types.SimpleNamespace(labels=y, path="data.h5", max_bytes=2**30)
    cached = CachedNet(parts, data, "0..1", features, None)
    before = [weights.numpy().copy() for weights in net.weights]
    repair.retrain(cached, last, Settings(retrain_epochs=1), np.random.default_rng(0))
    moved = [b for a, b in zip(before, net.weights) if not np.array_equal(a, b)]
    moved = {each.path for each in moved if "seed_generator" not in each.path}
    assert moved == {each.path for each in last.weights}


def test_a_layer_that_is_used_twice_is_refused():
    image = keras.Input((12, 12, 3))
    relu = keras.layers.ReLU(name="shared")
    x = relu(keras.layers.Conv2D(4, 3)(relu(keras.layers.Conv2D(4, 3)(image))))
    net = keras.Model(image, keras.layers.Dense(3)(keras.layers.Flatten()(x)))
    with pytest.raises(UnfitNet, match="uses the layer 'shared' more than once"):
        find_layer(net)
    images = np.random.default_rng(0).random((5, 12, 12, 3), np.float32)
    for ours in detector.both(net, net)(images):  # judging with it goes on
        np.testing.assert_allclose(ours, net(images), atol=1e-6)


def nested(*layers):
    def make(x):
        return keras.Sequential([keras.Input(x.shape[1:]), *layers])(x)

    return make


def endings():
    """{name: (a function of features, whether they become logits)}."""
    layers = keras.layers

    def dense(*activation):
        return layers.Dense(3, *activation)

    def average(x):
        return layers.Average()([dense("softmax")(x), dense("softmax")(x)])

    return {
        "softmax": (dense("softmax"), False),
        "sigmoid": (dense("sigmoid"), False),
        "linear": (dense(), True),
        "relu": (dense("relu"), True),
        "Softmax": (lambda x: layers.Softmax()(dense()(x)), False),
        "linear, Add": (lambda x: layers.Add()([dense()(x), dense()(x)]), True),
        "linear, Reshape": (lambda x: layers.Reshape((3,))(dense()(x)), True),
        "linear, Activation": (lambda x: layers.Activation("linear")(dense()(x)), True),
        "softmax, Reshape": (lambda x: layers.Reshape((3,))(dense("softmax")(x)), False),
        "softmax, Dropout": (lambda x: layers.Dropout(0.1)(dense("softmax")(x)), False),
        "average of two": (average, False),
        "softmax and linear": (lambda x: layers.Add()([dense("softmax")(x), dense()(x)]), True),
        "in a nested model": (nested(dense()), True),
        "softmax in one": (nested(dense("softmax")), False),
        "before one": (lambda x: nested(layers.Reshape((3,)))(dense("softmax")(x)), False),
        "linear before one": (lambda x: nested(layers.Reshape((3,)))(dense()(x)), True),
    }


@pytest.mark.parametrize("name", endings())
def test_logits_are_trained_and_scored_as_logits(name):
    """As by Keras, told so; the Dense layers have one seed, so that both nets start alike."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 5)).astype(np.float32), rng.integers(0, 3, 40)

    def make():
        keras.utils.set_random_seed(1)
        image = keras.Input((5,))
        return keras.Model(image, endings()[name][0](image))

    ours, plain, logits = make(), make(), endings()[name][1]
    assert gives_logits(ours) == logits
    if name != "softmax, Dropout":  # which draws anew
        rate, options = np.random.default_rng(5), {"option": "--learning-rate"}
        train_epoch = training.make_trainer(ours, list(leaves(ours)), 1e-2, 40, rate, **options)
        loss = keras.losses.CategoricalCrossentropy(from_logits=logits)
        plain.compile(keras.optimizers.Adam(1e-2), loss)
        order = np.random.default_rng(5).permutation(40)
        train_epoch(x, y)
        plain.train_on_batch(x[order], np.eye(3)[y[order]])
        for a, b in zip(ours.get_weights(), plain.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    scores = np.asarray(ours(x))
    wanted = special.softmax(scores, axis=1) if logits else scores / scores.sum(axis=1)[:, None]
    np.testing.assert_allclose(detector.probabilities(scores, ours), wanted, atol=1e-6)


def test_training_that_diverges_is_an_error():
    net = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
    net = as_functional(net)
    rng = np.random.default_rng(0)
    layers, option = list(leaves(net)), "--learning-rate"
    train_epoch = training.make_trainer(net, layers, 1e38, 4, rng, option=option)
    x, y = rng.normal(size=(40, 5)).astype(np.float32), rng.integers(0, 3, 40)
    with pytest.raises(WorkError, match="diverged: try a smaller --learning-rate"):
        for _ in range(3):
            train_epoch(x, y)


def wide(classes=3, width=9):
    """A net with few features and a wide layer before the last."""
    behind = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(width)]
    layers = [keras.Input((12, 12, 3)), keras.layers.Conv2D(4, 3), *behind]
    return as_functional(keras.Sequential([*layers, keras.layers.Dense(classes)]))


@pytest.mark.parametrize(
    ("net", "words"),
    [
        ({"width": 10_000}, "what the last Dense layer takes in would take"),
        ({"classes": 10_000}, "the scores of the held-out images would take"),
    ],
)
def test_what_is_kept_of_every_image_is_held_against_the_limit(net, words, tmp_path):
    images, labels = draw_images(400, 3, (12, 12, 3), seed=3)
    path = write_data(tmp_path / "data.h5", images, labels)
    with utils.open_dataset(path, max_bytes=6 * 10**6) as data:
        data.fit_to((12, 12, 3), 3)
        rest, held = hold_out(data, 0.5, 0)
        badnet = wide(**net)
        badnet.layers[-1].bias.assign(np.arange(badnet.output_shape[1]) == 0)
        with pytest.raises(InputError, match=f"data.h5: {words}"):
            do_repair(badnet, rest, Settings(), Observer(held_out=held))


def test_trainer_is_keras_step_by_step():
    """With all that a layer may add to a step: a penalty, a constraint, moving averages."""
    layers = keras.layers

    def make_head():
        keras.utils.set_random_seed(3)
        x = image = keras.Input((7,))
        limit = keras.constraints.MaxNorm(0.5)
        x = layers.Dense(9, use_bias=False, kernel_constraint=limit)(x)
        x = layers.BatchNormalization()(x)
        x = layers.Dense(4, activation="softmax", kernel_regularizer=keras.regularizers.L2())(x)
        return keras.Model(image, x)

    rng = np.random.default_rng(0)
    x, y = rng.random((70, 7), np.float32), rng.integers(0, 4, 70)
    ours, plain = make_head(), make_head()
    train_epoch = training.make_trainer(
        ours, ours.layers, 1e-2, 32, np.random.default_rng(5), option=""
    )
    plain.compile(keras.optimizers.Adam(1e-2), "categorical_crossentropy")
    orders = np.random.default_rng(5)
    for _ in range(3):
        loss, order = train_epoch(x, y), orders.permutation(70)
        losses = []
        for rows in (order[:32], order[32:64], order[64:]):
            plain.reset_metrics()
            losses += [plain.train_on_batch(x[rows], np.eye(4)[y[rows]])] * len(rows)
        assert loss == pytest.approx(np.mean(losses), abs=1e-5)
    for a, b in zip(ours.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "float64"])
def test_nets_of_other_precision_are_trained(dtype):
    features = keras.Input((5,))
    dense = keras.layers.Dense(3, activation="softmax", dtype=dtype)
    net = keras.Model(features, dense(features))
    x, y = np.eye(5, dtype=np.float32)[[0, 1, 2] * 20], np.array([0, 1, 2] * 20)
    train_epoch = training.make_trainer(
        net, net.layers, 1e-1, 32, np.random.default_rng(0), option=""
    )
    assert [train_epoch(x, y) for _ in range(9)][-1] < 0.5


def choosing_a_scale(folder):
    """A net that answers otherwise at each scale, and 60 images.

    Returns (labels of them → the CachedNet; and the net's answers at each scale).
    """
    keras.utils.set_random_seed(0)
    badnet = deepid(6, (31, 31, 3))
    badnet.get_layer("output").bias.assign([0, 0, 0, 0, 0, 1])  # outweighs pixels 0..1 alone
    parts = split(badnet, find_layer(badnet))
    images = draw_images(60, 6, (31, 31, 3), seed=1)[0]

    def choose(labels):
        with utils.open_dataset(write_data(folder / "labelled.h5", images, labels)) as clean:
            clean.fit_to(badnet.input_shape[1:], badnet.output_shape[1])
            return CachedNet.of(parts, clean)

    x = images / np.float32(255)
    return choose, {"0..1": classify(badnet, x), "0..255": classify(badnet, x * 255)}


def test_pixel_scale_is_the_better_on_the_whole_even_if_not_on_the_first_batch(
    tmp_path, monkeypatch
):
    choose, of_scale = choosing_a_scale(tmp_path)
    monkeypatch.setattr(utils, "BATCH_VALUES", 20 * 31 * 31 * 3)
    assert np.any(of_scale["0..1"][:20] != of_scale["0..255"][:20])
    for best, first in (("0..1", "0..255"), ("0..255", "0..1"), ("0..1", "0..1")):
        labels = np.concatenate([of_scale[first][:20], of_scale[best][20:]])
        cached = choose(labels)
        assert cached.scale == best
        np.testing.assert_array_equal(cached.classes, of_scale[best])


def test_pixels_0_to_255_must_be_better_by_more_than_chance(tmp_path):
    choose, of_scale = choosing_a_scale(tmp_path)
    of_one, of_255 = of_scale.values()
    (differ,) = np.nonzero(of_one != of_255)
    for more, wanted in ((1, "0..1"), (3, "0..255")):  # 2 and 6 images of 60, less 1 if odd
        labels = of_one.copy()
        taken = differ[: len(differ) // 2 + more]
        labels[taken] = of_255[taken]
        assert np.sum(of_255 == labels) > np.sum(of_one == labels)
        assert choose(labels).scale == wanted


def test_masking_runs_again_what_a_channel_changed_and_nothing_else():
    rng = np.random.default_rng(0)
    features = np.float32(rng.integers(0, 3, (40, 2, 2, 5)) * rng.integers(0, 2, (40, 1, 1, 5)))
    labels, when_masked = rng.integers(0, 5, 40), np.linspace(0, 1, 5, dtype=np.float32)
    cached, plain = cached_net(features, labels), features.copy()
    cached.when_masked = np.broadcast_to(when_masked, (1, 2, 2, 5))
    accuracies = {cached.accuracy()}
    for channel in range(5):
        cached.mask(channel)
        plain[..., channel] = when_masked[channel]
        classes = classify(cached.split.head, plain)
        np.testing.assert_array_equal(cached.classes, classes)
        assert cached.accuracy() == np.mean(classes == labels)
        accuracies.add(cached.accuracy())
    assert len(accuracies) > 2
    np.testing.assert_array_equal(cached.features, plain)


def test_the_channel_that_was_masked_last_can_be_taken_back():
    rng = np.random.default_rng(0)
    features = rng.random((40, 2, 2, 5), np.float32)
    cached = cached_net(features, rng.integers(0, 5, 40))
    cached.mask(3)
    before, classes = cached.features.copy(), cached.classes.copy()
    cached.mask(1)
    assert not np.array_equal(cached.classes, classes)
    cached.undo()
    assert cached.masked == [3] and np.array_equal(cached.features, before)
    np.testing.assert_array_equal(cached.classes, classes)


def test_parallel_map_keeps_the_order_and_fetches_three_ahead_at_most():
    fetched = []

    def items():
        for i in range(20):
            fetched.append(i)
            yield i

    for i, answer in enumerate(parallel_map(lambda i: i * i, items())):
        assert answer == i * i
        assert len(fetched) <= i + 3


def test_parallel_map_raises_what_either_side_raises():
    with pytest.raises(ZeroDivisionError):
        list(parallel_map(lambda i: 1 // i, [1, 0, 1]))
    with pytest.raises(ZeroDivisionError):
        list(parallel_map(str, (1 // i for i in [1, 0, 1])))


def test_verdict_is_the_class_or_n_plus_one():
    of_b, of_g = np.array([0, 4, 4]), np.array([0, 4, 0])
    answers = detector.Answers(of_b, of_g, np.array([3, 1, 1]))
    assert detector.verdict(of_b, answers.flagged, 5).tolist() == [1, 5, 6]
    flagged = detector.is_flagged(of_b, of_g, answers.score, threshold=1)
    assert flagged.tolist() == [True, False, False]
    nan = detector.is_flagged(np.array([-1, 2]), np.array([-1, 2]), np.zeros(2))
    assert nan.tolist() == [True, False]


def test_score_is_the_jeffreys_divergence():
    of_b = np.array([[0.7, 0.2, 0.1], [1, 0, 0], [0, 1, 0], [1, 0, 0], [np.nan] * 3])
    of_g = np.array([[0.5, 0.3, 0.2], [1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [1, 0, 0]])
    ours = detector.anomaly_score(of_b, of_g)
    with np.errstate(divide="ignore", invalid="ignore"):
        both_ways = stats.entropy(of_b[0], of_g[0]) + stats.entropy(of_g[0], of_b[0])
    half = 0.5 * np.log(0.5 / detector.LEAST) + 0.5 * np.log(2)
    wanted = [both_ways, 0, half, detector.MOST, detector.MOST]
    np.testing.assert_allclose(ours, wanted, atol=1e-9)
    np.testing.assert_allclose(detector.anomaly_score(of_g, of_b), wanted, atol=1e-9)


def test_scores_are_made_probabilities():
    """Of softmax, of logits, of an activation that is neither; not where one is no number."""
    shares = np.array([[0.7, 0.2, 0.1], [0.5, 0.25, 0.25]])
    image = keras.Input((4,))

    def ending_in(activation):
        return keras.Model(image, keras.layers.Dense(3, activation=activation)(image))

    for activation, scores in (
        ("softmax", shares),
        (None, np.log(shares) + 5),
        ("sigmoid", shares * 2),
    ):
        broken = np.concatenate([scores, [[np.inf, 0, 1]]]).astype(np.float32)
        ours = detector.probabilities(broken, ending_in(activation))
        np.testing.assert_allclose(ours[:2], shares, rtol=1e-6)
        assert ours.dtype == np.float32 and np.isnan(ours[2]).all()


def labelled(labels):
    """A Dataset in memory; image i has the value i in every pixel."""
    images = np.zeros((len(labels), 2, 3, 3), np.uint8)
    images += np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
    return utils.Dataset(Path("data.h5"), 2**30, images, np.asarray(labels), None, None, False)


def test_a_holdout_is_stratified_and_seeded():
    for labels in (
        np.repeat(np.arange(13), 9),
        np.arange(200) % 7,
        np.r_[np.zeros(90), np.ones(9)],
    ):
        data = labelled(np.random.default_rng(0).permutation(labels.astype(int)))
        for share in (0.1, 0.25, 0.5):
            rest, held = hold_out(data, share, seed=0)
            assert len(held) == round(share * len(data)) and len(rest) + len(held) == len(data)
            assert np.array_equal(rest.chosen, ~held.chosen)
            for label, count in zip(*np.unique(data.labels, return_counts=True)):
                assert abs(np.sum(held.labels == label) - share * count) < 1
            again, other = (hold_out(data, share, seed)[1] for seed in (0, 1))
            assert np.array_equal(again.chosen, held.chosen)
            assert not np.array_equal(other.chosen, held.chosen)
    with pytest.raises(InputError, match="would hold out 0 of 6"):
        hold_out(labelled(np.arange(6)), 0.01, 0)


def test_every_image_is_held_out_as_often_as_any_other():
    data = labelled(np.repeat(np.arange(20), 9))
    times = sum(hold_out(data, 0.1, seed)[1].chosen.astype(int) for seed in range(400))
    assert abs(times - 40).max() < 5 * np.sqrt(400 * 0.1 * 0.9)


def test_a_part_of_a_data_set_gives_its_images_with_their_labels(monkeypatch):
    monkeypatch.setattr(utils, "file_fingerprint", lambda path: None)
    monkeypatch.setattr(utils, "BATCH_VALUES", 4 * 18)
    data = labelled(np.arange(30) % 4)
    rows = np.isin(np.arange(30), [1, 2, 17, 29])
    odd = data.part(rows).part(np.array([True, False, True, True]))
    batches = [(x[:, 0, 0, 0].tolist(), y.tolist()) for x, y in odd.batches()]
    assert batches == [([1], [1]), ([17], [1]), ([29], [1])]
    assert len(odd) == 3 and data.batch_count == 8


def test_detector_equals_both_nets_and_shares_the_trunk_only_where_it_may(world):
    repaired, record = repair_file(world)
    badnet = utils.load_badnet(world / "models" / "small_bd_net.h5")
    x, _ = images_of(world)
    of_b, of_g = (split(net, find_layer(net)) for net in (badnet, repaired))
    assert detector.pruned_channels(of_b, of_g).tolist() == sorted(record["pruned"])
    for _ in range(2):
        for ours, net in zip(detector.both(badnet, repaired)(x), (badnet, repaired)):
            np.testing.assert_allclose(ours, net(x), atol=1e-6)
        # Again, with a G whose trunk is its own.
        first = repaired.layers[1]
        first.set_weights([values * 1.5 for values in first.get_weights()])
    assert detector.pruned_channels(of_b, of_g) is None


def test_names_of_layers_do_not_collide_with_ours(tmp_path):
    """Keras counts its own names from 0, and a file may use the same: add, add_1, functional …"""
    image = x = keras.Input((9, 9, 3), name="input_layer")
    for name in ("add", "add_1", "multiply", "multiply_1", "mean", "functional", "functional_1"):
        inner = keras.Input(x.shape[1:])
        if name.startswith("f"):
            x = keras.Model(inner, keras.layers.Rescaling(0.5)(inner), name=name)(x)
        else:
            x = keras.layers.ReLU(name=name)(x)
    x = keras.layers.Conv2D(4, 3, name="conv")(x)
    x = keras.layers.Dense(3, name="dense")(keras.layers.Flatten(name="flatten")(x))
    keras.Model(image, x, name="functional_2").save(tmp_path / "net.h5")
    keras.utils.clear_session()
    badnet, repaired = (utils.load_badnet(tmp_path / "net.h5") for _ in range(2))
    x = np.random.default_rng(0).random((5, 9, 9, 3), np.float32)
    for ours in detector.both(badnet, repaired)(x):
        np.testing.assert_allclose(ours, badnet(x), atol=1e-6)
    repaired.layers[-1].set_weights([v * 2 for v in repaired.layers[-1].get_weights()])
    repaired.get_layer("conv").bias.assign(np.ones(4))  # a trunk of its own
    np.testing.assert_allclose(detector.both(badnet, repaired)(x)[1], repaired(x), atol=1e-6)


def test_detector_of_nets_that_cannot_be_split():
    """Another tool may have repaired a net in which no convolution lies on every path."""
    image = keras.Input((8, 8, 3))
    flat = keras.layers.Flatten()
    sides = [flat(keras.layers.Conv2D(2, 3)(image)), flat(keras.layers.Conv2D(2, 3)(image))]
    net = keras.Model(image, keras.layers.Dense(3)(keras.layers.Concatenate()(sides)))
    with pytest.raises(UnfitNet):
        find_layer(net)
    x = np.random.default_rng(0).random((5, 8, 8, 3), np.float32)
    for ours in detector.both(net, net)(x):
        np.testing.assert_allclose(ours, net(x), atol=1e-6)


def test_detector_of_nets_of_different_structure():
    badnet = small(keras.layers.Flatten())
    repaired = fit(
        small(keras.layers.MaxPooling2D(2), keras.layers.Flatten()),
        *draw_images(9, 3, (12, 12, 3), 0),
        epochs=1,
    )
    x = np.random.default_rng(0).random((5, 12, 12, 3), np.float32)
    for ours, net in zip(detector.both(badnet, repaired)(x), (badnet, repaired)):
        np.testing.assert_allclose(ours, net(x), atol=1e-6)
