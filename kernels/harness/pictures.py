"""The pictures of a run: curves, views, nearest neighbours, t-SNE of the features, each a PNG in its folder.

Needs matplotlib and scikit-learn beside torch. data: images.Data; h [n, E]: features of its training images,
h_test: of its test images, on the CPU.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from sklearn.manifold import TSNE

from .images import fixed_order, pixels
from .files import atomic_write
from .views import two_views

NO_TERMS = "epoch", "loss", "RankMe", "knn", "meters"    # of a line of the history; the others are loss terms


def save_figure(figure, path):
    """A picture that is never half written."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def plot_curves(history, probes, folder):
    """curves.png: over epochs the loss terms, the dimensions in use and, with labels, the k-NN accuracy."""
    labelled = any("knn" in line for line in history)
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    axes = figure.subplots(1, 3 if labelled else 2)
    epochs = [line["epoch"] for line in history]

    for name in [name for name in history[0] if name not in NO_TERMS]:
        values = [line[name] for line in history]
        axes[0].plot(epochs, values, ".-", label=name)
    axes[0].set_yscale("asinh", linear_width=0.1)        # logarithmic, but for terms that cross 0
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes[0].set_title("loss terms, means over an epoch")
    axes[0].legend(fontsize=8, framealpha=0.5)

    ranks = [line.get("RankMe", math.nan) for line in history]
    axes[1].plot(epochs, ranks, "o")
    axes[1].set(title="RankMe of z, 256 test images", ylim=(0, None))

    if labelled:
        knn = [line.get("knn", math.nan) for line in history]
        axes[2].plot(epochs, knn, "o", label="trained encoder")
        for name, colour in ("raw pixels", "C1"), ("random encoder", "C2"):
            axes[2].axhline(probes[name]["k-NN"], color=colour, label=name)
        axes[2].set(title="k-NN accuracy, test features", ylim=(0, 1))
        axes[2].legend()
    for axis in axes:
        axis.set_xlabel("epoch")
    save_figure(figure, folder / "curves.png")


def plot_meters(history, codes, derived, z, folder):
    """meters.png of falcon.py: the loss beside {name: its derived value}, and the meters of four collapses.

    codes: how many there are; z [N, f]: embeddings at the end.
    """
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    loss, spread, dimensions, eigenvalues, clusters, within = axes
    epochs = [line["epoch"] for line in history]

    losses = [line["loss"] for line in history]
    loss.plot(epochs, losses, label="loss")
    names = {value: name for name, value in derived.items()}         # of equal values the last, the optimum
    styles = "--", "-.", ":"
    for (value, name), style in zip(names.items(), styles):
        loss.axhline(value, color="gray", ls=style, label=name)
    _, top = loss.get_ylim()
    loss.set(title="loss", ylim=(0, 1.6 * top), ylabel="nats")       # room for the legend

    def plot(axis, name, label, change=np.asarray):
        values = [line["meters"].get(name, math.nan) for line in history]
        axis.plot(epochs, change(values), label=label)

    plot(spread, "std", "std of a dimension (one point: 0)")
    plot(spread, "cosine", "mean cosine of two images (one point: 1)")
    plot(dimensions, "dimensions", f"of {z.shape[1]}")
    plot(clusters, "codes", f"likeliest code of an image, of {codes}")
    plot(clusters, "assignment_entropy", "exp entropy of the mean assignment", np.exp)     # in codes, too
    plot(within, "mixture_entropy_10", "of 10 Gaussians")
    spread.set(title="representation collapse", ylim=(None, 1))
    dimensions.set(title="dimensional collapse", ylabel="dimensions in use", ylim=(0, None))
    clusters.set(title="cluster collapse", yscale="log", ylabel="codes in use")
    within.set(title="intracluster collapse", ylabel="entropy / f, nats")
    for axis in (loss, spread, dimensions, clusters, within):
        axis.set_xlabel("epoch")

    z = z.double()
    second_moment = z.T @ z / len(z)
    spectrum = torch.linalg.eigvalsh(second_moment)
    largest_first = spectrum.flip(0).clamp(min=1e-12)
    places = range(1, len(spectrum) + 1)
    eigenvalues.semilogy(places, largest_first, label="of z^T z / N, at the end")
    eigenvalues.set(title="its spectrum", xlabel="eigenvalue, by size", ylabel="eigenvalue")
    for axis in axes:
        axis.legend(fontsize=7)
    save_figure(figure, folder / "meters.png")


# ---- Images ------------------------------------------------------------------------------------------------
def picture(x):
    """[C, *S] -> [H, W, 3] for imshow: gray unless of 3 or 4 channels; of a volume the central slice."""
    if x.ndim == 4:
        middle = x.shape[1] // 2
        x = x[:, middle]
    if len(x) in (3, 4):
        x = x[:3]
    else:
        x = x.mean(0).expand(3, -1, -1)
    return x.clamp(0, 1).movedim(0, 2).numpy()


def plot_images(rows, file):
    """A row of pictures for each of {title: images [n, C, *S]}, all of one shape."""
    strips = []
    for images in rows.values():
        framed = [np.pad(picture(x), [(1, 1), (1, 1), (0, 0)], constant_values=1) for x in images]
        strips.append(np.concatenate(framed, axis=1))
    mosaic = np.concatenate(strips)                      # one picture: an axis for each takes seconds
    height = len(mosaic) / len(rows)
    width = mosaic.shape[1] / height
    figure = Figure(figsize=(2 + width, 0.5 + len(rows)), layout="constrained")
    axis = figure.subplots()
    axis.imshow(mosaic)
    axis.set_xticks([])
    axis.set_yticks(height * (np.arange(len(rows)) + 0.5), [*rows])
    axis.tick_params(length=0)
    axis.set_frame_on(False)
    save_figure(figure, file)


def plot_views(data, folder):
    """views.png: eight training images and two views of each, as training makes them; of files that were
    cut or stretched above them all that they hold, within a border."""
    rows = fixed_order(len(data.images))[:8]
    x = pixels(data.images, rows)
    generator = torch.Generator().manual_seed(0)
    view1, view2 = two_views(x, generator, data.view)
    rows_of = {"image": x, "view 1": view1, "view 2": view2}
    if data.whole:
        whole = data.whole(rows)
        whole = whole / 255 if whole.dtype == torch.uint8 else whole
        rows_of = {"whole file": whole} | rows_of
    plot_images(rows_of, folder / "views.png")


def plot_neighbours(data, h, h_test, folder):
    """neighbours.png: eight test images, of different classes where there are, and below each the training
    images whose features have the largest cosine with its own."""
    rows = fixed_order(len(h_test))
    if data.labels is not None:
        classes = data.test_labels[rows]
        _, first = np.unique(classes, return_index=True)
        chosen = rows[first].tolist() + rows.tolist()
        rows = torch.tensor([*dict.fromkeys(chosen)])
    rows = rows[:8]
    unit = F.normalize(h)
    cosines = F.normalize(h_test[rows]) @ unit.T         # [8, n]
    nearest = cosines.topk(min(5, len(h))).indices

    shown = {"test image": pixels(data.test_images, rows)}
    for number, column in enumerate(nearest.T, 1):
        shown[f"nearest {number}"] = pixels(data.images, column)
    plot_images(shown, folder / "neighbours.png")


def plot_embedding(data, h_test, folder):
    """embedding.png: up to 1,000 test features in 2-D, by class; without labels 150 of them as images."""
    rows = fixed_order(len(h_test))[:1000]
    perplexity = min(30, len(rows) / 4)
    places = h_test[rows, :2]
    shown = h_test[rows]
    if shown.std(0).max() > 1e-6 * shown.abs().max():    # TSNE crashes on one point
        tsne = TSNE(perplexity=perplexity, random_state=0)
        places = tsne.fit_transform(shown)               # [n, 2]
    figure = Figure(figsize=(6, 5.2))
    axis = figure.subplots()

    if data.labels is None:
        axis.scatter(*places.T, s=1)
        images = pixels(data.test_images, rows[:150])
        for place, x in zip(places, images):
            zoom = 20 / x.shape[-1]
            image = OffsetImage(picture(x), zoom=zoom)
            axis.add_artist(AnnotationBbox(image, place, frameon=False))
    else:
        classes = data.test_labels[rows].numpy()
        points = axis.scatter(*places.T, s=6, c=classes, cmap="tab10")
        figure.colorbar(points, label="class")
    axis.set(xticks=[], yticks=[], title="t-SNE of the encoder's test features")
    save_figure(figure, folder / "embedding.png")
