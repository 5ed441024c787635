"""Why embeddings collapse when a few samples cannot be classified, and how stop-gradient prevents it.

Yao, Li, Liu, "A Minimal Model of Representation Collapse: Frustration, Stop-Gradient, and Dynamics",
arXiv 2604.09979. Samples x_i and labels y_a are free vectors of d numbers: no network, no images. A clean
sample is tied to its label, a frustrated one to two labels at once, and all vectors go downhill on the
squared distances along the ties: a toy that can be solved on paper.

    python collapse_toy.py                                        # all experiments, figures F1 to F7
    python collapse_toy.py --experiment transition --classes 8    # one of them, explored
    python collapse_toy.py --experiment plane --animate           # and the 2-D picture as a GIF
    python collapse_toy.py --experiment timeline --frustrated 10 --frustrated-weight .5

Expect a table, theory beside measurement, and seven figures in runs/collapse_toy-1, in 10 to 19 s on an AMD
EPYC. Without frustration labels stop 0.94 apart and stay there. With 10 frustrated samples among 260 all
distances shrink by exp(-0.0461 t), for ever. A head W between the two sides makes it faster; the same head
with stop-gradient keeps the labels 3.1 apart. Time is in units of 1 / (a clean sample's rate), length in
standard deviations of the class centres. Collapse costs clean samples no nearest-label accuracy (F1) while it
keeps its shape: they stay 1 / (1 - λ) times as far from the common mean as their labels, λ the slow rate;
what is lost is the margin against noise (crosses). Where pairs do not fill whole decks one mode outlives the
others and accuracy falls in the end (timeline, --samples 5 --frustration .25 --seed 1: .8 at t = 37, where
labels are 1e-4 apart, then .6). In the linear teacher-student it falls early (F6 with --frustration .2).

The paper states (public pages; its text was not at hand): samples and labels are trained by full-batch
gradient descent on squared error; classifiable data never collapse; few frustrated samples collapse all
classes, on a slow time scale of its own after the early gain; a shared head with stop-gradient has fixed
points that are not collapsed; mean-field theory describes it; a linear teacher-student model shows the same.
Our reading: the graph of samples and labels, the four heads, starts, rates, the teacher-student's details.
Derived here: every formula under "Theory". None of the numbers is the paper's.

The rooms of this file: the method as torch users write it; data; the same in matrices; gradient flow and
descent; theory; cases and measures; experiments, one a figure or two; command line.
"""
import argparse
import json
import math
import os
import signal
import sys
from dataclasses import dataclass, replace
from itertools import combinations, count
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")      # numpy reads it: small matrices want no threads
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGINT, signal.SIG_DFL)       # Ctrl-C while packages load: no traceback
import numpy as np
import torch
from matplotlib import rcParams
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from numpy.random import default_rng
from scipy.fft import dct
from scipy.integrate import solve_ivp
from scipy.optimize import brentq
from scipy.sparse import block_diag, bmat, csr_matrix, diags, eye
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import cdist, pdist

# ==== Method ================================================================================================
# M samples x and K labels y, rows of d numbers; weights A [M, K] of the ties between them; a head W [d, d].
HEADS = ("none", "both", "head", "head+sg")


def edge_loss(A, x, y, W, head):
    """The four losses as one writes them in torch: A [M, K], x [M, d], y [K, d], W [d, d] -> scalar.

        none      1/2 sum A_ia |x_i - y_a|^2
        both      1/2 sum A_ia |W x_i - W y_a|^2
        head      1/2 sum A_ia (|W x_i - y_a|^2 + |W y_a - x_i|^2)      one head, both directions
        head+sg   the same; the second vector of each term is a constant to the gradient
    """
    def pull(samples, labels):
        squares = (samples[:, None] - labels).square().sum(-1)      # [M, K]
        return (A * squares).sum() / 2

    Wx = x @ W.T
    Wy = y @ W.T

    if head == "none":
        return pull(x, y)
    if head == "both":
        return pull(Wx, Wy)
    if head == "head":
        return pull(Wx, y) + pull(x, Wy)
    return pull(Wx, y.detach()) + pull(x.detach(), Wy)


def autograd_descent(edges, z, W, head, eta, lr, steps):
    """Full-batch gradient descent by torch: the plain form that everything faster below must agree with.

    edges [M, K], z [M + K, d] (samples, then labels), W [d, d], eta: rate of the head beside the vectors' 1
    -> z, W after `steps` steps.
    """
    M = len(edges)
    A = torch.tensor(edges)
    z = torch.tensor(z, requires_grad=True)
    W = torch.tensor(W, requires_grad=True)

    for _ in range(steps):
        loss = edge_loss(A, z[:M], z[M:], W, head)
        to_z, to_W = torch.autograd.grad(loss, (z, W), materialize_grads=True)
        with torch.no_grad():
            z -= lr * to_z
            W -= lr * eta * to_W

    return z.detach().numpy(), W.detach().numpy()


# ==== Data ==================================================================================================
def sample_edges(K, n, frustrated, rng, w=1.):
    """Ties of n clean samples per class, then of frustrated ones to two labels with weight w each: [M, K].

    Pairs of labels are dealt like cards, none twice before each came once: whole decks are symmetric.
    """
    pairs = list(combinations(range(K), 2))
    decks = frustrated // len(pairs) + 1
    cards = np.concatenate([rng.permutation(len(pairs)) for _ in range(decks)])

    clean = np.repeat(np.eye(K), n, axis=0)
    torn = np.zeros((frustrated, K))
    for ties, card in zip(torn, cards):
        ties[list(pairs[card])] = w
    return np.vstack([clean, torn])


def symmetric_edges(K, n, m, w=1.):
    """n clean samples per class, m frustrated ones per pair of labels, both real numbers.

    -> one row for each kind [K + K (K - 1) / 2, K], and how many samples it stands for [rows].
    """
    pairs = math.comb(K, 2)
    edges = sample_edges(K, 1, pairs, default_rng(0), w)
    copies = np.repeat([float(n), float(m)], [K, pairs])
    return edges, copies


def frustrated_per_pair(K, n, p):
    """m for the frustrated fraction p = N_f / N, where N_f = m K (K - 1) / 2 and N = n K + N_f."""
    return 2 * p * n / ((1 - p) * (K - 1))


def mean_of_labels(edges, labels):
    """Where each sample's ties balance: edges [M, K], labels [K, d] -> [M, d]."""
    return edges @ labels / edges.sum(1, keepdims=True)


def random_start(edges, d, rng):
    """Class centres N(0, I), x = mean centre of its labels + N(0, I), y ~ N(0, I): z [M + K, d].

    Unstructured x would shrink label distances by sqrt(n + 1) even at p = 0: averaging, not collapse.
    """
    centres, y = rng.normal(size=(2, edges.shape[1], d))
    x = mean_of_labels(edges, centres)
    noise = rng.normal(size=x.shape)
    return np.vstack([x + noise, y])


def isotropic_start(edges, d, scale):
    """Centred, without noise, Y^T Y = scale^2 in each of the first min(d, K - 1) directions: z [M + K, d].

    The directions are cosines (DCT-II), whose first alone tells all labels apart: in any basis of so few, two
    labels may meet.
    """
    K = edges.shape[1]
    spread = min(d, K - 1)
    directions = dct(np.eye(K), norm="ortho")[:, 1:]
    y = np.zeros((K, d))
    y[:, :spread] = scale * directions[:, :spread]
    return np.vstack([mean_of_labels(edges, y), y])


# ==== The same in matrices ==================================================================================
@dataclass
class System:
    """All that flow and descent need to know. Rows z = (samples x; labels y) [M + K, d]; without head

        L = 1/2 tr z^T (own - cross) z

    For a graph of ties A, own = diag(row and column sums of A) and cross = [[0, A], [A^T, 0]]: the difference
    is the graph Laplacian. The linear student has the same form.
    """
    own: csr_matrix            # [M + K, M + K], among samples and among labels
    cross: csr_matrix          # [M + K, M + K], between samples and labels
    rates: np.ndarray          # [M + K], a row's velocity is -rate x gradient
    start: np.ndarray          # z at t = 0 [M + K, d]
    classes: int               # K: the last K rows are labels


def two_sided(A):
    """[M, K] -> [[0, A], [A^T, 0]]."""
    return bmat([[None, A], [A.T, None]], "csr")


def graph_system(edges, start, copies=1., lone=0.):
    """Edges [M, K], start [M + K, d] -> System.

    Row i is copies[i] samples that move as one; a tie of weight lone[i] holds each to the origin.
    """
    M, K = edges.shape
    copies = copies * np.ones(M)
    A = copies[:, None] * edges

    of_samples = A.sum(1) + copies * lone
    of_labels = A.sum(0)
    own = diags(np.r_[of_samples, of_labels]).tocsr()
    rates = np.r_[1 / copies, np.ones(K)]              # a row's gradient is that of all its copies
    return System(own, two_sided(A), rates, start, K)


def merge(edges, start):
    """The same motion of labels and head from fewer rows: edges [M, K], start [M + K, d] -> System.

    Samples with equal ties become one row, their mean. Deviations from the mean feel no label, only their own
    decay, and act on W through x^T x alone: at most d rows with the same x^T x (a QR factor) stand for all of
    one degree, tied to the origin. It is exact, and its size does not grow with the number of samples.
    """
    M, K = edges.shape
    x = start[:M]
    kinds, kind, counts = np.unique(edges, axis=0, return_inverse=True, return_counts=True)
    kind = kind.ravel()
    means = np.stack([x[kind == k].mean(0) for k in range(len(kinds))])
    deviations = x - means[kind]

    degree = edges.sum(1)
    factors = []
    decays = []
    for value in np.unique(degree):
        factor = np.linalg.qr(deviations[degree == value], mode="r")        # at most d rows
        factors.append(factor)
        decays += [value] * len(factor)

    no_ties = np.zeros((len(decays), K))
    rows = np.vstack([kinds, no_ties])
    copies = np.r_[counts, np.ones(len(decays))]
    lone = np.r_[np.zeros(len(kinds)), decays]
    z = np.vstack([means, *factors, start[M:]])
    return graph_system(rows, z, copies, lone)


def without_offset(system):
    """The same flow without its common mode, an offset of all vectors, of which centred ones have none: under
    head+sg rounding errors would grow into it until it owns one direction."""
    degree = system.own.diagonal()
    of_labels = degree.copy()
    of_labels[:-system.classes] = 0
    of_samples = degree - of_labels
    offset = np.outer(of_samples, of_labels) / of_samples.sum()
    return replace(system, cross=csr_matrix(system.cross - offset - offset.T))


NOISE_DIMS = 20            # of the linear student's inputs


def teacher_student(K, n, p, rng, start):
    """A linear student x = B s, mean loss. Input s: one of K orthonormal prototypes plus noise orthogonal to
    them, of total variance 1; of each class a fraction p of n gets a wrong label.

    -> System of the rows of B^T and of y, from start [K + NOISE_DIMS + K, d]; s [K n, K + NOISE_DIMS].
    """
    N = K * n
    true = np.repeat(np.arange(K), n)
    noise = rng.normal(size=(N, NOISE_DIMS))
    s = np.hstack([np.eye(K)[true], noise / math.sqrt(NOISE_DIMS)])

    label = true.copy()
    flips = round(p * n)
    for k in range(K):
        wrong = (k + rng.integers(1, K, flips)) % K
        chosen = rng.choice(n, flips, replace=False)
        label[k * n + chosen] = wrong
    A = np.eye(K)[label]                               # [K n, K]

    own = block_diag([s.T @ s, A.T @ A], "csr")
    cross = two_sided(s.T @ A)
    return System(own / N, cross / N, np.ones(len(start)), start, K), s


# ==== Gradient flow and descent =============================================================================
def headless_loss(system, z):
    """L without head at z [M + K, d]."""
    residual = system.own @ z - system.cross @ z
    return np.sum(z * residual) / 2


def gradient(system, z, W, head):
    """dL/dz [M + K, d] and dL/dW [d, d] by hand, as edge_loss has them; z [M + K, d], W [d, d]."""
    own, cross = system.own, system.cross
    if head in ("none", "both"):
        residual = own @ z - cross @ z                 # row i: sum_a A_ia (z_i - z_a)
        if head == "none":
            return residual, np.zeros_like(W)
        return residual @ (W.T @ W), W @ (z.T @ residual)

    Wz = z @ W.T
    residual = own @ Wz - cross @ z                    # row i: sum_a A_ia (W z_i - z_a)
    to_z = residual @ W                                # through the first vector of each term
    if head == "head":
        to_z += own @ z - cross @ Wz                   # and the second, which stop-gradient cuts
    return to_z, residual.T @ z


def jacobian(system, z, W):
    """Of gradient() under head+sg, all vectors flat, then the head: [(M + K) d + d d] twice."""
    d = len(W)
    one = np.eye(d)
    own_z = system.own @ z
    cross_z = system.cross @ z
    residual = own_z @ W.T - cross_z

    own_by_z = np.kron(system.own.toarray(), W.T @ W)
    cross_by_z = np.kron(system.cross.toarray(), W.T)
    z_by_W = np.einsum("ia,bj->ijba", own_z, W).reshape(-1, d * d) + np.kron(residual, one)
    W_by_z = np.einsum("ac,kb->abkc", W, own_z)
    W_by_z -= np.einsum("ac,kb->abkc", one, cross_z)
    W_by_z += np.einsum("bc,ka->abkc", one, residual)
    W_by_W = np.kron(one, z.T @ own_z)
    return np.block([[own_by_z - cross_by_z, z_by_W], [W_by_z.reshape(d * d, -1), W_by_W]])


def descent(system, W, head, eta, lr, times):
    """Full-batch gradient descent, as in the paper, at the steps nearest to `times`; returns as flow.

    FloatingPointError where it diverges.
    """
    z = system.start
    z_seen = []
    W_seen = []
    done = 0
    for steps in np.round(np.array(times) / lr).astype(int):
        with np.errstate(over="ignore", invalid="ignore"):                  # said below
            for _ in range(steps - done):
                to_z, to_W = gradient(system, z, W, head)
                z = z - lr * system.rates[:, None] * to_z
                W = W - lr * eta * to_W
        if not (np.isfinite(z).all() and np.isfinite(W).all()):
            raise FloatingPointError(f"descent at steps of {lr:.3g} diverges (head: {head})")
        done = steps
        z_seen.append(z)
        W_seen.append(W)
    return np.stack(z_seen), np.stack(W_seen)


def real_eigenvalues(matrix):
    """Real parts, ascending: [..., d, d] -> [..., d]."""
    return np.sort(np.linalg.eigvals(matrix).real)


def spectrum(system):
    """Rates, ascending, and modes [M + K, M + K] of dz/dt = -rates (own - cross) z."""
    root = np.sqrt(system.rates)                       # z = root u makes the matrix symmetric
    laplacian = (system.own - system.cross).toarray()
    decay, mode = np.linalg.eigh(root[:, None] * laplacian * root)
    return decay, root[:, None] * mode


def largest_step(system):
    """Descent without head is stable below 2 / (largest rate), which is just above 1 + n + w m (K - 1); near
    W = I the two terms of head have twice the rates."""
    decay, _ = spectrum(system)
    return 2 / decay[-1]


def largest_step_of_head(system, eta):
    """The same for W alone, at the start: dL/dW = W C - B, where C = z^T own z has its rates as eigenvalues.

    Rates of vectors and head add up at most, so half of the lower bound is stable for both at once.
    """
    C = system.start.T @ (system.own @ system.start)
    return 2 / (eta * np.linalg.eigvalsh(C)[-1])


def headless_flow(system, times):
    """Exact gradient flow without head, each mode decays by itself: [T, M + K, d]."""
    decay, mode = spectrum(system)
    amplitude = mode.T @ (system.start / system.rates[:, None])
    left = np.exp(-np.outer(times, decay))             # [T, M + K]
    return mode @ (left[:, :, None] * amplitude)


def flow(system, W, head, eta, times, tol=1e-10, method="LSODA"):
    """Gradient flow, which is descent with vanishing steps, from system.start and W [d, d] at t = 0:

        dz/dt = -rates dL/dz        dW/dt = -eta dL/dW

    Exact without head; else by an adaptive solver with relative error tol, which wants one flat state. Under
    head+sg LSODA is given the derivatives: its finite differences would cost most of the time.
    -> z [T, M + K, d], W [T, d, d] at `times` [T], ascending.
    """
    if head == "none":
        return headless_flow(system, times), np.stack([W] * len(times))

    size, shape = system.start.size, system.start.shape

    def velocity(_, state):
        z = state[:size].reshape(shape)
        to_z, to_W = gradient(system, z, state[size:].reshape(W.shape), head)
        to_z *= system.rates[:, None]
        return -np.r_[to_z.ravel(), eta * to_W.ravel()]

    each_rate = np.r_[np.repeat(system.rates, shape[1]), np.full(W.size, eta)]

    def derivatives(_, state):
        z = state[:size].reshape(shape)
        return -each_rate[:, None] * jacobian(system, z, state[size:].reshape(W.shape))

    more = {"jac": derivatives} if head == "head+sg" and method == "LSODA" else {}
    first = np.r_[system.start.ravel(), W.ravel()]
    solution = solve_ivp(velocity, (0, times[-1]), first, method, times, rtol=tol, atol=tol / 100, **more)
    if not solution.success:
        raise FloatingPointError(f"gradient flow stops short (head: {head})")
    path = solution.y.T                                # [T, (M + K) d + d d]
    z_path = path[:, :size].reshape(-1, *shape)
    W_path = path[:, size:].reshape(-1, *W.shape)
    return z_path, W_path


# ==== Theory ================================================================================================
# K classes, n clean samples per class, m frustrated ones per pair of labels with two ties of weight w.
def label_rates(K, n, m, w=1.):
    """Decay rates of the labels' differences without head, ascending; the first is the collapse.

    A mode of the labels, sum_a v_a = 0, has clean x_a = u v_a, frustrated x_ab = f (v_a + v_b), y_a = s v_a:
    three numbers, and -d/dt (u, f, s) is this matrix. Each rate comes K - 1 times.
    """
    of_u = [1, 0, -1]
    of_f = [0, 2 * w, -w]
    of_s = [-n, -w * m * (K - 2), n + w * m * (K - 1)]
    matrix = np.array([of_u, of_f, of_s])
    if K == 2:
        matrix = matrix[::2, ::2]                      # v_a + v_b = 0: there is no f
    return real_eigenvalues(matrix)


def slow_rate(K, n, m, w=1.):
    """The rate of the collapse."""
    return label_rates(K, n, m, w)[0]


def late_times(K, n, m, w=1.):
    """Two times [2] when of the labels' modes only the slow one is left, by exp(-20) and more; earlier where
    that one would by then have shrunk as far itself, to rounding errors."""
    slow, faster, *_ = label_rates(K, n, m, w)
    return np.array([2, 3]) / slow + min(20 / (faster - slow), 17 / slow)


def squared_samples(K, n, m):
    """X^T X in units of Y^T Y once every sample sits at the mean of its labels, (y_a + y_b) / 2 of a pair."""
    return n + m * (K - 2) / 4


def leading_rate(K, n, m, w=1.):
    """slow_rate to first order; w p K / (K - 1) for n -> infinity, p -> 0."""
    return w * m * K / 2 / (1 + squared_samples(K, n, m))


def zero_modes(system):
    """Each connected component keeps its mean for ever; those without a label are merge()'s deviations."""
    _, component = connected_components(system.cross)
    return len(set(component[-system.classes:]))


def aligned_labels(system, n):
    """Where labels stop at p = 0 [K, d], y_a* = (y_a + sum_i x_i) / (1 + n). The first K n rows: clean."""
    K = system.classes
    clean = system.start[:K * n].reshape(K, n, -1)
    return (system.start[-K:] + clean.sum(1)) / (1 + n)


def plateau_loss(p, y, w=1.):
    """Per sample after alignment, p w <D^2> / 4: frustrated samples wait halfway between labels, y [K, d]."""
    return p * w * np.mean(pdist(y) ** 2) / 4


def overlaps(system):
    """mu_k, descending [K]: eigenvalues of D_y^-1 A^T D_x^-1 A, the way from labels to samples and back.

    own = (D_x; D_y), cross = A; of a teacher they are squared canonical correlations. head+sg takes eig(W) to
    ±sqrt(mu_k) in directions that survive: at rest X W^T = D_x^-1 A Y and Y W^T = D_y^-1 A^T X. The others
    rest where their vectors died.
    """
    K = system.classes
    own = system.own.toarray()
    A = system.cross[:-K, -K:].toarray()
    to_samples = np.linalg.solve(own[:-K, :-K], A)
    to_labels = np.linalg.solve(own[-K:, -K:], A.T)
    return real_eigenvalues(to_labels @ to_samples)[::-1]


def overlap(K, n, m, w=1.):
    """mu_2 = ... = mu_K of the symmetric graph; mu_1 = 1 is the common offset."""
    weight = w * m
    return (n + weight * (K - 2) / 2) / (n + weight * (K - 1))


def conserved(system, z, W, eta):
    """Under head+sg, W^T W - eta (X^T X + Y^T Y) [d, d]: W^T W moves by -eta (W^T R^T z + transpose), R the
    residuals, and so does eta z^T z."""
    every_copy = z / system.rates[:, None]
    return W.T @ W - eta * z.T @ every_copy


def fixed_point(K, n, m, w, scale, eta, omega0=1.):
    """head+sg from isotropic_start(scale), W = omega0 I -> mu - c, final / initial label distance (0 if
    mu <= c).

    At rest W^2 = mu in directions that survive. There Y^T Y = Q and X^T X = Q squared_samples / mu, and what
    is conserved reads mu - eta Q (1 + squared_samples / mu) = c, its value at the start.
    """
    mu = overlap(K, n, m, w)
    samples = squared_samples(K, n, m)
    c = omega0 ** 2 - eta * scale ** 2 * (1 + samples)
    Q = max(0, mu - c) / eta / (1 + samples / mu)
    return mu - c, math.sqrt(Q) / scale


def self_consistent(system, W, eta, times, tol=1e-11, rounds=100):
    """head+sg as mean-field theory: the vectors are integrated out, correlations C, B [d, d] alone drive W,

        dW/dt = -eta (W C - B)     C(t) = z^T own z     B(t) = z^T cross z     z(t) = P[W](t) z(0)

    P: propagator of the linear dynamics in the field W(s <= t). Picard: W -> P -> C, B -> W until it stays;
    beyond t = 1 that takes many rounds. With merge()'s system no size is N. -> W [T, d, d], change per round.
    """
    def integrate(velocity, first):
        span = (0, times[-1])
        state = first.ravel()
        solution = solve_ivp(velocity, span, state, "DOP853", dense_output=True, rtol=tol, atol=tol / 100)

        def path(t):
            return solution.sol(t).reshape(first.shape)
        return path

    def vectors_in(field):
        """z(t) while W(t) = field(t) is given."""
        def velocity(t, state):
            z = state.reshape(system.start.shape)
            to_z, _ = gradient(system, z, field(t), "head+sg")
            to_z *= system.rates[:, None]
            return -to_z.ravel()
        return integrate(velocity, system.start)

    def head_driven_by(vectors):
        """W(t) while the correlations of z(t) = vectors(t) are given."""
        def velocity(t, state):
            z = vectors(t)
            C = z.T @ (system.own @ z)
            B = z.T @ (system.cross @ z)
            to_W = state.reshape(W.shape) @ C - B
            return -eta * to_W.ravel()
        return integrate(velocity, W)

    def unmoved(_):
        return W

    field = unmoved
    seen = np.stack([W] * len(times))
    changes = []
    for _ in range(rounds):
        before = seen
        field = head_driven_by(vectors_in(field))
        seen = np.stack([field(t) for t in times])
        changes.append(np.abs(seen - before).max())
        if changes[-1] <= 10 * tol:
            break
    return seen, changes


# ==== Cases and measures ====================================================================================
@dataclass
class Case:
    """One data set, and what theory says of it without head."""
    p: float                   # fraction of frustrated, or of relabelled, samples
    size: int                  # what the loss is divided by for a mean: N, or 1 where it is one already
    every: System              # with a row for every single sample
    merged: System             # with as few rows as there can be
    inputs: csr_matrix         # [n K, M], times z[:-K]: clean samples, or all of a teacher, by true class
    rate: float                # of the collapse; 0 where no rate is common to all classes
    plateau: np.ndarray        # labels before it [K, d]
    height: float              # loss per sample before it


def graph_case(args, frustrated, d):
    """Samples tied to labels, of them `frustrated` to two, in d dimensions."""
    K, n, w = args.classes, args.samples, args.frustrated_weight
    edges = sample_edges(K, n, frustrated, default_rng(args.seed), w)
    start = random_start(edges, d, default_rng(args.seed))
    every = graph_system(edges, start)
    merged = merge(edges, start)

    N = len(edges)
    p = frustrated / N
    clean = eye(n * K, N, format="csr")
    connected = zero_modes(merged) == 1
    rate = slow_rate(K, n, frustrated / math.comb(K, 2), w) if connected else 0.
    plateau = aligned_labels(every, n)
    return Case(p, N, every, merged, clean, rate, plateau, plateau_loss(p, plateau, w))


def relabelled_share(args, p):
    """The nearest to p that whole samples can make: 8 n per class."""
    n = 8 * args.samples
    return round(p * n) / n


def teacher_case(args, p):
    """The linear student, with 8 n samples per class; B is small, there is nothing to merge."""
    K, n = args.classes, 8 * args.samples
    p = relabelled_share(args, p)
    start = default_rng(args.seed).normal(size=(K + NOISE_DIMS + K, args.dim))
    system, s = teacher_student(K, n, p, default_rng(args.seed), start)
    clean, _ = teacher_student(K, n, 0, default_rng(args.seed), start)

    plateau = headless_flow(clean, [1e4])[0, -K:]
    height = 2 * plateau_loss(p, plateau)              # relabelled samples stay with their class, not halfway
    return Case(p, 1, system, system, s, p / (K - 1), plateau, height)


def only_rounding(labels):
    """Whether two labels [K, d] are as near as rounding errors of float64 bring them: a distance that says
    nothing."""
    return pdist(labels).min() < 1e-12 * np.abs(labels).max()


def accuracy(case, z):
    """Share of case.inputs whose nearest label is that of their class, z [M + K, d]; NaN once labels met."""
    K = case.every.classes
    if only_rounding(z[-K:]):
        return math.nan
    x = case.inputs @ z[:-K]                           # [n K, d]
    nearest = cdist(x, z[-K:]).argmin(1)
    right = np.repeat(np.arange(K), len(x) // K)
    return np.mean(nearest == right)


def margin(case, z):
    """Noise that all of case.inputs bear: least distance to a plane halfway between their label and another.

    Below 0 where a sample's nearest label is another one; NaN once labels met.
    """
    K = case.every.classes
    if only_rounding(z[-K:]):
        return math.nan
    x = case.inputs @ z[:-K]                           # [n K, d]
    squares = cdist(x, z[-K:], "sqeuclidean")          # [n K, K]
    own = np.repeat(np.arange(K), len(x) // K)
    with np.errstate(divide="ignore", invalid="ignore"):
        distances = (squares - squares[range(len(x)), own][:, None]) / (2 * cdist(z[-K:], z[-K:])[own])
    return np.nanmin(distances)                        # NaN: 0 / 0 at the own label


def d_min(z, K):
    """Smallest distance of two labels at each time: [T, M + K, d] -> [T]; NaN once labels met."""
    found = []
    for now in z:
        labels = now[-K:]
        found.append(math.nan if only_rounding(labels) else pdist(labels).min())
    return np.array(found)


def decay_rate(z, times, K):
    """Of the labels' differences, from z [2, M + K, d] at two late times."""
    labels = z[:, -K:]
    centred = labels - labels.mean(1, keepdims=True)
    early, late = np.linalg.norm(centred, axis=(1, 2))
    return math.log(early / late) / (times[1] - times[0])


MOST_STEPS = 12_000        # of a descent, whatever the step


def moments(lr, longest):
    """Times of lines, and of points, which are whole steps of gradient descent, at most MOST_STEPS: from .1
    on, or from a tenth of the last where that is earlier."""
    last = min(longest / lr, MOST_STEPS)
    first = max(1, min(.1 / lr, last / 10))
    points = lr * np.unique(np.geomspace(first, last, 22).round())
    lines = np.union1d(np.geomspace(.1, longest, 120), points)
    return lines, points


def report(name, theory, measured):
    """One row of the table; apart is relative to theory, absolute where that is 0."""
    if math.isnan(theory) or math.isnan(measured):
        return leave_out(name, "labels met: only rounding is left")
    apart = abs(measured - theory) / (abs(theory) or 1)
    print(f"{name:70}{theory:14.8g}{measured:14.8g}{apart:9.0e}")


def leave_out(name, why):
    """The row of what has no value here."""
    print(f"{name:70}{why:>37}")


# ==== Experiments ===========================================================================================
# Points are measured, by gradient descent of every single sample unless said otherwise; lines are theory.
TIME = "time (1 / rate of a clean sample)"
LENGTH = "D_min (std of class centres)"
COLOURS = {"none": "C3", "both": "C1", "head": "C2", "head+sg": "C0"}
rcParams["legend.fontsize"] = 8


def new_figure(width=6.2, height=4.):
    """Width and height in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def plot_points(axis, times, values, colour):
    axis.plot(times, values, "o", ms=4, c=colour)


def plot_timeline(axes, cases, lr, longest, accuracy_name, margin_name):
    """Without head: loss per sample, accuracy, D_min and the margin against noise."""
    loss_axis, accuracy_axis, distance_axis = axes
    lines, points = moments(lr, longest)
    K, d = cases[0].plateau.shape

    for case, colour in zip(cases, ("C0", "C3")):
        z = headless_flow(case.merged, lines)
        losses = [headless_loss(case.merged, now) / case.size for now in z]
        loss_axis.loglog(lines, losses, c=colour, label=f"p = {case.p:.2g}")
        distance_axis.loglog(lines, d_min(z, K), c=colour)

        z, _ = descent(case.every, np.eye(d), "none", 0, lr, points)
        losses = [headless_loss(case.every, now) / case.size for now in z]
        hits = [accuracy(case, now) for now in z]
        plot_points(loss_axis, points, losses, colour)
        plot_points(accuracy_axis, points, hits, colour)
        plot_points(distance_axis, points, d_min(z, K), colour)
        margins = [margin(case, now) for now in z]
        name = margin_name if case.p else None
        distance_axis.plot(points, margins, "x", ms=4, c=colour, label=name)

        if case.rate:
            shrinks = np.exp(-case.rate * lines)
            distance = pdist(case.plateau).min()
            loss_axis.plot(lines, case.height * shrinks ** 2, "k:", label="plateau x exp(-2 λ t)")
            distance_axis.plot(lines, distance * shrinks, "k:", label="plateau x exp(-λ t)")
        if case.p:
            distance_axis.legend()

    loss_axis.set(xlabel=TIME, ylabel="loss per sample", ylim=(1e-7, 30))
    loss_axis.legend()
    accuracy_axis.set(xlabel=TIME, ylabel=accuracy_name, ylim=(0, 1.05), xscale="log")
    distance_axis.set(xlabel=TIME, ylabel=LENGTH, ylim=(1e-3, 10))


def plot_heads(axis, case, heads, eta, lr, longest, story):
    """D_min for each head, in the table too; under head+sg also the least sqrt(mu_k)."""
    lines, points = moments(lr, longest)
    K, d = case.plateau.shape
    W_start = np.eye(d)

    for head in heads:
        colour = COLOURS[head]
        z, W = flow(case.merged, W_start, head, eta, lines, 1e-8)
        z_descent, W_descent = descent(case.every, W_start, head, eta, lr, points)
        theory = d_min(z, K)
        measured = d_min(z_descent, K)

        name = "both, as y" if head == "both" else head
        axis.loglog(lines, theory, c=colour, label=name)
        plot_points(axis, points, measured, colour)
        if head == "both":
            projected = z @ W.swapaxes(1, 2)           # W z, what the loss sees
            axis.plot(lines, d_min(projected, K), "--", c=colour, label="both, as W y")
            projected = z_descent @ W_descent.swapaxes(1, 2)
            plot_points(axis, points, d_min(projected, K), colour)

        early = points[12]
        name = f"{story}, {head}: D_min at t = {early:.1f}, flow against descent"
        report(name, theory[lines == early][0], measured[12])
        if head == "head+sg":
            level = math.sqrt(overlaps(case.merged)[-1])
            found = np.abs(np.linalg.eigvals(W[-1]))
            nearest = found[np.abs(found - level).argmin()]
            name = f"{story}, head+sg: least sqrt(mu_k), nearest |eig(W)| at t = {longest}"
            report(name, level, nearest)

    axis.set(xlabel=TIME, ylabel=LENGTH, ylim=(1e-4, 10))
    axis.legend()


def run_timeline(args):
    """F1: without head, noise dies at rate 1, then frustration shrinks all classes; at p = 0 nothing does."""
    K = args.classes
    clean = graph_case(args, 0, args.dim)
    torn = graph_case(args, args.frustrated, args.dim)
    figure = new_figure(10.5, 3.4)
    cases = [clean, torn] if args.frustrated else [clean]
    names = "accuracy on clean samples", "margin of clean samples"
    plot_timeline(figure.subplots(1, 3), cases, args.lr, 400, *names)

    z = headless_flow(clean.merged, [1000])
    name = "p = 0: D_min at t = 1000 against y* in closed form"
    report(name, pdist(clean.plateau).min(), d_min(z, K)[0])
    if not args.frustrated:
        return {"F1_timeline.png": figure}

    if torn.rate:
        report_rate(args, torn)
    else:
        why = f"none in common: {zero_modes(torn.merged)} groups of classes"
        leave_out(f"p = {torn.p:.3g}: slow rate", why)

    decay, _ = spectrum(torn.merged)
    vanishing = np.sum(decay < 1e-9)
    components = zero_modes(torn.merged)
    report("zero modes: connected components against vanishing rates", components, vanishing)
    return {"F1_timeline.png": figure}


def report_rate(args, torn):
    """Rows of the one rate at which all classes collapse."""
    K, n, w = args.classes, args.samples, args.frustrated_weight
    pairs = math.comb(K, 2)
    late = late_times(K, n, args.frustrated / pairs, w)
    z = headless_flow(torn.merged, late)
    name = f"p = {torn.p:.3g}: slow rate, 3 x 3 matrix"
    if args.frustrated % pairs:
        name += " (pairs are not whole decks)"
    report(name, torn.rate, decay_rate(z, late, K))

    aligned = 5 / min(1, 2 * w)                        # by then samples sit at the mean of their labels
    z = headless_flow(torn.merged, [aligned])[0]
    expected = torn.height * math.exp(-2 * torn.rate * aligned)
    name = f"loss per sample at t = {aligned:.3g}, p w <D^2> / 4 exp(-2 λ t)"
    report(name, expected, headless_loss(torn.merged, z) / torn.size)

    # Samples follow their label, x' = y - x, and are late: x = y / (1 - λ) about the common mean.
    t = min(60, MOST_STEPS * args.lr, 20 / torn.rate)
    name = f"margin of clean samples over D_min / 2 at t = {t:.3g}, about 1 / (1 - λ)"
    if (1 - torn.rate) * t < 5:                        # what they were before dies by that much more
        return leave_out(name, "too early: samples still settle")
    z, _ = descent(torn.every, np.eye(args.dim), "none", 0, args.lr, [t])
    report(name, 1 / (1 - torn.rate), 2 * margin(torn, z[0]) / d_min(z, K)[0])


def run_rate(args):
    """F2: the slow time is (K - 1) / (K p w)."""
    K, n, w = args.classes, args.samples, args.frustrated_weight
    rng = default_rng(args.seed)
    p = np.geomspace(1e-4, .3, 15)
    exact = []
    found = []
    for share in p:
        m = frustrated_per_pair(K, n, share)
        edges, copies = symmetric_edges(K, n, m, w)
        system = graph_system(edges, random_start(edges, args.dim, rng), copies)
        late = late_times(K, n, m, w)
        exact.append(slow_rate(K, n, m, w))
        found.append(decay_rate(headless_flow(system, late), late, K))
    slow_time = 1 / np.array(found)

    figure = new_figure()
    axis = figure.subplots()
    label = "pairs dealt at random: slowest to fastest mode"
    for frustrated in np.unique(np.geomspace(K, .4 * n * K, 8).astype(int)):
        edges = sample_edges(K, n, frustrated, rng, w)
        N = len(edges)
        decay, _ = spectrum(merge(edges, np.zeros((N + K, 1))))
        slowest, fastest = decay[[1, K - 1]]
        if slowest > 1e-9:                             # else the classes fall into unconnected groups
            axis.plot([frustrated / N] * 2, [1 / slowest, 1 / fastest], c="silver", lw=4, label=label)
            label = None
    axis.loglog(p, 1 / np.array(exact), label="3 x 3 matrix")
    axis.plot(p, (K - 1) / (K * p * w), "k:", label="(K - 1) / (K p w)")
    axis.plot(p, slow_time, "o", label="exact flow, all pairs of labels alike")
    axis.set(xlabel="frustrated fraction p", ylabel="slow time 1 / λ (1 / rate of a clean sample)")
    axis.legend()

    few = p <= .01
    exponent, _ = np.polyfit(np.log(p[few]), np.log(slow_time[few]), 1)
    report("slow time against p, p <= .01: exponent", -1, exponent)
    limit = (1 + 1 / n) * (K - 1) / K
    report("slow time x p w at p = 1e-4: (1 + 1/n) (K - 1) / K", limit, slow_time[0] * p[0] * w)
    leading = leading_rate(K, n, frustrated_per_pair(K, n, p[8]), w)
    report(f"slow rate at p = {p[8]:.2g}: leading formula", leading, found[8])
    return {"F2_slow_time.png": figure}


def run_heads(args):
    """F3: four heads, one start. F4: head+sg takes eig(W) to ±sqrt(mu_k), here from W = diag(1, -1, ...),
    in directions that survive; the others rest where their vectors died."""
    K, d, lr = args.classes, args.dim, args.lr
    case = graph_case(args, args.frustrated, d)
    eta = 1 / case.size
    distances = new_figure()
    plot_heads(distances.subplots(), case, args.heads, eta, lr, 1000, "model")

    edges = case.every.cross[:-K, -K:].toarray()
    for head in args.heads:
        by_torch, _ = autograd_descent(edges, case.every.start, np.eye(d), head, eta, lr, 100)
        by_hand, _ = descent(case.every, np.eye(d), head, eta, lr, [100 * lr])
        name = f"model, {head}: D_min after 100 steps, autograd against by hand"
        report(name, *d_min([by_torch, by_hand[0]], K))

    lines, points = moments(lr, 1000)
    signs = np.diag((-1.) ** np.arange(d))
    z, W = flow(case.merged, signs, "head+sg", eta, lines, 1e-9)
    _, W_descent = descent(case.every, signs, "head+sg", eta, lr, points)
    kept = [np.linalg.norm(conserved(case.merged, z[k], W[k], eta)) for k in (0, -1)]
    report("head+sg: norm of the conserved W^T W - eta (X^T X + Y^T Y), t = 1000", *kept)

    eigenvalues = new_figure()
    axis = eigenvalues.subplots()
    axis.semilogx(lines, real_eigenvalues(W), lw=.8, c="C0")
    plot_points(axis, points, real_eigenvalues(W_descent), "C0")
    levels = np.sqrt(overlaps(case.merged))
    for level in [*levels, *-levels]:
        dotted = axis.axhline(level, c="k", ls=":")
    axis.set(xlabel=TIME, ylabel="eigenvalues of W, real part")
    axis.legend([dotted], ["±sqrt(mu_k)"])

    short = np.linspace(0, .5, 6)
    theory, _ = self_consistent(case.merged, signs, eta, short, 1e-10)
    _, W = flow(case.merged, signs, "head+sg", eta, short, 1e-11, "DOP853")
    name = "head+sg: |W| at t = .5, self-consistent theory against flow"
    report(name, np.linalg.norm(theory[-1]), np.linalg.norm(W[-1]))
    return {"F3_heads.png": distances, "F4_head_spectrum.png": eigenvalues}


def run_transition(args):
    """F5: head+sg keeps classes apart where mu > c; a strong head on small embeddings has c near 1."""
    K, n, w = args.classes, args.samples, args.frustrated_weight
    d = min(args.dim, K - 1)
    eta = 1 / (n * K)
    scale = math.sqrt(.15 * n * K / (1 + n))           # so that c is about 0.85 at small p

    def theory(p):
        """mu - c, and the ratio of final to initial distance."""
        m = frustrated_per_pair(K, n, p)
        return fixed_point(K, n, m, w, scale, eta)

    def gap(p):
        return theory(p)[0]

    def measured(p, centred):
        edges, copies = symmetric_edges(K, n, frustrated_per_pair(K, n, p), w)
        system = graph_system(edges, isotropic_start(edges, d, scale), copies)
        if centred:
            system = without_offset(system)
        z, _ = flow(system, np.eye(d), "head+sg", eta, [0, 1000], 1e-8)
        first, last = [pdist(now[-K:]).min() for now in z]               # rounding is 0 here
        return last / first

    meet = gap(.6) < 0                                 # weak ties may never bring mu down to c
    edge = brentq(gap, 1e-6, .6) if meet else .3
    p = np.minimum(edge * np.array([.1, .3, .5, .7, .9, 1.1, 1.8]), .95)
    points = [measured(share, True) for share in p]
    loose = [measured(share, False) for share in p[::3]]
    fine = np.linspace(1e-4, min(2 * edge, .95), 400)
    line = [theory(share)[1] for share in fine]

    figure = new_figure()
    axis = figure.subplots()
    axis.plot(fine, line, label="fixed point, from the conservation law")
    axis.plot(p, points, "o", label="gradient flow at t = 1000, centred")
    axis.plot(p[::3], loose, "x", c="C3", label="the same, not centred")
    if meet:
        axis.axvline(edge, c="k", ls=":", label=f"mu = c, p = {edge:.3f}")
    axis.set(xlabel="frustrated fraction p", ylabel="final / initial distance of labels")
    axis.legend()

    for k in (0, 2, 4, 5):
        above, ratio = theory(p[k])
        name = f"head+sg, p = {p[k]:.3f}, mu - c = {above:+.3f}: final / initial distance"
        report(name, ratio, points[k])
    return {"F5_transition.png": figure}


def run_teacher(args):
    """F6: the same stories for a linear student x = B s of K prototypes, where a fraction p is relabelled."""
    K = args.classes
    shares = [.005, .01, .02, .05, .1, .15, .2, .3, .4]
    none = [share for share in [args.frustration, *shares] if share and not relabelled_share(args, share)]
    if none:
        names = ", ".join(f"{share:.3g}" for share in sorted(set(none)))
        print(f"note: of {8 * args.samples} samples a class {names} are less than one: not drawn")

    asked = {0, relabelled_share(args, args.frustration)}
    cases = [teacher_case(args, p) for p in sorted(asked)]
    lr = largest_step(cases[0].every) / 8
    figure = new_figure(10.5, 6.4)
    *timeline, slow_axis, heads_axis = figure.subplot_mosaic("AABBCC\nDDDEEE").values()
    plot_timeline(timeline, cases, lr, 1000, "accuracy, true class", "margin, true class")

    p = np.unique([relabelled_share(args, share) for share in shares if share not in none])
    found = []
    for share in p:
        decay, _ = spectrum(teacher_case(args, share).every)
        found.append(decay[1:K].mean())
    slow_axis.loglog(p, (K - 1) / p, label="(K - 1) / p")
    slow_axis.plot(p, 1 / np.array(found), "o", label="mean of K - 1 eigenmodes")
    slow_axis.legend()
    tabled = [relabelled_share(args, share) for share in (.01, .05, .1, .2)]
    for share, rate in zip(p, found):
        if share in tabled:
            name = f"teacher-student: mean slow rate at p = {share:.3g}, p / (K - 1)"
            report(name, share / (K - 1), rate)

    plot_heads(heads_axis, cases[-1], args.heads, .1, lr, 1000, "teacher-student")
    for axis in figure.axes:
        axis.set_xlabel("time (1 / rate)")
    slow_axis.set(xlabel="relabelled fraction p", ylabel="slow time 1 / λ (1 / rate)")
    return {"F6_teacher_student.png": figure}


def run_plane(args):
    """F7: the embeddings in two dimensions, centred so that neither is spent on a common offset."""
    K = args.classes
    case = graph_case(args, args.frustrated, d=2)
    first_torn = K * args.samples
    for part in np.split(case.every.start, [first_torn, case.size]):        # clean, frustrated, labels
        part -= part.sum(0) / max(1, len(part))

    frames = 32 if args.animate else 4                 # 1, 10 and 100 are among them
    longest = min(100, MOST_STEPS * args.lr)
    times = np.r_[0, np.geomspace(longest / 100, longest, frames - 1)]
    paths = {}
    for head in ("none", "head+sg") if args.head == "all" else args.heads:
        paths[head], _ = descent(case.every, np.eye(2), head, 1 / case.size, args.lr, times)

    colours = [f"C{k}" for k in range(K)]
    of_clean = np.repeat(colours, args.samples)

    def plot_frames(axes, k):
        for axis, (head, path) in zip(axes, paths.items()):
            clean, torn, labels = np.split(path[k], [first_torn, case.size])
            axis.clear()
            axis.scatter(*clean.T, s=4, c=of_clean)
            axis.scatter(*torn.T, s=18, c="k", marker="x", lw=.8)
            axis.scatter(*labels.T, s=90, c=colours, marker="*", ec="k")
            axis.set(xlim=(-4, 4), ylim=(-4, 4), aspect="equal", title=f"{head}, t = {times[k]:.3g}")

    figure = new_figure(10.5, 2.75 * len(paths))
    axes = figure.subplots(len(paths), 4, squeeze=False)
    for column, k in zip(axes.T, (0, 1, frames // 2, frames - 1)):
        plot_frames(column, k)
    if not args.animate:
        return {"F7_plane.png": figure}

    moving = Figure(figsize=(3.6 * len(paths), 3.8))
    axes = moving.subplots(1, len(paths), squeeze=False)[0]

    def plot_moving(k):
        plot_frames(axes, k)
    return {"F7_plane.png": figure, "F7_plane.gif": FuncAnimation(moving, plot_moving, frames)}


EXPERIMENTS = {"timeline": run_timeline, "rate": run_rate, "heads": run_heads,
               "transition": run_transition, "teacher": run_teacher, "plane": run_plane}


# ==== Command line ==========================================================================================
# Options and the experiments on which they have no effect.
UNUSED = {"--frustration": ("rate", "transition"), "--frustrated": ("rate", "transition"),
          "--frustrated-weight": ("teacher",), "--head": ("timeline", "rate", "transition"),
          "--dim": ("plane", "rate"), "--lr": ("rate", "transition", "teacher"), "--seed": ("transition",),
          "--animate": ("timeline", "rate", "heads", "transition", "teacher")}


def die(message, code=2):
    """One line, whatever the message quotes, and an exit code."""
    line = " ".join(message.split())
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.exit(code)


def typed():
    """Options as the user gave them, without values."""
    return {word.partition("=")[0] for word in sys.argv[1:]}


def say_unused(experiment):
    """A note on options that are given, but do nothing."""
    given = [option for option in UNUSED if option in typed() and experiment in UNUSED[option]]
    if given:
        print(f"note: {', '.join(given)}: without effect on --experiment {experiment}")


def between(low, high, kind=float):
    """An option's type: a number from low to high, both allowed."""
    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of bounds: it must be from {low} to {high}")
        return value
    return number


def options():
    """The command line; what depends on several options is left to parse()."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = die
    add = parser.add_argument
    take_many = "; rate and transition take many"
    add("--experiment", default="all", choices=["all", *EXPERIMENTS], help="which one to run")
    add("--classes", type=between(2, 10, int), default=5, help="K, labels, 2 to 10")
    add("--samples", type=between(2, 400, int), default=50, help="n, clean samples per class, 2 to 400")

    how_many = parser.add_mutually_exclusive_group()
    how_many.add_argument("--frustration", type=between(0, .999), default=.04,
                          help="p, fraction of samples tied to two labels, 0 to 0.999" + take_many)
    how_many.add_argument("--frustrated", type=between(0, 5000, int), default=None,
                          help="the same as a number of samples, 0 to 5000; None: --frustration says"
                               + take_many)
    add("--frustrated-weight", type=between(.01, 10), default=1.,
        help="w, weight of each of a frustrated sample's two ties, 0.01 to 10; teacher has none")

    add("--head", default="all", choices=["all", *HEADS],
        help="which to draw where heads are compared: heads, teacher, plane (whose all is none and head+sg)")
    add("--dim", type=between(2, 16, int), default=8,
        help="d, dimensions of the embedding, 2 to 16; plane has 2, the rows of transition none")
    add("--lr", type=float, default=None,
        help="step of gradient descent; None: half the stable bound; rate and transition have none, teacher "
             "its own")
    add("--seed", type=between(0, 2 ** 32 - 1, int), default=0,
        help="of starts, pairs and relabelled samples; transition draws none")
    add("--animate", action="store_true", help="plane as a GIF too; the others have none")
    add("--out", default=None, help="run folder, new or empty; None: runs/collapse_toy-1, -2, ...")
    return parser


def parse():
    """Options; those left to others are filled in, and what depends on several is held to its bounds."""
    args = options().parse_args()
    clean = args.classes * args.samples
    args.heads = HEADS if args.head == "all" else (args.head,)

    p = args.frustration
    wanted = p / (1 - p) * clean
    if args.frustrated is None:
        args.frustrated = round(wanted)
        if "--frustration" not in typed():             # few samples: the default is one of them
            args.frustrated = max(1, args.frustrated)
    else:
        args.frustration = args.frustrated / (clean + args.frustrated)
    args.frustrated_fraction = args.frustrated / (clean + args.frustrated)
    if args.experiment in UNUSED["--lr"]:              # no samples tied so, no descent of them
        return args

    if args.frustrated > 5000 or args.frustration and not args.frustrated:
        die(f"--frustration {p} makes {wanted:.2g} frustrated of {clean} clean: none, or from 1 to 5000")
    case = graph_case(args, args.frustrated, 2 if args.experiment == "plane" else args.dim)
    of_vectors = largest_step(case.merged) / 2         # heads double the rates
    bound = min(of_vectors, largest_step_of_head(case.merged, 1 / case.size))
    if args.lr is None:
        args.lr = bound / 2
    if not bound / 100 <= args.lr < bound:
        die(f"--lr {args.lr} is out of bounds: with these options it must be below {bound:.4g}, where "
            f"descent may diverge, and from {bound / 100:.2g} on")
    return args


def run_folder(out):
    """The folder --out names, else the first free one of runs/collapse_toy-1, -2, ...: there, and empty."""
    numbered = (Path("runs", f"collapse_toy-{k}") for k in count(1))
    folder = Path(out) if out else next(path for path in numbered if not path.exists())
    if folder.exists() and any(folder.iterdir()):
        die(f"{folder} is not empty: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def draw(args, folder):
    """Tables and figures of one experiment or all, as they come."""
    names = EXPERIMENTS if args.experiment == "all" else [args.experiment]
    for name in names:
        for file, picture in EXPERIMENTS[name](args).items():
            try:
                if file.endswith(".png"):
                    picture.savefig(folder / file, dpi=110)
                else:
                    picture.save(folder / file, PillowWriter(fps=12))
            except OSError as error:
                die(f"cannot write {folder / file} ({error.strerror or error}): choose another --out")


def main():
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")       # where it has no λ
    args = parse()
    try:
        folder = run_folder(args.out)
        (folder / "config.json").write_text(json.dumps(vars(args), indent=1) + "\n")
    except OSError as error:
        die(f"cannot write to {args.out or 'runs'} ({error.strerror}): choose another --out")

    say_unused(args.experiment)
    print(f"{'':70}{'theory':>14}{'measured':>14}{'apart':>9}")
    try:
        draw(args, folder)
    except FloatingPointError as error:
        die(f"{error}: choose a smaller --lr or --dim; {folder} keeps the figures until then")
    except KeyboardInterrupt:
        die(f"ended by Ctrl-C; {folder} keeps the figures until then: choose another --out next time", 130)
    written = sorted(file.name for file in folder.iterdir())
    print(f"In {folder}: {', '.join(written)}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
