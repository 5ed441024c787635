"""The rooms that the scripts share: that they are the same to the letter, and what their functions do.

`python -m tests.test_rooms` copies vicreg.py's rooms into the others.
"""
import argparse
import math
from pathlib import Path

import pytest
import torch

import vicreg

ROOT = Path(__file__).parents[1]
OTHERS = ["icone.py", "falcon.py", "ba_ssl.py"]
FIRST, LAST = "# ==== The same in every script ", "# ==== This script "


def parts(script):
    """Text before, of, and after the shared rooms."""
    text = (ROOT / script).read_text()
    first, last = text.index(FIRST), text.index(LAST)
    return text[:first], text[first:last], text[last:]


def imports(script):
    """What a script imports from elsewhere than kernels."""
    lines = parts(script)[0].splitlines()
    return {line for line in lines if line.startswith(("import", "from", "os.")) and "kernels" not in line}


@pytest.mark.parametrize("script", OTHERS)
def test_shared_rooms_are_the_same_to_the_letter(script):
    assert parts(script)[1] == parts("vicreg.py")[1]


@pytest.mark.parametrize("script", OTHERS)
def test_each_script_imports_what_the_rooms_use(script):
    assert imports(script) >= imports("vicreg.py")


@pytest.mark.parametrize("script", ["vicreg.py", *OTHERS])
def test_the_rooms_use_of_kernels_only_what_each_script_imports(script):
    before, _, _ = parts(script)
    for name in ("collapse_panel", "knn_accuracy", "verdict"):
        assert name in before


# ---- Encoder -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(1, 20, 20), (3, 28, 28), (1, 16, 16, 16), (2, 9, 7)])
def test_encoder_shapes_and_no_sample_sees_another(shape):
    torch.manual_seed(0)
    encoder = vicreg.Encoder(shape[0], len(shape) - 1, width=4, depth=2)
    x = torch.randn(5, *shape)
    h = encoder(x)
    assert h.shape == (5, 32)
    assert encoder.features == 32
    torch.testing.assert_close(encoder(x[2:3])[0], h[2])


# ---- Data and augmentation -----------------------------------------------------------------------------------
def test_posed_digits_are_the_same_for_every_seed():
    torch.manual_seed(0)
    a = vicreg.load_data("digits")
    torch.manual_seed(1)
    b = vicreg.load_data("digits")
    assert torch.equal(a.images, b.images) and torch.equal(a.test_images, b.test_images)
    assert a.images.shape == (1437, 1, 20, 20) and a.test_images.shape == (1440, 1, 20, 20)
    assert torch.equal(a.test_labels[:360], a.test_labels[360:720])
    assert not torch.equal(a.test_images[:360], a.test_images[360:720])
    assert vicreg.load_data("digits3d").images.shape == (1437, 1, 16, 16, 16)


def still(n, axes):
    """Angles, scale and shift that change nothing."""
    return torch.zeros(n, axes * (axes - 1) // 2), torch.ones(n), torch.zeros(n, axes)


@pytest.mark.parametrize("axes", [2, 3])
def test_warp_without_a_pose_changes_nothing(axes):
    x = torch.rand(2, 1, *[9] * axes)
    torch.testing.assert_close(vicreg.warp(x, *still(2, axes), x.shape[2:]), x)


@pytest.mark.parametrize("axes", [2, 3])
def test_warp_by_a_quarter_turns_the_first_plane(axes):
    x = torch.rand(2, 1, *[9] * axes)
    angles, scale, shift = still(2, axes)
    angles[:, 0] = torch.pi / 2
    turned = vicreg.warp(x, angles, scale, shift, x.shape[2:])
    def plane(x):                                                        # in 3-D the first plane holds the depth axis
        return x.flatten(0, 1) if axes == 2 else x[:, 0].movedim(1, 0).flatten(0, 1)
    either_way = [(plane(turned) - plane(x).rot90(k, (1, 2))).abs().max() for k in (1, 3)]
    assert min(either_way) < 1e-5


@pytest.mark.parametrize("axes", [2, 3])
def test_warp_by_a_half_takes_every_second_pixel(axes):
    x = torch.rand(2, 1, *[9] * axes)
    angles, scale, shift = still(2, axes)
    half = vicreg.warp(x, angles, scale / 2, shift, x.shape[2:])
    every_second = x[(..., *[slice(None, None, 2)] * axes)]              # 5 of 9 along each axis, the centre kept
    torch.testing.assert_close(half[(..., *[slice(2, 7)] * axes)], every_second)
    assert (half[..., 0] == 0).all()                                     # outside


@pytest.mark.parametrize("axes", [2, 3])
def test_warp_shifts_by_half_canvases_and_takes_numbers_that_broadcast(axes):
    x = torch.rand(2, 1, *[9] * axes)
    angles, scale, _ = still(2, axes)
    one_pixel = torch.eye(axes)[:1].expand(2, axes) * 2 / 9              # along the last axis
    moved = vicreg.warp(x, angles, scale, one_pixel, x.shape[2:])
    torch.testing.assert_close(moved[..., 1:], x[..., :-1])
    wide = [numbers.reshape(2, -1, *[1] * axes) for numbers in (angles, scale, one_pixel)]
    assert torch.equal(vicreg.warp(x, *wide, x.shape[2:]), moved)


def test_warp_keeps_lengths_where_canvases_are_not_square():
    bar = torch.zeros(1, 1, 21, 41)
    bar[..., 9:12, 5:36] = 1
    upright = vicreg.warp(bar, torch.tensor([[torch.pi / 2]]), torch.ones(1), torch.zeros(1, 2), bar.shape[2:])
    assert upright[0, 0, :, 20].sum() == pytest.approx(21)               # the whole height
    assert upright[0, 0, 10].sum() == pytest.approx(3)


@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 12, 12), (1, 8, 8, 8), (3, 8, 8, 8)])
def test_views_differ_by_sample_and_by_draw_and_follow_the_generator(shape):
    x = torch.rand(1, *shape).expand(4, *shape)
    a, b = vicreg.two_views(x, torch.Generator().manual_seed(3), vicreg.posed_view)
    again, _ = vicreg.two_views(x, torch.Generator().manual_seed(3), vicreg.posed_view)
    assert a.shape == x.shape and torch.equal(a, again)
    assert (a - b).abs().mean() > .02 and (a[0] - a[1]).abs().mean() > .02


def test_uniform_numbers_broadcast_over_their_sample():
    x = torch.rand(5, 3, 4, 4, 4)
    numbers = vicreg.uniform(x, torch.Generator().manual_seed(0), 2, 3, size=3)
    assert numbers.shape == (5, 3, 1, 1, 1)
    assert 2 <= numbers.min() and numbers.max() < 3


# ---- Training ------------------------------------------------------------------------------------------------
def test_learning_rate_rises_for_a_tenth_and_falls_to_zero():
    rates = [vicreg.learning_rate(step, steps=100, peak=2.) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == 2
    assert rates[10] == 2
    assert rates[55] == pytest.approx(1)
    assert rates[100] == pytest.approx(0)
    assert vicreg.learning_rate(1, steps=1, peak=2.) == 2                # asked for after the last step


def arguments(**more):
    return argparse.Namespace(batch=8, accumulate=1, epochs=2, seed=0, amp="off", compile=False, save_minutes=10.,
                              **more)


def small_data(labels=True):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(24) % 3
    x = torch.rand(24, 1, 12, 12, generator=generator) + y[:, None, None, None]
    return vicreg.Data(x, y if labels else None, x[:9], y[:9] if labels else None, view=vicreg.posed_view)


@pytest.mark.parametrize("labels", [True, False])
def test_any_module_from_images_to_features_can_be_the_encoder(tmp_path, labels, capsys):
    """The contract above the rooms: no attribute of the encoder is used."""
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(144, 10), torch.nn.BatchNorm1d(10))
    model = vicreg.VICReg(backbone, 10, projector=(16, 16))
    data = small_data(labels)
    untrained = vicreg.examine(model, data)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    history = vicreg.train(model, optimizer, data, arguments(), tmp_path, state=None)
    vicreg.report(model, data, untrained, history, tmp_path)
    assert len(history) == 2
    assert ("trained encoder" in capsys.readouterr().out) == labels
    saved = torch.load(tmp_path / "encoder.pt", weights_only=True)
    backbone.load_state_dict(saved["state_dict"])


def test_training_sees_each_image_once_an_epoch_and_drops_the_rest(tmp_path):
    """20 images at 8: 16 of them, in an order of their own each epoch."""
    seen = []

    class Watching(vicreg.VICReg):
        def forward(self, view1, view2, index):
            seen.append(index)
            return super().forward(view1, view2, index)

    model = Watching(vicreg.Encoder(1, 2, width=2), 16, projector=(8, 8))
    data = small_data()
    data = data._replace(images=data.images[:20], labels=data.labels[:20])
    vicreg.train(model, torch.optim.SGD(model.parameters(), 1e-3), data, arguments(), tmp_path, state=None)
    first, second = torch.cat(seen[:2]), torch.cat(seen[2:])
    assert len(first.unique()) == 16
    assert len(second.unique()) == 16
    assert not torch.equal(first, second)


# ---- Command line --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text, low, high", [("0", 1, math.inf), ("1", 0, 1), ("nan", 0, math.inf), ("-1", 0, 9)])
def test_bounds_refuse_what_lies_outside(text, low, high):
    with pytest.raises(argparse.ArgumentTypeError, match=rf"{text} does not lie in \[{low}, {high}\)"):
        vicreg.bounded(float, low, high)(text)


def test_layer_sizes():
    assert vicreg.layer_sizes("512-64") == [512, 64]
    with pytest.raises(argparse.ArgumentTypeError):
        vicreg.layer_sizes("512-0")
    with pytest.raises(ValueError):
        vicreg.layer_sizes("wide")


if __name__ == "__main__":
    for script in OTHERS:
        before, _, after = parts(script)
        (ROOT / script).write_text(before + parts("vicreg.py")[1] + after)
        print(f"{script}: rooms copied from vicreg.py")
