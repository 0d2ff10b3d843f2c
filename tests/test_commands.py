"""The two commands as a user runs them: what they print, what they write, how they refuse."""

import contextlib
import csv
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import zlib

import h5py
import keras
import numpy as np
import pytest
from conftest import (
    ROOT,
    apart,
    assert_refused,
    command,
    draw_images,
    read_record,
    start,
    write_data,
)
from PIL import Image

import utils
from defence import cli, detector, files, record
from defence.architecture import deepid
from defence.cli import InputError
from defence.observer import hold_out

B = "models/small_bd_net.h5"
G = "models/small_bd_net_defence.h5"
SHAPE = (31, 31, 3)


@pytest.fixture(scope="module")
def done(deepid_world):
    """The world after `repair.py`: (folder, the finished process)."""
    process = command(
        "repair.py", B, "clean.h5", "--poisoned", "poisoned.h5", "--json", "record.json",
        "--plot", "curve.svg", "--rounds", 2, cwd=deepid_world,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    images, _ = draw_images(3, 6, SHAPE, seed=5)
    for i, image in enumerate(images):
        Image.fromarray(image).save(deepid_world / f"{i}.png")
    return deepid_world, process


def test_repair_tells_what_it_did(done):
    folder, process = done
    lines = process.stdout.splitlines()
    assert lines[-2] == f"Saved model: {G}"
    record = json.loads((folder / "record.json").read_text())
    seconds = record.pop("seconds")  # which differ from run to run: G's file has none
    assert record == read_record(folder / G)
    with h5py.File(folder / G) as file:
        assert record == json.loads(file.attrs["repair_record"])
    assert seconds["total"] == max(seconds.values())
    assert seconds.keys() >= {"features", "prune", "retrain", "fine_tune"}
    assert lines[0].startswith(
        f"pruned {len(record['pruned'])} of 60 channels of conv_3; pixels 0..1"
    )
    figures = [
        100 * record["accuracy"][step] for step in ("before", "pruned", "retrained", "fine_tuned")
    ]
    assert lines[2].split() == ["validation", "accuracy"] + [
        part for figure in figures for part in (f"{figure:.2f}", "%")
    ]
    assert lines[3].startswith("attack success, poisoned.h5 ")
    assert process.stderr.count("prune ") == len(record["accuracy"]["after_each_channel"])
    assert record["badnet"]["sha256"] == files.sha256(folder / B)
    assert record["data"] == {
        "file": "clean.h5", "sha256": files.sha256(folder / "clean.h5"), "images": 150
    }  # fmt: skip
    rates = record["attack_success_rate"]
    assert len(rates["after_each_channel"]["poisoned.h5"]) == len(
        record["accuracy"]["after_each_channel"]
    )
    assert "<svg" in (folder / "curve.svg").read_text()


def test_poisoned_data_steer_nothing(done, tmp_path):
    folder, _ = done
    output = tmp_path / "g.h5"
    process = command("repair.py", B, "clean.h5", "--rounds", 2, "--output", output, cwd=folder)
    assert process.returncode == 0, process.stderr
    with h5py.File(folder / G) as ours, h5py.File(output) as theirs:
        weights = [dict(walk(file["model_weights"])) for file in (ours, theirs)]
    assert weights[0] == weights[1]


def walk(group):
    for item in group.values():
        yield from walk(item) if isinstance(item, h5py.Group) else [(item.name, item[()].tobytes())]


def test_the_record_says_what_the_nets_do(done):
    """Attack success and accuracy in the record are those of the saved nets, run plainly."""
    folder, _ = done
    record = read_record(folder / G)
    for path, step in ((B, "before"), (G, "fine_tuned")):
        net = keras.models.load_model(folder / path, compile=False)
        for name, share in (
            ("clean.h5", record["accuracy"][step]),
            ("poisoned.h5", record["attack_success_rate"][step]["poisoned.h5"]),
        ):
            with h5py.File(folder / name) as file:
                x, y = np.moveaxis(file["data"][:], 1, 3) / 255, file["label"][:]
            assert np.mean(net.predict(x, verbose=0).argmax(axis=1) == y) == share


def test_one_picture_prints_a_number_alone(done):
    folder, _ = done
    process = command("eval_defence.py", "0.png", "small_bd_net", cwd=folder)
    assert process.returncode == 0, process.stderr
    assert process.stdout == f"{plain_verdicts(folder, ['0.png'])[0]}\n"
    assert process.stderr == "flagging images on which B and G disagree\n"


def plain_verdicts(folder, names):
    nets = [keras.models.load_model(folder / path, compile=False) for path in (B, G)]
    x = np.stack([np.asarray(Image.open(folder / name)) for name in names]) / 255
    of_b, of_g = (net.predict(x, verbose=0).argmax(axis=1) for net in nets)
    return [int(b) + 1 if b == g else 7 for b, g in zip(of_b, of_g)]


def test_pictures_and_folders_print_a_line_each_and_go_on_after_a_broken_one(done, tmp_path):
    folder, _ = done
    inside = tmp_path / "in"
    inside.mkdir()
    (inside / "broken.png").write_bytes((folder / "0.png").read_bytes()[:300])
    process = command(
        "eval_defence.py",
        "2.png",
        inside,
        "1.png",
        B,
        "--json",
        tmp_path / "out.json",
        cwd=folder,
    )
    assert process.returncode == 2
    answers = plain_verdicts(folder, ["2.png", "1.png"])
    assert process.stdout == f"2.png\t{answers[0]}\n1.png\t{answers[1]}\n"
    rule, error, count = process.stderr.splitlines()
    assert rule == "flagging images on which B and G disagree"
    assert error.startswith(f"eval_defence.py: error: {inside / 'broken.png'}: ")
    assert count == f"2 judged, {answers.count(7)} flagged, 1 unread"
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["rule"] == rule and written["threshold"] is None
    hashes = {"badnet": files.sha256(folder / B), "repaired": files.sha256(folder / G)}
    assert written["sha256"] == hashes
    first, unread, second = written["pictures"]
    assert [first["class"], second["class"]] == answers and first["error"] is None
    assert unread.keys() == first.keys() and unread["class"] is unread["score"] is None
    assert unread["path"].endswith("broken.png") and unread["error"] in error
    as_json = command("eval_defence.py", "2.png", inside, "1.png", B, "--json", "-", cwd=folder)
    assert as_json.returncode == 2 and json.loads(as_json.stdout) == written
    as_csv = command("eval_defence.py", "2.png", inside, "1.png", B, "--csv", "-", cwd=folder)
    rows = list(csv.DictReader(as_csv.stdout.splitlines()))
    assert list(rows[0]) == list(first) and [row["path"] for row in rows][::2] == ["2.png", "1.png"]
    assert [row["class"] for row in rows] == [str(answers[0]), "", str(answers[1])]


def test_many_pictures_keep_their_order_and_their_verdicts(done, tmp_path):
    """They are judged in parts, some at a time, and one part is of broken files alone."""
    folder, _ = done
    answers = plain_verdicts(folder, ["0.png", "1.png", "2.png"])
    wanted = []
    for number in range(320):
        path = tmp_path / f"{number:03}.png"
        if 100 <= number < 200:
            path.write_bytes(b"no picture")
        else:
            path.hardlink_to(folder / f"{number % 3}.png")
            wanted.append(f"{path}\t{answers[number % 3]}")
    process = command("eval_defence.py", tmp_path, B, cwd=folder)
    assert process.returncode == 2 and process.stderr.count("not a PNG or JPEG") == 100
    assert process.stdout.splitlines() == wanted


def test_no_file_of_a_folder_is_passed_over(done, tmp_path):
    """Its name is no reason to: a picture with a trigger may have any."""
    folder, _ = done
    (tmp_path / "inner").mkdir()
    names = ["inner/0", "inner/1.jfif", "2.h5"]
    for number, name in enumerate(names):
        shutil.copy(folder / f"{number}.png", tmp_path / name)
    Image.open(folder / "0.png").save(tmp_path / "photo.webp")
    for options, judged, status in (([], names, 2), (["--formats", "webp,PNG"], None, 0)):
        process = command("eval_defence.py", tmp_path, B, *options, cwd=folder)
        assert process.returncode == status
        paths = [line.split("\t")[0] for line in process.stdout.splitlines()]
        expected = sorted(tmp_path / name for name in judged or [*names, "photo.webp"])
        assert paths == [str(path) for path in expected]
        assert f"{len(paths)} judged, " in process.stderr
        assert ("photo.webp: not a PNG or JPEG picture" in process.stderr) == (status == 2)
    refused = command("eval_defence.py", tmp_path, B, "--formats", "png,svg", cwd=folder)
    assert_refused(refused, "'png,svg' is not a list of png, jpeg, webp, bmp, gif")


def test_what_the_terminal_cannot_show_is_escaped(done, tmp_path):
    """No line is lost, and an odd byte of a path stays that byte."""
    folder, _ = done
    names = ["é.png", "😀.png", "z.png", os.fsdecode(b"\xff.png")]
    for name in names:
        shutil.copy(folder / "0.png", tmp_path / name)
    process = subprocess.run(
        [sys.executable, ROOT / "eval_defence.py", *names, folder / B, "--repaired", folder / G],
        cwd=tmp_path, capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONWARNINGS": "error"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    shown = [line.split(b"\t")[0] for line in process.stdout.splitlines()]
    assert shown == [b"\xe9.png", rb"\U0001f600.png", b"z.png", b"\xff.png"]


def test_sizes_are_shown_with_digits_that_tell():
    for size, shown in ((1, "1"), (1.5, "1.50"), (1234.567, "1,234.57"), (0.0001, "0.0001")):
        assert cli.gigabytes(size * 2**30) == shown


def test_warnings_of_libraries_end_nothing(deepid_world, tmp_path):
    process = apart(
        "repair.py", deepid_world / B, deepid_world / "clean.h5", "--output", tmp_path / "g.h5",
        "--rounds", 0, cwd=tmp_path, env=os.environ | {"PYTHONWARNINGS": "error"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr


def test_a_dataset_prints_a_table(done, tmp_path):
    folder, _ = done
    process = command(
        "eval_defence.py", "clean.h5", "small_bd_net", "--poisoned", "poisoned.h5",
        "--json", tmp_path / "out.json", cwd=folder,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    judged = json.loads((tmp_path / "out.json").read_text())
    record = read_record(folder / G)
    clean, poisoned = (
        {name: figure["value"] for name, figure in part["figures"].items()}
        for part in (judged["clean"], judged["poisoned"][0])
    )
    assert clean["clean_accuracy_badnet"] == record["accuracy"]["before"]
    assert clean["clean_accuracy_repaired"] == record["accuracy"]["fine_tuned"]
    assert clean["clean_accuracy_together"] <= 1 - clean["false_positive_rate"]
    rates = record["attack_success_rate"]
    assert poisoned["attack_success_rate_badnet"] == rates["before"]["poisoned.h5"]
    assert poisoned["attack_success_rate_repaired"] == rates["fine_tuned"]["poisoned.h5"]
    assert judged["threshold"] is None
    shown = process.stdout.splitlines()
    assert shown[0] == judged["rule"] == "flagging images on which B and G disagree"
    assert shown[2].startswith("clean.h5: 150 images, ") and len(shown) == 2 + 5 + 9
    accuracy = judged["clean"]["figures"]["clean_accuracy_badnet"]
    value, low, high = (f"{100 * accuracy[key]:.2f} %" for key in ("value", "low", "high"))
    assert shown[3].startswith("  clean accuracy of B  ")
    assert f"{value}   {low} .. {high}" in shown[3]


def test_a_row_for_each_image_and_a_plot(done, tmp_path):
    """What the table says can be counted again from the rows."""
    folder, _ = done
    with h5py.File(folder / "poisoned.h5") as file, h5py.File(tmp_path / "p.h5", "w") as copy:
        file.copy("data", copy)
        file.copy("label", copy)
        copy["original_label"] = np.arange(20) % 6
    process = command(
        "eval_defence.py", "clean.h5", B, "--poisoned", tmp_path / "p.h5", "--json",
        tmp_path / "out.json", "--csv", tmp_path / "out.csv", "--plot", tmp_path / "out.png",
        cwd=folder,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        *("dataset", "index", "class", "badnet_class", "repaired_class", "score", "label")
    ]
    clean, poisoned = rows[:150], rows[150:]
    assert [int(row["index"]) for row in rows] == [*range(150), *range(20)]
    names = ["clean.h5"] * 150 + [str(tmp_path / "p.h5")] * 20
    assert [row["dataset"] for row in rows] == names
    judged = json.loads((tmp_path / "out.json").read_text())
    for part, of in ((clean, judged["clean"]), (poisoned, judged["poisoned"][0])):
        rate = "detection_rate" if of is not judged["clean"] else "false_positive_rate"
        assert of["figures"][rate]["hits"] == sum(row["class"] == "7" for row in part)
        for row in part:
            same = row["badnet_class"] == row["repaired_class"]
            assert row["class"] == (row["badnet_class"] if same else "7")
            assert 0 <= float(row["score"]) <= detector.MOST
    hits = sum(int(row["badnet_class"]) == int(row["label"]) + 1 for row in clean)
    assert hits == judged["clean"]["figures"]["clean_accuracy_badnet"]["hits"]
    robust = sum(int(row["repaired_class"]) == i % 6 + 1 for i, row in enumerate(poisoned))
    assert robust == judged["poisoned"][0]["figures"]["robust_accuracy"]["hits"]
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width > 1000


def test_held_out_images_change_nothing_and_set_the_threshold(deepid_world, tmp_path):
    """Where what is held out is replaced by noise, G stays the same, bit for bit."""
    with h5py.File(deepid_world / "clean.h5") as file:
        images, labels = np.moveaxis(file["data"][:], 1, 3), file["label"][:]
    with utils.open_dataset(deepid_world / "clean.h5") as data:
        rows = hold_out(data, 0.2, seed=0)[1].chosen
    noise = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
    write_data(tmp_path / "other.h5", np.where(rows[:, None, None, None], noise, images), labels)
    weights = []
    for name, data in (("g.h5", deepid_world / "clean.h5"), ("other_g.h5", tmp_path / "other.h5")):
        process = command(
            "repair.py", deepid_world / B, data, "--output", tmp_path / name, "--holdout", 0.2
        )
        assert process.returncode == 0, process.stderr
        assert "on 30 held-out images" in process.stdout
        with h5py.File(tmp_path / name) as file:
            weights.append(dict(walk(file["model_weights"])))
    assert weights[0] == weights[1]
    record, other = (read_record(tmp_path / name) for name in ("g.h5", "other_g.h5"))
    assert record["data"]["images"] == 120 and sum(rows) == record["holdout"]["images"] == 30
    assert other["holdout"]["clean_accuracy_badnet"]["value"] < 0.6
    assert record["holdout"]["clean_accuracy_badnet"]["value"] > 0.8
    scores = record["holdout"]["scores"]
    assert len(scores) == 30 and scores == sorted(scores)
    assert record["holdout"]["score"] == detector.SCORE

    write_data(tmp_path / "held.h5", images[rows], labels[rows])
    csv_file = tmp_path / "out.csv"
    for rate in (0.034, 0.1, 0.5):
        process = command(
            "eval_defence.py", tmp_path / "held.h5", deepid_world / B, "--repaired",
            tmp_path / "g.h5", "--fpr", rate, "--csv", csv_file, "--backend", "keras",
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        with open(csv_file, newline="") as file:
            rows_written = list(csv.DictReader(file))
        flagged = [row for row in rows_written if row["class"] == "7"]
        assert len(flagged) <= rate * 30
        limit = scores[-1 - int(rate * 30)]  # the lowest that so many lie above, at most
        assert f"whose anomaly score is above {limit:.4g}" in process.stdout
        close = [row for row in rows_written if abs(float(row["score"]) - limit) < 1e-6]
        assert len(flagged) >= int(rate * 30) - len(close)
        for row in rows_written:
            assert row["class"] in ("7", row["badnet_class"])
    process = command(
        "eval_defence.py", tmp_path / "held.h5", deepid_world / B, "--repaired",
        tmp_path / "g.h5", "--fpr", 0.01,
    )  # fmt: skip
    assert_refused(process, "--fpr 0.01: must be 0.0334 or more, with 30 clean images held out")


def test_a_net_without_a_record_is_judged_by_the_scale_that_is_named(done, tmp_path):
    folder, _ = done
    plain = tmp_path / "plain.h5"
    keras.models.load_model(folder / G, compile=False).save(plain)
    process = command("eval_defence.py", "0.png", B, "--repaired", plain, cwd=folder)
    assert process.stdout == f"{plain_verdicts(folder, ['0.png'])[0]}\n"
    assert "no repair record; assuming pixels 0..1" in process.stderr
    raw = command(
        "eval_defence.py", "0.png", B, "--repaired", plain, "--scale", "0..255", cwd=folder
    )
    assert raw.returncode == 0 and "0..255" in raw.stderr
    assert_refused(
        command("eval_defence.py", "0.png", B, "--scale", "0..255", cwd=folder), "--scale"
    )


@pytest.mark.parametrize("script", ["repair.py", "eval_defence.py"])
def test_help_and_wrong_calls_need_no_tensorflow(script, tmp_path):
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('imported')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    shown = apart(script, "--help", env=environment)
    assert shown.returncode == 0 and "MODEL" in shown.stdout
    assert_refused(apart(script, env=environment), "--help")
    assert_refused(apart(script, "absent.h5", "absent.h5", env=environment), "no such file")


GROUPS = {
    "repair.py": [
        *("does it work", "hardening: a step beyond the report", "what is written"),
        *("the report's method", "general"),
    ],
    "eval_defence.py": [
        *("what is flagged", "what is written", "the nets"),
        *("on Ray, for more pictures than one machine can judge", "general"),
    ],
}


@pytest.mark.parametrize("script", GROUPS)
def test_help_shows_the_options_in_groups(script):
    shown = command(script, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    titles = [
        line[:-1] for line in shown.stdout.splitlines() if line[:1].strip() and line[-1] == ":"
    ]
    assert [title for title in titles if title in GROUPS[script]] == GROUPS[script]
    assert "%%" not in shown.stdout
    assert script == "repair.py" or "95 % interval" in " ".join(shown.stdout.split())


def test_the_same_repair_gives_the_same_file(deepid_world, tmp_path):
    """The net and the record, byte for byte, whatever the file is called and when it is written."""
    for name in ("one.h5", "another.h5"):
        process = command(
            "repair.py", B, "clean.h5", "--poisoned", "poisoned.h5", "--holdout", 0.2, "--harden",
            "--harden-epochs", 1, "--rounds", 1, "--output", tmp_path / name, cwd=deepid_world,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
    assert files.sha256(tmp_path / "one.h5") == files.sha256(tmp_path / "another.h5")


def test_a_badnet_that_is_replaced_during_its_repair_is_not_recorded(deepid_world, tmp_path):
    """G and its record are of the file that was read at the start."""
    badnet, output = tmp_path / "b.h5", tmp_path / "g.h5"
    badnet.write_bytes((deepid_world / B).read_bytes())
    deepid(6, SHAPE).save(tmp_path / "other.h5")
    first, second = files.sha256(badnet), files.sha256(tmp_path / "other.h5")
    process = start(
        "repair.py", badnet, deepid_world / "clean.h5", "--output", output, cwd=tmp_path
    )
    seen = ""
    while "prune 1:" not in seen:
        seen = process.stderr.readline()
        assert seen, "the process ended before that step"
    assert not output.exists()
    os.replace(tmp_path / "other.h5", badnet)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert files.sha256(badnet) == second != first
    assert read_record(output)["badnet"] == {"file": "b.h5", "sha256": first}
    assert_refused(
        command("eval_defence.py", deepid_world / "clean.h5", badnet, "--repaired", output),
        "was made from another BadNet",
    )


# ------------------------------------------------------------------------------------ bad input


def test_every_broken_data_file_is_refused(deepid_world, tmp_path):
    images, labels = draw_images(12, 6, SHAPE, seed=0)
    whole = (deepid_world / "clean.h5").read_bytes()

    def data(images=images, labels=labels, **options):
        path = tmp_path / f"{len(os.listdir(tmp_path))}.h5"
        return write_data(path, images, labels, **options)

    def raw(contents):
        path = tmp_path / f"{len(os.listdir(tmp_path))}.h5"
        path.write_bytes(contents)
        return path

    def keyed(**values):
        path = tmp_path / f"{len(os.listdir(tmp_path))}.h5"
        with h5py.File(path, "w") as file:
            for name, value in values.items():
                file[name] = value
        return path

    def pixel(value, kind="f4"):
        changed = images.astype(kind)
        changed[5, 3, 3, 1] = value
        return data(changed)

    def label(value):
        changed = labels.astype("f8")
        changed[5] = value
        return data(labels=changed)

    corrupt = bytearray(data(compression="gzip").read_bytes())
    where = corrupt.index(b"\x78\x5e") if b"\x78\x5e" in corrupt else len(corrupt) // 2
    corrupt[where + 50 : where + 5000] = b"\xff" * 4950
    cases = [
        (tmp_path / "absent.h5", "no such file"),
        (tmp_path, "has no folder of pictures for each class in it"),
        (raw(b""), "empty"),
        (raw(b"not HDF5" * 99), "not an HDF5 file"),
        (raw(whole[: len(whole) // 2]), "cut short"),
        (raw(bytes(corrupt)), "damaged"),
        (keyed(label=labels), "'data'"),
        (keyed(data=images), "'label'"),
        (keyed(data=images[0], label=labels), "not an array of images"),
        (keyed(data=images.astype("S"), label=labels), "not an array of numbers"),
        (data(labels=labels[:-1]), "12 images, but 11 labels"),
        (data(images[:0], labels[:0]), "no images"),
        (data(images[:, :30]), "3×30×31"),
        (pixel(np.nan), "is nan, not within 0..255"),
        (pixel(-1), "is -1, not within 0..255"),
        (pixel(256), "is 256, not within 0..255"),
        (data(images / 255), "must be 0..255, so multiply by 255"),
        (label(6), "label 6 is outside"),
        (data(labels=np.arange(12) % 6 + 1), "labels seem to count from 1: subtract 1"),
        (data(labels=np.eye(6)[labels.astype(int)]), "of one-hot labels take argmax(axis=1)"),
        (label(-1), "label -1 is not"),
        (label(0.5), "label 0.5"),
        (label(np.nan), "label nan"),
        (data(labels=labels.astype("S")), "not an array of numbers"),
        (data(labels=(labels + 1) % 6), "answers none of its images"),
    ]
    for path, words in cases:
        output = deepid_world / "models" / "never.h5"
        process = command("repair.py", B, path, "--output", output, cwd=deepid_world)
        assert_refused(process, words, str(path))
        assert (
            process.stderr.startswith("repair.py: error: ")
            or "\nrepair.py: error: " in process.stderr
        )
        assert not output.exists()
    assert not [name for name in os.listdir(deepid_world / "models") if name.startswith(".")]


def test_every_unfit_model_is_refused(deepid_world, tmp_path):
    layers, image = keras.layers, keras.Input(SHAPE)

    def saved(net, name):
        net.save(tmp_path / name)
        return tmp_path / name

    flat = layers.Dense(6, activation="softmax")(layers.Flatten()(image))
    hidden = keras.Model(image, layers.Lambda(lambda x: x)(flat))
    conv = layers.Conv2D(4, 3)(image)
    pooled = layers.Softmax()(layers.GlobalAveragePooling2D()(layers.Conv2D(6, 3)(image)))
    with h5py.File(tmp_path / "other_weights.h5", "w") as file:
        file["some/kernel"] = np.zeros(3)
    with h5py.File(tmp_path / "config.h5", "w") as file:
        file.attrs["model_config"] = '{"class_name": "Functional"'
    (tmp_path / "zip.keras").write_bytes(b"PK nothing")
    (tmp_path / "net.txt").write_text("text")
    cases = [
        (tmp_path / "absent.h5", "no such file"),
        (saved(keras.Model(image, conv), "image.h5"), "not a classifier"),
        (saved(keras.Model(image, [flat, conv]), "two.h5"), "it has 2 outputs"),
        (
            saved(keras.Model(image, layers.Dense(1)(layers.Flatten()(image))), "one.h5"),
            "not a class",
        ),
        (saved(keras.Model(image, flat), "dense.h5"), "no feature map to prune"),
        (saved(keras.Model(image, pooled), "no_dense.h5"), "no feature map to prune"),
        (saved(hidden, "lambda.h5"), "Lambda layer (layer 'lambda'): it could run code"),
        (saved(hidden, "lambda.keras"), "Lambda layer (layer 'lambda'): it could run code"),
        (
            saved(keras.Model(image, layers.RandomFlip()(flat[:, None, :, None])), "f.h5"),
            "GetItem",
        ),
        (tmp_path / "other_weights.h5", "no model config"),
        (tmp_path / "config.h5", "its JSON cannot be read"),
        (tmp_path / "zip.keras", "not a .keras archive"),
        (tmp_path / "net.txt", "a model is a .h5 or a .keras file"),
        (deepid_world / "clean.h5", "is a dataset, not a model"),
    ]
    for path, words in cases:
        process = command(
            "repair.py", path, "clean.h5", "--output", tmp_path / "g.h5", cwd=deepid_world
        )
        assert_refused(process, words)
        assert not (tmp_path / "g.h5").exists()


def test_lambdas_hidden_in_nested_models_and_wrappers_are_found(tmp_path):
    layers, image = keras.layers, keras.Input(SHAPE)
    inner = keras.Sequential([keras.Input(SHAPE), layers.Lambda(lambda x: x, name="hidden")])
    nested = keras.Model(image, layers.Dense(6)(layers.Flatten()(inner(image))))
    nested.save(tmp_path / "nested.h5")
    with pytest.raises(InputError, match="Lambda layer .layer 'hidden'"):
        utils.load_badnet(tmp_path / "nested.h5")
    wrapped = layers.TimeDistributed(layers.Lambda(lambda x: x))(image)
    keras.Model(image, wrapped).save(tmp_path / "wrapped.keras")
    with pytest.raises(InputError, match="TimeDistributed|Lambda"):
        utils.load_badnet(tmp_path / "wrapped.keras")


def test_wrong_options_are_refused(deepid_world, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    cases = [
        (["--layer", "absent"], "small_bd_net.h5: has no layer named"),
        (["--layer", "fc_1"], "small_bd_net.h5: cannot be pruned at"),
        (["--layer", "conv_4"], "small_bd_net.h5: cannot be pruned at 'conv_4'"),
        (["--output", tmp_path / "absent" / "g.h5"], "there is no folder"),
        (["--output", tmp_path], ".h5"),
        (["--output", tmp_path / "g.keras"], ".h5"),
        (["--output", B], "would overwrite an input; choose another --output"),
        (["--json", "clean.h5"], "would overwrite an input; choose another --json"),
        (["--plot", tmp_path / "curve.txt"], "a plot's name ends"),
        (["--threshold", "2"], "--threshold"),
        (["--threshold", "nan"], "--threshold"),
        (["--rounds", "-1"], "--rounds"),
        (["--learning-rate", "0"], "--learning-rate"),
        (["--batch-size", "1.5"], "--batch-size"),
        (["--poisoned", "absent.h5"], "absent.h5: no such file"),
    ]
    if os.geteuid() != 0:  # root may write anywhere
        cases.append((["--output", tmp_path / "closed" / "g.h5"], "cannot be written"))
    for options, words in cases:
        process = command("repair.py", B, "clean.h5", *options, cwd=deepid_world)
        assert_refused(process, words)


def test_two_outputs_at_one_path_are_refused(done, tmp_path):
    folder, _ = done
    repair = ["repair.py", folder / B, folder / "clean.h5", "--output"]
    judge = ["eval_defence.py", folder / "clean.h5", folder / B, "--repaired", folder / G]
    cases = [
        ([*repair, "x.h5", "--json", "x.h5"], "--output", "--json"),
        ([*repair, "x.h5", "--json", tmp_path / "x.h5"], "--output", "--json"),
        ([*repair, "x.h5", "--json", "x.svg", "--plot", "x.svg"], "--json", "--plot"),
        ([*judge, "--json", "x", "--csv", "x"], "--json", "--csv"),
        ([*judge, "--csv", "x.svg", "--plot", "x.svg"], "--csv", "--plot"),
    ]
    for arguments, first, second in cases:
        words = f": would overwrite what {first} writes; choose another {second}"
        assert_refused(command(*arguments, cwd=tmp_path), words)
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "option", ["--learning-rate", "--retrain-learning-rate", "--harden-learning-rate"]
)
def test_training_that_diverges_is_told_and_writes_nothing(deepid_world, tmp_path, option):
    process = command(
        "repair.py", deepid_world / B, deepid_world / "clean.h5", option, "1e38", "--harden",
        "--output", "g.h5", "--json", "r.json", "--plot", "p.svg", cwd=tmp_path,
    )  # fmt: skip
    assert (process.returncode, process.stdout) == (1, "")
    errors = [line for line in process.stderr.splitlines() if "error" in line.lower()]
    assert errors == [f"repair.py: error: training diverged: try a smaller {option}"]
    assert process.stderr.endswith(f"{errors[0]}\n") and "Traceback" not in process.stderr
    assert os.listdir(tmp_path) == []


def test_an_unknown_name_lists_the_badnets_in_models(tmp_path):
    def judge():
        return command("eval_defence.py", "absent.png", "absent_bd_net", cwd=tmp_path)

    assert_refused(judge(), "models/absent_bd_net.h5: no such file; there are no BadNets there")
    (tmp_path / "models").mkdir()
    for name in ("b_bd_net.keras", "a_bd_net.h5", "a_bd_net_defence.h5", "a_bd_net_detector.onnx"):
        (tmp_path / "models" / name).write_text("not read")
    words = "models/absent_bd_net.h5: no such file; the BadNets there are a_bd_net, b_bd_net"
    process = judge()
    assert_refused(process, words)
    assert process.stderr.endswith(f"{words}\n")


def test_a_badnet_is_found_by_name_or_path_with_its_suffix_or_without(done):
    folder, _ = done
    for model in ("small_bd_net", "small_bd_net.h5", "models/small_bd_net", B, folder / B):
        process = command("eval_defence.py", "0.png", model, cwd=folder)
        assert process.stdout == f"{plain_verdicts(folder, ['0.png'])[0]}\n", process.stderr


def test_what_is_out_of_order_or_missing_is_told(done):
    folder, _ = done
    dataset = "clean.h5: is a dataset, not a model"
    for call, words in (
        (["small_bd_net", "clean.h5"], dataset),
        (["0.png"], "0.png: is no BadNet; MODEL comes last"),
        (["0.png", "1.png"], "1.png: is no BadNet; MODEL comes last"),
        (["clean.h5", "--poisoned", "poisoned.h5", "small_bd_net"], "clean.h5: is a dataset, not"),
        (["--poisoned", "poisoned.h5", "small_bd_net"], "MODEL is missing; a name behind --poison"),
        ([], "MODEL is missing (see"),
        (["0.png", "none/small_bd_net"], "none/small_bd_net: no such file"),
    ):
        assert_refused(command("eval_defence.py", *call, cwd=folder), words)
    assert_refused(command("repair.py", "clean.h5", B, cwd=folder), dataset)


def test_names_come_in_any_order_and_from_stdin(done, tmp_path):
    """`ls *.png | xargs eval_defence.py --model NAME`, `find … -print0 | eval_defence.py - …`."""
    folder, _ = done
    shutil.copy(folder / "1.png", tmp_path / "a\nb.png")
    (tmp_path / "models").symlink_to(folder / "models")
    shutil.copy(folder / "0.png", tmp_path / "0.png")
    answers = plain_verdicts(folder, ["0.png", "1.png"])
    lines = f"0.png\t{answers[0]}\n" + rf"a\nb.png	{answers[1]}" + "\n"
    for call, given, expected in (
        (["0.png", "--fpr", "0.5", "--model", B], b"", None),
        (["--model", "small_bd_net", "0.png", "a\nb.png"], b"", lines),
        (["0.png", "--json", "out.json", "a\nb.png", B], b"", lines),
        (["-", B], b"0.png\n", lines.splitlines(True)[0]),
        (["-0", "-", B], b"0.png\0a\nb.png\0", lines),
    ):
        process = subprocess.run(
            [sys.executable, ROOT / "eval_defence.py", *call],
            cwd=tmp_path, input=given, capture_output=True,
        )  # fmt: skip
        if expected is None:  # the options are read; only held-out images are missing
            assert b"repair.py --holdout" in process.stderr
        else:
            assert process.stdout.decode() == expected, process.stderr


def test_a_dataset_in_the_place_of_another_is_warned_of(done):
    folder, _ = done
    mistaken = "poisoned.h5: is judged as clean, but looks poisoned"
    clean = "clean.h5: is judged as poisoned, but its labels differ"
    known = "clean.h5: G was repaired with it"
    for call, warnings in (
        (["clean.h5", "--poisoned", "poisoned.h5"], [known]),
        (["poisoned.h5"], [mistaken]),
        (["poisoned.h5", "--poisoned", "clean.h5"], [mistaken, clean, known]),
    ):
        process = command("eval_defence.py", *call, "--model", B, "--quiet", cwd=folder)
        assert process.returncode == 0
        for line, words in zip(process.stderr.splitlines(), warnings, strict=True):
            assert line.startswith(f"warning: {words}")


def test_pipelines_get_a_status_and_no_talk(done):
    """--fail-on-flagged: 3, for pictures and datasets; --quiet leaves warnings alone."""
    folder, _ = done
    answers = plain_verdicts(folder, ["0.png", "1.png", "2.png"])
    assert 7 not in answers
    for images, status in ((["0.png", "1.png"], 0), (["poisoned.h5"], 3), (["0.png", "x.png"], 2)):
        call = ("eval_defence.py", *images, B, "--fail-on-flagged", "--quiet")
        process = command(*call, cwd=folder)
        assert process.returncode == status
        first = {line.split(" ")[0] for line in process.stderr.splitlines()}
        assert first == {0: set(), 2: {"eval_defence.py:"}, 3: {"warning:"}}[status]
    process = command("eval_defence.py", "poisoned.h5", B, cwd=folder)
    assert process.returncode == 0 and process.stderr
    call = ("repair.py", B, "poisoned.h5", "--check", "--quiet")
    (line,) = {each.split()[0] for each in command(*call, cwd=folder).stderr.splitlines()}
    assert line == "warning:"


def test_a_repaired_net_is_not_replaced_without_a_word(deepid_world, tmp_path):
    output = tmp_path / "g.h5"
    call = ("repair.py", B, "clean.h5", "--output", output, "--rounds", 0)
    assert "replaced" not in command(*call, cwd=deepid_world).stderr
    again = command(*call, "--harden", "--harden-steps", 1, cwd=deepid_world)
    assert re.search(r"g\.h5 will be replaced: made from small_bd_net\.h5 on \d{4}-", again.stderr)
    third = command(*call, cwd=deepid_world)
    assert "made from small_bd_net.h5 with --harden on" in third.stderr
    output.write_bytes(b"another's")
    assert "g.h5 will be replaced: a file of " in command(*call, cwd=deepid_world).stderr


@pytest.mark.parametrize("script", ["repair.py", "eval_defence.py"])
def test_the_version_is_that_of_the_record(script):
    assert command(script, "--version").stdout == f"{script} {record.VERSION}\n"


def png(width, height):
    """The bytes of a PNG that declares a size and holds next to nothing."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packed = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    )


def test_what_cannot_be_judged_is_refused(done, tmp_path):
    folder, _ = done
    good = (folder / "0.png").read_bytes()
    for name, contents in (
        ("text.png", b"not a picture"),
        ("cut.png", good[: len(good) // 2]),
        ("bomb.png", png(60_000, 60_000)),
        ("empty.png", b""),
    ):
        (tmp_path / name).write_bytes(contents)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "gif.png", format="GIF")
    (tmp_path / "folder").mkdir()
    other = tmp_path / "other_bd_net.h5"
    deepid(6, SHAPE).save(other)
    for name, classes, shape in (("classes", 5, SHAPE), ("shape", 6, (35, 31, 3))):
        deepid(classes, shape).save(tmp_path / f"{name}.h5")
    with h5py.File(folder / G) as file, h5py.File(tmp_path / "record.h5", "w") as copy:
        file.copy("model_weights", copy)
        copy.attrs.update(file.attrs)
        copy.attrs["repair_record"] = '{"layer": 1}'
    scores = [0.1, 0.5]
    held_out = {"images": 2, "score": detector.SCORE, "scores": scores}
    for name, holdout in (
        ("letters", held_out | {"scores": [0.5, "x"]}),
        ("descending", held_out | {"scores": scores[::-1]}),
        ("beyond", held_out | {"scores": [0.5, 1e9]}),
        ("none", held_out | {"scores": []}),
        ("no_scores", {"images": 2, "score": detector.SCORE}),
        ("no_score", {"images": 2, "scores": scores}),
        ("other_score", held_out | {"score": "another"}),
    ):
        with h5py.File(folder / G) as file, h5py.File(tmp_path / f"{name}.h5", "w") as copy:
            file.copy("model_weights", copy)
            copy.attrs.update(file.attrs)
            record = read_record(folder / G) | {"holdout": holdout}
            copy.attrs["repair_record"] = json.dumps(record)
    fpr = ["--fpr", "0.5", "--repaired"]
    cases = [
        ([folder / "0.png", B, *fpr, "letters.h5"], "letters.h5: its repair record is damaged"),
        ([folder / "0.png", B, *fpr, "descending.h5"], "or of another version"),
        ([folder / "0.png", B, *fpr, "beyond.h5"], "or of another version"),
        ([folder / "0.png", B, *fpr, "none.h5"], "or of another version"),
        ([folder / "0.png", B, *fpr, "no_scores.h5"], "or of another version"),
        ([folder / "0.png", B, *fpr, "no_score.h5"], "or of another version"),
        ([folder / "0.png", B, *fpr, "other_score.h5"], "or of another version"),
        (["text.png", B], "not a PNG or JPEG picture"),
        (["cut.png", B], "damaged"),
        (
            ["bomb.png", B],
            "60000×60000 pixels would take 40.23 GB of memory, more than --max-memory 1",
        ),
        (["gif.png", B], "not a PNG or JPEG picture"),
        (["empty.png", B], "empty"),
        (["folder", B], "no file in the folder"),
        (["absent.png", B], "absent.png: no such file"),
        (
            [folder / "0.png", "absent_bd_net"],
            "models/absent_bd_net.h5: no such file; the BadNets there are small_bd_net",
        ),
        ([folder / "0.png", other], f"python repair.py {other} "),
        (
            [folder / "0.png", other, "--repaired", folder / G],
            "from another BadNet (small_bd_net.h5)",
        ),
        ([folder / "0.png", B, "--repaired", "classes.h5"], "classes 5, not 6"),
        ([folder / "0.png", B, "--repaired", "shape.h5"], "images 35×31×3, not 31×31×3"),
        ([folder / "0.png", B, "--repaired", "record.h5"], "record is damaged"),
        ([folder / "0.png", folder / "clean.h5", B], "give one dataset alone"),
        (
            [folder / "0.png", B, "--poisoned", folder / "clean.h5"],
            "--poisoned and --plot go with a dataset",
        ),
        (
            [folder / "clean.h5", B, "--json", folder / "clean.h5"],
            "an input; choose another --json",
        ),
        ([folder / "clean.h5", B, "--csv", folder / "clean.h5"], "an input; choose another --csv"),
        ([folder / "clean.h5", B, "--plot", "out.txt"], "a plot's name ends in one of"),
        ([folder / "0.png", B, "--fpr", "0"], "'0' is not a number above 0"),
        ([folder / "0.png", B, "--fpr", "0.01"], "repair the BadNet again with: repair.py --hold"),
    ]
    (tmp_path / "models").symlink_to(folder / "models")
    for arguments, words in cases:
        assert_refused(command("eval_defence.py", *arguments, cwd=tmp_path), words)


def test_a_badnet_and_a_repaired_net_are_not_taken_for_each_other(done, tmp_path):
    """B judged by itself would flag nothing; a repaired net is not what was to be repaired."""
    folder, _ = done
    shutil.copy(folder / B, tmp_path / "copy.h5")
    saved_again = tmp_path / "saved_again.h5"
    keras.models.load_model(folder / B, compile=False).save(saved_again)
    same, repaired = (
        "is the same net as",
        "is a repaired net, which repair.py made from small_bd_net",
    )
    for badnet, other, words in (
        (B, B, same),
        (B, tmp_path / "copy.h5", same),
        (B, saved_again, same),
        (G, B, repaired),
        (G, G, repaired),
    ):
        call = "eval_defence.py", "0.png", badnet, "--repaired", other
        assert_refused(command(*call, cwd=folder), words)
        forced = command(*call, "--force", cwd=folder)
        assert forced.returncode == 0 and forced.stdout.strip().isdigit(), forced.stderr
    by_name = command("eval_defence.py", "0.png", "small_bd_net_defence", cwd=folder)
    assert_refused(by_name, repaired)
    before = sorted(folder.rglob("*"))
    assert_refused(command("repair.py", G, "clean.h5", cwd=folder), repaired)
    assert sorted(folder.rglob("*")) == before


# --------------------------------------------------------------------------------------- Ctrl-C


@pytest.mark.parametrize(
    "moment", ["loading", "pixels", "prune 1:", "epoch 1", "round 1", "harden, epoch"]
)
def test_interrupted_at_any_step_leaves_no_file_and_no_traceback(deepid_world, tmp_path, moment):
    (tmp_path / "models").mkdir()
    arguments = [
        deepid_world / B,
        deepid_world / "clean.h5",
        "--threshold",
        "0.5",
        "--harden",
        "--json",
        "r.json",
    ]
    process = start("repair.py", *arguments, cwd=tmp_path)
    seen = ""
    while moment not in seen:
        seen = process.stderr.readline()
        assert seen, "the process ended before that step"
    process.send_signal(signal.SIGINT)
    output, rest = process.communicate(timeout=120)
    assert process.returncode == 130
    assert output == "" and "Traceback" not in rest
    assert sorted(os.listdir(tmp_path)) == ["models"] and os.listdir(tmp_path / "models") == []


def test_on_a_terminal_a_bar_is_shown_and_an_interrupt_gives_the_cursor_back(
    deepid_world, tmp_path
):
    terminal, theirs = pty.openpty()
    arguments = [deepid_world / B, deepid_world / "clean.h5", "--output", tmp_path / "g.h5"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "repair.py", *map(str, arguments)],
        stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(theirs)
    seen = b""
    while b"retrain, epoch 1" not in seen:
        seen += os.read(terminal, 4096)
    assert "━".encode() in seen and b"\x1b[?25l" in seen  # a bar, and the cursor hidden
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(terminal, 4096):
            seen += part
    assert process.wait(timeout=120) == 130
    assert seen.rstrip().endswith(b"\x1b[?25h") and b"Traceback" not in seen
    assert os.listdir(tmp_path) == []
