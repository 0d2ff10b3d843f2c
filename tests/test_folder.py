"""A folder of pictures, in a folder for each class, as a dataset."""

import h5py
import numpy as np
import pytest
from conftest import assert_refused, command, read_record
from PIL import Image

import utils
from defence.base import files
from defence.base.errors import InputError
from defence.load.folder import hash_dataset

B = "models/small_bd_net.h5"


@pytest.fixture
def pictures(deepid_world, tmp_path):
    """The clean images as pictures, in a folder of folders that are named in order."""
    with h5py.File(deepid_world / "clean.h5") as file:
        images, labels = np.moveaxis(file["data"][:], 1, 3), file["label"][:].astype(int)
    for number, (image, label) in enumerate(zip(images, labels)):
        place = tmp_path / "pictures" / f"person {label}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number:03}.png")
    return tmp_path / "pictures"


def test_it_is_the_dataset_that_a_file_of_the_same_images_is(deepid_world, pictures):
    order = np.argsort(utils_labels(deepid_world), kind="stable")
    with (
        utils.open_dataset(pictures) as ours,
        utils.open_dataset(deepid_world / "clean.h5") as theirs,
    ):
        for data in (ours, theirs):
            data.fit_to((31, 31, 3), 6)
        assert np.array_equal(ours.labels, theirs.labels[order]) and len(ours) == 150
        x = np.concatenate([x for x, _ in theirs.batches()])
        assert np.array_equal(np.concatenate([x for x, _ in ours.batches()]), x[order])
        some = ours.part(np.arange(150) % 7 == 0)
        assert np.array_equal(np.concatenate([x for x, _ in some.batches()]), x[order][::7])
        assert ours.pixel_range() == theirs.pixel_range()


def utils_labels(world):
    with utils.open_dataset(world / "clean.h5") as data:
        return data.labels


def test_a_net_is_repaired_and_judged_with_it(deepid_world, pictures, tmp_path):
    call = ("--output", tmp_path / "g.h5", "--rounds", 1, "--epochs", 1, "--retrain-epochs", 1)
    process = command("repair.py", B, pictures, *call, cwd=deepid_world)
    assert process.returncode == 0, process.stderr
    data = read_record(tmp_path / "g.h5")["data"]
    assert data["file"] == "pictures" and data["sha256"] == hash_dataset(pictures)
    call = ("small_bd_net", "--repaired", tmp_path / "g.h5", "--csv", tmp_path / "rows.csv")
    judged = command("eval_defence.py", pictures, *call, "--labelled", cwd=deepid_world)
    assert judged.returncode == 0 and "pictures: 150 images" in judged.stdout, judged.stderr
    assert "G was repaired with this dataset" in judged.stderr
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 151
    with_poisoned = (*call, "--labelled", "--poisoned", pictures)
    assert command("eval_defence.py", pictures, *with_poisoned, cwd=deepid_world).returncode == 0


def test_its_hash_is_of_names_and_contents(pictures):
    before = hash_dataset(pictures)
    assert hash_dataset(pictures) == before
    moved = pictures / "person 0" / "moved.png"
    sorted(moved.parent.iterdir())[0].rename(moved)
    after = hash_dataset(pictures)
    moved.write_bytes(moved.read_bytes() + b"!")
    assert len({before, after, hash_dataset(pictures)}) == 3
    assert hash_dataset(moved) == files.hash_file(moved)


def test_labels_txt_says_the_order_and_which_classes_have_no_picture(pictures):
    names = ["nobody", *(f"person {n}" for n in (5, 4, 3, 2, 1, 0))]
    (pictures / "labels.txt").write_text("\n".join(names))
    with utils.open_dataset(pictures) as data:
        data.fit_to((31, 31, 3), 7)
        assert np.bincount(data.labels).tolist() == [0] + [25] * 6
        with pytest.raises(InputError, match="has 7 classes, and the net 6$"):
            data.fit_to((31, 31, 3), 6)


def test_pictures_of_another_size_become_inputs_as_a_picture_alone_does(pictures):
    path = sorted((pictures / "person 0").iterdir())[0]
    large = Image.open(path).resize((70, 90))
    large.save(path)
    with utils.open_dataset(pictures) as data:
        data.fit_to((31, 31, 1), 6)
        x, _ = next(data.batches())
    assert np.array_equal(x[0], utils.make_input(large, (31, 31, 1)))


def test_what_is_no_such_folder_is_refused(deepid_world, pictures, tmp_path):
    def refused(*words, data=pictures):
        assert_refused(command("repair.py", B, data, "--check", cwd=deepid_world), *words)

    (tmp_path / "empty").mkdir()
    refused("empty: has no folder of pictures for each class", data=tmp_path / "empty")
    (pictures / "labels.txt").write_text("person 0\nperson 1")
    refused("person 2: is no class that labels.txt lists")
    (pictures / "labels.txt").unlink()
    (pictures / "person 9").mkdir()
    refused("person 9: no file in the folder")
    (pictures / "person 9" / "x.png").write_bytes(b"no picture")
    refused("has 7 classes, and the net 6; list all classes, one a line, in labels.txt")
    (pictures / "person 9" / "x.png").rename(pictures / "person 1" / "x.png")
    (pictures / "person 9").rmdir()
    refused("x.png: not a PNG or JPEG picture")
    (pictures / "person 1" / "x.png").rename(pictures / "x.png")
    refused("x.png: is not in the folder of a class")
    (pictures / "x.png").rename(pictures / ".x.png")
    assert command("repair.py", B, pictures, "--check", cwd=deepid_world).returncode in (0, 1)
    call = ("eval_defence.py", pictures / "person 1" / "001.png", "small_bd_net", "--labelled")
    (deepid_world / "x").mkdir(exist_ok=True)
    process = command(*call, "--repaired", B, cwd=deepid_world)
    assert_refused(process, "--labelled goes with one folder")
