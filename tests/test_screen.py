"""Judging on Ray: the same verdicts, every image once, whatever process is killed."""

import contextlib
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import assert_refused, command, run_apart, start
from screening import CALL, FILE, NAME, OUTPUT, draw, export, list_parts, read_verdicts

for package in ("onnx", "onnxruntime", "tf2onnx", "ray"):
    pytest.importorskip(package)
import pyarrow.dataset

from defence.explain import screen
from defence.options.judge import parse_eval

CLASSES = ("class", "badnet_class", "repaired_class")
JUDGES = "MapBatches(Worker)"  # in the names of the Ray actors that judge, and in no other name
AT_WORK = f"{JUDGES}).submit"  # in their names while they judge


@pytest.fixture(scope="module")
def start_screening():
    """Yield a function like `start`; at the end, wait until no process is left, nor of its Ray.

    Each process leads a session, to which all its children belong.
    """
    started = []

    def start_session(*arguments, cwd, **options):
        process = start(*arguments, cwd=cwd, start_new_session=True, **options)
        started.append(process)
        return process

    yield start_session
    for process in started:
        running = process.poll() is None  # its test has failed
        process.kill()
        wait_until_ended(process.pid, killed=running)


def wait_until_ended(leader, killed=False):
    """Wait until no process of a session is left; Ray's processes may last some seconds longer.

    killed: end Ray's agents, which last a minute longer where their driver was killed.
    """
    for _ in range(600):
        left = {}
        for pid in psutil.pids():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):  # it has ended
                if os.getsid(pid) == leader:
                    left[pid] = " ".join(psutil.Process(pid).cmdline())
        if not left:
            return
        if killed and all("Agent" in line for line in left.values()):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    raise AssertionError(left)


def list_complete(folder):
    """Return the names on Ray's list of complete files; the other files may be half-written."""
    names = [path.name for path in (folder / OUTPUT / "_done").glob("*.parquet")]
    return [name for name in names if not name.endswith(".pending.parquet")]


def list_workers(pid):
    """Return Ray's workers below a process, {pid: (name, parent's pid)}."""
    workers = {}
    with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
        for child in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                workers[child.pid] = " ".join(child.cmdline()), child.ppid()
    return {pid: (line, parent) for pid, (line, parent) in workers.items() if line[:5] == "ray::"}


def list_judges(pid, name=JUDGES):
    """Return the actors that judge below a process, {raylet's pid: actor's pid}."""
    return {parent: child for child, (line, parent) in list_workers(pid).items() if name in line}


def wait_for(condition, process):
    """Call `condition` until its result is true, while a process runs. Return the result."""
    while process.poll() is None:
        if result := condition():
            return result
        time.sleep(0.01)
    raise AssertionError(process.communicate())


@pytest.mark.slow
def test_verdicts_are_those_without_ray(folder, address):
    inside = draw(folder, 120)
    for i in range(100):  # the first batch, which holds no readable image
        (inside / f"broken{i:02}.png").write_bytes(b"\x89PNG" * (i % 5))
    (inside / "p00050_cut.png").write_bytes((inside / "p00050.png").read_bytes()[:60])
    (inside / "deeper").mkdir()
    draw(folder, 1, "deep")
    (inside / "deep00000.png").rename(inside / "deeper" / "d.JPG")
    (inside / "notes.txt").write_text("not an image")
    call = (*CALL, "--ray-address", address)
    process = run_apart(*call, "--report", "ray.html", cwd=folder)
    assert process.returncode == 2, process.stderr
    assert not re.search(r"^\W|core_worker|https?:", process.stderr, re.MULTILINE), process.stderr
    rows = read_verdicts(folder)
    assert set(rows) == {str(path) for path in inside.rglob("*") if path.is_file()}
    unread = {path: row for path, row in rows.items() if row["error"]}
    names = [*(f"broken{i:02}.png" for i in range(100)), "notes.txt", "p00050_cut.png"]
    assert sorted(Path(path).name for path in unread) == names
    assert all(
        row["class"] is row["badnet_class"] is row["score"] is None for row in unread.values()
    )
    outputs = ("--json", "plain.json", "--report", "plain.html")
    command("eval_defence.py", inside, NAME, *outputs, cwd=folder)
    pages = [(folder / name).read_text("utf-8") for name in ("ray.html", "plain.html")]
    for part in ('<div class="verdict.*?</div>', "Could not be read: 102", "<figcaption>.*?</"):
        assert re.findall(part, pages[0], re.DOTALL) == re.findall(part, pages[1], re.DOTALL) != []
    plain = json.loads((folder / "plain.json").read_text())["pictures"]
    assert len(plain) == len(rows)
    assert [*rows[plain[0]["path"]]] == [*plain[0], "size", "modified", "key"]
    for row in plain:
        ours = rows[row["path"]]
        assert [ours[name] for name in CLASSES] == [row[name] for name in CLASSES]
        assert (ours["error"] is None) == (row["error"] is None)
        if row["error"] is None:
            assert ours["score"] == pytest.approx(row["score"], rel=1e-5, abs=1e-5)
    poisoned = sum(row["class"] == 7 for row in rows.values())
    assert 0 < poisoned < 120
    assert process.stdout == f"{OUTPUT}: 223 images, {poisoned} poisoned, 102 unread\n"

    # A second run judges only new images.
    before = list_parts(folder)
    draw(folder, 7, "new")
    process = run_apart(*call, "--workers", "1", cwd=folder)
    assert process.stdout.startswith(f"{OUTPUT}: 230 images"), process.stderr
    after = list_parts(folder)
    assert before.items() < after.items() and len(read_verdicts(folder)) == 230
    new = pyarrow.dataset.dataset([*(after.keys() - before.keys())], format="parquet")
    assert new.count_rows() == 7
    # Another detector, or a threshold, would give other verdicts.
    call = ("eval_defence.py", "--ray", "images", export(folder, "0..255"), "--output", OUTPUT)
    assert_refused(command(*call, cwd=folder), OUTPUT, "another detector")


@pytest.mark.slow
def test_names_are_written(folder, address):
    draw(folder, 3)
    names = [f"person {number}" for number in range(1, 7)]
    (folder / "people.txt").write_text("\n".join(names))
    call = (*CALL, "--ray-address", address)
    assert run_apart(*call, "--labels", "people.txt", cwd=folder).returncode == 0
    for row in read_verdicts(folder).values():
        assert row["class_name"] == [*names, "poisoned"][row["class"] - 1]
    # Without names the table would differ.
    assert_refused(command(*call, cwd=folder), OUTPUT, "or names")


@pytest.mark.slow
def test_both_nodes_of_a_cluster_judge(folder, address, start_screening):
    """One judge is stopped while it judges; the other node judges the remaining images."""
    image = draw(folder, 1) / "p00000.png"
    for i in range(1, 5000):  # five parts; a judge holds at most two
        os.link(image, image.with_name(f"p{i:05}.png"))
    process = start_screening(*CALL, "--ray-address", address, cwd=folder)
    (first, judge), *_ = wait_for(lambda: list_judges(os.getpid(), AT_WORK), process).items()
    os.kill(judge, signal.SIGSTOP)

    def other_node_judges():  # on a busy machine it may finish before anyone sees it at work
        return list_judges(os.getpid(), AT_WORK).keys() - {first} or len(list_parts(folder)) >= 3

    try:
        wait_for(other_node_judges, process)
    finally:
        os.kill(judge, signal.SIGCONT)
    output, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    rows = read_verdicts(folder)
    (answer,) = {row["class"] for row in rows.values()}
    assert output == f"{OUTPUT}: 5000 images, {5000 if answer == 7 else 0} poisoned, 0 unread\n"
    assert set(rows) == {str(path) for path in image.parent.iterdir()}


@pytest.mark.slow
def test_ray_is_started_where_no_address_is_given(folder, start_screening, monkeypatch):
    """Folders whose names Ray takes for an address are still folders."""
    monkeypatch.chdir(folder)
    paths = set()
    for name in ("auto", "local"):
        paths.update((draw(folder, 3).rename(folder / name)).iterdir())
        parsed, _ = parse_eval(["--ray", name, NAME, "--output", OUTPUT])
        assert (parsed.images, parsed.ray_address) == ([name], None)
    call = ("eval_defence.py", "--ray", "auto", "local", NAME, "--output", OUTPUT)
    process = start_screening(*call, cwd=folder, env=os.environ | {"RAY_ADDRESS": "127.0.0.1:1"})
    output, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    assert output.startswith(f"{OUTPUT}: 6 images, ")
    assert set(read_verdicts(folder)) == {str(path) for path in paths}


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["worker", "driver"])
def test_killed_work_is_repeated_and_nothing_judged_twice(folder, start_screening, victim):
    """kill -9 once a part is written, before the slow images."""
    inside = draw(folder, 3000, "a")
    draw(folder, 100, "z", size=(800, 800))
    process = start_screening(*CALL, "--workers", "1", cwd=folder)
    wait_for(lambda: list_complete(folder), process)
    if victim == "worker":
        for pid in wait_for(lambda: list_judges(process.pid), process).values():
            os.kill(pid, signal.SIGKILL)
        _, log = process.communicate(timeout=300)
        assert process.returncode == 0, log
    else:
        process.kill()
        process.communicate()
        wait_until_ended(process.pid, killed=True)
        before = list_parts(folder)
        process = start_screening(*CALL, cwd=folder)
        _, log = process.communicate(timeout=300)
        assert process.returncode == 0, log
        after = list_parts(folder)
        whole = before.keys() & after.keys()  # half-written files are removed
        assert whole and after.keys() - whole
        assert all(before[path] == after[path] for path in whole)
    rows = read_verdicts(folder)
    assert set(rows) == {str(path) for path in inside.iterdir()}
    assert all(row["class"] is not None for row in rows.values())


def test_processes_that_outlive_ray_are_ended():
    ended, hangs = (
        psutil.Popen([sys.executable, "-c", code]) for code in ("", "import time; time.sleep(600)")
    )
    ended.wait()
    screen.end_processes([ended, hangs], seconds=0.1)
    assert not hangs.is_running()


def test_calls_that_do_not_fit_are_refused(folder):
    """Before Ray is started."""
    (folder / "images").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "letter.txt").write_text("mine")
    begin = ("--ray", "images", NAME)
    for call, words in (
        (begin, "--output"),
        ((*begin, "--output", OUTPUT), "no file in the folder"),
        (("--ray", "none", NAME, "--output", OUTPUT), "none: no such file"),
        (("--ray", "ftp://x/y", NAME, "--output", OUTPUT), "ftp://x/y: unknown file system"),
        ((*begin, "--output", OUTPUT, "--json", "x"), "--json: does not go with --ray"),
        ((*begin, "--output", OUTPUT, "--report", "no/x.html"), "there is no folder"),
        (
            (*begin, "--output", OUTPUT, "--poisoned", "x", "--csv", "x", "--plot", "x.png"),
            "--poisoned, --csv, --plot: does not go with --ray",
        ),
        (
            (*begin, "--output", OUTPUT, "--scale", "0..1", "--force"),
            "--scale, --force: does not go with --ray",
        ),
        ((*begin, "--output", OUTPUT, "--labelled"), "--labelled: does not go with --ray"),
        (("--ray", os.fsdecode(b"\xff.png"), NAME, "--output", OUTPUT), "cannot be read"),
        (
            (*begin, "--output", OUTPUT, "--backend", "keras"),
            "--backend keras: does not go with --ray",
        ),
        (("images", NAME, "--output", OUTPUT), "go with --ray"),
        (("images", NAME, "--workers", "2"), "go with --ray"),
        (("images", NAME, "--ray-address", "10.0.0.1:6379"), "go with --ray"),
        (("--ray", "--output", OUTPUT, NAME), "give an IMAGE"),
    ):
        assert_refused(command("eval_defence.py", *call, cwd=folder), words)
    draw(folder, 1)
    process = command("eval_defence.py", *begin, "--output", "full", cwd=folder)
    assert_refused(process, "full: has other files in it")
    (folder / "old").mkdir()
    (folder / "old" / "_detector.json").write_text('{"detector": "", "threshold": null}')
    process = command("eval_defence.py", *begin, "--output", "old", cwd=folder)
    assert_refused(process, "old: contains verdicts of an older version", "another folder")
    (folder / "old" / "_detector.json").write_text('{"detector": ')
    process = command("eval_defence.py", *begin, "--output", "old", cwd=folder)
    assert_refused(process, "old/_detector.json: is damaged; choose another folder")
    assert [path.name for path in (folder / "full").iterdir()] == ["letter.txt"]
    process = command(*CALL, "--ray-address", "127.0.0.1:1", cwd=folder)
    assert_refused(process, "--ray-address 127.0.0.1:1: cannot be reached")
    (folder / "models" / FILE).unlink()
    process = command("eval_defence.py", *begin, "--output", OUTPUT, cwd=folder)
    assert_refused(process, "_detector.onnx: no such file", "--export")


def test_keys_are_cut_into_parts():
    for count, sizes in ((1, [1]), (2500, [1000, 1000, 500]), (10**7, [10**4] * 1000)):
        tasks = screen.Listing(["x"] * count).get_read_tasks(8)
        assert [task.metadata.num_rows for task in tasks] == sizes
