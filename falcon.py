"""FALCON: a fixed random dictionary of codes and a uniform prior, proof against four kinds of collapse.

Sansone, Lebailly, Tuytelaars, arXiv 2410.04959, as the authors' code has it (emsansone/CPLearn). Features h
[n, f] of a view are compared with c codes, random signs W [c, f], never trained: p = softmax(h W^T / tau).

    L = KL(mean p || uniform) + beta CE(p, p')       each a mean over the two views, gradients into both

CE wants each image sure of its code and both views to agree; the prior wants all codes used. Images share
codes only as far as n / c forces them to, and W^T W / c goes to 1: with many codes features fill all of R^f.

    python falcon.py                                    # posed digits
    python falcon.py --codes 16384                      # more codes: less that can collapse
    python falcon.py --prior none                       # collapse, and the meters that show it
    python falcon.py --recipe released                  # the authors' settings, for hours rather than minutes

Expect k-NN accuracy .839 ± .025 and linear .879 ± .028 (mean ± std, 3 seeds; raw pixels .593, .169; random
encoder .307 ± .042, .222 ± .018) in 73 to 84 s on 2 cores of an AMD EPYC with torch 2.13.0.

Deviations from the released code: (1) L2-normalised features (the preprint's), f = 64, c = 512, beta = .7,
lr 6e-3, 45 epochs (release: tanh, 2048, 16,384, 1, 2.5e-4, 1000): a short run does not leave the plateau at
log c otherwise. --recipe released keeps theirs. (2) log mean p by logsumexp: from probabilities it is NaN
once a code underflows. (3) The dictionary comes from a hash of the seed and is in no checkpoint. (4) Small
encoder with GroupNorm; AdamW; views by pose, light, noise. (5) --prior forward is the preprint's form,
known at second hand. (6) The learnable dictionaries are our reading of three names; none is released.
"""
import argparse
import json
import math
import sys
from collections import defaultdict, namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from matplotlib.figure import Figure
from sklearn import datasets, linear_model, manifold, preprocessing
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import train_test_split
from torch import nn
from tqdm import tqdm

from kernels import bank_topk, dictionary_loss, dictionary_reference, dictionary_signs


# ==== The method ============================================================================================
def derived_temperature(n, f, codes, eps=1e-8):
    """tau = f / (sqrt(n) Lam), Lam = log((1 - eps (c - 1)) / eps): the released code's, for n images a view.

    With orthogonal codes, h = w_j / sqrt(n) then gives 1 - eps (c - 1) to code j and eps to each other one.
    ValueError unless 0 < eps < 1 / (c - 1).
    """
    if not 0 < eps * (codes - 1) < 1:
        raise ValueError(f"eps {eps} must be above 0 and below 1 / (codes - 1), {codes} codes at least 2")
    return f / (math.sqrt(n) * math.log((1 - eps * (codes - 1)) / eps))


class Sphere(nn.Module):
    """Rows of length sqrt(f / n): the preprint's features, in place of tanh."""

    def __init__(self, length):
        super().__init__()
        self.length = length

    def forward(self, x):
        return self.length * F.normalize(x)


class FALCON(nn.Module):
    """Encoder, projector (Linear, BatchNorm, tanh or L2 norm), dictionary of `codes` codes in R^sizes[-1].

    batch: images of a view, n. times: temperature over the derived one. prior: reverse, forward or none.
    kind: fixed, or one of three learnable ones, which start at the fixed one and keep its rows' length:
    learned by gradient; hybrid, a quarter of it by gradient; alternating, a step of k-means every 8 batches
    on the features of the last 32.
    """

    def __init__(self, encoder, batch, sizes=(64,), codes=512, norm="l2", prior="reverse", beta=.7, times=1.,
                 eps=1e-8, kind="fixed", seed=0):
        super().__init__()
        features = sizes[-1]
        self.encoder, self.prior, self.beta, self.kind = encoder, prior, beta, kind
        self.features, self.codes, self.seed = features, codes, seed
        self.temperature = times * derived_temperature(batch, features, codes, eps)
        layers = []
        for width, size in zip((encoder.features, *sizes), sizes):
            layers += [nn.Linear(width, size), nn.BatchNorm1d(size), nn.ReLU()]
        final = nn.Tanh() if norm == "tanh" else Sphere(math.sqrt(features / batch))
        self.projector = nn.Sequential(*layers[:-1], final)
        if kind != "fixed":
            moving = dictionary_signs(max(1, codes // 4) if kind == "hybrid" else codes, features, seed)
            self.moving = nn.Parameter(moving, requires_grad=kind != "alternating")
        if kind == "alternating":
            self.register_buffer("seen", torch.zeros(32, 2 * batch, features))
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def dictionary(self):
        """W [codes, features], rows of length sqrt(features)."""
        device = next(self.parameters()).device
        fixed = dictionary_signs(self.codes, self.features, self.seed, device=device)
        if self.kind == "fixed":
            return fixed
        return torch.cat([F.normalize(self.moving) * math.sqrt(self.features), fixed[len(self.moving):]])

    @torch.no_grad()
    def cluster(self, h):
        """h [2n, f] -> one step of k-means: codes move to the mean of the features nearest to them."""
        self.seen[self.count % 32] = h
        self.count += 1
        if self.count % 8 == 0:
            h = self.seen[:self.count].flatten(0, 1)
            code = bank_topk(h, self.dictionary(), 1)[1][:, 0]
            means = torch.zeros_like(self.moving).index_add_(0, code, h)
            used = means.norm(dim=1) > 0
            self.moving[used] = F.normalize(means[used]) * math.sqrt(self.features)

    def forward(self, view1, view2, index=None):
        """Views [B, C, *S] -> terms, whose sum is optimised, and notes, which are only logged."""
        h1, h2 = (self.projector(h) for h in self.encoder(torch.cat([view1, view2])).chunk(2))   # [B, f] each
        prior = "reverse" if self.prior == "none" else self.prior
        if self.kind == "fixed":
            kl, ce = dictionary_loss(h1, h2, self.codes, self.seed, self.temperature, prior)
        else:
            if self.kind == "alternating" and self.training:
                self.cluster(torch.cat([h1, h2]).float())
            with torch.autocast(h1.device.type, enabled=False):
                h1, h2, W = h1.float(), h2.float(), self.dictionary()
                kl, ce = dictionary_reference(h1, h2, W, self.temperature, prior)
        if self.prior == "none":
            return {"cross_entropy": self.beta * ce}, {"prior": kl}
        return {"prior": kl, "cross_entropy": self.beta * ce}, {}


def entropy(p):
    """-sum p log p in nats; p >= 0 sums to 1."""
    return -torch.special.xlogy(p, p).sum().item()


@torch.no_grad()
def collapse_meters(model, images, mixtures=(10,), samples=2000):
    """What tells the four collapses apart, on features h [N, f] of images, -> {name: number}.

    representation: std over images, mean over features; mean cosine of pairs (1: one point)
    dimensional: exp entropy of the eigenvalues of M = h^T h / N, uncentred (f: all dimensions alike); rms of
    M's off-diagonal over the mean of its diagonal
    cluster: codes that are some image's most likely one; entropy of the mean assignment (log c: uniform)
    intracluster: entropy of a mixture of K diagonal Gaussians fitted to h, over f (low: points, not clouds)
    """
    h, = encode(lambda x: model.projector(model.encoder(x)), images)                     # [N, f]
    n, W, unit = len(h), model.dictionary().cpu(), F.normalize(h)
    code, p = assign(h, W, model.temperature)
    M = h.double().T @ h.double() / n
    spectrum = torch.linalg.eigvalsh(M).clamp(min=0)
    diagonal = M.diagonal()
    off = (M - diagonal.diag()).square().sum() / (len(M) * (len(M) - 1))
    meters = {"std": h.std(0).mean().item(),
              "cosine": ((unit.sum(0).square().sum() - n) / (n * (n - 1))).item(),
              "dimensions": math.exp(entropy(spectrum / spectrum.sum())),
              "off_diagonal": (off.sqrt() / diagonal.mean()).item(),
              "codes": len(code.unique()), "assignment_entropy": entropy(p)}
    for k in (k for k in mixtures if k <= n):
        mixture = GaussianMixture(k, covariance_type="diag", init_params="random_from_data", random_state=0)
        drawn = mixture.fit(h.numpy()).sample(samples)[0]
        meters[f"mixture_entropy_{k}"] = -float(mixture.score_samples(drawn).mean()) / h.shape[1]
    return meters


def assign(h, W, temperature):
    """Most likely code [N] and mean assignment [c] of h [N, f] to W [c, f]."""
    code, total = [], 0
    for rows in h.split(64):
        s = rows @ W.T                                               # [64, c]
        code.append(s.argmax(1))
        total = total + (s / temperature).softmax(1).sum(0)
    return torch.cat(code), total / len(h)


def loss_values(n, codes, used, beta=1., eps=1e-8, prior="reverse"):
    """{what the features do: the least loss then}, derived for the reverse prior; of others the optimum."""
    rest, most, used = eps * (codes - 1), min(1, beta), min(used, n)                 # a batch uses at most n
    optimum = -beta * ((1 - rest) * math.log1p(-rest) + rest * math.log(eps))
    if prior == "forward":
        return {"optimum": optimum + math.log(codes)}
    if prior == "none":
        return {"optimum, one code for all": optimum}
    times = "" if beta >= 1 else f"{beta:g} "
    return {f"representation collapse, {times}log c": most * math.log(codes),
            f"cluster collapse to {used} codes, {times}log(c / {used})": most * math.log(codes / used),
            "optimum": max(optimum, most * math.log(codes / n))}


# ==== The same in every script ==============================================================================
# ---- Encoder -----------------------------------------------------------------------------------------------
def conv_norm(conv, width_in, width, kernel=3, stride=1):
    """Convolution and GroupNorm, which looks at one sample at a time."""
    return nn.Sequential(conv(width_in, width, kernel, stride, kernel // 2, bias=False),
                         nn.GroupNorm(math.gcd(8, width), width))


class Block(nn.Module):
    """Basic residual block; a stride halves the canvas and the skip follows by a 1x1 convolution."""

    def __init__(self, conv, width_in, width, stride):
        super().__init__()
        self.body = nn.Sequential(conv_norm(conv, width_in, width, 3, stride), nn.ReLU(),
                                  conv_norm(conv, width, width))
        self.skip = nn.Identity() if width_in == width else conv_norm(conv, width_in, width, 1, stride)

    def forward(self, x):
        return F.relu(self.skip(x) + self.body(x))


class Encoder(nn.Module):
    """Compact ResNet, 3x3 stem, no max-pool: [B, C, H, W] or [B, C, D, H, W] -> h [B, 8 width]."""

    def __init__(self, channels, axes, width=16, depth=1):
        super().__init__()
        self.config, self.features = dict(channels=channels, axes=axes, width=width, depth=depth), 8 * width
        conv = nn.Conv2d if axes == 2 else nn.Conv3d
        widths = [width] + [width * 2 ** stage for stage in (1, 2, 3) for _ in range(depth)]
        self.stem = nn.Sequential(conv_norm(conv, channels, width), nn.ReLU())
        self.stages = nn.Sequential(*(Block(conv, a, b, 1 + (a < b)) for a, b in zip(widths, widths[1:])))
        self.to(memory_format=torch.channels_last if axes == 2 else torch.channels_last_3d)

    def forward(self, x):
        return self.stages(self.stem(x)).flatten(2).mean(2)          # [B, 8 width, *S/8] -> [B, 8 width]


# ---- Data and augmentation ---------------------------------------------------------------------------------
Data = namedtuple("Data", "images labels test_images test_labels")   # [N, C, *S] float32; [N] int64 or None


def draw(x, generator, low, high, *shape):
    """Uniform numbers for each sample of x: [N, *shape]."""
    return torch.empty(len(x), *shape, device=x.device).uniform_(low, high, generator=generator)


def warp(x, angles, scale, shift, size):
    """Rotate, scale about the centre, then shift each of x [N, C, *S], images or volumes; one resampling.

    angles [N, 1], in 3-D rotation vectors [N, 3], radians; scale [N]; shift [N, axes], half canvases
    -> [N, C, *size], 0 outside.
    """
    axes = x.ndim - 2
    i, j = torch.triu_indices(axes, axes, 1, device=x.device)        # the planes of rotation
    skew = x.new_zeros(len(x), axes, axes)
    skew[:, i, j], skew[:, j, i] = angles, -angles
    aspect = x.new_tensor(size[::-1])                                # grids count in half canvases, x first
    inverse = torch.linalg.matrix_exp(skew) / scale[:, None, None] * aspect / aspect[:, None]
    theta = torch.cat([inverse, -inverse @ shift[:, :, None]], 2)    # [N, axes, axes + 1]
    grid = F.affine_grid(theta, [len(x), x.shape[1], *size], align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def random_view(x, generator):
    """A random pose, contrast, brightness, noise for each of x [N, C, *S]; if C = 3 colour and flip too."""
    u, axes, one = partial(draw, x, generator), x.ndim - 2, [1] * (x.ndim - 1)
    x = warp(x, u(-.45, .45, axes * (axes - 1) // 2), u(-.4, .4).exp(), u(-.25, .25, axes), x.shape[2:])
    if x.shape[1] == 3:
        x = x * u(.7, 1.3, 3, *one[1:])                              # colour cast
        gray = x.mean(1, keepdim=True).expand_as(x)
        x = torch.where(u(0, 1, *one) < .2, gray, torch.lerp(gray, x, u(.6, 1.4, *one)))      # saturation
        x = torch.where(u(0, 1, *one) < .5, x.flip(-1), x)
    x = x * u(.6, 1.4, *one) + u(-.2, .2, *one)
    return x + u(0, .1, *one) * torch.empty_like(x).normal_(generator=generator)


def two_views(x, generator):
    return random_view(x, generator), random_view(x, generator)


def posed_digits(axes):
    """scikit-learn's 1,797 handwritten digits, each in one pose of its own, whatever the run's seed.

    2-D: on a 20 x 20 canvas. 3-D: slabs two voxels thick in 16^3. 1,437 train; 360 test, in four poses each.
    """
    digits, generator = datasets.load_digits(), torch.Generator().manual_seed(0)
    train, test = train_test_split(range(1797), test_size=360, stratify=digits.target, random_state=0)
    rows, n = train + 4 * test, len(train)
    x = torch.tensor(digits.images[rows, None] / 16, dtype=torch.float32)                # [N, 1, 8, 8]
    if axes == 3:
        x = F.pad(repeat(x, "n c h w -> n c 2 h w"), (0, 0, 0, 0, 3, 3))                 # [N, 1, 8, 8, 8]
    angle, low, high, shift, size = (30, .45, .75, .3, 20) if axes == 2 else (25, .55, .85, .2, 16)
    u = partial(draw, x, generator)
    angles = u(-angle, angle, axes * (axes - 1) // 2).deg2rad()
    x = warp(x, angles, u(low, high), u(-shift, shift, axes), [size] * axes)
    x = x + .1 * torch.randn(x.shape, generator=generator)
    y = torch.tensor(digits.target[rows])
    return Data(x[:n], y[:n], x[n:], y[n:])


def read_npz(path):
    """MedMNIST's layout: train_images [N, *S] or [N, *S, 3], uint8 or in [0, 1]; other keys are optional."""
    keys = [f"{split}_{kind}" for split in ("train", "val", "test") for kind in ("images", "labels")]
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in keys if key in archive}
    except Exception as error:                                       # a bad archive raises any of seven kinds
        die(f"{path} cannot be read as .npz ({error}): check the path, or fetch the file again")

    def split(name):
        x, y = arrays.get(f"{name}_images"), arrays.get(f"{name}_labels")
        if x is None:
            die(f"{path} has no {name}_images: the keys are {', '.join(keys)}, all but train_images optional")
        colour = x.ndim in (4, 5) and x.shape[-1] in (1, 3)          # channels stand last in this layout
        if x.ndim - colour not in (3, 4) or min(x.shape[:-1]) < 4 or x.dtype.kind not in "uif":
            die(f"{path}: {name}_images is {x.dtype} {list(x.shape)}, not [N, H, W(, 3)], [N, D, H, W(, 3)]")
        x = torch.from_numpy(x.astype(np.float32) / (255 if x.dtype == np.uint8 else 1))
        x = rearrange(x, "n ... c -> n c ..." if colour else "n ... -> n 1 ...").contiguous()
        if not (x.min() >= 0 and x.max() <= 1):                      # NaN fails both
            die(f"{path}: {name}_images holds NaN or values outside [0, 1] (uint8: 0 to 255): clean it first")
        if y is None or y.size != len(x) or y.dtype.kind not in "ui" or y.min() < 0:
            return x, None
        return x, torch.from_numpy(y.reshape(-1).astype(np.int64))

    x, y = split("train")
    if "test_images" in arrays or "val_images" in arrays:
        test = split("test" if "test_images" in arrays else "val")
        if test[0].shape[1:] != x.shape[1:]:
            die(f"{path}: images of {list(x.shape[1:])} for training, {list(test[0].shape[1:])} for testing")
        return Data(x, y, *test)
    held = torch.isin(torch.arange(len(x)), subset(len(x), len(x) // 5))     # a fifth is held out
    return Data(x[~held], None if y is None else y[~held], x[held], None if y is None else y[held])


def load_data(name, imbalance=1.):
    """digits, digits3d or a .npz file; imbalance R thins training class k of K by R^(-k/(K-1))."""
    data = posed_digits(2 if name == "digits" else 3) if name in ("digits", "digits3d") else read_npz(name)
    if data.labels is None or data.test_labels is None or len(data.labels.unique()) < 2:
        print("no class labels, one an image, for both training and test: the probes are left out")
        data = data._replace(labels=None, test_labels=None)
    if imbalance > 1:
        if data.labels is None:
            die(f"--imbalance needs class labels for training and test, and {name} lacks some")
        classes, counts = data.labels.unique(return_counts=True)
        shares = imbalance ** -torch.linspace(0, 1, len(classes))
        rows = torch.cat([(data.labels == c).nonzero()[:n, 0]
                          for c, n in zip(classes, (counts.max() * shares).round().clamp(min=1).long())])
        data = data._replace(images=data.images[rows], labels=data.labels[rows])
    return data


# ---- Probes and collapse panel -----------------------------------------------------------------------------
def subset(n, most=2000):
    """Up to `most` of n row numbers, always the same ones, in random order."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:most]


@torch.no_grad()
def encode(function, *stacks):
    """function(images), in batches of 256, for each stack of images: fp32, on the CPU."""
    return [torch.cat([function(batch).float().cpu() for batch in images.split(256)]) for images in stacks]


def knn_accuracy(h, y, h_test, y_test, k=5, temperature=.07):
    """The k nearest of h [N, E] by cosine vote exp(cosine / temperature) for their class. Exact."""
    similarity, row = bank_topk(F.normalize(h_test), F.normalize(h), min(k, len(h)))     # [n, k] each
    votes = torch.zeros(len(h_test), int(y.max()) + 1)
    votes.scatter_add_(1, y[row], (similarity / temperature).exp())
    return (votes.argmax(1) == y_test).double().mean().item()


def probe(data, h, h_test):
    """k-NN and linear accuracy; linear: logistic regression on up to 10,000 standardised features."""
    if data.labels is None:
        return math.nan, math.nan
    scaler, rows = preprocessing.StandardScaler().fit(h), subset(len(h), 10_000)
    linear = linear_model.LogisticRegression(max_iter=2000).fit(scaler.transform(h[rows]), data.labels[rows])
    return (knn_accuracy(h, data.labels, h_test, data.test_labels),
            linear.score(scaler.transform(h_test), data.test_labels))


def collapse_panel(z, z1, z2):
    """z [N, D] of images, z1, z2 of two views of each, N >= 4 -> eight numbers; README says how to read them.

    Std per dimension of z; of z/|z|, x sqrt(D); mean cosine of pairs; RankMe, uncentred (arXiv 2210.02885);
    participation ratio of the covariance; alignment, uniformity (arXiv 2005.10242); TwoNN (Facco 2017).
    """
    z, z1, z2 = z.double(), z1.double(), z2.double()
    n, unit = len(z), F.normalize(z)
    p = torch.linalg.svdvals(z)
    p = p / p.sum() + 1e-7
    spectrum = torch.linalg.svdvals(z - z.mean(0)).square()
    near = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist").topk(3, largest=False).values[:, 1:]
    near = near[near[:, 0] > 0]                                      # a duplicate has no ratio of distances
    return {"raw std": z.std(0).mean().item(),
            "std": (unit.std(0).mean() * z.shape[1] ** .5).item(),
            "cosine": ((unit.sum(0).square().sum() - n) / (n * (n - 1))).item(),
            "RankMe": torch.exp(-(p * p.log()).sum()).item(),
            "participation": (spectrum.sum() ** 2 / spectrum.square().sum()).item(),
            "alignment": (F.normalize(z1) - F.normalize(z2)).square().sum(1).mean().item(),
            "uniformity": torch.pdist(unit).square().mul(-2).exp().mean().log().item(),
            "TwoNN": (max(0, len(near) - 1) / (near[:, 1] / near[:, 0]).log().sum()).item()}


def verdict(panel, most):
    """One sentence from the panel of the projector's output, where the loss acts; `most` is its full rank."""
    apart = panel["alignment"] / max(2 - 2 * panel["cosine"], 1e-12)     # squared distances: views / images
    seen = (f"raw std {panel['raw std']:.2g} (not near 0), std {panel['std']:.2f} (near 1), distance of "
            f"views / of images {apart:.2f} (near 0), RankMe {panel['RankMe']:.0f} of {most}")
    if not (panel["raw std"] > .02 and panel["std"] > .3 and apart < .8):        # NaN counts as collapsed
        return f"COLLAPSED, embeddings say next to nothing of the image: {seen}."
    if panel["RankMe"] < .03 * most:
        return f"DIMENSIONAL COLLAPSE, embeddings fill few of their dimensions: {seen}."
    return f"No collapse, different images keep different embeddings: {seen}."


# ---- Training ----------------------------------------------------------------------------------------------
def die(message):
    """One line, whatever the message quotes, and exit code 2."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def train(model, optimizer, data, args, folder, state, meters=None):
    """Minimise the sum of model(view1, view2, index)'s terms; a checkpoint and a line of metrics an epoch.

    meters(model in eval mode) -> {name: number}, put into that line as "meters" if given.
    """
    device, history, samples = data.images.device, [], args.batch * args.accumulate
    steps = len(data.images) // samples
    generator = torch.Generator(device).manual_seed(args.seed)       # order, poses, light and noise
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    total, warmup = args.epochs * steps, max(1, args.epochs * steps // 10)
    peak = (samples / 128) ** .5                                     # Adam's noise scale: arXiv 2205.10287
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: peak * min( # linear up, cosine down
        (step + 1) / warmup, .5 + .5 * math.cos(math.pi * max(0, step - warmup) / max(1, total - warmup))))
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    if state:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_rng"])
        history = state["history"]

    def checkpoint():
        whole = {name: part.state_dict() for name, part in parts.items()}
        torch.save({**whole, "config": vars(args), "history": history, "generator": generator.get_state(),
                    "torch_rng": torch.get_rng_state()}, folder / "last.tmp")
        (folder / "last.tmp").replace(folder / "last.pt")            # a kill leaves the old one or the new
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))

    checkpoint()
    forward = torch.compile(model) if args.compile else model
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp)
    with tqdm(total=total, initial=len(history) * steps, unit="step", mininterval=.5) as bar:
        for epoch in range(len(history) + 1, args.epochs + 1):
            model.train()
            sums = defaultdict(float)
            order = torch.randperm(len(data.images), generator=generator, device=device)[:steps * samples]
            for step, indices in enumerate(order.view(steps, args.accumulate, args.batch)):
                optimizer.zero_grad()
                for index in indices:
                    views = two_views(data.images[index], generator)
                    with torch.autocast(device.type, precision, enabled=precision is not None):
                        terms, notes = forward(*views, index)
                    loss = sum(terms.values())
                    scaler.scale(loss / args.accumulate).backward()
                    for name, value in {"loss": loss, **terms, **notes}.items():
                        sums[name] += value.detach() if torch.is_tensor(value) else value
                scaler.step(optimizer)
                scaler.update()
                schedule.step()
                bar.update()
                if step % 10 == 0:
                    bar.set_postfix({name: f"{term.item():.3g}" for name, term in terms.items()}, False)
            batches = steps * args.accumulate
            line = {"epoch": epoch, **{name: float(value) / batches for name, value in sums.items()}}
            if not math.isfinite(line["loss"]):
                bar.close()
                die(f"the loss is {line['loss']} in epoch {epoch}: start anew, lower --lr, another --out")
            model.eval()
            if meters:
                line["meters"] = meters(model)
            if data.labels is not None and epoch % max(1, args.epochs // 8) == 0:
                h, h_test = encode(model.encoder, data.images, data.test_images)
                line["knn"] = knn_accuracy(h, data.labels, h_test, data.test_labels)
            history.append(line)
            checkpoint()
    return history


def draw_pictures(history, h_test, labels, baselines, folder):
    """curves.png: the loss terms and the probe over epochs. embedding.png: test features in 2-D, by class."""
    figure, epochs = Figure(figsize=(11, 3.8), layout="constrained"), range(1, len(history) + 1)
    left, right = figure.subplots(1, 2)
    for name in [name for name in history[0] if name not in ("epoch", "knn", "meters")]:
        left.plot(epochs, [line[name] for line in history], ":" if "floor" in name else "-", label=name)
    right.plot(epochs, [line.get("knn", math.nan) for line in history], "o", label="trained encoder")
    for (name, (knn, _)), style in zip(baselines.items(), ("--", ":")):
        right.axhline(knn, color="gray", ls=style, label=name)
    left.set_yscale("symlog", linthresh=.01, subs=[2, 3, 5])         # logarithmic, but for terms that cross 0
    left.yaxis.set_minor_formatter("{x:g}")                          # a term may stay within a decade
    left.set(xlabel="epoch", ylabel="mean over the epoch")
    right.set(xlabel="epoch", ylabel="k-NN accuracy on test features", xlim=(0, None), ylim=(0, 1))
    for axis in (left, right):
        axis.legend(fontsize=8)
    figure.savefig(folder / "curves.png", dpi=110)
    tsne = manifold.TSNE(perplexity=min(30, len(h_test) / 4), init="pca", random_state=0)
    xy = tsne.fit_transform(preprocessing.StandardScaler().fit_transform(h_test))
    figure = Figure(figsize=(6, 5.2), layout="constrained")
    axis = figure.subplots()
    if labels is None:
        axis.scatter(*xy.T, s=6, c="gray")
    else:
        figure.colorbar(axis.scatter(*xy.T, s=6, c=labels, cmap="tab10"), label="class")
    axis.set(xticks=[], yticks=[], title="t-SNE of the encoder's test features")
    figure.savefig(folder / "embedding.png", dpi=110)


def report(model, data, baselines, history, folder):
    """Probe, panel, pictures, encoder.pt, features.npz, report.json; prints how every run ends."""
    encoder = model.eval().encoder
    h, h_test = encode(encoder, data.images, data.test_images)
    rows = subset(len(h_test))
    shown = data.test_images[rows.to(data.images.device)]
    three = shown, *two_views(shown, torch.Generator(data.images.device).manual_seed(0))
    z = encode(lambda x: model.projector(encoder(x)), *three)
    panels = {"encoder h": collapse_panel(*encode(encoder, *three)), "projector z": collapse_panel(*z)}
    torch.save({"config": encoder.config, "state_dict": encoder.state_dict()}, folder / "encoder.pt")
    labels = {} if data.labels is None else {"train_labels": data.labels, "test_labels": data.test_labels}
    np.savez(folder / "features.npz", train_features=h, test_features=h_test, **labels)
    draw_pictures(history, h_test[rows], None if not labels else data.test_labels[rows], baselines, folder)
    probes = {**baselines, "trained encoder": probe(data, h, h_test)}
    whole = {"k-NN, linear": probes, "panel": panels}
    (folder / "report.json").write_text(json.dumps(whole, indent=1) + "\n")
    if data.labels is not None:
        print(f"\n{'':16}{'k-NN':>8}{'linear':>8}")
        for name, (knn, linear) in probes.items():
            print(f"{name:16}{knn:8.3f}{linear:8.3f}")
    print(f"\n{'':11}" + "".join(f"{name:>14}" for name in panels["encoder h"]))
    for name, panel in panels.items():
        print(f"{name:11}" + "".join(f"{value:14.3g}" for value in panel.values()))
    print(f"\n{verdict(panels['projector z'], min(z[0].shape))}")
    print(f"In {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")


def sizes(text):
    """An option's type: 512-512 -> [512, 512]."""
    layers = [int(size) for size in text.split("-")]
    if min(layers) < 1:
        raise ValueError
    return layers


def between(low, high=math.inf, kind=float):
    """An option's type: numbers in [low, high)."""
    def number(text):
        if not low <= kind(text) < high:
            raise argparse.ArgumentTypeError(f"{text} does not lie in [{low}, {high})")
        return kind(text)
    return number


def options(description, **defaults):
    """The command line that every script has; `defaults` are the script's own."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error, add = die, parser.add_argument
    add("--data", default="digits", help="digits, digits3d, or a .npz file in MedMNIST's layout")
    add("--imbalance", type=float, default=1., help="thin training classes: largest / smallest")
    add("--batch", type=int, help="images at a time; what is left over after the last step is dropped")
    add("--epochs", type=int, help="passes over the training images")
    add("--accumulate", type=int, default=1, help="batches whose gradients are averaged for one step")
    add("--lr", type=float, help="peak learning rate of AdamW is this x sqrt(batch x accumulate / 128)")
    add("--width", type=int, default=16, help="channels of the encoder's stem; features are 8 x this")
    add("--depth", type=int, default=1, help="residual blocks in each of three stages")
    add("--seed", type=int, default=0, help="of weights, order and views; not of the data")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    add("--amp", default="off", choices=["off", "bf16", "fp16"], help="mixed precision; losses stay fp32")
    add("--compile", action="store_true", help="torch.compile the model; the first step takes a minute")
    add("--out", help="run folder, new or empty; if not given runs/SCRIPT-1, -2, ...")
    add("--resume", metavar="FOLDER", help="continue the run in this folder, with its own options")
    parser.set_defaults(**defaults)
    return parser


def begin(parser, least_batch=1, check=None):
    """Parse, check, load -> args, data on the device, the run's folder, the state to resume from or None.

    check(args, data) may die of what the method cannot take; nothing is written before.
    """
    args, state = parser.parse_args(), None
    folder = Path(args.out) if args.out else None
    if args.resume:
        if {word.split("=")[0] for word in sys.argv[1:] if word[:2] == "--"} != {"--resume"}:
            die("--resume takes no other option: the run keeps its own")
        folder = Path(args.resume)
        try:
            state = torch.load(folder / "last.pt", map_location="cpu", weights_only=True)
            if state["config"].keys() != vars(args).keys():
                raise ValueError("it is another script's")
        except Exception as error:                                   # missing, cut short, not a checkpoint
            die(f"cannot resume {folder}, its last.pt is no whole checkpoint ({error}): start a new run")
        args = argparse.Namespace(**state["config"])
    least = dict(batch=least_batch, accumulate=1, epochs=1, lr=0, seed=0, width=1, depth=1, imbalance=1)
    for name, bound in least.items():
        if not getattr(args, name) >= bound:
            die(f"--{name} {getattr(args, name)} is too small: it must be at least {bound} here")
    data = load_data(args.data, args.imbalance)
    if max(2, args.batch * args.accumulate) > len(data.images) or len(data.test_images) < 4:
        die(f"{args.data} has {len(data.images)} training and {len(data.test_images)} test images: --batch "
            f"{args.batch} x {args.accumulate} needs as many of the first, the panel 4 of the second")
    if args.amp != "off" and args.device == "cpu" and data.images.ndim == 5:
        die("--amp with volumes needs a GPU: on CPUs oneDNN's bf16 gradient is wrong on 2 x 2 x 2 canvases")
    if check:
        check(args, data)
    try:
        data = data._replace(images=data.images.to(args.device), test_images=data.test_images.to(args.device))
        numbered = (Path("runs", f"{Path(sys.argv[0]).stem}-{k}") for k in range(1, 10 ** 6))
        folder = folder or next(path for path in numbered if not path.exists())
        folder.mkdir(parents=True, exist_ok=bool(args.out or state))
        if not state and any(folder.iterdir()):
            die(f"{folder} is not empty: choose another --out, or continue with --resume {folder}")
        (folder / "config.json").write_text(json.dumps(vars(args), indent=1) + "\n")
    except (RuntimeError, AssertionError) as error:
        die(f"cannot use --device {args.device} ({str(error).splitlines()[0]}): try --device cpu")
    except OSError as error:
        die(f"cannot write into {folder} ({error.strerror}): choose another --out")
    return args, data, folder, state


# ==== Command line ==========================================================================================
RECIPES = {
    "default": dict(batch=64, epochs=45, lr=6e-3, weight_decay=.05,
                    projector=[64], codes=512, norm="l2", beta=.7),
    "released": dict(batch=64, epochs=1000, lr=2.5e-4 * 2 ** .5, weight_decay=1e-4,
                     projector=[2048], codes=16384, norm="tanh", beta=1.)}


def draw_meters(history, codes, values, h_test, folder):
    """meters.png: the loss beside its derived values, and the meters of each collapse."""
    figure, epochs = Figure(figsize=(11, 6), layout="constrained"), range(1, len(history) + 1)
    axes, meters = figure.subplots(2, 3).ravel(), [line["meters"] for line in history]
    axes[0].plot(epochs, [line["loss"] for line in history], label="loss")
    for (name, value), style in zip(values.items(), ("--", "-.", ":")):
        axes[0].axhline(value, color="gray", ls=style, label=name)
    axes[0].set(title="loss", ylim=(0, 1.6 * axes[0].get_ylim()[1]))
    for axis, title, name, label in [
            (axes[1], "representation collapse", "std", "std of a feature"),
            (axes[1], "representation collapse", "cosine", "mean cosine of two images"),
            (axes[2], "dimensional collapse", "dimensions", f"dimensions in use of {h_test.shape[1]}"),
            (axes[4], "cluster collapse", "codes", f"codes in use of {codes}"),
            (axes[4], "cluster collapse", "assignment_entropy",
             f"entropy of mean p, at most {math.log(codes):.1f}"),
            (axes[5], "intracluster collapse", "mixture_entropy_10", "entropy of 10 Gaussians / f")]:
        axis.plot(epochs, [line.get(name, math.nan) for line in meters], label=label)
        axis.set(title=title, xlabel="epoch")
    axes[4].set(yscale="log")
    spectrum = torch.linalg.eigvalsh(h_test.double().T @ h_test.double() / len(h_test)).flip(0)
    axes[3].semilogy(range(1, len(spectrum) + 1), spectrum.clamp(min=1e-12), label="of h's second moment")
    axes[3].set(title="dimensional collapse", xlabel="singular value, by size")
    for axis in axes:
        axis.legend(fontsize=7)
    figure.savefig(folder / "meters.png", dpi=110)


def report_collapses(model, data, history, args, folder):
    """Loss beside its derived values, meters, clusters against classes; meters.png, meters.json."""
    h, = encode(lambda x: model.projector(model.encoder(x)), data.test_images)
    meters = {"loss": history[-1]["loss"],
              **collapse_meters(model, data.test_images, (10, 20, 50, 100, 200), 10_000)}
    values = loss_values(args.batch, args.codes, meters["codes"], args.beta, args.eps, args.prior)
    if data.labels is not None:
        code, _ = assign(h, model.dictionary().cpu(), model.temperature)
        shuffled = code[subset(len(code), len(code))]                # as many clusters, as large, at random
        meters["NMI"] = normalized_mutual_info_score(data.test_labels, code)
        meters["NMI of a random assignment"] = normalized_mutual_info_score(data.test_labels, shuffled)
        meters["AMI"] = adjusted_mutual_info_score(data.test_labels, code)
    print("\ntest images: " + ", ".join(f"{name} {value:.3g}" for name, value in meters.items()))
    print("least loss: " + "; ".join(f"{name} {value:.3g}" for name, value in values.items()))
    draw_meters(history, args.codes, values, h, folder)
    (folder / "meters.json").write_text(json.dumps({**meters, "least loss": values}, indent=1) + "\n")


def check(args, data):
    if args.eps * (args.codes - 1) >= 1:
        die(f"--eps {args.eps} must be below 1 / (codes - 1), {1 / (args.codes - 1):.3g}: lower one")


def main():
    parser = options(__doc__.split("\n")[0], **RECIPES["default"])
    add = parser.add_argument
    add("--recipe", default="default", choices=RECIPES, help="where options that are not given come from")
    add("--projector", type=sizes, help="sizes of the projector's layers, as 512-64; the last one is f")
    add("--codes", type=between(2, kind=int), help="c, size of the dictionary")
    add("--dictionary", default="fixed", choices=["fixed", "learned", "alternating", "hybrid"],
        help="what it does during training")
    add("--norm", choices=["tanh", "l2"], help="of the features: the release's or the preprint's")
    add("--prior", default="reverse", choices=["reverse", "forward", "none"],
        help="the release's form, the preprint's; none shows the collapse")
    add("--beta", type=between(0), help="weight of the cross-entropy")
    add("--temperature", type=between(1e-3), default=1., help="over the derived one")
    add("--eps", type=between(1e-30), default=1e-8, help="below 1 / (codes - 1): sets the temperature")
    add("--weight-decay", type=between(0), help="of AdamW")
    parser.set_defaults(**RECIPES[parser.parse_known_args()[0].recipe])
    args, data, folder, state = begin(parser, least_batch=2, check=check)
    torch.manual_seed(args.seed)
    encoder = Encoder(data.images.shape[1], data.images.ndim - 2, args.width, args.depth).to(args.device)
    baselines = {name: probe(data, *encode(function, data.images, data.test_images))
                 for name, function in (("raw pixels", nn.Flatten()), ("random encoder", encoder))}
    model = FALCON(encoder, args.batch, args.projector, args.codes, args.norm, args.prior, args.beta,
                   args.temperature, args.eps, args.dictionary, args.seed).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)
    few = data.test_images[subset(len(data.test_images), 512).to(args.device)]
    history = train(model, optimizer, data, args, folder, state, partial(collapse_meters, images=few))
    report_collapses(model.eval(), data, history, args, folder)
    report(model, data, baselines, history, folder)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        die("interrupted: nothing is lost up to the last whole epoch; continue with --resume and its folder")
