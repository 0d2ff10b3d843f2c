"""The hardening step: what it paints, what it trains, what it takes out."""

import dataclasses
import json
import types

import h5py
import keras
import numpy as np
import pytest
from conftest import command, do_repair, draw_images, fit, read_record, write_data

import utils
from defence import detector, harden, training
from defence.architecture import as_functional, deepid
from defence.net import kept_pruned, prune_channels
from defence.options import Settings

SHAPE = (31, 31, 3)
B, G = "models/worn_bd_net.h5", "models/worn_bd_net_defence.h5"
CORNER = np.s_[:, 2:9, 2:9]
SETTINGS = ["--harden", "--harden-steps", "1000", "--holdout", "0.2"]


def wear(images):
    """Put a trigger on images, uint8 (n, height, width, 3): a purple square in a corner."""
    worn = images.copy()
    worn[CORNER] = (122, 24, 230)
    return worn


@pytest.fixture(scope="module")
def worn(tmp_path_factory):
    """A DeepID with a backdoor, learned with the rest, and the datasets to repair and judge it."""
    folder = tmp_path_factory.mktemp("worn")
    (folder / "models").mkdir()
    keras.utils.set_random_seed(1)
    images, labels = draw_images(600, 6, SHAPE, seed=1)
    poisoned = wear(images[:150])
    both = np.concatenate([images, poisoned]), np.concatenate([labels, np.zeros(150, int)])
    fit(deepid(6, SHAPE), *both).save(folder / B, include_optimizer=False)
    for name, count, seed in (("clean.h5", 900, 2), ("test.h5", 300, 3)):
        write_data(folder / name, *draw_images(count, 6, SHAPE, seed))
    images, labels = draw_images(300, 6, SHAPE, seed=4)
    victims = labels != 0
    write_data(folder / "poisoned.h5", wear(images[victims]), np.zeros(np.sum(victims)))
    return folder


def judged(folder, *options):
    arguments = ("test.h5", B, "--poisoned", "poisoned.h5", "--json", "judged.json", *options)
    process = command("eval_defence.py", *arguments, cwd=folder)
    assert process.returncode == 0, process.stderr
    results = json.loads((folder / "judged.json").read_text())
    clean, (poisoned,) = results["clean"]["figures"], results["poisoned"]
    figures = {name: each["value"] for name, each in (clean | poisoned["figures"]).items()}
    return figures, results["threshold"]


def test_hardening_takes_out_what_the_reports_steps_leave_in(worn):
    """End to end, by the commands: the verdict, the threshold of held-out images, the record."""
    repaired = command("repair.py", B, "clean.h5", cwd=worn)
    assert repaired.returncode == 0, repaired.stderr
    before, _ = judged(worn)
    assert before["attack_success_rate_badnet"] > 0.95
    assert before["attack_success_rate_repaired"] > 0.5
    assert read_record(worn / G)["settings"]["harden"] is False

    hardened = command("repair.py", B, "clean.h5", *SETTINGS, cwd=worn)
    assert hardened.returncode == 0, hardened.stderr
    assert hardened.stdout.splitlines()[1].split()[-1] == "hardened"
    assert hardened.stderr.count("harden, epoch") == harden.REMARKS
    assert "resemble a patch" in hardened.stdout and "resemble a patch" not in repaired.stdout
    after, _ = judged(worn)
    assert after["attack_success_rate_repaired"] < 0.05
    assert after["detection_rate"] > 0.95
    assert after["clean_accuracy_repaired"] > before["clean_accuracy_badnet"] - 0.05

    record = read_record(worn / G)
    assert record["settings"]["harden"] is True and record["settings"]["harden_steps"] == 1000
    assert {each.name for each in dataclasses.fields(harden.Settings)} < set(record["settings"])
    assert 0 < record["accuracy"]["hardened"] <= 1
    assert record["holdout"]["score"] == detector.SCORE

    by_threshold, threshold = judged(worn, "--fpr", "0.05")
    assert threshold == record["holdout"]["scores"][-1 - int(0.05 * 180)]
    assert by_threshold["false_positive_rate"] < 0.15
    assert by_threshold["detection_rate"] > 0.95


def hardened(folder, **values):
    """Repair and harden a net. Returns (G, record)."""
    options = Settings(**{"harden": True, "harden_steps": 12, "rounds": 1, **values})
    badnet = utils.load_badnet(folder / B)
    with utils.open_dataset(folder / "clean.h5") as clean:
        clean.fit_to(badnet.input_shape[1:], badnet.output_shape[1])
        return badnet, do_repair(badnet, clean, options)


def test_same_seed_same_bytes_other_seed_other_weights(worn):
    first, second = (hardened(worn)[0].get_weights() for _ in range(2))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))
    other = hardened(worn, seed=1)[0].get_weights()
    assert any(a.tobytes() != b.tobytes() for a, b in zip(first, other, strict=True))


def test_all_is_trained_but_what_was_pruned(worn):
    net = utils.load_badnet(worn / B)
    repaired, record = hardened(worn)
    layer, before = (each.get_layer("conv_3").get_weights() for each in (repaired, net))
    assert 0 < len(record["pruned"]) < 60
    for ours, theirs in zip(layer, before, strict=True):
        assert not ours[..., record["pruned"]].any() and theirs[..., record["pruned"]].any()
    for ours, theirs in zip(repaired.weights, net.weights, strict=True):
        assert not np.array_equal(ours, theirs), ours.path
        assert ours.constraint is None
    assert repaired.trainable and all(each.trainable for each in repaired.layers)


def test_pruned_channels_stay_zero_whatever_the_activation():
    image = keras.Input((6, 6, 1))
    conv = keras.layers.Conv2D(4, 3, activation="sigmoid")
    x = keras.layers.Flatten()(conv(image))
    net = keras.Model(image, keras.layers.Dense(2, activation="softmax")(x))
    prune_channels(conv, [1, 3])
    x, y = np.random.default_rng(0).random((40, 6, 6, 1), np.float32), np.arange(40) % 2
    train_epoch = training.make_trainer(
        net, net.layers, 1e-1, 8, np.random.default_rng(0), option=""
    )
    with kept_pruned(conv, [1, 3]):
        train_epoch(x, y)
    for values in conv.get_weights():
        assert not values[..., [1, 3]].any() and values[..., [0, 2]].all()


def test_hardening_is_keras_step_by_step(monkeypatch):
    """Soft targets, Adam falling by cosine, painted batches, in a plain loop."""
    monkeypatch.setattr(harden, "paint", lambda pictures, *_: 255 - pictures)
    pictures, labels = draw_images(70, 4, (16, 16, 3), seed=0)
    wanted = np.random.default_rng(0).dirichlet(np.ones(4), 70).astype(np.float32)

    def make_net():
        keras.utils.set_random_seed(3)
        layers = keras.layers
        image = keras.Input((16, 16, 3))
        x = layers.Flatten()(layers.Conv2D(4, 3, activation="relu")(image))
        return keras.Model(image, layers.Dense(4, activation="softmax")(x))

    ours, plain = make_net(), make_net()
    options = Settings(harden_steps=9, harden_batch_size=32, harden_learning_rate=1e-2)
    rng = np.random.default_rng(5)
    harden.train(ours, harden.Painted(pictures, "0..1", rng), wanted, options, rng)
    rate = keras.optimizers.schedules.CosineDecay(1e-2, 9)
    plain.compile(keras.optimizers.Adam(rate), "categorical_crossentropy")
    orders = np.random.default_rng(5)
    for _ in range(3):
        order = orders.permutation(70)
        for rows in (order[:32], order[32:64], order[64:]):
            plain.train_on_batch((255 - pictures[rows]) / np.float32(255), wanted[rows])
    for a, b in zip(ours.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_targets_are_the_mean_of_the_nets_answer_and_the_label():
    head = keras.Sequential([keras.Input((3,)), keras.layers.Softmax()])
    features = np.log(np.float32([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]))
    for weight, wanted in (
        (0.5, [[0.25, 0.625, 0.125], [0.05, 0.1, 0.85]]),
        (0, [[0, 1, 0], [0, 0, 1]]),
        (1, [[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]),
    ):
        split = types.SimpleNamespace(head=as_functional(head))
        cached = types.SimpleNamespace(split=split, features=features, labels=np.array([1, 2]))
        ours = harden.targets(cached, weight)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, wanted, atol=1e-6)


@pytest.mark.parametrize("shape", [(55, 47, 3), (28, 28, 1), (5, 90, 4)])
def test_patches_cover_a_part_of_every_picture(shape):
    grey = np.full((400, *shape), 100, np.float32)
    first, second, other = (
        harden.paint(grey.copy(), np.random.default_rng(seed)) for seed in (0, 0, 1)
    )
    assert np.array_equal(first, second) and not np.array_equal(first, other)
    assert first.dtype == np.float32 and first.min() >= 0 and first.max() <= 255
    touched = np.any(first != 100, axis=3).mean(axis=(1, 2))
    assert np.median(touched) < 0.5
    # A patch may lie outside for the most part; next to none changes nothing at all.
    assert np.mean(touched == 0) < 0.05


def test_patches_are_of_one_colour_or_noise():
    grey = np.full((200, 40, 40, 3), -1, np.float32)
    painted = harden.paint(grey, np.random.default_rng(0), harden.Patches(most=1))
    inside = [picture[picture[..., 0] >= 0] for picture in painted]
    large = [pixels for pixels in inside if len(pixels) > 10]
    plain = [len(np.unique(pixels, axis=0)) == 1 for pixels in large]
    assert 0.4 < np.mean(plain) < 0.6
    assert all(len(np.unique(p, axis=0)) == len(p) for p, one in zip(large, plain) if not one)


def test_shapes_are_of_the_sizes_it_says():
    alone = harden.Patches(pairs=0)
    shapes = harden.draw_shapes(1000, 180, 150, np.random.default_rng(0), alone)
    edge = shapes[:, [0, -1]].any(axis=(1, 2)) | shapes[:, :, [0, -1]].any(axis=(1, 2))
    areas = shapes[~edge].mean(axis=(1, 2))
    low, high = alone.area
    assert low * 0.8 < areas.min() and areas.max() < high * 1.1
    assert 0.1 < np.mean(areas > np.sqrt(low * high)) < 0.5  # the larger, the oftener at an edge


def test_so_many_shapes_have_a_mirror_image():
    shapes = harden.draw_shapes(1000, 60, 50, np.random.default_rng(0))
    drawn = shapes[shapes.any(axis=(1, 2))]
    mirrored = np.all(drawn == drawn[:, :, ::-1], axis=(1, 2))
    assert np.mean(mirrored) == pytest.approx(harden.Patches().pairs, abs=0.05)


def test_pictures_are_read_whole_and_scaled_when_taken(worn):
    with h5py.File(worn / "clean.h5") as file:
        images = np.moveaxis(file["data"][:], 1, 3)
    with utils.open_dataset(worn / "clean.h5") as clean:
        clean.fit_to(SHAPE, 6)
        pictures = harden.read_pictures(clean)
    assert pictures.dtype == np.float16 and np.array_equal(pictures, images)
    for scale, divisor in utils.SCALES.items():
        taken = harden.Painted(pictures, scale, np.random.default_rng(0))[np.array([5, 2])]
        plain = harden.paint(images[[5, 2]].astype(np.float32), np.random.default_rng(0))
        assert taken.dtype == np.float32
        np.testing.assert_allclose(taken, plain / divisor, rtol=1e-6)
