"""Published repairs and detectors on tiny nets, and the tables that compare them with ours."""

import keras
import numpy as np
import peer_detectors
import peer_repairs
import photo_peers
import photo_peers_tables
import pytest
from conftest import assert_refused, command, draw_images, fit, write_data
from peer_training import compile_gradient, copy_net, draw_batches

import utils

CLASSES, SHAPE = 4, (12, 12, 1)
SHORT = {
    "FT": {"epochs": 1},
    "report": {"retrain_epochs": 1, "rounds": 1, "epochs": 1},
    "ours": {"retrain_epochs": 1, "rounds": 1, "epochs": 1, "harden_steps": 1},
    "ANP": {"steps": 2},
    "I-BAU": {"rounds": 1},
    "FT-SAM": {"epochs": 1},
    "NFT": {"steps": 2},
    "D3": {"epochs": 1},
}


def build(norm):
    """Return a tiny untrained net, with or without batch normalisation."""
    layers = keras.layers
    image = keras.Input(SHAPE)
    x = layers.Conv2D(6, 3, 2, use_bias=not norm)(image)
    x = layers.ReLU()(layers.BatchNormalization()(x) if norm else x)
    x = layers.Dense(8, activation="relu")(layers.Flatten()(x))
    return keras.Model(image, layers.Dense(CLASSES, activation="softmax")(x))


@pytest.fixture(scope="module")
def images():
    return draw_images(80, CLASSES, SHAPE, seed=1)


@pytest.fixture(scope="module")
def nets(images):
    """A net without batch normalisation, and one with it."""
    keras.utils.set_random_seed(0)
    return [fit(build(norm), *images, epochs=20) for norm in (False, True)]


@pytest.fixture(scope="module")
def clean(images, tmp_path_factory):
    path = write_data(tmp_path_factory.mktemp("data") / "clean.h5", *images)
    with utils.open_dataset(path) as data:
        data.fit_to(SHAPE, CLASSES)
        yield data


@pytest.mark.parametrize("method", peer_repairs.REPAIRS)
def test_a_repair_returns_a_net_like_the_badnet_and_leaves_that_as_it_is(nets, clean, method):
    for net in nets if method in ("ANP", "NFT") else nets[:1]:
        before = net.get_weights()
        rng = np.random.default_rng(0)
        repaired = peer_repairs.REPAIRS[method](net, clean, rng, **SHORT[method])
        assert repaired is not net
        assert [w.shape for w in repaired.get_weights()] == [w.shape for w in before]
        for now, then in zip(net.get_weights(), before):
            np.testing.assert_array_equal(now, then)
        pairs = zip(repaired.get_weights(), before)
        assert method == "ANP" or any((after != then).any() for after, then in pairs)
        assert all(np.isfinite(weights).all() for weights in repaired.get_weights())


def test_pruning_by_masks_keeps_most_of_the_accuracy(nets, images):
    for net in nets:
        pruned = copy_net(net)
        masks, data = peer_repairs.Masks(pruned), (np.float32(images[0] / 255), images[1])
        for number, mask in enumerate(masks.values):
            if number == 0:
                mask.assign(np.linspace(0, 1, mask.shape[0]))
        peer_repairs.prune_low_masks(pruned, masks, data)
        kernels = pruned.get_layer(index=2 if len(masks.values) == 1 else 1).get_weights()[0]
        dead = (kernels.reshape(-1, 6) == 0).all(axis=0)
        assert dead[0] and not dead[-1]  # a mask of 0 always costs its channel, one of 1 never
        assert sorted(dead, reverse=True) == dead.tolist()

        def measure(model, data=data):
            return np.mean(model.predict(data[0], verbose=0).argmax(axis=1) == data[1])

        assert measure(pruned) >= (1 - peer_repairs.MOST_LOST) * measure(net)


def test_batches_have_each_image_once_in_an_epoch_and_smoothed_labels(nets, images):
    data = np.float32(images[0] / 255), images[1]
    rng = np.random.default_rng(0)
    batches = list(draw_batches(nets[0], data, 32, 6, rng, smoothing=0.3))
    assert [len(x) for x, _ in batches] == [32, 32, 16] * 2
    for part in (batches[:3], batches[3:]):
        targets = np.concatenate([targets for _, targets in part])
        assert sorted(targets.argmax(axis=1)) == sorted(images[1])
        np.testing.assert_allclose(np.sort(targets, axis=1)[0], [0.1, 0.1, 0.1, 0.7], rtol=1e-6)


def test_the_hypergradient_adds_to_the_gradient_what_goes_through_the_perturbation(nets, images):
    """Where no image is perturbed, nothing goes through it."""
    net = copy_net(nets[0])
    _, hypergradient = peer_repairs.compile_unlearning(net)
    x, targets = np.float32(images[0][:8] / 255), np.eye(CLASSES, dtype="float32")[images[1][:8]]
    noise = np.random.default_rng(0).normal(0, 0.1, (1, *SHAPE)).astype("float32")
    gradient = compile_gradient(net, net.trainable_variables)
    for share, same in ((0, True), (1, False)):
        chosen = np.full((8, 1, 1, 1), share, "float32")
        ours = hypergradient(noise, x, targets, x, targets, chosen)
        plain = gradient(x + share * noise, targets)
        assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(ours, plain, strict=True)) == same


def test_detectors_score_every_image(nets, images):
    pixels = np.float32(images[0] / 255)
    plain, normed = nets
    assert peer_detectors.make_ibd_psc(plain, pixels, images[1], None) is None
    for method in ("IBD-PSC", "BaDExpert"):
        rng = np.random.default_rng(0)
        score = peer_detectors.DETECTORS[method](normed, pixels, images[1], rng)
        scores = score(pixels[:5])
        assert scores.shape == (5,) and np.isfinite(scores).all()


RECORDS = [
    {"net": "a", "method": "B", "clean_accuracy": 0.9, "attack_success_rate": 1.0},
    {"net": "a", "method": "FT", "clean_accuracy": 0.8, "attack_success_rate": 0.5},
    {"net": "a", "method": "ours", "clean_accuracy": 0.9, "attack_success_rate": 0.0},
    {"net": "b", "method": "FT", "clean_accuracy": 0.9, "attack_success_rate": 0.1},
    {"net": "a", "method": "STRIP", "detection_rate": 0.25, "false_positive_rate": 0.02},
    {"net": "b", "method": "IBD-PSC"},
    {"net": "b", "method": "clean"},
    {"net": "c", "method": "FT", "clean_accuracy": 0.0, "attack_success_rate": 0.0},
]
RATINGS = {("a", "B"): 0.5, ("a", "FT"): 0.7, ("a", "ours"): 1.0, ("b", "FT"): 0.95}


def test_the_tables_have_means_and_count_where_ours_is_ahead():
    records = [
        record
        | {"defense_effectiveness_rating": RATINGS.get((record["net"], record["method"]), 0)}
        | {"relearned": {"10": 0.5, "50": 0.75}, "seconds": 3}
        if "clean_accuracy" in record
        else record
        for record in RECORDS
    ]
    records[2] |= {"detection_rate": 0.99, "false_positive_rate": 0.01}
    text = photo_peers_tables.make_document(records, {"group": ["a", "b"], "empty": ["d"]})
    assert "| FT | 2 | 85.0 | 30.0 | 50.0 | 82.5 | 50.0 | 75.0 | 3 | 1 of 1 |" in text
    assert "| ours | 1 | 90.0 | 0.0 | 0.0 | 100.0 | 50.0 | 75.0 | 3 | – |" in text
    assert "| STRIP | 1 | 25.0 | 25.0 | 2.0 | – | 1 of 1 |" in text
    assert "| b | – | – | 90.0 / 10.0 | – |" in text
    assert "IBD-PSC | 1" not in text and "empty" not in text and "| c |" not in text


def test_the_summary_has_a_row_for_each_dataset():
    def make(net, method, accuracy, success, caught=None):
        record = {"net": net, "method": method, "clean_accuracy": accuracy}
        record |= {"attack_success_rate": success}
        return record | ({"detection_rate": caught, "false_positive_rate": 0.01} if caught else {})

    records = [
        *(make("signs-deepid-1-patch-0.1", *row) for row in (("B", 0.9, 1), ("report", 0.9, 0.8))),
        make("signs-deepid-1-patch-0.1", "ours", 0.8, 0, 1),
        make("signs-vgg-2-patch-0.1", "B", 0.7, 1),
        make("signs-vgg-2-patch-0.1", "ours", 0.6, 0.1, 0.9),
        make("yale-deepid-3-patch-0.1", "B", 0.9, 1),  # not hardened yet
        make("tinyb-deepid-4-patch-0.1", "B", 0.9, 0.4),  # works too seldom
        make("tinyb-deepid-4-patch-0.1", "ours", 0.9, 0, 1),
    ]
    names = list(dict.fromkeys(record["net"] for record in records))
    table = photo_peers_tables.make_summary(records, names)
    row = "| 43 traffic signs | 2 | 80.0; 70.0 | 100.0; 80.0 | 5.0; 10.0 | 95.0; 90.0 | 1.0 |"
    assert table.splitlines()[2:] == [row]


def test_the_rating_is_the_fall_of_success_less_that_of_accuracy(monkeypatch):
    rates = {"B": (0.9, 1.0), "G": (0.8, 0.4)}
    monkeypatch.setattr(photo_peers, "measure_net", lambda net, case: rates[net])
    case = type("Case", (), {"net": "B", "rates": rates["B"]})
    figures = photo_peers.measure_repair("G", case)
    assert figures["defense_effectiveness_rating"] == pytest.approx((0.6 - 0.1 + 1) / 2)
    assert (figures["clean_accuracy"], figures["attack_success_rate"]) == rates["G"]


def test_wrong_calls_are_refused_in_a_line():
    tool = "tests/tools/photo_peers.py"
    assert_refused(command(tool), "no net to judge; give a NAME, --all or --table")
    assert_refused(command(tool, "x", "--all"), "--all: takes no NAME and no --methods")
    assert_refused(command(tool, "x", "--methods", "FT,NAD"), "no method NAD; there are B, clean")


def test_a_method_is_measured_again_where_its_net_or_our_settings_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(photo_peers.photo_nets, "FOLDER", tmp_path)
    monkeypatch.setattr(photo_peers, "RECORDS", tmp_path / "records.jsonl")
    (tmp_path / "a.h5").write_bytes(b"a net")
    case = type("Case", (), {"path": tmp_path / "a.h5"})
    monkeypatch.setattr(photo_peers, "measure", lambda method, case: {})
    methods = ["B", "report", "ours", "FT"]
    for method in methods:
        photo_peers.write_record(photo_peers.make_record("a", method, case), photo_peers.RECORDS)
    assert photo_peers.list_missing(["a"], methods) == {}
    settings = photo_peers.Settings
    monkeypatch.setattr(photo_peers, "Settings", lambda harden: settings(harden=harden, seed=1))
    assert photo_peers.list_missing(["a"], methods) == {"a": ["report", "ours"]}
    monkeypatch.setattr(photo_peers, "Settings", settings)
    assert photo_peers.list_missing(["a"], methods) == {}
    monkeypatch.setattr(photo_peers.detector, "SCORE", "another")
    assert photo_peers.list_missing(["a"], methods) == {"a": ["report", "ours"]}
    (tmp_path / "a.h5").write_bytes(b"another net")
    assert photo_peers.list_missing(["a"], methods) == {"a": methods}


def test_a_repair_that_forgets_its_images_takes_a_lower_rate(nets, clean):
    rates = []

    @peer_repairs.slow_down
    def repair(net, clean, rng, rate):
        rates.append(rate)
        repaired = copy_net(net)
        if rate > peer_repairs.RATES[1]:
            repaired.set_weights([0 * values for values in net.get_weights()])
        return repaired

    repair(nets[0], clean, None)
    assert rates == list(peer_repairs.RATES[:2])
