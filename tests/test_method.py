"""The fast path equals the report's loop. Training, scores, verdicts, held-out images."""

import shutil
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import reference
from conftest import do_repair, draw_images, make_world, write_data
from scipy import stats

import utils
from defence.base.errors import InputError, WorkError
from defence.beyond import check
from defence.beyond.observer import Observer
from defence.beyond.settings import Settings
from defence.judge import detector
from defence.load import datasets
from defence.load.architecture import make_functional
from defence.load.datasets import hold_out
from defence.net import training
from defence.net.cached_net import CachedNet
from defence.net.graph import list_layers
from defence.net.inference import map_in_parallel
from defence.net.split import split_net


def repair_file(folder, settings=None):
    """Repair the net of a world. Return (G, record)."""
    badnet = utils.load_badnet(folder / "models" / "small_bd_net.h5")
    with utils.open_dataset(folder / "clean.h5") as clean:
        clean.fit_to(badnet.input_shape[1:], badnet.output_shape[1])
        return badnet, do_repair(badnet, clean, settings)


def read_images(folder):
    with h5py.File(folder / "clean.h5") as file:
        return np.moveaxis(file["data"][:], 1, 3).astype(np.float32) / 255, file["label"][:]


@pytest.mark.parametrize("seed, mislabelled", [(0, 0), (7, 30)])
def test_fast_path_equals_reference(world, tmp_path, seed, mislabelled):
    """Channels and accuracies are equal, weights up to float32 rounding, which Adam amplifies.

    Thresholds are relative to B's accuracy, so one case has a B with errors.
    """
    folder = shutil.copytree(world, tmp_path / "world")
    with h5py.File(folder / "clean.h5", "r+") as file:
        file["label"][:mislabelled] = (file["label"][:mislabelled] + 1) % 6
    settings = Settings(seed=seed, epochs=2, rounds=2, learning_rate=1e-4)
    repaired, record = repair_file(folder, settings)
    plain = keras.models.load_model(folder / "models" / "small_bd_net.h5", compile=False)
    x, y = read_images(folder)
    assert record["accuracy"]["before"] == 1 - mislabelled / len(y)
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
    reseeded = repair_file(deepid_world, Settings(seed=1))[0].get_weights()
    assert any(a.tobytes() != b.tobytes() for a, b in zip(first, reseeded, strict=True))


def test_pruned_channels_are_zero_and_the_trunk_is_untouched(world):
    before = keras.models.load_model(world / "models" / "small_bd_net.h5", compile=False)
    repaired, record = repair_file(world)
    assert record["pruned"] and all(layer.trainable for layer in repaired.layers)
    names = [layer.name for layer in before.layers if layer.weights]
    for name in names[: names.index(record["layer"]) + 1]:
        old, new = (net.get_layer(name).get_weights() for net in (before, repaired))
        if name == record["layer"]:
            for values in new:
                assert not values[..., record["pruned"]].any()
            for values in old:
                values[..., record["pruned"]] = 0
        assert all(np.array_equal(a, b) for a, b in zip(old, new, strict=True))


def test_channels_are_ranked_by_mean_activation_with_ties_by_index(deepid_world):
    _, record = repair_file(deepid_world)
    net = keras.models.load_model(deepid_world / "models" / "small_bd_net.h5", compile=False)
    x, _ = read_images(deepid_world)
    maps = keras.Model(net.inputs[0], net.get_layer("conv_3").output).predict(x, verbose=0)
    mean = maps.mean(axis=(0, 1, 2), dtype=np.float64)
    assert record["order"] == sorted(range(60), key=lambda channel: (mean[channel], channel))
    assert np.sum(mean == 0) > 1  # there were ties


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


def make_wide(classes=3, width=9):
    """Return a net with few features and a wide layer before the last."""
    behind = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(width)]
    layers = [keras.Input((12, 12, 3)), keras.layers.Conv2D(4, 3), *behind]
    return make_functional(keras.Sequential([*layers, keras.layers.Dense(classes)]))


@pytest.mark.parametrize(
    ("net", "words"),
    [
        ({"width": 10_000}, "the input of the last layer would take"),
        ({"classes": 10_000}, "the scores of the held-out images would take"),
    ],
)
def test_arrays_of_all_images_are_checked_against_the_limit(net, words, tmp_path, full_disk):
    images, labels = draw_images(400, 3, (12, 12, 3), seed=3)
    path = write_data(tmp_path / "data.h5", images, labels)
    with utils.open_dataset(path, max_bytes=6 * 10**6) as data:
        data.fit_to((12, 12, 3), 3)
        clean, held_out = hold_out(data, 0.5, 0)
        badnet = make_wide(**net)
        badnet.layers[-1].bias.assign(np.arange(badnet.output_shape[1]) == 0)
        with pytest.raises(InputError, match=f"data.h5: {words}"):
            do_repair(badnet, clean, Settings(), Observer(held_out=held_out))


def test_a_net_that_is_never_right_cannot_be_repaired(tmp_path):
    images, _ = draw_images(20, 3, (12, 12, 3), seed=3)
    badnet = make_wide()
    badnet.layers[-1].bias.assign([1e9, 0, 0])
    with utils.open_dataset(write_data(tmp_path / "data.h5", images, np.ones(20))) as data:
        data.fit_to((12, 12, 3), 3)
        cached = CachedNet.from_dataset(split_net(badnet), data)
        with pytest.raises(InputError, match="data.h5: the BadNet answers none of its images"):
            check.refuse_unfit(cached, harden=False)


def test_training_that_diverges_is_an_error():
    net = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
    net = make_functional(net)
    rng = np.random.default_rng(0)
    layers, option = list(list_layers(net)), "--learning-rate"
    train_epoch = training.make_trainer(net, layers, 1e38, 4, rng, option=option)
    x, y = rng.normal(size=(40, 5)).astype(np.float32), rng.integers(0, 3, 40)
    with pytest.raises(WorkError, match="diverged: try a smaller --learning-rate"):
        for _ in range(3):
            train_epoch(x, y)


def test_the_trainer_equals_keras_step_by_step():
    """The layers add to the step a penalty, a constraint and moving averages."""
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


def test_parallel_map_keeps_the_order_and_fetches_three_ahead_at_most():
    fetched = []

    def items():
        for i in range(20):
            fetched.append(i)
            yield i

    for i, answer in enumerate(map_in_parallel(lambda i: i * i, items())):
        assert answer == i * i
        assert len(fetched) <= i + 3


def test_parallel_map_raises_the_errors_of_both_sides():
    with pytest.raises(ZeroDivisionError):
        list(map_in_parallel(lambda i: 1 // i, [1, 0, 1]))
    with pytest.raises(ZeroDivisionError):
        list(map_in_parallel(str, (1 // i for i in [1, 0, 1])))


def test_verdict_is_the_class_or_n_plus_one():
    of_b, of_g = np.array([0, 4, 4]), np.array([0, 4, 0])
    answers = detector.Answers(of_b, of_g, np.array([3, 1, 1]))
    assert detector.compute_verdict(of_b, answers.flagged, 5).tolist() == [1, 5, 6]
    flagged = detector.is_flagged(of_b, of_g, answers.score, threshold=1)
    assert flagged.tolist() == [True, False, False]
    nan = detector.is_flagged(np.array([-1, 2]), np.array([-1, 2]), np.zeros(2))
    assert nan.tolist() == [True, False]


def test_the_score_is_a_weighted_divergence():
    of_b = np.array([[0.7, 0.2, 0.1], [1, 0, 0], [0, 1, 0], [1, 0, 0], [np.nan] * 3])
    of_g = np.array([[0.5, 0.3, 0.2], [1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [1, 0, 0]])
    ours = detector.score_anomaly(of_b, of_g)
    with np.errstate(divide="ignore", invalid="ignore"):
        divergence = 1.2 * stats.entropy(of_b[0], of_g[0]) + stats.entropy(of_g[0], of_b[0])
    half = 0.5 * np.log(0.5 / detector.MIN_PROBABILITY) + (1.2 - 0.5) * np.log(2)
    expected = [divergence, 0, half, detector.MAX_SCORE, detector.MAX_SCORE]
    np.testing.assert_allclose(ours, expected, atol=1e-9)
    alike = np.random.default_rng(0).dirichlet(np.ones(9), 100).astype(np.float32)
    rounded = np.float32(1 + 1e-5) * alike  # so much more than 1 in all that the sum is below 0
    assert np.all(np.asarray(detector.score_anomaly(alike, rounded)) == 0)


def test_scores_become_probabilities():
    """Scores are of a softmax, logits or another activation; NaN or infinity gives NaN."""
    shares = np.array([[0.7, 0.2, 0.1], [0.5, 0.25, 0.25]])
    image = keras.Input((4,))

    def make_net(activation):
        return keras.Model(image, keras.layers.Dense(3, activation=activation)(image))

    for activation, scores in (
        ("softmax", shares),
        (None, np.log(shares) + 5),
        ("sigmoid", shares * 2),
    ):
        broken = np.concatenate([scores, [[np.inf, 0, 1]]]).astype(np.float32)
        ours = detector.compute_probabilities(broken, make_net(activation))
        np.testing.assert_allclose(ours[:2], shares, rtol=1e-6)
        assert ours.dtype == np.float32 and np.isnan(ours[2]).all()


def make_dataset(labels):
    """Return a Dataset in memory; image i has the value i in every pixel."""
    images = np.zeros((len(labels), 2, 3, 3), np.uint8)
    images += np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
    return utils.Dataset(Path("data.h5"), 2**30, images, np.asarray(labels), None, None, False)


def test_a_holdout_is_stratified_and_seeded():
    for labels in (
        np.repeat(np.arange(13), 9),
        np.arange(200) % 7,
        np.r_[np.zeros(90), np.ones(9)],
    ):
        data = make_dataset(np.random.default_rng(0).permutation(labels.astype(int)))
        for share in (0.1, 0.25, 0.5):
            clean, held = hold_out(data, share, seed=0)
            assert len(held) == round(share * len(data)) and len(clean) + len(held) == len(data)
            assert np.array_equal(clean.chosen, ~held.chosen)
            for label, count in zip(*np.unique(data.labels, return_counts=True)):
                assert abs(np.sum(held.labels == label) - share * count) < 1
            same, reseeded = (hold_out(data, share, seed)[1] for seed in (0, 1))
            assert np.array_equal(same.chosen, held.chosen)
            assert not np.array_equal(reseeded.chosen, held.chosen)
    with pytest.raises(InputError, match="would hold out 0 of 6"):
        hold_out(make_dataset(np.arange(6)), 0.01, 0)


def test_every_image_is_held_out_as_often_as_any_other():
    data = make_dataset(np.repeat(np.arange(20), 9))
    times = sum(hold_out(data, 0.1, seed)[1].chosen.astype(int) for seed in range(400))
    assert abs(times - 40).max() < 5 * np.sqrt(400 * 0.1 * 0.9)


def test_a_part_of_a_dataset_gives_its_images_with_their_labels(monkeypatch):
    monkeypatch.setattr(datasets, "fingerprint_file", lambda path: None)
    monkeypatch.setattr(datasets, "BATCH_VALUES", 4 * 18)
    data = make_dataset(np.arange(30) % 4)
    rows = np.isin(np.arange(30), [1, 2, 17, 29])
    part = data.part(rows).part(np.array([True, False, True, True]))
    batches = [(x[:, 0, 0, 0].tolist(), y.tolist()) for x, y in part.batches()]
    assert batches == [([1], [1]), ([17], [1]), ([29], [1])]
    assert len(part) == 3 and data.batch_count == 8


def test_detector_equals_both_nets_and_shares_the_trunk_only_where_they_agree(world):
    repaired, record = repair_file(world)
    badnet = utils.load_badnet(world / "models" / "small_bd_net.h5")
    x, _ = read_images(world)
    of_b, of_g = (split_net(net) for net in (badnet, repaired))
    assert detector.compare_trunks(of_b, of_g).tolist() == sorted(record["pruned"])
    for _ in range(2):
        for ours, net in zip(detector.build_joint_model(badnet, repaired)(x), (badnet, repaired)):
            np.testing.assert_allclose(ours, net(x), atol=1e-6)
        # The second time, G has its own trunk.
        first = repaired.layers[1]
        first.set_weights([values * 1.5 for values in first.get_weights()])
    assert detector.compare_trunks(of_b, of_g) is None
