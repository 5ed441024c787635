"""FALCON: a fixed random dictionary of codes and a uniform prior, proof against four kinds of collapse.

Sansone, Lebailly, Tuytelaars, arXiv 2410.04959, as the authors' code has it (emsansone/CPLearn). Embeddings z
[n, f] of a view (h in the paper) are compared with c codes, random signs W [c, f], never trained:

    p = softmax(z W^T / tau),   L = KL(mean p || uniform) + beta CE(p, p')

each term a mean over the two views, gradients into both. CE wants each image sure of its code and both
views to agree; the prior wants all codes used. Images share codes only as far as n / c forces them to, and
W^T W / c goes to 1: with many codes embeddings fill all of R^f.

    python falcon.py                                    # posed digits
    python falcon.py --codes 16384                      # more codes, for more images
    python falcon.py --prior none                       # collapse, and the meters that show it
    python falcon.py --recipe released                  # the authors' settings, for hours rather than minutes

Expect k-NN accuracy 0.913 ± 0.001 and linear 0.933 ± 0.004 (mean ± std, 3 seeds; raw pixels 0.593, 0.169;
random encoder 0.307 ± 0.042, 0.222 ± 0.018) in 60 to 150 s on 2 cores of an AMD EPYC with torch 2.13.0; on
one thread, which rounds otherwise, 0.923 ± 0.002 and 0.938 ± 0.003.

Deviations from the released code: (1) beta rises from 0 to 1 over the run: the prior spreads images over the
codes before they settle (release: 1 throughout). L2-normalised embeddings (the preprint's), f = 128, c =
4,096, lr 6e-3, 45 epochs (release: tanh, 2048, 16,384, 2.5e-4, 1000): a short run with tanh does not leave
the plateau at log c. --recipe released keeps theirs. (2) log mean p by logsumexp: from probabilities it is
NaN once a code underflows. (3) The dictionary comes from a hash of the seed and is in no checkpoint. (4)
Small encoder with GroupNorm; AdamW; views by pose, light, noise. (5) --prior forward is the preprint's form,
known at second hand. (6) The learnable dictionaries are our reading of three names; none is released.
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
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from tqdm import tqdm
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from sklearn.mixture import GaussianMixture

from kernels import (bank_topk, collapse_panel, dictionary_loss, dictionary_reference, dictionary_signs,
                     few_label_accuracy, knn_accuracy, runs, verdict)
from kernels.images import Data, digest, encode, fixed_order, limited, pixels, read_images, some
from kernels.pictures import plot_curves, plot_embedding, plot_neighbours, plot_views, save_figure
from kernels.runs import die
from kernels.views import cropped_view, posed_view, two_views, uniform, warp


# ==== The method ============================================================================================
def derived_temperature(n, f, codes, eps=1e-8):
    """tau = f / (sqrt(n) Lam), Lam = log((1 - eps (c - 1)) / eps): the released code's, for n images a view.

    With orthogonal codes, z = w_j / sqrt(n) then gives 1 - eps (c - 1) to code j and eps to each other one.
    ValueError unless 0 < eps < 1 / (c - 1).
    """
    others = eps * (codes - 1)
    if not 0 < others < 1:
        raise ValueError(f"eps {eps} must be above 0 and below 1 / (codes - 1), {codes} codes at least 2")
    return f / (math.sqrt(n) * math.log((1 - others) / eps))


class Sphere(nn.Module):
    """Rows of length sqrt(f / n): the preprint's embeddings, in place of tanh."""

    def __init__(self, length):
        super().__init__()
        self.length = length

    def forward(self, x):
        return self.length * F.normalize(x)


def head(features, sizes, final):
    """h [B, features] -> z [B, sizes[-1]]: Linear, BatchNorm, ReLU; at last `final` in place of ReLU."""
    layers = nn.Sequential()
    for size in sizes:
        layers.extend([nn.Linear(features, size), nn.BatchNorm1d(size), nn.ReLU()])
        features = size
    layers[-1] = final
    return layers


class FALCON(nn.Module):
    """An encoder to `features` numbers, a projector with layers of these sizes, a dictionary of codes.

    batch: images of a view, n. temperature: over the derived one. prior: reverse, forward or none.
    rise: calls in training in which beta rises from 0, so that codes are spread before images settle on one.
    dictionary: fixed, or one of three learnable ones, which start at the fixed one and keep its rows' length:
    learned by gradient; hybrid, a quarter of it by gradient; alternating, a step of k-means every 8 batches
    on the embeddings of the last 32.
    """

    def __init__(self, encoder, features, batch, projector=(128,), codes=4096, norm="l2", prior="reverse",
                 beta=1., rise=0, temperature=1., eps=1e-8, dictionary="fixed", seed=0):
        super().__init__()
        f = projector[-1]
        final = nn.Tanh() if norm == "tanh" else Sphere(math.sqrt(f / batch))
        self.encoder = encoder
        self.projector = head(features, projector, final)
        self.temperature = temperature * derived_temperature(batch, f, codes, eps)
        self.prior = prior
        self.beta = beta
        self.rise = rise
        if rise:
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.dictionary = dictionary
        self.codes = codes
        self.width = f
        self.seed = seed
        if dictionary != "fixed":
            moving = max(1, codes // 4) if dictionary == "hybrid" else codes
            start = dictionary_signs(moving, f, seed)
            self.moving = nn.Parameter(start, requires_grad=dictionary != "alternating")
        if dictionary == "alternating":
            self.register_buffer("seen", torch.zeros(32, 2 * batch, f))
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def code_vectors(self):
        """W [codes, f], rows of length sqrt(f)."""
        device = next(self.parameters()).device
        fixed = dictionary_signs(self.codes, self.width, self.seed, device=device)
        if self.dictionary == "fixed":
            return fixed
        moved = F.normalize(self.moving) * math.sqrt(self.width)
        return torch.cat([moved, fixed[len(moved):]])

    @torch.no_grad()
    def cluster(self, z):
        """z [2n, f] -> one step of k-means: codes move to the mean of the embeddings nearest to them."""
        self.seen[self.count % 32] = z
        self.count += 1
        if self.count % 8 == 0:
            z = self.seen[:self.count].flatten(0, 1)
            _, nearest = bank_topk(z, self.code_vectors(), 1)        # [.., 1]
            code = nearest[:, 0]
            means = torch.zeros_like(self.moving).index_add_(0, code, z)
            used = means.norm(dim=1) > 0
            self.moving[used] = F.normalize(means[used]) * math.sqrt(self.width)

    def forward(self, view1, view2, index=None):
        h1, h2 = self.encoder(torch.cat([view1, view2])).chunk(2)    # [B, E]
        z1 = self.projector(runs.gather(h1))                         # [B, f]
        z2 = self.projector(runs.gather(h2))
        prior = "reverse" if self.prior == "none" else self.prior
        beta = self.beta
        notes = {}
        if self.training and self.rise:
            self.calls += 1
            beta = notes["beta"] = beta * (self.calls / self.rise).clamp(max=1)
        if self.dictionary == "fixed":
            kl, ce = dictionary_loss(z1, z2, self.codes, self.seed, self.temperature, prior)
        else:
            if self.dictionary == "alternating" and self.training:
                self.cluster(torch.cat([z1, z2]).float())
            with torch.autocast(z1.device.type, enabled=False):
                W = self.code_vectors()
                kl, ce = dictionary_reference(z1.float(), z2.float(), W, self.temperature, prior)
        if self.prior == "none":
            return {"cross_entropy": beta * ce}, notes | {"prior": kl}
        return {"prior": kl, "cross_entropy": beta * ce}, notes


def loss_values(n, codes, used, beta=1., eps=1e-8, prior="reverse"):
    """{what the embeddings do: the least loss then}, derived for the reverse prior; of others the optimum."""
    used = min(used, n)                                              # a batch uses at most n codes
    most = min(1, beta)
    rest = eps * (codes - 1)
    optimum = -beta * ((1 - rest) * math.log1p(-rest) + rest * math.log(eps))
    if prior == "forward":
        return {"optimum": optimum + math.log(codes)}
    if prior == "none":
        return {"optimum, one code for all": optimum}
    times = "" if beta >= 1 else f"{beta:g} "
    one_point = f"representation collapse, {times}log c"
    few_codes = f"cluster collapse to {used} codes, {times}log(c / {used})"
    return {one_point: most * math.log(codes),
            few_codes: most * math.log(codes / used),
            "optimum": max(optimum, most * math.log(codes / n))}


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
# ---- The meters of four collapses --------------------------------------------------------------------------
def entropy(p):
    """-sum p log p in nats; p >= 0 sums to 1."""
    return -torch.special.xlogy(p, p).sum().item()


def assign(z, W, temperature):
    """Most likely code [N] and mean assignment [c] of z [N, f] to W [c, f]."""
    codes = []
    total = 0
    for rows in z.split(64):
        logits = rows @ W.T                                          # [64, c]
        codes.append(logits.argmax(1))
        p = (logits / temperature).softmax(1)
        total = total + p.sum(0)
    return torch.cat(codes), total / len(z)


def mixture_entropy(z, components, samples):
    """Entropy, by sampling, of a mixture of diagonal Gaussians fitted to z [N, f], over f; in nats.

    Low where clusters are points, not clouds. The released code (main_collapses.py) rescales embeddings to
    [0, 1] and pads them with zeros to 2048 dimensions, starts from k-means, takes 10 times 10,000 samples and
    does not divide by f: its values are others, only their order between runs can be compared.
    """
    start = "random_from_data"
    mixture = GaussianMixture(components, covariance_type="diag", init_params=start, random_state=0)
    mixture.fit(z.numpy())
    drawn, _ = mixture.sample(samples)
    log_density = mixture.score_samples(drawn)
    return -float(log_density.mean()) / z.shape[1]


@torch.no_grad()
def collapse_meters(z, W, temperature, mixtures=(10,), samples=2000):
    """What tells the four collapses apart, on embeddings z [N, f] and codes W [c, f] -> {name: number}.

    representation: std over images, mean over dimensions; mean cosine of pairs (1: one point)
    dimensional: exp entropy of the eigenvalues of M = z^T z / N, uncentred (f: all dimensions alike); rms of
    M's off-diagonal over the mean of its diagonal
    cluster: codes that are some image's most likely one; entropy of the mean assignment (log c: uniform)
    intracluster: mixture_entropy for each number of mixtures up to N
    """
    n, f = z.shape
    unit = F.normalize(z)
    code, p = assign(z, W, temperature)
    wide = z.double()
    M = wide.T @ wide / n
    spectrum = torch.linalg.eigvalsh(M).clamp(min=0)
    share = spectrum / spectrum.sum()
    diagonal = M.diagonal()
    off = (M - diagonal.diag()).square().sum() / (f * (f - 1))
    cosines = unit.sum(0).square().sum() - n                         # of all pairs
    meters = {"std": z.std(0).mean().item(),
              "cosine": cosines.item() / (n * (n - 1)),
              "dimensions": math.exp(entropy(share)),
              "off_diagonal": (off.sqrt() / diagonal.mean()).item(),
              "codes": len(code.unique()),
              "assignment_entropy": entropy(p)}
    for components in mixtures:
        if components <= n:
            meters[f"mixture_entropy_{components}"] = mixture_entropy(z, components, samples)
    return meters


@torch.no_grad()
def embed(model, images):
    """z [N, f] on the CPU, of images [N, C, *S]."""
    device = next(model.parameters()).device
    return model.projector(encode(model.encoder, images, device=device)).cpu()


def plot_meters(history, codes, derived, z, folder):
    """meters.png: the loss beside its derived values, and the meters of each collapse."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    epochs = [line["epoch"] for line in history]
    losses = [line["loss"] for line in history]
    axes[0].plot(epochs, losses, label="loss")
    names = {value: name for name, value in derived.items()}         # of equal values the last, the optimum
    for (value, name), style in zip(names.items(), ("--", "-.", ":")):
        axes[0].axhline(value, color="gray", ls=style, label=name)
    _, top = axes[0].get_ylim()
    axes[0].set(title="loss", ylim=(0, 1.6 * top), ylabel="nats")    # room for the legend

    lines = {"std": (axes[1], "std of a dimension (one point: 0)"),
             "cosine": (axes[1], "mean cosine of two images (one point: 1)"),
             "dimensions": (axes[2], f"of {z.shape[1]}"),
             "codes": (axes[4], f"likeliest code of an image, of {codes}"),
             "assignment_entropy": (axes[4], "exp entropy of the mean assignment"),
             "mixture_entropy_10": (axes[5], "of 10 Gaussians")}
    for name, (axis, label) in lines.items():
        values = [line["meters"].get(name, math.nan) for line in history]
        if name == "assignment_entropy":
            values = np.exp(values)                                  # a number of codes too
        axis.plot(epochs, values, label=label)
    axes[1].set(title="representation collapse", ylim=(None, 1))
    axes[2].set(title="dimensional collapse", ylabel="dimensions in use", ylim=(0, None))
    axes[4].set(title="cluster collapse", yscale="log", ylabel="codes in use")
    axes[5].set(title="intracluster collapse", ylabel="entropy / f, nats")

    second_moment = z.double().T @ z.double() / len(z)
    spectrum = torch.linalg.eigvalsh(second_moment).flip(0).clamp(min=1e-12)
    axes[3].semilogy(range(1, len(spectrum) + 1), spectrum, label="of z^T z / N, at the end")
    axes[3].set(title="its spectrum", xlabel="eigenvalue, by size", ylabel="eigenvalue")
    for axis in axes[[0, 1, 2, 4, 5]]:
        axis.set_xlabel("epoch")
    for axis in axes:
        axis.legend(fontsize=7)
    save_figure(figure, folder / "meters.png")


def report_collapses(model, data, history, args, folder):
    """Loss beside its derived values, meters, clusters against classes; meters.png, meters.json."""
    if runs.rank():
        return
    model.eval()
    data = limited(data)
    z = embed(model, data.test_images)
    W = model.code_vectors().cpu()
    mixtures = 10, 20, 50, 100, 200
    meters = {"loss": history[-1]["loss"]}
    meters |= collapse_meters(z, W, model.temperature, mixtures, samples=10_000)
    values = loss_values(args.batch, args.codes, meters["codes"], args.beta, args.eps, args.prior)
    if data.labels is not None:
        code, _ = assign(z, W, model.temperature)
        shuffled = code[fixed_order(len(code))]                      # as many clusters, as large, at random
        meters["NMI"] = normalized_mutual_info_score(data.test_labels, code)
        meters["NMI of a random assignment"] = normalized_mutual_info_score(data.test_labels, shuffled)
        meters["AMI"] = adjusted_mutual_info_score(data.test_labels, code)
    measured = [f"{name} {value:.3g}" for name, value in meters.items()]
    derived = [f"{name} {value:.3g}" for name, value in values.items()]
    print(f"\ntest images: {', '.join(measured)}")
    print(f"least loss: {'; '.join(derived)}")
    runs.write_text(folder / "meters.json", json.dumps({**meters, "least loss": values}, indent=1))
    plot_meters(history, args.codes, values, z, folder)


# ---- Its options -------------------------------------------------------------------------------------------
RELEASED = dict(epochs=1000, lr=2.5e-4 * 2 ** 0.5, weight_decay=1e-4,
                projector=[2048], codes=16384, norm="tanh", beta_rise=0.)


def main():
    parser = options(batch=64, epochs=45, lr=6e-3, least_batch=2)
    add = parser.add_argument
    add("--recipe", default="default", choices=["default", "released"],
        help="released: the authors' settings for options that are not given")
    add("--projector", type=layer_sizes, default="128", help="sizes of the projector's layers; the last is f")
    add("--codes", type=bounded(int, 2, 2**24), default=4096, help="c, size of the dictionary")
    add("--dictionary", default="fixed", choices=["fixed", "learned", "alternating", "hybrid"],
        help="what it does during training")
    add("--norm", default="l2", choices=["tanh", "l2"], help="of z: the release's or the preprint's")
    add("--prior", default="reverse", choices=["reverse", "forward", "none"],
        help="the release's form, the preprint's; none shows the collapse")
    add("--beta", type=bounded(float, 0), default=1., help="weight of the cross-entropy in the end")
    add("--beta-rise", type=bounded(float, 0, 1.1), default=1.,
        help="part of the run in which beta rises from 0")
    add("--temperature", type=bounded(float, 1e-3), default=1., help="over the derived one")
    add("--eps", type=bounded(float, 1e-30), default=1e-8, help="below 1 / (codes - 1): sets the temperature")
    add("--weight-decay", type=bounded(float, 0), default=0.05, help="of AdamW")
    if parser.parse_known_args()[0].recipe == "released":
        parser.set_defaults(**RELEASED)
    args, state = parse(parser)
    if args.eps * (args.codes - 1) >= 1:
        die(f"--eps {args.eps} must be below 1 / (codes - 1), {1 / (args.codes - 1):.3g}: lower one")
    data = data_for(args)
    torch.manual_seed(args.seed)
    encoder = encoder_for(args, data)
    folder = open_folder(args, state)

    calls = len(data.images) // (args.batch * args.accumulate) * args.accumulate * args.epochs
    model = FALCON(encoder, encoder.features, args.batch, projector=args.projector, codes=args.codes,
                   norm=args.norm, prior=args.prior, beta=args.beta, rise=round(args.beta_rise * calls),
                   temperature=args.temperature, eps=args.eps, dictionary=args.dictionary, seed=args.seed)
    model.to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)
    few = data.test_images[fixed_order(len(data.test_images))[:512]]

    def meters(model):
        W = model.code_vectors().cpu()
        return collapse_meters(embed(model, few), W, model.temperature)

    untrained = begin(model, data, folder)
    history = train(model, optimizer, data, args, folder, state, meters)
    report_collapses(model, data, history, args, folder)
    report(model, data, untrained, history, folder)


if __name__ == "__main__":
    runs.run(main)
