"""collapse_toy.py: simulation against closed form, hand-written against autograd, and the script as users run it."""
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import cdist, pdist

import collapse_toy as toy

SCRIPT = Path(__file__).parents[1] / "collapse_toy.py"


def rng(seed=0):
    return np.random.default_rng(seed)


def case(K=5, n=50, frustrated=10, d=8, seed=0, w=1., eta_y=1.):
    """Model of all samples, its start, and both again merged."""
    edges = toy.sample_edges(K, n, frustrated, rng(seed), w)
    z = toy.start(edges, d, rng(seed))
    return edges, toy.bipartite(edges, eta_y=eta_y), z, *toy.merge(edges, z, eta_y)


def d_min(z, K):
    return pdist(z[-K:]).min()


def apart(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


# ---- Model and dynamics --------------------------------------------------------------------------------------
@pytest.mark.parametrize("head", ["none", "both", "head"])
def test_gradient_is_that_of_the_loss(head):
    _, model, z, *_ = case(n=4, w=.7)
    W, dz, dW = rng(1).normal(size=(8, 8)), rng(2).normal(size=z.shape), rng(3).normal(size=(8, 8))
    up, down = (toy.loss(model, z + h * dz, W + h * dW, head) for h in (1e-5, -1e-5))
    to_z, to_W = toy.gradient(model, z, W, head)
    assert (up - down) / 2e-5 == pytest.approx(np.sum(to_z * dz) + np.sum(to_W * dW), rel=1e-7)


@pytest.mark.parametrize("head", toy.HEADS)
def test_loss_is_the_sum_over_edges(head):
    edges, model, z, *_ = case(n=4, w=.7)
    W = rng(1).normal(size=(8, 8))
    x, y, Wx, Wy = z[:-5], z[-5:], z[:-5] @ W.T, z[-5:] @ W.T
    pairs = {"none": [(x, y)], "both": [(Wx, Wy)]}.get(head, [(Wx, y), (x, Wy)])
    whole = sum(.5 * np.sum(edges * cdist(u, v) ** 2) for u, v in pairs)
    assert toy.loss(model, z, W, head) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("head", toy.HEADS)
def test_autograd_with_detach_agrees_with_the_hand_written_descent_and_flow(head):
    edges, model, z, *_ = case(K=4, n=10, frustrated=6, d=3)
    W, eta, errors = np.eye(3) + .2 * rng(1).normal(size=(3, 3)), .02, []
    exact = toy.flow(model, z, W, head, eta, [0, .2], 1e-11, "DOP853")
    for steps in (200, 400):
        by_torch = toy.autograd_descent(edges, z, W, head, eta, .2 / steps, steps)
        by_hand = toy.descent(model, z, W, head, eta, .2 / steps, [.2])
        assert max(apart(a, b[0]) for a, b in zip(by_torch, by_hand)) < 1e-12
        errors.append(max(apart(a, b[-1]) for a, b in zip(by_torch, exact)))
    assert errors[0] < 5e-3
    assert errors[0] / errors[1] == pytest.approx(2, abs=.1)                 # first order in the step


def test_symmetric_stop_gradient_on_both_changes_nothing():
    edges, _, z, *_ = case(K=4, n=10, frustrated=6, d=3)
    runs = [toy.autograd_descent(edges, z, np.eye(3), head, .02, .005, 200) for head in ("both", "both+sg")]
    assert max(apart(a, b) for a, b in zip(*runs)) < 1e-12


def test_stop_gradient_on_head_does_change_something():
    edges, _, z, *_ = case(K=4, n=10, frustrated=6, d=3)
    runs = [toy.autograd_descent(edges, z, np.eye(3), head, .02, .005, 200) for head in ("head", "head+sg")]
    assert apart(*(z for z, _ in runs)) > .1


@pytest.mark.parametrize("head", toy.HEADS)
@pytest.mark.parametrize("eta_y", [1, .3])
def test_merged_rows_move_as_all_samples_do(head, eta_y):
    _, model, z, small, merged = case(K=4, n=12, frustrated=7, d=5, w=.6, eta_y=eta_y)
    assert len(merged) < len(z) / 2
    whole, part = (toy.flow(*system, np.eye(5), head, .02, [0, .5, 3], 1e-11, "DOP853")
                   for system in ((model, z), (small, merged)))
    assert apart(part[0][:, -4:], whole[0][:, -4:]) < 1e-8
    assert apart(part[1], whole[1]) < 1e-8
    for k in range(3):
        assert toy.loss(small, part[0][k], part[1][k], head) == pytest.approx(
            toy.loss(model, whole[0][k], whole[1][k], head), rel=1e-7)


def test_largest_step_is_where_descent_turns_unstable():
    """The rule 2 / (1 + n + w m (K - 1)) lies above it: a step between the two diverges."""
    _, model, z, *_ = case()
    bound = toy.largest_step(model)
    assert bound < 2 / (1 + 50 + 4) < 1.002 * bound
    far = [np.abs(toy.descent(model, z, np.eye(8), "none", 0, lr, [30_000 * lr])[0]).max()
           for lr in (.9995 * bound, (bound + 2 / 55) / 2)]
    assert far[0] < 10 and far[1] > 1e6


# ---- Without head --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("K, n, m, rate", [(2, 50, 2, .0377627552), (5, 50, 1, .0461372486),
                                           (10, 100, 1, .0463365284)])
def test_check_values_of_the_slow_rate(K, n, m, rate):
    assert toy.slow_rate(K, n, m) == pytest.approx(rate, abs=1e-10)
    assert abs(toy.secular(toy.slow_rate(K, n, m), K, n, m)) < 1e-10
    assert toy.leading_rate(K, n, m) == pytest.approx(rate, rel=.06)


@pytest.mark.parametrize("K, n, m, w, eta_y", [(2, 50, 2, 1, 1), (5, 50, 1, 1, 1), (4, 7, 2, .3, 1), (3, 20, 1, 2, .5)])
def test_simulated_decay_has_the_slow_rate_k_minus_1_times(K, n, m, w, eta_y):
    _, model, z, *_ = case(K, n, m * math.comb(K, 2), 4, w=w, eta_y=eta_y)
    rate, t = toy.slow_rate(K, n, m, w, eta_y), np.array([60, 90.])
    assert toy.decay_rate(toy.linear_flow(model, z, t), t, K) == pytest.approx(rate, abs=1e-8)
    lr = .5 * toy.largest_step(model)
    steps = np.round(t / lr) * lr
    seen = toy.descent(model, z, np.eye(4), "none", 0, lr, steps)[0]
    assert toy.decay_rate(seen, steps, K) == pytest.approx(-math.log1p(-lr * rate) / lr, abs=1e-8)
    rates = toy.spectrum(model)[0]
    assert abs(rates[0]) < 1e-10 and rates[1:K] == pytest.approx(rate, abs=1e-10) and rates[K] > 2 * rate


def test_an_ode_solver_finds_the_slow_rate_too():
    _, model, z, *_ = case(n=20)
    solution = solve_ivp(lambda t, v: -toy.gradient(model, v.reshape(z.shape), np.eye(8), "none")[0].ravel(),
                         (0, 35), z.ravel(), "DOP853", [25, 35], rtol=1e-13, atol=1e-14)
    path = solution.y.T.reshape(2, *z.shape)
    assert toy.decay_rate(path, solution.t, 5) == pytest.approx(toy.slow_rate(5, 20, 1), abs=1e-8)


@pytest.mark.parametrize("K", [2, 5, 10])
def test_slow_time_is_inverse_in_p(K):
    p, n = np.geomspace(1e-4, 1e-2, 9), 200
    rates = []
    for x in p:
        edges, copies = toy.ensemble(K, n, toy.frustrated_per_pair(K, n, x))
        expected = toy.slow_rate(K, n, toy.frustrated_per_pair(K, n, x))
        t = np.array([2, 3]) / expected + 40
        z = toy.start(edges, 4, rng())
        rates.append(toy.decay_rate(toy.linear_flow(toy.bipartite(edges, copies), z, t), t, K))
    assert np.polyfit(np.log(p), -np.log(rates), 1)[0] == pytest.approx(-1, abs=.01)
    assert p / rates == pytest.approx((K - 1) / K, rel=.02)


def test_two_classes_many_samples():
    for p in (.01, .1, .4):
        assert toy.slow_rate(2, 1e7, toy.frustrated_per_pair(2, 1e7, p)) == pytest.approx(2 * p / (1 + p), rel=1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_zero_modes_are_connected_components(seed):
    """Random graphs, sparse enough to fall apart; a random weight changes nothing."""
    draw = rng(seed)
    K, n, frustrated = draw.integers(2, 9), draw.integers(1, 6), draw.integers(0, 9)
    edges, model, z, small, merged = case(K, n, frustrated, 3, seed, draw.uniform(.2, 2))
    ties = edges.T @ edges                                       # [K, K], which labels share a sample
    components = connected_components(ties)[0]
    assert toy.zero_modes(model) == toy.zero_modes(small) == components
    assert np.sum(toy.spectrum(model)[0] < 1e-9) == np.sum(toy.spectrum(small)[0] < 1e-9) == components
    labels = toy.linear_flow(small, merged, [1e6])[0, -K:]
    assert len(np.unique(labels.round(6), axis=0)) == components             # and only inside them all is one


@pytest.mark.parametrize("eta_y", [1, .2])
def test_nothing_collapses_at_p_0(eta_y):
    _, model, z, *_ = case(frustrated=0, eta_y=eta_y)
    end = toy.linear_flow(model, z, [1e3])[0]
    assert apart(end[-5:], toy.aligned_labels(z, 50, 5, eta_y)) < 1e-9
    assert d_min(end, 5) > .5
    rates = toy.spectrum(model)[0]
    assert np.abs(rates[:5]).max() < 1e-10                       # then 1 and 1 + n eta_y, nothing else
    assert rates[5:-5] == pytest.approx(1) and rates[-5:] == pytest.approx(1 + 50 * eta_y)


def test_loss_waits_on_its_plateau_and_then_decays_twice_as_fast_as_distances():
    edges, model, z, *_ = case(n=400, frustrated=20)
    p, rate = 20 / len(edges), toy.slow_rate(5, 400, 2)
    seen = [toy.loss(model, v, 0, "none") / len(edges) for v in toy.linear_flow(model, z, [8, 60, 120])]
    plateau = toy.plateau_loss(p, toy.aligned_labels(z, 400, 5))
    assert seen[0] * math.exp(16 * rate) == pytest.approx(plateau, rel=.02)
    assert math.log(seen[1] / seen[2]) / 60 == pytest.approx(2 * rate, rel=1e-4)


def test_time_course():
    """K = 10, n = 200, d = 10, 20 frustrated samples: one start's values lie within the range of 40 others."""
    seen = []
    for seed in range(40):
        *_, small, merged = case(10, 200, 20, 10, seed)
        path = toy.linear_flow(small, merged, [1, 5, 100, 1000])
        seen.append([toy.loss(small, v, 0, "none") / 2020 for v in path[:3]] + [d_min(v, 10) for v in path])
    noted = np.array([.71, .043, .0063, 2.68, 2.52, .593, .0073])
    assert np.all(np.min(seen, 0) < noted) and np.all(noted < np.max(seen, 0))


def test_accuracy_on_clean_samples_stays_1_while_everything_shrinks():
    edges, model, z, *_ = case(n=60, frustrated=20, d=10)
    for v in toy.linear_flow(model, z, [3, 30, 300]):
        assert np.mean(cdist(v[:300], v[-5:]).argmin(1) == np.arange(5).repeat(60)) > .999
    assert d_min(v, 5) < 1e-6


# ---- With head -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("eta_y", [1, .4])
def test_conservation(eta_y):
    _, model, z, *_ = case(n=10, eta_y=eta_y)
    path = toy.flow(model, z, np.eye(8), "head+sg", 1 / 60, [0, 1, 10, 40], 1e-11, "DOP853")
    first, *later = (toy.conserved(model, z, W, 1 / 60) for z, W in zip(*path))
    assert max(np.abs(now - first).max() for now in later) < 1e-8
    assert np.abs(path[1][-1] - np.eye(8)).max() > .1            # W itself has moved


@pytest.mark.parametrize("signs", [np.ones(8), (-1.) ** np.arange(8)])
@pytest.mark.parametrize("seed", [0, 1])
def test_eigenvalues_of_the_head_become_sqrt_mu(seed, signs):
    *_, small, merged = case(seed=seed)
    path = toy.flow(small, merged, np.diag(signs), "head+sg", 1 / 275, [0, 2000])
    found = np.linalg.eigvals(path[1][-1])
    mu = toy.overlaps(small)
    assert mu == pytest.approx([1] + 4 * [toy.overlap(5, 50, 1)], abs=1e-12)
    assert math.sqrt(mu[-1]) == pytest.approx(.97657755, abs=1e-8)
    free = list(np.abs(found)) if np.abs(found.imag).max() < 1e-6 else []
    for level in np.sqrt(mu):                                    # each sqrt(mu_k) uses up one eigenvalue
        nearest = min(free, key=lambda value: abs(value - level))
        assert abs(nearest - level) < 1e-6
        free.remove(nearest)
    assert d_min(path[0][-1], 5) > .5


def test_four_heads_from_one_start():
    """K = 5, n = 50, m = 1, d = 8, W = I, eta = 1/275, t = 2000."""
    *_, small, merged = case()
    ends = {head: toy.flow(small, merged, np.eye(8), head, 1 / 275, [0, 20, 2000]) for head in toy.HEADS}
    far = {head: d_min(z[-1], 5) for head, (z, _) in ends.items()}
    start = d_min(merged, 5)
    assert far["none"] < 1e-12 and far["head"] < 1e-12
    assert far["both"] > .1 * start                              # raw labels stay while projected ones merge
    assert pdist(ends["both"][0][-1][-5:] @ ends["both"][1][-1].T).min() < 1e-3 * start
    assert far["head+sg"] > .5 * start
    assert d_min(ends["head"][0][1], 5) < .6 * d_min(ends["none"][0][1], 5)  # at t = 20


def test_head_without_stop_gradient_is_twice_as_fast_at_w_identity():
    _, model, z, *_ = case()
    none, head = (toy.gradient(model, z, np.eye(8), name)[0] for name in ("none", "head"))
    assert apart(head, 2 * none) < 1e-12
    frozen, t = toy.flow(model, z, np.eye(8), "head", 0, [0, 10, 15], 1e-10, "DOP853")[0], np.array([10, 15])
    assert toy.decay_rate(frozen[1:], t, 5) == pytest.approx(2 * toy.slow_rate(5, 50, 1), rel=1e-4)


@pytest.mark.parametrize("d, dimensions", [(2, 1), (3, 2), (8, 4)])
def test_the_common_offset_takes_one_direction(d, dimensions):
    *_, small, merged = case(K=5, n=20, d=d)
    z = toy.flow(small, merged, np.eye(d), "head+sg", 1 / 110, [0, 4000])[0][-1]
    spread = np.linalg.svd(z[-5:] - z[-5:].mean(0))[1]
    assert np.sum(spread > 1e-3 * spread[0]) == dimensions       # min(d - 1, K - 1)


def isotropic(K, n, m, d, scale, eta, times, treat=toy.centred, omega0=1.):
    edges, copies = toy.ensemble(K, n, m)
    z = toy.isotropic_start(edges, d, scale)
    path = toy.flow(treat(toy.bipartite(edges, copies)), z, omega0 * np.eye(d), "head+sg", eta, times)
    return [d_min(z, K) / d_min(path[0][0], K) for z in path[0]]


@pytest.mark.parametrize("K, n, m, d, omega0",
                         [(5, 50, 1, 4, 1), (5, 50, 3, 8, 1), (3, 20, 2.5, 2, .9), (4, 30, 1, 2, 1)])
def test_final_separation_is_the_fixed_point_of_the_conservation_law(K, n, m, d, omega0):
    scale = math.sqrt(.15 * K)
    c, ratio = toy.fixed_point(K, n, m, scale, omega0, 1 / (K * n))
    assert toy.overlap(K, n, m) > c
    assert isotropic(K, n, m, d, scale, 1 / (K * n), [0, 3000], omega0=omega0)[1] == pytest.approx(ratio, abs=1e-6)


def test_collapse_on_one_side_of_mu_equal_c_only():
    K, n, eta = 5, 50, 1 / 250
    scale = math.sqrt(.15 * K)
    for m, collapsed in ((3.5, False), (4.6, True)):
        c, ratio = toy.fixed_point(K, n, m, scale, 1, eta)
        assert .003 < (c - toy.overlap(K, n, m) if collapsed else toy.overlap(K, n, m) - c) < .03
        assert (ratio == 0) == collapsed
        final = isotropic(K, n, m, 4, scale, eta, [0, 8000])[1]
        assert final < 1e-9 if collapsed else final > .9 * ratio > .1
    for m, collapsed in ((1, False), (7, True)):                 # far from the transition, without centred()
        final = isotropic(K, n, m, 4, scale, eta, [0, 300], treat=lambda model: model)[1]
        assert final < 1e-4 if collapsed else final > .8


def test_an_offset_grows_at_1_minus_mu_unless_it_is_taken_out():
    """The centred fixed point is a saddle: the tie to the common offset has mu_1 = 1 > mu = W^2."""
    K, n, m = 5, 50, 1
    edges, copies = toy.ensemble(K, n, m)
    z = toy.isotropic_start(edges, 4, math.sqrt(.15 * K)) + 1e-6 * np.eye(4)[0]
    times = np.array([0, 100, 150.])
    for treat, grows in ((lambda model: model, True), (toy.centred, False)):
        path = toy.flow(treat(toy.bipartite(edges, copies)), z, np.eye(4), "head+sg", 1 / 250, times, 1e-12)
        offset = np.linalg.norm(path[0][:, -K:].mean(1), axis=1)
        if grows:
            rate = math.log(offset[2] / offset[1]) / 50
            assert rate == pytest.approx(1 - toy.overlap(K, n, m), rel=.05)
        else:
            assert offset[2] < 1e-9


def test_self_consistent_theory_equals_the_ode_of_all_samples():
    _, model, z, small, merged = case()
    t = np.linspace(0, .5, 6)
    W, changes = toy.self_consistent(small, merged, np.eye(8), 1 / 275, t)
    whole = toy.flow(model, z, np.eye(8), "head+sg", 1 / 275, t, 1e-11, "DOP853")[1]
    assert np.abs(W - whole).max() < 1e-8
    assert np.abs(W[-1] - W[0]).max() > .2 and changes[-1] < 1e-9 < changes[2]


# ---- Teacher-student -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("p", [.01, .03, .05, .1])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_teacher_student_slow_rate(p, seed):
    model, _ = toy.teacher_student(5, 400, p, rng(seed))
    assert toy.spectrum(model)[0][1:5].mean() * 4 / p == pytest.approx(1, abs=.03)


def test_teacher_student_law_fails_where_the_slow_rate_meets_the_noise():
    model, _ = toy.teacher_student(5, 400, .3, rng())
    assert toy.spectrum(model)[0][1:5].mean() * 4 / .3 < .8


def test_teacher_student_heads():
    """K = 5, 400 per class, 20 noise dimensions, d = 8, p = .05, eta = .1: who collapses, who does not.

    From seeds 0 and 1 an eigenvalue of W passes near 0, where residuals need not vanish, and eig(W) is still 1e-4
    off at t = 20,000; seed 2 converges.
    """
    model, s = toy.teacher_student(5, 400, .05, rng(2))
    z, true = rng(3).normal(size=(30, 8)), np.arange(5).repeat(400)
    assert toy.overlaps(model)[0] == pytest.approx(1) and toy.overlaps(model)[1:] == pytest.approx(.9375 ** 2, abs=.04)
    ends = {head: toy.flow(model, z, np.eye(8), head, .1, [0, 300, 20_000][:2 + (head == "head+sg")])
            for head in ("none", "head", "head+sg")}
    at_300 = {head: d_min(path[1], 5) for head, (path, _) in ends.items()}
    assert at_300["head"] < at_300["none"] < .1 < 1 < at_300["head+sg"]
    z_end, W = (part[-1] for part in ends["head+sg"])
    assert np.mean(cdist(s @ z_end[:-5] @ W.T, z_end[-5:]).argmin(1) == true) > .999
    found = np.abs(np.linalg.eigvals(W))
    assert np.abs(found[:, None] - np.sqrt(toy.overlaps(model))).min(0).max() < 1e-6
    first, last = (toy.conserved(model, ends["head+sg"][0][k], ends["head+sg"][1][k], .1) for k in (0, -1))
    assert np.abs(last - first).max() < 1e-8


def test_teacher_student_does_not_collapse_at_p_0():
    model, _ = toy.teacher_student(5, 400, 0, rng())
    assert d_min(toy.linear_flow(model, rng(1).normal(size=(30, 8)), [1e5])[0], 5) > .5


# ---- The script ----------------------------------------------------------------------------------------------
def run(folder, *args):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, args)], cwd=folder, capture_output=True, text=True,
                          timeout=300)


def test_default_run_prints_the_table_and_draws_the_figures(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    folder = tmp_path / "runs" / "collapse_toy-1"
    assert {file.name for file in folder.iterdir()} == {
        "config.json", "F1_timeline.png", "F2_slow_time.png", "F3_heads.png", "F4_head_spectrum.png",
        "F5_transition.png", "F6_teacher_student.png", "F7_plane.png"}
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in folder.glob("*.png"))
    rows = re.findall(r"^(.{70}) *(\S+) +(\S+) +(\S+)$", done.stdout, re.M)[1:]
    table = {name.strip(): (float(theory), float(measured), float(off)) for name, theory, measured, off in rows}
    assert len(table) > 20
    for theory, measured, off in table.values():                 # the last column is what it says
        assert off == pytest.approx(abs(measured - theory) / (abs(theory) or 1), rel=.6, abs=1e-6)
    exact = [off for name, (*_, off) in table.items() if re.search("y\\*|3 x 3|conserved|self-consistent|zero", name)]
    assert len(exact) == 5 and max(exact) < 1e-8
    assert max(off for name, (*_, off) in table.items() if "final / initial" in name) < 1e-5


@pytest.mark.parametrize("args, files", [
    ("--classes 3 --samples 8 --dim 2 --head none --frustration .1", 8),
    ("--experiment plane --animate --samples 5 --lr .01 --head head", 3),
    ("--experiment timeline --frustration 0 --samples 4 --seed 3", 2)])
def test_experiments_with_options(tmp_path, capsys, monkeypatch, args, files):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *args.split(), "--out", "a/b"])
    toy.main()
    written = list((tmp_path / "a" / "b").iterdir())
    assert len(written) == files and "theory" in capsys.readouterr().out
    if "--animate" in args:
        assert (tmp_path / "a" / "b" / "F7_plane.gif").read_bytes()[:3] == b"GIF"


@pytest.mark.parametrize("args, says", [
    ("--dim 1", "from 2 to 16"), ("--frustration 1", "in [0, 1)"), ("--frustration -.1", "in [0, 1)"),
    ("--frustration nan", "in [0, 1)"), ("--frustration .0001", "must be 0, or from"), ("--classes 1", "from 2 to 10"),
    ("--samples 0", "from 2 to 400"), ("--lr .2", "below 0.01816"), ("--lr nan", "below"), ("--seed -1", "from 0"),
    ("--experiment nothing", "invalid choice"), ("--head nothing", "invalid choice"), ("--out full", "not empty"),
    ("--out full/file", "cannot write"), ("--out full/file/below", "cannot write"), ("--nothing", "unrecognized")])
def test_bad_parameters_get_one_line_and_write_nothing(tmp_path, capsys, monkeypatch, args, says):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *args.split()])
    with pytest.raises(SystemExit) as stopped:
        toy.main()
    out, error = capsys.readouterr()
    assert stopped.value.code == 2 and out == ""
    assert error.startswith("collapse_toy.py: ") and error.count("\n") == 1 and says in error
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {"full", "full/file"}


def test_bad_parameters_as_users_see_them(tmp_path):
    done = run(tmp_path, "--frustration", 2)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "in [0, 1)" in done.stderr
    assert not list(tmp_path.iterdir())
