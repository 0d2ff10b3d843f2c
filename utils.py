"""Everything that touches a file: models, data sets, images, records.

The files are other people's. Whatever is wrong with one is raised as InputError, a message of one
line that names the file.
"""

import contextlib
import csv
import dataclasses
import functools
import gc
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import h5py
import numpy as np

import guard
import terminal
from terminal import MEMORY, InputError, one_line

VERSION = "0.1.0"
MODELS = Path("models")
RECORD = "repair_record"
SCALES = {"0..1": 255.0, "0..255": 1.0}  # what B expects its pixels in: the divisor of 0..255
BATCH_VALUES = 2**19  # numbers held at a time: 2 MB as float32, 67 images of DeepID
MODEL_SUFFIXES = (".h5", ".hdf5", ".keras")
DATASET_SUFFIXES = (".h5", ".hdf5")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")


# ---------------------------------------------------------------------------------------- files


def require_file(path):
    """Return `path` as a Path. Raises InputError unless it is a file with something in it."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder, not a file")
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if path.is_file() and path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")
    if not path.is_file() or not os.access(path, os.R_OK):
        raise InputError(f"{path}: cannot be read")
    return path


def require_writable(path, *inputs):
    """Return `path` as a Path. Raises InputError unless a file can be put there.

    inputs: paths that are read and must not be overwritten.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}/ to write to")
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"{path}: cannot be written")
    for other in inputs:
        if path.resolve() == Path(other).resolve():
            raise InputError(f"{path}: would overwrite an input; name another --output")
    return path


@contextlib.contextmanager
def replacing(path):
    """Give a new file's name near `path`; when the block ends well, move that file to `path`.

    Readers see the old file or the new one, never a part. It is written in a folder that nobody
    else can enter, so no one can put a link in its place; a link at `path` itself is replaced.
    """
    path = Path(path)
    folder = Path(tempfile.mkdtemp(prefix=".", suffix=".unfinished", dir=path.parent))
    terminal.unfinished.add(folder)
    try:
        beside = folder / path.name
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:  # such as a full disk, which names no file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        terminal.unfinished.discard(folder)


def write_json(value, path):
    """Write `value` to `path` as indented JSON."""
    with replacing(path) as beside:
        beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def write_csv(rows, path):
    """Write dicts of the same keys as CSV (RFC 4180), the keys in the first line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    with replacing(path) as beside:
        beside.write_bytes(text.getvalue().encode())


def state(path):
    """What tells whether a file was changed, or another put in its place, meanwhile."""
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns


def sha256(path):
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def open_hdf5(path, limit=MEMORY):
    """Open an HDF5 file to read. Raises InputError where it is none or is cut short."""
    require_file(path)
    with guard.inspecting(path, limit):
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            broken = "truncated" in str(error) or h5py.is_hdf5(path)
            what = "the HDF5 file is damaged or cut short" if broken else "not an HDF5 file"
            raise InputError(f"{path}: {what}") from error
    with file:
        yield file


# --------------------------------------------------------------------------------------- models


def import_keras():
    """Import Keras on TensorFlow, without the lines TensorFlow writes to stderr meanwhile.

    It takes seconds, so it is called where Keras is first needed: `--help` and a wrong call
    answer at once.
    """
    if "keras" in sys.modules:
        return sys.modules["keras"]
    os.environ["KERAS_BACKEND"] = "tensorflow"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # else off on some processors
    # Two operations at a time, each on half the processors: the nets are small, and to share out
    # one operation takes longer than to run two beside each other, as a backward pass can.
    os.environ.setdefault("TF_NUM_INTEROP_THREADS", "2")
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", str(max(1, processors() // 2)))
    import logging

    logging.getLogger("absl").setLevel(logging.ERROR)
    with _stderr_kept_back(), _quick_import():
        import keras
    return keras


def processors():
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def _quick_import():
    """Import in the block without collecting garbage, and without matplotlib and pandas.

    An import leaves no garbage, but millions of objects that each collection looks at, also at
    exit. Keras imports those two, where there are any, for what nobody here asks it for.
    """
    gc.disable()
    unwanted = {"matplotlib", "pandas"} - sys.modules.keys()
    sys.modules.update(dict.fromkeys(unwanted))  # None: "cannot be imported"
    try:
        yield
    finally:
        for name in unwanted:
            del sys.modules[name]
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def _stderr_kept_back():
    """Hold back what C++ code writes to stderr; show it only where the block fails."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            kept.seek(0)
            os.write(stderr, kept.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def deepid(classes, input_shape=(55, 47, 3)):
    """The DeepID net of the competition, untrained.

    classes: N ≥ 2.  input_shape: (height, width, channels), at least (31, 31, 1).
    Returns a Keras model, float32 (n, height, width, channels) → probabilities (n, N).
    Source: Sun, Wang, Tang, CVPR 2014, in the sizes of CSAW-HackML-2020.
    """
    keras = import_keras()
    layers = keras.layers
    image = keras.Input(input_shape, name="input")
    x = image
    for i, (channels, kernel) in enumerate([(20, 4), (40, 3), (60, 3)], start=1):
        x = layers.Conv2D(channels, kernel, activation="relu", name=f"conv_{i}")(x)
        x = layers.MaxPooling2D(2, name=f"pool_{i}")(x)
    fine = layers.Flatten(name="flatten_1")(x)
    fine = layers.Dense(160, name="fc_1")(fine)
    coarse = layers.Conv2D(80, 2, activation="relu", name="conv_4")(x)
    coarse = layers.Flatten(name="flatten_2")(coarse)
    coarse = layers.Dense(160, name="fc_2")(coarse)
    x = layers.Add(name="add_1")([fine, coarse])
    x = layers.Activation("relu", name="activation_1")(x)
    return keras.Model(image, layers.Dense(classes, activation="softmax", name="output")(x))


def load_badnet(path, limit=MEMORY):
    """Load an image classifier from a Keras file, without its optimizer and without its code.

    path: a full model, .h5 of Keras 2.2 or later or .keras, or a weights-only .h5 of DeepID.
    limit: bytes that the weights, or a layer's output for one image, may take.
    Returns a Keras model, float32 (n, height, width, channels) → scores (n, N).
    Raises InputError where the file is damaged, holds what guard.py does not allow, or is no
    classifier of images.
    """
    path = require_file(path)
    before = state(path)
    make, shapes = inspect_model(path, limit)
    keras = import_keras()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the config, which the user did not write
            with guard.limit_weights(keras.layers.Layer, path, limit):
                model = make()
            refuse_other_than_classifier(model, path)
            guard.check_outputs(model, path, limit)
            guard.check_shapes(model, shapes, path)
            load_weights(model, path)
            guard.check_finite(model, path)
            if state(path) != before:
                raise InputError(f"{path}: was changed while it was read")
            return as_functional(model)
    except InputError:
        raise
    except Exception as error:  # Keras raises whatever its parts raise
        raise InputError(f"{path}: Keras cannot load the model: {one_line(error)}") from error


def inspect_model(path, limit=MEMORY):
    """Read as data what a model file declares, without Keras, in milliseconds.

    Returns (make, shapes): a function that builds the model, without its weights, and
    guard.declared_shapes.  Raises InputError for all that can be told before Keras is imported.
    """
    path = require_file(path)
    if path.suffix == ".keras":
        with guard.inspecting(path, limit), guard.open_archive(path, limit) as archive:
            guard.check_heaps(path)
            make = functools.partial(build, read_config(archive.read("config.json"), path))
            with h5py.File(io.BytesIO(archive.read("model.weights.h5")), "r") as file:
                return make, guard.declared_shapes(file, path, limit)
    if path.suffix not in MODEL_SUFFIXES:
        raise InputError(f"{path}: a model is a .h5 or a .keras file")
    with open_hdf5(path, limit) as file, guard.inspecting(path, limit):
        guard.check_heaps(path)
        text = guard.read_text(file, "model_config", path)
        config = None if text is None else read_config(text, path)
        shapes = guard.declared_shapes(file, path, limit)
        if config is None:
            return functools.partial(deepid, deepid_classes(file, path)), shapes
        return functools.partial(build, config), shapes


def load_weights(model, path):
    """Fill a model with the weights of an inspected file."""
    if path.suffix != ".keras":
        model.load_weights(path)
        return
    # Out of the archive Keras would read them in small pieces, which takes many times as long.
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path) as archive:
        model.load_weights(archive.extract("model.weights.h5", folder))


def read_config(text, path):
    """A model's config from its JSON, a dict. Raises InputError unless guard.py allows it all."""
    config = guard.parse_json(text, path)
    if not (isinstance(config, dict) and isinstance(config.get("config"), dict | list)):
        raise InputError(f"{path}: not a Keras model: its config describes no model")
    guard.check_config(config, path)
    return config


def build(config):
    """Build an untrained model from the config of an .h5 file of any Keras since 2.2."""
    keras = import_keras()
    config = portable(config)
    if config["class_name"] != "Sequential":
        return keras.Model.from_config(config["config"])
    inner = config["config"]
    if isinstance(inner, list):  # Keras before 2.2.3 saved the bare list of layers
        inner = {"name": "sequential", "layers": inner}
    layers = inner["layers"]
    if layers[0]["class_name"] != "InputLayer":
        # Keras 2 wrote the shape, with the batch, into the first layer; Keras 3 takes that for
        # the shape of one image, and the input gains a dimension.
        shape = layers[0]["config"].pop("batch_input_shape", None) or inner["build_input_shape"]
        layers.insert(0, {"class_name": "InputLayer", "config": {"batch_shape": shape}})
    return keras.Sequential.from_config(inner)


def portable(config):
    """A config less what keeps another version of Keras from reading it and changes nothing.

    Initializers are needless, since the weights are loaded; older versions do not know all of
    their keys, nor the mere mention of quantization.
    """
    if isinstance(config, dict):
        return {
            key: portable(part)
            for key, part in config.items()
            if key not in guard.UNREAD
            and not (key.endswith("_initializer") or (key == "quantization_config" and not part))
        }
    return [portable(part) for part in config] if isinstance(config, list) else config


def as_functional(model):
    """A classifier as a Functional model, one tensor in, one out, each layer called on one input.

    A Sequential is built anew: while layers were added to it, Keras called each on several.
    """
    keras = import_keras()
    if not isinstance(model, keras.Sequential):
        return keras.Model(model.inputs[0], model.outputs[0], name=model.name)
    image = x = keras.Input(model.input_shape[1:], name="input")
    for layer in model.layers:
        x = type(layer).from_config(layer.get_config())(x)
    functional = keras.Model(image, x, name=model.name)
    functional.set_weights(model.get_weights())
    return functional


def deepid_classes(file, path):
    """The number of classes of the DeepID whose weights, without a config, are in an HDF5 file."""
    for bias in ("output/output/bias:0", "output/output/bias", "layers/dense_2/vars/1"):
        if isinstance(file.get(bias), h5py.Dataset) and file[bias].ndim == 1:
            return len(file[bias])
    raise InputError(f"{path}: holds no model config, and its weights are not those of a DeepID")


def refuse_other_than_classifier(model, path):
    """Raise InputError unless a Keras model maps one image to the scores of N ≥ 2 classes."""
    inputs, outputs = model.inputs, model.outputs
    shape = tuple(inputs[0].shape[1:])
    if len(inputs) != 1 or len(shape) != 3 or None in shape:
        raise InputError(f"{path}: not an image classifier: its input is not one image")
    shape = tuple(outputs[0].shape[1:])
    if len(outputs) != 1 or len(shape) != 1 or shape[0] is None or shape[0] < 2:
        shown = "×".join(map(str, shape))
        raise InputError(f"{path}: not a classifier: its output, {shown}, is not a row of classes")


def save_model(model, record, path):
    """Save a Keras model without optimizer as .h5, with `record`, a dict, as a root attribute."""
    import_keras()
    from keras.src.legacy.saving.legacy_h5_format import save_model_to_hdf5  # into an open file

    # In memory first: where the disk is full, libhdf5 ends the process with a segmentation fault.
    contents = io.BytesIO()
    with h5py.File(contents, "w") as file:
        save_model_to_hdf5(model, file, include_optimizer=False)
        file.attrs[RECORD] = json.dumps(record)
    with replacing(path) as beside:
        beside.write_bytes(contents.getbuffer())


def read_record(path):
    """The repair record of an .h5 file, a dict, or None where it carries none.

    Raises InputError where what is needed to use G is not in the record.
    """
    if Path(path).suffix == ".keras":
        return None
    with open_hdf5(path) as file, guard.inspecting(path):
        guard.check_heaps(path)
        text = guard.read_text(file, RECORD, path)
        if text is None:
            return None
        record = guard.parse_json(text, path)
    try:
        texts = [record["layer"], record["badnet"]["file"], record["badnet"]["sha256"]]
        if record["input_scale"] in SCALES and all(isinstance(x, str) for x in texts):
            return record
    except (KeyError, TypeError, ValueError):
        pass
    raise InputError(f"{path}: its repair record is damaged; repair the BadNet anew")


def default_output(badnet_path):
    """Where repair.py puts the repaired net of a BadNet, and eval_defence.py looks for it."""
    return MODELS / f"{Path(badnet_path).stem}_defence.h5"


# ------------------------------------------------------------------------------------ data sets


@dataclasses.dataclass
class Dataset:
    """Labelled images in an open HDF5 file.

    images: HDF5 data set (m, channels, height, width) or (m, height, width, channels), 0..255.
    labels: int64 (n,), 0..N-1.  true_labels: the same, of poisoned images that carry them; or None.
    state: the file's `state` when it was opened.  channels_first: bool, None until `fit_to` is
    called.  chosen: bool (m,), which of the images belong to it, n of them; all where None.
    """

    path: Path
    images: h5py.Dataset
    labels: np.ndarray
    true_labels: np.ndarray
    state: tuple
    channels_first: bool = None
    chosen: np.ndarray = None

    def __len__(self):
        return len(self.labels)

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
        height, width, channels = shape
        stored = self.images.shape[1:]
        self.channels_first = stored == (channels, height, width)
        if not self.channels_first and stored != (height, width, channels):
            raise InputError(
                f"{self.path}: images are {'×'.join(map(str, stored))}, the model takes "
                f"{channels}×{height}×{width} or {height}×{width}×{channels}"
            )
        for labels in filter(lambda found: found is not None, (self.labels, self.true_labels)):
            if labels.max() >= classes:
                raise InputError(
                    f"{self.path}: label {labels.max()} is outside the model's classes, "
                    f"0..{classes - 1}"
                )

    def batches(self, scale="0..255"):
        """Yield (images, labels): float32 (b, height, width, channels) and int64 (b,).

        scale: a key of SCALES, the range that the pixels are brought to.
        Only one batch is in memory; none is empty. Raises InputError at a pixel that is NaN or
        outside 0..255, and at a first batch of floating-point images that never exceed 1.
        """
        done = 0
        for start in range(0, len(self.images), self.batch_size):
            part = slice(start, start + self.batch_size)
            chosen = slice(None) if self.chosen is None else self.chosen[part]
            if not np.any(chosen):
                continue
            try:
                stored = self.images[part]
            except Exception as error:  # h5py raises what libhdf5 says
                raise InputError(f"{self.path}: images from {start} on are damaged") from error
            # libhdf5 reads zeros where a file was cut off since it was opened.
            if state(self.path) != self.state:
                raise InputError(f"{self.path}: was changed while it was read")
            stored = stored[chosen]
            planes = stored if self.channels_first else stored.transpose(0, 3, 1, 2)
            x = np.empty((len(stored), *planes.shape[2:], planes.shape[1]), np.float32)
            for channel in range(planes.shape[1]):  # all at once is slower
                x[..., channel] = planes[:, channel]
            low, high = x.min(), x.max()
            if not (low >= 0 and high <= 255):  # also true of NaN
                raise InputError(
                    f"{self.path}: among images {start}..{min(part.stop, len(self.images)) - 1} "
                    "there is a pixel that is NaN or outside 0..255"
                )
            if start == 0 and high <= 1 and self.images.dtype.kind == "f":
                raise InputError(f"{self.path}: pixels lie in 0..1; they must be 0..255")
            yield np.divide(x, SCALES[scale], out=x), self.labels[done : done + len(x)]
            done += len(x)


@contextlib.contextmanager
def open_dataset(path, limit=MEMORY):
    """Open a data set of the competition's format; use it as `with open_dataset(path) as data`.

    The file has `data`, n images, uint8 or floating point, and `label` (n,), whole numbers of any
    type; `original_label`, of the same kind, if poisoned images carry their true labels. Images
    stay on disk.  limit: bytes that the labels, or a chunk, may take.
    Raises InputError where the file is not like that, or holds what guard.py does not allow.
    """
    before = state(require_file(path))
    with open_hdf5(path, limit) as file:
        with guard.inspecting(path, limit):
            found = guard.check_links(file, path)
            names = ["data", "label"] + ["original_label"] * ("original_label" in found)
            for name in names:
                if not isinstance(found.get(name), h5py.Dataset):
                    raise InputError(f"{path}: no data set '{name}' in the file")
                guard.check_stored(found[name], path, limit)
            images = found["data"]
            if images.ndim != 4:
                raise InputError(
                    f"{path}: 'data' is no array of images, but {guard.describe(images)}"
                )
            labels, *truth = (
                read_labels(found[name], name, len(images), path, limit) for name in names[1:]
            )
            if images.size == 0:
                raise InputError(f"{path}: there are no images in the file")
        yield Dataset(Path(path), images, labels, truth[0] if truth else None, before)


def read_labels(row, name, images, path, limit):
    """The labels of so many images in an HDF5 data set, int64 (n,). name: the data set's.

    Raises InputError unless there is one for each image, and each is one of 0, 1, 2, …
    """
    if row.ndim != 1:
        raise InputError(f"{path}: '{name}' is no row, but {guard.describe(row)}")
    if len(row) != images:
        raise InputError(f"{path}: {images} images, but {len(row)} {name}s")
    guard.require_fits(path, "the labels", 8 * len(row), limit)
    try:
        labels = row[:].astype(np.float64)
    except OSError as error:
        raise InputError(f"{path}: the labels are damaged") from error
    whole = (labels == np.floor(labels)) & (labels >= 0) & (labels < 2**31)
    if not whole.all():
        raise InputError(f"{path}: label {labels[~whole][0]} is not one of 0, 1, 2, …")
    return labels.astype(np.int64)


# --------------------------------------------------------------------------------------- images


def list_images(paths):
    """Replace each folder in `paths` by the PNG and JPEG files in it, by name. Returns Paths."""
    images = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES)
            if not inside:
                raise InputError(f"{path}: no PNG or JPEG picture in the folder")
            images += inside
        else:
            images.append(path)
    return images


def read_picture(path, limit=MEMORY):
    """Decode a PNG or JPEG file. Returns and raises what decode_picture does."""
    return decode_picture(require_file(path), path, limit)


def decode_picture(file, path, limit=MEMORY):
    """Decode a PNG or JPEG file. Returns a Pillow image, turned as its EXIF rotation says.

    file: its path, or what is open to read in its place.  path: its name, for messages.
    limit: bytes of memory; a pixel takes up to twelve of them until it is an input of a net.
    Raises InputError where the file is no such picture, is cut short, or is too large to decode.
    """
    from PIL import Image, ImageOps

    Image.MAX_IMAGE_PIXELS = None  # they are counted below
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata
            with Image.open(file, formats=("PNG", "JPEG")) as picture:
                width, height = picture.size
                guard.require_fits(path, f"{width}×{height} pixels", 12 * width * height, limit)
                picture.load()
                if picture.mode == "P":  # here, where a damaged palette is noticed
                    picture = picture.convert("RGBA")
                return ImageOps.exif_transpose(picture)
    except InputError:
        raise
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{path}: not a PNG or JPEG picture") from error
    except Exception as error:  # Pillow raises whatever the damage leads to
        raise InputError(f"{path}: the picture is damaged: {one_line(error)}") from error


def as_input(picture, shape):
    """Make a Pillow image of any size and mode the input of a net.

    shape: (height, width, channels) of the net; channels is 1 (grey) or 3 (RGB). Alpha is dropped.
    Returns float32 (height, width, channels), 0..255, resized bicubically where the size differs.
    """
    from PIL import Image

    height, width, channels = shape
    if picture.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut off at 255
        picture = Image.fromarray((np.asarray(picture) / 257).astype(np.uint8))
    picture = picture.convert("RGB" if channels == 3 else "L")
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture, np.float32).reshape(shape)
