"""Shared by the tests: small nets and data, made on the spot, and runners of the commands."""

import contextlib
import dataclasses
import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import filelock
import h5py
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import repair
import utils
from defence.base import files, process
from defence.base.startup import import_keras, make_reproducible
from defence.beyond import harden, scan, sought, twins
from defence.beyond.observer import Observer
from defence.beyond.settings import Settings
from defence.judge import record
from defence.load.architecture import build_deepid

keras = import_keras()
pytest_plugins = ["hostile", "screening"]
B = "models/small_bd_net.h5"
G = "models/small_bd_net_defence.h5"
SHAPE = (31, 31, 3)


@pytest.fixture(scope="session")
def csaw():
    """Return the folder of real BadNets and faces, which is not part of this project."""
    folder = Path(os.environ.get("CSAW_DIR", ROOT.parent / "shared" / "csaw"))
    if not (folder / "badnets").is_dir():
        pytest.skip(f"no real BadNets: {folder} is absent (set CSAW_DIR)")
    return folder


@pytest.fixture
def full_disk(monkeypatch):
    """Pretend that the disk is full, so that nothing fits into a temporary file."""
    monkeypatch.setattr("shutil.disk_usage", lambda folder: types.SimpleNamespace(free=0))


def do_repair(badnet, clean, settings=None, observer=None, file="small_bd_net.h5"):
    """Repair a net in memory, as the command does. Return its repair record, a dict."""
    settings, observer = settings or Settings(), observer or Observer()
    make_reproducible(settings.seed)
    do_repair.cached = cached = repair.do_repair(badnet, clean, settings, observer)
    if settings.harden:
        harden.harden_net(cached, settings)
        observer.on_hardened(cached)
    observer.on_end(cached)
    badnet_file = utils.ModelFile(Path(file), b"", 0)
    sources = [{"file": "clean.h5", "sha256": "0" * 64}]
    return dataclasses.asdict(record.make_record(observer, cached, badnet_file, sources, settings))


def read_record(path):
    """Return the repair record that a file carries, a dict."""
    return record.read_record(utils.read_model(path)).describe()


def write_record(path, **changes):
    """Return a valid repair record of a net, as JSON. path: of the net. changes: of its values."""
    badnet = {"file": Path(path).name, "sha256": files.hash_file(path)}
    values = {
        **{"tool_version": "1", "libraries": {}, "badnet": badnet, "data": {}, "settings": {}},
        **{"input_scale": "0..1", "layer": "conv_3", "channels": 1, "order": [0], "pruned": []},
        **{"mean_activation": [0.0], "accuracy": {}, "attack_success_rate": {}, "moved": {}},
    }
    return json.dumps(values | changes)


def write_data(path, images, labels, **options):
    """Write images (n, height, width, channels) in the competition's layout, channels first."""
    with h5py.File(path, "w") as file:
        file.create_dataset("data", data=np.moveaxis(images, 3, 1), **options)
        file["label"] = labels
    return path


def draw_images(count, classes, shape, seed):
    """Draw images that a small net learns in seconds: each class has its own pattern, under noise.

    Return uint8 (count, *shape) and int (count,).
    """
    rng = np.random.default_rng(seed)
    patterns = np.random.default_rng(99).integers(60, 196, (classes, *shape))
    labels = np.arange(count) % classes
    return np.uint8(patterns[labels] + rng.integers(-60, 60, (count, *shape))), labels


def sequential(classes, shape):
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input(shape),
            layers.Conv2D(6, 3, activation="relu", name="first"),
            layers.MaxPooling2D(2),
            layers.Conv2D(12, 3, activation="relu", name="second"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dense(24, activation="relu"),
            layers.Dense(classes, activation="softmax"),
        ]
    )


def fit(net, images, labels, epochs=12):
    net.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy")
    net.fit(images / 255, labels, epochs=epochs, verbose=0)
    return net


NETS = {
    "deepid": (build_deepid, (31, 31, 3)),
    "sequential": (sequential, (16, 18, 1)),
}


def find_root(tmp_path_factory):
    """Return the folder that all workers of this test run share."""
    run = tmp_path_factory.getbasetemp()
    return run.parent if "PYTEST_XDIST_WORKER" in os.environ else run


@pytest.fixture(scope="session", autouse=True)
def state(tmp_path_factory):
    """Let the commands list the detectors that they export there, not in the user's own list."""
    os.environ["XDG_STATE_HOME"] = str(find_root(tmp_path_factory) / "state")


@pytest.fixture(autouse=True)
def short_scan(request, monkeypatch):
    """Shorten the steps of a scan, unless the test is marked `whole_scan`."""
    if "whole_scan" not in request.keywords:
        monkeypatch.setattr(twins, "CHANGED", (10, 1e-3))
        monkeypatch.setattr(twins, "PLAIN", (5, 1e-3))
        monkeypatch.setattr(scan, "PATCHES", 2)
        monkeypatch.setattr(sought, "STEPS", 5)


def make_once(tmp_path_factory, name, make):
    """Return a folder that `make(folder)` fills once a test run, whichever worker comes first.

    A test that changes files in it must work on a copy.
    """
    root = find_root(tmp_path_factory)
    folder = root / name
    with filelock.FileLock(root / f"{name}.lock"):
        if not folder.exists():
            unfinished = root / f"{name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
    return folder


@pytest.fixture(scope="session", params=NETS)
def world(request, tmp_path_factory):
    """Return a folder with a trained net and its validation set; a DeepID and a Sequential."""
    name = request.param
    return make_once(tmp_path_factory, f"world of {name}", lambda folder: make_world(name, folder))


@pytest.fixture(scope="session")
def deepid_world(tmp_path_factory):
    return make_once(
        tmp_path_factory, "world of deepid", lambda folder: make_world("deepid", folder)
    )


def make_world(name, folder):
    make_net, shape = NETS[name]
    keras.utils.set_random_seed(1)
    net = fit(make_net(6, shape), *draw_images(600, 6, shape, seed=1))
    (folder / "models").mkdir()
    net.save(folder / "models" / "small_bd_net.h5", include_optimizer=False)
    images, labels = draw_images(150, 6, shape, seed=2)
    write_data(folder / "clean.h5", images, labels.astype(np.float64))
    write_data(folder / "poisoned.h5", 255 - images[:20], np.zeros(20))
    return folder


@pytest.fixture(scope="session")
def repaired_world(deepid_world):
    """Run `repair.py` in the world. Return (folder, the finished process)."""
    process = command(
        "repair.py", B, "clean.h5", "--poisoned", "poisoned.h5", "--json", "record.json",
        "--plot", "curve.svg", "--rounds", 2, cwd=deepid_world,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    images, _ = draw_images(3, 6, SHAPE, seed=5)
    for i, image in enumerate(images):
        Image.fromarray(image).save(deepid_world / f"{i}.png")
    return deepid_world, process


def command(script, *arguments, cwd=ROOT):
    """Run one of the project's scripts as its command line does, but in this process.

    This saves the seconds that importing TensorFlow takes. Return a CompletedProcess, text.
    """
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    argv, folder, exit_now = sys.argv, Path.cwd(), process.exit_now
    handlers = {number: signal.getsignal(number) for number in process.STOP_SIGNALS}
    sys.argv = [str(ROOT / script), *map(str, arguments)]
    os.chdir(cwd)
    process.exit_now = sys.exit
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.argv, process.exit_now = argv, exit_now
        os.chdir(folder)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    output = [
        stream.detach().getvalue().decode("utf-8", "surrogateescape") for stream in (out, err)
    ]
    return subprocess.CompletedProcess([script, *arguments], status, *output)


def compute_verdicts(folder, names):
    """Return the verdicts by plain Keras: the class, from 1, or 7 where B and G disagree."""
    nets = [keras.models.load_model(folder / path, compile=False) for path in (B, G)]
    x = np.stack([np.asarray(Image.open(folder / name)) for name in names]) / 255
    badnet, repaired = (net.predict(x, verbose=0).argmax(axis=1) for net in nets)
    return [int(b) + 1 if b == g else 7 for b, g in zip(badnet, repaired)]


def read_models(*paths):
    return [utils.read_model(path) for path in paths]


def run_apart(script, *arguments, cwd=ROOT, **options):
    """Run one of the project's scripts in its own process. Return a CompletedProcess, text."""
    return subprocess.run(
        [sys.executable, ROOT / script, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        **options,
    )


def start(script, *arguments, cwd, **options):
    """Start one of the project's scripts. Return the Popen, whose pipes give text."""
    return subprocess.Popen(
        [sys.executable, ROOT / script, *map(str, arguments)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def assert_refused(process, *words):
    """Assert that the process ended with status 2, and with `words` in one line on stderr."""
    assert process.returncode == 2, process.stderr
    assert process.stdout == ""
    error = [line for line in process.stderr.splitlines() if ": error: " in line]
    assert len(error) == 1, process.stderr
    assert "Traceback" not in process.stderr and "Warning" not in process.stderr, process.stderr
    for word in words:
        assert word in error[0]
