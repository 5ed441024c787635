"""kernels/launch.py: what is chosen where Triton is old, missing or cannot compile."""
import pytest
import torch

from kernels import launch
from kernels.launch import pick

pytestmark = pytest.mark.skipif(launch.triton is None, reason="needs triton")


def test_an_old_triton_is_refused_when_asked_for(monkeypatch):
    monkeypatch.setattr(launch.triton, "__version__", "3.2.0")
    with pytest.raises(ValueError, match="3.3 or newer"):
        pick("triton", [torch.zeros(1)])


def test_auto_passes_an_old_triton_by_with_a_warning(monkeypatch):
    monkeypatch.setattr(launch.triton, "__version__", "3.2.0")
    with pytest.warns(UserWarning, match="too old"):
        assert not launch._compiles.__wrapped__(0)


def test_a_triton_that_cannot_compile_is_passed_by_with_a_warning(monkeypatch):
    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("Failed to find C compiler")
    monkeypatch.setattr(launch, "_count_up", Broken())
    monkeypatch.setattr(torch.cuda, "device", lambda index: torch.no_grad())
    monkeypatch.setattr(launch.torch, "zeros", lambda *sizes, **options: torch.empty(1))
    with pytest.warns(UserWarning, match="C compiler"):
        assert not launch._compiles.__wrapped__(0)


def test_a_float64_operand_is_never_given_to_triton():
    both = [torch.zeros(1), torch.zeros(1, dtype=torch.float64)]
    assert pick("auto", both) == "torch"
    with pytest.raises(ValueError, match="at most fp32"):
        pick("triton", both)
