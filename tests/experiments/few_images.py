r"""Few images, unequal classes, small batches: every method beside IConE, as many images seen by each: tables.

    python tests/experiments/few_images.py --data fashion-mnist --counts 2000 --batches 1 4 64       # an hour on 2 cores
    python tests/experiments/few_images.py --data mri.npz --counts 2080 --ratios 1 --batches 4 64 --seen 10400 \
        --methods IConE VICReg SimCLR --options width=8 views=poses       # mri.py makes them

So many training images at random, where classes are unequal class k of K keeps R^(-k / (K - 1)) of the largest; 4,000 test
images, which are balanced. At batch 1 IConE alone. Views are
the default's, which fashion.py chose on images held out from training. Runs the scripts as a user does, on the CPU, one
thread a run, `jobs` at a time, into runs/few-images; goes on where it stopped.
"""
import argparse
import statistics
from pathlib import Path

import torch
from common import METHODS, apart, interval, make, of, options_of_all, over, run, save_npz, spread, thinned

from kernels.harness.cli import read_data

METHODS = {**METHODS, "FALCON": ("falcon.py", [])}
LEAST = {"IConE": 1, "VICReg": 4, "SimCLR": 4, "FALCON": 4}                                                  # batches
PROBES = ["k-NN", "linear", "5 a class"]
COLUMNS = [*PROBES, "RankMe", "TwoNN"]


def some(labels, count, ratio):
    """Rows of labels [N], drawn at random, `count` in all but for rounding, fewer where a class has not enough; largest
    class over smallest = ratio."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    if ratio == 1:
        return order[:count]
    return order[thinned(labels[order], ratio, count)]


def numbers(job):
    """One run's numbers, {row: {name in COLUMNS: value}}."""
    report = run(*job)
    panel = report["panels"]["projector z"]
    return {**report["probes"], "trained encoder": {**report["probes"]["trained encoder"], **panel}}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="as of the scripts, with labels")
    parser.add_argument("--counts", nargs="+", type=int, default=[500, 2000], help="training images")
    parser.add_argument("--ratios", nargs="+", type=int, default=[1, 100], help="largest class over smallest")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--seen", type=int, default=20_000, help="images, by every run")
    parser.add_argument("--options", nargs="*", default=["width=8"], help="of all runs, without their dashes")
    parser.add_argument("--seeds", type=int, default=3)
    args = options_of_all(parser, "few-images")
    out = args.out / Path(args.data).stem
    out.mkdir(parents=True, exist_ok=True)
    data = read_data(args.data)
    jobs = {}
    sets = [(count, ratio) for count in args.counts for ratio in args.ratios]
    for count, ratio in sets:
        rows = some(data.labels, count, ratio)
        file = (out / f"{count}-{ratio}.npz").resolve()
        save_npz(file, data.images[rows], data.labels[rows], data.test_images[:4000], data.test_labels[:4000])
        print(f"{file.name}: {len(rows):,} training images, by class {data.labels[rows].bincount().tolist()}")
        epochs = str(round(args.seen / len(rows)))
        common = ["--data", str(file), "--epochs", epochs, *(f"--{option}" for option in args.options)]
        for size in args.batches:
            for name in (name for name in args.methods if size >= LEAST[name]):
                script, own = METHODS[name]
                for seed in range(args.seeds):
                    folder = (out / f"{name} {count} {ratio} {size} {args.seen} {seed}").resolve()
                    jobs[count, ratio, size, name, seed] = folder, script, [
                        *own, *common, "--batch", str(size), "--seed", str(seed)]
    results = make(jobs, numbers, args)
    print(f"| images, R | batch | encoder | {' | '.join(COLUMNS)} |\n{'|---' * (3 + len(COLUMNS))}|")
    less = []                                                            # lines of the second table
    for count, ratio, size, name in dict.fromkeys(key[:-1] for key in jobs):
        own = of(results, count, ratio, size, name)
        if own and size == args.batches[0] and name == "IConE":
            for row in ("raw pixels", "random encoder"):
                cells = [spread([found[row][column] for found in own]) for column in PROBES]
                print(f"| {count:,}, {ratio} | | {row} | {' | '.join(cells)} | | |")
        if own:
            columns = {column: [found["trained encoder"][column] for found in own] for column in COLUMNS}
            cells = [spread(columns[column]) for column in PROBES]
            cells += [f"{statistics.mean(columns[column]):.1f}" for column in COLUMNS[len(PROBES):]]
            print(f"| {count:,}, {ratio} | {size} | {name} | {' | '.join(cells)} |")
            ours = of(results, count, ratio, size, "IConE")
            cells = [over([found["trained encoder"][column] for found in ours], columns[column]) for column in PROBES]
            if name != "IConE":
                less.append(f"| {count:,}, {ratio} | {size} | {name} | {' | '.join(cells)} |")
    if args.draw:
        return
    print("\n| images, R | batch | IConE less | k-NN, 95 % | linear | 5 a class |\n|---|---|---|---|---|---|", *less, sep="\n")
    if len(args.ratios) < 2:
        return
    even, *_, unequal = args.ratios
    print(f"\n| images | batch | encoder | k-NN, R = {unequal} less {even}, 95 % | of linear |\n|---|---|---|---|---|")
    for count, size, name in dict.fromkeys((count, size, name) for count, _, size, name, _ in jobs):
        lost = [interval(apart(results, (count, unequal, size, name), (count, even, size, name),
                               lambda found: found["trained encoder"][column])) for column in ("k-NN", "linear")]
        print(f"| {count:,} | {size} | {name} | {' | '.join(lost)} |")


if __name__ == "__main__":
    main()
