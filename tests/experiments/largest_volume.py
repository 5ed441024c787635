"""How large a volume trains: memory and seconds of a step, by side, of IConE one at a time and of VICReg two at a time.

    python tests/experiments/largest_volume.py                          # a quarter of an hour on 2 cores: up to 16 GB

A step as in the scripts, views included, on the CPU, default width, random volumes; each size in a process of its own. Time is
that of the fastest of three steps, from side 320 on of one.
"""
import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from icone import IConE
from kernels.harness.encoder import Encoder
from kernels.harness.views import posed_view, two_views
from vicreg import VICReg


def model_of(script):
    torch.manual_seed(0)
    encoder = Encoder(1, 3, large=True)
    if script == "vicreg.py":
        return VICReg(encoder, encoder.features)
    model = IConE(encoder, encoder.features, 1000)
    model.table.normal_()
    torch.nn.functional.normalize(model.table, out=model.table)
    return model


def measure(script, batch, side):
    """Seconds of the fastest step, and the process's peak memory in GB."""
    model = model_of(script)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, 1, side, side, side, generator=generator)
    seconds = []
    for _ in range(3 if side < 320 else 1):
        start = time.monotonic()
        views = two_views(x, generator, posed_view)
        terms, _ = model(*views, torch.arange(batch)) if script == "icone.py" else model(*views)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        if script == "icone.py":
            model.step()
        seconds.append(time.monotonic() - start)
    unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20              # bytes there, KiB on Linux
    return min(seconds), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sides", nargs="+", type=int, default=[128, 256, 384, 448, 512, 640, 768])
    parser.add_argument("--memory", type=float, default=16, help="GB; larger sides are not tried")
    parser.add_argument("--one", nargs=3, help="script, batch and side: this one alone, as JSON")
    args = parser.parse_args()
    if args.one:
        script, *numbers = args.one
        print(json.dumps(measure(script, *map(int, numbers))))
        return
    print("| method | batch | side | seconds a step | peak memory, GB |\n|---|---|---|---|---|")
    for name, script, batch in (("IConE", "icone.py", 1), ("VICReg", "vicreg.py", 2)):
        for side in args.sides:
            done = subprocess.run([sys.executable, __file__, "--one", script, str(batch), str(side)], check=True,
                                  stdout=subprocess.PIPE, text=True)
            seconds, memory = json.loads(done.stdout)
            print(f"| {name} | {batch} | {side} | {seconds:.2f} | {memory:.1f} |", flush=True)
            if memory > args.memory:
                break


if __name__ == "__main__":
    main()
