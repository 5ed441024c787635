"""Has it collapsed? Measures of any embeddings, in anybody's training loop, and one sentence on them.

    panel = collapse_panel(z, z1, z2)      embeddings of images, and of two views of each
    print(verdict(panel, untrained))       untrained: the panel of the same network before training
    knn_accuracy(h, y, h_test, y_test)     do neighbours share a class?

Self-supervised learning collapses when different inputs end up with the same embedding (complete collapse),
or with embeddings on a line or in a thin subspace (dimensional collapse). No single number shows both: a
constant plus noise has full centred rank, healthy features that are all positive have a mean cosine of 0.97.
Hence a panel.

Arithmetic and bytes. Nothing is N x N: uniformity is a log-sum-exp over the bank of the embeddings
themselves, neighbours are a top-k over it (4 N^2 D operations together), ranks come from the smaller of z^T z
and z z^T in float64. 50,000 x 512 are 5 TFLOP.
"""
import math

import torch
import torch.nn.functional as F

from .bank import bank_logsumexp, bank_topk


# ---- Parts of the panel ------------------------------------------------------------------------------------
def _parts(z, unit=False):
    """z, or its unit vectors, in float64, 4096 rows at a time: no copy of the whole."""
    for rows in z.split(4096):
        rows = rows.double()
        yield F.normalize(rows) if unit else rows


def _mean(z, unit=False):
    """Of each column, [D]."""
    return sum(rows.sum(dim=0) for rows in _parts(z, unit)) / len(z)


def _std(z, unit=False):
    """Of each column, [D], divisor N - 1."""
    mean = _mean(z, unit)
    squares = sum((rows - mean).square().sum(dim=0) for rows in _parts(z, unit))
    return (squares / (len(z) - 1)).sqrt()


def _gram(z, mean):
    """x^T x or x x^T [n, n] of x = z - mean, whichever is smaller: its eigenvalues are x's squared singular
    values."""
    samples, width = z.shape
    if samples <= width:
        x = z.double() - mean
        return x @ x.T
    return sum((rows - mean).T @ (rows - mean) for rows in _parts(z))


def _rankme(z):
    """exp entropy of the singular values, uncentred: Garrido et al., arXiv 2210.02885, eq. 1 and 2."""
    singular = torch.linalg.eigvalsh(_gram(z, 0)).clamp(min=0).sqrt()
    share = singular / singular.sum() + 1e-7
    return torch.exp(-(share * share.log()).sum())


def _participation(z):
    """(sum l)^2 / sum l^2 over the eigenvalues l of the covariance: its trace and its Frobenius norm."""
    gram = _gram(z, _mean(z))
    return gram.trace() ** 2 / gram.square().sum()


def _work_dtype(z):
    """float64 where N^2 D operations take about a second, else fp32."""
    samples, width = z.shape
    return torch.float64 if samples ** 2 * width < 2e10 else torch.float32


def _uniformity(z):
    """log of the mean of exp(-2 |u_i - u_j|^2) over pairs i != j, Wang, Isola, arXiv 2005.10242, eq. 2.

    For rows of unit length |u_i - u_j|^2 = 2 - 2 u_i . u_j: a log-sum-exp of the cosines at temperature 1/4.
    """
    samples = len(z)
    bank = torch.empty_like(z, dtype=_work_dtype(z))
    for place, unit in zip(bank.split(4096), _parts(z, unit=True)):
        place.copy_(unit)
    itself = torch.arange(samples, device=z.device)
    sums = [bank_logsumexp(bank[rows], bank, 0.25, exclude=rows) for rows in itself.split(4096)]
    return torch.cat(sums).double().logsumexp(dim=0) - math.log(samples * (samples - 1)) - 4


def _twonn(z, candidates=8):
    """Intrinsic dimension from the ratio of the distances to the two nearest others, Facco et al. 2017.

    The maximum-likelihood form (n - 1) / sum log(r2 / r1), over all points: nothing is discarded but points
    that have a duplicate, r1 = 0. Candidates come from dot products, since 2 z_i . z_j - |z_j|^2 orders by
    distance; their distances are then made anew from differences, in float64.
    """
    samples, width = z.shape
    mean = _mean(z)
    bank = z.new_empty(samples, width + 1, dtype=_work_dtype(z))
    for place, rows in zip(bank.split(4096), _parts(z)):
        centred = rows - mean
        place[:, :-1] = centred
        place[:, -1] = centred.square().sum(dim=1)

    total, points = 0., 0
    for rows in torch.arange(samples, device=z.device).split(1024):
        queries = 2 * bank[rows]
        queries[:, -1] = -1
        near = bank_topk(queries, bank, min(candidates, samples))[1]                   # [B, count]
        distance = (z[rows, None].double() - z[near].double()).norm(dim=2)
        distance[near == rows[:, None]] = torch.inf                                    # not to itself
        first, second = distance.sort(dim=1).values[:, :2].T
        ratio = (second / first)[first > 0]
        total += ratio.log().sum()
        points += len(ratio)
    return max(0, points - 1) / total if points else math.nan


# ---- The panel ---------------------------------------------------------------------------------------------
def _check(z, views):
    shape = [*z.shape]
    if z.ndim != 2 or len(z) < 4 or not z.is_floating_point():
        raise ValueError(f"collapse_panel takes float embeddings [N, D], N >= 4, got {z.dtype} {shape}")
    if len(views) == 1:
        raise ValueError("collapse_panel takes two views, z1 and z2, or none")
    for view in views:
        if view.shape != z.shape:
            raise ValueError(f"collapse_panel takes views of the shape of z {shape}, got {[*view.shape]}")


@torch.no_grad()
def collapse_panel(z, z1=None, z2=None):
    """Measures of embeddings z [N, D] of N images, and z1, z2 [N, D] of two views of each -> {name: number}.

    samples, width   N, D
    raw std          standard deviation over images, mean over dimensions; in z's units
    std              the same of z / |z|, times sqrt(D): 1 if directions are spread evenly, 0 at one point
    cosine           mean cosine of two different images: 1 at one point
    RankMe           exp entropy of z's singular values, uncentred: dimensions in use, the mean among them
    participation    (sum l)^2 / sum l^2 over the covariance's eigenvalues: as RankMe, centred and stricter
    uniformity       log mean exp(-2 squared distance) of unit vectors: 0 at one point, towards -4 if spread
    TwoNN            intrinsic dimension by maximum likelihood; beyond 10 only to compare runs
    alignment        mean squared distance of the two views' unit vectors
    view ratio       alignment over the mean squared distance of two images, 2 - 2 cosine: near 0 if an
                     embedding knows its image, 1 if two views are as far apart as two images

    Any float dtype, on any device that has float64; statistics in float64. The last two need z1 and z2. All
    values are NaN if an embedding is not finite. ValueError for shapes that do not agree, N < 4, integers.
    """
    views = [view for view in (z1, z2) if view is not None]
    _check(z, views)
    samples, width = z.shape
    pairs = samples * (samples - 1)
    lengths = sum(unit.square().sum() for unit in _parts(z, unit=True))              # 1 each, but for zeros
    cosine = ((samples * _mean(z, unit=True)).square().sum() - lengths) / pairs

    panel = {"samples": samples, "width": width}
    panel["raw std"] = _std(z).mean()
    panel["std"] = _std(z, unit=True).mean() * width ** 0.5
    panel["cosine"] = cosine
    finite = bool(z.isfinite().all())
    panel["RankMe"] = _rankme(z) if finite else math.nan
    panel["participation"] = _participation(z) if finite else math.nan
    panel["uniformity"] = _uniformity(z) if finite else math.nan
    panel["TwoNN"] = _twonn(z) if finite else math.nan
    if views:
        pairs_of_views = zip(_parts(z1, unit=True), _parts(z2, unit=True))
        panel["alignment"] = sum((u1 - u2).square().sum() for u1, u2 in pairs_of_views) / samples
        panel["view ratio"] = panel["alignment"] / (2 - 2 * cosine)
    return {name: value if isinstance(value, int) else float(value) for name, value in panel.items()}


# ---- The verdict -------------------------------------------------------------------------------------------
# All bounds are this project's own: no paper states them. tests/test_collapse.py holds what they tell apart.
ONE_POINT = 1e-3           # 1 - mean cosine below this: all images in one direction
VIEW_RATIO = 0.8           # above this an embedding says next to nothing of its image
SHRUNK = 0.3               # raw std below this share of the untrained network's: training has shrunk it
SHRUNK_VIEW_RATIO = 0.45   # takes VIEW_RATIO's place where training has shrunk it


def _too_thin(panel):
    """Which measure of dimensions lies below its bound, in words, or "".

    Participation: nine tenths of the variance on one axis. RankMe: the 3/8th power of what the sample and the
    width allow.
    """
    most = min(panel["samples"] - 1, panel["width"])
    bounds = {"participation": 1.25 - 0.25 / most, "RankMe": most ** 0.375}
    for name, least in bounds.items():
        if panel[name] < least:
            return f"{name} is {panel[name]:.2f} of at most {most} (bound {least:.2f})"
    return ""


def verdict(panel, untrained=None):
    """One sentence from a collapse_panel: which collapse, by which criterion, its value and its bound.

    COLLAPSED               all images at one point; or a view ratio near 1 and embeddings on a line; or one
                            near 1/2 and embeddings that training has shrunk
    DIMENSIONAL COLLAPSE    embeddings know their images, but on a line or in few dimensions
    NOT SPREAD YET          as blind to its image as before training, but no narrower
    No collapse             none of these

    untrained: the panel of the same network before training, on the same images. Without it an embedding that
    says nothing of its image is called collapsed although it may not be trained yet.
    """
    ratio = panel.get("view ratio", 0.)
    away = 1 - panel["cosine"]
    if not math.isfinite(panel["raw std"] + ratio):
        return "COLLAPSED: embeddings are not finite."
    if panel["raw std"] == 0 or away < ONE_POINT:
        direction = f"1 - mean cosine is {away:.1g} (bound {ONE_POINT})"
        return f"COLLAPSED: all images point in one direction, {direction}."

    thin = _too_thin(panel)
    seen = f"the squared distance of two views of an image is {ratio:.2f} of that of two images"
    share = panel["raw std"] / max(untrained["raw std"], 1e-30) if untrained else 1.
    if share < SHRUNK and ratio > SHRUNK_VIEW_RATIO:
        shrunk = f"raw std is {share:.2g} of the untrained network's (bound {SHRUNK})"
        return f"COLLAPSED: {seen} (bound {SHRUNK_VIEW_RATIO}), and {shrunk}."
    if ratio > VIEW_RATIO:
        blind = f"{seen} (bound {VIEW_RATIO})"
        if untrained is None:
            return f"COLLAPSED, or not trained yet: {blind}."
        if thin:
            return f"COLLAPSED: {blind}, and {thin}."
        return f"NOT SPREAD YET: {blind}, but no narrower than before training."
    if thin:
        return f"DIMENSIONAL COLLAPSE: {thin}."
    known = f"{seen}, " if "view ratio" in panel else ""
    most = min(panel["samples"] - 1, panel["width"])
    ranks = f"participation is {panel['participation']:.1f} and RankMe {panel['RankMe']:.0f}"
    return f"No collapse: {known}{ranks} of at most {most}."


# ---- Neighbours --------------------------------------------------------------------------------------------
@torch.no_grad()
def knn_accuracy(h, y, h_test, y_test, k=5, temperature=0.07):
    """Share of test features whose class the k nearest of h name, by votes exp(cosine / temperature); exact.

    h [N, E], y int64 [N] >= 0; h_test [M, E], y_test [M]. Wu et al., arXiv 1805.01978, vote so with k = 200.
    """
    cosine, row = bank_topk(F.normalize(h_test), F.normalize(h), min(k, len(h)))       # [M, k] each
    y, y_test = y.to(row.device), y_test.to(row.device)
    votes = cosine.new_zeros(len(h_test), int(y.max()) + 1)
    votes.scatter_add_(1, y[row], (cosine / temperature).exp())
    return (votes.argmax(dim=1) == y_test).double().mean().item()


@torch.no_grad()
def few_label_accuracy(h, y, h_test, y_test, labels, draws=10):
    """Accuracy of the nearest class mean, from `labels` images a class; mean over `draws` choices of them.

    Other arguments as above. Features less the mean of all h, which needs no labels, at unit length:
    SimpleShot's CL2N, Wang et al., arXiv 1911.04623. A class of fewer images has all of them taken.
    """
    centre = h.mean(dim=0)
    unit = F.normalize(h - centre)
    unit_test = F.normalize(h_test - centre)
    generator = torch.Generator().manual_seed(0)
    classes = y.unique()
    total = 0
    for _ in range(draws):
        order = torch.randperm(len(y), generator=generator).to(y.device)
        chosen = [order[y[order] == name][:labels] for name in classes]
        means = torch.stack([unit[rows].mean(dim=0) for rows in chosen])
        nearest = torch.cdist(unit_test, means).argmin(dim=1)
        total += (classes[nearest] == y_test).double().mean().item()
    return total / draws
