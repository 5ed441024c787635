"""Time and peak memory of kernels/ against the textbook and against a peer's form of the same loss.

    python -m kernels.benchmark                        # all three kernels
    python -m kernels.benchmark --only covariance --covariance 256x8192 --repeats 9 --pictures .
    python -m kernels.benchmark --report tables.md     # tables as of kernels/README.md

Each row is forward + backward in fp32: of variance + covariance at one size [N, D], of one loss of a batch
[B, d] against a bank [N, d], or of FALCON's loss of two views [n, f] and c codes. Implementations take turns,
for three seconds at least, so that a drift of the machine's speed meets all of them alike; medians are
printed. Memory is the peak of what was allocated on top of the input, gradients included. The floor is the
larger of operations / measured matmul rate and bytes / measured copy rate, both measured in the same run. An
implementation that disagrees with float64 is not timed: the run stops with exit code 2. Memory that is freed
stays with the process (glibc): whether it does by itself differs between processes, and getting it back takes
a case of 2 ms another 8.
"""
import argparse
import ctypes
import math
import os
import platform
import statistics
import sys
import time
from collections import namedtuple
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from .launch import triton
from .covariance import variance_covariance, variance_covariance_reference
from .dictionary import dictionary_loss, dictionary_reference, dictionary_signs
from .bank import bank_cross_entropy, bank_logsumexp, bank_repulsion, bank_topk

SIZES = {
    "covariance": [(64, 2048), (64, 8192), (256, 2048), (256, 8192), (2048, 2048), (4096, 512)],
    "bank": [(64, 50_000, 128), (256, 200_000, 128)],
    "dictionary": [(64, 512, 128), (64, 16_384, 256), (64, 16_384, 2048), (64, 262_144, 256)],
}
TEMPERATURE = .1

# forms {implementation: inputs -> loss}; the first form is the specification, the one named peer what the
# others are compared with. trained: which of the inputs get a gradient. operations, bytes: the least that has
# to be done.
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
    negative = torch.einsum("nc,ck->nk", q, queue.T.clone().detach())  # clones the queue each step
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
        p = a.softmax(1)
        mean = a.softmax(1).mean(0, keepdim=True)
        prior = (p * torch.log(len(W) * mean)).sum(1).mean()
        cross = a.softmax(1) * b - a.softmax(1) * b.logsumexp(1, keepdim=True)
        halves.append(prior - cross.sum(1).mean())
    return sum(halves) / 2


# ---- Cases -------------------------------------------------------------------------------------------------
def kernels_here(device):
    if device == "cuda" and triton is not None:
        return ["torch", "triton"]
    return ["torch"]


def covariance_case(n, d, device, impls):
    def weighted(form):
        def loss(z):
            variance, covariance = form(z)
            return 25 * variance + covariance
        return loss
    forms = {"textbook": weighted(variance_covariance_reference),
             "facebookresearch": weighted(facebookresearch_form)}
    for impl in impls:
        forms[impl] = weighted(partial(variance_covariance, impl=impl))
    generator = torch.Generator(device).manual_seed(0)
    z = torch.randn(n, d, device=device, generator=generator)
    operations = 3 * n * d * min(n, d)
    return Case(f"{n}, {d}", (z,), (True,), forms, "facebookresearch", operations, 16 * n * d)


def bank_cases(b, n, d, device, impls):
    """Cross-entropy with the bank detached and trained, MoCo's loss, the repulsion of N / 10 rows, top-k."""
    generator = torch.Generator(device).manual_seed(0)
    def unit(rows):
        return F.normalize(torch.randn(rows, d, device=device, generator=generator))
    q, key, bank = unit(b), unit(b), unit(n)
    target = torch.randint(n, (b,), device=device, generator=generator)
    half = bank[:n // 10].clone()
    size = f"{b}, {n}, {d}"
    product = 2 * b * n * d
    rows = 4 * n * d

    def textbook(q, bank):
        return F.cross_entropy(q @ bank.T / TEMPERATURE, target)

    def nearest(q, bank):
        return (q @ bank.T).topk(5)[0].sum()

    def nearest_streamed(q, bank):
        return bank_topk(q, bank, 5)[0].sum()

    def repulsion(x, impl):
        return bank_repulsion(x, x, "self", impl=impl)

    entropy = {"textbook": textbook}
    moco = {"facebookresearch/moco": moco_form}
    pairs = {"textbook": all_pairs_form}
    for impl in impls:
        entropy[impl] = partial(bank_cross_entropy, target=target, temperature=TEMPERATURE, impl=impl)
        moco[impl] = partial(moco_streamed, impl=impl)
        pairs[impl] = partial(repulsion, impl=impl)
    yield Case(f"{size} cross-entropy, bank detached", (q, bank), (True, False), entropy, "textbook",
               2 * product, rows)
    yield Case(f"{size} cross-entropy, bank trained", (q, bank), (True, True), entropy, "textbook",
               3 * product, 3 * rows)
    yield Case(f"{size} MoCo's loss with its queue", (q, key, bank), (True, False, False), moco,
               "facebookresearch/moco", 2 * product, rows)
    yield Case(f"{n // 10}, {d} repulsion, all pairs", (half,), (True,), pairs, "textbook",
               4 * len(half) ** 2 * d, 8 * len(half) * d)
    topk = {"textbook": nearest, "torch": nearest_streamed}
    yield Case(f"{size} 5 nearest, no gradient", (q, bank), (False, False), topk, "textbook", product, rows)


def dictionary_case(n, c, f, device, impls):
    generator = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, n, f, device=device, generator=generator)
    temperature = 4 * f / (n ** .5 * math.log(1e8))    # four times the derived one
    W = dictionary_signs(c, f, 0, device=device)

    def textbook(h1, h2):
        return sum(dictionary_reference(h1, h2, W.to(h1.dtype), temperature))

    def released(h1, h2):
        return cplearn_form(h1, h2, W, temperature)

    def streamed(h1, h2, impl):
        return sum(dictionary_loss(h1, h2, c, 0, temperature, impl=impl))

    forms = {"textbook": textbook, "emsansone/CPLearn": released}
    for impl in impls:
        forms[impl] = partial(streamed, impl=impl)
    views = a.tanh(), (a + .3 * b).tanh()
    return Case(f"{n}, {c}, {f}", views, (True, True), forms, "emsansone/CPLearn", 8 * n * c * f, c * f)


def cases_of(kernel, sizes, device):
    impls = kernels_here(device)
    for size in sizes:
        if kernel == "covariance":
            yield covariance_case(*size, device, impls)
        elif kernel == "bank":
            yield from bank_cases(*size, device, impls)
        else:
            yield dictionary_case(*size, device, impls)


# ---- Measuring ---------------------------------------------------------------------------------------------
def step(form, case, inputs=None):
    """Forward and, where an input is trained, backward: the loss and the gradients."""
    inputs = inputs or case.inputs
    inputs = [x.detach().requires_grad_(wanted) for x, wanted in zip(inputs, case.trained)]
    loss = form(*inputs)
    if any(case.trained):
        loss.backward()
    return [loss.detach()] + [x.grad for x, wanted in zip(inputs, case.trained) if wanted]


def seconds(call, device):
    """Of one call; on a GPU between two of its own events, gaps between its kernels included."""
    if device == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3          # from milliseconds
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@contextmanager
def quiet_stderr():
    """The profiler writes lines of its own, past Python, into any table."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def peak_memory(call, device="cpu"):
    """Peak bytes that torch's allocator held during call() on top of what it held before, the result
    included."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with quiet_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = call()                                  # noqa: F841, freed only after the measurement
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()                     # negative when freed
            peak = max(peak, held)
    return peak


def machine_rates(device):
    """Measured fp32 matmul rate (operations/s, tf32 off) and copy rate (bytes/s, read + write): medians of
    5."""
    n = 8192 if device == "cuda" else 2048
    a = torch.randn(n, n, device=device)
    b, c = torch.empty_like(a), torch.randn(2 ** 26, device=device)
    d = torch.empty_like(c)
    def median(call):
        call()
        return statistics.median(seconds(call, device) for _ in range(5))
    return 2 * n ** 3 / median(lambda: torch.mm(a, a, out=b)), 2 * c.nbytes / median(lambda: d.copy_(c))


def errors(form, case, truth):
    """Relative error of the loss and of each gradient."""
    found = []
    for got, true in zip(step(form, case), truth):
        found.append(((got.double() - true).norm() / true.norm()).item())
    return found


def check(case):
    """Losses and gradients of every form against float64: (name, what is wrong) of those that differ. Also
    the warm-up."""
    specification = next(iter(case.forms.values()))
    truth = step(specification, case, [x.double() for x in case.inputs])
    references = errors(specification, case, truth)
    for name, form in case.forms.items():
        for error, reference in zip(errors(form, case, truth), references):
            bar = 1e-3 if name == case.peer else min(max(4 * reference, 1e-6), 1e-3)
            if not error <= bar:
                yield name, (f"{name} disagrees with float64 at {case.label}: error {error:.1e}, the fp32 "
                             f"textbook's is {reference:.1e}; not timed")


def measure(case, device, repeats, least=0.):
    """{implementation: (median seconds, peak bytes)}, the implementations in turn, for `least` seconds or
    more."""
    times = {name: [] for name in case.forms}
    start, turns = time.perf_counter(), 0
    while turns < repeats or time.perf_counter() - start < least:
        turns += 1
        for name, form in case.forms.items():
            times[name].append(seconds(partial(step, form, case), device))
    result = {}
    for name, form in case.forms.items():
        memory = peak_memory(partial(step, form, case), device)
        result[name] = statistics.median(times[name]), memory
    return result


# ---- Output ------------------------------------------------------------------------------------------------
LABELS = {"textbook": ("textbook", "0.6"), "torch": ("here, torch", "C1"), "triton": ("here, Triton", "C3")}


def draw(rows, path, where):
    """Bars of time and memory for (case, result, floor) rows."""
    figure = Figure(figsize=(10, 1.6 + .42 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(name for _, result, _ in rows for name in result))
    height = .8 / len(names)
    panels = (left, 0, 1e3, "forward + backward, ms"), (right, 1, 2 ** -20, "memory, MiB")
    for axis, k, scale, label in panels:
        for i, name in enumerate(names):
            form, colour = LABELS.get(name, (f"released: {name}", "C0"))
            here = [r for r, (_, result, _) in enumerate(rows) if name in result]
            y = [r + (i - (len(names) - 1) / 2) * height for r in here]
            axis.barh(y, [rows[r][1][name][k] * scale for r in here], height, label=form, color=colour)
        axis.set(xscale="log", xlabel=label)
    left.set(yticks=range(len(rows)), yticklabels=[case.label for case, *_ in rows])
    sizes = {"covariance": "N, D", "bank": "B, N, d; repulsion: N, d", "dictionary": "n, c, f"}
    left.set_ylabel(sizes[path.stem])
    left.invert_yaxis()
    for r, (*_, least) in enumerate(rows):
        left.vlines(least * 1e3, r - .4, r + .4, color="black", label=None if r else "floor")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.suptitle(f"{path.stem}, {where}", fontsize=10)
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


def show(case, result, least):
    """One line for each implementation."""
    peer_time, peer_memory = result[case.peer]
    entered = sum(x.nbytes for x in case.inputs)
    for name, (time_, memory) in result.items():
        times = f"{time_ * 1e3:9.2f}{peer_time / time_:8.2f}x{time_ / least:7.1f}x"
        bytes_ = f"{memory / 2 ** 20:9.1f}{peer_memory / max(memory, 1):7.1f}x{memory / entered:8.2f}x"
        print(f"{case.label:>44} {name:<22}{times}{bytes_}", flush=True)


def report(tables, where):
    """The tables of kernels/README.md, of time and of memory: {kernel: (case, result, floor) rows}, a row for
    each of our forms."""
    lines = [f"Measured on {where}."]
    for kernel, rows in tables.items():
        lines += ["", f"**kernels/{kernel}.py**"]
        for k, title, scale, unit, ratio, digits in ((0, "time", 1e3, " ms", "faster", 2),
                                                     (1, "MiB", 2 ** -20, "", "less", 1)):
            lines += ["", f"| case, {title} | textbook | released form | here "
                          f"| {ratio} than textbook | than released |", "|---" * 6 + "|"]
            for case, result, _ in rows:
                others = [result.get("textbook"), None if case.peer == "textbook" else result[case.peer]]
                for name in sorted({"torch", "triton"} & result.keys()):
                    own = result[name]
                    cells = [case.label + (f", {name}" if name != "torch" else "")]
                    cells += [f"{form[k] * scale:.1f}{unit}" if form else "" for form in (*others, own)]
                    cells += [f"{form[k] / (own[k] or 1):.{digits}f}x" if form else "" for form in others]
                    lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def size(text, axes):
    """256x8192 -> (256, 8192)"""
    numbers = tuple(map(int, text.split("x")))
    if len(numbers) != axes or min(numbers) < 2 or (axes == 3 and numbers[1] < 100):
        raise ValueError
    return numbers


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", choices=SIZES, default=list(SIZES), metavar="KERNEL",
                        help="covariance, bank, dictionary: which to measure; not given: all")
    parser.add_argument("--covariance", nargs="+", metavar="NxD", type=partial(size, axes=2))
    parser.add_argument("--bank", nargs="+", metavar="BxNxd", type=partial(size, axes=3),
                        help="N at least 100")
    parser.add_argument("--dictionary", nargs="+", metavar="nxcxf", type=partial(size, axes=3),
                        help="c at least 100")
    parser.add_argument("--repeats", type=int, default=5,
                        help="timed runs at least, more of short cases; the median counts (default 5)")
    parser.add_argument("--pictures", type=Path, help="folder for covariance.png, ...; not given: none")
    parser.add_argument("--report", type=Path, help="file for tables in Markdown; not given: none")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=here, choices=["cpu", "cuda"])
    args = parser.parse_args()
    if args.repeats < 1 or (args.pictures and not args.pictures.is_dir()):
        parser.error("--repeats must be at least 1, and the folder of --pictures must exist")
    if args.report and not args.report.absolute().parent.is_dir():
        parser.error("the folder of --report's file must exist")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device here")
    return args


def keep_freed_memory():
    """Blocks of up to 32 MiB, the most that glibc allows, come from a heap that is not given back."""
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3                          # of malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 2 ** 25)
        libc.mallopt(trim_threshold, 2 ** 31 - 1)


def main():
    args = parse()
    keep_freed_memory()
    operations_rate, bytes_rate = machine_rates(args.device)
    name = f"CPU, {torch.get_num_threads()} threads"
    if args.device == "cuda":
        name = torch.cuda.get_device_name()
    where = f"{name}, torch {torch.__version__}"
    print(f"{where}: {operations_rate / 1e9:.0f} GFLOP/s fp32 matmul, {bytes_rate / 1e9:.1f} GB/s copy")
    columns = f"{'ms':>9}{'faster':>9}{'floor':>8}{'MiB':>9}{'less':>8}{'x input':>9}"
    print(f"{'':44} {'implementation':<22}{columns}")
    tables = {}
    for kernel in args.only:
        rows = tables[kernel] = []
        for case in cases_of(kernel, getattr(args, kernel) or SIZES[kernel], args.device):
            wrong = dict(check(case))
            if wrong:
                print(*wrong.values(), sep="\n", file=sys.stderr)
                sys.exit(2)
            result = measure(case, args.device, args.repeats, least=3)
            least = max(case.operations / operations_rate, case.bytes / bytes_rate)
            show(case, result, least)
            rows.append((case._replace(inputs=None, forms=None), result, least))
        if args.pictures:
            draw(rows, args.pictures / f"{kernel}.png", where)
    if args.report:
        args.report.write_text(report(tables, where))
    print("faster, less: against the peer's form in this run; floor: time over the floor")


if __name__ == "__main__":
    main()
