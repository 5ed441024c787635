"""What VICReg and SimCLR cost until they reach the same k-NN accuracy on posed digits: a table.

    python tests/experiments/cost.py                                    # a minute, after batch_sizes.py, whose runs it reads

A step is timed here, the methods in turn, views included, all cores; how many it takes is read between the k-NN
accuracies that a run of batch_sizes.py logs at each eighth. Memory is what a step allocates at its peak.
"""
import argparse
import json
import statistics
import time

import numpy as np
import torch
from common import METHODS, make, of, options_of_all, run, spread

import ba_ssl
import vicreg
from kernels.benchmark import peak_memory
from kernels.harness.cli import read_data
from kernels.harness.encoder import Encoder
from kernels.harness.images import pixels
from kernels.harness.views import two_views

MODELS = {"VICReg": vicreg.VICReg, "SimCLR": ba_ssl.BASSL}


def step_of(name, data, batch):
    """A call that makes one training step."""
    torch.manual_seed(0)
    encoder = Encoder(1, 2)
    model = MODELS[name](encoder, encoder.features)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=.05)
    generator = torch.Generator().manual_seed(0)

    def step():
        rows = torch.randint(len(data.images), (batch,), generator=generator)
        views = two_views(pixels(data.images, rows), generator, data.view)
        terms, _ = model(*views) if name == "VICReg" else model(*views, rows)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    return step


def epochs_to(accuracy, folder, script, options):
    """Epochs at which a run's logged k-NN accuracy passes this one, a straight line between; nan if it never does."""
    run(folder, script, options)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    epochs, knn = zip(*((line["epoch"], line["knn"]) for line in lines if "knn" in line))
    above = next((k for k, value in enumerate(knn) if value >= accuracy), None)
    if not above:
        return epochs[0] if above == 0 else float("nan")
    return float(np.interp(accuracy, knn[above - 1:above + 1], epochs[above - 1:above + 1]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--accuracy", type=float, default=.8, help="k-NN, to be reached")
    parser.add_argument("--seeds", type=int, default=3, help="at least 2")
    args = options_of_all(parser, "batch-sizes/digits")
    jobs = {}
    for batch in args.batches:
        for name in MODELS:
            script, options = METHODS[name]
            for seed in range(args.seeds):
                own = [*options, "--data", "digits", "--epochs", "64", "--batch", str(batch), "--seed", str(seed)]
                jobs[batch, name, seed] = (args.out / f"{name} {batch} 64 {seed}").resolve(), script, own
    found = make(jobs, lambda job: epochs_to(args.accuracy, *job), args)
    data = read_data("digits")
    print(f"| batch | method | a step | MiB a step | epochs to {args.accuracy} | time to it |\n{'|---' * 6}|")
    for batch in args.batches:
        steps = {name: step_of(name, data, batch) for name in MODELS}
        times = {name: [] for name in MODELS}
        for _ in range(20):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - start)
        for name, step in steps.items():
            if not (epochs := of(found, batch, name)):
                continue
            own_time = statistics.median(times[name])
            seconds = own_time * statistics.mean(epochs) * (len(data.images) // batch)
            cells = [f"{own_time * 1e3:.1f} ms", f"{peak_memory(step) / 2 ** 20:.0f}",
                     spread(epochs, 1), f"{seconds:.0f} s"]
            print(f"| {batch} | {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
