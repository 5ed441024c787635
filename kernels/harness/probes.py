"""What a run has learned: accuracies of probes, panels of numbers that show collapse, a verdict, files.

    untrained = begin(model, data, folder)           # before training: a line, views.png, how it starts
    report(model, data, untrained, run.history, folder)      # after it

model.encoder: images [N, C, *S] -> features h [N, E]; model.projector: h -> embeddings z [N, D].
"""
import json
import math
import warnings
from collections import namedtuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from .. import collapse_panel, few_label_accuracy, knn_accuracy, verdict
from .files import atomic_write, atomic_write_text
from .images import class_names, encode, limited, names_of, sample_rows
from .page import page_of_run
from .pictures import plot_curves, plot_embedding, plot_neighbours, plot_views
from .prepare import save_encoder
from .processes import rank
from .views import two_views

# Features [n, E] of training and test images on the CPU, what probe() gives, panels by name.
Findings = namedtuple("Findings", "h h_test probe panels")


# ---- Numbers -----------------------------------------------------------------------------------------------
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
    names = "k-NN", "linear", "1 a class", "5 a class", "10 a class"
    if len(data.labels.unique()) < 2:
        print("note: features are of one class: no probes")
        return dict.fromkeys(names, math.nan)
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                              # of raw pixels: they go on for minutes
        linear.fit(h, data.labels)
    known = h, data.labels, h_test, data.test_labels
    few = [few_label_accuracy(*known, count) for count in (1, 5, 10)]
    return dict(zip(names, [knn_accuracy(*known), linear.score(h_test, data.test_labels), *few]))


@torch.no_grad()
def quick_probe(model, data):
    """While it trains: RankMe of z of 256 test images and, where there are labels, the k-NN accuracy of h."""
    data = limited(data)
    h_test = encode(model.encoder, data.test_images)
    z = model.projector(h_test[sample_rows(len(h_test), 256)])
    found = {"RankMe": collapse_panel(z)["RankMe"]}
    if data.labels is not None and len(data.labels.unique()) > 1:
        found["knn"] = knn_accuracy(
            encode(model.encoder, data.images), data.labels, h_test, data.test_labels)
    return found


@torch.no_grad()
def examine(model, data):
    """What limited() data show: features, their probe, the panels of h and z on up to 2,000 test images."""
    model.eval()
    device = next(model.parameters()).device
    data = limited(data)
    generator = torch.Generator(device).manual_seed(0)

    def encode_views(x):
        return torch.stack([model.encoder(view) for view in two_views(x, generator, data.view)])

    h = encode(model.encoder, data.images).cpu()
    h_test = encode(model.encoder, data.test_images)
    rows = sample_rows(len(h_test), 2000)
    h1, h2 = encode(encode_views, data.test_images, rows, device, axis=1)
    features = h_test[rows], h1, h2                                  # of the images, and of two views of each
    embeddings = [model.projector(x) for x in features]
    classes = class_names(data, rows)
    panels = {"encoder h": collapse_panel(*features),
              "projector z": collapse_panel(*embeddings, labels=classes)}
    h_test = h_test.cpu()
    return Findings(h, h_test, probe(data, h, h_test), panels)


# ---- Before and after training -----------------------------------------------------------------------------
def begin(model, data, folder):
    """What every run starts with: a line on what is trained on what, views.png, how the network begins.

    -> {"probes": {row: accuracies of h}, "panel": of z} before training; untrained.json, which a resumed run
    reads.
    """
    channels, *sides = data.images.shape[1:]
    canvas = " x ".join(map(str, sides))
    size = sum(parameter.numel() for parameter in model.parameters())
    skipped = f", {len(data.skipped):,} files skipped (skipped.txt)" if data.skipped else ""
    if not rank():
        plot_views(data, folder)
        if skipped:
            lines = [f"{name}: {reason}\n" for name, reason in data.skipped]
            atomic_write_text(folder / "skipped.txt", "".join(lines))
    print(f"data: {len(data.images):,} train and {len(data.test_images):,} test images, {channels} "
          f"channel{'s' * (channels > 1)}, {canvas} ({len(sides)}-D), {len(data.classes) or 'no'} classes"
          f"{skipped}; {size:,} parameters on {next(model.parameters()).device}; {folder}")
    path = folder / "untrained.json"
    if not path.exists():
        found = examine(model, data)
        if rank():
            return None                                              # process 0 alone reports
        origin = getattr(model.encoder, "origin", "random encoder")
        probes = {origin: found.probe}
        if origin != "random encoder":
            probes = {"random encoder": probe_of_random_encoder(model.encoder, data), **probes}
        untrained = {"probes": probes, "panel": found.panels["projector z"]}
        atomic_write_text(path, json.dumps(untrained, indent=1))
    return json.loads(path.read_text())


def probe_of_random_encoder(encoder, data):
    """Of one that is like this one, which has learned already."""
    device = next(encoder.parameters()).device
    with torch.random.fork_rng():                                    # the run's own numbers stay as they are
        torch.manual_seed(0)
        random = type(encoder)(**encoder.config).to(device)
    data = limited(data)
    return probe(data, *features_of(random, data))


def features_of(encoder, data):
    """h [N, E] of all training and of all test images, on the CPU."""
    return [encode(encoder, x).cpu() for x in (data.images, data.test_images)]


def print_table(rows):
    """{row: {column: number}}, a column as wide as its name."""
    first, *others = rows.values()
    columns = [name for name, value in first.items()
               if not isinstance(value, list) and all(name in row for row in others)]
    width = max(18, *map(len, rows))
    print(f"\n{'':{width}}", *(f"{name:>8}" for name in columns))
    for name, row in rows.items():
        print(f"{name:{width}}", *(f"{row[column]:{max(8, len(column))}.4g}" for column in columns))


def save_features(encoder, data, found, folder):
    """features.npz: h of all training and test images [N, E], which files they are, labels if there are."""
    h, h_test = found.h, found.h_test
    if limited(data) is not data:                                    # examine() saw a part
        h, h_test = features_of(encoder, data)
    files, test_files = names_of(data)
    more = {"train_files": files, "test_files": test_files}
    if data.labels is not None:
        more |= {"train_labels": data.labels, "test_labels": data.test_labels, "classes": data.classes}
    with atomic_write(folder / "features.npz") as file:
        np.savez(file, train_features=h, test_features=h_test, **more)


def report(model, data, untrained, history, folder, **more_probes):
    """How every run ends: probes, panels, a verdict; report.json, encoder.pt, pictures and features.npz."""
    if rank():
        return
    trained = examine(model, data)
    probed = limited(data)
    probes = {"raw pixels": probe(probed, *features_of(small_pixels, probed))}
    probes |= {**untrained["probes"], "trained encoder": trained.probe, **more_probes}
    panels = {"untrained z": untrained["panel"], **trained.panels}
    sentence = verdict(panels["projector z"], panels["untrained z"])
    findings = {"epochs": len(history), "probes": probes, "panels": panels, "verdict": sentence}
    atomic_write_text(folder / "report.json", json.dumps(findings, indent=1))
    save_features(model.encoder, data, trained, folder)
    save_encoder(model.encoder, data, folder)                        # at once: they are of each other

    if data.labels is not None:
        print_table(probes)
    print_table(panels)
    print(f"\n{sentence}")
    plot_curves(history, probes, folder)
    plot_neighbours(probed, trained.h, trained.h_test, folder)
    plot_embedding(probed, trained.h_test, folder)
    page_of_run(data, trained, findings, folder)
    print(f"In {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")
