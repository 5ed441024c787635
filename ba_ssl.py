"""BA-SSL: batch fusion, a plug-in that lets the images of a batch see each other before the encoder does.

After Zhang, Shen, Liu, arXiv 2311.09974 (2023). THIS IS A RECONSTRUCTION: the blocks are known (patch
partition, conv embedding, patch restore, learned with the encoder), their layers are not. A batch of views x
[B, C, *S] is cut into patches and laid out as one picture of B channels, so that convolutions mix images. The
encoder sees

    x' = x + g F(x),   F = restore . conv embedding . partition,   g a learnable gate that starts at 0

and any loss follows: NT-Xent (SimCLR), or that of vicreg.py, falcon.py, icone.py.

    python ba_ssl.py                                    # SimCLR + fusion, posed digits
    python ba_ssl.py --no-fusion                        # plain SimCLR
    python ba_ssl.py --loss vicreg                      # or falcon, icone; each with or without fusion
    python ba_ssl.py --keep-slots                       # a shortcut, and the noise loss that shows it

Expect k-NN accuracy .864 ± .017 and linear .876 ± .015 (mean ± std, 3 seeds; raw pixels .593, .169; random
encoder .307 ± .042, .222 ± .018) in 74 to 87 s on 2 cores of an AMD EPYC with torch 2.13.0. Fusion does not
help here: g stays at 0, plain SimCLR scores the same (README, Results). A fixed share of another image helps.

Choices of our own: (1) Fusion acts on each view by itself, just before the encoder, with the same weights.
(2) A layer is a 3x3 convolution B -> B/4, GELU, another one back to B; no norm, which would see one "image".
(3) Slots are drawn anew for each view: a convolution over slots that stay could stamp both views of an image
with its slot's mark and solve NT-Xent without a look at the image. (4) At evaluation the module is dropped.
(5) SimCLR's settings suit digits: batch 64, AdamW, t = .2, views by pose, light, noise. (6) IConE is simpler
than in icone.py: a table drawn at random, and batch norm for the centring.
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
from sklearn.model_selection import train_test_split
from torch import nn
from tqdm import tqdm

from kernels import bank_cross_entropy, bank_logsumexp, bank_topk, dictionary_loss, variance_covariance


# ==== The method ============================================================================================
class BatchFusion(nn.Module):
    """x + gate F(x) for views x [B, C, H, W] or [B, C, D, H, W] of exactly B = `batch` images -> as x.

    F cuts images into patches of side `patch`, lays them out as one picture [1, B, patches, numbers of a
    patch], puts that through `layers` conv embeddings (0: none) and restores the images.
    mixing: conv, B -> B/4 -> B channels; grouped, a control: as many kernels, no channel sees another one;
    mixup, a control without layers: F(x) = another image - x, with a gate that stays.
    gate: its first value; None: 0, for mixup .2.
    keep_slots: image i is channel i in every call; otherwise each call deals the images to the channels anew.

    Call it for each view by itself, leave out an incomplete last batch, and use the encoder alone in the end:
    eval() changes nothing. ValueError for another mixing, another B, a side that `patch` does not divide.
    """

    PATCHES = {4: "b c (h p) (w q) -> 1 b (h w) (p q c)", 5: "b c (d o) (h p) (w q) -> 1 b (d h w) (o p q c)"}

    def __init__(self, batch, patch=4, layers=2, mixing="conv", keep_slots=False, gate=None):
        super().__init__()
        if mixing not in ("conv", "grouped", "mixup"):
            raise ValueError(f"mixing {mixing!r} is none of conv, grouped, mixup")
        self.batch, self.patch, self.mixing, self.keep_slots = batch, patch, mixing, keep_slots
        few = max(1, batch // 4)
        middle, groups = (batch * few, batch) if mixing == "grouped" else (few, 1)
        conv = partial(nn.Conv2d, kernel_size=3, padding=1, groups=groups)
        self.embedding = nn.Sequential(*[nn.Sequential(conv(batch, middle), nn.GELU(), conv(middle, batch))
                                         for _ in range(0 if mixing == "mixup" else layers)])
        if gate is None:
            gate = .2 if mixing == "mixup" else 0
        self.gate = nn.Parameter(torch.full((1,), float(gate)), requires_grad=mixing != "mixup")

    def partition(self, x):
        """[B, C, *S] -> [1, B, patches, numbers of a patch]"""
        return rearrange(x, self.PATCHES[x.ndim], **dict.fromkeys("opq"[5 - x.ndim:], self.patch))

    def restore(self, picture, shape):
        """The inverse; shape = [B, C, *S]."""
        images, patches = self.PATCHES[len(shape)].split(" -> ")
        counts = {axis: side // self.patch for axis, side in zip("dhw"[5 - len(shape):], shape[2:])}
        sides = dict.fromkeys("opq"[5 - len(shape):], self.patch)
        return rearrange(picture, f"{patches} -> {images}", c=shape[1], **counts, **sides)

    def forward(self, x):
        if x.ndim not in self.PATCHES or len(x) != self.batch or any(s % self.patch for s in x.shape[2:]):
            raise ValueError(f"views are {list(x.shape)}, but must be [B, C, H, W] or [B, C, D, H, W], "
                             f"B = {self.batch} and sides divisible by {self.patch}: drop what is left over")
        order = torch.arange(len(x)) if self.keep_slots else torch.randperm(len(x))       # on the CPU: its
        order = order.to(x.device)                                   # generator's state is in checkpoints
        slots = x[order]
        if self.mixing == "mixup":
            fused = slots.roll(1, 0) - slots
        else:
            fused = self.restore(self.embedding(self.partition(slots)), x.shape)
        return x + self.gate * fused[order.argsort()]


def nt_xent(z1, z2, temperature):
    """NT-Xent of z1, z2 [B, d]: each view has to find its partner among all 2B - 1 others; in nats.

    Chen et al., SimCLR, arXiv 2002.05709, eq. 1. The bank is the views themselves. log(2B - 1) if all agree.
    """
    z, i = F.normalize(torch.cat([z1, z2])), torch.arange(2 * len(z1), device=z1.device)
    return bank_cross_entropy(z, z, (i + len(z1)) % len(z), temperature, exclude=i)


def vicreg_terms(z1, z2):
    """vicreg.py's loss, with its weights, for z1, z2 [B, D]."""
    (v1, c1), (v2, c2) = variance_covariance(z1), variance_covariance(z2)
    return {"invariance": 25 * F.mse_loss(z1, z2), "variance": 25 * (v1 + v2) / 2, "covariance": c1 + c2}


def falcon_terms(z1, z2, seed, codes=512, beta=.7, eps=1e-8):
    """falcon.py's loss, L2-normalised, with its defaults, for z1, z2 [B, f]."""
    n, f = z1.shape
    h1, h2 = (math.sqrt(f / n) * F.normalize(z) for z in (z1, z2))
    temperature = f / (math.sqrt(n) * math.log((1 - eps * (codes - 1)) / eps))
    prior, cross_entropy = dictionary_loss(h1, h2, codes, seed, temperature)
    return {"prior": prior, "cross_entropy": beta * cross_entropy}


def icone_terms(z1, z2, table, index, temperature=.2, weight=3):
    """icone.py's loss, with its defaults, for z1, z2 [B, D] of images with rows index [B] in table [N, D]."""
    u = F.normalize(table)
    diversity = temperature * (bank_logsumexp(u[index], u, temperature, index).mean() - math.log(len(u) - 1))
    z = F.normalize(z1) + F.normalize(z2)
    return {"alignment": 1 - (z * u[index]).sum(1).mean() / 2, "diversity": weight * diversity}


class BASSL(nn.Module):
    """Fusion (or None), encoder, projector with layers of `sizes`, and a loss: simclr, vicreg, falcon, icone.

    count: training images, icone has a row for each. temperature: of NT-Xent. seed: of falcon's dictionary.
    """

    LOSSES = "simclr", "vicreg", "falcon", "icone"

    def __init__(self, encoder, fusion=None, loss="simclr", sizes=(512, 128), count=0, temperature=.2,
                 seed=0):
        super().__init__()
        if loss not in self.LOSSES:
            raise ValueError(f"loss {loss!r} is none of {', '.join(self.LOSSES)}")
        self.encoder, self.fusion, self.loss = encoder, fusion, loss
        self.temperature, self.seed = temperature, seed
        layers, width = [], encoder.features
        for size in sizes:
            layers += [nn.Linear(width, size), nn.BatchNorm1d(size), nn.ReLU()]
            width = size
        less = 2 if loss == "vicreg" else 1                          # vicreg's ends linear, others in a norm
        self.projector = nn.Sequential(*layers[:-less] or [nn.BatchNorm1d(width, affine=False)])
        if loss == "icone":
            self.table = nn.Parameter(.1 * torch.randn(count, width))

    def fuse(self, x):
        return self.fusion(x) if self.fusion else x

    def embed(self, view1, view2):
        """z [B, D] of both views, each fused and projected by itself; the encoder looks at single images."""
        h = self.encoder(torch.cat([self.fuse(view1), self.fuse(view2)]))                # [2B, E]
        return [self.projector(h_of_view).float() for h_of_view in h.chunk(2)]

    def forward(self, view1, view2, index):
        """Views [B, C, *S] of images index [B] -> terms, whose sum is optimised, and notes, only logged."""
        z1, z2 = self.embed(view1, view2)
        if self.loss == "simclr":
            terms = {"nt_xent": nt_xent(z1, z2, self.temperature)}
        elif self.loss == "vicreg":
            terms = vicreg_terms(z1, z2)
        elif self.loss == "falcon":
            terms = falcon_terms(z1, z2, self.seed)
        else:
            terms = icone_terms(z1, z2, self.table, index)
        return terms, {}


@torch.no_grad()
def noise_meters(model, shape):
    """Whether views of pure noise [B, C, *S] find their partners, though only their slot could tell.

    model in eval mode -> gate, if there is one; noise_nt_xent of two unrelated views; noise_exchanged, the
    same with partners exchanged; chance, log(2B - 1). Where embeddings spread both lie above chance; the
    first well below the second is a shortcut.
    """
    device = next(model.parameters()).device
    z1, z2 = model.embed(*(torch.rand(shape).to(device) for _ in range(2)))
    gate = {"gate": model.fusion.gate.item()} if model.fusion else {}
    return {**gate, "noise_nt_xent": nt_xent(z1, z2, model.temperature).item(),
            "noise_exchanged": nt_xent(z1, z2.roll(1, 0), model.temperature).item(),
            "chance": math.log(2 * shape[0] - 1)}


def noise_verdict(model, shape, draws=20):
    """What the noise meters say, in a sentence; a difference of a tenth (our threshold) is a shortcut."""
    meters = [noise_meters(model, shape) for _ in range(draws)]
    own, exchanged = (sum(m[name] for m in meters) / draws for name in ("noise_nt_xent", "noise_exchanged"))
    return (("SHORTCUT, slots give partners away" if own < .9 * exchanged else "Slots give no partner away")
            + f": NT-Xent of pure noise {own:.2f}, with partners exchanged {exchanged:.2f}, "
            f"chance {meters[0]['chance']:.2f}")


@torch.no_grad()
def fused_features(model, *stacks):
    """Features [N, E] of images behind the module, B at a time, in random order; a rest is filled up."""
    def features(images):
        n, size = len(images), model.fusion.batch
        order = subset(n, n)                                         # sorted by class they would tell it
        rows = order[torch.arange(n + -n % size) % n].to(images.device)
        h = [model.encoder(model.fuse(images[few])).float().cpu() for few in rows.split(size)]
        return torch.cat(h)[order.argsort()]
    return [features(images) for images in stacks]


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
RECIPES = {"simclr": dict(batch=64, epochs=45, lr=3e-3, projector=[512, 128]),
           "vicreg": dict(batch=128, epochs=45, lr=3e-3, projector=[512, 512]),
           "falcon": dict(batch=64, epochs=45, lr=6e-3, projector=[64]),
           "icone": dict(batch=64, epochs=45, lr=3e-3, projector=[])}


def head(text):
    return [] if text == "none" else sizes(text)


def check(args, data):
    if not args.projector and args.loss != "icone":
        die(f"--projector none is for --loss icone: give {args.loss} sizes, as 512-128")
    if not args.no_fusion and any(side % args.patch for side in data.images.shape[2:]):
        die(f"--patch {args.patch} does not divide the canvas {list(data.images.shape[2:])}: choose another")


def main():
    parser = options(__doc__.split("\n")[0], **RECIPES["simclr"])
    add = parser.add_argument
    add("--loss", default="simclr", choices=RECIPES, help="base method; sets batch, epochs, lr, projector")
    add("--projector", type=head, help="sizes of the projector's layers, as 512-128; icone: none")
    add("--no-fusion", action="store_true", help="the base method alone")
    add("--layers", type=int, default=2, choices=range(5), help="conv embeddings; 0: a gain on the images")
    add("--patch", type=between(1, kind=int), default=4, help="side of a patch; must divide the canvas")
    add("--mixing", default="conv", choices=["conv", "grouped", "mixup"],
        help="conv: learned; controls: grouped, no image sees another; mixup, a fixed share, --gate, of one")
    add("--gate", type=between(-math.inf), help="its first value; if not given 0, with mixup .2")
    add("--keep-slots", action="store_true", help="images keep their channels in both views: the shortcut")
    add("--temperature", type=between(1e-3), default=.2, help="of NT-Xent")
    parser.set_defaults(**RECIPES[parser.parse_known_args()[0].loss])
    args, data, folder, state = begin(parser, least_batch=2, check=check)
    torch.manual_seed(args.seed)
    encoder = Encoder(data.images.shape[1], data.images.ndim - 2, args.width, args.depth).to(args.device)
    baselines = {name: probe(data, *encode(function, data.images, data.test_images))
                 for name, function in (("raw pixels", nn.Flatten()), ("random encoder", encoder))}
    fusion = None if args.no_fusion else BatchFusion(args.batch, args.patch, args.layers, args.mixing,
                                                     args.keep_slots, args.gate)
    model = BASSL(encoder, fusion, args.loss, args.projector, len(data.images), args.temperature, args.seed)
    model.to(args.device)
    own = {"table", "fusion.gate"}
    groups = [{"params": [p for name, p in model.named_parameters() if name not in own]}]
    if fusion:
        groups += [{"params": [fusion.gate], "weight_decay": 0.}]    # what closes it shall be the loss
    if args.loss == "icone":
        groups += [{"params": [model.table], "lr": 10 * args.lr}]
    optimizer = torch.optim.AdamW(groups, args.lr, weight_decay=.05, fused=True)
    shape = args.batch, *data.images.shape[1:]
    history = train(model, optimizer, data, args, folder, state, partial(noise_meters, shape=shape))
    if fusion:
        print(f"\ngate {fusion.gate.item():.3f}. {noise_verdict(model.eval(), shape)}")
        behind = fused_features(model, data.images, data.test_images)
        baselines["with the module"] = probe(data, *behind)
    report(model, data, baselines, history, folder)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        die("interrupted: nothing is lost up to the last whole epoch; continue with --resume and its folder")
