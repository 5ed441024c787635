"""Time and peak memory of kernels/ against the best simple form of the same loss, and against a peer's.

    python -m kernels.benchmark                        # all three kernels, k-NN, TwoNN and uniformity
    python -m kernels.benchmark --only covariance --covariance 256x8192 --repeats 9 --pictures .
    python -m kernels.benchmark --report tables.md     # tables as of kernels/README.md

Each row is forward + backward in fp32: of variance + covariance at one size [N, D], of one loss of a batch
[B, d] against a bank [N, d], or of FALCON's loss of two views [n, f] and c codes; or a probe or a number of
the panel on [N, d]. A kernel is worth its lines where it is ahead of what a good engineer writes in five: the
textbook, torch.compile of it, the Gram identity, chunks under checkpointing, torch's own flash attention,
faiss, scikit-learn (where they are installed). Implementations take turns, for three seconds at least, so
that a drift of the machine's speed meets all of them alike; medians are printed. Memory is the peak of what
torch allocated on top of the input, gradients included (what faiss and scikit-learn allocate is not counted).
The floor is the larger of operations / measured matmul rate and bytes / measured copy rate, both measured in
the same run. An implementation that disagrees with float64 is not timed: the run stops with exit code 2.
Memory that is freed stays with the process (glibc): whether it does by itself differs between processes, and
getting it back takes a case of 2 ms another 8.
"""
import argparse
import ctypes
import importlib.util
import math
import os
import platform
import statistics
import sys
import time
import warnings
from collections import namedtuple
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.utils.checkpoint import checkpoint

from .launch import triton
from .collapse import _nearest, _Rows, _twonn, _uniformity, knn_accuracy
from .covariance import variance_covariance, variance_covariance_reference
from .dictionary import dictionary_loss, dictionary_reference, dictionary_signs
from .bank import bank_cross_entropy, bank_logsumexp, bank_repulsion, bank_topk

SIZES = {
    "covariance": [(64, 2048), (64, 8192), (256, 2048), (256, 8192), (2048, 2048), (4096, 512)],
    "bank": [(64, 50_000, 128), (256, 200_000, 128)],
    "dictionary": [(64, 512, 128), (64, 16_384, 256), (64, 16_384, 2048), (64, 262_144, 256)],
    "features": [(10_000, 128), (50_000, 128)],
}
TEMPERATURE = .1

# forms {implementation: inputs -> loss}; the first form is the specification, the one named peer is a
# released one (or the textbook, where there is none). trained: which of the inputs get a gradient.
# operations, bytes: the least that has to be done.
Case = namedtuple("Case", "label inputs trained forms peer operations bytes")


# ---- Simple forms -----------------------------------------------------------------------------------------
def gram_form(z):
    """variance, covariance by the Gram identity: |Z^T Z|^2 = |Z Z^T|^2, less the diagonal's part."""
    n, d = z.shape
    z = z - z.mean(dim=0)
    variances = z.square().sum(dim=0) / (n - 1)
    off_diagonal = (z @ z.T).square().sum() / (n - 1) ** 2 - variances.square().sum()
    return torch.relu(1 - torch.sqrt(variances + 0.0001)).mean(), off_diagonal / d


def chunked_logsumexp(q, bank, rows=8192):
    """Of q's logits [B, N], so many rows of the bank at a time, made again in the backward."""
    def part(q, some):
        return (q @ some.T / TEMPERATURE).logsumexp(1)
    parts = [checkpoint(part, q, some, use_reentrant=False) for some in bank.split(rows)]
    return torch.stack(parts).logsumexp(0)


class Flash(torch.autograd.Function):
    """logsumexp of q's logits by torch's own flash attention, a private operator: keys and values are the
    bank, so what it puts out is the gradient, and the log-sum-exp comes beside."""

    @staticmethod
    def forward(ctx, q, bank):
        keys = bank[None, None]
        mean, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[None, None], keys, keys, scale=1 / TEMPERATURE)
        ctx.save_for_backward(mean[0, 0])
        return sums.view(-1)

    @staticmethod
    def backward(ctx, upstream):
        mean, = ctx.saved_tensors
        return upstream[:, None] / TEMPERATURE * mean, None


def chunked_repulsion(x, rows=2048):
    """Mean squared positive cosine of different rows, so many rows at a time, made again in the backward."""
    def part(some, x):
        return (some @ x.T).clamp(min=0).square().sum()
    parts = [checkpoint(part, some, x, use_reentrant=False) for some in x.split(rows)]
    total = sum(parts)
    of_itself = x.square().sum(1).square().sum()
    return (total - of_itself) / (len(x) * (len(x) - 1))


def faiss_search(bank, q, k):
    """Cosines [M, k] to the nearest rows of the bank, and their places."""
    import faiss
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank.numpy())
    cosines, places = index.search(q.numpy(), k)
    return torch.from_numpy(cosines), torch.from_numpy(places)


def vote(cosines, places, y, y_test, temperature=0.07):
    """Accuracy [] of the weighted vote of the nearest."""
    votes = cosines.new_zeros(len(y_test), int(y.max()) + 1)
    votes.scatter_add_(1, y[places], (cosines / temperature).exp())
    return (votes.argmax(1) == y_test).double().mean()


def plain_knn(h, h_test, y, y_test, k=5, rows=1000):
    found = [(some @ F.normalize(h).T).topk(k) for some in F.normalize(h_test).split(rows)]
    return vote(*map(torch.cat, zip(*found)), y, y_test)


def faiss_knn(h, h_test, y, y_test, k=5):
    return vote(*faiss_search(F.normalize(h), F.normalize(h_test), k), y, y_test)


def plain_uniformity(z):
    """log mean exp(-2 d^2) of different rows' unit vectors, by all distances."""
    return torch.pdist(F.normalize(z)).square().mul(-2).exp().mean().log()


def twonn_of(distances):
    """Intrinsic dimension [] by maximum likelihood of the two nearest distances [N, 2], Facco et al. 2017."""
    return (len(distances) - 1) / (distances[:, 1] / distances[:, 0]).log().sum()


def plain_twonn(z, rows=1000):
    nearest = [torch.cdist(some, z).topk(3, largest=False)[0] for some in z.split(rows)]
    return twonn_of(torch.cat(nearest)[:, 1:].double())


def scikit_twonn(z):
    from sklearn.neighbors import NearestNeighbors
    search = NearestNeighbors(n_neighbors=3, n_jobs=torch.get_num_threads()).fit(z.numpy())
    return twonn_of(torch.from_numpy(search.kneighbors()[0])[:, :2].double())


def installed(package):
    return importlib.util.find_spec(package) is not None


# ---- The peers' forms --------------------------------------------------------------------------------------
def facebookresearch_form(z):
    """variance, covariance with the operations of facebookresearch/vicreg, main_vicreg.py at 4e12602."""
    n, d = z.shape
    z = z - z.mean(dim=0)
    variance = torch.relu(1 - torch.sqrt(z.var(dim=0) + 0.0001)).mean()
    c = z.T @ z / (n - 1)
    off_diagonal = c[:0]
    if d > 1:
        off_diagonal = c.flatten()[:-1].view(d - 1, d + 1)[:, 1:].flatten()
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
    others = s - torch.diag(torch.diagonal(s))
    return others.square().sum() / (len(bank) * (len(bank) - 1))


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
    forms = {"textbook": weighted(variance_covariance_reference), "Gram": weighted(gram_form),
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

    def simple(logsumexp):
        def loss(q, bank):
            return (logsumexp(q, bank) - (q * bank[target]).sum(1) / TEMPERATURE).mean()
        return loss

    def nearest(q, bank):
        return (q @ bank.T).topk(5)[0].sum()

    def nearest_streamed(q, bank):
        return bank_topk(q, bank, 5)[0].sum()

    def repulsion(x, impl):
        return bank_repulsion(x, x, "self", impl=impl)

    entropy = {"textbook": textbook, "chunks": simple(chunked_logsumexp)}
    moco = {"facebookresearch/moco": moco_form}
    pairs = {"textbook": all_pairs_form, "chunks": chunked_repulsion}
    flash = {"flash": simple(Flash.apply)} if device == "cpu" else {}
    for impl in impls:
        entropy[impl] = partial(bank_cross_entropy, target=target, temperature=TEMPERATURE, impl=impl)
        moco[impl] = partial(moco_streamed, impl=impl)
        pairs[impl] = partial(repulsion, impl=impl)
    yield Case(f"{size} cross-entropy, bank detached", (q, bank), (True, False), entropy | flash, "textbook",
               2 * product, rows)
    yield Case(f"{size} cross-entropy, bank trained", (q, bank), (True, True), entropy, "textbook",
               3 * product, 3 * rows)
    yield Case(f"{size} MoCo's loss with its queue", (q, key, bank), (True, False, False), moco,
               "facebookresearch/moco", 2 * product, rows)
    yield Case(f"{n // 10}, {d} repulsion, all pairs", (half,), (True,), pairs, "textbook",
               4 * len(half) ** 2 * d, 8 * len(half) * d)
    topk = {"textbook": nearest, "torch": nearest_streamed}
    if installed("faiss") and device == "cpu":
        topk["faiss"] = lambda q, bank: faiss_search(bank, q, 5)[0].sum()
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


def feature_cases(n, d, device):
    """k-NN accuracy of 10,000 features beside N others, and up to 10,000 the panel's numbers of all pairs."""
    generator = torch.Generator().manual_seed(0)
    y, y_test = torch.randint(10, (n + 10_000,), generator=generator).split([n, 10_000])
    centres = torch.randn(10, d, generator=generator)
    h, h_test = (
        (centres[labels] + 2 * torch.randn(len(labels), d, generator=generator)).to(device)
        for labels in (y, y_test))
    y, y_test = y.to(device), y_test.to(device)

    def ours(h, h_test):
        return torch.tensor(knn_accuracy(h, y, h_test, y_test), dtype=torch.float64)

    knn = {"textbook": partial(plain_knn, y=y, y_test=y_test), "torch": ours}
    on_cpu = torch.device(device).type == "cpu"                      # others' forms are
    if on_cpu and installed("faiss"):
        knn["faiss"] = partial(faiss_knn, y=y, y_test=y_test)
    yield Case(f"{n}, {d} k-NN of 10,000", (h, h_test), (False, False), knn, "textbook", 2 * 10_000 * n * d,
               4 * (n + 10_000) * d)
    if n <= 10_000:
        twonn = {"textbook": plain_twonn, "torch": lambda z: _twonn(_nearest(_Rows(z))[0], z.var(0))}
        if on_cpu and installed("sklearn"):
            twonn["scikit-learn"] = scikit_twonn
        yield Case(f"{n}, {d} TwoNN", (h,), (False,), twonn, "textbook", 2 * n * n * d, 4 * n * d)
        uniformity = {"textbook": plain_uniformity, "torch": lambda z: _uniformity(_Rows(z))}
        yield Case(f"{n}, {d} uniformity", (h,), (False,), uniformity, "textbook", n * n * d, 4 * n * d)


def with_compiled(case):
    """The case with torch.compile of its simple forms, where there is something to differentiate."""
    torch.compiler.reset()
    forms = {}
    for name, form in case.forms.items():
        forms[name] = form
        if any(case.trained) and name in ("textbook", "Gram", "facebookresearch/moco"):
            title = "compiled" if name == next(iter(case.forms)) else f"{name} compiled"
            forms[title] = torch.compile(form, dynamic=False)
    return case._replace(forms=forms)


def cases_of(kernel, sizes, device):
    impls = kernels_here(device)
    for size in sizes:
        if kernel == "features":
            yield from feature_cases(*size, device)
        elif kernel == "covariance":
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
    product = median(lambda: torch.mm(a, a, out=b))
    copy = median(lambda: d.copy_(c))
    return 2 * n ** 3 / product, 2 * c.nbytes / copy


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
            bar = 1e-3 if name not in OURS else min(max(4 * reference, 1e-6), 1e-3)
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
        memory = 0 if name in UNCOUNTED else peak_memory(partial(step, form, case), device)
        result[name] = statistics.median(times[name]), memory
    return result


OURS = "torch", "triton"
UNCOUNTED = "faiss", "scikit-learn"                    # they do not allocate by torch


def simple_forms(result):
    """What is neither ours nor a released form: names of those in a result."""
    return [name for name in result if name not in OURS and "/" not in name and name != "facebookresearch"]


# ---- Output ------------------------------------------------------------------------------------------------
LABELS = {"textbook": ("textbook", "0.75"), "compiled": ("textbook, compiled", "0.5"), "Gram": ("Gram", "C4"),
          "Gram compiled": ("Gram, compiled", "C6"), "chunks": ("chunks, checkpointed", "C8"),
          "flash": ("flash attention", "C9"), "faiss": ("faiss", "C2"),
          "scikit-learn": ("scikit-learn", "C5"),
          "torch": ("here, torch", "C1"), "triton": ("here, Triton", "C3")}


def draw(rows, path, where):
    """Bars of time and memory for (case, result, floor) rows."""
    names = list(dict.fromkeys(name for _, result, _ in rows for name in result))
    figure = Figure(figsize=(10, 1.6 + .14 * len(names) * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
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
    sizes = {"covariance": "N, D", "bank": "B, N, d; repulsion: N, d", "dictionary": "n, c, f",
             "features": "N, d"}
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
        less = peer_memory / memory if memory else math.nan
        bytes_ = f"{memory / 2 ** 20:9.1f}{less:7.1f}x{memory / entered:8.2f}x"
        print(f"{case.label:>44} {name:<22}{times}{bytes_}", flush=True)


def report(tables, where):
    """The tables of kernels/README.md, of time and of memory: {kernel: (case, result, floor) rows}, a row for
    each of our forms; over the best simple: the fastest, or smallest, of what is not released, over ours."""
    lines = [f"Measured on {where}."]
    for kernel, rows in tables.items():
        lines += ["", f"**{kernel}**"]
        simple = list(dict.fromkeys(name for _, result, _ in rows for name in simple_forms(result)))
        released = any(case.peer not in simple for case, *_ in rows)
        for k, title, scale, unit in ((0, "time", 1e3, " ms"), (1, "MiB", 2 ** -20, "")):
            header = [
                f"case, {title}", *simple, *["released form"] * released, "here",
                "over the best simple", *["over released"] * released, *["of the floor"] * (k == 0)]
            lines += ["", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
            for case, result, least in rows:
                others = [result.get(name) for name in simple]
                peer = result[case.peer] if case.peer not in simple else None
                counted = [form[k] for form in others if form and form[k]]
                best = min(counted, default=None)
                for name in sorted({*OURS} & result.keys()):
                    own = result[name]
                    cells = [case.label + (f", {name}" if name != "torch" else "")]
                    shown = [*others, *[peer] * released, own]
                    for form in shown:
                        cells.append(f"{form[k] * scale:.1f}{unit}" if form and form[k] else "")
                    for other in [best, *[peer and peer[k]] * released]:
                        cells.append(f"{other / max(own[k], 1e-9):.2f}x" if other else "")
                    cells += [f"{own[k] / least:.1f}x"] * (k == 0)
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
                        help="covariance, bank, dictionary, features: which to measure; not given: all")
    parser.add_argument("--covariance", nargs="+", metavar="NxD", type=partial(size, axes=2))
    parser.add_argument("--bank", nargs="+", metavar="BxNxd", type=partial(size, axes=3),
                        help="N at least 100")
    parser.add_argument("--dictionary", nargs="+", metavar="nxcxf", type=partial(size, axes=3),
                        help="c at least 100")
    parser.add_argument("--features", nargs="+", metavar="Nxd", type=partial(size, axes=2))
    parser.add_argument("--no-compile", dest="compile", action="store_false",
                        help="without torch.compile of simple forms, which takes a minute a kernel to build")
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
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch._inductor")
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
            if args.compile:
                case = with_compiled(case)
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
