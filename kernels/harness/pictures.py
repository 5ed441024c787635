"""The pictures of a run: curves, views, nearest neighbours, t-SNE of the features, each a PNG in its folder.

Needs matplotlib and scikit-learn beside torch. data: images.Data; h [n, E]: features of its training images,
h_test: of its test images, on the CPU.
"""
import math
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator
from sklearn.manifold import TSNE

from .images import fixed_order, names_of, pixels
from .files import atomic_write
from .views import two_views

NO_TERMS = "epoch", "loss", "RankMe", "knn", "meters"    # of a line of the history


def save_figure(figure, path):
    """A picture that is never half written; its kind, png, pdf or svg, is that of its name."""
    with atomic_write(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")                  # letters that the font lacks become boxes
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=120)


def epoch_axis(axis, last):
    """Epochs from 1 to the last, in whole numbers."""
    last = max(last, 2)                                  # one epoch has an axis, too
    room = 0.5 + 0.02 * last
    axis.set(xlabel="epoch", xlim=(1 - room, last + room))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def loss_ticks(low, high):
    """Numbers between these for an asinh axis: 1, 2, 5, 10, ... or powers of 10, of either sign; where few of
    them lie, evenly spaced ones."""
    for steps in ((1, 2, 5), (1,)):
        sizes = [step * 10. ** power for power in range(-1, 39) for step in steps]
        signed = {0., *sizes, *(-size for size in sizes)}
        ticks = sorted(tick for tick in signed if low <= tick <= high)
        if len(ticks) <= 14:
            break
    if len(ticks) < 3:
        return MaxNLocator(6).tick_values(low, high)
    return ticks[::1 + len(ticks) // 15]


def loss_terms(history):
    """The names in a line of the history that make up the loss, and those that are noted beside it.

    Terms are logged before notes: they are the first so many whose sum is the loss; all if there are none.
    """
    names = [name for name in history[0] if name not in NO_TERMS]
    loss = [line["loss"] for line in history]
    total = np.zeros(len(history))
    for count, name in enumerate(names, 1):
        total += [line[name] for line in history]
        if np.allclose(total, loss, rtol=1e-3, atol=0):
            return names[:count], names[count:]
    return names, []


def plot_curves(history, probes, folder):
    """curves.png: over epochs the loss and its terms, the dimensions in use and, with labels, the k-NN
    accuracy."""
    labelled = any("knn" in line for line in history)
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    axes = figure.subplots(1, 3 if labelled else 2)
    epochs = [line["epoch"] for line in history]
    mark = "." if len(history) < 100 else ""

    def plot(name, **style):
        values = [line[name] for line in history]
        axes[0].plot(epochs, values, marker=mark, **style)

    terms, notes = loss_terms(history)
    plot("loss", label="loss", color="black", linewidth=2)
    for name in terms if len(terms) > 1 else []:
        plot(name, label=name)
    for name in notes:
        plot(name, label=f"{name} (no term)", linestyle=":", linewidth=1)
    axes[0].set_yscale("asinh", linear_width=0.1)        # logarithmic, but for terms that cross 0
    axes[0].yaxis.set_major_locator(FixedLocator(loss_ticks(*axes[0].get_ylim())))
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes[0].minorticks_off()
    axes[0].set_title("loss and its terms, means over an epoch")
    axes[0].legend(fontsize=8, framealpha=0.5)

    ranks = [line.get("RankMe", math.nan) for line in history]
    axes[1].plot(epochs, ranks, "o")
    top = max(filter(math.isfinite, ranks), default=1)
    axes[1].set(title="RankMe of z, up to 256 test images", ylim=(0, 1.08 * top))    # no point is cut

    if labelled:
        knn = [line.get("knn", math.nan) for line in history]
        axes[2].plot(epochs, knn, "o", label="trained encoder")
        others = [name for name in probes if name != "trained encoder"]
        for k, name in enumerate(others, 1):
            level = probes[name]["k-NN"]
            axes[2].axhline(level, color=f"C{k}", label=plain(name))
        axes[2].set(title="k-NN accuracy, test features", ylim=(0, 1.03))
        axes[2].legend(fontsize=8)
    for axis in axes:
        epoch_axis(axis, epochs[-1])
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


def part_shown(channels, *sides):
    """What of such images picture() shows, in words; nothing if it is all."""
    words = []
    if len(sides) == 3:
        words.append("central slice along the first axis")
    if channels == 4:
        words.append("channels 1 to 3 as RGB")
    elif channels not in (1, 3):
        words.append(f"mean of {channels} channels")
    return ", ".join(words)


def shortened(name, most=16):
    """The end of a file's name, which tells more than its folders; a class may have none."""
    name = str(name).encode(errors="replace").decode()
    name = "".join(letter if letter.isprintable() else " " for letter in name)
    if not name.strip():
        return "(empty)"
    return name if len(name) <= most else "\N{HORIZONTAL ELLIPSIS}" + name[1 - most:]


def plain(name):
    """A name for a picture's text: no formula, and not left out of a legend."""
    return name.replace("$", r"\$").replace("_", " _", name.startswith("_"))


def plot_images(rows, file, words=None):
    """A row of pictures for each of {title: images [n, C, *S]}, all of one shape; words: {title: two lines
    below each of its pictures}. Below all of them stands what part of an image is shown."""
    words = words or {}
    first, *_ = rows.values()
    part = part_shown(*first.shape[1:])
    count = max(map(len, rows.values()))
    width = 2 + 1.3 * count                              # inches, as all below
    height = 0.3 + 1.3 * len(rows) + 0.35 * len(words) + 0.25 * bool(part)
    figure = Figure(figsize=(width, height))
    axis = figure.add_axes([0, 0, 1, 1])                 # one for all: an axis for each takes seconds
    axis.set(xlim=(0, width), ylim=(0, height))
    axis.set_axis_off()
    top = height - 0.15
    for name, images in rows.items():
        axis.text(1.4, top - 0.6, name, ha="right", va="center", fontsize=11)
        for k, x in enumerate(images):
            shown = picture(x)
            sides = np.array(shown.shape[:2])
            tall, wide = 1.2 * sides / sides.max()
            left = 2.2 + 1.3 * k - wide / 2
            low = top - 0.6 - tall / 2
            axis.imshow(shown, extent=(left, left + wide, low, low + tall))
            frame = Rectangle((left, low), wide, tall, fill=False, edgecolor="gray", linewidth=0.8)
            axis.add_patch(frame)
        top -= 1.3
        if name in words:
            for k, line in enumerate(words[name]):
                place = 2.2 + 1.3 * k, top + 0.07
                axis.text(*place, line, ha="center", va="top", fontsize=8, parse_math=False)
            top -= 0.35
    if part:
        axis.text(0.15, 0.1, f"shown: {part}", fontsize=8)
    axis.set(xlim=(0, width), ylim=(0, height), aspect="auto")       # imshow has changed them
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
        rows_of = {"whole file": data.whole(rows)} | rows_of
    files, _ = names_of(data)
    plot_images(rows_of, folder / "views.png", {"image": map(shortened, files[rows])})


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
    nearest = cosines.topk(min(5, len(h)))

    shown = {"test image": pixels(data.test_images, rows)}
    files, test_files = names_of(data)

    def lines(value, name, labels, row):
        own = "" if labels is None else shortened(data.classes[labels[row]], 12)
        return f"{value}  {own}".strip() + f"\n{shortened(name)}"

    words = {"test image": [lines("", test_files[row], data.test_labels, row) for row in rows.tolist()]}
    for number, (cosines, column) in enumerate(zip(nearest.values.T, nearest.indices.T), 1):
        title = f"nearest {number}\n(cosine)"
        shown[title] = pixels(data.images, column)
        words[title] = []
        for value, row in zip(cosines.tolist(), column.tolist()):
            words[title].append(lines(f"{value:.3f}", files[row], data.labels, row))
    plot_images(shown, folder / "neighbours.png", words)


def plot_embedding(data, h_test, folder):
    """embedding.png: up to 1,000 test features in 2-D, by class; without labels 150 of them as images."""
    rows = fixed_order(len(h_test))[:1000]
    h = h_test[rows]
    title = "first two features: all at one point, t-SNE has nothing to place"
    places = h[:, :2]
    if h.std(0).max() > 1e-6 * h.abs().max():            # TSNE crashes on one point
        title = "t-SNE of the encoder's test features"
        tsne = TSNE(perplexity=min(30, len(rows) / 4), random_state=0)
        places = tsne.fit_transform(h)                   # [n, 2]
    notes = []
    if len(rows) < len(h_test):
        notes.append(f"{len(rows):,} of the {len(h_test):,} looked at")
    figure = Figure(figsize=(10, 8), layout="constrained")
    axis = figure.subplots()

    if data.labels is None:
        axis.scatter(*places.T, s=1)
        images = pixels(data.test_images, rows[:150])
        for place, x in zip(places, images):
            shown = picture(x)
            image = OffsetImage(shown, zoom=20 / max(shown.shape[:2]))
            axis.add_artist(AnnotationBbox(image, place, frameon=False))
        if len(images) < len(rows):
            notes.append(f"{len(images)} of {len(rows):,} as images")
        notes.append(part_shown(*images.shape[1:]))
    else:
        count = len(data.classes)
        if count <= 20:
            map_of_colours = colormaps["tab10" if count <= 10 else "tab20"]
            colours = map_of_colours.colors[:count]
        else:
            colours = colormaps["gist_rainbow"](np.linspace(0, 1, count))
        labels = data.test_labels[rows].numpy()
        for k in range(count):
            own = labels == k
            if not own.any() and count > 40:
                continue
            name = shortened(data.classes[k], 24)
            name = plain(name)
            marker = "os^D"[k // 20 % 4]
            axis.scatter(*places[own].T, s=14, color=[colours[k]], marker=marker, label=name)
        if count <= 60:
            columns = math.ceil(count / 30)
            size = 11 if count <= 20 else 8
            side = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
            axis.legend(markerscale=2, ncols=columns, fontsize=size, **side)
        else:                                            # it would not fit beside the points
            notes.append(f"{count} classes, no legend")
    lines = title, ", ".join(filter(None, notes))
    axis.set(xticks=[], yticks=[], title="\n".join(lines).strip())
    save_figure(figure, folder / "embedding.png")
