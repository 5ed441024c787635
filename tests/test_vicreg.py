"""vicreg.py: the loss and what is known of it, and the rooms that every script shares."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

import vicreg
from kernels import variance_covariance
from kernels.benchmark import facebookresearch_form


def golden():
    torch.manual_seed(1234)
    return torch.randn(64, 32), torch.randn(64, 32)


def loss(z1, z2, lam=25, mu=25, nu=1):
    s, v, c = vicreg.vicreg_terms(z1, z2)
    return lam * s + mu * v + nu * c


def white(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- The loss ------------------------------------------------------------------------------------------------
def test_golden_value():
    """Of facebookresearch/vicreg at 4e12602."""
    z1, z2 = golden()
    (v1, c1), (v2, c2) = variance_covariance(z1), variance_covariance(z2)
    got = [t.item() for t in (vicreg.vicreg_terms(z1, z2)[0], v1, v2, c1, c2)]
    assert got == pytest.approx([2.082233, .030586, .036699, .485558, .564528], abs=1e-6)
    assert loss(z1, z2).item() == pytest.approx(53.9470, abs=1e-4)


@pytest.mark.parametrize("shape", [(24, 64), (32, 32), (64, 24)])
def test_loss_and_gradient_equal_the_released_form(shape):
    z = [white(*shape, seed).requires_grad_() for seed in (0, 1)]
    (v1, c1), (v2, c2) = map(facebookresearch_form, z)
    released, ours = 25 * F.mse_loss(*z) + 25 * (v1 + v2) / 2 + c1 + c2, loss(*z)
    assert ours.item() == pytest.approx(released.item(), rel=1e-10)
    for mine, theirs in zip(torch.autograd.grad(-1.7 * ours, z), torch.autograd.grad(-1.7 * released, z)):
        assert ((mine - theirs).norm() / theirs.norm()).item() < 1e-10


# What each project multiplies v + v', c + c' with, its coefficients and eps; then our weights that give the same
# loss and its value on the golden input. README carries this table.
CONVENTIONS = {
    "facebookresearch/vicreg": (.5, 1, (25, 25, 1), 1e-4, (25, 25, 1), 53.9470),
    "lightly, stable-pretraining, pytorch-metric-learning": (.5, 1, (25, 25, 1), 1e-4, (25, 25, 1), 53.9470),
    "solo-learn": (1, 1, (25, 25, 1), 1e-4, (25, 50, 1), 54.7880),
    "jolibrain/vicreg-loss": (.5, .5, (25, 15, 1), 0, (25, 15, .5), 53.0859),
    "VICRegL, global part": (.5, .5, (25, 25, 1), 1e-4, (25, 25, .5), 53.4219)}


@pytest.mark.parametrize("project", CONVENTIONS)
def test_conventions_of_other_projects(project):
    h_v, h_c, (lam, mu, nu), eps, weights, value = CONVENTIONS[project]
    z1, z2 = (z.double() for z in golden())
    variance = [torch.relu(1 - (z.var(0) + eps).sqrt()).mean() for z in (z1, z2)]
    covariance = [(torch.cov(z.T).square().sum() - z.var(0).square().sum()) / 32 for z in (z1, z2)]
    theirs = lam * F.mse_loss(z1, z2) + mu * h_v * sum(variance) + nu * h_c * sum(covariance)
    # Ours has eps 1e-4 inside the root; without it a hinge near 1 moves by at most 1e-4 / 2.
    assert loss(z1, z2, *weights).item() == pytest.approx(theirs.item(), rel=1e-10 if eps else 1e-4)
    assert theirs.item() == pytest.approx(value, abs=1e-4)


def test_exact_collapse_is_a_stationary_point():
    """Fact 1: VICReg pushes away from near-collapse, not from collapse."""
    z = [torch.full((16, 8), .5, requires_grad=True) for _ in range(2)]
    total = loss(*z)
    total.backward()
    assert total.item() == pytest.approx(24.75) and all((t.grad == 0).all() for t in z)


@pytest.mark.parametrize("sigma", [1e-3, 1e-2, .5])
def test_eps_damps_the_hinge_near_collapse(sigma):
    """Fact 2: the pull on a dimension's spread carries sigma / sqrt(sigma^2 + eps)."""
    unit = white(64, 8)
    unit = unit / unit.std(0)
    scale = torch.tensor(sigma, dtype=torch.float64, requires_grad=True)
    variance_covariance(scale * unit)[0].backward()
    assert scale.grad.item() == pytest.approx(-sigma / (sigma ** 2 + 1e-4) ** .5)


@pytest.mark.parametrize("n", [8, 32, 256])
def test_noise_floor_of_the_covariance_term(n):
    """Fact 3: white noise gives E[c] = (D - 1)/(N - 1), which the script logs beside the term."""
    c = np.mean([variance_covariance(white(n, 2048, seed).float())[1].item() for seed in range(4)])
    model = vicreg.VICReg(vicreg.Encoder(1, 2, 4), sizes=(16, 2048))
    _, notes = model(*torch.randn(2, n, 1, 8, 8))
    assert notes["c_noise_floor"] == 2047 / (n - 1)
    assert c == pytest.approx(notes["c_noise_floor"], rel=.02)


def test_one_sample_is_refused():
    """Fact 4: every released implementation but lightly returns NaN."""
    with pytest.raises(ValueError, match=r"\[1, 8\].*N >= 2"):
        loss(torch.zeros(1, 8), torch.zeros(1, 8))


def test_the_loss_is_fp32_where_fp16_underflows_and_overflows():
    """Fact 5: at feature std .02 every squared covariance is 0 in fp16; at std 8, N = 2048 the products overflow."""
    def naive(z):
        c = (z - z.mean(0)).T @ (z - z.mean(0)) / (len(z) - 1)
        return (c - torch.diag(torch.diagonal(c))).square().sum() / z.shape[1]
    small, large = (.02 * white(64, 32)).half(), (8 * white(2048, 32)).half()
    assert naive(small).item() == 0 and not naive(large).isfinite()
    for z in (small, large):
        truth = variance_covariance(z.double())[1].item()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert variance_covariance(z)[1].item() == pytest.approx(truth, rel=1e-5)


def test_terms_are_differentiable_through_the_model_and_sum_to_the_loss():
    torch.manual_seed(0)
    model = vicreg.VICReg(vicreg.Encoder(1, 2, 4), sizes=(16, 8), weights=(3, 5, 7))
    views = torch.randn(2, 6, 1, 12, 12)
    terms, notes = model(*views)
    z = [model.projector(model.encoder(view)) for view in views]
    assert sum(terms.values()).item() == pytest.approx(loss(*z, 3, 5, 7).item(), rel=1e-5)
    sum(terms.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# ---- Encoder -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(1, 20, 20), (3, 28, 28), (1, 16, 16, 16), (2, 9, 7)])
def test_encoder_shapes_and_no_sample_sees_another(shape):
    torch.manual_seed(0)
    encoder = vicreg.Encoder(shape[0], len(shape) - 1, width=4, depth=2)
    x = torch.randn(5, *shape)
    h = encoder(x)
    assert h.shape == (5, encoder.features) == (5, 32)
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


def test_imbalance_thins_the_training_classes_only():
    data = vicreg.load_data("digits", imbalance=100)
    counts = data.labels.bincount()
    assert counts[0] == max(counts) and counts[0] / counts[9] > 70 and (counts.diff() <= 0).all()
    assert len(data.images) == counts.sum() and len(data.test_images) == 1440


@pytest.mark.parametrize("axes", [2, 3])
def test_warp_poses_as_it_says(axes):
    x = torch.rand(2, 1, *[9] * axes)
    still = torch.zeros(2, axes * (axes - 1) // 2), torch.ones(2), torch.zeros(2, axes)
    torch.testing.assert_close(vicreg.warp(x, *still, x.shape[2:]), x)
    quarter = torch.tensor([[torch.pi / 2] + [0] * (still[0].shape[1] - 1)] * 2)
    turned = vicreg.warp(x, quarter, *still[1:], x.shape[2:])
    plane = turned.flatten(0, 1) if axes == 2 else turned[:, 0].movedim(1, 0).flatten(0, 1)
    source = x.flatten(0, 1) if axes == 2 else x[:, 0].movedim(1, 0).flatten(0, 1)
    assert min((plane - source.rot90(k, (1, 2))).abs().max() for k in (1, 3)) < 1e-5
    half = vicreg.warp(x, still[0], still[1] / 2, still[2], x.shape[2:])
    every_second = x[(..., *[slice(None, None, 2)] * axes)]              # 5 of 9 along each axis, the centre kept
    torch.testing.assert_close(half[(..., *[slice(2, 7)] * axes)], every_second)
    assert (half[..., 0] == 0).all()
    bar = torch.zeros(1, 1, *[3] * (axes - 2), 21, 41)                    # canvases need not be square
    bar[..., 9:12, 5:36] = 1
    angle = torch.tensor([[torch.pi / 2] + [0] * (still[0].shape[1] - 1)])
    upright = vicreg.warp(bar, angle, torch.ones(1), torch.zeros(1, axes), bar.shape[2:])
    if axes == 2:                                                        # in 3-D the first plane holds the depth axis
        assert upright[0, 0, :, 20].sum() == pytest.approx(21) and upright[0, 0, 10].sum() == pytest.approx(3)
    one_voxel = torch.eye(axes)[:1].expand(2, axes) * 2 / 9              # along the last axis
    moved = vicreg.warp(x, *still[:2], one_voxel, x.shape[2:])
    torch.testing.assert_close(moved[..., 1:], x[..., :-1])


@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 12, 12), (1, 8, 8, 8), (3, 8, 8, 8)])
def test_views_differ_by_sample_and_by_draw_and_follow_the_generator(shape):
    x = torch.rand(1, *shape).expand(4, *shape)
    a, b = vicreg.two_views(x, torch.Generator().manual_seed(3))
    again, _ = vicreg.two_views(x, torch.Generator().manual_seed(3))
    assert a.shape == x.shape and torch.equal(a, again)
    assert (a - b).abs().mean() > .02 and (a[0] - a[1]).abs().mean() > .02


# ---- Probes and collapse panel -------------------------------------------------------------------------------
def test_knn_equals_scikit_learn():
    h, h_test = white(200, 6).float(), white(90, 6, 1).float()
    y, y_test = (h[:, 0] > 0).long() + (h[:, 1] > 0), (h_test[:, 0] > 0).long() + (h_test[:, 1] > 0)
    theirs = KNeighborsClassifier(5, metric="cosine", weights=lambda distance: np.exp((1 - distance) / .07))
    assert vicreg.knn_accuracy(h, y, h_test, y_test) == pytest.approx(theirs.fit(h, y).score(h_test, y_test))


def panel(z):
    return vicreg.collapse_panel(z, z, z)


def test_panel_on_known_spectra():
    got = panel(white(512, 2048))
    assert got["RankMe"] == pytest.approx(494.9, rel=.01) and got["participation"] == pytest.approx(409.6, rel=.01)
    basis = torch.linalg.qr(torch.cat([torch.ones(1024, 1), torch.randn(1024, 512)], 1).double()).Q[:, 1:]
    got = panel(basis * torch.arange(1, 513) ** -.5)                 # covariance eigenvalues proportional to 1/k
    assert got["participation"] == pytest.approx(28.2808, abs=1e-3)
    assert got["RankMe"] == pytest.approx(409.5545, abs=.2)              # its 1e-7 inside the entropy adds .11


def test_panel_on_near_constant_features():
    """No single number sees this: the centred spectrum is full, the uncentred one is the mean's."""
    got = panel(3 + .01 * white(4096, 256))
    assert got["raw std"] == pytest.approx(.01, rel=.01) and got["RankMe"] == pytest.approx(1.61, abs=.02)
    assert got["participation"] == pytest.approx(240.7, rel=.01)
    assert got["cosine"] > .999 and got["std"] < .01


@pytest.mark.parametrize("d, uniformity", [(128, -3.937), (2, -1.575)])
def test_panel_on_white_features(d, uniformity):
    got = panel(white(2000, d))
    assert got["std"] == pytest.approx(1, abs=.01) and got["cosine"] == pytest.approx(0, abs=.01)
    assert got["uniformity"] == pytest.approx(uniformity, abs=.02) and got["alignment"] == 0


@pytest.mark.parametrize("d, twonn", [(2, 1.95), (10, 8.75)])
def test_twonn_on_uniform_cubes(d, twonn):
    cube = torch.rand(3000, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert panel(cube)["TwoNN"] == pytest.approx(twonn, rel=.04)
    assert panel(torch.cat([cube, cube[:50]]))["TwoNN"] > 0                                     # duplicates do no harm


def test_alignment_is_the_squared_distance_of_unit_views():
    z1, z2 = white(50, 4), white(50, 4, 1)
    expected = (2 - 2 * F.cosine_similarity(z1, z2)).mean().item()
    assert vicreg.collapse_panel(z1, z1, z2)["alignment"] == pytest.approx(expected)


def test_verdict_names_each_collapse():
    z, noise = white(500, 64), white(500, 64, 1)
    line = white(500, 1) @ white(1, 64, 1)
    def say(*three):
        return vicreg.verdict(vicreg.collapse_panel(*three), min(three[0].shape))
    assert say(z, z + .1 * noise, z - .1 * noise).startswith("No collapse")
    assert say(1 + 1e-3 * z, 1 + 1e-3 * z, 1 + 1e-3 * z).startswith("COLLAPSED, embeddings say next to nothing")
    assert say(1e-3 * z, 1e-3 * z, 1e-3 * z).startswith("COLLAPSED, embeddings say next to nothing")
    assert say(white(12, 512), *2 * [white(12, 512)]).startswith("No collapse")                 # rank is at most 12
    assert say(torch.ones(500, 64), *torch.ones(2, 500, 64)).startswith("COLLAPSED, embeddings say next to nothing")
    assert say(z, noise, white(500, 64, 2)).startswith("COLLAPSED, embeddings say next to nothing")
    assert say(line, line, line).startswith("DIMENSIONAL")
