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


def shuffle_some(x, y):
    """Shuffle the labels of a third of the images."""
    labels, rng = y.copy(), np.random.default_rng(0)
    rows = rng.permutation(len(y))[: len(y) // 3]
    labels[rows] = rng.permutation(y[rows])
    return x, labels


def uneven(x, y):
    """Keep few images of each class, and repeat those of class 0."""
    few = np.concatenate([np.flatnonzero(y == label)[:8] for label in range(6)])
    more = np.resize(np.flatnonzero(y == 0), 60)
    return x[[*few, *more]], y[[*few, *more]]


def mix(x, y):
    """Mix each image with one of the next class, so that B takes some for that class."""
    others = np.roll(x, -1, axis=0)
    share = np.linspace(0, 0.68, len(x))[np.random.default_rng(0).permutation(len(x))]
    return np.uint8(x + (others - x.astype(float)) * share[:, None, None, None]), y


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
            "Does the dataset belong to another net, or are its labels in the wrong order?",
        ),
        (
            shuffle_some,
            "% of the labels seem to be wrong: the BadNet gives them its lowest scores. G",
        ),
        (
            lambda x, y: (x[..., ::-1], y),
            "its pixels seem to be BGR, not RGB: with reversed channels the",
        ),
        (lambda x, y: (x[y < 5], y[y < 5] + 1), "labels seem to count from 1; subtract 1"),
        (lambda x, y: (x[y > 0], y[y > 0] - 1), "labels seem one too low; add 1"),
        (
            lambda x, y: (x[y == 3], y[y == 3]),
            "5 of 6 classes have no image, such as class 1 (label 0 in the file); G forgets th",
        ),
        (
            confuse,
            "answers 30 of the 30 images that it gets wrong with class 1 (label 0 in the file), as "
            "sure as it is of right answers; look at them: if they are poisoned, --holdout measure",
        ),
        (
            lambda x, y: (x[:5], y[:5]),
            "only 5 images and fewer than 3 images in 5 of 5 classes; G forgets some of what",
        ),
    ],
)
def test_possible_problems_are_reported(deepid_world, write_set, make, words):
    call = ("--check", "--scale", "0..1")  # of the BGR set, "caffe" serves some training runs well
    process = command("repair.py", B, write_set(make), *call, cwd=deepid_world)
    assert process.returncode == 1
    warnings = [line for line in process.stderr.splitlines() if line.startswith("warning: ")]
    assert any(words in line for line in warnings), process.stderr
    assert "the BadNet is right on " in process.stdout
    assert process.stdout.splitlines()[-1] == "mend what the warnings name, then check again"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            uneven,
            "class 1 (label 0 in the file) has 68 images, most others have 8. That harms nothing "
            "by itself. If you do not know why it is so, look at them: poisoned images with the "
            "attacker's label would keep the backdoor in G",
        ),
        (
            mix,
            "and its wrong answers do not look like wrong labels: these images are hard for it. So "
            "it will disagree with G on more clean images; --holdout 0.1, and then "
            "eval_defence.py --fpr 0.01, allow for that",
        ),
    ],
)
def test_what_photographs_are_like_is_no_problem(deepid_world, write_set, make, words):
    """Uneven classes, and images on which B is right on some 73 %."""
    process = command(
        "repair.py", B, write_set(make), "--check", "--scale", "0..1", cwd=deepid_world
    )
    assert process.returncode == 0 and "warning" not in process.stderr, process.stderr
    assert words in process.stderr
    assert process.stdout.splitlines()[-1].startswith("nothing warns against this dataset; repair")


def test_a_good_set_is_checked_in_four_lines_and_nothing_is_written(deepid_world, tmp_path):
    """This also works without a folder models/."""
    (tmp_path / "clean.h5").symlink_to(deepid_world / "clean.h5")
    call = ("repair.py", deepid_world / B, "clean.h5", "--check", "--scale", "0..1")
    process = command(*call, cwd=tmp_path)
    assert process.returncode == 0 and "warning" not in process.stderr
    first, second, third, fourth = process.stdout.splitlines()
    assert first.startswith("clean.h5: ") and " images, pixels from 0 to 25" in first
    assert second.startswith("the BadNet is right on ")
    assert second.endswith(" % with pixels scaled to 0..1; the repair scales them so, too")
    assert fourth == "nothing warns against this dataset; repair with --harden --holdout 0.1 next"
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


def make_net(answers, labels, scores=None, rival=None):
    """Return what stands for a CachedNet that gives these answers to images with these labels."""
    classes = 120 if scores is None else scores.shape[1]
    net = types.SimpleNamespace(output_shape=(None, classes))
    return types.SimpleNamespace(
        accuracy=lambda: float(np.mean(answers == labels)), rival=rival, scale="0..1",
        labels=labels, classes=answers, data=types.SimpleNamespace(path="set.h5"),
        features=scores, split=types.SimpleNamespace(net=net, head=None),
    )  # fmt: skip


def examine(net):
    return [*check.examine_answers(net), *check.examine_classes(net)]


def test_a_set_that_fits_is_not_warned_of():
    labels = np.arange(1200) % 120
    assert examine(make_net((labels + (np.arange(1200) % 20 == 1)) % 120, labels)) == []


def test_pixels_that_serve_as_well_are_a_remark():
    labels = np.arange(1200) % 120
    ((tell, text),) = examine(make_net(labels, labels, rival="0..255"))
    assert tell is check.say
    assert text == (
        "the BadNet is right as often with pixels 0..255 as with 0..1, so it may have been trained "
        "on either. The repair uses 0..1; if that is wrong, set --scale 0..255"
    )


@pytest.mark.parametrize("share", [0, 0.05, 0.2, 0.5, 1])
@pytest.mark.parametrize("hard", [0, 0.25])
def test_wrong_labels_are_told_from_hard_images(monkeypatch, share, hard):
    """Of 40 classes. A hard image's label is B's second choice."""
    monkeypatch.setattr(check, "predict", lambda head, scores, rows: iter([scores[rows]]))
    rng, count = np.random.default_rng(0), 4000
    labels = np.arange(count) % 40
    scores = rng.random((count, 40))
    scores[np.arange(count), labels] = 2
    rows = rng.random(count) < hard
    scores[rows, (labels[rows] + 1) % 40] = 3
    answers, wrong = scores.argmax(axis=1), rng.random(count) < share
    labels[wrong] = rng.integers(0, 40, np.sum(wrong))
    estimate = check.estimate_disorder(make_net(answers, labels, scores))
    assert estimate == pytest.approx(share if share > 0.1 else 0, abs=0.03)
