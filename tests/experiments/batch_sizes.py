"""Every method at several batch sizes, as many images seen by each: README's table and figure.

    python tests/experiments/batch_sizes.py --jobs 2                    # an hour and a quarter on 2 cores; goes on where it stopped

Runs the scripts as a user does, on the CPU, one thread a run, `jobs` at a time, into runs/batch-sizes.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
METHODS = {  # name in the figure: script, its options, batch sizes
    "IConE": ("icone.py", [], [1, 4, 16, 64]),
    "IConE, 64 images a step": ("icone.py", ["--accumulate", "64"], [1]),
    "VICReg": ("vicreg.py", [], [4, 16, 64]),
    "SimCLR": ("ba_ssl.py", ["--no-fusion"], [4, 16, 64])}
COLUMNS = ["k-NN", "linear", "RankMe of z", "TwoNN of z"]


def run(folder, script, options):
    """The report of one run, which is not repeated if it is already there."""
    if not (folder / "report.json").exists():
        shutil.rmtree(folder, ignore_errors=True)                        # what a kill left of it
        subprocess.run([sys.executable, ROOT / script, "--out", folder, "--device", "cpu", *options], check=True,
                       stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads((folder / "report.json").read_text())


def numbers(job):
    """One run's numbers in the order of COLUMNS."""
    report = run(*job)
    panel = report["panels"]["projector z"]
    probe = report["probes"]["trained encoder"]
    return [probe["k-NN"], probe["linear"], panel["RankMe"], panel["TwoNN"]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", default="32", help="of every run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs", "batch-sizes"))
    args = parser.parse_args()
    jobs = {}
    for name, (script, options, sizes) in METHODS.items():
        for size in sizes:
            for seed in range(args.seeds):
                folder = args.out / f"{name} {size} {args.epochs} {seed}"
                jobs[name, size, seed] = folder.resolve(), script, [
                    "--batch", str(size), "--epochs", args.epochs, "--seed", str(seed), *options]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = dict(zip(jobs, pool.map(numbers, jobs.values())))
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots(1, len(COLUMNS))
    print(f"| method | batch | {' | '.join(COLUMNS)} |\n|---|---|{'---|' * len(COLUMNS)}")
    for name, (_, _, sizes) in METHODS.items():
        table = []                                                       # [sizes][columns] of (mean, std)
        for size in sizes:
            columns = zip(*(results[name, size, seed] for seed in range(args.seeds)))
            table.append([(statistics.mean(column), statistics.stdev(column)) for column in columns])
            cells = [f"{mean:.3f} ± {std:.3f}" if k < 2 else f"{mean:.1f} ± {std:.1f}"
                     for k, (mean, std) in enumerate(table[-1])]
            print(f"| {name} | {size} | {' | '.join(cells)} |")
        for axis, column in zip(axes, zip(*table)):
            means, stds = zip(*column)
            axis.errorbar(sizes, means, stds, fmt="o-" if len(sizes) > 1 else "s", capsize=3, label=name)
    for axis, label in zip(axes, COLUMNS):
        axis.set_xscale("log", base=2)
        axis.set(xlabel="batch size", ylabel=label, xticks=[1, 4, 16, 64], ylim=(0, None))
        axis.set_xticklabels([1, 4, 16, 64])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS), fontsize=9)
    figure.suptitle(f"Posed digits, {args.epochs} epochs, mean ± std over {args.seeds} seeds", fontsize=10)
    figure.savefig(args.out / "batch_sizes.png", dpi=110)
    print(f"picture: {args.out / 'batch_sizes.png'}")


if __name__ == "__main__":
    main()
