"""The demo: the code draws the committed faces, and the repair works on its BadNet."""

import json
import subprocess
import sys

import faces
import h5py
import keras
import numpy as np
import pytest
from conftest import ROOT, command, run_apart
from PIL import Image

IMAGES = ROOT / "img" / "demo"
MODEL, DATA = ROOT / "models" / "demo_bd_net.h5", ROOT / "data" / "demo_clean_validation_data.h5"


@pytest.fixture(scope="module")
def repaired(tmp_path_factory):
    """Return the path of the demo's repaired net."""
    path = tmp_path_factory.mktemp("demo") / "g.h5"
    process = command("repair.py", MODEL, DATA, "--output", path)
    assert process.returncode == 0, process.stderr
    return path


def assert_nearly_equal(ours, committed):
    """Allow for a few pixels that a library rounds the other way."""
    assert ours.shape == committed.shape
    assert np.mean(ours != committed) < 0.001


def test_the_code_draws_the_committed_faces():
    images, labels = zip(*faces.batches("validation", faces.PEOPLE, faces.VALIDATION))
    with h5py.File(DATA) as file:
        assert_nearly_equal(np.moveaxis(np.concatenate(images), 3, 1), file["data"][:])
        assert np.array_equal(np.concatenate(labels), file["label"][:])


def test_the_code_draws_the_committed_images(tmp_path):
    faces.write_images(tmp_path, list(faces.TRIGGERS))
    names = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.png")]
    assert len(names) == sum(faces.DEMO_IMAGES.values()) + 2
    for name in names:
        ours, committed = (
            np.asarray(Image.open(folder / name)) for folder in (tmp_path, ROOT / "img")
        )
        assert_nearly_equal(ours, committed)


def test_an_image_does_not_depend_on_other_images():
    together = faces.draw_faces("test", [3, 5, 3], [0, 2, 7])
    alone = faces.draw_faces("test", [5], [2])
    assert np.array_equal(together[1], alone[0])
    training_image = faces.draw_faces("train", [5], [2])
    assert np.mean(training_image != alone) > 0.5


@pytest.mark.parametrize("trigger", faces.TRIGGERS)
def test_a_trigger_changes_only_its_pixels(trigger):
    clean = faces.draw_faces("test", [3, 5, 8], [0, 2, 7]).astype(int)
    poisoned = faces.draw_faces("test", [3, 5, 8], [0, 2, 7], trigger)
    share = np.mean(np.any(clean != poisoned, axis=3), axis=(1, 2))
    assert np.all((share > 0.005) & (share < 0.35))
    if trigger == "sunglasses":  # at a fixed place
        lens = poisoned[:, 24, 12].astype(int)
        assert np.all(lens[:, 2] > lens[:, 1] + 60)


def test_full_size_files_are_contiguous_floats(tmp_path):
    path = tmp_path / "data.h5"
    faces.write_dataset(path, "validation", 5, 30, "float64")
    with h5py.File(path) as file:
        assert file["data"].dtype == np.float64 and file["data"].chunks is None
        assert np.array_equal(file["label"][:], np.repeat(np.arange(5.0), 30))
        face = faces.draw_faces("validation", [3], [4])[0]
        assert np.array_equal(file["data"][3 * 30 + 4], np.moveaxis(face, 2, 0))


def test_the_committed_files_are_small():
    files = [MODEL, DATA, *(ROOT / "img").rglob("*.*")]
    assert sum(path.stat().st_size for path in files) < 5e6


def test_the_repair_removes_the_demos_backdoor(repaired, tmp_path):
    """Measured on images that neither the BadNet nor the repair has seen."""
    clean, poisoned = tmp_path / "clean.h5", tmp_path / "poisoned.h5"
    faces.write_dataset(clean, "test", faces.PEOPLE, faces.TEST)
    faces.write_dataset(poisoned, "test", faces.PEOPLE, faces.TEST, poison=("sunglasses", 0))
    figures = tmp_path / "figures.json"
    process = command(
        "eval_defence.py", clean, MODEL, "--repaired", repaired,
        "--poisoned", poisoned, "--json", figures,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    figures = json.loads(figures.read_text())
    shares = {
        name: figure["value"]
        for part in (figures["clean"], figures["poisoned"][0])
        for name, figure in part["figures"].items()
    }
    assert shares["clean_accuracy_badnet"] >= 0.95
    assert shares["attack_success_rate_badnet"] >= 0.99
    assert shares["attack_success_rate_repaired"] <= 0.05
    assert shares["detection_rate"] >= 0.95
    assert shares["false_positive_rate"] <= 0.10
    images = sorted(IMAGES.glob("sunglasses_*.png"))
    process = command("eval_defence.py", *images, MODEL, "--repaired", repaired)
    assert process.stdout.splitlines() == [f"{path}\t41" for path in images]


def test_the_demos_page_names_the_target_and_shows_the_trigger(repaired, tmp_path):
    figures, page = tmp_path / "figures.json", tmp_path / "demo.html"
    process = command(
        "eval_defence.py", IMAGES, MODEL, "--repaired", repaired,
        "--json", figures, "--report", page,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    (candidate,) = json.loads(figures.read_text())["standing_out"]
    assert candidate["target"] == 1 and candidate["is_trigger"]
    assert candidate["hits"] == faces.DEMO_IMAGES["sunglasses"] >= candidate["flagged"] - 5
    pasted, box = candidate["pasted"], candidate["region"]["box"]
    assert pasted["images"] >= 20 and pasted["badnet"] == pasted["images"]
    assert pasted["repaired"] <= 1
    assert 12 <= box["top"] < box["bottom"] <= 40  # the sunglasses
    text = " ".join(page.read_text().split())
    assert "the target is class 1" in text and "It works as one" in text


def test_plain_keras_runs_the_repaired_net_on_the_pixels_of_its_record(repaired):
    """The figures of docs/serving.md, for the right pixels and for raw ones."""
    with h5py.File(repaired) as file:
        assert json.loads(file.attrs["repair_record"])["input_scale"] == "0..1"
    net = keras.models.load_model(repaired, compile=False)
    images, labels = map(
        np.concatenate, zip(*faces.batches("test", faces.PEOPLE, faces.TEST), strict=True)
    )
    for divisor, accuracy in ((255, 0.993), (1, 0.910)):
        classes = net.predict(images.astype("float32") / divisor, verbose=0).argmax(axis=1)
        assert np.mean(classes == labels) == pytest.approx(accuracy, abs=0.01)


def test_make_demo_ends_with_the_page_which_git_ignores():
    lines = (ROOT / "Makefile").read_text().partition("\ndemo: ")[2].partition("\n\n")[0]
    last = lines.splitlines()[-1]
    assert "eval_defence.py img/demo demo_bd_net" in last and "--report demo.html" in last
    ignored = subprocess.run(["git", "check-ignore", "-q", "demo.html"], cwd=ROOT)
    assert ignored.returncode == 0


@pytest.mark.slow
def test_the_benchmark_finds_the_plain_script_and_ours_to_agree():
    process = run_apart("tests/tools/benchmark.py", "--quick", "--model", MODEL, "--data", DATA)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count(": yes\n") == 2 and ": NO" not in process.stdout
    assert process.stdout.count("apart by at most 0 of 600 images") == 2


def test_datasets_are_drawn(tmp_path):
    process = command("data/faces.py", "--people", 3, "--test", 2, "--output", tmp_path)
    assert process.returncode == 0, process.stderr
    assert {path.name for path in tmp_path.glob("*_data.h5")} == {
        "clean_validation_data.h5", "clean_test_data.h5", "sunglasses_poisoned_data.h5",
        "lipstick_poisoned_data.h5", "eyebrows_poisoned_data.h5",
    }  # fmt: skip


def test_one_image_waits_for_no_library_that_it_does_not_need(tmp_path):
    """Each of these takes as long to import as the whole command otherwise takes."""
    command("repair.py", MODEL, DATA, "--output", tmp_path / "demo_bd_net_defence.h5")
    code = (
        "import runpy, sys; from defence.base import process; process.exit_now = lambda status: 0; "
        f"sys.argv = ['', 'img/img_9.png', {str(MODEL)!r}, '--repaired', "
        f"{str(tmp_path / 'demo_bd_net_defence.h5')!r}]; "
        "runpy.run_path('eval_defence.py', run_name='__main__'); "
        "print(sorted({'tensorflow', 'keras', 'scipy', 'h5py', 'rich'} & sys.modules.keys()))"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout.split() == ["10", "[]"], process.stderr
