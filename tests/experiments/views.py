"""Every method on letters that pixels do not tell apart, with crops and with poses as views: a table.

    python tests/experiments/glyphs.py --out glyphs.npz
    python tests/experiments/views.py --jobs 2                          # goes on where it stopped

Runs the scripts as a user does, on the CPU, one thread a run, `jobs` at a time, into runs/views.
"""
import argparse
import statistics
from pathlib import Path

from common import METHODS, make, of, options_of_all, run, spread

METHODS = {**METHODS, "FALCON": ("falcon.py", [])}
VIEWS = ["crops", "poses"]
COLUMNS = ["k-NN", "linear"]


def cells(probes):
    """One {column: accuracy} a seed -> the cells of a row."""
    return " | ".join(spread([probe[column] for probe in probes]) for column in COLUMNS)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", default="5", help="of every run")
    parser.add_argument("--data", type=Path, default=Path("glyphs.npz"), help="colour images with labels")
    parser.add_argument("--seeds", type=int, default=3, help="at least 2")
    parser.add_argument("--device", default="cpu", help="of every run")
    args = options_of_all(parser, "views")

    common = ["--data", str(args.data.resolve()), "--batch", "32", "--width", "8"]
    common += ["--epochs", args.epochs, "--device", args.device]
    jobs = {}
    for seed in range(args.seeds):
        for name, (script, options) in METHODS.items():
            for views in VIEWS:
                folder = args.out / f"{name} {views} {args.epochs} {seed}"
                own = ["--views", views, "--seed", str(seed), *options]
                jobs[name, views, seed] = folder.resolve(), script, [*common, *own]
    reports = make(jobs, lambda job: run(*job), args)

    print(f"| method | views | {' | '.join(COLUMNS)} | RankMe of z |\n|---|---|{'---|' * len(COLUMNS)}---|")
    for row in ("raw pixels", "random encoder"):                         # are the same in all methods
        if own := [report["probes"][row] for report in of(reports, "VICReg", "crops")]:
            print(f"| {row} | | {cells(own)} | |")
    for name in METHODS:
        for views in VIEWS:
            if not (own := of(reports, name, views)):
                continue
            panels = [report["panels"]["projector z"] for report in own]
            rank = f"{statistics.mean(panel['RankMe'] for panel in panels):.0f} of {panels[0]['width']:.0f}"
            print(f"| {name} | {views} | {cells([report['probes']['trained encoder'] for report in own])} | {rank} |")


if __name__ == "__main__":
    main()
