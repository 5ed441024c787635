"""views.py: poses; crops and colours, what each step does, and how often, measured on the images that come out."""
import math

import pytest
import torch

from kernels.harness import views


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- Poses -------------------------------------------------------------------------------------------------
def still(n, axes):
    """Angles, scale and shift that change nothing."""
    return torch.zeros(n, axes * (axes - 1) // 2), torch.ones(n), torch.zeros(n, axes)


@pytest.mark.parametrize("axes", [2, 3])
def test_warp_without_a_pose_changes_nothing(axes):
    x = torch.rand(2, 1, *[9] * axes)
    torch.testing.assert_close(views.warp(x, *still(2, axes), x.shape[2:]), x)


@pytest.mark.parametrize("axes", [2, 3])
def test_warp_by_a_quarter_turns_the_first_plane(axes):
    x = torch.rand(2, 1, *[9] * axes)
    angles, scale, shift = still(2, axes)
    angles[:, 0] = torch.pi / 2
    turned = views.warp(x, angles, scale, shift, x.shape[2:])
    def plane(x):                                                        # in 3-D the first plane holds the depth axis
        return x.flatten(0, 1) if axes == 2 else x[:, 0].movedim(1, 0).flatten(0, 1)
    either_way = [(plane(turned) - plane(x).rot90(k, (1, 2))).abs().max() for k in (1, 3)]
    assert min(either_way) < 1e-5


@pytest.mark.parametrize("axes", [2, 3])
def test_warp_by_a_half_takes_every_second_pixel(axes):
    x = torch.rand(2, 1, *[9] * axes)
    angles, scale, shift = still(2, axes)
    half = views.warp(x, angles, scale / 2, shift, x.shape[2:])
    every_second = x[(..., *[slice(None, None, 2)] * axes)]              # 5 of 9 along each axis, the centre kept
    torch.testing.assert_close(half[(..., *[slice(2, 7)] * axes)], every_second)
    assert (half[..., 0] == 0).all()                                     # outside


@pytest.mark.parametrize("axes", [2, 3])
def test_warp_shifts_by_half_canvases_and_takes_numbers_that_broadcast(axes):
    x = torch.rand(2, 1, *[9] * axes)
    angles, scale, _ = still(2, axes)
    one_pixel = torch.eye(axes)[:1].expand(2, axes) * 2 / 9              # along the last axis
    moved = views.warp(x, angles, scale, one_pixel, x.shape[2:])
    torch.testing.assert_close(moved[..., 1:], x[..., :-1])
    wide = [numbers.reshape(2, -1, *[1] * axes) for numbers in (angles, scale, one_pixel)]
    assert torch.equal(views.warp(x, *wide, x.shape[2:]), moved)


def test_warp_keeps_lengths_where_canvases_are_not_square():
    bar = torch.zeros(1, 1, 21, 41)
    bar[..., 9:12, 5:36] = 1
    upright = views.warp(bar, torch.tensor([[torch.pi / 2]]), torch.ones(1), torch.zeros(1, 2), bar.shape[2:])
    assert upright[0, 0, :, 20].sum() == pytest.approx(21)               # the whole height
    assert upright[0, 0, 10].sum() == pytest.approx(3)


@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 12, 12), (1, 8, 8, 8), (3, 8, 8, 8)])
def test_views_differ_by_sample_and_by_draw_and_follow_the_generator(shape):
    x = torch.rand(1, *shape).expand(4, *shape)
    a, b = views.two_views(x, torch.Generator().manual_seed(3), views.posed_view)
    again, _ = views.two_views(x, torch.Generator().manual_seed(3), views.posed_view)
    assert a.shape == x.shape and torch.equal(a, again)
    assert (a - b).abs().mean() > .02 and (a[0] - a[1]).abs().mean() > .02


def test_uniform_numbers_broadcast_over_their_sample():
    x = torch.rand(5, 3, 4, 4, 4)
    numbers = views.uniform(x, torch.Generator().manual_seed(0), 2, 3, size=3)
    assert numbers.shape == (5, 3, 1, 1, 1)
    assert 2 <= numbers.min() and numbers.max() < 3


@pytest.mark.parametrize("view", [views.posed_view, views.cropped_view])
def test_views_of_large_images_are_made_piece_by_piece_each_image_in_its_place(view, monkeypatch):
    """In 5 pieces: a bright image stays at its place, two views differ, and the generator repeats them."""
    x = torch.zeros(14, 3, 16, 16)
    x[9] = 1
    monkeypatch.setattr(views, "PIECE", 3 * x[0].numel() * 4)
    sizes = []
    def seen(part, generator):
        sizes.append(len(part))
        return view(part, generator)
    first, second = views.two_views(x, seeded(), seen)
    assert sizes == [3, 3, 3, 3, 2] * 2
    assert first.shape == second.shape == x.shape and not torch.equal(first, second)
    assert first.flatten(1).mean(1).argmax() == second.flatten(1).mean(1).argmax() == 9
    again, _ = views.two_views(x, seeded(), view)
    assert torch.equal(first, again)


# ---- Crops and colours -------------------------------------------------------------------------------------
def test_views_of_photographs_lie_in_0_to_1_differ_and_can_be_repeated():
    x = torch.rand(40, 3, 32, 32, generator=seeded())
    before = x.clone()
    first, second = views.two_views(x, seeded(1), views.cropped_view)
    again, _ = views.two_views(x, seeded(1), views.cropped_view)
    assert torch.equal(first, again) and torch.equal(x, before)
    assert first.shape == x.shape and first.isfinite().all()
    assert first.min() > -1e-5 and first.max() < 1 + 1e-5
    assert ((first - second).abs().flatten(1).amax(1) > 0.01).all()


@pytest.mark.parametrize("n", [1, 2])
def test_a_batch_of_which_no_image_is_blurred_works(n):
    for seed in range(8):
        assert views.cropped_view(torch.rand(n, 3, 9, 14), seeded(seed)).shape == (n, 3, 9, 14)


def test_crops_show_8_to_100_percent_of_the_image_half_of_them_mirrored():
    n, side = 4000, 16
    place = (torch.arange(side) + 0.5) / side
    x = torch.stack(torch.broadcast_tensors(place, place[:, None], torch.ones(side, side))).repeat(n, 1, 1, 1)
    across, down, inside = views.random_crop(x, seeded()).unbind(1)
    assert inside.min() > 0.999                                      # no black from beyond the border
    width = across[:, side // 2, -2] - across[:, side // 2, 1]       # of 13 of 16 pixels, away from the border
    height = down[:, -2, side // 2] - down[:, 1, side // 2]
    assert abs((width < 0).double().mean() - 0.5) < 0.03 and (height > 0).all()
    area = (width * height).abs() * (16 / 13) ** 2
    assert 0.07 < area.min() < 0.1 and 0.9 < area.max() < 1.01
    assert abs(area.mean() - 0.54) < 0.03
    ratio = (width / height).abs().log()
    assert ratio.abs().max() < math.log(4 / 3) + 0.15


def by_hand(x, brightness, contrast, saturation, angle):
    """The four steps one after the other in float64, without cutting; the hue by a rotation of its own."""
    luma = torch.tensor(views.LUMA, dtype=torch.float64)
    x = brightness * x.double()
    mean = (luma[:, None, None] * x).sum(0).mean()
    x = contrast * x + (1 - contrast) * mean
    gray = (luma[:, None, None] * x).sum(0, keepdim=True)
    x = saturation * x + (1 - saturation) * gray
    axis = torch.ones(3, dtype=torch.float64) / math.sqrt(3)
    turned = torch.linalg.cross(axis.expand_as(x.movedim(0, -1)), x.movedim(0, -1), dim=-1).movedim(-1, 0)
    along = axis[:, None, None] * (axis[:, None, None] * x).sum(0)
    return along + (x - along) * math.cos(angle) + turned * math.sin(angle)


def test_colours_are_brightness_contrast_saturation_and_hue_one_after_the_other(monkeypatch):
    """The numbers drawn are replaced, so that each image's four are known; mid-gray images need no cutting."""
    drawn = {(0.6, 1.4): iter([0.9, 1.2]), (0.8, 1.2): iter([0.85]), (-0.1, 0.1): iter([0.07]),
             (0, 1): iter([0.5, 0.9])}                               # jittered, not gray
    monkeypatch.setattr(views, "uniform", lambda x, generator, low, high: torch.full(
        (len(x), 1, 1, 1), next(drawn[low, high])))
    x = 0.4 + 0.2 * torch.rand(3, 3, 5, 7, generator=seeded())
    made = views.random_colours(x, None)
    for image, expected in zip(made, x):
        torch.testing.assert_close(image.double(), by_hand(expected, 0.9, 1.2, 0.85, 2 * math.pi * 0.07),
                                   atol=1e-6, rtol=0)


def test_a_fifth_keeps_its_colours_and_a_fifth_turns_gray():
    x = torch.rand(5000, 3, 4, 4, generator=seeded())
    made = views.random_colours(x, seeded(1))
    same = (made - x).abs().flatten(1).amax(1) < 1e-6
    gray = (made - made.mean(1, keepdim=True)).abs().flatten(1).amax(1) < 1e-6
    assert abs(same.double().mean() - 0.2 * 0.8) < 0.02
    assert abs(gray.double().mean() - 0.2) < 0.02


def test_blur_is_the_gaussian_sum_and_keeps_what_is_flat():
    x = torch.rand(2, 3, 40, 40, generator=seeded(), dtype=torch.float64)
    sigma = torch.tensor([0.5, 1.7], dtype=torch.float64).view(2, 1, 1, 1)
    made = views.blur(x, sigma)
    place = torch.arange(-2, 3)                                      # a tenth of 40: 2 on either side
    for image, s, expected in zip(x, sigma.flatten(), made):
        weights = torch.exp(-(place[:, None] ** 2 + place ** 2) / (2 * s * s))
        window = image[1, 10:15, 20:25]
        assert abs((weights * window).sum() / weights.sum() - expected[1, 12, 22]) < 1e-12
    flat = torch.full((1, 3, 8, 8), 0.3)
    torch.testing.assert_close(views.blur(flat, torch.ones(1, 1, 1, 1)), flat)
