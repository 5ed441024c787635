"""Why embeddings collapse when a few samples cannot be classified, and how stop-gradient prevents it: a toy.

Yao, Li, Liu, "A Minimal Model of Representation Collapse: Frustration, Stop-Gradient, and Dynamics",
arXiv 2604.09979. Samples x_i and labels y_a are free vectors of d numbers: no network, no images. Samples are
tied to their labels, frustrated ones to two at once, and all vectors go downhill on the squared distances.

    python collapse_toy.py                                        # all experiments, figures F1 to F7
    python collapse_toy.py --experiment transition --classes 8    # one of them, explored
    python collapse_toy.py --experiment plane --animate           # and the 2-D picture as a GIF

The paper states (public pages; its text was not at hand): samples and labels are trained by full-batch
gradient descent on squared error; classifiable data never collapse; few frustrated samples collapse all
classes, on a slow time scale of its own after the early gain; a shared head with stop-gradient has fixed
points that are not collapsed; mean-field theory describes it; a linear teacher-student model shows the same.
Our reading: the graph of samples and labels, the four heads, starts, rates, the teacher-student's details.
Derived here: every formula under "Theory". None of the numbers is the paper's.

Expect a table, theory beside measurement, and seven figures in runs/collapse_toy-1, in 16 to 19 s on an AMD
EPYC.
Time is in units of 1 / (a clean sample's rate), length in standard deviations of the class centres.
"""
import argparse
import json
import math
import os
import sys
from collections import namedtuple
from functools import partial
from itertools import combinations
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")      # numpy reads it: small matrices want no threads
import numpy as np
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from scipy.integrate import solve_ivp
from scipy.optimize import brentq
from scipy.sparse import bmat, csr_matrix, diags
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import cdist, pdist

# ==== Model =================================================================================================
# Vectors z = (samples x; labels y) [M + K, d], a weighted bipartite graph A [M, K], and a head W [d, d]:
#     none      L = 1/2 sum A_ia |x_i - y_a|^2
#     both      L = 1/2 sum A_ia |W x_i - W y_a|^2
#     head      L = 1/2 sum A_ia (|W x_i - y_a|^2 + |W y_a - x_i|^2)          one head, both directions
#     head+sg   the same; the second vector of each term is a constant to the gradient
# All need only D = diag(row and column sums of A) and O = [[0, A], [A^T, 0]]; D - O is the graph Laplacian.
HEADS = ("none", "both", "head", "head+sg")
Model = namedtuple("Model", "D O rates classes")          # sparse [M + K, M + K] twice; of descent [M + K]; K


def bipartite(edges, copies=None, lone=0., eta_y=1.):
    """Edges [M, K] -> Model. Row i is copies[i] samples that move as one; lone[i] ties it to the origin."""
    copies = np.ones(len(edges)) if copies is None else copies
    A, rates = copies[:, None] * edges, np.r_[1 / copies, np.full(edges.shape[1], eta_y)]
    D = diags(np.r_[A.sum(1) + copies * lone, A.sum(0)]).tocsr()
    return Model(D, bmat([[None, A], [A.T, None]]).tocsr(), rates, A.shape[1])


def sample_edges(K, n, frustrated, rng, w=1.):
    """n clean samples per class, then frustrated ones tied to two labels with weight w: [N, K].

    Pairs of labels are dealt like cards, none twice before each came once: whole decks are symmetric.
    """
    pairs, edges = list(combinations(range(K), 2)), np.zeros((n * K + frustrated, K))
    edges[np.arange(n * K), np.repeat(np.arange(K), n)] = 1
    deck = np.concatenate([rng.permutation(len(pairs)) for _ in range(frustrated // len(pairs) + 1)])
    for row, card in zip(edges[n * K:], deck):
        row[list(pairs[card])] = w
    return edges


def ensemble(K, n, m, w=1.):
    """The symmetric ensemble, n clean per class, m per pair of labels, both real numbers: edges, copies."""
    pairs = math.comb(K, 2)
    return sample_edges(K, 1, pairs, np.random.default_rng(0), w), np.repeat([float(n), float(m)], [K, pairs])


def start(edges, d, rng, sigma=1.):
    """Class centres N(0, I), x = mean centre of its labels + sigma noise, y ~ N(0, I): z [M + K, d].

    Unstructured x would shrink label distances by sqrt(n + 1) even at p = 0: averaging, not collapse.
    """
    centres, y = rng.normal(size=(2, edges.shape[1], d))
    x = edges @ centres / edges.sum(1, keepdims=True)
    return np.vstack([x + sigma * rng.normal(size=x.shape), y])


def isotropic_start(edges, d, scale):
    """Centred, without noise, Y^T Y = scale^2 in each of the first min(d, K - 1) directions: z [M + K, d]."""
    K = edges.shape[1]
    y = scale * np.linalg.svd(np.eye(K) - 1 / K)[0][:, :min(d, K - 1)]
    y = np.pad(y, ((0, 0), (0, d - y.shape[1])))
    return np.vstack([edges @ y / edges.sum(1, keepdims=True), y])


def merge(edges, z, eta_y=1.):
    """Exact, and of a size that does not know the number of samples: -> Model, z [M' + K, d].

    Samples with equal labels become one row, their mean. Deviations from it feel no label, only their decay,
    and act on W by x^T x alone: d rows with the same x^T x (a QR factor) stand for all of one degree.
    """
    groups, index, counts = np.unique(edges, axis=0, return_inverse=True, return_counts=True)
    x, index, degree = z[:len(edges)], index.ravel(), edges.sum(1)
    means = np.stack([x[index == g].mean(0) for g in range(len(groups))])
    factors = {g: np.linalg.qr((x - means[index])[degree == g], mode="r") for g in np.unique(degree)}
    lone = np.concatenate([np.full(len(rows), g) for g, rows in factors.items()])
    groups = np.pad(groups, ((0, len(lone)), (0, 0)))
    model = bipartite(groups, np.r_[counts, np.ones(len(lone))], np.r_[0 * counts, lone], eta_y)
    return model, np.vstack([means, *factors.values(), z[len(edges):]])


def centred(model):
    """The same flow for centred vectors; but an offset common to all, which under head+sg grows from rounding
    errors until it owns one direction, dies: its tie from samples to labels is taken out of O."""
    degree = model.D.diagonal()
    samples = np.arange(len(degree)) < len(degree) - model.classes
    offset = np.outer(samples * degree, ~samples * degree) / (samples * degree).sum()
    return model._replace(O=csr_matrix(model.O - offset - offset.T))


def teacher_student(K, n, p, rng, noise_dims=20, sigma=1.):
    """x = B s: s one of K orthonormal prototypes plus noise orthogonal to them, of total variance sigma^2; a
    fraction p of each class is relabelled; mean loss. -> Model of (B^T; y), s [K n, K + noise_dims]."""
    true, flips = np.repeat(np.arange(K), n), round(p * n)
    s = np.hstack([np.eye(K)[true], sigma / math.sqrt(noise_dims) * rng.normal(size=(n * K, noise_dims))])
    A = np.eye(K)[true]
    for k in range(K):
        A[k * n + rng.choice(n, flips, replace=False)] = np.eye(K)[(k + rng.integers(1, K, flips)) % K]
    D, O = bmat([[s.T @ s, None], [None, A.T @ A]]), bmat([[None, s.T @ A], [A.T @ s, None]])
    return Model(D.tocsr() / (n * K), O.tocsr() / (n * K), np.ones(D.shape[0]), K), s


# ==== Dynamics ==============================================================================================
def loss(model, z, W, head):
    """L at z [M + K, d], W [d, d]; stop-gradient does not change the value."""
    u = z if head == "none" else z @ W.T
    if head in ("none", "both"):
        return .5 * np.sum(u * (model.D @ u - model.O @ u))
    return .5 * np.sum(u * (model.D @ u) + z * (model.D @ z)) - np.sum(u * (model.O @ z))


def gradient(model, z, W, head):
    """dL/dz [M + K, d] and dL/dW [d, d], by hand. Row i of R is sum_a A_ia (W z_i - z_a), the residuals."""
    D, O = model.D, model.O
    if head in ("none", "both"):
        F = D @ z - O @ z
        return (F, 0 * W) if head == "none" else (F @ (W.T @ W), W @ (z.T @ F))
    R = D @ (z @ W.T) - O @ z
    to_z = R @ W                                          # through the first vector of each term
    if head == "head":
        to_z = to_z + D @ z - O @ (z @ W.T)               # and the second, which stop-gradient cuts
    return to_z, R.T @ z


def spectrum(model):
    """Rates, ascending, and modes [M + K, M + K] of dz/dt = -rates (D - O) z; symmetric with S^2 = rates."""
    S = np.sqrt(model.rates)
    rate, mode = np.linalg.eigh(S[:, None] * (model.D - model.O).toarray() * S)
    return rate, S[:, None] * mode


def linear_flow(model, z, times):
    """Exact gradient flow without head: [T, M + K, d]."""
    rate, mode = spectrum(model)
    amplitude = mode.T @ (z / model.rates[:, None])
    return np.stack([mode @ (np.exp(-rate * t)[:, None] * amplitude) for t in times])


def flow(model, z, W, head, eta, times, tol=1e-10, method="LSODA"):
    """Gradient flow from z, W at t = 0; exact without head, else adaptive -> z [T, M + K, d], W [T, d, d]."""
    if head == "none":
        return linear_flow(model, z, times), np.repeat(W[None], len(times), 0)

    def velocity(_, state):
        to_z, to_W = gradient(model, state[:z.size].reshape(z.shape), state[z.size:].reshape(W.shape), head)
        return np.r_[(-model.rates[:, None] * to_z).ravel(), -eta * to_W.ravel()]

    first = np.r_[z.ravel(), W.ravel()]
    path = solve_ivp(velocity, (0, times[-1]), first, method, times, rtol=tol, atol=tol / 100).y.T
    return path[:, :z.size].reshape(-1, *z.shape), path[:, z.size:].reshape(-1, *W.shape)


def descent(model, z, W, head, eta, lr, times):
    """Plain full-batch gradient descent, as in the paper, at the steps nearest to times; returns as flow."""
    seen, done = [], 0
    for steps in np.round(np.array(times) / lr).astype(int):
        for _ in range(steps - done):
            to_z, to_W = gradient(model, z, W, head)
            z, W = z - lr * model.rates[:, None] * to_z, W - lr * eta * to_W
        seen, done = seen + [(z, W)], steps
    return tuple(map(np.stack, zip(*seen)))


def largest_step(model):
    """Descent without head is stable below 2 / (largest rate), which is just above 1 + n + w m (K - 1); near
    W = I the two terms of head have twice the rates."""
    return 2 / spectrum(model)[0][-1]


def autograd_descent(edges, z, W, head, eta, lr, steps):
    """The same by torch, term by term from the definition, with the .detach() that people use -> z, W."""
    A, M, stop = torch.tensor(edges), len(edges), torch.Tensor.detach if "+sg" in head else lambda v: v
    z, W = torch.tensor(z, requires_grad=True), torch.tensor(W, requires_grad=True)
    optimizer = torch.optim.SGD([{"params": [z]}, {"params": [W], "lr": lr * eta}], lr)
    for _ in range(steps):
        x, y, Wx, Wy = z[:M], z[M:], z[:M] @ W.T, z[M:] @ W.T
        terms = {"none": [(x, y)], "both": [(Wx, Wy)], "both+sg": [(Wx, stop(Wy)), (stop(Wx), Wy)]}.get(
            head, [(Wx, stop(y)), (stop(x), Wy)])
        optimizer.zero_grad()
        sum(.5 * (A * (u[:, None] - v).square().sum(-1)).sum() for u, v in terms).backward()     # [M, K, d]
        optimizer.step()
    return z.detach().numpy(), W.detach().numpy()


# ==== Theory ================================================================================================
# No head: in the symmetric ensemble a mode of the labels, sum_a v_a = 0, has clean x_a = u v_a, frustrated
# x_ab = f (v_a + v_b), y_a = s v_a: three numbers. Their slowest rate is the collapse, K - 1 times over.
def slow_rate(K, n, m, w=1., eta_y=1.):
    """Lowest eigenvalue of -d/dt (u, f, s)."""
    matrix = np.array([[1, 0, -1],
                       [0, 2 * w, -w],
                       [-eta_y * n, -eta_y * w * m * (K - 2), eta_y * (n + w * m * (K - 1))]])
    return np.linalg.eigvals(matrix).real.min()


def secular(rate, K, n, m, w=1., eta_y=1.):
    """0 at each of the three rates: u = s / (1 - rate) and f = w s / (2 w - rate) put into the third row."""
    return rate / eta_y + n * rate / (1 - rate) - w * m * (K - 1 - w * (K - 2) / (2 * w - rate))


def leading_rate(K, n, m, w=1., eta_y=1.):
    """The secular equation to first order in the rate; w p K / (K - 1) for n -> infinity, p -> 0."""
    return w * m * K / 2 / (1 / eta_y + n + m * (K - 2) / 4)


def frustrated_per_pair(K, n, p):
    """m from p = N_f / N, N_f = m K (K - 1) / 2, N = n K + N_f."""
    return 2 * p * n / ((1 - p) * (K - 1))


def zero_modes(model):
    """Each connected component keeps its mean for ever; those without a label are merge()'s scatter rows."""
    return len(set(connected_components(model.O)[1][-model.classes:]))


def aligned_labels(z, n, K, eta_y=1.):
    """Where labels stop at p = 0: y_a* = (y_a / eta_y + sum_i x_i) / (1 / eta_y + n), n samples per class."""
    return (z[-K:] / eta_y + z[:n * K].reshape(K, n, -1).sum(1)) / (1 / eta_y + n)


def plateau_loss(p, y, w=1.):
    """Per sample after alignment, p w <D^2> / 4: frustrated samples wait halfway between labels, y [K, d]."""
    return p * w * np.mean(pdist(y) ** 2) / 4


def overlaps(model):
    """mu_k, descending: eigenvalues of D_y^-1 A^T D_x^-1 A; of a teacher, squared canonical correlations."""
    D, O, K = model.D.toarray(), model.O.toarray(), model.classes
    loop = np.linalg.solve(D[-K:, -K:], O[-K:, :-K] @ np.linalg.solve(D[:-K, :-K], O[:-K, -K:]))
    return np.sort(np.linalg.eigvals(loop).real)[::-1]


def overlap(K, n, m, w=1.):
    """mu_2 = ... = mu_K of the symmetric ensemble with r = 2; mu_1 = 1 is the common offset."""
    return (n + w * m * (K - 2) / 2) / (n + w * m * (K - 1))


def conserved(model, z, W, eta):
    """Under head+sg, W^T W - eta (X^T X + Y^T Y / eta_y) [d, d]: W^T W moves by -eta (W^T R^T z + transpose),
    and so does eta z^T z."""
    return W.T @ W - eta * z.T @ (z / model.rates[:, None])


def fixed_point(K, n, m, scale, omega0, eta, w=1., eta_y=1.):
    """head+sg from isotropic_start(scale), W = omega0 I -> c, final / initial label distance (0 if mu <= c).

    X W^T = D_x^-1 A Y and Y W^T = D_y^-1 A^T X give W^2 = mu in directions that survive. There Y^T Y = Q and
    X^T X = Q (n + m (K-2)/4) / mu, and conservation reads mu - eta Q (1/eta_y + (n + m (K-2)/4) / mu) = c.
    """
    mu, weight = overlap(K, n, m, w), n + m * (K - 2) / 4
    c = omega0 ** 2 - eta * scale ** 2 * (1 / eta_y + weight)
    return c, math.sqrt(max(0, mu - c) / eta / (1 / eta_y + weight / mu)) / scale


def self_consistent(model, z, W, eta, times, tol=1e-11, rounds=30):
    """head+sg as mean-field theory: the vectors are integrated out, correlations C, B [d, d] alone drive W,

        dW/dt = -eta (W C - B)     C(t) = z^T D z     B(t) = z^T O z     z(t) = P[W](t) z(0)

    P: propagator of the linear dynamics in the field W(s <= t). Picard: W -> P -> C, B -> W until it stays;
    beyond t = 1 that takes many rounds. With merge()'s z no size is N. -> W [T, d, d], change per round.
    """
    solve = partial(solve_ivp, t_span=(0, times[-1]), method="DOP853", rtol=tol, atol=tol / 100,
                    dense_output=True)

    def vectors(t, state):
        to_z, _ = gradient(model, state.reshape(z.shape), field(t), "head+sg")
        return (-model.rates[:, None] * to_z).ravel()

    def head(t, state):
        now = path(t).reshape(z.shape)
        C, B = now.T @ (model.D @ now), now.T @ (model.O @ now)
        return -eta * (state.reshape(W.shape) @ C - B).ravel()

    field, seen, changes = lambda t: W, np.repeat(W[None], len(times), 0), []
    while len(changes) < rounds and (not changes or changes[-1] > 10 * tol):
        path = solve(vectors, y0=z.ravel()).sol
        field, old = lambda t, sol=solve(head, y0=W.ravel()).sol: sol(t).reshape(W.shape), seen
        seen = np.stack([field(t) for t in times])
        changes.append(np.abs(seen - old).max())
    return seen, changes


# ==== Experiments ===========================================================================================
# Points are measured, by gradient descent of every single sample unless said otherwise; lines are theory.
Case = namedtuple("Case", "p model z small merged inputs size rate plateau height")
TIME, LENGTH = "time (1 / rate of a clean sample)", "D_min (std of class centres)"


def row(name, theory, measured):
    print(f"{name:70}{theory:14.8g}{measured:14.8g}{abs(measured - theory) / (abs(theory) or 1):9.0e}")


def sample_case(args, p, d=None):
    """All samples and merged; inputs(z) are the clean x; slow rate; labels and loss on the plateau."""
    K, n, frustrated = args.classes, args.samples, round(p / (1 - p) * args.samples * args.classes)
    edges = sample_edges(K, n, frustrated, np.random.default_rng(args.seed))
    z = start(edges, d or args.dim, np.random.default_rng(args.seed))
    rate, y, N = slow_rate(K, n, frustrated / math.comb(K, 2)), aligned_labels(z, n, K), len(edges)
    return Case(frustrated / N, bipartite(edges), z, *merge(edges, z), lambda z: z[:n * K], N, rate, y,
                plateau_loss(frustrated / N, y))


def teacher_case(args, p):
    """The same of the linear student, with 8 n samples per class; B is small, there is nothing to merge.
    Relabelled samples stay with their class, at twice the loss of halfway."""
    K, rng = args.classes, partial(np.random.default_rng, args.seed)
    (model, s), (clean, _) = (teacher_student(K, 8 * args.samples, share, rng()) for share in (p, 0))
    z = rng().normal(size=(len(model.rates), args.dim))
    y = linear_flow(clean, z, [1e4])[0, -K:]
    return Case(p, model, z, model, z, lambda z: s @ z[:-K], 1, p / (K - 1), y, 2 * plateau_loss(p, y))


def d_min(path, W, K, projected=False):
    """Smallest distance of two labels y, or of two W y: path [T, M + K, d], W [T, d, d] -> [T]."""
    return np.array([pdist(z[-K:] @ w.T if projected else z[-K:]).min() for z, w in zip(path, W)])


def decay_rate(path, times, K):
    """Of the centred labels, from two late times."""
    size = np.linalg.norm(path[:, -K:] - path[:, -K:].mean(1, keepdims=True), axis=(1, 2))
    return math.log(size[0] / size[1]) / (times[1] - times[0])


def moments(lr, longest):
    """Times of lines, and of points, which are whole steps of gradient descent, at most 12,000."""
    points = lr * np.unique(np.geomspace(max(1, .1 / lr), min(longest / lr, 12_000), 22).round())
    return np.union1d(np.geomspace(.1, longest, 120), points), points


def draw_timeline(axes, cases, args, lr, longest):
    """Without head: loss per sample, accuracy on clean samples, D_min."""
    (t, seen), K, W = moments(lr, longest), args.classes, np.eye(args.dim)
    for case, colour in zip(cases, ("C0", "C3")):
        points = descent(case.model, case.z, W, "none", 0, lr, seen)[0]
        lines = linear_flow(case.small, case.merged, t)
        true = np.repeat(np.arange(K), len(case.inputs(case.z)) // K)
        hits = [np.mean(cdist(case.inputs(z), z[-K:]).argmin(1) == true) for z in points]
        axes[1].semilogx(seen, hits, "o", ms=4, c=colour)
        for at, model, path, style, label in ((t, case.small, lines, "-", f"p = {case.p:.2g}"),
                                              (seen, case.model, points, "o", None)):
            losses = [loss(model, z, W, "none") / case.size for z in path]
            axes[0].loglog(at, losses, style, ms=4, c=colour, label=label)
            axes[2].loglog(at, d_min(path, [W] * len(at), K), style, ms=4, c=colour)
        if case.rate:
            dies = np.exp(-case.rate * t)
            axes[0].plot(t, case.height * dies ** 2, "k:", label="plateau x exp(-2 λ t)")
            axes[2].plot(t, pdist(case.plateau).min() * dies, "k:", label="plateau x exp(-λ t)")
            axes[2].legend(fontsize=8)
    for axis, label, low, high in zip(axes, ("loss per sample", "accuracy on clean samples", LENGTH),
                                      (1e-7, 0, 1e-3), (30, 1.05, 10)):
        axis.set(xlabel=TIME, ylabel=label, ylim=(low, high))
    axes[0].legend(fontsize=8)


def draw_heads(axis, case, args, eta, lr, longest, kind):
    """D_min for each head, in the table too; under head+sg also the least sqrt(mu_k)."""
    (t, seen), K, W = moments(lr, longest), args.classes, np.eye(args.dim)
    for head, colour in zip(HEADS, ("C3", "C1", "C2", "C0")):
        if args.head not in ("all", head):
            continue
        path = flow(case.small, case.merged, W, head, eta, t, 1e-8)
        points = descent(case.model, case.z, W, head, eta, lr, seen)
        for projected in (False, True)[:1 + (head == "both")]:
            label = head + (", as W y" if projected else ", as y" if head == "both" else "")
            axis.loglog(t, d_min(*path, K, projected), "--" if projected else "-", c=colour, label=label)
            axis.plot(seen, d_min(*points, K, projected), "o", ms=4, c=colour)
        row(f"{kind}, {head}: D_min at t = {seen[12]:.1f}, flow against descent",
            d_min(*path, K)[t == seen[12]][0], d_min(*points, K)[12])
        if head == "head+sg":
            found, level = np.abs(np.linalg.eigvals(path[1][-1])), math.sqrt(overlaps(case.small)[-1])
            row(f"{kind}, head+sg: least sqrt(mu_k), nearest |eig(W)| at t = {t[-1]:.0f}", level,
                found[np.abs(found - level).argmin()])
    axis.set(xlabel=TIME, ylabel=LENGTH, ylim=(1e-4, 10))
    axis.legend(fontsize=8)


def single():
    figure = Figure(figsize=(6.2, 4), layout="constrained")
    return figure, figure.subplots()


def timeline(args):
    """F1: without head, noise dies at rate 1, then frustration shrinks all classes; at p = 0 nothing does."""
    K, cases = args.classes, [sample_case(args, p) for p in sorted({0, args.frustration})]
    figure = Figure(figsize=(10.5, 3.4), layout="constrained")
    draw_timeline(figure.subplots(1, 3), cases, args, args.lr, 400)
    row("p = 0: D_min at t = 1000 against y* in closed form", pdist(cases[0].plateau).min(),
        pdist(linear_flow(cases[0].small, cases[0].merged, [1000])[0, -K:]).min())
    for case in cases[1:]:
        late = np.array([2, 3]) / case.rate + 20
        path = linear_flow(case.small, case.merged, [5, *late])
        row(f"p = {case.p:.3g}: slow rate, 3 x 3 matrix", case.rate, decay_rate(path[1:], late, K))
        row("loss per sample at t = 5, p <D^2> / 4 exp(-2 λ t)", case.height * math.exp(-10 * case.rate),
            loss(case.small, path[0], 0, "none") / case.size)
        row("zero modes: connected components against vanishing rates", zero_modes(case.small),
            np.sum(spectrum(case.small)[0] < 1e-9))
    return {"F1_timeline.png": figure}


def rate(args):
    """F2: the slow time is (K - 1) / (K p)."""
    K, n, rng, (figure, axis) = args.classes, args.samples, np.random.default_rng(args.seed), single()
    p, found, label = np.geomspace(1e-4, .3, 15), [], "pairs dealt at random: slowest to fastest mode"
    m = frustrated_per_pair(K, n, p)
    exact = np.array([slow_rate(K, n, each) for each in m])
    for each, late in zip(m, np.outer(1 / exact, [2, 3]) + 40):
        edges, copies = ensemble(K, n, each)
        path = linear_flow(bipartite(edges, copies), start(edges, args.dim, rng), late)
        found.append(decay_rate(path, late, K))
    for frustrated in np.unique(np.geomspace(K, .4 * n * K, 8).astype(int)):
        edges = sample_edges(K, n, frustrated, rng)
        model = merge(edges, np.zeros((len(edges) + K, 1)))[0]
        if zero_modes(model) == 1:
            slow = 1 / spectrum(model)[0][[1, K - 1]]
            axis.plot([frustrated / len(edges)] * 2, slow, c="silver", lw=4, label=label)
            label = None
    axis.loglog(p, 1 / exact, label="3 x 3 matrix")
    axis.plot(p, (K - 1) / (K * p), "k:", label="(K - 1) / (K p)")
    axis.plot(p, 1 / np.array(found), "o", label="exact flow, all pairs of labels alike")
    axis.set(xlabel="frustrated fraction p", ylabel="slow time 1 / λ (1 / rate of a clean sample)")
    axis.legend(fontsize=8)
    logs = np.log([p, 1 / np.array(found)])
    row("slow time against p, p <= .01: exponent", -1, np.polyfit(*logs[:, p <= .01], 1)[0])
    row("slow time x p at p = 1e-4: (1 + 1/n) (K - 1) / K", (1 + 1 / n) * (K - 1) / K, p[0] / found[0])
    row(f"slow rate at p = {p[8]:.2g}: leading formula", leading_rate(K, n, m[8]), found[8])
    return {"F2_slow_time.png": figure}


def heads(args):
    """F3: four heads, one start. F4: head+sg takes eig(W) to ±sqrt(mu_k), here from W = diag(1, -1, ...)."""
    case, (three, left), (four, right) = sample_case(args, args.frustration), single(), single()
    eta, W, (t, seen) = 1 / case.size, np.diag((-1.) ** np.arange(args.dim)), moments(args.lr, 1000)
    draw_heads(left, case, args, eta, args.lr, 1000, "model")
    path = flow(case.small, case.merged, W, "head+sg", eta, t, 1e-9)
    points = descent(case.model, case.z, W, "head+sg", eta, args.lr, seen)
    right.semilogx(t, np.sort(np.linalg.eigvals(path[1]).real), lw=.8, c="C0")
    right.plot(seen, np.sort(np.linalg.eigvals(points[1]).real), "o", ms=4, c="C0")
    for k, level in enumerate(np.outer([1, -1], np.sqrt(overlaps(case.small))).ravel()):
        right.axhline(level, c="k", ls=":", label=None if k else "±sqrt(mu_k)")
    right.set(xlabel=TIME, ylabel="eigenvalues of W, real part")
    right.legend()
    row("head+sg: norm of the conserved W^T W - eta (X^T X + Y^T Y), t = 1000",
        *(np.linalg.norm(conserved(case.small, path[0][k], path[1][k], eta)) for k in (0, -1)))
    t, system = np.linspace(0, .5, 6), (case.small, case.merged, W)
    row("head+sg: |W| at t = .5, self-consistent theory against flow",
        np.linalg.norm(self_consistent(*system, eta, t, 1e-10)[0][-1]),
        np.linalg.norm(flow(*system, "head+sg", eta, t, 1e-11, "DOP853")[1][-1]))
    return {"F3_heads.png": three, "F4_head_spectrum.png": four}


def transition(args):
    """F5: head+sg keeps classes apart where mu > c; a strong head on small embeddings has c near 1."""
    K, n, d, (figure, axis) = args.classes, args.samples, min(args.dim, args.classes - 1), single()
    eta, scale = 1 / (n * K), math.sqrt(.15 * n * K / (1 + n))       # so that c is about .85 at small p

    def theory(p):
        m = frustrated_per_pair(K, n, p)
        c, ratio = fixed_point(K, n, m, scale, 1, eta)
        return overlap(K, n, m) - c, ratio

    def final(p, treat):
        edges, copies = ensemble(K, n, frustrated_per_pair(K, n, p))
        z, W = isotropic_start(edges, d, scale), np.eye(d)
        path = flow(treat(bipartite(edges, copies)), z, W, "head+sg", eta, [0, 1000], 1e-8)
        return np.divide(*d_min(*path, K)[::-1])

    edge = brentq(lambda p: theory(p)[0], 1e-6, .6)
    p, fine = edge * np.array([.1, .3, .5, .7, .9, 1.1, 1.8]), np.linspace(1e-4, 2 * edge, 400)
    points = [final(x, centred) for x in p]
    axis.plot(fine, [theory(x)[1] for x in fine], label="fixed point, from the conservation law")
    axis.plot(p, points, "o", label="gradient flow at t = 1000, centred")
    loose = [final(x, lambda model: model) for x in p[::3]]
    axis.plot(p[::3], loose, "x", c="C3", label="the same, not centred")
    axis.axvline(edge, c="k", ls=":", label=f"mu = c, p = {edge:.3f}")
    axis.set(xlabel="frustrated fraction p", ylabel="final / initial distance of labels")
    axis.legend(fontsize=8)
    for k in (0, 2, 4, 5):
        gap, ratio = theory(p[k])
        row(f"head+sg, p = {p[k]:.3f}, mu - c = {gap:+.3f}: final / initial distance", ratio, points[k])
    return {"F5_transition.png": figure}


def teacher(args):
    """F6: the same stories for a linear student x = B s of K prototypes, where a fraction p is relabelled."""
    K, cases = args.classes, [teacher_case(args, p) for p in sorted({0, args.frustration})]
    figure, lr = Figure(figsize=(10.5, 6.4), layout="constrained"), largest_step(cases[0].model) / 8
    axes = list(figure.subplot_mosaic("AABBCC\nDDDEEE").values())
    p = np.array([.005, .01, .02, .05, .1, .15, .2, .3, .4])
    found = np.array([spectrum(teacher_case(args, x).model)[0][1:K].mean() for x in p])
    draw_timeline(axes[:3], cases, args, lr, 1000)
    axes[3].loglog(p, (K - 1) / p, label="(K - 1) / p")
    axes[3].plot(p, 1 / found, "o", label="mean of K - 1 eigenmodes")
    axes[3].legend(fontsize=8)
    for k in (1, 3, 4, 6):
        row(f"teacher-student: mean slow rate at p = {p[k]:.2g}, p / (K - 1)", p[k] / (K - 1), found[k])
    draw_heads(axes[4], cases[-1], args, .1, lr, 1000, "teacher-student")
    for axis in axes:
        axis.set_xlabel("time (1 / rate)")
    axes[3].set(xlabel="relabelled fraction p", ylabel="slow time 1 / λ (1 / rate)")
    return {"F6_teacher_student.png": figure}


def plane(args):
    """F7: the embeddings in two dimensions, centred so that neither is spent on a common offset."""
    K, case, clean = args.classes, sample_case(args, args.frustration, 2), args.classes * args.samples
    pair, N = ("none", "head+sg") if args.head == "all" else (args.head,), case.size
    for part in (case.z[:clean], case.z[clean:N], case.z[N:]):
        part -= part.sum(0) / max(1, len(part))
    longest, frames = min(100, 12_000 * args.lr), 31 if args.animate else 4
    times = np.r_[0, np.geomspace(longest / 100, longest, frames - 1)]
    paths = [descent(case.model, case.z, np.eye(2), head, 1 / N, args.lr, times)[0] for head in pair]

    def draw(axis, head, path, k):
        axis.clear()
        colours = [f"C{k}" for k in range(K)]
        axis.scatter(*path[k, :clean].T, s=4, c=np.repeat(colours, args.samples))
        axis.scatter(*path[k, clean:N].T, s=18, c="k", marker="x", lw=.8)
        axis.scatter(*path[k, N:].T, s=90, c=colours, marker="*", ec="k")
        axis.set(xlim=(-4, 4), ylim=(-4, 4), aspect="equal", title=f"{head}, t = {times[k]:.3g}")

    figure = Figure(figsize=(10.5, 2.75 * len(pair)), layout="constrained")
    for axes, head, path in zip(figure.subplots(len(pair), 4, squeeze=False), pair, paths):
        for axis, k in zip(axes, (0, frames // 3, 2 * frames // 3, frames - 1)):
            draw(axis, head, path, k)
    if not args.animate:
        return {"F7_plane.png": figure}
    moving = Figure(figsize=(3.6 * len(pair), 3.8))
    axes = moving.subplots(1, len(pair), squeeze=False)[0]
    return {"F7_plane.png": figure, "F7_plane.gif": FuncAnimation(
        moving, lambda k: [draw(*one, k) for one in zip(axes, pair, paths)], frames)}


EXPERIMENTS = {run.__name__: run for run in (timeline, rate, heads, transition, teacher, plane)}


# ==== Command line ==========================================================================================
def die(message):
    """One line, whatever the message quotes, and exit code 2."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def parse():
    """Options, held against their bounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error, add = die, parser.add_argument
    add("--experiment", default="all", choices=["all", *EXPERIMENTS], help="which one to run")
    add("--classes", type=int, default=5, help="K, labels, 2 to 10")
    add("--samples", type=int, default=50, help="n, clean samples per class, 2 to 400")
    add("--frustration", type=float, default=.04, help="p, fraction of samples tied to two labels, in [0, 1)")
    add("--head", default="all", choices=["all", *HEADS], help="which to draw where heads are compared")
    add("--dim", type=int, default=8, help="d, dimensions of the embedding, 2 to 16; plane has 2")
    add("--lr", type=float, help="step of gradient descent; if not given half the stable bound")
    add("--seed", type=int, default=0, help="of starts, pairs and relabelled samples")
    add("--animate", action="store_true", help="plane as a GIF too")
    add("--out", help="run folder, new or empty; if not given runs/collapse_toy-1, -2, ...")
    args = parser.parse_args()
    clean, p = args.classes * args.samples, args.frustration
    for name, low, high in ("classes", 2, 10), ("samples", 2, 400), ("dim", 2, 16), ("seed", 0, 2 ** 32 - 1):
        if not low <= getattr(args, name) <= high:
            die(f"--{name} {getattr(args, name)} is out of bounds: it must be from {low} to {high}")
    if not 0 <= p < 1:
        die(f"--frustration {p} is out of bounds: the fraction p must be in [0, 1)")
    if p and not .5 < p / (1 - p) * clean < 5000:
        least, most = .5 / (clean + .5), 5000 / (clean + 5000)
        die(f"--frustration {p} of {clean} clean samples: it must be 0, or from {least:.2g} to {most:.4g}")
    bound = largest_step(sample_case(args, p).small) / 2             # heads double the rates
    args.lr = bound / 2 if args.lr is None else args.lr
    if not 0 < args.lr < bound:
        die(f"--lr {args.lr} is not stable: it must be above 0 and below {bound:.4g} with these options")
    return args


def main():
    args = parse()
    numbered = (Path("runs", f"collapse_toy-{k}") for k in range(1, 10 ** 6))
    folder = Path(args.out) if args.out else next(path for path in numbered if not path.exists())
    try:
        if folder.exists() and any(folder.iterdir()):
            die(f"{folder} is not empty: choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(vars(args), indent=1) + "\n")
    except OSError as error:
        die(f"cannot write to {folder} ({error.strerror}): choose another --out")
    print(f"{'':70}{'theory':>14}{'measured':>14}{'apart':>9}")
    for name in EXPERIMENTS if args.experiment == "all" else [args.experiment]:
        for file, picture in EXPERIMENTS[name](args).items():
            picture.savefig(folder / file, dpi=110) if file.endswith(".png") else \
                picture.save(folder / file, PillowWriter(fps=12))
    print(f"In {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")


if __name__ == "__main__":
    main()
