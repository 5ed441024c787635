"""Similarity of a batch to a memory bank: log-sum-exp, cross-entropy, repulsion, top-k, without a B x N matrix.

    bank_logsumexp(q, bank, t)          lse_b = log sum_n exp(q_b . m_n / t)
    bank_cross_entropy(q, bank, y, t)   mean_b (lse_b - q_b . m_{y_b} / t)
    bank_repulsion(q, bank)             mean_{b, n} max(0, q_b . m_n)^2
    bank_topk(q, bank, k)               the k largest q_b . m_n and their rows, exact

q [B, d], bank [N, d]. Every sum leaves out column exclude_b where `exclude` [B] is given: a row of the bank does not
repel itself. Rows are used as they are: normalise them if the dot product shall be a cosine.

Arithmetic and bytes. The textbook form writes S = q bank^T, B x N numbers, reads them for the softmax and writes them
again for the backward: at (1024, 1M) 4 GB each time. Streaming reads the bank once in the forward (4 N d bytes) and
once more if it is trained itself; 4 B N d operations with the queries' gradient, 4 B N d more with the bank's. At
(256, 200k, 128) that is 26 (52) GFLOP over 102 MB: bound by arithmetic and by B N exponentials, not by memory.

Accumulation is fp32, also inside autocast; float64 stays float64.
"""
import math
from contextlib import nullcontext

import torch

try:
    import triton
    import triton.language as tl
except ImportError:                                    # no wheel here: all but impl="triton" works
    triton = None


# ---- Reference: the specification --------------------------------------------------------------------------
def bank_reference(q, bank, temperature, target=None, exclude=None):
    """logsumexp [B], cross-entropy and repulsion with B x N in memory, by autograd."""
    s, count = q @ bank.T, len(bank)                   # [B, N]
    if exclude is not None:
        s = s.scatter(1, exclude[:, None], -torch.inf)
        count -= 1
    lse = torch.logsumexp(s / temperature, dim=1)
    cross_entropy = None if target is None else (lse - (q * bank[target]).sum(1) / temperature).mean()
    return lse, cross_entropy, s.clamp(min=0).square().sum() / (len(q) * count)


# ---- Derivation --------------------------------------------------------------------------------------------
# All three are L = sum_b F(sum_n f(s_bn)), s_bn = q_b . m_n, so with the weight w_bn = dL/ds_bn
#
#   dq_b = sum_n w_bn m_n          dm_n = sum_b w_bn q_b
#
#   log-sum-exp   w_bn = g_b/t exp(s_bn/t - lse_b)      repulsion   w_bn = 2 g max(0, s_bn) / count
#
# dq is the sum that flash attention accumulates with K = V = bank: the forward can make O_b = sum_n f'_bn m_n in the
# same pass, and a detached bank needs no backward pass over the bank at all. dm needs w again, tile by tile, from
# lse_b. With a running maximum c_b, sums and O are rescaled by exp(c_old - c_new) whenever it grows; that is exact, and
# safe at any temperature. An excluded column has s = -inf: weight 0 in both. All is done in base 2, with queries that
# carry log2(e)/t, since 2^x costs less than e^x: 40 % of the time on CPUs, one instruction on GPUs.

def _merge(top, total, out):
    """Partial (maximum [S, B], sum [S, B], output [S, B, d] or None) of S slabs -> log2 sum [B], output [B, d]."""
    high = top.amax(dim=0)
    weight = (top - high).exp2()
    total = (total * weight).sum(dim=0)
    if out is not None:
        out = (out * weight[:, :, None]).sum(dim=0) / total[:, None]
    return high + total.log2(), out


# ---- Plain torch -------------------------------------------------------------------------------------------
def _chunks(q, bank):
    """(first row, bank rows [C, d] in q's dtype, a buffer of B C numbers) for each chunk of the bank."""
    size = max(512, min(8192, 2 ** 18 // len(q)))      # 1 MB a tile: measured best at 2 cores, 1 MB of L2 each
    buffer = q.new_empty(len(q) * min(size, len(bank)))
    for first in range(0, len(bank), size):
        rows = bank[first:first + size].to(q.dtype)
        yield first, rows, buffer[:len(q) * len(rows)]


def _among(index, first, count):
    """Where in this chunk, and for which queries b, row index_b lies: two index tensors."""
    b = ((index >= first) & (index < first + count)).nonzero()[:, 0]
    return index[b] - first, b


def _forward_torch(q, bank, exclude, softmax, with_output):
    """q [B, d], scaled -> log2 sum_n 2^s_bn or sum_n max(0, s_bn)^2 [B], O [B, d] or None. Tiles lie [C, B]: faster."""
    top, total, qt = q.new_full((len(q),), -torch.inf), q.new_zeros(len(q)), q.T.contiguous()
    out = torch.zeros_like(q) if with_output else None
    for first, rows, buffer in _chunks(q, bank):
        s = torch.mm(rows, qt, out=buffer.view(len(rows), len(q)))                         # [C, B]
        if exclude is not None:
            s[_among(exclude, first, len(rows))] = -torch.inf
        if softmax:
            new = torch.maximum(top, s.amax(dim=0))
            weight, rescale = s.sub_(new).exp2_(), (top - new).exp2_()
            total, top = total * rescale + weight.sum(dim=0), new
            if with_output:
                out *= rescale[:, None]
        else:
            weight = s.clamp_(min=0)
            total += torch.linalg.vector_norm(weight, dim=0).square()
        if with_output:
            out.addmm_(weight.T, rows)
    if not softmax:
        return total, out
    return _merge(top[None], total[None], None if out is None else out[None])


def _backward_torch(q, bank, exclude, target, value, g, softmax):
    """dL/d bank [N, d], sum_b g_b w_bn q_b, for q and value as in the forward; g [B] upstream."""
    dm, weighted, qt = torch.empty(bank.shape, dtype=q.dtype, device=q.device), q * g[:, None], q.T.contiguous()
    for first, rows, buffer in _chunks(q, bank):
        weight = buffer.view(len(rows), len(q))                                            # [C, B]
        if softmax:
            torch.addmm(value, rows, qt, beta=-1, out=weight).exp2_()
        else:
            torch.mm(rows, qt, out=weight).clamp_(min=0)
        if exclude is not None:
            weight[_among(exclude, first, len(rows))] = 0
        if target is not None:
            weight[_among(target, first, len(rows))] -= 1
        torch.mm(weight, weighted, out=dm[first:first + len(rows)])
    return dm


# ---- Triton ------------------------------------------------------------------------------------------------
# Two kernels with static tile sizes, no atomics: bitwise reproducible. A forward program walks one slab of the bank
# for 64 queries and leaves partial maxima, sums and outputs; a backward program owns 64 rows of the bank and walks the
# queries. Registers hold 64 x SLICE numbers of output: where d is larger than SLICE, further programs make the other
# slices, each with all of s, which is summed over d in steps of BLOCK_K. Offsets are int64; all is cast to fp32 right
# after the load; what lies past an edge is loaded as 0, and set to -inf before an exp.
if triton is not None:

    @triton.jit
    def _tile(x, rows, count, first, d, stride, stride_d, WIDTH: tl.constexpr):
        """x[rows, first:first + WIDTH] in fp32, 0 outside."""
        cols = first + tl.arange(0, WIDTH)[None, :]
        return tl.load(x + rows.to(tl.int64)[:, None] * stride + cols * stride_d,
                       mask=(rows[:, None] < count) & (cols < d), other=0.).to(tl.float32)

    @triton.jit
    def _slab(q, bank, exclude, top, total, out, B, N, d, rows_per_slab, stride_q, stride_qd, stride_m, stride_md,
              SOFTMAX: tl.constexpr, EXCLUDE: tl.constexpr, OUTPUT: tl.constexpr, OWN: tl.constexpr,
              OTHER: tl.constexpr, BLOCK_K: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr):
        """Partial maximum, sum and one slice of the output of OWN queries over one slab of the bank."""
        b, slab, part = tl.program_id(0) * OWN + tl.arange(0, OWN), tl.program_id(1), tl.program_id(2) * SLICE
        if EXCLUDE:
            without = tl.load(exclude + b, mask=b < B, other=-1)
        high = tl.full([OWN], -float("inf"), tl.float32)
        acc, o = tl.zeros([OWN], tl.float32), tl.zeros([OWN, SLICE], tl.float32)
        first = slab * rows_per_slab
        last = tl.minimum(first + rows_per_slab, N)
        for start in range(first, last, OTHER):
            n = start + tl.arange(0, OTHER)
            s = tl.zeros([OWN, OTHER], tl.float32)
            for k in range(0, d, BLOCK_K):
                qk = _tile(q, b, B, k, d, stride_q, stride_qd, BLOCK_K)
                mk = _tile(bank, n, last, k, d, stride_m, stride_md, BLOCK_K)
                s += tl.dot(qk, tl.trans(mk), input_precision=PRECISION)
            keep = (n < last)[None, :]
            if EXCLUDE:
                keep = keep & (n[None, :] != without[:, None])
            s = tl.where(keep, s, -float("inf"))
            if SOFTMAX:
                new = tl.maximum(high, tl.max(s, axis=1))
                shift = tl.where(new == -float("inf"), 0., new)                # all excluded so far
                weight, rescale = tl.exp2(s - shift[:, None]), tl.exp2(high - shift)
                acc, high = acc * rescale + tl.sum(weight, axis=1), new
                o *= rescale[:, None]
            else:
                weight = tl.maximum(s, 0.)
                acc += tl.sum(weight * weight, axis=1)
            if OUTPUT:
                m = _tile(bank, n, last, part, d, stride_m, stride_md, SLICE)
                o += tl.dot(weight, m, input_precision=PRECISION)
        at = slab.to(tl.int64) * B + b
        if part == 0:
            tl.store(top + at, high, mask=b < B)
            tl.store(total + at, acc, mask=b < B)
        if OUTPUT:
            cols = part + tl.arange(0, SLICE)[None, :]
            tl.store(out + at[:, None] * d + cols, o, mask=(b[:, None] < B) & (cols < d))

    @triton.jit
    def _bank_rows(q, bank, exclude, target, value, g, dm, B, N, d, stride_q, stride_qd, stride_m, stride_md,
                   SOFTMAX: tl.constexpr, EXCLUDE: tl.constexpr, TARGET: tl.constexpr, OWN: tl.constexpr,
                   OTHER: tl.constexpr, BLOCK_K: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr):
        """One slice of dm for OWN rows of the bank: sum_b g_b w_bn q_b over all queries."""
        n, part = tl.program_id(0) * OWN + tl.arange(0, OWN), tl.program_id(1) * SLICE
        acc = tl.zeros([OWN, SLICE], tl.float32)
        for start in range(0, B, OTHER):
            b = start + tl.arange(0, OTHER)
            s = tl.zeros([OWN, OTHER], tl.float32)
            for k in range(0, d, BLOCK_K):
                mk = _tile(bank, n, N, k, d, stride_m, stride_md, BLOCK_K)
                qk = _tile(q, b, B, k, d, stride_q, stride_qd, BLOCK_K)
                s += tl.dot(mk, tl.trans(qk), input_precision=PRECISION)
            if SOFTMAX:
                shift = tl.load(value + b, mask=b < B, other=0.)[None, :]
                weight = tl.exp2(tl.where(n[:, None] < N, s - shift, -float("inf")))
            else:
                weight = tl.maximum(s, 0.)
            if EXCLUDE:
                without = tl.load(exclude + b, mask=b < B, other=-1)[None, :]
                weight = tl.where(n[:, None] == without, 0., weight)
            if TARGET:
                weight -= tl.where(n[:, None] == tl.load(target + b, mask=b < B, other=-1)[None, :], 1., 0.)
            weight *= tl.load(g + b, mask=b < B, other=0.)[None, :]
            qs = _tile(q, b, B, part, d, stride_q, stride_qd, SLICE)
            acc += tl.dot(weight, qs, input_precision=PRECISION)
        cols = part + tl.arange(0, SLICE)[None, :]
        tl.store(dm + n.to(tl.int64)[:, None] * d + cols, acc, mask=(n[:, None] < N) & (cols < d))

    OWN, OTHER = 64, 32                                # 64 rows: the least that Hopper's matrix units take
    PRECISION = "ieee" if torch.version.hip else "tf32x3"      # fp32 on tensor cores; AMD's take fp32 itself


def _tiles(d):
    """Static tile sizes, the largest found that spill no registers: results do not depend on a search."""
    part = min(128, max(16, triton.next_power_of_2(d)))
    return dict(OWN=OWN, OTHER=OTHER, BLOCK_K=min(32, part), SLICE=part, PRECISION=PRECISION, num_warps=8, num_stages=2)


def _on_device(q):
    return torch.cuda.device(q.device) if q.is_cuda else nullcontext()       # Triton launches on the current one


def _forward_triton(q, bank, exclude, softmax, with_output):
    """As _forward_torch."""
    (B, d), N, tiles = q.shape, len(bank), _tiles(q.shape[1])
    blocks, parts = triton.cdiv(B, OWN), triton.cdiv(d, tiles["SLICE"]) if with_output else 1
    # Slabs until some 264 programs run, two for each of 132 processors, none shorter than eight tiles.
    slabs = max(1, min(264 // (blocks * parts), N // (8 * OTHER)))
    rows_per_slab = triton.cdiv(triton.cdiv(N, slabs), OTHER) * OTHER
    slabs = triton.cdiv(N, rows_per_slab)
    top, total = q.new_empty((slabs, B)), q.new_empty((slabs, B))
    out = q.new_empty((slabs, B, d)) if with_output else None
    with _on_device(q):
        _slab[(blocks, slabs, parts)](q, bank, exclude, top, total, out, B, N, d, rows_per_slab, *q.stride(),
                                      *bank.stride(), softmax, exclude is not None, with_output, **tiles)
    if not softmax:
        return total.sum(dim=0), None if out is None else out.sum(dim=0)
    return _merge(top, total, out)


def _backward_triton(q, bank, exclude, target, value, g, softmax):
    """As _backward_torch."""
    dm, tiles = torch.empty(bank.shape, dtype=q.dtype, device=q.device), _tiles(q.shape[1])
    with _on_device(q):
        _bank_rows[triton.cdiv(len(bank), OWN), triton.cdiv(q.shape[1], tiles["SLICE"])](
            q, bank, exclude, target, value, g, dm, len(q), *bank.shape, *q.stride(), *bank.stride(),
            softmax, exclude is not None, target is not None, **tiles)
    return dm


# ---- Autograd ----------------------------------------------------------------------------------------------
class _BankSum(torch.autograd.Function):
    """lse_b (minus the target's logit), or sum_n max(0, s_bn)^2: one number a query."""

    @staticmethod
    def forward(ctx, q, bank, scale, exclude, target, softmax, symmetric, use_triton):
        work = torch.promote_types(torch.promote_types(q.dtype, bank.dtype), torch.float32)
        unit = math.log(2) if softmax else 1.                                            # of value: base 2 inside
        scaled, exclude, target = q.to(work) * (scale / unit), *(
            x if x is None else x.contiguous() for x in (exclude, target))
        with_output = ctx.needs_input_grad[0]
        value, out = (_forward_triton if use_triton else _forward_torch)(scaled, bank, exclude, softmax, with_output)
        if with_output and target is not None:
            out = out - bank[target]
        ctx.save_for_backward(q, bank, value, out, exclude, target)
        ctx.options = scale, unit, softmax, symmetric, use_triton
        return unit * (value if target is None else value - (scaled * bank[target]).sum(dim=1))

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():              # create_graph=True
            raise RuntimeError("the bank functions have no double backward")
        q, bank, value, out, exclude, target = ctx.saved_tensors
        scale, unit, softmax, symmetric, use_triton = ctx.options
        g = g if softmax else 2 * g
        dq = dm = None
        if ctx.needs_input_grad[0]:
            dq = (out * (g[:, None] * (2 * scale if symmetric else scale))).to(q.dtype)
        if ctx.needs_input_grad[1] and not symmetric:
            with torch.autocast(q.device.type, enabled=False):
                dm = (_backward_triton if use_triton else _backward_torch)(
                    q.to(value.dtype) * (scale / unit), bank, exclude, target, value, g * unit, softmax).to(bank.dtype)
        return dq, dm, None, None, None, None, None, None


def _check(q, bank, **indices):
    if q.ndim != 2 or bank.ndim != 2 or q.shape[1] != bank.shape[1] or not (q.numel() and bank.numel()):
        raise ValueError(f"q {list(q.shape)} and bank {list(bank.shape)} must be [B, d] and [N, d], not empty")
    if not (q.is_floating_point() and bank.is_floating_point()):
        raise ValueError(f"q {q.dtype} and bank {bank.dtype} must be floats")
    for name, index in indices.items():
        if index.shape != q.shape[:1] or index.dtype != torch.int64:
            raise ValueError(f"{name} must be int64 [{len(q)}], bank rows; got {index.dtype} {list(index.shape)}")
        if not (index.is_cuda or torch.compiler.is_compiling()) and not 0 <= index.min() <= index.max() < len(bank):
            raise ValueError(f"{name} has rows {index.min()} to {index.max()}: the bank's are 0 to {len(bank) - 1}")


def _apply(q, bank, temperature, exclude, target, softmax, impl):
    """Check, choose an implementation, run: [B]."""
    indices = {"exclude": exclude, "target": target}
    _check(q, bank, **{name: index for name, index in indices.items() if index is not None})
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be above 0")
    if exclude is not None and len(bank) < 2:
        raise ValueError("exclude leaves nothing of a bank of one row")
    if impl == "auto":
        impl = "triton" if q.is_cuda and triton is not None and q.dtype != torch.float64 else "torch"
    if impl not in ("torch", "triton") or (impl == "triton" and (triton is None or q.dtype == torch.float64)):
        raise ValueError(f"impl={impl!r}: auto, torch, or triton (needs the triton package, takes at most fp32)")
    # All pairs, each row at most without itself: both gradients are the same sum, made once.
    symmetric = not softmax and q is bank and (
        exclude is None or torch.equal(exclude, torch.arange(len(q), device=q.device)))
    with torch.autocast(q.device.type, enabled=False):
        return _BankSum.apply(q, bank, 1 / temperature, exclude, target, softmax, symmetric, impl == "triton")


# ---- Public ------------------------------------------------------------------------------------------------
def bank_logsumexp(q, bank, temperature, exclude=None, impl="auto"):
    """log sum_n exp(q_b . m_n / temperature), [B] fp32. See bank_cross_entropy."""
    return _apply(q, bank, temperature, exclude, None, True, impl)


def bank_cross_entropy(q, bank, target, temperature, exclude=None, impl="auto"):
    """Mean over b of bank_logsumexp minus the logit of row target_b: InfoNCE with the whole bank as negatives.

    q [B, d], bank [N, d]: any float dtype and strides; used as they are, so normalise rows for cosines. Gradients go to
    whichever requires them; a bank that does not costs no backward pass. q and bank may be the same tensor.
    target, exclude: int64 [B], rows of the bank in [0, N), which only CPU tensors are checked for; exclude_b is left
    out of query b's sum (itself, say).
    temperature: above 0; safe at .01 and below. impl: "auto" (Triton for CUDA tensors), "torch", "triton".

    Returns an fp32 scalar (float64 for float64 input). Memory O((B + N) d) at the most, never B x N. ValueError for
    shapes, dtypes, options; RuntimeError in a double backward. Source: van den Oord et al., arXiv 1807.03748, eq. 4.
    """
    return _apply(q, bank, temperature, exclude, target, True, impl).mean()


def bank_repulsion(q, bank, exclude=None, impl="auto"):
    """Mean over all pairs (b, n), n != exclude_b, of max(0, q_b . m_n)^2, an fp32 scalar; arguments as above."""
    count = len(q) * (len(bank) - (exclude is not None))
    return _apply(q, bank, 1., exclude, None, False, impl).sum() / count


@torch.no_grad()
def bank_topk(q, bank, k):
    """The k largest dot products of each query, descending, and their rows: [B, k], int64 [B, k]. Exact, in chunks."""
    _check(q, bank)
    if not 1 <= k <= len(bank):
        raise ValueError(f"k = {k} must lie between 1 and the bank's {len(bank)} rows")
    work = torch.promote_types(q.dtype, torch.float32)
    best, row = q.new_empty((len(q), 0), dtype=work), q.new_empty((len(q), 0), dtype=torch.int64)
    with torch.autocast(q.device.type, enabled=False):
        q = q.to(work)
        for first, rows, buffer in _chunks(q, bank):
            s = torch.mm(q, rows.T, out=buffer.view(len(q), len(rows)))
            values, columns = s.topk(min(k, len(rows)), dim=1)
            best, row = torch.cat([best, values], 1), torch.cat([row, columns + first], 1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            row = row.gather(1, order)
    return best, row
