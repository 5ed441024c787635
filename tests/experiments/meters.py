"""All methods on FALCON's meters of four collapses, on the collapse panel and with few labels: two of README's tables.

    python tests/experiments/meters.py --jobs 2                         # a quarter of an hour on 2 cores; goes on where it stopped

Runs the scripts as a user does, on the CPU, one thread a run, `jobs` at a time, into runs/meters. Embeddings z are
brought to unit length for the meters, and compared with 2,048 random codes whatever the method.
"""
import argparse
import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from batch_sizes import run

sys.path.insert(0, str(Path(__file__).parents[2]))
import ba_ssl
import falcon
import icone
import vicreg
from kernels import dictionary_signs

METHODS = {  # name: script, its options, model of an encoder
    "VICReg": ("vicreg.py", [], lambda encoder: vicreg.VICReg(encoder, 128)),
    "SimCLR": ("ba_ssl.py", ["--no-fusion"], lambda encoder: ba_ssl.BASSL(encoder, 128)),
    "SimCLR + fusion": ("ba_ssl.py", [], lambda encoder: ba_ssl.BASSL(encoder, 128)),
    "IConE": ("icone.py", [], lambda encoder: icone.IConE(encoder, 128, 1437)),
    "FALCON": ("falcon.py", [], lambda encoder: falcon.FALCON(encoder, 128, 64))}
METERS = ["std", "cosine", "dimensions", "off_diagonal", "codes", "assignment_entropy", "mixture_entropy_10"]
PANEL = ["cosine", "RankMe", "participation", "uniformity", "TwoNN", "view ratio"]
PROBES = ["k-NN", "linear", "1 a class", "5 a class", "10 a class"]


def numbers(job):
    """{group: {name: number}} of one run."""
    folder, script, options, make = job
    report = run(folder, script, options)
    model = make(vicreg.Encoder(1, 2))
    state = torch.load(folder / "last.pt", weights_only=True)["model"]
    state = {name: weight for name, weight in state.items() if not name.startswith("fusion")}
    model.load_state_dict(state, strict=False)
    model.eval()
    with torch.no_grad():
        z = model.projector(vicreg.encode(model.encoder, vicreg.load_data("digits").test_images))
    n, f = z.shape
    z = F.normalize(z) * (f / 64) ** .5
    meters = falcon.collapse_meters(z, dictionary_signs(2048, f, 0), falcon.derived_temperature(64, f, 2048))
    meters["dimensions"] = meters["dimensions"] / f
    return {"meters": meters, "panel": report["panels"]["projector z"], "probes": report["probes"]["trained encoder"],
            "raw pixels": report["probes"]["raw pixels"], "random encoder": report["probes"]["random encoder"]}


def cells(results, group, names, decimals=3):
    columns = ([result[group][name] for result in results] for name in names)
    return " | ".join(f"{statistics.mean(column):.{decimals}f} ± {statistics.stdev(column):.{decimals}f}"
                      for column in columns)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="at least 2")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path("runs", "meters"))
    args = parser.parse_args()
    jobs = {(name, seed): ((args.out / f"{name} {seed}").resolve(), script, [*options, "--seed", str(seed)], make)
            for seed in range(args.seeds) for name, (script, options, make) in METHODS.items()}
    with ThreadPoolExecutor(args.jobs) as pool:
        found = dict(zip(jobs, pool.map(numbers, jobs.values())))
    table = {name: [found[name, seed] for seed in range(args.seeds)] for name in METHODS}
    print(f"| method | {' | '.join(PROBES)} |\n|---|{'---|' * len(PROBES)}")
    for name in ("raw pixels", "random encoder"):
        print(f"| {name} | {cells(table['VICReg'], name, PROBES)} |")
    for name, results in table.items():
        print(f"| {name} | {cells(results, 'probes', PROBES)} |")
    print(f"\n| method | {' | '.join(METERS)} | {' | '.join(PANEL)} |\n|---|{'---|' * (len(METERS) + len(PANEL))}")
    for name, results in table.items():
        print(f"| {name} | {cells(results, 'meters', METERS, 2)} | {cells(results, 'panel', PANEL, 2)} |")


if __name__ == "__main__":
    main()
