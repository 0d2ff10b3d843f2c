"""Hostile HDF5 files on which libhdf5 never ends or crashes are refused."""

import os
import shutil
import struct
import time

import h5py
import numpy as np
import pytest
from conftest import draw_images, write_data
from hostile import copy_net

import utils
from defence.base.errors import InputError
from defence.load import guard_hdf5
from defence.load.guard import TEXT_LENGTH

WORDS = "the HDF5 file is damaged: reading it crashes or has no end"


def overwrite(path, signature, *fields):
    """Overwrite 8-byte fields after a signature's first place; None stands for that place."""
    contents = bytearray(path.read_bytes())
    start = contents.index(signature)
    for offset, value in fields:
        field = struct.pack("<Q", start if value is None else value)
        contents[start + offset : start + offset + 8] = field
    path.write_bytes(contents)
    return path


def empty_heap(path):
    """Give the heap of a fill value that is a text an object of size 0."""
    with h5py.File(path, "r+") as file:
        file.create_dataset("names", (1,), h5py.string_dtype(), fillvalue="nobody")
    return overwrite(path, b"GCOL", (16, 0), (24, 0))


def own_neighbour(path):
    """Make the tree of the root's names its own right neighbour."""
    return overwrite(path, b"TREE", (16, None))


def own_child(path):
    """Make that tree its own child, which libhdf5 descends until its stack overflows."""
    level = int.from_bytes(b"TREE\0\1\1\0", "little")
    return overwrite(path, b"TREE", (0, level), (32, None))


def many_children(path):
    """Make a tree of chunks in which 32 children of each node are the same node, 7 levels deep."""
    with h5py.File(path, "r+") as file:
        del file["data"]
        file.create_dataset("data", data=np.zeros((40, 3, 9, 9)), chunks=(1, 3, 9, 9))
    contents = bytearray(path.read_bytes())
    leaf = contents.index(b"TREE\1\0")
    child, node = leaf, 24 + 64 * 8 + 65 * 48  # children, keys
    for level in range(1, 8):
        key = contents[leaf + 24 : leaf + 24 + 48]
        entries = (key + struct.pack("<Q", child)) * 32 + key
        start = struct.pack("<4sBBHQQ", b"TREE", 1, level, 32, 2**64 - 1, 2**64 - 1)
        place, child = len(contents), len(contents)
        contents += (start + entries).ljust(node, b"\0")
    contents = contents.replace(struct.pack("<Q", leaf), struct.pack("<Q", place), 1)
    contents[40:48] = struct.pack("<Q", len(contents))  # the end of the file in its superblock
    path.write_bytes(contents)
    return path


@pytest.mark.parametrize("change", [empty_heap, own_neighbour, own_child, many_children])
def test_a_dataset_that_libhdf5_cannot_read(change, tmp_path, monkeypatch):
    monkeypatch.setattr(guard_hdf5, "SECONDS", 1)
    path = change(write_data(tmp_path / "evil.h5", *draw_images(12, 3, (9, 9, 3), seed=0)))
    start = time.monotonic()
    with pytest.raises(InputError, match=WORDS), utils.open_dataset(path):
        pass
    assert time.monotonic() - start < 20


def test_files_that_crash_libhdf5_do_not_crash_the_command(good, check_refused, tmp_path):
    path = shutil.copy(good / "data.h5", tmp_path / "evil.h5")
    check_refused(own_child(path), WORDS, data=True)
    check_refused(own_child(copy_net(good, tmp_path)), WORDS)


def test_a_rehearsal_ends_with_any_end_of_the_block(tmp_path, monkeypatch):
    def fail():
        raise ValueError

    def loop():
        while True:
            pass

    monkeypatch.setattr(guard_hdf5, "SECONDS", 1)
    seen = tmp_path / "seen"
    guard_hdf5.rehearse(lambda: seen.write_text(str(os.getpid())), "x.h5")
    assert int(seen.read_text()) != os.getpid()
    guard_hdf5.rehearse(fail, "x.h5")
    for end in (os.abort, loop, lambda: os.kill(os.getpid(), 9)):
        with pytest.raises(InputError, match=f"^x.h5: {WORDS}$"):
            guard_hdf5.rehearse(end, "x.h5")


def test_where_no_process_can_be_copied_a_valid_file_is_read(tmp_path, monkeypatch):
    def refuse():
        raise BlockingIOError

    monkeypatch.setattr(os, "fork", refuse)
    path = write_data(tmp_path / "good.h5", *draw_images(12, 3, (9, 9, 3), seed=0))
    with utils.open_dataset(path) as data:
        assert len(data) == 12


def test_a_long_text_in_a_heap_is_refused(tmp_path):
    """Its declaration has eight bytes, whatever its length."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.attrs["text"] = "a" * (TEXT_LENGTH - 1)
        file.attrs["long"] = "a" * (TEXT_LENGTH + 1)
        assert len(guard_hdf5.read_text(file, "text", "x.h5")) == TEXT_LENGTH - 1
        with pytest.raises(InputError, match="the attribute 'long' is too long"):
            guard_hdf5.read_text(file, "long", "x.h5")


def test_many_empty_heaps_take_no_time(tmp_path):
    heaps = guard_hdf5.HEAP + bytes(8)
    guard_hdf5.check_heaps(heaps * 1_000, "x.h5")
    with pytest.raises(InputError, match="a heap without an end"):
        guard_hdf5.check_heaps(heaps * (guard_hdf5.TEXTS + 1), "x.h5")
