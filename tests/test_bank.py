"""kernels/bank.py against float64: values, gradients for every combination of requires_grad, memory."""
import pytest
import torch
import torch.nn.functional as F

import kernels
from judge import error, nan_padded, room
from kernels.benchmark import peak_memory
from kernels.bank import (bank_cross_entropy, bank_logsumexp, bank_reference, bank_repulsion, bank_topk,
                          triton, unit_rows)

SHAPES = [(1, 1, 1), (1, 7, 3), (5, 130, 16), (33, 65, 20), (70, 64, 33), (17, 600, 5), (40, 90, 150)]     # B, N, d
IMPLS = ["torch"] + ["triton"] * (triton is not None)


@pytest.fixture
def unit(device):
    """Function (n, d, seed) -> n rows of length 1, where kernels are tested."""
    def rows(n, d, seed=0):
        return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed))).to(device)
    return rows


@pytest.fixture
def indices(device):
    """Function (b, n) -> a target and another row to exclude for each query."""
    def rows(b, n):
        target = torch.arange(b, device=device) * 7 % n
        return target, (target + 1) % n if n > 1 else None
    return rows


def reference(name):
    def function(q, bank, target, exclude, temperature):
        lse, cross_entropy, repulsion = bank_reference(q, bank, temperature, target, exclude)
        return {"logsumexp": lse.mean(), "cross_entropy": cross_entropy, "repulsion": repulsion}[name]
    return function


def streamed(name, impl):
    def function(q, bank, target, exclude, temperature):
        if name == "logsumexp":
            return bank_logsumexp(q, bank, temperature, exclude, impl=impl).mean()
        if name == "cross_entropy":
            return bank_cross_entropy(q, bank, target, temperature, exclude, impl=impl)
        return bank_repulsion(q, bank, exclude, impl=impl)
    return function


def run(function, q, bank, *options, wanted=(True, True), upstream=-1.7):
    q, bank = (x.detach().requires_grad_(want) for x, want in zip((q, bank), wanted))
    value = function(q, bank, *options)
    if any(wanted):
        value.backward(torch.full_like(value, upstream))
    return value.detach(), q.grad, bank.grad


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["logsumexp", "cross_entropy", "repulsion"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("leave_out", [False, True])
def test_error_is_at_most_twice_that_of_the_fp32_reference(shape, name, impl, leave_out, unit, indices, floor,
                                                           nan_poisoned):
    b, n, d = shape
    target, exclude = indices(b, n)
    if leave_out and exclude is None:
        pytest.skip("one row cannot be left out of one")
    ours, theirs = [], []
    for seed in range(4):
        q, bank = unit(b, d, seed), unit(n, d, seed + 10)
        options = target, exclude if leave_out else None, .1
        truth = run(reference(name), q.double(), bank.double(), *options)
        ours.append([error(g, t) for g, t in zip(run(streamed(name, impl), nan_padded(q), nan_padded(bank), *options),
                                                 truth)])
        theirs.append([error(g, t) for g, t in zip(run(reference(name), q, bank, *options), truth)])
    ours, theirs = (torch.tensor(e).square().mean(0).sqrt() for e in (ours, theirs))               # rms over seeds
    assert (ours <= (2 * theirs).clamp(min=floor(impl))).all(), (ours, theirs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["logsumexp", "cross_entropy", "repulsion"])
@pytest.mark.parametrize("wanted", [(False, False), (True, False), (False, True), (True, True)])
def test_each_combination_of_requires_grad(name, impl, wanted, unit, indices):
    q, bank = unit(9, 8), unit(50, 8, 1)
    options = *indices(9, 50), .2
    truth = run(reference(name), q.double(), bank.double(), *options)
    got = run(streamed(name, impl), q, bank, *options, wanted=wanted)
    for g, t, want in zip(got, truth, (True, *wanted)):
        assert (g is not None) == want and (not want or error(g, t) < 3e-6)


@pytest.mark.parametrize("name", ["logsumexp", "cross_entropy", "repulsion"])
def test_gradcheck(name, unit, indices):
    q, bank = (x.double().requires_grad_() for x in (unit(4, 3), unit(6, 3, 1)))
    assert torch.autograd.gradcheck(lambda q, bank: streamed(name, "torch")(q, bank, *indices(4, 6), .3), (q, bank))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["logsumexp", "repulsion"])
@pytest.mark.parametrize("leave_out", [False, True])
def test_all_pairs_of_one_tensor(name, impl, leave_out, unit):
    """q and bank the same tensor: the gradient is the sum of both roles'."""
    bank = unit(70, 6)
    exclude = torch.arange(70, device=bank.device) if leave_out else None
    def gradient(function, x):
        x = x.detach().requires_grad_()
        function(x, x, None, exclude, .2).backward()
        return x.grad
    assert error(gradient(streamed(name, impl), bank), gradient(reference(name), bank.double())) < 3e-6


def test_reference_is_the_textbook(unit, indices):
    q, bank, (target, _) = unit(6, 4).double(), unit(9, 4, 1).double(), indices(6, 9)
    lse, cross_entropy, repulsion = bank_reference(q, bank, .1, target)
    assert torch.allclose(cross_entropy, F.cross_entropy(q @ bank.T / .1, target))
    assert torch.allclose(repulsion, (q @ bank.T).clamp(min=0).square().mean())
    assert torch.allclose(lse, torch.logsumexp(q @ bank.T / .1, 1))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [.01, .003])
def test_low_temperatures_duplicates_and_collapsed_banks(impl, temperature, unit, indices):
    q = unit(5, 8)
    for bank in (q.repeat(30, 1), unit(1, 8, 1).expand(150, 8), -q[:1].expand(150, 8)):
        truth = run(reference("cross_entropy"), q.double(), bank.double(), *indices(5, 150), temperature)
        got = run(streamed("cross_entropy", impl), q, bank, *indices(5, 150), temperature)
        assert all(g.isfinite().all() for g in got)
        assert (got[0].double() - truth[0]).abs() < 1e-6 / temperature


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_is_accumulated_in_fp32(impl, dtype, device, unit, indices):
    q, bank, options = unit(9, 16).to(dtype), unit(80, 16, 1).to(dtype), (*indices(9, 80), .1)
    truth = run(reference("cross_entropy"), q.double(), bank.double(), *options)
    value, dq, dm = run(streamed("cross_entropy", impl), q, bank, *options)
    assert value.dtype == torch.float32 and dq.dtype == dm.dtype == dtype
    assert error(value, truth[0]) < 1e-6 and max(error(dq, truth[1]), error(dm, truth[2])) < torch.finfo(dtype).eps
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(run(streamed("cross_entropy", impl), q, bank, *options)[1], dq)


@pytest.mark.parametrize("impl", IMPLS)
def test_two_runs_agree_to_the_bit(impl, unit, indices):
    runs = [run(streamed("cross_entropy", impl), unit(20, 8), unit(300, 8, 1), *indices(20, 300), .1) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("b, n, k", [(1, 1, 1), (3, 10, 10), (40, 20_000, 5), (600, 900, 5), (3, 1200, 700)])
@pytest.mark.parametrize("chunk", [1, kernels.bank.TOPK_CHUNK])
def test_topk_is_exact(b, n, k, chunk, unit, monkeypatch):
    """Also where it is merged from many chunks, of fewer rows than are asked for, and for more queries than it takes at once."""
    monkeypatch.setattr(kernels.bank, "TOPK_CHUNK", chunk)
    monkeypatch.setattr(kernels.bank, "_chunk_rows", lambda q: 512)
    q, bank = unit(b, 8), unit(n, 8, 1)
    values, rows = bank_topk(q, bank, k)
    truth = (q @ bank.T).topk(k)
    torch.testing.assert_close(values, truth.values)
    torch.testing.assert_close((q[:, None] * bank[rows]).sum(2), truth.values)
    assert all(len(set(row.tolist())) == k for row in rows)


@pytest.mark.parametrize("queries, on_a_gpu, numbers", [
    (64, False, 2 ** 21), (256, False, 2 ** 22), (10_000, True, 2 ** 26), (50_000, True, 2 ** 26)])
def test_topk_makes_no_more_products_at_a_time_than_that(queries, on_a_gpu, numbers):
    class Queries(list):
        is_cuda = on_a_gpu
    assert queries * kernels.bank._topk_rows(Queries([0] * queries)) <= numbers


def test_memory_grows_with_the_bank_not_with_batch_times_bank(device, unit, indices):
    """Detached: the same at any N. Trained: the bank's gradient beside it. Either below 5 % of one B x N matrix."""
    impl = "triton" if device == "cuda" else "torch"  # on a GPU plain torch takes chunks larger than all this
    q = unit(64, 16)
    bank = unit(400_000, 16, 1)
    sizes = (100_000, 200_000, 400_000)
    def peak(n, wanted):
        options = *indices(64, n), .1
        def call():
            return run(streamed("cross_entropy", impl), q, bank[:n], *options, wanted=wanted)
        if device == "cuda":
            call()                                    # what is allocated once and for all
        return peak_memory(call, device)
    detached = [peak(n, (True, False)) for n in sizes]
    assert max(detached) < (1.1 if device == "cuda" else 1.01) * min(detached)       # slabs by the GPU's processors
    assert detached[-1] < .05 * 4 * 64 * sizes[-1]
    for n, fixed in zip(sizes, detached):
        assert peak(n, (True, True)) - 4 * 16 * n < 1.1 * fixed


def test_kept_weights_cost_less_than_the_textbook_and_change_nothing(monkeypatch, unit, indices):
    """Up to KEEP numbers a trained bank's weights are kept on a CPU; above, made twice."""
    q, bank, *rows = (x.cpu() for x in (unit(64, 16), unit(50_000, 16, 1), *indices(64, 50_000)))
    options = *rows, .1
    ours = peak_memory(lambda: run(streamed("cross_entropy", "torch"), q, bank, *options))
    textbook = peak_memory(lambda: run(reference("cross_entropy"), q, bank, *options))
    kept = run(streamed("cross_entropy", "torch"), q, bank, *options)
    monkeypatch.setattr(kernels.bank, "KEEP", 0)
    made_again = run(streamed("cross_entropy", "torch"), q, bank, *options)
    assert 4 * 64 * 50_000 < ours < .7 * textbook
    assert torch.equal(kept[1], made_again[1])
    assert error(kept[2], made_again[2].double()) < 1e-6


def test_bad_input_is_named(device, unit):
    q, bank = unit(4, 8), unit(6, 8)
    def zeros(count, dtype=torch.int64):
        return torch.zeros(count, dtype=dtype, device=device)
    for call, words in [
            (lambda: bank_logsumexp(q, unit(6, 7), .1), r"\[4, 8\] and bank \[6, 7\]"),
            (lambda: bank_logsumexp(q, bank, 0), "temperature 0"),
            (lambda: bank_logsumexp(q.long(), bank, 1), "int64"),
            (lambda: bank_topk(q, unit(6, 7), 2), r"\[4, 8\] and bank \[6, 7\]"),
            (lambda: bank_cross_entropy(q, bank, zeros(3), 1), r"target must be int64 \[4\]"),
            (lambda: bank_repulsion(q, bank, zeros(4, torch.float32)), "exclude must be int64"),
            (lambda: bank_repulsion(q, bank[:1], zeros(4)), "one row"),
            (lambda: bank_repulsion(q, bank, impl="cuda"), "impl='cuda'"),
            (lambda: bank_topk(q, bank, 7), "k = 7.*6 rows")]:
        with pytest.raises(ValueError, match=words):
            call()


def test_rows_that_a_bank_does_not_have_are_named_on_a_cpu(unit):
    """On a GPU one would have to wait for the answer."""
    q, bank = unit(4, 8).cpu(), unit(6, 8).cpu()
    with pytest.raises(ValueError, match="target has rows 0 to 6: the bank's are 0 to 5"):
        bank_cross_entropy(q, bank, torch.tensor([0, 1, 2, 6]), 1)
    with pytest.raises(ValueError, match="exclude has rows -1 to 5"):
        bank_logsumexp(q, bank, 1, torch.tensor([0, -1, 2, 5]))


@pytest.mark.parametrize("impl", IMPLS)
def test_operands_on_different_devices_are_named(impl, unit, indices):
    """Before a kernel is handed a pointer that means nothing there."""
    q, bank, (target, exclude) = unit(4, 8), unit(6, 8), indices(4, 6)
    elsewhere = torch.device("meta")
    with pytest.raises(ValueError, match="the bank on meta"):
        bank_logsumexp(q, bank.to(elsewhere), .2, impl=impl)
    with pytest.raises(ValueError, match="target is on meta"):
        bank_cross_entropy(q, bank, target.to(elsewhere), .2, impl=impl)
    with pytest.raises(ValueError, match="exclude is on meta"):
        bank_repulsion(q, bank, exclude.to(elsewhere), impl=impl)


def test_a_double_backward_says_there_is_none(unit):
    q = unit(4, 8).requires_grad_()
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(bank_repulsion(q, unit(6, 8)), q, create_graph=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("trained", [False, True])
def test_a_learnable_temperature_gets_its_gradient(impl, trained, device, unit, indices):
    """Alone, and beside those of queries and bank."""
    q, bank, target = unit(9, 8), unit(50, 8, 1), indices(9, 50)[0]
    def gradients(function, dtype):
        leaves = [x.to(dtype).detach() for x in (q, bank, torch.tensor(.2, device=device))]
        wanted = leaves if trained else leaves[2:]
        for leaf in wanted:
            leaf.requires_grad_()
        function(*leaves).backward()
        return [x.grad for x in wanted]
    def ours(q, bank, temperature):
        return bank_cross_entropy(q, bank, target, temperature, impl=impl)
    def textbook(q, bank, temperature):
        return bank_reference(q, bank, temperature, target)[1]
    truth = gradients(textbook, torch.float64)
    for got, true in zip(gradients(ours, torch.float32), truth):
        assert error(got, true) < 3e-6
    if impl == "torch":
        for got, true in zip(gradients(ours, torch.float64), truth):
            assert error(got, true) < 1e-12


def test_a_trained_bank_may_not_change_before_the_backward(unit):
    """Its own gradient is made from it: autograd says so instead of making a wrong one."""
    q, bank = unit(9, 8), unit(50, 8, 1).requires_grad_()
    loss = bank_logsumexp(q, bank, .2).mean()
    with torch.no_grad():
        bank.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_detached_bank_may_change_before_the_backward(impl, unit, indices):
    """As MoCo's queue does, which takes its new keys first."""
    q, bank, target = unit(9, 8).requires_grad_(), unit(50, 8, 1), indices(9, 50)[0]
    expected = run(reference("cross_entropy"), q.double(), bank.double(), target, None, .2, upstream=1.)[1]
    loss = bank_cross_entropy(q, bank, target, .2, impl=impl)
    bank.zero_()
    loss.backward()
    assert error(q.grad, expected) < 3e-6


@pytest.mark.skipif(triton is None, reason="needs triton")
def test_offsets_are_64_bit_on_both_axes(device, unit, indices):
    """Rows and columns 2^30 apart, as in a transposed queue: the storage is address space, hardly touched."""
    storage = room(3 * 2 ** 30 + 64, device)
    q = unit(2, 4)
    for shape, strides in [((5, 4), (1, 2 ** 30 + 7)), ((4, 4), (2 ** 30 + 7, 1))]:
        bank = storage.as_strided(shape, strides)
        bank.copy_(unit(*shape))
        near = bank.clone(memory_format=torch.contiguous_format)
        options = *indices(2, len(bank)), .2
        for name in ("cross_entropy", "repulsion"):
            far = run(streamed(name, "triton"), q, bank, *options)
            for one, other in zip(far, run(streamed(name, "triton"), q, near, *options)):
                assert error(one, other.double()) < 1e-6


def test_mixed_dtypes_compute_in_the_wider_one(unit):
    q, bank = unit(4, 8), unit(30, 8, 1).double()
    truth = (q.double() @ bank.T).topk(3)
    values, rows = bank_topk(q, bank, 3)
    assert values.dtype == torch.float64
    assert torch.equal(rows, truth.indices)
    assert error(values, truth.values) < 1e-15
    lse = bank_logsumexp(q, bank, .2)
    assert lse.dtype == torch.float64
    assert error(lse, torch.logsumexp(q.double() @ bank.T / .2, 1)) < 1e-14
    with pytest.raises(ValueError, match="impl='triton'"):
        bank_logsumexp(q, bank, .2, impl="triton")


@pytest.mark.parametrize("impl", IMPLS)
def test_several_excluded_rows(impl, device, unit, indices):
    q, bank = unit(9, 8), unit(50, 8, 1)
    first = torch.arange(9, device=device)[:, None] * 11 % 50
    exclude = torch.cat([first, (first + 1) % 50, (first + 30) % 50], dim=1)
    options = indices(9, 50)[0], exclude, .2
    for name in ("logsumexp", "cross_entropy", "repulsion"):
        truth = run(reference(name), q.double(), bank.double(), *options)
        for got, true in zip(run(streamed(name, impl), q, bank, *options), truth):
            assert error(got, true) < 3e-6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("trained", [False, True])
def test_inside_torch_compile(impl, trained, unit, indices):
    """Forward and backward in one graph, with nothing in it that looks at a tensor's values."""
    q, bank, options = unit(9, 8), unit(50, 8, 1), (*indices(9, 50), .2)
    compiled = torch.compile(streamed("cross_entropy", impl), fullgraph=True, backend="aot_eager")
    truth = run(reference("cross_entropy"), q.double(), bank.double(), *options)
    got = run(compiled, q, bank, *options, wanted=(True, trained))
    for value, true in zip(got[:2 + trained], truth):
        assert error(value, true) < 3e-6


def test_all_pairs_inside_torch_compile(unit):
    x = unit(20, 8).requires_grad_()
    compiled = torch.compile(lambda x: bank_repulsion(x, x, "self"), fullgraph=True, backend="aot_eager")
    compiled(x).backward()
    y = x.detach().double().requires_grad_()
    bank_reference(y, y, 1., exclude=torch.arange(20, device=y.device))[2].backward()
    assert error(x.grad, y.grad) < 3e-6


# ---- Recipes: what the page shows, against the textbook ------------------------------------------------------
def test_recipe_symmetric_loss_with_a_learnable_scale(device, unit):
    """CLIP: both directions, logits times exp(log_scale)."""
    a, b = unit(12, 8).double().requires_grad_(), unit(12, 8, 1).double().requires_grad_()
    log_scale = torch.tensor(1.5, dtype=torch.float64, device=device, requires_grad=True)
    pairs = torch.arange(12, device=device)
    temperature = (-log_scale).exp()
    loss = (bank_cross_entropy(a, b, pairs, temperature) + bank_cross_entropy(b, a, pairs, temperature)) / 2
    logits = log_scale.exp() * a @ b.T
    truth = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
    leaves = a, b, log_scale
    for got, true in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, leaves)):
        assert error(got, true) < 1e-12
    assert error(loss.detach(), truth.detach()) < 1e-12


def test_recipe_several_positives(device, unit):
    """SupCon: the mean over positives of log p, each row itself left out."""
    z, row = unit(12, 8).double(), torch.arange(12, device=device)
    label = row % 3
    positives = torch.stack([row.roll(-3 * k) for k in (1, 2, 3)], dim=1)     # of the same label
    assert (label[positives] == label[:, None]).all()
    lse = bank_logsumexp(z, z, .1, "self")
    loss = (lse - (z[:, None] * z[positives]).sum(2).mean(1) / .1).mean()
    s = (z @ z.T / .1).fill_diagonal_(-torch.inf)
    log_p = s - s.logsumexp(1, keepdim=True)
    same = (label[:, None] == label) & (row[:, None] != row)
    truth = -(torch.where(same, log_p, 0.).sum(1) / same.sum(1)).mean()
    assert error(loss, truth) < 1e-12


def test_recipe_label_smoothing(unit, indices):
    q, bank, target = unit(9, 8).double(), unit(50, 8, 1).double(), indices(9, 50)[0]
    uniform = (q @ bank.mean(0) / .2).mean()
    lse = bank_logsumexp(q, bank, .2).mean()
    loss = .9 * bank_cross_entropy(q, bank, target, .2) + .1 * (lse - uniform)
    truth = F.cross_entropy(q @ bank.T / .2, target, label_smoothing=.1)
    assert error(loss, truth) < 1e-12


def test_recipe_shards_of_a_bank(unit):
    q, bank = unit(9, 8).double(), unit(50, 8, 1).double()
    shards = bank.split(17)
    lse = torch.stack([bank_logsumexp(q, shard, .2) for shard in shards]).logsumexp(0)
    assert error(lse, bank_logsumexp(q, bank, .2)) < 1e-14


# ---- What a list may hold --------------------------------------------------------------------------------------
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("times", [1, 2, 3, 8])
def test_a_row_that_is_excluded_several_times_is_left_out_once(times, impl, unit, device):
    """Padded lists repeat a row: N = 9."""
    q, bank = unit(4, 5), unit(9, 5, 1)
    once = torch.tensor([[3]] * 4, device=device)
    padded = once.expand(4, times).contiguous()
    s = q.double() @ bank.double().T
    others = torch.arange(9) != 3
    expected = s[:, others.to(device)].clamp(min=0).square().mean().item()
    assert bank_repulsion(q, bank, padded, impl=impl).item() == pytest.approx(expected, rel=1e-5)
    lse = torch.logsumexp(s[:, others.to(device)] / .2, 1)
    torch.testing.assert_close(bank_logsumexp(q, bank, .2, padded, impl=impl).double(), lse, rtol=1e-5, atol=1e-5)
    _, _, reference = bank_reference(q.double(), bank.double(), .2, exclude=padded)
    assert reference.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_excluded_list_may_repeat_up_to_all_rows_or_be_empty(impl, unit, device):
    q, bank = unit(1, 4), unit(2, 4, 1)
    twice = torch.tensor([[0, 0]], device=device)
    s = q.double() @ bank.double().T
    assert bank_repulsion(q, bank, twice, impl=impl).item() == pytest.approx(s[0, 1].clamp(min=0).item() ** 2, rel=1e-5, abs=1e-9)
    assert bank_logsumexp(q, bank, .5, twice, impl=impl).item() == pytest.approx(s[0, 1].item() / .5, rel=1e-5, abs=1e-6)
    none = torch.zeros(1, 0, dtype=torch.int64, device=device)
    for function in (lambda *exclude: bank_repulsion(q, bank, *exclude, impl=impl),
                     lambda *exclude: bank_logsumexp(q, bank, .5, *exclude, impl=impl)):
        torch.testing.assert_close(function(none), function(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="leaves nothing"):
        bank_repulsion(q, bank, torch.tensor([[0, 1, 1]], device=device), impl=impl)


def test_the_reference_with_exclude_and_a_trained_temperature_has_its_gradient(unit):
    """By central differences, and as the fused form's."""
    q, bank = unit(6, 5).double(), unit(9, 5, 1).double()
    exclude = torch.arange(6, device=q.device)[:, None]
    target = exclude[:, 0] + 1

    def value(t, function):
        return function(q, bank, t)

    def reference(q, bank, t):
        return bank_reference(q, bank, t, target, exclude)[1]

    def fused(q, bank, t):
        return bank_cross_entropy(q, bank, target, t, exclude)

    expected = (reference(q, bank, .2 + 1e-6) - reference(q, bank, .2 - 1e-6)) / 2e-6
    for function in (reference, fused):
        t = torch.tensor(.2, dtype=torch.float64, requires_grad=True)
        gradient, = torch.autograd.grad(function(q, bank, t), t)
        assert gradient.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 30])
def test_topk_of_products_of_minus_infinity_names_rows_that_are_there(n, device):
    q, bank = torch.ones(3, 2, device=device), torch.full((n, 2), -torch.inf, device=device)
    bank[n // 2:] = 1
    for k in (1, n // 2 + 1, n):
        values, rows = bank_topk(q, bank, k)
        assert (rows < n).all() and all(len({*line.tolist()}) == k for line in rows)
        expected = (q.double() @ bank.double().T).topk(k).values
        torch.testing.assert_close(values.double(), expected)


def test_topk_of_chunks_of_minus_infinity_names_rows_that_are_there(device, monkeypatch):
    """The last chunk alone is filled up to whole groups, and the best of those before it are as small."""
    monkeypatch.setattr("kernels.bank.TOPK_CHUNK", 1)
    monkeypatch.setattr("kernels.bank._chunk_rows", lambda q: 16)
    q, bank = -torch.full((3, 2), 1e20, device=device), torch.full((33, 2), 1e20, device=device)
    values, rows = bank_topk(q, bank, 5)
    assert (rows < 33).all() and all(len({*line.tolist()}) == 5 for line in rows)
    assert (values == -torch.inf).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_an_excluded_row_may_be_nan(impl, unit, device):
    """A padded bank's rows that are not set: nothing of them comes into a value, or into other rows' gradients."""
    q, bank = unit(4, 5), unit(9, 5, 1)
    bank[3] = torch.nan
    exclude = torch.full((4,), 3, device=device)
    others = torch.arange(9, device=device) != 3
    s = q.double() @ bank.double().T[:, others]
    trained = bank.clone().requires_grad_()
    lse, repulsion = bank_logsumexp(q, trained, .2, exclude, impl=impl), bank_repulsion(q, trained, exclude, impl=impl)
    assert error(lse.detach(), torch.logsumexp(s / .2, 1)) < 1e-6
    assert repulsion.item() == pytest.approx(s.clamp(min=0).square().mean().item(), rel=1e-5)
    own = bank.double()[others].requires_grad_()
    s = q.double() @ own.T
    (torch.logsumexp(s / .2, 1).sum() + s.clamp(min=0).square().mean()).backward()
    (lse.sum() + repulsion).backward()
    assert error(trained.grad[others], own.grad) < 1e-6
    lse, _, repulsion = bank_reference(q, bank, .2, exclude=exclude)
    assert lse.isfinite().all() and repulsion.isfinite()


# ---- By torch's own flash attention, on a CPU --------------------------------------------------------------------
@pytest.fixture
def flashes(monkeypatch):
    """A list that grows with each use of it; two threads, since one is as fast without."""
    calls, function = [], kernels.bank.FLASH
    if function is None:
        pytest.skip("this torch has no such operator")
    monkeypatch.setattr(kernels.bank, "FLASH", lambda *arguments, **named: calls.append(1) or function(*arguments, **named))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield calls
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["logsumexp", "cross_entropy"])
@pytest.mark.parametrize("shape", [(64, 1, 5), (70, 64, 33), (65, 700, 16), (200, 1300, 7), (800, 90, 128)])
@pytest.mark.parametrize("temperature", [.06, 1.])
def test_flash_attention_errs_at_most_twice_as_much_as_the_fp32_reference(shape, name, temperature, unit, flashes, nan_poisoned):
    b, n, d = shape
    ours, theirs = [], []
    for seed in range(4):
        q, bank = unit(b, d, seed).cpu(), unit(n, d, seed + 10).cpu()
        options = torch.arange(b) * 7 % n, None, temperature
        truth = run(reference(name), q.double(), bank.double(), *options)[:2]
        ours.append([error(g, t) for g, t in zip(run(streamed(name, "torch"), nan_padded(q), nan_padded(bank), *options,
                                                     wanted=(True, False)), truth)])
        theirs.append([error(g, t) for g, t in zip(run(reference(name), q, bank, *options), truth)])
    assert len(flashes) == 4
    ours, theirs = (torch.tensor(e).square().mean(0).sqrt() for e in (ours, theirs))               # rms over seeds
    assert (ours <= (2 * theirs).clamp(min=2 ** -20)).all(), (ours, theirs)


@pytest.mark.parametrize("common, taken", [(1, 1), (3, 1), (100, 0), (1000, 0)])
def test_flash_attention_is_left_where_products_cancel(common, taken, flashes):
    """Long rows whose products nearly cancel: a small logit, and sums that round as the large products do."""
    axes = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    own = torch.randn(64, 62, generator=torch.Generator().manual_seed(1), dtype=torch.float64) @ axes[2:]
    own = 3 * F.normalize(own)
    bank = (own + common * axes[0]).float()
    q = (own + common * axes[1]).float().requires_grad_()
    target = torch.arange(64)
    loss = bank_cross_entropy(q, bank, target, 1.)
    loss.backward()
    truth = F.cross_entropy(q.detach().double() @ bank.double().T, target)
    plain = F.cross_entropy(q.detach() @ bank.T, target)
    assert len(flashes) == taken and abs(loss.item() - truth.item()) < 2 * abs(plain.item() - truth.item()) + 2e-6


@pytest.mark.parametrize("temperature, taken", [(.06, 1), (.04, 0)])
def test_flash_attention_is_left_where_the_loss_would_lose_digits(temperature, taken, unit, flashes):
    """Each query is its target's row, whose logit is 1 / t: a loss near 0 shows what rounding leaves of it."""
    bank = unit(900, 32).cpu()
    target = torch.arange(64) * 5
    q = bank[target].requires_grad_()
    loss = bank_cross_entropy(q, bank, target, temperature)
    loss.backward()
    wide = q.detach().double().requires_grad_()
    true = F.cross_entropy(wide @ bank.double().T / temperature, target)
    true.backward()
    assert len(flashes) == taken
    assert (q.grad - wide.grad).abs().max() < 1e-8 / temperature
    assert abs(loss.item() - true.item()) < (2e-6 if taken else 1e-7)


def test_flash_attention_is_taken_only_where_it_has_all_that_is_asked_for(unit, flashes, monkeypatch):
    q, bank = unit(64, 8).cpu(), unit(50, 8, 1).cpu()
    target = torch.arange(64) % 50

    def take(q=q, bank=bank, target=target, exclude=None, wanted=(True, False)):
        flashes.clear()
        run(streamed("cross_entropy", "torch"), q, bank, target, exclude, .2, wanted=wanted)
        return len(flashes)
    assert take() == 1
    assert take(q[:63], target=target[:63]) == take(wanted=(True, True)) == take(wanted=(False, False)) == 0
    assert take(exclude=(target + 1) % 50) == take(q.double(), bank.double()) == take(bank=bank.bfloat16()) == 0
    assert take(bank=bank.T.contiguous().T) == take(bank=bank[:1].expand(50, 8)) == 0
    torch.set_num_threads(1)
    assert take() == 0
    torch.set_num_threads(2)
    with_it = run(streamed("cross_entropy", "torch"), q, bank, target, None, .2, wanted=(True, False))
    monkeypatch.setattr(kernels.bank, "FLASH", None)
    without = run(streamed("cross_entropy", "torch"), q, bank, target, None, .2, wanted=(True, False))
    assert all(error(a, b) < 1e-6 for a, b in zip(with_it[:2], without[:2]))


def test_flash_attention_inside_torch_compile_and_with_nan(unit, flashes):
    q, bank, target = unit(64, 8).cpu(), unit(50, 8, 1).cpu(), torch.arange(64) % 50
    function = streamed("cross_entropy", "torch")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, want = (run(f, q, bank, target, None, .2, wanted=(True, False)) for f in (compiled, function))
    assert len(flashes) == 2 and all(error(a, b) < 1e-6 for a, b in zip(got[:2], want[:2]))
    bank[3, 4] = torch.nan
    assert run(function, q, bank, target, None, .2, wanted=(True, False))[0].isnan()
    assert run(streamed("logsumexp", "torch"), q, bank, target, None, .2, wanted=(True, False))[0].isnan()


# ---- What a difference of large numbers loses ------------------------------------------------------------------
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [1e-2, 1e-3, 1e-4])
def test_learned_pairs_cost_nothing_at_any_temperature(temperature, impl, kept, unit, monkeypatch):
    """Each query is its target's row: F.cross_entropy in fp32 gives 0, and no gradient where t is small."""
    monkeypatch.setattr(kernels.bank, "KEEP", kernels.bank.KEEP * kept)
    bank = unit(40, 16).requires_grad_()
    target = torch.arange(7, device=bank.device) * 5
    q = bank.detach()[target].requires_grad_()
    loss = bank_cross_entropy(q, bank, target, temperature, impl=impl)
    loss.backward()
    wide = [x.detach().double().requires_grad_() for x in (q, bank)]
    true = F.cross_entropy(wide[0] @ wide[1].T / temperature, target)
    true.backward()
    assert abs(loss.item() - true.item()) < 1e-7
    for x, other in zip((q, bank), wide):
        assert (x.grad - other.grad).abs().max() < 1e-6 / temperature * max(true.item(), 1e-4)


@pytest.mark.parametrize("use_triton", [False, True])
def test_the_backward_has_the_targets_logit_from_the_forward(use_triton, unit):
    """As on machines whose products in the backward are rounded otherwise than the forward's."""
    bank = unit(40, 16)
    target = torch.arange(7, device=bank.device) * 5
    q = bank[target] / 1e-3
    top, rest, _, positive, weights, shifts = kernels.bank._forward(q, bank, None, target, True, False, False, use_triton)
    rounded = q * (1 + 1e-6)
    dm = kernels.bank._backward(rounded, bank, None, target, top, rest, positive, weights, shifts, torch.ones(7, device=q.device),
                                True, use_triton)
    assert dm.abs().max() < 1e-6


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_target_may_be_among_the_excluded(impl, kept, unit, monkeypatch):
    """Its logit is taken off, but not in the sum."""
    monkeypatch.setattr(kernels.bank, "KEEP", kernels.bank.KEEP * kept)
    q, bank = unit(5, 8).requires_grad_(), unit(9, 8, 1).requires_grad_()
    target = torch.arange(5, device=q.device)
    bank_cross_entropy(q, bank, target, .2, target, impl=impl).backward()
    wide = [x.detach().double().requires_grad_() for x in (q, bank)]
    bank_reference(*wide, .2, target, target)[1].backward()
    for x, other in zip((q, bank), wide):
        assert error(x.grad, other.grad) < 1e-6


def test_torch_func_is_refused_in_a_line_and_the_reference_takes_it(unit):
    q, bank = unit(5, 4), unit(9, 4, 1)
    target = torch.arange(5, device=q.device)
    for function in (lambda q: bank_cross_entropy(q, bank, target, .2), lambda q: bank_logsumexp(q, bank, .2).sum(),
                     lambda q: bank_repulsion(q, bank)):
        for transform in (torch.func.grad, torch.func.vmap):
            with pytest.raises(RuntimeError, match="torch.func.*use bank_reference"):
                transform(function)(q if transform is torch.func.grad else q[None])
    with pytest.raises(RuntimeError, match="torch.func.*topk"):
        torch.func.vmap(lambda q: bank_topk(q, bank, 2)[0])(q[None])
    each = torch.func.vmap(torch.func.grad(lambda q: bank_reference(q, bank, .2, target)[1]))(q[None])
    expected, = torch.autograd.grad(bank_cross_entropy(own := q.clone().requires_grad_(), bank, target, .2), own)
    torch.testing.assert_close(each[0], expected)


# ---- Rows at length 1 ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_unit_rows_are_normalised_and_a_row_of_zeros_stays_and_has_no_gradient(dtype):
    x = torch.randn(6, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0] = 6e4 * x[0].sign() if dtype == torch.float16 else 1e15         # its length leaves fp16
    x[2] = 0
    x.requires_grad_()
    unit = unit_rows(x)
    assert unit.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (unit * torch.arange(300)).sum().backward()
    wide = x.detach().double().requires_grad_()
    true = F.normalize(wide)
    (true * torch.arange(300)).sum().backward()
    assert (unit - true).abs().max() < 1e-6
    others = torch.arange(6) != 2
    assert unit[2].eq(0).all() and x.grad[2].eq(0).all()
    assert error(x.grad[others], wide.grad[others]) < (1e-2 if dtype.itemsize == 2 else 1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("excluded", [0, 1, 3])
def test_targets_are_read_as_they_lie(impl, excluded, unit, device):
    """Columns of a table, every other one of a list, one number expanded."""
    q, bank = unit(6, 8), unit(50, 8, 1)
    table = torch.randint(50, (12, 2), generator=torch.Generator().manual_seed(0)).to(device)
    exclude = (table[:6, 1:] + torch.arange(1, excluded + 1, device=device)) % 50 if excluded else None
    for target in (table[:6, 0], table[:, 0][::2], table[3, 0].expand(6)):
        expected = run(reference("cross_entropy"), q.double(), bank.double(), target.clone(), exclude, .2)
        for got, truth in zip(run(streamed("cross_entropy", impl), q, bank, target, exclude, .2), expected):
            assert error(got, truth) < 1e-5
