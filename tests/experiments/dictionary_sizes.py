"""FALCON from 16 to 16,384 codes, its learnable dictionaries, and without its prior: README's table and figure.

    python tests/experiments/dictionary_sizes.py --jobs 2               # three quarters of an hour on 2 cores; goes on where it stopped

Runs falcon.py as a user does, on the CPU, one thread a run, `jobs` at a time, into runs/dictionary-sizes.
"""
import argparse
import json
import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from batch_sizes import run
from matplotlib.figure import Figure

SIZES = [16, 64, 256, 1024, 2048, 4096, 16384]                          # 4096 is the default
CHANGES = [["--beta-rise", "0"], ["--prior", "none"], ["--norm", "tanh"], ["--dictionary", "learned"],
           ["--projector", "512-128"], ["--projector", "64"], ["--prior", "forward"], ["--dictionary", "alternating"],
           ["--dictionary", "hybrid"]]
RUNS = {**{str(size): ["--codes", str(size)] for size in SIZES},
        **{f"2048, `{' '.join(change)}`": ["--codes", "2048", *change] for change in CHANGES},
        **{f"{size}, `--dictionary learned`": ["--codes", str(size), "--dictionary", "learned"] for size in (16, 64)}}
COLUMNS = {  # name in meters.json, or in report.json: decimals
    "k-NN": 3, "linear": 3, "NMI": 3, "NMI of a random assignment": 3, "AMI": 3, "codes": 0,
    "assignment_entropy": 2, "dimensions": 1, "off_diagonal": 3, "cosine": 2, "loss": 2}


def numbers(job):
    """One run's numbers, {name in COLUMNS: value}."""
    folder, options = job
    probe = run(folder, "falcon.py", options)["probes"]["trained encoder"]
    return {**probe, **json.loads((folder / "meters.json").read_text())}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs", "dictionary-sizes"))
    args = parser.parse_args()
    jobs = {(name, seed): ((args.out / f"{name.replace('`', '')} {seed}").resolve(), [*options, "--seed", str(seed)])
            for seed in range(args.seeds) for name, options in RUNS.items()}
    with ThreadPoolExecutor(args.jobs) as pool:
        results = dict(zip(jobs, pool.map(numbers, jobs.values())))
    print(f"| codes | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    table = {}                                                           # {run: {column: (mean, std)}}
    for name in RUNS:
        values = {column: [results[name, seed][column] for seed in range(args.seeds)] for column in COLUMNS}
        table[name] = {column: (statistics.mean(v), statistics.stdev(v)) for column, v in values.items()}
        print(f"| {name} | " + " | ".join(f"{mean:.{COLUMNS[column]}f} ± {std:.{COLUMNS[column]}f}"
                                          for column, (mean, std) in table[name].items()) + " |")
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = {"accuracy on test features": ["k-NN", "linear"],
              "codes against classes, test images": ["NMI", "NMI of a random assignment", "AMI"],
              "codes in use, 1,440 images": ["codes"], "off-diagonal of h^T h, rms": ["off_diagonal"]}
    for axis, (title, columns) in zip(figure.subplots(1, len(panels)), panels.items()):
        for column in columns:
            means, stds = zip(*(table[str(size)][column] for size in SIZES))
            axis.errorbar(SIZES, means, stds, fmt="o-", capsize=3, label=column if len(columns) > 1 else "measured")
        if columns == ["codes"]:
            axis.plot(SIZES, [min(size, 1440) for size in SIZES], ":", color="gray", label="all that can be")
        if columns == ["off_diagonal"]:
            axis.plot(SIZES, [size ** -.5 for size in SIZES], ":", color="gray", label="at the optimum, 1 / sqrt(c)")
        axis.set_xscale("log", base=4)
        axis.set(xlabel="codes c", title=title, ylim=(0, 1 if len(columns) > 1 else None), xticks=SIZES)
        if columns == ["codes"]:
            axis.set(yscale="log", ylim=(1, 2000))
        axis.set_xticklabels(SIZES, rotation=45)
        axis.title.set_size(9)
        axis.legend(fontsize=7)
    figure.suptitle(f"falcon.py on posed digits, mean ± std over {args.seeds} seeds", fontsize=10)
    figure.savefig(args.out / "dictionary_sizes.png", dpi=110)
    print(f"picture: {args.out / 'dictionary_sizes.png'}")


if __name__ == "__main__":
    main()
