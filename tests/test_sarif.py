"""The finding as SARIF: its rules and results, its paths, and the command that writes it."""

import json
import re
from pathlib import Path

import pytest
import test_scan
from conftest import B, assert_refused, command
from test_scan import NETS, TARGET

from defence.beyond import finding
from defence.beyond.finding import Finding
from defence.explain import finding_words, sarif
from defence.judge.record import VERSION
from defence.load.models import ModelFile

folder, small_nets = test_scan.folder, test_scan.small_nets  # fixtures
NET = ModelFile(Path("models/net.h5"), b"weights", 100)
CLASSES = 40
ROW = {
    **{"count": 2475, "ratio": 150.0, "way": "maps", "value": 0.3, "usual": 0.01},
    **{"score": 9.0, "p_value": 0.025},
}
NAMES = [f"person {number}" for number in range(1, CLASSES + 1)]


def make_finding(targets=(), shift=None):
    """Make a Finding of CLASSES classes, in which the targets come first."""
    order = [*targets, *(number for number in range(1, CLASSES + 1) if number not in targets)]
    rows = [{"class": number} | ROW for number in order]
    answer = "backdoor" if targets or shift else "nothing"
    return Finding(answer, None, 0.025, 39, 0.05, list(targets), shift, 0.025, 21068, rows)


def make_run(result, names=None, net=NET):
    """Return the only run of a log, as whoever parses its JSON gets it."""
    log = json.loads(json.dumps(sarif.make_log(result, names, net), allow_nan=False))
    assert log["version"] == "2.1.0" and "2.1.0" in log["$schema"]
    (run,) = log["runs"]
    return run


# ------------------------------------------------------------------------------- the results


def test_each_target_is_a_result():
    """Also beyond the ten that the command prints."""
    targets = [5, 40, *range(10, 20)]
    result = make_finding(targets)
    results = make_run(result, NAMES)["results"]
    assert [one["properties"]["class"] for one in results] == targets
    *lines, _ = finding_words.describe_finding(result, NAMES)
    assert [one["message"]["text"] for one in results][: len(lines)] == lines
    first = results[0]
    assert first["ruleId"] == "backdoor-target" and first["level"] == "error"
    assert first["properties"] == {
        **{"class": 5, "class_name": "person 5", "wrong": 21068, "clean_nets": 39},
        **ROW,
    }
    (location,) = first["locations"]
    assert location["physicalLocation"]["artifactLocation"]["uri"] == "models/net.h5"


def test_a_shift_is_a_result():
    result = make_finding(shift=1)
    (one,) = make_run(result)["results"]
    assert one["ruleId"] == "backdoor-shift" and one["level"] == "error"
    assert [one["message"]["text"], finding_words.ADVICE] == list(
        finding_words.describe_finding(result)
    )
    assert one["properties"]["shift"] == 1 and one["properties"]["p_value"] == 0.025
    both = make_run(make_finding([3], shift=1))["results"]
    assert [one["ruleId"] for one in both] == ["backdoor-target", "backdoor-shift"]


def test_a_net_that_cannot_be_judged_is_a_note():
    (one,) = make_run(Finding("none", "it is raining"))["results"]
    assert one["ruleId"] == "scan-cannot-tell" and one["level"] == "note"
    assert one["message"]["text"] == "no finding about a backdoor: it is raining"
    assert one["properties"] == {"reason": "it is raining"}


def test_where_nothing_stands_out_the_list_of_results_is_empty():
    run = make_run(make_finding())
    assert run["results"] == [] and run["invocations"] == [{"executionSuccessful": True}]
    (artifact,) = run["artifacts"]
    assert artifact["hashes"] == {"sha-256": NET.sha256} and artifact["length"] == 7


def test_a_result_is_known_again_by_the_net_and_the_class():
    def list_fingerprints(result, names=None, net=NET):
        return [one["partialFingerprints"] for one in make_run(result, names, net)["results"]]

    five, six, shift = list_fingerprints(make_finding([5, 6], shift=1))
    (none,) = list_fingerprints(Finding("none", "it is raining"))
    assert len({one["modelAndClass/v1"] for one in (five, six, shift, none)}) == 4
    again = make_finding([5])
    again.wrong, again.classes[0]["count"] = 1, 1
    assert list_fingerprints(again, NAMES) == [five]
    assert list_fingerprints(again, net=ModelFile(Path("elsewhere.h5"), b"weights", 9)) == [five]
    assert list_fingerprints(again, net=ModelFile(NET.path, b"other", 100)) != [five]
    for one in (five, six, shift, none):
        assert set(one.values()) == {one["primaryLocationLineHash"]}


# ------------------------------------------------------------- what a code host shows and runs


def test_rules_have_stable_names_and_say_what_to_do():
    driver = make_run(make_finding())["tool"]["driver"]
    assert driver["version"] == VERSION and driver["name"]
    levels = {rule["id"]: rule["defaultConfiguration"]["level"] for rule in driver["rules"]}
    assert levels == {
        **{"backdoor-target": "error", "backdoor-shift": "error"},
        **{"scan-cannot-tell": "note"},
    }
    for rule in driver["rules"]:
        for key in ("shortDescription", "fullDescription", "help"):
            assert 20 < len(rule[key]["text"]) < 1000 and rule[key]["text"].endswith(".")
        assert "--harden" in rule["help"]["text"] and "helpUri" not in rule


@pytest.mark.parametrize(
    ("path", "uri"),
    [
        ("./models/a b#1%.h5", "models/a%20b%231%25.h5"),
        ("c:x.h5", "c%3Ax.h5"),  # else c would be a scheme
        ("\u00e9\udcff.h5", "%C3%A9%FF.h5"),
        ("/nets/a b.h5", "file:///nets/a%20b.h5"),
    ],
)
def test_the_path_of_the_net_is_a_uri_as_it_was_given(path, uri):
    run = make_run(make_finding([5]), net=ModelFile(Path(path), b"weights", 100))
    (one,) = run["results"]
    location = one["locations"][0]["physicalLocation"]["artifactLocation"]
    assert location["uri"] == run["artifacts"][0]["location"]["uri"] == uri
    assert ("uriBaseId" in location) != path.startswith("/")
    assert run["automationDetails"]["id"] == f"{uri}/"


def test_a_name_of_a_class_makes_no_link_no_placeholder_and_no_control_character():
    name = "[all is well](https://x.example) {0}\x1b[2J\u202e"
    (one,) = make_run(make_finding([5]), [name] * CLASSES)["results"]
    text = one["message"]["text"]
    assert "](" not in text and "{{0}}" in text and text.isprintable()
    assert one["properties"]["class_name"] == name


# -------------------------------------------------------------------------------- the command


@pytest.mark.slow
@pytest.mark.whole_scan
def test_a_scan_writes_its_finding_as_sarif(folder, tmp_path, small_nets):
    path = tmp_path / "scan.sarif"
    process = command(
        "repair.py", NETS["backdoored"], "clean.h5", "--scan", "--sarif", path, cwd=folder
    )
    assert process.returncode == 3, process.stderr
    text = path.read_text()
    (run,) = json.loads(text)["runs"]
    assert run["results"][0]["properties"]["class"] == TARGET + 1
    assert [one["message"]["text"] for one in run["results"]] == process.stdout.splitlines()[:-1]
    assert str(folder) not in text and not re.search(r"\d\d:\d\d|20\d\d-", text)


def test_the_log_goes_to_stdout_and_is_the_same_each_time(deepid_world):
    call = ("repair.py", B, "clean.h5", "--scan", "--sarif")
    first, second = (command(*call, "-", cwd=deepid_world) for _ in range(2))
    assert first.returncode == 4 and first.stdout == second.stdout
    (run,) = json.loads(first.stdout)["runs"]
    (one,) = run["results"]
    assert one["ruleId"] == "scan-cannot-tell" and one["message"]["text"] in first.stderr
    assert_refused(command(*call, "-", "--json", "-", cwd=deepid_world), "cannot both go to stdout")
    for path in (B, "clean.h5", "models/labels.txt"):
        refusal = f"{path}: would overwrite an input; choose another --sarif"
        assert_refused(command(*call, path, cwd=deepid_world), refusal)


def test_a_hardened_repair_writes_it_too(deepid_world, tmp_path, monkeypatch):
    monkeypatch.setattr(finding, "scan_net", lambda net, seed: make_finding([5]))
    call = ("repair.py", B, "clean.h5", "--output", tmp_path / "G.h5", "--no-export")
    call += ("--harden", "--harden-steps", "2", "--rounds", "1", "--sarif", "-")
    process = command(*call, cwd=deepid_world)
    assert process.returncode == 0, process.stderr
    (one,) = json.loads(process.stdout)["runs"][0]["results"]
    assert one["properties"]["class"] == 5 and one["message"]["text"] in process.stderr


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ((), "--sarif: does nothing without --scan or --harden"),
        (("--check",), "--sarif: does nothing with --check"),
    ],
)
def test_without_a_scan_sarif_is_refused(options, problem, deepid_world, tmp_path):
    process = command(
        "repair.py", B, "clean.h5", *options, "--sarif", tmp_path / "x", cwd=deepid_world
    )
    assert_refused(process, problem)
    assert not list(tmp_path.iterdir())
