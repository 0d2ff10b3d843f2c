"""Judge images with a BadNet B and its repaired net G: a class, 1 to N, or N + 1 for "poisoned".

    python eval_defence.py img/img_9.png anonymous_1_bd_net

prints the class where B and G agree, and N + 1 where they do not (report, section 2, last
paragraph). G is what repair.py made of B. For a dataset it prints what the defence is worth on it.
"""

import os
import signal

if __name__ == "__main__":  # until cli.command takes over, Ctrl-C ends the imports without a word
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import contextlib
import dataclasses
import itertools
import math
import sys
import time
from pathlib import Path

import numpy as np

import utils
from defence import (
    backends,
    cli,
    detector,
    figures,
    files,
    flagged,
    folder,
    names,
    onnx_file,
    options,
    plots,
    streams,
    tables,
    where,
)
from defence.cli import InputError, printable, say, track
from defence.inference import parallel_map

PICTURES, THREADS = 50, 3  # judged together, and so many of these at a time
STDIN = "-"  # as IMAGE
ROW = ("path", "class", "badnet_class", "repaired_class", "score", "error")  # what is told of each


def main():
    arguments = options.parse_eval()
    models = backends.find_models(arguments.model, arguments.repaired)
    if not arguments.ray and (arguments.output or arguments.workers or arguments.ray_address):
        raise InputError("--output, --workers and --ray-address go with --ray")
    if arguments.export:
        return export(models, arguments)
    if not arguments.images:
        raise InputError("give an IMAGE, or --export")
    given = arguments.images
    alone = len(given) == 1 and given[0] != STDIN and not Path(given[0]).is_dir()
    if arguments.null and STDIN not in given:
        raise InputError("-0 goes with -, for the names on stdin")
    if STDIN in given:
        arguments.images = [name for name in given if name != STDIN]
        arguments.images += names_on_stdin(arguments.null)
        if not arguments.images:
            raise InputError("-: there are no names on stdin")
    if arguments.ray:
        return judge_on_ray(models, arguments)
    if arguments.labelled and not (len(given) == 1 and Path(given[0]).is_dir()):
        raise InputError("--labelled goes with one folder as IMAGE")
    given = map(Path, arguments.images)
    datasets = [
        path
        for path in given
        if arguments.labelled or path.suffix.lower() in utils.DATASET_SUFFIXES
    ]
    images = datasets if arguments.labelled else files.list_files(arguments.images)
    if datasets and len(images) > 1:
        raise InputError(f"{datasets[0]}: give one dataset alone, or pictures")
    if (arguments.poisoned or arguments.plot) and not datasets:
        raise InputError("--poisoned and --plot go with a dataset as IMAGE, not pictures")
    outputs = {f"--{name}": getattr(arguments, name) for name in ("json", "csv", "plot", "report")}
    files.check_writable(outputs, [*images, *arguments.poisoned, *models])
    if arguments.plot:
        plots.require_format(arguments.plot)
    if arguments.report:
        options.require_report(arguments.report)
    if datasets:
        return judge_datasets(images, models, arguments)
    return judge_pictures(images, models, arguments, alone)


def names_on_stdin(null):
    """The names on stdin, one a line or, if null, each ended by NUL. Empty ones are left out."""
    given = sys.stdin.buffer.read()
    if null:
        return [os.fsdecode(name) for name in given.split(b"\0") if name]
    if b"\0" in given:
        raise InputError("-: the names end in NUL; add -0")
    return [os.fsdecode(name) for name in given.replace(b"\r\n", b"\n").split(b"\n") if name]


def use_of(arguments):  # what backends.usage_from_record takes
    return {name: getattr(arguments, name) for name in ("fpr", "scale", "force")}


def load(models, arguments, backend):
    """The Detector that the options ask for, run by a backend."""
    return backends.load(models, arguments.max_bytes, backend, **use_of(arguments))


def export(models, arguments):
    """Write the detector of B and G to its file, and print where that is."""
    unfit = ("images", "backend", "ray", "poisoned", "json", "csv", "plot", "report", "labels")
    if len(models) == 1 or any(getattr(arguments, name) for name in unfit):
        raise InputError("--export goes with a MODEL alone, one that is not an .onnx file")
    path = onnx_file.default_path(models[1])
    files.check_writable({"--export": path}, models)
    badnet, repaired = (utils.read_model(each, arguments.max_bytes) for each in models)
    say(backends.export(badnet, repaired, path, **use_of(arguments)).rule)
    print(f"Saved detector: {path}")


def judge_on_ray(models, arguments):
    """Judge pictures on Ray and print how many there were. Returns the exit status."""
    if not arguments.output:
        raise InputError("--ray needs --output, the folder for the verdicts")
    unfit = ("poisoned", "json", "csv", "plot", "scale", "force")
    given = [f"--{name}" for name in unfit if getattr(arguments, name)]
    if given or arguments.backend == "keras":
        raise InputError(f"{', '.join(given) or '--backend keras'}: does not go with --ray")
    onnx_file.require("ray", "pyarrow", packages="requirements-scale.txt")
    if arguments.report:
        files.check_writable({"--report": arguments.report}, models)
        options.require_report(arguments.report)
        if Path(arguments.report).resolve().is_relative_to(Path(arguments.output).resolve()):
            raise InputError(f"{arguments.report}: is inside --output, where verdicts alone may be")
    from defence import screen

    found = load(models, arguments, "onnx")
    say(found.rule)
    called = names.find(models[0], arguments.labels, found.classes, arguments.max_bytes)
    counts, standing = screen.screen(
        arguments.images,
        found,
        arguments.output,
        arguments.ray_address,
        arguments.workers,
        arguments.max_bytes,
        arguments.formats,
        called,
    )
    print(
        f"{printable(arguments.output)}: {counts['pictures']} pictures, {counts['poisoned']} "
        f"poisoned, {counts['unread']} unread"
    )
    if arguments.report:
        how = arguments.output, arguments.max_bytes, arguments.formats
        stream, why = screen.stream(arguments.images, found, *how)
        looked = look(stream, found, called, arguments)
        report(arguments.report, found, [looked], called, why, counts["unread"])
    else:
        tell_standing(standing, called)
    return status(arguments, counts["poisoned"], counts["unread"])


def status(arguments, flagged, unread=0):
    """The exit status where so many images were flagged, and so many could not be read."""
    if flagged and arguments.fail_on_flagged:
        return 3
    return 2 if unread else 0


# ------------------------------------------------------------------------------------- pictures


def judge_pictures(images, models, arguments, alone):
    """Print the verdicts on pictures, batch after batch. Returns the exit status.

    alone: whether there is one, that was named: print the number alone.
    """
    if alone:
        picture = read(images[0], arguments)  # before the nets are loaded
    found = load(models, arguments, arguments.backend)
    say(found.rule)
    found.require_pictures()
    called = names.find(models[0], arguments.labels, found.classes, arguments.max_bytes)
    blank, results = dict.fromkeys([*ROW, "class_name"] if called else ROW), []
    count = min(PICTURES, max(1, arguments.max_bytes // (16 * math.prod(found.shape))))

    def as_input(path):
        return utils.as_input(picture if alone else read(path, arguments), found.shape)

    def judge(paths):
        rows, inputs = [blank | {"path": str(path)} for path in paths], []
        for row, path in zip(rows, paths):
            try:
                inputs.append(as_input(path))
            except InputError as error:
                row["error"] = str(error)
        judged = [row for row in rows if row["error"] is None]
        if judged:
            answers = found.judge(np.stack(inputs))
            for row, said in zip(judged, detector.rows(answers, found.classes, called)):
                row |= said
        return rows

    parts = (images[start : start + count] for start in range(0, len(images), count))
    for rows in parallel_map(judge, parts, THREADS):  # some decode while the nets of others run
        tell(rows, arguments, alone)
        results += rows
    judged = [row for row in results if row["error"] is None]
    stream = streams.of_pictures(judged, found.shape, found.classes, as_input)
    poisoned, unread = int(stream.answers.flagged.sum()), len(results) - len(judged)
    if not alone:
        say(f"{len(judged)} judged, {poisoned} flagged, {unread} unread")
    part = look(stream, found, called, arguments)
    if arguments.json:
        told = {"standing_out": described(part), "pictures": results}
        files.write_json(found.described() | told, arguments.json)
    if arguments.csv:
        files.write_csv(results, arguments.csv)
    if arguments.report:
        why = [row["error"] for row in results if row["error"] is not None]
        report(arguments.report, found, [part], called, why[: streams.UNREAD], unread)
    return status(arguments, poisoned, unread)


def look(stream, found, called, arguments, beside=None):
    """Say which classes may be targets, by the flagged images. Returns the where.Looked.

    stream: a streams.Stream.  called: names of the classes, or None.  beside: as for where.look.
    """
    judged = stream.answers.badnet, stream.answers.flagged, stream.classes
    if arguments.json or arguments.report:
        looked = where.look_at(stream, flagged.unusual(*judged), found.judge, beside)
    else:
        looked = where.Looked(stream, flagged.standing_out(*judged), [])
    tell_standing(looked.standing, called, stream.path)
    if arguments.report and not looked.standing:
        looked.alone = where.look_alone(stream, found.judge, beside)
    return looked


def tell_standing(standing, called, path=None):
    """Say which classes may be targets. standing: [flagged.Standing, …].  path: of a dataset."""
    for each in standing:
        name = called and names.of(each.target, called)
        say((f"{path}: " if path else "") + flagged.in_words(each, name))


def described(looked):
    """The classes that stand out, as a list of dicts for JSON. looked: a where.Looked."""
    found = [dataclasses.asdict(each) for each in looked.standing]
    return [
        each | (seen.described() if seen else {})
        for each, seen in itertools.zip_longest(found, looked.seen)
    ]


def report(path, *told, **more):
    """Write the page of --report. The arguments are page_judged.write's."""
    from defence import page_judged  # here, for the time that it takes

    page_judged.write(path, *told, **more)
    say(f"wrote {path}")


def tell(rows, arguments, alone):
    """Print the class of each picture on stdout, or on stderr why it could not be read."""
    for row in rows:
        if row["error"] is not None:
            cli.tell(f"eval_defence.py: error: {row['error']}")
        elif files.STDOUT not in (arguments.json, arguments.csv):
            named = [row["class_name"]] if "class_name" in row else []
            cells = [row["class"]] if alone else [row["path"], row["class"], *named]
            print(*map(printable, cells), sep="\t")
    sys.stdout.flush()


def read(path, arguments):
    return utils.read_picture(path, arguments.max_bytes, arguments.formats)


# ------------------------------------------------------------------------------------- datasets


def judge_datasets(images, models, arguments):
    """Print the table of a clean dataset and of poisoned ones."""
    with contextlib.ExitStack() as opened:
        datasets = [
            opened.enter_context(utils.open_dataset(path, arguments.max_bytes))
            for path in (*images, *arguments.poisoned)
        ]
        found = load(models, arguments, arguments.backend)
        for data in datasets:
            data.fit_to(found.shape, found.classes)
        called = names.find(models[0], arguments.labels, found.classes, arguments.max_bytes)
        warn_of_mistaken(datasets)
        warn_of_known(datasets, found.repaired_with or {})
        try:
            judged = [judge_dataset(found, data) for data in datasets]
        except onnx_file.NotWhole as error:
            if arguments.backend or len(models) == 1:
                raise InputError(f"{error}; use --backend keras") from error
            say(f"{error}; judging with Keras")
            found = load(models, arguments, "keras")
            judged = [judge_dataset(found, data) for data in datasets]
        results = evaluate(datasets, judged) | found.described()
        looked = []
        for each, data, (answers, _) in zip(
            (results["clean"], *results["poisoned"]), datasets, judged
        ):
            stream = streams.of_dataset(data, answers, found.classes)
            clean = looked[0].stream if looked else None
            looked.append(look(stream, found, called, arguments, clean))
            each["standing_out"] = described(looked[-1])
        if files.STDOUT not in (arguments.json, arguments.csv):
            print(tables.evaluation(results))
        if arguments.json:
            files.write_json(results, arguments.json)
        if arguments.csv:
            files.write_csv(csv_rows(datasets, judged, found.classes, called), arguments.csv)
        if arguments.plot:
            plots.evaluation(results, datasets, [each[0] for each in judged], arguments.plot)
        if arguments.report:
            report(arguments.report, found, looked, called, results=results)
        return status(arguments, sum(np.sum(answers.flagged) for answers, _ in judged))


def warn_of_mistaken(datasets):
    """Warn of a clean Dataset, the first, that looks poisoned, and of others that look clean."""
    clean, *poisoned = datasets
    if looks_poisoned(clean):
        cli.warn(f"{clean.path}: is judged as clean, but looks poisoned; see --poisoned")
    for data in poisoned:
        if not looks_poisoned(data):
            cli.warn(f"{data.path}: is judged as poisoned, but its labels differ, as clean ones do")


def looks_poisoned(data):
    """Whether a Dataset has its images' true labels as well, or one label for all of several."""
    return data.true_labels is not None or len(data) > 1 == len(np.unique(data.labels))


def judge_dataset(found, data):
    """Judge every image of a Dataset with a Detector. Returns (detector.Answers, seconds)."""
    start = time.monotonic()
    batches = parallel_map(found.judge, (x for x, _ in data.batches()))
    parts = [vars(part).values() for part in track(batches, data.path.name, data.batch_count)]
    return detector.Answers(*map(np.concatenate, zip(*parts))), time.monotonic() - start


def evaluate(datasets, judged):
    """The figures of a clean Dataset and of poisoned ones, as a dict that JSON can hold.

    judged: for each of them what judge_dataset returned.
    """
    shown = [
        {"file": str(data.path), "images": len(data), "seconds": max(0.001, round(seconds, 3))}
        for data, (_, seconds) in zip(datasets, judged)
    ]
    (clean, _), *others = judged
    shown[0]["figures"] = of_clean = figures.clean_figures(clean, datasets[0].labels)
    for each, data, (answers, _) in zip(shown[1:], datasets[1:], others):
        each["figures"] = figures.poisoned_figures(
            answers, data.labels, data.true_labels, clean.score, of_clean
        )
    return {"clean": shown[0], "poisoned": shown[1:]}


def warn_of_known(datasets, known):
    """Warn of a dataset that G was repaired with, {"file", "sha256"}, as its record says."""
    for data in datasets:
        if data.path.name == known.get("file") and folder.sha256(data.path) == known.get("sha256"):
            cli.warn(f"{data.path}: G was repaired with it, so that the figures flatter G")


def csv_rows(datasets, judged, classes, called):
    """Yield the row of each image, a dict; index and label count from 0, classes from 1.

    called: the names of the classes, or None.
    """
    for data, (answers, _) in zip(datasets, judged):
        pairs = zip(detector.rows(answers, classes, called), data.labels)
        for index, (row, label) in enumerate(pairs):
            yield {"dataset": str(data.path), "index": index, **row, "label": int(label)}


if __name__ == "__main__":
    cli.leave(cli.command(main))
