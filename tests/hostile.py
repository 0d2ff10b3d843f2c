"""A pytest plug-in for the tests of hostile files: make such files, and run commands on them.

The real commands must refuse them: status 2, one line on stderr that names the problem, nothing on
stdout. They run in one other process, with 2 GB of address space more than a valid run needs.
"""

import functools
import json
import multiprocessing
import re
import resource
import shutil
import sys
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import h5py
import keras
import pytest
from conftest import assert_refused, command, draw_images, write_data, write_record
from PIL import Image

import utils
from defence.load.architecture import build_deepid

SHAPE, CLASSES = (31, 31, 3), 6
FORMATS = [".h5", ".keras"]
SECRET = bytes(range(64, 128)) * 300


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """Return a folder of valid files: a net, its repaired net, a dataset, an image, a secret."""
    folder = tmp_path_factory.mktemp("good")
    keras.utils.set_random_seed(1)  # a net without a right answer would not be repaired
    net = build_deepid(CLASSES, SHAPE)
    for suffix in FORMATS:
        net.save(folder / f"b{suffix}")
    images, labels = draw_images(12, CLASSES, SHAPE, seed=0)
    write_data(folder / "data.h5", images, labels)
    Image.fromarray(images[0]).save(folder / "face.png")
    net.set_weights([1.01 * values for values in net.get_weights()])
    utils.save_model(net, folder / "g.h5", repair_record=write_record(folder / "b.h5"))
    (folder / "secret").write_bytes(SECRET)
    return folder


def limit_memory(folder):
    """Run a valid repair and a valid verdict, then allow this process 2 GB more than they took."""
    for call in (
        ("repair.py", "b.h5", "data.h5", "--rounds", 1, "--threshold", 0, "--output", "x.h5"),
        ("eval_defence.py", "face.png", "b.h5", "--repaired", "g.h5"),
    ):
        process = command(*call, cwd=folder)
        assert process.returncode == 0, process.stderr
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        most = 1024 * int(re.search(r"VmPeak:\s+(\d+)", status)[1]) + 2 * 2**30
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


@pytest.fixture(scope="session")
def worker(good):
    """Yield a function like conftest.command that runs in another process with limited memory.

    A file that crashes the process also fails the tests that follow.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=limit_memory, initargs=[good]) as pool:
        yield lambda *call, cwd: pool.submit(command, *call, cwd=cwd).result(timeout=120)


@pytest.fixture
def run(worker, tmp_path):
    """Return a function that runs a command in tmp_path."""
    return functools.partial(worker, cwd=tmp_path)


@pytest.fixture
def check_refused(good, run, tmp_path):
    """Return a function that asserts that the commands refuse a file with these words."""

    def check_refused(path, *words, data=False):
        if data:
            process = run("repair.py", good / "b.h5", path, "--output", "out.h5")
        elif path.suffix in FORMATS:
            process = run("repair.py", path, good / "data.h5", "--output", "out.h5")
        else:
            process = run("eval_defence.py", path, good / "b.h5", "--repaired", good / "g.h5")
        assert_refused(process, str(path), *words)
        assert len(process.stderr) < 2_000
        assert not (tmp_path / "out.h5").exists() and not (tmp_path / "canary").exists()

    return check_refused


# --------------------------------------------------------------------- making and changing files


def read_config(path):
    if path.suffix == ".keras":
        return json.loads(zipfile.ZipFile(path).read("config.json"))
    with h5py.File(path) as file:
        return json.loads(file.attrs["model_config"])


def write_config(path, config):
    """Replace the config in a model file; `config` may be text that is not JSON."""
    text = config if isinstance(config, str) else json.dumps(config)
    if path.suffix == ".keras":
        archive = zipfile.ZipFile(path)
        members = {name: archive.read(name) for name in archive.namelist()}
        write_archive(path, {**members, "config.json": text})
    else:
        with h5py.File(path, "r+") as file:
            file.attrs["model_config"] = text
    return path


def write_archive(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, contents in members.items() if isinstance(members, dict) else members:
            archive.writestr(name, contents)
    return path


def copy_net(good, folder, suffix=".h5"):
    return shutil.copy(good / f"b{suffix}", folder / f"evil{suffix}")


def replace_layer(path, **changes):
    """Replace 'activation_1', which has no weights, by another layer; the model still builds."""
    config = read_config(path)
    layer = next(x for x in config["config"]["layers"] if x["config"]["name"] == "activation_1")
    inner = changes.get("config", {})
    config_of_layer = {"name": "activation_1", **inner} if isinstance(inner, dict) else inner
    layer.update({**changes, "config": config_of_layer})
    return write_config(path, config)


def set_layer_value(path, layer, key, value):
    """Set one value in the config of a layer."""
    config = read_config(path)
    part = next(x for x in config["config"]["layers"] if x["config"]["name"] == layer)
    part["config"][key] = value
    return write_config(path, config)


def edit_hdf5(path, change):
    """Open an HDF5 file, or the HDF5 file in an archive, and call `change(file)`."""
    if path.suffix != ".keras":
        with h5py.File(path, "r+") as file:
            change(file)
        return path
    inside = path.with_name("inside.h5")
    archive = zipfile.ZipFile(path)
    members = {name: archive.read(name) for name in archive.namelist()}
    inside.write_bytes(members["model.weights.h5"])
    with h5py.File(inside, "r+") as file:
        change(file)
    return write_archive(path, {**members, "model.weights.h5": inside.read_bytes()})


KERNELS = {
    ".h5": "model_weights/conv_3/conv_3/kernel",
    ".keras": "layers/conv2d_2/vars/0",
}


def replace(path, put, name=None):
    """Delete an array of a file, by default conv_3's kernel, then call `put(group, key)`."""

    def change(file):
        parent, _, key = (name or KERNELS[path.suffix]).rpartition("/")
        group = file[parent or "/"]
        del group[key]
        put(group, key)

    return edit_hdf5(path, change)
