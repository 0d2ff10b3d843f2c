"""A folder of images, in a folder for each class, as a dataset."""

import json
import os
import shutil

import h5py
import numpy as np
import pytest
from conftest import SHAPE, assert_refused, command, draw_images, read_record, write_data
from PIL import Image

import utils
from defence.base.errors import InputError

B = "models/small_bd_net.h5"


@pytest.fixture
def image_folder(deepid_world, tmp_path):
    """Return a folder of the clean images, in a folder for each class, named in order."""
    with h5py.File(deepid_world / "clean.h5") as file:
        images, labels = np.moveaxis(file["data"][:], 1, 3), file["label"][:].astype(int)
    for number, (image, label) in enumerate(zip(images, labels)):
        person = tmp_path / "images" / f"person {label}"
        person.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(person / f"{number:03}.png")
    return tmp_path / "images"


def hash_dataset(path):
    with utils.open_dataset(path) as data:
        return data.hash()


def test_a_folder_equals_an_hdf5_file_of_the_same_images(deepid_world, image_folder):
    order = np.argsort(read_labels(deepid_world), kind="stable")
    with (
        utils.open_dataset(image_folder) as ours,
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


def read_labels(world):
    with utils.open_dataset(world / "clean.h5") as data:
        return data.labels


def test_a_net_is_repaired_and_judged_with_a_folder(deepid_world, image_folder, tmp_path):
    call = ("--output", tmp_path / "g.h5", "--rounds", 1, "--epochs", 1, "--retrain-epochs", 1)
    process = command("repair.py", B, image_folder, *call, cwd=deepid_world)
    assert process.returncode == 0, process.stderr
    data = read_record(tmp_path / "g.h5")["data"]
    assert data["file"] == "images" and data["sha256"] == hash_dataset(image_folder)
    call = ("small_bd_net", "--repaired", tmp_path / "g.h5", "--csv", tmp_path / "rows.csv")
    process = command("eval_defence.py", image_folder, *call, "--labelled", cwd=deepid_world)
    assert process.returncode == 0 and "images: 150 images" in process.stdout, process.stderr
    assert "G was repaired with this dataset" in process.stderr
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 151
    with_poisoned = (*call, "--labelled", "--poisoned", image_folder)
    assert (
        command("eval_defence.py", image_folder, *with_poisoned, cwd=deepid_world).returncode == 0
    )


def test_the_spelling_of_a_path_does_not_change_the_repaired_net(
    deepid_world, image_folder, tmp_path
):
    """Nor does the record hold a directory. Sets that share a name get digits of their hashes."""
    images, labels = draw_images(20, 6, SHAPE, seed=4)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write_data(tmp_path / name / "x.h5", images, labels)
        images = 255 - images
    sets = [image_folder, tmp_path / "first" / "x.h5", tmp_path / "second" / "x.h5"]
    spelled = [
        "../images",
        "../first/x.h5",
        image_folder / ".." / "second" / ".." / "second" / "x.h5",
    ]
    call = ("--rounds", 1, "--epochs", 1, "--retrain-epochs", 1, "--no-export", "--output")
    badnet = deepid_world / B
    for data, poisoned, cwd, output in (
        (image_folder, [*sets, sets[1]], deepid_world, tmp_path / "g1.h5"),
        (".", spelled, image_folder, tmp_path / "g2.h5"),
    ):
        process = command(
            "repair.py", badnet, data, *call, output, "--poisoned", *poisoned, cwd=cwd
        )
        assert process.returncode == 0, process.stderr
    assert (tmp_path / "g1.h5").read_bytes() == (tmp_path / "g2.h5").read_bytes()
    record = read_record(tmp_path / "g1.h5")
    digests = [hash_dataset(path) for path in sets]
    assert record["poisoned"] == [
        {"file": path.name, "sha256": digest, "images": count}
        for path, digest, count in zip(sets, digests, (150, 20, 20))
    ]
    names = ["images", f"x.h5 ({digests[1][:8]})", f"x.h5 ({digests[2][:8]})"]
    assert all(list(rates) == names for rates in record["attack_success_rate"].values())
    assert tmp_path.name not in json.dumps(record)
    assert [line.split("  ")[0] for line in process.stdout.splitlines()[3:6]] == [
        f"attack success, {name}" for name in names
    ]


def test_the_hash_covers_names_and_contents(image_folder):
    before = hash_dataset(image_folder)
    assert hash_dataset(image_folder) == before
    moved = image_folder / "person 0" / "moved.png"
    sorted(moved.parent.iterdir())[0].rename(moved)
    after = hash_dataset(image_folder)
    moved.write_bytes(moved.read_bytes() + b"!")
    assert len({before, after, hash_dataset(image_folder)}) == 3


def test_dot_names_are_ignored_at_any_depth(image_folder, tmp_path):
    """Neither their images nor their links count, and the hash stays the same."""
    before = hash_dataset(image_folder)
    checkpoints = image_folder / "person 0" / ".checkpoints"
    checkpoints.mkdir()
    image = sorted((image_folder / "person 1").iterdir())[0]
    (checkpoints / "copy.png").write_bytes(image.read_bytes())
    (image_folder / "person 1" / ".link").symlink_to(tmp_path)
    (image_folder / ".DS_Store").write_bytes(b"of a file manager")
    with utils.open_dataset(image_folder) as data:
        assert len(data) == 150
    assert hash_dataset(image_folder) == before


@pytest.mark.parametrize("name", ["x.png", "link.png", "loop.png", "empty.png"])
def test_what_is_not_a_regular_file_is_refused_before_any_work(
    name, deepid_world, image_folder, tmp_path
):
    """Reading a pipe that nobody writes to would wait forever."""
    path = image_folder / "person 3" / name
    {
        "x.png": lambda: os.mkfifo(path),
        "link.png": lambda: path.symlink_to(tmp_path),
        "loop.png": lambda: path.symlink_to(path),
        "empty.png": path.touch,
    }[name]()
    process = command("repair.py", B, image_folder, cwd=deepid_world)
    assert_refused(process, f"{path}: ")
    assert "loading TensorFlow" not in process.stderr


def test_an_image_that_changes_while_the_folder_is_read_is_refused(image_folder):
    """An edit inside a class's folder does not change the folder around it."""
    with utils.open_dataset(image_folder) as data:
        data.fit_to(SHAPE, 6)
        batches = data.batches()
        path = image_folder / "person 5" / "new.png"
        last = sorted((image_folder / "person 5").iterdir())[-1]
        shutil.copy(last, path)
        os.replace(path, last)
        with pytest.raises(InputError, match=f"{last}: was changed"):
            list(batches)


def test_a_pipe_as_labels_txt_is_refused(image_folder):
    """The hash would wait forever for somebody who writes to it."""
    os.mkfifo(image_folder / "labels.txt")
    with (
        pytest.raises(InputError, match="labels.txt: cannot be read"),
        utils.open_dataset(image_folder),
    ):
        pass


def test_the_hash_is_of_the_files_that_are_read(image_folder):
    path = image_folder / "person 5" / "new.png"
    with utils.open_dataset(image_folder) as data:
        before = data.hash()
        path.write_bytes(b"was not there when the folder was opened")
        assert data.hash() == before
        path.rename(sorted((image_folder / "person 5").iterdir())[-2])
        with pytest.raises(InputError, match="png: was changed while"):
            data.hash()


def test_the_folder_of_a_class_may_be_a_link(image_folder, tmp_path):
    before = hash_dataset(image_folder)
    (image_folder / "person 4").rename(tmp_path / "elsewhere")
    (image_folder / "person 4").symlink_to(tmp_path / "elsewhere")
    assert hash_dataset(image_folder) == before


def test_a_class_that_labels_txt_lists_twice_is_refused(image_folder):
    names = ["person 0", *(f"person {number}" for number in range(6))]
    (image_folder / "labels.txt").write_text("\n".join(names))
    with (
        pytest.raises(InputError, match="labels.txt: lists 'person 0' more than once"),
        utils.open_dataset(image_folder),
    ):
        pass


def test_labels_txt_gives_the_order_and_classes_without_images(image_folder):
    names = ["nobody", *(f"person {n}" for n in (5, 4, 3, 2, 1, 0))]
    (image_folder / "labels.txt").write_text("\n".join(names))
    with utils.open_dataset(image_folder) as data:
        data.fit_to((31, 31, 3), 7)
        assert np.bincount(data.labels).tolist() == [0] + [25] * 6
        with pytest.raises(InputError, match="labels.txt: has 7 names, but the net has 6 classes$"):
            data.fit_to((31, 31, 3), 6)


def test_images_of_another_size_become_inputs_as_a_single_image_does(image_folder):
    path = sorted((image_folder / "person 0").iterdir())[0]
    large = Image.open(path).resize((70, 90))
    large.save(path)
    with utils.open_dataset(image_folder) as data:
        data.fit_to((31, 31, 1), 6)
        x, _ = next(data.batches())
    assert np.array_equal(x[0], utils.make_input(large, (31, 31, 1)))


def test_any_other_folder_is_refused(deepid_world, image_folder, tmp_path):
    def check_refused(*words, data=image_folder):
        assert_refused(command("repair.py", B, data, "--check", cwd=deepid_world), *words)

    (tmp_path / "empty").mkdir()
    check_refused("empty: has no subfolder of images for each class", data=tmp_path / "empty")
    (image_folder / "labels.txt").write_text("person 0\nperson 1")
    check_refused("person 2: is not a class in labels.txt")
    (image_folder / "labels.txt").unlink()
    (image_folder / "person 9").mkdir()
    check_refused("person 9: no file in the folder")
    (image_folder / "person 9" / "x.png").write_bytes(b"not an image")
    check_refused("has 7 class folders, but the net has 6 classes; list all, one a line, in its l")
    (image_folder / "person 9" / "x.png").rename(image_folder / "person 1" / "x.png")
    (image_folder / "person 9").rmdir()
    check_refused("x.png: not a PNG or JPEG image")
    (image_folder / "person 1" / "x.png").rename(image_folder / "x.png")
    check_refused("x.png: is not in the folder of a class")
    (image_folder / "x.png").rename(image_folder / ".x.png")
    assert command("repair.py", B, image_folder, "--check", cwd=deepid_world).returncode in (0, 1)
    call = ("eval_defence.py", image_folder / "person 1" / "001.png", "small_bd_net", "--labelled")
    (deepid_world / "x").mkdir(exist_ok=True)
    process = command(*call, "--repaired", B, cwd=deepid_world)
    assert_refused(process, "001.png: is not a folder; --labelled takes one folder")
