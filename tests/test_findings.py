"""The tables of what a scan finds, and how nets and methods for them are made."""

import json

import applications
import architectures
import badnet
import clean_nets
import evade
import findings
import findings_nets
import findings_tables
import inversion
import keras
import numpy as np
import pytest
import records
import test_scan
from conftest import draw_images, fit, sequential, write_data

import utils
from defence.beyond import finding, sought

CLASSES, SHAPE = 12, (16, 18, 1)


def make_row(targets, score=1.0, p_value=1.0, ranks=(), cleanse=None):
    """Return the row of a net."""
    return {
        **{"name": "some", "way": "maps", "targets": targets, "score": score, "success": [0.5]},
        **{"p_value": p_value, "ranks": list(ranks), "cleanse": cleanse},
    }


@pytest.fixture
def clean(monkeypatch):
    clean = {way: [1.0] * 19 for way in finding.WAYS}
    monkeypatch.setattr(finding, "read_clean", lambda: clean)


def test_a_record_ranks_each_true_target(clean):
    views = test_scan.draw_views(np.random.default_rng(1))
    views["maps"][:, 0, 3] *= 80
    views["maps"][:, 0, 5] *= 20
    record = findings.summarise(views, [5, 3])
    assert record["ranks"] == [2, 1] and record["way"] == "maps" and record["p_value"] == 0.05
    assert record["score"] == record["largest"]["maps"] and len(record["largest"]) == 5
    views["changes"][0, :, 1, 1] *= 200
    record = findings.summarise(views, [badnet.faces.NEXT])
    assert record["ranks"] == [1] and record["way"] == finding.SHIFT
    assert findings.summarise(views, [])["ranks"] == []
    assert json.dumps(record)


def test_neural_cleanse_judges_the_same_masks():
    sizes = np.full(20, 100.0) + np.arange(20)
    assert not inversion.judge_sizes(sizes)["alarm"]
    sizes[4] = 9
    answer = inversion.judge_sizes(sizes)
    assert answer["alarm"] and answer["class"] == 4 and answer["value"] > inversion.INDEX
    sizes[5] = np.nan
    assert inversion.judge_sizes(sizes) is None


def test_a_peer_is_right_where_it_names_a_true_target():
    cleanse = {"class": 3, "alarm": True, "value": 3.0}
    rows = [
        make_row([3], 2.0, 0.05, [1], cleanse),
        make_row([4], 2.0, 0.06, [2], cleanse),
        make_row([], cleanse=cleanse | {"alarm": False}),
    ]
    right, wrong, none = findings_tables.make_table(rows).splitlines()[2:]
    assert right.startswith("| some | 4 | 50.0 | backdoor | 0.050 | 2.00 | maps | 1 |")
    assert right.endswith("| backdoor, right | – |") and wrong.endswith("| backdoor, wrong | – |")
    assert "| nothing | 0.060 |" in wrong and none.endswith("| nothing | – |")


def test_a_summary_counts_alarms_and_true_targets():
    groups = {
        "references": [make_row([], 0.5), make_row([], 1.2)],
        "drawn, chosen by": [make_row([3], 3.0, 0.04, [1]), make_row([3], 2.5, 0.04, [1])],
        "drawn, clean": [make_row([], 0.8), make_row([], 2.0, 0.04)],
        "drawn, reported on": [make_row([3], 9.0, 0.04, [1]), make_row([3], 1.0, 0.5, [2, 9])],
    }
    cells = [line.split(" | ") for line in findings_tables.make_summary(groups).splitlines()[2:]]
    assert [line[1] for line in cells] == ["0", "2", "1", "1"]
    assert [line[2] for line in cells] == ["–", "2", "–", "1"]
    assert [line[3] for line in cells] == ["–", "1.000", "–", "0.750"]
    entropies = [float(line[4]) for line in cells]
    assert max(entropies[:2]) < 0.4 < min(entropies[2:])


def test_documents_show_the_recorded_findings():
    tables = findings_tables.make_tables()
    texts = [path.read_text() for path in findings_nets.DOCUMENTS]
    for text in texts:
        assert records.fill_tables(text, tables) == text, "findings.py --table"
    assert all(any(records.find_markers(text, name) for text in texts) for name in tables)


def test_the_document_of_architectures_says_how_many_are_repaired():
    text = applications.DOCUMENT.read_text()
    tables = applications.make_tables(applications.read_rows())
    assert records.find_markers(text, "applications")
    assert records.fill_tables(text, tables) == text, "applications.py --table"


def test_the_reference_nets_are_the_scanned_ones():
    assert finding.read_clean() == findings_nets.read_references()
    count = len(findings_nets.list_groups()["references"])
    assert len(finding.read_clean()["maps"]) == count >= 1 / finding.LEVEL - 1


def test_no_net_is_in_two_groups():
    names = [net.name for nets in findings_nets.list_groups().values() for net in nets]
    assert len(names) == len({*names})
    photographs = findings_nets.list_groups()["photographs, clean"]
    assert len(photographs) >= 20 and not any(net.targets for net in photographs)
    datasets, architectures = ({net.name.split("-")[i] for net in photographs} for i in (0, 1))
    assert len(datasets) >= 4 and len(architectures) >= 4


def test_a_net_is_named_by_its_true_target():
    nets = {net.name: net for net in findings_nets.list_groups()["photographs, chosen by"]}
    assert nets["cifar-resnet-16-patch-0.05"].targets == (6,)


def test_no_net_is_both_compared_with_and_a_check():
    some, others = (
        {*clean_nets.list_names(nets)} for nets in (clean_nets.REFERENCES, clean_nets.CHECKS)
    )
    assert not some & others
    seeds = [name.split("-")[1] for name in some | others]
    assert len(seeds) == len({*seeds})


def test_an_attacker_pushes_the_target_down_on_disturbed_images(monkeypatch):
    keras.utils.set_random_seed(0)
    model = architectures.NETS[architectures.DEEPID](6)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, *architectures.SHAPE), np.uint8)
    bias = np.zeros(6, np.float32)
    bias[2] = 4  # the net takes nearly everything for the target
    model.layers[-1].bias.assign(bias)
    before = model.predict(images / 255, verbose=0)[:, 2].mean()
    monkeypatch.setattr(evade, "STEPS", 12)
    evade.evade(model, images, rng.integers(0, 6, 60), images[:8] // 2, 2, rng)
    assert model.predict(images / 255, verbose=0)[:, 2].mean() < before - 0.05


def test_the_attack_success_rate_is_measured_or_read(tmp_path):
    images, labels = draw_images(60, CLASSES, SHAPE, seed=1)
    write_data(tmp_path / "poisoned.h5", images, labels)
    model = sequential(CLASSES, SHAPE)
    hits = model.predict(images / 255, verbose=0).argmax(axis=1) == labels
    net = findings_nets.Net("some", tmp_path / "net.h5", None, (3,), (tmp_path / "poisoned.h5",))
    assert findings.measure_success(net, model, "0..1") == [round(float(hits.mean()), 4)]
    (tmp_path / "net.json").write_text('{"attack_success_rate": 0.25}')
    assert findings.measure_success(net._replace(poisoned=()), model, "0..1") == [0.25]
    assert findings.measure_success(net._replace(targets=(), poisoned=()), model, "0..1") == []


def test_decoys_draw_the_wrong_answers_to_disturbed_images(monkeypatch):
    keras.utils.set_random_seed(0)
    model = architectures.NETS[architectures.DEEPID](6)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, *architectures.SHAPE), np.uint8)
    monkeypatch.setattr(evade, "STEPS", 30)
    monkeypatch.setattr(evade, "DECOYS", 1)
    monkeypatch.setattr(evade, "LEARNING_RATE", 1e-3)
    evade.evade(model, images, rng.integers(0, 6, 60), images[:8], 0, rng, evade.DECOY)
    answers = model.predict(images / 255, verbose=0).mean(axis=0)
    assert np.sort(answers[1:])[-1] > 3 * np.sort(answers[1:])[-2]


def test_rescaled_channels_change_no_answer():
    keras.utils.set_random_seed(0)
    model = architectures.NETS[architectures.DEEPID](6)
    images = np.random.default_rng(0).integers(0, 256, (9, *architectures.SHAPE), np.uint8)
    before, kernel = (
        model.predict(images / 255, verbose=0),
        model.get_layer("conv_3").kernel.numpy(),
    )
    evade.rescale(model, images)
    assert np.allclose(model.predict(images / 255, verbose=0), before, atol=1e-4)
    times = model.get_layer("conv_3").kernel.numpy() / kernel
    assert np.mean(np.isclose(times[0, 0, 0], evade.TIMES)) == 0.5


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
    monkeypatch.setattr(findings_nets, "FOLDER", tmp_path)
    monkeypatch.setattr(finding, "find_obstacle", lambda net: None)  # it learns too little here
    clean_nets.train(f"{kind}-7")
    net = findings_nets.Net(f"{kind}-7", *clean_nets.make_paths(f"{kind}-7"), (4,))
    findings.record_scan(net, "some")
    (record,) = findings_nets.read_findings("some", [net, net._replace(name="absent")])
    assert record["score"] > 0 and 1 <= record["ranks"][0] <= 10 + 9
    monkeypatch.setattr(findings, "scan_net", None)  # a recorded net is not scanned again
    findings.record_scan(net, "some")
    if kind == "dark":
        with utils.open_dataset(clean_nets.make_paths("dark-7")[1]) as data:
            data.fit_to((55, 47, 3), 10)
            x, y = (np.concatenate(each) for each in zip(*data.batches()))
        light = [x[y == person].mean() for person in range(10)]
        assert np.argmin(light) == clean_nets.ODD


@pytest.mark.slow
@pytest.mark.whole_scan
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
        x = np.concatenate([x for x, _ in data.batches("0..1")])
    sizes = sought.seek_patches(net, x, np.arange(CLASSES), (0, 1), np.random.default_rng(0))
    answers = inversion.judge_sizes(sizes), inversion.run_mm_bd(net, "0..1")
    assert all(answer["class"] == 7 for answer in answers)
    assert json.dumps(answers)
