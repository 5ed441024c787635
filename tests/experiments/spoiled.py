"""VICReg and SimCLR on training images that are thinned, noisy or full of holes; test images stay clean: a table.

    python tests/experiments/spoiled.py --jobs 2                        # half an hour on 2 cores; goes on where it stopped
    python tests/experiments/spoiled.py --data glyphs.npz --epochs 5 --options batch=32 width=8

Both at one batch size and as many epochs. Runs the scripts as a user does, on the CPU, one thread a run, `jobs` at a
time, into runs/spoiled.
"""
import argparse
from pathlib import Path

import torch
from common import METHODS, VIEWS_OF, apart, interval, make, of, options_of_all, over, run, save_npz, spread, thinned

from kernels.harness.cli import read_data
from kernels.harness.images import pixels

METHODS = {name: METHODS[name] for name in ("VICReg", "SimCLR")}


def spoil(case, data, generator):
    """Training rows and images [n, C, *S] in [0, 1] of a case."""
    rows = thinned(data.labels, 100) if case == "thinned to 1 : 100" else torch.arange(len(data.images))
    x = pixels(data.images, rows, "cpu").clamp(0, 1)
    if case == "noise, std 0.3":
        x = (x + .3 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    if case == "a quarter of the patches missing":                       # of 4 x 4
        grid = torch.rand(len(x), 1, *[side // 4 for side in x.shape[2:]], generator=generator)
        x = torch.where(torch.nn.functional.interpolate(grid, x.shape[2:]) < .25, 0., x)
    return rows, x


CASES = ["clean", "thinned to 1 : 100", "noise, std 0.3", "a quarter of the patches missing"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="digits", help="digits, or an .npz of 2-D images with labels")
    parser.add_argument("--epochs", default="45")
    parser.add_argument("--options", nargs="*", default=["batch=64"], help="of all runs, without their dashes")
    parser.add_argument("--seeds", type=int, default=3, help="at least 2")
    args = options_of_all(parser, "spoiled")
    out = args.out / Path(args.data).stem
    out.mkdir(parents=True, exist_ok=True)
    data = read_data(args.data)
    test = pixels(data.test_images, torch.arange(len(data.test_images)), "cpu")
    jobs = {}
    for case in CASES:
        rows, x = spoil(case, data, torch.Generator().manual_seed(0))
        file = (out / f"{case.replace(' : ', '-')}.npz").resolve()
        save_npz(file, x, data.labels[rows], test, data.test_labels)
        for seed in range(args.seeds):
            for name, (script, options) in METHODS.items():
                own = [f"--{option}" for option in args.options] + VIEWS_OF.get(args.data, [])
                jobs[case, name, seed] = (out / f"{name}, {case.replace(' : ', '-')} {seed}").resolve(), script, [
                    *options, *own, "--data", str(file), "--epochs", args.epochs, "--seed", str(seed)]
    probes = make(jobs, lambda job: run(*job)["probes"], args)
    print("| training images | raw: k-NN | method | k-NN | linear | k-NN less clean, 95 % | VICReg less SimCLR |\n"
          + "|---" * 7 + "|")
    for case in CASES:
        for name in METHODS:
            if not (own := of(probes, case, name)):
                continue
            cells = [spread([probe["trained encoder"][column] for probe in own]) for column in ("k-NN", "linear")]
            lost = apart(probes, (case, name), ("clean", name), lambda probe: probe["trained encoder"]["k-NN"])
            cells.append(interval(lost) if case != "clean" else "")
            ours, theirs = ([probe["trained encoder"]["k-NN"] for probe in of(probes, case, which)] for which in METHODS)
            cells.append(over(ours, theirs) if name == "VICReg" else "")
            raw = own[0]["raw pixels"]["k-NN"]
            print(f"| {case} | {raw:.3f} | {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
