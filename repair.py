"""Repair a BadNet: prune, retrain, fine-tune, save.

    python repair.py models/anonymous_1_bd_net.h5 data/clean_validation_data.h5

writes models/anonymous_1_bd_net_defence.h5, the repaired net G. The three steps are those of
sections 2a to 2c of the report, after Fine-Pruning (Liu, Dolan-Gavitt, Garg, RAID 2018). With
--harden a fourth follows, which is ours: see harden.py.
"""

import os
import signal

if __name__ == "__main__":  # until `command` takes over, Ctrl-C ends the imports without a word
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import contextlib
import importlib.metadata
import math
import sys
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

import detector
import guard
import harden
import metrics
import nets
import utils
from metrics import percent
from terminal import InputError, Parser, at_least, command, memory_option, say, track


def main():
    arguments = parse_arguments()
    start = time.monotonic()
    badnet_path = utils.require_file(arguments.model)
    output = arguments.output or utils.default_output(badnet_path)
    if Path(output).suffix != ".h5":
        raise InputError(f"{output}: the repaired net is saved as a .h5 file")
    inputs = [badnet_path, arguments.data, *arguments.poisoned]
    exported = detector.file_path(badnet_path) if arguments.export else None
    for path in filter(None, (output, arguments.json, arguments.plot, exported)):
        utils.require_writable(path, *inputs)
    if exported:
        detector.require(*detector.EXPORTS)
    if arguments.plot:
        metrics.require_plot_format(arguments.plot)
    limit = arguments.max_memory
    utils.inspect_model(badnet_path, limit)  # before the seconds that the import takes
    with contextlib.ExitStack() as files:
        clean, *poisoned = [
            files.enter_context(utils.open_dataset(path, limit))
            for path in (arguments.data, *arguments.poisoned)
        ]
        # Read while TensorFlow is imported, which keeps one processor busy and no disk.
        digest = ThreadPool(1).apply_async(utils.sha256, [arguments.data])
        say("loading TensorFlow and the BadNet")
        nets.make_reproducible(arguments.seed)
        badnet = utils.load_badnet(badnet_path, limit)
        for data in (clean, *poisoned):
            data.fit_to(badnet.input_shape[1:], badnet.output_shape[1])
        held_out = None
        if arguments.holdout:
            clean, held_out = hold_out(clean, arguments.holdout, arguments.seed)
        try:
            record = repair(badnet, clean, poisoned, arguments, held_out)
        except nets.UnfitNet as error:
            raise InputError(f"{badnet_path}: {error}") from error
        record = provenance(badnet_path, clean, digest.get(), arguments) | record
    record["seconds"]["total"] = round(time.monotonic() - start, 3)
    utils.save_model(badnet, record, output)
    if arguments.json:
        utils.write_json(record, arguments.json)
    if arguments.plot:
        metrics.plot_pruning(record, arguments.plot)
    print(metrics.summary(record))
    print(f"Saved model: {output}")
    if exported:
        detector.export(badnet_path, Path(output), exported, limit)
        print(f"Saved detector: {exported}")


# The constants of the method: type, the report's value, what it is.
SETTINGS = {
    "threshold": (at_least(0, most=1), 0.95, "prune down to this share of the accuracy before"),
    "retrain_epochs": (at_least(0, int), 5, "epochs for the last Dense layer"),
    "retrain_learning_rate": (at_least(0, above=True), 1e-3, "Adam's, for the last Dense layer"),
    "rounds": (at_least(0, int), 6, "rounds of fine-tuning at most"),
    "epochs": (at_least(1, int), 5, "epochs in a round"),
    "learning_rate": (at_least(0, above=True), 1e-4, "Adam's, for fine-tuning"),
    "batch_size": (at_least(1, int), 32, "images in a training step"),
    **harden.SETTINGS,
    "seed": (at_least(0, int, most=2**32 - 1), 0, "of the order of images and of dropout"),
    "holdout": (at_least(0, most=0.9), 0.0, "share of DATA kept out of the repair, to measure it"),
}


def parse_arguments(words=None):
    parser = Parser(
        description="Repair a BadNet with clean data: prune the channels that clean images use "
        "least, retrain the last Dense layer, fine-tune the layers behind the pruned one; with "
        "--harden also train all of the net on pictures that are painted on.",
        epilog="Example: repair.py models/demo_bd_net.h5 data/demo_clean_validation_data.h5 "
        "--plot curve.png. Exit status: 0 repaired, 1 failed, 2 wrong input.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="the BadNet B: a Keras model, .h5 or .keras")
    add("data", metavar="DATA", help="clean validation set: .h5 with 'data' and 'label'")
    add("--output", metavar="FILE", help="where G goes (default: models/NAME_defence.h5)")
    add("--layer", metavar="NAME", help="convolution to prune (default: the last on every path)")
    add(
        "--harden",
        action="store_true",
        help="a fourth step, not the report's, against backdoors in channels that clean images "
        "use: teach G to answer pictures with random patches as B answers them without",
    )
    for name, (kind, value, what) in SETTINGS.items():
        option, shown = "--" + name.replace("_", "-"), f"{what} (default: {value})"
        add(option, metavar="N", type=kind, default=value, help=shown)
    add(
        "--poisoned",
        metavar="FILE",
        nargs="+",
        action="extend",
        default=[],
        help="poisoned data, 'label' being the attack's target: report the attack success rate "
        "after each step; nothing is trained or decided on it",
    )
    add(
        "--export",
        action="store_true",
        help="also write models/NAME_detector.onnx: both nets and the verdict in one file that "
        "needs no TensorFlow; with a threshold: eval_defence.py --export --fpr RATE NAME",
    )
    add("--json", metavar="FILE", help="also write the repair record as JSON")
    add("--plot", metavar="FILE", help="draw the pruning curve, as .png, .svg or .pdf")
    memory_option(parser)
    return parser.parse_args(words)


# ------------------------------------------------------------------------- the report's method


def hold_out(data, share, seed):
    """Split a Dataset by chance: a share, 0..1, of every class is held out, to the nearest image.

    Returns (the rest, what is held out). Where the share of a class is a fraction of an image,
    which classes give one is left to chance, so that the share holds on the whole.
    Raises InputError where either would be empty.
    """
    count = round(share * len(data))
    if not 0 < count < len(data):
        raise InputError(f"--holdout {share:g}: leaves {count} of {len(data)} images to hold out")
    rng = np.random.default_rng(seed)
    classes = rng.permutation(data.labels.max() + 1)
    row = np.lexsort((rng.random(len(data)), classes[data.labels]))  # class after class
    chosen = np.zeros(len(data), bool)
    chosen[row[np.int64((np.arange(count) + rng.random()) * len(data) / count)]] = True
    return data.part(~chosen), data.part(chosen)


def repair(badnet, clean, poisoned, settings, held_out=None):
    """Turn B into G, in place, by the report's three steps, and by harden.py's where asked to.

    badnet: Keras classifier.  clean: Dataset, the validation set.  poisoned: Datasets, their
    labels the attack's targets; they are measured and change nothing.  held_out: a clean Dataset
    to measure the repair on, or None.
    settings: an object with the attributes of the command's options.
    Returns the repair record of what was done, a dict that JSON can hold.
    """
    seconds = {}
    layer = nets.find_layer(badnet, settings.layer)
    parts = nets.split(badnet, layer)
    head, labels = parts.head, clean.labels
    last_dense = nets.last_dense(head)
    silent = nets.silent_features(parts)
    others = [*poisoned, held_out] if held_out else poisoned
    images = sum(map(len, (clean, *others)))
    limit = settings.max_memory
    guard.require_fits(clean.path, "the features of all images", images * silent.nbytes, limit)
    guard.require_step_fits(head, "--batch-size", settings.batch_size, limit)
    if settings.harden:
        guard.require_step_fits(badnet, "--harden-batch-size", settings.harden_batch_size, limit)
        size = len(clean) * harden.memory(badnet)
        guard.require_fits(clean.path, "all pictures and what to answer to them", size, limit)

    with timed(seconds, "features"):
        scale, features, activation, answers = choose_scale(parts, clean)
        of_others = [extract_features(parts.trunk, data, scale)[0] for data in others]
    own_scores = list(nets.outputs(head, of_others[-1])) if held_out else None

    def attack_success_rates():
        return {
            str(data.path): nets.accuracy(head, x, data.labels)
            for data, x in zip(poisoned, of_others)
        }

    accuracy = {"before": float(np.mean(answers == labels))}
    success = {"before": attack_success_rates()}
    if accuracy["before"] == 0:
        raise InputError(f"{clean.path}: the BadNet answers no image of it with its label")
    say(f"validation accuracy {percent(accuracy['before'])} before pruning")
    if settings.harden:
        targets = harden.targets(head, features, labels, settings.harden_trust)

    with timed(seconds, "prune"):
        order = np.argsort(activation, kind="stable")
        pruned, curve = prune(head, features, labels, order, settings.threshold, silent)
    with timed(seconds, "poisoned"):
        success["after_each_channel"] = {
            str(data.path): list(
                prune_each(head, x.copy(), data.labels, order[: len(curve)], silent)
            )[1:]
            for data, x in zip(poisoned, of_others)
        }
        for x in of_others:
            x[..., pruned] = silent[..., pruned]
    nets.silence(pruned, layer)
    weights = badnet.get_weights()
    accuracy["after_each_channel"] = curve
    accuracy["pruned"] = [accuracy["before"], *curve][len(pruned)]
    success["pruned"] = attack_success_rates()

    rng = np.random.default_rng(settings.seed)
    with timed(seconds, "retrain"):
        retrain(parts, last_dense, features, labels, settings, rng)
    accuracy["retrained"] = nets.accuracy(head, features, labels)
    success["retrained"] = attack_success_rates()
    say(f"validation accuracy {percent(accuracy['retrained'])} after retraining")

    with timed(seconds, "fine_tune"):
        rounds = fine_tune(head, features, labels, accuracy["before"], settings, rng)
    accuracy["after_each_round"] = rounds
    accuracy["fine_tuned"] = [accuracy["retrained"], *rounds][-1]
    success["fine_tuned"] = attack_success_rates()
    if settings.harden:
        with timed(seconds, "harden"), nets.kept_silent(pruned, layer):
            harden.harden(badnet, harden.read_pictures(clean), scale, targets, settings, rng)
        with timed(seconds, "features_again"):  # G's trunk is no longer B's
            features, *of_others = (
                extract_features(parts.trunk, data, scale)[0] for data in (clean, *others)
            )
        accuracy["hardened"] = nets.accuracy(head, features, labels)
        success["hardened"] = attack_success_rates()
        say(f"validation accuracy {percent(accuracy['hardened'])} after hardening")

    classes = nets.classify(head, features)
    measured = {
        "moved": {
            "answers": float(np.mean(classes != answers)),
            "weights": how_far(badnet.get_weights(), weights),
        }
    }
    if held_out:
        measured["holdout"] = measure(head, of_others[-1], own_scores, held_out.labels)
    badnet.trainable = True  # as B was: what this run trained is nothing G should carry

    return {
        "input_scale": scale,
        "layer": layer.name,
        "channels": len(order),
        "order": order.tolist(),
        "mean_activation": activation.tolist(),
        "pruned": pruned,
        "accuracy": accuracy,
        "attack_success_rate": success,
        **measured,
        "seconds": seconds,
    }


# What pixels 0..255 must gain, as a share of the images. A net for 0..1 answers most of them alike
# at 0..255, and by chance a few better; a net for 0..255 knows next to none at 0..1.
HANDICAP = {"0..1": 0, "0..255": 0.05}


def choose_scale(parts, clean):
    """Find what B was trained on, pixels 0..1 or 0..255, by its accuracy on the validation set.

    All images are run with the pixels that serve the first batch better; with the others, only as
    many as it takes to see that these cannot win on the whole. 0..255 bear the HANDICAP.
    Returns (scale, features, activation, answers): a key of utils.SCALES, what extract_features
    returns for it, and the classes that B then gives, int (n,).
    """

    def correct_in(x, y):
        features = np.asarray(nets.compiled(parts.trunk)(x)[0])
        return int(np.sum(nets.classify(parts.head, features) == y))

    def first_batch(scale):
        x, y = next(clean.batches(scale))
        return correct_in(x, y) - HANDICAP[scale] * len(y)

    scale, other = sorted(utils.SCALES, key=first_batch, reverse=True)
    features, activation = extract_features(parts.trunk, clean, scale)
    answers = nets.classify(parts.head, features)
    correct = int(np.sum(answers == clean.labels))

    enough = correct + (HANDICAP[other] - HANDICAP[scale]) * len(clean)
    right = seen = 0
    for x, y in clean.batches(other):
        right += correct_in(x, y)
        seen += len(y)
        if right + len(clean) - seen <= enough:
            break
    say(
        f"pixels {scale}: the BadNet is right on {percent(correct / len(clean))}; pixels {other}: "
        f"on {percent(right / seen)} of {seen} images"
    )
    if right > enough:
        scale = other
        features, activation = extract_features(parts.trunk, clean, scale)
        answers = nets.classify(parts.head, features)
    return scale, features, activation, answers


def extract_features(trunk, data, scale):
    """Run the trunk once over a data set.

    Returns (features, activation): float32 (n, …, C), what the head takes, and float64 (C,), the
    mean over all images and positions of each channel's activation in the layer to prune.
    """
    features = np.empty((len(data), *trunk.output_shape[0][1:]), np.float32)
    activation = np.zeros(features.shape[-1])
    done = 0
    images = (x for x, _ in data.batches(scale))
    batches = nets.side_by_side(nets.compiled(trunk), images)
    for part, mean in track(batches, "features", data.batch_count):
        features[done : done + len(part)] = part
        activation += np.sum(mean, axis=0, dtype=np.float64)
        done += len(part)
    return features, activation / len(data)


def prune(head, features, labels, order, threshold, silent=0.0):
    """Prune channels in `order` until accuracy falls below `threshold` × the accuracy at first.

    head: features (n, …, C) → scores (n, N).
    features: float32 (n, …, C), output of the trunk; pruned channels are overwritten in place.
    labels: int (n,), 0..N-1.  order: int (C,), channels by ascending mean activation.
    silent: float32 (1, …, C), what a pruned channel's features are; 0 after ReLU.
    Returns (pruned, curve): channels in the order they were pruned, and the accuracy, 0..1, after
    each. Where accuracy fell too far, `curve` has one more entry, for the channel that was taken
    back.  Source: report, section 2a.
    """
    accuracies = prune_each(head, features, labels, order, silent)
    before = next(accuracies)
    enough = threshold * before
    pruned, curve = [], []
    for channel in track([int(c) for c in order], "prune"):
        kept = features[..., channel].copy()
        last = curve[-1] if curve else before
        curve.append(next(accuracies))
        say(
            f"prune {len(curve)}: channel {channel}, validation accuracy {percent(curve[-1])}, "
            f"worth {percent(last - curve[-1])}"
        )
        if curve[-1] < enough:
            features[..., channel] = kept
            say(f"below {percent(enough)}: channel {channel} is taken back")
            break
        pruned.append(channel)
    return pruned, curve


def prune_each(head, features, labels, order, silent):
    """Yield the accuracy, 0..1, at first, and after each channel of `order` that is overwritten.

    Only images in which the channel was not silent anyway are run again.
    """
    silent = np.broadcast_to(silent, (1, *features.shape[1:]))
    classes = nets.classify(head, features)
    yield float(np.mean(classes == labels))
    for channel in order:
        heard = (features[..., channel] != silent[..., channel]).reshape(len(features), -1)
        rows = np.flatnonzero(heard.any(axis=1))
        features[..., channel] = silent[..., channel]
        classes[rows] = nets.classify(head, features, rows)
        yield float(np.mean(classes == labels))


def retrain(parts, last_dense, features, labels, settings, rng):
    """Train the last Dense layer alone, in place.

    Everything before that layer is frozen, so what goes into it is computed once, unless a random
    layer (dropout) must draw anew for every batch or a path leads around it.
    Source: report, section 2b.
    """
    net, x = parts.head, features
    if not any(hasattr(layer, "seed_generator") for layer in parts.head.layers):
        net, x = nets.skip_to(last_dense, parts, features)
    train_epoch = nets.make_trainer(
        net, [last_dense], settings.retrain_learning_rate, settings.batch_size, rng
    )
    for epoch in track(range(1, settings.retrain_epochs + 1), "retrain"):
        loss = train_epoch(x, labels)
        say(f"retrain, epoch {epoch} of {settings.retrain_epochs}: loss {loss:.4f}")


def fine_tune(head, features, labels, accuracy_before, settings, rng):
    """Train the layers behind the pruned one, in place, in rounds of epochs.

    Stops after the first round whose validation accuracy is at least `accuracy_before`. One Adam
    serves all rounds.  Returns the accuracy after each round, 0..1.  Source: report, section 2c.
    """
    rounds = []
    train_epoch = nets.make_trainer(
        head, head.layers, settings.learning_rate, settings.batch_size, rng
    )
    while len(rounds) < settings.rounds and max(rounds, default=-1) < accuracy_before:
        step = f"fine-tune, round {len(rounds) + 1}"
        for _ in track(range(settings.epochs), step):
            loss = train_epoch(features, labels)
        rounds.append(nets.accuracy(head, features, labels))
        say(f"{step}: loss {loss:.4f}, validation accuracy {percent(rounds[-1])}")
    return rounds


# ------------------------------------------------------------------------------ what is recorded


@contextlib.contextmanager
def timed(seconds, step):
    start = time.monotonic()
    yield
    seconds[step] = round(time.monotonic() - start, 3)


def provenance(badnet_path, clean, digest, settings):
    """What a repair was made from: the first part of its record. digest: the data file's."""
    libraries = ("tensorflow", "keras", "numpy", "h5py")
    return {
        "tool_version": utils.VERSION,
        "libraries": {name: importlib.metadata.version(name) for name in libraries},
        "badnet": {"file": badnet_path.name, "sha256": utils.sha256(badnet_path)},
        "data": {
            "file": clean.path.name,
            "sha256": digest,
            "images": len(clean),
        },
        "settings": {name: getattr(settings, name) for name in ("harden", *SETTINGS)},
    }


def how_far(weights, before):
    """The length of what training added to a net's weights, over their length before.

    weights, before: lists of arrays, as model.get_weights() gives them.
    """
    length = [
        math.sqrt(sum(float(np.sum(np.square(values, dtype=np.float64))) for values in each))
        for each in (before, [now - was for now, was in zip(weights, before)])
    ]
    return length[1] / (length[0] or 1)


def measure(head, features, of_badnet, labels):
    """The figures of a repair on clean images that it has not seen, for its record.

    features: float32 (n, …, C), G's.  of_badnet: B's scores, float32 (b, N), batch after batch.
    labels: int (n,).
    Returns what metrics.clean_figures does, and "images", n, "score", which one, and "thresholds"
    of it, as metrics.thresholds gives them.
    """
    rows = []
    for pair in zip(of_badnet, nets.outputs(head, features), strict=True):
        score = nets.suspicion(*(nets.probabilities(scores, head) for scores in pair))
        rows.append((*(scores.argmax(axis=1) for scores in pair), score))
    of_badnet, repaired, score = map(np.concatenate, zip(*rows))
    answers = metrics.Answers(of_badnet, repaired, score, of_badnet != repaired)
    figures = metrics.clean_figures(answers, labels)
    kept = {"score": nets.SCORE, "thresholds": metrics.thresholds(score)}
    return {"images": len(labels), **figures, **kept}


if __name__ == "__main__":
    sys.exit(command(main))
