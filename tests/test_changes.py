"""Random changes of images: the effect of each family, its rate and its ranges."""

import numpy as np
import pytest
import reference

from defence.beyond import changes
from defence.beyond.changes import FAMILIES, HARDENING

SHAPE = (24, 20, 3)


def parametrize(families):
    return pytest.mark.parametrize("family", families, ids=lambda family: family.__name__)


every_family = parametrize(HARDENING)


def draw(n=8, shape=SHAPE, seed=0):
    return np.random.default_rng(seed).uniform(0, 255, (n, *shape)).astype(np.float32)


def make_plain(level, n=200, shape=SHAPE):
    return np.full((n, *shape), level, np.float32)


def rng(seed=0):
    return np.random.default_rng(seed)


@every_family
@pytest.mark.parametrize("shape", [SHAPE, (28, 28, 1), (9, 70, 3), (1, 5, 3), (4, 1, 4)], ids=str)
def test_a_family_keeps_shape_and_type_and_depends_on_the_generator_alone(family, shape):
    first, repeated, different = (family(draw(shape=shape), rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (8, *shape) and first.dtype == np.float32
    assert np.isfinite(first).all()
    assert np.array_equal(first, repeated)
    assert not np.array_equal(first, different)


@every_family
@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_familys_work_does_not_depend_on_the_memory_layout(family, n):
    """A dataset's channels may come first; then a view of an image is not contiguous."""
    channels_last = draw(n)
    channels_first = np.moveaxis(np.ascontiguousarray(np.moveaxis(channels_last, 3, 1)), 1, 3)
    ours, plain = (family(images, rng()) for images in (channels_first, channels_last.copy()))
    np.testing.assert_allclose(ours, plain, atol=1e-3)


@every_family
def test_an_image_may_be_one_pixel(family):
    assert np.isfinite(family(draw(shape=(1, 1, 3)), rng())).all()


@parametrize(FAMILIES)
def test_a_family_changes_each_image_differently(family):
    same = np.repeat(draw(1), 6, axis=0)
    changed = family(same.copy(), rng())
    assert all(not np.allclose(changed[0], image, atol=0.01) for image in changed[1:])


@every_family
def test_a_family_is_applied_as_often_as_it_says(family):
    images = draw(1000, (8, 8, 3))
    changed = changes.change_images(images.copy(), rng(), {family: 0.3})
    share = np.any(changed != images, axis=(1, 2, 3)).mean()
    assert share == pytest.approx(0.3, abs=0.05)


def test_changed_images_stay_within_their_range_and_most_are_changed():
    images = draw(500)
    changed = changes.change_images(images.copy(), rng())
    assert changed.dtype == np.float32 and changed.min() == 0 and changed.max() == 255
    assert np.any(changed != images, axis=(1, 2, 3)).mean() > 0.95


def test_a_dim_image_is_changed_less():
    bright = np.float32(128) + 80 * (draw() > 128)
    dim = 128 + (bright - 128) / 8
    family = changes.fit_contrast(changes.shade)
    assert [known.__name__ for known in HARDENING].count(family.__name__) == 1
    for images, share in ((bright, 1), (dim, dim[0].std() / changes.FULL_CONTRAST)):
        added = changes.shade(images.copy(), rng()) - images
        np.testing.assert_allclose(family(images, rng()) - images, share * added, rtol=0.1, atol=1)


def test_families_are_applied_in_order():
    def double(images, rng):
        return 2 * images

    def add(images, rng):
        return images + 10

    assert np.all(changes.change_images(make_plain(5), rng(), {double: 1, add: 1}) == 20)
    assert np.all(changes.change_images(make_plain(5), rng(), {add: 1, double: 1}) == 30)


# ------------------------------------------------------------------------------------- geometry


def test_values_between_pixels_are_the_references():
    images = draw(3)
    down, right = rng(1).uniform(-3, 27, (2, 3, *SHAPE[:2])).astype(np.float32)
    ours = changes.sample_images(images, down, right)
    expected = reference.sample(images, down, right)
    np.testing.assert_allclose(ours, expected, atol=1e-2)


def test_a_move_of_nothing_changes_nothing():
    still = changes.move(draw(), rng(), turn=0, scale=0, shift=0, bend=0)
    np.testing.assert_allclose(still, draw(), atol=1e-2)


def test_a_move_shifts_turns_and_enlarges():
    """It moves a ramp, whose values are coordinates, as far as the parameters allow."""
    height, width = 41, 31
    down, right = np.indices((height, width)).astype(np.float32)
    ramp = np.repeat(np.stack([down, right], axis=2)[None], 50, axis=0)
    middle = (slice(None), slice(15, 26), slice(12, 19))
    inside = ramp[middle]
    shifted = changes.move(ramp.copy(), rng(), turn=0, scale=0, shift=0.06, bend=0)[middle] - inside
    assert np.allclose(shifted, shifted[:, :1, :1], atol=1e-3)
    assert 2 < np.abs(shifted).max() <= 0.06 * height
    turned = changes.move(ramp.copy(), rng(), turn=15, scale=0, shift=0, bend=0)[middle]
    slope = np.diff(turned, axis=1).mean(axis=(1, 2))
    np.testing.assert_allclose(np.hypot(*slope.T), 1, atol=1e-3)
    angle = np.degrees(np.arctan2(slope[:, 1], slope[:, 0]))
    assert 10 < np.abs(angle).max() <= 15 and abs(angle.mean()) < 4
    scaled = changes.move(ramp.copy(), rng(), turn=0, scale=0.12, shift=0, bend=0)[middle]
    slope = np.log(np.diff(scaled, axis=1).mean(axis=(1, 2))[:, 0])
    assert 0.08 < np.abs(slope).max() <= 0.121
    bent = changes.move(ramp.copy(), rng(), turn=0, scale=0, shift=0, bend=0.035)[middle] - inside
    assert 0.5 < np.abs(bent).max() < 1.5 * 0.035 * height
    assert np.abs(np.diff(bent, axis=1)).max() < 0.7  # smoothly


@pytest.mark.parametrize(("shape", "ways"), [((6, 6, 3), 7), ((6, 5, 3), 3)], ids=str)
def test_an_image_is_turned_over_in_every_way_but_none(shape, ways):
    image = draw(1, shape)
    turned = changes.turn_over(np.repeat(image, 200, axis=0), rng())
    kinds = {kind.tobytes() for kind in turned}
    assert len(kinds) == ways and image[0].tobytes() not in kinds
    expected = [image[0, ::-1], image[0, :, ::-1], image[0, ::-1, ::-1]]
    if ways == 7:
        expected += [np.rot90(image[0], quarters) for quarters in (1, 3)]
    assert all(np.ascontiguousarray(way).tobytes() in kinds for way in expected)


def test_a_smooth_field_goes_through_its_grid():
    field = changes.draw_smooth_field(2, 33, 17, 3, rng(), cells=(4, 5))
    grid_rng = rng()
    grid_rng.integers(4, 5)
    grid = grid_rng.uniform(-1, 1, (2, 3, 5, 5))
    np.testing.assert_allclose(field[:, ::8, ::4], np.moveaxis(grid, 1, 3), atol=1e-5)
    assert np.allclose(changes.make_interpolation(50, 6).sum(axis=1), 1, atol=1e-6)


# -------------------------------------------------------------------------- colours and patterns


def test_a_tint_is_a_gain_and_a_bias_of_each_channel():
    images = draw(300)
    tinted = changes.tint(images.copy(), rng())
    low, high = images.reshape(300, -1, 3)[:, :2].swapaxes(0, 1)
    out_low, out_high = tinted.reshape(300, -1, 3)[:, :2].swapaxes(0, 1)
    gain = (out_high - out_low) / (high - low)
    bias = out_low - gain * low
    near = np.abs(high - low) > 20
    assert np.abs(gain[near] - 1).max() <= 0.351 and np.abs(gain[near] - 1).max() > 0.3
    assert np.abs(bias[near]).max() <= 41 and np.abs(bias[near]).max() > 30
    expected = gain[:, None, None] * images + bias[:, None, None]
    np.testing.assert_allclose(tinted[near.all(axis=1)], expected[near.all(axis=1)], atol=0.1)


def test_a_wave_is_a_sinusoid_of_one_direction_and_colour():
    waves = changes.wave(make_plain(128, 400, (64, 64, 3)), rng()) - 128
    assert 30 < np.abs(waves).max() <= 40.1
    grey = np.all(np.isclose(waves, waves[..., :1], atol=1e-3), axis=(1, 2, 3))
    assert grey.mean() == pytest.approx(0.4, abs=0.08)
    strongest = np.abs(waves).max(axis=(1, 2)).argmax(axis=1)
    spectrum = np.abs(np.fft.fft2(waves[range(400), :, :, strongest])) ** 2
    spectrum[:, 0, 0] = 0
    ordered = np.sort(spectrum.reshape(400, -1), axis=1)[:, ::-1]
    short = spectrum.reshape(400, -1).argmax(axis=1) > 3
    concentrated = ordered[:, :18].sum(axis=1) / ordered.sum(axis=1)
    assert np.median(concentrated[short]) > 0.8


def test_a_shade_is_of_low_frequency():
    shades = changes.shade(make_plain(128, 300, (48, 48, 3)), rng()) - 128
    assert 30 < np.abs(shades).max() < 75
    power = np.abs(np.fft.fft2(shades, axes=(1, 2))) ** 2
    near = np.minimum(np.arange(48), 48 - np.arange(48)) < 9
    assert power[:, near][:, :, near].sum() > 0.9 * power.sum()


def test_a_blend_is_between_the_image_and_noise():
    black, white = (changes.blend(make_plain(level), rng()) for level in (0, 255))
    assert np.ptp(white - black, axis=(1, 2, 3)).max() < 1e-3  # one weight for the whole image
    assert np.ptp(black, axis=(1, 2, 3)).mean() > 10  # the noise varies
    assert 60 < black.max() <= 0.3 * 255 and 255 - white.min() <= 0.3 * 255 + 1e-3
    weight = 1 - (white - black)[:, 0, 0, 0] / 255
    assert weight.max() <= 0.3 and weight.mean() == pytest.approx(0.15, abs=0.02)


def test_grain_is_noise_of_every_pixel():
    noise = changes.grain(make_plain(128), rng()) - 128
    deviation = noise.std(axis=(1, 2, 3))
    assert deviation.max() < 19 and deviation.mean() == pytest.approx(9, abs=1)
    assert np.abs(noise.mean(axis=(1, 2, 3)) / deviation).max() < 0.15


def test_smoothing_keeps_the_mean_and_takes_out_the_fine():
    images = draw(100)
    smoothed = changes.smooth(images.copy(), rng())
    np.testing.assert_allclose(smoothed.mean(axis=(1, 2)), images.mean(axis=(1, 2)), atol=0.01)
    ratio = smoothed.std(axis=(1, 2, 3)) / images.std(axis=(1, 2, 3))
    assert 0.25 < ratio.min() < 0.45 and 0.95 < ratio.max() <= 1
    assert np.allclose(changes.smooth(make_plain(90), rng()), 90, atol=1e-3)


# -------------------------------------------------------------------------------------- patches


def test_at_least_one_patch_is_pasted_and_most_of_an_image_stays():
    """Most of a patch may lie outside, but hardly any image stays unchanged."""
    pasted = changes.patch(make_plain(100, 500, (55, 47, 3)), rng())
    touched = np.any(pasted != 100, axis=3).mean(axis=(1, 2))
    assert 0.1 < np.median(touched) < 0.5 and np.mean(touched == 0) < 0.05
    assert pasted.min() >= 0 and pasted.max() <= 255


def test_patches_are_of_one_colour_or_noise():
    pasted = changes.patch(make_plain(-1, 200, (40, 40, 3)), rng(), max_patches=1)
    inside = [image[image[..., 0] >= 0] for image in pasted]
    large = [pixels for pixels in inside if len(pixels) > 10]
    plain = [len(np.unique(pixels, axis=0)) == 1 for pixels in large]
    assert 0.4 < np.mean(plain) < 0.6
    noisy = [pixels for pixels, is_plain in zip(large, plain) if not is_plain]
    assert all(len(np.unique(pixels, axis=0)) == len(pixels) for pixels in noisy)


def test_shapes_have_the_sizes_of_the_range():
    low, high = 0.005, 0.3
    shapes = changes.draw_shapes(1000, 180, 150, rng(), (low, high), aspect=10, pairs=0)
    edge = shapes[:, [0, -1]].any(axis=(1, 2)) | shapes[:, :, [0, -1]].any(axis=(1, 2))
    areas = shapes[~edge].mean(axis=(1, 2))
    assert low * 0.8 < areas.min() and areas.max() < high * 1.1
    assert 0.1 < np.mean(areas > np.sqrt(low * high)) < 0.5  # large shapes touch an edge more often


def test_the_share_of_pairs_has_a_mirror_image():
    shapes = changes.draw_shapes(1000, 60, 50, rng(), (0.005, 0.3), aspect=10, pairs=0.3)
    inside = shapes[shapes.any(axis=(1, 2))]
    mirrored = np.all(inside == inside[:, :, ::-1], axis=(1, 2))
    assert np.mean(mirrored) == pytest.approx(0.3, abs=0.05)
