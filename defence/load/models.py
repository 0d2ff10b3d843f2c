"""From an untrusted file to a Keras net, and from a net to a file."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from defence.base.errors import InputError
from defence.base.files import make_private_folder, read_file, replace_file, require_file
from defence.base.limits import DEFAULT_MAX_BYTES, Name
from defence.base.startup import import_keras
from defence.base.text import first_line
from defence.load import architecture, guard, guard_model
from defence.load.guard_hdf5 import check_heaps, open_hdf5, read_text, rehearse

MODELS = Path("models")
MODEL_SUFFIXES = (".h5", ".hdf5", ".keras")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class ModelFile:
    """A model's file, read once, so that the same bytes are hashed, inspected and loaded.

    max_bytes: the limit for its weights and for a layer's output for one image.
    """

    path: Path
    contents: bytes
    max_bytes: int

    @functools.cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.contents).hexdigest()

    @functools.cached_property
    def declared(self) -> tuple[Callable[[], Any], guard_model.Shapes]:
        """The model that the file declares, read in milliseconds without Keras: (build, shapes).

        build: a function that builds the model without its weights.
        shapes: guard_model.read_shapes of the file.
        Raise InputError for every problem that can be detected before Keras is imported.
        """
        path, max_bytes = self.path, self.max_bytes
        if path.suffix == ".keras":
            with guard.inspect_file(path, max_bytes), self._archive() as archive:
                weights = archive.read("model.weights.h5")
                shapes = self.read_hdf5(self._read_shapes, weights)
                config = architecture.read_config(archive.read("config.json"), path)
            return functools.partial(architecture.build_model, config), shapes
        shapes, text = self.read_hdf5(self._read_declared)
        if isinstance(text, int):
            return functools.partial(architecture.build_deepid, text), shapes
        with guard.inspect_file(path, max_bytes):
            config = architecture.read_config(text, path)
        return functools.partial(architecture.build_model, config), shapes

    def _read_shapes(self, file: Any) -> guard_model.Shapes:
        return guard_model.read_shapes(file, self.path, self.max_bytes)

    def _read_declared(self, file: Any) -> tuple[guard_model.Shapes, str | int]:
        """Read the shapes of the weights, and the config as JSON; without one, a DeepID's N."""
        shapes = self._read_shapes(file)
        text = read_text(file, "model_config", self.path)
        if text is None:
            return shapes, architecture.count_deepid_classes(file, self.path)
        return shapes, text

    def _archive(self) -> contextlib.AbstractContextManager[Any]:
        return guard.open_archive(io.BytesIO(self.contents), self.path, self.max_bytes)

    def read_hdf5(self, read: Callable[[Any], Result], contents: bytes | None = None) -> Result:
        """Return what `read` returns for an h5py.File of an .h5 file's contents, or of `contents`.

        Raise InputError where `read` does, or the guards refuse the file.
        """
        contents = self.contents if contents is None else contents

        def call() -> Result:
            with (
                open_hdf5(io.BytesIO(contents), self.path, self.max_bytes) as file,
                guard.inspect_file(self.path, self.max_bytes),
            ):
                return read(file)

        with guard.inspect_file(self.path, self.max_bytes):
            check_heaps(contents, self.path)
            rehearse(call, self.path)
        return call()

    def load(self) -> Any:
        """Load the image classifier, without its optimizer and without code from the file.

        Return a Keras model, float32 (n, height, width, channels) → scores (n, N).
        Raise InputError where the file is damaged, contains what the guards do not allow, or is
        not a classifier of images.
        """
        path, max_bytes = self.path, self.max_bytes
        build, shapes = self.declared
        keras = import_keras()
        with self._weights_file() as weights, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the config, which the user did not write
            try:
                with guard_model.limit_weights(keras.layers.Layer, path, max_bytes):
                    model = build()
                guard_model.check_classifier(model, path)
                guard_model.check_outputs(model, path, max_bytes)
                guard_model.check_shapes(model, shapes, path)
                model.load_weights(weights)
                guard_model.check_finite(model, path)
                flat = architecture.make_functional(model)
                # Only now is each size known in a nested model and behind plain arithmetic.
                guard_model.check_outputs(flat, path, max_bytes)
                guard_model.check_prepared(model, path)
                return flat
            except InputError:
                raise
            except Exception as error:  # Keras can raise any exception
                problem = f"{path}: Keras cannot load the model: {first_line(error)}"
                raise InputError(problem) from error

    @contextlib.contextmanager
    def _weights_file(self) -> Iterator[Path]:
        """Write the inspected weights to a file for the block, and yield its path.

        Reading them from an archive takes Keras many times as long, because it reads small pieces.
        """
        contents, keras_3 = self.contents, self.path.name.endswith((".weights.h5", ".keras"))
        if self.path.suffix == ".keras":
            with self._archive() as archive:
                contents = archive.read("model.weights.h5")
        with make_private_folder(tempfile.gettempdir()) as folder:
            copy = folder / ("model.weights.h5" if keras_3 else "model.h5")
            copy.write_bytes(contents)
            yield copy


def read_model(path: Name, max_bytes: int = DEFAULT_MAX_BYTES) -> ModelFile:
    """Read a model's file: .h5 of Keras 2.2 or later, .keras, or a DeepID's weights in .h5.

    Raise InputError where there is no such file, or it is larger than `max_bytes`.
    """
    if not os.path.exists(path) and (meant := find_meant(Path(path))):
        raise InputError(f"{path}: no such file; did you mean {meant}?")
    path = require_file(path)
    if path.suffix not in MODEL_SUFFIXES:
        raise InputError(f"{path}: a model is a .h5 or a .keras file")
    return ModelFile(path, read_file(path, max_bytes), max_bytes)


def find_meant(path: Path) -> Path | None:
    """Return the model's file that a path without its suffix, or a name in MODELS, stands for."""
    folders = [Path(), MODELS] if path.name == str(path) else [Path()]
    paths = (folder / f"{path}{suffix}" for folder in folders for suffix in ("", *MODEL_SUFFIXES))
    return next(filter(os.path.isfile, paths), None)


def load_badnet(path: Name, max_bytes: int = DEFAULT_MAX_BYTES) -> Any:
    """Read a model's file and load it: see read_model and ModelFile.load."""
    return read_model(path, max_bytes).load()


def save_model(model: Any, path: Name, **attributes: str) -> None:
    """Save a Keras model without its optimizer as .h5, with these texts as root attributes."""
    import_keras()
    import h5py
    from keras.src.legacy.saving.legacy_h5_format import save_model_to_hdf5  # to an open file

    # Written in memory first, because on a full disk libhdf5 crashes with a segmentation fault.
    contents = io.BytesIO()
    with h5py.File(contents, "w") as file:
        save_model_to_hdf5(model, file, include_optimizer=False)
        file.attrs.update(attributes)
    with replace_file(path) as unfinished:
        unfinished.write_bytes(contents.getbuffer())


def default_repaired_path(badnet_path: Name) -> Path:
    """Return the path where repair.py writes a repaired net and eval_defence.py looks for it."""
    return MODELS / f"{Path(badnet_path).stem}_defence.h5"
