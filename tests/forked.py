"""Scripts as processes of their own that need not import torch, scikit-learn and matplotlib anew: 4 s less each."""
import multiprocessing
import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import threadpoolctl                                     # scikit-learn's own dependency
import torch

context = multiprocessing.get_context("forkserver")      # its server imports these once, starts no thread, and forks
context.set_forkserver_preload(["torch", "sklearn.manifold", "sklearn.mixture", "sklearn.linear_model",
                                "sklearn.model_selection", "matplotlib.figure", "tqdm", "einops"])


def as_main(script, arguments, folder):
    """What `python script arguments` does in this folder, output in files beside it."""
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


def run(script, arguments, folder):
    """As subprocess.run(..., capture_output=True, text=True)."""
    process = context.Process(target=as_main, args=(str(script), [str(a) for a in arguments], str(folder)))
    process.start()
    process.join(300)
    process.kill()
    status, *output = [Path(f"{folder}.{name}").read_text() for name in ("status", "stdout", "stderr")]
    return subprocess.CompletedProcess(script, int(status), *output)


def make_all(request, tmp_path_factory, kind, key):
    """make(folder) of all runs of this class that chosen tests ask for, by key, as many at a time as there are cores.

    -> {run: what came of it}: a future, whose result() raises what went wrong.
    """
    items = [item for item in request.session.items if not item.get_closest_marker("skip")]
    parameters = [getattr(item, "callspec", None) for item in items]
    chosen = [called.params["run"] for called in parameters if called and "run" in called.params]
    chosen = sorted({run for run in chosen if isinstance(run, kind)}, key=key)           # other files have their own
    folders = [tmp_path_factory.mktemp("run") for _ in chosen]           # mktemp is not safe among threads
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = [pool.submit(run.make, folder) for run, folder in zip(chosen, folders)]
    return dict(zip(chosen, made))
