"""What is told of a validation set before anything is trained on it."""

import types

import h5py
import numpy as np
import pytest
from conftest import assert_refused, command, write_data

from defence.beyond import check

B = "models/small_bd_net.h5"


@pytest.fixture
def sets(deepid_world, tmp_path):
    """A function: write a set made of the clean one's images and labels; returns its path."""
    with h5py.File(deepid_world / "clean.h5") as file:
        images, labels = np.moveaxis(file["data"][:], 1, 3), file["label"][:].astype(int)

    def write(make):
        path = tmp_path / "set.h5"
        write_data(path, *make(images, labels))
        return path

    return write


def shuffled(x, y):
    return x, np.random.default_rng(0).permutation(y)


def poisoned(x, y):
    """Of each class but one most images are gone, and that one has those of others."""
    few = np.concatenate([np.flatnonzero(y == label)[:8] for label in range(6)])
    return np.concatenate([x[few], x[:60]]), np.concatenate([y[few], np.zeros(60, int)])


def worn(x, y):
    """Images of other classes, labelled truly, that the net takes for class 0: those of class 0."""
    images, labels = x.copy(), y.copy()
    rows = np.flatnonzero(y != 0)[:30]
    zeros = x[y == 0]
    images[rows] = zeros[np.arange(30) % len(zeros)]
    return images, labels


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (shuffled, "is it another net's set, or are its labels in disorder?"),
        (lambda x, y: (x[..., ::-1], y), "its pixels seem to be BGR, not RGB: so turned it is"),
        (lambda x, y: (x[y < 5], y[y < 5] + 1), "labels seem to count from 1; subtract 1"),
        (lambda x, y: (x[y > 0], y[y > 0] - 1), "labels seem one too low; add 1"),
        (lambda x, y: (x[y == 3], y[y == 3]), "without an image: 5 of 6, such as label 0;"),
        (poisoned, "label 0 has 68 images, most others 8; so it looks where poisoned"),
        (worn, "of the 30 images that the BadNet gets wrong it answers 30 with label 0; look at"),
        (lambda x, y: (x[:5], y[:5]), "only 5 images for 6 classes; 100 or more are better"),
    ],
)
def test_what_may_be_wrong_is_told(deepid_world, sets, make, words):
    process = command("repair.py", B, sets(make), "--check", cwd=deepid_world)
    assert process.returncode == 1
    warnings = [line for line in process.stderr.splitlines() if line.startswith("warning: ")]
    assert any(words in line for line in warnings), process.stderr
    assert "the BadNet is right on " in process.stdout


def test_a_good_set_is_checked_in_three_lines_and_nothing_is_written(deepid_world, tmp_path):
    """Also where there is no models/ to write to."""
    (tmp_path / "clean.h5").symlink_to(deepid_world / "clean.h5")
    call = ("repair.py", deepid_world / B, "clean.h5", "--check", "--scale", "0..1")
    process = command(*call, cwd=tmp_path)
    assert process.returncode == 0 and "warning" not in process.stderr
    first, second, third = process.stdout.splitlines()
    assert first.startswith("clean.h5: ") and "; the BadNet takes 0..1" in first
    assert second.startswith("the BadNet is right on ")
    assert third.startswith("classes with images: 6 of 6, ")
    assert [path.name for path in tmp_path.iterdir()] == ["clean.h5"]
    unfit = command("repair.py", B, "clean.h5", "--check", "--layer", "none", cwd=deepid_world)
    assert_refused(unfit, f"{B}: ")


def test_hardening_refuses_what_would_wreck_the_net(deepid_world, sets, tmp_path):
    for make in (shuffled, lambda x, y: (x[y < 2], y[y < 2])):
        path = sets(make)
        call = ("repair.py", B, path, "--output", tmp_path / "g.h5", "--rounds", 0)
        refused = command(*call, "--harden", cwd=deepid_world)
        assert_refused(refused, "set.h5: --harden would teach G what is wrong")
        assert not (tmp_path / "g.h5").exists()
        unhardened = command(*call, cwd=deepid_world)
        assert unhardened.returncode == 0 and "warning: " in unhardened.stderr
        (tmp_path / "g.h5").unlink()


def test_a_set_that_fits_is_not_warned_of():
    net = types.SimpleNamespace(
        accuracy=lambda: 0.9, rival=None, labels=np.arange(1200) % 120, data=None,
        classes=(np.arange(1200) + (np.arange(1200) % 10 == 0)) % 120,
        split=types.SimpleNamespace(net=types.SimpleNamespace(output_shape=(None, 120))),
    )  # fmt: skip
    assert list(check.find_problems(net)) == []
