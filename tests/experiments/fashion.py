"""Fashion-MNIST, 60,000 + 10,000 images of clothes, 28 x 28 gray: views chosen for it, and every method on it.

    python tests/experiments/fashion.py views --data FOLDER          # which views, on a part held out from training
    python tests/experiments/fashion.py methods --data FOLDER        # all 60,000, beside a supervised encoder
    python tests/experiments/fashion.py peers --data FOLDER          # lightly's losses in the same loop; needs lightly
    python tests/experiments/fashion.py icone --data FOLDER          # IConE's choices made otherwise, on that part
    python tests/experiments/fashion.py many --data FOLDER           # IConE beside SimCLR on 20,000
    python tests/experiments/fashion.py subset --data FOLDER         # an .npz of 6,000 + 4,000 for the other experiments

FOLDER holds the four IDX files as they are published (github.com/zalandoresearch/fashion-mnist; on Debian package
dataset-fashion-mnist, folder usr/share/datasets/fashion-mnist; 30 MB, MIT licence). Runs the scripts as a user does, on the
CPU, one thread a run, `jobs` at a time, into runs/fashion; goes on where it stopped.
"""
import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from common import METHODS, make, of, options_of_all, run, save_npz, spread
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from kernels import few_label_accuracy, knn_accuracy
from kernels.harness.encoder import Encoder
from kernels.harness.images import encode
from kernels.harness.reading import read_images

METHODS = {"VICReg": METHODS["VICReg"], "SimCLR": METHODS["SimCLR"], "SimCLR + fusion": ("ba_ssl.py", []),
           "IConE": METHODS["IConE"], "FALCON": ("falcon.py", [])}
VIEWS = {  # row of the table: options
    "poses": ["--views", "poses"],
    "poses, half as strong": ["--views", "poses", "--pose", ".5", "--noise", ".5"],
    **{f"crops from {least} %, {'' if flips == 'on' else 'no '}flips":
       ["--views", "crops", "--crop", f"{least / 100}", "--flips", flips] for least in (8, 20, 40) for flips in ("on", "off")}}
COLUMNS = ["k-NN", "linear", "1 a class", "5 a class", "10 a class"]
BATCH = "128"                                                            # of methods
SHORT = ["--batch", "64", "--width", "8", "--epochs", "10"]              # of all else
CHOICES = ["", "--window 0 --table-init encoder", "--table-init encoder", "--table-init normal", "--window 2000",
           "--window 2000 --table-init encoder", "--lr 6e-3", "--weight 3", "--projector 512-128", "--bank 8192",
           "--view-view 1", "--view-view 2", "--view-view 1 --table-init encoder",
           "--view-view 1 --window 0 --table-init encoder"]


def cells(seeds):
    """One {column: accuracy} a seed -> the cells of a row."""
    return " | ".join(spread([seed[column] for seed in seeds]) for column in COLUMNS)


def subset(data, file, train, test, held_out=False):
    """An .npz of so many training images, at random, and as many for testing: the data's first test images, or, held
    out for choices, other training images. -> its path"""
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    images, labels = (data.images, data.labels) if held_out else (data.test_images, data.test_labels)
    known, asked = order[:train], order[train:train + test] if held_out else torch.arange(test)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_npz(file, data.images[known], data.labels[known], images[asked], labels[asked])
    return str(file.resolve())


# ---- Which views -------------------------------------------------------------------------------------------
def views(args, data):
    file = subset(data, args.out / "choice.npz", 12_000, 4_000, held_out=True)
    common = ["--data", file, *SHORT]
    jobs = {}
    for seed in range(args.seeds):
        for name, options in VIEWS.items():
            for method in ("SimCLR", "VICReg", "FALCON"):
                script, own = METHODS[method]
                folder = (args.out / f"views {method}, {name} {seed}").resolve()
                jobs[name, method, seed] = folder, script, [*own, *options, *common, "--seed", str(seed)]
    probes = make(jobs, lambda job: run(*job)["probes"], args)
    print(f"| views | method | {' | '.join(COLUMNS)} |\n{'|---' * (len(COLUMNS) + 2)}|")
    for row in ("raw pixels", "random encoder"):
        if own := [probe[row] for probe in of(probes, "poses", "VICReg")]:
            print(f"| {row} | | {cells(own)} |")
    for name, method in dict.fromkeys(key[:2] for key in jobs):
        if own := [probe["trained encoder"] for probe in of(probes, name, method)]:
            print(f"| {name} | {method} | {cells(own)} |")


# ---- Every method ------------------------------------------------------------------------------------------
def whole(train, labels, test, test_labels):
    """Probes that know all training images, of features [N, E] and [M, E]."""
    known = train, labels, test, test_labels
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)).fit(train, labels)
    few = {f"{count} a class": few_label_accuracy(*known, count) for count in (1, 5, 10)}
    return {"k-NN": knn_accuracy(*known), "linear": linear.score(test, test_labels), **few}


def of_run(job):
    folder, *_ = job
    report = run(*job)
    file = folder / "whole.json"                                         # a minute's work, done once
    if not file.exists():
        with np.load(folder / "features.npz") as found:
            own = [torch.from_numpy(found[f"{split}_{part}"]) for split in ("train", "test") for part in ("features", "labels")]
        file.write_text(json.dumps(whole(*own)))
    return json.loads(file.read_text()) | report


def of_random_encoder(data, seed):
    torch.manual_seed(seed)
    encoder = Encoder(1, 2).eval()
    return whole(encode(encoder, data.images), data.labels, encode(encoder, data.test_images), data.test_labels)


def methods(args, data):
    jobs = {}
    for seed in range(args.seeds):
        common = ["--data", str(args.data), "--epochs", args.epochs, "--seed", str(seed)]
        for name, (script, own) in METHODS.items():
            folder = (args.out / f"{name} {args.epochs} {seed}").resolve()
            jobs[name, seed] = folder, script, [*own, *common, "--batch", BATCH]
        folder = (args.out / f"supervised {args.epochs} {seed}").resolve()
        jobs["supervised encoder", seed] = folder, "tests/experiments/supervised.py", common
    jobs = {key: job for key, job in jobs.items() if key[0] in args.only}
    found = make(jobs, of_run, args)
    print(f"| method | {' | '.join(COLUMNS)} | RankMe of z | verdict |\n{'|---' * (len(COLUMNS) + 3)}|")
    if not args.draw:
        raw = [data.images.flatten(1).float(), data.labels, data.test_images.flatten(1).float(), data.test_labels]
        print(f"| raw pixels | {cells([whole(*raw)])} | | |")
        print(f"| random encoder | {cells([of_random_encoder(data, seed) for seed in range(args.seeds)])} | | |")
    for name in ("supervised encoder", *METHODS):
        if own := of(found, name):
            rank = says = ""
            if name in METHODS:
                panels = [one["panels"]["projector z"] for one in own]
                rank = f"{statistics.mean(panel['RankMe'] for panel in panels):.0f} of {panels[0]['width']:.0f}"
                says = ", ".join(sorted({one["verdict"].split(":")[0] for one in own}))
            print(f"| {name} | {cells(own)} | {rank} | {says} |")


def peers(args, data):
    """On the part for choices."""
    file = subset(data, args.out / "choice.npz", 12_000, 4_000, held_out=True)
    common = ["--data", file, *SHORT]
    jobs = {}
    for seed in range(args.seeds):
        for name in ("VICReg", "SimCLR"):
            for who, (script, own) in {"ours": METHODS[name], "lightly's": ("tests/experiments/peers.py", [name])}.items():
                folder = (args.out / f"peers {name} {who} {seed}").resolve()
                jobs[name, who, seed] = folder, script, [*own, *common, "--seed", str(seed)]
    probes = make(jobs, lambda job: run(*job)["probes"], args)
    print(f"| loss | whose | {' | '.join(COLUMNS)} |\n{'|---' * (len(COLUMNS) + 2)}|")
    for name, who in dict.fromkeys(key[:2] for key in jobs):
        if own := [probe["trained encoder"] for probe in of(probes, name, who)]:
            print(f"| {name} | {who} | {cells(own)} |")


# ---- IConE -------------------------------------------------------------------------------------------------
def icone(args, data):
    file = subset(data, args.out / "choice.npz", 12_000, 4_000, held_out=True)
    jobs = {}
    for seed in range(args.seeds):
        for options in CHOICES:
            folder = (args.out / f"icone {options} {seed}").resolve()
            jobs[options, seed] = folder, "icone.py", [*options.split(), "--data", file, *SHORT, "--seed", str(seed)]
    probes = make(jobs, lambda job: run(*job)["probes"], args)
    print(f"| run | {' | '.join(COLUMNS)} |\n{'|---' * (len(COLUMNS) + 1)}|")
    for options in CHOICES:
        if own := [probe["trained encoder"] for probe in of(probes, options)]:
            print(f"| `{' '.join(['icone.py', *options.split()])}` | {cells(own)} |")


def many(args, data):
    """Chooses nothing."""
    file = subset(data, args.out / "many.npz", 20_000, 10_000)
    jobs = {}
    for seed in range(args.seeds):
        for name in ("IConE", "SimCLR"):
            script, own = METHODS[name]
            folder = (args.out / f"many {name} {seed}").resolve()
            jobs[name, seed] = folder, script, [*own, "--data", file, *SHORT, "--seed", str(seed)]
    probes = make(jobs, lambda job: run(*job)["probes"], args)
    print(f"| method | {' | '.join(COLUMNS)} |\n{'|---' * (len(COLUMNS) + 1)}|")
    for row, name in (("raw pixels", "SimCLR"), ("random encoder", "SimCLR"), ("IConE", "IConE"), ("SimCLR", "SimCLR")):
        if own := [probe["trained encoder" if row == name else row] for probe in of(probes, name)]:
            print(f"| {row} | {cells(own)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=["views", "methods", "peers", "icone", "many", "subset"])
    parser.add_argument("--data", type=Path, required=True, help="folder of the four IDX files")
    parser.add_argument("--epochs", default="10", help="of methods")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=["supervised encoder", *METHODS], help="of methods: these, by name")
    args = options_of_all(parser, "fashion")
    args.data = args.data.resolve()
    data = read_images(args.data)
    if args.part == "subset":
        print(subset(data, args.out / "fashion.npz", 6_000, 4_000))
        return
    dict(views=views, methods=methods, peers=peers, icone=icone, many=many)[args.part](args, data)


if __name__ == "__main__":
    main()
