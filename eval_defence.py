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
import re
import sys
import time
from pathlib import Path

import numpy as np

import detector
import metrics
import nets
import utils
from terminal import InputError, Parser, at_least, command, memory_option, printable, say, track

PICTURES = 100  # judged together
LOCAL = "local"  # Ray, on this machine
ADDRESS = re.compile(r"local|auto|(ray://)?[^/:]+:\d+")  # of Ray


def main():
    arguments = parse_arguments()
    models = detector.find_models(arguments.model, arguments.repaired)
    if arguments.export:
        return export(models, arguments)
    if not arguments.images:
        raise InputError("give an IMAGE, or --export")
    if arguments.ray:
        return judge_on_ray(models, arguments)
    images = utils.list_images(arguments.images)
    of_data = [path for path in images if path.suffix.lower() in utils.DATASET_SUFFIXES]
    if of_data and len(images) > 1:
        raise InputError(f"{of_data[0]}: give one data set alone, or pictures")
    if arguments.poisoned and not of_data:
        raise InputError("--poisoned goes with a clean data set as IMAGE, not with pictures")
    if (arguments.csv or arguments.plot) and not of_data:
        raise InputError("--csv and --plot go with a data set as IMAGE, not with pictures")
    for path in filter(None, (arguments.json, arguments.csv, arguments.plot)):
        utils.require_writable(path, *images, *arguments.poisoned, *models)
    if arguments.plot:
        metrics.require_plot_format(arguments.plot)

    judge = judge_data if of_data else judge_pictures
    return judge(images, models, arguments)


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
        nargs="*",
        help="a PNG or JPEG picture, a folder of them, or one .h5 data set",
    )
    add(
        "model",
        metavar="MODEL",
        help="the BadNet: a name in models/, or a path; or a detector's .onnx file",
    )
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
    add(
        "--engine",
        choices=detector.ENGINES,
        help="what runs the nets (default: onnx where models/NAME_detector.onnx was made of them)",
    )
    add(
        "--export",
        action="store_true",
        help="judge nothing, but write models/NAME_detector.onnx: both nets and the verdict, with "
        "--fpr the threshold, in one file that needs no TensorFlow",
    )
    add(
        "--ray",
        metavar="ADDRESS",
        nargs="?",
        const=LOCAL,
        help="judge pictures on Ray, and write the verdicts as Parquet to --output: on the cluster "
        "at this address, such as 10.0.0.1:6379, or else on this machine; IMAGE may be a URI (s3, "
        "gs, hdfs). The same command goes on with a run that was cut off",
    )
    add("--output", metavar="FOLDER", help="with --ray: where the verdicts go, a folder or a URI")
    add(
        "--workers",
        metavar="N",
        type=at_least(1, int),
        help="with --ray: detectors at a time, at most (default: as many as processors)",
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
    arguments = parser.parse_args()
    if arguments.ray and not ADDRESS.fullmatch(arguments.ray):  # it is the first IMAGE instead
        arguments.images.insert(0, arguments.ray)
        arguments.ray = LOCAL
    if arguments.ray is None and (arguments.output or arguments.workers):
        parser.error("--output and --workers go with --ray")
    return arguments


def judge_on_ray(models, arguments):
    """Judge pictures on Ray and print how many there were. Returns the exit status."""
    if not arguments.output:
        raise InputError("--ray needs --output, the folder for the verdicts")
    unfit = ("poisoned", "json", "csv", "plot", "scale", "force")
    given = [f"--{name}" for name in unfit if getattr(arguments, name)]
    if given or arguments.engine == "keras":
        raise InputError(f"--ray: goes without {', '.join(given) or '--engine keras'}")
    detector.require("ray", "pyarrow", packages="requirements-scale.txt")
    import screen

    counts = screen.screen(
        arguments.images,
        models,
        arguments.output,
        arguments.ray,
        arguments.workers,
        arguments.max_memory,
        arguments.fpr,
    )
    print(
        f"{printable(arguments.output)}: {counts['pictures']} pictures, {counts['poisoned']} "
        f"poisoned, {counts['unread']} unread"
    )
    return 2 if counts["unread"] else 0


def terms(arguments):
    """The options that detector.terms takes."""
    return {name: getattr(arguments, name) for name in ("fpr", "scale", "force")}


def export(models, arguments):
    """Write the detector of B and G to its file, and print where that is."""
    if arguments.images or len(models) == 1 or arguments.engine:
        raise InputError("--export goes with a MODEL alone, that is no .onnx file")
    path = utils.require_writable(detector.file_path(models[0]), *models)
    detector.export(*models, path, arguments.max_memory, **terms(arguments))
    print(f"Saved detector: {path}")


def judge_pictures(images, models, arguments):
    """Print the verdicts on pictures, a batch after the other. Returns the exit status."""
    alone = len(arguments.images) == 1 and not Path(arguments.images[0]).is_dir()
    if alone:
        picture = utils.read_picture(images[0], arguments.max_memory)  # before the nets are loaded
    judge = detector.load(models, arguments.max_memory, arguments.engine, **terms(arguments))
    detector.require_pictures(judge, models[0])
    shape, classes = judge.shape, judge.classes
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
        answers = judge(np.stack(inputs))
        for path, row in zip(judged, detector.rows(answers, classes)):
            answer = row.pop("verdict")
            print(answer if alone else f"{printable(path)}\t{answer}", flush=True)
            results.append({"path": str(path), "class": answer, **row})
    if arguments.json:
        utils.write_json(results, arguments.json)
    return 2 if unread else 0


def judge_data(images, models, arguments):
    """Print the table of a clean data set and of poisoned ones."""
    with contextlib.ExitStack() as files:
        sets = [
            files.enter_context(utils.open_dataset(path, arguments.max_memory))
            for path in (*images, *arguments.poisoned)
        ]
        judge = detector.load(models, arguments.max_memory, arguments.engine, **terms(arguments))
        for data in sets:
            data.fit_to(judge.shape, judge.classes)
        judged = [judge_all(judge, data) for data in sets]
        results = figures(sets, judged) | {"threshold": judge.limit}
        print(metrics.table(results))
        if arguments.json:
            utils.write_json(results, arguments.json)
        if arguments.csv:
            table = [
                {"index": index, **row, "label": int(label)}
                for data, (answers, _) in zip(sets, judged)
                for index, (row, label) in enumerate(
                    zip(detector.rows(answers, judge.classes), data.labels)
                )
            ]
            utils.write_csv(table, arguments.csv)
        if arguments.plot:
            scores = [answers.score for answers, _ in judged]
            flagged = [some_flagged(data, answers) for data, (answers, _) in zip(sets, judged)]
            metrics.plot_judging(results, scores, flagged, arguments.plot)


def judge_all(judge, data):
    """Judge every image of a Dataset. Returns (metrics.Answers, seconds)."""
    start = time.monotonic()
    batches = nets.side_by_side(judge, (x for x, _ in data.batches()))
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
