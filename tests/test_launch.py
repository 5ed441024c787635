"""kernels/launch.py and what all kernels owe a GPU: Triton only where it works, grids that it can start, no waiting."""
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import (bank, bank_cross_entropy, bank_logsumexp, bank_repulsion, bank_topk, covariance, dictionary,
                     dictionary_loss, launch, variance_covariance)
from kernels.launch import pick

needs_triton = pytest.mark.skipif(launch.triton is None, reason="needs triton")
IMPLS = ["torch"] + ["triton"] * (launch.triton is not None)


# ---- What operators say of themselves ----------------------------------------------------------------------
class BesideItsFake(TorchDispatchMode):
    """Runs each of our operators, and its fake, which torch.compile believes: shapes, strides and dtypes agree."""
    seen = frozenset()

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        found = operator(*arguments, **(options or {}))
        if str(operator).startswith("kernels."):
            self.seen |= {str(operator)}
            with FakeTensorMode() as mode:
                fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
                expected = operator(*fakes)
            for one, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
                assert (one.shape, one.dtype) == (other.shape, other.dtype), operator
                assert one.numel() < 2 or one.stride() == other.stride(), operator
        return found


def laid_out(rows, columns, device):
    """[rows, columns] as it lies usually, transposed, with gaps, and expanded."""
    yield torch.randn(rows, columns, device=device)
    yield torch.randn(columns, rows, device=device).T
    yield torch.randn(rows, 2 * columns, device=device)[:, ::2]
    yield torch.randn(1, columns, device=device).expand(rows, columns)


@pytest.mark.parametrize("impl", IMPLS)
def test_operators_return_what_their_fakes_say(impl, device, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)        # then functions call the operators
    with BesideItsFake() as beside:
        for x in laid_out(12, 24, device):
            x = x.detach().requires_grad_()
            for bank_rows in laid_out(40, 24, device):
                for trained in (False, True):
                    rows = bank_rows.detach().requires_grad_(trained)
                    bank_cross_entropy(x, rows, torch.arange(12, device=device), .2, impl=impl).sum().backward()
                    bank_repulsion(x, rows, impl=impl).sum().backward()
            bank_repulsion(x, x, "self", impl=impl).sum().backward()
            for side in ("gram", "covariance"):
                sum(variance_covariance(x, side=side, impl=impl)).backward()
            sum(dictionary_loss(x, x.detach(), 50, 0, 1., impl=impl)).backward()
    assert len(beside.seen) == 6, beside.seen


# ---- Whether Triton is taken -------------------------------------------------------------------------------
@needs_triton
def test_an_old_triton_is_refused_when_asked_for(monkeypatch):
    monkeypatch.setattr(launch.triton, "__version__", "3.2.0")
    with pytest.raises(ValueError, match="3.3 or newer"):
        pick("triton", [torch.zeros(1)])


@needs_triton
def test_auto_passes_an_old_triton_by_with_a_warning(monkeypatch):
    monkeypatch.setattr(launch.triton, "__version__", "3.2.0")
    with pytest.warns(UserWarning, match="too old"):
        assert not launch._compiles.__wrapped__(0)


@needs_triton
def test_a_triton_that_cannot_compile_is_passed_by_with_a_warning(monkeypatch):
    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("Failed to find C compiler")
    monkeypatch.setattr(launch, "_count_up", Broken())
    monkeypatch.setattr(torch.cuda, "device", lambda index: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(launch.torch, "zeros", lambda *sizes, **options: torch.empty(1))
    with pytest.warns(UserWarning, match="C compiler"):
        assert not launch._compiles.__wrapped__(0)


@needs_triton
def test_tensor_cores_without_tf32_and_bf16_are_passed_by_with_a_warning(monkeypatch):
    """A T4's: kernels compile for them, without a matrix instruction and with thousands of bytes spilled."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    with pytest.warns(UserWarning, match="neither tf32 nor bf16"):
        assert not launch._compiles.__wrapped__(0)


@needs_triton
def test_a_driver_that_fails_is_passed_by_with_a_warning(monkeypatch):
    def fail(index):
        raise AssertionError("Torch not compiled with CUDA enabled")
    monkeypatch.setattr(torch.cuda, "get_device_capability", fail)
    with pytest.warns(UserWarning, match="not compiled with CUDA"):
        assert not launch._compiles.__wrapped__(0)


def test_under_torch_compile_the_answer_is_a_constant(monkeypatch):
    asked = []
    monkeypatch.setattr(launch, "_compiles", lambda index: bool(asked.append(index)))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lru_cache")              # Dynamo would look through it
        compiled = torch.compile(lambda x: x + launch._compiles_now(3), fullgraph=True, backend="eager")
        for _ in range(3):
            assert compiled(torch.ones(1)) == 1
    assert asked == [3]


@pytest.mark.parametrize("capability, hopper", [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True),
                                                ((10, 3), True), ((12, 0), False), ((12, 1), False)])
def test_whose_matrix_units_are_hoppers(capability, hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert launch.is_hopper(on_a_gpu()) == (hopper and not torch.version.hip)


def on_a_gpu():
    """What pick() looks at in a CUDA tensor, on the last GPU that anybody has."""
    return SimpleNamespace(dtype=torch.float32, device=torch.device("cuda", 127), is_cuda=True)


@needs_triton
def test_the_fall_back_warns_once(monkeypatch):
    monkeypatch.setattr(launch.triton, "__version__", "3.2.0")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [pick("auto", [on_a_gpu()]) for _ in range(5)] == 5 * ["torch"]
    assert len(caught) == 1 and "plain torch on cuda:127" in str(caught[0].message)


@needs_triton
def test_the_public_functions_refuse_an_old_triton(monkeypatch, device):
    monkeypatch.setattr(launch.triton, "__version__", "3.2.0")
    x = torch.zeros(4, 4, device=device)
    for call in (lambda: variance_covariance(x, impl="triton"), lambda: bank_logsumexp(x, x, 1, impl="triton"),
                 lambda: dictionary_loss(x, x, 9, 0, 1, impl="triton")):
        with pytest.raises(ValueError, match="3.3 or newer"):
            call()


@needs_triton
def test_cpu_tensors_are_triton_s_only_in_the_interpreter(monkeypatch):
    """Else it would say that a pointer cannot be accessed."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        pick("triton", [torch.zeros(1)])


def test_a_float64_operand_is_never_given_to_triton():
    both = [torch.zeros(1), torch.zeros(1, dtype=torch.float64)]
    assert pick("auto", both) == "torch"
    with pytest.raises(ValueError, match="at most fp32"):
        pick("triton", both)


# ---- Grids -------------------------------------------------------------------------------------------------
class Recorder:
    """In place of a kernel: notes the grids, starts nothing."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *arguments, **named: None


@pytest.fixture
def grids(monkeypatch):
    recorder = Recorder()
    for module, names in [(covariance, "_column_stats _merge_stats _product _fold _gradient"),
                          (bank, "_slab _bank_rows"),
                          (dictionary, "_row_sums _code_means _row_terms _slopes _times_signs")]:
        for name in names.split():
            monkeypatch.setattr(module, name, recorder)
    return recorder.grids


def three_million_columns(device):
    z = torch.zeros(2, 1, device=device).expand(2, 3_000_000).requires_grad_()
    sum(variance_covariance(z, impl="triton")).backward()


def three_million_samples(device):
    z = torch.zeros(1, 2, device=device).expand(3_000_000, 2).requires_grad_()
    sum(variance_covariance(z, impl="triton")).backward()


def eight_million_bank_rows(device):
    memory = torch.zeros(1, 2, device=device).expand(8_000_000, 2).requires_grad_()
    bank_logsumexp(torch.zeros(1, 2, device=device), memory, 1., impl="triton").sum().backward()


def eight_million_queries(device):
    q = torch.zeros(1, 2, device=device).expand(8_000_000, 2).requires_grad_()
    bank_logsumexp(q, torch.zeros(3, 2, device=device), 1., impl="triton").sum().backward()


def eight_million_codes(device):
    h = torch.zeros(1, 2, device=device, requires_grad=True)
    sum(dictionary_loss(h, h.detach(), 8_000_000, 0, 1., impl="triton")).backward()


@needs_triton
@pytest.mark.parametrize("run", [three_million_columns, three_million_samples, eight_million_bank_rows,
                                 eight_million_queries, eight_million_codes])
def test_only_the_first_axis_of_a_grid_grows_with_the_input(run, grids, device):
    """CUDA takes 2^31 - 1 programs on the first axis, 65,535 on the others."""
    run(device)
    assert grids
    for grid in grids:
        first, *others = grid
        assert first < 2 ** 31 and max(others, default=1) < 2 ** 16, grids


# ---- No waiting --------------------------------------------------------------------------------------------
class NoLook(TorchDispatchMode):
    """Refuses whatever hands a tensor's values, or a size that depends on them, to Python."""

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        refused = "_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select", "item"
        assert operation.overloadpacket.__name__ not in refused, operation
        return operation(*arguments, **(named or {}))


def every_function(device, impl):
    """A step with each of them."""
    def leaf(n):
        return torch.linspace(-1, 1, 8 * n, device=device).view(n, 8).sin().requires_grad_()
    q, memory, rows = leaf(9), leaf(50), torch.arange(9, device=device)
    temperature = .2                                  # on a CPU, where it is free, a tensor's value is checked
    if q.is_cuda:
        temperature = torch.full((1,), .2, device=device, requires_grad=True)
    bank_cross_entropy(q, memory, rows, temperature, rows + 1, impl=impl).backward()
    bank_repulsion(q, memory, rows, impl=impl).backward()
    bank_repulsion(q, q, "self", impl=impl).backward()
    bank_topk(q, memory, 3)
    sum(dictionary_loss(q, q, 40, 0, temperature, impl=impl)).backward()
    sum(variance_covariance(q, impl=impl, side="gram")).backward()
    sum(variance_covariance(q, impl=impl, side="covariance")).backward()


def test_no_function_looks_at_a_value(monkeypatch):
    """Looking is waiting on a GPU, and impossible while a CUDA graph is captured; on a CPU indices are checked."""
    monkeypatch.setattr(bank, "_check_rows", lambda *arguments: None)
    for module in (covariance, dictionary):
        monkeypatch.setattr(module, "free_to_look", lambda x: False)     # as on a GPU
    dictionary._held.cache_clear()
    with NoLook():
        every_function("cpu", "torch")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("impl", IMPLS)
def test_no_function_waits_for_a_gpu(impl):
    every_function("cuda", impl)                      # compiles, which waits
    try:
        torch.cuda.set_sync_debug_mode("error")
        every_function("cuda", impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("impl", IMPLS)
def test_kernels_start_on_the_device_of_their_tensors(impl):
    every_function("cuda:1", impl)                    # the current device is 0
