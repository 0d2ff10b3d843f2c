"""Where some images stand for all, they are taken evenly: a folder has them class after class."""

import re

import numpy as np
import pytest
from conftest import command, write_data
from PIL import Image

import utils
from defence.load import datasets

SHAPE = (31, 31, 3)


@pytest.fixture
def in_order(tmp_path):
    """Return 240 images in the order of their classes: a folder, and files with and without chunks.

    Image i has the grey level i.
    """
    images = np.full((240, *SHAPE), np.arange(240, dtype=np.uint8)[:, None, None, None])
    labels = np.repeat(np.arange(6), 40)
    for number, (image, label) in enumerate(zip(images, labels)):
        (tmp_path / "faces" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "faces" / str(label) / f"{number:03}.png")
    write_data(tmp_path / "plain.h5", images, labels)
    write_data(tmp_path / "chunks.h5", images, labels, chunks=(7, 3, 31, 31))
    return {name: tmp_path / name for name in ("faces", "plain.h5", "chunks.h5")}


@pytest.mark.parametrize("name", ["faces", "plain.h5", "chunks.h5"])
@pytest.mark.parametrize("some", [False, True])
def test_spread_batches_give_each_image_once_and_begin_with_all_classes(
    name, some, in_order, monkeypatch
):
    monkeypatch.setattr(datasets, "BATCH_VALUES", 12 * 31 * 31 * 3)
    with utils.open_dataset(in_order[name]) as data:
        data.fit_to(SHAPE, 6)
        expected = np.arange(240)
        if some:
            expected = expected[expected % 5 > 0]
            data = data.part(np.arange(240) % 5 > 0)
        batches = list(data.spread_batches())
        rows = np.concatenate([rows for _, rows in batches])
        assert sorted(rows) == list(range(len(data))) and max(len(x) for x, _ in batches) <= 12
        shown = np.concatenate([x[:, 0, 0, 0] for x, _ in batches])
        assert np.array_equal(shown, expected[rows])
        # A chunk is read as a whole, so only batches, not images, are spread over such a file.
        few = np.concatenate([rows for _, rows in batches[: 6 if name == "chunks.h5" else 1]])
        assert len({*data.labels[few]}) >= 5


def test_a_single_batch_is_in_the_order_of_the_file(in_order, monkeypatch):
    monkeypatch.setattr(datasets, "BATCH_VALUES", 240 * 31 * 31 * 3)
    with utils.open_dataset(in_order["plain.h5"]) as data:
        data.fit_to(SHAPE, 6)
        ((x, rows),) = data.part(np.arange(240) < 100).spread_batches()
    assert rows.tolist() == list(range(100)) and np.array_equal(x[:, 0, 0, 0], np.arange(100))


def test_the_message_about_pixels_says_that_the_images_are_taken_evenly(deepid_world, monkeypatch):
    monkeypatch.setattr(datasets, "BATCH_VALUES", 9 * 31 * 31 * 3)
    process = command(
        "repair.py", "models/small_bd_net.h5", "clean.h5", "--check", cwd=deepid_world
    )
    assert re.search(r"accuracy on \d+ of 150 images, taken evenly, with pixels", process.stderr)
