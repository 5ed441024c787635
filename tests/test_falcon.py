"""falcon.py: the values derived for the loss at its optimum and at each collapse, the meters, the four dictionaries."""
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from sklearn.metrics import normalized_mutual_info_score

sys.path.insert(0, str(Path(__file__).parent / "experiments"))
import falcon
import free_features
from kernels import dictionary_loss, dictionary_reference, dictionary_signs


def hadamard(c):
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < c:
        H = torch.cat([torch.cat([H, H]), torch.cat([H, -H])], 1)
    return H


def released(h1, h2, codes, temperature, seed=0):
    return sum(dictionary_loss(h1, h2, codes, seed, temperature)).item()


# ---- Derived values ----------------------------------------------------------------------------------------
def at_optimum(n, c, eps, a=1., b=0.):
    """prior and cross-entropy, both forms, at h_i = a w_j + b (sum of the others), over sqrt(n), j = i mod c."""
    W = hadamard(c)
    h = (a * W + b * (W.sum(0) - W))[torch.arange(n) % c] / math.sqrt(n)
    t = falcon.derived_temperature(n, c, c, eps)
    (kl, ce), (forward, _) = (dictionary_reference(h, h, W, t, prior) for prior in ("reverse", "forward"))
    return kl.item(), forward.item(), ce.item()


def test_optimum_with_hadamard_codes():
    kl, forward, ce = at_optimum(256, 64, 1e-8)
    assert forward + ce == pytest.approx(4.158895, abs=5e-7) and forward == pytest.approx(math.log(64))
    assert kl == pytest.approx(0, abs=1e-12)
    for prior, name, value in (("reverse", "optimum", kl + ce), ("forward", "not below", forward + ce)):
        assert falcon.loss_values(256, 64, 64, prior=prior)[name] == pytest.approx(value, abs=1e-9)


def test_the_forward_prior_of_fewer_images_than_codes_stays_far_above_its_bound():
    """n 16, c 256, free assignments from ten starts, two views alike: 7.87 at best, the bound is log 256 = 5.55."""
    logits = torch.randn(10, 16, 256, generator=torch.Generator().manual_seed(0)).mul_(3).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=.1)
    for _ in range(400):
        log_p = logits.log_softmax(2)
        losses = math.log(16) - log_p.logsumexp(1).mean(1) - (log_p.exp() * log_p).sum(2).mean(1)        # [10]
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    assert 7.8 < losses.min() < 8
    assert falcon.loss_values(16, 256, 16, prior="forward") == {"not below": pytest.approx(math.log(256), abs=1e-4)}


def test_images_that_cannot_be_dealt_to_codes_alike_cost_a_little():
    """n 64, 48 codes, each image sure of its code: 16 codes have two, prior .06 where loss_values says 0."""
    share = torch.bincount(torch.arange(64) % 48).double() / 64
    assert math.log(48) - falcon.entropy(share) == pytest.approx(.06, abs=.005)
    assert falcon.loss_values(64, 48, 48)["optimum"] < 1e-4


@pytest.mark.parametrize("beta", [.5, 1, 2])
def test_values_at_other_betas(beta):
    kl, _, ce = at_optimum(256, 64, 1e-3)
    values = falcon.loss_values(256, 64, 64, beta, 1e-3)
    assert values["optimum"] == pytest.approx(kl + beta * ce, abs=1e-9)
    collapsed, = [value for name, value in values.items() if name.startswith("representation")]
    assert collapsed == pytest.approx(min(1, beta) * math.log(64))


@pytest.mark.parametrize("temperature", [.1, 1, 10])
def test_mean_assignment_at_any_temperature(temperature):
    z, W = torch.randn(150, 8, generator=torch.Generator().manual_seed(0)), dictionary_signs(32, 8, 0)
    _, p = falcon.assign(z, W, temperature)
    torch.testing.assert_close(p, (z @ W.T / temperature).softmax(1).mean(0))
    meters = falcon.collapse_meters(z, W, temperature, mixtures=())
    assert meters["assignment_entropy"] == pytest.approx(falcon.entropy(p))


def test_alternating_codes_move_in_training_alone_and_by_the_last_32_batches():
    dictionary = falcon.AlternatingDictionary(16, 8, batch=3)
    before = dictionary.learned.clone()
    batches = [(torch.randn(3, 8), torch.randn(3, 8)) for _ in range(40)]
    dictionary.eval()
    for z1, z2 in batches:
        dictionary(z1, z2, 1., "reverse")
    assert dictionary.count == 0 and torch.equal(dictionary.learned, before)
    dictionary.train()
    for z1, z2 in batches:
        dictionary(z1, z2, 1., "reverse")
    assert dictionary.count == 40 and not torch.equal(dictionary.learned, before)
    kept = {tuple(rows.flatten().tolist()) for rows in dictionary.seen}
    assert kept == {tuple(torch.cat(pair).flatten().tolist()) for pair in batches[8:]}


def test_assignments_at_that_optimum_are_smoothed_one_hot():
    W, eps = hadamard(64), 1e-3
    p = (W / 16 @ W.T / falcon.derived_temperature(256, 64, 64, eps)).softmax(1)
    torch.testing.assert_close(p, torch.full_like(p, eps).fill_diagonal_(1 - 63 * eps))


def test_the_spheres_optimum_lies_slightly_below_the_bound():
    def value(angle):                                                    # on the sphere |h|^2 = f / n
        _, forward, ce = at_optimum(64, 64, 1e-3, math.cos(angle), math.sin(angle) / math.sqrt(63))
        return forward + ce
    assert value(0) == pytest.approx(4.655044, abs=1e-6)
    assert minimize_scalar(value, bounds=(-.3, .1), method="bounded").fun == pytest.approx(4.633620, abs=1e-6)


def test_representation_collapse_costs_log_c_whatever_the_common_assignment():
    t = falcon.derived_temperature(64, 64, 16384)
    for scale in (.01, 1, 10):
        h = (scale * torch.randn(1, 64, generator=torch.Generator().manual_seed(1)).double()).tanh().expand(64, 64)
        assert released(h, h, 16384, t) == pytest.approx(9.7041, abs=5e-5)


@pytest.mark.parametrize("m, value", [(4, 8.3178), (16, 6.9315), (64, 5.5452)])
def test_cluster_collapse_to_m_codes_costs_log_c_over_m(m, value):
    """m = n = 64 is the optimum of this batch, log(c / n)."""
    h = dictionary_signs(16384, 256, 0)[torch.arange(64) % m]            # tanh at its limits
    assert released(h, h, 16384, falcon.derived_temperature(64, 256, 16384)) == pytest.approx(value, abs=5e-5)
    values = list(falcon.loss_values(64, 16384, m).values())
    assert values[0] == pytest.approx(9.7041, abs=5e-5) and values[1] == pytest.approx(value, abs=5e-5)
    assert values[2] == pytest.approx(5.5452, abs=5e-5)


def test_no_random_features_go_below_the_optimum():
    t = falcon.derived_temperature(16, 32, 512)
    for seed in range(20):
        h = (3 * torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(seed))).tanh()
        assert released(*h, 512, t) > falcon.loss_values(16, 512, 16)["optimum"]


def test_identical_views_cost_log_c_less_the_information_between_sample_and_code():
    h = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).double()
    p = (h @ dictionary_signs(30, 8, 0).double().T).softmax(1)
    information = falcon.entropy(p.mean(0)) - sum(map(falcon.entropy, p)) / 20
    assert released(h, h, 30, 1.) == pytest.approx(math.log(30) - information)


@pytest.mark.parametrize("correlation, leaves", [(.4, False), (.6, True)])
def test_the_plateau_is_left_only_where_views_correlate_by_more_than_a_half(correlation, leaves):
    """Small features, near the uniform p (1 + d): CE = log c + mean (d_a^2 + d_b^2) / 4 - d_a d_b, to second order."""
    a, b = torch.randn(2, 4000, 16, generator=torch.Generator().manual_seed(0)).double()
    views = a, correlation * a + math.sqrt(1 - correlation ** 2) * b
    ce = dictionary_loss(*(.01 * h for h in views), 64, 0, 1.)[1].item()
    assert (ce < math.log(64)) == leaves


@pytest.mark.parametrize("c, rms, rank", [(10, None, 10), (128, .088, None), (1024, .031, 128), (16384, .0077, 128)])
def test_decorrelation_goes_with_one_over_sqrt_c(c, rms, rank):
    """Second moment of features in balanced alignment, W W^T / c: the meter sees 1 / sqrt(c)."""
    W = dictionary_signs(c, 128, 0)
    M = W.T @ W / c
    off = M - torch.diag(M.diagonal())
    if rms:
        assert (off.square().sum() / (128 * 127)).sqrt().item() == pytest.approx(rms, rel=.1)
        assert rms == pytest.approx(1 / math.sqrt(c), rel=.03)
    if rank:
        assert torch.linalg.matrix_rank(M) == rank


@pytest.mark.parametrize("eps, codes", [(1 / 9, 10), (.5, 10), (0, 10), (1e-8, 1), (1e-4, 16384), (.5, 2), (.6, 2),
                                        (1 / 16, 16)])
def test_an_eps_that_leaves_nothing_is_refused(eps, codes):
    with pytest.raises(ValueError, match="eps .* below 1 / codes"):
        falcon.derived_temperature(64, 128, codes, eps)


@pytest.mark.parametrize("classes, clusters, value", [(10, 16384, .353), (100, 16384, .63)])
def test_nmi_of_a_random_assignment_is_far_from_zero(classes, clusters, value):
    """CIFAR's 10,000 test images: why AMI and a random assignment stand beside every NMI."""
    codes = torch.randint(clusters, (10_000,), generator=torch.Generator().manual_seed(0))
    assert normalized_mutual_info_score(torch.arange(10_000) % classes, codes) == pytest.approx(value, abs=.01)


# ---- The model ---------------------------------------------------------------------------------------------
def model(kind="fixed", seed=0, **options):
    torch.manual_seed(0)
    dictionary = falcon.make_dictionary(kind, 40, 12, 8, seed)
    return falcon.FALCON(falcon.Encoder(1, 2, width=2), 16, dictionary, 8, projector=(12,), **options)


def images(n=8, seed=0):
    return torch.rand(n, 1, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["fixed", "learned", "hybrid", "alternating"])
@pytest.mark.parametrize("norm", ["tanh", "l2"])
def test_terms_are_the_formulas(kind, norm):
    net = model(kind, norm=norm, temperature=2., prior="forward").train()
    view1, view2 = images(seed=1), images(seed=2)
    W, t = dictionary_signs(40, 12, 0), 2 * falcon.derived_temperature(8, 12, 40)
    def features(view):
        x = net.projector[0](net.encoder(view))
        x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
        return x.tanh() if norm == "tanh" else math.sqrt(12 / 8) * F.normalize(x)
    p1, p2 = ((features(view) @ W.T / t).softmax(1) for view in (view1, view2))
    terms, notes = net(view1, view2)
    prior = -(p1.mean(0).log().mean() + p2.mean(0).log().mean()) / 2
    cross = -((p1 * p2.log()).sum(1).mean() + (p2 * p1.log()).sum(1).mean()) / 2
    assert not notes and terms["prior"].item() == pytest.approx(prior.item(), rel=1e-5)
    assert terms["cross_entropy"].item() == pytest.approx(cross.item(), rel=1e-5)


def test_an_embedding_of_zeros_has_no_gradient():
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    x[3] = 0
    x.requires_grad_()
    z = falcon.Sphere(2.)(x)
    (z * torch.arange(8)).sum().backward()
    assert z[3].eq(0).all() and x.grad[3].eq(0).all() and x.grad.isfinite().all()
    torch.testing.assert_close(z[[0, 1, 2, 4]].norm(dim=1), torch.full((4,), 2.))


def test_without_a_prior_it_is_only_logged():
    terms, notes = model(prior="none").train()(images(), images(seed=1))
    assert set(terms) == {"cross_entropy"} and set(notes) == {"prior"}


def test_codes_must_be_as_wide_as_embeddings():
    with pytest.raises(ValueError, match="codes of 8 numbers for embeddings of 12"):
        falcon.FALCON(falcon.Encoder(1, 2, width=2), 16, falcon.FixedDictionary(40, 8), 8, projector=(12,))


@pytest.mark.parametrize("kind", ["fixed", "learned"])
def test_another_norm_or_prior_is_refused(kind):
    parts = falcon.Encoder(1, 2, width=2), 16, falcon.make_dictionary(kind, 40, 8, 8), 8, (8,)
    with pytest.raises(ValueError, match="norm 'L2' is neither l2 nor tanh"):
        falcon.FALCON(*parts, norm="L2")
    with pytest.raises(ValueError, match="prior"):
        falcon.FALCON(*parts, prior="uniform")(images(), images(seed=1))


@pytest.mark.parametrize("progress, rise, beta", [(.25, 1, .5), (.25, .5, 1), (.5, .5, 2), (.75, .5, 2), (1, 1, 2), (.1, 0, 2)])
def test_beta_rises_from_0_over_a_part_of_the_run(progress, rise, beta):
    assert falcon.beta_at(progress, beta=2., rise=rise) == pytest.approx(beta)


def test_the_fixed_dictionary_is_in_no_checkpoint():
    net = model()
    assert {name.split(".")[0] for name in net.state_dict()} == {"encoder", "projector"}
    assert net.dictionary.vectors().shape == (40, 12) and torch.equal(net.dictionary.vectors(), dictionary_signs(40, 12, 0))
    assert not torch.equal(model(seed=1).dictionary.vectors(), net.dictionary.vectors())


@pytest.mark.parametrize("kind, moved", [("learned", 40), ("hybrid", 10)])
def test_learnable_dictionaries_start_at_the_fixed_one_and_keep_the_length_of_rows(kind, moved):
    net = model(kind, norm="l2").train()
    torch.testing.assert_close(net.dictionary.vectors().detach(), dictionary_signs(40, 12, 0))
    optimizer = torch.optim.SGD(net.parameters(), 10.)
    sum(net(images(), images(seed=1))[0].values()).backward()
    optimizer.step()
    W = net.dictionary.vectors().detach()
    torch.testing.assert_close(W.norm(dim=1), torch.full((40,), math.sqrt(12)))
    changed = (W - dictionary_signs(40, 12, 0)).abs().sum(1) > 1e-4
    assert changed[:moved].all() and not changed[moved:].any()


def test_alternating_is_a_step_of_k_means_every_eight_batches():
    net = model("alternating")
    h = F.normalize(torch.randn(8, 16, 12, generator=torch.Generator().manual_seed(0)), dim=2)
    def nearest():
        return (h.flatten(0, 1) @ net.dictionary.vectors().T).max(1)
    before, code = nearest()
    for batch in h[:7]:
        net.dictionary.cluster(batch)
    assert torch.equal(net.dictionary.vectors(), dictionary_signs(40, 12, 0) / 12 ** .5 * math.sqrt(12))
    net.dictionary.cluster(h[7])
    assert nearest()[0].mean() > before.mean()
    j = code[0]
    mean = h.flatten(0, 1)[code == j].mean(0)
    torch.testing.assert_close(net.dictionary.vectors()[j], F.normalize(mean, dim=0) * math.sqrt(12))
    assert net.dictionary.learned.grad is None and not net.dictionary.learned.requires_grad


# ---- Meters ------------------------------------------------------------------------------------------------
def test_meters_tell_the_collapses_apart():
    W = dictionary_signs(64, 32, 0)
    def meters(h):
        return falcon.collapse_meters(h, W, temperature=1., mixtures=(4,))
    healthy = meters(W.repeat(4, 1))                                     # balanced, aligned
    point = meters(W[:1].repeat(256, 1))
    few = meters(W[:4].repeat(64, 1))
    blurred = meters(W.repeat(4, 1) + torch.randn(256, 32, generator=torch.Generator().manual_seed(0)))
    assert healthy["codes"] == 64 and healthy["assignment_entropy"] == pytest.approx(math.log(64), rel=1e-2)
    assert healthy["dimensions"] > 20 and abs(healthy["cosine"]) < .02 and healthy["std"] > .9
    assert healthy["off_diagonal"] == pytest.approx(1 / 8, rel=.1)       # 1 / sqrt(c)
    assert point["std"] == 0 and point["cosine"] == pytest.approx(1) and point["codes"] == 1
    assert point["dimensions"] == pytest.approx(1, abs=1e-4) and point["assignment_entropy"] < .1
    assert few["codes"] == 4 and few["dimensions"] < 4.01
    assert few["assignment_entropy"] == pytest.approx(math.log(4), rel=.05)
    assert few["mixture_entropy_4"] < -3.5 < blurred["mixture_entropy_4"]  # points against clouds: intracluster


def test_mixture_entropy_of_one_gaussian_is_the_textbooks():
    h = 2 * torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    assert falcon.mixture_entropy(h, components=1, samples=2000) == pytest.approx(.5 * math.log(2 * math.pi * math.e * 4), abs=.03)


# ---- The theorem, where it is one: free features (tests/experiments/free_features.py) ----------------------------
@pytest.mark.parametrize("norm", ["l2", "tanh"])
@pytest.mark.parametrize("codes, steps", [(64, 600), (512, 300)])
def test_free_features_reach_the_optimum_and_none_of_the_four_collapses(norm, codes, steps):
    """More images than codes, and fewer; from a random start, with beta rising: loss, codes, decorrelation, dimensions."""
    n, f = 128, 16
    h, _ = free_features.descend(n, codes, f, norm, steps=steps)
    found = free_features.judged(h, codes)
    assert found["distance"] <= .05
    assert found["codes"] >= min(codes, .95 * n)                         # n < c: two images may share one
    assert found["off_diagonal"] <= 1.1 / math.sqrt(found["codes"])
    span = free_features.judged(dictionary_signs(codes, f, 0), codes)["dimensions"]      # of the codes themselves
    assert found["dimensions"] >= .95 * span
    assert abs(found["cosine"]) < .02 and found["std"] > .9 * h.square().mean().sqrt()


@pytest.mark.parametrize("norm", ["l2", "tanh"])
def test_without_the_prior_free_features_stay_where_they_start(norm):
    """One point stays one, at the least loss; spread ones stay spread: without a network nothing draws images together."""
    for start, codes in (("collapsed", 1), ("random", 57)):
        h, _ = free_features.descend(128, 64, 16, norm, start, prior="none", rise=0, steps=200)
        found = free_features.judged(h, 64, prior="none")
        assert found["distance"] < .02 and found["codes"] == codes, found


@pytest.mark.parametrize("norm, reached", [("l2", .25), ("tanh", .05)])
def test_from_a_collapsed_start_descent_needs_the_rise_of_beta(norm, reached):
    distances = []
    for rise in (.5, 0):
        h, _ = free_features.descend(128, 64, 16, norm, "collapsed", rise=rise, steps=600)
        distances.append(free_features.judged(h, 64)["distance"])
    assert distances[0] <= reached and distances[1] > .35, distances
