"""kernels/dictionary.py against float64 and the plain form: values, gradients, extreme logits, memory, the signs."""
import math

import numpy as np
import pytest
import torch

from judge import error, nan_padded
from kernels import dictionary
from kernels.benchmark import peak_memory
from kernels.dictionary import dictionary_loss, dictionary_reference, dictionary_signs
from kernels.launch import INTERPRETED, triton

SHAPES = [(1, 1, 2), (2, 40, 33), (5, 7, 1), (33, 20, 130), (70, 65, 33), (8, 70, 100)]                  # n, f, c
IMPLS = ["torch", "blocks"] + ["triton"] * (triton is not None)           # blocks: as many codes want
PRIORS = ["reverse", "forward"]


@pytest.fixture
def views(device):
    """Function (n, f, seed) -> features as a tanh makes them, of two views that agree in part, in float64."""
    def features(n, f, seed=0):
        a, b = torch.randn(2, n, f, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return [h.tanh().to(device) for h in (a, a + .3 * b)]
    return features


@pytest.fixture(autouse=True)
def no_code_fits(request, monkeypatch):
    """For "blocks": a CPU's form for many codes, at few."""
    if hasattr(request.node, "callspec") and request.node.callspec.params.get("impl") == "blocks":
        monkeypatch.setattr(dictionary, "_is_small", lambda h, codes: False)


def option(impl):
    return "torch" if impl == "blocks" else impl


def released_temperature(n, f):
    return f / (math.sqrt(n) * math.log(1e8))


def plain(c, seed, temperature, prior):
    def function(h1, h2):
        return dictionary_reference(h1, h2, dictionary_signs(c, h1.shape[1], seed, h1.dtype, h1.device), temperature,
                                    prior)
    return function


def streamed(c, seed, temperature, prior, impl):
    return lambda h1, h2: dictionary_loss(h1, h2, c, seed, temperature, prior, option(impl))


def run(function, h, upstream=(1.3, -.7), wanted=(True, True)):
    """prior, cross-entropy, and the gradient of their sum with upstream weights."""
    h = [x.detach().requires_grad_(want) for x, want in zip(h, wanted)]
    values = function(*h)
    sum(u * v for u, v in zip(upstream, values)).backward()
    return [*(v.detach() for v in values), *(x.grad for x in h)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("softer", [1, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_at_most_twice_that_of_the_fp32_reference(shape, softer, prior, impl, views, floor, nan_poisoned):
    n, f, c = shape
    t, ours, theirs, least = softer * released_temperature(n, f), [], [], []
    for seed in range(3):
        h = views(n, f, seed)
        single = [x.float() for x in h]
        h = [x.double() for x in single]
        truth = run(plain(c, seed, t, prior), h)
        ours.append([error(g, x) for g, x in zip(
            run(streamed(c, seed, t, prior, impl), [nan_padded(x) for x in single]), truth)])
        theirs.append([error(g, x) for g, x in zip(run(plain(c, seed, t, prior), single), truth)])
        # the prior is a difference of logarithms as large as log c, and their rounding stays when it is small
        least.append([floor(impl) * max(1., math.log(c) / (truth[0].abs().item() or 1)), *3 * [floor(impl)]])
    ours, theirs, least = (torch.tensor(e).square().mean(0).sqrt() for e in (ours, theirs, least))  # rms over seeds
    assert (ours <= torch.maximum(2 * theirs, least)).all(), (ours, theirs, least)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter, in which one can round otherwise")
def test_products_that_round_towards_zero_cost_no_digits(views, monkeypatch):
    """As accumulators of NVIDIA's tensor cores do (Ootomo, Yokota 2022): sixteen products, then the sum is cut to fp32. A
    sum of thousands left to them would shrink: here to 3.5 times the error of the plain form."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self, a, b, d, *options):
        total = d.data
        for k in range(0, a.data.shape[1], 16):
            wide = total.astype(np.float64) + a.data[:, k:k + 16].astype(np.float64) @ b.data[k:k + 16].astype(np.float64)
            near = wide.astype(np.float32)
            total = np.where(np.abs(near) > np.abs(wide), np.nextafter(near, np.float32(0)), near)
        return TensorHandle(total, d.dtype.scalar)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    n, f, c = 16, 2048, 100
    t = 4 * released_temperature(n, f)
    single = [x.float() for x in views(n, f)]
    truth = run(plain(c, 0, t, "reverse"), [x.double() for x in single])
    ours = [error(g, x) for g, x in zip(run(streamed(c, 0, t, "reverse", "triton"), single), truth)]
    theirs = [error(g, x) for g, x in zip(run(plain(c, 0, t, "reverse"), single), truth)]
    assert max(ours[2:]) < 2 * max(theirs[2:]), (ours, theirs)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_streamed_equals_the_plain_form(prior, dtype, bound, views):
    h, t = [x.to(dtype) for x in views(64, 256)], 4 * released_temperature(64, 256)
    for got, want in zip(run(streamed(4096, 1, t, prior, "torch"), h), run(plain(4096, 1, t, prior), h)):
        assert got.dtype == dtype and error(got, want.double()) < bound


@pytest.mark.parametrize("impl", ["torch", "blocks"])
@pytest.mark.parametrize("prior", PRIORS)
def test_gradcheck(prior, impl, views):
    h = [x.requires_grad_() for x in views(3, 5)]
    assert torch.autograd.gradcheck(streamed(7, 0, 1., prior, impl), h)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_one_view_may_be_detached(impl, wanted, views):
    h = [x.float() for x in views(6, 9)]
    both, one = (run(streamed(20, 0, 2., "reverse", impl), h, wanted=w) for w in ((True, True), wanted))
    for whole, part, want in zip(both[2:], one[2:], wanted):
        assert torch.equal(whole, part) if want else part is None


@pytest.mark.parametrize("impl", IMPLS)
def test_slopes_made_in_several_pieces(impl, monkeypatch, views):
    if impl == "triton":
        monkeypatch.setattr(dictionary, "WORKSPACE", 1000)               # 41 codes at a time
    h, t = views(12, 20), 2.
    truth = run(plain(700, 3, t, "reverse"), h)
    for got, want in zip(run(streamed(700, 3, t, "reverse", impl), [x.float() for x in h]), truth):
        assert error(got, want) < 1e-5


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("prior", PRIORS)
def test_logits_of_150_give_no_nan(impl, prior, device):
    """Every code but a few underflows in every row: from probabilities, 0 log 0."""
    signs = dictionary_signs(500, 64, 0, device=device)
    h, t = [signs[:8].clone(), signs[[0, 1, 2, 3, 4, 5, 6, 9]].clone()], 64 / 150
    got = run(streamed(500, 0, t, prior, impl), h)
    truth = run(plain(500, 0, t, prior), [x.double() for x in h])
    assert all(g.isfinite().all() for g in got)
    assert all(error(g, x) < 1e-5 for g, x in zip(got, truth))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_is_accumulated_in_fp32(impl, dtype, device, views):
    h, function = [x.to(dtype) for x in views(9, 16)], streamed(80, 0, 2., "reverse", impl)
    truth = run(plain(80, 0, 2., "reverse"), [x.double() for x in h])
    got = run(function, h)
    assert got[0].dtype == got[1].dtype == torch.float32 and got[2].dtype == got[3].dtype == dtype
    assert max(error(g, x) for g, x in zip(got[:2], truth)) < 1e-5
    assert max(error(g, x) for g, x in zip(got[2:], truth[2:])) < torch.finfo(dtype).eps
    with torch.autocast(device, dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(run(function, h), got))


@pytest.mark.parametrize("impl", IMPLS)
def test_two_runs_agree_to_the_bit(impl, views):
    h = [x.float() for x in views(20, 8)]
    runs = [run(streamed(300, 0, 1., "reverse", impl), h) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_signs_are_fair_independent_and_for_ever_the_same(device):
    def dictionary_signs(*options):
        return dictionary.dictionary_signs(*options, device=device)
    W = dictionary_signs(4096, 256, 7)
    assert set(W.unique().tolist()) == {-1., 1.} and abs(W.mean()) < 4 / math.sqrt(W.numel())
    for one, other in [(W, dictionary_signs(4096, 256, 8)), (W[1:], W[:-1]), (W[:, 1:], W[:, :-1]),
                       (W[:, 32:], W[:, :-32])]:                         # seeds, codes, bits, words
        assert abs((one * other).mean()) < 4 / math.sqrt(one.numel())
    cosine = (W[:1000] @ W[:1000].T / 256).fill_diagonal_(0)
    assert cosine.square().mean().item() == pytest.approx(1 / 256, rel=.01)
    assert torch.equal(dictionary_signs(10, 256, 7), W[:10]) and torch.equal(dictionary_signs(9, 250, 7), W[:9, :250])
    word = sum((dictionary_signs(3, 40, 2 ** 40 + 5) > 0)[2, k].item() << k for k in range(32))
    x = (4 * 0x9E3779B1 + (2 ** 40 + 5) * 0x85EBCA6B) % 2 ** 32          # two words a code: the fourth hash
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = (x ^ x >> shift) * factor % 2 ** 32
    assert word == x


def test_memory_at_a_quarter_million_codes(monkeypatch, views):
    """On a CPU: a third of the plain form's with the logarithms kept, a tenth where they are too many to keep."""
    h, t, c = [x.float().cpu() for x in views(64, 256)], 4 * released_temperature(64, 256), 262_144
    W = dictionary_signs(c, 256, 0)
    function = streamed(c, 0, t, "reverse", "torch")
    function(*h)                                                         # the dictionary is held from now on
    theirs = peak_memory(lambda: run(lambda *h: dictionary_reference(*h, W, t), h))
    kept = peak_memory(lambda: run(function, h))
    monkeypatch.setattr(dictionary, "KEEP", 0)
    streams = peak_memory(lambda: run(function, h))
    assert theirs > 4 * (4 * 64 * c)
    assert kept < .34 * theirs
    assert streams < .1 * theirs


@pytest.mark.parametrize("impl", ["torch", "blocks"])
@pytest.mark.parametrize("prior", PRIORS)
def test_keeping_the_logarithms_changes_nothing(prior, impl, monkeypatch, views):
    h, t = [x.float() for x in views(20, 30)], 2.
    kept = run(streamed(900, 0, t, prior, impl), h)
    monkeypatch.setattr(dictionary, "KEEP", 0)
    for one, other in zip(kept, run(streamed(900, 0, t, prior, impl), h)):
        assert error(one, other.double()) < 1e-6


def test_bad_input_is_named(device):
    h = torch.zeros(4, 8, device=device)
    for call, words in [
            (lambda: dictionary_loss(h, h[:3], 9, 0, 1), r"h1 \[4, 8\] and h2 \[3, 8\]"),
            (lambda: dictionary_loss(h.long(), h, 9, 0, 1), "h1 torch.int64"),
            (lambda: dictionary_loss(h, h.to("meta"), 9, 0, 1), "h2 on meta"),
            (lambda: dictionary_loss(h, h, 0, 0, 1), "codes 0 must be at least 1"),
            (lambda: dictionary_loss(h, h, 9, -1, 1), "seed -1"),
            (lambda: dictionary_loss(h, h, 9, 0, 0), "temperature 0"),
            (lambda: dictionary_loss(h, h, 9, 0, 1, "uniform"), "prior='uniform'"),
            (lambda: dictionary_loss(h, h, 9, 0, 1, impl="cuda"), "impl='cuda'")]:
        with pytest.raises(ValueError, match=words):
            call()


def test_a_double_backward_says_there_is_none(device):
    h = torch.randn(4, 8, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(dictionary_loss(h, h.detach(), 9, 0, 1.)[0], h, create_graph=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_learnable_temperature_gets_its_gradient(impl, device, views):
    h = [x.float() for x in views(6, 9)]
    W = dictionary_signs(20, 9, 0, device=device)
    def gradient(function, dtype):
        t = torch.tensor(2., dtype=dtype, device=device, requires_grad=True)
        sum(function(*[x.to(dtype) for x in h], t)).backward()
        return t.grad
    truth = gradient(lambda a, b, t: dictionary_reference(a, b, W.double(), t), torch.float64)
    assert error(gradient(lambda a, b, t: dictionary_loss(a, b, 20, 0, t, impl=option(impl)), torch.float32), truth) < 1e-5
    if impl != "triton":
        assert error(gradient(lambda a, b, t: dictionary_loss(a, b, 20, 0, t), torch.float64), truth) < 1e-12


@pytest.mark.parametrize("impl", IMPLS)
def test_inside_torch_compile(impl, views):
    """One graph; the held dictionary is not made again by it."""
    h = [x.float() for x in views(6, 9)]
    function = streamed(20, 0, 2., "reverse", impl)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, want in zip(run(compiled, h), run(function, h)):
        assert error(got, want.double()) < 1e-6
    dictionary._held.cache_clear()
    run(compiled, h)
    run(compiled, h)
    assert dictionary._held.cache_info().misses <= 1


def test_mixed_dtypes_compute_in_the_wider_one(views):
    a, b = views(6, 9)
    a = a.float()
    mixed = dictionary_loss(a, b, 20, 0, 2.)
    wide = dictionary_loss(a.double(), b, 20, 0, 2.)
    for got, want in zip(mixed, wide):
        assert got.dtype == torch.float64
        assert torch.equal(got, want)
    if triton is not None:
        with pytest.raises(ValueError, match="at most fp32"):
            dictionary_loss(a, b, 20, 0, 2., impl="triton")


@pytest.mark.parametrize("kind", ["int8", "int32", "uint32", "int64"])
def test_seed_and_codes_may_be_integers_of_numpy(kind):
    import numpy
    number = numpy.dtype(kind).type
    h1, h2 = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    expected = dictionary_loss(h1, h2, 40, 5, .2)
    for got, value in zip(dictionary_loss(h1, h2, number(40), number(5), .2), expected):
        assert torch.equal(got, value)
    assert torch.equal(dictionary_signs(40, 16, number(5)), dictionary_signs(40, 16, 5))


# ---- What a difference of large numbers loses ------------------------------------------------------------------
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [1e-3, 1e-4])
def test_gradients_at_low_temperatures_are_autograds(temperature, impl, prior, keep, device, monkeypatch):
    """15 images: their number is no power of 2, whose logarithm any logit holds. Logits of 1e4 and more."""
    monkeypatch.setattr(dictionary, "KEEP", dictionary.KEEP * keep)
    h = torch.randn(2, 15, 32, generator=torch.Generator().manual_seed(0)).to(device)
    h = torch.nn.functional.normalize(torch.stack([h[0], h[0] + .05 * h[1]]), dim=2)
    W = dictionary_signs(256, 32, 0, device=device)
    for upstream in ((1., 0.), (0., 1.)):
        truth = run(lambda a, b: dictionary_reference(a, b, W.double(), temperature, prior), h.double(), upstream)
        plain = run(lambda a, b: dictionary_reference(a, b, W, temperature, prior), h, upstream)
        got = run(streamed(256, 0, temperature, prior, impl), h, upstream)
        for ours, form, true in zip(got, plain, truth):
            assert error(ours, true) <= 2 * error(form, true) + 1e-6


@pytest.mark.parametrize("rarest", [-100, -112, -116, -119, -125])
@pytest.mark.parametrize("prior", PRIORS)
def test_rare_codes_cost_nothing_where_a_loss_is_scaled(prior, rarest):
    """log2 p of the rarest code at or above what fp32 holds of p itself; upstream as a loss scaler begins."""
    h = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))[:1] + .001 * torch.randn(
        2, 4, 64, generator=torch.Generator().manual_seed(1))
    W = dictionary_signs(64, 64, 0)
    spread = (torch.log_softmax(h.double() @ W.double().T, dim=2) / math.log(2)).min()
    h = h * (rarest / spread).item()
    upstream = 65536., 65536.
    truth = run(lambda a, b: dictionary_reference(a, b, W.double(), 1., prior), h.double(), upstream)
    plain = run(lambda a, b: dictionary_reference(a, b, W, 1., prior), h, upstream)
    got = run(streamed(64, 0, 1., prior, "torch"), h, upstream)
    for ours, form, true in zip(got, plain, truth):
        assert error(ours, true) <= 2 * error(form, true) + 1e-6


def test_torch_func_is_refused_in_a_line_and_the_reference_takes_it(views):
    h = [x.float() for x in views(6, 9)]
    for transform in (torch.func.grad, torch.func.vmap):
        with pytest.raises(RuntimeError, match="torch.func.*use dictionary_reference"):
            transform(lambda a: dictionary_loss(a, a, 20, 0, 2.)[0])(h[0] if transform is torch.func.grad else h[0][None])
    W = dictionary_signs(20, 9, 0, device=h[0].device)
    each = torch.func.vmap(torch.func.grad(lambda a: sum(dictionary_reference(a, h[1], W, 2.))))(h[0][None])
    expected, = torch.autograd.grad(sum(dictionary_loss(own := h[0].clone().requires_grad_(), h[1], 20, 0, 2.)), own)
    torch.testing.assert_close(each[0], expected)
