"""the front page's two pictures: what collapse looks like, and a sketch of the five mechanisms.

    python tests/experiments/front_page.py                              # four minutes on 2 cores; goes on where it stopped

Trains vicreg.py three times, as a user does, into runs/front-page; writes collapse.png and mechanisms.png there.
"""
import argparse
import math
from pathlib import Path

import numpy as np
import torch
from common import run
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, Rectangle

import vicreg
from kernels.harness.cli import read_data
from kernels.harness.encoder import Encoder
from kernels.harness.files import load_checkpoint
from kernels.harness.images import encode

RUNS = {"VICReg": [], "without its variance term": ["--variance", "0"],
        "without its covariance term": ["--covariance", "0"]}


# ---- What collapse looks like ------------------------------------------------------------------------------
@torch.no_grad()
def embeddings(model, images):
    """z [N, 512] of images [N, C, *S]."""
    return encode(torch.nn.Sequential(model.encoder, model.projector).eval(), images)


def network(data, folder=None):
    """VICReg as the script makes it: seed 0, with a finished run's weights if there is one."""
    torch.manual_seed(0)
    encoder = Encoder(data.images.shape[1], 2)
    model = vicreg.VICReg(encoder, encoder.features)
    if folder:
        model.load_state_dict(load_checkpoint(folder / "last.pt")["model"])
    return model


def draw_collapse(z, labels, path):
    """{title: z [N, D]}: first two principal components, on one scale; below the spectrum of the covariance."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots(2, len(z), sharex="row", sharey="row", height_ratios=[3, 2])
    for (cloud, spectrum), (title, values) in zip(axes.T, z.items()):
        centred = (values - values.mean(0)).double()
        _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
        x, y = (centred @ directions[:2].T).T
        cloud.scatter(x, y, s=5, c=labels, cmap="tab10", linewidths=0)
        cloud.set_title(title, fontsize=11)
        cloud.set(xlim=(-16, 16), ylim=(-16, 16), aspect="equal")
        cloud.set_xticks([])
        cloud.set_yticks([])
        variances = singular.square() / (len(values) - 1)
        spectrum.loglog(range(1, len(variances) + 1), variances.clamp(min=1e-9), color="black")
        spectrum.set(xlabel="principal component", ylim=(1e-7, 1e3))
        spectrum.grid(color="gainsboro", lw=.5)
    axes[0, 0].set_ylabel("embeddings of 1,440 test digits,\none scale (the line runs on)", fontsize=9)
    axes[1, 0].set_ylabel("variance", fontsize=9)
    figure.savefig(path, dpi=100)
    print(f"picture: {path}")


# ---- The five mechanisms -----------------------------------------------------------------------------------
def arrow(axis, start, end, color="black", style="-|>", **options):
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=9, color=color, shrinkA=3, shrinkB=3,
                                   lw=1.2, **options))


def on_circle(degrees, radius=1.):
    return radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees))


def sketch_vicreg(axis):
    for k, (x, y) in enumerate([(-.6, .35), (.55, .6), (.1, -.55), (-.75, -.5), (.8, -.3)]):
        axis.plot([x, x + .34], [y, y + .15], "o", color=f"C{k}", ms=6)
        arrow(axis, (x, y), (x + .34, y + .15), style="<|-|>")
    for sign in (-1, 1):
        arrow(axis, (sign * .95, 0), (sign * 1.3, 0), "crimson")
        arrow(axis, (0, sign * .85), (0, sign * 1.2), "crimson")
    return "vicreg.py", "two views of an image attract;\nevery dimension keeps its spread (red)\nand repeats no other one"


def sketch_icone(axis):
    axis.add_patch(Circle((0, 0), 1, fill=False, color="silver"))
    angles = [20, 95, 160, 235, 310]
    for k, angle in enumerate(angles):
        row = on_circle(angle)
        axis.plot(*row, "*", color=f"C{k}", ms=13)
        for turn in (-16, 13):
            view = on_circle(angle + turn, .72)
            axis.plot(*view, "o", color=f"C{k}", ms=5)
            arrow(axis, view, row)
    for a, b in zip(angles, angles[1:] + [380]):
        arrow(axis, on_circle(a + 14, 1.15), on_circle(b - 14, 1.15), "crimson", "<|-|>",
              connectionstyle=f"arc3,rad={.25 * (b - a) / 75}")
    return "icone.py", "each image owns a learnable row (star);\nviews go to their row, rows repel (red):\nno view looks at the batch"


def sketch_falcon(axis):
    for angle in (10, 62, 118, 170, 222, 290, 335):
        arrow(axis, (0, 0), on_circle(angle, 1.2), "gray")
    for k, angle in enumerate((10, 62, 118, 170, 222, 290, 335)):
        for turn in (-5, 6):
            axis.plot(*on_circle(angle + turn, .95), "o", color=f"C{k}", ms=5)
    axis.plot(0, 0, "o", color="gray", ms=3)
    return "falcon.py", "fixed random codes (grey arrows):\ntwo views choose the same one,\nand all codes must be chosen"


def sketch_ba(axis):
    for row in range(3):
        for column in range(3):
            axis.add_patch(Rectangle((-1.35 + .3 * column, .3 - .3 * row), .28, .28, color=f"C{row}", alpha=.3 + .25 * column))
            axis.add_patch(Rectangle((.5 + .3 * column, .3 - .3 * row), .28, .28, color=f"C{row}", alpha=.3 + .25 * column))
            axis.add_patch(Rectangle((.5 + .3 * column + .14, .3 - .3 * row), .14, .07, color=f"C{(row + 1) % 3}"))
            axis.add_patch(Rectangle((.5 + .3 * column, .3 - .3 * row + .21), .14, .07, color=f"C{(row + 2) % 3}"))
    arrow(axis, (-.4, .15), (.45, .15))
    axis.text(0, .3, "mix", ha="center", fontsize=9)
    return "ba_ssl.py", "patches of the images of a batch (rows)\nare mixed, each keeps its own identity:\na plug-in for the other losses"


def sketch_toy(axis):
    left, right = (-.9, .75), (.9, .75)
    for label, color in ((left, "C0"), (right, "C1")):
        axis.plot(*label, "s", color=color, ms=12)
        for k in (-1, 0, 1):
            sample = label[0] + .35 * k, -.5
            axis.plot(*sample, "o", color=color, ms=6)
            axis.plot([sample[0], label[0]], [sample[1], label[1]], color=color, lw=1)
    axis.plot(0, -.5, "o", color="crimson", ms=8)
    for label in (left, right):
        axis.plot([0, label[0]], [-.5, label[1]], color="crimson", lw=1.5)
    arrow(axis, (-.7, .75), (-.25, .75), "crimson")
    arrow(axis, (.7, .75), (.25, .75), "crimson")
    return "collapse_toy.py", "a frustrated sample (red) belongs to two\nlabels (squares) and slowly pulls all\ntogether; stop-gradient cuts the pull"


def legend(axis):
    for row, (draw, text) in enumerate([
            (lambda x, y: axis.plot([x, x + .25], [y, y], "o", color="C0", ms=6), "two views of an image"),
            (lambda x, y: arrow(axis, (x - .05, y), (x + .35, y)), "attracts"),
            (lambda x, y: arrow(axis, (x - .05, y), (x + .35, y), "crimson"), "keeps apart (toy: pulls)")]):
        draw(-1.3, .6 - .5 * row)
        axis.text(-.85, .6 - .5 * row, text, va="center", fontsize=9)
    return "", ""


def draw_mechanisms(path):
    figure = Figure(figsize=(8.4, 6.6))
    figure.subplots_adjust(left=.01, right=.99, top=.95, bottom=.1, wspace=.02, hspace=.33)
    axes = figure.subplots(2, 3).ravel()
    for axis, sketch in zip(axes, (sketch_vicreg, sketch_icone, sketch_falcon, sketch_ba, sketch_toy, legend)):
        axis.set(xlim=(-1.5, 1.5), ylim=(-1.3, 1.3), aspect="equal")
        axis.axis("off")
        title, text = sketch(axis)
        axis.set_title(title, fontsize=11, family="monospace")
        axis.text(0, -1.4, text, ha="center", va="top", fontsize=9)
    figure.savefig(path, dpi=140)
    print(f"picture: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", default="45")
    parser.add_argument("--out", type=Path, default=Path("runs", "front-page"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    draw_mechanisms(args.out / "mechanisms.png")
    data = read_data("digits")
    z = {"untrained": embeddings(network(data), data.test_images)}
    for name, options in RUNS.items():
        folder = (args.out / name).resolve()
        run(folder, "vicreg.py", [*options, "--epochs", args.epochs, "--seed", "0"])
        z[name] = embeddings(network(data, folder), data.test_images)
    draw_collapse(z, np.asarray(data.test_labels), args.out / "collapse.png")


if __name__ == "__main__":
    main()
