"""How kernel tests judge a result: its relative error, inputs that lie between NaN, and far apart."""
import pytest
import torch


def error(got, truth):
    """Relative error in the norm, in float64; absolute where truth is zero."""
    return ((got.double() - truth).norm() / (truth.norm() if truth.norm() else 1)).item()


def nan_padded(x):
    """The same values [n, d] as a strided window into storage that is NaN everywhere else."""
    n, d = x.shape
    storage = torch.full((n + 5, d + 7), torch.nan, dtype=x.dtype, device=x.device)
    storage[2:2 + n, 3:3 + d] = x
    return storage[2:2 + n, 3:3 + d]


def room(numbers, device):
    """Storage of so many fp16 numbers, of which a test touches few; the test is skipped on a GPU that has not so much."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 3 * numbers:
        pytest.skip(f"needs {3 * numbers / 2 ** 30:.0f} GiB of a GPU's memory")
    return torch.empty(numbers, dtype=torch.float16, device=device)
