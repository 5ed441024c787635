"""IConE, VICReg and SimCLR where classes are unequal, on a test set that is balanced: a table and a figure.

    python tests/experiments/glyphs.py --out glyphs.npz
    python tests/experiments/long_tail.py                                # two hours and a half on 2 cores; goes on where it stopped

Class k of K keeps R^(-k / (K - 1)) of the largest one's training images (imbalanced.py). Head, middle and tail are
thirds of the classes. Every run sees as many images. Runs the scripts as a user does, on the CPU, one thread a run,
`jobs` at a time, into runs/long-tail.
"""
import argparse
import statistics
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from common import METHODS, VIEWS_OF, apart, interval, make, of, options_of_all, over, run, save_npz, spread, thinned
from matplotlib.figure import Figure

from kernels import knn_accuracy
from kernels.harness.cli import read_data

PARTS = ["head", "middle", "tail"]
COLUMNS = {"k-NN": 3, "linear": 3, **dict.fromkeys(PARTS, 3), "RankMe": 1, "TwoNN": 1}                       # decimals


def numbers(job):
    """One run's numbers, {name in COLUMNS: value}; head, middle and tail: k-NN accuracy on those classes' test images."""
    folder, script, options = job
    report = run(folder, script, options)
    features = np.load(folder / "features.npz")
    h, y, h_test, y_test = (torch.from_numpy(features[name]) for name in (
        "train_features", "train_labels", "test_features", "test_labels"))
    parts = {}
    for part, classes in zip(PARTS, y_test.unique().tensor_split(3)):    # the largest class has the first label
        rows = torch.isin(y_test, classes)
        parts[part] = knn_accuracy(h, y, h_test[rows], y_test[rows])
    panel = report["panels"]["projector z"]
    probe = report["probes"]["trained encoder"]
    return {"k-NN": probe["k-NN"], "linear": probe["linear"], **parts, "RankMe": panel["RankMe"],
            "TwoNN": panel["TwoNN"], "raw": report["probes"]["raw pixels"]["k-NN"],
            "random": report["probes"]["random encoder"]["k-NN"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="glyphs.npz", help="digits, or an .npz of 2-D images with labels")
    parser.add_argument("--ratios", nargs="+", type=int, default=[10, 100], help="largest class over smallest")
    parser.add_argument("--batches", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS], help="all of them: a picture, too")
    parser.add_argument("--seen", type=int, default=80_000, help="images, by every run")
    parser.add_argument("--options", nargs="*", default=["width=8"], help="of all runs, without their dashes")
    parser.add_argument("--seeds", type=int, default=5, help="at least 2")
    args = options_of_all(parser, "long-tail")
    out = args.out / Path(args.data).stem
    out.mkdir(parents=True, exist_ok=True)
    data = read_data(args.data)
    common = [f"--{option}" for option in args.options] + VIEWS_OF.get(args.data, [])
    jobs = {}
    for ratio in args.ratios:
        rows = thinned(data.labels, ratio)
        file = (out / f"{ratio}.npz").resolve()
        save_npz(file, data.images[rows], data.labels[rows], data.test_images, data.test_labels)
        epochs = str(round(args.seen / len(rows)))
        for size in args.batches:
            for name in args.methods:
                script, options = METHODS[name]
                for seed in range(args.seeds):
                    folder = (out / f"{name} {ratio} {size} {seed}").resolve()
                    jobs[ratio, size, name, seed] = folder, script, [
                        *options, *common, "--data", str(file), "--batch", str(size), "--epochs", epochs, "--seed", str(seed)]
    results = make(jobs, numbers, args)
    print(f"| R, batch | method | {' | '.join(COLUMNS)} |\n{'|---' * (2 + len(COLUMNS))}|")
    shown = [(ratio, size) for ratio in args.ratios for size in args.batches]
    for ratio, size in shown:
        for name in args.methods:
            if own := of(results, ratio, size, name):
                columns = {column: [line[column] for line in own] for column in COLUMNS}
                cells = [f"{statistics.mean(column):.{COLUMNS[name]}f}" for name, column in columns.items()]
                cells[0] = spread(columns["k-NN"])
                print(f"| {ratio}, {size} | {name} | {' | '.join(cells)} |")
        for row, of_row in (("raw pixels", "raw"), ("random encoder", "random")):
            if own := of(results, ratio, size, args.methods[-1]):
                print(f"| {ratio}, {size} | {row} | {statistics.mean(line[of_row] for line in own):.3f} "
                      f"{'| ' * (len(COLUMNS) - 1)}|")
    if args.draw:
        return
    first, last = args.ratios[0], args.ratios[-1]
    print(f"\n| k-NN, 95 % | {' | '.join(f'batch {size}' for size in args.batches)} |\n|---{'|---' * len(args.batches)}|")
    for a, b in combinations(args.methods, 2):
        for ratio in args.ratios:
            ours, theirs = ([[line["k-NN"] for line in of(results, ratio, size, name)] for size in args.batches] for name in (a, b))
            print(f"| {a} less {b}, R = {ratio} | {' | '.join(map(over, ours, theirs))} |")
    for name in args.methods:
        lost = (apart(results, (last, size, name), (first, size, name), lambda line: line["k-NN"]) for size in args.batches)
        print(f"| {name}, R = {last} less R = {first} | {' | '.join(map(interval, lost))} |")

    if len(args.methods) < len(METHODS):
        return
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axis, (ratio, size) in zip(axes, shown):
        for k, name in enumerate(METHODS):
            parts = [[line[part] for line in of(results, ratio, size, name)] for part in PARTS]
            axis.bar([x + .27 * (k - 1) for x in range(3)], [*map(statistics.mean, parts)], .25,
                     yerr=[*map(statistics.stdev, parts)], capsize=2, label=name)
        axis.set(title=f"R = {ratio}, batch {size}", xticks=range(3))
        axis.set_xticklabels(PARTS)
    axes[0].set(ylabel="k-NN accuracy")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS), fontsize=9)
    figure.savefig(args.out / "long_tail.png", dpi=110)
    print(f"picture: {args.out / 'long_tail.png'}")


if __name__ == "__main__":
    main()
