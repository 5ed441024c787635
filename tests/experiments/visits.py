"""How often must an image be visited? Few images seen often beside many seen rarely, as many in all: a table, a figure.

    python tests/experiments/visits.py --data FOLDER --seen 64000        # an hour and a half on 2 cores; goes on where it stopped

N of the training images of Fashion-MNIST (fashion.py says where they are), at random; N / 16 steps an epoch, so many epochs
that each run sees `--seen` images. Probes know these N (of more than 10,000 as many) and are asked for 4,000 test images. Runs the scripts as a user does,
on the CPU, one thread a run, `jobs` at a time, into runs/visits.
"""
import argparse
import statistics
from pathlib import Path

from common import METHODS, make, of, options_of_all, run, spread
from fashion import subset
from matplotlib.figure import Figure

from kernels.harness.reading import read_images

COLUMNS = ["k-NN", "linear", "10 a class"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the four IDX files")
    parser.add_argument("--counts", nargs="+", type=int, default=[500, 2000, 8000, 32_000], help="training images")
    parser.add_argument("--seen", type=int, default=64_000, help="images, by every run")
    parser.add_argument("--seeds", type=int, default=3)
    args = options_of_all(parser, "visits")
    data = read_images(args.data.resolve())
    jobs = {}
    for count in args.counts:
        file = subset(data, args.out / f"{count}.npz", count, 4000)
        common = ["--data", file, "--batch", "16", "--width", "8", "--epochs", str(round(args.seen / count))]
        for name, (script, options) in METHODS.items():
            for seed in range(args.seeds):
                folder = (args.out / f"{name} {count} {args.seen} {seed}").resolve()
                jobs[count, name, seed] = folder, script, [*options, *common, "--seed", str(seed)]
    probes = make(jobs, lambda job: run(*job)["probes"], args)
    print(f"| images | visits | encoder | {' | '.join(COLUMNS)} |\n{'|---' * (3 + len(COLUMNS))}|")
    found = {}
    for count in args.counts:
        rows = {row: [probe[row] for probe in of(probes, count, "VICReg")] for row in ("raw pixels", "random encoder")}
        rows |= {name: [probe["trained encoder"] for probe in of(probes, count, name)] for name in METHODS}
        for row, own in rows.items():
            if own:
                found[count, row] = [[seed[column] for seed in own] for column in COLUMNS]
                print(f"| {count:,} | {round(args.seen / count)} | {row} | {' | '.join(map(spread, found[count, row]))} |")
    if args.draw:
        return
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axis, label, k in zip(figure.subplots(1, len(COLUMNS)), COLUMNS, range(len(COLUMNS))):
        for row in (*METHODS, "raw pixels"):
            values = [found[count, row][k] for count in args.counts]
            stds = [statistics.stdev(value) if len(value) > 1 else 0 for value in values]
            line = dict(color="gray", linestyle=":") if row == "raw pixels" else dict(marker="o")
            axis.errorbar(args.counts, [*map(statistics.mean, values)], stds, capsize=3, label=row, **line)
        axis.set_xscale("log")
        axis.set(xlabel="training images", ylabel=label, xticks=args.counts)
        axis.set_xticklabels([f"{count:,}" for count in args.counts], fontsize=8)
        axis.minorticks_off()
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle(f"Fashion-MNIST, {args.seen:,} images seen by each run, batch 16", fontsize=10)
    figure.savefig(args.out / "visits.png", dpi=110)
    print(f"picture: {args.out / 'visits.png'}")


if __name__ == "__main__":
    main()
