"""A batch against a memory bank: log-sum-exp, cross-entropy, repulsion, top-k, without a B x N matrix.

    bank_logsumexp(q, bank, t)          lse_b = log sum_n exp(q_b . m_n / t)
    bank_cross_entropy(q, bank, y, t)   mean_b (lse_b - q_b . m_{y_b} / t)
    bank_repulsion(q, bank)             mean_{b, n} max(0, q_b . m_n)^2
    bank_topk(q, bank, k)               the k largest q_b . m_n and their rows, exact
    unit_rows(x)                        x_n / |x_n|, for cosines

q [B, d], bank [N, d]. Every sum leaves out the columns exclude_b where `exclude` is given: a row of the bank
does not repel itself. Rows are used as they are: normalise them if the dot product shall be a cosine.

Arithmetic and bytes. The textbook form writes S = q bank^T, B x N numbers, reads them for the softmax and
writes them again for the backward: at (1024, 1M) 4 GB each time. Streaming reads the bank once in the forward
(4 N d bytes) and once more if it is trained itself; 4 B N d operations with the queries' gradient, 4 B N d
more with the bank's. At (256, 200k, 128) that is 26 (52) GFLOP over 102 MB: bound by arithmetic and by B N
exponentials, not by memory.

Accumulation is fp32, also inside autocast; float64 stays float64.
"""
import math

import torch
from torch import Tensor

from .launch import (check_temperature, is_hopper, on_device, opaque, pick, programs, refuse_double_backward,
                     refuse_transforms, tl, triton)


# ---- Reference: the specification --------------------------------------------------------------------------
def bank_reference(q, bank, temperature, target=None, exclude=None):
    """logsumexp [B], cross-entropy and repulsion with B x N in memory, by autograd; exclude [B] or [B, K]."""
    s = q @ bank.T                                     # [B, N]
    left_out = torch.zeros_like(s, dtype=torch.bool)
    if exclude is not None:
        left_out.scatter_(1, exclude.reshape(len(q), -1), True)
    logits = (s / temperature).masked_fill(left_out, -torch.inf)     # not before: -inf / t has no gradient
    lse = torch.logsumexp(logits, dim=1)
    repulsion = s.clamp(min=0).square().masked_fill(left_out, 0).sum() / (~left_out).sum()
    if target is None:
        return lse, None, repulsion
    positive = (q * bank[target]).sum(dim=1) / temperature
    return lse, (lse - positive).mean(), repulsion


# ---- Derivation --------------------------------------------------------------------------------------------
# All three are L = sum_b F(sum_n f(s_bn)), s_bn = q_b . m_n, so with the weight w_bn = dL/ds_bn
#
#   dq_b = sum_n w_bn m_n          dm_n = sum_b w_bn q_b
#
#   log-sum-exp   w_bn = g_b/t exp(s_bn/t - lse_b)      repulsion   w_bn = 2 g max(0, s_bn) / count
#
# dq is the sum that flash attention accumulates with K = V = bank: the forward can make O_b = sum_n f'_bn m_n
# in the same pass, and a detached bank needs no backward pass over the bank at all, nor to be what it was by
# then. dm needs w again, tile by tile, from lse_b. With a running maximum c_b, sums and O are rescaled by
# exp(c_old - c_new) whenever it grows; that is exact, and safe at any temperature. An excluded column has
# s = -inf: weight 0 in both. At 1/t = 10,000 an fp32 logit is .001 wrong: so lse_b is kept as its largest
# logit and the logarithm of the rest, and the target's logit comes from the same product, in the backward
# too: a product made again may be rounded otherwise.
#
# On CPUs torch has this pass as an operator, flash attention, a tenth quicker than ours with two threads or
# more. It gives lse_b as one number, so the target's logit is taken off all logits before: then that number
# is the loss. What rounding leaves in a loss near 0, 1e-7 of sum_k |q_k m_k|, bounds its use: LARGE.
#
# All is done in base 2, with queries that carry log2(e)/t, since 2^x costs less than e^x: 40 % of the time on
# CPUs, one instruction on GPUs. The queries are scaled outside of the autograd function, by autograd: so the
# temperature gets its gradient from theirs, d/d(1/t) = sum_b q_b . dq_b.

def _merge(top, total, out):
    """Partial (maximum [S, B], sum [S, B], output [S, B, d] or None) of S slabs -> maximum [B], log2 of the
    rest [B], output [B, d]."""
    high = top.amax(dim=0)
    weight = (top - high).exp2()
    total = (total * weight).sum(dim=0)
    if out is not None:
        out = (out * weight[:, :, None]).sum(dim=0) / total[:, None]
    return high, total.log2(), out


# ---- Plain torch -------------------------------------------------------------------------------------------
LN2 = math.log(2)
KEEP = 2 ** 22  # weights that a CPU keeps for the bank's gradient: 16 MB of fp32
FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)     # a private operator
LARGE = 20.                                            # sum_k |q_k m_k| of a target, by which sums round
GPU_CHUNK = 2 ** 26                                    # numbers in a chunk's matrix on a GPU: 256 MB of fp32


def _chunk_rows(q):
    """Bank rows at a time: on a GPU until its memory counts, on a CPU until its caches do."""
    if q.is_cuda:
        return max(512, GPU_CHUNK // len(q))
    return max(512, min(8192, 2 ** 19 // len(q)))      # 2 MB a tile: measured best at 2 cores


def _chunks(q, bank, size):
    """(first row, bank rows [C, d] in q's dtype) for each chunk of the bank."""
    for first in range(0, len(bank), size):
        yield first, bank[first:first + size].to(q.dtype)


def _places(index, first, count):
    """Places [K, B] of index [B, K] in a chunk of `count` bank rows from `first` on; `count` for all others.

    Without a look at which these are, which on a GPU would have to be waited for.
    """
    local = (index - first).T
    return local.masked_fill_((local < 0) | (local >= count), count)


def _leave_out(s, exclude, first):
    """s [C + 1, B], a chunk's products and a spare row: -inf at those of exclude [B, K], NaN or not."""
    s.scatter_(0, _places(exclude, first, len(s) - 1), -torch.inf)


def _flash_wins(q, bank, exclude, softmax, with_output, trained):
    """Whether torch's own flash attention has all that is asked for, and a block of queries a thread."""
    if FLASH is None or trained or exclude is not None or not (softmax and with_output):
        return False
    fits = q.device.type == "cpu" and q.dtype == bank.dtype == torch.float32
    fits = fits and bank.stride(1) == 1 and bank.stride(0) >= bank.shape[1]
    block = 32 if len(q) < 192 else 64 if len(q) < 768 else 256                     # as torch 2.13 cuts them
    return fits and 1 < torch.get_num_threads() <= len(q) // block


def _forward_flash(q, bank, target):
    """As _forward_torch, for a detached bank; None where the loss would lose digits."""
    top = q.new_zeros(len(q))
    mask = None
    if target is not None:
        products = q * bank[target]
        top = products.sum(dim=1)
        if not products.abs_().sum(dim=1).amax() * LN2 < LARGE:
            return None
        mask = (top * -LN2)[None, None, :, None]           # what attention adds to all of a query's logits
    keys = bank[None, None]
    out, lse = FLASH(q[None, None], keys, keys, attn_mask=mask, scale=LN2)
    positive = q.new_empty(0) if target is None else top.clone()
    return top, lse[0, 0] / LN2, out[0, 0], positive, q.new_empty(0), q.new_empty(0)


def _forward_torch(q, bank, exclude, target, softmax, with_output, keep):
    """As _forward. Tiles lie [C, B]: faster."""
    size = min(_chunk_rows(q), len(bank))
    qt = q.T.contiguous()
    top = q.new_full((len(q),), -torch.inf)
    total = q.new_zeros(len(q))
    out = torch.zeros_like(q) if with_output else None
    weights = q.new_empty((len(bank) if keep else size) + 1, len(q))
    positive = q.new_zeros(1, 0 if target is None else len(q))
    tops = []
    for first, rows in _chunks(q, bank, size):
        tile = weights[first:] if keep else weights
        tile = tile[:len(rows) + 1]                    # a spare row, for what is not in this chunk
        s = torch.mm(rows, qt, out=tile[:-1])                                              # [C, B]
        if target is not None:
            tile[-1] = positive
            positive = tile.gather(0, _places(target[:, None], first, len(rows)))
        if exclude is not None:
            _leave_out(tile, exclude, first)
        if softmax:
            new = torch.maximum(top, s.amax(dim=0))
            shift = new.clamp(min=torch.finfo(q.dtype).min)  # all excluded so far
            weight = s.sub_(shift).exp2_()
            rescale = (top - shift).exp2_()
            total = total * rescale + weight.sum(dim=0)
            top = new
            if keep:
                tops.append(shift)
            if with_output:
                out *= rescale[:, None]
        else:
            weight = s.clamp_(min=0)
            total += torch.linalg.vector_norm(weight, dim=0).square()
        if with_output:
            out.addmm_(weight.T, rows)
    rest = total
    if softmax:
        top, rest, out = _merge(top[None], total[None], None if out is None else out[None])
    tops = torch.stack(tops) if tops else q.new_empty(0)
    return top, rest, out, positive[0], weights[:-1] if keep else q.new_empty(0), tops


def _backward_torch(q, bank, exclude, target, top, rest, positive, g, softmax):
    """dL/d bank [N, d], sum_b g_b w_bn q_b, for q, top, rest, positive as in the forward; g [B] upstream."""
    dm = torch.empty(bank.shape, dtype=q.dtype, device=q.device)
    weighted = q * (g * (-rest).exp2() if softmax else g)[:, None]
    qt = q.T.contiguous()
    size = min(_chunk_rows(q), len(bank))
    buffer = q.new_empty(size + 1, len(q))
    for first, rows in _chunks(q, bank, size):
        tile = buffer[:len(rows) + 1]
        s = torch.mm(rows, qt, out=tile[:-1])                                              # [C, B]
        if target is not None:
            own = _places(target[:, None], first, len(rows))
            tile.scatter_(0, own, positive[None])
        if exclude is not None:
            _leave_out(tile, exclude, first)
        weight = s.sub_(top).exp2_() if softmax else s.clamp_(min=0)                       # times 2^rest
        if target is not None:
            tile.scatter_add_(0, own, -rest.exp2()[None])
        torch.mm(weight, weighted, out=dm[first:first + len(rows)])
    return dm


def _backward_kept(q, bank, target, top, rest, g, weights, tops):
    """As _backward_torch, from the weights [N, B] that the forward kept and what it took off their
    logarithms."""
    dm = torch.empty(bank.shape, dtype=q.dtype, device=q.device)
    weighted = q * g[:, None]
    mixed = torch.empty_like(q) if len(tops) else weighted
    size = min(_chunk_rows(q), len(bank))
    for number, first in enumerate(range(0, len(bank), size)):
        rows = slice(first, first + size)
        if len(tops):
            mixed = torch.mul(weighted, (tops[number] - top - rest).exp2()[:, None], out=mixed)
        torch.mm(weights[rows], mixed, out=dm[rows])
    if target is not None:
        dm.index_add_(0, target, weighted, alpha=-1)
    return dm


# ---- Triton ------------------------------------------------------------------------------------------------
# Two kernels with static tile sizes, no atomics: bitwise reproducible. A forward program walks one slab of
# the bank for 64 queries and leaves partial maxima, sums and outputs; a backward program owns 64 rows of the
# bank and walks the queries. Registers hold 64 x SLICE numbers of output: where d is larger than SLICE,
# further programs make the other slices, each with all of s, which is summed over d in steps of BLOCK_K.
# Offsets are int64; all is cast to fp32 right after the load; what lies past an edge is loaded as 0, and set
# to -inf before an exp.
if triton is not None:

    @triton.jit
    def _tile(
            x,  # [count, d], strides stride, stride_d
            rows,  # which of them, an int32 vector
            count, first, d,
            stride, stride_d,
            WIDTH: tl.constexpr,
    ):
        """x[rows, first:first + WIDTH] in fp32, 0 outside."""
        cols = first + tl.arange(0, WIDTH)[None, :]
        at = rows.to(tl.int64)[:, None] * stride + cols.to(tl.int64) * stride_d
        return tl.load(x + at, mask=(rows[:, None] < count) & (cols < d), other=0.).to(tl.float32)

    @triton.jit
    def _slab(
            q,  # [B, d], scaled; strides stride_q, stride_qd
            bank,  # [N, d]; strides stride_m, stride_md
            exclude,  # [B, excluded] rows of the bank, contiguous; not read without EXCLUDE
            target,  # [B] rows of the bank, contiguous; not read without TARGET
            top,  # [slabs, B] out, maxima
            total,  # [slabs, B] out, sums
            out,  # [slabs, B, d] out, sums of weighted bank rows; not written without OUTPUT
            positive,  # [B] out, s of the target, by the slab that it is in; only with TARGET
            B, N, d, excluded, rows_per_slab,
            stride_q, stride_qd,
            stride_m, stride_md,
            SOFTMAX: tl.constexpr,  # 2^s and its maximum; else max(0, s)^2
            EXCLUDE: tl.constexpr,  # whether queries leave out rows
            TARGET: tl.constexpr,  # whether there are targets
            OUTPUT: tl.constexpr,  # whether out is asked for
            OWN: tl.constexpr,  # queries of a program
            OTHER: tl.constexpr,  # bank rows at a time
            BLOCK_K: tl.constexpr,  # of d at a time
            SLICE: tl.constexpr,  # columns of out
            PRECISION: tl.constexpr,  # of tl.dot
    ):
        """Partial maximum, sum and one slice of the output of OWN queries over one slab of the bank."""
        b = tl.program_id(0) * OWN + tl.arange(0, OWN)
        slab = tl.program_id(1)
        part = tl.program_id(2) * SLICE
        high = tl.full([OWN], -float("inf"), tl.float32)
        acc = tl.zeros([OWN], tl.float32)
        o = tl.zeros([OWN, SLICE], tl.float32)
        first = slab * rows_per_slab
        last = tl.minimum(first + rows_per_slab, N)
        for start in range(first, last, OTHER):
            n = start + tl.arange(0, OTHER)
            s = tl.zeros([OWN, OTHER], tl.float32)
            for k in range(0, d, BLOCK_K):
                qk = _tile(q, b, B, k, d, stride_q, stride_qd, BLOCK_K)
                mk = _tile(bank, n, last, k, d, stride_m, stride_md, BLOCK_K)
                s += tl.dot(qk, tl.trans(mk), input_precision=PRECISION)
            if TARGET:
                y = tl.load(target + b, mask=b < B, other=-1)
                own = tl.sum(tl.where(n[None, :] == y[:, None], s, 0.), axis=1)
                tl.store(positive + b, own, mask=(y >= start) & (y < start + OTHER))
            s = tl.where((n < last)[None, :], s, -float("inf"))
            if EXCLUDE:
                for number in range(0, excluded):
                    without = tl.load(exclude + b * excluded + number, mask=b < B, other=-1)
                    s = tl.where(n[None, :] == without[:, None], -float("inf"), s)
            if SOFTMAX:
                new = tl.maximum(high, tl.max(s, axis=1))
                shift = tl.where(new == -float("inf"), 0., new)                # all excluded so far
                weight = tl.exp2(s - shift[:, None])
                rescale = tl.exp2(high - shift)
                acc = acc * rescale + tl.sum(weight, axis=1)
                high = new
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
    def _bank_rows(
            q,  # [B, d], scaled; strides stride_q, stride_qd
            bank,  # [N, d]; strides stride_m, stride_md
            exclude,  # [B, excluded] rows of the bank, contiguous; not read without EXCLUDE
            target,  # [B] rows of the bank, contiguous; not read without TARGET
            top, rest,  # [B], log2 of the sums in two parts; not read without SOFTMAX
            positive,  # [B], s of the target as the forward had it; not read without TARGET
            g,  # [B], upstream gradient
            dm,  # [N, d] out, contiguous
            B, N, d, excluded,
            stride_q, stride_qd,
            stride_m, stride_md,
            SOFTMAX: tl.constexpr,
            EXCLUDE: tl.constexpr,
            TARGET: tl.constexpr,
            OWN: tl.constexpr,  # bank rows of a program
            OTHER: tl.constexpr,  # queries at a time
            BLOCK_K: tl.constexpr,  # of d at a time
            SLICE: tl.constexpr,  # columns of dm
            PRECISION: tl.constexpr,  # of tl.dot
    ):
        """One slice of dm for OWN rows of the bank: sum_b g_b w_bn q_b over all queries."""
        n = tl.program_id(0) * OWN + tl.arange(0, OWN)
        part = tl.program_id(1) * SLICE
        acc = tl.zeros([OWN, SLICE], tl.float32)
        for start in range(0, B, OTHER):
            b = start + tl.arange(0, OTHER)
            s = tl.zeros([OWN, OTHER], tl.float32)
            for k in range(0, d, BLOCK_K):
                mk = _tile(bank, n, N, k, d, stride_m, stride_md, BLOCK_K)
                qk = _tile(q, b, B, k, d, stride_q, stride_qd, BLOCK_K)
                s += tl.dot(mk, tl.trans(qk), input_precision=PRECISION)
            if TARGET:
                y = tl.load(target + b, mask=b < B, other=-1)[None, :]
                s = tl.where(n[:, None] == y, tl.load(positive + b, mask=b < B, other=0.)[None, :], s)
            if EXCLUDE:
                for number in range(0, excluded):
                    without = tl.load(exclude + b * excluded + number, mask=b < B, other=-1)
                    s = tl.where(n[:, None] == without[None, :], -float("inf"), s)
            if SOFTMAX:
                s -= tl.load(top + b, mask=b < B, other=0.)[None, :]
                s -= tl.load(rest + b, mask=b < B, other=0.)[None, :]
                weight = tl.exp2(tl.where(n[:, None] < N, s, -float("inf")))
            else:
                weight = tl.maximum(s, 0.)
            if TARGET:
                weight -= tl.where(n[:, None] == y, 1., 0.)
            weight *= tl.load(g + b, mask=b < B, other=0.)[None, :]
            qs = _tile(q, b, B, part, d, stride_q, stride_qd, SLICE)
            acc += tl.dot(weight, qs, input_precision=PRECISION)
        cols = part + tl.arange(0, SLICE)[None, :]
        tl.store(dm + n.to(tl.int64)[:, None] * d + cols, acc, mask=(n[:, None] < N) & (cols < d))

    OWN, OTHER = 64, 32                                # 64 rows: the least that Hopper's matrix units take
    PRECISION = "ieee" if torch.version.hip else "tf32x3"      # fp32 on tensor cores; AMD's take fp32 itself


def _tiles(d, hopper=False):
    """Static tile sizes, the largest found that spill no registers: results do not depend on a search.

    hopper: whether launch.is_hopper. There four warps have room for two programs on a processor; elsewhere
    they would spill.
    """
    part = min(128, max(16, triton.next_power_of_2(d)))
    sizes = dict(OWN=OWN, OTHER=OTHER, BLOCK_K=min(32, part), SLICE=part)
    return dict(**sizes, PRECISION=PRECISION, num_warps=4 if hopper else 8, num_stages=2)


def _forward_triton(q, bank, exclude, target, softmax, with_output):
    """As _forward, keeping nothing."""
    B, d = q.shape
    N = len(bank)
    tiles = _tiles(d, is_hopper(q))
    blocks = triton.cdiv(B, OWN)
    parts = triton.cdiv(d, tiles["SLICE"]) if with_output else 1
    # Slabs until the device is full, none shorter than eight tiles.
    slabs = max(1, min(programs(q) // (blocks * parts), N // (8 * OTHER)))
    rows_per_slab = triton.cdiv(triton.cdiv(N, slabs), OTHER) * OTHER
    slabs = triton.cdiv(N, rows_per_slab)

    top = q.new_empty((slabs, B))
    total = q.new_empty((slabs, B))
    out = q.new_empty((slabs, B, d)) if with_output else None
    positive = q.new_empty(0 if target is None else B)
    count = 0 if exclude is None else exclude.shape[1]
    with on_device(q):
        _slab[blocks, slabs, parts](q, bank, exclude, target, top, total, out, positive, B, N, d, count,
                                    rows_per_slab, *q.stride(), *bank.stride(), softmax, count > 0,
                                    target is not None, with_output, **tiles)
    if softmax:
        return *_merge(top, total, out), positive
    return top[0], total.sum(dim=0), None if out is None else out.sum(dim=0), positive


def _backward_triton(q, bank, exclude, target, top, rest, positive, g, softmax):
    """As _backward_torch."""
    B, d = q.shape
    dm = torch.empty(bank.shape, dtype=q.dtype, device=q.device)
    tiles = _tiles(d, is_hopper(q))
    count = 0 if exclude is None else exclude.shape[1]
    grid = triton.cdiv(len(bank), OWN), triton.cdiv(d, tiles["SLICE"])
    with on_device(q):
        _bank_rows[grid](q, bank, exclude, target, top, rest, positive, g, dm, B, len(bank), d, count,
                         *q.stride(), *bank.stride(), softmax, count > 0, target is not None, **tiles)
    return dm


# ---- Both ways ---------------------------------------------------------------------------------------------
def _keeps(q, bank, use_triton):
    """Whether the forward keeps its weights [N, B] for the bank's gradient: on a CPU, as long as they are
    few."""
    return not (use_triton or q.is_cuda) and len(q) * len(bank) <= KEEP


def _shapes_forward(q, bank, exclude, target, softmax, with_output, trained, use_triton):
    B, N = len(q), len(bank)
    keep = trained and _keeps(q, bank, use_triton)
    chunks = -(-N // min(_chunk_rows(q), N)) if keep else 0
    out = torch.empty_like(q) if with_output else q.new_empty(0)
    positive = q.new_empty(0 if target is None else B)
    weights = q.new_empty(N, B) if keep else q.new_empty(0)
    shifts = q.new_empty(chunks, B) if softmax and keep else q.new_empty(0)
    return q.new_empty(B), q.new_empty(B), out, positive, weights, shifts


@opaque("bank_forward", _shapes_forward)
def _forward(q: Tensor, bank: Tensor, exclude: Tensor | None, target: Tensor | None, softmax: bool,
             with_output: bool, trained: bool,
             use_triton: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q [B, d], scaled -> log2 sum_n 2^s_bn as two parts [B], the largest s (or, by flash attention, that of
    the target, or 0) and rest, or rest = sum_n max(0, s_bn)^2; O [B, d]; s of the target [B]; weights [N, B],
    shifts.

    Empty tensors for what is not asked for: O only with_output, weights if _keeps and the bank is trained.
    """
    weights, shifts = q.new_empty(0), q.new_empty(0)
    if use_triton:
        top, rest, out, positive = _forward_triton(q, bank, exclude, target, softmax, with_output)
    else:
        keep = trained and _keeps(q, bank, use_triton)
        found = None
        if _flash_wins(q, bank, exclude, softmax, with_output, trained):
            found = _forward_flash(q, bank, target)
        if found is None:
            found = _forward_torch(q, bank, exclude, target, softmax, with_output, keep)
        top, rest, out, positive, weights, shifts = found
    return top, rest, q.new_empty(0) if out is None else out, positive, weights, shifts


def _shapes_backward(q, bank, *rest):
    return q.new_empty(bank.shape)


@opaque("bank_backward", _shapes_backward)
def _backward(q: Tensor, bank: Tensor, exclude: Tensor | None, target: Tensor | None, top: Tensor,
              rest: Tensor, positive: Tensor, weights: Tensor, shifts: Tensor, g: Tensor, softmax: bool,
              use_triton: bool) -> Tensor:
    """dL/d bank [N, d] from what the forward left and g [B] upstream."""
    if use_triton:
        return _backward_triton(q, bank, exclude, target, top, rest, positive, g, softmax)
    if len(weights):
        return _backward_kept(q, bank, target, top, rest, g, weights, shifts)
    return _backward_torch(q, bank, exclude, target, top, rest, positive, g, softmax)


# ---- Autograd ----------------------------------------------------------------------------------------------

class _BankSum(torch.autograd.Function):
    """ln sum_n 2^s_bn, minus the target's logit; or sum_n max(0, s_bn)^2: one number a query."""

    @staticmethod
    def forward(ctx, q, bank, exclude, target, softmax, symmetric, use_triton):
        with_output, trained = ctx.needs_input_grad[:2]
        trained = trained and not symmetric            # its gradient comes with that of q
        found = _forward(q, bank, exclude, target, softmax, with_output, trained, use_triton)
        top, rest, out, positive, weights, shifts = found
        result = LN2 * (top + rest) if softmax else rest
        if target is not None:
            result = LN2 * (top - positive + rest)     # in this order: the first two may be large, and equal
            if with_output:
                out = out - bank[target].to(q.dtype)
        # The bank, and what belongs to it, only if it is trained: else it may change before the backward.
        kept = (q, bank, exclude, target, top, rest, positive, weights, shifts) if trained else ()
        ctx.save_for_backward(out, *kept)
        ctx.options = softmax, symmetric, use_triton
        return result

    @staticmethod
    def backward(ctx, g):
        refuse_double_backward("a bank function")
        out, *kept = ctx.saved_tensors
        softmax, symmetric, use_triton = ctx.options
        g = g * (LN2 if softmax else 2)
        dq = dm = None
        if kept:
            q, bank, *_ = kept
            with torch.autocast(q.device.type, enabled=False):
                dm = _backward(*kept, g.contiguous(), softmax, use_triton)
            dm = dm.to(bank.dtype)
        if ctx.needs_input_grad[0]:
            dq = out * (2 * g if symmetric else g)[:, None]
        return dq, dm, None, None, None, None, None


def _check(q, bank):
    fit = q.ndim == bank.ndim == 2 and q.shape[1] == bank.shape[1]
    if not (fit and q.numel() and bank.numel()):
        shapes = f"q {list(q.shape)} and bank {list(bank.shape)}"
        raise ValueError(f"{shapes} must be [B, d] and [N, d], not empty")
    if not (q.is_floating_point() and bank.is_floating_point()):
        raise ValueError(f"q {q.dtype} and bank {bank.dtype} must be floats")
    if q.device != bank.device:
        raise ValueError(f"q is on {q.device}, the bank on {bank.device}")


def _check_rows(name, index, shapes, q, bank):
    """Indices of the bank's rows."""
    if index.dtype != torch.int64 or index.ndim not in (1, 2) or len(index) != len(q) or index.ndim > shapes:
        wanted = f"[{len(q)}]" if shapes == 1 else f"[{len(q)}] or [{len(q)}, K]"
        raise ValueError(f"{name} must be int64 {wanted}, bank rows; got {index.dtype} {list(index.shape)}")
    if index.device != q.device:
        raise ValueError(f"{name} is on {index.device}, q on {q.device}")
    if index.is_cuda or torch.compiler.is_compiling():
        return                                         # a look at the values would have to be waited for
    low, high = index.min(), index.max()
    if low < 0 or high >= len(bank):
        raise ValueError(f"{name} has rows {low} to {high}: the bank's are 0 to {len(bank) - 1}")


def _excluded(exclude, q, bank):
    """`exclude` as a contiguous [B, K] or None, checked."""
    if exclude is None or (isinstance(exclude, Tensor) and exclude.ndim == 2 and not exclude.shape[1]):
        return None
    if isinstance(exclude, str):
        if exclude != "self" or len(q) != len(bank):
            raise ValueError(f'exclude={exclude!r}: "self" needs as many queries ({len(q)}) as bank rows '
                             f"({len(bank)})")
        exclude = torch.arange(len(q), device=q.device)
    else:
        _check_rows("exclude", exclude, 2, q, bank)
    exclude = exclude.reshape(len(q), -1).contiguous()
    most = exclude.shape[1]
    if most >= len(bank) and not torch.compiler.is_compiling():
        most = _distinct(exclude).max()                # padded lists: a row may be named more than once
    if most >= len(bank):
        raise ValueError(f"exclude leaves nothing of a bank of {'one row' if len(bank) == 1 else len(bank)}")
    return exclude


def _distinct(exclude):
    """How many different rows each query leaves out, [B]."""
    return 1 + (exclude.sort(dim=1).values.diff(dim=1) != 0).sum(dim=1)


def _apply(q, bank, temperature, exclude, target, softmax, impl):
    """Check, choose an implementation, run: [B]."""
    refuse_transforms("a bank function", "bank_reference")
    _check(q, bank)
    check_temperature(temperature)
    if target is not None:
        _check_rows("target", target, 1, q, bank)
        target = target.contiguous()                   # as the kernels read it
    # All pairs of one tensor: both gradients are the same sum, made once. From other indices it cannot be
    # told whether they are each row's own, but by a look at them.
    symmetric = not softmax and q is bank and (exclude is None or isinstance(exclude, str))
    exclude = _excluded(exclude, q, bank)
    use_triton = pick(impl, [q, bank]) == "triton"
    work = torch.promote_types(torch.promote_types(q.dtype, bank.dtype), torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        scaled = q.to(work)
        if scaled is bank:                             # torch.compile takes no tensor twice
            bank = bank.detach() if symmetric else bank.view_as(bank)
        if softmax:
            if isinstance(temperature, Tensor):
                temperature = temperature.reshape(()).to(work)
            scaled = scaled * (1 / (LN2 * temperature))
        scaled = scaled.contiguous()                   # as torch.compile is told that it is
        return _BankSum.apply(scaled, bank, exclude, target, softmax, symmetric, use_triton)


# ---- Public ------------------------------------------------------------------------------------------------
def unit_rows(x):
    """Rows of x [N, d] at length 1, in fp32 or finer; rows shorter than 1e-12 become 0 and get gradient 0
    (those whose squares overflow, from 1e19 in fp32 on, become 0 too).

    F.normalize divides these by 1e-12, and their gradients with them: one blank image can end a run.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    length = x.norm(dim=1, keepdim=True)
    return x / length.masked_fill(length < 1e-12, torch.inf)


def bank_logsumexp(q, bank, temperature, exclude=None, impl="auto"):
    """log sum_n exp(q_b . m_n / temperature), [B] fp32. See bank_cross_entropy."""
    return _apply(q, bank, temperature, exclude, None, True, impl)


def bank_cross_entropy(q, bank, target, temperature, exclude=None, impl="auto"):
    """Mean over b of bank_logsumexp minus the logit of row target_b: InfoNCE, its negatives the whole bank.

    q [B, d], bank [N, d]: any float dtype and strides; used as they are, so normalise rows for cosines.
    Gradients go to whichever requires them; a bank that does not costs no backward pass, and may be
    overwritten before it. q and bank may be the same tensor.
    target: int64 [B], rows of the bank in [0, N): checked on CPUs alone, and not under torch.compile.
    exclude: int64 [B] or [B, K], rows likewise, left out of query b's sum, once though named twice; "self":
    of as many queries as there are rows, each leaves out its own.
    temperature: above 0; safe at 0.01 and below. A number, or a tensor of one, which gets its gradient.
    impl: "auto" (Triton for CUDA tensors), "torch", "triton".

    Returns an fp32 scalar (float64 if q or bank is); on a CPU that of a detached bank may be 2e-6 off where
    it is near 0, and below it. Memory O((B + N) d) at the most, and on a CPU 16 MB of weights if the bank is
    trained; never B x N. ValueError for shapes, dtypes, devices, options; RuntimeError in a double backward.
    Source: van den Oord et al., arXiv 1807.03748, eq. 4.
    """
    return _apply(q, bank, temperature, exclude, target, True, impl).mean()


def bank_repulsion(q, bank, exclude=None, impl="auto"):
    """Mean over all pairs (b, n) but the excluded of max(0, q_b . m_n)^2, an fp32 scalar; arguments as above.

    bank_repulsion(x, x, "self") or without exclude makes the gradient of both roles in one pass.
    """
    total = _apply(q, bank, 1., exclude, None, False, impl).sum()
    left_out = 0
    if isinstance(exclude, Tensor) and exclude.ndim == 2 and exclude.shape[1] > 1:
        left_out = _distinct(exclude).sum()
    elif exclude is not None:
        left_out = len(q) if isinstance(exclude, str) else exclude.numel()
    return total / (len(q) * len(bank) - left_out)


# ---- Top-k -------------------------------------------------------------------------------------------------
TOPK_ROWS = 2 ** 14                                    # of the bank at a time on a CPU, at least: few merges
TOPK_CHUNK = 2 ** 21                                   # numbers at a time, likewise: 8 MB of fp32
TOPK_QUERIES = 256                                     # at a time on a CPU: more would leave few rows a chunk
GROUP = 8                                              # bank rows whose largest product is looked at first


@torch.no_grad()
def bank_topk(q, bank, k):
    """The k largest dot products of each query, descending, exact, and their rows: [B, k], int64 [B, k].

    In chunks. Computed and returned in the wider of both dtypes, fp32 at least; ties break arbitrarily. What
    is among the k largest lies in one of the k groups with the largest maxima: only these are sorted.
    """
    refuse_transforms("bank_topk", "(q @ bank.T).topk(k)")
    _check(q, bank)
    if not 1 <= k <= len(bank):
        raise ValueError(f"k = {k} must lie between 1 and the bank's {len(bank)} rows")
    work = torch.promote_types(torch.promote_types(q.dtype, bank.dtype), torch.float32)
    at_once = len(q) if q.is_cuda else TOPK_QUERIES
    with torch.autocast(q.device.type, enabled=False):
        found = [_topk(queries.to(work), bank, k) for queries in q.split(at_once)]
    values, rows = zip(*found)
    return torch.cat(values), torch.cat(rows)


def _topk_rows(q):
    """Bank rows at a time."""
    if q.is_cuda:
        return max(_chunk_rows(q), TOPK_CHUNK // len(q))
    return max(_chunk_rows(q), TOPK_CHUNK // len(q), TOPK_ROWS)


def _topk(q, bank, k):
    """bank_topk of some queries, in their dtype."""
    size = min(_topk_rows(q), len(bank))
    members = torch.arange(GROUP, device=q.device)
    least = torch.finfo(q.dtype).min
    best = rows = None
    qt = q.T.contiguous()
    buffer = q.new_empty(size + GROUP, len(q))
    for first, part in _chunks(q, bank, size):
        groups = -(-len(part) // GROUP)
        s = buffer[:GROUP * groups]                    # [C, B], tiles as in _forward_torch
        torch.mm(part, qt, out=s[:len(part)])
        if len(part) < len(s):                         # a product of -inf comes before what is no row
            s[:len(part)].clamp_(min=least)
            best = None if best is None else best.clamp_(min=least)
        s[len(part):] = -torch.inf
        highest = s.view(groups, GROUP, len(q)).amax(dim=1)
        _, group = highest.T.topk(min(k, groups), dim=1)
        columns = (GROUP * group[:, :, None] + members).flatten(1)             # [B, at most GROUP k]
        values = s.T.gather(1, columns)
        columns += first
        if best is not None:
            values = torch.cat([best, values], dim=1)
            columns = torch.cat([rows, columns], dim=1)
        best, order = values.topk(min(k, values.shape[1]), dim=1)
        rows = columns.gather(1, order)
    return best.masked_fill_(best == least, -torch.inf), rows
