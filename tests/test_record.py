"""The repair record: its threshold, and the records that are refused."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import write_record

from defence.base.errors import InputError
from defence.judge import detector, record


@pytest.fixture
def make(tmp_path):
    """Return a function of held-out scores and other values that returns a RepairRecord."""
    (tmp_path / "b.h5").write_bytes(b"a net")

    def make(scores=None, **changes):
        if scores is not None:
            changes["holdout"] = {"images": len(scores), "score": detector.SCORE, "scores": scores}
        return record.parse_record(write_record(tmp_path / "b.h5", **changes), "g.h5")

    return make


def test_a_saturated_score_is_valid(make):
    """The largest score, as the nets give it in float32, is not above MAX_SCORE."""
    zero = np.eye(2, dtype=np.float32)
    most = np.asarray(detector.score_anomaly(zero, zero[::-1])).tolist()
    assert most == [detector.MAX_SCORE] * 2
    assert make([0.0, 1.0, most[0]]).threshold(0.5, "g.h5") == 1.0
    assert make([most[0]] * 3).threshold(0.5, "g.h5") == detector.MAX_SCORE


def test_the_threshold_is_the_score_that_new_images_exceed_at_the_rate(make):
    scores = sorted(np.random.default_rng(0).random(99).tolist())
    for rate, above in ((0.01, 0), (0.02, 1), (0.07, 6), (0.29, 28), (0.295, 28), (1, 98)):
        assert make(scores).threshold(rate, "g.h5") == scores[-1 - above]
    with pytest.raises(InputError) as refused:
        make(scores[:98]).threshold(0.01, "g.h5")
    assert str(refused.value) == (
        "g.h5: --fpr 0.01 needs 99 held-out clean images, and the repair held out 98; give --fpr "
        "0.0102 or more, or repair the BadNet again with a larger --holdout"
    )
    assert make(scores[:98]).threshold(0.0102, "g.h5") == scores[97]
    with pytest.raises(InputError, match="repair.py MODEL DATA --holdout"):
        make().threshold(0.5, "g.h5")


@pytest.mark.parametrize(
    "scores", [[], [1.0, 0.5], [-1.0], [detector.MAX_SCORE + 1e-3], ["a"], [True, 2.0], "scores"]
)
def test_damaged_scores_are_refused(make, scores):
    with pytest.raises(InputError, match="its repair record is damaged"):
        make(scores).threshold(0.9, "g.h5")


def test_a_record_survives_writing_and_reading(make):
    original = make([0.5, 1.0])
    assert record.parse_record(original.to_json(), "g.h5") == original
    assert record.parse_record("null", "g.h5") is None
    for key in ("layer", "badnet", "settings", "pruned", "input_scale"):
        values = dataclasses.asdict(original)
        del values[key]
        with pytest.raises(InputError, match="its repair record is damaged"):
            record.parse_record(json.dumps(values), "g.h5")


@pytest.mark.parametrize("key", ["holdout", "finding"])
def test_optional_values_are_objects_or_none(make, key):
    values = dataclasses.asdict(make())
    absent = json.dumps({name: value for name, value in values.items() if name != key})
    for text in (absent, json.dumps(values | {key: None})):
        assert getattr(record.parse_record(text, "g.h5"), key) is None
    assert getattr(record.parse_record(json.dumps(values | {key: {}}), "g.h5"), key) == {}
    for value in ([], "", 0, False):
        with pytest.raises(InputError, match="its repair record is damaged"):
            record.parse_record(json.dumps(values | {key: value}), "g.h5")


def test_poisoned_datasets_are_a_list_or_absent(make):
    """Older records have none."""
    assert make().poisoned is None
    assert make(poisoned=[]).poisoned == []
    with pytest.raises(InputError, match="its repair record is damaged"):
        make(poisoned={})


def test_names_of_datasets_differ_where_their_contents_do():
    def name(*pairs):
        return record.name_datasets([{"file": file, "sha256": digest} for file, digest in pairs])

    one, two, near = "1" * 64, "2" * 64, "1" * 63 + "2"
    assert name() == []
    assert name(("a", one), ("b", one)) == ["a", "b"]
    assert name(("a", one), ("b", one), ("a", one)) == ["a", "b", "a"]
    shared = [("a", one), ("b", one), ("a", two), ("a", one)]
    assert name(*shared) == ["a (11111111)", "b", "a (22222222)", "a (11111111)"]
    for pairs in (
        [("a", one), ("a", near)],
        [("a", one), ("a", two), ("a (11111111)", two)],
        [("a", one), ("a", two), (f"a ({one})", two)],
        [("a", one), ("a", near), (f"a ({one})", two)],
    ):
        assert len({*name(*pairs)}) == len(pairs)


@pytest.mark.parametrize("key, value", [("layer", 1), ("order", {}), ("moved", []), ("data", None)])
def test_values_of_another_type_are_refused(make, key, value):
    values = dataclasses.asdict(make()) | {key: value}
    with pytest.raises(InputError, match="its repair record is damaged"):
        record.parse_record(json.dumps(values), "g.h5")


def test_a_number_that_json_does_not_have_is_not_written(make):
    with pytest.raises(ValueError):
        dataclasses.replace(make(), mean_activation=[float("nan")]).to_json()
