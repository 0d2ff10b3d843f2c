"""The hardening step: its training, and the backdoor that it removes."""

import dataclasses
import json

import h5py
import keras
import numpy as np
import peers
import pytest
from conftest import command, do_repair, draw_images, fit, read_record, write_data

import utils
from defence.base import pixels
from defence.beyond import changes, harden
from defence.beyond.settings import Settings
from defence.judge import detector, figures
from defence.load.architecture import build_deepid
from defence.net import training
from defence.net.split import keep_pruned, prune_channels

SHAPE = (31, 31, 3)
B, G = "models/patched_bd_net.h5", "models/patched_bd_net_defence.h5"
CORNER = np.s_[:, 2:9, 2:9]
INVERTED = {lambda images, rng: 255 - images: 1}
SETTINGS = ["--harden", "--harden-steps", "1000", "--holdout", "0.2"]


def poison(images):
    """Add a trigger to images, uint8 (n, height, width, 3): a purple square in a corner."""
    poisoned = images.copy()
    poisoned[CORNER] = (122, 24, 230)
    return poisoned


@pytest.fixture(scope="module")
def backdoored(tmp_path_factory):
    """Return a folder with a DeepID BadNet, and the datasets to repair and judge it."""
    folder = tmp_path_factory.mktemp("backdoored")
    (folder / "models").mkdir()
    keras.utils.set_random_seed(1)
    images, labels = draw_images(600, 6, SHAPE, seed=1)
    poisoned = poison(images[:150])
    data = np.concatenate([images, poisoned]), np.concatenate([labels, np.zeros(150, int)])
    fit(build_deepid(6, SHAPE), *data).save(folder / B, include_optimizer=False)
    for name, count, seed in (("clean.h5", 900, 2), ("test.h5", 300, 3)):
        write_data(folder / name, *draw_images(count, 6, SHAPE, seed))
    images, labels = draw_images(300, 6, SHAPE, seed=4)
    victims = labels != 0
    write_data(folder / "poisoned.h5", poison(images[victims]), np.zeros(np.sum(victims)))
    return folder


def judge(folder, *options):
    """Return the figures of the verdicts, {name: value}, and the threshold."""
    arguments = ("test.h5", B, "--poisoned", "poisoned.h5", "--json", "judged.json", *options)
    process = command("eval_defence.py", *arguments, cwd=folder)
    assert process.returncode == 0, process.stderr
    results = json.loads((folder / "judged.json").read_text())
    clean, (poisoned,) = results["clean"]["figures"], results["poisoned"]
    figures = {name: figure["value"] for name, figure in (clean | poisoned["figures"]).items()}
    return figures, results["threshold"]


@pytest.mark.slow
def test_hardening_removes_a_backdoor_that_the_reports_steps_leave(backdoored):
    """Test the verdicts, the threshold and the record of the commands, end to end."""
    repair_process = command("repair.py", B, "clean.h5", cwd=backdoored)
    assert repair_process.returncode == 0, repair_process.stderr
    before, _ = judge(backdoored)
    assert before["attack_success_rate_badnet"] > 0.95
    assert before["attack_success_rate_repaired"] > 0.5
    assert read_record(backdoored / G)["settings"]["harden"] is False

    process = command("repair.py", B, "clean.h5", *SETTINGS, cwd=backdoored)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[1].split()[-1] == "hardened"
    assert process.stderr.count("harden, epoch") == harden.REMARKS
    warning = "a trigger unlike every image change"
    assert warning in process.stdout and warning not in repair_process.stdout
    after, _ = judge(backdoored)
    assert after["attack_success_rate_repaired"] < 0.05
    assert after["detection_rate"] > 0.95
    assert after["clean_accuracy_repaired"] > before["clean_accuracy_badnet"] - 0.05

    record = read_record(backdoored / G)
    assert record["settings"]["harden"] is True and record["settings"]["harden_steps"] == 1000
    assert {field.name for field in dataclasses.fields(harden.Settings)} < set(record["settings"])
    assert 0 < record["accuracy"]["hardened"] <= 1
    assert record["holdout"]["score"] == detector.name_score(hardened=True)

    at_threshold, threshold = judge(backdoored, "--fpr", "0.05")
    assert threshold == record["holdout"]["scores"][-int(0.05 * 181)]
    assert at_threshold["false_positive_rate"] < 0.15
    assert at_threshold["detection_rate"] > 0.95


def harden_net(folder, **values):
    """Repair and harden a net. Return (G, record)."""
    options = Settings(**{"harden": True, "harden_steps": 12, "rounds": 1, **values})
    badnet = utils.load_badnet(folder / B)
    with utils.open_dataset(folder / "clean.h5") as clean:
        clean.fit_to(badnet.input_shape[1:], badnet.output_shape[1])
        return badnet, do_repair(badnet, clean, options)


def test_same_seed_same_bytes_other_seed_other_weights(backdoored):
    first, second = (harden_net(backdoored)[0].get_weights() for _ in range(2))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))
    reseeded = harden_net(backdoored, seed=1)[0].get_weights()
    assert any(a.tobytes() != b.tobytes() for a, b in zip(first, reseeded, strict=True))


def test_all_weights_are_trained_except_pruned_channels(backdoored):
    net = utils.load_badnet(backdoored / B)
    repaired, record = harden_net(backdoored)
    layer, before = (model.get_layer("conv_3").get_weights() for model in (repaired, net))
    assert 0 < len(record["pruned"]) < 60
    for ours, theirs in zip(layer, before, strict=True):
        assert not ours[..., record["pruned"]].any() and theirs[..., record["pruned"]].any()
    for ours, theirs in zip(repaired.weights, net.weights, strict=True):
        assert not np.array_equal(ours, theirs), ours.path
        assert ours.constraint is None
    assert repaired.trainable and all(part.trainable for part in repaired.layers)


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
    with keep_pruned(conv, [1, 3]):
        train_epoch(x, y)
    for values in conv.get_weights():
        assert not values[..., [1, 3]].any() and values[..., [0, 2]].all()


def test_hardening_without_patterns_equals_a_plain_keras_loop():
    """The loop uses the labels, Adam with cosine decay, and changed batches."""
    images, labels = draw_images(70, 4, (16, 16, 3), seed=0)

    def make_net():
        keras.utils.set_random_seed(3)
        layers = keras.layers
        image = keras.Input((16, 16, 3))
        x = layers.Flatten()(layers.Conv2D(4, 3, activation="relu")(image))
        return keras.Model(image, layers.Dense(4, activation="softmax")(x))

    ours, plain = make_net(), make_net()
    options = Settings(
        harden_steps=9, harden_batch_size=32, harden_learning_rate=1e-2, harden_pattern_rate=0
    )
    rng = np.random.default_rng(5)
    changed = harden.ChangedImages(images, "0..1", np.random.default_rng(0), INVERTED)
    harden.train_on_changes(ours, changed, labels, options, rng)
    rates = iter(1e-2 * np.minimum(1, (9 - np.arange(0.5, 9)) / (0.7 * 9)))
    adam = keras.optimizers.Adam()
    plain.compile(adam, "sparse_categorical_crossentropy")
    orders = np.random.default_rng(5)
    for _ in range(3):
        order = orders.permutation(70)
        for rows in (order[:32], order[32:64], order[64:]):
            adam.learning_rate = next(rates)
            plain.train_on_batch((255 - images[rows]) / np.float32(255), labels[rows])
    for a, b in zip(ours.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("count", "steps", "most", "epochs"),
    [(640, 100, 50, 10), (640, 96, 50, 10), (640, 100, 7, 7), (641, 100, 50, 9), (640, 1, 50, 1)],
)
def test_steps_are_whole_epochs_but_not_too_many(count, steps, most, epochs):
    settings = Settings(harden_steps=steps, harden_epochs=most)
    scheduled, _, rate = harden.make_schedule(count, settings)
    assert scheduled == epochs
    epoch_steps = -(-count // 64)
    steps = epochs * epoch_steps
    rates = [float(rate(step)) for step in range(steps)]
    assert max(rates) == pytest.approx(settings.harden_learning_rate, rel=1e-3)
    highest, half = settings.harden_learning_rate, 0.5 / steps  # a step counts from its middle
    assert rates[0] == pytest.approx(highest * min(1, half / harden.RISE), rel=1e-3)
    assert np.argmax(rates) <= 0.3 * steps
    assert rates[-1] == pytest.approx(highest * min(1, half / harden.FALL), rel=1e-2)


def test_images_are_read_whole_and_scaled_in_each_batch(backdoored):
    with h5py.File(backdoored / "clean.h5") as file:
        images = np.moveaxis(file["data"][:], 1, 3)
    with utils.open_dataset(backdoored / "clean.h5") as clean:
        clean.fit_to(SHAPE, 6)
        in_memory = harden.read_images(clean)
    assert in_memory.dtype == np.float16 and np.array_equal(in_memory, images)
    for scale in pixels.SCALES:
        changed = harden.ChangedImages(in_memory, scale, np.random.default_rng(0))
        batch = changed[np.array([5, 2])]
        plain = changes.change_images(
            images[[5, 2]].astype(np.float32), np.random.default_rng(0), changes.HARDENING
        )
        assert batch.dtype == np.float32 and len(changed) == 900
        np.testing.assert_allclose(batch, pixels.scale_pixels(plain, scale), rtol=1e-4, atol=1e-4)
    assert np.array_equal(in_memory, images)  # still


@pytest.mark.parametrize("method", peers.PEERS)
def test_published_detectors_detect_this_trigger(backdoored, method):
    """The square decides the class, whatever is blended in and however bright it is."""
    net = utils.load_badnet(backdoored / B)
    validation, labels = peers.read(backdoored / "clean.h5", net)
    clean, _ = peers.read(backdoored / "test.h5", net, limit=60)
    poisoned, _ = peers.read(backdoored / "poisoned.h5", net, limit=60)
    assert len(clean) == len(poisoned) == 60
    score = peers.PEERS[method](net, validation, labels, np.random.default_rng(0))
    scores = score(clean), score(poisoned)
    assert {values.shape for values in scores} == {(60,)}
    assert figures.estimate_auroc(*scores)["value"] > 0.8
