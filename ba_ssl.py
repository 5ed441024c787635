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

Expect k-NN accuracy 0.864 ± 0.017 and linear 0.876 ± 0.015 (mean ± std, 3 seeds; raw pixels 0.593, 0.169;
random encoder 0.307 ± 0.042, 0.222 ± 0.018) in 74 to 87 s on 2 cores of an AMD EPYC with torch 2.13.0.
Fusion does not help here: g stays at 0, plain SimCLR scores the same (README, Results). A fixed share of
another image helps.

Choices of our own: (1) Fusion acts on each view by itself, just before the encoder, with the same weights.
(2) A layer is a 3x3 convolution B -> B/4, GELU, another one back to B; no norm, which would see one "image".
(3) Slots are drawn anew for each view: a convolution over slots that stay could stamp both views of an image
with its slot's mark and solve NT-Xent without a look at the image. (4) At evaluation the module is dropped.
(5) SimCLR's settings suit digits: batch 64, AdamW, t = 0.2, views by pose, light, noise. (6) IConE is simpler
than in icone.py: a table drawn at random, and batch norm for the centring.
"""
import argparse
import json
import math
import os
import sys
from collections import defaultdict, namedtuple
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")      # before torch: idle threads soon sleep,
os.environ.setdefault("GOMP_SPINCOUNT", "1000")          # so that other programs may work
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from tqdm import tqdm

from einops import rearrange

from kernels import (bank_cross_entropy, bank_logsumexp, collapse_panel, dictionary_loss, knn_accuracy,
                     variance_covariance, verdict)


# ==== The method ============================================================================================
class BatchFusion(nn.Module):
    """x + gate F(x) for views x [B, C, H, W] or [B, C, D, H, W] of exactly B = `batch` images -> as x.

    F cuts images into patches of side `patch`, lays them out as one picture [1, B, patches, numbers of a
    patch], puts that through `layers` conv embeddings (0: none) and restores the images.
    mixing: conv, B -> B/4 -> B channels; grouped, a control: as many kernels, no channel sees another one;
    mixup, a control without layers: F(x) = another image - x, with a gate that stays.
    gate: its first value; None: 0, for mixup 0.2.
    keep_slots: image i is channel i in every call; otherwise each call deals the images to the channels anew.

    Call it for each view by itself, leave out an incomplete last batch, and use the encoder alone in the end:
    eval() changes nothing. ValueError for another mixing, another B, a side that `patch` does not divide.
    """

    IMAGES = {4: "b c (h p) (w q)", 5: "b c (d o) (h p) (w q)"}
    PICTURE = {4: "1 b (h w) (p q c)", 5: "1 b (d h w) (o p q c)"}

    def __init__(self, batch, patch=4, layers=2, mixing="conv", keep_slots=False, gate=None):
        super().__init__()
        if mixing not in ("conv", "grouped", "mixup"):
            raise ValueError(f"mixing {mixing!r} is none of conv, grouped, mixup")
        self.batch = batch
        self.patch = patch
        self.mixing = mixing
        self.keep_slots = keep_slots
        few = max(1, batch // 4)
        groups = batch if mixing == "grouped" else 1
        self.embedding = nn.Sequential()
        for _ in range(0 if mixing == "mixup" else layers):
            narrow = nn.Conv2d(batch, groups * few, kernel_size=3, padding=1, groups=groups)
            widen = nn.Conv2d(groups * few, batch, kernel_size=3, padding=1, groups=groups)
            self.embedding.append(nn.Sequential(narrow, nn.GELU(), widen))
        if gate is None:
            gate = 0.2 if mixing == "mixup" else 0.
        self.gate = nn.Parameter(torch.full((1,), float(gate)), requires_grad=mixing != "mixup")

    def partition(self, x):
        """[B, C, *S] -> [1, B, patches, numbers of a patch]"""
        sides = dict.fromkeys("pq" if x.ndim == 4 else "opq", self.patch)
        return rearrange(x, f"{self.IMAGES[x.ndim]} -> {self.PICTURE[x.ndim]}", **sides)

    def restore(self, picture, shape):
        """The inverse; shape = [B, C, *S]."""
        axes = len(shape)
        sides = dict.fromkeys("pq" if axes == 4 else "opq", self.patch)
        for axis, side in zip("hw" if axes == 4 else "dhw", shape[2:]):
            sides[axis] = side // self.patch
        return rearrange(picture, f"{self.PICTURE[axes]} -> {self.IMAGES[axes]}", c=shape[1], **sides)

    def forward(self, x):
        divisible = all(side % self.patch == 0 for side in x.shape[2:])
        if x.ndim not in self.IMAGES or len(x) != self.batch or not divisible:
            raise ValueError(f"views are {[*x.shape]}, but must be [B, C, H, W] or [B, C, D, H, W], "
                             f"B = {self.batch} and sides divisible by {self.patch}: drop what is left over")
        # Drawn on the CPU, whose generator's state is in checkpoints.
        order = torch.arange(len(x)) if self.keep_slots else torch.randperm(len(x))
        order = order.to(x.device)
        slots = x[order]
        if self.mixing == "mixup":
            fused = slots.roll(1, 0) - slots
        else:
            fused = self.restore(self.embedding(self.partition(slots)), x.shape)
        return x + self.gate * fused[order.argsort()]


# Four losses of two views' embeddings; those of other scripts are unweighted terms by name, as there.
def same_shape(z1, z2):
    if z1.shape != z2.shape:
        raise ValueError(f"embeddings of two views must agree in shape, got {[*z1.shape]} and {[*z2.shape]}")


def nt_xent(z1, z2, temperature=0.2):
    """NT-Xent of z1, z2 [B, d]: each view has to find its partner among all 2B - 1 others; in nats.

    Chen et al., SimCLR, arXiv 2002.05709, eq. 1. The bank is the views themselves. log(2B - 1) if all agree.
    ValueError for views of different shapes.
    """
    same_shape(z1, z2)
    z = F.normalize(torch.cat([z1, z2]))                             # [2B, d]
    itself = torch.arange(len(z), device=z.device)
    partner = itself.roll(len(z1))
    return bank_cross_entropy(z, z, partner, temperature, exclude=itself)


def vicreg_terms(z1, z2):
    """vicreg.py's terms, for z1, z2 [B, D]."""
    same_shape(z1, z2)
    v1, c1 = variance_covariance(z1)
    v2, c2 = variance_covariance(z2)
    return {"invariance": F.mse_loss(z1.to(v1), z2.to(v1)),
            "variance": (v1 + v2) / 2,
            "covariance": c1 + c2}


def falcon_terms(z1, z2, seed, codes=512, eps=1e-8):
    """falcon.py's terms, L2-normalised, with its defaults, for z1, z2 [B, f]."""
    same_shape(z1, z2)
    n, f = z1.shape
    length = math.sqrt(f / n)
    temperature = f / (math.sqrt(n) * math.log((1 - eps * (codes - 1)) / eps))
    z1 = length * F.normalize(z1)
    z2 = length * F.normalize(z2)
    prior, cross_entropy = dictionary_loss(z1, z2, codes, seed, temperature)
    return {"prior": prior, "cross_entropy": cross_entropy}


def icone_terms(z1, z2, table, index, temperature=0.2):
    """icone.py's terms, with its defaults, for z1, z2 [B, D] of the images index [B] of table [N, D]."""
    same_shape(z1, z2)
    if index.shape != z1.shape[:1]:
        raise ValueError(f"index must name a row for each of {len(z1)} images, got {[*index.shape]}")
    u = F.normalize(table)
    sums = bank_logsumexp(u[index], u, temperature, exclude=index)
    z = F.normalize(z1) + F.normalize(z2)
    return {"alignment": 1 - (z * u[index]).sum(1).mean() / 2,
            "diversity": temperature * (sums.mean() - math.log(len(u) - 1))}


WEIGHTS = {"simclr": {"nt_xent": 1},
           "vicreg": {"invariance": 25, "variance": 25, "covariance": 1},
           "falcon": {"prior": 1, "cross_entropy": 0.7},
           "icone": {"alignment": 1, "diversity": 3}}


class BASSL(nn.Module):
    """Fusion (or None), an encoder to `features` numbers, a projector with layers of these sizes, and a loss.

    loss: simclr, vicreg, falcon, icone; count: training images, icone has a row for each. temperature: of
    NT-Xent. seed: of falcon's dictionary. ValueError for another loss.
    """

    def __init__(self, encoder, features, fusion=None, loss="simclr", projector=(512, 128), count=0,
                 temperature=0.2, seed=0):
        super().__init__()
        if loss not in WEIGHTS:
            raise ValueError(f"loss {loss!r} is none of {', '.join(WEIGHTS)}")
        self.encoder = encoder
        self.fusion = fusion
        self.loss = loss
        self.temperature = temperature
        self.seed = seed
        layers = []
        for size in projector:
            layers += [nn.Linear(features, size), nn.BatchNorm1d(size), nn.ReLU()]
            features = size
        ending = 2 if loss == "vicreg" else 1                        # linear; the others end in a norm
        self.projector = nn.Sequential(*layers[:-ending])
        if not projector:
            self.projector.append(nn.BatchNorm1d(features, affine=False))
        if loss == "icone":
            self.table = nn.Parameter(0.1 * torch.randn(count, features))

    def fuse(self, x):
        return self.fusion(x) if self.fusion else x

    def embed(self, view1, view2):
        """z [B, D] of both views, each fused and projected by itself; the encoder looks at single images."""
        views = torch.cat([self.fuse(view1), self.fuse(view2)])
        h1, h2 = self.encoder(views).chunk(2)                        # [B, E]
        return self.projector(h1).float(), self.projector(h2).float()

    def forward(self, view1, view2, index):
        z1, z2 = self.embed(view1, view2)
        if self.loss == "simclr":
            terms = {"nt_xent": nt_xent(z1, z2, self.temperature)}
        elif self.loss == "vicreg":
            terms = vicreg_terms(z1, z2)
        elif self.loss == "falcon":
            terms = falcon_terms(z1, z2, self.seed)
        else:
            terms = icone_terms(z1, z2, self.table, index)
        return {name: WEIGHTS[self.loss][name] * term for name, term in terms.items()}, {}


# ==== The same in every script ==============================================================================
# What train() and report() need of a model, and of nothing else:
#     model.encoder       any nn.Module: images [N, C, *S] -> features h [N, E]
#     model.projector     nn.Module: h [N, E] -> embeddings z [N, D]
#     model(view1, view2, index) -> terms, notes      views [B, C, *S] of the training images index [B];
#                         dicts of scalars: the sum of the terms is minimised, notes are only logged
# ---- Encoder -----------------------------------------------------------------------------------------------
def conv_norm(conv, width_in, width, kernel, stride=1):
    """Convolution and GroupNorm, which looks at one sample at a time."""
    return nn.Sequential(
        conv(width_in, width, kernel, stride, kernel // 2, bias=False),
        nn.GroupNorm(math.gcd(8, width), width))


class Block(nn.Module):
    """Basic residual block; a stride halves the canvas, and the skip follows by a 1x1 convolution."""

    def __init__(self, conv, width_in, width, stride):
        super().__init__()
        self.body = nn.Sequential(
            conv_norm(conv, width_in, width, 3, stride),
            nn.ReLU(),
            conv_norm(conv, width, width, 3))
        self.skip = conv_norm(conv, width_in, width, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        return F.relu(self.skip(x) + self.body(x))


class Encoder(nn.Module):
    """Compact ResNet, 3x3 stem, no max-pool: [N, C, H, W] or [N, C, D, H, W] -> h [N, 8 width]."""

    def __init__(self, channels, axes, width=16, depth=1):
        super().__init__()
        self.config = dict(channels=channels, axes=axes, width=width, depth=depth)
        self.features = 8 * width
        conv = nn.Conv2d if axes == 2 else nn.Conv3d
        self.stem = nn.Sequential(conv_norm(conv, channels, width, 3), nn.ReLU())
        self.stages = nn.Sequential()
        for _ in range(3):
            for stride in [2] + [1] * (depth - 1):                   # 2 halves the canvas, doubles the width
                self.stages.append(Block(conv, width, stride * width, stride))
                width = stride * width
        self.to(memory_format=torch.channels_last if axes == 2 else torch.channels_last_3d)

    def forward(self, x):
        return self.stages(self.stem(x)).flatten(2).mean(2)          # from [N, 8 width, *S/8, rounded up]


# ---- Data and augmentation ---------------------------------------------------------------------------------
Data = namedtuple("Data", "images labels test_images test_labels")   # [N, C, *S] float32; [N] int64 or None


def die(message):
    """How a user's mistake ends: one line, whatever the message quotes, and exit code 2."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def uniform(x, generator, low, high, size=1):
    """Random numbers for each sample of x [N, C, *S], which broadcast over it: [N, size, 1, ...]."""
    shape = len(x), size, *[1] * (x.ndim - 2)
    return torch.empty(shape, device=x.device).uniform_(low, high, generator=generator)


def warp(x, angles, scale, shift, sides):
    """Rotate, scale about the centre, then shift each of x [N, C, *S], images or volumes; one resampling.

    angles [N, 1], in 3-D rotation vectors [N, 3], radians; scale [N]; shift [N, axes], half canvases; all may
    have more axes of length 1 -> [N, C, *sides], 0 outside.
    """
    # affine_grid wants for each place of the result the place of x that it comes from: the inverse of the
    # pose, in half canvases, last axis first.
    axes = x.ndim - 2
    i, j = torch.triu_indices(axes, axes, 1, device=x.device)        # the planes of rotation
    skew = x.new_zeros(len(x), axes, axes)
    skew[:, i, j] = angles.flatten(1)
    inverse = torch.linalg.matrix_exp(skew - skew.mT) / scale.view(-1, 1, 1)
    length = x.new_tensor(sides[::-1])
    inverse = inverse * length / length[:, None]                     # pixels stay square on other canvases
    offset = -inverse @ shift.view(-1, axes, 1)
    theta = torch.cat([inverse, offset], 2)                          # [N, axes, axes + 1]
    grid = F.affine_grid(theta, [len(x), x.shape[1], *sides], align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def random_view(x, generator):
    """One random view of each of x [N, C, *S], of the same shape. THIS IS THE FUNCTION TO REPLACE for images
    that want other views: all randomness comes from the generator, so that a run can be repeated."""
    draw = partial(uniform, x, generator)
    axes = x.ndim - 2
    angles = draw(-0.45, 0.45, axes * (axes - 1) // 2)               # 26 degrees either way
    scale = draw(-0.4, 0.4).exp()                                    # 0.67 to 1.49
    shift = draw(-0.25, 0.25, axes)
    x = warp(x, angles, scale, shift, x.shape[2:])

    if x.shape[1] == 3:
        x = x * draw(0.7, 1.3, 3)                                    # colour cast
        gray = x.mean(1, keepdim=True)
        keep_colour = draw(0, 1) >= 0.2
        x = torch.lerp(gray, x, keep_colour * draw(0.6, 1.4))        # saturation
        x = torch.where(draw(0, 1) < 0.5, x.flip(-1), x)

    contrast = draw(0.6, 1.4)
    brightness = draw(-0.2, 0.2)
    noise_level = draw(0, 0.1)
    noise = torch.empty_like(x).normal_(generator=generator)
    return contrast * x + brightness + noise_level * noise


def two_views(x, generator):
    return random_view(x, generator), random_view(x, generator)


def posed_digits(axes):
    """scikit-learn's 1,797 handwritten digits, each in one pose of its own, whatever the run's seed.

    2-D: on a 20 x 20 canvas. 3-D: slabs two voxels thick in 16^3. 1,437 train; 360 test, in four poses each.
    """
    digits = load_digits()
    train, test = train_test_split(range(1797), test_size=360, stratify=digits.target, random_state=0)
    rows = train + 4 * test
    x = torch.tensor(digits.images[rows, None] / 16, dtype=torch.float32)                # [N, 1, 8, 8]
    y = torch.tensor(digits.target[rows])
    turn, small, large, move, side = (30, 0.45, 0.75, 0.3, 20) if axes == 2 else (25, 0.55, 0.85, 0.2, 16)
    if axes == 3:
        x = F.pad(torch.stack([x, x], 2), (0, 0, 0, 0, 3, 3))        # [N, 1, 8, 8, 8]

    generator = torch.Generator().manual_seed(0)
    draw = partial(uniform, x, generator)
    angles = draw(-turn, turn, axes * (axes - 1) // 2).deg2rad()
    scale = draw(small, large)
    shift = draw(-move, move, axes)
    x = warp(x, angles, scale, shift, [side] * axes)
    x = x + 0.1 * torch.randn(x.shape, generator=generator)
    return Data(x[:1437], y[:1437], x[1437:], y[1437:])


def read_split(path, arrays, split):
    """Images [N, C, *S] float32 in [0, 1] and labels [N] of one split of an archive's arrays."""
    x, y = arrays[f"{split}_images"], arrays.get(f"{split}_labels")
    colour = x.ndim in (4, 5) and x.shape[-1] in (1, 3)              # channels stand last in this layout
    if x.ndim - colour not in (3, 4) or min(x.shape[:-1]) < 4 or x.dtype.kind not in "uif":
        die(f"{path}: {split}_images is {x.dtype} {[*x.shape]}, not [N, H, W(, 3)] or [N, D, H, W(, 3)]")
    x = torch.from_numpy(x.astype(np.float32) / (255 if x.dtype == np.uint8 else 1))
    x = x.movedim(-1, 1) if colour else x[:, None]                   # [N, C, *S]
    if not (x.min() >= 0 and x.max() <= 1):                          # NaN fails both
        die(f"{path}: {split}_images holds NaN or values outside [0, 1] (uint8: 0 to 255): clean it first")

    if y is None or y.size != len(x) or y.dtype.kind not in "ui" or y.min() < 0:
        y = np.zeros(len(x))                                         # one class: load_data says so
    return x, torch.from_numpy(y.ravel().astype(np.int64))


def read_npz(path):
    """MedMNIST's layout: train_images [N, *S] or [N, *S, 3], uint8 or in [0, 1]; without test_images
    a fifth is held out."""
    keys = "train_images train_labels test_images test_labels".split()
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in keys if key in archive}
    except Exception as error:                                       # a bad archive raises any of seven kinds
        die(f"{path} cannot be read as .npz ({error}): check the path, or fetch the file again")
    if "train_images" not in arrays:
        die(f"{path} has no train_images: the keys are {', '.join(keys)}, all but the first optional")

    x, y = read_split(path, arrays, "train")
    if "test_images" not in arrays:
        train, test = train_test_split(range(len(x)), test_size=0.2, random_state=0)
        return Data(x[train], y[train], x[test], y[test])
    x_test, y_test = read_split(path, arrays, "test")
    if x_test.shape[1:] != x.shape[1:]:
        die(f"{path}: images of {[*x.shape[1:]]} for training, {[*x_test.shape[1:]]} for testing")
    return Data(x, y, x_test, y_test)


def load_data(name):
    """digits, digits3d or a .npz file; where there are no two classes, labels become None."""
    if name in ("digits", "digits3d"):
        data = posed_digits(3 if name == "digits3d" else 2)
    else:
        data = read_npz(name)
    if len(data.labels.unique()) < 2 or len(data.test_labels.unique()) < 2:
        print(f"{name} has no class labels (whole numbers, two classes) for training and test: no probes")
        data = data._replace(labels=None, test_labels=None)
    return data


# ---- Training ----------------------------------------------------------------------------------------------
@torch.no_grad()
def encode(function, images):
    """function(images), 256 at a time."""
    return torch.cat([function(batch) for batch in images.split(256)])


def learning_rate(step, steps, peak):
    """What to multiply --lr with: a linear rise to the peak in the first tenth, then half a cosine to 0."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (1 + math.cos(math.pi * progress)) / 2


def train(model, optimizer, data, args, folder, state, meters=None):
    """Minimise the sum of the model's terms -> history, a dict of means for each epoch.

    One optimiser step takes `accumulate` batches. The checkpoint last.pt and metrics.jsonl, the history, are
    written at the start and after each epoch. state: the checkpoint to go on from, or None. meters(model in
    eval mode) -> {name: number}, put into the epoch's line as "meters" if given.
    """
    images = data.images
    device = images.device
    step_size = args.batch * args.accumulate
    steps = len(images) // step_size                                 # in an epoch; the rest is dropped
    total = args.epochs * steps
    # For Adam the noise of a step stays alike if the rate follows sqrt(batch), arXiv 2205.10287; 128 is where
    # --lr was chosen. The schedule multiplies the learning rates that the optimizer was made with.
    peak = math.sqrt(step_size / 128)
    factor = partial(learning_rate, steps=total, peak=peak)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    generator = torch.Generator(device).manual_seed(args.seed)       # of order and views
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    history = []
    if state:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_rng"])                      # what models themselves draw, on the CPU
        history = state["history"]

    def checkpoint():
        whole = {name: part.state_dict() for name, part in parts.items()}
        whole.update(config=vars(args), history=history, generator=generator.get_state(),
                     torch_rng=torch.get_rng_state())
        torch.save(whole, folder / "last.tmp")
        (folder / "last.tmp").replace(folder / "last.pt")            # a kill leaves the old one or the new
        lines = [*map(json.dumps, history), ""]
        (folder / "metrics.jsonl").write_text("\n".join(lines))

    checkpoint()
    if args.compile:
        model.compile()
    with tqdm(total=total, initial=len(history) * steps, unit="step") as bar:
        for epoch in range(len(history) + 1, args.epochs + 1):
            model.train()
            sums = defaultdict(float)
            order = torch.randperm(len(images), generator=generator, device=device)[:steps * step_size]
            for batches in order.view(steps, args.accumulate, args.batch):
                optimizer.zero_grad()
                for index in batches:                                # the numbers of `batch` images
                    views = two_views(images[index], generator)
                    with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
                        terms, notes = model(*views, index)
                    loss = sum(terms.values())
                    (loss / args.accumulate).backward()
                    for name, value in {"loss": loss, **terms, **notes}.items():
                        sums[name] += torch.as_tensor(value).detach()              # not .item(): no waiting
                optimizer.step()
                schedule.step()
                bar.update()
                if bar.n % 10 == 0:
                    bar.set_postfix(loss=loss.item())

            line = {name: value.item() / (steps * args.accumulate) for name, value in sums.items()}
            if not math.isfinite(line["loss"]):
                die(f"the loss is {line['loss']} in epoch {epoch}: start anew, lower --lr, another --out")
            model.eval()
            if meters:
                line["meters"] = meters(model)
            if data.labels is not None and epoch % max(1, args.epochs // 8) == 0:      # some eight times
                h = encode(model.encoder, images)
                h_test = encode(model.encoder, data.test_images)
                line["knn"] = knn_accuracy(h, data.labels, h_test, data.test_labels)
            history.append({"epoch": epoch, **line})
            checkpoint()
    return history


# ---- Report ------------------------------------------------------------------------------------------------
Findings = namedtuple("Findings", "h h_test probe panels")           # features [N, E]; what probe() gives


def fixed_order(n):
    """Row numbers 0 to n - 1 in random order, the same one in every run."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def probe(data, h, h_test):
    """k-NN and linear accuracy; linear: logistic regression on up to 10,000 standardised features."""
    if data.labels is None:
        return {}
    rows = fixed_order(len(h))[:10_000]
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    linear.fit(h[rows], data.labels[rows])
    return {"k-NN": knn_accuracy(h, data.labels, h_test, data.test_labels),
            "linear": linear.score(h_test, data.test_labels)}


@torch.no_grad()
def examine(model, data):
    """Features of all images, their probe, and the collapse panels of h and z on up to 2,000 test images."""
    model.eval()
    h = encode(model.encoder, data.images).cpu()
    h_test = encode(model.encoder, data.test_images)
    rows = fixed_order(len(h_test))[:2000]
    views = two_views(data.test_images[rows], torch.Generator(h_test.device).manual_seed(0))
    three_h = [h_test[rows]] + [encode(model.encoder, view) for view in views]
    three_z = [encode(model.projector, features) for features in three_h]
    panels = {"encoder h": collapse_panel(*three_h), "projector z": collapse_panel(*three_z)}
    h_test = h_test.cpu()
    return Findings(h, h_test, probe(data, h, h_test), panels)


def plot_curves(history, probes, folder):
    """curves.png: the loss terms and the probe over epochs."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [line["epoch"] for line in history]
    names = [name for name in history[0] if name not in ("epoch", "loss", "knn", "meters")]
    left.plot(epochs, [[line[name] for name in names] for line in history], label=names)
    left.set_yscale("asinh", linear_width=0.1)                       # logarithmic, but for terms that cross 0
    left.set(xlabel="epoch", ylabel="mean over the epoch")

    knn = [line.get("knn", math.nan) for line in history]
    right.plot(epochs, knn, "o", label="trained encoder")
    for name, colour in ("raw pixels", "C1"), ("random encoder", "C2"):
        right.axhline(probes[name].get("k-NN", math.nan), color=colour, label=name)
    right.set(xlabel="epoch", ylabel="k-NN accuracy on test features", ylim=(0, 1))
    left.legend()
    right.legend()
    figure.savefig(folder / "curves.png")


def plot_embedding(h_test, labels, folder):
    """embedding.png: up to 1,000 test features in 2-D, by class."""
    rows = fixed_order(len(h_test))[:1000]
    tsne = TSNE(perplexity=min(30, len(rows) / 4), random_state=0)
    places = tsne.fit_transform(h_test[rows])                        # [n, 2]
    figure = Figure(figsize=(6, 5.2))
    axis = figure.subplots()
    points = axis.scatter(*places.T, s=6, c=None if labels is None else labels[rows])
    if labels is not None:
        points.set_cmap("tab10")
        figure.colorbar(points, label="class")
    axis.set(xticks=[], yticks=[], title="t-SNE of the encoder's test features")
    figure.savefig(folder / "embedding.png")


def print_table(rows):
    """{row: {column: number}}, a column as wide as its name."""
    columns, *_ = rows.values()
    print(f"\n{'':18}", *(f"{name:>8}" for name in columns))
    for name, row in rows.items():
        print(f"{name:18}", *(f"{row[column]:{max(8, len(column))}.4g}" for column in columns))


def report(model, data, untrained, history, folder, **more_probes):
    """How every run ends: probes, panels, a verdict; report.json, encoder.pt, features.npz and pictures."""
    trained = examine(model, data)
    pixels = probe(data, data.images.flatten(1).cpu(), data.test_images.flatten(1).cpu())
    probes = {"raw pixels": pixels, "random encoder": untrained.probe, "trained encoder": trained.probe}
    probes.update(more_probes)
    panels = {"untrained z": untrained.panels["projector z"], **trained.panels}
    sentence = verdict(panels["projector z"], panels["untrained z"])
    text = json.dumps({"probes": probes, "panels": panels, "verdict": sentence}, indent=1)
    (folder / "report.json").write_text(text)

    encoder = {"config": getattr(model.encoder, "config", {}), "state_dict": model.encoder.state_dict()}
    torch.save(encoder, folder / "encoder.pt")                       # Encoder(**config) makes it anew
    labels = {}
    if data.labels is not None:
        labels = {"train_labels": data.labels, "test_labels": data.test_labels}
        print_table(probes)
    np.savez(folder / "features.npz", train_features=trained.h, test_features=trained.h_test, **labels)
    print_table(panels)
    print(f"\n{sentence}")
    plot_curves(history, probes, folder)
    plot_embedding(trained.h_test, data.test_labels, folder)
    print(f"In {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")


# ---- Command line ------------------------------------------------------------------------------------------
def bounded(kind, low, high=math.inf):
    """An option's type: numbers of this kind in [low, high)."""
    def number(text):
        if not low <= kind(text) < high:
            raise argparse.ArgumentTypeError(f"{text} does not lie in [{low}, {high})")
        return kind(text)
    return number


def layer_sizes(text):
    """An option's type: 512-512 -> [512, 512]."""
    return [bounded(int, 1)(size) for size in text.split("-")]


def options(batch, epochs, lr, least_batch=1):
    """The command line that every script has; the defaults of some options are the script's own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = die
    add = parser.add_argument
    count = bounded(int, 1)
    add("--data", default="digits", help="digits, digits3d, or a .npz file in MedMNIST's layout")
    add("--batch", type=bounded(int, least_batch), default=batch,
        help="images at a time; what is left over after the last step is dropped")
    add("--epochs", type=count, default=epochs, help="passes over the training images")
    add("--accumulate", type=count, default=1, help="batches whose gradients are averaged for one step")
    add("--lr", type=bounded(float, 0), default=lr,
        help="peak learning rate of AdamW is this x sqrt(batch x accumulate / 128)")
    add("--width", type=count, default=16, help="channels of the encoder's stem; features are 8 x this")
    add("--depth", type=count, default=1, help="residual blocks in each of three stages")
    add("--seed", type=bounded(int, 0), default=0, help="of weights, order and views; not of the data")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    add("--amp", default="off", choices=["off", "bf16"], help="mixed precision; losses stay fp32")
    add("--compile", action="store_true", help="torch.compile the model; the first step takes a minute")
    add("--out", help="run folder, new or empty; if not given runs/SCRIPT-1, -2, ...")
    add("--resume", help="folder of a run to continue, with its own options")
    return parser


def parse(parser):
    """The options, and the checkpoint to go on from or None; a resumed run keeps its own options, but for
    --out, which is where it lies now."""
    args = parser.parse_args()
    if not args.resume:
        return args, None
    if sum(word.startswith("--") for word in sys.argv) > 1:
        die("--resume takes no other option: the run keeps its own")
    try:
        state = torch.load(Path(args.resume, "last.pt"), map_location="cpu", weights_only=True)
        if state["config"].keys() != vars(args).keys():
            raise ValueError("it is another script's")
    except Exception as error:                                       # missing, cut short, not a checkpoint
        die(f"cannot resume {args.resume}, its last.pt is no whole checkpoint ({error}): start a new run")
    return argparse.Namespace(**state["config"] | {"out": args.resume}), state


def data_for(args):
    """The data, images on the device; ends the program if this run cannot take them."""
    data = load_data(args.data)
    if len(data.images) < max(2, args.batch * args.accumulate) or len(data.test_images) < 4:
        die(f"{args.data} has {len(data.images)} training and {len(data.test_images)} test images: --batch "
            f"{args.batch} x {args.accumulate} needs as many training images, 2 at least, and 4 test images")
    if args.amp != "off" and "cpu" in args.device and data.images.ndim == 5:
        die("--amp with volumes needs a GPU: on CPUs oneDNN's bf16 gradient is wrong on 2 x 2 x 2 canvases")
    try:
        return data._replace(images=data.images.to(args.device), test_images=data.test_images.to(args.device))
    except Exception as error:                                       # no such device, or too small a one
        die(f"cannot use --device {args.device} ({str(error).splitlines()[0]}): try --device cpu")


def open_folder(args, state):
    """The run's folder, made where there is none, with config.json in it; --out, or the first free number.

    Ends the program if it holds something else than the run that is resumed. Two runs that start at once do
    not get one number: then exist_ok is False, and the second one ends.
    """
    number = 1
    while (free := Path("runs", f"{Path(sys.argv[0]).stem}-{number}")).exists():
        number += 1
    folder = Path(args.out or free)
    try:
        folder.mkdir(parents=True, exist_ok=bool(args.out))
        if not state and any(folder.iterdir()):
            die(f"{folder} is not empty: choose another --out, or continue with --resume {folder}")
        (folder / "config.json").write_text(json.dumps(vars(args), indent=1))
    except OSError as error:
        die(f"cannot write into {folder} ({error.strerror}): choose another --out")
    return folder


# ==== This script ===========================================================================================
# ---- Does it learn, or cheat? ------------------------------------------------------------------------------
@torch.no_grad()
def noise_meters(model, shape):
    """Whether views of pure noise [B, C, *S] find their partners, though only their slot could tell.

    model in eval mode -> gate, if there is one; noise_nt_xent of two unrelated views; noise_exchanged, the
    same with partners exchanged; chance, log(2B - 1). Where embeddings spread both lie above chance; the
    first well below the second is a shortcut.
    """
    device = next(model.parameters()).device
    noise1 = torch.rand(shape).to(device)
    noise2 = torch.rand(shape).to(device)
    z1, z2 = model.embed(noise1, noise2)
    own = nt_xent(z1, z2, model.temperature)
    exchanged = nt_xent(z1, z2.roll(1, 0), model.temperature)
    meters = {"gate": model.fusion.gate.item()} if model.fusion else {}
    meters["noise_nt_xent"] = own.item()
    meters["noise_exchanged"] = exchanged.item()
    meters["chance"] = math.log(2 * shape[0] - 1)
    return meters


def noise_verdict(model, shape, draws=20):
    """What the noise meters say, in a sentence; a difference of a tenth (our threshold) is a shortcut."""
    meters = [noise_meters(model, shape) for _ in range(draws)]
    own = sum(line["noise_nt_xent"] for line in meters) / draws
    exchanged = sum(line["noise_exchanged"] for line in meters) / draws
    chance = meters[0]["chance"]
    said = "SHORTCUT, slots give partners away" if own < 0.9 * exchanged else "Slots give no partner away"
    return (f"{said}: NT-Xent of pure noise {own:.2f}, with partners exchanged {exchanged:.2f}, "
            f"chance {chance:.2f}")


@torch.no_grad()
def fused_features(model, images):
    """Features [N, E] of images behind the module, B at a time, in random order; a rest is filled up."""
    count = len(images)
    size = model.fusion.batch
    order = fixed_order(count)                                       # sorted by class they would tell it
    filled = order[torch.arange(count + -count % size) % count]
    h = [model.encoder(model.fuse(images[rows])) for rows in filled.split(size)]
    return torch.cat(h)[order.argsort()].cpu()


# ---- Its options -------------------------------------------------------------------------------------------
RECIPES = {"simclr": dict(batch=64, lr=3e-3, projector=[512, 128]),
           "vicreg": dict(batch=128, lr=3e-3, projector=[512, 512]),
           "falcon": dict(batch=64, lr=6e-3, projector=[64]),
           "icone": dict(batch=64, lr=3e-3, projector=[])}


def head_sizes(text):
    """An option's type: none -> [], or sizes."""
    return [] if text == "none" else layer_sizes(text)


def main():
    parser = options(batch=64, epochs=45, lr=3e-3, least_batch=2)
    add = parser.add_argument
    add("--loss", default="simclr", choices=RECIPES, help="base method; sets batch, lr and projector")
    add("--projector", type=head_sizes, default="512-128", help="sizes of its layers; icone: none")
    add("--no-fusion", action="store_true", help="the base method alone")
    add("--layers", type=int, default=2, choices=range(5), help="conv embeddings; 0: a gain on the images")
    add("--patch", type=bounded(int, 1), default=4, help="side of a patch; must divide the canvas")
    add("--mixing", default="conv", choices=["conv", "grouped", "mixup"],
        help="conv: learned; controls: grouped, no image sees another; mixup, a fixed share, --gate, of one")
    add("--gate", type=bounded(float, -math.inf), help="its first value; if not given 0, with mixup 0.2")
    add("--keep-slots", action="store_true", help="images keep their channels in both views: the shortcut")
    add("--temperature", type=bounded(float, 1e-3), default=0.2, help="of NT-Xent")
    loss = parser.parse_known_args()[0].loss
    parser.set_defaults(**RECIPES[loss])
    args, state = parse(parser)
    if not args.projector and args.loss != "icone":
        die(f"--projector none is for --loss icone: give {args.loss} sizes, as 512-128")
    data = data_for(args)
    canvas = data.images.shape[2:]
    if not args.no_fusion and any(side % args.patch for side in canvas):
        die(f"--patch {args.patch} does not divide the canvas {[*canvas]}: choose another")
    folder = open_folder(args, state)

    torch.manual_seed(args.seed)
    encoder = Encoder(data.images.shape[1], data.images.ndim - 2, args.width, args.depth)
    fusion = None
    if not args.no_fusion:
        fusion = BatchFusion(args.batch, patch=args.patch, layers=args.layers, mixing=args.mixing,
                             keep_slots=args.keep_slots, gate=args.gate)
    model = BASSL(encoder, encoder.features, fusion, loss=args.loss, projector=args.projector,
                  count=len(data.images), temperature=args.temperature, seed=args.seed)
    model.to(args.device)

    groups = {"network": [], "gate": [], "table": []}
    for name, parameter in model.named_parameters():
        own = {"fusion.gate": "gate", "table": "table"}.get(name, "network")
        groups[own].append(parameter)
    parts = [{"params": groups["network"]}]
    if fusion:
        parts.append({"params": groups["gate"], "weight_decay": 0.}) # what closes it shall be the loss
    if args.loss == "icone":
        parts.append({"params": groups["table"], "lr": 10 * args.lr})
    optimizer = torch.optim.AdamW(parts, args.lr, weight_decay=0.05, fused=True)

    untrained = examine(model, data)
    shape = args.batch, *data.images.shape[1:]
    history = train(model, optimizer, data, args, folder, state, partial(noise_meters, shape=shape))
    more_probes = {}
    if fusion:
        model.eval()
        print(f"\ngate {fusion.gate.item():.3f}. {noise_verdict(model, shape)}")
        h = fused_features(model, data.images)
        more_probes["with the module"] = probe(data, h, fused_features(model, data.test_images))
    report(model, data, untrained, history, folder, **more_probes)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        die("interrupted: nothing is lost up to the last whole epoch; continue with --resume and its folder")
