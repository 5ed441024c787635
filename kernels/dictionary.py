"""FALCON's loss on a fixed random dictionary of signs, without an n x c matrix of assignments.

    dictionary_loss(h1, h2, codes, seed, t)     prior, cross_entropy of two views' assignments to c codes
    dictionary_signs(codes, f, seed)            the dictionary itself, W [c, f] of +-1

h1, h2 [n, f]: features of two views, of which p = softmax(h W^T / t) [n, c] are soft assignments to codes.
The signs are bits of a hash of (seed, code, feature): a GPU makes them where it needs them and never stores
the dictionary, a CPU holds it as bytes, small ones as fp32, and both have the same one.

Arithmetic and bytes. The textbook form keeps p and log p of both views and their gradients, some ten arrays
of n x c numbers: 700 MB at n = 64, c = 262,144. Streaming over the codes keeps O(n f + c), at the price of
making the logits three times instead of once: 16 n c f operations, forward and backward, against 8 with the
logarithms of p kept, which is what a CPU does as long as they fit KEEP (of few codes p, too). (Triton has a
pass of its own for the mean assignment: 20, each in three products.) On tensor cores signs are exact in
bf16, and any fp32 number is exactly the sum of three bf16 numbers: three such products are as good as fp32,
where no long sum is left to the tensor cores, whose accumulators round towards zero (Ootomo, Yokota 2022).

Accumulation is fp32, also inside autocast; float64 stays float64.
"""
import math
from functools import lru_cache

import torch
from torch import Tensor

from .launch import (INTERPRETED, check_temperature, free_to_look, on_device, opaque, pick, programs,
                     refuse_double_backward, refuse_transforms, tl, triton)


# ---- Reference: the specification --------------------------------------------------------------------------
def dictionary_reference(h1, h2, W, temperature, prior="reverse"):
    """prior and cross-entropy with n x c in memory, by autograd; W [c, f] may be any dictionary."""
    if prior not in ("reverse", "forward"):
        raise ValueError(f"prior {prior!r} is neither reverse nor forward")
    n, c = len(h1), len(W)
    priors, logs = [], []
    for h in (h1, h2):
        log = torch.log_softmax(h @ W.T / temperature, dim=1)          # log p [n, c]
        mean = torch.logsumexp(log, dim=0) - math.log(n)               # log of the mean p [c]
        logs.append(log)
        if prior == "reverse":
            priors.append((mean.exp() * (mean + math.log(c))).sum())   # KL(mean p || uniform)
        else:
            priors.append(-mean.mean())                                # KL(uniform || mean p) + log c
    a, b = logs
    cross = -(a.exp() * b + b.exp() * a).sum(dim=1).mean()
    return sum(priors) / 2, cross / 2


# ---- Derivation --------------------------------------------------------------------------------------------
# a and b are the assignments of the two views to codes j, l = log a; all logarithms are to base 2 (2^x costs
# less than e^x), with features that carry log2(e)/t, so that l_ij = h_i . w_j - lse_i. Four numbers a row or
# code suffice:
#
#   lse_i     log of the softmax' denominator: largest logit + log of the rest, kept apart for the digits
#   m_j       log mean_i a_ij = logsumexp_i l_ij - log n, from logarithms: every a_.j may underflow; largest
#             l_ij + log of the rest, kept apart
#   E_i       sum_j a_ij log b_ij
#   R_i       sum_j a_ij g_j,     g_j = m_j + log c (reverse prior) or -1 / (c 2^m_j) (forward)
#
#   cross-entropy = -ln 2 mean E       prior = ln 2 mean R (reverse) or -ln 2 mean m (forward)
#
# Softmax's Jacobian takes dL/da to a (dL/da - sum a dL/da): with s the logits in nats,
#
#   dCE/ds_ij = [a (ln 2 (E_i - log b) + 1) - b] / 2n
#   dprior/ds_ij = a (g_j - R_i) / 2n, times ln 2 if reverse
#
# where 2n comes from the mean over rows and views, and dh_i = sum_j ds_ij w_j / t. R needs m, and m needs all
# rows: three passes over the dictionary, lse | m, E, R | gradient; lse, m, E and R are all that the backward
# needs. Features are scaled outside of the autograd function, by autograd: it has the temperature's gradient.

WORD = 32                                              # signs that come from one hash


# ---- The dictionary ----------------------------------------------------------------------------------------
LOW = 0xFFFFFFFF                                       # the low 32 bits


def _plain(number):
    """A NumPy integer, which would overflow, as Python's."""
    return number.item() if hasattr(number, "item") else number


def _seed_offset(seed):
    """What the seed adds to a word's number before it is mixed."""
    return seed * 0x85EBCA6B & LOW


def dictionary_signs(codes, f, seed, dtype=torch.float32, device="cpu"):
    """W [codes, f] of +-1 for an integer seed >= 0: bit k % 32 of lowbias32(code * words + k // 32),
    seeded."""
    words = -(-f // WORD)
    x = torch.arange(codes * words, device=device)                     # int64: wraps, then masked
    x = (x * 0x9E3779B1 + _seed_offset(_plain(seed))) & LOW
    x = (x ^ x >> 16) * 0x7FEB352D & LOW               # the mixing function of skeeto/hash-prospector
    x = (x ^ x >> 15) * 0x846CA68B & LOW
    x = x ^ x >> 16
    signs = torch.empty(codes, words * WORD, dtype=dtype, device=device)
    for bit in range(WORD):
        signs[:, bit::WORD] = ((x >> bit & 1) * 2 - 1).view(codes, words)
    return signs[:, :f]


WIDE = 2 ** 20                                         # signs that are held as fp32, 4 MB: more as bytes


@lru_cache(maxsize=2)
def _held(codes, f, seed, device):
    dtype = torch.float32 if codes * f <= WIDE else torch.int8
    return dictionary_signs(codes, f, seed, dtype, device).contiguous()


# ---- Plain torch -------------------------------------------------------------------------------------------
KEEP = 2 ** 25  # logarithms that a CPU keeps for the backward: 128 MB of fp32
FEW = 2 ** 18                                          # assignments of which p is kept as well: 1 MB of fp32
UNDERFLOW = -120.                                      # 2^x is a normal number in fp32 above it
GPU_BLOCK = 2 ** 26                                    # logits, or signs, at a time on a GPU: 256 MB of fp32


def _block_size(h):
    """Codes at a time: on a GPU until its memory counts, on a CPU until its caches do."""
    _, n, f = h.shape
    if h.is_cuda:
        return max(256, min(GPU_BLOCK // (2 * n), GPU_BLOCK // f))
    return max(256, min(4096, 2 ** 17 // n, 2 ** 20 // f))             # 1 MB of logits, 4 of signs


def _blocks(h, codes):
    """A slice of the codes for each block of the dictionary."""
    size = _block_size(h)
    return [slice(first, min(first + size, codes)) for first in range(0, codes, size)]


def _unpacked(signs, block, space):
    """A block's signs [C, f]: as they are held, or, from bytes, in a buffer [block, f] of its dtype."""
    if signs.dtype == space.dtype:
        return signs[block]
    return space[:block.stop - block.start].copy_(signs[block])


def _logits_torch(h, rows, out):
    """out [2, n, C] of features [2, n, f] and signs [C, f]."""
    torch.mm(h.flatten(0, 1), rows.T, out=out.flatten(0, 1))
    return out


def _place(space, n, block, kept=True):
    """[2, n, C] in a buffer: each block by itself if all are kept, else one after the other in one place.

    New memory for each block instead leaves a heap in pieces: 3 GB where .6 are in use.
    """
    count = block.stop - block.start
    first = 2 * n * block.start if kept else 0
    return space[first:first + 2 * n * count].view(2, n, count)


def _is_small(h, codes):
    """Whether a CPU has all codes in one block, of few numbers: there calls cost more than what they do."""
    _, n, _ = h.shape
    return free_to_look(h) and codes <= _block_size(h) and 2 * n * codes <= min(KEEP, FEW)


def _forward_small(h, codes, seed, reverse, keep):
    """As _forward_torch, in few calls; p is kept beside its logarithms."""
    _, n, f = h.shape
    rows = _held(codes, f, seed, h.device).to(h.dtype)
    s = h.new_empty(2 * n, codes).addmm_(h.flatten(0, 1), rows.T, beta=0, alpha=math.log(2))
    log = torch.log_softmax(s.view(2, n, codes), dim=2)
    del s
    p = log.exp()
    log *= 1 / math.log(2)
    high, of_mean = 0, p                                               # as in _forward_torch
    if not log.amin() > UNDERFLOW:
        high = log.amax(dim=1)
        of_mean = (log - high[:, None]).exp2_()
    mean = of_mean.mean(dim=1)
    level = mean.log2()
    m = torch.stack([torch.zeros_like(level) + high, level])
    E = torch.stack([
        torch.linalg.vecdot(p[0], log[1]),
        torch.linalg.vecdot(p[1], log[0])])
    if reverse:
        R = torch.linalg.vecdot(p, (high + level + math.log2(codes))[:, None])
    else:
        R = (of_mean / mean[:, None]).sum(dim=2) / -codes
    lse = h.new_zeros(2, n)                                            # log p needs none
    if not keep:
        return lse, lse.clone(), m, E, R, h.new_empty(0), h.new_empty(0)
    return lse, lse.clone(), m, E, R, log.flatten(), p


def _backward_small(h, codes, seed, reverse, m, E, R, log, p, g_prior, g_cross):
    """As _backward_torch, from what _forward_small kept."""
    _, n, f = h.shape
    log = log.view_as(p)
    ln2 = math.log(2)
    g_prior = g_prior.item()
    g_cross = g_cross.item()
    of_row = g_cross - R * (g_prior * (ln2 if reverse else 1))
    slope = torch.empty_like(log)
    for view, other in ((0, 1), (1, 0)):
        torch.sub(E[view, :, None], log[other], out=slope[view])       # first: both may be large, and equal
    torch.add(of_row[:, :, None], slope, alpha=ln2 * g_cross, out=slope)
    if reverse:
        slope += (m.sum(dim=0) + math.log2(codes))[:, None] * (g_prior * ln2)
    slope *= p
    for view, other in ((0, 1), (1, 0)):
        slope[view].sub_(p[other], alpha=g_cross)
    if not reverse:
        high, mean = m[:, :, None]
        slope.sub_((log - high).sub_(mean).exp2_(), alpha=g_prior / codes)
    rows = _held(codes, f, seed, h.device).to(h.dtype)
    return torch.mm(slope.flatten(0, 1), rows).view(2, n, f)


def _forward_torch(h, codes, seed, reverse, keep):
    """As _forward."""
    if _is_small(h, codes):
        return _forward_small(h, codes, seed, reverse, keep)
    _, n, f = h.shape
    signs = _held(codes, f, seed, h.device)
    block_size = min(_block_size(h), codes)
    logs = h.new_empty(2 * n * (codes if keep else block_size))
    scratch = h.new_empty(2 * n * block_size)
    unpacked = h.new_empty(0 if signs.dtype == h.dtype else block_size, f)
    top = h.new_full((2, n), -torch.inf)                               # a row's largest logit so far
    total = h.new_zeros(2, n)                                          # its sum of 2^(logit - top)
    for block in _blocks(h, codes):
        s = _logits_torch(h, _unpacked(signs, block, unpacked), _place(logs, n, block, keep))
        new = torch.maximum(top, s.amax(dim=2))
        p = torch.sub(s, new[:, :, None], out=_place(scratch, n, block, False)).exp2_()
        total = total * (top - new).exp2() + p.sum(dim=2)
        top = new
    rest = total.log2()                                                # log2 p = logit - top - rest

    log_c = math.log2(codes)
    m = h.new_empty(2, 2, codes)                                       # log2 of a view's mean, two parts
    E = h.new_zeros(2, n)                                              # sum_j p_ij log2 p'_ij, p' the other's
    R = h.new_zeros(2, n)                                              # a row's part of the prior
    for block in _blocks(h, codes):
        log = _place(logs, n, block, keep)
        if not keep:
            _logits_torch(h, _unpacked(signs, block, unpacked), log)
        log.sub_(top[:, :, None]).sub_(rest[:, :, None])
        high = log.amax(dim=1, keepdim=True)                           # [2, 1, C]
        p = torch.sub(log, high, out=_place(scratch, n, block, False)).exp2_()
        mean = p.mean(dim=1, keepdim=True)
        m[0, :, block] = high[:, 0]
        m[1, :, block] = mean[:, 0].log2()
        if not reverse:
            R -= (p / mean).sum(dim=2) / codes
        p *= high.exp2()
        E[0] += torch.linalg.vecdot(p[0], log[1])
        E[1] += torch.linalg.vecdot(p[1], log[0])
        if reverse:
            R += torch.linalg.vecdot(p, m[:, :, None, block].sum(dim=0) + log_c)
    return top, rest, m, E, R, logs if keep else logs[:0].clone(), h.new_empty(0)


def _backward_torch(h, codes, seed, reverse, top, rest, m, E, R, kept, p, g_prior, g_cross):
    """sum_j 2n ds_ij w_j, [2, n, f], for upstream gradients of the two values."""
    if len(p):
        return _backward_small(h, codes, seed, reverse, m, E, R, kept, p, g_prior, g_cross)
    _, n, f = h.shape
    signs = _held(codes, f, seed, h.device)
    dh = torch.zeros_like(h)
    ln2, log_c = math.log(2), math.log2(codes)
    # 2n ds_ij = p_ij (g_cross ln 2 (E_i - log2 p'_ij) + of_row_i + ...) - g_cross p'_ij, as derived. E
    # less log2 p' first: both may be large, and equal.
    of_row = g_cross - g_prior * (ln2 * R if reverse else R)
    block_size = min(_block_size(h), codes)
    logs = kept if len(kept) else h.new_empty(2 * n * block_size)
    scratch = h.new_empty(2 * n * block_size)
    unpacked = h.new_empty(0 if signs.dtype == h.dtype else block_size, f)
    slopes = h.new_empty(n * block_size)
    for block in _blocks(h, codes):
        rows = _unpacked(signs, block, unpacked)
        log = _place(logs, n, block, len(kept))
        if not len(kept):
            _logits_torch(h, rows, log).sub_(top[:, :, None]).sub_(rest[:, :, None])
        high, mean = m[:, :, None, block]                              # [2, 1, C] each
        p = torch.exp2(log, out=_place(scratch, n, block, False))
        slope = slopes[:n * len(rows)].view(n, len(rows))
        for view, other in ((0, 1), (1, 0)):           # one at a time: each array of both would cost memory
            torch.sub(E[view, :, None], log[other], out=slope).mul_(ln2 * g_cross)
            slope += of_row[view, :, None]
            if reverse:
                slope += g_prior * ln2 * (high[view] + mean[view] + log_c)
            slope.mul_(p[view]).addcmul_(p[other], g_cross, value=-1)
            if not reverse:
                slope -= (log[view] - high[view]).exp2_() * (g_prior / codes * (-mean[view]).exp2())
            dh[view].addmm_(slope, rows)
    return dh


# ---- Triton ------------------------------------------------------------------------------------------------
# Static tile sizes, no atomics: bitwise reproducible. h comes as three bf16 parts whose sum it is, padded
# with zeros to a multiple of STEP features; each kernel makes its tiles of logits from them and from signs
# that it makes: one hash a code and 32 features. _code_means owns codes and walks the rows; _row_sums and
# _row_terms own rows, walk one slab of the codes, leave partial results; _slopes writes ds, in parts again,
# for as many codes as WORKSPACE holds, which _times_signs multiplies by the signs before the next ones are
# made. Rows and codes past an edge are set to -inf before an exp. The interpreter has no bf16 arithmetic:
# there (BF16 false) the same parts are multiplied in fp32.
PARTS = 3

if triton is not None:

    @triton.jit
    def _signs(
            code,  # [C] int32
            first,  # first feature, a multiple of 32
            words, offset,  # hashes a code; _seed_offset as int32
            WIDTH: tl.constexpr,  # features, a multiple of 32
            BF16: tl.constexpr,
    ):
        """Features first to first + WIDTH of codes -> [C, WIDTH] of +-1, bf16 or fp32."""
        word = first // 32 + tl.arange(0, WIDTH // 32)
        x = (code[:, None] * words + word[None, :]).to(tl.uint32) * 0x9E3779B1 + offset
        x = (x ^ (x >> 16)) * 0x7FEB352D
        x = (x ^ (x >> 15)) * 0x846CA68B
        x = x ^ (x >> 16)
        bits = (x[:, :, None] >> tl.arange(0, 32)[None, None, :].to(tl.uint32)) & 1
        bits = tl.reshape(bits, [code.shape[0], WIDTH])
        if BF16:
            # 0xBF80 is -1 in bf16, its highest bit the sign: no arithmetic is needed.
            signs = ((bits << 15) ^ 0xBF80).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        else:
            signs = bits.to(tl.float32) * 2 - 1
        return signs

    @triton.jit
    def _dot(a, b, acc, BF16: tl.constexpr):
        """acc + a b in fp32; a holds bf16 numbers, b signs, or the other way round."""
        if BF16:
            acc = tl.dot(a, b, acc)
        else:
            acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
        return acc

    @triton.jit
    def _add_logits(
            s,  # [R, C] fp32, what is there already
            h,  # [3, rows, width] bf16 parts, plane numbers apart
            row, rows,  # [R] int32; rows past `rows` count as 0
            signs,  # [STEP, C]
            k, width, plane,
            STEP: tl.constexpr,
            BF16: tl.constexpr,
    ):
        """s + features k to k + STEP of these rows times signs, s by an addition outside of the products."""
        some = tl.zeros_like(s)
        at = h + row.to(tl.int64)[:, None] * width + k + tl.arange(0, STEP)[None, :]
        for part in tl.static_range(3):
            tile = tl.load(at + part * plane, mask=row[:, None] < rows, other=0.)
            some = _dot(tile, signs, some, BF16)
        return s + some

    @triton.jit
    def _logits(
            h,  # [3, rows, width] bf16 parts, plane numbers apart
            row, rows,  # [R] int32; how many there are
            code, codes,  # [C] int32; how many there are
            width, plane,
            words, offset,  # of _signs
            STEP: tl.constexpr,
            BF16: tl.constexpr,
    ):
        """s [R, C] of rows [R] of h and codes [C]; -inf past the edges."""
        s = tl.zeros([row.shape[0], code.shape[0]], tl.float32)
        for k in range(0, width, STEP):
            signs = tl.trans(_signs(code, k, words, offset, STEP, BF16))
            s = _add_logits(s, h, row, rows, signs, k, width, plane, STEP, BF16)
        return tl.where((row[:, None] < rows) & (code[None, :] < codes), s, -float("inf"))

    @triton.jit
    def _minus_lse(s, top, rest, row, n):
        """log2 p [R, C] from logits [R, C] of rows [R] of a view, whose log-sum-exp has two parts [n]."""
        s -= tl.load(top + row, mask=row < n, other=0.)[:, None]
        return s - tl.load(rest + row, mask=row < n, other=0.)[:, None]

    @triton.jit
    def _row_sums(
            h,  # [3, rows, width] bf16, both views' rows
            top,  # [slabs, rows] out, maxima
            total,  # [slabs, rows] out, sums
            rows, codes, width, words, offset, codes_per_slab,
            ROWS: tl.constexpr,
            CODES: tl.constexpr,
            STEP: tl.constexpr,
            BF16: tl.constexpr,
    ):
        """Partial maximum and sum of 2^s over one slab of the codes, for ROWS of both views' rows."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        slab = tl.program_id(1)
        plane = tl.cast(rows, tl.int64) * width
        high = tl.full([ROWS], -float("inf"), tl.float32)
        acc = tl.zeros([ROWS], tl.float32)
        first = slab * codes_per_slab
        last = tl.minimum(first + codes_per_slab, codes)
        for start in range(first, last, CODES):
            code = start + tl.arange(0, CODES)
            s = _logits(h, row, rows, code, last, width, plane, words, offset, STEP, BF16)
            new = tl.maximum(high, tl.max(s, axis=1))
            shift = tl.where(new == -float("inf"), 0., new)            # rows past the edge
            acc = acc * tl.exp2(high - shift) + tl.sum(tl.exp2(s - shift[:, None]), axis=1)
            high = new
        at = slab.to(tl.int64) * rows + row
        tl.store(top + at, high, mask=row < rows)
        tl.store(total + at, acc, mask=row < rows)

    @triton.jit
    def _code_means(
            h,  # [3, 2 n, width] bf16
            top, rest,  # [2, n] each, the two parts of lse
            m,  # [2, 2, codes] out: two parts of both views
            n, codes, width, words, offset,
            ROWS: tl.constexpr,
            CODES: tl.constexpr,
            STEP: tl.constexpr,
            BF16: tl.constexpr,
    ):
        """m of CODES codes in one view."""
        code = tl.program_id(0) * CODES + tl.arange(0, CODES)
        view = tl.program_id(1).to(tl.int64)
        plane = tl.cast(n, tl.int64) * 2 * width
        h += view * n * width
        top += view * n
        rest += view * n
        high = tl.full([CODES], -float("inf"), tl.float32)
        acc = tl.zeros([CODES], tl.float32)
        for start in range(0, n, ROWS):
            row = start + tl.arange(0, ROWS)
            s = _logits(h, row, n, code, codes, width, plane, words, offset, STEP, BF16)
            log = _minus_lse(s, top, rest, row, n)
            new = tl.maximum(high, tl.max(log, axis=0))
            shift = tl.where(new == -float("inf"), 0., new)            # codes past the edge
            acc = acc * tl.exp2(high - shift) + tl.sum(tl.exp2(log - shift[None, :]), axis=0)
            high = new
        at = m + view * codes + code
        tl.store(at, high, mask=code < codes)
        tl.store(at + 2 * codes, tl.log2(tl.where(code < codes, acc, 1.) / n), mask=code < codes)

    @triton.jit
    def _two_views(
            h,  # [3, 2 n, width] bf16
            top, rest,  # [2, n] each
            row, code,  # [R], [C]
            n, last, width, words, offset,
            STEP: tl.constexpr,
            BF16: tl.constexpr,
    ):
        """log2 a and log2 b [R, C] of the same images; -inf past the edges. The signs are made once for
        both."""
        plane = tl.cast(n, tl.int64) * 2 * width
        h_b = h + tl.cast(n, tl.int64) * width
        a = tl.zeros([row.shape[0], code.shape[0]], tl.float32)
        b = tl.zeros([row.shape[0], code.shape[0]], tl.float32)
        for k in range(0, width, STEP):
            signs = tl.trans(_signs(code, k, words, offset, STEP, BF16))
            a = _add_logits(a, h, row, n, signs, k, width, plane, STEP, BF16)
            b = _add_logits(b, h_b, row, n, signs, k, width, plane, STEP, BF16)
        inside = (row[:, None] < n) & (code[None, :] < last)
        a = tl.where(inside, _minus_lse(a, top, rest, row, n), -float("inf"))
        b = tl.where(inside, _minus_lse(b, top + n, rest + n, row, n), -float("inf"))
        return a, b

    @triton.jit
    def _finite(log):
        """Logarithms with 0 past the edges, where they are -inf: there p log p shall be 0."""
        return tl.where(log == -float("inf"), 0., log)

    @triton.jit
    def _two_parts(m, code, codes, last):
        """The parts [1, C] of a view's m; 0 past the edge."""
        high = tl.load(m + code, mask=code < last, other=0.)
        rest = tl.load(m + 2 * codes + code, mask=code < last, other=0.)
        return high[None, :], rest[None, :]

    @triton.jit
    def _row_terms(
            h,  # [3, 2 n, width] bf16
            top, rest,  # [2, n] each
            m,  # [2, 2, codes]
            out,  # [slabs, 4, n] out: E of both views, R of both views
            n, codes, width, words, offset, log_c, codes_per_slab,
            REVERSE: tl.constexpr,
            ROWS: tl.constexpr,
            CODES: tl.constexpr,
            STEP: tl.constexpr,
            BF16: tl.constexpr,
    ):
        """Partial E and R over one slab of the codes, for ROWS images."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        slab = tl.program_id(1)
        e_a = tl.zeros([ROWS], tl.float32)
        e_b = tl.zeros([ROWS], tl.float32)
        r_a = tl.zeros([ROWS], tl.float32)
        r_b = tl.zeros([ROWS], tl.float32)
        first = slab * codes_per_slab
        last = tl.minimum(first + codes_per_slab, codes)
        for start in range(first, last, CODES):
            code = start + tl.arange(0, CODES)
            a_log, b_log = _two_views(h, top, rest, row, code, n, last, width, words, offset, STEP, BF16)
            a = tl.exp2(a_log)
            b = tl.exp2(b_log)
            e_a += tl.sum(a * _finite(b_log), axis=1)
            e_b += tl.sum(b * _finite(a_log), axis=1)
            high_a, mean_a = _two_parts(m, code, codes, last)
            high_b, mean_b = _two_parts(m + codes, code, codes, last)
            if REVERSE:
                r_a += tl.sum(a * (high_a + mean_a + log_c), axis=1)
                r_b += tl.sum(b * (high_b + mean_b + log_c), axis=1)
            else:
                r_a -= tl.sum(tl.exp2(a_log - high_a - mean_a), axis=1) / codes
                r_b -= tl.sum(tl.exp2(b_log - high_b - mean_b), axis=1) / codes
        at = out + slab.to(tl.int64) * 4 * n + row
        tl.store(at, e_a, mask=row < n)
        tl.store(at + n, e_b, mask=row < n)
        tl.store(at + 2 * n, r_a, mask=row < n)
        tl.store(at + 3 * n, r_b, mask=row < n)

    @triton.jit
    def _slope(
            log, other_log,  # [R, C], log2 p of this view and of the other one
            high, mean,  # [1, C], parts of m of this view; with REVERSE their sum, and nothing
            E, R,  # [R, 1] of this view
            g_prior, g_cross,  # upstream
            log_c, codes,
            REVERSE: tl.constexpr,
    ):
        """2n ds of one view."""
        LN2: tl.constexpr = 0.6931471805599453
        p = tl.exp2(log)
        slope = g_cross * (p * (LN2 * (E - _finite(other_log)) + 1) - tl.exp2(other_log))
        if REVERSE:
            slope += g_prior * LN2 * p * (high + log_c - R)
        else:
            slope -= g_prior * (tl.exp2(log - high - mean) / codes + p * R)
        return slope

    @triton.jit
    def _store_parts(at, x, plane, mask):
        """x as three bf16 numbers whose sum it is, plane numbers apart."""
        high = x.to(tl.bfloat16)
        x -= high.to(tl.float32)
        middle = x.to(tl.bfloat16)
        x -= middle.to(tl.float32)
        tl.store(at, high, mask=mask)
        tl.store(at + plane, middle, mask=mask)
        tl.store(at + 2 * plane, x.to(tl.bfloat16), mask=mask)

    @triton.jit
    def _slopes(
            h,  # [3, 2 n, width] bf16
            top, rest,  # [2, n] each
            m,  # [2, 2, codes]
            terms,  # [4, n]: E of both views, R of both views
            upstream,  # [2]: gradients of prior and cross-entropy
            out,  # [3, 2, n, stride] bf16 out, 2n ds of codes first to last
            n, codes, width, words, offset, log_c, first, last,
            stride,  # of out's rows, at least last - first
            REVERSE: tl.constexpr,
            ROWS: tl.constexpr,
            CODES: tl.constexpr,
            STEP: tl.constexpr,
            BF16: tl.constexpr,
    ):
        """2n ds of both views of ROWS images for CODES of the codes."""
        place = tl.program_id(0) * CODES + tl.arange(0, CODES)
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        code = first + place
        a_log, b_log = _two_views(h, top, rest, row, code, n, last, width, words, offset, STEP, BF16)
        g_prior = tl.load(upstream)
        g_cross = tl.load(upstream + 1)
        e_a = tl.load(terms + row, mask=row < n, other=0.)[:, None]
        e_b = tl.load(terms + n + row, mask=row < n, other=0.)[:, None]
        r_a = tl.load(terms + 2 * n + row, mask=row < n, other=0.)[:, None]
        r_b = tl.load(terms + 3 * n + row, mask=row < n, other=0.)[:, None]
        high_a, mean_a = _two_parts(m, code, codes, last)
        high_b, mean_b = _two_parts(m + codes, code, codes, last)
        if REVERSE:
            high_a += mean_a
            high_b += mean_b

        at = out + row.to(tl.int64)[:, None] * stride + place[None, :]
        view = tl.cast(n, tl.int64) * stride
        inside = (row[:, None] < n) & (place[None, :] < stride)  # what lies between last and stride becomes 0
        slope = _slope(a_log, b_log, high_a, mean_a, e_a, r_a, g_prior, g_cross, log_c, codes, REVERSE)
        _store_parts(at, slope, 2 * view, inside)
        slope = _slope(b_log, a_log, high_b, mean_b, e_b, r_b, g_prior, g_cross, log_c, codes, REVERSE)
        _store_parts(at + view, slope, 2 * view, inside)

    @triton.jit
    def _times_signs(
            slopes,  # [3, rows, stride] bf16
            out,  # [slabs, rows, f] fp32 out
            rows, stride, f, words, offset,
            first,  # the first code
            codes_per_slab,
            ROWS: tl.constexpr,
            CODES: tl.constexpr,  # codes at a time
            STEP: tl.constexpr,  # features of a program
            BF16: tl.constexpr,
    ):
        """slopes times the signs of their codes: STEP features, one slab of the codes."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        slab = tl.program_id(1)
        part = tl.program_id(2) * STEP
        plane = tl.cast(rows, tl.int64) * stride
        acc = tl.zeros([ROWS, STEP], tl.float32)
        start = slab * codes_per_slab
        end = tl.minimum(start + codes_per_slab, stride)
        for k in range(start, end, CODES):
            place = k + tl.arange(0, CODES)
            signs = _signs(first + place, part, words, offset, STEP, BF16)
            at = slopes + row.to(tl.int64)[:, None] * stride + place[None, :]
            inside = (row[:, None] < rows) & (place[None, :] < end)
            some = tl.zeros_like(acc)
            for number in tl.static_range(3):
                tile = tl.load(at + number * plane, mask=inside, other=0.)
                some = _dot(tile, signs, some, BF16)
            acc += some
        cols = part + tl.arange(0, STEP)[None, :]
        at = (slab.to(tl.int64) * rows + row)[:, None] * f + cols
        tl.store(out + at, acc, mask=(row[:, None] < rows) & (cols < f))

    BF16 = not INTERPRETED
    # The largest tiles found that spill no registers; static, so that results do not depend on a search.
    ONE_VIEW = dict(ROWS=128, CODES=64, STEP=64, BF16=BF16, num_warps=8, num_stages=2)
    TWO_VIEWS = dict(ROWS=64, CODES=64, STEP=64, BF16=BF16, num_warps=8, num_stages=2)
    SUM = dict(ROWS=128, CODES=64, STEP=64, BF16=BF16, num_warps=8, num_stages=2)
    WORKSPACE = 2 ** 22                                # slopes at a time: 24 MB


def _slabs(x, codes, blocks, tile):
    """Slabs of the codes so that programs in so many blocks fill the device: (how many, codes in each)."""
    slabs = max(1, min(programs(x) // blocks, codes // (4 * tile)))
    per_slab = triton.cdiv(triton.cdiv(codes, slabs), tile) * tile
    return triton.cdiv(codes, per_slab), per_slab


def _hashing(parts, f, seed):
    """width, words, offset of the kernels."""
    return parts.shape[2], triton.cdiv(f, WORD), _int32(_seed_offset(seed))


def _int32(x):
    """The signed number with the same 32 bits."""
    return x - 2 ** 32 if x >= 2 ** 31 else x


def _in_parts(h):
    """h [2, n, f] -> [3, 2n, width] bf16 whose sum it is, features padded with zeros to a multiple of
    STEP."""
    _, n, f = h.shape
    width = triton.cdiv(f, ONE_VIEW["STEP"]) * ONE_VIEW["STEP"]
    parts = h.new_zeros((PARTS, 2 * n, width), dtype=torch.bfloat16)
    rest = h.reshape(2 * n, f)
    for part in parts:
        part[:, :f] = rest
        rest = rest - part[:, :f]
    return parts


def _forward_triton(h, codes, seed, reverse):
    """As _forward, keeping nothing."""
    _, n, f = h.shape
    parts = _in_parts(h)
    hashing = _hashing(parts, f, seed)
    blocks = triton.cdiv(2 * n, ONE_VIEW["ROWS"])
    slabs, per_slab = _slabs(h, codes, blocks, ONE_VIEW["CODES"])
    tops = h.new_empty((slabs, 2 * n))
    totals = h.new_empty((slabs, 2 * n))
    m = h.new_empty((2, 2, codes))
    with on_device(h):
        _row_sums[blocks, slabs](parts, tops, totals, 2 * n, codes, *hashing, per_slab, **ONE_VIEW)
        top = tops.amax(dim=0)
        rest = (totals * (tops - top).exp2()).sum(dim=0).log2()
        tiles = triton.cdiv(codes, ONE_VIEW["CODES"])
        _code_means[tiles, 2](parts, top, rest, m, n, codes, *hashing, **ONE_VIEW)
        blocks = triton.cdiv(n, TWO_VIEWS["ROWS"])
        slabs, per_slab = _slabs(h, codes, blocks, TWO_VIEWS["CODES"])
        terms = h.new_empty((slabs, 2, 2, n))
        log_c = math.log2(codes)
        _row_terms[blocks, slabs](parts, top, rest, m, terms, n, codes, *hashing, log_c, per_slab, reverse,
                                  **TWO_VIEWS)
    E = terms[:, 0].sum(dim=0)
    R = terms[:, 1].sum(dim=0)
    return top.view(2, n), rest.view(2, n), m, E, R


def _backward_triton(h, codes, seed, reverse, top, rest, m, E, R, g_prior, g_cross):
    """As _backward_torch."""
    _, n, f = h.shape
    parts = _in_parts(h)
    hashing = _hashing(parts, f, seed)
    terms = torch.stack([E, R])
    upstream = torch.stack([g_prior, g_cross]).float()
    dh = torch.zeros_like(h)
    log_c = math.log2(codes)
    tile = SUM["CODES"]
    most = max(tile, WORKSPACE // (2 * n) // tile * tile)
    blocks = triton.cdiv(2 * n, SUM["ROWS"])
    columns = triton.cdiv(f, SUM["STEP"])
    for first in range(0, codes, most):
        last = min(first + most, codes)
        stride = triton.cdiv(last - first, tile) * tile
        slopes = h.new_empty((PARTS, 2, n, stride), dtype=torch.bfloat16)
        slabs, per_slab = _slabs(h, stride, blocks * columns, tile)
        out = h.new_empty((slabs, 2, n, f))
        grid = triton.cdiv(stride, TWO_VIEWS["CODES"]), triton.cdiv(n, TWO_VIEWS["ROWS"])
        with on_device(h):
            _slopes[grid](parts, top, rest, m, terms, upstream, slopes, n, codes, *hashing, log_c, first,
                          last, stride, reverse, **TWO_VIEWS)
            _times_signs[blocks, slabs, columns](slopes, out, 2 * n, stride, f, *hashing[1:], first, per_slab,
                                                 **SUM)
        dh += out.sum(dim=0)
    return dh


# ---- Both ways ---------------------------------------------------------------------------------------------
def _keeps(h, codes, use_triton):
    """Whether the forward keeps log p for the backward: on a CPU, as long as it is small."""
    _, n, _ = h.shape
    return not (use_triton or h.is_cuda) and 2 * n * codes <= KEEP


def _shapes_forward(h, codes, seed, reverse, trained, use_triton):
    _, n, _ = h.shape
    kept = 2 * n * codes if trained and _keeps(h, codes, use_triton) else 0
    new = h.new_empty
    p = new(2, n, codes) if kept and _is_small(h, codes) else new(0)
    return new(2, n), new(2, n), new(2, 2, codes), new(2, n), new(2, n), new(kept), p


@opaque("dictionary_forward", _shapes_forward)
def _forward(h: Tensor, codes: int, seed: int, reverse: bool, trained: bool,
             use_triton: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h [2, n, f], scaled -> lse's two parts [2, n] each (0 of few codes, which do not need them), m
    [2, 2, c], E [2, n], R [2, n], what is kept of log p, and of p."""
    if use_triton:
        return *_forward_triton(h, codes, seed, reverse), h.new_empty(0), h.new_empty(0)
    return _forward_torch(h, codes, seed, reverse, trained and _keeps(h, codes, use_triton))


def _shapes_backward(h, *rest):
    return torch.empty_like(h)


@opaque("dictionary_backward", _shapes_backward)
def _backward(h: Tensor, codes: int, seed: int, reverse: bool, use_triton: bool, top: Tensor, rest: Tensor,
              m: Tensor, E: Tensor, R: Tensor, kept: Tensor, p: Tensor, g_prior: Tensor,
              g_cross: Tensor) -> Tensor:
    """Gradient of h [2, n, f], from what the forward left and the two upstream gradients."""
    _, n, _ = h.shape
    if use_triton:
        dh = _backward_triton(h, codes, seed, reverse, top, rest, m, E, R, g_prior, g_cross)
    else:
        dh = _backward_torch(h, codes, seed, reverse, top, rest, m, E, R, kept, p, g_prior, g_cross)
    return dh * (math.log(2) / (2 * n))                # h is in base 2


# ---- Autograd ----------------------------------------------------------------------------------------------
class _DictionaryLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, codes, seed, reverse, use_triton):
        kept = _forward(h, codes, seed, reverse, ctx.needs_input_grad[0], use_triton)
        _, _, m, E, R, *_ = kept
        ctx.save_for_backward(h, *kept)
        ctx.options = codes, seed, reverse, use_triton
        ln2 = math.log(2)
        prior = R.mean() if reverse else -m.sum(dim=0).mean()
        return ln2 * prior, -ln2 * E.mean()

    @staticmethod
    def backward(ctx, g_prior, g_cross):
        refuse_double_backward("dictionary_loss")
        h, *kept = ctx.saved_tensors
        with torch.autocast(h.device.type, enabled=False):
            dh = _backward(h, *ctx.options, *kept, g_prior, g_cross)
        return dh, None, None, None, None


# ---- Public ------------------------------------------------------------------------------------------------
def dictionary_loss(h1, h2, codes, seed, temperature, prior="reverse", impl="auto"):
    """FALCON's two terms on `codes` random codes: prior, cross_entropy, fp32 scalars (float64 for float64).

    h1, h2 [n, f]: features of two views of n images, any float dtype and strides, both with gradients.
    codes, seed: integers, codes >= 1, seed >= 0; the dictionary is dictionary_signs(codes, f, seed).
    temperature: above 0; no overflow however large the logits. A number, or a tensor of one with gradient.
    prior: "reverse", KL(mean p || uniform) as the released code has it; "forward", -1/c sum_j log mean p_j.
    impl: "auto" (Triton for CUDA tensors), "torch", "triton".

    Both terms are means over the two views; cross_entropy is -1/2 mean_i sum_j (a log b + b log a), without
    a stop-gradient. Memory O(n f + c), and on a CPU the 2 n c logarithms up to 128 MB of them (and p, up to
    1 MB). The torch path holds the signs beside it, c f bytes (4 c f up to 4 MB), and keeps the last two
    dictionaries. ValueError for shapes, dtypes, devices, options; RuntimeError in a double backward. Source:
    Sansone et al., arXiv 2410.04959, and emsansone/CPLearn.
    """
    if h1.ndim != 2 or h1.shape != h2.shape or not h1.numel():
        raise ValueError(f"h1 {list(h1.shape)} and h2 {list(h2.shape)} must both be [n, f], not empty")
    if not (h1.is_floating_point() and h2.is_floating_point()):
        raise ValueError(f"h1 {h1.dtype} and h2 {h2.dtype} must be floats")
    if h1.device != h2.device:
        raise ValueError(f"h1 is on {h1.device}, h2 on {h2.device}")
    refuse_transforms("dictionary_loss", "dictionary_reference")
    codes, seed = _plain(codes), _plain(seed)
    if codes < 1 or seed < 0:
        raise ValueError(f"codes {codes} must be at least 1, seed {seed} at least 0")
    check_temperature(temperature)
    if prior not in ("reverse", "forward"):
        raise ValueError(f"prior={prior!r}: reverse or forward")
    use_triton = pick(impl, [h1, h2]) == "triton"
    work = torch.promote_types(torch.promote_types(h1.dtype, h2.dtype), torch.float32)
    with torch.autocast(h1.device.type, enabled=False):
        if isinstance(temperature, Tensor):
            temperature = temperature.reshape(()).to(work)
        h = torch.stack([h1.to(work), h2.to(work)]) * (1 / (math.log(2) * temperature))
        return _DictionaryLoss.apply(h, codes, seed, prior == "reverse", use_triton)
