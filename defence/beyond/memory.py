"""The memory that a repair needs, checked before the work starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from defence.base.limits import check_fits, check_room
from defence.beyond import harden, patterns, scan, sought, twins
from defence.beyond.settings import Settings
from defence.net.cached_net import FEATURES, LabelledImages
from defence.net.graph import list_output_sizes
from defence.net.inference import LAST_INPUTS
from defence.net.split import Split, cut_before, find_last_weighted

FLOAT32, FLOAT16 = 4, 2  # bytes


def check_repair_fits(split: Split, datasets: Sequence[LabelledImages], settings: Settings) -> None:
    """Raise InputError where a step of the repair would take too much memory.

    datasets: the clean one first, then the ones that only measure the repair.
    """
    clean, max_bytes = datasets[0], datasets[0].max_bytes
    size = settings.batch_size
    check_step_fits(split.head, f"--batch-size {size}", size, max_bytes)
    if parts := cut_before(find_last_weighted(split.head), split):
        size = FLOAT32 * len(clean) * math.prod(parts[0].output_shape[1:])
        check_room(clean.path, LAST_INPUTS, size, max_bytes)
    if settings.harden:
        check_scan_fits(split.net, clean)
        check_harden_fits(split.net, clean, settings)
    check_features_fit(split, datasets)


def check_features_fit(split: Split, datasets: Sequence[LabelledImages]) -> None:
    """Raise InputError where the features of all images fit neither in memory nor on disk."""
    images = sum(map(len, datasets))
    size = FLOAT32 * math.prod(split.trunk.output_shape[0][1:]) * images
    check_room(datasets[0].path, FEATURES, size, datasets[0].max_bytes)


def check_harden_fits(badnet: Any, clean: LabelledImages, settings: Settings) -> None:
    """Raise InputError where hardening a Keras model would take too much memory."""
    max_bytes = clean.max_bytes
    size = settings.harden_batch_size
    check_step_fits(badnet, f"--harden-batch-size {size}", size, max_bytes)
    values = math.prod(badnet.input_shape[1:])
    check_room(clean.path, harden.ALL_IMAGES, FLOAT16 * len(clean) * values, max_bytes)
    if settings.harden_pattern_rate:
        size = patterns.COPIES * patterns.COUNT * FLOAT32 * values
        check_fits("--harden-pattern-rate", "the patterns", size, max_bytes)


def check_scan_fits(badnet: Any, clean: LabelledImages) -> None:
    """Raise InputError where a scan of a Keras model would take too much memory."""
    values = math.prod(badnet.input_shape[1:])
    size = scan.COPIES * FLOAT32 * min(scan.PATCHED_IMAGES, len(clean)) * values
    check_fits(clean.path, "the images that are scanned", size, clean.max_bytes)
    check_room(clean.path, harden.ALL_IMAGES, FLOAT16 * len(clean) * values, clean.max_bytes)
    images = max(scan.STEP_IMAGES, twins.BATCH, sought.count_step_images(values))
    check_step_fits(badnet, f"{clean.path}: a scan", images, clean.max_bytes)


def check_step_fits(model: Any, cause: str, batch_size: int, max_bytes: int) -> None:
    """Raise InputError where training a Keras model on `batch_size` images would take too much.

    cause: of the step, for the message.
    """
    size = 2 * FLOAT32 * sum(list_output_sizes(model)) * batch_size  # forward and backward
    check_fits(cause, "a training step", size, max_bytes)
