"""Repair a BadNet: prune, retrain, fine-tune, save.

    python repair.py models/anonymous_1_bd_net.h5 data/clean_validation_data.h5

writes models/anonymous_1_bd_net_defence.h5, the repaired net G. `do_repair` is section 2 of the
report, after Fine-Pruning (Liu, Dolan-Gavitt, Garg, RAID 2018). --harden adds a fourth step, which
is ours: see defence/beyond/harden.py.
"""

NEEDS: str = "Python 3.10 to 3.13"  # Python 2 stops at this line, and shows it: see README.md

from defence.base.begin import begin

if __name__ == "__main__":
    begin(NEEDS)

import contextlib
import dataclasses
import time
from argparse import Namespace
from multiprocessing.pool import AsyncResult, ThreadPool
from typing import Any

import numpy as np

from defence.base.arguments import take_settings
from defence.base.errors import InputError
from defence.base.process import exit_now, run_command
from defence.base.progress import print_result, say, track
from defence.base.startup import make_reproducible
from defence.beyond import check, finding, harden, memory
from defence.beyond.observer import Observer
from defence.beyond.settings import Settings
from defence.explain import outputs
from defence.judge.record import ATTRIBUTE, RepairRecord, make_record
from defence.load.class_names import find_class_names
from defence.load.datasets import Dataset, hold_out, open_dataset
from defence.load.models import ModelFile, save_model
from defence.net import graph, split, training
from defence.net.cached_net import CachedNet
from defence.net.inference import run_model
from defence.options.repair import announce_replacement, parse_repair

SCAN_STATUS = {"nothing": 0, "backdoor": 3, "none": 4}  # exit statuses of --scan, by finding

# --------------------------------------------------------------------- section 2 of the report


def do_repair(
    badnet: Any,
    clean: Dataset,
    settings: Settings,
    observer: Observer | None = None,
    cached: CachedNet | None = None,
) -> CachedNet:
    """Turn the BadNet B into the repaired net G, by the report's three steps.

    badnet: Keras classifier, scaled images (n, height, width, channels) → scores (n, N).
    clean: the validation set, fitted to B (`Dataset.fit_to`).
    observer: measures and logs every step; it decides nothing.
    cached: B on the validation set, where the caller has it already.
    Return G on the validation set; its `split.net` is the Keras model.
    Raise UnfitNet where B has no feature map to prune, InputError where the data cannot serve,
    WorkError where training diverges.  Source: report, section 2.
    """
    if cached is None:
        parts = split.split_net(badnet, settings.layer)
        cached = CachedNet.from_dataset(parts, clean, settings.scale, settings.seed)
    observer = observer or Observer()
    observer.on_start(cached)
    before = cached.accuracy()

    prune(cached, settings.threshold * before, observer)  # a
    retrain(cached, settings)  # b
    observer.on_retrained(cached)
    fine_tune(cached, before, settings, observer)  # c
    observer.on_fine_tuned(cached)

    split.make_trainable(cached.split)  # G's file should not show which layers were frozen
    return cached


def prune(cached: CachedNet, enough: float, observer: Observer) -> None:
    """Prune channels by ascending mean activation until accuracy falls below `enough`, 0..1.

    The channel that lowered accuracy too far is restored.  Source: report, section 2a.
    """
    order = np.argsort(cached.mean_activation, kind="stable")
    for channel in track(order, "prune"):
        cached.mask(channel)
        observer.on_channel(cached)
        if cached.accuracy() < enough:
            cached.undo()
            break
    split.prune_channels(cached.split.layer, cached.masked)
    observer.on_pruned(cached, order, enough)


def retrain(cached: CachedNet, settings: Settings) -> None:
    """Train only the last layer that has weights, Dense or a convolution, in place.

    All layers before it are frozen, so its input is computed once.  Source: report, section 2b.
    """
    last = split.find_last_weighted(cached.split.head)
    model, x = cached.split.head, cached.features
    if parts := split.cut_before(last, cached.split):
        before, model = parts
        x = run_model(before, x, cached.data.path, cached.data.max_bytes)
    rate, option = settings.retrain_learning_rate, "--retrain-learning-rate"
    train_epoch = training.make_trainer(
        model, [last], rate, settings.batch_size, cached.rng, option=option
    )
    epochs = settings.retrain_epochs
    for epoch, loss in training.run_epochs(train_epoch, x, cached.labels, epochs, "retrain"):
        say(f"retrain, epoch {epoch} of {epochs}: loss {loss:.4f}")
    cached.refresh()


def fine_tune(cached: CachedNet, until: float, settings: Settings, observer: Observer) -> None:
    """Train the layers behind the pruned one, in place, in rounds of epochs, with one Adam.

    Stop after the first round with a validation accuracy of at least `until`, 0..1.
    Source: report, section 2c.
    """
    head, x, y = cached.split.head, cached.features, cached.labels
    rate, option = settings.learning_rate, "--learning-rate"
    layers = list(graph.list_layers(head))
    train_epoch = training.make_trainer(
        head, layers, rate, settings.batch_size, cached.rng, option=option
    )
    for _ in range(settings.rounds):
        *_, (_, loss) = training.run_epochs(train_epoch, x, y, settings.epochs, "fine-tune")
        cached.refresh()
        observer.on_round(cached, loss)
        if cached.accuracy() >= until:
            break


# ---------------------------------------------------------------------------------- the command


@dataclasses.dataclass
class Job:
    """What each mode of the command works on. sources: as make_record takes them, once hashed."""

    arguments: Namespace
    settings: Settings
    badnet: ModelFile
    model: Any
    clean: Dataset
    poisoned: list[Dataset]
    class_names: list[str] | None
    sources: AsyncResult


def main() -> int | None:
    start = time.monotonic()
    arguments, badnet = parse_repair()
    settings = take_settings(Settings, arguments)
    with contextlib.ExitStack() as stack:
        clean, *poisoned = [
            stack.enter_context(open_dataset(path, arguments.max_bytes))
            for path in (arguments.data, *arguments.poisoned)
        ]
        # Hash while TensorFlow is imported: the import keeps one processor busy, but no disk.
        sources = ThreadPool(1).map_async(Dataset.identify, (clean, *poisoned))
        say("loading TensorFlow and the BadNet")
        make_reproducible(settings.seed)
        model = badnet.load()
        shape, classes = model.input_shape[1:], model.output_shape[1]
        class_names = find_class_names(
            badnet.path, arguments.labels, classes, arguments.max_bytes, clean.class_names
        )
        for data in (clean, *poisoned):
            data.fit_to(shape, classes, class_names)
        job = Job(arguments, settings, badnet, model, clean, poisoned, class_names, sources)
        try:
            if settings.layer == "help":
                print_result(*map(split.describe_map, split.find_feature_maps(model)))
                return None
            if arguments.check:
                return check_data(job)
            if arguments.scan:
                return scan(job)
            record, observer = repair(job)
        except split.UnfitNet as error:
            raise InputError(f"{badnet.path}: {error}") from error
    seconds = observer.seconds | {"total": round(time.monotonic() - start, 3)}
    outputs.print_repair(record, observer.finding, seconds, class_names, badnet, arguments)
    return None


def check_data(job: Job) -> int:
    """Print whether the validation set can serve (--check). Return the exit status."""
    cached = cache_badnet(job)
    print_result(*check.describe_dataset(cached))
    warned = check.warn_of_problems(cached, job.class_names)
    print_result(check.conclude(warned))
    return int(warned)


def scan(job: Job) -> int:
    """Print whether the net looks backdoored, to which class (--scan). Return the exit status."""
    memory.check_scan_fits(job.model, job.clean)  # before the minutes that large images take
    cached = cache_badnet(job)
    check.warn_of_problems(cached, job.class_names)
    check.refuse_unfit(cached, harden=False)
    result = finding.scan_net(cached, job.settings.seed)
    outputs.print_scan(result, job.class_names, job.badnet, job.arguments)
    return SCAN_STATUS[result.finding]


def repair(job: Job) -> tuple[RepairRecord, Observer]:
    """Make G and save it. Return its record, and the observer of its repair."""
    settings, clean, held_out = job.settings, job.clean, None
    if settings.holdout:
        clean, held_out = hold_out(clean, settings.holdout, settings.seed)
    observer = Observer(job.poisoned, held_out)
    parts = split.split_net(job.model, settings.layer)
    measured = [clean, *job.poisoned, *filter(None, [held_out])]
    memory.check_repair_fits(parts, measured, settings)
    cached = CachedNet.from_dataset(parts, clean, settings.scale, settings.seed)
    check.warn_of_problems(cached, job.class_names)
    check.refuse_unfit(cached, settings.harden)
    announce_replacement(job.arguments)  # no input can be refused any more
    sources = job.sources.get()
    observer.end_step("features")
    if settings.harden:
        observer.on_scanned(finding.scan_net(cached, settings.seed))
    do_repair(job.model, clean, settings, observer, cached)
    if settings.harden:
        harden.harden_net(cached, settings)
        observer.on_hardened(cached)
    observer.on_end(cached)
    # Names of a labels.txt beside B are found there again, and may be corrected there.
    names = job.class_names if job.arguments.labels or clean.class_names else None
    record = make_record(observer, cached, job.badnet, sources, settings, names)
    check.warn_if_ruined(record)
    save_model(cached.split.net, job.arguments.output, **{ATTRIBUTE: record.to_json()})
    return record, observer


def cache_badnet(job: Job) -> CachedNet:
    """Run B's trunk over the validation set."""
    parts = split.split_net(job.model, job.settings.layer)
    return CachedNet.from_dataset(parts, job.clean, job.settings.scale)


if __name__ == "__main__":
    exit_now(run_command(main, "nothing was saved"))
