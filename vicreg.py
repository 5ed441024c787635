"""VICReg: variance, invariance and covariance regularisation; no negatives, no momentum, no stop-gradient.

Bardes, Ponce, LeCun, arXiv 2105.04906 (ICLR 2022), as its released code has it (facebookresearch/vicreg). Two
views of a batch of images go through an encoder (features h) and a projector (embeddings z, z'):

    L = 25 s(z, z') + 25 (v(z) + v(z'))/2 + 1 (c(z) + c(z'))    s, v, c: see vicreg_terms below

s pulls the two views of an image together; alone it would map all images to one point. v keeps the standard
deviation of every dimension near 1, c keeps different dimensions from saying the same thing.

    python vicreg.py                                    # posed digits
    python vicreg.py --data pathmnist.npz --epochs 20   # your own images or volumes
    python vicreg.py --variance 0                       # collapse, and how the panel shows it

Expect k-NN accuracy 0.866 ± 0.009 and linear 0.891 ± 0.004 (mean ± std, 3 seeds; raw pixels 0.593, 0.169;
random encoder 0.307 ± 0.042, 0.222 ± 0.018) in 64 to 71 s on 2 cores of an AMD EPYC with torch 2.13.0.

Deviations from the paper: (1) s is divided by D and v halved, as in the released code. (2) Small encoder with
GroupNorm, projector of two layers of 512 (paper: ResNet-50, three of 8192). (3) AdamW, cosine schedule,
weight decay 0.05, batch 128 (paper: LARS, batch 2048). (4) Views differ by pose, light and noise, which suit
digits and volumes (paper: crops, blur, solarisation). (5) The loss is computed in fp32 also under --amp.
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

from kernels import collapse_panel, knn_accuracy, variance_covariance, verdict


# ==== The method ============================================================================================
def vicreg_terms(z1, z2):
    """The three terms, unweighted, of two views' embeddings z1, z2 [B, D], any float dtype; in fp32 or finer.

        s = 1/(B D) sum (z1 - z2)^2                                      invariance
        v = 1/D sum_d max(0, 1 - sqrt(C_dd + 1e-4))                      variance, mean of the two views
        c = 1/D sum_{i != j} C_ij^2,   C = Z_c^T Z_c / (B - 1)           covariance, sum of the two views

    Equations 1 to 4 of the paper, scaled as in the released code. ValueError unless B >= 2 and shapes agree.
    """
    if z1.shape != z2.shape:
        raise ValueError(f"embeddings of two views must agree in shape, got {[*z1.shape]} and {[*z2.shape]}")
    v1, c1 = variance_covariance(z1)
    v2, c2 = variance_covariance(z2)
    return {"invariance": F.mse_loss(z1.to(v1), z2.to(v1)),          # in v1's dtype
            "variance": (v1 + v2) / 2,
            "covariance": c1 + c2}


def expander(features, sizes):
    """The paper's projector, h [B, features] -> z [B, sizes[-1]]: Linear, BatchNorm, ReLU; linear at last."""
    layers = []
    for size in sizes[:-1]:
        layers += [nn.Linear(features, size), nn.BatchNorm1d(size), nn.ReLU()]
        features = size
    return nn.Sequential(*layers, nn.Linear(features, sizes[-1], bias=False))


class VICReg(nn.Module):
    """An encoder to `features` numbers, a projector with layers of these sizes, the weights of the terms."""

    def __init__(self, encoder, features, projector=(512, 512), invariance=25., variance=25., covariance=1.):
        super().__init__()
        self.encoder = encoder
        self.projector = expander(features, projector)
        self.weights = {"invariance": invariance, "variance": variance, "covariance": covariance}

    def forward(self, view1, view2, index=None):
        z1 = self.projector(self.encoder(view1))                     # [B, D]
        z2 = self.projector(self.encoder(view2))
        terms = vicreg_terms(z1, z2)
        notes = {"c_per_view": terms["covariance"] / 2,
                 "c_noise_floor": (z1.shape[1] - 1) / (len(z1) - 1)}        # c of white, unit noise
        return {name: self.weights[name] * term for name, term in terms.items()}, notes


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
def main():
    parser = options(batch=128, epochs=45, lr=3e-3, least_batch=2)
    weight = bounded(float, 0)
    add = parser.add_argument
    add("--projector", type=layer_sizes, default="512-512", help="sizes of the projector's layers")
    add("--invariance", type=weight, default=25., help="weight lambda of s")
    add("--variance", type=weight, default=25., help="weight mu of v; 0 shows collapse")
    add("--covariance", type=weight, default=1., help="weight nu of c; 0 shows dimensional collapse")
    args, state = parse(parser)
    data = data_for(args)
    folder = open_folder(args, state)

    torch.manual_seed(args.seed)
    encoder = Encoder(data.images.shape[1], data.images.ndim - 2, args.width, args.depth)
    model = VICReg(encoder, encoder.features, projector=args.projector, invariance=args.invariance,
                   variance=args.variance, covariance=args.covariance)
    model.to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.05)
    untrained = examine(model, data)
    history = train(model, optimizer, data, args, folder, state)
    report(model, data, untrained, history, folder)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        die("interrupted: nothing is lost up to the last whole epoch; continue with --resume and its folder")
