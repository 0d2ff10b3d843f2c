"""The observer of a repair: it logs and measures each step, and decides nothing."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from defence.base.limits import check_fits
from defence.base.progress import say, track
from defence.base.text import format_percent
from defence.judge import detector, figures
from defence.net.cached_net import CachedNet
from defence.net.inference import compile_model, map_in_parallel, predict

if TYPE_CHECKING:
    from defence.beyond.finding import Finding
    from defence.load.datasets import Dataset

MOST_SCORES = 200_000  # of held-out images that a record keeps, which stays short enough to be read


class Observer:
    """Record every step of a repair: times, accuracies, attack success, held-out figures.

    poisoned: their labels are the attack's targets.  held_out: clean images that the repair does
    not see, or None.
    After a repair it holds, as a RepairRecord describes them, `order`, `accuracy`, `moved` and
    `holdout`; `attack_success_rate`, but with a list in the order of `poisoned` in the place of
    each {file: …}; `seconds`, {step: s}; and the `finding` about the BadNet, or None where the net
    was not scanned.
    """

    def __init__(self, poisoned: Sequence[Dataset] = (), held_out: Dataset | None = None) -> None:
        self.poisoned, self.held_out = list(poisoned), held_out
        self.order: list[int] = []
        self.accuracy: dict = {}
        self.attack_success_rate: dict = {}
        self.moved: dict[str, float] = {}
        self.holdout: dict | None = None
        self.seconds: dict[str, float] = {}
        self.finding: Finding | None = None
        self._step_began, self._observed, self._total_observed = time.monotonic(), 0.0, 0.0

    def end_step(self, step: str) -> None:
        """Count the time since the last step towards this one."""
        with self._watch(step):
            pass

    # ------------------------------------------------------------------- the steps of a repair

    def on_start(self, net: CachedNet) -> None:
        """Measure the net before pruning: B, untouched."""
        with self._watch("features"):
            self._nets = [net.for_dataset(data) for data in self.poisoned]
            self._held = net.for_dataset(self.held_out) if self.held_out else None
            if self._held:
                self._badnet_scores = _score_held_out(self._held)
            self._answers = net.classes.copy()
            self.accuracy["after_each_channel"] = []
            self.attack_success_rate["after_each_channel"] = [[] for _ in self._nets]
            self._note("before", net)
            say(f"validation accuracy {format_percent(net.accuracy())} before pruning")

    def on_scanned(self, finding: Finding) -> None:
        """Keep the finding of the scan of B."""
        with self._watch("scan"):
            self.finding = finding

    def on_channel(self, net: CachedNet) -> None:
        """Measure the net with one more channel masked."""
        with self._watch():
            curve, channel = self.accuracy["after_each_channel"], net.masked[-1]
            last, now = [self.accuracy["before"], *curve][-1], net.accuracy()
            curve.append(now)
            for number, poisoned_net in enumerate(self._nets):
                poisoned_net.mask(channel)
                rates = self.attack_success_rate["after_each_channel"][number]
                rates.append(poisoned_net.accuracy())
            say(
                f"prune {len(curve)}: channel {channel}, validation accuracy "
                f"{format_percent(now)}, cost {format_percent(last - now)}"
            )

    def on_pruned(self, net: CachedNet, order: np.ndarray, enough: float) -> None:
        """Measure the net after pruning: its masked channels are pruned for good.

        order: all channels, in the order in which they were to be pruned.
        enough: the accuracy, 0..1, that pruning had to keep.
        """
        with self._watch("prune"):
            self.order = [int(channel) for channel in order]
            for poisoned_net in self._nets:
                if poisoned_net.masked != net.masked:
                    poisoned_net.undo()
            if len(self.accuracy["after_each_channel"]) > len(net.masked):
                restored = self.order[len(net.masked)]
                say(f"below {format_percent(enough)}: channel {restored} is restored")
            if held := self._held:
                for channel in net.masked:
                    held.features[..., channel] = held.masked_values[..., channel]
            self._weights = net.split.net.get_weights()
            self._note("pruned", net)

    def on_retrained(self, net: CachedNet) -> None:
        """Measure the net after the last layer was retrained."""
        self._end_training("retrain", "retrained", net)
        say(f"validation accuracy {format_percent(net.accuracy())} after retraining")

    def on_round(self, net: CachedNet, loss: float) -> None:
        """Measure the net after a round of fine-tuning."""
        with self._watch("fine_tune"):
            rounds = self.accuracy.setdefault("after_each_round", [])
            rounds.append(net.accuracy())
            say(
                f"fine-tune, round {len(rounds)}: loss {loss:.4f}, validation accuracy "
                f"{format_percent(rounds[-1])}"
            )

    def on_fine_tuned(self, net: CachedNet) -> None:
        """Measure the net after fine-tuning."""
        self.accuracy.setdefault("after_each_round", [])
        self._end_training("fine_tune", "fine_tuned", net)

    def on_hardened(self, net: CachedNet) -> None:
        """Measure the net after hardening, which changes the trunk too."""
        with self._watch("harden"):
            for other_net in (*self._nets, *filter(None, [self._held])):
                other_net.recompute_features()
        self._end_training("harden", "hardened", net)
        say(f"validation accuracy {format_percent(net.accuracy())} after hardening")

    def on_end(self, net: CachedNet) -> None:
        """Compare the net, now G, with B, and compute the held-out figures."""
        with self._watch():
            self.moved = {
                "answers": float(np.mean(net.classes != self._answers)),
                "weights": measure_change(net.split.net.get_weights(), self._weights),
            }
            if self._held:
                self.holdout = compute_held_out_figures(
                    self._held, self._badnet_scores, "hardened" in self.accuracy
                )
        self.seconds = {step: round(spent, 3) for step, spent in self.seconds.items()}
        self.seconds["observe"] = round(self._total_observed, 3)

    # ------------------------------------------------------------------------------ its own

    @contextlib.contextmanager
    def _watch(self, step: str | None = None) -> Iterator[None]:
        """Count a block's time as the observer's own.

        step: the step of the repair that ends where the block begins.
        """
        start = time.monotonic()
        if step:
            spent = start - self._step_began - self._observed
            self.seconds[step] = self.seconds.get(step, 0.0) + spent
        yield
        now = time.monotonic()
        self._total_observed += now - start
        self._observed += now - start
        if step:
            self._step_began, self._observed = now, 0.0

    def _end_training(self, step: str, name: str, net: CachedNet) -> None:
        with self._watch(step):
            for poisoned_net in self._nets:
                poisoned_net.refresh()
            self._note(name, net)

    def _note(self, name: str, net: CachedNet) -> None:
        rates = [poisoned_net.accuracy() for poisoned_net in self._nets]
        self.accuracy[name], self.attack_success_rate[name] = net.accuracy(), rates


def _score_held_out(held: CachedNet) -> list[np.ndarray]:
    """Return B's scores of held-out images, float32 (b, N), batch after batch."""
    head, data = held.split.head, held.data
    arrays = 2  # B's, and G's mean answers
    size = 4 * arrays * len(data) * head.output_shape[1]
    check_fits(data.path, "the scores of the held-out images", size, data.max_bytes)
    return list(predict(head, held.features))


def compute_held_out_figures(
    held: CachedNet, badnet_scores: list[np.ndarray], hardened: bool
) -> dict:
    """Return the figures of a repair on clean images that it has not seen, for its record.

    held: G on these images.  badnet_scores: B's scores, float32 (b, N), batch after batch.
    hardened: whether G is hardened.
    """
    head, parts, start = held.split.head, [], 0
    means = _answer_views(held) if hardened else None
    for pair in zip(badnet_scores, predict(head, held.features), strict=True):
        b, g = (detector.compute_probabilities(scores, head) for scores in pair)
        rows = slice(start, start := start + len(pair[0]))
        score = detector.score_anomaly(b, g if means is None else means[rows])
        parts.append((*(scores.argmax(axis=1) for scores in pair), np.asarray(score)))
    answers = detector.Answers(*map(np.concatenate, zip(*parts)))
    kept = answers.score
    if len(kept) > MOST_SCORES:
        kept = np.random.default_rng(0).choice(kept, MOST_SCORES, replace=False)
    scores = np.sort(kept).tolist()
    return {
        "images": len(held.data),
        "rule": detector.DISAGREEMENT,
        **figures.compute_clean_figures(answers, held.labels),
        "expected_false_positive_rate": figures.expect_false_positives(scores),
        "score": detector.name_score(hardened),
        "scores": scores,
    }


def _answer_views(held: CachedNet) -> np.ndarray:
    """Return a hardened G's mean answers to the views of held-out images: float32 (n, N)."""
    net, data = held.split.net, held.data
    run = compile_model(net)

    def answer(images: np.ndarray) -> np.ndarray:
        views = [
            detector.compute_probabilities(run(view), net) for view in detector.shift_images(images)
        ]
        return np.asarray(detector.average_views(np.stack(views)))

    batches = map_in_parallel(answer, (images for images, _ in data.batches(held.scale)))
    return np.concatenate(list(track(batches, "held-out images", data.batch_count)))


def measure_change(weights: list[np.ndarray], before: list[np.ndarray]) -> float:
    """Return the length of what training added to a net's weights, over their length before.

    weights, before: as model.get_weights() gives them.
    """
    change = _measure_length([new - old for new, old in zip(weights, before)])
    return change / (_measure_length(before) or 1)


def _measure_length(weights: list[np.ndarray]) -> float:
    squares = (np.sum(np.square(values, dtype=np.float64)) for values in weights)
    return math.sqrt(sum(float(square) for square in squares))
