"""Judge images with a BadNet B and its repaired net G: a class, 1 to N, or N + 1 for "poisoned".

    python eval_defence.py img/img_9.png anonymous_1_bd_net

prints the class of the image where B and G agree, and N + 1 where they do not (report, section 2,
last paragraph). G is the net that repair.py made of B. For a data set it prints what the defence is
worth on it.
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

import metrics
import nets
import utils
from terminal import InputError, Parser, at_least, command, memory_option, printable, say, track

PICTURES = 100  # judged together


def main():
    arguments = parse_arguments()
    images = utils.list_images(arguments.images)
    of_data = [path for path in images if path.suffix.lower() in utils.DATASET_SUFFIXES]
    if of_data and len(images) > 1:
        raise InputError(f"{of_data[0]}: give one data set alone, or pictures")
    if arguments.poisoned and not of_data:
        raise InputError("--poisoned goes with a clean data set as IMAGE, not with pictures")
    if (arguments.csv or arguments.plot) and not of_data:
        raise InputError("--csv and --plot go with a data set as IMAGE, not with pictures")
    badnet_path, repaired_path = find_models(arguments.model, arguments.repaired)
    for path in (badnet_path, repaired_path):  # before the seconds that the import takes
        utils.inspect_model(path, arguments.max_memory)
    for path in filter(None, (arguments.json, arguments.csv, arguments.plot)):
        inputs = [*images, *arguments.poisoned, badnet_path, repaired_path]
        utils.require_writable(path, *inputs)
    if arguments.plot:
        metrics.require_plot_format(arguments.plot)

    judge = judge_data if of_data else judge_pictures
    return judge(images, badnet_path, repaired_path, arguments)


def parse_arguments():
    parser = Parser(
        description="Judge images with a BadNet and its repaired net. Where both answer the same, "
        "print that class, 1 to N; where they do not, N+1: the image is poisoned.",
        epilog="Example: eval_defence.py img/img_9.png demo_bd_net. One picture: the number alone. "
        "Several: 'path<TAB>class' each; one that cannot be read does not keep the others from "
        "being judged. A data set: a table of figures, each with its 95 %% interval. Exit status: "
        "0 done, 1 failed, 2 wrong input.",
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
    add(
        "--fpr",
        metavar="RATE",
        type=at_least(0, most=1, above=True),
        help="instead of where B and G disagree, flag an image whose score, how far apart their "
        "answers are, is above the threshold that flagged this share of the clean images that "
        "repair.py --holdout kept out of the repair, such as 0.01",
    )
    add("--json", metavar="FILE", help="also write the verdicts or the table as JSON")
    add(
        "--csv",
        metavar="FILE",
        help="also write a row for each image: index (from 0 in each data set, in the order "
        "given), badnet_class, repaired_class, verdict, score, and label as in the file",
    )
    add(
        "--plot",
        metavar="FILE",
        help="draw ROC curves, the scores and flagged images, as .png, .svg or .pdf",
    )
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
    """Load B and G as one function. Returns (detector, N, image shape, threshold or None).

    detector: float32 (n, height, width, channels), 0..255 → metrics.Answers, all arrays (n,).
    threshold: of the score, that `arguments.fpr` asks for.
    arguments: `scale`, a key of utils.SCALES, for a G without a repair record; `max_memory`;
    `force`, for a G that was made from another B; `fpr`, None or above 0.
    Raises InputError where G does not belong to B, or has no threshold for `fpr`.
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
    limit = None
    if arguments.fpr is not None:
        limit = held_out_threshold(record, arguments.fpr, repaired_path)
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
        shares = [nets.probabilities(*each) for each in zip(scores, (badnet, repaired))]
        of_b, of_g = (
            np.where(np.isnan(share[:, 0]), none, np.argmax(each, axis=1))
            for each, share, none in zip(scores, shares, (-1, -2))
        )
        score = nets.suspicion(*shares)
        flagged = of_b != of_g if limit is None else (score > limit) | (of_b < 0) | (of_g < 0)
        return metrics.Answers(of_b, of_g, score, flagged)

    return detector, badnet.output_shape[1], badnet.input_shape[1:], limit


def held_out_threshold(record, rate, path):
    """The threshold of the score that flagged this share of the held-out clean images, 0..1.

    record: G's repair record, or None.  rate: above 0, at most 1.
    Raises InputError where no images were held out, or too few for the rate.
    """
    held_out = (record or {}).get("holdout")
    if held_out is None:
        raise InputError(
            f"{path}: --fpr needs clean images that the repair has not seen, and none were held "
            "out; repair the BadNet anew with: repair.py --holdout 0.1"
        )
    try:
        images, thresholds = held_out["images"], np.float64(held_out["thresholds"])
        damaged = held_out["score"] != nets.SCORE or not images >= 1
        damaged |= thresholds.shape != (metrics.THRESHOLDS + 1,)
        damaged |= not np.all((thresholds >= 0) & (thresholds <= nets.SCORE_MOST))
    except (KeyError, TypeError, ValueError):
        damaged = True
    if damaged:
        raise InputError(
            f"{path}: its repair record is damaged or of another version; repair the BadNet anew"
        )
    least = max(1 / images, 1 / metrics.THRESHOLDS)
    if rate < least:
        raise InputError(
            f"{path}: --fpr {rate:g}: can be {math.ceil(1e4 * least) / 1e4:g} or more, since "
            f"{images} clean images were held out"
        )
    return float(thresholds[math.floor(rate * metrics.THRESHOLDS + 1e-9)])


def verdict(answers, classes):
    """What is printed: N + 1, "poisoned", for what is flagged, else B's class, 1..N.

    answers: metrics.Answers.  classes: N.  Without --fpr an image is flagged where the nets
    disagree, so this is the class of both.  Source: report, section 2, last paragraph.
    """
    return np.where(answers.flagged, classes + 1, answers.badnet + 1)


def judge_pictures(images, badnet_path, repaired_path, arguments):
    """Print the verdicts on pictures, a batch after the other. Returns the exit status."""
    alone = len(arguments.images) == 1 and not Path(arguments.images[0]).is_dir()
    if alone:
        picture = utils.read_picture(images[0], arguments.max_memory)  # before the nets are loaded
    detector, classes, shape, _ = load_detector(badnet_path, repaired_path, arguments)
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
        answers = detector(np.stack(inputs))
        for path, row in zip(judged, rows(answers, classes)):
            answer = row.pop("verdict")
            print(answer if alone else f"{printable(path)}\t{answer}", flush=True)
            results.append({"path": str(path), "class": answer, **row})
    if arguments.json:
        utils.write_json(results, arguments.json)
    return 2 if unread else 0


def rows(answers, classes):
    """Yield what is written about each image, a dict; classes and verdict as printed, from 1."""
    for b, g, score, said in zip(
        answers.badnet.tolist(),
        answers.repaired.tolist(),
        answers.score.tolist(),
        verdict(answers, classes).tolist(),
    ):
        b, g = (each + 1 if each >= 0 else None for each in (b, g))
        yield {"badnet_class": b, "repaired_class": g, "verdict": said, "score": score}


def judge_data(images, badnet_path, repaired_path, arguments):
    """Print the table of a clean data set and of poisoned ones."""
    with contextlib.ExitStack() as files:
        sets = [
            files.enter_context(utils.open_dataset(path, arguments.max_memory))
            for path in (*images, *arguments.poisoned)
        ]
        detector, classes, shape, limit = load_detector(badnet_path, repaired_path, arguments)
        for data in sets:
            data.fit_to(shape, classes)
        judged = [judge_all(detector, data) for data in sets]
        results = figures(sets, judged) | {"threshold": limit}
        print(metrics.table(results))
        if arguments.json:
            utils.write_json(results, arguments.json)
        if arguments.csv:
            table = [
                {"index": index, **row, "label": int(label)}
                for data, (answers, _) in zip(sets, judged)
                for index, (row, label) in enumerate(zip(rows(answers, classes), data.labels))
            ]
            utils.write_csv(table, arguments.csv)
        if arguments.plot:
            scores = [answers.score for answers, _ in judged]
            flagged = [some_flagged(data, answers) for data, (answers, _) in zip(sets, judged)]
            metrics.plot_judging(results, scores, flagged, arguments.plot)


def judge_all(detector, data):
    """Judge every image of a Dataset. Returns (metrics.Answers, seconds)."""
    start = time.monotonic()
    batches = nets.side_by_side(detector, (x for x, _ in data.batches()))
    parts = [vars(part).values() for part in track(batches, data.path.name, data.batch_count)]
    answers = metrics.Answers(*map(np.concatenate, zip(*parts)))
    return answers, time.monotonic() - start


def figures(sets, judged):
    """The figures of a clean Dataset and of poisoned ones, as a dict that JSON can hold.

    judged: for each of them what judge_all returned.
    """
    shown = [
        {"file": str(data.path), "images": len(data), "seconds": max(0.001, round(seconds, 3))}
        for data, (_, seconds) in zip(sets, judged)
    ]
    (clean, _), *others = judged
    shown[0]["figures"] = of_clean = metrics.clean_figures(clean, sets[0].labels)
    for each, data, (answers, _) in zip(shown[1:], sets[1:], others):
        each["figures"] = metrics.poisoned_figures(
            answers, data.labels, data.true_labels, clean.score, of_clean
        )
    return {"clean": shown[0], "poisoned": shown[1:]}


def some_flagged(data, answers):
    """Up to metrics.SHEET of the flagged images, evenly spread, and both classes of each."""
    flagged = np.flatnonzero(answers.flagged)
    some = flagged[:: max(1, -(-len(flagged) // metrics.SHEET))]
    chosen = np.isin(np.arange(len(data)), some)
    images = [x for x, _ in data.part(chosen).batches()]
    return images and np.concatenate(images), answers.badnet[some], answers.repaired[some]


if __name__ == "__main__":
    sys.exit(command(main))
