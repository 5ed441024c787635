"""Random calls of every loss, of top-k, of the probes and of the scripts' modules, each against float64 or refused in a line.

Shapes of 1 to 1271, layouts, dtypes, zeros, duplicates, one far larger column, scales of 1e-6 to 1e6, temperatures of
1e-3 to 10; plain, under autocast, no_grad, inference_mode, compiled; upstream gradients of any size. The first twelfth by
default; `pytest -m slow tests/test_sweep.py` makes all 6,000 calls, in a minute.
"""
import contextlib
import copy
import math
import random

import pytest
import torch
import torch.nn.functional as F

import ba_ssl
import falcon
import icone
import vicreg
from damage import share
from judge import nan_padded
from kernels import (bank_cross_entropy, bank_logsumexp, bank_reference, bank_repulsion, bank_topk, dictionary_loss,
                     dictionary_reference, dictionary_signs, few_label_accuracy, knn_accuracy, unit_rows,
                     variance_covariance, variance_covariance_reference)

pytestmark = pytest.mark.usefixtures("one_thread")
CALLS = 100                                                              # of one test
DTYPES = [torch.float32] * 4 + [torch.float64, torch.bfloat16, torch.float16]


# ---- What goes in ------------------------------------------------------------------------------------------
def size(rng, most=1271):
    """1 to most, small ones as often as large ones."""
    return min(most, round(math.exp(rng.uniform(0, math.log(most + 1)))))


def embeddings(rng, n, d, dtype=None, wild=True):
    """[n, d] of some dtype, layout and content."""
    g = torch.Generator().manual_seed(rng.randrange(2**31))
    x = torch.randn(n, d, generator=g)
    content = rng.choice(["plain", "plain", "offset", "zeros", "duplicates", "point", "half zero", "column", "scale"])
    if content == "offset":
        x += 30 * torch.randn(d, generator=g)
    elif content == "zeros":
        x[:] = 0
    elif content == "duplicates":
        x = x[torch.randint(0, max(1, n // 3), (n,), generator=g)]
    elif content == "point":
        x = x[:1].expand(n, d)
    elif content == "half zero":
        x[::2] = 0
    elif content == "column" and wild:
        x[:, rng.randrange(d)] *= 1e3
    elif content == "scale" and wild:
        x *= 10. ** rng.uniform(-6, 6)
    x = x.to(dtype or rng.choice(DTYPES))
    if not x.isfinite().all():                                           # past fp16
        x = x.clamp(-60_000, 60_000).nan_to_num()
    layout = rng.choice(["plain", "plain", "transposed", "padded", "flipped"])
    if layout == "transposed":
        return x.T.contiguous().T
    return nan_padded(x) if layout == "padded" else x.flip(0) if layout == "flipped" else x


def rows_of(rng, n, *shape):
    return torch.randint(0, n, shape, generator=torch.Generator().manual_seed(rng.randrange(2**31)))


# ---- How it is called and judged ---------------------------------------------------------------------------
def values_and_gradients(function, inputs, upstream, gradients=True):
    """Values, then gradients of their sum with these weights; under no_grad only values."""
    inputs = [x.detach().requires_grad_(gradients) for x in inputs]
    values = function(*inputs)
    values = values if isinstance(values, (tuple, list)) else [values]
    if gradients:
        sum(u * v.sum() for u, v in zip(upstream, values)).backward()
    return [v.detach() for v in values] + [x.grad for x in inputs if gradients]


def judged(rng, function, plain, inputs, scale=1.):
    """function on these inputs errs at most a few times as much as `plain` does in fp32; truth: `plain` in float64.

    scale: how large what is added up may be, in values and per unit of upstream gradient; it may cancel to nothing.
    """
    upstream = [rng.choice([1., -1.7, 65536., 1e-3]) for _ in range(3)]
    way = rng.choice(["as it is"] * 6 + ["autocast", "no_grad", "inference_mode"] + ["compiled"] * (rng.random() < .1))
    wide = [x.double() for x in inputs]
    dtype = torch.float64 if torch.float64 in [x.dtype for x in inputs] else torch.float32
    work = [x.to(dtype) for x in inputs]
    gradients = way not in ("no_grad", "inference_mode")
    truth = values_and_gradients(plain, wide, upstream, gradients)
    usual = values_and_gradients(plain, work, upstream, gradients)
    context = {"autocast": torch.autocast("cpu", torch.bfloat16), "no_grad": torch.no_grad(),
               "inference_mode": torch.inference_mode()}.get(way, contextlib.nullcontext())
    if way == "compiled":
        torch._dynamo.reset()
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    with context:
        got = values_and_gradients(function, inputs, upstream, gradients)
    eps = 1e-12 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps                   # the truth errs, too
    for number, (own, form, true) in enumerate(zip(got, usual, truth)):
        if not form.isfinite().all():                                    # it overflows in fp32
            continue
        kind = torch.finfo(own.dtype)                                    # a gradient is rounded to its input's dtype
        if true.abs().max() > kind.max:
            continue
        allowed = 4 * (form.double() - true).norm() + (16 * eps + kind.eps) * true.norm() + kind.tiny * own.numel()
        allowed += eps * scale * max(map(abs, upstream)) ** (number >= len(got) - len(inputs))
        off = (own.double() - true).norm()
        assert off <= allowed, f"{way}: output {number} is {off:.3g} off, {allowed:.3g} allowed, of {true.norm():.3g}"


# ---- The calls ---------------------------------------------------------------------------------------------
def call_variance_covariance(rng):
    n, d = 1 + size(rng, 1270), size(rng)
    while n * d > 60_000:
        n, d = 1 + size(rng, 1270), size(rng)
    z = embeddings(rng, n, d, wild=2 * n > d)                            # a wild column: see tests of the Gram side
    gamma, eps = rng.choice([1., .3, 5.]), rng.choice([1e-4, 1e-2])
    side = rng.choice(["auto", "covariance"])
    judged(rng, lambda z: variance_covariance(z, gamma, eps, side=side),
           lambda z: variance_covariance_reference(z, gamma, eps), [z])


def operands(rng):
    """Queries, bank, target, exclude (or None), temperature."""
    b, n, d = size(rng, 300), 1 + size(rng, 1270), size(rng, 300)
    while b * n > 100_000 or (b + n) * d > 100_000:
        b, n, d = size(rng, 300), 1 + size(rng, 1270), size(rng, 300)
    q, bank = embeddings(rng, b, d, wild=False), embeddings(rng, n, d, wild=False)
    if rng.random() < .7:
        q, bank = F.normalize(q.float()).to(q.dtype), F.normalize(bank.float()).to(bank.dtype)
    target = rows_of(rng, n, b)
    kind = rng.choice(["none", "one", "several", "empty"])
    exclude = dict(none=None, one=rows_of(rng, n, b), several=rows_of(rng, n, b, min(n - 1, rng.randrange(1, 6))),
                   empty=torch.zeros(b, 0, dtype=torch.int64))[kind]
    return q, bank, target, exclude, rng.choice([10., 1., .2, .05, .01, .001])


def call_bank(rng):
    q, bank, target, exclude, t = operands(rng)
    name = rng.choice(["logsumexp", "cross_entropy", "repulsion"])
    without = exclude if exclude is not None and exclude.numel() else None

    def plain(q, bank):
        lse, cross_entropy, repulsion = bank_reference(q, bank, t, target, without)
        return dict(logsumexp=lse, cross_entropy=cross_entropy, repulsion=repulsion)[name]

    def own(q, bank):
        if name == "repulsion":
            return bank_repulsion(q, bank, exclude)
        if name == "logsumexp":
            return bank_logsumexp(q, bank, t, exclude)
        return bank_cross_entropy(q, bank, target, t, exclude)
    longest = [x.double().norm(dim=1).max().item() for x in (q, bank)]
    judged(rng, own, plain, [q, bank], (1 + max(longest)) ** 2 / min(t, 1) + math.log(len(bank)))


def call_bank_with_itself(rng):
    x = embeddings(rng, 1 + size(rng, 250), size(rng, 200), wild=False)
    t = rng.choice([1., .2, .05])
    itself = torch.arange(len(x))
    judged(rng, lambda x: (bank_repulsion(x, x, "self"), bank_logsumexp(x, x, t, "self")),
           lambda x: (bank_reference(x, x, t, exclude=itself)[2], bank_reference(x, x, t, exclude=itself)[0]), [x],
           (1 + x.double().norm(dim=1).max().item()) ** 2 / t)


def call_topk(rng):
    q, bank, *_ = operands(rng)
    k = rng.randint(1, min(len(bank), 40))
    values, rows = bank_topk(q, bank, k)
    products = q.double() @ bank.double().T
    expected = products.topk(k).values
    scale = (q.double().norm(dim=1, keepdim=True) * bank.double().norm(dim=1).max()).clamp(min=1e-30)
    assert ((values.double() - expected).abs() <= 1e-5 * scale).all()
    assert ((products.gather(1, rows) - expected).abs() <= 1e-5 * scale).all()
    assert all(len({*line}) == k for line in rows.tolist())


def call_dictionary(rng):
    n, f, codes = size(rng, 100), size(rng, 200), size(rng)
    seed, prior = rng.randrange(2**31), rng.choice(["reverse", "forward"])
    dtype = rng.choice(DTYPES)
    h = [unit_rows(embeddings(rng, n, f, dtype, wild=False)).to(dtype) for _ in range(2)]
    t = rng.choice([3., .5, .1, .02])
    W = dictionary_signs(codes, f, seed)
    judged(rng, lambda a, b: dictionary_loss(a, b, codes, seed, t, prior),
           lambda a, b: dictionary_reference(a, b, W.to(a.dtype), t, prior), h, math.sqrt(f) / t + math.log(codes))


def call_unit_rows(rng):
    x = embeddings(rng, size(rng), size(rng, 300))
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def plain(x):
        length = x.norm(dim=1, keepdim=True)
        return torch.where(length > 1e-12, x / torch.where(length > 1e-12, length, 1), 0) * weights.to(x.dtype)
    judged(rng, lambda x: unit_rows(x) * weights, plain, [x])


def call_terms(rng):
    """Losses of two views, as ba_ssl.py has them: the same in float64."""
    n, d = 1 + size(rng, 100), 1 + size(rng, 200)
    z = [embeddings(rng, n, d, torch.float32, wild=False) for _ in range(2)]
    table = torch.randn(n + 2, d, generator=torch.Generator().manual_seed(rng.randrange(2**31)))
    index = torch.arange(n).flip(0)
    kind = rng.choice(["nt_xent", "vicreg", "falcon", "icone"])

    def terms(a, b):
        if kind == "nt_xent":
            return ba_ssl.nt_xent(a, b)
        if kind == "vicreg":
            return [*ba_ssl.vicreg_terms(a, b).values()]
        if kind == "falcon":
            return [*ba_ssl.falcon_terms(a, b, 0, codes=64).values()]
        return [*ba_ssl.icone_terms(a, b, table.to(a.dtype), index).values()]

    def by_hand(a, b):
        if kind == "nt_xent":
            u = unit_rows(torch.cat([a, b]))
            logits = (u @ u.T / .2).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
            return F.cross_entropy(logits, torch.arange(2 * n).roll(n))
        if kind == "vicreg":
            (v1, c1), (v2, c2) = variance_covariance_reference(a), variance_covariance_reference(b)
            return F.mse_loss(a, b), (v1 + v2) / 2, c1 + c2
        if kind == "falcon":
            W, length = dictionary_signs(64, d, 0).to(a.dtype), math.sqrt(d / n)
            t = falcon.derived_temperature(n, d, 64)
            return dictionary_reference(length * unit_rows(a), length * unit_rows(b), W, t)
        u = unit_rows(table.to(a.dtype))
        sums = bank_reference(u[index], u, .2, exclude=index)[0]
        z = unit_rows(a) + unit_rows(b)
        return 1 - (z * u[index]).sum(1).mean() / 2, .2 * (sums.mean() - math.log(n + 1)) + 0 * z.sum()
    if kind == "icone":                                                  # its second term has the table's gradient alone
        def own(a, b):
            first, second = terms(a, b)
            return first, second + 0 * a.sum()
        return judged(rng, own, by_hand, z)
    judged(rng, terms, by_hand, z)


def module_and_inputs(rng):
    kind = rng.choice(["vicreg", "falcon", "icone", "fusion"])
    torch.manual_seed(rng.randrange(2**31))
    if kind == "fusion":
        b, patch, axes = rng.randint(3, 9), rng.choice([1, 2, 4]), rng.choice([2, 3])
        sides = [patch * rng.randint(1, 4) for _ in range(axes)]
        module = ba_ssl.BatchFusion(b, patch, rng.randint(1, 3), mixing=rng.choice(["conv", "random", "grouped", "mixup"]),
                                    keep_slots=True, axes=axes)
        x = torch.rand(b, rng.choice([1, 3]), *sides)
        if rng.random() < .3:
            x = x[:1].expand(x.shape).clone()                            # all images alike
        return module, [x]
    n, d = 2 * rng.randint(1, 20), rng.randint(2, 64)
    views = list(torch.randn(2, n, d))
    if rng.random() < .3:
        views[0][0] = 0                                                  # an embedding of zeros
    if kind == "vicreg":
        return vicreg.VICReg(torch.nn.Identity(), d, projector=[d]), views
    if kind == "falcon":
        dictionary = falcon.FixedDictionary(rng.randint(2, 300), d, 3)
        net = falcon.FALCON(torch.nn.Identity(), d, dictionary, n, projector=(d,), norm=rng.choice(["l2", "tanh"]),
                            prior=rng.choice(["reverse", "forward", "none"]))
        return net, views
    net = icone.IConE(torch.nn.Identity(), d, n + rng.randint(1, 40), diversity=rng.choice(["logsumexp", "relu2"]),
                      view_view=rng.choice([0, 1]), centre=rng.choice([0, .9]))
    net.table.normal_()
    F.normalize(net.table, out=net.table)
    return net, [*views, torch.randperm(n)]


def call_module(rng):
    """Terms and gradients in fp32 as in float64; evaluation leaves no trace; two halves accumulated are a whole."""
    net, inputs = module_and_inputs(rng)
    start = copy.deepcopy(net.state_dict())
    evaluates = rng.random() < .3 and not isinstance(net, ba_ssl.BatchFusion)
    results = []
    for dtype in (torch.float32, torch.float64):
        own = copy.deepcopy(net).to(dtype).train(not evaluates)
        x = [part.detach().clone().to(dtype).requires_grad_() if part.is_floating_point() else part for part in inputs]
        torch.manual_seed(0)
        out = own(*x)
        total = out.square().mean() if isinstance(out, torch.Tensor) else sum(out[0].values())
        scale = rng.choice([1., 65536.])
        if total.requires_grad:
            (scale * total).backward()
        if isinstance(own, icone.IConE) and own.training:
            own.step(scale)
        learned = [part for part in [*x, *own.parameters()] if part.grad is not None]
        rows = [own.table] if hasattr(own, "table") else []
        results.append([total.detach().double(), *[part.grad.double() / scale for part in learned], *rows])
        if evaluates:
            for name, value in own.state_dict().items():
                assert torch.equal(value, start[name].to(value.dtype)), name
    largest = max(1., *[true.norm().item() for true in results[1]])
    alike = isinstance(net, ba_ssl.BatchFusion) and inputs[0].std(0).max() < 1e-6                # its rounding is all there is
    for number, (own, true) in enumerate(zip(*results, strict=True)):
        assert own.isfinite().all()
        off = (own - true).norm()
        assert alike or off <= 1e-4 * true.norm() + 2e-5 * largest, f"{net}: {number} is {off:.3g} off, of {true.norm():.3g}"


def call_probes(rng):
    """k-NN by hand in float64; both probes refuse what is not finite."""
    n, m, d, classes = 2 + size(rng, 300), size(rng, 100), size(rng, 100), rng.randint(2, 12)
    h, h_test = embeddings(rng, n, d), embeddings(rng, m, d)
    y, y_test = rows_of(rng, classes, n), rows_of(rng, classes, m)
    y[:2] = torch.tensor([0, 1])
    k, t = rng.randint(1, 20), rng.choice([1., .07, .01])
    known = (h, y[:, None] if rng.random() < .3 else y, h_test, y_test)
    if rng.random() < .2:
        h[rng.randrange(n), rng.randrange(d)] = math.nan
        for probe in (knn_accuracy, lambda *known: few_label_accuracy(*known, 1)):
            with pytest.raises(ValueError, match="row"):
                probe(*known)
        return
    cosines = F.normalize(h_test.double()) @ F.normalize(h.double()).T
    near, rows = cosines.topk(min(k, n))
    votes = torch.zeros(m, classes, dtype=torch.float64)
    votes.scatter_add_(1, y[rows], ((near - near[:, :1]) / t).exp())
    first, second = votes.topk(2).values.T
    clear = first > second * 1.01                                        # equal neighbours may come in any order
    edges = near[:, -1:] - cosines.topk(min(k + 1, n)).values[:, -1:] > 1e-4 if n > k else torch.ones(m, 1).bool()
    clear &= edges[:, 0]
    right = (votes.argmax(1) == y_test) & clear
    accuracy = knn_accuracy(*known, k=k, temperature=t)
    assert right.double().mean() - 1e-9 <= accuracy <= (right | ~clear).double().mean() + 1e-9


ALL = [call_variance_covariance, call_bank, call_bank, call_bank_with_itself, call_topk, call_dictionary, call_unit_rows,
       call_terms, call_module, call_probes]


@pytest.mark.parametrize("seed", share(60))
def test_random_calls(seed):
    for number in range(CALLS):
        rng = random.Random(f"{seed} {number}")
        call = rng.choice(ALL)
        try:
            call(rng)
        except Exception as error:
            raise AssertionError(f"{call.__name__}, random.Random('{seed} {number}')") from error
