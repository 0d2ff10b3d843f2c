"""Every limit of memory: what one thing may take, and where larger arrays go.

`--max-memory` is the limit for any one thing that a file declares: `check_fits` refuses more. An
array of all images' features may also go to a temporary file: `allocate` chooses. The other
constants bound what is held at a time while images stream through a net.
"""

import contextlib
import ctypes
import gc
import math
import os
import shutil
import tempfile
from os import PathLike
from typing import Any

import numpy as np

from defence.base.errors import InputError
from defence.base.text import format_gigabytes

DEFAULT_MAX_BYTES = 2**30  # of --max-memory
ON_DISK = 16  # times --max-memory that a temporary file may take: a small file may unfold to much
BATCH_VALUES = 2**19  # numbers in a batch of images: 2 MB as float32, 67 images of DeepID
OUTPUT_VALUES = 2**26  # in one layer's output for a batch: 256 MB; DeepID stays far below
STREAM_VALUES = 2**23  # in the images of a stream that are compared: 32 MB
STREAM_BATCH_VALUES = 2**17  # in a batch of such images: 512 KB

Name = str | PathLike


def check_fits(path: Name, what: str, size: float, max_bytes: int) -> None:
    """Raise InputError where `size` bytes, for `what`, are more than `max_bytes`."""
    if size > max_bytes:
        raise InputError(
            f"{path}: {what} would take {format_gigabytes(size)} GB of memory, more than "
            f"--max-memory {format_gigabytes(max_bytes)}"
        )


def check_room(path: Name, what: str, size: int, max_bytes: int) -> None:
    """Raise InputError where `size` bytes fit neither in memory nor in a temporary file.

    path, what: the file and what takes the bytes, for the message.  max_bytes: of memory.
    """
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if size > max(max_bytes, min(free, ON_DISK * max_bytes)):
        limit = (
            f"the {format_gigabytes(free)} GB that are free in {folder}"
            if free < ON_DISK * max_bytes
            else f"{ON_DISK} times --max-memory {format_gigabytes(max_bytes)}"
        )
        raise InputError(
            f"{path}: {what} would take {format_gigabytes(size)} GB, more than {limit}"
        )


def allocate(
    shape: tuple[int, ...], dtype: Any, path: Name, what: str, max_bytes: int
) -> np.ndarray:
    """Return an array to fill, in memory or in a nameless file that ends with the array.

    path, what, max_bytes: as for `check_room`, whose InputError it raises.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    check_room(path, what, size, max_bytes)
    if size <= max_bytes:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile() as file:
        # Reserve all of it: where the disk fills up later, writing to the array ends the process.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        return np.memmap(file, dtype, "w+", shape=shape)


def release_memory() -> None:
    """Return memory that is no longer used to the system, which the C library would keep."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # only glibc has the function
        ctypes.CDLL(None).malloc_trim(0)
