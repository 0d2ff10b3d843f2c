"""Judge images with a BadNet B and its repaired net G: a class, 1 to N, or N + 1 for "poisoned".

    python eval_defence.py img/img_9.png anonymous_1_bd_net

prints the class where B and G agree, and N + 1 where they do not (report, section 2, last
paragraph). repair.py makes G from B. For a dataset the command prints how well the defence works.
"""

NEEDS: str = "Python 3.10 to 3.13"  # Python 2 stops at this line, and shows it: see README.md

from defence.base.begin import begin

if __name__ == "__main__":
    begin(NEEDS)

import contextlib
import functools
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from defence.base import files
from defence.base.errors import InputError
from defence.base.process import exit_now, run_command
from defence.base.progress import print_line, print_result, say, track
from defence.explain import findings, natural, streams
from defence.judge import backends, onnx_file
from defence.judge.detector import Answers, Detector, describe_answers, describe_better
from defence.load.class_names import find_class_names
from defence.load.datasets import open_dataset
from defence.load.images import make_input, read_image
from defence.load.models import read_model
from defence.net.inference import map_in_parallel
from defence.options import judge as options

BATCH, THREADS = 50, 3  # images that are judged together, and batches at a time
FLAGGED = 3  # exit status of --fail-on-flagged
# The columns of an image's row.
ROW = ("path", "class", "badnet_class", "repaired_class", "score", "error")


def main() -> int:
    arguments, models = options.parse_eval()
    if arguments.mode == options.EXPORT:
        return export(arguments, models)
    if arguments.mode == options.RAY:
        return judge_on_ray(arguments, models)
    if arguments.mode == options.DATASET:
        return judge_datasets(arguments, models)
    return judge_images(arguments, models)


def export(arguments: Namespace, models: list[Path]) -> int:
    """Write the detector of B and G to its file, and print its name. Return the exit status."""
    path = onnx_file.default_detector_path(models[1])
    badnet, repaired = (read_model(model, arguments.max_bytes) for model in models)
    detector = backends.export_detector(badnet, repaired, path, **take_usage(arguments))
    print_result(f"Saved detector: {path}")
    say(f"the detector's file flags {detector.rule.removeprefix('flagging ')}")
    return conclude(detector, arguments)


def load(
    arguments: Namespace, models: list[Path], backend: str | None, folders: list[str] | None = None
) -> tuple[Detector, list[str] | None]:
    """Load the detector that the options ask for, and the classes' names, or else the folders'."""
    limit = arguments.max_bytes
    detector = backends.load_detector(models, limit, backend, **take_usage(arguments))
    known = detector.class_names or folders
    names = find_class_names(models[0], arguments.labels, detector.classes, limit, known)
    natural.require_clean(arguments, detector, detector.class_names or names)
    return detector, names


def take_usage(arguments: Namespace) -> dict:
    """Return the options that backends.read_usage takes."""
    return {name: getattr(arguments, name) for name in ("fpr", "scale", "force")}


def conclude(detector: Detector, arguments: Namespace, flagged: int = 0, unread: int = 0) -> int:
    """Say what would judge better, and return the exit status. unread: images not read."""
    if detector.better_rate:
        say(describe_better(detector.better_rate))
    if flagged and arguments.fail_on_flagged:
        return FLAGGED
    return 2 if unread else 0


# -------------------------------------------------------------------------------------- images


def judge_images(arguments: Namespace, models: list[Path]) -> int:
    """Print the verdicts on images, batch after batch. Return the exit status."""
    paths = arguments.images
    read = functools.partial(read_image, max_bytes=arguments.max_bytes, formats=arguments.formats)
    if arguments.alone:
        image = read(paths[0])  # before the nets are loaded
    detector, class_names = load(arguments, models, arguments.backend)
    say(detector.rule)
    detector.require_images()

    def prepare(path: Path) -> np.ndarray:
        return make_input(image if arguments.alone else read(path), detector.shape)

    def judge(batch: Sequence[Path]) -> tuple[list[dict], Answers | None]:
        return judge_batch(batch, detector, class_names, prepare)

    size = min(BATCH, max(1, arguments.max_bytes // (16 * math.prod(detector.shape))))
    batches = [paths[start : start + size] for start in range(0, len(paths), size)]
    rows, parts = [], []
    judged_batches = map_in_parallel(judge, batches, THREADS)  # others decode
    for batch_rows, answers in track(judged_batches, "batches", len(batches), bar=False):
        print_verdicts(batch_rows, arguments)
        rows += batch_rows
        parts += [] if answers is None else [answers]
    judged = [row["path"] for row in rows if row["error"] is None]
    errors = [row["error"] for row in rows if row["error"] is not None]
    stream = streams.make_image_stream(
        judged, Answers.concatenate(parts), detector.classes, detector.shape, prepare
    )
    flagged = int(stream.answers.flagged.sum())
    if not arguments.alone:
        say(f"{len(judged)} judged, {flagged} flagged, {len(errors)} unread")
    evidence = findings.examine(stream, detector, class_names, arguments)
    if arguments.json:
        results = {"standing_out": evidence.describe(), "pictures": rows}
        files.write_json(detector.describe() | results, arguments.json)
    if arguments.csv:
        files.write_csv(rows, arguments.csv)
    if arguments.report:
        findings.write_page(arguments.report, detector, [evidence], class_names, errors)
    return conclude(detector, arguments, flagged, len(errors))


def judge_batch(
    batch: Sequence[Path],
    detector: Detector,
    class_names: list[str] | None,
    prepare: Callable[[Path], np.ndarray],
) -> tuple[list[dict], Answers | None]:
    """Judge some images. Return a row for each, and the answers to those that could be read."""
    columns = [*ROW, "class_name"] if class_names else ROW
    rows, inputs = [dict.fromkeys(columns) | {"path": str(path)} for path in batch], []
    for row, path in zip(rows, batch):
        try:
            inputs.append(prepare(path))
        except InputError as error:
            row["error"] = str(error)
    if not inputs:
        return rows, None
    answers = detector.judge(np.stack(inputs))
    judged = [row for row in rows if row["error"] is None]
    for row, verdict in zip(judged, describe_answers(answers, detector.classes, class_names)):
        row |= verdict
    return rows, answers


def print_verdicts(rows: list[dict], arguments: Namespace) -> None:
    """Print the class of each image on stdout, or the reason on stderr where it was not read."""
    for row in rows:
        if row["error"] is not None:
            print_line(f"eval_defence.py: error: {row['error']}")
        elif files.STDOUT not in (arguments.json, arguments.csv):
            names = [row["class_name"]] if "class_name" in row else []
            cells = [row["class"]] if arguments.alone else [row["path"], row["class"], *names]
            print_result(*cells, sep="\t")
    sys.stdout.flush()


def judge_on_ray(arguments: Namespace, models: list[Path]) -> int:
    """Judge images on Ray and print how many there were. Return the exit status."""
    from defence.explain import screen, verdicts  # here, since not every user has Ray

    detector, class_names = load(arguments, models, "onnx")
    say(detector.rule)
    limits = arguments.max_bytes, arguments.formats
    cluster = arguments.ray_address, arguments.workers
    screening = screen.judge_on_ray(
        arguments.images, detector, arguments.output, *cluster, *limits, class_names
    )
    counts, candidates = verdicts.summarise_verdicts(screening, detector.classes)
    print_result(
        f"{arguments.output}: {counts['images']} images, {counts['poisoned']} poisoned, "
        f"{counts['unread']} unread"
    )
    verdicts.say_rest(screening, counts)
    if candidates or arguments.report:
        stream, errors = verdicts.read_stream(screening, detector, *limits)
        evidence = findings.examine(stream, detector, class_names, arguments)
    if arguments.report:
        findings.write_page(
            arguments.report, detector, [evidence], class_names, errors, counts["unread"]
        )
    return conclude(detector, arguments, counts["poisoned"], counts["unread"])


# ------------------------------------------------------------------------------------- datasets


def judge_datasets(arguments: Namespace, models: list[Path]) -> int:
    """Print the table of a clean dataset and of poisoned ones. Return the exit status."""
    from defence.explain import evaluation, plots, tables  # here, for the time that it takes

    with contextlib.ExitStack() as stack:
        datasets = [
            stack.enter_context(open_dataset(path, arguments.max_bytes))
            for path in (*arguments.images, *arguments.poisoned)
        ]
        detector, class_names = load(arguments, models, arguments.backend, datasets[0].class_names)
        for data in datasets:
            data.fit_to(detector.shape, detector.classes, detector.class_names or class_names)
        evaluation.warn_of_mistakes(datasets, detector)
        try:
            judged = [evaluation.judge_dataset(detector, data) for data in datasets]
        except onnx_file.FractionalPixels as error:
            if arguments.backend or len(models) == 1:
                raise InputError(f"{error}; use --backend keras") from error
            say(f"{error}; judging with Keras")
            detector, _ = load(arguments, models, "keras")
            judged = [evaluation.judge_dataset(detector, data) for data in datasets]
        results = evaluation.evaluate(datasets, judged) | detector.describe()
        evidence: list[findings.StreamFindings] = []
        parts = (results["clean"], *results["poisoned"])
        for part, data, (answers, _) in zip(parts, datasets, judged):
            stream = streams.make_dataset_stream(data, answers, detector.classes)
            clean = evidence[0].stream if evidence else None
            evidence.append(findings.examine(stream, detector, class_names, arguments, clean))
            part["standing_out"] = evidence[-1].describe()
        if files.STDOUT not in (arguments.json, arguments.csv):
            print_result(*tables.format_evaluation(results))
        if arguments.json:
            files.write_json(results, arguments.json)
        if arguments.csv:
            rows = evaluation.list_rows(datasets, judged, detector.classes, class_names)
            files.write_csv(rows, arguments.csv)
        if arguments.plot:
            all_answers = [answers for answers, _ in judged]
            plots.plot_evaluation(results, datasets, all_answers, arguments.plot, class_names)
        if arguments.report:
            findings.write_page(arguments.report, detector, evidence, class_names, results=results)
        return conclude(detector, arguments, sum(int(a.flagged.sum()) for a, _ in judged))


if __name__ == "__main__":
    exit_now(run_command(main))
