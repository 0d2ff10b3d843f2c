"""Repair a BadNet: prune, retrain, fine-tune, save.

    python repair.py models/anonymous_1_bd_net.h5 data/clean_validation_data.h5

writes models/anonymous_1_bd_net_defence.h5, the repaired net G. `do_repair` is section 2 of the
report, after Fine-Pruning (Liu, Dolan-Gavitt, Garg, RAID 2018). With --harden a fourth step
follows, which is ours: see defence/harden.py.
"""

import os
import signal

if __name__ == "__main__":  # until cli.command takes over, Ctrl-C ends the imports without a word
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import contextlib
import dataclasses
import sys
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

import utils
from defence import (
    backends,
    check,
    cli,
    files,
    finding,
    folder,
    graph,
    guard_model,
    harden,
    names,
    net,
    onnx_file,
    options,
    page_repaired,
    plots,
    record,
    scan,
    tables,
    training,
)
from defence.cached_net import CachedNet
from defence.cli import InputError, percent, say, track
from defence.inference import predict
from defence.observer import Observer, hold_out
from defence.startup import make_reproducible

FOUND = 3  # exit status of --scan where a class stands out
TAKEN_IN = "what the last layer takes in"
WORTH = 0.9  # the part of B's accuracy that G should have

# --------------------------------------------------------------------- section 2 of the report


def do_repair(badnet, clean, settings, observer):
    """Turn B into G by the report's three steps, and by harden.py's where asked to.

    badnet: Keras classifier.  clean: Dataset, the validation set.  settings: options.Settings.
    observer: an Observer, told of every step; decides nothing.
    Returns a CachedNet: G on the validation set, with the channels that were pruned.
    Raises net.UnfitNet and InputError where B cannot be repaired with this data, WorkError where
    training diverges.  Source: report, section 2.
    """
    split = net.split(badnet, settings.layer)
    last = net.last_weighted(split.head)
    check_memory(split, clean, settings)

    cached = CachedNet.of(split, clean, settings.scale)
    before = cached.accuracy()
    check.warn(cached)
    check.refuse(cached, settings.harden)
    observer.ready(cached)
    if settings.harden:
        observer.scanned(finding.of(cached, settings.seed))

    prune(cached, settings.threshold * before, observer)  # 2a
    rng = np.random.default_rng(settings.seed)
    retrain(cached, last, settings, rng)  # 2b
    observer.retrained(cached)
    fine_tune(cached, before, settings, rng, observer)  # 2c
    observer.fine_tuned(cached)

    if settings.harden:
        harden.harden(cached, settings, rng)
        observer.hardened(cached)
    net.all_trainable(split)  # what this run trained, and what not, should not show in G
    observer.done(cached)
    return cached


def prune(cached, enough, observer):
    """Prune channels by ascending mean activation until accuracy falls below `enough`.

    cached: CachedNet, changed in place; the channel that lowered accuracy too far is taken back.
    enough: accuracy, 0..1.  observer: told of every channel.  Source: report, section 2a.
    """
    order = np.argsort(cached.mean_activation, kind="stable")
    for channel in track(order, "prune"):
        cached.mask(channel)
        observer.channel(cached)
        if cached.accuracy() < enough:
            cached.undo()
            break
    net.prune_channels(cached.split.layer, cached.masked)
    observer.pruned(cached, order, enough)


def retrain(cached, last, settings, rng):
    """Train the last layer with weights alone, in place: a Dense layer, or a convolution.

    Everything before that layer is frozen, so what goes into it is computed once, where it can be.
    Source: report, section 2b.
    """
    model, x = cached.split.head, cached.features
    if parts := net.cut_before(last, cached.split):
        before, model = parts
        x = gathered(before, x, cached.data)
    rate, option = settings.retrain_learning_rate, "--retrain-learning-rate"
    train_epoch = training.make_trainer(
        model, [last], rate, settings.batch_size, rng, option=option
    )
    for epoch in track(range(1, settings.retrain_epochs + 1), "retrain"):
        loss = train_epoch(x, cached.labels)
        say(f"retrain, epoch {epoch} of {settings.retrain_epochs}: loss {loss:.4f}")
    cached.refresh()


def gathered(model, inputs, data):
    """What a model gives for all inputs, float32 (n, …). data: the Dataset they are of."""
    shape, done = (len(inputs), *model.output_shape[1:]), 0
    found = files.room_for(shape, np.float32, data.path, TAKEN_IN, data.max_bytes)
    for part in predict(model, inputs):
        found[done : done + len(part)] = part
        done += len(part)
    return found


def fine_tune(cached, until, settings, rng, observer):
    """Train the layers behind the pruned one, in place, in rounds of epochs, with one Adam.

    Stops after the first round whose validation accuracy, 0..1, is at least `until`.
    observer: told of every round.  Source: report, section 2c.
    """
    head, layers = cached.split.head, list(graph.leaves(cached.split.head))
    train_epoch = training.make_trainer(
        head, layers, settings.learning_rate, settings.batch_size, rng, option="--learning-rate"
    )
    for number in range(1, settings.rounds + 1):
        for _ in track(range(settings.epochs), f"fine-tune, round {number}"):
            loss = train_epoch(cached.features, cached.labels)
        cached.refresh()
        observer.round(cached, loss)
        if cached.accuracy() >= until:
            break


def check_memory(split, clean, settings):
    """Raise InputError where a step of the repair would take more memory than the dataset may."""
    max_bytes = clean.max_bytes
    guard_model.check_step_fits(split.head, "--batch-size", settings.batch_size, max_bytes)
    if parts := net.cut_before(net.last_weighted(split.head), split):
        size = 4 * len(clean) * int(np.prod(parts[0].output_shape[1:]))
        files.check_room(clean.path, TAKEN_IN, size, max_bytes)
    if settings.harden:
        scan.check_memory(split.net, clean)
        harden.check_memory(split.net, clean, settings)


# ---------------------------------------------------------------------------------- the command


def main():
    start = time.monotonic()
    arguments = options.parse_repair()
    settings = cli.take_settings(options.Settings, arguments)
    badnet, output, exported = check_call(arguments)
    with contextlib.ExitStack() as opened:
        clean, *poisoned = [
            opened.enter_context(utils.open_dataset(path, arguments.max_bytes))
            for path in (arguments.data, *arguments.poisoned)
        ]
        # Read while TensorFlow is imported, which keeps one processor busy and no disk.
        digest = ThreadPool(1).apply_async(folder.sha256, [clean.path])
        say("loading TensorFlow and the BadNet")
        make_reproducible(settings.seed)
        model = badnet.load()
        for data in (clean, *poisoned):
            data.fit_to(model.input_shape[1:], model.output_shape[1])
        called = names.find(
            badnet.path, arguments.labels, model.output_shape[1], arguments.max_bytes
        )
        held_out = None
        if settings.holdout and not looks_only(arguments):
            clean, held_out = hold_out(clean, settings.holdout, settings.seed)
        observer = Observer(poisoned, held_out)
        try:
            if settings.layer == "help":
                return print("\n".join(map(net.in_words, net.feature_maps(model))))
            if looks_only(arguments):
                cached = CachedNet.of(net.split(model, settings.layer), clean, settings.scale)
                if arguments.check:
                    return check_data(cached)
                return scan_net(cached, settings.seed, arguments.json, called)
            repaired = do_repair(model, clean, settings, observer)
        except net.UnfitNet as error:
            raise InputError(f"{badnet.path}: {error}") from error
        data = {"file": clean.path.name, "sha256": digest.get(), "images": len(clean)}
    made = record.make(observer, repaired, badnet, data, settings)
    warn_if_ruined(made)
    utils.save_model(repaired.split.net, output, **{record.ATTRIBUTE: made.to_json()})
    seconds = observer.seconds | {"total": round(time.monotonic() - start, 3)}
    write_results(made, observer.finding, seconds, called, arguments)
    talk = sys.stderr if arguments.json == files.STDOUT else sys.stdout
    print(tables.summary(made, seconds, called), f"Saved model: {output}", sep="\n", file=talk)
    if exported and export(badnet, output, exported, arguments.max_bytes):
        print(f"Saved detector: {exported}", file=talk)
    if arguments.report:
        print(f"Saved page: {arguments.report}", file=talk)


def write_results(made, found, seconds, called, arguments):
    """Write what --json, --plot and --report ask for.

    made: the RepairRecord.  found: the Finding about the BadNet, or None.  seconds: {step: s}.
    called: names of the classes, or None.
    """
    if arguments.json:
        more = {"finding": found and dataclasses.asdict(found), "seconds": seconds}
        files.write_json(dataclasses.asdict(made) | more, arguments.json)
    if arguments.plot:
        plots.pruning_curve(made, arguments.plot)
    if arguments.report:
        page_repaired.write(arguments.report, made, found, seconds, called)


def export(badnet, repaired, path, max_bytes):
    """Write the detector of B, a ModelFile, and G. Returns whether these nets allow that."""
    say("writing the detector's file")
    try:
        backends.export(badnet, utils.read_model(repaired, max_bytes), path)
    except InputError as error:
        say(f"{error}; eval_defence.py judges with Keras")
        return False
    return True


def warn_if_ruined(made):
    """Warn where G knows much less than B did. made: the RepairRecord."""
    before, *_, after = (made.accuracy[step] for step in tables.STEPS if step in made.accuracy)
    if after < WORTH * before:
        cli.warn(
            f"G is right on {percent(after)} of the images, the BadNet was on {percent(before)}: "
            "it flags what it has forgotten"
        )


def check_data(cached):
    """Print what --check tells of the validation set. Returns the exit status."""
    print("\n".join(check.report(cached)))
    return int(check.warn(cached))


def scan_net(cached, seed, path, called):
    """Print whether the net looks backdoored, and to which class. Returns the exit status.

    path: of the JSON file to write, or None.  called: the classes' names, or None.
    """
    scan.check_memory(cached.split.net, cached.data)
    check.warn(cached)
    check.refuse(cached, harden=False)
    found = finding.of(cached, seed)
    if path:
        files.write_json(dataclasses.asdict(found), path)
    talk = sys.stderr if path == files.STDOUT else sys.stdout
    print(*finding.in_words(found, called), sep="\n", file=talk)
    return FOUND if found.finding == "backdoor" else 0


def looks_only(arguments):
    """Whether the command is to look at the net or the data, and to repair nothing."""
    return arguments.check or arguments.scan


def check_call(arguments):
    """Check what can be checked before the seconds that importing TensorFlow takes.

    Returns (B's ModelFile, G's path, the detector's path or None).  Raises InputError.
    """
    badnet = utils.read_model(arguments.model, arguments.max_bytes)
    made = utils.default_output(badnet.path)
    output = Path(made if arguments.output is None else arguments.output)
    if output.suffix != ".h5":
        raise InputError(f"{output}: the repaired net is saved as a .h5 file")
    exported = None if arguments.no_export else onnx_file.default_path(output)
    outputs = {"--output": output}
    outputs |= {f"--{name}": getattr(arguments, name) for name in ("json", "plot", "report")}
    inputs = [badnet.path, arguments.data, *arguments.poisoned]
    if looks_only(arguments):
        files.check_writable({"--json": arguments.json}, inputs)
    else:
        files.check_writable(outputs | {"the detector's file": exported}, inputs)
    if arguments.plot:
        plots.require_format(arguments.plot)
    if arguments.report:
        options.require_report(arguments.report)
    _ = badnet.declared
    record.refuse_repaired(badnet)
    if output.exists() and not looks_only(arguments):
        say(f"{output} will be replaced: {record.in_words(output, arguments.max_bytes)}")
    return badnet, output, exported


if __name__ == "__main__":
    cli.leave(cli.command(main))
