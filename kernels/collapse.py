"""Has it collapsed? Measures of any embeddings, in anybody's training loop, and one sentence on them.

    python -m kernels.collapse emb.npy                      # embeddings from anywhere; --help has the rest

    panel = collapse_panel(z, z1, z2)      embeddings of images, and of two views of each
    print(verdict(panel, untrained))       untrained: the panel of the same network before training
    watch = CollapseWatch(network, x, x1, x2); print(watch())        the same, in a training loop
    knn_accuracy(h, y, h_test, y_test)     do neighbours share a class?

Self-supervised learning collapses when different inputs end up with the same embedding (complete collapse, or
of a part of them), or with embeddings on a line or in a thin subspace (dimensional collapse). No single
number shows all: a constant plus noise has full centred rank, healthy features that are all positive have a
mean cosine of 0.97. Hence a panel. And without two views of each image no number tells images from noise.

Arithmetic and bytes. Nothing is N x N: uniformity is a log-sum-exp over the bank of the embeddings
themselves, neighbours are a top-k over it (4 N^2 D operations together), ranks come from the smaller of z^T z
and z z^T in float64. 50,000 x 512 are 5 TFLOP; beyond 50,000 rows these two look at as many, drawn at random.
Rows are read 4096 at a time, also from a mapped .npy file that is larger than memory.
"""
import math

import torch
import torch.nn.functional as F

from .bank import bank_logsumexp, bank_topk

MOST = 50_000                          # rows for what takes N^2 operations


# ---- Embeddings, wherever they lie -------------------------------------------------------------------------
class _Rows:
    """Rows of a tensor or a NumPy array [N, D], also a mapped one; counted: their numbers, None for all;
    unit: a power of 2 that they are divided by."""

    def __init__(self, z, counted=None, unit=1.0):
        self.z, self.counted, self.unit = z, counted, unit
        self.device = z.device if isinstance(z, torch.Tensor) else torch.device("cpu")
        self.width = z.shape[1]

    def __len__(self):
        return len(self.z) if self.counted is None else len(self.counted)

    def read(self, rows):
        """Those numbers or that slice of the whole, as a tensor."""
        if isinstance(self.z, torch.Tensor):
            part = self.z[rows]
        else:
            part = self.z[rows if isinstance(rows, slice) else rows.numpy()]
            part = torch.from_numpy(part.astype(part.dtype.newbyteorder("=")))         # a copy
        return part if self.unit == 1 else part.double() / self.unit

    def parts(self, unit=False):
        """Rows, or their unit vectors, in float64, 4096 at a time: no copy of the whole."""
        for first in range(0, len(self), 4096):
            rows = slice(first, first + 4096)
            rows = self.read(rows if self.counted is None else self.counted[rows]).double()
            yield _unit(rows) if unit else rows

    def some(self, most):
        """Of `most` rows at random, or of all: _Rows in memory."""
        if len(self) <= most:
            return self if self.counted is None and isinstance(self.z, torch.Tensor) else _Rows(self.whole())
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0), device="cpu")
        chosen = order[:most].sort().values
        chosen = chosen.to(self.device)
        return _Rows(self.read(chosen if self.counted is None else self.counted[chosen]))

    def whole(self):
        return self.read(slice(None) if self.counted is None else self.counted)


def _finite(sets):
    """Whether a row is finite in all of these, [N], and for each the largest number of its finite rows."""
    highest = [torch.cat([rows.abs().amax(dim=1) for rows in z.parts()]) for z in sets]      # NaN if one is
    finite = torch.stack([numbers.isfinite() for numbers in highest]).all(dim=0)
    return finite, [float(numbers[finite].max()) if finite.any() else 0. for numbers in highest]


def _unit_of(largest):
    """A power of 2 near it, by which to divide what squares would not bear; else 1."""
    _, exponent = math.frexp(largest)
    return 1. if abs(exponent) < 50 or not largest else 2. ** min(max(exponent, -1000), 1000)


# ---- Parts of the panel ------------------------------------------------------------------------------------
def _mean(z, unit=False):
    """Of each column, [D]."""
    return sum(rows.sum(dim=0) for rows in z.parts(unit)) / len(z)


def _std(z, unit=False):
    """Of each column, [D], divisor N - 1."""
    mean = _mean(z, unit)
    squares = sum((rows - mean).square().sum(dim=0) for rows in z.parts(unit))
    return (squares / (len(z) - 1)).sqrt()


def _gram(z, mean):
    """x^T x or x x^T [n, n] of x = z - mean, whichever is smaller: its eigenvalues are x's squared singular
    values."""
    if len(z) <= z.width:
        x = z.whole().double() - mean
        return x @ x.T
    return sum((rows - mean).T @ (rows - mean) for rows in z.parts())


def _outliers(z):
    """The few rows, a hundredth at most or one, that hold over half of the variance, and again of the
    rest: their numbers in the whole, [k], and their share of it."""
    everyone = torch.arange(len(z.z), device=z.device) if z.counted is None else z.counted
    kept, whole, most = everyone, None, max(1, len(z) // 100)
    while True:
        rows = _Rows(z.z, kept, z.unit)
        mean = _mean(rows)
        squares = torch.cat([(part - mean).square().sum(dim=1) for part in rows.parts()])
        whole = squares.sum() if whole is None else whole
        far = squares.argsort(descending=True)
        few = 1 + int((squares[far].cumsum(0) <= OUTLIERS * squares.sum()).sum())
        if len(everyone) - len(kept) + few > most or not squares.sum() > 0:
            return everyone[~torch.isin(everyone, kept)], 1 - float(squares.sum() / whole)
        kept = kept[far[few:].sort().values]


def _rankme(z):
    """exp entropy of the singular values, uncentred: Garrido et al., arXiv 2210.02885, eq. 1 and 2."""
    singular = torch.linalg.eigvalsh(_gram(z, 0)).clamp(min=0).sqrt()
    share = singular / singular.sum() + 1e-7
    return torch.exp(-(share * share.log()).sum())


def _participation_and_axes(z):
    """Of the eigenvalues l of the covariance: (sum l)^2 / sum l^2, which are its trace and Frobenius norm,
    and how many of them, the largest first, hold 99 % of their sum."""
    gram = _gram(z, _mean(z))
    variances = torch.linalg.eigvalsh(gram).clamp(min=0).flip(0)
    axes = 1 + int((variances.cumsum(0) < 0.99 * variances.sum()).sum())
    return gram.trace() ** 2 / gram.square().sum(), axes


def _work_dtype(z):
    """float64 where N^2 D operations take about a tenth of a second, else fp32."""
    return torch.float64 if len(z) ** 2 * z.width < 2e9 else torch.float32


def _uniformity(z):
    """log of the mean of exp(-2 |u_i - u_j|^2) over pairs i != j, Wang, Isola, arXiv 2005.10242, eq. 2.

    For rows of unit length |u_i - u_j|^2 = 2 - 2 u_i . u_j: a log-sum-exp of the cosines at temperature 1/4.
    A row of zeros has no direction and stays 0: then two more columns bring its length in.
    """
    samples = len(z)
    bank = torch.empty(samples, z.width, dtype=_work_dtype(z), device=z.device)
    for place, unit in zip(bank.split(4096), z.parts(unit=True)):
        place.copy_(unit)
    query = bank
    half = bank.square().sum(dim=1, keepdim=True) / 2
    if (half < 0.25).any():                              # u_i . u_j - |u_i|^2 / 2 - |u_j|^2 / 2 + 1
        one = torch.ones_like(half)
        query, bank = torch.cat([bank, one, 0.5 - half], 1), torch.cat([bank, 0.5 - half, one], 1)
    itself = torch.arange(samples, device=z.device)
    sums = [bank_logsumexp(query[rows], bank, 0.25, exclude=rows) for rows in itself.split(4096)]
    return torch.cat(sums).double().logsumexp(dim=0) - math.log(samples * (samples - 1)) - 4


def _nearest(z, candidates=8):
    """Distances [N, k] of each row to the k nearest others, float64, and which they are; inf: not another.

    Candidates come from dot products, since 2 z_i . z_j - |z_j|^2 orders by distance; their distances are
    then made anew from differences. Where these products are of fp32, what lies closer than some thousandth
    of a row's length may not be among them: TwoNN of very tight clusters is then too low.
    """
    samples, mean = len(z), _mean(z)
    bank = torch.empty(samples, z.width + 1, dtype=_work_dtype(z), device=z.device)
    for place, rows in zip(bank.split(4096), z.parts()):
        centred = rows - mean
        place[:, :-1] = centred
        place[:, -1] = centred.square().sum(dim=1)

    distances, nearest = [], []
    for rows in torch.arange(samples, device=z.device).split(1024):
        queries = 2 * bank[rows]
        queries[:, -1] = -1
        near = bank_topk(queries, bank, min(candidates, samples))[1]                   # [B, count]
        distance = (z.read(rows)[:, None].double() - z.read(near).double()).norm(dim=2)
        distance[near == rows[:, None]] = torch.inf                                    # not to itself
        distance, order = distance.sort(dim=1)
        distances.append(distance)
        nearest.append(near.gather(1, order))
    return torch.cat(distances), torch.cat(nearest)


def _twonn(distances, variance):
    """Intrinsic dimension from the ratio of the distances to the two nearest others, Facco et al. 2017.

    The maximum-likelihood form (n - 1) / sum log(r2 / r1), over all points: nothing is discarded but points
    that have a duplicate, r1 = 0, or one but for rounding: r1 below 1e-5 of two rows' distance and 1e-3 r2.
    """
    first, second = distances[:, :2].T
    duplicate = (first <= 1e-5 * (2 * variance.sum()).sqrt()) & (first < 1e-3 * second)
    ratio = (second / first)[(first > 0) & ~duplicate]
    return max(0, len(ratio) - 1) / ratio.log().sum() if len(ratio) else math.nan


OUTLIERS = 0.5                         # of the variance in a few rows: they would hide all others
# Of the root of the mean squared distance of two rows:
NEAR = 0.02                            # one point, for a twentieth of the images
EQUAL = 1e-3                           # no distance; more for pairs, which may be frames of one film


def _joined(group, one, other):
    """Groups [N], each row the first of its own, once these pairs of rows are in one."""
    while True:
        pair = group[one], group[other]
        first = torch.minimum(*pair)
        joined = group.clone()
        for members in pair:
            joined.scatter_reduce_(0, members, first, "amin")
        joined = joined[joined[group]]
        if torch.equal(joined, group):
            return group
        group = joined


def _distinct(z, distances, nearest, variance):
    """Share of distinct rows, which are (nearly) equal to no other, and of those in the largest group at one
    point, 0 if none is."""
    apart = (2 * variance.sum()).sqrt()
    every = torch.arange(len(z), device=z.device)
    tolerances = [apart * part for part in (NEAR, EQUAL, EQUAL / 1000)]
    near = _sizes(z, every, distances, nearest, tolerances)
    equal = _sizes(z, every, distances, nearest, tolerances[1:])
    distinct = (len(z) - equal.sum().item() + len(equal)) / len(z)
    return distinct, near.max().item() / len(z) if len(near) else 0.


def _sizes(z, rows, distances, nearest, tolerances):
    """Of the groups of equal ones among these rows, whose distances to their nearest in z are [R, k]: [G].

    Rows are joined with those of their nearest that are equal. A group of more than that falls into several:
    so the first of each are compared anew, until no two are equal. What was joined in a chain and is longer
    than the tolerance, as points close together on a curve are, is judged by the next, smaller one.
    """
    tolerance, *smaller = tolerances
    near = distances[:, 0] <= tolerance
    equal, kept = rows[near], (distances[near], nearest[near])
    distances, nearest = kept
    asked, others = equal, torch.arange(len(z), device=z.device)
    group = others
    while len(asked):
        row, place = (distances <= tolerance).nonzero(as_tuple=True)
        if not len(row):
            break
        group = _joined(group, asked[row], others[nearest[row, place]])
        asked = others = group[equal].unique()
        if len(asked) < 2:
            break
        distances, nearest = _nearest(_Rows(z.read(asked)))
    _, own, sizes = group[equal].unique(return_inverse=True, return_counts=True)
    squares = torch.zeros(len(sizes), dtype=torch.float64, device=z.device)            # from the first one
    for rows, groups in zip(equal.split(4096), own.split(4096)):
        apart = z.read(rows).double() - z.read(group[rows]).double()
        squares.index_add_(0, groups, apart.square().sum(dim=1))
    long = squares > tolerance ** 2 * (sizes - 1)
    if not smaller or not long.any():
        return sizes[~long]
    distances, nearest = (numbers[long[own]] for numbers in kept)
    return torch.cat([sizes[~long], _sizes(z, equal[long[own]], distances, nearest, smaller)])


def _class_stds(z, labels):
    """Root mean variance of the rows of each class [K], NaN for less than 4, and all labels there are."""
    names, index = labels.unique(return_inverse=True)
    counts = index.bincount()
    sums = torch.zeros(len(names), z.width, dtype=torch.float64, device=z.device)
    for rows, own in zip(z.parts(), index.split(4096)):
        sums.index_add_(0, own, rows)
    means = sums / counts[:, None]
    squares = torch.zeros(len(names), dtype=torch.float64, device=z.device)
    for rows, own in zip(z.parts(), index.split(4096)):
        squares.index_add_(0, own, (rows - means[own]).square().mean(dim=1))
    stds = (squares / (counts - 1)).sqrt()
    return stds.where(counts >= 4, torch.nan), names


# ---- The panel ---------------------------------------------------------------------------------------------
def _check(z, views):
    if not all(hasattr(x, "shape") for x in (z, *views)):
        raise ValueError("collapse_panel takes tensors or NumPy arrays")
    shape = [*z.shape]
    floats = z.is_floating_point() if isinstance(z, torch.Tensor) else z.dtype.kind == "f"
    if z.ndim != 2 or len(z) < 4 or not floats or not z.shape[1]:
        raise ValueError(f"collapse_panel takes float embeddings [N, D], N >= 4, got {z.dtype} {shape}")
    if len(views) == 1:
        raise ValueError("collapse_panel takes two views, z1 and z2, or none")
    for view in views:
        if tuple(view.shape) != tuple(z.shape):
            raise ValueError(f"collapse_panel takes views of the shape of z {shape}, got {[*view.shape]}")


@torch.no_grad()
def collapse_panel(z, z1=None, z2=None, labels=None):
    """Measures of embeddings z [N, D] of N images, and z1, z2 [N, D] of two views of each -> {name: number}.

    samples, width   N, D
    raw std          standard deviation over images, mean over dimensions; in z's units
    std              the same of z / |z|, times sqrt(D): 1 if directions are spread evenly, 0 at one point
    cosine           mean cosine of two different images: 1 at one point
    RankMe           exp entropy of z's singular values, uncentred: dimensions in use, the mean among them
    participation    (sum l)^2 / sum l^2 over the covariance's eigenvalues: as RankMe, centred and stricter
    axes             of the largest eigenvalues, how many hold 99 % of the variance
    uniformity       log mean exp(-2 squared distance) of unit vectors: 0 at one point, towards -4 if spread
    TwoNN            intrinsic dimension by maximum likelihood; beyond 10 only to compare runs
    dead             dimensions whose standard deviation is below a thousandth of the root mean variance
    distinct         share of rows that are distinct: 1 if none has an equal, or nearly equal, other, within a
                     thousandth of what two rows are apart
    at one point     share of rows in the largest group of those within a fiftieth of it
    alignment        mean squared distance of the two views' unit vectors
    view ratio       alignment over the mean squared distance of two images' unit vectors: near 0 if an
                     embedding knows its image, 1 if two views are as far apart as two images

    Tensors of any float dtype, on any device that has float64, or NumPy arrays, mapped files too; statistics
    in float64. alignment and view ratio need z1 and z2. Beyond 50,000 rows uniformity, TwoNN, distinct and at
    one point look at so many, drawn at random, and "sample" says so.

    labels [N]: of classes or other groups, whole numbers or words; adds classes (of 4 rows at least), and
    classes at one point, a list of those whose rows differ by less than a fiftieth of what all rows do.
    Rows that are not finite, in z or a view, are left out: "not finite" is how many they are, "not finite
    rows" a list of the first ten. So are, up to a hundredth of them and of 20 rows one, those that hold over
    half of the variance: "outliers", "outlier rows", and "outlier share", their part. ValueError for shapes
    that do not agree, N < 4, integers.
    """
    views = [view for view in (z1, z2) if view is not None]
    _check(z, views)
    sets = [_Rows(x) for x in (z, *views)]
    finite, largest = _finite(sets)
    counted = None if finite.all() else finite.nonzero().flatten()
    sets = [_Rows(x.z, counted, _unit_of(number)) for x, number in zip(sets, largest)]
    rows, *views = sets
    panel = {"samples": len(rows), "width": rows.width}
    if counted is not None:
        missing = (~finite).nonzero().flatten()
        panel |= {"not finite": len(missing), "not finite rows": missing[:10].tolist()}
    outliers, share = _outliers(rows) if len(rows) >= 20 else ([], 0.)
    if len(outliers):
        finite[outliers] = False
        counted = finite.nonzero().flatten()
        sets = [_Rows(x.z, counted) for x in sets]
        largest = [max(float(part.abs().max()) for part in x.parts()) for x in sets]
        rows, *views = [_Rows(x.z, counted, _unit_of(number)) for x, number in zip(sets, largest)]
        panel |= {"samples": len(rows), "outliers": len(outliers), "outlier rows": outliers[:10].tolist(),
                  "outlier share": share}
    samples, width = len(rows), rows.width
    if samples < 4:
        names = "raw std", "std", "cosine", "RankMe", "participation", "axes", "uniformity", "TwoNN"
        return panel | dict.fromkeys(names + ("alignment", "view ratio") * bool(views), math.nan)
    pairs = samples * (samples - 1)
    lengths = sum(unit.square().sum() for unit in rows.parts(unit=True))             # 1 each, but for zeros
    cosine = ((samples * _mean(rows, unit=True)).square().sum() - lengths) / pairs

    std = _std(rows)
    variance = std.square()
    panel["raw std"] = std.mean() * rows.unit
    panel["std"] = _std(rows, unit=True).mean() * width ** 0.5
    panel["cosine"] = cosine
    panel["RankMe"] = _rankme(rows)
    panel["participation"], panel["axes"] = _participation_and_axes(rows)
    looked_at = rows.some(MOST)
    if len(looked_at) < samples:
        panel["sample"] = len(looked_at)
    distances, nearest = _nearest(looked_at)
    panel["uniformity"] = _uniformity(looked_at)
    panel["TwoNN"] = _twonn(distances, variance)
    panel["dead"] = int((std < 1e-3 * variance.mean().sqrt()).sum())
    panel["distinct"], panel["at one point"] = _distinct(looked_at, distances, nearest, variance)
    if views:
        pairs_of_views = zip(*(view.parts(unit=True) for view in views))
        panel["alignment"] = sum((u1 - u2).square().sum() for u1, u2 in pairs_of_views) / samples
        panel["view ratio"] = panel["alignment"] / (2 * lengths / samples - 2 * cosine)   # of zeros less
    if labels is not None:
        panel |= _classes(rows, labels, counted, variance.mean().sqrt())
    kept = int, float, list
    return {name: value if isinstance(value, kept) else float(value) for name, value in panel.items()}


def _classes(rows, labels, counted, whole):
    words = None
    if not isinstance(labels, torch.Tensor) and any(isinstance(label, str) for label in labels):
        if not all(isinstance(label, str) for label in labels):
            raise ValueError("labels must be all words or all whole numbers, got both")
        words = sorted({*labels})
        number = {word: k for k, word in enumerate(words)}
        labels = [number[word] for word in labels]
    labels = _labels(labels, len(rows.z), "labels").to(rows.device)
    stds, names = _class_stds(rows, labels if counted is None else labels[counted])
    points = names[stds < whole / 50].tolist()
    points = [words[point] for point in points] if words else points
    return {"classes": int(stds.isfinite().sum()), "classes at one point": points}


# ---- The verdict -------------------------------------------------------------------------------------------
# All bounds are this project's own: no paper states them. tests/test_collapse.py holds what they tell apart.
ONE_POINT = 1e-3           # 1 - mean cosine below this: all images in one direction
VIEW_RATIO = 0.8           # above this an embedding says next to nothing of its image
SHRUNK = 0.3               # raw std below this share of the untrained network's: training has shrunk it
SHRUNK_VIEW_RATIO = 0.45   # takes VIEW_RATIO's place where training has shrunk it
THINNER = 0.5              # participation or RankMe below this share of the untrained network's: narrower
FALLEN = 0.2               # participation below this share of the untrained network's: no collapse, but said
POINTED = 0.9              # mean cosine above this: images have one direction in common, and little beside it
POINT = 0.05               # of the images at one point: more are no accident of the data
DISTINCT = 0.25            # share of distinct embeddings: fewer are not


def _too_thin(panel):
    """Which measure of dimensions lies below its bound, in words, or "".

    Participation: nine tenths of the variance on one axis. RankMe: the 3/8th power of what the sample and the
    width allow; the same of axes, since a little noise in all others lifts RankMe.
    """
    samples, width = panel["samples"], panel["width"]
    centred = min(samples - 1, width)
    bounds = {"participation": (1.25 - 0.25 / centred, centred),
              "RankMe": (centred ** 0.375, min(samples, width))}
    for name, (least, most) in bounds.items():
        if panel[name] < least and most > 1:
            return f"{name} is {panel[name]:.2f} of at most {most} (bound {least:.2f})"
    axes = panel.get("axes", math.inf)
    if axes < centred ** 0.375 and centred > 1:
        some = "one axis holds" if axes == 1 else f"{axes} axes of at most {centred} hold"
        return f"{some} 99 % of the variance (bound {centred ** 0.375:.2f})"
    return ""


def _part_at_a_point(panel):
    """Which part of the images has collapsed though the whole has not, in words, or ""."""
    share = panel.get("at one point", 0.)
    if share >= POINT and share * panel.get("sample", panel["samples"]) >= 4:
        return f"{share:.0%} of the images lie at one point (bound {POINT:.0%})"
    if panel.get("distinct", 1.) < DISTINCT:
        return f"only {panel['distinct']:.2%} of the embeddings are distinct (bound {DISTINCT:.0%})"
    points = panel.get("classes at one point", [])
    if points:
        names = ", ".join(map(str, points[:3])) + ", ..." * (len(points) > 3)
        return f"each at one point are the images of {len(points)} of {panel['classes']} classes ({names})"
    return ""


def _narrower(panel, untrained):
    """Whether training has made the embeddings narrower, in words, or ""."""
    for name, bound in (("raw std", SHRUNK), ("participation", THINNER), ("RankMe", THINNER)):
        share = panel[name] / max(untrained[name], 1e-30)
        if share < bound:
            return f"{name} is {share:.2g} of the untrained network's (bound {bound})"
    return ""


def _as_before(panel, untrained):
    """Whether all measures are within a tenth of those before training."""
    names = "view ratio", "raw std", "std", "RankMe", "participation"
    return all(abs(panel[name] - untrained[name]) <= 0.1 * abs(untrained[name]) for name in names)


def _remarks(panel, untrained=None):
    """What else is to be known, in words that end a sentence."""
    remarks = ""
    if untrained and panel["participation"] < FALLEN * untrained["participation"]:
        share = panel["participation"] / untrained["participation"]
        remarks += f"; participation has fallen to {share:.2f} of the untrained network's"
    if panel["cosine"] > POINTED:
        remarks += f"; the mean cosine of two images is {panel['cosine']:.3f}"
    if panel.get("dead"):
        remarks += f"; {panel['dead']:,} of {panel['width']:,} dimensions are dead"
    if "sample" in panel:
        remarks += f"; equal images were sought among {panel['sample']:,}"
    return remarks


def verdict(panel, untrained=None):
    """One sentence from a collapse_panel: which collapse, by which criterion, its value and its bound.

    COLLAPSED               all images at one point; or a view ratio near 1 and embeddings in few dimensions
                            that training has made narrower; or a ratio near 1/2 and embeddings that it has
                            shrunk; "or not trained yet" for a ratio near 1 where there is no `untrained`
    DIMENSIONAL COLLAPSE    embeddings know their images, but on a line or in few dimensions
    PARTIAL COLLAPSE        a part of the images at one point, most of them equal to others, or a class
    NOT SPREAD YET          blind to its image, but no narrower than before training, or narrower and still
                            in many dimensions; or in few dimensions beside one that all share, not shrunk
    NOTHING LEARNT YET      views, spread and ranks are within a tenth of those before training
    CANNOT TELL             without views, or with equal ones: spread, which noise would be, too; of width 1
    No collapse             none of these
    NOT FINITE              some rows: how many, which, and the verdict on the rest
    OUTLIERS                hold most of the variance: how many, which, and the verdict on the rest

    untrained: the panel of the same network before training, on the same images. Without it an embedding that
    says nothing of its image is called collapsed although it may not be trained yet. ValueError if it is of
    another width.
    """
    if "not finite" in panel:
        rows = ", ".join(map(str, panel["not finite rows"][:3])) + ", ..." * (panel["not finite"] > 3)
        of = panel["samples"] + panel["not finite"] + panel.get("outliers", 0)
        rest = {name: value for name, value in panel.items() if not name.startswith("not finite")}
        if panel["not finite"] > of / 10 or panel["samples"] < 4:
            return f"COLLAPSED: {panel['not finite']:,} of {of:,} embeddings are not finite (rows {rows})."
        return f"NOT FINITE: {panel['not finite']:,} of {of:,} embeddings (rows {rows}). The rest: " + \
            verdict(rest, untrained)
    if "outliers" in panel:
        rest = {name: value for name, value in panel.items() if not name.startswith("outlier")}
        rows = ", ".join(map(str, panel["outlier rows"][:3])) + ", ..." * (panel["outliers"] > 3)
        of = panel["samples"] + panel["outliers"]
        held = f"{panel['outliers']:,} of {of:,} embeddings (rows {rows}) hold {panel['outlier share']:.0%}"
        return f"OUTLIERS: {held} of the variance. The rest: {verdict(rest, untrained)}"
    if untrained and not math.isfinite(untrained["raw std"]):
        untrained = None
    if untrained and untrained["width"] != panel["width"]:
        raise ValueError(f"untrained is of width {untrained['width']}, the panel of {panel['width']}: of one "
                         "network they must be")
    away = 1 - panel["cosine"]
    if panel["raw std"] == 0:
        return "COLLAPSED: all embeddings are equal."
    if not math.isfinite(panel["raw std"]):
        return "COLLAPSED: embeddings are too large, their variance is not finite."
    if panel["width"] == 1:
        return "CANNOT TELL: of width 1, embeddings have no dimensions that could collapse."
    narrower = _narrower(panel, untrained) if untrained else ""
    if away < ONE_POINT:
        direction = f"1 - mean cosine is {away:.1g} (bound {ONE_POINT})"
        if untrained and not narrower and 1 - untrained["cosine"] < 2 * ONE_POINT:
            return f"NOT SPREAD YET: all images point in one direction, {direction}, as before training."
        return f"COLLAPSED: all images point in one direction, {direction}."

    thin = _too_thin(panel)
    ratio = panel.get("view ratio", 0.)
    seen = f"the squared distance of two views of an image is {ratio:.2f} of that of two images"
    if narrower.startswith("raw std") and ratio > SHRUNK_VIEW_RATIO:
        return f"COLLAPSED: {seen} (bound {SHRUNK_VIEW_RATIO}), and {narrower}."
    if ratio > VIEW_RATIO:
        blind = f"{seen} (bound {VIEW_RATIO})"
        if untrained is None:
            return f"COLLAPSED, or not trained yet: {blind}."
        if thin and narrower:
            return f"COLLAPSED: {blind}, {thin}, and {narrower}."
        if narrower:
            return f"NOT SPREAD YET: {blind}; {narrower}, but they do not lie in few dimensions."
        return f"NOT SPREAD YET: {blind}, but no narrower than before training."
    if thin:
        if untrained and panel["cosine"] > POINTED and not narrower.startswith("raw std"):
            share = panel["raw std"] / max(untrained["raw std"], 1e-30)
            return (f"NOT SPREAD YET: {thin} and the mean cosine of two images {panel['cosine']:.3f}, but "
                    f"raw std is {share:.2g} of the untrained network's (bound {SHRUNK}): a plateau, or the "
                    "way into a dimensional collapse.")
        return f"DIMENSIONAL COLLAPSE: {thin}."
    part = _part_at_a_point(panel)
    if part:
        return f"PARTIAL COLLAPSE: {part}, if no more of the images themselves are equal{_remarks(panel)}."
    most = min(panel["samples"] - 1, panel["width"])
    if not panel.get("alignment"):
        spread = f"spread in {panel['participation']:.0f} of at most {most} dimensions"
        equal = "alignment" in panel
        lack = "where the two views of an image are equal" if equal else "without two views of each image"
        return f"CANNOT TELL: {spread}, but {lack} noise cannot be told from images{_remarks(panel)}."
    if untrained and "view ratio" in untrained and _as_before(panel, untrained):
        return f"NOTHING LEARNT YET: {seen}, and all measures are within a tenth of those before training."
    of_it = f" of at most {most}" * (panel["samples"] <= panel["width"])    # RankMe, not centred, may be more
    ranks = f"participation is {panel['participation']:.1f}{of_it} and RankMe {panel['RankMe']:.0f}"
    most = min(panel["samples"], panel["width"])
    return f"No collapse: {seen}, {ranks} of at most {most}{_remarks(panel, untrained)}."


class CollapseWatch:
    """watch() -> the verdict on a network as it is now, beside what it was when the watch was made.

    embed: inputs -> embeddings [N, D], a module or any function; x, x1, x2: N images and two views of each.
    network: the module that is in eval mode meanwhile, and as it was afterwards; embed, if that is one: of a
    function say which it calls, or dropout and running means see these images, too.
    `panel` holds the last measures, `untrained` the first.
    """

    def __init__(self, embed, x, x1, x2, network=None):
        self.embed, self.inputs = embed, (x, x1, x2)
        self.network = embed if network is None else network
        self.untrained = self.panel = self.measure()

    @torch.no_grad()
    def measure(self):
        modules = [*self.network.modules()] if isinstance(self.network, torch.nn.Module) else []
        training = [module.training for module in modules]
        try:
            for module in modules:
                module.training = False
            return collapse_panel(*(self.embed(x) for x in self.inputs))
        finally:
            for module, mode in zip(modules, training):
                module.training = mode

    def __call__(self):
        self.panel = self.measure()
        return verdict(self.panel, self.untrained)


# ---- Neighbours --------------------------------------------------------------------------------------------
def _labels(y, count, name):
    """Labels [N] or [N, 1], tensor, array or list -> int64 [N]; ValueError if they are none of `count`."""
    try:
        if type(y).__module__ == "numpy" and y.dtype.kind in "biuf":     # reversed, of another byte order
            y = y.astype(y.dtype.newbyteorder("="), order="C")
        y = torch.as_tensor(y)
        whole = not y.is_complex()
        if y.is_floating_point():
            whole = bool(((y == y.round()) & (y.abs() < 2**63)).all())
    except (TypeError, ValueError, RuntimeError):        # of words, ragged
        whole = False
    if not whole or [*y.shape] not in ([count], [count, 1]):
        got = f"{y.dtype} {[*y.shape]}" if hasattr(y, "shape") else type(y).__name__
        raise ValueError(f"{name} must be whole numbers [{count}] or [{count}, 1], got {got}")
    return y.flatten().long()


def _features(h, name, width=None):
    """[N, E] in fp32 or finer; ValueError if a row is not finite, or the shape is none."""
    h = torch.as_tensor(h)
    if h.ndim != 2 or not h.is_floating_point() or not h.numel() or width not in (None, h.shape[1]):
        wide = "E" if width is None else width
        raise ValueError(f"{name} must be float features [N, {wide}], got {h.dtype} {[*h.shape]}")
    rows = (~h.isfinite().all(dim=1)).nonzero().flatten()
    if len(rows):
        first = ", ".join(map(str, rows[:3].tolist()))
        raise ValueError(f"{len(rows):,} of {len(h):,} rows of {name} are not finite: {first}, ...")
    return h.to(torch.promote_types(h.dtype, torch.float32))


def _known(h, y, h_test, y_test):
    h = _features(h, "h")
    h_test = _features(h_test, "h_test", h.shape[1])
    work = torch.promote_types(h.dtype, h_test.dtype)
    h, h_test = h.to(work), h_test.to(h.device, work)
    y, y_test = _labels(y, len(h), "y"), _labels(y_test, len(h_test), "y_test")
    return h, y.to(h.device), h_test, y_test.to(h.device)


def _unit(h):
    """Unit vectors, zeros for zeros; where squares would be too large or too small, of scaled rows."""
    largest = h.abs().amax(dim=1, keepdim=True)
    if ((largest > 1e15) | (largest < 1e-10)).any():
        h = h / largest.clamp(min=torch.finfo(h.dtype).tiny)
    return F.normalize(h)


def _for_cosines(h_test, h):
    """Rows whose products are cosines, or, where all directions are nearly one, these less a number of each
    query's own: of what is left without the mean, since of 0.9999997 fp32 has no digit more."""
    unit = _unit(h)
    mean = unit.mean(dim=0, dtype=torch.float64)
    if mean.square().sum() < 1 - ONE_POINT:
        return _unit(h_test), unit
    rest, rest_test = _unit(h.double()) - mean, _unit(h_test.double()) - mean
    bank = torch.cat([rest, rest @ mean[:, None]], dim=1)
    query = F.pad(rest_test, (0, 1), value=1)
    return query.to(h.dtype), bank.to(h.dtype)


@torch.no_grad()
def knn_accuracy(h, y, h_test, y_test, k=5, temperature=0.07):
    """Share of test features whose class the k nearest of h name, by votes exp(cosine / temperature); exact.

    h [N, E] of any float dtype, y whole numbers [N] or [N, 1]; h_test [M, E], y_test [M] or [M, 1]; tensors
    or NumPy arrays; in fp32 or finer. Wu et al., arXiv 1805.01978, vote so with k = 200. ValueError for rows
    that are not finite, lengths that do not agree, k < 1, a temperature that is not above 0.
    """
    h, y, h_test, y_test = _known(h, y, h_test, y_test)
    if not (k >= 1 and 0 < temperature < math.inf):
        raise ValueError(f"knn_accuracy takes k >= 1 and a finite temperature > 0, got {k} and {temperature}")
    cosine, row = bank_topk(*_for_cosines(h_test, h), min(int(k), len(h)))             # [M, k] each
    names, y = y.unique(return_inverse=True)
    votes = cosine.new_zeros(len(h_test), len(names), dtype=torch.float64)
    cosine = cosine.double()
    votes.scatter_add_(1, y[row], ((cosine - cosine[:, :1]) / temperature).exp())
    return (names[votes.argmax(dim=1)] == y_test).double().mean().item()


@torch.no_grad()
def few_label_accuracy(h, y, h_test, y_test, labels, draws=10):
    """Accuracy of the nearest class mean, from `labels` images a class; mean over `draws` choices of them.

    Other arguments as above. Features less the mean of all h, which needs no labels, at unit length:
    SimpleShot's CL2N, Wang et al., arXiv 1911.04623. A class of fewer images has all of them taken.
    """
    h, y, h_test, y_test = _known(h, y, h_test, y_test)
    if labels < 1 or draws < 1:
        raise ValueError(f"few_label_accuracy takes labels >= 1 and draws >= 1, got {labels} and {draws}")
    if max(h.abs().max(), h_test.abs().max()) > 1e15:    # sums of which would overflow in fp32
        h, h_test = h.double(), h_test.double()
    centre = h.mean(dim=0)
    unit = _unit(h - centre)
    unit_test = _unit(h_test - centre)
    generator = torch.Generator().manual_seed(0)
    classes = y.unique()
    total = 0
    for _ in range(draws):
        order = torch.randperm(len(y), generator=generator, device="cpu").to(y.device)
        chosen = [order[y[order] == name][:labels] for name in classes]
        means = torch.stack([unit[rows].mean(dim=0) for rows in chosen])
        nearest = torch.cdist(unit_test, means).argmin(dim=1)
        total += (classes[nearest] == y_test).double().mean().item()
    return total / draws


if __name__ == "__main__":
    from kernels.harness.instrument import main          # with this module's own name, not as __main__
    main()
