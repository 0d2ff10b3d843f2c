"""Judge images with a BadNet B and its repaired net G: a class, 1 to N, or N + 1 for "poisoned".

    python eval_defence.py img/img_9.png anonymous_1_bd_net

prints the class of the image where B and G agree, and N + 1 where they do not (report, section 2,
last paragraph). G is the net that repair.py made of B.
"""

import os
import signal

if __name__ == "__main__":  # until `command` takes over, Ctrl-C ends the imports without a word
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import contextlib
import math
import sys
import time
from pathlib import Path

import numpy as np

import nets
import utils
from terminal import InputError, Parser, command, memory_option, printable, say, track

PICTURES = 100  # judged together


def main():
    arguments = parse_arguments()
    images = utils.list_images(arguments.images)
    of_data = [path for path in images if path.suffix.lower() in utils.DATASET_SUFFIXES]
    if of_data and len(images) > 1:
        raise InputError(f"{of_data[0]}: give one data set alone, or pictures")
    if arguments.poisoned and not of_data:
        raise InputError("--poisoned goes with a clean data set as IMAGE, not with pictures")
    badnet_path, repaired_path = find_models(arguments.model, arguments.repaired)
    for path in (badnet_path, repaired_path):  # before the seconds that the import takes
        utils.inspect_model(path, arguments.max_memory)
    if arguments.json:
        utils.require_writable(arguments.json, *images, badnet_path, repaired_path)

    judge = judge_data if of_data else judge_pictures
    return judge(images, badnet_path, repaired_path, arguments)


def parse_arguments():
    parser = Parser(
        description="Judge images with a BadNet and its repaired net. Where both answer the same, "
        "print that class, 1 to N; where they do not, N+1: the image is poisoned.",
        epilog="Example: eval_defence.py img/img_9.png demo_bd_net. One picture: the number alone. "
        "Several: 'path<TAB>class' each; one that cannot be read does not keep the others from "
        "being judged. A data set: a table. Exit status: 0 done, 1 failed, 2 wrong input.",
    )
    add = parser.add_argument
    add(
        "images",
        metavar="IMAGE",
        nargs="+",
        help="a PNG or JPEG picture, a folder of them, or one .h5 data set",
    )
    add("model", metavar="MODEL", help="the BadNet: a name in models/, or a path")
    add(
        "--repaired",
        metavar="FILE",
        help="the repaired net (default: models/NAME_defence.h5)",
    )
    add(
        "--scale",
        choices=utils.SCALES,
        help="pixels that the nets take, for a repaired net without a repair record",
    )
    add(
        "--poisoned",
        metavar="FILE",
        nargs="+",
        action="extend",
        default=[],
        help="poisoned data sets, 'label' being the attack's target, to judge beside the clean one",
    )
    add("--json", metavar="FILE", help="also write the verdicts or the table as JSON")
    add(
        "--force",
        action="store_true",
        help="judge even where the repaired net was made from another BadNet",
    )
    memory_option(parser)
    return parser.parse_args()


def find_models(model, repaired=None):
    """The paths of B and G for a name in models/ or a path. Raises InputError where one is missing.

    G stands where repair.py puts it: in models/, as NAME_defence.h5.
    """
    path = Path(model)
    if path.suffix not in utils.MODEL_SUFFIXES:
        named = [utils.MODELS / f"{model}{suffix}" for suffix in utils.MODEL_SUFFIXES]
        path = next((p for p in named if p.exists()), named[0])
    utils.require_file(path)
    if repaired is None:
        repaired = utils.default_output(path)
        if not repaired.exists():
            raise InputError(
                f"{repaired}: no repaired net; make it with: python repair.py {path} CLEAN_DATA.h5"
            )
    return path, utils.require_file(repaired)


def load_detector(badnet_path, repaired_path, arguments):
    """Load B and G as one model that takes images 0..255. Returns (detector, N, image shape).

    detector: float32 (n, height, width, channels), 0..255 → the classes that B and G give, two int
    arrays (n,), 0..N-1; -1 (B) and -2 (G), so that they never agree, where a score is NaN.
    arguments: `scale`, a key of utils.SCALES, for a G without a repair record; `max_memory`;
    `force`, for a G that was made from another B.
    Raises InputError where G does not belong to B.
    """
    scale = arguments.scale
    record = utils.read_record(repaired_path)
    if record is None:
        scale = scale or next(iter(utils.SCALES))
        say(f"{repaired_path}: no repair record; taking pixels {scale} (see --scale)")
        layer = None
    else:
        if record["badnet"]["sha256"] != utils.sha256(badnet_path):
            problem = (
                f"{repaired_path}: was made from another BadNet ({record['badnet']['file']}), not "
                f"from {badnet_path}"
            )
            if not arguments.force:
                raise InputError(f"{problem}; repair this one with repair.py, or --force")
            say(f"warning: {problem}; judging all the same")
        if scale not in (None, record["input_scale"]):
            raise InputError(f"--scale: {repaired_path} was made for {record['input_scale']}")
        scale, layer = record["input_scale"], record["layer"]
    badnet, repaired = (
        utils.load_badnet(path, arguments.max_memory) for path in (badnet_path, repaired_path)
    )
    for what, ours, theirs in (
        ("images", badnet.input_shape[1:], repaired.input_shape[1:]),
        ("classes", badnet.output_shape[1:], repaired.output_shape[1:]),
    ):
        if ours != theirs:
            raise InputError(
                f"{repaired_path}: does not belong to {badnet_path}: it has {what} "
                f"{'×'.join(map(str, theirs))}, not {'×'.join(map(str, ours))}"
            )
    both = nets.detector(badnet, repaired, layer)
    divisor = utils.SCALES[scale]

    def detector(images):
        x = images / divisor
        # Compiling takes longer than running one image layer by layer.
        scores = both(x, training=False) if len(x) == 1 else nets.compiled(both)(x)
        return [
            np.where(np.isfinite(each).all(axis=1), np.argmax(each, axis=1), none)
            for each, none in zip(scores, (-1, -2))
        ]

    return detector, badnet.output_shape[1], badnet.input_shape[1:]


def verdict(badnet_class, repaired_class, classes):
    """What is printed: the class, 1..N, where both nets agree, else N + 1, "poisoned".

    badnet_class, repaired_class: int, 0..N-1, or arrays of them.  classes: N.
    Source: report, section 2, last paragraph.
    """
    return np.where(badnet_class == repaired_class, np.add(badnet_class, 1), classes + 1)


def judge_pictures(images, badnet_path, repaired_path, arguments):
    """Print the verdicts on pictures, a batch after the other. Returns the exit status."""
    alone = len(arguments.images) == 1 and not Path(arguments.images[0]).is_dir()
    if alone:
        picture = utils.read_picture(images[0], arguments.max_memory)  # before the nets are loaded
    detector, classes, shape = load_detector(badnet_path, repaired_path, arguments)
    if shape[2] not in (1, 3):
        raise InputError(f"{badnet_path}: takes images of {shape[2]} channels, not pictures")
    results, unread = [], 0
    count = min(PICTURES, max(1, arguments.max_memory // (4 * math.prod(shape))))
    for start in range(0, len(images), count):
        judged, inputs = [], []
        for path in images[start : start + count]:
            try:
                picture = picture if alone else utils.read_picture(path, arguments.max_memory)
                inputs.append(utils.as_input(picture, shape))
                judged.append(path)
            except InputError as error:
                say(f"eval_defence.py: error: {error}")
                unread += 1
        if not inputs:
            continue
        of_b, of_g = detector(np.stack(inputs))
        answers = verdict(of_b, of_g, classes)
        for path, answer, b, g in zip(judged, answers.tolist(), of_b.tolist(), of_g.tolist()):
            print(answer if alone else f"{printable(path)}\t{answer}", flush=True)
            of_each = {"badnet_class": b, "repaired_class": g}
            of_each = {net: c + 1 if c >= 0 else None for net, c in of_each.items()}
            results.append({"path": str(path), "class": answer, **of_each})
    if arguments.json:
        utils.write_json(results, arguments.json)
    return 2 if unread else 0


def judge_data(images, badnet_path, repaired_path, arguments):
    """Print the table of a clean data set and of poisoned ones."""
    with contextlib.ExitStack() as files:
        clean, *poisoned = [
            files.enter_context(utils.open_dataset(path, arguments.max_memory))
            for path in (*images, *arguments.poisoned)
        ]
        detector, classes, shape = load_detector(badnet_path, repaired_path, arguments)
        for data in (clean, *poisoned):
            data.fit_to(shape, classes)
        figures = {"clean": measure(detector, clean, clean_figures)}
        figures["poisoned"] = [measure(detector, data, poisoned_figures) for data in poisoned]
    for row in (figures["clean"], *figures["poisoned"]):
        print(f"{printable(row['file'])}: {row['images']} images")
        for name, share in row["shares"].items():
            print(f"  {name:<40}{100 * share:8.2f} %")
    if arguments.json:
        utils.write_json(figures, arguments.json)


def measure(detector, data, figures):
    """The figures of a Dataset, as a dict with its file, its images and the seconds it took."""
    start = time.monotonic()
    shares = figures(data.labels, *classify_both(detector, data))
    seconds = time.monotonic() - start
    say(f"{data.path}: {len(data)} images in {seconds:.1f} s, {len(data) / seconds:.0f} a second")
    return {
        "file": str(data.path),
        "images": len(data),
        "seconds": round(seconds, 3),
        "shares": {name: float(np.mean(hits)) for name, hits in shares.items()},
    }


def classify_both(detector, data):
    """The classes that B and G give every image of a Dataset: two int arrays (n,), 0..N-1."""
    batches = nets.side_by_side(detector, (x for x, _ in data.batches()))
    answers = track(batches, data.path.name, data.batch_count)
    return [np.concatenate(parts) for parts in zip(*answers, strict=True)]


def clean_figures(labels, of_b, of_g):
    """What counts on clean images: {name: bool (n,)}, whether each image is a case of it."""
    return {
        "clean accuracy of B": of_b == labels,
        "clean accuracy of G": of_g == labels,
        "clean accuracy of the two together": (of_b == of_g) & (of_b == labels),
        "false-positive rate (clean flagged)": of_b != of_g,
    }


def poisoned_figures(targets, of_b, of_g):
    """What counts on poisoned images: {name: bool (n,)}, whether each image is a case of it."""
    return {
        "attack success rate on B": of_b == targets,
        "attack success rate on G": of_g == targets,
        "poisoned caught (flagged)": of_b != of_g,
    }


if __name__ == "__main__":
    sys.exit(command(main))
