"""What is measured and said of a repair while it goes on. It decides nothing."""

import contextlib
import math
import time

import numpy as np

from defence import cached_net, detector, figures, guard
from defence.cli import InputError, counted, percent, say
from defence.inference import predict


def hold_out(data, fraction, seed):
    """Split a Dataset at random: hold out a fraction, 0..1, of every class, to the nearest image.

    Returns (the rest, what is held out). Where the fraction of a class is not a whole number of
    images, which classes give one more is random, so that the fraction is right overall.
    Raises InputError where either would be empty.
    """
    count = round(fraction * len(data))
    if not 0 < count < len(data):
        images = counted(len(data), "image")
        raise InputError(f"--holdout {fraction:g}: would hold out {count} of {images}")
    rng = np.random.default_rng(seed)
    classes = rng.permutation(data.labels.max() + 1)
    row = np.lexsort((rng.random(len(data)), classes[data.labels]))  # class after class
    chosen = np.zeros(len(data), bool)
    chosen[row[np.int64((np.arange(count) + rng.random()) * len(data) / count)]] = True
    return data.part(~chosen), data.part(chosen)


class Observer:
    """Told of every step of a repair; keeps times, accuracies, attack success, held-out figures.

    poisoned: Datasets, their labels the attack's targets.  held_out: a clean Dataset that the
    repair does not see, or None.
    After a repair it holds, as a RepairRecord describes them, `order`, `accuracy`,
    `attack_success_rate`, `moved` and `holdout`; `seconds`, {step: s}; `finding`, a Finding where
    the net was scanned, or None.
    """

    def __init__(self, poisoned=(), held_out=None):
        self.poisoned, self.held_out = list(poisoned), held_out
        self.order, self.accuracy, self.moved, self.holdout = [], {}, {}, None
        self.attack_success_rate, self.seconds, self.finding = {}, {}, None
        self._began, self._observing, self._spent = time.monotonic(), 0.0, 0.0

    # ------------------------------------------------------------------- told by the repair

    def ready(self, net):
        """The CachedNet is B's, untouched."""
        with self._watching("features"):
            datasets = [*self.poisoned, *filter(None, [self.held_out])]
            cached_net.check_room(net.split, [net.data, *datasets])
            self._nets = {str(data.path): net.on(data) for data in self.poisoned}
            self._held = net.on(self.held_out) if self.held_out else None
            if self._held:
                self._own_scores = _held_out_scores(self._held)
            self._answers = net.classes.copy()
            self.accuracy["after_each_channel"] = []
            self.attack_success_rate["after_each_channel"] = {name: [] for name in self._nets}
            self._note("before", net)
            say(f"validation accuracy {percent(net.accuracy())} before pruning")

    def scanned(self, finding):
        """The net was scanned; a Finding came out."""
        with self._watching("scan"):
            self.finding = finding

    def channel(self, net):
        """The CachedNet has one more channel masked."""
        with self._watching():
            curve, channel = self.accuracy["after_each_channel"], net.masked[-1]
            last, now = [self.accuracy["before"], *curve][-1], net.accuracy()
            curve.append(now)
            for name, each in self._nets.items():
                each.mask(channel)
                self.attack_success_rate["after_each_channel"][name].append(each.accuracy())
            say(
                f"prune {len(curve)}: channel {channel}, validation accuracy {percent(now)}, "
                f"cost {percent(last - now)}"
            )

    def pruned(self, net, order, enough):
        """Pruning is over: the channels of the CachedNet that are masked are pruned for good.

        order: channels as they were to be pruned.  enough: the accuracy that was to be kept.
        """
        with self._watching("prune"):
            self.order = [int(channel) for channel in order]
            for each in self._nets.values():
                if each.masked != net.masked:
                    each.undo()
            if len(self.accuracy["after_each_channel"]) > len(net.masked):
                taken_back = self.order[len(net.masked)]
                say(f"below {percent(enough)}: channel {taken_back} is taken back")
            for channel in net.masked if self._held else ():
                self._held.features[..., channel] = self._held.when_masked[..., channel]
            self._weights = net.split.net.get_weights()
            self._note("pruned", net)

    def retrained(self, net):
        self._trained("retrain", "retrained", net)
        say(f"validation accuracy {percent(net.accuracy())} after retraining")

    def round(self, net, loss):
        """A round of fine-tuning is over."""
        with self._watching("fine_tune"):
            rounds = self.accuracy.setdefault("after_each_round", [])
            rounds.append(net.accuracy())
            step = f"fine-tune, round {len(rounds)}"
            say(f"{step}: loss {loss:.4f}, validation accuracy {percent(rounds[-1])}")

    def fine_tuned(self, net):
        self.accuracy.setdefault("after_each_round", [])
        self._trained("fine_tune", "fine_tuned", net)

    def hardened(self, net):
        with self._watching("harden"):
            for each in (*self._nets.values(), *filter(None, [self._held])):
                each.reread()
        self._trained("harden", "hardened", net)
        say(f"validation accuracy {percent(net.accuracy())} after hardening")

    def done(self, net):
        """The CachedNet is G's."""
        with self._watching():
            self.moved = {
                "answers": float(np.mean(net.classes != self._answers)),
                "weights": how_far(net.split.net.get_weights(), self._weights),
            }
            if self._held:
                self.holdout = held_out_figures(self._held, self._own_scores)
        self.seconds = {step: round(each, 3) for step, each in self.seconds.items()}
        self.seconds["observe"] = round(self._spent, 3)

    # ------------------------------------------------------------------------------ its own

    @contextlib.contextmanager
    def _watching(self, step=None):
        """A block whose time is the observer's, not that of the step that it ends, if it does."""
        start = time.monotonic()
        if step:
            spent = start - self._began - self._observing
            self.seconds[step] = self.seconds.get(step, 0.0) + spent
        yield
        now = time.monotonic()
        self._spent += now - start
        self._observing += now - start
        if step:
            self._began, self._observing = now, 0.0

    def _trained(self, step, name, net):
        with self._watching(step):
            for each in self._nets.values():
                each.refresh()
            self._note(name, net)

    def _note(self, name, net):
        rates = {path: each.accuracy() for path, each in self._nets.items()}
        self.accuracy[name], self.attack_success_rate[name] = net.accuracy(), rates


def _held_out_scores(held):
    """B's scores of held-out images, as a list of float32 (b, N), batch after batch."""
    head, data = held.split.head, held.data
    size = 4 * len(data) * head.output_shape[1]
    guard.check_fits(data.path, "the scores of the held-out images", size, data.max_bytes)
    return list(predict(head, held.features))


def held_out_figures(held, of_badnet):
    """The figures of a repair on clean images that it has not seen, for its record.

    held: a CachedNet of them, G's.  of_badnet: B's scores, float32 (b, N), batch after batch.
    """
    head, parts = held.split.head, []
    for pair in zip(of_badnet, predict(head, held.features), strict=True):
        probabilities = (detector.probabilities(scores, head) for scores in pair)
        classes = [scores.argmax(axis=1) for scores in pair]
        parts.append((*classes, np.asarray(detector.anomaly_score(*probabilities))))
    answers = detector.Answers(*map(np.concatenate, zip(*parts)))
    return {
        "images": len(held.data),
        **figures.clean_figures(answers, held.labels),
        "score": detector.SCORE,
        "scores": np.sort(answers.score).tolist(),
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
