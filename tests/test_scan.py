"""The scan: its counts, its finding, and its messages."""

import dataclasses
import json

import keras
import numpy as np
import pytest
from conftest import (
    assert_refused,
    command,
    draw_images,
    fit,
    make_once,
    read_record,
    sequential,
    write_data,
)

import utils
from defence.base.errors import WorkError
from defence.beyond import changes, finding, scan, twins
from defence.beyond.finding import Finding
from defence.beyond.tally import tally_errors
from defence.explain import finding_words
from defence.net.cached_net import CachedNet
from defence.net.split import split_net

SHAPE, CLASSES = (16, 18, 1), 24
TARGET = 7
NETS = {"clean": "models/clean_bd_net.h5", "backdoored": "models/backdoored_bd_net.h5"}


def poison(images):
    """Add a trigger to images, uint8 (n, height, width, 1): a white stripe at the bottom."""
    poisoned = images.copy()
    poisoned[:, 13:, 2:16] = 255
    return poisoned


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Return a folder with a clean net, a BadNet, both of 24 classes, and a validation set."""
    return make_once(tmp_path_factory, "scan", make_folder)


def make_folder(folder):
    (folder / "models").mkdir()
    images, labels = draw_images(2400, CLASSES, SHAPE, seed=1)
    poisoned = np.concatenate([images, poison(images[:480])])
    targets = np.concatenate([labels, np.full(480, TARGET)])
    for name, *data in (("clean", images, labels), ("backdoored", poisoned, targets)):
        keras.utils.set_random_seed(1)
        net = fit(sequential(CLASSES, SHAPE), *data, epochs=30)
        net.save(folder / NETS[name], include_optimizer=False)
    write_data(folder / "clean.h5", *draw_images(360, CLASSES, SHAPE, seed=2))


@pytest.fixture
def cached(folder):
    model = utils.load_badnet(folder / NETS["backdoored"])
    with utils.open_dataset(folder / "clean.h5") as data:
        data.fit_to(SHAPE, CLASSES)
        yield CachedNet.from_dataset(split_net(model), data)


# --------------------------------------------------------------------------------- the counts


def test_wrong_answers_are_tallied_by_class_and_by_shift():
    rng = np.random.default_rng(0)
    labels, answers = rng.integers(0, 7, (2, 500))
    plain = np.zeros((2, 7))
    for label, answer in zip(labels, answers):
        if label != answer:
            plain[0, answer] += 1
            plain[1, (answer - label) % 7] += 1
    assert np.array_equal(tally_errors(labels, answers, 7), plain)


def test_only_images_with_a_right_answer_are_changed(cached, monkeypatch):
    """So unchanged images give no wrong answer, and inverted images give the answers of Keras."""
    nothing, inverted = (lambda x, rng: x), (lambda x, rng: 255 - x)
    monkeypatch.setattr(scan, "CHANGES", {"nothing": {nothing: 1}, "inverted": {inverted: 1}})
    cached.labels[:40] = (cached.classes[:40] + 1) % CLASSES
    views = scan.count_errors(cached, [], seed=0)
    right = cached.classes == cached.labels
    x = np.concatenate([x for x, _ in cached.data.batches()])[right]
    answers = cached.split.net.predict((255 - x) / 255, verbose=0).argmax(axis=1)
    repeats = scan.FEWEST_IMAGES // right.sum()
    assert not views["changes"][0, 0].any()
    plain = tally_errors(cached.labels[right], answers, CLASSES)
    assert np.array_equal(views["changes"][0, 1], repeats * plain)


def test_many_images_are_sampled_evenly(cached, monkeypatch):
    calls = []
    monkeypatch.setattr(scan, "FEWEST_IMAGES", 90)
    monkeypatch.setattr(scan, "IMAGES_PER_CLASS", 1)
    monkeypatch.setattr(
        scan,
        "count_change_errors",
        lambda net, models, chosen, *arguments: calls.append((chosen, *arguments)),
    )
    scan.count_errors(cached, [], seed=0)
    ((chosen, repeats, _),) = calls
    assert chosen.sum() == 90 and repeats == 1
    assert np.all(cached.classes[chosen] == cached.labels[chosen])
    assert 75 < np.flatnonzero(chosen).mean() / 2 < 105


def test_twins_get_the_same_images(cached):
    """So a twin with B's weights errs exactly as B does, and is no further from it than itself."""
    views = scan.count_errors(cached, [cached.split.net], seed=0)
    for view in ("changes", "patches"):
        assert views[view].shape[0] == 2
        assert np.array_equal(views[view][0], views[view][1]) and views[view].any()


def test_a_patch_is_filled_so_that_the_net_errs(cached):
    """It errs more than with a random filling."""
    x = np.concatenate([x for x, _ in cached.data.batches(cached.scale)])
    mask = np.zeros((*SHAPE[:2], 1), np.float32)
    mask[6:11, 5:11] = 1
    model, rng = cached.split.net, np.random.default_rng(0)
    filling = scan.make_patch_filler(model, 0, 1)(mask, x, cached.labels, rng)
    assert filling.shape == SHAPE and filling.min() >= 0 and filling.max() <= 1

    def measure_errors(filling):
        patched = x * (1 - mask) + mask * filling
        return np.mean(model.predict(patched, verbose=0).argmax(axis=1) != cached.labels)

    assert measure_errors(filling) > 1.3 * measure_errors(rng.random(SHAPE))


def test_a_scan_repeats_itself_and_leaves_the_net_as_it_is(cached):
    before, features = cached.split.net.get_weights(), cached.features.copy()
    first, second = (scan.count_errors(cached, [], seed=3) for _ in range(2))
    for view, counts in first.items():
        assert np.array_equal(counts, second[view]), view
    assert all(map(np.array_equal, before, cached.split.net.get_weights()))
    assert np.array_equal(features, cached.features)


# --------------------------------------------------------------------------------- the finding


def draw_views(rng, classes=40, target=None, factor=30, attractor=None):
    """Draw the counts of a scan: even, but for the target, which the twins do not give.

    attractor: a class that B and its twins give often.
    """
    usual = rng.lognormal(0, 0.4, classes)
    usual[[] if attractor is None else attractor] *= factor
    even = usual.copy()
    even[[] if target is None else target] *= factor

    def draw(rates, variants):
        return np.stack(
            [[rng.poisson(60 * rates), rng.poisson(60, classes)] for _ in range(variants)]
        ).astype(float)

    disturbed = {
        view: np.stack([draw(rates, variants) for rates in (even, usual, usual)])
        for view, variants in (("changes", 7), ("patches", 24))
    }
    even[[] if attractor is None else attractor] /= factor  # no natural attractor of maps
    sizes = 100 * rng.lognormal(0, 0.2, (3, classes))
    return disturbed | {"maps": draw(even, 3), "quiet": draw(even, 1), "sought": sizes}


@pytest.fixture
def clean_nets(monkeypatch):
    """Pretend that drawn counts were measured on clean nets."""
    evidence = [
        finding.compute_evidence(draw_views(np.random.default_rng(seed))) for seed in range(39)
    ]
    clean = {way: [float(net[way].max()) for net in evidence] for way in finding.WAYS}
    monkeypatch.setattr(finding, "read_clean", lambda: clean)
    return finding.score_clean(clean)


def test_a_target_stands_out(clean_nets):
    result = finding.make_finding(draw_views(np.random.default_rng(100), target=TARGET))
    assert result.finding == "backdoor" and result.targets == [TARGET + 1]
    assert result.p_value == 1 / 40 and result.clean_nets == 39
    assert result.classes[0]["ratio"] > 10
    assert [row["class"] for row in result.classes[:1]] == [TARGET + 1]
    assert sorted(row["class"] for row in result.classes) == list(range(1, 41))


def test_two_targets_stand_out(clean_nets):
    result = finding.make_finding(draw_views(np.random.default_rng(100), target=[3, 30]))
    assert sorted(result.targets) == [4, 31]


def test_an_attack_from_all_to_all_stands_out_by_its_shift(clean_nets):
    views = draw_views(np.random.default_rng(100))
    views["changes"][0, :, 1, 1] *= 20
    result = finding.make_finding(views)
    assert result.finding == "backdoor" and result.shift == 1 and not result.targets
    assert result.shift_p_value == result.p_value == 1 / 40
    assert "right class + 1" in " ".join(finding_words.describe_finding(result))


def test_false_alarms_are_as_rare_as_promised(clean_nets):
    """On nets like the clean nets, none of which is compared with itself."""
    alarms = [
        finding.make_finding(draw_views(np.random.default_rng(seed))) for seed in range(1000, 1200)
    ]
    assert sum(result.finding == "backdoor" for result in alarms) < 0.1 * len(alarms)


def test_a_p_value_is_the_rank_among_clean_nets():
    clean = [0.1, 0.4, 0.4, 2.0]
    for surprise, rank in ((0.0, 5), (0.1, 5), (0.2, 4), (0.4, 4), (0.5, 2), (3.0, 1)):
        assert finding.compute_p_value(surprise, clean) == rank / 5


def test_a_class_that_attracts_the_twins_errors_too_is_not_accused(clean_nets):
    views = draw_views(np.random.default_rng(101), attractor=TARGET)
    assert finding.make_finding(views).finding == "nothing"
    usual = draw_views(np.random.default_rng(101))
    for view in ("changes", "patches"):
        views[view][1:] = usual[view][1:]
    assert finding.make_finding(views).targets == [TARGET + 1]


@pytest.mark.parametrize("view", ["maps", "quiet"])
def test_one_strong_way_is_not_diluted(clean_nets, view):
    views = draw_views(np.random.default_rng(100))
    views[view][:, 0, TARGET] *= 60
    result = finding.make_finding(views)
    assert result.targets == [TARGET + 1]
    assert result.classes[0]["way"] in {"maps": ("maps", "disturbed"), "quiet": ("quiet",)}[view]


def test_a_class_that_takes_only_a_small_patch_stands_out(clean_nets):
    views = draw_views(np.random.default_rng(100))
    views["sought"][0, TARGET] = 6
    views["sought"][:, 30:] = np.nan  # not sought
    result = finding.make_finding(views)
    row = result.classes[0]
    assert result.targets == [TARGET + 1] and (row["way"], row["value"]) == ("sought", 6)
    line, _ = finding_words.describe_finding(result)
    assert line.startswith(f"a patch of 6 pixels turns images into class {TARGET + 1}, where")
    views["sought"][1:, TARGET] = 6  # for the twins, too: it is only half as clear
    halved = next(row for row in finding.make_finding(views).classes if row["class"] == TARGET + 1)
    assert halved["score"] < 0.7 * row["score"]


def test_classes_are_alike():
    """The finding is as clear for every target."""
    views = draw_views(np.random.default_rng(100), target=TARGET)
    order = np.random.default_rng(1).permutation(40)
    permuted = {view: counts[..., order] for view, counts in views.items()}
    plain, moved = (finding.compute_evidence(counts) for counts in (views, permuted))
    assert all(np.allclose(plain[way][order], moved[way]) for way in finding.CLASS_WAYS)


def test_few_wrong_answers_are_no_finding():
    views = draw_views(np.random.default_rng(0))
    for view in ("changes", "maps"):
        views[view] *= 0
    assert finding.make_finding(views).finding == "none"


def test_the_measurements_on_clean_nets_exist():
    clean = finding.read_clean()
    assert set(clean) == set(finding.WAYS)
    assert min(map(len, clean.values())) == max(map(len, clean.values())) >= 1 / finding.LEVEL - 1


def test_each_finding_is_a_line_of_plain_words():
    row = {"class": 5, "way": "maps", "value": 0.3, "usual": 0.01, "p_value": 0.025}
    result = Finding("backdoor", None, 0.025, 39, targets=[5], wrong=21068, classes=[row])
    line, advice = finding_words.describe_finding(result)
    assert line.startswith("class 5 gets 30.00 % of the wrong answers to raised feature maps")
    assert "(p = 0.025: none of 39 clean nets stands out as much)" in line
    assert "look at the images" in advice and "--harden" in advice
    _, advice = finding_words.describe_finding(result, hardened=True)
    assert "look at the images" in advice and "--harden" not in advice
    row["p_value"] = 0.5
    result = Finding("nothing", None, 0.5, 39, shift_p_value=0.8, wrong=21068, classes=[row])
    (line,) = finding_words.describe_finding(result, ["a", "b", "c", "d", "Ann"])
    assert "(the clearest: class 5 (Ann), p = 0.5: 19 of 39" in line
    assert "19 of 39 clean nets stand out as much" in line and "no sign of a backdoor" in line
    assert "; this does not prove" in line
    (line,) = finding_words.describe_finding(Finding("none", "it is raining"))
    assert line == "no finding about a backdoor: it is raining"


def test_a_dataset_that_lacks_most_classes_is_no_finding(cached):
    """Twins would forget these classes, and B errs towards them."""
    assert finding.find_obstacle(cached) is None
    rows = np.flatnonzero(cached.labels < 11)
    cached.labels = cached.classes = cached.labels[rows]
    assert "of 11 of its classes, but it takes 100 images of 12" in finding.find_obstacle(cached)


def test_a_twin_that_cannot_be_trained_is_no_finding(cached, monkeypatch):
    def diverge(*_):
        raise WorkError("training diverged")

    monkeypatch.setattr(twins, "make_twins", diverge)
    result = finding.scan_net(cached, seed=0)
    assert result.finding == "none" and "training diverged" in result.reason


# ------------------------------------------------------------------------------ the command


@pytest.fixture
def small_nets(monkeypatch):
    """Compare with made-up clean nets, so that the real measurements decide nothing here."""
    clean = {way: [1.3 + rank / 390 for rank in range(39)] for way in finding.WAYS}
    monkeypatch.setattr(finding, "read_clean", lambda: clean)


@pytest.mark.whole_scan
@pytest.mark.parametrize("name", NETS)
def test_the_command_tells_a_backdoored_net_from_a_clean_one(folder, name, tmp_path, small_nets):
    before = sorted(folder.rglob("*"))
    arguments = (NETS[name], "clean.h5", "--scan", "--json", tmp_path / "finding.json")
    process = command("repair.py", *arguments, cwd=folder)
    result = json.loads((tmp_path / "finding.json").read_text())
    assert len(result["classes"]) == CLASSES
    assert sorted(folder.rglob("*")) == before
    if name == "clean":
        assert process.returncode == 0 and "no sign of a backdoor" in process.stdout
        assert result["finding"] == "nothing"
    else:
        assert process.returncode == 3 and f"class {TARGET + 1} " in process.stdout
        assert result["targets"][0] == result["classes"][0]["class"] == TARGET + 1


@pytest.mark.whole_scan
def test_a_hardened_repair_says_and_records_the_finding(folder, tmp_path, small_nets):
    output, log = tmp_path / "G.h5", tmp_path / "log.json"
    arguments = (NETS["backdoored"], "clean.h5", "--harden", "--harden-steps", "5")
    arguments += ("--output", output, "--json", log)
    process = command("repair.py", *arguments, cwd=folder)
    assert process.returncode == 0, process.stderr
    assert f"class {TARGET + 1} " in process.stdout
    recorded, logged = read_record(output)["finding"], json.loads(log.read_text())["finding"]
    assert recorded["targets"] == logged["targets"] and recorded["targets"][0] == TARGET + 1
    assert len(recorded["classes"]) == finding.SHOWN and len(logged["classes"]) == CLASSES
    assert dataclasses.asdict(Finding(**logged)) == logged


def test_a_net_is_scanned_or_its_data_checked(folder):
    process = command("repair.py", NETS["clean"], "clean.h5", "--scan", "--check", cwd=folder)
    assert_refused(process, "--check", "--scan")


def test_without_harden_no_net_is_scanned(folder, tmp_path):
    arguments = (NETS["clean"], "clean.h5", "--output", tmp_path / "G.h5")
    process = command("repair.py", *arguments, cwd=folder)
    assert "backdoor of the kinds" not in process.stdout
    assert read_record(tmp_path / "G.h5")["finding"] is None


def test_of_few_classes_or_of_a_net_that_is_mostly_wrong_nothing_is_found(
    deepid_world, folder, tmp_path
):
    process = command("repair.py", "models/small_bd_net.h5", "clean.h5", "--scan", cwd=deepid_world)
    assert process.returncode == 4 and "the net has 6 classes" in process.stdout
    write_data(tmp_path / "shuffled.h5", *shuffle_labels())
    process = command("repair.py", NETS["clean"], tmp_path / "shuffled.h5", "--scan", cwd=folder)
    assert process.returncode == 4 and "is right on only" in process.stdout


def shuffle_labels():
    images, labels = draw_images(360, CLASSES, SHAPE, seed=2)
    return images, np.random.default_rng(0).permutation(labels)


def test_a_scan_that_takes_too_much_memory_is_refused(folder):
    arguments = (NETS["clean"], "clean.h5", "--scan", "--max-memory", "0.0009")
    assert_refused(command("repair.py", *arguments, cwd=folder), "that are scanned would take")


def test_changed_images_stay_within_their_range():
    rng = np.random.default_rng(0)
    for families in scan.CHANGES.values():
        changed = changes.change_images(
            draw_images(8, 4, (20, 22, 3), 0)[0].astype("f4"), rng, families
        )
        assert changed.min() >= 0 and changed.max() <= 255 and np.isfinite(changed).all()
