"""The pages of --report: their text, and that hostile names in them stay text."""

import base64
import hashlib
import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import ROOT, assert_refused, command
from PIL import Image

from defence.explain import flagged, page, page_judged, plots, streams, trigger
from defence.judge import figures
from defence.judge.detector import Answers, Detector

HOSTILE = "<script>alert(1)</script>\n\"'&{{ 7*7 }}\u202e$\\frac$\udcff"
DEMO = ROOT / "img" / "demo"
MODEL = ROOT / "models" / "demo_bd_net.h5"
DATA = ROOT / "data" / "demo_clean_validation_data.h5"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
VOID = {"meta", "img", "br", "wbr"}


class Page(html.parser.HTMLParser):
    """A parsed page: its elements and its text. Every opened element must be closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open, self.glued = [], [], [], 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.elements[-1:] == [("wbr", {})] and self.open and self.glued < len(self.elements):
            self.texts[-1] += text  # a name that may break here is one word
            self.glued = len(self.elements)
        else:
            self.texts.append(text)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def assert_sound(text):
    """Assert that a page is one file, describes its images, and forbids scripts and the network."""
    parsed = Page(text)
    assert not {"script", "iframe", "object", "link", "form"} & {tag for tag, _ in parsed.elements}
    for tag, attributes in parsed.elements:
        assert not any(name.startswith("on") or name == "style" for name in attributes), tag
    for image in parsed.all("img"):
        assert image["src"].startswith(("data:image/png;base64,", "data:image/svg+xml;base64,"))
        assert int(image["width"]) > 0 and int(image["height"]) > 0 and image["alt"]
        assert b"<script" not in base64.b64decode(image["src"].partition(",")[2])
    style = re.search("<style>(.*)</style>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = parsed.all("meta")[1]["content"]
    assert f"style-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none'")
    levels = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:]))
    return parsed


def make_detector(shape, classes, threshold=1.0, held_out=(0.1, 0.2, 3.0)):
    hashes = {"badnet": "0" * 64}
    return Detector(None, classes, shape, threshold, "x.onnx", hashes, held_out, hardened=True)


def make_findings(shape, classes, bad, target=0, name="image {}".format, path=None):
    """Return the StreamFindings of 60 images, `bad` of them flagged, all with the target."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 250, (60, *shape)).astype(np.float32)
    images[:bad, : shape[0] // 3, : shape[1] // 3] = 250  # the trigger
    badnet = np.where(np.arange(60) < bad, target, 1 + np.arange(60) % (classes - 1))
    score = np.where(np.arange(60) < bad, 9, 0.1).astype(np.float32)
    answers = Answers(badnet, 1 + np.arange(60) % (classes - 1), score, np.arange(60) < bad)
    stream = streams.Stream(path, shape, classes, answers, lambda rows: images[rows], name)
    unusual = flagged.find_candidates(badnet, answers.flagged, classes)

    def judge(x):
        triggered = x[:, : shape[0] // 3, : shape[1] // 3].min(axis=(1, 2, 3)) == 250
        score = np.where(triggered, 9, 0.1).astype(np.float32)
        return Answers(np.where(triggered, target, 1), np.ones(len(x), int), score, triggered)

    return trigger.find_targets(stream, unusual, judge)


def write_page(path, *arguments):
    """Write a page of verdicts. Return its text."""
    page_judged.write_judged_page(path, *arguments)
    return path.read_text(encoding="utf-8")


def test_hostile_names_stay_text(tmp_path):
    """They name images, classes, and files that could not be read."""
    shape, class_names = (12, 10, 3), [HOSTILE] * 40
    part = make_findings(shape, 40, 20, name=lambda i: HOSTILE)
    text = write_page(
        tmp_path / "x.html", make_detector(shape, 40), [part], class_names, [HOSTILE] * 3, 3
    )
    parsed = assert_sound(text)
    assert "It works as one" in parsed.text and "within the region" in parsed.text
    assert "<script>alert(1)</script>\\n" in parsed.text and "{{ 7*7 }}\\u202e" in parsed.text
    assert "\\udcff" in parsed.text and "\u202e" not in text


def test_a_dataset_with_a_hostile_name_has_its_charts(tmp_path):
    shape = (8, 8, 1)
    path = tmp_path / "a$b$\\frac$ <i>.h5"
    parsed = assert_sound(
        write_page(
            tmp_path / "x.html",
            make_detector(shape, 5),
            [make_findings(shape, 5, 9, path=path)],
            None,
        )
    )
    assert "a$b$\\frac$ <i>.h5" in parsed.text
    assert [image for image in parsed.all("img") if image["src"].startswith("data:image/svg")]


@pytest.mark.parametrize("bad", [0, 1, 60])
def test_no_flagged_image_one_and_all(tmp_path, bad):
    shape = (9, 7, 3)
    text = write_page(
        tmp_path / "x.html", make_detector(shape, 30), [make_findings(shape, 30, bad)], None
    )
    parsed = assert_sound(text)
    assert f"{bad} of 60 images flagged" in parsed.text
    assert ("no sign of poisoned images" in parsed.text) == (bad == 0)
    assert ("Some of these images are" in parsed.text) == (bad == 60)


def test_no_image_at_all(tmp_path):
    shape, nothing = (4, 4, 3), np.empty(0)
    answers = Answers(nothing.astype(int), nothing.astype(int), np.float32(nothing), nothing > 0)
    stream = streams.Stream(None, shape, 9, answers, lambda rows: np.empty((0, *shape)), str)
    unread = [f"{i}.png: cannot be read" for i in range(50)]
    text = write_page(
        tmp_path / "x.html",
        make_detector(shape, 9),
        [trigger.StreamFindings(stream, [], [])],
        None,
        unread,
        80,
    )
    parsed = assert_sound(text)
    assert "Could not be read: 80" in parsed.text and "The first 50 are shown." in parsed.text
    assert "No image could be judged." in parsed.text and "no sign" not in parsed.text


def test_a_page_of_large_images_and_a_thousand_classes_is_small(tmp_path):
    shape, class_names = (224, 224, 3), [f"class number {i}" for i in range(1283)]
    path = tmp_path / "x.html"
    assert_sound(
        write_page(
            path, make_detector(shape, 1283), [make_findings(shape, 1283, 40)] * 3, class_names
        )
    )
    assert path.stat().st_size < 5e6


def test_only_a_proven_trigger_is_called_a_trigger(tmp_path):
    """The region is all over the image, at one place, or nowhere."""
    shape, everywhere = (12, 10, 3), np.ones((12, 10), bool)
    part = make_findings(shape, 40, 20)
    (evidence,) = part.evidence
    for region, words in (
        (evidence.region, "within one region"),
        (everywhere, "all over the image"),
        (~everywhere, "nothing in common"),
    ):
        evidence.region = region
        evidence.pasted = evidence.covered = {"images": 9, "badnet": 9, "repaired": 0, "flagged": 0}
        parsed = assert_sound(
            write_page(tmp_path / "x.html", make_detector(shape, 40), [part], None)
        )
        assert words in parsed.text and "It works as one" not in parsed.text
        assert ("too few images to test whether it works" in parsed.text) == region.any()


@pytest.mark.parametrize("held_out", [None, [0.0] * 1000])
def test_the_expected_number_of_flagged_images_is_shown_where_it_is_known(tmp_path, held_out):
    shape = (9, 7, 3)
    detector = make_detector(shape, 30, None if held_out is None else 1.0, held_out)
    text = Page(
        write_page(tmp_path / "x.html", detector, [make_findings(shape, 30, 30)], None)
    ).text
    assert ("is not known" in text) == (held_out is None)
    assert ("of clean images, expect 0 (95 % interval: 0 to 1)." in text) == (held_out is not None)


def test_the_expected_number_is_the_one_that_was_asked_for(tmp_path):
    """So 99 held-out images and a rate of 1 % give 6 of 600 on average."""
    held_out = np.random.default_rng(0).exponential(1, 99)
    threshold = figures.choose_threshold(held_out, 0.01)
    mean, low, high = flagged.predict_flagged(held_out, threshold, 600)
    assert mean == pytest.approx(6) and low < 6 < high
    rule = make_detector((9, 7, 3), 30, threshold, held_out.tolist()).rule
    assert rule.endswith(
        "0 of 99 held-out clean images exceed, and at most 1.00 % of new ones on average"
    )


def test_more_flagged_than_expected_of_no_class_is_said(tmp_path):
    shape, held_out = (9, 7, 3), [0.0] * 1000
    part = make_findings(shape, 60, 30)
    part.stream.answers.badnet[:30] = np.arange(30)
    part = trigger.StreamFindings(part.stream, [], [])
    text = Page(
        write_page(tmp_path / "x.html", make_detector(shape, 60, 1.0, held_out), [part], None)
    ).text
    assert "More images are flagged than expected of clean ones, but no class stands out." in text


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_of_any_channels_are_shown(channels):
    for size in ((1, 1), (3, 200), (500, 40)):
        image = page.make_image(np.full((*size, channels), 300.0))
        assert max(image.width, image.height) == page.SHOWN_SIDE
        assert min(image.width, image.height) >= 1


def test_a_formula_in_a_name_stays_text():
    assert plots.escape_formulas("a$x$\n\udcff") == "a\\$x\\$\\n\\udcff"


# ----------------------------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Return the folder of the demo's two pages: of its repair, and of verdicts on its images."""
    folder = tmp_path_factory.mktemp("reports")
    process = command(
        "repair.py", MODEL, DATA, "--output", folder / "g.h5", "--report", folder / "repair.html"
    )
    assert process.returncode == 0
    assert f"Saved page: {folder / 'repair.html'}" in process.stdout
    assert not list(folder.glob(".*")), "an unfinished file is left"
    images = sorted(DEMO.glob("clean_*.png")) + sorted(DEMO.glob("sunglasses_*.png")) * 3
    process = command(
        "eval_defence.py", *images, MODEL, "--repaired", folder / "g.h5",
        "--report", folder / "judged.html", "--json", folder / "judged.json",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return folder


def test_the_demo_page_agrees_with_json(reports):
    parsed = assert_sound((reports / "judged.html").read_text(encoding="utf-8"))
    (candidate,) = json.loads((reports / "judged.json").read_text())["standing_out"]
    assert candidate["target"] == 1 and {"region", "is_trigger"} <= candidate.keys()
    assert "images are probably poisoned: the target is class 1." in parsed.text
    assert ("It works as one" in parsed.text) == candidate["is_trigger"]
    assert f"{candidate['hits']} of {candidate['flagged']} flagged images" in parsed.text


def test_the_page_of_a_repair_names_the_rule_of_its_rates(tmp_path):
    call = ("repair.py", MODEL, DATA, "--output", tmp_path / "g.h5", "--no-export", "--rounds", 0)
    path = tmp_path / "repair.html"
    process = command(*call, "--holdout", 0.25, "--report", path)
    assert process.returncode == 0, process.stderr
    text = assert_sound(path.read_text(encoding="utf-8")).text
    assert "false-positive rate (B and G disagree)" in text
    assert "… expected with --fpr 0.01" in text
    assert "eval_defence.py --fpr 0.01 flags by the anomaly score" in text


def test_the_page_of_a_repair_tells_its_steps(reports):
    parsed = assert_sound((reports / "repair.html").read_text(encoding="utf-8"))
    assert "channels of conv_3" in parsed.text and "fine-tuned" in parsed.text
    assert "does not prove that the backdoor is gone" in parsed.text
    assert len(parsed.all("img")) == 2  # no finding without --scan or --harden


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x.pdf", "a page's name ends in .html"),
        ("missing/x.html", "there is no folder"),
        ("clean_1.html", "would overwrite"),
    ],
)
def test_a_page_that_cannot_be_written_is_refused_before_the_work(reports, tmp_path, name, words):
    image = tmp_path / "clean_1.html"  # an image, whatever its name
    Image.new("RGB", (47, 55)).save(image, "PNG")
    call = (image, MODEL, "--repaired", reports / "g.h5", "--report", tmp_path / name)
    assert_refused(command("eval_defence.py", *call), words)


def test_a_page_of_an_export_is_refused(reports):
    call = ("eval_defence.py", MODEL, "--repaired", reports / "g.h5", "--export")
    assert_refused(command(*call, "--report", "x.html"), "--export goes with a MODEL alone")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("name", ["repair.html", "judged.html"])
def test_a_browser_opens_the_page_without_an_error_or_a_request(reports, tmp_path, name):
    shot, log = tmp_path / "shot.png", tmp_path / "net.json"
    process = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
            *("--window-size=1280,2000", f"--screenshot={shot}", f"--log-net-log={log}"),
            *("--disable-background-networking", "--disable-component-update"),
            f"--user-data-dir={tmp_path / 'user'}",
            (reports / name).as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ":CONSOLE" not in process.stderr, process.stderr
    pixels = np.asarray(Image.open(shot).convert("L"))
    assert pixels.shape == (2000, 1280) and pixels.std() > 10
    requested = re.findall(r'"url":"(https?://[^/"]+)', log.read_text())
    browser = re.compile(r"[/.](google|gvt1|googleapis)\.com$")  # requested by any page
    assert not [url for url in requested if not browser.search(url)], requested
