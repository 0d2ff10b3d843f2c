"""What an untrusted HDF5 file may contain. guard.py has the list of all guards."""

import contextlib
import math
import os
import signal
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NoReturn

import numpy as np

from defence.base.errors import InputError
from defence.base.limits import DEFAULT_MAX_BYTES, Name, check_fits
from defence.base.process import STOP_SIGNALS
from defence.load.guard import TEXT_LENGTH, inspect_file

SIGNATURE = b"\x89HDF\r\n\x1a\n"
OBJECTS = 50_000  # groups and arrays in an HDF5 file, for weights and an optimizer
TEXTS = 10**6  # in the heaps of an HDF5 file: names of layers and weights
INFLATION = 1032  # bytes that one byte of a deflate stream can become, at most
DEFLATE, SHUFFLE, FLETCHER32 = 1, 2, 3  # the numbers of these filters in an HDF5 file
SECONDS = 15  # of the processor, to rehearse reading a file; one of 50,000 arrays takes 4
HEAP = b"GCOL\1\0\0\0"  # the first bytes of each global heap of HDF5


@contextlib.contextmanager
def open_hdf5(
    file: Name | BinaryIO, path: Name, max_bytes: int = DEFAULT_MAX_BYTES
) -> Iterator[Any]:
    """Open an h5py.File to read. Raise InputError where the file is not HDF5 or is damaged.

    file: its path, or a binary file open to read.  path: its name, for messages.
    """
    import h5py  # here, because the import takes long

    with inspect_file(path, max_bytes):
        try:
            opened = h5py.File(file, "r")
        except OSError as error:
            problem = "not an HDF5 file"
            if _read_signature(file) == SIGNATURE:
                problem = "the HDF5 file is damaged or cut short"
            raise InputError(f"{path}: {problem}") from error
    with opened:
        yield opened


def _read_signature(file: Name | BinaryIO) -> bytes:
    """Return the first bytes of a file, given as a path or as an open binary file."""
    if isinstance(file, str | os.PathLike):
        with open(file, "rb") as opened:
            return opened.read(len(SIGNATURE))
    file.seek(0)
    return file.read(len(SIGNATURE))


def check_heaps(contents: bytes, path: Name) -> None:
    """Raise InputError where libhdf5 would never reach the end of a heap, which stores texts.

    contents: the file's bytes.  libhdf5 moves from object to object by the size that an object
    declares, and a hostile file can declare 0.
    """
    problem = f"{path}: the HDF5 file is damaged: a heap without an end"
    remaining = TEXTS
    heap = contents.find(HEAP)
    while heap >= 0:
        place, end = heap + 16, heap + int.from_bytes(contents[heap + 8 : heap + 16], "little")
        while place + 16 <= min(end, len(contents)):
            index, _, _, size = struct.unpack_from("<HHIQ", contents, place)
            step = 16 + -(-size // 8) * 8 if index else size  # free space counts its header
            remaining -= 1
            if not 0 < step <= end - place or remaining < 0:
                raise InputError(problem)
            place += step
        remaining -= 1  # an empty heap takes time, too
        if remaining < 0:
            raise InputError(problem)
        heap = contents.find(HEAP, heap + 1)


def rehearse(read: Callable[[], object], path: Name) -> None:
    """Raise InputError where `read()` never ends or crashes, as libhdf5 can on a hostile file.

    A copy of this process calls it first. An exception there does not count: it comes again when
    the caller reads the file.  path: for messages.  Where a process cannot be copied, as on
    Windows or beyond a limit of processes, nothing is checked.
    """
    import h5py  # noqa: F401  # here, so that the copy need not import it

    if not hasattr(os, "fork"):
        return
    reader, writer = os.pipe()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about other threads, none of which runs in the copy
            child = os.fork()
    except OSError:
        os.close(reader)
        os.close(writer)
        return
    if child == 0:
        _rehearse_and_exit(read, writer)
    os.close(writer)
    with open(reader, "rb") as pipe:
        survived = pipe.read()
    with contextlib.suppress(ChildProcessError):  # it is gone where SIGCHLD is ignored
        os.waitpid(child, 0)
    if not survived:
        raise InputError(f"{path}: the HDF5 file is damaged: reading it crashes or has no end")


def _rehearse_and_exit(read: Callable[[], object], writer: int) -> NoReturn:
    """Call `read()`, write a byte to the pipe `writer`, and end this process, a copy."""
    import faulthandler
    import resource

    try:
        faulthandler.disable()
        for number in STOP_SIGNALS:  # whose handler would delete what this process writes
            signal.signal(number, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # glibc writes why it ends a process
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
        limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_CPU, (min([SECONDS, *limits]), hard))
        signal.alarm(40 * SECONDS)
        with contextlib.suppress(Exception):
            read()
        os.write(writer, b".")
    finally:
        os._exit(0)


def check_links(file: Any, path: Name) -> dict[str, Any]:
    """Check that an open HDF5 file is one tree of groups and arrays, stored in this file alone.

    Return {name: h5py.Group or h5py.Dataset} for every object; the root's name is "".  Raise
    InputError at a soft, external or user-defined link, an object with two names, external
    storage, a virtual dataset.
    """
    import h5py  # here, because the import takes long

    if file.id.get_create_plist().get_sizes() != (8, 8):
        raise InputError(f"{path}: the HDF5 file does not use 8-byte addresses and lengths")
    root = file["/"]
    objects, groups, addresses = {"": root}, [("", root)], {h5py.h5o.get_info(root.id).addr}
    while groups:
        parent, group = groups.pop()
        if len(group) + len(addresses) > OBJECTS:
            raise InputError(f"{path}: contains more than {OBJECTS:,} groups and arrays")
        for key in group:
            name = f"{parent}/{key}" if parent else key
            link = group.id.links.get_info(key.encode(errors="surrogateescape"))
            if link.type != h5py.h5l.TYPE_HARD:
                raise InputError(
                    f"{path}: {name!r} is a soft or external link, which could read another file"
                )
            if link.u in addresses:
                raise InputError(f"{path}: {name!r} is a second name of another object")
            addresses.add(link.u)
            objects[name] = item = group[key]
            if isinstance(item, h5py.Group):
                groups.append((name, item))
            elif is_array(item):
                layout = item.id.get_create_plist()
                if layout.get_external_count() or layout.get_layout() == h5py.h5d.VIRTUAL:
                    raise InputError(f"{path}: the data of {name!r} is stored in another file")
    return objects


def is_array(item: Any) -> bool:
    """Return whether an object of an HDF5 file is an array."""
    import h5py

    return isinstance(item, h5py.Dataset)


def check_stored(array: Any, path: Name, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
    """Raise InputError unless an array of numbers can be read in parts of `max_bytes`.

    array: h5py.Dataset.  Its bytes must be in the file, in one piece or in chunks of at most
    `max_bytes`, with no filters except gzip, shuffle and fletcher32.
    """
    name, kind = array.name.strip("/"), array.dtype
    if array.shape is None or kind.kind not in "fiu" or kind.itemsize > 8:
        hint = "; save the net with weights in float32" * (kind.kind == "V")  # bfloat16
        problem = f"'{name}' is not an array of numbers but {describe_array(array)}"
        raise InputError(f"{path}: {problem}{hint}")
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


def walk_through(path: Name, names: Iterable[str], max_bytes: int = DEFAULT_MAX_BYTES) -> None:
    """Have libhdf5 read the structures of a file, for rehearse: all that lead to its arrays.

    names: of the arrays that will be read.  Their chunks are looked up, but not inflated.
    """
    with open_hdf5(path, path, max_bytes) as file, inspect_file(path, max_bytes):
        objects = check_links(file, path)
        for array in (objects[name] for name in names if is_array(objects.get(name))):
            with contextlib.suppress(Exception):  # the other arrays count nevertheless
                array.id.get_storage_size()
                array.id.get_num_chunks()  # raises where it has no chunks
                for row in {0, (len(array) - 1) // array.chunks[0] * array.chunks[0]}:
                    array.id.read_direct_chunk((row, *[0] * (array.ndim - 1)))


def _check_inflated(array: Any, info: Any, chunk: int, max_bytes: int, path: Name) -> None:
    """Raise InputError where a chunk inflates beyond its size: libhdf5 inflates all of it.

    info: h5py's StoreInfo of the chunk.  chunk: the chunk's size in bytes.
    """
    if info.size * INFLATION > max_bytes:
        _, stored = array.id.read_direct_chunk(info.chunk_offset)
        if len(zlib.decompressobj().decompress(stored, chunk + 5)) > chunk + 4:  # with a checksum
            raise InputError(f"{path}: a chunk of '{array.name}' inflates beyond its size")


def describe_array(array: Any) -> str:
    """Describe an h5py.Dataset by its shape and type."""
    return f"{'×'.join(map(str, array.shape or ())) or 'one'} values of type {array.dtype}"


def read_text(item: Any, name: str, path: Name) -> str | None:
    """Return an HDF5 object's attribute that is one text; None if it is absent."""
    values = read_texts(item, name, path)
    if values is not None and len(values) != 1:
        raise InputError(f"{path}: the attribute '{name}' is not one text")
    return None if values is None else values[0]


def read_texts(item: Any, name: str, path: Name) -> list[str] | None:
    """Return an HDF5 object's attribute that is a text or a row of texts; None if it is absent."""
    import h5py

    if name not in item.attrs:
        return None
    attribute = item.attrs.get_id(name)
    if attribute.shape == (0,):
        return []
    if attribute.shape is None or len(attribute.shape) > 1:
        raise InputError(f"{path}: the attribute '{name}' is not a row of texts")
    if not h5py.check_string_dtype(attribute.dtype):
        raise InputError(f"{path}: the attribute '{name}' is not text")
    if attribute.dtype.itemsize * math.prod(attribute.shape) > TEXT_LENGTH:
        raise InputError(f"{path}: the attribute '{name}' is too long")
    value = item.attrs[name]
    values = value.tolist() if isinstance(value, np.ndarray) else [value]
    if sum(map(len, values)) > TEXT_LENGTH:  # texts of any length are in a heap
        raise InputError(f"{path}: the attribute '{name}' is too long")
    return [value.decode() if isinstance(value, bytes) else value for value in values]
