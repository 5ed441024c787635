"""Are the kernels right and fast on this machine? One command, under ten minutes on one GPU.

    python -m kernels.acceptance --out .               # writes acceptance.json, prints a table
    python -m kernels.acceptance --out . --quick       # half a minute: small sizes, few repeats

Part A, correctness, of the plain-torch and of the Triton path: the kernel tests; agreement with float64;
torch.compile with fullgraph, CUDA graphs, another stream, no waiting for the GPU; banks over 2^31 elements;
autocast and bf16; runs equal to the bit; input between NaN. Part B, time and memory, forward + backward in
fp32, medians: the textbook form, torch.compile of it, other simple forms, the released one where there is
one, both of ours. "faster" and "less" are the textbook's figure over that of the path which impl="auto"
takes; "of the fastest" is the time of the fastest form over ours.

Every bar is a line in BARS or TIMES and ends as PASS, FAIL or "not here" (no GPU, no Triton, too little
memory, no time left). Checks that fail, die or hang leave the rest alone: each group of them has a process of
its own. Exit code 1 if a bar failed. Without a GPU the same is run on the CPU at smaller sizes, and Triton
only in its interpreter (TRITON_INTERPRET=1), only in part A. --bar NAME=VALUE moves a bar.
"""
import argparse
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections import namedtuple
from functools import cache, partial
from pathlib import Path

import torch

from .bank import bank_logsumexp
from .benchmark import bank_cases, check, covariance_case, dictionary_case, kernels_here, measure, step
from .covariance import variance_covariance
from .launch import INTERPRETED, pick, triton

Bar = namedtuple("Bar", "name sense value")            # sense: "<=" or ">="
Row = namedtuple("Row", "part name figure sense bar verdict note")


class NotHere(Exception):
    """What a check needs is missing on this machine."""


# ---- Bars --------------------------------------------------------------------------------------------------
# Part A: at most. Relative errors and differences, but for the tests (how many failed), error and bf16 (in
# units of what is allowed: twice the fp32 textbook's error, at least 1e-6; bf16's rounding), repeats (how
# many runs differ).
BARS = {
    "error": 1, "compile": 1e-6, "graph": 1e-6, "stream": 1e-6, "waiting": 0, "offsets": 1e-6,
    "autocast": 0, "bf16": 1, "repeats": 0, "padding": 1e-6,
}
OF_THE_FASTEST = .9                                    # below it, "auto" should take another form

# Part B: kernel, size, at least so much faster, at least so much less memory (None: no bar).
TIMES = {
    "cuda": [
        ("covariance", (64, 8192), 5, 8),
        ("covariance", (256, 8192), 10, 8),
        ("covariance", (2048, 8192), 7, None),
        ("covariance", (4096, 512), 1.5, None),
        ("bank", (256, 65_536, 128), 1.3, None),
        ("bank", (256, 1_000_000, 128), 1.3, 100),
        ("bank", (1024, 200_000, 256), 1, None),
        ("dictionary", (256, 16_384, 2048), 2, None),
        ("dictionary", (256, 1_000_000, 256), 2, 20),
    ],
    "cpu": [
        ("covariance", (64, 2048), 5, 8),
        ("covariance", (512, 512), 1, None),
        ("bank", (64, 50_000, 128), 1, 8),
        ("dictionary", (64, 16_384, 256), 1, 2),
    ],
    "quick": [
        ("covariance", (64, 1024), 1, 2),
        ("bank", (32, 5000, 64), .5, 2),
        ("dictionary", (32, 4096, 64), .5, 1),
    ],
}

TESTS = "test_covariance.py", "test_bank.py", "test_dictionary.py", "test_launch.py"


def case_name(kernel, size):
    return f"{kernel} {'x'.join(map(str, size))}"


def groups(device, quick):
    """{group: bars}. A group's checks share one process."""
    found = {}
    for impl in ("torch", "triton"):
        found[impl] = [Bar(f"{name} {impl}", "<=", value) for name, value in BARS.items()]
    for kernel, size, faster, less in TIMES["quick" if quick else device]:
        name = case_name(kernel, size)
        found[name] = [Bar(f"{name} faster", ">=", faster),
                       Bar(f"{name} of the fastest", ">=", OF_THE_FASTEST)]
        if less:
            found[name].append(Bar(f"{name} less", ">=", less))
    found["tests"] = [Bar("kernel tests", "<=", 0)]    # last: they take what time is left
    return found


# ---- Part A: correctness -----------------------------------------------------------------------------------
# A check is a function of (impl, device, quick) that returns one figure.
@cache
def problems(impl, device):
    """(case, its loss and gradients), small and of irregular shapes: both sides of the covariance, bank
    detached and trained, repulsion, dictionary."""
    detached, trained, _, pairs, _ = bank_cases(33, 500, 20, device, [impl])
    cases = [covariance_case(33, 130, device, [impl]), covariance_case(130, 41, device, [impl]),
             detached, trained, pairs, dictionary_case(33, 150, 40, device, [impl])]
    return [(case, run(case, impl)) for case in cases]


def run(case, impl, inputs=None):
    """Loss and gradients of one implementation."""
    return step(case.forms[impl], case, inputs)


def differences(got, wanted):
    """Relative difference of each tensor, in float64."""
    found = []
    for one, other in zip(got, wanted):
        other = other.double()
        found.append(((one.double() - other).norm() / other.norm().clamp(min=1e-30)).item())
    return found


def worst(numbers):
    """The largest, NaN if one is NaN: Python's max would hide it."""
    return torch.tensor(numbers, dtype=torch.float64).max().item()


def need_cuda(device):
    if device != "cuda":
        raise NotHere("needs a GPU")


def error(impl, device, quick):
    found = []
    for case, got in problems(impl, device):
        truth = run(case, "textbook", [x.double() for x in case.inputs])
        ours = differences(got, truth)
        theirs = differences(run(case, "textbook"), truth)
        found += [one / max(2 * other, 1e-6) for one, other in zip(ours, theirs)]
    return worst(found)


def compile(impl, device, quick):
    """Forward and backward in one graph."""
    backend = "aot_eager" if quick else "inductor"
    found = []
    for case, wanted in problems(impl, device):
        torch.compiler.reset()
        form = case.forms[impl]
        compiled = torch.compile(lambda *inputs: form(*inputs), fullgraph=True, backend=backend)
        found += differences(step(compiled, case), wanted)
    return worst(found)


def graph(impl, device, quick):
    """Captured with one input, replayed with another."""
    need_cuda(device)
    found = []
    for case, wanted in problems(impl, device):
        inputs = [x.flip(0).contiguous() for x in case.inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run(case, impl, inputs)                    # compiles, which a capture must not see
        torch.cuda.current_stream().wait_stream(side)

        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            outputs = run(case, impl, inputs)
        for static, x in zip(inputs, case.inputs):
            static.copy_(x)
        captured.replay()
        found += differences(outputs, wanted)
    return worst(found)


def stream(impl, device, quick):
    """The input is only there when its own stream, which is busy, has come to it."""
    need_cuda(device)
    found = []
    for case, wanted in problems(impl, device):
        inputs = [torch.full_like(x, torch.nan) for x in case.inputs]
        other = torch.cuda.Stream()
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            torch.cuda._sleep(10 ** 8)                 # cycles
            for late, x in zip(inputs, case.inputs):
                late.copy_(x)
            got = run(case, impl, inputs)
        torch.cuda.current_stream().wait_stream(other)
        found += differences(got, wanted)
    return worst(found)


def waiting(impl, device, quick):
    need_cuda(device)
    cases = problems(impl, device)
    torch.cuda.set_sync_debug_mode("error")            # a wait is an exception
    try:
        for case, _ in cases:
            run(case, impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return 0


def offsets(impl, device, quick):
    """Rows, and columns, 2^30 elements apart, as a transposed queue has them: most of the storage is never
    touched."""
    storage = torch.empty(3 * 2 ** 30 + 64, dtype=torch.float16, device=device)
    apart = 2 ** 30 + 7
    values = torch.linspace(-1, 1, 16, device=device).view(4, 4)
    values = torch.sin(7 * values).half()
    found = []
    for strides in ((apart, 1), (1, apart)):
        far = storage.as_strided((4, 4), strides)
        far.copy_(values)
        got = bank_logsumexp(values, far, .2, impl=impl), *variance_covariance(far, impl=impl)
        wanted = bank_logsumexp(values, values, .2, impl=impl), *variance_covariance(values, impl=impl)
        found += differences(got, wanted)
    return worst(found)


def autocast(impl, device, quick):
    """It changes nothing."""
    found = []
    for case, wanted in problems(impl, device):
        with torch.autocast(device, dtype=torch.bfloat16):
            found += differences(run(case, impl), wanted)
    return worst(found)


def bf16(impl, device, quick):
    """Input in bf16: no error but the rounding of the gradients."""
    found = []
    for case, _ in problems(impl, device):
        halves = [x.bfloat16() for x in case.inputs]
        truth = run(case, "textbook", [x.double() for x in halves])
        found += differences(run(case, impl, halves), truth)
    return worst(found) / torch.finfo(torch.bfloat16).eps


def repeats(impl, device, quick):
    differing = 0
    for case, first in problems(impl, device):
        for _ in range(2 if quick else 19):
            again = run(case, impl)
            differing += not all(torch.equal(one, other) for one, other in zip(first, again))
    return differing


def padded(x):
    """x as a window into storage that is NaN everywhere else."""
    storage = x.new_full((x.shape[0] + 3, x.shape[1] + 5), torch.nan)
    storage[1:-2, 2:-3] = x
    return storage[1:-2, 2:-3]


def padding(impl, device, quick):
    """And what torch.empty returns is NaN too: an output that is not written shows."""
    found = []
    for case, wanted in problems(impl, device):
        torch.use_deterministic_algorithms(True)
        try:
            got = run(case, impl, [padded(x) for x in case.inputs])
        finally:
            torch.use_deterministic_algorithms(False)
        found += differences(got, wanted)
    return worst(found)


def kernel_tests(quick):
    """How many fail: one process for each file, all at once, since each compiles its own kernels."""
    folder = Path(__file__).parents[1] / "tests"
    files = TESTS[-1:] if quick else TESTS
    if not all((folder / file).exists() for file in files):
        raise NotHere("no tests/ beside kernels/")
    plain = {name: value for name, value in os.environ.items() if name != "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"}
    started = []
    for file in files:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", folder / file]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder.parent,
                                        env=plain))
    failed = 0
    for process in started:
        said, _ = process.communicate()
        counts = re.findall(r"(\d+) (?:failed|error)", said)
        failed_here = sum(map(int, counts)) or process.returncode != 0
        if failed_here:
            print(said, flush=True)
        failed += failed_here
    return failed


CHECKS = {
    check.__name__: check
    for check in (error, compile, graph, stream, waiting, offsets, autocast, bf16, repeats, padding)
}


# ---- Part B: time and memory -------------------------------------------------------------------------------
def case_of(kernel, size, device):
    impls = kernels_here(device)
    if kernel == "covariance":
        return covariance_case(*size, device, impls)
    if kernel == "bank":
        return next(bank_cases(*size, device, impls))  # the cross-entropy, bank detached
    return dictionary_case(*size, device, impls)


def runs(case, name):
    """Whether a form gets through a step here, and why not."""
    try:
        run(case, name)
    except Exception as problem:
        return reason(problem)
    return ""


def without(case, problems):
    """The case less the forms that have a problem; {form: problem} of these."""
    lost = {name: problem for name, problem in problems.items() if problem}
    forms = {name: form for name, form in case.forms.items() if name not in lost}
    return case._replace(forms=forms), lost


def measured(kernel, size, device, quick):
    """{form: (seconds, bytes)}; {form: why it has none}."""
    case = case_of(kernel, size, device)
    if not quick:
        form = case.forms["textbook"]
        compiled = torch.compile(lambda *inputs: form(*inputs), dynamic=False)
        case = case._replace(forms={**case.forms, "textbook, compiled": compiled})
    lost = {name: runs(case, name) for name in case.forms}
    case, lost = without(case, lost)
    case, wrong = without(case, dict(check(case)))
    for impl in kernels_here(device):
        if impl in wrong:
            raise AssertionError(f"{impl}: {wrong[impl]}")
    return measure(case, device, 3 if quick else 30), {**lost, **wrong}


def figures(kernel, size, device, quick):
    """(name of a bar, its figure or an exception), and the times themselves."""
    name = case_name(kernel, size)
    result, lost = measured(kernel, size, device, quick)
    here = torch.empty(0, device=device)
    ours = pick("auto", [here])
    if ours in lost:
        raise AssertionError(f"{ours}: {lost[ours]}")
    our_time, our_memory = result[ours]
    fastest = min(time_ for time_, _ in result.values())
    yield f"{name} of the fastest", fastest / our_time
    if "textbook" in lost:
        missing = NotHere(f"textbook: {lost['textbook']}")
        yield f"{name} faster", missing
        yield f"{name} less", missing
    else:
        time_, memory = result["textbook"]
        yield f"{name} faster", time_ / our_time
        yield f"{name} less", memory / max(our_memory, 1)
    times = {form: [1e3 * time_, memory / 2 ** 20] for form, (time_, memory) in result.items()}
    yield "times", {**times, **lost}


# ---- Processes ---------------------------------------------------------------------------------------------
GROUP_LIMIT, LIMIT = 300, 570                          # seconds for one group, for all


def reason(problem):
    first = str(problem).strip().split("\n")[0]
    if isinstance(problem, NotHere):
        return first
    return f"{type(problem).__name__}: {first}"[:160]


def attempt(call):
    """Its figure, or the exception."""
    try:
        return call()
    except Exception as problem:
        return problem


def outcome(problem):
    """(verdict, why)"""
    if isinstance(problem, (NotHere, torch.OutOfMemoryError)):
        return "not here", reason(problem)
    traceback.print_exception(problem)
    return "FAIL", reason(problem)


def usable(impl, device):
    """NotHere, unless an implementation takes tensors of this device."""
    if impl == "torch":
        return
    if triton is None:
        raise NotHere("no Triton here")
    if device == "cpu" and not INTERPRETED:
        raise NotHere("needs a GPU, or TRITON_INTERPRET=1")


def check_of(name, impl, device, quick):
    usable(impl, device)
    return CHECKS[name](impl, device, quick)


def answers(group, device, quick):
    """(name of a bar, its figure or an exception) of each of a group's checks."""
    if group == "tests":
        yield "kernel tests", attempt(partial(kernel_tests, quick))
    elif group in ("torch", "triton"):
        for name in BARS:
            yield f"{name} {group}", attempt(partial(check_of, name, group, device, quick))
    else:
        for kernel, size, *_ in TIMES["quick" if quick else device]:
            if case_name(kernel, size) == group:
                yield from figures(kernel, size, device, quick)


def child(pipe, group, device, quick):
    os.setpgrp()                                       # so that what it starts can be ended with it
    if group in ("torch", "triton"):                   # not where times are measured
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")    # else cuBLAS does not repeat itself
    torch.set_float32_matmul_precision("highest")      # some containers ask for tf32 by a variable
    torch.manual_seed(0)
    try:
        for name, figure in answers(group, device, quick):
            if isinstance(figure, Exception):
                figure = outcome(figure)
            pipe.send((name, figure))
    except Exception as problem:
        pipe.send(("", outcome(problem)))
    pipe.close()


def forked(target, *arguments):
    """A process that sends its answers through a pipe: the process, our end of the pipe."""
    forking = multiprocessing.get_context("fork")      # this process has not touched a GPU, and must not
    reader, writer = forking.Pipe(duplex=False)
    process = forking.Process(target=target, args=(writer, *arguments))
    process.start()
    os.setpgid(process.pid, process.pid)               # it does so itself, but may not have come to it yet
    writer.close()
    return process, reader


def collect(group, device, quick, limit):
    """{name: figure, or (verdict, why)} of a group; "" stands for whatever it did not come to."""
    process, reader = forked(child, group, device, quick)
    found = {}
    end = time.monotonic() + limit
    try:
        while reader.poll(max(0, end - time.monotonic())):
            name, figure = reader.recv()
            found[name] = figure
        cut = limit < GROUP_LIMIT / 3                  # by the limit of all: hardly this group's fault
        found.setdefault("", ("not here", "no time was left: run it again, compiled kernels are kept") if cut
                         else ("FAIL", f"stopped after {limit:.0f} s"))
    except EOFError:                                   # it is done, or dead
        process.join()
        found.setdefault("", ("FAIL", f"its process ended with code {process.exitcode}"))
    finally:
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
    return found


def find_device(pipe):
    """Sends "cuda" or "cpu", and the machine in words."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = f"CPU, {torch.get_num_threads()} threads"
    if device == "cuda":
        where = torch.cuda.get_device_name()
    pipe.send((device, where))


# ---- Verdicts ----------------------------------------------------------------------------------------------
def judge(bar, figure, part):
    """The bar's row in the table; figure as collect() has it."""
    if isinstance(figure, tuple):
        verdict, note = figure
        return Row(part, bar.name, None, bar.sense, bar.value, verdict, note)
    good = figure <= bar.value if bar.sense == "<=" else figure >= bar.value
    verdict = "PASS" if good else "FAIL"
    if math.isnan(figure):
        return Row(part, bar.name, None, bar.sense, bar.value, verdict, "NaN")
    return Row(part, bar.name, figure, bar.sense, bar.value, verdict, "")


def table(rows):
    lines = []
    for row in rows:
        figure = "" if row.figure is None else f"{row.figure:.3g}"
        bar = f"{row.sense} {row.bar:g}"
        lines.append(f"{row.part}  {row.name:44}{figure:>10}  {bar:>9}  {row.verdict:9} {row.note}".rstrip())
    return "\n".join(lines)


def moved(text):
    """NAME=VALUE -> (name, value)"""
    name, value = text.rsplit("=", 1)
    return name.strip(), float(value)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for acceptance.json")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats")
    parser.add_argument("--bar", action="append", default=[], type=moved, metavar="NAME=VALUE",
                        help='another bar, as in --bar "error torch=2"; names are those of the table')
    args = parser.parse_args()
    if not args.out.is_dir():
        parser.error(f"the folder {args.out} must exist")
    return parser, args


def main():
    start = time.monotonic()
    parser, args = parse()
    _, reader = forked(find_device)
    device, where = reader.recv()
    where += f", torch {torch.__version__}, Triton {triton.__version__ if triton else 'not installed'}"
    plan = groups(device, args.quick)
    known = {bar.name for bars in plan.values() for bar in bars}
    wanted = dict(args.bar)
    if not wanted.keys() <= known:
        parser.error(f"--bar: no bar named {', '.join(wanted.keys() - known)}")

    print(where)
    rows, times = [], {}
    for group, bars in plan.items():
        part = "A" if group in ("tests", "torch", "triton") else "B"
        left = start + LIMIT - time.monotonic()
        found = collect(group, device, args.quick, max(0, min(GROUP_LIMIT, left)))
        for bar in bars:
            bar = bar._replace(value=wanted.get(bar.name, bar.value))
            rows.append(judge(bar, found.get(bar.name, found[""]), part))
        print(f"{group}: {time.monotonic() - start:.0f} s", flush=True)
        if "times" in found:
            times[group] = found["times"]
        for form, measures in found.get("times", {}).items():
            if not isinstance(measures, str):
                measures = "{:9.2f} ms{:10.1f} MiB".format(*measures)
            print(f"    {form:20} {measures}", flush=True)
        rows.sort(key=lambda row: row.part)
        report = dict(where=where, quick=args.quick, rows=[row._asdict() for row in rows], times=times)
        (args.out / "acceptance.json").write_text(json.dumps(report, indent=1))

    print(table(rows))
    verdicts = [row.verdict for row in rows]
    passed, failed = verdicts.count("PASS"), verdicts.count("FAIL")
    print(f"{passed} passed, {failed} failed, {len(rows) - passed - failed} not here")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
