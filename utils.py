"""Files in and out: models, datasets, pictures.

The files are other people's. Whatever is wrong with one is raised as InputError, a message of one
line that names the file.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import tempfile
import warnings
from pathlib import Path

import numpy as np

from defence import architecture, folder, guard, guard_model, pixels
from defence.cli import DEFAULT_MAX_BYTES, InputError, counted, one_line
from defence.files import (
    file_fingerprint,
    open_hdf5,
    private_folder,
    replacing,
    require_file,
)
from defence.pictures import (
    MORE_FORMATS,
    PICTURE_FORMATS,
    as_input,
    decode_picture,
    read_picture,
)
from defence.startup import import_keras

__all__ = ["MORE_FORMATS", "PICTURE_FORMATS", "as_input", "decode_picture", "read_picture"]

MODELS = Path("models")
BATCH_VALUES = 2**19  # numbers held at a time: 2 MB as float32, 67 images of DeepID
MODEL_SUFFIXES = (".h5", ".hdf5", ".keras")
DATASET_SUFFIXES = (".h5", ".hdf5")


# --------------------------------------------------------------------------------------- models


@dataclasses.dataclass(frozen=True)
class ModelFile:
    """A model's file, read once: what is hashed, inspected and loaded are the same bytes.

    path: its Path.  contents: its bytes.  max_bytes: what its weights, or a layer's output for
    one image, may take.
    """

    path: Path
    contents: bytes
    max_bytes: int

    @functools.cached_property
    def sha256(self):
        return hashlib.sha256(self.contents).hexdigest()

    @functools.cached_property
    def declared(self):
        """What the file declares, read as data, without Keras, in milliseconds.

        That is (make, shapes): a function that builds the model, without its weights, and
        guard_model.declared_shapes.  Raises InputError for all that can be told before Keras is
        imported.
        """
        path, max_bytes = self.path, self.max_bytes
        if path.suffix == ".keras":
            with guard.inspecting(path, max_bytes), self._archive() as archive:
                guard.check_heaps(self.contents, path)
                weights = io.BytesIO(archive.read("model.weights.h5"))
                with open_hdf5(weights, path, max_bytes) as file:
                    shapes = guard_model.declared_shapes(file, path, max_bytes)
                config = architecture.read_config(archive.read("config.json"), path)
            return functools.partial(architecture.build, config), shapes
        with self.open_hdf5() as file, guard.inspecting(path, max_bytes):
            shapes = guard_model.declared_shapes(file, path, max_bytes)
            text = guard.read_text(file, "model_config", path)
            if text is None:
                classes = architecture.deepid_classes(file, path)
                return functools.partial(architecture.deepid, classes), shapes
            return functools.partial(
                architecture.build, architecture.read_config(text, path)
            ), shapes

    def _archive(self):
        return guard.open_archive(io.BytesIO(self.contents), self.path, self.max_bytes)

    @contextlib.contextmanager
    def open_hdf5(self):
        """Open the contents of an .h5 file to read attributes and arrays."""
        with open_hdf5(io.BytesIO(self.contents), self.path, self.max_bytes) as file:
            guard.check_heaps(self.contents, self.path)
            yield file

    def load(self):
        """Load the image classifier, without its optimizer and without its code.

        Returns a Keras model, float32 (n, height, width, channels) → scores (n, N).
        Raises InputError where the file is damaged, contains what the guards do not allow, or is
        not a classifier of images.
        """
        path, max_bytes = self.path, self.max_bytes
        make, shapes = self.declared
        keras = import_keras()
        with self._weights_file() as weights, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the config, which the user did not write
            try:
                with guard_model.limit_weights(keras.layers.Layer, path, max_bytes):
                    model = make()
                guard_model.check_classifier(model, path)
                guard_model.check_outputs(model, path, max_bytes)
                guard_model.check_prepared(model, path)
                guard_model.check_shapes(model, shapes, path)
                model.load_weights(weights)
                guard_model.check_finite(model, path)
                return architecture.as_functional(model)
            except InputError:
                raise
            except Exception as error:  # Keras raises whatever its parts raise
                problem = f"{path}: Keras cannot load the model: {one_line(error)}"
                raise InputError(problem) from error

    @contextlib.contextmanager
    def _weights_file(self):
        """The path of a file of the weights, for a block: of the bytes that were inspected.

        Out of an archive Keras would read them in small pieces, which takes many times as long.
        """
        contents, new = self.contents, self.path.name.endswith((".weights.h5", ".keras"))
        if self.path.suffix == ".keras":
            with self._archive() as archive:
                contents = archive.read("model.weights.h5")
        with private_folder(tempfile.gettempdir()) as folder:
            copy = folder / ("model.weights.h5" if new else "model.h5")
            copy.write_bytes(contents)
            yield copy


def read_model(path, max_bytes=DEFAULT_MAX_BYTES):
    """Read the file of a model: .h5 of Keras 2.2 or later, .keras, or a DeepID's weights in .h5.

    Returns a ModelFile.  Raises InputError where there is no such file.
    """
    path = require_file(path)
    if path.suffix not in MODEL_SUFFIXES:
        raise InputError(f"{path}: a model is a .h5 or a .keras file")
    guard.check_fits(path, "the file", path.stat().st_size, max_bytes)
    return ModelFile(path, path.read_bytes(), max_bytes)


def load_badnet(path, max_bytes=DEFAULT_MAX_BYTES):
    """Read a model's file and load it. Takes, returns and raises what both do."""
    return read_model(path, max_bytes).load()


def save_model(model, path, **attributes):
    """Save a Keras model without optimizer as .h5, with these texts as root attributes."""
    import_keras()
    import h5py
    from keras.src.legacy.saving.legacy_h5_format import save_model_to_hdf5  # into an open file

    # In memory first: where the disk is full, libhdf5 ends the process with a segmentation fault.
    contents = io.BytesIO()
    with h5py.File(contents, "w") as file:
        save_model_to_hdf5(model, file, include_optimizer=False)
        file.attrs.update(attributes)
    with replacing(path) as beside:
        beside.write_bytes(contents.getbuffer())


def default_output(badnet_path):
    """Where repair.py puts the repaired net of a BadNet, and eval_defence.py looks for it."""
    return MODELS / f"{Path(badnet_path).stem}_defence.h5"


# ------------------------------------------------------------------------------------- datasets


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
            yield pixels.scaled(x, scale), self.labels[done : done + len(x)]
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
        if file_fingerprint(self.path) != self.fingerprint:
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
        images, labels = folder.find_pictures(Path(path), max_bytes)
        yield Dataset(Path(path), max_bytes, images, labels, None, file_fingerprint(path))
        return
    path = require_file(path)
    fingerprint = file_fingerprint(path)
    with open_hdf5(path, path, max_bytes) as file:
        with guard.inspecting(path, max_bytes):
            found = guard.check_links(file, path)
            names = ["data", "label"] + ["original_label"] * ("original_label" in found)
            for name in names:
                if not guard.is_array(found.get(name)):
                    there = ", ".join(sorted(filter(None, found))[:9]) or "nothing"
                    raise InputError(f"{path}: there is no array '{name}' in the file, but {there}")
                guard.check_stored(found[name], path, max_bytes)
            images = found["data"]
            if images.ndim != 4:
                raise InputError(
                    f"{path}: 'data' is not an array of images but {guard.describe(images)}"
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
        raise InputError(f"{path}: '{name}' is not a row but {guard.describe(row)}{hot}")
    if len(row) != images:
        raise InputError(f"{path}: {counted(images, 'image')}, but {counted(len(row), name)}")
    guard.check_fits(path, "the labels", 8 * len(row), max_bytes)
    try:
        labels = row[:].astype(np.float64)
    except OSError as error:
        raise InputError(f"{path}: the labels are damaged") from error
    whole = (labels == np.floor(labels)) & (labels >= 0) & (labels < 2**31)
    if not whole.all():
        raise InputError(f"{path}: label {labels[~whole][0]:g} is not one of 0, 1, 2, …")
    return labels.astype(np.int64)
