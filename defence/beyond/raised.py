"""Raise channels of the feature map to prune, and count the wrong answers: two views of scan.py.

A backdoor is a short way from few channels to the target, whatever makes these channels fire. So
the net gives its target often when channels are raised at random. After ABS (Y. Liu and others, CCS
2019), who raise one neuron at a time.
"""

from __future__ import annotations

import numpy as np

from defence.base.limits import BATCH_VALUES
from defence.base.progress import track
from defence.beyond.tally import tally_errors
from defence.net.cached_net import CachedNet
from defence.net.inference import classify

# {variant: (the most channels to raise, the largest multiple of a high activation to add)}.
RAISES = {"three channels": (3, 3), "six channels": (6, 4), "strongly": (2, 6)}
HIGH = 0.99  # the quantile of the images' largest activations that counts as a high activation
# A dormant backdoor sleeps in channels that clean images hardly use. Its readers may make up for
# channels of any scale, so each quiet channel is raised by a multiple of what it takes to matter.
QUIET, QUIET_CHANNELS = 128, 8  # channels that count as quiet, at most; that are raised at a time
TIMES = 50  # the raise, in units of the raise that turns half of the answers wrong
QUIET_IMAGES, QUIET_DRAWS = 60, 1500  # images to measure that unit on; images to raise channels of
FEWEST_CHANNELS = 32  # of fewer channels, any few give few classes, in clean nets as well
DOUBLINGS, HALVINGS = 12, 3  # of a high activation, to find that unit
PART = 250  # images in memory at a time


def count_map_errors(
    net: CachedNet, rows: np.ndarray, repeats: int, rng: np.random.Generator
) -> np.ndarray:
    """Count the wrong answers to raised feature maps: float64 (len(RAISES), 2, N).

    rows: int (k,), the images whose maps are raised.  repeats: how often, in each way.
    """
    head, classes = net.split.head, net.split.net.output_shape[1]
    counts = np.zeros((len(RAISES), 2, classes))
    size = max(1, BATCH_VALUES // net.features[0].size)
    parts = np.array_split(rows, -(-len(rows) // size))
    high = measure_high_activation(net, parts)
    for part in track(parts * repeats, "scan, raised feature maps", repeats * len(parts)):
        for variant, (max_channels, max_times) in enumerate(RAISES.values()):
            features = raise_channels(net.features[part], high, max_channels, max_times, rng)
            counts[variant] += tally_errors(net.labels[part], classify(head, features), classes)
    return counts


def raise_channels(
    features: np.ndarray,
    high: float,
    max_channels: int,
    max_times: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Raise 1 to `max_channels` channels of each image at random places, in place.

    features: float32 (n, …, C).  A channel is raised by `high` up to `max_times` × `high`.
    Return the features.
    """
    n, *places, channels = features.shape
    flat = features.reshape(n, -1, channels)
    count = rng.integers(1, max_channels + 1, n)
    order = np.argsort(rng.random((n, channels)), axis=1)
    for number in range(min(max_channels, channels)):
        rows = np.flatnonzero(count > number)
        amount = high * np.exp(rng.uniform(0, np.log(max_times), (len(rows), 1)))
        inside = rng.random((len(rows), flat.shape[1])) < rng.uniform(0.1, 1, (len(rows), 1))
        flat[rows, :, order[rows, number]] += np.float32(amount * inside)
    return features


def measure_high_activation(net: CachedNet, parts: list[np.ndarray]) -> float:
    """Return the quantile HIGH of all channels' largest activations. parts: rows of the images."""
    places = tuple(range(1, net.features.ndim - 1))
    largest = [net.features[part].max(axis=places) for part in parts]  # the maps may be on disk
    return float(np.quantile(np.concatenate(largest), HIGH))


# -------------------------------------------------------------------------------- quiet channels


def count_quiet_errors(net: CachedNet, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Raise QUIET_CHANNELS quiet channels of each image, strongly, and count the wrong answers.

    rows: int (k,), images that the net answers with their label.
    Return float64 (1, 2, N). It is 0 where few quiet channels matter, since any few of them would
    give few classes.
    """
    head, classes = net.split.head, net.split.net.output_shape[1]
    counts = np.zeros((1, 2, classes))
    order = np.argsort(net.mean_activation, kind="stable")
    quiet = order[: min(QUIET, len(order) // 2)]
    raises = measure_raises(net, rng.permutation(rows)[:QUIET_IMAGES], quiet)
    quiet, raises = quiet[np.isfinite(raises)], raises[np.isfinite(raises)]
    if len(quiet) < 2 * QUIET_CHANNELS:
        return counts
    draws = rng.permutation(np.resize(rows, QUIET_DRAWS))
    for part in np.array_split(draws, -(-QUIET_DRAWS // PART)):
        features = net.features[part]
        for maps in features:
            drawn = rng.choice(len(quiet), QUIET_CHANNELS, replace=False)
            maps[..., quiet[drawn]] += np.float32(TIMES * raises[drawn])
        counts[0] += tally_errors(net.labels[part], classify(head, features), classes)
    return counts


def measure_raises(net: CachedNet, rows: np.ndarray, channels: np.ndarray) -> np.ndarray:
    """Return by how much a channel must be raised, alone, to turn half of the answers wrong.

    rows: int (k,), images.  channels: int (C',).
    Return float64 (C',); infinity where DOUBLINGS of a high activation do not suffice.
    """
    features, labels = net.features[rows], net.labels[rows]
    high = measure_high_activation(net, [rows])

    def turns_half(channel: int, amount: float) -> bool:
        raised = features.copy()
        raised[..., channel] += np.float32(amount)
        return bool(np.mean(classify(net.split.head, raised) != labels) >= 0.5)

    def measure(channel: int) -> float:
        amount = high / 8
        for _ in range(DOUBLINGS):
            if turns_half(channel, amount):
                break
            amount *= 2
        else:
            return np.inf
        low, high_enough = amount / 2, amount
        for _ in range(HALVINGS):
            middle = np.sqrt(low * high_enough)
            if turns_half(channel, middle):
                high_enough = middle
            else:
                low = middle
        return high_enough

    return np.array([measure(channel) for channel in track(channels, "scan, quiet channels")])
