"""The two commands as a user runs them: their output and their files."""

import csv
import functools
import itertools
import json
import os
import shutil

import h5py
import keras
import numpy as np
from conftest import (
    SHAPE,
    B,
    G,
    assert_refused,
    command,
    compute_verdicts,
    read_record,
    start,
    write_data,
)
from PIL import Image

import utils
from defence.base import files, progress
from defence.judge import detector
from defence.load.architecture import build_deepid
from defence.load.datasets import hold_out


def test_repair_prints_and_records_its_steps(repaired_world):
    folder, process = repaired_world
    lines = process.stdout.splitlines()
    assert lines[-2] == f"Saved model: {G}"
    record = json.loads((folder / "record.json").read_text())
    seconds = record.pop("seconds")  # not in G's file: they differ from run to run
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
    assert record["badnet"]["sha256"] == files.hash_file(folder / B)
    assert record["data"] == {
        "file": "clean.h5", "sha256": files.hash_file(folder / "clean.h5"), "images": 150
    }  # fmt: skip
    rates = record["attack_success_rate"]
    assert len(rates["after_each_channel"]["poisoned.h5"]) == len(
        record["accuracy"]["after_each_channel"]
    )
    assert "<svg" in (folder / "curve.svg").read_text()


def test_poisoned_data_do_not_influence_the_repair(repaired_world, tmp_path):
    folder, _ = repaired_world
    output = tmp_path / "g.h5"
    process = command("repair.py", B, "clean.h5", "--rounds", 2, "--output", output, cwd=folder)
    assert process.returncode == 0, process.stderr
    with h5py.File(folder / G) as ours, h5py.File(output) as theirs:
        weights = [dict(list_arrays(file["model_weights"])) for file in (ours, theirs)]
    assert weights[0] == weights[1]


def list_arrays(group):
    for item in group.values():
        yield from (
            list_arrays(item) if isinstance(item, h5py.Group) else [(item.name, item[()].tobytes())]
        )


def test_the_record_agrees_with_the_nets(repaired_world):
    """Attack success and accuracy in the record equal those of the saved nets in plain Keras."""
    folder, _ = repaired_world
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


def test_one_image_prints_only_a_number(repaired_world):
    folder, _ = repaired_world
    process = command("eval_defence.py", "0.png", "small_bd_net", cwd=folder)
    assert process.returncode == 0, process.stderr
    assert process.stdout == f"{compute_verdicts(folder, ['0.png'])[0]}\n"
    assert process.stderr == "flagging images on which B and G disagree\n"


def test_images_and_folders_print_a_line_each_and_skip_a_broken_image(repaired_world, tmp_path):
    folder, _ = repaired_world
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
    answers = compute_verdicts(folder, ["2.png", "1.png"])
    assert process.stdout == f"2.png\t{answers[0]}\n1.png\t{answers[1]}\n"
    rule, error, count = process.stderr.splitlines()
    assert rule == "flagging images on which B and G disagree"
    assert error.startswith(f"eval_defence.py: error: {inside / 'broken.png'}: ")
    assert count == f"2 judged, {answers.count(7)} flagged, 1 unread"
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["rule"] == rule and results["threshold"] is None
    hashes = {"badnet": files.hash_file(folder / B), "repaired": files.hash_file(folder / G)}
    assert results["sha256"] == hashes
    first, unread, second = results["pictures"]
    assert [first["class"], second["class"]] == answers and first["error"] is None
    assert unread.keys() == first.keys() and unread["class"] is unread["score"] is None
    assert unread["path"].endswith("broken.png") and unread["error"] in error
    as_json = command("eval_defence.py", "2.png", inside, "1.png", B, "--json", "-", cwd=folder)
    assert as_json.returncode == 2 and json.loads(as_json.stdout) == results
    as_csv = command("eval_defence.py", "2.png", inside, "1.png", B, "--csv", "-", cwd=folder)
    rows = list(csv.DictReader(as_csv.stdout.splitlines()))
    assert list(rows[0]) == list(first) and [row["path"] for row in rows][::2] == ["2.png", "1.png"]
    assert [row["class"] for row in rows] == [str(answers[0]), "", str(answers[1])]


def test_many_images_keep_their_order_and_their_verdicts(repaired_world, tmp_path):
    """They are judged in parts, several at a time, and one part holds only broken files."""
    folder, _ = repaired_world
    answers = compute_verdicts(folder, ["0.png", "1.png", "2.png"])
    expected = []
    for number in range(320):
        path = tmp_path / f"{number:03}.png"
        if 100 <= number < 200:
            path.write_bytes(b"not an image")
        else:
            path.hardlink_to(folder / f"{number % 3}.png")
            expected.append(f"{path}\t{answers[number % 3]}")
    process = command("eval_defence.py", tmp_path, B, cwd=folder)
    assert process.returncode == 2 and process.stderr.count("not a PNG or JPEG") == 100
    assert process.stdout.splitlines() == expected


def test_a_folder_says_how_far_it_is_beside_the_verdicts(repaired_world, tmp_path, monkeypatch):
    folder, _ = repaired_world
    for number in range(120):
        shutil.copy(folder / "0.png", tmp_path / f"{number}.png")
    clock = functools.partial(next, itertools.count(0, 20))  # each look at it takes 20 seconds
    monkeypatch.setattr(progress, "track", functools.partial(progress.track, clock=clock))
    process = command("eval_defence.py", tmp_path, B, cwd=folder)
    assert len(process.stdout.splitlines()) == 120
    assert "\nbatches: 67 %, about " in process.stderr


def test_no_file_of_a_folder_is_passed_over(repaired_world, tmp_path):
    """Whatever its name: an image with a trigger may have any name."""
    folder, _ = repaired_world
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
        assert ("photo.webp: not a PNG or JPEG image" in process.stderr) == (status == 2)
    process = command("eval_defence.py", tmp_path, B, "--formats", "png,svg", cwd=folder)
    assert_refused(process, "'png,svg' is not a list of png, jpeg, webp, bmp, gif")


def test_a_dataset_prints_a_table(repaired_world, tmp_path):
    folder, _ = repaired_world
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
    lines = process.stdout.splitlines()
    assert lines[0] == judged["rule"] == "flagging images on which B and G disagree"
    assert lines[2].startswith("clean.h5: 150 images, ") and len(lines) == 2 + 5 + 9
    accuracy = judged["clean"]["figures"]["clean_accuracy_badnet"]
    value, low, high = (f"{100 * accuracy[key]:.2f} %" for key in ("value", "low", "high"))
    assert lines[3].startswith("  clean accuracy of B  ")
    assert f"{value}   {low} .. {high}" in lines[3]


def test_a_row_for_each_image_and_a_plot(repaired_world, tmp_path):
    """The counts of the table follow from the rows."""
    folder, _ = repaired_world
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
    for part, results, rate in (
        (clean, judged["clean"], "false_positive_rate"),
        (poisoned, judged["poisoned"][0], "detection_rate"),
    ):
        assert results["figures"][rate]["hits"] == sum(row["class"] == "7" for row in part)
        for row in part:
            same = row["badnet_class"] == row["repaired_class"]
            assert row["class"] == (row["badnet_class"] if same else "7")
            assert 0 <= float(row["score"]) <= detector.MAX_SCORE
    hits = sum(int(row["badnet_class"]) == int(row["label"]) + 1 for row in clean)
    assert hits == judged["clean"]["figures"]["clean_accuracy_badnet"]["hits"]
    robust = sum(int(row["repaired_class"]) == i % 6 + 1 for i, row in enumerate(poisoned))
    assert robust == judged["poisoned"][0]["figures"]["robust_accuracy"]["hits"]
    with Image.open(tmp_path / "out.png") as plot:
        assert plot.width > 1000


def test_held_out_images_change_nothing_and_set_the_threshold(deepid_world, tmp_path):
    """G stays the same, bit for bit, where noise replaces the held-out images."""
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
        assert "false-positive rate (B and G disagree) " in process.stdout
        assert "… expected with --fpr 0.0323 " in process.stdout
        assert "--fpr 0.01 needs 99 held-out images." in process.stdout
        with h5py.File(tmp_path / name) as file:
            weights.append(dict(list_arrays(file["model_weights"])))
    assert weights[0] == weights[1]
    record, noise_record = (read_record(tmp_path / name) for name in ("g.h5", "other_g.h5"))
    assert record["data"]["images"] == 120 and sum(rows) == record["holdout"]["images"] == 30
    assert noise_record["holdout"]["clean_accuracy_badnet"]["value"] < 0.6
    assert record["holdout"]["clean_accuracy_badnet"]["value"] > 0.8
    scores = record["holdout"]["scores"]
    assert len(scores) == 30 and scores == sorted(scores)
    assert record["holdout"]["score"] == detector.SCORE
    assert record["holdout"]["rule"] == "flagging images on which B and G disagree"
    assert record["holdout"]["expected_false_positive_rate"]["fpr"] == 0.0323

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
        above = int(rate * 31) - 1  # a new image is one more than they
        assert len(flagged) <= above
        limit = scores[-1 - above]
        assert f"whose anomaly score is above {limit:.4g}" in process.stdout
        close = [row for row in rows_written if abs(float(row["score"]) - limit) < 1e-6]
        assert len(flagged) >= above - len(close)
        for row in rows_written:
            assert row["class"] in ("7", row["badnet_class"])
    process = command(
        "eval_defence.py", tmp_path / "held.h5", deepid_world / B, "--repaired",
        tmp_path / "g.h5", "--fpr", 0.01,
    )  # fmt: skip
    assert_refused(
        process, "--fpr 0.01 needs 99 held-out clean images", "held out 30; give --fpr 0.0323"
    )


def test_a_net_without_a_record_is_judged_at_the_scale_of_the_option(repaired_world, tmp_path):
    folder, _ = repaired_world
    plain = tmp_path / "plain.h5"
    keras.models.load_model(folder / G, compile=False).save(plain)
    process = command("eval_defence.py", "0.png", B, "--repaired", plain, cwd=folder)
    assert process.stdout == f"{compute_verdicts(folder, ['0.png'])[0]}\n"
    assert "no repair record; assuming pixels 0..1" in process.stderr
    process = command(
        "eval_defence.py", "0.png", B, "--repaired", plain, "--scale", "0..255", cwd=folder
    )
    assert process.returncode == 0 and "0..255" in process.stderr
    assert_refused(
        command("eval_defence.py", "0.png", B, "--scale", "0..255", cwd=folder), "--scale"
    )


def test_the_same_repair_gives_the_same_file(deepid_world, tmp_path):
    """The net and the record are equal, byte for byte, whatever the file's name and date."""
    for name in ("one.h5", "another.h5"):
        process = command(
            "repair.py", B, "clean.h5", "--poisoned", "poisoned.h5", "--holdout", 0.2, "--harden",
            "--harden-epochs", 1, "--rounds", 1, "--output", tmp_path / name, cwd=deepid_world,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
    assert files.hash_file(tmp_path / "one.h5") == files.hash_file(tmp_path / "another.h5")


def test_a_badnet_that_is_replaced_during_its_repair_is_not_recorded(deepid_world, tmp_path):
    """G and its record belong to the file that was read at the start."""
    badnet, output = tmp_path / "b.h5", tmp_path / "g.h5"
    badnet.write_bytes((deepid_world / B).read_bytes())
    build_deepid(6, SHAPE).save(tmp_path / "other.h5")
    first, second = files.hash_file(badnet), files.hash_file(tmp_path / "other.h5")
    process = start(
        "repair.py", badnet, deepid_world / "clean.h5", "--output", output, cwd=tmp_path
    )
    line = ""
    while "prune 1:" not in line:
        line = process.stderr.readline()
        assert line, "the process ended before that step"
    assert not output.exists()
    os.replace(tmp_path / "other.h5", badnet)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert files.hash_file(badnet) == second != first
    assert read_record(output)["badnet"] == {"file": "b.h5", "sha256": first}
    assert_refused(
        command("eval_defence.py", deepid_world / "clean.h5", badnet, "--repaired", output),
        "was made from another BadNet",
    )
