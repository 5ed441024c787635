"""Triton's interpreter where there is no GPU, uninitialised memory that shows when it is read, and what is made once
for many tests: scripts' runs, side by side, and a finished one."""
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")   # read with torch: else cuBLAS does not repeat itself
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if WORKERS > 1:                                       # pytest -n: to each its share of the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // WORKERS)))
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"              # read once, when kernels/ is imported
sys.path.insert(0, str(Path(__file__).parents[1]))
import scripts  # noqa: E402


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def floor(device):
    """Function impl -> relative error that any form of a kernel may make, however exact the fp32 reference is."""
    def bound(impl):
        if impl == "triton" or device == "cuda":
            return 1e-6                               # tensor cores multiply in parts; cuBLAS sums as it likes
        return 2 ** -22                               # two roundings
    return bound


@pytest.fixture
def nan_poisoned():
    """Every torch.empty, empty_like and new_empty comes filled with NaN."""
    torch.use_deterministic_algorithms(True)          # its fill_uninitialized_memory does the poisoning
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def one_thread():
    """Small networks gain nothing by a second one, and beside other work it costs tenfold; sums in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- Runs of scripts ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def made(request, tmp_path_factory):
    """{run: future} of all runs that chosen tests of this file ask for by @command: as many at a time as there are
    cores, the longest first."""
    chosen = []
    for item in request.session.items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if item.path == request.path and "run" in parameters and not item.get_closest_marker("skip"):
            chosen.append(parameters["run"])
    chosen = sorted(dict.fromkeys(chosen), key=lambda run: (run.way is scripts.forked, -len(run.starts)))
    folders = [tmp_path_factory.mktemp("run") for _ in chosen]           # mktemp is not safe among threads
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(run.make, folder) for run, folder in zip(chosen, folders)]
    return dict(zip(chosen, futures))


@pytest.fixture
def run(request, made):
    """The run of a test's @command; raises what went wrong while it was made."""
    made[request.param].result()
    return request.param


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    scripts.saved(**scripts.small_arrays())(folder)
    assert scripts.call(folder, *scripts.SMALL.split(), "--projector", "16-16", "--out", "run") == 0
    return folder


@pytest.fixture
def finished(finished_once, tmp_path):
    """A folder with small.npz and a run of it, `run`, of vicreg.py."""
    return Path(shutil.copytree(finished_once, tmp_path / "copy"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """pytest -n: tests of a file go to one worker, since they share what the first of them made."""
    from xdist.scheduler import LoadFileScheduling
    return LoadFileScheduling(config, log)


def pytest_addoption(parser):
    parser.addoption("--every-run", action="store_true", help="with -m slow: the pages' tables whole, in half a day")


def pytest_configure(config):
    if config.option.markexpr == "slow" and getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("-m slow measures times: run it without -n")
    config.addinivalue_line("markers", "slow: minutes, not seconds; runs with -m slow")


def pytest_collection_modifyitems(config, items):
    if "slow" not in config.option.markexpr:
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: runs with -m slow"))
