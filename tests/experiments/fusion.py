"""Base methods with and without batch fusion, layers, controls, batch sizes: README's tables and figure.

    python tests/experiments/fusion.py --jobs 2                         # some ninety minutes on 2 cores; goes on where it stopped

Runs ba_ssl.py as a user does, on the CPU, one thread a run, `jobs` at a time, into runs/fusion.
"""
import argparse
import json
import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from batch_sizes import run
from matplotlib.figure import Figure
from scipy import stats

BASE = {"SimCLR": [], "VICReg": ["--loss", "vicreg"], "FALCON": ["--loss", "falcon"],
        **{f"SimCLR, batch {size}": ["--batch", str(size)] for size in (16, 256)}}
CHANGES = {"`--mixing grouped`": ["--mixing", "grouped"], "`--mixing mixup`": ["--mixing", "mixup"],
           "`--keep-slots`": ["--keep-slots"], **{f"`--layers {k}`": ["--layers", str(k)] for k in (0, 1, 3, 4)},
           "`--gate 1`": ["--gate", "1"]}
RUNS = {  # name: (its base, options)
    **{name: (name, [*options, "--no-fusion"]) for name, options in BASE.items()},
    **{f"{name} + fusion": (name, options) for name, options in BASE.items()},
    **{f"SimCLR + fusion, {name}": ("SimCLR", options) for name, options in CHANGES.items()},
    "VICReg + fusion, `--mixing mixup`": ("VICReg", [*BASE["VICReg"], "--mixing", "mixup"])}


def numbers(job):
    """One run's numbers; those of the noise meters are those of the last epoch."""
    folder, options = job
    probes = run(folder, "ba_ssl.py", options)["probes"]
    meters = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["meters"]
    behind = {"with the module": probes["with the module"]["k-NN"]} if "with the module" in probes else {}
    return {**probes["trained encoder"], **behind, **meters}


def spread(values, decimals=3):
    """mean ± std, without the zero before the point."""
    return " ± ".join(f"{v:.{decimals}f}".replace("0.", ".", 1) if abs(v) < 1 else f"{v:.{decimals}f}"
                      for v in (statistics.mean(values), statistics.stdev(values)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="at least 2")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs", "fusion"))
    args = parser.parse_args()
    jobs = {(name, seed): ((args.out / f"{name.replace('`', '')} {seed}").resolve(), [*options, "--seed", str(seed)])
            for name, (_, options) in RUNS.items() for seed in range(args.seeds)}
    with ThreadPoolExecutor(args.jobs) as pool:
        results = dict(zip(jobs, pool.map(numbers, jobs.values())))
    print("| run | k-NN | linear | k-NN over its base | linear over its base | k-NN with the module | gate "
          "| noise: NT-Xent / exchanged / chance |\n|" + "---|" * 8)
    differences = {}                                                     # {run: {probe: one number a seed}}
    for name, (base, _) in RUNS.items():
        own, its = ([results[run, seed] for seed in range(args.seeds)] for run in (name, base))
        columns = {column: [line[column] for line in own] for column in own[0]}
        differences[name] = {probe: [a[probe] - b[probe] for a, b in zip(own, its)] for probe in ("k-NN", "linear")}
        cells = [spread(columns["k-NN"]), spread(columns["linear"])]
        cells += [spread(values) for values in differences[name].values()] if name != base else ["", ""]
        cells += [spread(columns[column]) if column in columns else "" for column in ("with the module", "gate")]
        noise = " / ".join(f"{statistics.mean(columns[c]):.2f}" for c in ("noise_nt_xent", "noise_exchanged", "chance"))
        print(f"| {name} | {' | '.join(cells)} | {noise} |")
    figure = Figure(figsize=(11, 5), layout="constrained")
    fused = [name for name, (base, _) in RUNS.items() if name != base and "keep" not in name]     # that is far off
    for axis, probe in zip(figure.subplots(1, 2, sharey=True), ("k-NN", "linear")):
        for row, name in enumerate(fused):
            values = differences[name][probe]
            error = stats.t.ppf(.975, len(values) - 1) * statistics.stdev(values) / len(values) ** .5
            axis.plot(values, [row] * len(values), ".", color="silver")
            axis.errorbar(statistics.mean(values), row, xerr=error, fmt="o", color="C0", capsize=3)
        axis.axvline(0, color="gray", lw=1)
        axis.set(xlabel=f"{probe} accuracy over its base without fusion, same seed", yticks=range(len(fused)))
        axis.set_yticklabels([name.replace("`", "") for name in fused], fontsize=8)
    axis.invert_yaxis()
    figure.suptitle(f"Posed digits, {args.seeds} seeds: each (grey), mean and its 95 % interval", fontsize=10)
    figure.savefig(args.out / "fusion.png", dpi=110)
    print(f"picture: {args.out / 'fusion.png'}")


if __name__ == "__main__":
    main()
