"""A script's run as its user makes it: the ways it is started, the small images it finds, what came of it.

A test says its command in the line above it, and `run` (conftest.py) is what came of that:

    @command(f"{SMALL} --lr 1e30", scripts=ALL)
    def test_a_loss_that_is_not_finite_stops_the_run(run):
        assert run.returncode == 2

All runs that the chosen tests of a file ask for are made before the first of them, as many at a time as there are
cores. Nothing here imports a script or kernels/: forked processes import this file, and must find them new.
"""
import contextlib
import functools
import importlib
import io
import json
import multiprocessing
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
ALL = ["vicreg.py", "icone.py", "falcon.py", "ba_ssl.py"]
ONE = ["vicreg.py"]                                      # stands for all where only what all share is at work
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL = "--data small.npz --batch 8 --epochs 3 --width 4 --size 16"    # a later option of the same name is what counts


# ---- Data --------------------------------------------------------------------------------------------------
def small_arrays(*shape, count=40, test_count=12):
    """Noise of this shape, [12, 12] if none is given, brighter by class, in three classes; MedMNIST's names."""
    arrays = {}
    for split, n in ("train", count), ("test", test_count):
        x = np.random.default_rng(0).integers(0, 120, (n, *(shape or (12, 12))))
        labels = np.arange(n) % 3
        brightness = 60 * labels.reshape(n, *[1] * (x.ndim - 1))
        arrays[f"{split}_images"] = (x + brightness).astype(np.uint8)
        arrays[f"{split}_labels"] = labels.astype(np.uint8)
    return arrays


def saved(**arrays):
    """What makes small.npz of these arrays."""
    def make(folder):
        np.savez(folder / "small.npz", **arrays)
    return make


def snippet(words):
    """The one block of Python in kernels/harness/README.md that has these words."""
    page = (ROOT / "kernels" / "harness" / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    block, = (block for block in blocks if words in block)
    return block


# ---- Ways to run a script: (script, its arguments, folder) -> subprocess.CompletedProcess -------------------
context = multiprocessing.get_context("forkserver")      # its server imports these once, starts no thread, and forks
context.set_forkserver_preload(["torch", "torch._dynamo", "sklearn.manifold", "sklearn.mixture", "sklearn.linear_model",
                                "sklearn.model_selection", "sklearn.datasets", "sklearn.pipeline", "PIL.ImageOps",
                                "matplotlib.figure", "matplotlib.backends.backend_agg", "tqdm", "einops", "pytest"])


def as_main(script, arguments, folder):
    """What `python script arguments` does in this folder, output in files beside it."""
    import threadpoolctl                                 # scikit-learn's own dependency; tests of kernels need neither
    os.chdir(folder)
    torch.set_num_threads(1)                             # runs go as many at a time as there are cores
    threadpoolctl.threadpool_limits(1)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).parent)
    status = 1
    try:
        runpy.run_path(script, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code
        raise
    finally:  # by file: a Process that one thread joins is polled by others' start(), and one of them reads 255
        Path(f"{folder}.status").write_text(str(status))


def forked(script, arguments, folder):
    """A process that need not import torch, scikit-learn and matplotlib anew: 4 s less."""
    started = context.Process(target=as_main, args=(str(ROOT / script), [*map(str, arguments)], str(folder)))
    started.start()
    started.join(300)
    started.kill()
    status, *output = [Path(f"{folder}.{name}").read_text() for name in ("status", "stdout", "stderr")]
    return subprocess.CompletedProcess(script, int(status), *output)


def process(script, arguments, folder, **environment):
    """A process from its start."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300,
                          env={**ONE_THREAD, **environment})


def as_a_copy(script, arguments, folder):
    """The script and kernels/, nothing else, in another folder."""
    shutil.copy(ROOT / script, folder)
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return process(folder / script, arguments, folder)


def killed_and_resumed(script, arguments, folder):
    """A whole run in `whole`; one in `run` that went on after a SIGKILL at a random moment."""
    whole = process(script, [*arguments, "--out", "whole"], folder)
    assert whole.returncode == 0, whole.stderr
    started = torchrun(script, [*arguments, "--out", "run"], folder, count=1)
    until_it_trains(started, folder)
    time.sleep(random.uniform(0, 1.5))
    started.kill()
    started.communicate()
    return process(script, ["--resume", "run"], folder)


def interrupted(script, arguments, folder):
    """Ctrl-C after a second of training in `run`."""
    started = torchrun(script, [*arguments, "--out", "run"], folder, count=1)
    until_it_trains(started, folder)
    time.sleep(1)
    started.send_signal(signal.SIGINT)
    output = started.communicate(timeout=60)
    return subprocess.CompletedProcess(script, started.returncode, *output)


# ---- Processes that a test ends itself ---------------------------------------------------------------------
def torchrun(script, arguments, folder, count=2):
    """So many processes of a script, started, in a group of their own; 1: without torchrun."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    if count > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    return subprocess.Popen(command, cwd=folder, text=True, start_new_session=True, env=ONE_THREAD,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def until_it_trains(started, folder):
    """Waits for the first checkpoint of folder/run, which is there once its metrics are."""
    while not (folder / "run" / "metrics.jsonl").exists():
        assert started.poll() is None, started.communicate()[1]
        time.sleep(0.01)


def children(pid):
    """Processes that this one started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:                                  # it has just ended
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return sorted(found)


# ---- In this very process ----------------------------------------------------------------------------------
def call(folder, *arguments, script="vicreg.py"):
    """The script's main() in this process, which tests may have changed -> exit code; a traceback is an error."""
    module = importlib.import_module(Path(script).stem)
    signals = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = os.getcwd(), sys.argv, torch.get_rng_state(), torch.get_num_threads()
    handlers = [signal.getsignal(number) for number in signals]
    os.chdir(folder)
    sys.argv = [script, *arguments]
    torch.set_num_threads(1)
    try:
        module.launch(module.main)
        return 0
    except SystemExit as end:
        return end.code
    finally:
        os.chdir(before[0])
        sys.argv = before[1]
        torch.set_rng_state(before[2])
        torch.set_num_threads(before[3])
        for number, handler in zip(signals, handlers):
            signal.signal(number, handler)


def call_command(name, folder, *arguments):
    """python -m kernels.NAME in this process -> subprocess.CompletedProcess."""
    before, argv = os.getcwd(), sys.argv
    out, err = io.StringIO(), io.StringIO()
    os.chdir(folder)
    sys.argv = [name, *map(str, arguments)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            importlib.import_module(f"kernels.{name}").main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        os.chdir(before)
        sys.argv = argv
    return subprocess.CompletedProcess(name, code, out.getvalue(), err.getvalue())


def said(capsys, code, found):
    """It ended with exit code 2 and a line that holds this."""
    assert code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("vicreg.py: ") and found in line, line


# ---- A run and what came of it -----------------------------------------------------------------------------
class Run:
    """A script's run in a folder of its own, where small.npz is.

    script      in ROOT
    arguments   those of several starts, one after another in one folder, are parted by "; "
    prepare     prepare(folder) puts there what else is needed
    between     what changes the folder before the second start, the third, ...
    way         how it is run: forked, as_a_copy, interrupted, ...

    Once it is made: folder; done, what came of each start; returncode, stdout and stderr of the last one; before
    and after, the files there as {path: (when it was written, checksum)}.
    """

    def __init__(self, script, arguments, prepare=None, between=(), way=forked):
        self.script, self.prepare, self.between, self.way = script, prepare, between, way
        self.starts = [shlex.split(each) for each in arguments.split("; ")]

    def make(self, folder):
        self.folder = folder
        saved(**small_arrays())(folder)
        if self.prepare:
            self.prepare(folder)
        self.before = self.files()
        self.done = []
        for number, arguments in enumerate(self.starts):
            if number and self.between:
                self.between[number - 1](folder)
            self.done.append(self.way(self.script, arguments, folder))
        self.returncode, self.stdout, self.stderr = [
            getattr(self.done[-1], name) for name in ("returncode", "stdout", "stderr")]
        self.after = self.files()

    def files(self):
        return {path: (path.stat().st_mtime_ns, zlib.crc32(path.read_bytes()))
                for path in self.folder.rglob("*") if path.is_file()}

    def out(self, number=1):
        """The folder of the first start, or of another, after starts that ended well."""
        for done in self.done:
            assert done.returncode == 0, done.stderr
        return self.folder / "runs" / f"{Path(self.script).stem}-{number}"

    def line(self, number=1):
        """What the line before training says of the data: "32 train and 8 test images, ..."."""
        stdout = self.done[number - 1].stdout
        lines = [line for line in stdout.splitlines() if line.startswith("data: ")]
        assert len(lines) == 1, self.done[number - 1].stderr
        words, size, folder = lines[0].removeprefix("data: ").split("; ")
        assert re.fullmatch(r"[\d,]+ parameters on cpu", size)
        assert self.folder / folder == self.out(number)
        return words

    def notes(self):
        return [line for line in self.stdout.splitlines() if line.startswith("note:")]

    def config(self):
        return json.loads((self.out() / "config.json").read_text())

    def metrics(self, number=1):
        return [json.loads(line) for line in (self.out(number) / "metrics.jsonl").read_text().splitlines()]

    def checkpoint(self):
        return torch.load(self.out() / "last.pt", weights_only=True)

    def encoder(self, number=1):
        return torch.load(self.out(number) / "encoder.pt", weights_only=True)

    def features(self):
        return np.load(self.out() / "features.npz")

    def decoded(self):
        """The arrays under runs/decoded, the oldest first."""
        paths = sorted((self.folder / "runs" / "decoded").glob("*.npy"), key=lambda path: path.stat().st_mtime_ns)
        return [np.load(path) for path in paths]


the_run = functools.cache(Run)                           # tests of the same command share what came of it


def command(arguments, scripts=ONE, prepare=None, between=(), way=forked, slow=()):
    """Gives a test its runs: these arguments with each of the scripts, some of which only run with -m slow."""
    params = [pytest.param(the_run(script, arguments, prepare, between, way), id=script,
                           marks=[pytest.mark.slow] * (script in slow)) for script in scripts]
    return pytest.mark.parametrize("run", params, indirect=True)
