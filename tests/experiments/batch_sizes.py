"""Every method at several batch sizes, as many images seen by each: README's table and figure.

    python tests/experiments/batch_sizes.py                              # five hours on 2 cores; goes on where it stopped
    python tests/experiments/batch_sizes.py --seeds 3 --sizes 4 16 64 256
    python tests/experiments/batch_sizes.py --seeds 3 --data digits3d --sizes 4 64 --epochs 20 --options width=8
    python tests/experiments/batch_sizes.py --seeds 3 --data glyphs.npz --sizes 16 64 --epochs 5 --options width=8

Runs the scripts as a user does, on the CPU, one thread a run, `jobs` at a time, into runs/batch-sizes.
"""
import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from matplotlib.figure import Figure
from scipy import stats

ROOT = Path(__file__).parents[2]
METHODS = {  # name in the figure: script, its options; IConE alone takes a batch of 1
    "IConE": ("icone.py", []), "VICReg": ("vicreg.py", []), "SimCLR": ("ba_ssl.py", ["--no-fusion"])}
COLUMNS = ["k-NN", "linear", "RankMe of z", "TwoNN of z"]


def run(folder, script, options):
    """The report of one run, which is not repeated if it is already there."""
    if not (folder / "report.json").exists():
        shutil.rmtree(folder, ignore_errors=True)                        # what a kill left of it
        subprocess.run([sys.executable, ROOT / script, "--out", folder, "--device", "cpu", *options], check=True,
                       stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads((folder / "report.json").read_text())


def options_of_all(parser, folder):
    """The options that every experiment has."""
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--draw", type=int, help="make so many runs, drawn at random, and print their rows alone")
    parser.add_argument("--out", type=Path, default=Path("runs", folder))
    return parser.parse_args()


def make(jobs, numbers, args):
    """{key: numbers(job)}; the last part of a key is the seed, and whole tables of a seed come first."""
    keys = random.sample([*jobs], args.draw) if args.draw else sorted(jobs, key=lambda key: key[-1])
    with ThreadPoolExecutor(args.jobs) as pool:
        return dict(zip(keys, pool.map(lambda key: numbers(jobs[key]), keys)))


def of(results, *row):
    """Those of a row, in order of their seeds."""
    return [value for key, value in results.items() if key[:-1] == row]


def apart(results, row, other, value):
    """value(result) of a row less that of another row, for each seed that both have."""
    return [value(results[*row, seed]) - value(results[*other, seed])
            for *key, seed in results if key == [*row] and (*other, seed) in results]


def numbers(report):
    """One run's numbers in the order of COLUMNS."""
    panel = report["panels"]["projector z"]
    probe = report["probes"]["trained encoder"]
    return [probe["k-NN"], probe["linear"], panel["RankMe"], panel["TwoNN"]]


def spread(values, decimals=3):
    """mean ± std; of one value itself."""
    std = f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{decimals}f}{std}"


def half_width(values):
    """Of the 95 % interval of their mean, by Student's t."""
    return stats.t.ppf(.975, len(values) - 1) * statistics.stdev(values) / len(values) ** .5


def interval(values):
    """Their mean and half the width of its 95 % interval; nothing for fewer than two."""
    return "" if len(values) < 2 else f"{statistics.mean(values):+.3f} ± {half_width(values):.3f}"


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
                over = apart(reports, ("IConE", size), (name, size), lambda report: numbers(report)[0])
                cells.append(interval(over) if name != "IConE" else "")
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
