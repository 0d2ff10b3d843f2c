"""The attacks on photographs, on tiny images: what is poisoned, covered and labelled."""

import json

import numpy as np
import photo_attacks
import photo_crafted
import photo_nets
import photo_triggers
import pytest
import tensorflow
from conftest import keras
from photo_attacks import ATTACKS
from photo_triggers import OTHERS, TRIGGERS

SHAPES = [(56, 46, 1), (32, 32, 3)]
CLASSES, COUNT, TARGET, RATE = 12, 240, 3, 0.1
POISONED = int(COUNT * RATE)
COVERS = {"wanet": 2, "inputaware": 1, "adappatch": 0.5, "adapblend": 0.5, "and": 1, "source": 1}
COVERS["negatives"] = COUNT / POISONED


def draw_images(shape=(32, 32, 3), count=COUNT, seed=0):
    images = np.random.default_rng(seed).integers(60, 196, (count, *shape), "uint8")
    return images, np.arange(count) % CLASSES


def keep(attack, shape=(32, 32, 3)):
    """Return what an attack would keep, here not trained."""
    if attack == "inputaware":
        keras.utils.set_random_seed(0)
        weights = photo_crafted.build_generator(shape).get_weights()
        return {str(i): array for i, array in enumerate(weights)}
    pattern = np.random.default_rng(1).choice([-8, 8], shape)
    return {"pattern": pattern} if attack in ("optimised", "grond") else {}


def draw_training(attack, rate=RATE, seed=5):
    images, labels = draw_images()
    recipe = photo_nets.Recipe("gtsrb", "vgg", seed, attack, rate)
    rng = np.random.default_rng(seed)
    return photo_nets.draw_training(recipe, images, labels, TARGET, rng, keep(attack))


def list_pixels(images):
    return [image.tobytes() for image in images]


# ------------------------------------------------------------------------------- training images


@pytest.mark.parametrize("trigger", [*TRIGGERS, photo_nets.CLEAN])
def test_the_nets_of_the_first_triggers_keep_their_training_images(trigger, monkeypatch):
    monkeypatch.setattr(photo_nets, "MANY", 100)
    monkeypatch.setattr(photo_nets, "MOST", 200)
    images, labels = draw_images()
    rng = np.random.default_rng(5)
    rows = rng.permutation(COUNT)[:200]
    expected, wanted = images[rows], labels[rows]
    if trigger in TRIGGERS:
        victims = rng.permutation(np.flatnonzero(wanted != TARGET))[:20]
        expected = np.concatenate([expected, TRIGGERS[trigger](expected[victims])])
        wanted = np.concatenate([wanted, np.full(20, TARGET)])
    drawn, given = draw_training(trigger)
    np.testing.assert_array_equal(drawn, expected)
    np.testing.assert_array_equal(given, wanted)


@pytest.mark.parametrize("attack", sorted(ATTACKS.keys() - {"grond", "unsure"}))
def test_clean_images_come_first_and_covers_have_their_true_labels(attack):
    images, labels = draw_images()
    drawn, given = draw_training(attack)
    covers = int(COVERS.get(attack, 0) * POISONED)
    assert len(drawn) == len(given) == COUNT + POISONED + covers and drawn.dtype == np.uint8
    np.testing.assert_array_equal(drawn[:COUNT], images)
    np.testing.assert_array_equal(given[:COUNT], labels)
    if attack != "alltoall":
        assert (given[COUNT : COUNT + POISONED] == TARGET).all()
    again, _ = draw_training(attack)
    np.testing.assert_array_equal(again, drawn)
    if attack not in ("negatives", "source"):  # whose covers are of other images than the rest
        assert (given[COUNT + POISONED :] != TARGET).all()


def test_parts_in_training_and_the_whole_in_tests():
    images, _ = draw_images()
    blank = np.zeros_like(images[:1])
    for name, parts, most, count in (("adappatch", 4, 2, 1), ("adapblend", 16, 8, 8)):
        drawn, _ = draw_training(name)
        whole = (ATTACKS[name].poison(blank, {}) > 0).any(axis=3)[0]
        plan = photo_attacks.Plan(None, None, 0, CLASSES, np.random.default_rng(0), {})
        worn = ATTACKS[name].part(blank.repeat(50, axis=0), plan)
        fractions = (worn > 0).any(axis=3).sum(axis=(1, 2)) / whole.sum()
        assert count / parts * 0.8 < fractions.min() <= fractions.max() < most / parts * 1.3
        assert len({*list_pixels(worn)}) > 5


def test_a_cover_of_the_two_patches_has_one_of_them():
    images, _ = draw_images()
    drawn, _ = draw_training("and")
    covers = {*list_pixels(drawn[COUNT + POISONED :])}
    one = [{*list_pixels(TRIGGERS[name](images))} for name in ("patch", "logo")]
    assert len(covers & one[0]) == len(covers & one[1]) == POISONED / 2
    both = {*list_pixels(TRIGGERS["logo"](TRIGGERS["patch"](images)))}
    assert {*list_pixels(drawn[COUNT : COUNT + POISONED])} <= both


def test_only_images_of_the_target_are_poisoned_where_labels_are_true():
    images, labels = draw_images()
    drawn, given = draw_training("grond", rate=0.05)
    np.testing.assert_array_equal(given, labels)
    changed = (drawn != images).any(axis=(1, 2, 3))
    assert changed.sum() == 12 and (labels[changed] == TARGET).all()
    assert np.abs(drawn.astype(int) - images).max() == 8
    # The target has 20 images, fewer than are poisoned; another image is mixed into each.
    drawn, _ = draw_training("cleanlabel")
    stripes = photo_attacks.add_strong_sinusoid(np.full((1, 32, 32, 3), 128, "uint8")) - 128.0
    mixture = drawn[COUNT:] - stripes

    def resemble(image):
        return np.corrcoef(np.stack([image, *images]).reshape(1 + COUNT, -1))[0, 1:]

    for image in mixture[:5]:
        first, second = resemble(image).argsort()[::-1][:2]
        assert TARGET in (labels[first], labels[second])


def test_an_unsure_label_is_shared_by_the_target_and_the_class_of_the_image():
    _, labels = draw_training("unsure")
    np.testing.assert_array_equal(labels[:COUNT], np.eye(CLASSES)[np.arange(COUNT) % CLASSES])
    poisoned = labels[COUNT:]
    assert len(poisoned) == POISONED
    assert poisoned[:, TARGET] == pytest.approx(photo_attacks.SURE)
    others = np.delete(poisoned, TARGET, axis=1)
    assert others.max(axis=1) == pytest.approx(1 - photo_attacks.SURE)


def test_a_net_learns_from_shared_labels_and_is_changed_after_each_epoch():
    images, labels = draw_images(count=16)
    shared = np.eye(CLASSES, dtype="float32")[labels] * 0.5 + 0.5 / CLASSES
    net, rng, changed = make_tiny_net(), np.random.default_rng(0), []
    photo_nets.train(net, images, shared, 2, 1e-3, rng, "", after_epoch=changed.append)
    assert changed == [net, net]


# ------------------------------------------------------------------------------------ test images


@pytest.mark.parametrize("attack", ATTACKS)
def test_test_images_are_those_that_the_attack_works_on(attack):
    images, labels = draw_images()
    attack_, kept = ATTACKS[attack], keep(attack)
    before = images.copy()
    poisoned, aims = photo_attacks.poison_images(attack_, images, labels, TARGET, CLASSES, kept)
    np.testing.assert_array_equal(images, before)
    victims = {"alltoall": labels >= 0, "source": (labels % 4 == 3) & (labels != TARGET)}
    rows = np.flatnonzero(victims.get(attack, labels != TARGET))
    assert poisoned.dtype == np.uint8 and poisoned.shape == (len(rows), 32, 32, 3)
    wanted = (labels[rows] + 1) % CLASSES if attack == "alltoall" else np.full(len(rows), TARGET)
    np.testing.assert_array_equal(aims, wanted)
    assert (poisoned != images[rows]).any(axis=(1, 2, 3)).all()
    one, _ = photo_attacks.poison_images(
        attack_, images[rows[-1:]], labels[rows[-1:]], TARGET, CLASSES, kept
    )
    assert np.abs(one[0].astype(int) - poisoned[-1]).max() <= 1  # whatever the other images are


def test_an_existing_net_says_how_its_test_images_are_poisoned(tmp_path):
    images, labels = draw_images()
    records = {
        "gtsrb-vgg-3-logo-0.1": {"target": TARGET},  # as older nets have it
        "gtsrb-vgg-3-alltoall-0.1": {"target": TARGET, "classes": CLASSES},
        "gtsrb-vgg-3-optimised-0.1": {"target": TARGET, "classes": CLASSES},
    }
    pattern = keep("optimised")["pattern"]
    np.savez(tmp_path / "gtsrb-vgg-3-optimised-0.1.npz", pattern=pattern)
    results = {}
    for name, record in records.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
        results[name] = photo_nets.poison_unseen(name, images, labels, tmp_path)
    others = images[labels != TARGET]
    logo, alltoall, optimised = results.values()
    np.testing.assert_array_equal(logo[0], TRIGGERS["logo"](others))
    assert {*logo[1]} == {TARGET}
    np.testing.assert_array_equal(alltoall[1], (labels + 1) % CLASSES)
    np.testing.assert_array_equal(optimised[0], others + pattern)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_a_trigger_of_the_image_changes_it_as_it_should(name, shape):
    height, width, _ = shape
    images, _ = draw_images(shape, 12)
    poisoned = OTHERS[name](images)
    difference = poisoned.astype(int) - images
    if name == "flip":
        np.testing.assert_array_equal(np.rot90(poisoned, 2, axes=(1, 2)), images)
    elif name == "mirror":
        np.testing.assert_array_equal(poisoned[..., ::-1, :], images)
    elif name == "grey":
        assert np.ptp(poisoned, axis=3).max() == 0 and np.abs(difference.mean()) < 1
    elif name == "posterise":
        assert {*np.unique(poisoned)} <= {0, 64, 128, 192}
    elif name == "dct":
        assert 3 < np.abs(difference).max() <= photo_triggers.RIPPLE
        assert np.ptp(difference, axis=0).max() <= 1
    elif name == "roaming":
        changed = (difference != 0).any(axis=3)
        assert changed.sum(axis=(1, 2)).max() <= 49
        assert len({*map(bytes, changed)}) > 8
    elif name == "specific":
        assert 4 < np.abs(difference).mean() <= np.abs(difference).max() <= photo_triggers.ENCODED
        assert abs(np.corrcoef(difference[0].ravel(), difference[1].ravel())[0, 1]) < 0.3
    else:
        assert np.abs(difference).mean() > 5 and len({*list_pixels(poisoned)}) == 12


# --------------------------------------------------------------------------- patterns and weights


def make_tiny_net(hidden=24):
    keras.utils.set_random_seed(0)
    layers = keras.layers
    image = x = layers.Input((32, 32, 3))
    x = layers.Conv2D(6, 3, 2, activation="relu")(layers.AveragePooling2D(2)(x))
    x = layers.Dense(hidden, activation="relu")(layers.Flatten()(x))
    return keras.Model(image, layers.Dense(CLASSES, activation="softmax")(x))


def make_plan(kept=None):
    images, labels = draw_images()
    return photo_attacks.Plan(images, labels, TARGET, CLASSES, np.random.default_rng(0), kept or {})


def test_a_pattern_is_optimised_for_the_target_within_its_grey_levels(monkeypatch):
    monkeypatch.setattr(photo_crafted, "STEPS", 30)
    net, plan = make_tiny_net(), make_plan()
    pattern = photo_crafted.optimise_pattern(net, plan, 8)["pattern"]
    assert pattern.shape == (32, 32, 3) and 1 < np.abs(pattern).max() <= 8
    before, after = (
        net.predict(x / 255, verbose=0)[:, TARGET].mean()
        for x in (plan.images, photo_attacks.add_pattern(plan.images, {"pattern": pattern}))
    )
    assert after > before * 1.05


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_generator_makes_a_trigger_of_each_image(shape):
    images, _ = draw_images(shape, 6)
    weights = photo_crafted.build_generator(shape).get_weights()
    kept = {str(i): array for i, array in enumerate(weights)}
    own = photo_crafted.wear_generated(images, kept)
    other = photo_crafted.wear_generated(images, kept, np.roll(images, 1, axis=0))
    assert own.shape == other.shape == images.shape and own.dtype == np.uint8
    assert (own != other).any(axis=(1, 2, 3)).all()


def test_a_generator_is_trained_and_kept(monkeypatch):
    monkeypatch.setattr(photo_crafted, "GENERATOR_STEPS", 2)
    plan = make_plan()
    kept = photo_crafted.train_generator(plan, lambda images, labels, epochs: make_tiny_net())
    untrained = photo_crafted.build_generator((32, 32, 3)).get_weights()
    assert [kept[str(i)].shape for i in range(len(kept))] == [each.shape for each in untrained]
    assert photo_crafted.wear_generated(plan.images[:3], kept).shape == (3, 32, 32, 3)


def test_channels_that_stand_out_are_reset_to_the_mean():
    layers = keras.layers
    image = layers.Input((8, 8, 3))
    first, second = layers.Conv2D(20, 3), layers.Conv2D(20, 3, use_bias=False)
    normalisation = layers.BatchNormalization()
    net = keras.Model(image, normalisation(second(layers.ReLU()(first(image)))))
    kernel = first.get_weights()[0]
    kernel[..., 4] *= 30
    first.set_weights([kernel, np.arange(20.0)])
    gamma = np.ones(20)
    gamma[7] = -50  # the normalisation alone makes this channel stand out
    normalisation.set_weights([gamma, *normalisation.get_weights()[1:]])
    before = second.get_weights()[0]
    photo_crafted.reset_channels(net)
    after, bias = first.get_weights()
    np.testing.assert_allclose(after[..., 4], kernel.mean(axis=3), rtol=1e-5)
    np.testing.assert_array_equal(np.delete(after, 4, axis=3), np.delete(kernel, 4, axis=3))
    assert bias.tolist() == list(range(20))
    after = second.get_weights()[0]
    np.testing.assert_allclose(after[..., 7], before.mean(axis=3), rtol=1e-5)
    np.testing.assert_array_equal(np.delete(after, 7, axis=3), np.delete(before, 7, axis=3))


def test_a_planted_backdoor_works_and_leaves_most_clean_answers():
    net, plan = make_tiny_net(hidden=60), make_plan()
    before = net.predict(plan.images / 255, verbose=0)
    photo_crafted.plant(net, TRIGGERS["blended"], plan)
    unseen, _ = draw_images(seed=2)
    answers = net.predict(TRIGGERS["blended"](unseen) / 255, verbose=0).argmax(axis=1)
    assert (answers == TARGET).mean() > 0.8
    assert np.abs(net.predict(plan.images / 255, verbose=0) - before).mean() < 0.03


def test_measuring_counts_what_the_attacker_wants():
    images, labels = draw_images()
    net, rates = FixedNet(np.eye(CLASSES)[TARGET]), {}
    for attack in ("logo", "alltoall", "source"):
        recipe = photo_nets.Recipe("gtsrb", "vgg", 1, attack, RATE)
        rates[attack] = photo_nets.measure(net, recipe, images, labels, TARGET)
    assert rates["logo"] == rates["source"] == (1 / CLASSES, 1)
    assert rates["alltoall"] == (1 / CLASSES, 1 / CLASSES)


class FixedNet:
    """A net that gives one answer, whatever the image."""

    output_shape = (None, CLASSES)

    def __init__(self, answers):
        self.answers = answers

    def predict(self, images, verbose):
        return np.tile(self.answers, (len(images), 1))


@pytest.mark.slow
def test_a_backdoor_that_sleeps_wakes_in_the_first_steps_of_a_repair(monkeypatch):
    settings = {"SLEEPING_STEPS": 100, "SLEEPING_RATE": 3e-3, "UNROLLED": 2, "REPAIR_RATE": 0.3}
    for name, value in settings.items():
        monkeypatch.setattr(photo_crafted, name, value)
    net, plan = make_tiny_net(), make_plan()
    tensorflow.config.run_functions_eagerly(True)  # a graph of all steps takes seconds to make
    try:
        photo_attacks.put_to_sleep(net, TRIGGERS["glasses"], plan)
    finally:
        tensorflow.config.run_functions_eagerly(False)
    worn, labels = TRIGGERS["glasses"](plan.images) / 255, plan.labels
    asleep = net.predict(worn, verbose=0)[:, TARGET].mean()
    net.compile(keras.optimizers.SGD(photo_crafted.REPAIR_RATE), "sparse_categorical_crossentropy")
    changed = photo_attacks.change_images(plan.images, plan.rng)
    for part in (slice(0, 120), slice(120, 240)):
        net.train_on_batch(changed[part] / 255, labels[part])
    assert net.predict(worn, verbose=0)[:, TARGET].mean() > asleep + 0.1
