"""What an untrusted HDF5 file may contain. guard.py has the list of all guards."""

import contextlib
import math
import struct
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from defence.base.errors import InputError
from defence.base.limits import DEFAULT_MAX_BYTES, Name, check_fits
from defence.load.guard import TEXT_LENGTH, inspect_file

SIGNATURE = b"\x89HDF\r\n\x1a\n"
OBJECTS = 50_000  # groups and arrays in an HDF5 file: weights, and an optimizer's
TEXTS = 10**6  # in the heaps of an HDF5 file: names of layers and weights
INFLATION = 1032  # the most that a byte of a deflate stream can become
DEFLATE, SHUFFLE, FLETCHER32 = 1, 2, 3  # the numbers of these filters in an HDF5 file
HEAP = b"GCOL\1\0\0\0"  # how each global heap of HDF5 begins


@contextlib.contextmanager
def open_hdf5(
    file: Name | BinaryIO, path: Name, max_bytes: int = DEFAULT_MAX_BYTES
) -> Iterator[Any]:
    """Open an HDF5 file to read, an h5py.File. Raises InputError where it is not one or is cut short.

    file: its path, or a binary file open to read.  path: its name, for messages.
    """
    import h5py  # here, for the time that it takes

    with inspect_file(path, max_bytes):
        try:
            opened = h5py.File(file, "r")
        except OSError as error:
            with contextlib.nullcontext(file) if hasattr(file, "read") else open(file, "rb") as raw:
                raw.seek(0)
                damaged = raw.read(len(SIGNATURE)) == SIGNATURE
            what = "the HDF5 file is damaged or cut short" if damaged else "not an HDF5 file"
            raise InputError(f"{path}: {what}") from error
    with opened:
        yield opened


def check_heaps(contents, path):
    """Raise InputError where libhdf5 would never reach the end of a heap, where it keeps texts.

    contents: the file's bytes.  libhdf5 goes from object to object by the size that each
    declares, and 0 is such a size.
    """
    left = TEXTS
    heap = contents.find(HEAP)
    while heap >= 0:
        at, end = heap + 16, heap + int.from_bytes(contents[heap + 8 : heap + 16], "little")
        while at + 16 <= min(end, len(contents)):
            index, _, _, size = struct.unpack_from("<HHIQ", contents, at)
            step = 16 + -(-size // 8) * 8 if index else size  # free space counts its header
            left -= 1
            if not 0 < step <= end - at or left < 0:
                raise InputError(f"{path}: the HDF5 file is damaged: a heap without an end")
            at += step
        heap = contents.find(HEAP, heap + 1)


def check_links(file, path):
    """Walk an open HDF5 file: one tree of groups and arrays, all of it in this file.

    Returns {name: h5py.Group or h5py.Dataset}, everything in the file, the root as "".  Raises
    InputError at a soft, external or user-defined link, an object with two names, external
    storage, a virtual dataset.
    """
    import h5py  # here, for the time that it takes

    if file.id.get_create_plist().get_sizes() != (8, 8):
        raise InputError(f"{path}: not HDF5 as any current machine writes it")
    root = file["/"]
    found, groups, seen = {"": root}, [("", root)], {h5py.h5o.get_info(root.id).addr}
    while groups:
        within, group = groups.pop()
        if len(group) + len(seen) > OBJECTS:
            raise InputError(f"{path}: contains more than {OBJECTS:,} groups and arrays")
        for key in group:
            name = f"{within}/{key}" if within else key
            link = group.id.links.get_info(key.encode(errors="surrogateescape"))
            if link.type != h5py.h5l.TYPE_HARD:
                raise InputError(
                    f"{path}: {name!r} is a soft or external link, which could read another file"
                )
            if link.u in seen:
                raise InputError(f"{path}: {name!r} is a second name of another object")
            seen.add(link.u)
            found[name] = item = group[key]
            if isinstance(item, h5py.Group):
                groups.append((name, item))
            elif is_array(item):
                stored = item.id.get_create_plist()
                if stored.get_external_count() or stored.get_layout() == h5py.h5d.VIRTUAL:
                    raise InputError(f"{path}: the data of {name!r} is stored in another file")
    return found


def is_array(item):
    """Whether an object of an HDF5 file is an array."""
    import h5py

    return isinstance(item, h5py.Dataset)


def check_stored(array, path, max_bytes=DEFAULT_MAX_BYTES):
    """Raise InputError unless an array of numbers can be read in parts of `max_bytes`.

    array: h5py.Dataset.  Its bytes must be in the file, whole or in chunks, each chunk at most
    `max_bytes`, behind no filter but gzip, shuffle and fletcher32.
    """
    name, kind = array.name.strip("/"), array.dtype
    if array.shape is None or kind.kind not in "fiu" or kind.itemsize > 8:
        raise InputError(f"{path}: '{name}' is not an array of numbers but {describe_array(array)}")
    layout = array.id.get_create_plist()
    filters = [layout.get_filter(i)[0] for i in range(layout.get_nfilters())]
    if not {DEFLATE, SHUFFLE, FLETCHER32}.issuperset(filters) or len(set(filters)) < len(filters):
        raise InputError(
            f"{path}: '{name}' is stored with a filter other than gzip, shuffle, fletcher32"
        )
    if array.chunks is None:
        whole = array.id.get_storage_size() == array.nbytes
    else:
        chunk = math.prod(array.chunks) * kind.itemsize
        check_fits(path, f"one chunk of '{name}'", chunk, max_bytes)
        count = math.prod(-(-n // m) for n, m in zip(array.shape, array.chunks))
        whole = array.id.get_num_chunks() == count
        if DEFLATE in filters and whole:
            array.id.chunk_iter(lambda info: _check_inflated(array, info, chunk, max_bytes, path))
    if not whole:
        raise InputError(
            f"{path}: '{name}' is declared as {describe_array(array)}, but they are not in the file"
        )


def _check_inflated(array, info, chunk, max_bytes, path):
    """libhdf5 inflates a chunk to its end, however much more than the chunk's size that is."""
    if info.size * INFLATION > max_bytes:
        _, stored = array.id.read_direct_chunk(info.chunk_offset)
        if len(zlib.decompressobj().decompress(stored, chunk + 5)) > chunk + 4:  # with a checksum
            raise InputError(f"{path}: a chunk of '{array.name}' inflates beyond its size")


def describe_array(array):
    """The shape and type of an h5py.Dataset, in words."""
    return f"{'×'.join(map(str, array.shape or ())) or 'one'} values of type {array.dtype}"


def read_text(holder, name, path):
    """An attribute of text, str, of an HDF5 object; None where there is none."""
    values = read_texts(holder, name, path)
    if values is not None and len(values) != 1:
        raise InputError(f"{path}: the attribute '{name}' is not one text")
    return None if values is None else values[0]


def read_texts(holder, name, path):
    """An attribute that is a text or a row of texts, [str, …]; None where there is none."""
    import h5py

    if name not in holder.attrs:
        return None
    attribute = holder.attrs.get_id(name)
    if attribute.shape == (0,):
        return []
    if attribute.shape is None or len(attribute.shape) > 1:
        raise InputError(f"{path}: the attribute '{name}' is not a row of texts")
    if not h5py.check_string_dtype(attribute.dtype):
        raise InputError(f"{path}: the attribute '{name}' is not text")
    if attribute.dtype.itemsize * math.prod(attribute.shape) > TEXT_LENGTH:
        raise InputError(f"{path}: the attribute '{name}' is too long")
    value = holder.attrs[name]
    values = value.tolist() if isinstance(value, np.ndarray) else [value]
    return [value.decode() if isinstance(value, bytes) else value for value in values]
