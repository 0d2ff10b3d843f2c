"""How long a scan takes: told soon after it begins, and shown while it goes on."""

import contextlib
import shutil

import pytest
import test_scan
from conftest import assert_refused, command

from defence.beyond import duration, finding, scan, sought, twins
from defence.net.cached_net import CachedNet

folder, cached = test_scan.folder, test_scan.cached  # fixtures


def test_each_step_of_a_scan_is_followed_to_its_end(cached, monkeypatch):
    steps = {}

    @contextlib.contextmanager
    def follow(title, total, *_, **options):
        done = []
        yield done.append
        steps.setdefault(title, []).append((total, sum(done), options))

    for module in (scan, sought, twins):
        monkeypatch.setattr(module, "follow", follow)
    finding.scan_net(cached, seed=0)
    assert [*steps] == ["scan, twin 1", "scan, twin 2", "scan, patches", "scan, sought patches"]
    assert all(total == done for parts in steps.values() for total, done, _ in parts)
    twins_steps = steps["scan, twin 1"] + steps["scan, twin 2"]
    first, *others = (options["times"] for _, _, options in twins_steps)
    assert first == duration.compare_scan(cached) > 2 and not any(others)


@pytest.mark.whole_scan
def test_the_work_of_a_scan_is_counted_in_passes_of_an_image():
    """As a scan of the demo's net makes them: twins, changed images, patches, sought patches."""
    changed, patches, sought_patches = 6 * 592 * 7 * 3, 24 * (2 * 30 * 32 + 3 * 300), 64 * 800
    passes = 2 * 57_600 + changed + patches + 2 * sought_patches
    assert duration.count_passes(592, 40, 57_600) == passes


def test_a_scan_that_needs_too_much_memory_is_refused_before_it_begins(
    deepid_world, tmp_path, monkeypatch
):
    """Before the features, too: they take minutes, where images are large."""
    monkeypatch.setattr(scan, "STEP_IMAGES", 10**7)
    monkeypatch.setattr(CachedNet, "from_dataset", None)
    net, data = deepid_world / "models" / "small_bd_net.h5", tmp_path / "clean{0}{x}.h5"
    shutil.copy(deepid_world / "clean.h5", data)
    process = command("repair.py", net, data, "--scan")
    assert_refused(process, "clean{0}{x}.h5: a scan: a training step would take")
