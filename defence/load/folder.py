"""A folder of images as a dataset, with a subfolder for each class, as in Keras's guides.

The classes are the names of the subfolders, in the order of a labels.txt in the folder, or else
in alphabetical order, as in Keras's image_dataset_from_directory.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from defence.base import files
from defence.base.errors import InputError
from defence.base.limits import check_fits
from defence.base.text import format_count
from defence.load.class_names import FILE, make_plain, read_class_names
from defence.load.images import make_input, read_image

READERS = 2  # images that are decoded at a time


class FolderImages:
    """The images of a Dataset in files, decoded and resized when a slice of them is read.

    classes: names in the order of the labels.
    listing: a labels.txt that they come from, or None; with one, a class may have no subfolder.
    shape: (n, height, width, channels), with size 0 until `fit_to` is called.
    fingerprints: of all files that are read, when the folder was opened.
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self,
        paths: list[Path],
        classes: list[str],
        listing: Path | None,
        folder: Path,
        max_bytes: int,
    ) -> None:
        self.paths, self.classes, self.listing = paths, classes, listing
        self.folder, self.max_bytes = folder, max_bytes
        read = [*paths, *filter(None, [listing])]
        self.fingerprints = dict(zip(read, map(files.fingerprint_file, read)))
        self.shape: tuple[int, ...] = (len(paths), 0, 0, 0)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def class_names(self) -> list[str]:
        return [make_plain(name) for name in self.classes]

    def fit_to(
        self, shape: tuple[int, ...], classes: int, names: Sequence[str] | None = None
    ) -> np.ndarray:
        """Resize images for a net from now on, and return the label of each class: int64.

        shape: (height, width, channels) of the net's input.  classes: its N.
        names: of the net's classes; where each subfolder has one of them, it gives the label.
        Raise InputError where the net does not fit the images.
        """
        if shape[2] not in (1, 3):
            raise InputError(
                f"{self.folder}: image files have 1 or 3 channels, but the net takes {shape[2]}"
            )
        self.shape = (len(self.paths), *shape)
        places, own = dict(zip(names or [], range(classes))), self.class_names
        if not self.listing and len(places) == classes and {*own} <= places.keys():
            self.classes = list(places)
            return np.array([places[name] for name in own])
        if len(own) == classes:
            return np.arange(classes)
        if self.listing:
            count = format_count(len(own), "name")
            raise InputError(f"{self.listing}: has {count}, but the net has {classes} classes")
        problem = f"{self.folder}: has {format_count(len(own), 'class folder')}, but the net has"
        strange = next((name for name in own if names and name not in places), None)
        if strange is None:
            raise InputError(f"{problem} {classes} classes; list all, one a line, in its {FILE}")
        raise InputError(
            f"{problem} {classes} classes, and {strange!r} is none of them; name each folder after "
            f"a class, such as {next(iter(places))!r}"
        )

    def __getitem__(self, part: slice) -> np.ndarray:
        with ThreadPoolExecutor(READERS) as threads:
            return np.stack(list(threads.map(self.read, self.paths[part]))).astype(np.uint8)

    def read(self, path: Path) -> np.ndarray:
        """Return an image as an input. Raise InputError where it cannot be read, or was changed."""
        image = make_input(read_image(path, self.max_bytes), self.shape[1:])
        self._refuse_changed(path)
        return image

    def hash(self) -> str:
        """Return the SHA-256 of the names and contents of all files that are read.

        Raise InputError where one was changed after the folder was opened.
        """
        digest = hashlib.sha256()
        for path in sorted(self.fingerprints):
            name, sha256 = path.relative_to(self.folder).as_posix(), files.hash_file(path)
            self._refuse_changed(path)
            digest.update(f"{name}\0{sha256}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def _refuse_changed(self, path: Path) -> None:
        if files.fingerprint_file(path) != self.fingerprints[path]:
            raise InputError(f"{path}: was changed while the dataset was being read")


def find_images(folder: Path, max_bytes: int) -> tuple[FolderImages, np.ndarray]:
    """Return the images in a folder's subfolders, at any depth, and their labels, int64 (n,).

    Names that begin with a dot are ignored.
    Raise InputError where there are no images, one is not a regular file, or labels.txt does not
    list a subfolder.
    """
    try:
        contents = sorted(path for path in folder.iterdir() if path.name[0] != ".")
    except OSError as error:
        raise InputError(f"{folder}: {files.describe_reason(error)}") from error
    subfolders = [path.name for path in contents if path.is_dir()]
    loose = [path for path in contents if not path.is_dir() and path.name != FILE]
    if not subfolders:
        raise InputError(
            f"{folder}: has no subfolder of images for each class; put clean images into a folder "
            "named after their class, poisoned ones into a folder named after their target"
        )
    if loose:
        raise InputError(f"{loose[0]}: is not in the folder of a class")
    listing = next((path for path in contents if not path.is_dir()), None)
    classes = read_class_names(listing, max_bytes) if listing else subfolders
    places, counts = dict(zip(classes, range(len(classes)))), collections.Counter(classes)
    paths: list[Path] = []
    labels: list[int] = []
    for name in subfolders:
        if name not in places:
            raise InputError(f"{folder / name}: is not a class in {FILE}")
        if counts[name] > 1:
            raise InputError(f"{folder / FILE}: lists {name!r} more than once")
        class_paths = [files.require_file(path) for path in list_visible(folder / name)]
        paths += class_paths
        labels += [places[name]] * len(class_paths)
    check_fits(folder, "the names of its images", 600 * len(paths), max_bytes)
    if not paths:
        raise InputError(f"{folder}: has no images")
    return FolderImages(paths, classes, listing, folder, max_bytes), np.array(labels)


def list_visible(folder: Path) -> list[Path]:
    """List the files in a folder, at any depth, without those whose path has a dot name."""
    paths = files.list_files([folder])
    return [p for p in paths if not any(part[0] == "." for part in p.relative_to(folder).parts)]


def get_name(path: Path) -> str:
    """Return the last name of a dataset's path, without a directory."""
    return path.name if path.name not in ("", "..") else path.resolve().name
