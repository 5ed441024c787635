r"""Base methods with and without batch fusion, its controls, layers, batch sizes: a table and a figure.

    python tests/experiments/fusion.py --jobs 2                         # an hour and a half on 2 cores; goes on where it stopped
    python tests/experiments/fusion.py --jobs 2 --seeds 3 --only SimCLR "SimCLR + fusion" "SimCLR + mixup" --data glyphs.npz \
        --options epochs=5 width=8

Runs ba_ssl.py as a user does, on the CPU, one thread a run, `jobs` at a time, into runs/fusion.
"""
import argparse
import json
import statistics
from operator import itemgetter
from pathlib import Path

from common import apart, half_width, interval, make, of, options_of_all, run, spread
from matplotlib.figure import Figure

BASE = {"SimCLR": [], "VICReg": ["--loss", "vicreg"], "FALCON": ["--loss", "falcon"], "IConE": ["--loss", "icone"],
        **{f"SimCLR, batch {size}": ["--batch", str(size)] for size in (16, 256)}}
CONTROLS = {"mixup": ["--mixing", "mixup"], "random": ["--mixing", "random"]}
CHANGES = {"grouped": ["--mixing", "grouped"], "both views": ["--both"],
           "mixup, both views": ["--mixing", "mixup", "--both"],
           **{f"{k} layer{'s' * (k > 1)}": ["--layers", str(k)] for k in (1, 3, 4)}}
MAIN = ["SimCLR", "SimCLR + fusion", "SimCLR + mixup", "SimCLR + random"]
RUNS = {}  # name: (its base, options); whole tables of a seed first, what decides before the rest
for name, options in BASE.items():
    RUNS[name] = name, [*options, "--no-fusion"]
    RUNS[f"{name} + fusion"] = name, options
    for control, more in CONTROLS.items():
        if control == "mixup" or name == "SimCLR":
            RUNS[f"{name} + {control}"] = name, [*options, *more]
for change, more in CHANGES.items():
    RUNS[f"SimCLR + {change}"] = "SimCLR", more


def numbers(job):
    """One run's numbers; those of the meters are those of the last epoch."""
    folder, options = job
    probes = run(folder, "ba_ssl.py", options)["probes"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {**probes["trained encoder"], **lines[-1]["meters"]}
    found["course"] = [line["knn"] for line in lines if "knn" in line]
    if "with the module" in probes:
        found["with the module"] = probes["with the module"]["k-NN"]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="of SimCLR, with fusion, mixup, random; at least 2")
    parser.add_argument("--more-seeds", type=int, default=3, help="of all other runs; no more than --seeds")
    parser.add_argument("--only", nargs="*", default=[*RUNS], help="runs by name, each with its base before it")
    parser.add_argument("--data", help="as of ba_ssl.py")
    parser.add_argument("--options", nargs="*", default=[], help="of all runs, without their dashes: epochs=20")
    args = options_of_all(parser, "fusion")
    common = [f"--{option}" for option in args.options] + (["--data", args.data] if args.data else [])
    chosen = {name: job for name, job in RUNS.items() if name in args.only}
    out = args.out / Path(args.data).stem if args.data else args.out
    out.mkdir(parents=True, exist_ok=True)
    seeds = {name: range(args.seeds if name in MAIN else args.more_seeds) for name in chosen}
    jobs = {(name, seed): ((out / f"{name} {seed}").resolve(), [*options, *common, "--seed", str(seed)])
            for name, (_, options) in chosen.items() for seed in seeds[name]}
    results = make(jobs, numbers, args)

    print("| run | seeds | k-NN | linear | k-NN over its base, 95 % | linear over its base, 95 % | with the module |\n"
          + "|---" * 7 + "|")
    differences = {}                                                     # {run: {probe: one number a seed}}
    noise, others = {}, {}
    for name, (base, _) in chosen.items():
        if not (own := of(results, name)):
            continue
        differences[name] = {probe: apart(results, (name,), (base,), itemgetter(probe)) for probe in ("k-NN", "linear")}
        cells = [spread([line[probe] for line in own]) for probe in ("k-NN", "linear")]
        if name == base:
            cells += [""] * 3
        else:
            cells += [interval(values) for values in differences[name].values()]
            cells.append(f"{statistics.mean(line['with the module'] for line in own):.3f}")
            others[name] = statistics.mean(line["others"] for line in own)
        noise[name] = statistics.mean(line["noise_nt_xent"] / line["noise_exchanged"] for line in own)
        print(f"| {name} | {len(own)} | {' | '.join(cells)} |")
    if args.draw:
        return
    if {*MAIN} <= {*chosen}:
        print("\n| less another | k-NN, 95 % |\n|---|---|")
        for name in MAIN[2:]:
            over = apart(results, ("SimCLR + fusion",), (name,), itemgetter("k-NN"))
            print(f"| SimCLR + fusion less {name} | {interval(over)} |")
        base, fused = ([line["course"] for line in of(results, name)] for name in MAIN[:2])
        over = [statistics.mean(after) - statistics.mean(before) for before, after in zip(zip(*base), zip(*fused))]
        print(f"\n| part of the training, of {len(over)} | {' | '.join(str(k + 1) for k in range(len(over)))} |\n"
              f"|---{'|---' * len(over)}|\n| fusion over SimCLR | {' | '.join(f'{value:+.3f}' for value in over)} |")
    for title, values in (("NT-Xent of noise over the same with partners exchanged", noise), ("others' part", others)):
        low, high = (pick(values, key=values.get) for pick in (min, max))
        print(f"{title}: from {values[low]:.2f} ({low}) to {values[high]:.2f} ({high})")

    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    fused = [name for name, (base, _) in chosen.items() if name != base]
    for row, name in enumerate(fused):
        values = differences[name]["k-NN"]
        left.plot(values, [row] * len(values), ".", color="silver")
        left.errorbar(statistics.mean(values), row, xerr=half_width(values), fmt="o", color="C0", capsize=3)
    left.axvline(0, color="gray", lw=1)
    left.set(xlabel="k-NN accuracy over its base, same seed", yticks=range(len(fused)))
    left.set_yticklabels(fused, fontsize=8)
    left.invert_yaxis()
    for name in MAIN:
        if name in chosen:
            courses = [line["course"] for line in of(results, name)]
            means = [statistics.mean(values) for values in zip(*courses)]
            right.plot([(k + 1) / len(means) for k in range(len(means))], means, "o-", ms=3, label=name)
    right.set(xlabel="part of the training", ylabel="k-NN accuracy, mean of the seeds")
    right.legend(fontsize=8)
    figure.suptitle("Left: each seed (grey), mean and its 95 % interval. Right: while they train", fontsize=10)
    figure.savefig(out / "fusion.png", dpi=110)
    print(f"picture: {out / 'fusion.png'}")


if __name__ == "__main__":
    main()
