"""The page of eval_defence.py --report: the flagged images, the class behind them, the trigger."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from defence.base.text import format_count, format_percent, number_class
from defence.explain import flagged, outcome, page, plots, streams, tables, trigger
from defence.load.class_names import name_class

if TYPE_CHECKING:
    from defence.base.limits import Name
    from defence.explain.flagged import Candidate
    from defence.explain.streams import Stream
    from defence.explain.trigger import StreamFindings, TriggerEvidence
    from defence.judge.detector import Detector

NETS = {"badnet": "BadNet", "repaired": "repaired net"}
FEW = 50  # among fewer images, less than trigger.FEWEST flagged ones say little
MISTAKEN = "They may be poisoned, or clean and flagged by mistake."
HARDEN = "Repair the BadNet with repair.py --harden"
SERVE = (
    "Look at the images below. If they carry a trigger, do not serve the BadNet alone: serve the "
    "file that eval_defence.py --export writes, which flags such images."
)
GATHER = (
    "Look at the images below, and judge more images from where they came: the page can name a "
    "target once some ten poisoned images of it are flagged."
)
MORE_CLEAN = "Use neither net on images that others can choose, or repair with more clean images."
MISSED = 0.5  # a lower detection rate of successful attacks misses the attack
SOME = 12  # flagged images outside the examined classes that are shown, at most


def write_judged_page(
    path: Name,
    detector: Detector,
    findings_list: Sequence[StreamFindings],
    class_names: list[str] | None,
    unread: Sequence[str] = (),
    unread_count: int = 0,
    results: dict | None = None,
) -> None:
    """Write the page.

    unread: why images could not be read, the first of the unread_count reasons.
    results: the figures of datasets, as in eval_defence.py's JSON.
    """
    flags = np.concatenate([findings.stream.answers.flagged for findings in findings_list])
    dataset_results: list[dict | None] = [None] * len(findings_list)
    if results:
        dataset_results = [results["clean"], *results["poisoned"]]
    nets = {f"{NETS[net]}, SHA-256": digest for net, digest in detector.sha256.items()}
    page.write_page(
        path,
        "judged.html",
        title=describe_flagged(flags),
        streams=[
            describe_stream(findings, detector, class_names, result)
            for findings, result in zip(findings_list, dataset_results)
        ],
        charts=[
            page.make_chart(*chart)
            for chart in plots.draw_judged_charts(findings_list, detector.threshold, results)
        ],
        rule=detector.rule,
        unread=unread,
        unread_count=unread_count,
        provenance=page.describe_provenance(detector=str(detector.path), **nets),
    )


def describe_flagged(flags: np.ndarray) -> str:
    """Say how many images are flagged. flags: bool (n,), whether each is."""
    images = "image" if len(flags) == 1 else "images"
    return f"{flags.sum():,} of {len(flags):,} {images} flagged"


def describe_stream(
    findings: StreamFindings, detector: Detector, class_names: list[str] | None, result: dict | None
) -> dict:
    """Return what the page shows of a stream. result: the dataset's, with its figures."""
    stream, evidence = findings.stream, findings.evidence
    targets = [candidate.target - 1 for candidate in findings.candidates[: len(evidence)]]
    outside = ~np.isin(stream.answers.badnet, targets)
    unexplained = streams.select_highest(stream.answers, outside, None)
    tone, lines = describe_verdict(findings, detector, class_names)
    lines += advise(tone, lines, findings, detector.hardened)
    if result and "detection_rate" in result["figures"] and not findings.candidates:
        tone, lines = describe_given(result["figures"], detector.hardened, tone, lines)
    return {
        "name": stream.path and str(stream.path),
        "count": len(stream.answers.score),
        "tone": tone,
        "lines": lines,
        "targets": [
            describe_target(stream, candidate, target_evidence, class_names, detector.hardened)
            for candidate, target_evidence in zip(findings.candidates, evidence)
        ],
        "unexplained": [
            describe_image(stream, row, pixels, class_names, findings.attributions.get(row))
            for row, pixels in zip(*streams.fetch_images(stream, unexplained[:SOME]))
        ],
        "unexplained_count": len(unexplained),
        "figures": result and list(list_figures(result["figures"], detector.threshold)),
    }


def describe_verdict(
    findings: StreamFindings, detector: Detector, class_names: list[str] | None
) -> tuple[str, list[str]]:
    """Return the page's first words on a stream: ("alarm", "open" or "calm", lines of text)."""
    flags = findings.stream.answers.flagged
    if not len(flags):
        return "open", ["No image could be judged."]
    usual, summary = None, describe_flagged(flags)
    if detector.held_out is None or detector.threshold is None:
        unknown = "the number to expect of clean images is not known"
        summary += f"; {unknown} (repair.py --holdout 0.1, --fpr)."
    else:
        usual, low, high = flagged.predict_flagged(
            detector.held_out, detector.threshold, len(flags)
        )
        summary += f"; of clean images, expect {usual:,.0f} (95 % interval: {low:,} to {high:,})."
    if findings.candidates:
        numbers = [label_class(row.target, class_names) for row in findings.candidates]
        targets = "targets are classes" if len(numbers) > 1 else "target is class"
        first = f"Some of these images are probably poisoned: the {targets} {', '.join(numbers)}."
        reasons = [
            flagged.describe_candidate(candidate, find_name(candidate.target, class_names))
            for candidate in findings.candidates
        ]
        return "alarm", [first, summary, *reasons]
    comfort = [summary, "This does not prove that none of them is poisoned."]
    doubt = describe_doubt(detector)
    if not flags.any():
        if doubt:
            return "open", ["No image is flagged, which says little.", summary, doubt]
        return "calm", ["No image is flagged: no sign of poisoned images.", *comfort]
    suspect = findings.suspect
    reasons = [describe_suspect(suspect, class_names)] if suspect else []
    more = usual is not None and flags.sum() > high
    if more and (len(flags) >= FEW or flags.sum() >= trigger.FEWEST):
        first = "More images are flagged than expected of clean ones, but no class stands out."
        guess = "They may be poisoned with many targets, or unlike the clean data."
        guess = f"{guess} One clean stream in forty has as many."
        return "alarm", [first, summary, *(reasons or [guess])]
    if reasons:
        return "open", [*reasons, summary, MISTAKEN]
    if usual is None or len(flags) < FEW:
        first = "Some images are flagged, but no class stands out among them."
        return "open", [first, summary, MISTAKEN]
    first = "No more images are flagged than expected of clean ones, and no class stands out"
    if doubt:
        return "open", [f"{first}, which says little.", summary, doubt]
    return "calm", [f"{first}.", *comfort]


def describe_suspect(suspect: Candidate, class_names: list[str] | None) -> str:
    """Say on the page what findings.examine says on stderr."""
    return flagged.describe_suspect(suspect, find_name(suspect.target, class_names)) + "."


def describe_given(
    figures: dict, hardened: bool | None, tone: str, lines: list[str]
) -> tuple[str, list[str]]:
    """Return what describe_verdict does, of a dataset of --poisoned without a candidate.

    figures: the dataset's.  hardened: as in Detector.
    tone, lines: as describe_verdict returns them.
    """
    success, caught = figures["attack_success_rate_badnet"], figures["detection_rate_of_successes"]
    if not success["of"]:
        return tone, lines
    if success["value"] <= outcome.CARRIES:
        first = (
            f"The BadNet answers only {success['hits']:,} of these {success['of']:,} images, given "
            "as poisoned, with the target."
        )
        return "open" if tone == "calm" else tone, [first, *lines]
    if caught["value"] >= MISSED:
        return tone, lines
    first = (
        f"The attack is missed: the rule flags {caught['hits']:,} of the {caught['of']:,} images "
        "that the BadNet answers with the target."
    )
    return "alarm", [first, *lines[1:2], MORE_CLEAN if hardened else f"{HARDEN}."]


def advise(
    tone: str, lines: list[str], findings: StreamFindings, hardened: bool | None
) -> Iterator[str]:
    """Yield what to do next, which README explains: a sentence or two, or nothing.

    tone, lines: as describe_verdict returns them.  hardened: as in Detector.
    """
    if tone == "calm" or not findings.stream.answers.flagged.any():
        return
    if not findings.candidates:
        yield GATHER
    elif hardened:
        yield SERVE
    else:
        yield "Look at the images below. If they carry a trigger, stop serving the BadNet."
    if not hardened and HARDEN not in " ".join(lines):
        yield f"{HARDEN}, and judge these images again."


def describe_doubt(detector: Detector) -> str | None:
    """Say why images that are not flagged may be poisoned, or None where G was hardened."""
    if detector.hardened:
        return None
    cause = "G was not hardened"
    if detector.hardened is None:
        cause = "Nothing tells whether G was hardened"
    return (
        f"{cause}: without hardening, {outcome.LEFT_MOST}, and an image that fools both nets is "
        f"not flagged. {HARDEN}."
    )


def find_name(number: int, class_names: list[str] | None) -> str | None:
    """Return the name of a class, or None where classes have no names. number: from 1."""
    return name_class(number, class_names) if class_names else None


def label_class(number: int, class_names: list[str] | None) -> str:
    """Return a class as text.number_class does. number: from 1, or N + 1 for "poisoned"."""
    return number_class(number, find_name(number, class_names))


def describe_target(
    stream: Stream,
    candidate: Candidate,
    evidence: TriggerEvidence,
    class_names: list[str] | None,
    hardened: bool | None = None,
) -> dict:
    """Return what the page shows of a class that may be a target. hardened: as in Detector."""
    region, usual, mean = evidence.region, evidence.usual, evidence.mean
    images: dict[str, page.Image | None] = {"usual": None, "mean": None}
    images |= {"difference": None, "cut_out": None}
    if usual is not None and mean is not None:
        images |= {"usual": page.make_image(usual), "mean": page.make_image(mean)}
        if region.any() and evidence.cut_out is not None:
            images["difference"] = page.make_image(127.5 + mean - usual)
            images["cut_out"] = page.make_lit_image(evidence.cut_out, region.astype(np.float32))
    label = label_class(candidate.target, class_names)
    trials = {"pasted": evidence.pasted, "covered": evidence.covered}
    return {
        "number": label,
        "region": region.any(),
        "whole": evidence.whole,
        "fraction": format_percent(region.mean()),
        "trials": [(name, trial) for name, trial in trials.items() if trial],
        "is_trigger": evidence.is_trigger,
        "twin": (evidence.pasted or {}).get("twin"),
        "failure": describe_failure(evidence, label, hardened),
        **images,
        "images": [
            describe_image(stream, row, pixels, class_names, places)
            for row, pixels, places in zip(evidence.rows, evidence.flagged, evidence.places)
        ],
        "image_count": len(evidence.rows),
    }


def describe_failure(
    evidence: TriggerEvidence, target: str, hardened: bool | None
) -> tuple[str, str]:
    """Say why the test did not show that a cut-out is a trigger: (the fact, the reason).

    target: the class, as label_class returns it.  hardened: as in Detector.
    """
    pasted = evidence.pasted
    count = pasted["images"] if pasted else 0
    if pasted is None or count < trigger.FEWEST_TRIED:
        return (
            "There are too few images to test whether it works as one",
            f"it was put on {format_count(count, 'other image')}, and the test takes "
            f"{trigger.FEWEST_TRIED}.",
        )
    badnet, repaired = pasted["badnet"], pasted["repaired"]
    fact = f"put on {count} other images, it makes the BadNet answer {badnet} with class {target}"
    enough = trigger.A_TRIGGER * count
    if badnet < enough:
        return "The test does not show that it works as one", f"{fact}, too few to tell."
    both = f"{fact}, and the repaired net {repaired}"
    if badnet - pasted.get("twin", 0) < enough:
        return (
            "It is probably a natural feature, which nobody planted",
            f"{both}. But it also fools a twin of the BadNet, which clean images have taught to "
            f"ignore triggers: that gives this answer {pasted['twin']} times.",
        )
    if repaired < enough:
        return (
            "The test does not show that it works as one",
            f"{both}. The two are too close to tell.",
        )
    advice = "Repair the BadNet again, with more clean images" if hardened else HARDEN
    return (
        "The repaired net has the backdoor, too",
        f"{both}. {advice}, unless these places show what images of class {target} usually show.",
    )


def describe_image(
    stream: Stream,
    row: int,
    pixels: np.ndarray,
    class_names: list[str] | None,
    places: np.ndarray | None = None,
) -> dict:
    """Return what the page shows of an image.

    row: its number in the stream.  places: float32 (height, width), where its answer comes from.
    """

    def describe_class(answer: int) -> str:
        return "NaN" if answer < 0 else label_class(answer + 1, class_names)

    answers = stream.answers
    return {
        "name": stream.name(int(row)),
        "plain": page.make_image(pixels),
        "badnet": describe_class(int(answers.badnet[row])),
        "repaired": describe_class(int(answers.repaired[row])),
        "score": f"{answers.score[row]:.3g}",
        "lit": None if places is None else page.make_lit_image(pixels, places),
    }


def list_figures(figures: dict, threshold: float | None) -> Iterator[tuple[str, str, str]]:
    """Yield (label, value, interval) of each figure, as text.

    The arguments are as for tables.label_figures.
    """
    for label, figure in tables.label_figures(figures, threshold):
        value, _, interval = tables.format_cells(figure).strip().partition("   ")
        yield label, value, interval
