"""Faults while the commands run: killed, no room, no permission, a data file cut short.

Whatever happens, the repaired net of before is left intact or replaced by a whole one, nothing
half-written bears its name, and the next run succeeds.
"""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from conftest import (
    ROOT,
    apart,
    assert_refused,
    command,
    draw_images,
    read_record,
    start,
    write_data,
)

import utils
from defence import files

B, G = "models/small_bd_net.h5", "models/small_bd_net_defence.h5"
QUICK = ("--rounds", 1, "--epochs", 1, "--threshold", 0.99)
QUICK_REPAIR = ("repair.py", B, "clean.h5", *QUICK)


@pytest.fixture(scope="module")
def repaired(deepid_world, tmp_path_factory):
    """A copy of the world, with a repaired net from an earlier run."""
    folder = shutil.copytree(deepid_world, tmp_path_factory.mktemp("repaired") / "world")
    process = command(*QUICK_REPAIR, cwd=folder)
    assert process.returncode == 0, process.stderr
    return folder


@pytest.fixture
def folder(repaired, tmp_path):
    return shutil.copytree(repaired, tmp_path / "world")


def left(folder):
    """What lies in models/, but for the hidden folders that a killed run may leave."""
    return sorted(name for name in os.listdir(folder / "models") if not name.startswith("."))


def read_until(process, words):
    """Read the stderr of a started process up to the line with these words."""
    seen = ""
    while words not in seen:
        seen = process.stderr.readline()
        assert seen, "the process ended before that step"


def assert_next_run_succeeds(folder):
    process = command(*QUICK_REPAIR, cwd=folder)
    assert process.returncode == 0, process.stderr
    assert left(folder) == ["small_bd_net.h5", "small_bd_net_defence.h5"]
    assert read_record(folder / G)["layer"] == "conv_3"
    utils.load_badnet(folder / G)


@pytest.mark.slow
def test_killed_at_random_moments(folder):
    """20 times SIGKILL, at moments over all of a run."""
    began = time.monotonic()
    start(*QUICK_REPAIR, cwd=folder).communicate()
    length = time.monotonic() - began
    rng = random.Random(0)
    old = (folder / G).read_bytes()
    for i in range(20):
        process = start(*QUICK_REPAIR, cwd=folder)
        # Every other one in the last part, where the net is saved.
        share = rng.uniform(0, 0.85) if i % 2 else rng.uniform(0.85, 1)
        time.sleep(share * length)
        process.kill()
        process.communicate()
        assert left(folder) == ["small_bd_net.h5", "small_bd_net_defence.h5"]
        now = (folder / G).read_bytes()
        if now != old:  # then it is a whole one
            utils.load_badnet(folder / G)
            old = now
    assert_next_run_succeeds(folder)


@pytest.mark.parametrize("size", [1_000, 100_000])
def test_no_room_for_the_output(folder, size):
    """As on a full disk: a file may have `size` bytes from when B is loaded, G has 400,000."""
    old = (folder / G).read_bytes()
    process = start(*QUICK_REPAIR, cwd=folder)
    read_until(process, "prune 1:")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    output, rest = process.communicate(timeout=120)
    assert process.returncode == 1 and output == ""
    errors = [line for line in rest.splitlines() if ": error: " in line]
    assert len(errors) == 1 and "Traceback" not in rest, rest
    assert errors[0] == f"repair.py: error: [Errno 27] File too large: '{G}'"
    assert (folder / G).read_bytes() == old
    assert sorted(os.listdir(folder / "models")) == ["small_bd_net.h5", "small_bd_net_defence.h5"]
    assert_next_run_succeeds(folder)


def test_no_room_for_the_copy_of_the_weights_that_is_loaded(folder):
    """The model is as it should be, so it is no wrong input but a failure."""
    old = (folder / G).read_bytes()
    process = apart(
        *QUICK_REPAIR,
        cwd=folder,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert (folder / G).read_bytes() == old
    assert process.returncode == 1 and process.stdout == "" and "Traceback" not in process.stderr
    (error,) = [line for line in process.stderr.splitlines() if ": error: " in line]
    assert error.startswith("repair.py: error: [Errno 27] File too large")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(folder):
    (folder / "models").chmod(0o500)
    assert_refused(command(*QUICK_REPAIR, cwd=folder), "cannot be written")
    (folder / "models").chmod(0o700)
    assert_next_run_succeeds(folder)


@pytest.mark.parametrize("moment", ["loading", "prune 1:"])
def test_a_data_file_that_is_cut_short_while_it_is_read(folder, moment):
    """The validation set loses its second half after it was opened, or while B is pruned."""
    old = (folder / G).read_bytes()
    images, labels = draw_images(600, 6, (31, 31, 3), seed=2)
    path = write_data(folder / "large.h5", images.astype(np.float64), labels)
    process = start("repair.py", B, path, *QUICK, cwd=folder)
    read_until(process, moment)
    os.truncate(path, os.path.getsize(path) // 2)
    output, errors = process.communicate(timeout=120)
    if moment == "loading":
        assert process.returncode == 2 and output == ""
        assert f"repair.py: error: {path}: was changed while it was read" in errors
        assert "Traceback" not in errors and (folder / G).read_bytes() == old
    else:  # its features were in memory already
        assert process.returncode == 0, errors
    assert_next_run_succeeds(folder)


def test_a_process_that_ends_while_it_saves_leaves_only_a_hidden_folder(tmp_path):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from defence import files
with files.replacing("g.h5") as beside:
    beside.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "g.h5").write_text("old")
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path)
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "g.h5").read_text() == "old"
    (hidden,) = set(os.listdir(tmp_path)) - {"g.h5"}
    assert hidden.startswith(".") and hidden.endswith(".unfinished")
    with files.replacing(tmp_path / "g.h5") as beside:
        beside.write_text("new")
    assert (tmp_path / "g.h5").read_text() == "new"


def test_a_damaged_repaired_net_is_not_judged_with(folder):
    whole = (folder / G).read_bytes()
    (folder / G).write_bytes(whole[: len(whole) // 2])
    process = command("eval_defence.py", "clean.h5", B, cwd=folder)
    assert_refused(process, G, "cut short")
    with h5py.File(folder / B, "r+") as file:  # another BadNet under the old name
        file["model_weights/output/output/bias"][0] += 1
    (folder / G).write_bytes(whole)
    assert_refused(command("eval_defence.py", "clean.h5", B, cwd=folder), "another BadNet")
