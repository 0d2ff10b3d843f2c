"""A pytest plug-in for the tests of judging on Ray: a cluster, a tiny detector, images."""

import shutil

import keras
import numpy as np
import psutil
import pytest
from conftest import draw_images
from PIL import Image

import utils

SHAPE = (9, 8, 3)
NAME, OUTPUT = "tiny_bd_net", "verdicts"
FILE = f"{NAME}_detector.onnx"


@pytest.fixture(scope="module")
def address():
    """Yield the address of a Ray cluster on this machine: two nodes with a processor each."""
    from ray.cluster_utils import Cluster

    before = psutil.Process().children(recursive=True)
    node = {"num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(num_cpus=1)
        yield cluster.address
    finally:
        started = {*psutil.Process().children(recursive=True)} - {*before}
        cluster.shutdown()
        for process in psutil.wait_procs(started, timeout=60)[1]:
            process.kill()  # rarely, a worker outlives a cluster that Ray shuts down


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return a folder with the detector of two tiny nets: their Keras files and an ONNX file."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "models").mkdir()
    keras.utils.set_random_seed(3)
    layers = keras.layers
    hidden = [layers.Conv2D(4, 3, activation="relu"), layers.Flatten()]
    net = keras.Sequential([keras.Input(SHAPE), *hidden, layers.Dense(6, activation="softmax")])
    paths = list_model_paths(folder)
    net.save(paths[0])
    noise = np.random.default_rng(0)
    net.set_weights([v + 0.1 * noise.standard_normal(v.shape) for v in net.get_weights()])
    net.save(paths[1])
    export(folder, "0..1")
    return folder


def list_model_paths(folder):
    return [folder / "models" / f"{NAME}{end}.h5" for end in ("", "_defence")]


def export(folder, scale):
    """Write the detector of the folder's nets. Return its path."""
    from defence.judge import backends  # here, and so on, because ONNX, Ray may be absent

    path = folder / "models" / FILE
    backends.export_detector(*map(utils.read_model, list_model_paths(folder)), path, scale=scale)
    return path


@pytest.fixture
def folder(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    return tmp_path


def draw(folder, count, name="p", size=SHAPE[1::-1]):
    """Write `count` numbered images into folder/images. size: (width, height)."""
    inside = folder / "images"
    inside.mkdir(exist_ok=True)
    images, _ = draw_images(count, 6, SHAPE, seed=len(name))
    for i, image in enumerate(images):
        Image.fromarray(image).resize(size).save(inside / f"{name}{i:05}.png", compress_level=1)
    return inside


CALL = ("eval_defence.py", "--ray", "images", NAME, "--output", OUTPUT)


def list_rows(folder):
    """Return the rows of the Parquet files."""
    import pyarrow.dataset

    return pyarrow.dataset.dataset(folder / OUTPUT, format="parquet").to_table().to_pylist()


def read_verdicts(folder):
    """Return the rows of the Parquet files, {path: row}."""
    rows = list_rows(folder)
    assert len({row["path"] for row in rows}) == len(rows)
    return {row["path"]: row for row in rows}


def list_parts(folder):
    return {path: path.stat().st_mtime_ns for path in (folder / OUTPUT).glob("*.parquet")}
