"""Import Keras on TensorFlow, and ONNX Runtime, quickly and quietly; make Keras reproducible."""

import contextlib
import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from defence.base import process

# Keras imports these, if they are installed, for features not used here, which takes time and
# memory (docs/design-notes.md).
UNWANTED = {"matplotlib", "pandas", "scipy", "sklearn"}


def import_keras() -> Any:
    """Return Keras on TensorFlow, imported without the lines that TensorFlow writes to stderr.

    The import takes seconds, so call this where Keras is first needed: `--help` and a wrong
    call then answer at once.
    """
    if "keras" in sys.modules:
        return sys.modules["keras"]
    os.environ["KERAS_BACKEND"] = "tensorflow"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # off by default on some processors
    # Run two operations at a time, each on half the processors. The nets are small: dividing one
    # operation among all processors takes longer than running two, as a backward pass can.
    os.environ.setdefault("TF_NUM_INTEROP_THREADS", "2")
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", str(max(1, count_processors() // 2)))
    import logging

    logging.getLogger("absl").setLevel(logging.ERROR)
    with hold_back_stderr(), _import_quickly():
        import keras
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # it warns of functions for many nets
    return keras


def import_onnxruntime() -> Any:
    """Return ONNX Runtime, imported with its telemetry off.

    Since 1.29 it reports each net that it opens to Microsoft, with hashes of its weights.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # ONNX Runtime reads it during the import
    import onnxruntime

    return onnxruntime


def make_reproducible(seed: int) -> None:
    """Make the same operations in the same order give the same bytes. seed: 0..2**32-1."""
    keras = import_keras()
    import tensorflow  # Keras sets the seed, but does not make operations deterministic

    keras.utils.set_random_seed(seed)
    tensorflow.config.experimental.enable_op_determinism()


def count_processors() -> int:
    """Return the number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def hold_back_stderr() -> Iterator[None]:
    """Hold back all that C++ code writes to stderr; show it only if the block fails."""
    sys.stderr.flush()
    stderr = process.stderr = os.dup(2)
    with tempfile.TemporaryFile() as text:
        os.dup2(text.fileno(), 2)
        try:
            yield
        except BaseException:
            text.seek(0)
            os.write(stderr, text.read())
            raise
        finally:
            os.dup2(stderr, 2)
            process.stderr = 2
            os.close(stderr)


@contextlib.contextmanager
def _import_quickly() -> Iterator[None]:
    """Run the block's imports without garbage collection and without the packages of UNWANTED.

    An import makes no garbage, but millions of objects that every collection visits, also at exit.
    """
    gc.disable()
    unwanted = UNWANTED - sys.modules.keys()
    blocked: dict[str, Any] = dict.fromkeys(unwanted)  # None makes Python refuse the import
    sys.modules.update(blocked)
    try:
        yield
    finally:
        for name in unwanted:
            del sys.modules[name]
        gc.freeze()
        gc.enable()
