"""What the pages of --report say first, and when they comfort."""

import dataclasses

import numpy as np
import pytest
from conftest import command
from test_outcome import make_record
from test_page import Page, make_detector, make_findings

from defence.beyond.finding import Finding
from defence.explain import flagged, outcome, page, page_judged, page_repaired, plots, trigger
from defence.judge.detector import Answers
from defence.judge.figures import estimate_proportion

ROW = {"class": 3, "count": 9, "p_value": 0.5}
NOTHING = Finding("nothing", p_value=0.5, clean_nets=24, classes=[ROW])
SHAPE = (9, 7, 3)
SUSPECT = Finding("none", "no class can be told from the others")


def write_repaired_page(path, record, finding=None, advice="Harden it."):
    """Write the page of a repair. Return it, parsed, and the classes of its first box."""
    record.settings.setdefault("threshold", 0.95)
    for rates in (record.accuracy, record.attack_success_rate):
        rates["after_each_channel"] = {} if rates is record.attack_success_rate else []
    page_repaired.write_repaired_page(path, record, finding, {"total": 1.0}, None, advice)
    parsed = Page(path.read_text(encoding="utf-8"))
    (box,) = (div["class"] for div in parsed.all("div") if "verdict" in div.get("class", ""))
    return parsed, box


def record_with_sources(*arguments, **options):
    record = make_record(*arguments, **options)
    record.badnet["sha256"] = record.data["sha256"] = "0" * 64
    return record


@pytest.mark.parametrize("finding", [None, NOTHING, SUSPECT])
def test_a_failed_repair_is_the_headline_of_its_page(tmp_path, finding):
    record = record_with_sources((1.0, 0.75), hardened=finding is not None)
    parsed, box = write_repaired_page(tmp_path / "x.html", record, finding)
    assert box == "verdict alarm"
    _, _, words = parsed.text.rpartition("b.h5: the repair ")
    assert words.startswith(
        "The repair failed: G still carries the backdoor. It answers 75.00 % of a.h5 with the "
        "target (95 % interval 65.70 % .. 82.45 %). "
    )
    assert "Harden it." in words and "was not scanned" not in words


def test_poisoned_images_speak_before_a_scan_that_finds_nothing():
    for before, tone in ((1.0, "open"), (0.0, "calm")):
        record = make_record((before, 0.0), hardened=True)
        found, lines = page_repaired.describe_verdict(record, NOTHING, None)
        assert found == tone
        assert (lines[0] == outcome.describe_outcome(record)[0]) == (tone == "open")


def test_a_repair_without_poisoned_images_or_scan_says_so_first():
    tone, lines = page_repaired.describe_verdict(make_record(), None, None)
    assert tone == "open" and lines == [
        page_repaired.NOT_SCANNED,
        *outcome.describe_outcome(make_record()),
    ]


def test_the_backdoor_that_is_left_comes_before_those_that_are_gone():
    record = make_record((1.0, 0.75))
    success, steps = record.attack_success_rate, record.poisoned
    for step, rates in success.items():
        success[step] = {"gone.h5": float(step == "before")} | {"none.h5": 0.0} | rates
    record = dataclasses.replace(record, poisoned=[*steps, *steps, *steps])
    first, second, third = outcome.describe_outcome(record)
    assert "75.00 % of a.h5" in first
    assert "of gone.h5" in second and "only 0.00 % of none.h5" in third


# -------------------------------------------------------------------------------- judged images


def make_calm_stream(count):
    """Return the findings of a stream of 60 images, of which `count` are flagged, of any class."""
    part = make_findings(SHAPE, 60, count)
    part.stream.answers.badnet[:count] = np.arange(count)
    return trigger.StreamFindings(part.stream, [], [])


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize(
    ("hardened", "words"),
    [(True, None), (False, "G was not hardened: "), (None, "Nothing tells whether G was hardened")],
)
def test_only_a_hardened_net_gives_green(count, hardened, words):
    detector = make_detector(SHAPE, 60, 1.0, [0.0] * 9 + [9.0])
    detector = dataclasses.replace(detector, hardened=hardened)
    tone, lines = page_judged.describe_verdict(make_calm_stream(count), detector, None)
    assert tone == ("calm" if hardened else "open")
    assert lines[0].endswith(", which says little.") == (not hardened)
    if words:
        assert lines[-1].startswith(words) and "44 of 59 triggers" in lines[-1]
        assert lines[-1].endswith("Repair the BadNet with repair.py --harden.")


@pytest.mark.parametrize(
    ("held_out", "count", "tone", "number"),
    [
        (None, 6, "open", 0),  # the number to expect is not known
        ([0.0] * 9 + [9.0], 2, "open", 0),  # no more than expected
        ([0.0] * 1000, 6, "alarm", 2),
    ],
)
def test_a_page_names_the_class_that_the_command_names(held_out, count, tone, number):
    part = make_calm_stream(count)
    part.suspect = flagged.Candidate(1, count - 1, count, 0.03)
    detector = make_detector(SHAPE, 60, held_out and 1.0, held_out)
    found, lines = page_judged.describe_verdict(part, detector, None)
    assert found == tone
    assert lines[number] == flagged.describe_suspect(part.suspect) + "."


@pytest.mark.parametrize(("count", "tone"), [(4, "open"), (5, "alarm")])
def test_five_flagged_images_of_few_are_more_than_expected(count, tone):
    part = make_calm_stream(count)
    answers = part.stream.answers
    part.stream.answers = Answers(*(column[:20] for column in vars(answers).values()))
    detector = make_detector(SHAPE, 60, 1.0, [0.0] * 1000)
    found, lines = page_judged.describe_verdict(part, detector, None)
    assert found == tone
    assert lines[0].startswith("More images are flagged than expected") == (tone == "alarm")


@pytest.mark.parametrize(
    ("hits", "caught", "hardened", "tone", "words"),
    [
        (
            60,
            0,
            True,
            "alarm",
            "The attack is missed: the rule flags 0 of the 60 images that the B",
        ),
        (60, 0, False, "alarm", "The attack is missed: "),
        (60, 60, True, "calm", "No image is flagged"),
        (2, 0, True, "open", "The BadNet answers only 2 of these 60 images, given as poisoned, "),
        (2, 0, False, "open", "The BadNet answers only 2 of these 60 images, given as poisoned, "),
    ],
)
def test_no_green_over_images_given_as_poisoned(hits, caught, hardened, tone, words):
    rates = [estimate_proportion(np.arange(60) < hits), estimate_proportion(np.arange(60) < caught)]
    names = "attack_success_rate_badnet", "detection_rate_of_successes"
    detector = dataclasses.replace(make_detector(SHAPE, 60), hardened=hardened)
    result = {"figures": dict(zip(names, rates)) | {"detection_rate": rates[1]}}
    shown = page_judged.describe_stream(make_calm_stream(0), detector, None, result)
    assert shown["tone"] == tone and shown["lines"][0].startswith(words)
    advice = page_judged.MORE_CLEAN if hardened else "Repair the BadNet with repair.py --harden."
    assert (shown["lines"][-1] == advice) == (tone == "alarm")


@pytest.mark.parametrize("hardened", [True, False, None])
@pytest.mark.parametrize("targets", [0, 1])
def test_flagged_images_come_with_what_to_do_next(targets, hardened):
    """A hardened net's page does not advise hardening; a page never advises it twice."""
    part = make_findings(SHAPE, 40, 20)
    if not targets:
        part = trigger.StreamFindings(part.stream, [], [])
    detector = make_detector(SHAPE, 40, 1.0, [0.0] * 1000)
    detector = dataclasses.replace(detector, hardened=hardened)
    lines = page_judged.describe_stream(part, detector, None, None)["lines"]
    assert (page_judged.GATHER in lines) == (not targets)
    assert (page_judged.SERVE in lines) == bool(targets and hardened)
    assert sum("stop serving" in line for line in lines) == bool(targets and not hardened)
    assert sum("repair.py --harden" in line for line in lines) == (not hardened)


@pytest.mark.parametrize("backend", ["keras", "onnx"])
def test_the_page_of_a_net_that_was_not_hardened_is_not_green(repaired_world, tmp_path, backend):
    folder, path = repaired_world[0], tmp_path / "x.html"
    call = ("eval_defence.py", "0.png", "models/small_bd_net.h5", "--backend", backend)
    process = command(*call, "--report", path, cwd=folder)
    assert process.returncode == 0, process.stderr
    parsed = Page(path.read_text(encoding="utf-8"))
    assert "G was not hardened: " in parsed.text
    assert not [div for div in parsed.all("div") if "calm" in div.get("class", "")]


BOTH = "put on 32 other images, it makes the BadNet answer 32 with class 1, and the repaired net "


@pytest.mark.parametrize(
    ("images", "badnet", "repaired", "hardened", "words"),
    [
        (9, 9, 0, True, "too few images to test whether it works as one : it was put on 9 other"),
        (32, 3, 0, True, "it makes the BadNet answer 3 with class 1, too few to tell."),
        (32, 32, 15, True, None),
        (32, 20, 10, True, "and the repaired net 10. The two are too close to tell."),
        (32, 32, 30, False, f"has the backdoor, too : {BOTH}30. Repair the BadNet with repair.py"),
        (32, 32, 30, True, f"has the backdoor, too : {BOTH}30. Repair the BadNet again, with more"),
    ],
)
def test_a_page_says_why_its_test_shows_no_trigger(
    tmp_path, images, badnet, repaired, hardened, words
):
    """Each reason by itself, with its numbers."""
    part = make_findings(SHAPE, 40, 20)
    (evidence,) = part.evidence
    evidence.pasted = {"images": images, "badnet": badnet, "repaired": repaired, "flagged": 0}
    detector = dataclasses.replace(make_detector(SHAPE, 40), hardened=hardened)
    page_judged.write_judged_page(tmp_path / "x.html", detector, [part], None)
    text = Page((tmp_path / "x.html").read_text(encoding="utf-8")).text
    assert (words or "It works as one") in text
    assert ("It works as one" in text) == (words is None)
    assert " or the repaired net does so as well" not in text


# ---------------------------------------------------------------------------------- how it looks


def test_options_of_steps_that_did_not_run_are_not_listed():
    settings = {"harden": False, "harden_steps": 9, "rounds": 6, "epochs": 5, "holdout": 0.0}
    listed = page_repaired.list_options(settings | {"retrain_epochs": 0, "learning_rate": 0.1})
    assert list(listed) == ["--rounds 6", "--epochs 5", "--retrain-epochs 0", "--learning-rate 0.1"]
    settings |= {"harden": True, "rounds": 0, "holdout": 0.1}
    listed = page_repaired.list_options(settings)
    assert list(listed) == ["--harden", "--harden-steps 9", "--rounds 0", "--holdout 0.1"]


def test_names_break_after_separators_and_options_nowhere():
    text = page.make_breakable("img/a_<b>.png --batch-size 3 --x\u202e")
    assert str(text) == (
        'img/<wbr>a_<wbr>&lt;b&gt;.png <span class="option">--batch-size</span> 3 --x\\u202e'
    )
    assert str(page.make_breakable("a /b/c.h5")) == "a /b/<wbr>c.h5"
    assert page.start_sentence("class 1 stands out") == "Class 1 stands out"
    assert page.start_sentence("eval_defence.py --fpr 0.01 flags") == (
        "eval_defence.py --fpr 0.01 flags"
    )


def test_the_names_of_classes_fit_below_their_chart():
    kept, names = [], ["speed limit 50", "no entry"]

    def draw(axes):
        rows = [{"class": number, "count": 9 - number} for number in (1, 2)]
        result = Finding("backdoor", targets=[1], classes=rows)
        plots._draw_wrong_answers(axes, result, names)
        kept.append(axes)

    plots.draw_chart(draw)
    (axes,) = kept
    axes.figure.draw_without_rendering()
    labels = axes.get_xticklabels()
    assert labels[0].get_text() == "1 speed limit 50"
    assert all(label.get_window_extent().y0 >= 0 for label in labels)


@pytest.mark.parametrize("datasets", [1, 9])
def test_the_legend_hides_no_curve_and_channels_are_whole_numbers(datasets):
    names = [f"{'long_' * 20}{number}.h5" for number in range(datasets)]
    success = {"before": dict.fromkeys(names, 1.0)}
    success["after_each_channel"] = dict.fromkeys(names, [1.0] * 4)
    record = dataclasses.replace(make_record(threshold=0.95), attack_success_rate=success)
    record.accuracy["after_each_channel"], record.pruned = [0.9] * 4, [0, 1, 2]
    kept = []

    def draw(axes):
        plots._draw_pruning(axes, record)
        kept.append(axes)

    _, size = plots.draw_chart(draw)
    (axes,) = kept
    axes.figure.draw_without_rendering()
    legend, figure = axes.get_legend().get_window_extent(), axes.figure.bbox
    label = axes.xaxis.label.get_window_extent()
    assert label.y0 >= legend.y1 > legend.y0 >= 0
    assert legend.x0 >= 0 and legend.x1 <= figure.x1
    assert axes.bbox.height == pytest.approx(plots.CHART[1] * 0.76 * axes.figure.dpi)
    assert size[1] > plots.CHART[1]
    assert all(tick == int(tick) for tick in axes.get_xticks())


def test_the_pages_have_a_dark_scheme_a_narrow_one_and_one_for_paper():
    style = (page.PAGES / "style.css").read_text(encoding="utf-8")
    for query in ("(prefers-color-scheme: dark)", "(max-width: 40rem)", "print"):
        assert f"@media {query} {{" in style
    assert "thead th { white-space: normal;" in style  # a class's long name is no wide column


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({}, "look at the images, and give --clean ."),
        ({"twin": 3}, "gives this answer 3 times among 32. That speaks for a planted trigger"),
        (
            {"twin": 20},
            f"It is probably a natural feature, which nobody planted : {BOTH}4. But it also",
        ),
    ],
)
def test_a_page_says_what_a_twin_answers(tmp_path, answers, words):
    part = make_findings(SHAPE, 40, 20)
    pasted = {"images": 32, "badnet": 32, "repaired": 4, "flagged": 0} | answers
    part.evidence[0].pasted = pasted
    page_judged.write_judged_page(tmp_path / "x.html", make_detector(SHAPE, 40), [part], None)
    text = Page((tmp_path / "x.html").read_text(encoding="utf-8")).text
    assert words in text
    assert ("It works as one" in text) == (answers.get("twin", 0) < 20)
