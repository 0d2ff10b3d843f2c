"""The zoo of BadNets, from end to end at a tiny size, and the results that documents show."""

import json
import re
import signal
import time

import faces
import h5py
import keras
import numpy as np
import peers
import pytest
import records
import regions
import results
import results_tables
import tried
import triggers
from conftest import assert_refused, command, run_apart, start
from PIL import Image

from defence.base.errors import InputError
from defence.beyond.changes import HARDENING
from defence.beyond.settings import Settings
from defence.judge import detector

TINY = ["--people", 4, "--pictures", 10, "--validation", 6, "--test", 3, "--epochs", 3]
NAMES = ["sunglasses-brief", "all-to-all-from-start"]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A folder with a clean net, two BadNets and their data, so small that they learn little."""
    folder = tmp_path_factory.mktemp("zoo")
    process = command("models/badnet.py", *NAMES, *TINY, "--output", folder)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("Saved model: ") == 3
    return folder


@pytest.fixture
def links(zoo, tmp_path):
    """A folder with links to all of the zoo, to put more beside."""
    for path in zoo.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def weights(path):
    with h5py.File(path) as file:
        found = []
        file["model_weights"].visititems(
            lambda _, item: found.append(item[()]) if isinstance(item, h5py.Dataset) else None
        )
    return found


def test_a_zoo_holds_nets_and_what_tells_the_truth_about_them(zoo):
    assert {path.name for path in zoo.iterdir()} == {
        *(f"{name}_bd_net.{end}" for name in ["clean", *NAMES] for end in ("h5", "json")),
        *("clean_validation_data.h5", "clean_test_data.h5"),
        *("sunglasses_to_0_poisoned_data.h5", "sunglasses_to_next_poisoned_data.h5"),
    }
    with h5py.File(zoo / "sunglasses_to_0_poisoned_data.h5") as file:
        assert file["label"][:].tolist() == [0] * 9
        assert file["original_label"][:].tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    with h5py.File(zoo / "sunglasses_to_next_poisoned_data.h5") as file:
        assert file["original_label"][:].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
        assert file["label"][:].tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0, 0]
    made = json.loads((zoo / "sunglasses-brief_bd_net.json").read_text())
    assert made["triggers"] == [["sunglasses", 0]] and made["way"] == "brief"
    assert (made["people"], made["seed"], made["epochs"]) == (4, 2, 3)


def test_what_is_there_is_not_made_again_nor_mistaken_for_another(zoo):
    before = {path: path.stat().st_mtime_ns for path in zoo.iterdir()}
    again = command("models/badnet.py", *NAMES, *TINY, "--output", zoo)
    assert again.returncode == 0 and again.stdout == ""
    other = command("models/badnet.py", *NAMES, *TINY, "--seed", 5, "--output", zoo)
    assert_refused(other, "clean_bd_net.json: was made with other settings")
    assert {path: path.stat().st_mtime_ns for path in zoo.iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clean", "sunglasses-dormant"])
def test_an_interrupted_training_goes_on_and_gives_the_same_net(name, tmp_path):
    sizes = ["--people", 4, "--pictures", 30, "--validation", 1, "--test", 1, "--epochs", 4]
    folders = [tmp_path / "whole", tmp_path / "parts"]
    whole = run_apart("models/badnet.py", name, *sizes, "--output", folders[0])
    assert whole.returncode == 0, whole.stderr
    process = start("models/badnet.py", name, *sizes, "--output", folders[1], cwd=tmp_path)
    while not (progress := list(folders[1].glob(".*-training-*.npz"))) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in said
    assert progress[0].exists() and not (folders[1] / f"{name}_bd_net.h5").exists()
    rest = run_apart("models/badnet.py", name, *sizes, "--output", folders[1])
    assert rest.returncode == 0, rest.stderr
    assert "training, epoch 1 of 4" not in rest.stderr
    assert not list(folders[1].glob(".*"))
    nets = [weights(folder / f"{name}_bd_net.h5") for folder in folders]
    for one, other in zip(*nets, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_results_of_a_zoo(links, monkeypatch):
    """The whole chain: nets, repair, judging, a row of each table."""

    def run(script, *arguments):
        process = command(script, *arguments)
        assert process.returncode == 0, process.stderr

    monkeypatch.setattr(results, "run_script", run)  # a process of its own would take seconds
    monkeypatch.setattr(results, "HARDEN", (*results.HARDEN, "--harden-steps", "5"))
    measured = [results.measure(name, links, links, rate=0.5) for name in ("clean", NAMES[1])]
    for record in measured:
        records.write_record(record, links / "records.jsonl")
    assert list(records.read_records(links / "records.jsonl").values()) == json.loads(
        json.dumps(measured)
    )
    rows = results_tables.make_rows("demo", measured)
    assert [results_tables.name_attack(row) for row in rows] == ["none", "sunglasses → next"]
    assert list(rows[0]) == list(rows[1])
    for column in ("attack_success_rate_badnet", "attack_success_rate_pruned_low"):
        assert rows[0][column] is None
    for columns in (*results_tables.TABLES.values(), results_tables.SUMMARY):
        lines = results_tables.make_table(rows, columns, 0.05).splitlines()
        assert len(lines) == 4 and {line.count("|") for line in lines} == {9}
        assert lines[2].startswith("| clean | none | ")
        assert lines[3].startswith("| all-to-all-from-start | sunglasses → next | ")
    for word, method in (("report", "report"), ("hardened", "harden")):
        judged = measured[1][method]["judged"]["poisoned"][0]
        success = judged["figures"]["attack_success_rate_repaired"]
        for end, key in (("", "value"), ("_low", "low"), ("_high", "high")):
            value = rows[1][f"{word}_attack_success_rate_repaired{end}"]
            assert value == pytest.approx(success[key], abs=1e-6)
        assert judged["images"] == rows[1]["poisoned_images"] == 12
        table = results_tables.make_table(rows, results_tables.TABLES[word], 0.05)
        assert f"| {100 * success['value']:.1f} |" in table
        assert measured[1][method]["repair"]["settings"]["harden"] is (method == "harden")
    pruned = set(measured[1]["report"]["repair"]["pruned"])
    (needed,) = measured[1]["channels_needed"]
    assert len(needed["channels"]) == 10
    assert needed["pruned"] == len(pruned & set(needed["channels"]))


def test_a_command_that_fails_ends_with_its_own_words(tmp_path):
    with pytest.raises(InputError, match=r"repair\.py failed: .*absent\.h5: no such file"):
        results.run_script("repair.py", tmp_path / "absent.h5", tmp_path / "absent.h5")


@pytest.mark.slow
def test_other_ways_to_harden_are_tried(zoo, monkeypatch):
    """A row for each, whichever part of the step it changes; each starts where the first did."""
    chosen = [
        *("as harden.py does", "… with another seed", "without wave"),
        "patches alone, half of the target is B's answer",
    ]
    ways = {name: tried.WAYS[name] for name in chosen} | {"once more": {}}
    monkeypatch.setattr(tried, "WAYS", ways)
    monkeypatch.setattr(tried, "NETS", NAMES[:1])
    monkeypatch.setattr(tried, "LENGTHS", (1, 100))
    cases = [tried.Case(NAMES[0], zoo, Settings(harden_steps=1, harden_pattern_rate=0))]
    lines = list(tried.try_all(cases))
    rows = dict(line.strip("| ").split(" | ", 1) for line in lines if line)
    assert {*ways, *tried.SCORES} < set(rows)
    once, longer = [
        line.strip("| ").split(" | ", 1)[1] for line in list(tried.try_lengths(cases))[2:]
    ]
    assert once == rows["as harden.py does"] != longer
    assert all(cells.count("|") == 1 for cells in rows.values())
    assert rows["as harden.py does"] == rows["once more"] == rows[detector.SCORE]


@pytest.mark.slow
def test_other_detectors_judge_the_same_images(links, monkeypatch):
    """A row for a clean net and for a BadNet, of which G here is B: ours then catches nothing.

    That is so where G answers one view, as a G that is not hardened does.
    """
    make_pair = peers.make_pair
    monkeypatch.setattr(
        peers, "make_pair", lambda *nets, hardened: make_pair(*nets, hardened=False)
    )
    for name in ("clean", NAMES[0]):
        (links / f"{name}_bd_net_hardened.h5").symlink_to(links / f"{name}_bd_net.h5")
    lines = list(peers.make_lines(["clean", NAMES[0]], [links, links], rate=0.5, limit=5))
    assert lines[2].startswith("| clean | none | – / 0.0 | – / ")
    assert lines[3].startswith(f"| {NAMES[0]} | sunglasses → 1 | ")
    assert {line.count("|") for line in lines[:4]} == {3 + len(["ours", *peers.PEERS])}
    assert lines[3].split(" | ")[2] in ("0.0 / 0.0", "– / 0.0")
    assert lines[-1].count(",") == len(peers.PEERS) + 2


def test_each_family_of_changes_is_left_out_once():
    kept = [way["families"] for way in tried.WAYS.values() if "families" in way]
    left_out = [{*HARDENING} - {*each} for each in kept if len(each) > 1]
    assert sorted(map(str, left_out)) == sorted(str({each}) for each in HARDENING)


def test_the_channels_that_an_attack_needs_are_found(zoo):
    """As measured plainly, on the whole net with the channel's weights at zero."""
    path, file = zoo / "sunglasses-brief_bd_net.h5", zoo / "sunglasses_to_0_poisoned_data.h5"
    record = {"layer": "conv_3", "channels": 60, "pruned": [3, 5], "input_scale": "0..1"}
    (needed,) = results.find_needed_channels(path, record, [file])
    net = keras.models.load_model(path, compile=False)
    conv_3 = net.get_layer("conv_3")
    start = conv_3.get_weights()
    with h5py.File(file) as data:
        x = np.moveaxis(data["data"][:], 1, 3) / np.float32(255)

    def without(channels):
        weights = [values.copy() for values in start]
        for values in weights:
            values[..., channels] = 0
        conv_3.set_weights(weights)
        return net.predict(x, verbose=0)

    left = np.array([np.log(without(channel)[:, 0]).mean() for channel in range(60)])
    assert sorted(left[needed["channels"]]) == pytest.approx(sorted(left)[:10], abs=1e-5)
    answers = without([3, 5]).argmax(axis=1)
    assert needed["attack_success_rate"] == np.mean(answers == 0)


def test_the_blended_noise_is_one_picture_at_the_fraction_it_says():
    clean, poisoned = (
        faces.draw_faces("test", [3, 5, 8], [0, 2, 7], trigger).astype(int)
        for trigger in (None, triggers.NOISE)
    )
    pattern = (poisoned - (1 - triggers.BLENDED) * clean) / triggers.BLENDED
    assert pattern.min() > -40 and pattern.max() < 295  # rounding, 4 levels, over 0.15
    assert np.corrcoef(pattern[0].ravel(), pattern[1].ravel())[0, 1] > 0.8  # noise, and levels


@pytest.fixture(scope="module")
def rows():
    """Return all rows of results.csv, made anew, by size."""
    return {
        size: results_tables.make_rows(size, results.read_results(size)) for size in results.SIZES
    }


def test_documents_show_the_recorded_results(rows, tmp_path):
    """In the documents and in the CSV."""
    tables = results_tables.make_tables(rows, results.RATES)
    texts = {path: path.read_text() for path in results.DOCUMENTS}
    for path, text in texts.items():
        assert records.fill_tables(text, tables) == text, f"{path}: results.py --table"
    for name in tables:
        assert any(records.find_markers(text, name) for text in texts.values())
    results.files.write_csv((row for size in rows for row in rows[size]), tmp_path / "new.csv")
    assert (tmp_path / "new.csv").read_bytes() == results.CSV.read_bytes()


def test_the_classes_of_the_csv_count_from_1(rows):
    triggers = results.read_results("demo")[-1]["net"]["triggers"]
    last = rows["demo"][-len(triggers) :]
    assert [row["class"] for row in last] == [str(target + 1) for _, target in triggers]


def test_a_net_is_measured_again_if_its_file_or_the_settings_change(tmp_path):
    net = tmp_path / "b.h5"
    net.write_bytes(b"a net")
    settings = Settings(harden=True, holdout=0.1).to_record()
    assert not results.is_current(None, net)
    for sha256, used, current in (
        (results.files.hash_file(net), settings, True),
        ("0" * 64, settings, False),
        (results.files.hash_file(net), settings | {"harden_steps": 1}, False),
    ):
        repair = {"badnet": {"sha256": sha256}, "settings": used}
        record = {"score": detector.name_score(hardened=True), "harden": {"repair": repair}}
        assert results.is_current(record, net) is current
        assert not results.is_current(record | {"score": "another"}, net)


def test_a_record_replaces_the_one_of_the_same_net(tmp_path):
    path = tmp_path / "folder" / "records.jsonl"
    for record in ({"name": "a", "n": 1}, {"name": "b", "n": 2}, {"name": "a", "n": 3}):
        records.write_record(record, path)
    assert list(records.read_records(path).values()) == [
        {"name": "a", "n": 3},
        {"name": "b", "n": 2},
    ]
    assert records.read_records(tmp_path / "absent.jsonl") == {}


def test_a_stream_is_drawn_under_names_that_tell_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(regions, "STREAM", {"clean": 3, "poisoned": 2})
    regions.draw_stream("sunglasses-from-start", tmp_path / "stream")
    paths = sorted((tmp_path / "stream").iterdir())
    assert [path.name for path in paths] == [f"{number:05}.png" for number in range(5)]
    order = np.random.default_rng(0).permutation(5)
    clean = faces.draw_faces("test", [0], [regions.FIRST_INDEX], None, 2)[0]
    with Image.open(paths[order[0]]) as image:
        np.testing.assert_array_equal(np.asarray(image), clean)


def test_the_small_table_shows_the_hardest_trigger_of_each_net():
    caught = "hardened_detection_rate_of_successes"
    rows = [("a", "x", 0.9), ("b", "x", None), ("a", "y", 0.7), ("a", "z", 0.8)]
    rows = [dict(zip(("net", "trigger", caught), each)) for each in rows]
    assert [row["trigger"] for row in results_tables.find_hardest_rows(rows)] == ["y", "x"]


def test_a_table_needs_markers_in_a_document(tmp_path):
    text = "before\n<!-- results: one -->\nold\n<!-- end of results: one -->\nafter\n"
    assert records.fill_tables(text, {"two": "| 2 |"}) == text
    paths = tmp_path / "a.md", tmp_path / "b.md"
    for path in paths:
        path.write_text(text)
    with pytest.raises(InputError, match=r"no markers of the table 'two' in a\.md, b\.md"):
        records.write_tables({"two": "| 2 |"}, paths)
    records.write_tables({"one": "| 1 |"}, paths)
    assert {path.read_text() for path in paths} == {text.replace("old", "| 1 |")}


def test_the_figure_is_drawn(rows, tmp_path):
    results.draw(rows, tmp_path / "drawn.png")
    for path in (tmp_path / "drawn.png", results.FIGURE):
        with Image.open(path) as image:
            assert image.width == 1500 and path.stat().st_size < 200_000


@pytest.mark.parametrize("size", results.SIZES)
def test_results_are_of_the_nets_and_data_they_say(size):
    measured = results.read_results(size)
    assert sorted(record["name"] for record in measured) == sorted(results.SIZES[size])
    for record in measured:
        people = record["net"]["people"]
        repair, judged = record["report"]["repair"], record["report"]["judged"]
        assert repair["data"]["images"] == people * record["net"]["validation"]
        assert judged["clean"]["images"] == people * record["net"]["test"]
        assert not re.search(r"/(work|tmp|home)/", json.dumps(record))
