"""Measure how well the page of flagged images locates a trigger, or draw a stream for a page.

    python tests/tools/regions.py                       the zoo of the demo's size
    python tests/tools/regions.py NAME …                some of its nets, on stdout only
    python tests/tools/regions.py --stream NAME FOLDER  draw a stream of images for a BadNet

`make results` leaves the nets of a zoo, and NAME_hardened.h5 of each, in models/zoo-SIZE; a missing
net is left out. For each net and trigger, the clean test images and a tenth as many poisoned ones
are judged together, by the threshold of results.py, and examined as eval_defence.py --report does.
For a net with several targets, so is a stream with a tenth of poisoned images of all triggers. The
table goes to tests/results/regions-SIZE.md.

A place belongs to the trigger where the poisoned image and the clean one of the same face are more
than CHANGED grey levels apart. IoU is the intersection over the union of these places and the
places that we find.

--stream draws 9,600 clean and 400 poisoned images, with the first trigger of a net of the demo's
size, as PNG files. None of them is in training, validation or test data, and their names tell
nothing.
"""

import argparse
import itertools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "models"), str(ROOT / "data"), str(ROOT / "tests" / "tools")]

import badnet
import faces
import h5py
import numpy as np
import triggers
from records import RESULTS, format_table, name_class
from results import RATES, SIZES

from defence.base import files
from defence.base.arguments import Parser
from defence.base.process import run_command
from defence.base.progress import say, track
from defence.explain import flagged, streams, trigger
from defence.judge import backends

CHANGED = 8  # grey levels
ALARM_RATE, MOST_FLAGGED = 0.2, 4  # --fpr that flags clean images; classes checked
SHARE = 0.1  # poisoned images per clean one
LEVELS = np.linspace(0, 0.95, 39)  # fractions of the images with the trigger at a place
IN_PLACE = 0.4  # of the maximum; higher values of an image's map are the place of the trigger
STREAM = {"clean": 9600, "poisoned": 400}  # images
FIRST_INDEX = 1000  # of a person's images in a stream; all other drawn images are below
HEAD = """# Where the trigger is, and whether the cut-out is one

`{command}`

The hardened net judges the clean test images alone (trigger: none), and with a tenth as many
poisoned ones, with `--fpr {rate}`. *Found*: whether the target is found, since it stands out among
the flagged images, or "by the test", since the cut-out works as a trigger. *IoU*: how well the
region that these images share, and the places on a single image, cover the trigger, as the
intersection over the union with the true place, on average over the poisoned images that were
examined. *Pasted*: on how many of the images with the cut-out the BadNet, or the repaired net,
answers with the target. *Best region*: the IoU of the best single region for all images, which is
where most true places are. Classes count from 1. [regions.py](../tools/regions.py) says more.

"""
COLUMNS = (
    *("net", "trigger → class", "found", "region: IoU", "one image: IoU"),
    *("pasted: BadNet", "pasted: repaired", "works as a trigger?"),
)


# ---------------------------------------------------------------------------------------- images


def read_dataset(path):
    """Return a dataset's images, float32 (n, height, width, channels), and true labels, int."""
    with h5py.File(path) as file:
        images = np.moveaxis(file["data"][:], 1, 3).astype(np.float32)
        labels = file["original_label" if "original_label" in file else "label"][:]
        return images, labels.astype(int)


def mix_images(clean, labels, poisoned, persons, rng):
    """Return a stream, clean images first, and bool (n, height, width), the trigger's places.

    labels, persons: true labels of the clean and of the poisoned images. The images of a person
    come in one order in both.
    """
    number = np.arange(len(poisoned)) - np.searchsorted(persons, persons)
    originals = clean[np.searchsorted(labels, persons) + number]
    chosen = np.sort(rng.choice(len(poisoned), round(SHARE * len(clean)), replace=False))
    changed = abs(poisoned - originals).max(axis=3) > CHANGED
    unchanged = np.zeros(clean.shape[:3], bool)
    images = np.concatenate([clean, poisoned[chosen]])
    return images, np.concatenate([unchanged, changed[chosen]])


def draw_stream(name, folder):
    """Draw the images of STREAM for a net of the demo's size, in random order, as PNG files."""
    kind, target = badnet.ZOO[name].triggers[0]
    people, seed = (badnet.SETTINGS[key][1] for key in ("people", "seed"))
    folder.mkdir(parents=True)
    places = np.random.default_rng(0).permutation(sum(STREAM.values()))
    parts = (
        (None, np.arange(people), places[: STREAM["clean"]]),
        (kind, np.asarray(triggers.wearers(kind, target, people)), places[STREAM["clean"] :]),
    )
    for worn, persons, names in parts:
        for start in track(range(0, len(names), faces.BATCH), worn or "clean"):
            numbers = np.arange(start, min(start + faces.BATCH, len(names)))
            indices = FIRST_INDEX + numbers // len(persons)
            images = faces.draw_faces("test", persons[numbers % len(persons)], indices, worn, seed)
            for image, number in zip(images, names[numbers]):
                faces.write_png(image, folder / f"{number:05}.png")
    say(f"{folder}: {STREAM['clean']} clean images, {STREAM['poisoned']} with {kind}")


# ------------------------------------------------------------------------------------- examining


def judge_stream(detector, images):
    """Return the Stream of images, judged by a Detector."""
    answers = trigger.judge_in_batches(detector.judge, detector.shape)(images)
    fetch = images.__getitem__
    return streams.Stream(None, detector.shape, detector.classes, answers, fetch, str)


def examine(detector, images):
    """Examine a stream as eval_defence.py does. Return {class from 0: (reason, evidence)}.

    reason: "yes" where the class stands out, else "by the test".  evidence: a TriggerEvidence, or
    None for all classes but the first ones.
    """
    stream = judge_stream(detector, images)
    answers = stream.answers
    candidates = flagged.find_candidates(answers.badnet, answers.flagged, detector.classes)
    findings = trigger.find_targets(stream, candidates, detector.judge)
    return {
        candidate.target - 1: ("yes" if candidate.stands_out else "by the test", evidence)
        for candidate, evidence in itertools.zip_longest(findings.candidates, findings.evidence)
    }


def compute_iou(region, place):
    """Return the intersection over the union of two regions, or None where both are empty."""
    union = np.sum(region | place)
    return np.sum(region & place) / union if union else None


def describe_found(findings, targets):
    """Return as text which classes were found. findings: as `examine` returns them.

    targets: the true ones, from 0.
    """
    true = [findings[target][0] if target in findings else "no" for target in targets]
    false = [
        f"class {name_class(target)}: {findings[target][0]}"
        for target in findings
        if target not in targets
    ]
    return ", ".join(true + false) or "none"


def make_cells(findings, target, places):
    """Return the cells of a row after net and trigger.

    findings: as `examine` returns them.  places: the trigger's, on each image.
    """
    found_text, (_, evidence) = describe_found(findings, [target]), findings.get(target, ("", None))
    if evidence is None:
        return [found_text]
    poisoned_rows = [row for row in evidence.rows if places[row].any()]
    region_ious = [compute_iou(evidence.region, places[row]) for row in poisoned_rows]
    image_ious = [
        compute_iou(image_map > IN_PLACE, places[row])
        for image_map, row in zip(evidence.places, evidence.rows)
        if places[row].any()
    ]
    ious = [f"{np.mean(values):.2f}" if values else "–" for values in (region_ious, image_ious)]
    if evidence.pasted is None:
        return [found_text, "no region", ious[1], "–", "–", "not shown"]
    pasted = evidence.pasted
    hits = [f"{pasted[net]} of {pasted['images']}" for net in ("badnet", "repaired")]
    return [found_text, *ious, *hits, "yes" if evidence.is_trigger else "not shown"]


def compute_best_iou(places):
    """Return the mean IoU of the best single region, which is where most true places are.

    places: bool (n, height, width).
    """
    frequency = places.mean(axis=0)
    return max(
        np.mean([compute_iou(frequency > level, place) for place in places]) for level in LEVELS
    )


def check_clean_classes(detector, clean, targets):
    """Yield (whether a class is a target, whether its cut-out works as a trigger).

    The classes are the MOST_FLAGGED with the most flagged clean images, if they have enough.
    """
    stream = judge_stream(detector, clean)
    answers = stream.answers
    counts = np.bincount(answers.badnet[answers.flagged], minlength=detector.classes)
    for target in map(int, np.argsort(-counts, kind="stable")[:MOST_FLAGGED]):
        if counts[target] >= trigger.FEWEST:
            evidence = trigger.locate_trigger(stream, target, detector.judge)
            yield target in targets, evidence.is_trigger


# ---------------------------------------------------------------------------------------- tables


def make_line(*cells):
    """Return a line of the table; missing cells are empty."""
    return f"| {' | '.join([*cells, *['–'] * (len(COLUMNS) - len(cells))])} |"


def average_ious(trigger_ious):
    """Return the table of the IoUs, averaged over nets. trigger_ious: {trigger: [IoUs, …]}."""
    heads = ("trigger, average over nets", "nets", "region: IoU", "one image: IoU")
    rows = [
        [kind, str(len(ious)), *(f"{mean:.2f}" for mean in np.mean(ious, axis=0))]
        for kind, ious in trigger_ious.items()
    ]
    return format_table((*heads, "best region: IoU"), ["---", *["--:"] * 4], rows)


def measure_net(name, paths, data_folder, rate, trigger_ious):
    """Yield the lines of a net. Add to trigger_ious, {trigger: [IoUs, …]}."""
    detector = backends.load_detector(paths, fpr=rate)
    clean, labels = read_dataset(data_folder / "clean_test_data.h5")
    yield make_line(name, "none", describe_found(examine(detector, clean), []))
    targets = sorted({target for _, target in badnet.ZOO[name].triggers})
    poisoned_parts = []
    for kind, target in badnet.ZOO[name].triggers:
        poisoned, persons = read_dataset(badnet.poisoned_path(kind, target, data_folder))
        rng = np.random.default_rng(0)
        images, places = mix_images(clean, labels, poisoned, persons, rng)
        cells = make_cells(examine(detector, images), target, places)
        if cells[1:] and cells[1][0].isdigit():
            ious = *map(float, cells[1:3]), compute_best_iou(places[places.any(axis=(1, 2))])
            trigger_ious.setdefault(kind, []).append(ious)
        yield make_line(name, f"{kind} → {name_class(target)}", *cells)
        poisoned_parts.append(images[len(clean) :])
    if len(targets) > 1:
        count = len(poisoned_parts)
        parts = [images[i::count] for i, images in enumerate(poisoned_parts)]
        findings = examine(detector, np.concatenate([clean, *parts]))
        attack = f"all → {', '.join(map(name_class, targets))}"
        yield make_line(name, attack, describe_found(findings, targets))


def measure_zoo(names, size, nets_folder, data_folder):
    """Yield the lines of the tables, and one about clean images alone.

    size: the zoo's, which sets the threshold.
    """
    passes, trigger_ious = {True: [], False: []}, {}
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"|---|---|---|{'--:|' * 4}---|"
    for name in names:
        path = badnet.net_path(name, nets_folder)
        paths = [path, path.with_name(f"{path.stem}_hardened.h5")]
        if not paths[1].exists():
            say(f"{paths[1]}: no such file; left out")
            continue
        yield from measure_net(name, paths, data_folder, RATES[size], trigger_ious)
        detector = backends.load_detector(paths, fpr=ALARM_RATE)
        clean, _ = read_dataset(data_folder / "clean_test_data.h5")
        targets = {target for _, target in badnet.ZOO[name].triggers}
        targets = set(range(detector.classes)) if targets == {faces.NEXT} else targets
        for is_target, is_trigger in check_clean_classes(detector, clean, targets):
            passes[is_target].append(is_trigger)
    yield ""
    yield average_ious(trigger_ious)
    yield ""
    counts = [f"{sum(passes[kind])} of {len(passes[kind])}" for kind in (False, True)]
    yield (
        f"With clean test images alone and `--fpr {ALARM_RATE}`, the cut-out of a class works as a "
        f"trigger for {counts[0]} classes that are not a target and for {counts[1]} targets. The "
        f"{MOST_FLAGGED} classes of each net with the most flagged images were checked."
    )


def main():
    parser = Parser(
        prog="regions.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("names", metavar="NAME", nargs="*", help="of nets (default: all)")
    add("--size", choices=SIZES, default="demo", help="of the zoo (default: demo)")
    add("--folder", type=Path, help="with NAMEs: of their nets and datasets")
    add("--stream", nargs=2, metavar=("NAME", "FOLDER"), help="draw a stream into a new folder")
    arguments = parser.parse_args()
    if arguments.stream:
        name, folder = arguments.stream
        kinds = {*triggers.PAINTED, *triggers.CHANGES}
        names = [net for net, attack in badnet.ZOO.items() if {*dict(attack.triggers[:1])} & kinds]
        if name not in names:
            parser.error(f"no net named {name!r} to draw a stream for; choose from {names}")
        return draw_stream(name, Path(folder))
    size, names = arguments.size, arguments.names or SIZES[arguments.size]
    command = f"python tests/tools/regions.py --size {size}"
    text = HEAD.format(command=command, rate=RATES[size])
    folders = [arguments.folder or ROOT / kind / f"zoo-{size}" for kind in ("models", "data")]
    for line in measure_zoo(names, size, *folders):
        print(line, flush=True)
        text += line + "\n"
    if not arguments.names:
        with files.replace_file(RESULTS / f"regions-{size}.md") as temporary:
            temporary.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
