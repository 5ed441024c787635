"""Time and peak memory of kernels/ against the textbook and against a peer's form of the same loss.

    python -m kernels.benchmark                        # all three, some 8 minutes on 2 CPU cores; on a GPU seconds
    python -m kernels.benchmark --covariance 256x8192 --bank --dictionary --repeats 9 --pictures .
    python -m kernels.benchmark --covariance --bank 256x200000x128 --dictionary

Each row is forward + backward in fp32: of variance + covariance at one size [N, D], of one loss of a batch [B, d]
against a bank [N, d], or of FALCON's loss of two views [n, f] and c codes. Implementations take turns, so that a drift
of the machine's speed meets all of them alike;
medians are printed. Memory is the peak of what was allocated on top of the input, gradients included. The floor is the
larger of operations / measured matmul rate and bytes / measured copy rate, both measured in the same run. An
implementation that disagrees with float64 is not timed: the run stops with exit code 2.
"""
import argparse
import math
import statistics
import sys
import time
from collections import namedtuple
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from .covariance import triton, variance_covariance, variance_covariance_reference
from .dictionary import dictionary_loss, dictionary_reference, dictionary_signs
from .similarity import bank_cross_entropy, bank_logsumexp, bank_repulsion, bank_topk

COVARIANCE = [(64, 2048), (64, 8192), (256, 2048), (256, 8192), (2048, 2048), (4096, 512)]
BANK = [(64, 50_000, 128), (256, 200_000, 128)]
DICTIONARY = [(64, 512, 128), (64, 16_384, 256), (64, 16_384, 2048), (64, 262_144, 256)]
TEMPERATURE = .1

# forms {implementation: inputs -> loss}; the first form is the specification, the one named peer what the others are
# compared with. trained: which of the inputs get a gradient. operations, bytes: the least that has to be done.
Case = namedtuple("Case", "label inputs trained forms peer operations bytes")


# ---- The peers' forms --------------------------------------------------------------------------------------
def facebookresearch_form(z):
    """variance, covariance with the operations of facebookresearch/vicreg, main_vicreg.py at 4e12602."""
    n, d = z.shape
    z = z - z.mean(dim=0)
    variance = torch.relu(1 - torch.sqrt(z.var(dim=0) + 0.0001)).mean()
    c = z.T @ z / (n - 1)
    off_diagonal = c.flatten()[:-1].view(d - 1, d + 1)[:, 1:].flatten() if d > 1 else c[:0]
    return variance, off_diagonal.pow_(2).sum() / d


def moco_form(q, key, queue):
    """InfoNCE with the operations of facebookresearch/moco, moco/builder.py: q, key [B, d]; queue [N, d]."""
    positive = torch.einsum("nc,nc->n", q, key)[:, None]
    negative = torch.einsum("nc,ck->nk", q, queue.T.clone().detach())                      # clones the queue each step
    logits = torch.cat([positive, negative], dim=1) / TEMPERATURE                          # [B, 1 + N]
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))


def moco_streamed(q, key, queue, impl):
    positive = (q * key).sum(dim=1) / TEMPERATURE
    return (torch.logaddexp(positive, bank_logsumexp(q, queue, TEMPERATURE, impl=impl)) - positive).mean()


def all_pairs_form(bank):
    """Mean squared positive cosine of different rows, N x N in memory."""
    s = (bank @ bank.T).clamp(min=0)
    return (s - torch.diag(torch.diagonal(s))).square().sum() / (len(bank) * (len(bank) - 1))


def cplearn_form(h1, h2, W, temperature):
    """FALCON's loss with the operations of emsansone/CPLearn, solo/losses/cplearn.py at 6e0bd3b; W [c, f]."""
    logits = [h @ W.T / temperature for h in (h1, h2)]
    logits = [z - z.max(dim=1, keepdim=True)[0] for z in logits]
    halves = []
    for a, b in (logits, logits[::-1]):
        prior = (a.softmax(1) * torch.log(len(W) * a.softmax(1).mean(0, keepdim=True))).sum(1).mean()
        halves.append(prior - (a.softmax(1) * b - a.softmax(1) * b.logsumexp(1, keepdim=True)).sum(1).mean())
    return sum(halves) / 2


# ---- Cases -------------------------------------------------------------------------------------------------
def kernels_here(device):
    return ["torch"] + ["triton"] * (device == "cuda" and triton is not None)


def covariance_case(n, d, device):
    def loss(form, z):
        variance, covariance = form(z)
        return 25 * variance + covariance
    forms = {"textbook": variance_covariance_reference, "facebookresearch": facebookresearch_form,
             **{impl: partial(variance_covariance, impl=impl) for impl in kernels_here(device)}}
    z = torch.randn(n, d, device=device, generator=torch.Generator(device).manual_seed(0))
    return Case(f"{n}, {d}", (z,), (True,), {name: partial(loss, form) for name, form in forms.items()},
                "facebookresearch", 3 * n * d * min(n, d), 16 * n * d)


def bank_cases(b, n, d, device):
    """Cross-entropy with the bank detached and trained, MoCo's loss, the repulsion of N / 10 rows, top-k."""
    generator = torch.Generator(device).manual_seed(0)
    q, key, bank = (F.normalize(torch.randn(rows, d, device=device, generator=generator)) for rows in (b, b, n))
    target = torch.randint(n, (b,), device=device, generator=generator)
    half = bank[:n // 10].clone()
    itself = torch.arange(len(half), device=device)
    impls, size = kernels_here(device), f"{b}, {n}, {d}"
    def textbook(q, bank):
        return F.cross_entropy(q @ bank.T / TEMPERATURE, target)
    def nearest(q, bank):
        return (q @ bank.T).topk(5)[0].sum()
    streamed = {impl: partial(bank_cross_entropy, target=target, temperature=TEMPERATURE, impl=impl) for impl in impls}
    product, rows = 2 * b * n * d, 4 * n * d
    yield Case(f"{size} cross-entropy, bank detached", (q, bank), (True, False), {"textbook": textbook, **streamed},
               "textbook", 2 * product, rows)
    yield Case(f"{size} cross-entropy, bank trained", (q, bank), (True, True), {"textbook": textbook, **streamed},
               "textbook", 3 * product, 3 * rows)
    yield Case(f"{size} MoCo's loss with its queue", (q, key, bank), (True, False, False),
               {"facebookresearch/moco": moco_form, **{impl: partial(moco_streamed, impl=impl) for impl in impls}},
               "facebookresearch/moco", 2 * product, rows)
    yield Case(f"{n // 10}, {d} repulsion, all pairs", (half,), (True,), {"textbook": all_pairs_form, **{
        impl: lambda x, impl=impl: bank_repulsion(x, x, itself, impl=impl) for impl in impls}},
        "textbook", 4 * len(half) ** 2 * d, 8 * len(half) * d)
    topk = {"textbook": nearest, "torch": lambda q, bank: bank_topk(q, bank, 5)[0].sum()}
    yield Case(f"{size} 5 nearest, no gradient", (q, bank), (False, False), topk, "textbook", product, rows)


def dictionary_case(n, c, f, device):
    generator = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, n, f, device=device, generator=generator)
    temperature = 4 * f / (n ** .5 * math.log(1e8))                                        # four times the derived one
    W = dictionary_signs(c, f, 0, device=device)
    def textbook(h1, h2):
        return sum(dictionary_reference(h1, h2, W.to(h1.dtype), temperature))
    forms = {"textbook": textbook, "emsansone/CPLearn": lambda h1, h2: cplearn_form(h1, h2, W, temperature), **{
        impl: lambda h1, h2, impl=impl: sum(dictionary_loss(h1, h2, c, 0, temperature, impl=impl))
        for impl in kernels_here(device)}}
    return Case(f"{n}, {c}, {f}", (a.tanh(), (a + .3 * b).tanh()), (True, True), forms, "emsansone/CPLearn",
                8 * n * c * f, c * f)


# ---- Measuring ---------------------------------------------------------------------------------------------
def step(form, case, inputs=None):
    """Forward and, where an input is trained, backward: the loss and the gradients."""
    inputs = [x.detach().requires_grad_(wanted) for x, wanted in zip(inputs or case.inputs, case.trained)]
    loss = form(*inputs)
    if any(case.trained):
        loss.backward()
    return [loss.detach()] + [x.grad for x, wanted in zip(inputs, case.trained) if wanted]


def seconds(call, device):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(call, device="cpu"):
    """Peak bytes that torch's allocator held during call() on top of what it held before, the result included."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = call()                                  # noqa: F841, freed only after the measurement
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()                     # negative when freed
            peak = max(peak, held)
    return peak


def machine_rates(device):
    """Measured fp32 matmul rate (operations/s, tf32 off) and copy rate (bytes/s, read + write): medians of 5."""
    n = 8192 if device == "cuda" else 2048
    a = torch.randn(n, n, device=device)
    b, c = torch.empty_like(a), torch.randn(2 ** 26, device=device)
    d = torch.empty_like(c)
    def median(call):
        call()
        return statistics.median(seconds(call, device) for _ in range(5))
    return 2 * n ** 3 / median(lambda: torch.mm(a, a, out=b)), 2 * c.nbytes / median(lambda: d.copy_(c))


def check(case):
    """Losses and gradients of every form against float64; also the warm-up."""
    specification = next(iter(case.forms.values()))
    truth = step(specification, case, [x.double() for x in case.inputs])
    def errors(form):
        return [((got.double() - t).norm() / t.norm()).item() for got, t in zip(step(form, case), truth)]
    for name, form in case.forms.items():
        for error, reference in zip(errors(form), errors(specification)):
            if not error <= (1e-3 if name == case.peer else min(max(4 * reference, 1e-6), 1e-3)):
                print(f"{name} disagrees with float64 at {case.label}: error {error:.1e}, the fp32 textbook's is "
                      f"{reference:.1e}; not timed", file=sys.stderr)
                sys.exit(2)


def measure(case, device, repeats):
    """{implementation: (median seconds, peak bytes)}, the implementations in turn."""
    check(case)
    times = {name: [] for name in case.forms}
    for _ in range(repeats):
        for name, form in case.forms.items():
            times[name].append(seconds(lambda: step(form, case), device))
    return {name: (statistics.median(times[name]), peak_memory(lambda: step(form, case), device))
            for name, form in case.forms.items()}


# ---- Output ------------------------------------------------------------------------------------------------
def draw(rows, path, where):
    """Bars of time and memory for (case, result, floor) rows."""
    figure = Figure(figsize=(10, 1.6 + .42 * len(rows)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(name for _, result, _ in rows for name in result))
    panels = (axes[0], 0, 1e3, "forward + backward, ms"), (axes[1], 1, 2 ** -20, "extra memory, MiB")
    for axis, k, scale, label in panels:
        for i, name in enumerate(names):
            here = [r for r, (_, result, _) in enumerate(rows) if name in result]
            y = [r + (i - (len(names) - 1) / 2) * .8 / len(names) for r in here]
            axis.barh(y, [rows[r][1][name][k] * scale for r in here], .8 / len(names), label=name)
        axis.set(xscale="log", xlabel=label)
    axes[0].set(yticks=range(len(rows)), yticklabels=[case.label for case, *_ in rows])
    axes[0].invert_yaxis()
    for r, (*_, least) in enumerate(rows):
        axes[0].vlines(least * 1e3, r - .4, r + .4, color="black", label=None if r else "floor")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.suptitle(f"{path.stem}, {where}", fontsize=10)
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


def size(text, axes):
    """256x8192 -> (256, 8192)"""
    numbers = tuple(map(int, text.split("x")))
    if len(numbers) != axes or min(numbers) < 2 or (axes == 3 and numbers[1] < 100):
        raise ValueError
    return numbers


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--covariance", nargs="*", metavar="NxD", type=partial(size, axes=2), default=COVARIANCE,
                        help="sizes for the variance + covariance loss; nothing after it: none")
    parser.add_argument("--bank", nargs="*", metavar="BxNxd", type=partial(size, axes=3), default=BANK,
                        help="sizes for the memory-bank similarity, N at least 100; nothing after it: none")
    parser.add_argument("--dictionary", nargs="*", metavar="nxcxf", type=partial(size, axes=3), default=DICTIONARY,
                        help="sizes for FALCON's loss, c at least 100; nothing after it: none")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each; the median counts (default 5)")
    parser.add_argument("--pictures", type=Path, help="folder for covariance.png, ...; not given: no pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    if args.repeats < 1 or (args.pictures and not args.pictures.is_dir()):
        parser.error("--repeats must be at least 1, and the folder of --pictures must exist")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device here")
    operations_rate, bytes_rate = machine_rates(args.device)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    where = f"{name}, torch {torch.__version__}"
    print(f"{where}: {operations_rate / 1e9:.0f} GFLOP/s fp32 matmul, {bytes_rate / 1e9:.1f} GB/s copy")
    print(f"{'':44} {'implementation':<22}"
          f"{'ms':>9}{'faster':>9}{'floor':>8}{'MiB':>9}{'less':>8}{'x input':>9}")
    for kernel, cases in (("covariance", (covariance_case(*shape, args.device) for shape in args.covariance)),
                          ("bank", (case for shape in args.bank for case in bank_cases(*shape, args.device))),
                          ("dictionary", (dictionary_case(*shape, args.device) for shape in args.dictionary))):
        rows = []
        for case in cases:
            result = measure(case, args.device, args.repeats)
            least = max(case.operations / operations_rate, case.bytes / bytes_rate)
            rows.append((case._replace(inputs=None, forms=None), result, least))
            peer_time, peer_memory = result[case.peer]
            entered = sum(x.nbytes for x in case.inputs)
            for name, (t, m) in result.items():
                print(f"{case.label:>44} {name:<22}{t * 1e3:9.2f}{peer_time / t:8.2f}x{t / least:7.1f}x"
                      f"{m / 2 ** 20:9.1f}{peer_memory / max(m, 1):7.1f}x{m / entered:8.2f}x", flush=True)
        if args.pictures and rows:
            draw(rows, args.pictures / f"{kernel}.png", where)
    print("faster, less: against the peer's form in this run, else the textbook's; floor: time over the floor")


if __name__ == "__main__":
    main()
