"""BA-SSL: batch fusion, a plug-in that lets the images of a batch see each other before the encoder does.

After Zhang, Shen, Liu, arXiv 2311.09974 (2023). THIS IS A RECONSTRUCTION: the blocks are known (patch
partition, conv embedding, patch restore, learned with the encoder), their layers are not. A batch of views x
[B, C, *S] is cut into patches that are pictures of B channels, so that convolutions mix images. The encoder
sees

    x' = x + share (F(x) - x + mean of the batch),   F = restore . conv embedding . partition

of one view, F brought to a fixed strength and free of x itself, and the other view as it is. Any loss
follows: NT-Xent (SimCLR), or that of vicreg.py, falcon.py, icone.py.

    python ba_ssl.py                                    # SimCLR + fusion, posed digits
    python ba_ssl.py --no-fusion                        # plain SimCLR
    python ba_ssl.py --loss vicreg                      # or falcon, icone; each with or without fusion
    python ba_ssl.py --mixing mixup                     # a control: another image in place of F

Expect k-NN accuracy 0.904 ± 0.010 and linear 0.910 ± 0.007 (mean ± std, 5 seeds; raw pixels 0.593,
0.169; random encoder 0.287 ± 0.064, 0.214 ± 0.029) in 105 s on one core of an AMD EPYC with torch
2.13.0, in 70 to 190 s on two. Plain SimCLR has 0.880 ± 0.018 and 0.896 ± 0.011. What is learned adds
nothing to that: the same convolutions never trained gain as much, and so does a fifth of one other image
(README, Results).

Choices of our own: (1) The share is fixed. A gate that is learned closes: what other images add differs
between two views, and to the loss it is noise. (2) A fused view meets a clean one. (3) A layer is a 3x3
convolution over B channels inside the patch, without bias or norm. (4) Slots are drawn anew in each call: a
convolution over slots that stay could stamp both views of an image with its slot's mark and solve NT-Xent
without a look at the image. (5) At evaluation the module is dropped. (6) SimCLR's settings suit digits: batch
64, AdamW, t = 0.2, views by pose, light, noise. (7) IConE is simpler than in icone.py: a table drawn at
random, all of it the bank and in AdamW; batch norm for the centring.
"""
import argparse
import json
import math
import os
import signal
import sys
import time
import warnings
from collections import namedtuple
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")      # before torch: idle threads soon sleep,
os.environ.setdefault("GOMP_SPINCOUNT", "1000")          # so that other programs may work
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)         # Ctrl-C while the packages load: no traceback
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from tqdm import tqdm

from einops import rearrange

from kernels import (bank_cross_entropy, bank_logsumexp, collapse_panel, dictionary_loss, few_label_accuracy,
                     knn_accuracy, runs, variance_covariance, verdict)
from kernels.images import Data, digest, encode, fixed_order, limited, pixels, read_images, some
from kernels.pictures import plot_curves, plot_embedding, plot_neighbours, plot_views
from kernels.runs import die
from kernels.views import cropped_view, posed_view, two_views, uniform, warp


# ==== The method ============================================================================================
class BatchFusion(nn.Module):
    """x + share (F(x) - x + mean) for views x [B, C, H, W] or [B, C, D, H, W] of exactly B = `batch` images.

    F(x) shows the other images as image i sees them. x less its mean over the batch is cut into patches of
    side `patch`, each a small picture of B channels, an image a channel; `layers` convolutions 3x3 (axes=3:
    3x3x3) mix channels; patches are put back. No bias, so equal images mix to nothing; what lies along the
    own image is taken out, and the rest gets the strength of x less its mean: others' part is `share` at any
    number of layers, in the first step and in the last. What of the others is learned.

    mixing: conv; three controls: random, conv not trained; grouped, each image with its own channel alone;
    mixup, F(x) = another image, without layers.
    keep_slots: image i is channel i in every call; otherwise each call deals the images to the channels anew.

    Call it for each view by itself, leave out an incomplete last batch, and use the encoder alone in the end:
    eval() changes nothing. ValueError for another mixing, one image, no layers, another B or rank of x, a
    side that `patch` does not divide.
    """

    IMAGES = {4: "b c (h p) (w q)", 5: "b c (d o) (h p) (w q)"}
    PATCHES = {4: "(c h w) b p q", 5: "(c d h w) b o p q"}

    def __init__(self, batch, patch=4, layers=2, share=0.2, mixing="conv", keep_slots=False, axes=2):
        super().__init__()
        if mixing not in ("conv", "random", "grouped", "mixup"):
            raise ValueError(f"mixing {mixing!r} is none of conv, random, grouped, mixup")
        if batch < 2 or layers < 1:
            raise ValueError(f"batch = {batch}, layers = {layers}: it takes two images and a layer to mix")
        self.batch = batch
        self.patch = patch
        self.share = share
        self.mixing = mixing
        self.keep_slots = keep_slots
        self.axes = axes
        conv = nn.Conv2d if axes == 2 else nn.Conv3d
        groups = batch if mixing == "grouped" else 1
        self.embedding = nn.ModuleList()
        for _ in range(0 if mixing == "mixup" else layers):
            self.embedding.append(conv(batch, batch, 3, padding=1, groups=groups, bias=False))
        self.requires_grad_(mixing != "random")

    def partition(self, x):
        """[B, C, *S] -> [C x patches, B, *patch]: a pixel's neighbours are those that it had."""
        sides = dict.fromkeys("pq" if x.ndim == 4 else "opq", self.patch)
        return rearrange(x, f"{self.IMAGES[x.ndim]} -> {self.PATCHES[x.ndim]}", **sides)

    def restore(self, patches, shape):
        """The inverse; shape = [B, C, *S]."""
        axes = len(shape)
        sides = {axis: side // self.patch for axis, side in zip("hw" if axes == 4 else "dhw", shape[2:])}
        return rearrange(patches, f"{self.PATCHES[axes]} -> {self.IMAGES[axes]}", c=shape[1], **sides)

    @staticmethod
    @torch.compiler.disable                                          # torch 2.13 cannot compile it
    def deal(count):
        """A slot for each image; drawn on the CPU, whose generator's state is in checkpoints."""
        return torch.randperm(count)

    def mix(self, x):
        """x [B, C, *S], of mean 0 over the batch, in slots -> what the other slots bring, as strong as x."""
        if self.mixing == "mixup":
            return x.roll(1, 0)
        patches = self.partition(x)
        strength = rms(patches)
        for conv in self.embedding:
            patches = conv(patches)
            patches = patches * (strength / rms(patches))
        mixed = self.restore(patches, x.shape)
        if self.mixing != "grouped":
            own = (mixed * x).flatten(1).sum(1) / x.square().flatten(1).sum(1).clamp(min=1e-12)      # [B]
            mixed = mixed - x * own.view(-1, *[1] * (x.ndim - 1))
        return mixed * (rms(x) / rms(mixed))

    def forward(self, x):
        divisible = all(side % self.patch == 0 for side in x.shape[2:])
        if x.ndim != 2 + self.axes or len(x) != self.batch or not divisible:
            raise ValueError(f"views are {[*x.shape]}, but must be [B, C, {'D, ' * (self.axes == 3)}H, W], "
                             f"B = {self.batch} and sides divisible by {self.patch}: drop what is left over")
        order = torch.arange(len(x)) if self.keep_slots else self.deal(len(x))
        order = order.to(x.device)
        differs = x - x.mean(0)
        mixed = self.mix(differs[order])[order.argsort()]
        return x + self.share * (mixed - differs)


def rms(x):
    return x.square().mean().sqrt().clamp(min=1e-6)


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
    """falcon.py's terms, L2-normalised, for z1, z2 [B, f]; a smaller dictionary, and beta does not rise."""
    same_shape(z1, z2)
    n, f = z1.shape
    length = math.sqrt(f / n)
    temperature = f / (math.sqrt(n) * math.log((1 - eps * (codes - 1)) / eps))
    z1 = length * F.normalize(z1)
    z2 = length * F.normalize(z2)
    prior, cross_entropy = dictionary_loss(z1, z2, codes, seed, temperature)
    return {"prior": prior, "cross_entropy": cross_entropy}


def icone_terms(z1, z2, table, index, temperature=0.2):
    """icone.py's terms for z1, z2 [B, D] of the images index [B] of table [N, D], any lengths of rows.

    Its defaults, but for the bank, which is the table, with gradient: both rows of a pair move, not one.
    """
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
           "icone": {"alignment": 1, "diversity": 3}}                # half of icone.py's: see icone_terms


class BASSL(nn.Module):
    """Fusion (or None), an encoder to `features` numbers, a projector with layers of these sizes, and a loss.

    both: fuse both views, each by itself; otherwise a fused view meets a clean one. loss: simclr, vicreg,
    falcon, icone; count: training images, icone has a row for each. temperature: of NT-Xent. seed: of
    falcon's dictionary. ValueError for another loss.
    """

    def __init__(self, encoder, features, fusion=None, both=False, loss="simclr", projector=(512, 128),
                 count=0, temperature=0.2, seed=0):
        super().__init__()
        if loss not in WEIGHTS:
            raise ValueError(f"loss {loss!r} is none of {', '.join(WEIGHTS)}")
        self.encoder = encoder
        self.fusion = fusion
        self.both = both
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
        """z [B, D] of both views, each projected by itself; the encoder looks at single images."""
        views = torch.cat([self.fuse(view1), self.fuse(view2) if self.both else view2])
        h1, h2 = self.encoder(views).chunk(2)                        # [B, E]
        if self.training:
            h1, h2 = runs.gather(h1), runs.gather(h2)
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
# Under torchrun a process has views of its own B / processes images, and all of index; runs.gather(h) gives
# the features of all, so that projector and terms are those of the whole batch, in every process.
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
    """Compact ResNet: [N, C, H, W] or [N, C, D, H, W] -> h [N, 8 width].

    Its stem keeps the canvas; with large=True it divides it by 4, as ResNet's: 7x7 with stride 2, max-pool.
    """

    def __init__(self, channels, axes, width=16, depth=1, large=False):
        super().__init__()
        self.config = dict(channels=channels, axes=axes, width=width, depth=depth, large=large)
        self.features = 8 * width
        conv = nn.Conv2d if axes == 2 else nn.Conv3d
        kernel, stride = (7, 2) if large else (3, 1)
        self.stem = conv_norm(conv, channels, width, kernel, stride)
        if large:                                                    # before the norm: a quarter of its work
            self.stem.insert(1, nn.MaxPool2d(3, 2, 1) if axes == 2 else nn.MaxPool3d(3, 2, 1))
        self.stem.append(nn.ReLU())
        self.stages = nn.Sequential()
        for _ in range(3):
            for stride in [2] + [1] * (depth - 1):                   # 2 halves the canvas, doubles the width
                self.stages.append(Block(conv, width, stride * width, stride))
                width = stride * width
        # oneDNN 3.x gets the gradients of strided 1x1 convolutions, the skips', wrong, or crashes, where
        # fewer than 8 channels lie last.
        if self.features >= 128:
            layout = torch.channels_last if axes == 2 else torch.channels_last_3d
            self.to(memory_format=layout)

    def forward(self, x):
        return self.stages(self.stem(x)).flatten(2).mean(2)          # of [N, 8 width, *S/8 or *S/32]


# ---- Data and augmentation ---------------------------------------------------------------------------------
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
    return Data(x[:1437], y[:1437], x[1437:], y[1437:], classes=digits.target_names)


def load_data(name, size=64, channels_last=False, views="auto"):
    """The digits, or what read_images finds in a file or folder; with the views that suit it."""
    if name in ("digits", "digits3d"):
        data = posed_digits(2 if name == "digits" else 3)
    else:
        try:
            data = read_images(name, size, channels_last)
        except (OSError, ValueError) as error:
            die(str(error))
    photographs = data.images.shape[1] == 3 and len(data.images.shape) == 4
    if views == "crops" and not photographs:
        die(f"--views crops: {name} holds no 2-D images of three channels; use poses")
    return data._replace(view=cropped_view if photographs and views != "poses" else posed_view)


# ---- Training ----------------------------------------------------------------------------------------------
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
    written at the start, after each epoch, every `save_minutes` and at a signal, which ends the program.
    state: the checkpoint to go on from, or None. meters(model in eval mode) -> {name: number}, put into the
    epoch's line as "meters" if given.
    """
    images = data.images
    device = next(model.parameters()).device
    few = limited(data)
    step_size = args.batch * args.accumulate
    steps = len(images) // step_size                                 # in an epoch; the rest is dropped
    total = args.epochs * steps
    # For Adam the noise of a step stays alike if the rate follows sqrt(batch), arXiv 2205.10287; 128 is where
    # --lr was chosen. The schedule multiplies the learning rates that the optimizer was made with.
    peak = math.sqrt(step_size / 128)
    factor = partial(learning_rate, steps=total, peak=peak)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    generator = torch.Generator(device)                              # of views; process 0's also of the order
    generator.manual_seed((args.seed * runs.processes() + runs.rank()) % 2**63)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    history = []
    begun = None                                                     # an epoch's order, steps done, sums
    if state:
        try:
            for name, part in parts.items():
                part.load_state_dict(state[name])
            torch.set_rng_state(state["torch_rng"])                  # what models themselves draw, on the CPU
            if runs.rank() < len(state["generators"]):
                generator.set_state(state["generators"][runs.rank()])
            history, begun = state["history"], state["begun"]
            done = len(history) * steps + (begun["step"] if begun else 0)
            if schedule.last_epoch != done:
                raise ValueError(f"steps {done} and {schedule.last_epoch}")
        except Exception as error:                                   # parts missing, of other shapes
            die(f"cannot resume {folder}, its last.pt does not fit ({error}): start a new run")

    def checkpoint():
        losses = [line["loss"] for line in history[-1:]]
        if not (np.isfinite(losses).all() and all(weight.isfinite().all() for weight in model.parameters())):
            die(f"loss or weights are not finite after epoch {len(history)}: start anew, with a lower --lr")
        whole = {name: part.state_dict() for name, part in parts.items()}
        whole.update(config=vars(args), history=history, begun=begun, torch_rng=torch.get_rng_state(),
                     generators=runs.everyone(generator.get_state()))
        if runs.rank() == 0:
            with runs.whole(folder / "last.pt") as file:
                torch.save(whole, file)
            runs.write_text(folder / "metrics.jsonl", "".join(f"{json.dumps(line)}\n" for line in history))
        return time.monotonic()

    if args.compile:
        # Its own layouts would be channels last for narrow encoders too: see Encoder.
        model.compile(options={"layout_optimization": False})
    run_model = runs.parallel(model)
    own = runs.own_part(args.batch)
    bar = tqdm(total=total, initial=schedule.last_epoch, unit="step", disable=runs.rank() > 0)
    with bar, runs.noted_signals() as caught:
        saved = checkpoint()
        for epoch in range(len(history) + 1, args.epochs + 1):
            model.train()
            if not begun:
                order = torch.randperm(len(images), generator=generator, device=device)[:steps * step_size]
                begun = {"order": runs.first(order.cpu()), "step": 0, "sums": {}}
            sums = begun["sums"]
            order = begun["order"].to(device).view(steps, args.accumulate, args.batch)
            for batches in order[begun["step"]:]:
                optimizer.zero_grad()
                for index in batches:                                # the numbers of `batch` images
                    x = pixels(images, index[own].cpu(), device)
                    views = two_views(x, generator, data.view)
                    with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
                        terms, notes = run_model(*views, index)
                    loss = sum(terms.values())
                    (loss / args.accumulate).backward()
                    for name, value in {"loss": loss, **terms, **notes}.items():
                        # Not .item(): no waiting for a GPU.
                        sums[name] = sums.get(name, 0) + torch.as_tensor(value).detach()
                optimizer.step()
                schedule.step()
                bar.update()
                if bar.n % 10 == 0:
                    bar.set_postfix(loss=loss.item())
                begun["step"] += 1
                late = time.monotonic() - saved > 60 * args.save_minutes
                late, stop = runs.agreed([late, max(caught, default=0)], device)
                if late or stop:
                    saved = checkpoint()
                if stop:                                             # the signal's number
                    bar.close()
                    runs.leave(stop, folder)

            line = {name: value.item() / (steps * args.accumulate) for name, value in sums.items()}
            model.eval()
            if meters:
                line["meters"] = meters(model)
            if epoch % max(1, args.epochs // 8) == 0:                # some eight times
                h_test = encode(model.encoder, few.test_images, device=device)
                with torch.no_grad():
                    z = model.projector(h_test[some(len(h_test), 256)])
                line["RankMe"] = collapse_panel(z)["RankMe"]
                if data.labels is not None:
                    h = encode(model.encoder, few.images, device=device)
                    line["knn"] = knn_accuracy(h, few.labels, h_test, few.test_labels)
            history.append({"epoch": epoch, **line})
            begun = None
            saved = checkpoint()
    if caught:                                                       # after the last step
        runs.leave(caught[-1], folder)
    return history


# ---- Report ------------------------------------------------------------------------------------------------
# Features [n, E] of training and test images on the CPU, what probe() gives, panels by name.
Findings = namedtuple("Findings", "h h_test probe panels")


def small_pixels(x):
    """Images [n, C, *S] -> [n, numbers], on canvases of 32 x 32 or 16 x 16 x 16 at most."""
    most = 32 if x.ndim == 4 else 16
    sides = [min(side, most) for side in x.shape[2:]]
    return F.interpolate(x, sides, mode="area").flatten(1)


def probe(data, h, h_test):
    """Accuracy of k-NN, of a linear probe and from 1, 5, 10 labels a class.

    linear: logistic regression on standardised features, 300 steps at most.
    """
    if data.labels is None:
        return {}
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                              # of raw pixels: they go on for minutes
        linear.fit(h, data.labels)
    known = h, data.labels, h_test, data.test_labels
    return {"k-NN": knn_accuracy(*known), "linear": linear.score(h_test, data.test_labels)} | {
        f"{labels} a class": few_label_accuracy(*known, labels) for labels in (1, 5, 10)}


@torch.no_grad()
def examine(model, data):
    """What limited() data show: features, their probe, the panels of h and z on up to 2,000 test images."""
    model.eval()
    device = next(model.parameters()).device
    data = limited(data)
    generator = torch.Generator(device).manual_seed(0)

    def encode_views(x):
        return torch.stack([model.encoder(view) for view in two_views(x, generator, data.view)])

    h = encode(model.encoder, data.images, device=device).cpu()
    h_test = encode(model.encoder, data.test_images, device=device)
    rows = some(len(h_test), 2000)
    three_h = h_test[rows], *encode(encode_views, data.test_images, rows, device, axis=1)
    three_z = [model.projector(features) for features in three_h]
    panels = {"encoder h": collapse_panel(*three_h), "projector z": collapse_panel(*three_z)}
    h_test = h_test.cpu()
    return Findings(h, h_test, probe(data, h, h_test), panels)


def begin(model, data, folder):
    """What every run starts with: a line on what is trained on what, views.png, the untrained findings."""
    channels, *sides = data.images.shape[1:]
    canvas = " x ".join(map(str, sides))
    size = sum(parameter.numel() for parameter in model.parameters())
    if runs.rank() == 0:
        plot_views(data, folder)
    print(f"data: {len(data.images):,} train and {len(data.test_images):,} test images, {channels} "
          f"channel{'s' * (channels > 1)}, {canvas} ({len(sides)}-D), {len(data.classes) or 'no'} classes; "
          f"{size:,} parameters on {next(model.parameters()).device}; {folder}")
    return examine(model, data)


def print_table(rows):
    """{row: {column: number}}, a column as wide as its name."""
    columns, *_ = rows.values()
    print(f"\n{'':18}", *(f"{name:>8}" for name in columns))
    for name, row in rows.items():
        print(f"{name:18}", *(f"{row[column]:{max(8, len(column))}.4g}" for column in columns))


def report(model, data, untrained, history, folder, **more_probes):
    """How every run ends: probes, panels, a verdict; report.json, encoder.pt, pictures and features.npz."""
    if runs.rank():
        return
    trained = examine(model, data)
    few = limited(data)
    pixel_rows = [encode(small_pixels, images) for images in (few.images, few.test_images)]
    probes = {"raw pixels": probe(few, *pixel_rows)}
    probes.update({"random encoder": untrained.probe, "trained encoder": trained.probe, **more_probes})
    panels = {"untrained z": untrained.panels["projector z"], **trained.panels}
    sentence = verdict(panels["projector z"], panels["untrained z"])
    runs.write_text(folder / "report.json",
                    json.dumps({"probes": probes, "panels": panels, "verdict": sentence}, indent=1))
    encoder = {"config": getattr(model.encoder, "config", {}), "state_dict": model.encoder.state_dict()}
    with runs.whole(folder / "encoder.pt") as file:
        torch.save(encoder, file)                                    # Encoder(**config) makes it anew

    if data.labels is not None:
        print_table(probes)
    print_table(panels)
    print(f"\n{sentence}")
    plot_curves(history, probes, folder)
    plot_neighbours(few, trained.h, trained.h_test, folder)
    plot_embedding(few, trained.h_test, folder)

    h, h_test = trained.h, trained.h_test
    if few is not data:                                              # of all images then
        device = next(model.parameters()).device
        h, h_test = [encode(model.encoder, x, device=device).cpu() for x in (data.images, data.test_images)]
    labels = {}
    if data.labels is not None:
        labels = {"train_labels": data.labels, "test_labels": data.test_labels, "classes": data.classes}
    with runs.whole(folder / "features.npz") as file:
        np.savez(file, train_features=h, test_features=h_test, **labels)
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
    return [bounded(int, 1, 2**20)(size) for size in text.split("-")]


def options(batch, epochs, lr, least_batch=1):
    """The command line that every script has; the defaults of some options are the script's own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = die
    parser.set_defaults(encoder=None, digest=None)                   # its config, the data's, once there
    add = parser.add_argument
    count = bounded(int, 1)
    add("--data", default="digits",
        help="digits, digits3d, a .npz file in MedMNIST's layout, or a folder: of image files (in class "
        "subfolders or not, in train/ with test/ or val/ or not), of .npy volumes, or of train_images.npy")
    add("--size", type=bounded(int, 4, 10_000), default=64, help="canvas of images from a folder, N x N")
    add("--channels-last", action="store_true", help="arrays [N, H, W, C] are images of C bands, not volumes")
    add("--views", default="auto", choices=["auto", "crops", "poses"],
        help="what training shows: crops and colours, as of photographs, or poses; auto: crops for RGB")
    add("--batch", type=bounded(int, least_batch), default=batch,
        help="images at a time; what is left over after the last step is dropped")
    add("--epochs", type=count, default=epochs, help="passes over the training images")
    add("--accumulate", type=count, default=1, help="batches whose gradients are averaged for one step")
    add("--lr", type=bounded(float, 0), default=lr,
        help="peak learning rate of AdamW is this x sqrt(batch x accumulate / 128)")
    add("--width", type=bounded(int, 1, 10_000), default=16,
        help="channels of the encoder's stem; features are 8 x this")
    add("--depth", type=bounded(int, 1, 1000), default=1, help="residual blocks in each of three stages")
    add("--seed", type=bounded(int, 0, 2**63), default=0, help="of weights, order and views; not of the data")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...")
    add("--amp", default="off", choices=["off", "bf16"], help="mixed precision; losses stay fp32")
    add("--compile", action="store_true", help="torch.compile the model; the first step takes a minute")
    add("--out", type=filled, help="run folder, new or empty; if not given runs/SCRIPT-1, -2, ...")
    add("--save-minutes", type=bounded(float, 0), default=10.,
        help="a checkpoint within an epoch is no older than this; there is one after each epoch")
    add("--init", type=filled,
        help="a run's folder or encoder.pt: start from its encoder, of its width and depth")
    add("--resume", type=filled, help="folder of a run to continue, with its own options")
    return parser


def filled(text):
    """An option's type: any text but none, which an unset variable leaves."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; is a variable unset?")
    return text


def parse(parser):
    """The options, and the checkpoint to go on from or None; a resumed run keeps its own options, but for
    --out, which is where it lies now."""
    args = parser.parse_args()
    if args.resume is None:
        return args, None
    if sum(word.startswith("--") for word in sys.argv) > 1:
        die("--resume takes no other option: the run keeps its own")
    try:
        state = runs.load(Path(args.resume, "last.pt"))
        config = dict(state["config"])
        if config.keys() != vars(args).keys():
            raise ValueError("it is another script's, or another version's")
        found = {name: config.pop(name) for name in ("encoder", "digest")}
        Encoder(**found["encoder"])
        config["out"] = args.resume
        args = parser.parse_args(runs.as_typed(config))              # what cannot be typed ends here
    except Exception as error:                                       # missing, cut short, not a checkpoint
        die(f"cannot resume {args.resume}, its last.pt is no whole checkpoint ({error}): start a new run")
    return argparse.Namespace(**vars(args) | found), state


def data_for(args):
    """The data; ends the program if this run cannot take them."""
    try:
        args.device = runs.join_processes(args.device)
        torch.zeros(1, device=args.device).item()
    except Exception as error:                                       # no such device, or none that computes
        die(f"cannot use --device {args.device} ({str(error).splitlines()[0]}): try --device cpu")
    if args.batch % runs.processes():
        die(f"--batch {args.batch} is that of all {runs.processes()} processes: give a multiple")
    with runs.in_turn():                                             # one decodes, the others find the array
        data = load_data(args.data, args.size, args.channels_last, args.views)
    if len(data.images) < max(2, args.batch * args.accumulate) or len(data.test_images) < 4:
        die(f"{args.data} has {len(data.images)} training and {len(data.test_images)} test images: --batch "
            f"{args.batch} x {args.accumulate} needs as many training images, 2 at least, and 4 test images")
    if args.amp != "off" and "cpu" in args.device and len(data.images.shape) == 5:
        die("--amp with volumes needs a GPU: on CPUs oneDNN's bf16 gradient is wrong on 2 x 2 x 2 canvases")
    found = digest(data.images)
    if args.digest not in (None, found):
        die(f"cannot resume: {args.data} holds other images than those this run began with")
    args.digest = found
    return data


def encoder_for(args, data):
    """An Encoder for these images, new or that of --init; ends the program if it does not fit them."""
    channels, *sides = data.images.shape[1:]
    wanted = dict(channels=channels, axes=len(sides))
    if args.encoder:                                                 # a resumed run: its weights come later
        return Encoder(**args.encoder | wanted)
    if args.init:
        path = Path(args.init)
        try:
            saved = runs.load(path / "encoder.pt" if path.is_dir() else path)
            encoder = Encoder(**saved["config"])
            encoder.load_state_dict(saved["state_dict"])
        except Exception as error:                                   # missing, cut short, another network's
            die(f"--init {path} has no encoder.pt of these scripts ({error}): give a finished run's folder")
        if not wanted.items() <= encoder.config.items():
            die(f"--init {path}: its encoder is {encoder.config}, but {args.data} has {wanted}")
    else:
        encoder = Encoder(**wanted, width=args.width, depth=args.depth, large=min(sides) >= 96)
    args.encoder = encoder.config
    return encoder


def open_folder(args, state):
    """The run's folder, made where there is none, with config.json in it; --out, or the first free number.

    Ends the program if it holds something else than the run that is resumed. Two runs that start at once do
    not get one number: then exist_ok is False, and the second one ends.
    """
    if runs.rank():
        return runs.first(None)
    number = 1
    while (free := Path("runs", f"{Path(sys.argv[0]).stem}-{number}")).exists():
        number += 1
    folder = Path(args.out or free)
    try:
        folder.mkdir(parents=True, exist_ok=bool(args.out))
        runs.hold(folder)
        there = {file.name for file in folder.iterdir() if file.suffix != ".part"}
        if not state and there - {"config.json", "views.png"}:       # these alone: its start was cut short
            die(f"{folder} is not empty: choose another --out, or continue with --resume {folder}")
        runs.write_text(folder / "config.json", json.dumps(vars(args), indent=1))
    except BlockingIOError:
        die(f"another run is at work in {folder}: wait until it ends, or choose another --out")
    except OSError as error:
        die(f"cannot write into {folder} ({error.strerror}): choose another --out")
    return runs.first(folder)


# ==== This script ===========================================================================================
# ---- Does it mix? Does it cheat? ---------------------------------------------------------------------------
@torch.no_grad()
def mixing_meters(fusion, x, deals=16):
    """What the module adds to images x [B, C, *S], in `deals` calls; rms, over that of x.

    own: what stays however the slots are dealt. others: what differs. bias: what is added to equal images.
    """
    added = torch.stack([fusion(x) - x for _ in range(deals)])       # [deals, B, C, *S]
    own = added.mean(0)
    equal = x.mean(0).expand_as(x)
    found = {"own": own, "others": added - own, "bias": fusion(equal) - equal}
    return {name: (part.norm() / part.numel() ** 0.5 / rms(x)).item() for name, part in found.items()}


@torch.no_grad()
def noise_meters(model, shape):
    """Whether views of pure noise [B, C, *S] find their partners, though only their slot could tell.

    model in eval mode -> noise_nt_xent of two unrelated views; noise_exchanged, the same with partners
    exchanged; chance, log(2B - 1). Where embeddings spread both lie above chance; the first well below the
    second is a shortcut.
    """
    device = next(model.parameters()).device
    noise1 = torch.rand(shape).to(device)
    noise2 = torch.rand(shape).to(device)
    z1, z2 = model.embed(noise1, noise2)
    own = nt_xent(z1, z2, model.temperature)
    exchanged = nt_xent(z1, z2.roll(1, 0), model.temperature)
    return {"noise_nt_xent": own.item(), "noise_exchanged": exchanged.item(),
            "chance": math.log(2 * shape[0] - 1)}


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
    device = next(model.parameters()).device
    h = []
    for rows in filled.split(size):
        x = pixels(images, rows, device)
        h.append(model.encoder(model.fuse(x)))
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
    parser = options(batch=64, epochs=55, lr=3e-3, least_batch=2)
    add = parser.add_argument
    add("--loss", default="simclr", choices=RECIPES, help="base method; sets batch, lr and projector")
    add("--projector", type=head_sizes, default="512-128", help="sizes of its layers; icone: none")
    add("--no-fusion", action="store_true", help="the base method alone")
    add("--layers", type=int, default=2, choices=range(1, 5), help="conv embeddings")
    add("--patch", type=bounded(int, 1), default=4, help="side of a patch; must divide the canvas")
    add("--share", type=bounded(float, 0, 1), default=0.2, help="of an image that others take the place of")
    add("--mixing", default="conv", choices=["conv", "random", "grouped", "mixup"],
        help="conv: learned; controls: random, never trained; grouped, own image alone; mixup, one other")
    add("--both", action="store_true", help="fuse both views; otherwise a fused view meets a clean one")
    add("--keep-slots", action="store_true", help="images keep their channels in all calls: with --both a "
        "shortcut")
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
    own = args.batch // runs.processes()                             # a process fuses its own images
    if not args.no_fusion and own < 2:
        die(f"--batch {args.batch} leaves each process one image, with none to mix: give a larger one")
    torch.manual_seed(args.seed)
    encoder = encoder_for(args, data)
    folder = open_folder(args, state)

    fusion = None
    if not args.no_fusion:
        fusion = BatchFusion(own, patch=args.patch, layers=args.layers, share=args.share, mixing=args.mixing,
                             keep_slots=args.keep_slots, axes=len(canvas))
    model = BASSL(encoder, encoder.features, fusion, both=args.both, loss=args.loss,
                  projector=args.projector, count=len(data.images), temperature=args.temperature,
                  seed=args.seed)
    model.to(args.device)

    network = [weight for name, weight in model.named_parameters() if name != "table"]
    parts = [{"params": network}]
    if args.loss == "icone":
        parts.append({"params": [model.table], "lr": 10 * args.lr})
    optimizer = torch.optim.AdamW(parts, args.lr, weight_decay=0.05, fused=True)

    untrained = begin(model, data, folder)
    shape = own, *data.images.shape[1:]
    sample = pixels(data.images, fixed_order(len(data.images))[:own], args.device)

    def meters(model):
        mixing = mixing_meters(fusion, sample) if fusion else {}
        return mixing | noise_meters(model, shape)

    history = train(model, optimizer, data, args, folder, state, meters)
    more_probes = {}
    if fusion:
        model.eval()
        shares = ", ".join(f"{name} {value:.3f}" for name, value in mixing_meters(fusion, sample).items())
        print(f"\nadded to an image, of its own strength: {shares}. {noise_verdict(model, shape)}")
        few = limited(data)
        h = fused_features(model, few.images)
        more_probes["with the module"] = probe(few, h, fused_features(model, few.test_images))
    report(model, data, untrained, history, folder, **more_probes)


if __name__ == "__main__":
    runs.run(main)
