"""Wrong or impossible calls are refused, and doubtful calls are warned of."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib

import h5py
import keras
import numpy as np
import pytest
from conftest import ROOT, SHAPE, B, G, assert_refused, command, compute_verdicts, read_record
from PIL import Image

from defence.judge import detector
from defence.load.architecture import build_deepid


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


def test_two_outputs_at_one_path_are_refused(repaired_world, tmp_path):
    folder, _ = repaired_world
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
        words = f": would overwrite the output of {first}; choose another {second}"
        assert_refused(command(*arguments, cwd=tmp_path), words)
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "option", ["--learning-rate", "--retrain-learning-rate", "--harden-learning-rate"]
)
def test_training_that_diverges_is_reported_and_writes_nothing(deepid_world, tmp_path, option):
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

    assert_refused(judge(), f"no such file; the folder {tmp_path}/models does not exist; give")
    (tmp_path / "models").mkdir()
    assert_refused(judge(), f"no such file; the folder {tmp_path}/models has no BadNets; give")
    for name in ("b_bd_net.keras", "a_bd_net.h5", "a_bd_net_defence.h5", "a_bd_net_detector.onnx"):
        (tmp_path / "models" / name).write_text("not read")
    words = "models/absent_bd_net.h5: no such file; models/ has the BadNets a_bd_net, b_bd_net"
    process = judge()
    assert_refused(process, words)
    assert process.stderr.endswith(f"{words}\n")


def test_a_badnet_is_found_by_name_or_path_with_its_suffix_or_without(repaired_world):
    folder, _ = repaired_world
    for model in ("small_bd_net", "small_bd_net.h5", "models/small_bd_net", B, folder / B):
        process = command("eval_defence.py", "0.png", model, cwd=folder)
        assert process.stdout == f"{compute_verdicts(folder, ['0.png'])[0]}\n", process.stderr


def test_arguments_out_of_order_or_missing_are_refused(repaired_world):
    folder, _ = repaired_world
    dataset = "clean.h5: is a dataset, not a model"
    for call, words in (
        (["small_bd_net", "clean.h5"], dataset),
        (["0.png"], "0.png: is not a BadNet; MODEL comes last"),
        (["0.png", "1.png"], "1.png: is not a BadNet; MODEL comes last"),
        (["clean.h5", "--poisoned", "poisoned.h5", "small_bd_net"], "clean.h5: is a dataset, not"),
        (["--poisoned", "poisoned.h5", "small_bd_net"], "MODEL is missing; a name after --poison"),
        ([], "MODEL is missing (see"),
        (["0.png", "none/small_bd_net"], "none/small_bd_net: no such file"),
    ):
        assert_refused(command("eval_defence.py", *call, cwd=folder), words)
    assert_refused(command("repair.py", "clean.h5", B, cwd=folder), dataset)


def test_names_come_in_any_order_and_from_stdin(repaired_world, tmp_path):
    """`ls *.png | xargs eval_defence.py --model NAME`, `find … -print0 | eval_defence.py - …`."""
    folder, _ = repaired_world
    shutil.copy(folder / "1.png", tmp_path / "a\nb.png")
    (tmp_path / "models").symlink_to(folder / "models")
    shutil.copy(folder / "0.png", tmp_path / "0.png")
    answers = compute_verdicts(folder, ["0.png", "1.png"])
    lines = f"0.png\t{answers[0]}\n" + rf"a\nb.png	{answers[1]}" + "\n"
    for call, stdin, expected in (
        (["0.png", "--fpr", "0.5", "--model", B], b"", None),
        (["--model", "small_bd_net", "0.png", "a\nb.png"], b"", lines),
        (["0.png", "--json", "out.json", "a\nb.png", B], b"", lines),
        (["-", B], b"0.png\n", lines.splitlines(True)[0]),
        (["-0", "-", B], b"0.png\0a\nb.png\0", lines),
    ):
        process = subprocess.run(
            [sys.executable, ROOT / "eval_defence.py", *call],
            cwd=tmp_path, input=stdin, capture_output=True,
        )  # fmt: skip
        if expected is None:  # the options are read; only held-out images are missing
            assert b"repair.py MODEL DATA --holdout" in process.stderr
        else:
            assert process.stdout.decode() == expected, process.stderr


def test_swapped_datasets_are_warned_of(repaired_world):
    folder, _ = repaired_world
    mistaken = "poisoned.h5: counts as clean, but looks poisoned"
    clean = "clean.h5: counts as poisoned, but its labels vary"
    reused = "clean.h5: G was repaired with this dataset"
    for call, warnings in (
        (["clean.h5", "--poisoned", "poisoned.h5"], [reused]),
        (["poisoned.h5"], [mistaken]),
        (["poisoned.h5", "--poisoned", "clean.h5"], [mistaken, clean, reused]),
    ):
        process = command("eval_defence.py", *call, "--model", B, "--quiet", cwd=folder)
        assert process.returncode == 0
        for line, words in zip(process.stderr.splitlines(), warnings, strict=True):
            assert line.startswith(f"warning: {words}")


def test_pipelines_get_a_status_and_no_messages(repaired_world):
    """--fail-on-flagged gives 3, for images and datasets; --quiet leaves only warnings."""
    folder, _ = repaired_world
    answers = compute_verdicts(folder, ["0.png", "1.png", "2.png"])
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
    (line,) = {text.split()[0] for text in command(*call, cwd=folder).stderr.splitlines()}
    assert line == "warning:"


@pytest.mark.slow
def test_replacing_a_repaired_net_is_announced(deepid_world, tmp_path):
    output = tmp_path / "g.h5"
    call = ("repair.py", B, "clean.h5", "--output", output, "--rounds", 0)
    assert "replaced" not in command(*call, cwd=deepid_world).stderr
    process = command(*call, "--harden", "--harden-steps", 1, cwd=deepid_world)
    assert re.search(
        r"g\.h5 will be replaced: made from small_bd_net\.h5 on \d{4}-", process.stderr
    )
    process = command(*call, cwd=deepid_world)
    assert "made from small_bd_net.h5 with --harden on" in process.stderr
    output.write_bytes(b"another's")
    assert "g.h5 will be replaced: written on " in command(*call, cwd=deepid_world).stderr


def make_png(width, height):
    """Return the bytes of a PNG that declares a size but holds almost no data."""

    def make_chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packed = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n"
        + make_chunk(b"IHDR", header)
        + make_chunk(b"IDAT", packed)
        + make_chunk(b"IEND", b"")
    )


def test_impossible_verdicts_are_refused(repaired_world, tmp_path):
    folder, _ = repaired_world
    good = (folder / "0.png").read_bytes()
    for name, contents in (
        ("text.png", b"not an image"),
        ("cut.png", good[: len(good) // 2]),
        ("bomb.png", make_png(60_000, 60_000)),
        ("empty.png", b""),
    ):
        (tmp_path / name).write_bytes(contents)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "gif.png", format="GIF")
    (tmp_path / "folder").mkdir()
    unrepaired = tmp_path / "other_bd_net.h5"
    build_deepid(6, SHAPE).save(unrepaired)
    for name, classes, shape in (("classes", 5, SHAPE), ("shape", 6, (35, 31, 3))):
        build_deepid(classes, shape).save(tmp_path / f"{name}.h5")
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
        ([folder / "0.png", B, *fpr, "descending.h5"], "its repair record is damaged"),
        ([folder / "0.png", B, *fpr, "beyond.h5"], "its repair record is damaged"),
        ([folder / "0.png", B, *fpr, "none.h5"], "its repair record is damaged"),
        ([folder / "0.png", B, *fpr, "no_scores.h5"], "its repair record is damaged"),
        ([folder / "0.png", B, *fpr, "no_score.h5"], "of another version of the anomaly score"),
        ([folder / "0.png", B, *fpr, "other_score.h5"], "of another version of the anomaly score"),
        (["text.png", B], "not a PNG or JPEG image"),
        (["cut.png", B], "damaged"),
        (
            ["bomb.png", B],
            "60000×60000 pixels would take 40.23 GB of memory, more than --max-memory 1",
        ),
        (["gif.png", B], "not a PNG or JPEG image"),
        (["empty.png", B], "empty"),
        (["folder", B], "no file in the folder"),
        (["absent.png", B], "absent.png: no such file"),
        (
            [folder / "0.png", "absent_bd_net"],
            "models/absent_bd_net.h5: no such file; models/ has the BadNets small_bd_net",
        ),
        ([folder / "0.png", unrepaired], f"python repair.py {unrepaired} "),
        (
            [folder / "0.png", unrepaired, "--repaired", folder / G],
            "from another BadNet (small_bd_net.h5)",
        ),
        ([folder / "0.png", B, "--repaired", "classes.h5"], "has 5 classes, not 6"),
        ([folder / "0.png", B, "--repaired", "shape.h5"], "images of 35×31×3, not 31×31×3"),
        ([folder / "0.png", B, "--repaired", "record.h5"], "record is damaged"),
        ([folder / "0.png", folder / "clean.h5", B], "give only one dataset"),
        (
            [folder / "0.png", B, "--poisoned", folder / "clean.h5"],
            "--poisoned and --plot go with a clean dataset as IMAGE: an .h5 file",
        ),
        (
            [folder / "clean.h5", B, "--json", folder / "clean.h5"],
            "an input; choose another --json",
        ),
        ([folder / "clean.h5", B, "--csv", folder / "clean.h5"], "an input; choose another --csv"),
        ([folder / "clean.h5", B, "--plot", "out.txt"], "a plot's name ends in one of"),
        ([folder / "0.png", B, "--fpr", "0"], "'0' is not a number above 0"),
        ([folder / "0.png", B, "--fpr", "0.01"], "again with: repair.py MODEL DATA --holdout 0.1"),
    ]
    (tmp_path / "models").symlink_to(folder / "models")
    for arguments, words in cases:
        assert_refused(command("eval_defence.py", *arguments, cwd=tmp_path), words)


def test_a_badnet_and_a_repaired_net_are_not_confused(repaired_world, tmp_path):
    """B judged by itself would flag nothing, and a repaired net needs no repair."""
    folder, _ = repaired_world
    shutil.copy(folder / B, tmp_path / "copy.h5")
    saved_again = tmp_path / "saved_again.h5"
    keras.models.load_model(folder / B, compile=False).save(saved_again)
    same, repaired = (
        "is the same net as",
        "is a repaired net, which repair.py made from small_bd_net",
    )
    for badnet, repaired_net, words in (
        (B, B, same),
        (B, tmp_path / "copy.h5", same),
        (B, saved_again, same),
        (G, B, repaired),
        (G, G, repaired),
    ):
        call = "eval_defence.py", "0.png", badnet, "--repaired", repaired_net
        assert_refused(command(*call, cwd=folder), words)
        process = command(*call, "--force", cwd=folder)
        assert process.returncode == 0 and process.stdout.strip().isdigit(), process.stderr
    by_name = command("eval_defence.py", "0.png", "small_bd_net_defence", cwd=folder)
    assert_refused(by_name, repaired)
    before = sorted(folder.rglob("*"))
    assert_refused(command("repair.py", G, "clean.h5", cwd=folder), repaired)
    assert sorted(folder.rglob("*")) == before
