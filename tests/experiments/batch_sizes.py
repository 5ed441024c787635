"""Every method at several batch sizes, as many images seen by each: a table and a figure.

    python tests/experiments/batch_sizes.py                              # five hours on 2 cores; goes on where it stopped
    python tests/experiments/batch_sizes.py --seeds 3 --sizes 4 16 64 256
    python tests/experiments/batch_sizes.py --seeds 3 --data digits3d --sizes 4 64 --epochs 20 --options width=8
    python tests/experiments/batch_sizes.py --seeds 3 --data glyphs.npz --sizes 16 64 --epochs 5 --options width=8

Runs the scripts as a user does, on the CPU, one thread a run, `jobs` at a time, into runs/batch-sizes.
"""
import argparse
import statistics
from pathlib import Path

from common import METHODS, make, of, options_of_all, over, run, spread
from matplotlib.figure import Figure

COLUMNS = ["k-NN", "linear", "RankMe of z", "TwoNN of z"]


def numbers(report):
    """One run's numbers in the order of COLUMNS."""
    panel = report["panels"]["projector z"]
    probe = report["probes"]["trained encoder"]
    return [probe["k-NN"], probe["linear"], panel["RankMe"], panel["TwoNN"]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="digits", help="as of the scripts")
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 4, 16, 64, 256], help="batches")
    parser.add_argument("--options", nargs="*", default=[], help="of all runs, without their dashes: width=8")
    parser.add_argument("--epochs", default="64", help="of every run")
    parser.add_argument("--seeds", type=int, default=5, help="at least 2")
    args = options_of_all(parser, "batch-sizes")
    out = args.out / Path(args.data).stem
    out.mkdir(parents=True, exist_ok=True)
    common = ["--data", args.data, "--epochs", args.epochs, *(f"--{option}" for option in args.options)]
    taken = {name: [size for size in args.sizes if size > 1 or name == "IConE"] for name in METHODS}
    jobs = {}
    for seed in range(args.seeds):
        for name, (script, options) in METHODS.items():
            for size in taken[name]:
                folder = out / f"{name} {size} {args.epochs} {seed}"
                jobs[name, size, seed] = folder.resolve(), script, [
                    *options, *common, "--batch", str(size), "--seed", str(seed)]
    reports = make(jobs, lambda job: run(*job), args)
    print(f"| method | batch | {' | '.join(COLUMNS)} | IConE over it, k-NN, 95 % |\n{'|---' * (3 + len(COLUMNS))}|")
    for row in ("raw pixels", "random encoder"):                         # the same in all methods
        if probes := [report["probes"][row] for report in of(reports, "IConE", args.sizes[0])]:
            print(f"| {row} | | {' | '.join(spread([probe[c] for probe in probes]) for c in COLUMNS[:2])} | | | |")
    table = {}                                                           # {name, size: [columns] of a number a seed}
    for name, sizes in taken.items():
        for size in sizes:
            if own := of(reports, name, size):
                table[name, size] = [*zip(*map(numbers, own))]
                cells = [spread(column, 3 if k < 2 else 1) for k, column in enumerate(table[name, size])]
                ours = table.get(("IConE", size))
                cells.append(over(ours[0], table[name, size][0]) if ours and name != "IConE" else "")
                print(f"| {name} | {size} | {' | '.join(cells)} |")
    if args.draw:
        return
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots(1, len(COLUMNS))
    for name, sizes in taken.items():
        for axis, columns in zip(axes, zip(*(table[name, size] for size in sizes))):
            means, stds = ([part(column) for column in columns] for part in (statistics.mean, statistics.stdev))
            axis.errorbar(sizes, means, stds, fmt="o-" if len(sizes) > 1 else "s", capsize=3, label=name)
    for axis, label in zip(axes, COLUMNS):
        axis.set_xscale("log", base=2)
        axis.set(xlabel="batch size", ylabel=label, xticks=args.sizes, ylim=(0, None))
        axis.set_xticklabels(args.sizes)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS), fontsize=9)
    figure.suptitle(f"{args.data}, {args.epochs} epochs, mean ± std over {args.seeds} seeds", fontsize=10)
    figure.savefig(out / "batch_sizes.png", dpi=110)
    print(f"picture: {out / 'batch_sizes.png'}")


if __name__ == "__main__":
    main()
