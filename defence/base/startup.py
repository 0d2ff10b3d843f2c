"""Import Keras on TensorFlow, and ONNX Runtime, quickly and quietly; make Keras reproducible."""

import contextlib
import gc
import os
import sys
import tempfile


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
    # Two operations at a time, each on half the processors: the nets are small, and splitting one
    # operation up takes longer than running two in parallel, as a backward pass can.
    os.environ.setdefault("TF_NUM_INTEROP_THREADS", "2")
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", str(max(1, count_processors() // 2)))
    import logging

    logging.getLogger("absl").setLevel(logging.ERROR)
    with _stderr_kept_back(), _quick_import():
        import keras
    return keras


def import_onnxruntime():
    """Import ONNX Runtime, such that it sends nothing to its makers.

    Since 1.29 it tells Microsoft of each net that it opens, hashes of its weights among the rest.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when it is imported
    import onnxruntime

    return onnxruntime


def make_reproducible(seed):
    """From here on, the same operations in the same order give the same bytes. seed: 0..2**32-1."""
    keras = import_keras()
    import tensorflow  # Keras sets the seed, but not this switch

    keras.utils.set_random_seed(seed)
    tensorflow.config.experimental.enable_op_determinism()


def count_processors():
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def _quick_import():
    """Import in the block without collecting garbage, and without matplotlib and pandas.

    An import leaves no garbage, but millions of objects that each collection looks at, also at
    exit. Keras imports those two, if they are installed, for features that are not used here.
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
    """Hold back what C++ code writes to stderr; show it only if the block fails."""
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
