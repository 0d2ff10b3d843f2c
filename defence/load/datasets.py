"""From an untrusted file or folder to labelled images, read batch after batch."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from defence.base import pixels
from defence.base.errors import InputError
from defence.base.files import fingerprint_file, hash_file, require_file
from defence.base.limits import BATCH_VALUES, DEFAULT_MAX_BYTES, Name, check_fits
from defence.base.text import format_count
from defence.load import guard
from defence.load.folder import FolderImages, find_images, get_name
from defence.load.guard_hdf5 import (
    check_links,
    check_stored,
    describe_array,
    is_array,
    open_hdf5,
    rehearse,
    walk_through,
)

DATASET_SUFFIXES = (".h5", ".hdf5")
GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, are spread over 0..1
ARRAYS = ("data", "label", "original_label")  # of a dataset's file; the last may be absent


class ImageArray(Protocol):
    """An array of images on disk: an h5py.Dataset or a FolderImages."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> np.ndarray: ...


@dataclasses.dataclass
class Dataset:
    """Labelled images in an open HDF5 file or in a folder.

    path: the file or folder.  max_bytes: the memory limit for any one thing in it.
    images: (m, channels, height, width) or (m, height, width, channels), 0..255.
    labels: int64 (n,), 0..N-1.  true_labels: the same for poisoned images, if the file has them.
    fingerprint: the file's when it was opened.  channels_first: None until `fit_to` is called.
    chosen: bool (m,), the n images that belong to this dataset; all if None.
    """

    path: Path
    max_bytes: int
    images: ImageArray
    labels: np.ndarray
    true_labels: np.ndarray | None
    fingerprint: tuple[int, int, int]
    channels_first: bool | None = None
    chosen: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width, channels) of an image. Call `fit_to` first."""
        first, second, third = self.images.shape[1:]
        return (second, third, first) if self.channels_first else (first, second, third)

    @property
    def class_names(self) -> list[str] | None:
        """The names of a folder's classes, in the order of the labels; None of a file's."""
        return self.images.class_names if isinstance(self.images, FolderImages) else None

    @property
    def batch_size(self) -> int:
        return max(1, BATCH_VALUES // int(np.prod(self.images.shape[1:])))

    @property
    def batch_count(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def part(self, rows: np.ndarray) -> Dataset:
        """Return a Dataset of some of the images, in the file's order. rows: bool (n,)."""
        true_labels = None if self.true_labels is None else self.true_labels[rows]
        labels, chosen = self.labels[rows], self._choose(rows)
        return dataclasses.replace(self, labels=labels, true_labels=true_labels, chosen=chosen)

    def _choose(self, rows: np.ndarray) -> np.ndarray:
        """Return which of the m stored images these rows are: bool (m,). rows: bool (n,)."""
        if self.chosen is None:
            return rows
        chosen = self.chosen.copy()
        chosen[chosen] = rows
        return chosen

    def fit_to(
        self, shape: tuple[int, ...], classes: int, names: Sequence[str] | None = None
    ) -> None:
        """Choose the layout in which the images fit a net. Raise InputError where neither fits.

        shape: (height, width, channels) of the net's input.  classes: its N.
        names: of its classes; a folder's labels follow them, as FolderImages.fit_to says.
        """
        if isinstance(self.images, FolderImages):
            self.labels = self.images.fit_to(shape, classes, names)[self.labels]
        height, width, channels = shape
        stored = self.images.shape[1:]
        channels_first = stored == (channels, height, width)
        if not channels_first and stored != (height, width, channels):
            raise InputError(
                f"{self.path}: images are {'×'.join(map(str, stored))}, but the model takes "
                f"{channels}×{height}×{width} or {height}×{width}×{channels}"
            )
        for labels in (self.labels, self.true_labels):
            if labels is not None and labels.max() >= classes:
                from_1 = bool(labels.min() == 1 and labels.max() == classes)
                raise InputError(
                    f"{self.path}: label {labels.max()} is outside 0..{classes - 1}, the labels of "
                    f"the model's {classes} classes"
                    f"{'; labels seem to count from 1: subtract 1' * from_1}"
                )
        self.channels_first = channels_first

    def batches(self, scale: str = "0..255") -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (images, labels): float32 (b, height, width, channels) and int64 (b,).

        scale: the range of the yielded pixels, a key of pixels.SCALES.
        Only one batch is in memory; none is empty. Raise InputError at a pixel that is NaN or
        outside 0..255, and at a first batch of floating-point images that never exceed 1;
        RuntimeError before `fit_to`.
        """
        starts = range(0, len(self.images), self.batch_size)
        parts = (slice(start, start + self.batch_size) for start in starts)
        for x, rows in self._read_parts(parts):
            yield pixels.scale_pixels(x, scale), self.labels[rows]

    def spread_batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (images, rows), float32 (b, height, width, channels), 0..255, and int64 (b,).

        Each image comes once. The images of the first few batches are spread over all the images,
        which a folder has class after class, so that some batches can stand for all.
        Raise InputError and RuntimeError as `batches` does.
        """
        count, size = self.batch_count, self.batch_size
        parts = [slice(start, None, count) for start in range(count)]
        if getattr(self.images, "chunks", None):  # to read one image unpacks its whole chunk
            starts = np.argsort(np.arange(count) * GOLDEN % 1).tolist()
            parts = [slice(start * size, (start + 1) * size) for start in starts]
        return self._read_parts(parts)

    def _read_parts(self, parts: Iterable[slice]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the images in slices of the stored ones, and their rows, as `spread_batches`."""
        if self.channels_first is None:
            raise RuntimeError("call Dataset.fit_to first: it chooses the layout of the images")
        chosen = np.ones(len(self.images), bool) if self.chosen is None else self.chosen
        rows = np.cumsum(chosen) - 1
        for part in parts:
            if not chosen[part].any():
                continue
            x = self._read(part, chosen[part])
            if part.start == 0 and x.max() <= 1 and self.images.dtype.kind == "f":
                raise InputError(
                    f"{self.path}: pixels lie in 0..1; they must be 0..255, so multiply by 255"
                )
            yield x, rows[part][chosen[part]]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return images, float32 (k, height, width, channels), 0..255, in the file's order.

        rows: bool (n,).  Raise InputError as `batches` does, except where all pixels are in 0..1.
        """
        chosen, images = self._choose(rows), [np.empty((0, *self.shape), np.float32)]
        for start in range(0, len(self.images), self.batch_size):
            part = slice(start, start + self.batch_size)
            if chosen[part].any():
                images.append(self._read(part, chosen[part]))
        return np.concatenate(images)

    def pixel_range(self) -> tuple[Any, Any]:
        """Return the smallest and the largest value of a pixel, 0..255."""
        lowest, highest = zip(*((x.min(), x.max()) for x, _ in self.batches()))
        return min(lowest), max(highest)

    def identify(self) -> dict[str, str]:
        """Return {"file", "sha256"}, however the dataset's path is spelled."""
        return {"file": get_name(self.path), "sha256": self.hash()}

    def hash(self) -> str:
        """Return the SHA-256 of the file, or of the names and contents of the folder's files.

        Raise InputError where it was changed after it was opened.
        """
        images: Any = self.images
        digest = images.hash() if isinstance(images, FolderImages) else hash_file(self.path)
        self._refuse_changed()
        return digest

    def _refuse_changed(self) -> None:
        if fingerprint_file(self.path) != self.fingerprint:
            raise InputError(f"{self.path}: was changed while it was being read")

    def _read(self, part: slice, chosen: Any) -> np.ndarray:
        """Return the chosen images of a slice, float32 (b, height, width, channels), 0..255.

        chosen: bool (b,).
        """
        places = range(*part.indices(len(self.images)))
        first, last = places[0], places[-1]
        try:
            stored = self.images[part]
        except InputError:
            raise
        except Exception as error:  # h5py passes on any error of libhdf5
            raise InputError(f"{self.path}: images {first}..{last} are damaged") from error
        self._refuse_changed()  # if a file was cut off after it was opened, libhdf5 reads zeros
        stored = stored[chosen]
        planes = stored if self.channels_first else stored.transpose(0, 3, 1, 2)
        x = np.empty((len(stored), *planes.shape[2:], planes.shape[1]), np.float32)
        for channel in range(planes.shape[1]):  # faster than all at once
            x[..., channel] = planes[:, channel]
        if not (x.min() >= 0 and x.max() <= 255):  # also true of NaN
            pixel = x.min() if x.min() < 0 else x.max()
            raise InputError(
                f"{self.path}: a pixel of images {first}..{last} is {pixel:g}, not within 0..255"
            )
        return x


@contextlib.contextmanager
def open_dataset(path: Name, max_bytes: int = DEFAULT_MAX_BYTES) -> Iterator[Dataset]:
    """Open a dataset of the competition's format; use it as `with open_dataset(path) as data`.

    The file has `data`, n images, uint8 or floating point, and `label` (n,), whole numbers of any
    type. With poisoned images it may also have `original_label` (n,), their true labels. Images
    stay on disk.  max_bytes: the memory limit for the labels and for a chunk.
    A folder of images, with a subfolder for each class, serves as well: see folder.py.
    Raise InputError where the file has another format, or a guard refuses its content.
    """
    if os.path.isdir(path):
        images, labels = find_images(Path(path), max_bytes)
        yield Dataset(Path(path), max_bytes, images, labels, None, fingerprint_file(path))
        return
    path = require_file(path)
    fingerprint = fingerprint_file(path)
    with guard.inspect_file(path, max_bytes):
        rehearse(lambda: walk_through(path, ARRAYS, max_bytes), path)
    with open_hdf5(path, path, max_bytes) as file:
        with guard.inspect_file(path, max_bytes):
            objects = check_links(file, path)
            names = [name for name in ARRAYS if name != ARRAYS[2] or name in objects]
            for name in names:
                if not is_array(objects.get(name)):
                    contents = ", ".join(sorted(filter(None, objects))[:9]) or "nothing"
                    raise InputError(f"{path}: has no array '{name}'; it contains {contents}")
                check_stored(objects[name], path, max_bytes)
            images = objects["data"]
            if images.ndim != 4:
                raise InputError(
                    f"{path}: 'data' is not an array of images but {describe_array(images)}"
                )
            label_rows = [
                read_labels(objects[name], name, len(images), path, max_bytes) for name in names[1:]
            ]
            if images.size == 0:
                raise InputError(f"{path}: has no images")
        true_labels = label_rows[1] if len(label_rows) > 1 else None
        yield Dataset(path, max_bytes, images, label_rows[0], true_labels, fingerprint)


def read_labels(row: Any, name: str, images: int, path: Name, max_bytes: int) -> np.ndarray:
    """Return the labels in an HDF5 array, int64 (n,).

    row: h5py.Dataset.  name: its name.  images: n.
    Raise InputError unless there is a label for each image, and each label is one of 0, 1, 2, …
    """
    if row.ndim != 1:
        hint = ""
        if row.ndim == 2:
            mend = "convert one-hot labels with argmax(axis=1)"
            hint = "; take its column: [:, 0]" if row.shape[1] == 1 else f"; {mend}"
        raise InputError(f"{path}: '{name}' is not a row but {describe_array(row)}{hint}")
    if len(row) != images:
        raise InputError(
            f"{path}: {format_count(images, 'image')}, but {format_count(len(row), name)}"
        )
    check_fits(path, "the labels", 8 * len(row), max_bytes)
    try:
        labels = row[:].astype(np.float64)
    except OSError as error:
        raise InputError(f"{path}: the labels are damaged") from error
    whole = (labels == np.floor(labels)) & (labels >= 0) & (labels < 2**31)
    if not whole.all():
        raise InputError(f"{path}: label {labels[~whole][0]:g} is not one of 0, 1, 2, …")
    return labels.astype(np.int64)


def hold_out(data: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split a Dataset at random: hold out a fraction, 0..1, of every class, to the nearest image.

    Return (remaining images, held-out images). Where the fraction of a class is not a whole number
    of images, chance decides whether it gives one more, so that the fraction is right overall.
    Raise InputError where a part would be empty.
    """
    count = round(fraction * len(data))
    if not 0 < count < len(data):
        images = format_count(len(data), "image")
        raise InputError(f"--holdout {fraction:g}: would hold out {count} of {images}")
    rng = np.random.default_rng(seed)
    ranks = rng.permutation(data.labels.max() + 1)
    order = np.lexsort((rng.random(len(data)), ranks[data.labels]))  # class after class
    chosen = np.zeros(len(data), bool)
    chosen[order[np.int64((np.arange(count) + rng.random()) * len(data) / count)]] = True
    return data.part(~chosen), data.part(chosen)
