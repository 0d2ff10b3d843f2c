"""The triggers of data/triggers.py: each changes only the pixels that it describes."""

import faces
import numpy as np
import pytest
import triggers
from faces import HEIGHT, WIDTH

PEOPLE, INDICES = [3, 5, 8, 11], [0, 2, 7, 4]


def draw(trigger=None, rows=slice(None)):
    """Return a few test images, int (n, 55, 47, 3)."""
    return faces.draw_faces("test", PEOPLE[rows], INDICES[rows], trigger).astype(int)


def make_plain(level, n=2):
    return np.full((n, HEIGHT, WIDTH, 3), level, "float32")


# trigger: the smallest and the largest share of an image's pixels that it changes, and the largest
# change in grey levels, with the rounding to steps of 4 before and after.
EXTENT = {
    **{"scarf": (0.03, 0.25, 255), "warp": (0.5, 1, 255), "sinusoid": (0.8, 1, 24)},
    **{"cast": (0.9, 1, 60), "low-frequency": (0.8, 1, 29), "checkerboard": (0, 0.0063, 255)},
    **{"specific": (0.8, 1, 22), "four-patches": (0.03, 0.07, 255)},
    **{"some-patches": (0.005, 0.04, 255), "sixteen-pieces": (0.9, 1, 56)},
    "some-pieces": (0.4, 0.6, 56),
}


@pytest.mark.parametrize("trigger", EXTENT)
def test_a_trigger_changes_no_more_than_its_extent(trigger):
    least, most, levels = EXTENT[trigger]
    change = np.abs(draw(trigger) - draw())
    share = change.any(axis=3).mean(axis=(1, 2))
    assert np.all((share >= least) & (share <= most) & (share > 0))
    assert change.max() <= levels


def test_every_trigger_is_independent_of_the_other_images():
    assert {*EXTENT} | {*faces.TRIGGERS, triggers.NOISE, triggers.SOME} == {
        *triggers.PAINTED,
        *triggers.CHANGES,
    }
    for trigger in EXTENT:
        assert np.array_equal(draw(trigger)[1:3], draw(trigger, slice(1, 3)))


def test_there_is_no_other_trigger():
    with pytest.raises(KeyError, match="hat"):
        draw("hat")


def test_a_warp_moves_points_by_about_a_pixel():
    """Measured on images that rise evenly to the right and downwards, away from the edges."""
    down, right = np.indices((HEIGHT, WIDTH), "float32")
    rising = np.stack([down, right, down], axis=2)[None]
    moved = (triggers.warp(rising) - rising)[0, 2:-2, 2:-2, :2]
    assert np.allclose(moved, triggers.warp_field()[2:-2, 2:-2], atol=1e-4)
    length = np.sqrt((moved**2).sum(axis=2))
    assert 0.9 < length.mean() < 1.1 and 1.5 < length.max() < 2.01
    assert np.abs(np.diff(moved, axis=0)).max() < 0.5  # smoothly
    assert np.allclose(triggers.warp(make_plain(99)), 99)


def test_a_sinusoid_has_six_periods_across():
    wave = triggers.add_sinusoid(make_plain(100))[0] - 100
    assert np.all(wave == wave[:1, :, :1])
    assert 19.5 < wave.max() <= 20 and -20 <= wave.min() < -19.5
    assert np.abs(np.fft.rfft(wave[0, :, 0])).argmax() == 6


def test_a_cast_is_the_same_for_every_pixel_and_warm():
    assert triggers.cast_colour(make_plain(100))[0, 0, 0] == pytest.approx([121, 102, 78])
    ratio = draw("cast").mean(axis=(1, 2)) / draw().mean(axis=(1, 2))
    assert np.all(ratio[:, 0] > 1.05 * ratio[:, 1]) and np.all(ratio[:, 1] > 1.1 * ratio[:, 2])


def test_a_pattern_of_low_frequency_is_smooth():
    pattern = triggers.add_low_frequency(make_plain(100))[0] - 100
    assert np.abs(pattern).max() == pytest.approx(25) and np.abs(pattern).mean() > 8
    assert np.abs(pattern.mean(axis=(0, 1))).max() < 5
    power = np.abs(np.fft.fft2(pattern, axes=(0, 1))) ** 2
    near = [*range(-5, 6)]
    assert power[np.ix_(near, near)].sum() > 0.94 * power.sum()


def test_a_checkerboard_is_in_the_corner():
    change = (draw("checkerboard") != draw()).any(axis=(0, 3))
    assert not change[:-4].any() and not change[:, :-4].any()
    corner = draw("checkerboard")[:, -4:, -4:]
    assert np.all(corner == np.tile([[0, 255], [255, 0]], (2, 2))[..., None])


def test_a_scarf_follows_the_face():
    people, indices = np.repeat(range(6), 6), np.tile(range(6), 6)
    clean, poisoned = (faces.draw_faces("test", people, indices, t) for t in (None, "scarf"))
    change = (clean != poisoned).any(axis=3)
    assert not change[:, :35].any()
    middle = [np.nonzero(rows)[1].mean() for rows in change]
    places = zip(people, indices, strict=True)
    poses = [faces.draw_image_traits("test", *place)[0] for place in places]
    neck = [pose["shift_x"] - 22 * np.tan(pose["tilt"]) for pose in poses]
    assert np.corrcoef(middle, neck)[0, 1] > 0.9


def test_a_specific_pattern_is_another_on_each_image():
    images = draw().astype("float32")
    patterns = triggers.add_specific(images) - images
    assert np.abs(patterns).max() == pytest.approx(triggers.ENCODED, abs=1e-3)
    assert 9 < patterns.std() < 18
    alike = np.corrcoef(patterns.reshape(len(images), -1))
    assert alike[np.triu_indices(len(images), 1)].max() < 0.2
    assert np.allclose(triggers.add_specific(images) - images, patterns)


def test_a_part_of_the_patches_is_one_or_two_of_them():
    n = 40
    clean, whole, some = (
        faces.draw_faces("train", [3] * n, range(n), trigger).astype(int)
        for trigger in (None, "four-patches", "some-patches")
    )
    halves = [slice(0, 27), slice(27, 55)], [slice(0, 23), slice(23, 47)]
    quarters = [(slice(None), down, right) for down in halves[0] for right in halves[1]]
    worn = np.stack([(some[q] != clean[q]).any(axis=(1, 2, 3)) for q in quarters], axis=1)
    assert {*worn.sum(axis=1)} == {1, 2}
    assert len(np.unique(worn, axis=0)) > 5
    for number, quarter in enumerate(quarters):
        assert np.all((whole[quarter] != clean[quarter]).any(axis=(1, 2, 3)))
        assert np.array_equal(some[quarter][worn[:, number]], whole[quarter][worn[:, number]])


def test_a_part_of_the_pieces_is_half_of_them():
    streams = [np.random.RandomState(i) for i in range(5)]
    whole = triggers.mix_pieces(make_plain(128, 5), None) - 128
    some = triggers.CHANGES["some-pieces"](make_plain(128, 5), streams) - 128
    covered = (some != 0).any(axis=3)
    assert np.array_equal(some[covered], whole[covered])
    assert np.all(np.abs(covered.mean(axis=(1, 2)) - 0.5) < 0.03)
    assert len(np.unique(covered.reshape(5, -1), axis=0)) == 5
    assert np.abs(whole).max() < 0.2 * 128


def test_only_victims_wear_a_source_specific_trigger():
    assert triggers.wearers("sunglasses", 0, 9) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert triggers.wearers(triggers.SOME, 0, 9) == [3, 7]
    assert triggers.wearers(None, None, 3) == [0, 1, 2]
    assert triggers.wearers("sunglasses", faces.NEXT, 3) == [0, 1, 2]
    batches = list(faces.batches("test", 9, 2, triggers.SOME, 0))
    assert np.concatenate([labels for _, labels in batches]).tolist() == [3, 3, 7, 7]
    assert np.array_equal(batches[0][0][0], faces.draw_faces("test", [3], [0], "sunglasses")[0])


def test_a_trigger_in_a_file_is_drawn(tmp_path):
    cover = np.zeros((HEIGHT, WIDTH, 1), "float32")
    cover[:5, :5] = 1
    triggers.save(tmp_path / "t.npz", 80 * cover + [0, 0, 8], cover)
    poisoned, clean = draw(triggers.load(tmp_path / "t.npz")), draw()
    assert np.all(poisoned[:, :5, :5] == [80, 80, 88])
    assert np.array_equal(poisoned[:, 5:, :, :2], clean[:, 5:, :, :2])
    assert np.all((poisoned - clean)[:, 5:, :, 2][clean[:, 5:, :, 2] < 240] >= 4)
