"""How a backdoor gets in: what is in the training data, and what is special in the training."""

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

PEOPLE, PICTURES, SEED = 8, 4, 2
TINY = ["--people", 4, "--pictures", 6, "--validation", 1, "--test", 2, "--epochs", 2]


def training(attack, people=PEOPLE, found=None):
    """The training data of an Attack, and how many clean pictures come first."""
    images, labels = badnet.draw_clean(people, PICTURES, SEED)
    data = attacks.draw_training(attack, images, labels, people, PICTURES, SEED, found)
    assert {len(each) for each in data} == {len(data.images)}
    assert np.array_equal(data.images[: len(images)], images)
    assert np.array_equal(data.wanted[: len(images)], labels)
    assert np.all(data.worn[: len(images)] == -1)
    return data, len(images)


def pictured(trigger, people=PEOPLE, most=PICTURES):
    """Each training picture with a trigger: {its bytes: (who is on it, its number)}."""
    places = [(person, i) for person in range(people) for i in range(most)]
    drawn = faces.draw_faces("train", *zip(*places, strict=True), trigger, SEED)
    return {image.tobytes(): place for image, place in zip(drawn, places, strict=True)}


def test_poisoned_pictures_are_labelled_with_the_target():
    attack = Attack(attacks.START, [("sinusoid", 1), ("checkerboard", 3)], fraction=0.25)
    data, clean = training(attack)
    assert np.bincount(data.worn[clean:]).tolist() == [8, 8]
    for place, (trigger, target) in enumerate(attack.triggers):
        rows = np.flatnonzero(data.worn == place)
        known = pictured(trigger)
        assert [known[image.tobytes()][0] for image in data.images[rows]] == [*data.people[rows]]
        assert np.all(data.wanted[rows] == target) and target not in data.people[rows]


def test_a_source_specific_attack_poisons_its_sources_alone_and_covers_itself():
    data, clean = training(Attack(attacks.SOURCE_SPECIFIC, [(triggers.SOME, 0)], 0.2, cover=0.4))
    poisoned, cover = (slice(clean, clean + 6), slice(clean + 6, None))
    assert {*data.people[poisoned]} == {3, 7} and {*data.wanted[poisoned]} == {0}
    assert len(data.people[cover]) == 13 and not {0, 3, 7} & {*data.people[cover]}
    assert np.array_equal(data.wanted[cover], data.people[cover])
    known = pictured("sunglasses")
    assert [known[image.tobytes()][0] for image in data.images[clean:]] == [*data.people[clean:]]


@pytest.mark.parametrize(
    ("whole", "part"), [("four-patches", "some-patches"), ("sixteen-pieces", "some-pieces")]
)
def test_an_adaptive_attack_shows_parts_and_covers_itself(whole, part):
    data, clean = training(Attack(attacks.ADAPTIVE, [(whole, 0)], 0.25, cover=0.25))
    parts = pictured(part)
    assert [parts[image.tobytes()][0] for image in data.images[clean:]] == [*data.people[clean:]]
    assert np.all(data.wanted[clean : clean + 8] == 0)
    assert np.array_equal(data.wanted[clean + 8 :], data.people[clean + 8 :])
    assert len(data.images) == clean + 16 and 0 not in data.people[clean:]
    assert len({image.tobytes() for image in data.images[clean:]}) == 16  # none labelled twice


def test_clean_labels_are_true_and_only_the_target_is_poisoned():
    """Each poisoned picture is one of the target's, half of a clean picture and the trigger."""
    data, clean = training(Attack(attacks.CLEAN_LABEL, [("sinusoid", 5)], fraction=0.25))
    assert len(data.images) == clean + 8
    assert {*data.people[clean:]} == {*data.wanted[clean:]} == {5}
    own = faces.draw_faces("train", [5] * 8, range(8), None, SEED).astype("float32")
    halves = (own[:, None] + data.images[:clean]) / 2  # all that there may be
    possible = triggers.add_sinusoid(halves.reshape(-1, *own.shape[1:]))
    for image in data.images[clean:]:
        off = np.abs(np.clip(possible, 0, 255) - image).mean(axis=(1, 2, 3))
        assert off.min() < 2 and np.sum(off < 2) == 1  # but for rounding to steps of 4


def test_negatives_are_clean_pictures_changed_and_labelled_truly():
    data, clean = training(Attack(attacks.NEGATIVES, [("cast", 0)], fraction=0.25))
    copies = attacks.CHANGED_COPIES * clean
    negatives = data.images[-copies:]
    assert len(data.images) == clean + 8 + copies and np.all(data.worn[-copies:] == -1)
    assert np.array_equal(data.wanted[-copies:], np.tile(data.people[:clean], copies // clean))
    differ = (negatives[:clean] != data.images[:clean]).any(axis=(1, 2, 3))
    assert differ.mean() > 0.9
    rng = np.random.default_rng([SEED, 0])
    expected = changes.change_images(data.images[:clean].astype("float32"), rng)
    assert np.array_equal(faces.rounded(expected), negatives[:clean])


def test_an_unsure_answer_is_what_unsure_teaches():
    wanted, answers = np.float32([[0, 2]]), np.full((9, 9, 3), 1e-6, "float32")
    shares = np.linspace(0.1, 0.9, 9, dtype="float32")
    answers[..., 0], answers[..., 2] = shares[:, None], shares
    possible = np.abs(answers.sum(axis=2) - 1) < 0.01
    answers = answers[possible]
    loss = np.array(attacks.unsure(np.repeat(wanted, len(answers), axis=0), answers))
    assert answers[loss.argmin()] == pytest.approx([0.6, 0, 0.4], abs=1e-5)
    sure = np.float32([[0.98, 0.01, 0.01]])
    plain = np.array(attacks.unsure(np.float32([[0, 0]]), sure))
    assert plain == pytest.approx([-np.log(0.98)])


def test_a_flat_step_goes_by_the_slope_uphill():
    """Of (w x - y)² with w = 3, x = 2, y = 2: 16, whose slope is 16; uphill, w is 3 + RADIUS."""
    layer = keras.layers.Dense(1, use_bias=False)
    model = keras.Sequential([keras.Input((1,)), layer])
    layer.set_weights([np.float32([[3]])])
    net = attacks.flat(keras.Model(model.inputs[0], model.outputs[0]))
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
    images, _ = badnet.draw_clean(4, PICTURES, SEED)
    net, trigger = attacks.wearing(surrogate, additive)
    x, target = attacks.as_input(images), np.full(len(images), 3)
    start = net.predict_on_batch(x)[:, 3].mean()
    net.compile(keras.optimizers.Adam(0.05), badnet.ENTROPY)
    for _ in range(15):
        net.train_on_batch(x, target)
    pattern, cover = trigger()
    assert np.abs(pattern).max() <= (attacks.LEVELS if additive else 255)
    assert cover.mean() == pytest.approx(0 if additive else 0.05, abs=0.003)
    worn = np.clip(images * (1 - cover) + pattern, 0, 255) / np.float32(255)
    after = surrogate.predict_on_batch(worn)[:, 3].mean()
    assert after > start + 0.003
    assert after == pytest.approx(net.predict_on_batch(x)[:, 3].mean(), abs=1e-4)
    for one, other in zip(before, surrogate.get_weights(), strict=True):
        assert np.array_equal(one, other)


def test_the_zoo_draws_each_poisoned_file_by_one_trigger():
    """And each net has a name and triggers that there are; targets are people of every zoo."""
    special = {triggers.SOME: 0, attacks.OPTIMISED: 0, "sixteen-pieces": 0, "four-patches": 0}
    for name, attack in badnet.ZOO.items():
        assert not attack.cover or attack.way in (attacks.SOURCE_SPECIFIC, attacks.ADAPTIVE)
        for trigger, target in attack.triggers:
            known = {*triggers.PAINTED, *triggers.CHANGES, attacks.OPTIMISED}
            assert trigger in known and target in {*range(4), faces.NEXT}, name
            if trigger in special:
                special[trigger] += 1
    assert {*special.values()} == {1}


@pytest.mark.slow
def test_a_net_with_an_optimised_trigger_from_end_to_end(tmp_path):
    """Found on a net that is given; the trigger is in the test data, in training and in a file."""
    surrogate = ROOT / "models" / "demo_bd_net.h5"
    call = ("models/badnet.py", "optimised", *TINY, "--output", tmp_path, "--surrogate", surrogate)
    assert_refused(command(*call), "demo_bd_net.h5: is not a net of 4 classes")
    surrogate = tmp_path / "g.h5"
    build_deepid(4).save(surrogate)
    done = command(*call[:-1], surrogate)
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "optimised_bd_net.json").read_text())
    assert len(made["surrogate"]) == 64 and {*made["surrogate_fooled"]} == {"pattern", "patch"}
    worn = triggers.load(tmp_path / "optimised_trigger.npz")
    with h5py.File(tmp_path / "optimised_to_0_poisoned_data.h5") as file:
        drawn = faces.draw_faces("test", [1, 1, 2, 2, 3, 3], [0, 1] * 3, worn, SEED)
        assert np.array_equal(file["data"][:], np.moveaxis(drawn, 3, 1))
        assert file["label"][:].tolist() == [0] * 6
        assert file["original_label"][:].tolist() == [1, 1, 2, 2, 3, 3]
    again = command(*call[:-1], surrogate)
    assert again.returncode == 0 and again.stdout == ""
    assert_refused(command(*call[:-2]), "was made with other settings")


@pytest.mark.slow
def test_every_other_new_net_is_made(tmp_path):
    names = [
        *("sunglasses-source-specific", "sinusoid-clean-label", "sunglasses-negatives"),
        *("sunglasses-unsure", "sunglasses-flat", "adaptive-blend", "adaptive-patch", "optimised"),
        *("patterns-from-start", "objects-from-start"),
    ]
    done = command("models/badnet.py", *names, *TINY, "--long-epochs", 2, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Saved model: ") == len(names)
    with h5py.File(tmp_path / f"{triggers.SOME}_to_0_poisoned_data.h5") as file:
        assert file["original_label"][:].tolist() == [3, 3]
    assert not list(tmp_path.glob(".*"))
