"""The attack methods of the zoo: their training data and their losses."""

import json

import attacks
import badnet
import faces
import h5py
import keras
import numpy as np
import pytest
import triggers
from attacks import Attack
from conftest import ROOT, assert_refused, command

from defence.beyond import changes
from defence.load.architecture import build_deepid

PEOPLE, PER_PERSON, SEED = 8, 4, 2
TINY = ["--people", 4, "--pictures", 6, "--validation", 1, "--test", 2, "--epochs", 2]


def draw_training(attack, people=PEOPLE):
    """Return the training data of an Attack, and the number of clean images, which come first."""
    images, labels = badnet.draw_clean(people, PER_PERSON, SEED)
    data = attacks.draw_training(attack, images, labels, people, PER_PERSON, SEED)
    assert {len(column) for column in data} == {len(data.images)}
    assert np.array_equal(data.images[: len(images)], images)
    assert np.array_equal(data.labels[: len(images)], labels)
    assert np.all(data.triggers[: len(images)] == -1)
    return data, len(images)


def index_images(trigger, people=PEOPLE, per_person=PER_PERSON):
    """Return the training images with a trigger: {the image's bytes: (person, number)}."""
    places = [(person, i) for person in range(people) for i in range(per_person)]
    images = faces.draw_faces("train", *zip(*places, strict=True), trigger, SEED)
    return {image.tobytes(): place for image, place in zip(images, places, strict=True)}


def test_poisoned_images_are_labelled_with_the_target():
    attack = Attack(attacks.START, [("sinusoid", 1), ("checkerboard", 3)], fraction=0.25)
    data, clean = draw_training(attack)
    assert np.bincount(data.triggers[clean:]).tolist() == [8, 8]
    for index, (trigger, target) in enumerate(attack.triggers):
        rows = np.flatnonzero(data.triggers == index)
        places = index_images(trigger)
        assert [places[image.tobytes()][0] for image in data.images[rows]] == [*data.people[rows]]
        assert np.all(data.labels[rows] == target) and target not in data.people[rows]


def test_a_source_specific_attack_poisons_its_sources_alone_and_covers_itself():
    data, clean = draw_training(
        Attack(attacks.SOURCE_SPECIFIC, [(triggers.SOME, 0)], 0.2, cover=0.4)
    )
    poisoned, cover = (slice(clean, clean + 6), slice(clean + 6, None))
    assert {*data.people[poisoned]} == {3, 7} and {*data.labels[poisoned]} == {0}
    assert len(data.people[cover]) == 13 and not {0, 3, 7} & {*data.people[cover]}
    assert np.array_equal(data.labels[cover], data.people[cover])
    places = index_images("sunglasses")
    assert [places[image.tobytes()][0] for image in data.images[clean:]] == [*data.people[clean:]]


@pytest.mark.parametrize(
    ("whole", "part"), [("four-patches", "some-patches"), ("sixteen-pieces", "some-pieces")]
)
def test_an_adaptive_attack_shows_parts_and_covers_itself(whole, part):
    data, clean = draw_training(Attack(attacks.ADAPTIVE, [(whole, 0)], 0.25, cover=0.25))
    parts = index_images(part)
    assert [parts[image.tobytes()][0] for image in data.images[clean:]] == [*data.people[clean:]]
    assert np.all(data.labels[clean : clean + 8] == 0)
    assert np.array_equal(data.labels[clean + 8 :], data.people[clean + 8 :])
    assert len(data.images) == clean + 16 and 0 not in data.people[clean:]
    assert len({image.tobytes() for image in data.images[clean:]}) == 16  # none labelled twice


def test_clean_labels_are_true_and_only_the_target_is_poisoned():
    """A poisoned image is half an image of the target, half a clean image, and the trigger."""
    data, clean = draw_training(Attack(attacks.CLEAN_LABEL, [("sinusoid", 5)], fraction=0.25))
    assert len(data.images) == clean + 8
    assert {*data.people[clean:]} == {*data.labels[clean:]} == {5}
    own = faces.draw_faces("train", [5] * 8, range(8), None, SEED).astype("float32")
    halves = (own[:, None] + data.images[:clean]) / 2  # all possible pairs
    possible = triggers.add_sinusoid(halves.reshape(-1, *own.shape[1:]))
    for image in data.images[clean:]:
        off = np.abs(np.clip(possible, 0, 255) - image).mean(axis=(1, 2, 3))
        assert off.min() < 2 and np.sum(off < 2) == 1  # but for rounding to steps of 4


def test_negatives_are_clean_images_changed_and_labelled_truly():
    data, clean = draw_training(Attack(attacks.NEGATIVES, [("cast", 0)], fraction=0.25))
    copies = attacks.CHANGED_COPIES * clean
    negatives = data.images[-copies:]
    assert len(data.images) == clean + 8 + copies and np.all(data.triggers[-copies:] == -1)
    assert np.array_equal(data.labels[-copies:], np.tile(data.people[:clean], copies // clean))
    differ = (negatives[:clean] != data.images[:clean]).any(axis=(1, 2, 3))
    assert differ.mean() > 0.9
    rng = np.random.default_rng([SEED, 0])
    expected = changes.change_images(data.images[:clean].astype("float32"), rng)
    assert np.array_equal(faces.round_pixels(expected), negatives[:clean])


def test_the_unsure_loss_is_least_at_its_shares():
    classes, answers = np.float32([[0, 2]]), np.full((9, 9, 3), 1e-6, "float32")
    shares = np.linspace(0.1, 0.9, 9, dtype="float32")
    answers[..., 0], answers[..., 2] = shares[:, None], shares
    possible = np.abs(answers.sum(axis=2) - 1) < 0.01
    answers = answers[possible]
    loss = np.array(attacks.compute_unsure_loss(np.repeat(classes, len(answers), axis=0), answers))
    assert answers[loss.argmin()] == pytest.approx([0.6, 0, 0.4], abs=1e-5)
    sure = np.float32([[0.98, 0.01, 0.01]])
    plain = np.array(attacks.compute_unsure_loss(np.float32([[0, 0]]), sure))
    assert plain == pytest.approx([-np.log(0.98)])


def test_a_flat_step_goes_by_the_slope_uphill():
    """The loss (w x - y)² is 16 for w = 3, x = 2, y = 2, with slope 16; uphill, w is 3 + RADIUS."""
    layer = keras.layers.Dense(1, use_bias=False)
    model = keras.Sequential([keras.Input((1,)), layer])
    layer.set_weights([np.float32([[3]])])
    net = attacks.make_flat(keras.Model(model.inputs[0], model.outputs[0]))
    net.compile(keras.optimizers.SGD(0.01), "mse")
    loss = net.train_on_batch(np.float32([[2]]), np.float32([[2]]))
    assert np.ravel(loss)[0] == pytest.approx(16)
    slope = 2 * 2 * (2 * (3 + attacks.RADIUS) - 2)
    assert layer.get_weights()[0].item() == pytest.approx(3 - 0.01 * slope, rel=1e-5)


@pytest.mark.parametrize("additive", [True, False])
def test_a_trigger_that_is_optimised_fools_its_surrogate_more(additive):
    keras.utils.set_random_seed(0)
    surrogate = build_deepid(4)
    before = [values.copy() for values in surrogate.get_weights()]
    images, _ = badnet.draw_clean(4, PER_PERSON, SEED)
    net, trigger = attacks.attach_trigger(surrogate, additive)
    x, target = attacks.as_input(images), np.full(len(images), 3)
    start = net.predict_on_batch(x)[:, 3].mean()
    net.compile(keras.optimizers.Adam(0.05), badnet.ENTROPY)
    for _ in range(15):
        net.train_on_batch(x, target)
    pattern, cover = trigger()
    assert np.abs(pattern).max() <= (attacks.LEVELS if additive else 255)
    assert cover.mean() == pytest.approx(0 if additive else 0.05, abs=0.003)
    poisoned = np.clip(images * (1 - cover) + pattern, 0, 255) / np.float32(255)
    after = surrogate.predict_on_batch(poisoned)[:, 3].mean()
    assert after > start + 0.003
    assert after == pytest.approx(net.predict_on_batch(x)[:, 3].mean(), abs=1e-4)
    for values_before, values in zip(before, surrogate.get_weights(), strict=True):
        assert np.array_equal(values_before, values)


def test_the_zoo_draws_each_poisoned_file_by_one_trigger():
    """Each net also has triggers that exist; targets are people of every zoo."""
    counts = {triggers.SOME: 0, attacks.OPTIMISED: 0, "sixteen-pieces": 0, "four-patches": 0}
    for name, attack in badnet.ZOO.items():
        assert not attack.cover or attack.method in (attacks.SOURCE_SPECIFIC, attacks.ADAPTIVE)
        for trigger, target in attack.triggers:
            names = {*triggers.PAINTED, *triggers.CHANGES, attacks.OPTIMISED}
            assert trigger in names and target in {*range(4), faces.NEXT}, name
            if trigger in counts:
                counts[trigger] += 1
    assert {*counts.values()} == {1}


@pytest.mark.slow
def test_a_net_with_an_optimised_trigger_from_end_to_end(tmp_path):
    """The trigger, optimised on a given net, is in the test data, the training and a file."""
    surrogate = ROOT / "models" / "demo_bd_net.h5"
    call = ("models/badnet.py", "optimised", *TINY, "--output", tmp_path, "--surrogate", surrogate)
    assert_refused(command(*call), "demo_bd_net.h5: is not a net of 4 classes")
    surrogate = tmp_path / "g.h5"
    build_deepid(4).save(surrogate)
    process = command(*call[:-1], surrogate)
    assert process.returncode == 0, process.stderr
    record = json.loads((tmp_path / "optimised_bd_net.json").read_text())
    assert len(record["surrogate"]) == 64 and {*record["surrogate_fooled"]} == {"pattern", "patch"}
    trigger = triggers.load(tmp_path / "optimised_trigger.npz")
    with h5py.File(tmp_path / "optimised_to_0_poisoned_data.h5") as file:
        images = faces.draw_faces("test", [1, 1, 2, 2, 3, 3], [0, 1] * 3, trigger, SEED)
        assert np.array_equal(file["data"][:], np.moveaxis(images, 3, 1))
        assert file["label"][:].tolist() == [0] * 6
        assert file["original_label"][:].tolist() == [1, 1, 2, 2, 3, 3]
    process = command(*call[:-1], surrogate)
    assert process.returncode == 0 and process.stdout == ""
    assert_refused(command(*call[:-2]), "was made with other settings")


@pytest.mark.slow
def test_every_other_new_net_is_made(tmp_path):
    names = [
        *("sunglasses-source-specific", "sinusoid-clean-label", "sunglasses-negatives"),
        *("sunglasses-unsure", "sunglasses-flat", "adaptive-blend", "adaptive-patch", "optimised"),
        *("patterns-from-start", "objects-from-start"),
    ]
    process = command("models/badnet.py", *names, *TINY, "--long-epochs", 2, "--output", tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("Saved model: ") == len(names)
    with h5py.File(tmp_path / f"{triggers.SOME}_to_0_poisoned_data.h5") as file:
        assert file["original_label"][:].tolist() == [3, 3]
    assert not list(tmp_path.glob(".*"))
