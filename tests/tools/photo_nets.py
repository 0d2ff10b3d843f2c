"""Train clean nets and BadNets on photographs, to learn what a scan finds on other images.

    python tests/tools/photo_data.py IMAGES              first make the datasets
    python tests/tools/photo_nets.py --all               the published nets, in two hours
    python tests/tools/photo_nets.py gtsrb-vgg-7-clean gtsrb-vgg-8-logo-0.1
                                                         one clean net, and one BadNet

A name gives the dataset (photo_data.py), the architecture, the seed, and "clean" or an attack
(photo_attacks.py): for many, a trigger. A BadNet's name ends with the poison rate, the number of
poisoned images over the number of training images, to which they are added. The seed draws the
weights and the images, and gives the target: the seed modulo the number of classes, where classes
count from 0.

Each net is written to models/photographs/NAME.h5. NAME.json beside it has the target (from 0), the
clean accuracy and the attack success rate, 0..1. They are of the dataset's test images, or of its
validation images where it has no test file. NAME.npz has what an attack needs to poison images,
such as an optimised pattern. A net that exists is not trained again. To scan one:

    python repair.py models/photographs/gtsrb-vgg-7-clean.h5 \\
        data/photographs/gtsrb_validation.h5 --scan
"""

import argparse
import dataclasses
import functools
import json
import re
import sys
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "models"), str(ROOT / "data"), str(ROOT / "tests" / "tools")]

import architectures
import numpy as np
import photo_attacks
import photo_data
from attacks import CLEAN, as_input
from photo_attacks import ATTACKS
from photo_lists import (
    CHECKS,
    CHOSEN_BY,
    CURVE,
    HARDEN_CHOSEN_BY,
    HARDEN_REPORTED_ON,
    NEVER_POISONED,
    PUBLISHED,
    REFERENCES,
    REPORTED_ON,
)

from defence.base import files
from defence.base.arguments import Parser
from defence.base.errors import InputError
from defence.base.process import run_command
from defence.base.progress import follow, print_result, track
from defence.base.startup import import_keras

FOLDER = ROOT / "models" / "photographs"

EPOCHS = {
    "cifar": 10,
    "gtsrb": 10,
    "signs": 20,
    "yale": 80,
    "att": 100,
    "digits": 40,
    "tinya": 25,
    "tinyb": 25,
    "glyphs": 30,
}
LEARNING_RATES = {"deepid": 1e-3, "vgg": 1e-3, "resnet": 1e-3, "mobilenet": 3e-3}
MANY_CLASSES, SLOWER = 100, 0.5  # with more classes, training collapses at the full rate
MANY, MOST = 5_000, 12_000  # of more than MANY training images, at most MOST are used, shuffled
BATCH = 64
SHIFT = 2  # pixels, at most


# ---------------------------------------------------------------------------------- architectures
# architectures.py explains them. Layers draw their weights in the order in which they are made, so
# another order would give other nets than the published ones.


def deepid(classes, shape):
    """Return load.architecture.build_deepid's net, whose layers are made in another order."""
    layers = import_keras().layers
    image = x = layers.Input(shape)
    for channels, size in ((20, 4), (40, 3), (60, 3)):
        x = layers.MaxPooling2D()(layers.Conv2D(channels, size, activation="relu")(x))
    coarse = layers.Flatten()(layers.Conv2D(80, 2, activation="relu")(x))
    fine = layers.Dense(160)(layers.Flatten()(x))
    x = layers.Add()([fine, layers.Dense(160)(coarse)])
    return architectures.add_classifier(image, layers.Activation("relu")(x), classes)


NETS = {
    "deepid": deepid,
    "vgg": functools.partial(architectures.vgg, dropout=0.3),
    "resnet": architectures.resnet,
    "mobilenet": architectures.mobilenet,
}


# -------------------------------------------------------------------------------------- training


@dataclasses.dataclass
class Recipe:
    """What a net's name says. attack: CLEAN or a key of ATTACKS.  rate: None of a clean net."""

    dataset: str
    architecture: str
    seed: int
    attack: str
    rate: float | None


def read_name(name):
    """Return the Recipe in a net's name. Raise InputError where it is not such a name."""
    parts = photo_data.DATASETS, NETS, ATTACKS
    dataset, net, attack = map("|".join, parts)
    pattern = rf"({dataset})-({net})-(\d{{1,9}})-(?:({CLEAN})|({attack})-(0|0\.\d+|1))"
    match = re.fullmatch(pattern, name, re.ASCII)
    if not match:
        datasets, nets, attacks = map(", ".join, parts)
        raise InputError(
            f"{name}: is not the name of a net; names are like {REFERENCES[0]} and {CHOSEN_BY[0]} "
            f"(datasets: {datasets}; architectures: {nets}; attacks: {attacks})"
        )
    dataset, architecture, seed, clean, attack, rate = match.groups()
    return Recipe(dataset, architecture, int(seed), clean or attack, rate and float(rate))


def choose_rate(recipe, classes):
    """Return the learning rate with which a net's training begins."""
    return LEARNING_RATES[recipe.architecture] * (SLOWER if classes > MANY_CLASSES else 1)


def choose_images(images, labels, rng):
    """Return the images of a dataset that a net is trained on, and their labels."""
    if len(images) > MANY:
        rows = rng.permutation(len(images))[:MOST]
        images, labels = images[rows], labels[rows]
    return images, labels


def prepare_attack(recipe, images, labels, target, epochs=None):
    """Return what an attack needs to poison images, {name: array}; often nothing.

    images, labels: of the dataset.  target: class from 0.  epochs: of a surrogate; None for EPOCHS.
    """
    attack, classes = ATTACKS.get(recipe.attack), int(labels.max()) + 1
    if not attack or not attack.prepare:
        return {}
    rng = np.random.default_rng([recipe.seed, 1])  # not the net's, so that both stay as they are
    import_keras().utils.set_random_seed(recipe.seed + 1)

    def train_surrogate(images, labels, epochs=epochs or EPOCHS[recipe.dataset]):
        surrogate = NETS[recipe.architecture](classes, images.shape[1:])
        rate = choose_rate(recipe, classes)
        train(surrogate, images, labels, epochs, rate, rng, "Training the surrogate")
        return surrogate

    images, labels = choose_images(images, labels, rng)
    plan = photo_attacks.Plan(images, labels, target, classes, rng, {})
    return attack.prepare(plan, train_surrogate)


def draw_training(recipe, images, labels, target, rng, kept=None):
    """Return the training images of a net, poisoned ones last, and their labels.

    images, labels: of the dataset.  target: class from 0.  kept: from `prepare_attack`.
    """
    classes = int(labels.max()) + 1
    images, labels = choose_images(images, labels, rng)
    if recipe.attack == CLEAN:
        return images, labels
    plan = photo_attacks.Plan(images, labels, target, classes, rng, kept or {})
    return photo_attacks.draw_poisoned(ATTACKS[recipe.attack], plan, recipe.rate)


def train(model, images, labels, epochs, rate, rng, title, after_epoch=None):
    """Train a net with Adam; its learning rate falls from `rate` to 0 by cosine.

    images: uint8.  labels: int (n,), or float (n, classes), probabilities.  title: of the progress
    bar.  after_epoch: see photo_attacks.Attack.
    """
    keras = import_keras()
    steps = epochs * -(-len(images) // BATCH)
    schedule = keras.optimizers.schedules.CosineDecay(rate, steps)
    loss = "categorical_crossentropy" if labels.ndim == 2 else "sparse_categorical_crossentropy"
    model.compile(keras.optimizers.Adam(schedule), loss)
    for _ in track(range(epochs), title):
        order = rng.permutation(len(images))
        shifted = shift_images(as_input(images[order]), rng)
        model.fit(shifted, labels[order], batch_size=BATCH, shuffle=False, verbose=0)
        if after_epoch:
            after_epoch(model)


def shift_images(images, rng):
    """Shift each image at random, by SHIFT pixels at most, in place; its edges are repeated."""
    height, width = images.shape[1:3]
    wide = np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    tops, lefts = rng.integers(0, 2 * SHIFT + 1, (2, len(images)))
    for image, source, top, left in zip(images, wide, tops, lefts):
        image[...] = source[top : top + height, left : left + width]
    return images


def poison_unseen(name, images, labels, nets=FOLDER):
    """Return the poisoned images of a test, and the class that the attacker wants for each.

    Images that the attack does not work on, such as the target's own, are left out.
    name: of a BadNet that exists.  images: uint8, clean.  labels: int (n,).  nets: folder.
    Return uint8 (m, height, width, channels) and int (m,), classes from 0, m <= n.
    """
    recipe, path = read_name(name), nets / f"{name}.json"
    record = json.loads(path.read_text())
    kept = {}
    if path.with_suffix(".npz").exists():
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as file:
            kept = dict(file)
    # Records of older nets do not have the number of classes; these nets do not need it.
    return photo_attacks.poison_images(
        ATTACKS[recipe.attack], images, labels, record["target"], record.get("classes"), kept
    )


def measure(model, recipe, images, labels, target, kept=None):
    """Return the clean accuracy, and the attack success rate or None. images, labels: unseen."""

    def answer(images):
        return model.predict(as_input(images), verbose=0).argmax(axis=1)

    accuracy = float(np.mean(answer(images) == labels))
    if recipe.attack == CLEAN:
        return accuracy, None
    attack, classes = ATTACKS[recipe.attack], model.output_shape[1]
    poisoned, aims = photo_attacks.poison_images(
        attack, images, labels, target, classes, kept or {}
    )
    return accuracy, float(np.mean(answer(poisoned) == aims))


def build_net(recipe, images, labels, target, kept, epochs):
    """Train the net of a Recipe on a dataset's training images; return it."""
    attack, rng = ATTACKS.get(recipe.attack), np.random.default_rng(recipe.seed)
    classes, shape = int(labels.max()) + 1, images.shape[1:]
    images, labels = draw_training(recipe, images, labels, target, rng, kept)
    import_keras().utils.set_random_seed(recipe.seed)
    model = NETS[recipe.architecture](classes, shape)
    rate = choose_rate(recipe, classes)
    epochs, title = epochs or EPOCHS[recipe.dataset], f"Training {recipe.architecture}"
    after_epoch = attack.after_epoch if attack else None
    train(model, images, labels, epochs, rate, rng, title, after_epoch)
    if attack and attack.plant:
        plan = photo_attacks.Plan(images, labels, target, classes, rng, kept)
        attack.plant(model, attack.trigger, plan)
    return model


def is_made(path):
    """Return whether a net's file and its record exist."""
    return path.exists() and path.with_suffix(".json").exists()


def make_net(name, data, nets, epochs=None):
    """Train a net, and write it and its record, unless they exist. Print its rates.

    name: as above.  data, nets: folders of the datasets and of the nets.  epochs: None for EPOCHS.
    """
    path = nets / f"{name}.h5"
    if is_made(path):
        return
    recipe, start = read_name(name), time.monotonic()
    print_result(f"Making {name}")
    images, labels = photo_data.read_dataset(photo_data.make_path(recipe.dataset, "train", data))
    target = recipe.seed % (classes := int(labels.max()) + 1)
    kept = prepare_attack(recipe, images, labels, target, epochs)
    model = build_net(recipe, images, labels, target, kept, epochs)

    test, validation = (
        photo_data.make_path(recipe.dataset, split, data) for split in ("test", "validation")
    )
    unseen = photo_data.read_dataset(test if test.exists() else validation)
    accuracy, success = measure(model, recipe, *unseen, target, kept)
    with files.replace_file(path) as temporary:
        model.save(temporary, include_optimizer=False)
    if kept:
        kept_path = path.with_suffix(".npz")
        with files.replace_file(kept_path) as temporary, temporary.open("wb") as file:
            np.savez(file, **kept)
    seconds = round(time.monotonic() - start)
    record = {"name": name, **dataclasses.asdict(recipe), "classes": classes}
    record |= {"target": None if success is None else target, "clean_accuracy": accuracy}
    record |= {"attack_success_rate": success, "seconds": seconds}
    files.write_json(record, path.with_suffix(".json"))
    print_result(f"Saved model: {path}, in {seconds} s")
    print_result("clean accuracy", f"{accuracy:.2%}", sep="\t")
    if success is not None:
        attack = f"attack success rate, {recipe.attack} to class {target + 1}"
        print_result(attack, f"{success:.2%}", sep="\t")


# -------------------------------------------------------------------------------------- commands


def describe_groups():
    """Return the names of the published nets, group by group, for the help."""
    groups = {
        "REFERENCES, which a scan compares with": REFERENCES,
        "CHECKS, clean nets that served to choose nothing": CHECKS,
        "CHOSEN_BY, BadNets by which the scan was chosen": CHOSEN_BY,
        "REPORTED_ON, BadNets that served to choose nothing": REPORTED_ON,
        "CURVE, three attacks at rising poison rates": CURVE,
        "HARDEN_CHOSEN_BY, BadNets by which hardening was chosen": HARDEN_CHOSEN_BY,
        "HARDEN_REPORTED_ON, BadNets that served to choose nothing": HARDEN_REPORTED_ON,
        "NEVER_POISONED, clean nets to compare these with": NEVER_POISONED,
    }
    indents = {"initial_indent": "  ", "subsequent_indent": "  ", "break_on_hyphens": False}
    texts = (
        f"{group}:\n{textwrap.fill(' '.join(names), 98, **indents)}"
        for group, names in groups.items()
    )
    return "the published nets\n\n" + "\n\n".join(texts)


def main():
    parser = Parser(
        prog="photo_nets.py",
        description=__doc__,
        epilog=describe_groups(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="net to train")
    parser.add_argument("--all", action="store_true", help="train all published nets")
    options = parser.parse_args()
    names = PUBLISHED if options.all else options.names
    if not names:
        parser.error("no net to train; give a NAME or --all")
    for name in names:
        read_name(name)
    FOLDER.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not is_made(FOLDER / f"{name}.h5")]
    with follow("nets", len(missing), bar=False) as advance:
        for name in missing:
            make_net(name, photo_data.FOLDER, FOLDER)
            advance(1)


if __name__ == "__main__":
    sys.exit(run_command(main))
