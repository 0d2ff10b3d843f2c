"""Train clean nets of many kinds, to learn what a scan finds where there is no backdoor.

    python tests/tools/clean_nets.py               all of them, in models/clean-nets/
    python tests/tools/clean_nets.py deepid-101    one of them

A name gives the kind and the seed, which draws other people and starts from other weights.
defence/beyond/finding.json is made of REFERENCES, here and in photo_nets.py. CHECKS test whether
other clean nets raise as few alarms as it promises. A net that exists is not trained again.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "models"), str(ROOT / "data")]

import badnet
import faces
import h5py
import numpy as np

from defence.base import files
from defence.base.arguments import Parser
from defence.base.process import run_command
from defence.base.startup import import_keras
from defence.beyond import changes
from defence.load.architecture import build_deepid

FOLDER = ROOT / "models" / "clean-nets"
IMAGES, EPOCHS = 80, 16  # training images of a person; training
VALIDATION, FEWEST, MOST = 600, 10, 60  # validation images in all; of a person
LEAST_SHARE = 0.1  # of the images that the rarest person of an uneven dataset keeps
DARK, TINT = 0.35, (0.5, 0.6, 1)  # factors of one person's pixels
ODD = 3  # that person, from 0

# kind: {seed: people}
REFERENCES = {
    "deepid": {101: 40, 102: 40, 114: 10, 118: 20},
    "augmented": {131: 40},
    "wide": {141: 40},
    "normalised": {151: 40},
    "uneven": {161: 40},
}
CHECKS = {
    "deepid": {201: 40, 207: 10},
    "normalised": {213: 40},
    "dark": {215: 40},
    "tinted": {217: 40},
}


def list_names(nets):
    """Return the names of REFERENCES or CHECKS, in order."""
    return [f"{kind}-{seed}" for kind, seeds in nets.items() for seed in seeds]


def make_paths(name):
    """Return the paths of a net and of its validation set."""
    return FOLDER / f"{name}.h5", FOLDER / f"{name}_clean_validation_data.h5"


# ----------------------------------------------------------------------------------------- kinds


def build_wide(people):
    """Build a plain stack, wider than DeepID, with dropout."""
    layers = import_keras().layers
    image = x = layers.Input((faces.HEIGHT, faces.WIDTH, 3))
    for channels in (48, 96, 160):
        x = layers.MaxPooling2D()(layers.Conv2D(channels, 3, activation="relu")(x))
    x = layers.Dropout(0.3)(layers.Flatten()(x))
    return build_classifier(image, layers.Dense(256, activation="relu")(x), people)


def build_normalised(people):
    """Build a stack with batch normalisation, as most nets of today have."""
    layers = import_keras().layers
    image = x = layers.Input((faces.HEIGHT, faces.WIDTH, 3))
    for channels in (32, 64, 128):
        x = layers.Conv2D(channels, 3, padding="same", use_bias=False)(x)
        x = layers.MaxPooling2D()(layers.ReLU()(layers.BatchNormalization()(x)))
    x = layers.Flatten()(layers.Conv2D(128, 3, activation="relu")(x))
    return build_classifier(image, layers.Dense(128, activation="relu")(x), people)


def build_classifier(image, x, people):
    """Build a model from an image and the features x, with a softmax layer."""
    keras = import_keras()
    return keras.Model(image, keras.layers.Dense(people, activation="softmax")(x))


def augment(images, rng):
    """Mirror, turn, shift and light images, as training often does."""
    mirrored = rng.random(len(images)) < 0.5
    images[mirrored] = images[mirrored][:, :, ::-1]
    images = changes.move(images, rng, turn=10, scale=0.08, shift=0.05, bend=0)
    return np.clip(images * changes.draw_uniform(rng, 0.8, 1.2, len(images), 1, 1, 1), 0, 255)


def choose_uneven_rows(labels):
    """Return the rows of a dataset in which some people have few images, as in most of real people.

    labels: int (n,).
    """
    rows = []
    for person in range(labels.max() + 1):
        person_rows = np.flatnonzero(labels == person)
        share = max(LEAST_SHARE, np.exp(-2 * person / labels.max()))
        rows.append(person_rows[: round(share * len(person_rows))])
    return np.concatenate(rows)


def mark_odd_person(images, labels, factor):
    """Multiply the pixels of one person by a factor, in place. images: uint8 (n, h, w, 3)."""
    images[labels == ODD] = images[labels == ODD] * np.float32(factor)


# ------------------------------------------------------------------------------------- training


def train(name):
    """Train a net of REFERENCES or CHECKS. Write it and its validation set."""
    kind, seed = name.split("-")
    seed = int(seed)
    people = (REFERENCES.get(kind, {}) | CHECKS.get(kind, {}))[seed]
    images, labels = badnet.draw_clean(people, IMAGES, seed)
    factor = {"dark": DARK, "tinted": TINT}.get(kind)
    if factor:
        images = images.copy()
        mark_odd_person(images, labels, factor)
    if kind == "uneven":
        rows = choose_uneven_rows(labels)
        images, labels = images[rows], labels[rows]
    import_keras().utils.set_random_seed(seed)
    builders = {"wide": build_wide, "normalised": build_normalised}
    model = builders.get(kind, build_deepid)(people)
    path, validation = make_paths(name)
    progress = path.with_suffix(".npz")
    change = augment if kind == "augmented" else None
    rate = EPOCHS, badnet.LEARNING_RATE
    badnet.train(model, images, [labels], [badnet.ENTROPY], *rate, seed, name, progress, change)
    per_person = int(np.clip(VALIDATION / people, FEWEST, MOST))
    faces.write_dataset(validation, "validation", people, per_person, seed=seed)
    if factor:
        mark_dataset(validation, factor)
    with files.replace_file(path) as temporary:
        model.save(temporary, include_optimizer=False)
    progress.unlink()


def mark_dataset(path, factor):
    """Multiply the pixels of one person in a dataset that faces.write_dataset wrote."""
    with h5py.File(path, "r+") as file:
        images = np.moveaxis(file["data"][...], 1, -1)
        mark_odd_person(images, file["label"][...], factor)
        file["data"][...] = np.moveaxis(images, -1, 1)


def main():
    names = list_names(REFERENCES) + list_names(CHECKS)
    parser = Parser(
        prog="clean_nets.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    text = f"{names[0]} to {names[-1]} (default: all)"
    parser.add_argument("names", metavar="NAME", nargs="*", help=text)
    chosen = parser.parse_args().names or names
    for name in chosen:
        if name not in names:
            parser.error(f"no net named {name!r}; choose from {', '.join(names)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        path, _ = make_paths(name)
        if not path.exists():
            train(name)
            print(f"Saved model: {path}", flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
