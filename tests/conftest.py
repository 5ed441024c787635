"""Triton's interpreter where there is no GPU, and uninitialised memory that shows when it is read."""
import os
import sys
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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """pytest -n: tests of a file go to one worker, since they share what the first of them made."""
    from xdist.scheduler import LoadFileScheduling
    return LoadFileScheduling(config, log)


def pytest_addoption(parser):
    parser.addoption("--every-run", action="store_true", help="with -m slow: README's tables whole, in half a day")


def pytest_configure(config):
    if config.option.markexpr == "slow" and getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("-m slow measures times: run it without -n")
    config.addinivalue_line("markers", "slow: minutes, not seconds; runs with -m slow")


def pytest_collection_modifyitems(config, items):
    if "slow" not in config.option.markexpr:
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: runs with -m slow"))
