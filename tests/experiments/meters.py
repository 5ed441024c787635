"""All methods on FALCON's meters of four collapses, on the collapse panel and with few labels: three of a tables.

    python tests/experiments/meters.py --jobs 2                         # a quarter of an hour on 2 cores; goes on where it stopped

Runs the scripts as a user does, on the CPU, one thread a run, `jobs` at a time, into runs/meters. Embeddings z are
brought to unit length for the meters, and compared with 2,048 random codes whatever the method.
"""
import argparse

import torch
import torch.nn.functional as F
from common import make, of, options_of_all, run, spread

import ba_ssl
import falcon
import icone
import vicreg
from kernels import dictionary_signs
from kernels.harness.cli import read_data
from kernels.harness.encoder import Encoder
from kernels.harness.images import encode

METHODS = {  # name: script, its options, model of an encoder
    "VICReg": ("vicreg.py", [], lambda encoder: vicreg.VICReg(encoder, 128)),
    "SimCLR": ("ba_ssl.py", ["--no-fusion"], lambda encoder: ba_ssl.BASSL(encoder, 128)),
    "SimCLR + fusion": ("ba_ssl.py", [], lambda encoder: ba_ssl.BASSL(encoder, 128)),
    "IConE": ("icone.py", [], lambda encoder: icone.IConE(encoder, 128, 1437)),
    "FALCON": ("falcon.py", [], lambda encoder: falcon.FALCON(encoder, 128, falcon.FixedDictionary(4096, 128), 64))}
METERS = {  # name in the table: in falcon.collapse_meters, decimals
    "std": ("std", 2), "cosine": ("cosine", 2), "dimensions": ("dimensions", 2), "off-diagonal": ("off_diagonal", 2),
    "codes": ("codes", 0), "assignment entropy": ("assignment_entropy", 2), "mixture entropy": ("mixture_entropy_10", 2)}
PANEL = {"cosine": 2, "RankMe": 1, "participation": 1, "uniformity": 2, "TwoNN": 1, "view ratio": 2}        # decimals
SEED = 1000                                              # of the codes: no run was trained on these
PROBES = {"k-NN": 3, "linear": 3, "1 a class": 3, "5 a class": 3, "10 a class": 3}


def numbers(job):
    """{group: {name: number}} of one run."""
    folder, script, options, make = job
    report = run(folder, script, options)
    model = make(Encoder(1, 2))
    state = torch.load(folder / "last.pt", weights_only=True)["model"]
    state = {name: weight for name, weight in state.items() if not name.startswith("fusion")}
    model.load_state_dict(state, strict=False)
    model.eval()
    with torch.no_grad():
        z = model.projector(encode(model.encoder, read_data("digits").test_images))
    n, f = z.shape
    z = F.normalize(z) * (f / 64) ** .5
    codes = dictionary_signs(2048, f, SEED)
    meters = falcon.collapse_meters(z, codes, falcon.derived_temperature(64, f, 2048))
    meters["dimensions"] = meters["dimensions"] / f
    return {"meters": meters, "panel": report["panels"]["projector z"], "probes": report["probes"]["trained encoder"],
            "raw pixels": report["probes"]["raw pixels"], "random encoder": report["probes"]["random encoder"]}


def cells(results, group, names):
    """names: {name: decimals}."""
    columns = {name: [result[group][name] for result in results] for name in names}
    return " | ".join(spread(column, names[name]) for name, column in columns.items())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="at least 2")
    args = options_of_all(parser, "meters")
    jobs = {(name, seed): ((args.out / f"{name} {seed}").resolve(), script, [*options, "--seed", str(seed)], make)
            for seed in range(args.seeds) for name, (script, options, make) in METHODS.items()}
    found = make(jobs, numbers, args)
    table = {name: own for name in METHODS if (own := of(found, name))}
    print(f"| method | {' | '.join(PROBES)} |\n|---|{'---|' * len(PROBES)}")
    for name in ("raw pixels", "random encoder"):
        if "VICReg" in table:
            print(f"| {name} | {cells(table['VICReg'], name, PROBES)} |")
    for name, results in table.items():
        print(f"| {name} | {cells(results, 'probes', PROBES)} |")
    decimals = dict(METERS.values())
    for group, names, title in (("meters", decimals, METERS), ("panel", PANEL, PANEL)):
        print(f"\n| method | {' | '.join(title)} |\n|---|{'---|' * len(title)}")
        for name, results in table.items():
            print(f"| {name} | {cells(results, group, names)} |")


if __name__ == "__main__":
    main()
