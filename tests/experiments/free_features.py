"""FALCON without a network: the features of n images are the parameters, two views of one are it plus a little noise.

    python tests/experiments/free_features.py                           # three to six minutes on one core: table and picture
    python tests/experiments/free_features.py --rows 10000 --codes 65536 --batch 250 --steps 400 --lr .1 --features 64

The theorem is about the optimum over all features, so this is where it can be held: the same loss, temperature and
meters as in falcon.py, Adam in place of a network. Descent needs one thing that the theorem does not mention: beta has
to rise from 0. The prior alone first spreads the images over the codes; with beta = 1 from the start the first codes
that win keep images which others lack.
"""
import argparse
import math
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[2]))
import falcon
from kernels import dictionary_loss, dictionary_signs


def features_of(free, norm):
    """Free parameters [n, f] -> features h [n, f] as FALCON's projector ends."""
    n, f = free.shape
    return free.tanh() if norm == "tanh" else falcon.Sphere(math.sqrt(f / n))(free)


def descend(n, codes, f, norm="l2", start="random", prior="reverse", beta=1., rise=.5, steps=1500, lr=None, noise=.01,
            batch=None, seed=0):
    """Features h [n, f] after `steps` steps of Adam, cosine schedule, and the loss of each step.

    start: random, or collapsed, all images within a hundredth of one point. rise: share of the steps in which beta
    rises from 0. noise: of a view, over the parameters' rms. batch: rows a step, all if None.
    """
    lr = lr or (.02 if norm == "tanh" else .05)
    generator = torch.Generator().manual_seed(seed)
    free = torch.randn(n, f, generator=generator)
    if norm == "tanh":
        free /= math.sqrt(n)
    if start == "collapsed":
        free = free[:1] + .01 * free
    free.requires_grad_()
    batch = batch or n
    temperature = falcon.derived_temperature(batch, f, codes)
    optimizer = torch.optim.Adam([free], lr)
    losses = []
    rows = torch.arange(n)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        if batch < n:
            rows = torch.randint(n, (batch,), generator=generator)
        chosen = free[rows]
        size = noise * chosen.detach().square().mean().sqrt()
        views = [features_of(chosen + size * torch.randn(chosen.shape, generator=generator), norm) for _ in range(2)]
        kl, ce = dictionary_loss(*views, codes, seed, temperature, "reverse" if prior == "none" else prior)
        weight = beta * min(1, step / (rise * steps)) if rise else beta
        loss = weight * ce + (0 if prior == "none" else kl)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return features_of(free.detach(), norm), losses


def judged(h, codes, beta=1., prior="reverse", seed=0, mixtures=()):
    """Meters of falcon.py on features h [n, f], their loss at rest beside its optimum, and how far it is from it.

    distance: (loss - optimum) / (collapse - optimum), 0 at the optimum and 1 at representation collapse.
    """
    n, f = h.shape
    temperature = falcon.derived_temperature(n, f, codes)
    kl, ce = dictionary_loss(h, h, codes, seed, temperature, "reverse" if prior == "none" else prior)
    loss = (beta * ce + (0 if prior == "none" else kl)).item()
    values = falcon.loss_values(n, codes, n, beta, prior=prior)
    optimum = list(values.values())[-1]
    worst = math.log(codes) * (2 if prior == "forward" else min(1, beta))
    meters = falcon.collapse_meters(h, dictionary_signs(codes, f, seed), temperature, mixtures)
    return {"loss": loss, "optimum": optimum, "distance": (loss - optimum) / (worst - optimum), **meters}


SIZES = [16, 64, 256, 1024, 4096, 16384, 65536]
STEPS = {4096: 300, 16384: 150, 65536: 100}              # large dictionaries need fewer: each image finds a code


def rows_of_the_table(n, f):
    """name: options of descend()."""
    rows = {}
    for norm in ("l2", "tanh"):
        for codes in SIZES:
            faster = {"lr": .1} if codes >= 16384 and norm == "l2" else {}
            rows[f"{norm}, c = {codes}"] = dict(n=n, codes=codes, f=f, norm=norm, steps=STEPS.get(codes, 3000), **faster)
    for norm in ("l2", "tanh"):
        base = dict(n=n, codes=256, f=f, norm=norm, steps=3000)
        rows[f"{norm}, c = 256, beta 1 from the start"] = {**base, "rise": 0}
        rows[f"{norm}, c = 256, beta 0.7 from the start"] = {**base, "rise": 0, "beta": .7}
        rows[f"{norm}, c = 256, forward prior"] = {**base, "prior": "forward"}
        rows[f"{norm}, c = 256, from a collapsed start"] = {**base, "start": "collapsed"}
        rows[f"{norm}, c = 256, collapsed start, beta 1 at once"] = {**base, "start": "collapsed", "rise": 0}
        rows[f"{norm}, c = 256, without the prior"] = {**base, "prior": "none", "rise": 0}
        rows[f"{norm}, c = 256, without the prior, collapsed"] = {**base, "prior": "none", "rise": 0, "start": "collapsed"}
    return rows


def describe(name, found):
    values = [found["loss"], found["optimum"], found["distance"], found["off_diagonal"], 1 / math.sqrt(found["codes"]),
              found["cosine"]]
    cells = [f"{round(value, 3) + 0:.3f}" for value in values]           # + 0: no -0.000
    cells[3:3] = [f"{found['codes']}", f"{found['dimensions']:.1f}"]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def draw(found, n, f, path):
    """Meters against c, as they should be (grey) and as they are, for both norms."""
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    axes = figure.subplots(1, 5)
    titles = ["loss", "dimensions in use", "off-diagonal, rms", "codes in use", "entropy of 10 Gaussians / f"]
    names = ["loss", "dimensions", "off_diagonal", "codes", "mixture_entropy_10"]
    labels = {"dimensions": "all there are", "off_diagonal": "1 / sqrt(codes in use)"}
    used = [min(n, codes) for codes in SIZES]
    expected = [[max(0, math.log(codes / n)) for codes in SIZES], [f] * len(SIZES),
                [count ** -.5 for count in used], used, None]
    for axis, title, name, line in zip(axes, titles, names, expected):
        for norm in ("l2", "tanh"):
            values = [found[f"{norm}, c = {codes}"][name] for codes in SIZES]
            axis.plot(SIZES, values, "o" if norm == "l2" else "x", label=norm)
        if line:
            axis.plot(SIZES, line, color="gray", lw=1, zorder=0, label=labels.get(name, "optimum"))
        axis.set_xscale("log", base=4)
        axis.set_xticks(SIZES, SIZES, rotation=45, fontsize=7)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("codes c")
        if line:
            axis.set_ylim(0, None)
        axis.legend(fontsize=7)
    figure.suptitle(f"{n} free features in {f} dimensions under FALCON's loss", fontsize=10)
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=256, help="n, images")
    parser.add_argument("--features", type=int, default=32, help="f")
    parser.add_argument("--codes", type=int, help="one descent with so many, in place of the table")
    parser.add_argument("--norm", default="l2", choices=["l2", "tanh"])
    parser.add_argument("--batch", type=int, help="rows a step, all if not given")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--out", type=Path, default=Path("runs", "free-features"))
    args = parser.parse_args()
    print("| case | loss | optimum | distance | codes in use | dimensions | off-diagonal | 1 / sqrt(codes in use) | cosine |\n"
          + "|---" * 9 + "|")
    if args.codes:
        rows = {f"{args.norm}, n = {args.rows}, c = {args.codes}": dict(
            n=args.rows, codes=args.codes, f=args.features, norm=args.norm, batch=args.batch, steps=args.steps,
            lr=args.lr)}
    else:
        rows = rows_of_the_table(args.rows, args.features)
    found = {}
    for name, options in rows.items():
        start = time.monotonic()
        h, _ = descend(**options)
        found[name] = judged(h, options["codes"], options.get("beta", 1.), options.get("prior", "reverse"),
                             mixtures=() if args.codes else (10,))
        describe(name, found[name])
    if args.codes:
        print(f"{time.monotonic() - start:.0f} s")
    else:
        args.out.mkdir(parents=True, exist_ok=True)
        draw(found, args.rows, args.features, args.out / "free_features.png")


if __name__ == "__main__":
    main()
