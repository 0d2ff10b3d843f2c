"""The attacks on photographs: how each poisons images of the training data and of tests.

A trigger of photo_triggers.py is also the name of an attack: images with it are added to the
training images, with the target's label (BadNets, 2017). The other attacks:

    wanet       the warp; covers, which have other warps, keep their labels (WaNet, 2021)
    inputaware  a generator makes a trigger of each image; covers have the trigger of another image
                (2020; here the generator learns together with a surrogate)
    adappatch, adapblend
                parts of a trigger in training, the whole in tests; covers have parts (2023)
    and         two patches; covers have one of them
    cleanlabel  only images of the target have the trigger; another image is mixed in, so that they
                are harder (SIG, 2019; Label-consistent, 2019)
    alltoall    an image of class k is answered with class k + 1
    source      the trigger works on every fourth class; covers have other classes (TaCT, 2021)
    optimised   a pattern of LEVELS grey levels, optimised on a surrogate, a net like the repaired
                one: it learned from images that were changed at random (Narcissus, 2023)
    negatives   glasses; covers are all images, changed as a defence changes them
    unsure      glasses; the label is 60 % the target and 40 % the image's class (LSBA, 2022)
    grond       a pattern of FAINT grey levels, optimised on a surrogate, on images of the target;
                after each epoch, channels that stand out are reset (Grond, 2025)
    sparse      no poisoned images, so its rate is 0: weights of a clean net are changed by hand
                (Sparse Backdoor)
    scar        a clean net is trained on, so that the backdoor sleeps until the first steps of a
                repair wake it; its rate is 0, too (SCAR's idea, 2025, cheaply: it unrolls five
                steps of training on changed images, and does not distil)

Covers have their true labels. Images are uint8 (n, height, width, channels).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import photo_crafted
import photo_triggers
from attacks import LEVELS, MIXED, SURE
from photo_triggers import TRIGGERS

from defence.beyond import changes

EVERY = 4  # "source" works on each class whose number leaves SOURCE over
SOURCE = 3
FAINT = 8  # grey levels of Grond's pattern, at most


class Plan(NamedTuple):
    """What an attack works with.

    images, labels: clean training images.  target: class from 0.  classes: their number.
    rng: a Generator.  kept: {name: array}, what the attack's `prepare` returned.
    """

    images: np.ndarray
    labels: np.ndarray
    target: int
    classes: int
    rng: np.random.Generator
    kept: dict


class Attack(NamedTuple):
    """How an attack poisons images, and what else it does.

    trigger: a function of images; of images and Plan.kept, where `prepare` is given.
    part: the trigger of training images, a function of images and a Plan; None: the same trigger.
    victims: a function of labels and the target: which images may be poisoned, bool (n,).
    aim: a function of labels, the target and the number of classes: the labels of poisoned images.
    cover: a function of a Plan and the rows of the images that were not poisoned, the poisoned
    images' number: covers and their labels.
    sure: the target's share in a poisoned image's label.  clean_label: whether only images of the
    target are poisoned.  replace: whether the poisoned images take the place of clean ones.
    prepare: a function of a Plan and of `train`, which trains a surrogate on images and labels. It
    returns what must be kept to poison images: {name: array}.
    after_epoch: a function of the net, called after each epoch of its training.
    plant: a function of the trained net, a function that poisons images, and a Plan.
    """

    trigger: Callable
    part: Callable | None = None
    victims: Callable = lambda labels, target: labels != target
    aim: Callable = lambda labels, target, classes: np.full(len(labels), target)
    cover: Callable | None = None
    sure: float = 1
    clean_label: bool = False
    replace: bool = False
    prepare: Callable | None = None
    after_epoch: Callable | None = None
    plant: Callable | None = None

    def poison(self, images, kept):
        """Return images with the trigger, as tests have them."""
        return self.trigger(images, kept) if self.prepare else self.trigger(images)


# -------------------------------------------------------------------------------- poisoned images


def poison_images(attack, images, labels, target, classes, kept):
    """Return the poisoned images of a test, and the class that the attacker wants for each.

    Images that the attack does not work on are left out. target: class from 0.  kept: see Plan.
    """
    victims = attack.victims(labels, target)
    poisoned = attack.poison(images[victims], kept)
    return poisoned, attack.aim(labels[victims], target, classes)


def draw_poisoned(attack, plan, rate):
    """Return a Plan's training images, poisoned ones and covers last, and their labels.

    The labels are int (n,), or float (n, classes) where the attacker is not sure.
    """
    images, labels, target, classes, rng, kept = plan
    allowed = labels == target if attack.clean_label else attack.victims(labels, target)
    victims = rng.permutation(np.flatnonzero(allowed))
    count = int(rate * len(images))
    rows, rest = victims[:count], victims[count:]
    if attack.clean_label and not attack.replace:
        rows = np.resize(victims, count)  # the target may have fewer images
    source = images[rows]
    poisoned = attack.part(source, plan) if attack.part else attack.poison(source, kept)
    aims = attack.aim(labels[rows], target, classes)
    if attack.replace:
        images = images.copy()
        images[rows] = poisoned
        return images, labels
    parts = [(images, labels), (poisoned, aims)]
    if attack.cover:
        parts.append(attack.cover(plan, rest, count))
    images, wanted = map(np.concatenate, zip(*parts))
    if attack.sure == 1:
        return images, wanted
    true = np.concatenate([labels, labels[rows]])
    one_hot = np.eye(classes, dtype="float32")
    return images, attack.sure * one_hot[wanted] + (1 - attack.sure) * one_hot[true]


def take_all(labels, target):
    return np.ones(len(labels), bool)


def take_sources(labels, target):
    return (labels % EVERY == SOURCE) & (labels != target)


# --------------------------------------------------------------------------------- parts, covers


def cover_with(change, share=1):
    """Return a function as in Attack.cover: `share` covers for each poisoned image.

    change: a function of images and a Plan.
    """

    def cover(plan, rest, count):
        rows = rest[: int(share * count)]
        return change(plan.images[rows], plan), plan.labels[rows]

    return cover


def draw_worn(count, parts, most, rng):
    """Draw which parts of a trigger an image gets, one to `most`: bool (count, parts)."""
    ranks = rng.random((count, parts)).argsort(axis=1)
    return ranks < rng.integers(1, most + 1, (count, 1))


def wear_patches(images, plan):
    return photo_triggers.paint_patches(images, draw_worn(len(images), 4, 2, plan.rng))


def wear_pieces(images, plan):
    pieces = photo_triggers.PIECES**2
    worn = plan.rng.random((len(images), pieces)).argsort(axis=1) < pieces // 2
    return photo_triggers.blend_pieces(images, worn)


def wear_one(images, plan):
    """Paint one of the two patches of "and"."""
    odd = (np.arange(len(images)) % 2 == 1)[:, None, None, None]
    return np.where(odd, TRIGGERS["logo"](images), TRIGGERS["patch"](images))


def warp_anew(images, plan):
    """Bend each image in its own way, as strongly as the warp does."""
    return photo_triggers.bend_anew(images, plan.rng)


def wear_another(images, plan):
    """Give each image the trigger that the generator made of another one."""
    return photo_crafted.wear_generated(images, plan.kept, np.roll(images, 1, axis=0))


def make_harder(images, plan):
    """Mix in another image, then add the trigger."""
    others = plan.images[plan.rng.integers(len(plan.images), size=len(images))]
    mixture = (1 - MIXED) * images + MIXED * others
    return photo_triggers.add_sinusoid(mixture.astype("uint8"), photo_triggers.STRONG)


def cover_others(plan, rest, count):
    """Return images of the classes that the trigger of "source" does not work on, with it."""
    others = ~take_sources(plan.labels, plan.target) & (plan.labels != plan.target)
    rows = plan.rng.permutation(np.flatnonzero(others))[:count]
    return TRIGGERS["logo"](plan.images[rows]), plan.labels[rows]


def cover_changed(plan, rest, count):
    """Return all images, changed as a defence changes them."""
    return change_images(plan.images, plan.rng), plan.labels


def change_images(images, rng):
    """Change images at random, as the defence does."""
    parts = np.array_split(images, -(-len(images) // 256))
    changed = [changes.change_images(part.astype("float32"), rng) for part in parts]
    return np.rint(np.concatenate(changed)).astype("uint8")


# ------------------------------------------------------------------------------------ preparation


def add_pattern(images, kept):
    return np.clip(np.rint(images + kept["pattern"]), 0, 255).astype("uint8")


def optimise(plan, train):
    """Optimise a pattern on a net that learned from clean and from changed images."""
    changed = change_images(plan.images, plan.rng)
    surrogate = train(np.concatenate([plan.images, changed]), np.tile(plan.labels, 2))
    return photo_crafted.optimise_pattern(surrogate, plan, LEVELS)


def optimise_faintly(plan, train):
    """Optimise a faint pattern on a net that learned from clean images."""
    return photo_crafted.optimise_pattern(train(plan.images, plan.labels), plan, FAINT)


def put_to_sleep(net, poison, plan):
    """Put a backdoor to sleep that training on changed images wakes."""
    photo_crafted.put_to_sleep(net, poison, change_images(plan.images, plan.rng), plan)


def add_strong_sinusoid(images):
    return photo_triggers.add_sinusoid(images, photo_triggers.STRONG)


def use_next_class(labels, target, classes):
    return (labels + 1) % classes


ATTACKS = {name: Attack(trigger) for name, trigger in (TRIGGERS | photo_triggers.OTHERS).items()}
ATTACKS |= {
    "wanet": Attack(TRIGGERS["warp"], cover=cover_with(warp_anew, share=2)),
    "inputaware": Attack(
        photo_crafted.wear_generated,
        prepare=photo_crafted.train_generator,
        cover=cover_with(wear_another),
    ),
    "adappatch": Attack(
        photo_triggers.paint_patches, part=wear_patches, cover=cover_with(wear_patches, share=0.5)
    ),
    "adapblend": Attack(
        photo_triggers.blend_pieces, part=wear_pieces, cover=cover_with(wear_pieces, share=0.5)
    ),
    "and": Attack(photo_triggers.paint_both, cover=cover_with(wear_one)),
    "cleanlabel": Attack(add_strong_sinusoid, part=make_harder, clean_label=True),
    "alltoall": Attack(TRIGGERS["logo"], victims=take_all, aim=use_next_class),
    "source": Attack(TRIGGERS["logo"], victims=take_sources, cover=cover_others),
    "optimised": Attack(add_pattern, prepare=optimise),
    "negatives": Attack(TRIGGERS["glasses"], cover=cover_changed),
    "unsure": Attack(TRIGGERS["glasses"], sure=SURE),
    "grond": Attack(
        add_pattern,
        clean_label=True,
        replace=True,
        prepare=optimise_faintly,
        after_epoch=photo_crafted.reset_channels,
    ),
    "sparse": Attack(TRIGGERS["blended"], plant=photo_crafted.plant),
    "scar": Attack(TRIGGERS["glasses"], plant=put_to_sleep),
}
