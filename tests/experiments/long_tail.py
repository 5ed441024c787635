"""IConE, VICReg and SimCLR where classes are unequal, on a test set that is balanced: README's table and figure.

    python tests/experiments/glyphs.py --out glyphs.npz
    python tests/experiments/long_tail.py                                # two hours and a half on 2 cores; goes on where it stopped

Class k of K keeps R^(-k / (K - 1)) of the largest one's training images (imbalanced.py). Head, middle and tail are
thirds of the classes. Every run sees as many images. Runs the scripts as a user does, on the CPU, one thread a run,
`jobs` at a time, into runs/long-tail.
"""
import argparse
import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from batch_sizes import interval, run
from imbalanced import channels_last, thinned
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[2]))
import vicreg
from kernels import knn_accuracy

METHODS = {"IConE": ("icone.py", []), "VICReg": ("vicreg.py", []), "SimCLR": ("ba_ssl.py", ["--no-fusion"])}
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
    parser.add_argument("--seen", type=int, default=80_000, help="images, by every run")
    parser.add_argument("--options", nargs="*", default=["width=8"], help="of all runs, without their dashes")
    parser.add_argument("--seeds", type=int, default=5, help="at least 2")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs", "long-tail"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data = vicreg.load_data(args.data)
    common = [f"--{option}" for option in args.options]
    jobs = {}
    for ratio in args.ratios:
        rows = thinned(data.labels, ratio)
        file = (args.out / f"{ratio}.npz").resolve()
        np.savez(file, train_images=channels_last(data.images[rows]), train_labels=data.labels[rows].numpy(),
                 test_images=channels_last(data.test_images), test_labels=data.test_labels.numpy())
        epochs = str(round(args.seen / len(rows)))
        for size in args.batches:
            for name, (script, options) in METHODS.items():
                for seed in range(args.seeds):
                    folder = (args.out / f"{name} {ratio} {size} {seed}").resolve()
                    jobs[seed, ratio, size, name] = folder, script, [
                        *options, *common, "--data", str(file), "--batch", str(size), "--epochs", epochs, "--seed", str(seed)]
    jobs = dict(sorted(jobs.items(), key=lambda job: job[0][0]))         # whole tables of a seed first
    with ThreadPoolExecutor(args.jobs) as pool:
        results = dict(zip(jobs, pool.map(numbers, jobs.values())))

    seeds = range(args.seeds)
    print(f"| R, batch | method | {' | '.join(COLUMNS)} |\n{'|---' * (2 + len(COLUMNS))}|")
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots(1, len(args.ratios) * len(args.batches), sharey=True, squeeze=False)[0]
    for axis, (ratio, size) in zip(axes, [(ratio, size) for ratio in args.ratios for size in args.batches]):
        for k, name in enumerate(METHODS):
            own = [results[seed, ratio, size, name] for seed in seeds]
            means = {column: statistics.mean(line[column] for line in own) for column in COLUMNS}
            stds = {column: statistics.stdev(line[column] for line in own) for column in COLUMNS}
            cells = [f"{mean:.{COLUMNS[column]}f}" for column, mean in means.items()]
            cells[0] += f" ± {stds['k-NN']:.3f}"
            print(f"| {ratio}, {size} | {name} | {' | '.join(cells)} |")
            axis.bar([x + .27 * (k - 1) for x in range(3)], [means[part] for part in PARTS], .25,
                     yerr=[stds[part] for part in PARTS], capsize=2, label=name)
        random = [line["random"] for line in own]
        for row, cell in (("raw pixels", f"{own[0]['raw']:.3f}"), ("random encoder", f"{statistics.mean(random):.3f}")):
            print(f"| {ratio}, {size} | {row} | {cell} {'| ' * (len(COLUMNS) - 1)}|")
        axis.set(title=f"R = {ratio}, batch {size}", xticks=range(3))
        axis.set_xticklabels(PARTS)
    def knn(ratio, size, name):
        """One number a seed."""
        return [results[seed, ratio, size, name]["k-NN"] for seed in seeds]

    first, last = args.ratios[0], args.ratios[-1]
    print(f"\n| k-NN, 95 % | {' | '.join(f'batch {size}' for size in args.batches)} |\n|---{'|---' * len(args.batches)}|")
    rows = {f"{a} less {b}, R = {ratio}": ((ratio, a), (ratio, b))
            for a, b in (("IConE", "VICReg"), ("IConE", "SimCLR"), ("VICReg", "SimCLR")) for ratio in args.ratios}
    rows |= {f"{name}, R = {last} less R = {first}": ((last, name), (first, name)) for name in METHODS}
    for title, ((ratio, name), (other, its)) in rows.items():
        apart = ([a - b for a, b in zip(knn(ratio, size, name), knn(other, size, its))] for size in args.batches)
        print(f"| {title} | {' | '.join(map(interval, apart))} |")
    axes[0].set(ylabel="k-NN accuracy")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS), fontsize=9)
    figure.savefig(args.out / "long_tail.png", dpi=110)
    print(f"picture: {args.out / 'long_tail.png'}")


if __name__ == "__main__":
    main()
