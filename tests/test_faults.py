"""Faults while the commands run: killed, no room, no permission, a data file cut short.

In each case the old repaired net stays intact or is replaced by a complete net, no half-written
file bears its name, and the next run succeeds.
"""

import errno
import functools
import multiprocessing
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver

import h5py
import numpy as np
import pytest
from conftest import (
    ROOT,
    assert_refused,
    command,
    draw_images,
    read_record,
    start,
    write_data,
)

import utils
from defence.base import startup
from defence.beyond.observer import Observer
from defence.judge import onnx_file

B, G = "models/small_bd_net.h5", "models/small_bd_net_defence.h5"
NAMES = ["small_bd_net.h5", "small_bd_net_defence.h5"]
REPAIR = ("repair.py", B, "clean.h5", "--threshold", 0.99, "--no-export")
QUICK_REPAIR = (*REPAIR, "--rounds", 0, "--retrain-epochs", 0)
HALF = 100_000  # bytes; G has four times as many


@pytest.fixture(scope="module")
def repaired(deepid_world, tmp_path_factory):
    """Return a copy of the world with a repaired net from an earlier run."""
    folder = shutil.copytree(deepid_world, tmp_path_factory.mktemp("repaired") / "world")
    for detector in (folder / "models").glob("*.onnx"):  # left by another test
        detector.unlink()
    process = command(*QUICK_REPAIR, cwd=folder)
    assert process.returncode == 0, process.stderr
    assert (folder / G).stat().st_size > 3 * HALF
    return folder


@pytest.fixture
def folder(repaired, tmp_path):
    return shutil.copytree(repaired, tmp_path / "world")


def list_visible(folder):
    """Return the names in models/ without the hidden folders that a killed run may leave."""
    return sorted(name for name in os.listdir(folder / "models") if not name.startswith("."))


@pytest.fixture(scope="module")
def forks():
    """Return a context whose processes have TensorFlow imported already, which saves time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests"))))
        forkserver.ensure_running()
    return context


def repair_with_fault(forks, folder, event, fault, inside="models"):
    """Run the repair with another seed, in its own process with a fault.

    event: an audit event of Python; `fault` is called at each such event about a hidden file in
    the folder `inside`.  Return a CompletedProcess, text.
    """
    process = forks.Process(target=run_with_fault, args=(folder, event, fault, f"{inside}/."))
    process.start()
    process.join(120)
    process.kill()  # if it still runs
    output = [(folder / name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(QUICK_REPAIR, process.exitcode, *output)


def run_with_fault(folder, event, fault, hidden):
    """Run in the process of `repair_with_fault`."""

    def hook(name, arguments):
        if name == event and hidden in str(arguments):
            fault()

    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = [str(ROOT / "repair.py"), *map(str, QUICK_REPAIR[1:]), "--seed", "1"]
    sys.addaudithook(hook)
    runpy.run_path(sys.argv[0], run_name="__main__")


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def limit_file_size(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def kill_at_half():
    """Let the kernel end the process in the middle of its writing, without a core file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit_file_size(HALF)


def assert_failed(process, problem):
    """Assert that the process ended with status 1 and one error that begins with `problem`."""
    assert process.returncode == 1 and process.stdout == "", process.stderr
    assert "Traceback" not in process.stderr
    (error,) = [line for line in process.stderr.splitlines() if ": error: " in line]
    assert error.startswith(f"repair.py: error: {problem}")


def assert_next_run_succeeds(folder):
    before = (folder / G).stat().st_ino
    process = command(*QUICK_REPAIR, cwd=folder)
    assert process.returncode == 0, process.stderr
    assert list_visible(folder) == NAMES and (folder / G).stat().st_ino != before
    assert read_record(folder / G)["layer"] == "conv_3"
    utils.load_badnet(folder / G)


@pytest.mark.slow
def test_killed_at_random_moments(folder):
    """Send SIGKILL to 8 runs, at moments spread over the run."""
    call = (*REPAIR, "--rounds", 1, "--epochs", 1)
    began = time.monotonic()
    start(*call, cwd=folder).communicate()
    length = time.monotonic() - began
    rng = random.Random(0)
    old = (folder / G).read_bytes()
    for i in range(8):
        process = start(*call, "--seed", i + 1, cwd=folder)
        # Every other kill is in the last part, where the net is saved.
        share = rng.uniform(0, 0.85) if i % 2 else rng.uniform(0.85, 1)
        time.sleep(share * length)
        process.kill()
        process.communicate()
        assert list_visible(folder) == NAMES
        now = (folder / G).read_bytes()
        if now != old:  # then the file is complete
            utils.load_badnet(folder / G)
            old = now
    assert_next_run_succeeds(folder)


@pytest.mark.parametrize(
    "event, fault, number",
    [
        ("tempfile.mkdtemp", kill_at_half, signal.SIGXFSZ),
        ("os.rename", kill, signal.SIGKILL),
        ("shutil.rmtree", kill, signal.SIGKILL),
    ],
    ids=["half-written", "before the rename", "after the rename"],
)
def test_killed_while_the_net_is_saved(folder, forks, event, fault, number):
    """Only a hidden folder is left; G is the old net until the rename."""
    old, complete = (folder / G).read_bytes(), event != "tempfile.mkdtemp"
    process = repair_with_fault(forks, folder, event, fault)
    assert process.returncode == -number, process.stderr
    assert list_visible(folder) == NAMES
    (hidden,) = set(os.listdir(folder / "models")) - set(NAMES)
    assert hidden.startswith(".") and hidden.endswith(".unfinished")
    inside = list((folder / "models" / hidden).iterdir())
    if event == "shutil.rmtree":
        assert inside == [] and (folder / G).read_bytes() != old
    else:
        (temporary,) = inside
        assert (folder / G).read_bytes() == old
        assert complete or temporary.stat().st_size == HALF
    if complete:
        new = folder / G if inside == [] else temporary
        assert read_record(new)["settings"]["seed"] == 1
        utils.load_badnet(new)
    assert_next_run_succeeds(folder)


@pytest.mark.parametrize("size", [10_000, HALF])
def test_no_room_for_the_output(folder, forks, size):
    """As on a full disk, a file may have at most `size` bytes when G is saved; stderr has fewer."""
    old = (folder / G).read_bytes()
    fault = functools.partial(limit_file_size, size)
    process = repair_with_fault(forks, folder, "tempfile.mkdtemp", fault)
    assert_failed(process, f"[Errno 27] File too large: '{G}'")
    assert (folder / G).read_bytes() == old
    assert sorted(os.listdir(folder / "models")) == NAMES
    assert_next_run_succeeds(folder)


@pytest.mark.parametrize(
    "step",
    [(tempfile, "mkdtemp"), (os, "fsync"), (os, "replace")],
    ids=lambda step: step[1],
)
def test_no_room_at_a_step_of_saving(folder, monkeypatch, step):
    """A full disk may refuse other calls than the writing itself."""
    module, name = step
    original, failures = getattr(module, name), []

    def fail(*arguments, **options):
        if name != "fsync" and "models" not in str((arguments, options)):
            return original(*arguments, **options)
        failures.append(arguments)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    old = (folder / G).read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(module, name, fail)
        process = command(*QUICK_REPAIR, "--seed", 1, cwd=folder)
    assert len(failures) == 1
    assert_failed(process, f"[Errno 28] No space left on device: '{G}'")
    assert (folder / G).read_bytes() == old
    assert sorted(os.listdir(folder / "models")) == NAMES
    assert_next_run_succeeds(folder)


def test_no_room_for_the_copy_of_the_weights_when_loading(folder, forks):
    """The model is valid, so this is a failure and not a wrong input."""
    old, fault = (folder / G).read_bytes(), functools.partial(limit_file_size, HALF)
    inside = tempfile.gettempdir()
    process = repair_with_fault(forks, folder, "tempfile.mkdtemp", fault, inside)
    assert_failed(process, "[Errno 27] File too large")
    assert (folder / G).read_bytes() == old


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(folder):
    (folder / "models").chmod(0o500)
    assert_refused(command(*QUICK_REPAIR, cwd=folder), "cannot be written")
    (folder / "models").chmod(0o700)
    assert_next_run_succeeds(folder)


@pytest.mark.parametrize("moment", ["loading", "pruning"])
def test_a_data_file_that_is_cut_short_while_it_is_read(folder, monkeypatch, moment):
    """The validation set loses its second half after it is opened, or while B is pruned."""
    old = (folder / G).read_bytes()
    images, labels = draw_images(600, 6, (31, 31, 3), seed=2)
    path = write_data(folder / "large.h5", images.astype(np.float64), labels)
    size = os.path.getsize(path)
    function = startup, "make_reproducible"
    if moment == "pruning":
        function = Observer, "on_channel"
    original = getattr(*function)

    def cut(*arguments):
        os.truncate(path, size // 2)
        return original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(*function, cut)
        process = command("repair.py", B, path, *QUICK_REPAIR[3:], cwd=folder)
    assert os.path.getsize(path) == size // 2
    if moment == "loading":
        assert_refused(process, f"repair.py: error: {path}: was changed while it was being read")
        assert (folder / G).read_bytes() == old
    else:  # its features were in memory already
        assert process.returncode == 0, process.stderr
    assert_next_run_succeeds(folder)


@pytest.mark.slow
def test_no_room_for_the_detector(folder, monkeypatch):
    """G is already saved, and stays."""
    convert = onnx_file._convert_to_onnx
    monkeypatch.setattr(
        onnx_file, "_convert_to_onnx", lambda *arguments: convert(*arguments) * 10**4
    )
    old, limits = (folder / G).read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 * HALF, limits[1]))
    try:
        call = [argument for argument in QUICK_REPAIR if argument != "--no-export"]
        process = command(*call, "--seed", 1, cwd=folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert process.returncode == 1 and "Saved model" in process.stdout
    assert "repair.py: error: [Errno 27] File too large" in process.stderr
    assert sorted(os.listdir(folder / "models")) == NAMES
    assert read_record(folder / G)["settings"]["seed"] == 1 and (folder / G).read_bytes() != old


def test_a_damaged_repaired_net_is_not_judged_with(folder):
    contents = (folder / G).read_bytes()
    (folder / G).write_bytes(contents[: len(contents) // 2])
    process = command("eval_defence.py", "clean.h5", B, cwd=folder)
    assert_refused(process, G, "cut short")
    with h5py.File(folder / B, "r+") as file:  # another BadNet under the old name
        file["model_weights/output/output/bias"][0] += 1
    (folder / G).write_bytes(contents)
    assert_refused(command("eval_defence.py", "clean.h5", B, cwd=folder), "another BadNet")
