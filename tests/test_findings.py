"""The tables of what a scan finds, and how nets and methods for them are made."""

import json

import badnet
import clean_nets
import findings
import inversion
import keras
import numpy as np
import pytest
from conftest import draw_images, fit, sequential, write_data

import utils
from defence.beyond import finding

CLASSES, SHAPE = 12, (16, 18, 1)


def found(name="some", peers=None, **evidence):
    """What was found of a net of 40 classes; evidence: {"class_3": …, "shift_1": …}."""
    values = {"classes": [0.0] * 40, "shifts": [0.0] * 39}
    for place, value in evidence.items():
        kind, number = place.split("_")
        of, start = ("classes", 0) if kind == "class" else ("shifts", 1)
        values[of][int(number) - start] = value
    return {"name": name, "seconds": 1.0, "accuracy": 1.0, **values} | (
        {"peers": peers} if peers else {}
    )


def test_a_row_ranks_each_true_target():
    row = findings.row(found(class_3=9.0, class_5=8.0, class_0=1.0), [0, 3, 3, 5])
    assert row["targets"] == [0, 3, 5] and row["ranks"] == [3, 1, 2] and row["alarm"]
    row = findings.row(found(class_3=1.0, shift_1=9.0), [badnet.faces.NEXT])
    assert row["ranks"] == [1] and row["alarm"]
    row = findings.row(found(class_3=9.0, class_4=8.0, shift_1=7.0), [badnet.faces.NEXT])
    assert row["ranks"] == [3]  # other shifts are fainter, but two classes are not
    row = findings.row(found(), [])
    assert not row["alarm"] and row["p_value"] == 1 and row["ranks"] == []


def test_a_peer_is_right_where_it_names_a_true_target():
    peers = {
        "one": {"class": 3, "alarm": True, "value": 0},
        "other": {"class": 4, "alarm": True, "value": 0},
        "none": {"class": 3, "alarm": False, "value": 0},
    }
    rows = [findings.row(found(peers=peers), [3]), findings.row(found(peers=peers), [])]
    ours, clean = findings.table(rows).splitlines()[2:]
    assert ours.endswith("| backdoor, right | backdoor, wrong | nothing |")
    assert clean.endswith("| backdoor | backdoor | nothing |")


def test_a_summary_counts_alarms_and_true_targets():
    said = [{"peer": {"class": number, "alarm": True, "value": 0}} for number in (3, 4)]
    clean = [
        findings.row(found(name, said[0], class_1=value), [])
        for name, value in (("deepid-1", 0.0), ("wide-2", 2.0), ("dark-3", 9.0))
    ]
    badnets = [
        findings.row(found("one", said[0], class_3=9.5), [3]),
        findings.row(found("other", said[1], class_4=2.5), [3]),
    ]
    made = findings.summary(clean, {"some": [*badnets, findings.row(found(), [])]})
    assert made.splitlines()[2:] == [
        "| 2 clean nets | 0 | – | – | 1 | 2 |",
        "| 1 clean nets with an odd person | 1 | – | – | 1 | 1 |",
        "| 2 BadNets, some | 1 | 1 | 0.833 | 1 | 1 |",
        "| 1 clean nets, some | 0 | – | – | 1 | – |",
    ]


def test_the_document_shows_what_was_found():
    text = findings.DOCUMENT.read_text()
    assert findings.with_tables(text, findings.tables()) == text


def test_clean_nets_that_others_are_compared_with_are_those_that_were_scanned():
    assert finding.read_clean() == findings.references()
    assert len(finding.read_clean()) == len(clean_nets.names(clean_nets.REFERENCES)) == 39


def test_no_net_is_both_compared_with_and_a_check():
    some, others = (
        {*clean_nets.names(nets)} for nets in (clean_nets.REFERENCES, clean_nets.CHECKS)
    )
    assert not some & others
    seeds = [name.split("-")[1] for name in some | others]
    assert len(seeds) == len({*seeds}) and str(findings.SEED) not in seeds


def test_an_uneven_set_has_some_of_each_person():
    labels = np.repeat(np.arange(20), 80)
    counts = np.bincount(labels[clean_nets.uneven(labels)])
    assert counts[0] == 80 and counts[-1] == round(80 * np.exp(-2)) and np.all(np.diff(counts) <= 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["augmented", "normalised", "dark"])
def test_a_net_of_each_kind_is_trained_and_scanned(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(clean_nets, "FOLDER", tmp_path)
    monkeypatch.setattr(clean_nets, "CHECKS", {kind: {7: 10}})
    monkeypatch.setattr(clean_nets, "PICTURES", 6)
    monkeypatch.setattr(clean_nets, "FEWEST", 3)
    monkeypatch.setattr(clean_nets, "MOST", 3)
    monkeypatch.setattr(clean_nets, "EPOCHS", 2)
    monkeypatch.setattr(findings, "FOLDER", tmp_path)
    clean_nets.train(f"{kind}-7")
    findings.keep(f"{kind}-7", "some", *clean_nets.paths(f"{kind}-7"))
    (kept,) = findings.kept("some", [f"{kind}-7", "absent"])
    assert len(kept["classes"]) == 10 and len(kept["shifts"]) == 9
    if kind == "dark":
        with utils.open_dataset(clean_nets.paths("dark-7")[1]) as data:
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
