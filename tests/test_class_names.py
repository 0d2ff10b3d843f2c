"""Names of classes: the files they are read from, and the outputs that show them."""

import json
import os

import pytest
from conftest import ROOT, assert_refused, command

from defence.base.errors import InputError
from defence.load.class_names import find_class_names

IMAGES = [ROOT / "img" / "demo" / f"{kind}_1.png" for kind in ("clean", "sunglasses")]


def write(path, count, encoding="utf-8"):
    path.write_bytes("".join(f"person {i}\n" for i in range(1, count + 1)).encode(encoding))
    return path


def test_names_come_from_beside_the_net_or_from_the_option(tmp_path):
    net = tmp_path / "net.h5"
    assert find_class_names(net, None, 3, 10**6) is None
    write(tmp_path / "labels.txt", 3)
    assert find_class_names(net, None, 3, 10**6) == ["person 1", "person 2", "person 3"]
    chosen = tmp_path / "other.txt"
    chosen.write_bytes("a\r\nb\rÅsa".encode())
    assert find_class_names(net, chosen, 3, 10**6) == ["a", "b", "Åsa"]


def test_names_of_another_net_are_ignored_or_refused(tmp_path, capsys):
    write(tmp_path / "labels.txt", 3)
    assert find_class_names(tmp_path / "net.h5", None, 4, 10**6) is None
    assert "has 3 names, but the net has 4 classes; not used" in capsys.readouterr().err
    assert find_class_names(tmp_path / "net.h5", None, 9, 10**6) is None  # of another net
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match="has 3 names, but the net has 4 classes"):
        find_class_names(tmp_path / "net.h5", tmp_path / "labels.txt", 4, 10**6)


def test_a_file_without_names_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for file, words in (
        ("absent.txt", "no such file"),
        (".", "not a file"),
        ("pipe", "cannot be read"),
    ):
        with pytest.raises(InputError, match=words):
            find_class_names(tmp_path / "net.h5", tmp_path / file, 3, 10**6)
    with pytest.raises(InputError, match="is not text in UTF-8"):
        find_class_names(tmp_path / "net.h5", write(tmp_path / "odd.txt", 3, "utf-16"), 3, 10**6)
    with pytest.raises(InputError, match="--max-memory"):
        find_class_names(tmp_path / "net.h5", write(tmp_path / "long.txt", 3), 3, 5)


def test_a_name_that_is_very_long_is_refused(tmp_path):
    file = tmp_path / "labels.txt"
    file.write_text("a\n" + "b" * 1_000 + "\nc\n")
    assert find_class_names(tmp_path / "net.h5", file, 3, 2**30) == ["a", "b" * 1_000, "c"]
    file.write_text("a\n" + "b" * 1_001 + "\nc\n")
    with pytest.raises(InputError, match="labels.txt: line 2 has more than 1,000 characters"):
        find_class_names(tmp_path / "net.h5", file, 3, 2**30)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Repair the demo as fast as possible. Return its folder."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "models").mkdir()
    badnet = folder / "models" / "demo_bd_net.h5"
    badnet.write_bytes((ROOT / "models" / "demo_bd_net.h5").read_bytes())
    data = ROOT / "data" / "demo_clean_validation_data.h5"
    process = command("repair.py", badnet, data, "--rounds", 1, cwd=folder)
    assert process.returncode == 0, process.stderr
    return folder


def test_names_stand_beside_the_number_except_for_a_single_image(demo, tmp_path):
    file = write(tmp_path / "people.txt", 40)
    arguments = [*IMAGES, "demo_bd_net", "--labels", file, "--json", tmp_path / "out.json"]
    process = command("eval_defence.py", *arguments, "--csv", tmp_path / "out.csv", cwd=demo)
    assert process.stdout.splitlines() == [
        f"{IMAGES[0]}\t4\tperson 4",
        f"{IMAGES[1]}\t41\tpoisoned",
    ]
    rows = json.loads((tmp_path / "out.json").read_text())["pictures"]
    assert [row["class_name"] for row in rows] == ["person 4", "poisoned"]
    header, first, _ = (tmp_path / "out.csv").read_text().splitlines()
    assert header.endswith(",class_name") and first.endswith(",person 4")
    process = command("eval_defence.py", IMAGES[0], *arguments[2:5], cwd=demo)
    assert process.stdout == "4\n"


def test_an_unreadable_image_has_no_name(demo, tmp_path):
    (tmp_path / "a.png").write_bytes(b"not an image")
    file = write(tmp_path / "people.txt", 40)
    arguments = ["demo_bd_net", "--labels", file, "--csv", tmp_path / "out.csv"]
    process = command("eval_defence.py", tmp_path / "a.png", *IMAGES, *arguments, cwd=demo)
    assert process.returncode == 2
    _, unread, first, _ = (tmp_path / "out.csv").read_text().splitlines()
    assert unread.endswith(",") and first.endswith(",person 4")


def test_a_dataset_has_names_in_each_row(demo, tmp_path):
    write(demo / "models" / "labels.txt", 40)
    data = ROOT / "data" / "demo_clean_validation_data.h5"
    process = command("eval_defence.py", data, "demo_bd_net", "--csv", "-", cwd=demo)
    (demo / "models" / "labels.txt").unlink()
    assert "person 40" in process.stdout and "poisoned" in process.stdout


def test_another_number_of_names_is_refused(demo, tmp_path):
    file = write(tmp_path / "people.txt", 39)
    process = command("eval_defence.py", *IMAGES, "demo_bd_net", "--labels", file, cwd=demo)
    assert_refused(process, "has 39 names, but the net has 40 classes")


def test_names_are_read_before_a_dataset_is_judged(demo, tmp_path):
    """They are read even where no row is written that would show them."""
    data = ROOT / "data" / "demo_clean_validation_data.h5"
    process = command("eval_defence.py", data, "demo_bd_net", "--labels", "absent.txt", cwd=demo)
    assert_refused(process, "absent.txt: no such file")


def test_a_mark_at_the_start_of_a_file_is_no_part_of_a_name(tmp_path):
    """Windows writes one."""
    path = write(tmp_path / "labels.txt", 2, "utf-8-sig")
    assert find_class_names(tmp_path / "net.h5", path, 2, 10**6) == ["person 1", "person 2"]


def test_a_file_that_nobody_named_does_not_stop_a_command(tmp_path, capsys):
    path = tmp_path / "labels.txt"
    path.write_bytes("Åsa\nB\n".encode("latin-1"))
    assert find_class_names(tmp_path / "net.h5", None, 2, 10**6) is None
    assert "labels.txt: is not text in UTF-8; not used" in capsys.readouterr().err
    with pytest.raises(InputError, match="is not text in UTF-8"):
        find_class_names(tmp_path / "net.h5", path, 2, 10**6)
