"""The check of a validation set before any training."""

import types

import h5py
import numpy as np
import pytest
from conftest import assert_refused, command, write_data

from defence.beyond import check

B = "models/small_bd_net.h5"


@pytest.fixture
def write_set(deepid_world, tmp_path):
    """Return a function that writes a set made from the clean images and returns its path."""
    with h5py.File(deepid_world / "clean.h5") as file:
        images, labels = np.moveaxis(file["data"][:], 1, 3), file["label"][:].astype(int)

    def write(make):
        path = tmp_path / "set.h5"
        write_data(path, *make(images, labels))
        return path

    return write


def shuffle_labels(x, y):
    return x, np.random.default_rng(0).permutation(y)


def poison(x, y):
    """Keep few images of each class, and give class 0 images of others."""
    few = np.concatenate([np.flatnonzero(y == label)[:8] for label in range(6)])
    return np.concatenate([x[few], x[:60]]), np.concatenate([y[few], np.zeros(60, int)])


def confuse(x, y):
    """Replace images of other classes by images of class 0, which the net answers with class 0."""
    images, labels = x.copy(), y.copy()
    rows = np.flatnonzero(y != 0)[:30]
    zeros = x[y == 0]
    images[rows] = zeros[np.arange(30) % len(zeros)]
    return images, labels


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            shuffle_labels,
            "does the dataset belong to another net, or are its labels in the wrong order?",
        ),
        (
            lambda x, y: (x[..., ::-1], y),
            "its pixels seem to be BGR, not RGB: with reversed channels the",
        ),
        (lambda x, y: (x[y < 5], y[y < 5] + 1), "labels seem to count from 1; subtract 1"),
        (lambda x, y: (x[y > 0], y[y > 0] - 1), "labels seem one too low; add 1"),
        (
            lambda x, y: (x[y == 3], y[y == 3]),
            "5 of 6 classes have no image, such as class 1 (label 0 in the file); G",
        ),
        (poison, "class 1 (label 0 in the file) has 68 images, most others have 8, as if poisoned"),
        (
            confuse,
            "30 images wrong and answers 30 of them with class 1 (label 0 in the file); look",
        ),
        (lambda x, y: (x[:5], y[:5]), "only 5 images for 6 classes; 100 or more are better"),
    ],
)
def test_possible_problems_are_reported(deepid_world, write_set, make, words):
    call = ("--check", "--scale", "0..1")  # of the BGR set, "caffe" serves some training runs well
    process = command("repair.py", B, write_set(make), *call, cwd=deepid_world)
    assert process.returncode == 1
    warnings = [line for line in process.stderr.splitlines() if line.startswith("warning: ")]
    assert any(words in line for line in warnings), process.stderr
    assert "the BadNet is right on " in process.stdout


def test_a_good_set_is_checked_in_three_lines_and_nothing_is_written(deepid_world, tmp_path):
    """This also works without a folder models/."""
    (tmp_path / "clean.h5").symlink_to(deepid_world / "clean.h5")
    call = ("repair.py", deepid_world / B, "clean.h5", "--check", "--scale", "0..1")
    process = command(*call, cwd=tmp_path)
    assert process.returncode == 0 and "warning" not in process.stderr
    first, second, third = process.stdout.splitlines()
    assert first.startswith("clean.h5: ") and "; the BadNet takes 0..1" in first
    assert second.startswith("the BadNet is right on ")
    assert third.startswith("classes with images: 6 of 6, ")
    assert [path.name for path in tmp_path.iterdir()] == ["clean.h5"]
    process = command("repair.py", B, "clean.h5", "--check", "--layer", "none", cwd=deepid_world)
    assert_refused(process, f"{B}: ")


def test_hardening_refuses_data_that_would_ruin_the_net(deepid_world, write_set, tmp_path):
    for make in (shuffle_labels, lambda x, y: (x[y < 2], y[y < 2])):
        path = write_set(make)
        call = ("repair.py", B, path, "--output", tmp_path / "g.h5", "--rounds", 0)
        process = command(*call, "--harden", cwd=deepid_world)
        assert_refused(process, "set.h5: --harden would ruin G: the BadNet is right")
        assert not (tmp_path / "g.h5").exists()
        process = command(*call, cwd=deepid_world)
        assert process.returncode == 0 and "warning: " in process.stderr
        (tmp_path / "g.h5").unlink()


def test_a_set_that_fits_is_not_warned_of():
    net = types.SimpleNamespace(
        accuracy=lambda: 0.9, rival=None, labels=np.arange(1200) % 120, data=None,
        classes=(np.arange(1200) + (np.arange(1200) % 10 == 0)) % 120,
        split=types.SimpleNamespace(net=types.SimpleNamespace(output_shape=(None, 120))),
    )  # fmt: skip
    assert list(check.find_problems(net)) == []
