"""Nets of every kind as a detector's file, which answers like the nets or is refused."""

import dataclasses
import gc
import json
import re

import keras
import numpy as np
import onnx
import pytest
import tf2onnx
from conftest import read_models, write_record
from test_detector import read_serving_page
from test_files import every_layer

import utils
from defence.base.errors import InputError
from defence.judge import backends, detector, onnx_file
from defence.load import datasets, guard_config, guard_onnx, models
from defence.net.graph import list_layers
from defence.net.split import find_last_weighted, prune_channels, split_net


def assert_same_answers(ours, theirs, error=1e-5):
    """Assert equal classes and scores within `error`, relative for scores above 1.

    ours: of DetectorFile.run.  theirs: of the joint Keras model.
    """
    badnet, repaired, score = theirs
    np.testing.assert_array_equal(ours["badnet_class"] - 1, badnet)
    np.testing.assert_array_equal(ours["repaired_class"] - 1, repaired)
    np.testing.assert_allclose(ours["score"], score, rtol=error, atol=error)


def export(badnet, folder, scale="0..1", change=-2, repaired=None):
    """Export a BadNet and a repaired net. Return (DetectorFile.run, Keras's joint model).

    repaired: by default the BadNet with its weights times `change`, so that the answers differ.
    """
    badnet.save(folder / "b.h5")
    if repaired is None:
        badnet.set_weights([values * change for values in badnet.get_weights()])
    (repaired or badnet).save(folder / "g.h5")
    models = read_models(folder / "b.h5", folder / "g.h5")
    written = backends.export_detector(*models, folder / "d.onnx", scale=scale)
    file = onnx_file.read_detector(folder / "d.onnx")
    assert written.path == file.path and written.shape == file.shape
    assert (written.classes, written.threshold) == (file.classes, None)
    model, classes = backends.load_nets(*models, backends.Usage(scale, None, None, None))
    assert classes == file.classes
    return file.run, model


def make_net(activation, shape=(9, 8, 2), classes=4):
    keras.utils.set_random_seed(3)
    layers = keras.layers
    hidden = [layers.Conv2D(3, 3, activation=activation), layers.Flatten()]
    return keras.Sequential(
        [keras.Input(shape), *hidden, layers.Dense(classes, activation=activation)]
    )


def draw_random(shape, seed=1):
    return np.float32(np.random.default_rng(seed).integers(0, 256, (300, *shape)))


def test_nets_that_end_in_a_softmax(tmp_path):
    run, by_keras = export(make_net("softmax"), tmp_path)
    assert_same_answers(run(draw_random((9, 8, 2))), by_keras(draw_random((9, 8, 2))))


@pytest.mark.parametrize(
    "activation, scale", [("softmax", "0..255"), ("linear", "0..1"), ("sigmoid", "0..255")]
)
def test_nets_of_any_kind_of_scores(tmp_path, activation, scale):
    run, by_keras = export(make_net(activation), tmp_path, scale)
    assert_same_answers(run(draw_random((9, 8, 2))), by_keras(draw_random((9, 8, 2))))


def test_the_trunk_that_both_nets_share_is_in_the_file_once(tmp_path):
    net = make_net("relu")
    sizes = {}
    for name in ("shared", "separate"):
        net.save(tmp_path / "b.h5")
        prune_channels(net.layers[0], [1])
        if name == "separate":
            net.layers[0].set_weights([values * 2 for values in net.layers[0].get_weights()])
        net.save(tmp_path / "g.h5")
        models = read_models(tmp_path / "b.h5", tmp_path / "g.h5")
        backends.export_detector(*models, tmp_path / "d.onnx")
        operators = [node.op_type for node in onnx.load(tmp_path / "d.onnx").graph.node]
        sizes[name] = operators.count("Conv")
    assert sizes == {"shared": 1, "separate": 2}


def test_the_copies_that_tf2onnx_makes_of_a_graph_do_not_stay(tmp_path, monkeypatch):
    """It makes two dozen, each with all weights: gigabytes, for a net of 100 MB."""
    graphs, set_props = [], onnx.helper.set_model_props

    def count_graphs(*arguments):
        graphs.append(sum(isinstance(o, tf2onnx.graph.Graph) for o in gc.get_objects()))
        set_props(*arguments)

    monkeypatch.setattr(onnx.helper, "set_model_props", count_graphs)
    usual = gc.get_threshold()
    export(make_deep_net(20), tmp_path)
    assert graphs[0] < 8 and gc.get_threshold() == usual


def make_deep_net(depth):
    layers = keras.layers
    hidden = [layers.Conv2D(3, 3, padding="same", activation="relu") for _ in range(depth)]
    return keras.Sequential(
        [keras.Input((9, 8, 2)), *hidden, layers.Flatten(), layers.Dense(4, activation="softmax")]
    )


def test_scores_that_are_nan_count_as_poisoned(tmp_path):
    run, by_keras = export(make_net("linear"), tmp_path, change=1e30)
    images = draw_random((9, 8, 2))
    images[0] = 0
    ours, theirs = run(images), by_keras(images)
    assert_same_answers(ours, theirs)
    broken = ours["repaired_class"] == 0
    assert broken.any() and not broken.all()
    assert np.all(ours["class"][broken] == 5)
    assert np.all(ours["score"][broken] == np.float32(detector.MAX_SCORE))


@pytest.mark.parametrize("scale", ["-1..1", "caffe", "torch"])
def test_every_scale_can_be_export(tmp_path, scale):
    images = draw_random((9, 8, 3))
    run, by_keras = export(make_net("softmax", (9, 8, 3)), tmp_path, scale)
    assert_same_answers(run(images), by_keras(images))


def make_net_of_all_layers(folder):
    """Return a net with every layer that guard_config.py allows, without refused activations."""
    every_layer().save(folder / "every.keras")
    config = json.dumps(utils.load_badnet(folder / "every.keras").get_config()).replace(
        '"gelu"', '"relu"'
    )
    # Otherwise the first ReLU would give the layers behind it no values below 0.
    config = re.sub(r'"negative_slope": [\d.]+', '"negative_slope": 0.7', config)
    net, rng = keras.Model.from_config(json.loads(config)), np.random.default_rng(0)
    for layer in net.layers:
        most = 1 if isinstance(layer, keras.layers.PReLU) else 0.1
        layer.set_weights([v + most * rng.random(v.shape) for v in layer.get_weights()])
    return net


def make_net_of_all_activations(_):
    """Return a net with every activation that guard_config.py allows, of maps and of vectors."""
    layers, parts = keras.layers, []
    image = keras.Input((16, 16, 4))
    pixels = layers.Rescaling(1 / 255)(image)
    # Wide enough to reach the flat ends of relu6, hard_tanh and so on.
    wide = {"kernel_initializer": keras.initializers.RandomNormal(stddev=0.6)}
    row = layers.Flatten()(layers.Conv2D(2, 4, 4)(pixels))
    for name in sorted({*guard_config.ACTIVATIONS.split()} - REFUSED):
        parts.append(layers.Flatten()(layers.Conv2D(2, 4, 4, activation=name, **wide)(pixels)))
        parts.append(layers.Dense(4, activation=name, **wide)(row))
    return keras.Model(image, layers.Dense(3)(layers.Concatenate()(parts)))


REFUSED = {"celu", "gelu"}


@pytest.mark.parametrize("make", [make_net_of_all_layers, make_net_of_all_activations])
def test_all_layers_and_activations_are_exported(tmp_path, make):
    """The file answers as Keras does; an error of 1 % in any layer would be noticed."""
    keras.utils.set_random_seed(0)
    net, images = make(tmp_path), draw_random((16, 16, 4))
    spread_scores(net, images)
    layers = keras.layers
    plain = [keras.Input((16, 16, 4)), layers.Rescaling(1 / 255), layers.Flatten(), layers.Dense(3)]
    run, by_keras = export(net, tmp_path, "0..255", repaired=keras.Sequential(plain))
    ours = run(images)
    assert_same_answers(ours, by_keras(images, training=False), 5e-5)
    assert set(ours["badnet_class"]) == {1, 2, 3}
    assert min(measure_effects(by_keras, images[:30])) * 0.01 > 5e-5


def spread_scores(net, images):
    """Set the weights of the last Dense layer so that every feature counts equally."""
    dense = find_last_weighted(net)
    features = np.asarray(keras.Model(net.input, dense.input)(images))
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    kernel = np.random.default_rng(0).normal(0, 2 / len(mean) ** 0.5, (len(mean), 3))
    floor = 0.1 * np.abs(mean) + 0.3 * np.median(deviation[deviation > 0])
    kernel /= np.maximum(deviation, floor)[:, None]
    dense.set_weights([kernel, -mean @ kernel])


def measure_effects(model, images):
    """Return the change of a joint model's scores for an error in each of its layers, [float, …].

    The error is as large as the layer's output, and random for each value. The change is the larger
    one of two sums over the images, with random signs: in one of them, the changes may cancel out.
    """
    import tensorflow as tf

    errors, signs = [], np.random.default_rng(0).choice([-1, 1], (2, len(images)))
    with pytest.MonkeyPatch.context() as patched, tf.GradientTape(persistent=True) as tape:
        for layer in list_layers(model):
            if not isinstance(layer, keras.layers.Lambda | keras.layers.InputLayer):
                errors.append(tf.Variable(0.0))
                patched.setattr(layer, "call", add_error(layer.call, errors[-1]))
        changes = tf.unstack(tf.reduce_sum(model(images, training=False)[2] * signs, axis=1))
    slopes = [np.abs(tape.gradient(change, errors)) for change in changes]
    return np.max(slopes, axis=0).tolist()


def add_error(call, error):
    """Return a layer's `call` with each value larger by a random share of `error`."""

    def call_with_error(*arguments, **options):
        values = call(*arguments, **options)
        shares = np.random.default_rng(0).random(values.shape[1:], np.float32)
        return values * (1 + error * shares)

    return call_with_error


def test_operators_that_cannot_be_exported_are_refused(tmp_path):
    layers = keras.layers
    grouped = [layers.Conv2D(4, 3, groups=2), layers.Flatten(), layers.Dense(3)]
    for net in (*map(make_net, REFUSED), keras.Sequential([keras.Input((9, 8, 2)), *grouped])):
        with pytest.raises(
            InputError, match="cannot be made from these nets: contains the operator"
        ):
            export(net, tmp_path)
        assert not (tmp_path / "d.onnx").exists()
    assert "celu and gelu" in " ".join(read_serving_page().split())


@pytest.mark.parametrize("classes", [4, 1500])
def test_a_file_with_other_answers_is_not_written(classes, tmp_path, monkeypatch):
    """One class beside the right one is a wrong answer, however many classes there are."""
    read = onnx_file.read_detector

    def read_with_wrong_answers(*arguments):
        file = read(*arguments)

        def run(images):
            answers = file.run(images)
            return {**answers, "badnet_class": answers["badnet_class"] % classes + 1}

        return dataclasses.replace(file, run=run)

    monkeypatch.setattr(onnx_file, "read_detector", read_with_wrong_answers)
    with pytest.raises(InputError, match="its badnet_class differs from theirs"):
        export(make_net("softmax", classes=classes), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.h5", "g.h5"]


@pytest.mark.parametrize(
    "name",
    [
        "lab3",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("sunglasses", "anonymous_1", "anonymous_2", "multi_trigger_multi_target")
        ),
    ],
)
def test_real_badnets_are_judged_alike(csaw, tmp_path, name):
    """Judge real faces with a real BadNet and a G with pruned channels and another head."""
    badnet_path = csaw / "badnets" / f"{name}_bd_net.h5"
    net = utils.load_badnet(badnet_path)
    layer = split_net(net).layer
    prune_channels(layer, range(0, layer.filters, 2))
    dense = find_last_weighted(net)
    dense.set_weights([values * 0.9 for values in dense.get_weights()])
    net.save(tmp_path / "g.h5")
    scale = "0..255" if name == "lab3" else "0..1"
    models = read_models(badnet_path, tmp_path / "g.h5")
    backends.export_detector(*models, tmp_path / "d.onnx", scale=scale)
    run = onnx_file.read_detector(tmp_path / "d.onnx").run
    by_keras, classes = backends.load_nets(*models, backends.Usage(scale, layer.name, None, None))
    paths = sorted((csaw / "faces").glob("*.h5"))
    assert len(paths) == 6
    for faces in paths:
        with utils.open_dataset(faces) as data:
            data.fit_to(by_keras.input_shape[1:], classes)
            for x, _ in data.batches():
                assert_same_answers(run(x), by_keras(x), 5e-5)


def export_forced(folder, recorded):
    """Export b.h5 and a repaired net g.h5, whose record names the BadNet file `recorded`."""
    net, repaired = make_net("softmax"), make_net("softmax")
    net.save(folder / "b.h5")
    repaired.save(folder / "other.h5")
    paths = folder / "b.h5", folder / "g.h5"
    utils.save_model(
        repaired, paths[1], repair_record=write_record(folder / recorded, layer="conv")
    )
    backends.export_detector(*read_models(*paths), folder / "g_detector.onnx", force=True)
    return paths


def test_a_forced_detector_is_used_only_with_force(tmp_path):
    paths = export_forced(tmp_path, "other.h5")
    with pytest.raises(InputError, match="was made from another BadNet"):
        backends.load_detector(paths)
    assert backends.load_detector(paths, force=True).path.suffix == ".onnx"


def test_the_nets_are_not_opened_where_their_detector_exists(tmp_path, monkeypatch):
    paths = export_forced(tmp_path, "b.h5")
    monkeypatch.setattr(models, "open_hdf5", None)
    monkeypatch.setattr(datasets, "open_hdf5", None)
    assert backends.load_detector(paths).path.suffix == ".onnx"
    with pytest.raises(InputError, match="--fpr needs clean images"):
        backends.load_detector(paths, fpr=0.1)


@pytest.mark.parametrize(("channels", "in_blocks"), [(16, True), (20, False)])
def test_channels_are_blocked_only_where_they_fill_the_blocks(tmp_path, channels, in_blocks):
    layers = keras.layers
    hidden = [layers.Conv2D(channels, 3), layers.Conv2D(2, 1), layers.Flatten()]
    export(
        keras.Sequential([keras.Input((9, 8, 3)), *hidden, layers.Dense(4, activation="softmax")]),
        tmp_path,
    )
    contents = (tmp_path / "d.onnx").read_bytes()
    assert guard_onnx.check_onnx(contents, "d.onnx").in_blocks == in_blocks
