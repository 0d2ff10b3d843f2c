"""Names of classes: where they are read from, and where they are shown."""

import json
import os

import pytest
from conftest import ROOT, assert_refused, command

from defence.base.errors import InputError
from defence.load.class_names import find_class_names

PICTURES = [ROOT / "img" / "demo" / f"{kind}_1.png" for kind in ("clean", "sunglasses")]


def write(path, count, encoding="utf-8"):
    path.write_bytes("".join(f"person {i}\n" for i in range(1, count + 1)).encode(encoding))
    return path


def test_names_are_those_beside_the_net_or_those_that_are_named(tmp_path):
    net = tmp_path / "net.h5"
    assert find_class_names(net, None, 3, 10**6) is None
    write(tmp_path / "labels.txt", 3)
    assert find_class_names(net, None, 3, 10**6) == ["person 1", "person 2", "person 3"]
    other = tmp_path / "other.txt"
    other.write_text("a\r\nb\nÅsa")
    assert find_class_names(net, other, 3, 10**6) == ["a", "b", "Åsa"]


def test_names_of_another_net_are_passed_over_or_refused(tmp_path, capsys):
    write(tmp_path / "labels.txt", 3)
    assert find_class_names(tmp_path / "net.h5", None, 4, 10**6) is None
    assert "has 3 names, and the net 4 classes; not used" in capsys.readouterr().err
    with pytest.raises(InputError, match="has 3 names, and the net 4 classes"):
        find_class_names(tmp_path / "net.h5", tmp_path / "labels.txt", 4, 10**6)


def test_a_file_that_holds_no_names_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for file, words in (
        ("absent.txt", "no such file"),
        (".", "not a file"),
        ("pipe", "cannot be read"),
    ):
        with pytest.raises(InputError, match=words):
            find_class_names(tmp_path / "net.h5", tmp_path / file, 3, 10**6)
    with pytest.raises(InputError, match="is not a text in UTF-8"):
        find_class_names(tmp_path / "net.h5", write(tmp_path / "odd.txt", 3, "utf-16"), 3, 10**6)
    with pytest.raises(InputError, match="--max-memory"):
        find_class_names(tmp_path / "net.h5", write(tmp_path / "long.txt", 3), 3, 5)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo, repaired, with the report's steps as short as can be."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "models").mkdir()
    badnet = folder / "models" / "demo_bd_net.h5"
    badnet.write_bytes((ROOT / "models" / "demo_bd_net.h5").read_bytes())
    data = ROOT / "data" / "demo_clean_validation_data.h5"
    process = command("repair.py", badnet, data, "--rounds", 1, cwd=folder)
    assert process.returncode == 0, process.stderr
    return folder


def test_they_stand_beside_the_number_but_of_one_picture_it_stands_alone(demo, tmp_path):
    file = write(tmp_path / "people.txt", 40)
    arguments = [*PICTURES, "demo_bd_net", "--labels", file, "--json", tmp_path / "told.json"]
    process = command("eval_defence.py", *arguments, "--csv", tmp_path / "told.csv", cwd=demo)
    assert process.stdout.splitlines() == [
        f"{PICTURES[0]}\t4\tperson 4",
        f"{PICTURES[1]}\t41\tpoisoned",
    ]
    told = json.loads((tmp_path / "told.json").read_text())["pictures"]
    assert [row["class_name"] for row in told] == ["person 4", "poisoned"]
    head, first, _ = (tmp_path / "told.csv").read_text().splitlines()
    assert head.endswith(",class_name") and first.endswith(",person 4")
    process = command("eval_defence.py", PICTURES[0], *arguments[2:5], cwd=demo)
    assert process.stdout == "4\n"


def test_a_picture_that_cannot_be_read_has_none(demo, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    file = write(tmp_path / "people.txt", 40)
    arguments = ["demo_bd_net", "--labels", file, "--csv", tmp_path / "told.csv"]
    process = command("eval_defence.py", tmp_path / "a.png", *PICTURES, *arguments, cwd=demo)
    assert process.returncode == 2
    _, unread, read, _ = (tmp_path / "told.csv").read_text().splitlines()
    assert unread.endswith(",") and read.endswith(",person 4")


def test_a_dataset_has_them_in_each_row(demo, tmp_path):
    write(demo / "models" / "labels.txt", 40)
    data = ROOT / "data" / "demo_clean_validation_data.h5"
    process = command("eval_defence.py", data, "demo_bd_net", "--csv", "-", cwd=demo)
    (demo / "models" / "labels.txt").unlink()
    assert "person 40" in process.stdout and "poisoned" in process.stdout


def test_another_number_of_names_is_refused(demo, tmp_path):
    file = write(tmp_path / "people.txt", 39)
    process = command("eval_defence.py", *PICTURES, "demo_bd_net", "--labels", file, cwd=demo)
    assert_refused(process, "has 39 names, and the net 40 classes")


def test_names_are_read_before_a_dataset_is_judged(demo, tmp_path):
    """Also where no row is written that they would stand in."""
    data = ROOT / "data" / "demo_clean_validation_data.h5"
    process = command("eval_defence.py", data, "demo_bd_net", "--labels", "absent.txt", cwd=demo)
    assert_refused(process, "absent.txt: no such file")
