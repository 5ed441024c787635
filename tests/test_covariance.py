"""kernels/covariance.py against float64 and against the released form, values and gradients."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck

from judge import error, nan_padded, room
from kernels import covariance, variance_covariance, variance_covariance_reference
from kernels.benchmark import facebookresearch_form, peak_memory
from kernels.launch import triton

SHAPES = [(2, 1), (2, 3), (5, 2), (41, 41), (33, 66), (34, 66), (17, 128), (64, 128), (64, 65), (63, 31), (300, 9)]
IMPLS = ["torch", "unseen"] + ["triton"] * (triton is not None)            # unseen: torch as on a GPU, at whose values it cannot look
UPSTREAM = 2.5, -0.7                                  # gradients of the two terms, neither 0 nor 1


@pytest.fixture
def embeddings(device):
    """Function (n, d, seed) -> uneven columns, some on either side of the hinge, with means away from zero."""
    def rows(n, d, seed=0):
        g = torch.Generator().manual_seed(seed)
        spread = torch.randn(n, d, generator=g) * torch.linspace(.2, 2, d)
        return (spread + torch.randn(d, generator=g)).to(device)
    return rows


@pytest.fixture(autouse=True)
def nothing_is_looked_at(request, monkeypatch):
    if hasattr(request.node, "callspec") and request.node.callspec.params.get("impl") == "unseen":
        monkeypatch.setattr(covariance, "free_to_look", lambda z: False)


def option(impl):
    return "torch" if impl == "unseen" else impl


def run(function, z, upstream=UPSTREAM, **options):
    z = z.detach().requires_grad_()
    if "impl" in options:
        options["impl"] = option(options["impl"])
    terms = function(z, **options)
    torch.autograd.backward(terms, [torch.full_like(t, g) for t, g in zip(terms, upstream)])
    return *(t.detach() for t in terms), z.grad


def errors(got, truth):
    """Relative error of variance, covariance and gradient; a term that is zero in truth counts absolutely."""
    return [error(g, t) for g, t in zip(got, truth)]


@pytest.mark.parametrize("side", ["gram", "covariance"])
@pytest.mark.parametrize("shape", [(7, 30), (20, 20), (31, 8), (40, 90), (3, 2)])
def test_equals_the_released_form_in_float64(shape, side, embeddings):
    z = embeddings(*shape).double()
    got, truth = run(variance_covariance, z, side=side), run(facebookresearch_form, z)
    assert all(e < 1e-10 for e in errors(got, truth)), errors(got, truth)


def test_why_auto_leaves_the_gram_side_at_2n_above_d(device):
    """Whitened embeddings: what is subtracted there is nearly all there is."""
    g = torch.Generator().manual_seed(0)
    white = torch.linalg.qr(torch.randn(4096, 512, generator=g, dtype=torch.float64)).Q * 64
    white += 1e-3 * torch.randn(white.shape, generator=g, dtype=torch.float64)
    white = white.to(device)
    truth = variance_covariance(white, side="covariance")[1]
    def wrong(side):
        return (variance_covariance(white.float(), side=side)[1] / truth - 1).abs().item()
    assert wrong("gram") > 1e-3
    assert wrong("covariance") < 1e-5
    assert wrong("auto") == wrong("covariance")


def dominated(n, d, columns, factor, seed):
    """Random embeddings, some columns of them scaled by the factor."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=g)
    z[:, torch.randperm(d, generator=g)[:columns]] *= factor
    return z


def check_dominated(shape, columns, factor, seed, impls, device):
    """Against float64; where its D x D takes seconds, by the Gram side, which the first seed checks against it."""
    z = dominated(*shape, columns, factor, seed).to(device)
    truth = run(variance_covariance, z.double(), side="gram")
    if seed == 0 or shape[1] <= 2048:
        whole = run(variance_covariance, z.double(), side="covariance")
        assert max(errors(truth[1:], whole[1:])) < 1e-8
        truth = whole
    for impl in impls:
        got = run(variance_covariance, z, side="gram", impl=impl)
        worst = max(errors(got[1:], truth[1:]))       # covariance, gradient
        assert worst < 1e-3, (shape, columns, factor, seed, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("factor", [1e3, 1e4, 1e6])
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("shape", [(64, 512), (100, 530)])
def test_dominating_columns_leave_value_and_gradient_right(shape, columns, factor, impl, device, nan_poisoned):
    slow = impl == "triton" and device == "cpu"       # the interpreter
    for seed in range(1 if slow else 3):
        check_dominated(shape, columns, factor, seed, [impl], device)


CASES = [(1, 1e3), (1, 1e4), (1, 1e6), (3, 1e3), (3, 1e4), (3, 1e6)]


@pytest.mark.slow
@pytest.mark.parametrize("case", range(6))
@pytest.mark.parametrize("shape", [(64, 512), (64, 2048), (64, 8192), (128, 512), (128, 2048), (256, 512), (256, 8192)])
def test_dominating_columns_at_twenty_seeds(shape, case, device):
    """Where the interpreter takes seconds a seed, the 20 seeds are dealt to the six cases."""
    quick = device == "cuda" or shape[0] * shape[1] <= 2 ** 16
    for seed in range(20):
        impls = [impl for impl in IMPLS if impl != "unseen"] if quick or seed % 6 == case else ["torch"]
        check_dominated(shape, *CASES[case], seed, impls, device)


def counted(monkeypatch, name):
    """A list that grows with each call of that function of covariance.py."""
    calls, function = [], getattr(covariance, name)
    monkeypatch.setattr(covariance, name, lambda *arguments: calls.append(name) or function(*arguments))
    return calls


@pytest.mark.parametrize("std, taken_out", [(1., 0), (2e-4, 0), (5e3, 0), (5e-5, 1), (2e4, 1)])
def test_on_a_cpu_columns_are_taken_out_where_any_are_large_or_squares_would_overflow(std, taken_out, monkeypatch):
    z = std * torch.randn(24, 400, generator=torch.Generator().manual_seed(0))
    calls = counted(monkeypatch, "_with_dominant")
    got, truth = run(variance_covariance, z, impl="torch"), run(facebookresearch_form, z.double())
    assert len(calls) == taken_out and max(errors(got, truth)) < 2e-6


@pytest.mark.parametrize("large, taken_out", [(4, 0), (40, 1)])
def test_on_a_cpu_columns_are_taken_out_where_one_is_large(large, taken_out, monkeypatch):
    """One column of 400: eight such would hold less than half of the variance, or more."""
    z = torch.randn(24, 400, generator=torch.Generator().manual_seed(0))
    z[:, 7] *= large
    calls = counted(monkeypatch, "_with_dominant")
    got, truth = run(variance_covariance, z, impl="torch"), run(facebookresearch_form, z.double())
    assert len(calls) == taken_out and max(errors(got, truth)) < 3e-6


def test_on_a_cpu_columns_are_taken_out_where_the_diagonal_is_nearly_all(monkeypatch):
    """Twenty large columns that do not correlate: what is subtracted is nearly all there is."""
    g = torch.Generator().manual_seed(0)
    z = .1 * torch.randn(64, 400, generator=g)
    z[:, :20] += torch.linalg.qr(torch.randn(64, 20, generator=g))[0] * 8
    calls = counted(monkeypatch, "_with_dominant")
    got, truth = run(variance_covariance, z, impl="torch"), run(facebookresearch_form, z.double())
    assert len(calls) == 1 and max(errors(got, truth)) < 2e-5


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gradient_of", [(1., 0.), (0., 1.)])
def test_dominating_columns_each_get_their_own_gradient(gradient_of, impl, device):
    """Column by column: in a norm over all of them the small ones would not show."""
    z = dominated(40, 200, 3, 1e4, 0).to(device)
    truth = run(variance_covariance, z.double(), gradient_of, side="covariance")[-1]
    got = run(variance_covariance, z, gradient_of, side="gram", impl=impl)[-1]
    size = truth.norm(dim=0).clamp(min=1e-30)
    off = (got.double() - truth).norm(dim=0) / size
    assert off.max() < 1e-4


@pytest.mark.parametrize("shape", [(2, 3), (2, 40), (5, 12), (9, 8), (3, 1)])
def test_as_many_columns_as_are_taken_out_or_fewer(shape, embeddings):
    z = embeddings(*shape)
    truth = run(facebookresearch_form, z.double())
    assert max(errors(run(variance_covariance, z.double(), side="gram"), truth)) < 1e-10
    assert max(errors(run(variance_covariance, z, side="gram"), truth)) < 1e-5


def test_equal_columns(embeddings):
    """All variances are equal, so that any of them may be taken out."""
    z = embeddings(20, 1).expand(20, 60)
    truth = run(facebookresearch_form, z.double())
    assert max(errors(run(variance_covariance, z, side="gram"), truth)) < 1e-5


@pytest.mark.parametrize("side", ["auto", "gram", "covariance"])
@pytest.mark.parametrize("shape", [(4, 9), (6, 6), (9, 4)])
def test_gradcheck(shape, side, embeddings):
    z = embeddings(*shape).double().requires_grad_()
    assert gradcheck(lambda z: variance_covariance(z, gamma=1.1, side=side), z)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_at_most_twice_that_of_the_fp32_reference(shape, impl, embeddings, floor, nan_poisoned):
    ours, reference = [], []
    for seed in range(8):
        z = embeddings(*shape, seed)
        truth = run(facebookresearch_form, z.double())
        ours.append(errors(run(variance_covariance, nan_padded(z), impl=impl), truth))
        reference.append(errors(run(variance_covariance, z, impl="reference"), truth))
    ours, reference = (torch.tensor(e).square().mean(0).sqrt() for e in (ours, reference))      # rms over seeds
    assert (ours <= (2 * reference).clamp(min=floor(impl))).all(), (ours, reference)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("side", ["gram", "covariance"])
def test_a_side_can_be_forced_and_strides_do_not_matter(impl, side, nan_poisoned, embeddings):
    for shape in [(40, 70), (70, 40)]:
        z = embeddings(*shape)
        truth = run(facebookresearch_form, z.double())
        for layout in (z, z.T.contiguous().T, nan_padded(z), z.repeat_interleave(2, dim=1)[:, ::2]):
            assert all(e < 3e-6 for e in errors(run(variance_covariance, layout, impl=impl, side=side), truth))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(20, 64), (64, 20)])
def test_half_precision_input_is_computed_in_fp32(dtype, impl, shape, embeddings):
    z = embeddings(*shape).to(dtype)
    truth = run(facebookresearch_form, z.double())
    variance, covariance, gradient = run(variance_covariance, z, impl=impl)
    assert variance.dtype == covariance.dtype == torch.float32 and gradient.dtype == dtype
    assert all(e < 1e-6 for e in errors((variance, covariance), truth))
    assert errors([gradient], truth[2:])[0] < torch.finfo(dtype).eps


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(20, 64), (64, 20)])
def test_autocast_changes_nothing(shape, impl, device, embeddings):
    z = embeddings(*shape)
    plain = run(variance_covariance, z, impl=impl)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = run(variance_covariance, z, impl=impl)          # forward and backward both
    assert all(torch.equal(a, b) for a, b in zip(plain, inside))


@pytest.mark.parametrize("impl", IMPLS)
def test_two_runs_agree_to_the_bit(impl, embeddings):
    for shape in [(24, 100), (100, 24)]:
        z = embeddings(*shape)
        assert all(torch.equal(a, b) for a, b in zip(*(run(variance_covariance, z, impl=impl) for _ in range(2))))


@pytest.mark.skipif(triton is None, reason="needs triton")
def test_offsets_are_64_bit(device, embeddings):
    """Row 2 starts past 2^31 elements. But for three rows the storage is never touched: it costs address space only."""
    z = room(2 ** 31 + 32, device).as_strided((3, 8), (2 ** 30 + 7, 1))
    z.copy_(embeddings(3, 8))
    same = z.contiguous()
    assert all(torch.equal(a, b) for a, b in zip(run(variance_covariance, same, impl="triton"),
                                                 run(variance_covariance, z, impl="triton")))


@pytest.mark.parametrize("shape", [(64, 2048), (256, 2048), (600, 1100), (512, 512), (2048, 256)])
def test_extra_memory_is_about_three_times_the_input(shape, device, embeddings):
    z = embeddings(*shape)
    if device == "cuda":
        run(variance_covariance, z)                   # what is allocated once and for all
    assert peak_memory(lambda: run(variance_covariance, z), device) <= 3.2 * z.numel() * 4


@pytest.mark.parametrize("shape", [(16, 64), (64, 16)])
def test_inside_torch_compile(shape, embeddings):
    z = embeddings(*shape)
    compiled = torch.compile(lambda z: variance_covariance(2 * z), fullgraph=True)
    assert all(e < 1e-6 for e in errors(run(compiled, z), run(lambda z: variance_covariance(2 * z), z.double())))


def test_a_double_backward_says_there_is_none(embeddings):
    z = embeddings(8, 4).requires_grad_()
    with pytest.raises(RuntimeError, match="no double backward.*impl='reference'"):
        torch.autograd.grad(sum(variance_covariance(z)), z, create_graph=True)
    gradient, = torch.autograd.grad(sum(variance_covariance(z, impl="reference")), z, create_graph=True)
    gradient.square().sum().backward()
    assert z.grad.abs().sum() > 0


@pytest.mark.parametrize("z, words", [
    (torch.zeros(1, 8), r"\[1, 8\].*larger batch"), (torch.zeros(8), r"\[8\]"), (torch.zeros(2, 3, 4), "flatten"),
    (torch.zeros(4, 4, dtype=torch.int64), r"int64.*\.float\(\)"), (torch.zeros(4, 0), r"D >= 1")])
def test_bad_input_is_named(z, words):
    with pytest.raises(ValueError, match=words):
        variance_covariance(z)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="impl='cuda'"):
        variance_covariance(torch.zeros(4, 4), impl="cuda")
    with pytest.raises(ValueError, match="side='rows'"):
        variance_covariance(torch.zeros(4, 4), side="rows")
    with pytest.raises(ValueError, match="impl='triton'"):
        variance_covariance(torch.zeros(4, 4).double(), impl="triton")


def test_nan_input_gives_nan_output(embeddings):
    z = embeddings(20, 8)
    z[3, 5] = torch.nan
    for impl in IMPLS:
        assert all(t.isnan() for t in variance_covariance(z, impl=option(impl)))


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_and_too_large_gradients_come_out_of_the_gram_side(impl, device):
    """As a loss scaler wants them: inf or NaN, which it skips, and no error."""
    z = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(device)
    for upstream in ((0., 1e30), (0., torch.inf), (0., torch.nan)):
        assert not run(variance_covariance, 1e6 * z, upstream, impl=impl)[-1].isfinite().any()
    assert not run(variance_covariance, 1e18 * z[:, :8].T, (0., 65536.), impl=impl)[-1].isfinite().any()
    z[3, 5] = torch.nan
    *terms, gradient = run(variance_covariance, z, impl=impl)
    assert all(t.isnan() for t in terms) and gradient.isnan().any()


def test_without_triton_everything_but_the_triton_path_works():
    code = """if True:
        import sys
        sys.modules["triton"] = None                  # makes `import triton` raise ImportError
        import torch
        from kernels import variance_covariance
        z = torch.randn(9, 5, requires_grad=True)
        sum(variance_covariance(z)).backward()
        assert z.grad.isfinite().all()
        try:
            variance_covariance(z, impl="triton")
        except ValueError as error:
            assert "triton" in str(error)
            print("as it should be")
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.stdout == "as it should be\n", done.stderr


@pytest.mark.parametrize("impl", IMPLS)
def test_two_passes_keep_the_variance_of_features_far_from_zero(impl, device):
    """At mean 30, std .05 the one-pass form E[x^2] - E[x]^2 is 12 % wrong in fp32."""
    g = torch.Generator().manual_seed(0)
    z = (30 + .05 * torch.randn(4096, 8, generator=g)).to(device)
    truth, _ = variance_covariance(z.double())
    got, _ = variance_covariance(z, impl=option(impl))
    assert abs(got - truth) / truth < 1e-6
    one_pass = (z.square().mean(0) - z.mean(0).square()) * 4096 / 4095
    assert ((one_pass - z.double().var(0)).abs() / z.double().var(0)).max() > .05


@pytest.mark.parametrize("name", ["gamma", "eps"])
def test_a_tensor_that_would_get_no_gradient_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be a number"):
        variance_covariance(torch.zeros(4, 4), **{name: torch.tensor(1., requires_grad=True)})


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("side", ["gram", "covariance"])
@pytest.mark.parametrize("std", [4e-20, 1e-15, 1e-9, 1e9, 1e10, 1e15])
def test_at_extreme_scales_it_is_finite_where_the_reference_is(std, side, impl, device, nan_poisoned):
    """Each value and gradient: as the fp32 reference where that overflows, else as float64 says."""
    z = std * torch.randn(12, 40, generator=torch.Generator().manual_seed(0)).to(device)
    for upstream in ((1., 0.), (0., 1.)):
        truth = run(variance_covariance_reference, z.double(), upstream)
        plain = run(variance_covariance_reference, z, upstream)
        got = run(variance_covariance, z, upstream, side=side, impl=impl)
        for own, form, true in zip(got, plain, truth):
            if form.isfinite().all():
                off = (own.double() - true).norm()
                assert off <= 1e-5 * true.norm() + torch.finfo(torch.float32).tiny * own.numel(), (upstream, own, true)
            else:
                assert own.isinf() if own.ndim == 0 else not own.isfinite().all()


def test_torch_func_is_refused_in_a_line_and_the_reference_takes_it():
    z = torch.randn(3, 12, 5, generator=torch.Generator().manual_seed(0))

    def loss(z, impl):
        return sum(variance_covariance(z, impl=impl))

    for transform in (torch.func.grad, torch.func.vmap):
        with pytest.raises(RuntimeError, match="torch.func.*use impl='reference'"):
            transform(lambda z: loss(z, "torch"))(z if transform is torch.func.vmap else z[0])
    each = torch.func.vmap(torch.func.grad(lambda z: loss(z, "reference")))(z)
    for one, got in zip(z, each):
        expected, = torch.autograd.grad(loss(own := one.clone().requires_grad_(), "torch"), own)
        torch.testing.assert_close(got, expected)
