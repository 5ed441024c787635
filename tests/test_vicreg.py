"""vicreg.py: the loss, and what is known of it."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import vicreg
from kernels import variance_covariance
from kernels.benchmark import facebookresearch_form


def golden():
    torch.manual_seed(1234)
    return torch.randn(64, 32), torch.randn(64, 32)


def loss(z1, z2, lam=25, mu=25, nu=1):
    terms = vicreg.vicreg_terms(z1, z2)
    return lam * terms["invariance"] + mu * terms["variance"] + nu * terms["covariance"]


def white(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_golden_value():
    """Of facebookresearch/vicreg at 4e12602."""
    z1, z2 = golden()
    (v1, c1), (v2, c2) = variance_covariance(z1), variance_covariance(z2)
    got = [t.item() for t in (vicreg.vicreg_terms(z1, z2)["invariance"], v1, v2, c1, c2)]
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
# loss and its value on the golden input. tests/experiments/vicreg.md carries this table.
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
    model = vicreg.VICReg(vicreg.Encoder(1, 2, 4), 32, projector=(16, 2048))
    _, notes = model(*torch.randn(2, n, 1, 8, 8))
    assert notes["c_noise_floor"] == 2047 / (n - 1)
    assert c == pytest.approx(notes["c_noise_floor"], rel=.02)


def test_one_sample_is_refused():
    """Fact 4: every released implementation but lightly returns NaN."""
    with pytest.raises(ValueError, match=r"\[1, 8\].*N >= 2"):
        loss(torch.zeros(1, 8), torch.zeros(1, 8))


@pytest.mark.parametrize("other", [(4, 1), (1, 32), (8, 32), (4,)])
def test_views_of_different_shapes_are_refused_and_named(other):
    """[4, 1] would be broadcast without a word."""
    with pytest.raises(ValueError, match=r"agree in shape, got \[4, 32\] and \["):
        vicreg.vicreg_terms(torch.zeros(4, 32), torch.zeros(other))


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
    model = vicreg.VICReg(vicreg.Encoder(1, 2, 4), 32, projector=(16, 8), invariance=3, variance=5, covariance=7)
    views = torch.randn(2, 6, 1, 12, 12)
    terms, notes = model(*views)
    z = [model.projector(model.encoder(view)) for view in views]
    assert sum(terms.values()).item() == pytest.approx(loss(*z, 3, 5, 7).item(), rel=1e-5)
    sum(terms.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
