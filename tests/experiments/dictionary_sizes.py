"""FALCON from 16 to 65,536 codes, its learnable dictionaries, and without its prior: tables and a figure.

    python tests/experiments/dictionary_sizes.py --jobs 2               # half an hour on 2 cores; goes on where it stopped
    python tests/experiments/dictionary_sizes.py --data glyphs.npz      # letters, a smaller encoder: less than an hour
    python tests/experiments/dictionary_sizes.py --data runs/fashion/fashion.npz    # of fashion.py subset

Runs falcon.py as a user does, on the CPU, one thread a run, `jobs` at a time, into runs/dictionary-sizes.
"""
import argparse
import json
import statistics
from pathlib import Path

from common import make, of, options_of_all, run, spread
from matplotlib.figure import Figure

SIZES = [16, 64, 256, 1024, 2048, 4096, 16384]                          # 4096 is the default
RUNS = {  # options: seeds
    **{f"--codes {size}": 3 for size in SIZES},
    "--codes 2048 --beta-rise 0": 3, "--codes 2048 --prior none": 3, "--codes 2048 --norm tanh": 3,
    "--codes 2048 --dictionary learned": 3, "--codes 2048 --dictionary alternating": 1,
    "--codes 2048 --dictionary hybrid": 1, "--codes 64 --dictionary learned": 3, "--codes 16 --dictionary learned": 3,
    "--codes 2048 --projector 512-128": 3, "--codes 2048 --projector 64": 1, "--codes 2048 --prior forward": 1}
ON_OTHERS = {**{f"--codes {size}": 3 for size in (64, 512, 4096, 65536)},
              **{f"--codes {size} --dictionary learned": 3 for size in (16, 64)}}
COLUMNS = {  # name in the table: in meters.json or report.json, decimals, whether with its std
    "k-NN": ("k-NN", 3, True), "linear": ("linear", 3, True), "AMI": ("AMI", 2, False), "NMI": ("NMI", 2, False),
    "of chance": ("NMI of a random assignment", 2, False), "codes in use": ("codes", 0, False),
    "dim.": ("dimensions", 1, False), "off-diagonal": ("off_diagonal", 2, False)}


def numbers(job):
    """One run's numbers, {name in COLUMNS: value}."""
    folder, options = job
    found = run(folder, "falcon.py", options)["probes"]["trained encoder"]
    found |= json.loads((folder / "meters.json").read_text())
    return {column: found[name] for column, (name, _, _) in COLUMNS.items()}


def draw(table, path):
    """Numbers against the number of codes; table: {options: {column: one number a seed}}."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = {"accuracy on test features": ["k-NN", "linear"],
              "codes against classes, test images": ["NMI", "of chance", "AMI"],
              "codes in use, 1,440 images": ["codes in use"], "off-diagonal of z^T z, rms": ["off-diagonal"]}
    for axis, (title, columns) in zip(figure.subplots(1, len(panels)), panels.items()):
        for column in columns:
            values = [table[f"--codes {size}"][column] for size in SIZES]
            means, stds = ([part(value) for value in values] for part in (statistics.mean, statistics.stdev))
            axis.errorbar(SIZES, means, stds, fmt="o-", capsize=3, label=column if len(columns) > 1 else "measured")
        if columns == ["codes in use"]:
            axis.plot(SIZES, [min(size, 1440) for size in SIZES], ":", color="gray", label="all that can be")
        if columns == ["off-diagonal"]:
            most = [min(size, 1440) ** -.5 for size in SIZES]
            axis.plot(SIZES, most, ":", color="gray", label="at the optimum, 1 / sqrt(codes in use)")
        axis.set_xscale("log", base=4)
        axis.set(xlabel="codes c", title=title, ylim=(0, 1 if len(columns) > 1 else None), xticks=SIZES)
        if columns == ["codes in use"]:
            axis.set(yscale="log", ylim=(1, 2000))
        axis.set_xticklabels(SIZES, rotation=45)
        axis.title.set_size(9)
        axis.legend(fontsize=7)
    figure.suptitle("falcon.py on posed digits, mean ± std over 3 seeds", fontsize=10)
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="an .npz, as of glyphs.py, in place of digits")
    args = options_of_all(parser, "dictionary-sizes")
    chosen, out, common = RUNS, args.out, []
    if args.data:
        chosen, out = ON_OTHERS, args.out / args.data.stem
        common = ["--data", str(args.data.resolve()), "--batch", "32", "--width", "8", "--epochs", "5"]
    jobs = {(name, seed): ((out / f"{name[2:]} {seed}").resolve(), [*name.split(), *common, "--seed", str(seed)])
            for name, seeds in chosen.items() for seed in range(seeds)}
    results = make(jobs, numbers, args)
    titles = [name.replace("NMI", "NMI, of chance") for name in COLUMNS if name != "of chance"]
    print(f"| codes | else | {' | '.join(titles)} |\n{'|---' * (2 + len(titles))}|")
    table = {}                                                           # {options: {column: one number a seed}}
    for name in chosen:
        if not (lines := of(results, name)):
            continue
        own = table[name] = {column: [line[column] for line in lines] for column in COLUMNS}
        cells = {column: spread(own[column], decimals) if both else f"{statistics.mean(own[column]):.{decimals}f}"
                 for column, (_, decimals, both) in COLUMNS.items()}
        cells["NMI"] += ", " + cells.pop("of chance")
        codes, _, others = name[8:].partition(" --")                     # "--codes 64 --dictionary learned"
        print(f"| {codes} | {others} | {' | '.join(cells.values())} |")
    if not args.data and not args.draw:
        draw(table, out / "dictionary_sizes.png")


if __name__ == "__main__":
    main()
