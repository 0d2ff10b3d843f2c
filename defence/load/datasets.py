"""From an untrusted file or folder to labelled images, read batch after batch."""

import contextlib
import dataclasses
from pathlib import Path

import numpy as np

from defence.base import pixels
from defence.base.errors import InputError
from defence.base.files import fingerprint_file, require_file
from defence.base.limits import BATCH_VALUES, DEFAULT_MAX_BYTES, check_fits
from defence.base.text import format_count
from defence.load import guard
from defence.load.folder import find_images
from defence.load.guard_hdf5 import check_links, check_stored, describe_array, is_array, open_hdf5

DATASET_SUFFIXES = (".h5", ".hdf5")


@dataclasses.dataclass
class Dataset:
    """Labelled images in an open HDF5 file.

    path: the file's Path.  max_bytes: what any one thing of it may take in memory.
    images: HDF5 array (m, channels, height, width) or (m, height, width, channels), 0..255.
    labels: int64 (n,), 0..N-1.  true_labels: the same, of poisoned images that carry them; or None.
    fingerprint: the file's, when it was opened.  channels_first: bool; None until `fit_to` is
    called.  chosen: bool (m,), which of the images belong to it, n of them; all if None.
    """

    path: Path
    max_bytes: int
    images: object
    labels: np.ndarray
    true_labels: np.ndarray
    fingerprint: tuple
    channels_first: bool = None
    chosen: np.ndarray = None

    def __len__(self):
        return len(self.labels)

    @property
    def shape(self):
        """(height, width, channels) of an image. `fit_to` has been called."""
        first, *others = self.images.shape[1:]
        return (*others, first) if self.channels_first else (first, *others)

    @property
    def batch_size(self):
        return max(1, BATCH_VALUES // int(np.prod(self.images.shape[1:])))

    @property
    def batch_count(self):
        return -(-len(self.images) // self.batch_size)

    def part(self, rows):
        """A Dataset of some of the images, in the file's order. rows: bool (n,)."""
        chosen = rows
        if self.chosen is not None:
            chosen = self.chosen.copy()
            chosen[chosen] = rows
        truth = None if self.true_labels is None else self.true_labels[rows]
        labels = self.labels[rows]
        return dataclasses.replace(self, labels=labels, true_labels=truth, chosen=chosen)

    def fit_to(self, shape, classes):
        """Choose the layout in which the images fit a net. Raises InputError where none does.

        shape: (height, width, channels) of the net's input.  classes: its N.
        """
        if hasattr(self.images, "fit_to"):  # pictures in a folder
            self.images.fit_to(shape, classes)
        height, width, channels = shape
        stored = self.images.shape[1:]
        first = stored == (channels, height, width)
        if not first and stored != (height, width, channels):
            raise InputError(
                f"{self.path}: images are {'×'.join(map(str, stored))}, the model takes "
                f"{channels}×{height}×{width} or {height}×{width}×{channels}"
            )
        for labels in filter(lambda found: found is not None, (self.labels, self.true_labels)):
            if labels.max() >= classes:
                from_1 = bool(labels.min() == 1 and labels.max() == classes)
                raise InputError(
                    f"{self.path}: label {labels.max()} is outside the model's classes, "
                    f"0..{classes - 1}{'; labels seem to count from 1: subtract 1' * from_1}"
                )
        self.channels_first = first

    def batches(self, scale="0..255"):
        """Yield (images, labels): float32 (b, height, width, channels) and int64 (b,).

        scale: a key of pixels.SCALES, the range that the pixels are brought to.
        Only one batch is in memory; none is empty. Raises InputError at a pixel that is NaN or
        outside 0..255, and at a first batch of floating-point images that never exceed 1;
        RuntimeError before `fit_to`.
        """
        if self.channels_first is None:
            raise RuntimeError("Dataset.fit_to chooses the layout of the images; call it first")
        done = 0
        for start in range(0, len(self.images), self.batch_size):
            part = slice(start, start + self.batch_size)
            chosen = slice(None) if self.chosen is None else self.chosen[part]
            if not np.any(chosen):
                continue
            x = self._read(part, chosen)
            if start == 0 and x.max() <= 1 and self.images.dtype.kind == "f":
                raise InputError(
                    f"{self.path}: pixels lie in 0..1; they must be 0..255, so multiply by 255"
                )
            yield pixels.scale_pixels(x, scale), self.labels[done : done + len(x)]
            done += len(x)

    def take(self, rows):
        """Some of the images, in the file's order: float32 (k, height, width, channels), 0..255.

        rows: bool (n,).  Raises InputError as `batches` does, but not where all pixels lie in 0..1.
        """
        part, found = self.part(rows), [np.empty((0, *self.shape), np.float32)]
        for start in range(0, len(self.images), self.batch_size):
            place = slice(start, start + self.batch_size)
            if part.chosen[place].any():
                found.append(part._read(place, part.chosen[place]))
        return np.concatenate(found)

    def pixel_range(self):
        """The least and the largest value of a pixel, 0..255."""
        lowest, highest = zip(*((x.min(), x.max()) for x, _ in self.batches()))
        return min(lowest), max(highest)

    def _read(self, part, chosen):
        """The chosen images of a slice, float32 (b, height, width, channels), 0..255."""
        last = min(part.stop, len(self.images)) - 1
        try:
            stored = self.images[part]
        except InputError:
            raise
        except Exception as error:  # h5py raises what libhdf5 says
            raise InputError(f"{self.path}: images {part.start}..{last} are damaged") from error
        # libhdf5 reads zeros where a file was cut off since it was opened.
        if fingerprint_file(self.path) != self.fingerprint:
            raise InputError(f"{self.path}: was changed while it was read")
        stored = stored[chosen]
        planes = stored if self.channels_first else stored.transpose(0, 3, 1, 2)
        x = np.empty((len(stored), *planes.shape[2:], planes.shape[1]), np.float32)
        for channel in range(planes.shape[1]):  # all at once is slower
            x[..., channel] = planes[:, channel]
        if not (x.min() >= 0 and x.max() <= 255):  # also true of NaN
            found = f"is {x.min():g}" if x.min() < 0 else f"is {x.max():g}"
            raise InputError(
                f"{self.path}: a pixel of images {part.start}..{last} {found}, not within 0..255"
            )
        return x


@contextlib.contextmanager
def open_dataset(path, max_bytes=DEFAULT_MAX_BYTES):
    """Open a dataset of the competition's format; use it as `with open_dataset(path) as data`.

    The file has `data`, n images, uint8 or floating point, and `label` (n,), whole numbers of any
    type; `original_label`, of the same kind, if poisoned images carry their true labels. Images
    stay on disk.  max_bytes: what the labels, or a chunk, may take.
    A folder of pictures, in a folder for each class, is read as such a file: see folder.py.
    Raises InputError where the file is not like that, or contains what the guards do not allow.
    """
    if Path(path).is_dir():
        images, labels = find_images(Path(path), max_bytes)
        yield Dataset(Path(path), max_bytes, images, labels, None, fingerprint_file(path))
        return
    path = require_file(path)
    fingerprint = fingerprint_file(path)
    with open_hdf5(path, path, max_bytes) as file:
        with guard.inspect_file(path, max_bytes):
            found = check_links(file, path)
            names = ["data", "label"] + ["original_label"] * ("original_label" in found)
            for name in names:
                if not is_array(found.get(name)):
                    there = ", ".join(sorted(filter(None, found))[:9]) or "nothing"
                    raise InputError(f"{path}: there is no array '{name}' in the file, but {there}")
                check_stored(found[name], path, max_bytes)
            images = found["data"]
            if images.ndim != 4:
                raise InputError(
                    f"{path}: 'data' is not an array of images but {describe_array(images)}"
                )
            labels, *truth = (
                read_labels(found[name], name, len(images), path, max_bytes) for name in names[1:]
            )
            if images.size == 0:
                raise InputError(f"{path}: there are no images in the file")
        true_labels = truth[0] if truth else None
        yield Dataset(path, max_bytes, images, labels, true_labels, fingerprint)


def read_labels(row, name, images, path, max_bytes):
    """The labels of so many images in an HDF5 array, int64 (n,). name: the array's.

    Raises InputError unless there is one for each image, and each is one of 0, 1, 2, …
    """
    if row.ndim != 1:
        hot = "; of one-hot labels take argmax(axis=1)" if row.ndim == 2 else ""
        raise InputError(f"{path}: '{name}' is not a row but {describe_array(row)}{hot}")
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


def hold_out(data, fraction, seed):
    """Split a Dataset at random: hold out a fraction, 0..1, of every class, to the nearest image.

    Returns (the rest, what is held out). Where the fraction of a class is not a whole number of
    images, which classes give one more is random, so that the fraction is right overall.
    Raises InputError where either would be empty.
    """
    count = round(fraction * len(data))
    if not 0 < count < len(data):
        images = format_count(len(data), "image")
        raise InputError(f"--holdout {fraction:g}: would hold out {count} of {images}")
    rng = np.random.default_rng(seed)
    classes = rng.permutation(data.labels.max() + 1)
    row = np.lexsort((rng.random(len(data)), classes[data.labels]))  # class after class
    chosen = np.zeros(len(data), bool)
    chosen[row[np.int64((np.arange(count) + rng.random()) * len(data) / count)]] = True
    return data.part(~chosen), data.part(chosen)
