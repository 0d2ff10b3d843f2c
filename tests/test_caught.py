"""What a hardened net catches at 1 %, by a detector that is a few lines of NumPy."""

import types

import caught
import numpy as np
import photo_data
from conftest import command, draw_images

from defence.judge.detector import Answers

NAME = "gtsrb-deepid-7-logo-0.1"


def make_detector(models, fpr):
    """B takes a logo in the corner for class 7, where the image below is dark; G flags some."""
    assert fpr == caught.RATE

    def judge(images):
        logo = np.all(images[:, 1, 1:5] == images[:, 1, 1:2], axis=(1, 2))
        fooled = logo & (images[:, 20, 20, 0] < 128)
        flagged = fooled & (images[:, 20, 20, 1] < 64)
        badnet, repaired = np.where(fooled, 7, 3), np.full(len(images), 3)
        return Answers(badnet, repaired, np.float32(flagged), flagged)

    return types.SimpleNamespace(judge=judge, shape=(32, 32, 3))


def test_rates_are_of_poisoned_images(monkeypatch):
    monkeypatch.setattr(caught.backends, "load_detector", make_detector)
    images = draw_images(200, 5, (32, 32, 3), seed=0)[0]
    dark, darker = images[:, 20, 20, 0] < 128, images[:, 20, 20, 1] < 64
    rates = caught.measure_caught(NAME, "b.h5", "g.h5", images, 7)
    assert rates == {
        "success": dark.mean(),
        "success_repaired": 0,
        "caught": (dark & darker).mean(),
        "caught_of_successes": darker[dark].mean(),
        "flagged": 0,
    }


def test_unseen_images_are_of_other_classes(monkeypatch, tmp_path):
    monkeypatch.setattr(photo_data, "FOLDER", tmp_path)
    (tmp_path / "gtsrb_validation.h5").touch()
    images, labels = draw_images(90, 9, (32, 32, 3), seed=0)
    monkeypatch.setattr(photo_data, "read_dataset", lambda path: (images, labels))
    unseen, target = caught.read_unseen(NAME)
    assert target == 7 and len(unseen) == np.sum(labels != 7)


def test_a_net_without_a_repaired_one_is_left_out(tmp_path):
    process = command("tests/tools/caught.py", tmp_path, NAME)
    assert process.returncode == 0 and f"{NAME}.h5: no such file; left out" in process.stderr
    assert process.stdout.count("\n") == 2
