"""Time and peak memory of kernels/ against the textbook and against a peer's form of the same loss.

    python -m kernels.benchmark                        # some 3 minutes on 2 CPU cores; on a GPU seconds
    python -m kernels.benchmark --sizes 256x8192 --repeats 9 --picture covariance.png

Each row is forward + backward of variance + covariance at one size [N, D], fp32. Implementations take turns, so that a
drift of the machine's speed meets all of them alike; medians are printed. Memory is the peak of what was allocated on
top of the input. The floor is the larger of operations / measured matmul rate and bytes / measured copy rate, both
measured in the same run. An implementation that disagrees with float64 is not timed: the run stops with exit code 2.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

from .covariance import triton, variance_covariance, variance_covariance_reference

SIZES = [(64, 2048), (64, 8192), (256, 2048), (256, 8192), (2048, 2048), (4096, 512)]


def facebookresearch_form(z):
    """variance, covariance with the operations of facebookresearch/vicreg, main_vicreg.py at 4e12602 (the peer)."""
    n, d = z.shape
    z = z - z.mean(dim=0)
    variance = torch.relu(1 - torch.sqrt(z.var(dim=0) + 0.0001)).mean()
    c = z.T @ z / (n - 1)
    off_diagonal = c.flatten()[:-1].view(d - 1, d + 1)[:, 1:].flatten() if d > 1 else c[:0]
    return variance, off_diagonal.pow_(2).sum() / d


def step(function, z):
    """Forward and backward of 25 variance + covariance; the gradient."""
    z = z.detach().requires_grad_()
    variance, covariance = function(z)
    (25 * variance + covariance).backward()
    return z.grad


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


def floor(n, d, operations_rate, bytes_rate):
    """Seconds below which no forward + backward can go: 3 N D min(N, D) operations, 4 passes over fp32 Z."""
    return max(3 * n * d * min(n, d) / operations_rate, 16 * n * d / bytes_rate)


def check(name, function, z, truth, reference_error):
    error = ((step(function, z).double() - truth).norm() / truth.norm()).item()
    if not error <= min(max(4 * reference_error, 1e-6), 1e-3):
        print(f"{name} disagrees with float64 at {list(z.shape)}: gradient error {error:.1e}, the fp32 reference's is "
              f"{reference_error:.1e}; not timed", file=sys.stderr)
        sys.exit(2)


def measure(n, d, device, repeats):
    """{implementation: (median seconds, peak bytes)} at one size, the implementations in turn."""
    z = torch.randn(n, d, device=device, generator=torch.Generator(device).manual_seed(0))
    contenders = {"reference": variance_covariance_reference, "facebookresearch": facebookresearch_form,
                  "torch": lambda z: variance_covariance(z, impl="torch")}
    if device == "cuda" and triton is not None:
        contenders["triton"] = lambda z: variance_covariance(z, impl="triton")
    truth = step(variance_covariance_reference, z.double())
    reference_error = ((step(variance_covariance_reference, z).double() - truth).norm() / truth.norm()).item()
    for name, function in contenders.items():
        check(name, function, z, truth, reference_error)       # also the warm-up
    times = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, function in contenders.items():
            times[name].append(seconds(lambda: step(function, z), device))
    return {name: (statistics.median(times[name]), peak_memory(lambda: step(function, z), device))
            for name, function in contenders.items()}


def draw(rows, path, where):
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    axes = figure.subplots(1, 2)
    names = list(rows[0][2])
    panels = (axes[0], 0, 1e3, "forward + backward, ms"), (axes[1], 1, 2 ** -20, "extra memory, MiB")
    for axis, k, scale, label in panels:
        for i, name in enumerate(names):
            x = [r + (i - (len(names) - 1) / 2) * .8 / len(names) for r in range(len(rows))]
            axis.bar(x, [result[name][k] * scale for *_, result, _ in rows], .8 / len(names), label=name)
        axis.set(yscale="log", ylabel=label, xticks=range(len(rows)), xticklabels=[f"{n}\n{d}" for n, d, *_ in rows])
        axis.set_xlabel("batch N over dimension D")
    for r, (*_, least) in enumerate(rows):
        axes[0].hlines(least * 1e3, r - .4, r + .4, color="black", label=None if r else "floor")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.suptitle(f"Variance + covariance loss, {where}", fontsize=10)
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


def size(text):
    """256x8192 -> (256, 8192)"""
    n, d = map(int, text.split("x"))
    if n < 2 or d < 1:
        raise ValueError
    return n, d


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--sizes", nargs="+", metavar="NxD", type=size, default=SIZES, help="what to time")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each; the median counts (default 5)")
    parser.add_argument("--picture", default="covariance_benchmark.png", help="where the picture goes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    if args.repeats < 1 or not Path(args.picture).parent.is_dir():
        parser.error("--repeats must be at least 1, and the folder of --picture must exist")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device here")
    operations_rate, bytes_rate = machine_rates(args.device)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    where = f"{name}, torch {torch.__version__}"
    print(f"{where}: {operations_rate / 1e9:.0f} GFLOP/s fp32 matmul, {bytes_rate / 1e9:.1f} GB/s copy")
    print(f"{'N, D':>12}  {'implementation':<17}"
          f"{'ms':>10}{'faster':>9}{'floor':>8}{'MiB':>10}{'less':>7}{'x input':>9}")
    rows = []
    for n, d in args.sizes:
        result, least = measure(n, d, args.device, args.repeats), floor(n, d, operations_rate, bytes_rate)
        rows.append((n, d, result, least))
        peer_time, peer_memory = result["facebookresearch"]
        for name, (t, m) in result.items():
            print(f"{f'{n}, {d}':>12}  {name:<17}{t * 1e3:10.2f}{peer_time / t:8.1f}x{t / least:7.1f}x"
                  f"{m / 2 ** 20:10.1f}{peer_memory / m:6.1f}x{m / (4 * n * d):8.1f}x", flush=True)
    print("faster, less: against facebookresearch's form in this run; floor: time over the floor at this size")
    draw(rows, args.picture, where)


if __name__ == "__main__":
    main()
