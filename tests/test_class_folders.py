"""The names of the class folders: in what the commands print and write, and in G's record."""

import csv

import h5py
import numpy as np
import pytest
from conftest import (
    SHAPE,
    assert_refused,
    command,
    draw_images,
    read_record,
    write_data,
    write_record,
)
from matplotlib.figure import Figure
from PIL import Image

from defence.base.errors import InputError
from defence.base.text import format_class
from defence.beyond.finding import Finding
from defence.explain import page_judged, plots
from defence.judge import onnx_file, record
from defence.load.class_names import NAME_LENGTH

B = "models/small_bd_net.h5"
NAMES = ["Ann", "Bo", "Cy", "Di", "Ed", "$Flo\x1b[31m"]
ORDER = sorted(NAMES)  # $ comes before letters: so the folders' order is not that of NAMES
FAST = ("--rounds", 1, "--epochs", 1, "--retrain-epochs", 1)


@pytest.fixture(scope="module")
def faces(deepid_world, tmp_path_factory):
    """Return a folder with a folder of the clean images of each class, named as in ORDER."""
    folder = tmp_path_factory.mktemp("faces")
    with h5py.File(deepid_world / "clean.h5") as file:
        images, labels = np.moveaxis(file["data"][:], 1, 3), file["label"][:].astype(int)
    for number, (image, label) in enumerate(zip(images, labels)):
        (folder / ORDER[label]).mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / ORDER[label] / f"{number:03}.png")
    return folder


@pytest.fixture(scope="module")
def repaired(deepid_world, faces, tmp_path_factory):
    """Repair the net with the folder. Return G's path."""
    output = tmp_path_factory.mktemp("repaired") / "g.h5"
    process = command("repair.py", B, faces, "--output", output, *FAST, cwd=deepid_world)
    assert process.returncode == 0, process.stderr
    return output


def test_warnings_about_a_folder_name_its_classes(deepid_world, faces, tmp_path):
    for name in ORDER[1:]:
        (tmp_path / name).symlink_to(faces / name)
    (tmp_path / "labels.txt").write_text("\n".join(ORDER))
    process = command("repair.py", B, tmp_path, "--check", cwd=deepid_world)
    words = "1 of 6 classes have no image, such as class 1 ($Flo\\x1b[31m); G forgets them"
    assert words in process.stderr and "label 0" not in process.stderr


def test_folders_in_another_order_than_the_net_s_say_which_order_counts(
    deepid_world, faces, tmp_path
):
    for number, name in enumerate(reversed(ORDER)):
        (tmp_path / f"{number}").symlink_to(faces / name)
    process = command("repair.py", B, tmp_path, "--check", cwd=deepid_world)
    assert process.returncode == 1
    assert "Class folders count in alphabetical order, unless a labels.txt" in process.stderr


def test_a_class_without_a_name_says_where_its_label_stands():
    assert format_class(np.int64(11)) == "class 12 (label 11 in the file)"
    assert format_class(1, ["Ann", "Bo"]) == "class 2 (Bo)"


def test_the_record_carries_the_names_to_the_verdicts(deepid_world, faces, repaired):
    assert read_record(repaired)["class_names"] == ORDER
    detector = onnx_file.default_detector_path(repaired)
    images = sorted((faces / "Bo").iterdir())[:2]
    printed = set()
    for model in (
        [B, "--repaired", repaired, "--backend", "keras"],
        [B, "--repaired", repaired, "--backend", "onnx"],
        [detector],
    ):
        process = command("eval_defence.py", *images, *model, cwd=deepid_world)
        assert process.returncode == 0, process.stderr
        printed.add(process.stdout)
    (text,) = printed
    for line in text.splitlines():
        _, number, name = line.split("\t")
        assert name == [*ORDER, "poisoned"][int(number) - 1]


def test_labels_come_before_the_record_and_the_record_before_labels_txt(
    deepid_world, faces, repaired, tmp_path
):
    model = tmp_path / "models" / "small_bd_net.h5"
    model.parent.mkdir()
    model.write_bytes((deepid_world / B).read_bytes())
    (model.parent / "labels.txt").write_text("a\n" * 6)
    (tmp_path / "explicit.txt").write_text("b\n" * 6)
    images = [*sorted((faces / "Bo").iterdir()), *sorted((faces / "Cy").iterdir())]

    def judge(*options):
        call = ("eval_defence.py", *images, model, "--repaired", repaired, *options)
        lines = command(*call, cwd=tmp_path).stdout.splitlines()
        return {line.split("\t")[2] for line in lines} - {"poisoned"}

    assert {"Bo", "Cy"} <= judge() <= {*ORDER}
    assert judge("--labels", tmp_path / "explicit.txt") == {"b"}


def test_a_repair_without_folders_records_only_the_names_of_labels(deepid_world, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join(NAMES[:5] + ["Flo"]))
    call = ("repair.py", B, "clean.h5", *FAST, "--no-export", "--output", tmp_path / "g.h5")
    assert command(*call, cwd=deepid_world).returncode == 0
    assert "class_names" not in h5py.File(tmp_path / "g.h5").attrs["repair_record"]
    assert command(*call, "--labels", names, cwd=deepid_world).returncode == 0
    assert read_record(tmp_path / "g.h5")["class_names"] == [*NAMES[:5], "Flo"]


@pytest.mark.parametrize(
    "names",
    [["a"] * 5, ["a"] * 7, ["a"] * 5 + [1], ["a"] * 5 + ["b" * (NAME_LENGTH + 1)], [], "abcdef"]
    + [["a"] * 5 + ["\ud800"], {"a": 1}, 0],
)
def test_damaged_names_are_refused(names, deepid_world):
    with pytest.raises(InputError, match=r"g\.h5: its repair record is damaged"):
        text = write_record(deepid_world / B, class_names=names)
        record.parse_record(text, "g.h5").names(6, "g.h5")


def test_names_too_long_to_be_read_again_are_left_out(deepid_world, monkeypatch):
    text = write_record(deepid_world / B, class_names=["a" * NAME_LENGTH, "b"])
    assert record.parse_record(text, "g.h5").names(2, "g.h5") == ["a" * NAME_LENGTH, "b"]
    assert record.parse_record(write_record(deepid_world / B), "g.h5").names(2, "g.h5") is None
    monkeypatch.setattr(record, "NAMES_LENGTH", 20)
    assert record.fit_names(["a" * 9, "b"]) == ["a" * 9, "b"]
    assert record.fit_names(["a" * 19, "b"]) is None and record.fit_names(None) is None


def test_poisoned_images_in_the_folder_of_their_target_get_its_label(
    deepid_world, faces, repaired, tmp_path
):
    target = tmp_path / "stamped" / "Cy"
    target.mkdir(parents=True)
    for image in sorted((faces / "Bo").iterdir()):
        (target / image.name).write_bytes(image.read_bytes())
    call = ("eval_defence.py", faces, B, "--repaired", repaired, "--labelled", "--poisoned")
    process = command(*call, target.parent, "--csv", "-", cwd=deepid_world)
    assert process.returncode == 0, process.stderr
    rows = csv.DictReader(process.stdout.splitlines())
    labels = {row["label"] for row in rows if row["dataset"] == str(target.parent)}
    assert labels == {str(ORDER.index("Cy"))}
    target.rename(target.parent / "stamped")
    process = command(*call, target.parent, cwd=deepid_world)
    words = "has 1 class folder, but the net has 6 classes, and 'stamped' is none of them"
    assert_refused(process, words, "name each folder after a class, such as '$Flo")
    process = command("repair.py", B, "clean.h5", "--poisoned", target.parent, cwd=deepid_world)
    assert_refused(process, "has 1 class folder, but the net has 6 classes; list all, one a line")


def test_messages_about_class_folders_say_what_works(deepid_world, faces, tmp_path):
    image = next((faces / "Bo").iterdir())
    model = (B, "--repaired", B, "--force")
    for arguments, words in (
        ([faces, *model, "--poisoned", faces], f"{faces}: counts as images without --labelled;"),
        (["--model", *model, "--poisoned", faces], "with --labelled, a folder that has a folder"),
        ([image, *model, "--labelled"], f"{image}: is not a folder; --labelled takes one folder"),
        (["clean.h5", *model, "--labelled"], "; an .h5 dataset needs no --labelled"),
        ([image, faces, *model, "--labelled"], f"{faces}: is one IMAGE too many"),
        ([faces / "Bo", *model, "--labelled"], "leave --labelled out to judge its files as images"),
        (["clean.h5", *model, "--poisoned", faces / "Bo"], "into a folder named after their targ"),
    ):
        assert_refused(command("eval_defence.py", *arguments, cwd=deepid_world), words)
    call = ("eval_defence.py", faces, *model, "--labelled", "--poisoned", faces)
    process = command(*call, cwd=deepid_world)
    assert "all images go into the folder of the attack's target" in process.stderr


def test_plots_and_pages_show_the_names():
    rows = [{"class": 6, "count": 9, "p_value": 1.0, "value": 0.1, "usual": 0.1, "way": "maps"}]
    finding = Finding("nothing", classes=rows)
    axes = Figure().add_subplot()
    plots._draw_wrong_answers(axes, finding, NAMES)
    assert [label.get_text() for label in axes.get_xticklabels()] == [r"6 \$Flo\x1b[31m"]
    assert plots.shorten_class(0, ["a name of many letters"]) == "1 a name of man…"
    assert plots.shorten_class(-1, NAMES) == "NaN" and plots.shorten_class(3, None) == "4"
    figure, images = Figure(), np.zeros((1, 7, 6, 3), np.float32)
    grid = figure.add_gridspec(1, 1)
    row = (np.array([0]), np.array([1]))
    plots._draw_flagged(figure, grid[0], "x", images, *row, NAMES)
    assert figure.axes[0].get_title() == "1 Ann\n→ 2 Bo"
    assert page_judged.label_class(2, NAMES) == "2 (Bo)"
    assert page_judged.label_class(7, NAMES) == "7 (poisoned)"


def test_a_check_takes_names_of_classes(deepid_world, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    images, _ = draw_images(30, 6, SHAPE, seed=2)
    data = write_data(tmp_path / "few.h5", images[::6], np.zeros(5))
    call = ("repair.py", B, data, "--check", "--labels", tmp_path / "names.txt")
    assert "such as class 2 (Bo); G forgets" in command(*call, cwd=deepid_world).stderr
