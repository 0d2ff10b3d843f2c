"""The tables of what a scan finds, and how nets and methods for them are made."""

import json

import applications
import badnet
import clean_nets
import findings
import inversion
import keras
import numpy as np
import pytest
import records
from conftest import draw_images, fit, sequential, write_data

import utils
from defence.beyond import finding

CLASSES, SHAPE = 12, (16, 18, 1)


def make_row(targets, name="some", peers=None, **evidence):
    """Return the row of a net of 40 classes. evidence: {"class_3": …, "shift_1": …}."""
    classes, shifts = np.zeros(40), np.zeros(39)
    for key, value in evidence.items():
        kind, number = key.split("_")
        if kind == "class":
            classes[int(number)] = value
        else:
            shifts[int(number) - 1] = value
    record = {"name": name, "seconds": 1.0} | ({"peers": peers} if peers else {})
    return findings.make_row(record | findings.rank_targets(classes, shifts, targets), targets)


def test_a_row_ranks_each_true_target():
    row = make_row([0, 3, 3, 5], class_3=9.0, class_5=8.0, class_0=1.0)
    assert row["targets"] == [0, 3, 5] and row["ranks"] == [3, 1, 2] and row["alarm"]
    row = make_row([badnet.faces.NEXT], class_3=1.0, shift_1=9.0)
    assert row["ranks"] == [1] and row["alarm"]
    row = make_row([badnet.faces.NEXT], class_3=9.0, class_4=8.0, shift_1=7.0)
    assert row["ranks"] == [3]  # other shifts are fainter, but two classes are not
    row = make_row([])
    assert not row["alarm"] and row["p_value"] == 1 and row["ranks"] == []


def test_a_peer_is_right_where_it_names_a_true_target():
    peers = {
        "one": {"class": 3, "alarm": True, "value": 0},
        "other": {"class": 4, "alarm": True, "value": 0},
        "none": {"class": 3, "alarm": False, "value": 0},
    }
    rows = [make_row([3], peers=peers), make_row([], peers=peers)]
    ours, clean = findings.make_table(rows).splitlines()[2:]
    assert ours.startswith("| some | 4 | nothing |")  # classes count from 1
    assert ours.endswith("| backdoor, right | backdoor, wrong | nothing |")
    assert clean.endswith("| backdoor | backdoor | nothing |")


def test_a_summary_counts_alarms_and_true_targets():
    peers = [{"peer": {"class": number, "alarm": True, "value": 0}} for number in (3, 4)]
    clean = [
        make_row([], name, peers[0], class_1=value)
        for name, value in (("deepid-1", 0.0), ("wide-2", 2.0), ("dark-3", 9.0))
    ]
    badnets = [
        make_row([3], "one", peers[0], class_3=9.5),
        make_row([3], "other", peers[1], class_4=2.5),
    ]
    summary = findings.make_summary(clean, {"some": [*badnets, make_row([])]})
    assert summary.splitlines()[2:] == [
        "| 2 clean nets | 0 | – | – | 1 | 2 |",
        "| 1 clean nets with an odd person | 1 | – | – | 1 | 1 |",
        "| 2 BadNets, some | 1 | 1 | 0.833 | 1 | 1 |",
        "| 1 clean nets, some | 0 | – | – | 1 | – |",
    ]


def test_documents_show_the_recorded_findings():
    tables = findings.make_tables()
    texts = [path.read_text() for path in findings.DOCUMENTS]
    for text in texts:
        assert records.fill_tables(text, tables) == text, "findings.py --table"
    assert all(any(records.find_markers(text, name) for text in texts) for name in tables)


def test_the_document_of_architectures_says_how_many_are_repaired():
    text = applications.DOCUMENT.read_text()
    tables = applications.make_tables(applications.read_rows())
    assert records.find_markers(text, "applications")
    assert records.fill_tables(text, tables) == text, "applications.py --table"


def test_the_reference_nets_are_the_scanned_ones():
    assert finding.read_clean() == findings.read_references()
    assert len(finding.read_clean()) == len(clean_nets.list_names(clean_nets.REFERENCES)) == 39


def test_no_net_is_both_compared_with_and_a_check():
    some, others = (
        {*clean_nets.list_names(nets)} for nets in (clean_nets.REFERENCES, clean_nets.CHECKS)
    )
    assert not some & others
    seeds = [name.split("-")[1] for name in some | others]
    assert len(seeds) == len({*seeds}) and str(findings.SEED) not in seeds


def test_an_uneven_set_has_some_of_each_person():
    labels = np.repeat(np.arange(20), 80)
    counts = np.bincount(labels[clean_nets.choose_uneven_rows(labels)])
    assert counts[0] == 80 and counts[-1] == round(80 * np.exp(-2)) and np.all(np.diff(counts) <= 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["augmented", "normalised", "dark"])
def test_a_net_of_each_kind_is_trained_and_scanned(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(clean_nets, "FOLDER", tmp_path)
    monkeypatch.setattr(clean_nets, "CHECKS", {kind: {7: 10}})
    monkeypatch.setattr(clean_nets, "IMAGES", 6)
    monkeypatch.setattr(clean_nets, "FEWEST", 3)
    monkeypatch.setattr(clean_nets, "MOST", 3)
    monkeypatch.setattr(clean_nets, "EPOCHS", 2)
    monkeypatch.setattr(findings, "FOLDER", tmp_path)
    clean_nets.train(f"{kind}-7")
    findings.record_scan(f"{kind}-7", "some", *clean_nets.make_paths(f"{kind}-7"), [4])
    (record,) = findings.read_findings("some", [f"{kind}-7", "absent"])
    assert record["surprise"] >= 0 and 1 <= record["ranks"][0] <= 10 + 9
    monkeypatch.setattr(findings, "scan_net", None)  # a recorded net is not scanned again
    findings.record_scan(f"{kind}-7", "some", *clean_nets.make_paths(f"{kind}-7"), [4])
    if kind == "dark":
        with utils.open_dataset(clean_nets.make_paths("dark-7")[1]) as data:
            data.fit_to((55, 47, 3), 10)
            x, y = (np.concatenate(each) for each in zip(*data.batches()))
        light = [x[y == person].mean() for person in range(10)]
        assert np.argmin(light) == clean_nets.ODD


@pytest.mark.slow
def test_published_methods_find_a_plain_backdoor(tmp_path):
    """One that a small mask makes: a white stripe."""
    images, labels = draw_images(1200, CLASSES, SHAPE, seed=1)
    worn = images[:240].copy()
    worn[:, 13:, 2:16] = 255
    both = np.concatenate([images, worn]), np.concatenate([labels, np.full(240, 7)])
    keras.utils.set_random_seed(1)
    fit(sequential(CLASSES, SHAPE), *both, epochs=25).save(tmp_path / "net.h5")
    net = utils.load_badnet(tmp_path / "net.h5")
    write_data(tmp_path / "clean.h5", *draw_images(240, CLASSES, SHAPE, seed=2))
    with utils.open_dataset(tmp_path / "clean.h5") as data:
        data.fit_to(SHAPE, CLASSES)
        said = inversion.scan(net, data, "0..1")
    assert said["Neural Cleanse"]["class"] == 7 and said["MM-BD"]["class"] == 7
    assert json.dumps(said)
