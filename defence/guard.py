"""What an untrusted file may contain, checked before the libraries that trust it see it.

The guards stand in three files, each guard in the order in which it runs:

guard.py, for any file
    check_fits         what the file declares takes at most --max-memory
    inspecting         reading what it declares takes little more address space than that
    open_archive       .keras: three known members, uncompressed, none twice
    check_heaps        HDF5: the heaps of texts have an end
    check_links        HDF5: one tree, no link to another file
    check_stored       HDF5: an array is as large in the file as it says; known filters only
    read_text          HDF5: an attribute is one text
    read_texts         HDF5: it is text, of bounded length
    parse_json         short, no NaN

guard_model.py, for a Keras model
    declared_shapes    the arrays of its weights, by check_links and check_stored
    check_config       allowed layers and activations only; numbers and names within bounds
    limit_weights      no weight is allocated beyond --max-memory while Keras builds the net
    check_classifier   one image in, a row of class scores out
    check_outputs      no layer's output for one image is beyond --max-memory
    check_prepared     what prepares an image gives what it says, tried on one image
    check_shapes       the file's arrays have the shapes of the net's weights
    check_finite       no weight is NaN or infinite
    check_step_fits    neither is a training step beyond --max-memory

guard_onnx.py, for a detector's .onnx file
    check_onnx         one picture in, a detector's answers out; allowed operators only, no other
                       file, no output for one image beyond --max-memory

Pictures are guarded by utils.decode_picture, a repair record by record.parse. A guard raises
InputError, one line that begins with the file's name.
"""

import contextlib
import json
import math
import struct
import zipfile
import zlib

import numpy as np

from defence.cli import DEFAULT_MAX_BYTES, InputError, gigabytes, one_line

OBJECTS = 50_000  # groups and arrays in an HDF5 file: weights, and an optimizer's
TEXTS = 10**6  # in the heaps of an HDF5 file: names of layers and weights
TEXT_LENGTH = 2**23  # characters; the config of keras.applications.EfficientNetV2L has 964,217
INFLATION = 1032  # the most that a byte of a deflate stream can become
DEFLATE, SHUFFLE, FLETCHER32 = 1, 2, 3  # the numbers of these filters in an HDF5 file
HEAP = b"GCOL\1\0\0\0"  # how each global heap of HDF5 begins
MEMBERS = {"metadata.json", "config.json", "model.weights.h5"}
NOT_KERAS = "not a .keras archive as Keras writes it"


def check_fits(path, what, size, max_bytes):
    """Raise InputError where `size` bytes, for `what`, are more than `max_bytes`."""
    if size > max_bytes:
        raise InputError(
            f"{path}: {what} would take {gigabytes(size)} GB of memory, more than --max-memory "
            f"{gigabytes(max_bytes)}"
        )


@contextlib.contextmanager
def inspecting(path, max_bytes=DEFAULT_MAX_BYTES):
    """A block that reads what a file declares. Raises InputError for whatever a library raises.

    Where the system can (Linux), it may take little more than `max_bytes` of address space: beyond
    the checks of what the file declares, for what it makes a library allocate unasked.
    """
    try:
        with _address_space(max_bytes):
            yield
    except InputError:
        raise
    except Exception as error:  # libhdf5, h5py, zipfile raise whatever their parts raise
        if isinstance(error, MemoryError) or "allocat" in str(error):
            problem = "reading it takes more memory than --max-memory allows"
            raise InputError(f"{path}: {problem}") from error
        raise InputError(f"{path}: damaged or of another format: {one_line(error)}") from error


@contextlib.contextmanager
def _address_space(max_bytes):
    try:
        import resource

        with open("/proc/self/statm") as sizes:
            used = int(sizes.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = used + max_bytes + 2**28  # room for what Python itself needs: without it, it may crash
    most = most if soft == resource.RLIM_INFINITY else min(soft, most)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# --------------------------------------------------------------------------------------- .keras


@contextlib.contextmanager
def open_archive(file, path, max_bytes=DEFAULT_MAX_BYTES):
    """Open a .keras file: a ZipFile with members of MEMBERS, as Keras writes them.

    file: the archive, a binary file open to read.  path: its name, for messages.
    """
    file.seek(-min(22, file.seek(0, 2)), 2)
    end = file.read()  # of the directory, where no comment follows, as none does here
    _, _, _, _, count, size, _, _ = struct.unpack("<4s4H2LH", end.rjust(22))
    if end[:4] != b"PK\5\6" or count > len(MEMBERS) or size > 1_000:
        raise InputError(f"{path}: {NOT_KERAS}")
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        for member in members:
            name = member.filename
            if name not in MEMBERS:
                raise InputError(f"{path}: {NOT_KERAS}: contains {name!r}")
            if names.count(name) > 1:
                raise InputError(f"{path}: {NOT_KERAS}: contains {name!r} more than once")
            check_fits(path, name, member.file_size, max_bytes)
            if member.compress_size != member.file_size or member.flag_bits & 1:
                raise InputError(f"{path}: {name} is compressed or encrypted; Keras does neither")
        yield archive


# ----------------------------------------------------------------------------------------- HDF5


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
        raise InputError(f"{path}: '{name}' is not an array of numbers but {describe(array)}")
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
            f"{path}: '{name}' is declared as {describe(array)}, but they are not in the file"
        )


def _check_inflated(array, info, chunk, max_bytes, path):
    """libhdf5 inflates a chunk to its end, however much more than the chunk's size that is."""
    if info.size * INFLATION > max_bytes:
        _, stored = array.id.read_direct_chunk(info.chunk_offset)
        if len(zlib.decompressobj().decompress(stored, chunk + 5)) > chunk + 4:  # with a checksum
            raise InputError(f"{path}: a chunk of '{array.name}' inflates beyond its size")


def describe(array):
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


# ----------------------------------------------------------------------------------------- JSON


def parse_json(text, path):
    """Parse JSON, str or bytes, of at most TEXT_LENGTH. Raises InputError if it cannot be."""

    def refuse(constant):
        raise ValueError(constant)

    if len(text) > TEXT_LENGTH:
        raise InputError(f"{path}: its JSON is longer than {TEXT_LENGTH:,} characters")
    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged: its JSON cannot be read") from error
