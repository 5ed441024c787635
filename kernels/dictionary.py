"""FALCON's loss on a fixed random dictionary of signs, without an n x c matrix of assignments.

    dictionary_loss(h1, h2, codes, seed, t)     prior, cross_entropy of two views' assignments to c codes
    dictionary_signs(codes, f, seed)            the dictionary itself, W [c, f] of +-1

h1, h2 [n, f]: features of two views, of which p = softmax(h W^T / t) [n, c] are soft assignments to codes. The signs
are bits of a hash of (seed, code, feature): a GPU makes them where it needs them and never stores the dictionary, a
CPU holds it as bytes, and both have the same one.

Arithmetic and bytes. The textbook form keeps p and log p of both views and their gradients, some ten arrays of n x c
numbers: 700 MB at n = 64, c = 262,144. Streaming over the codes keeps O(n f + c), at the price of making the logits
three times instead of once: 16 n c f operations, forward and backward, against 12.

Accumulation is fp32, also inside autocast; float64 stays float64.
"""
import math
from contextlib import nullcontext
from functools import lru_cache

import torch

try:
    import triton
    import triton.language as tl
except ImportError:                                    # no wheel here: all but impl="triton" works
    triton = None


# ---- Reference: the specification --------------------------------------------------------------------------
def dictionary_reference(h1, h2, W, temperature, prior="reverse"):
    """prior and cross-entropy with n x c in memory, by autograd; W [c, f] may be any dictionary."""
    logs = [torch.log_softmax(h @ W.T / temperature, dim=1) for h in (h1, h2)]             # log p [n, c]
    n, c = logs[0].shape
    means = [torch.logsumexp(log, dim=0) - math.log(n) for log in logs]                    # log of the mean p [c]
    if prior == "reverse":
        priors = [(mean.exp() * (mean + math.log(c))).sum() for mean in means]             # KL(mean p || uniform)
    else:
        priors = [-mean.mean() for mean in means]                                          # KL(uniform || .) + log c
    cross = [-(a.exp() * b).sum(dim=1).mean() for a, b in (logs, logs[::-1])]
    return sum(priors) / 2, sum(cross) / 2


# ---- Derivation --------------------------------------------------------------------------------------------
# a and b are the assignments of the two views to codes j, l = log a; all logarithms are to base 2 (2^x costs less than
# e^x), with features that carry log2(e)/t, so that l_ij = h_i . w_j - lse_i. Four numbers a row, or a code, suffice:
#
#   lse_i     log of the softmax' denominator: largest logit + log of the rest, kept apart for the digits
#   m_j       log mean_i a_ij = logsumexp_i l_ij - log n, from logarithms: every a_.j may underflow
#   E_i       sum_j a_ij log b_ij
#   R_i       sum_j a_ij g_j,     g_j = m_j + log c (reverse prior) or -1 / (c 2^m_j) (forward)
#
#   cross-entropy = -ln 2 mean E       prior = ln 2 mean R (reverse) or -ln 2 mean m (forward)
#
# Softmax's Jacobian takes dL/da to a (dL/da - sum a dL/da): with s the logits in nats,
#
#   dCE/ds_ij = [a (ln 2 (E_i - log b) + 1) - b] / 2n        dprior/ds_ij = a (g_j - R_i) / 2n, x ln 2 if reverse
#
# where 2n comes from the mean over rows and views, and dh_i = sum_j ds_ij w_j / t. R needs m, and m needs all rows:
# three passes over the dictionary, lse | m, E, R | gradient; lse, m, E and R are all that is kept for the backward.

WORD = 32                                              # signs that come from one hash


# ---- The dictionary ----------------------------------------------------------------------------------------
def dictionary_signs(codes, f, seed, dtype=torch.float32, device="cpu"):
    """W [codes, f] of +-1 for an integer seed >= 0: bit k % 32 of lowbias32(code * words + k // 32), seeded."""
    words, low = -(-f // WORD), 0xFFFFFFFF
    x = torch.arange(codes * words, device=device)                                         # int64: wraps, then masked
    x = (x * 0x9E3779B1 + (seed * 0x85EBCA6B & low)) & low
    x = (x ^ x >> 16) * 0x7FEB352D & low               # the mixing function of skeeto/hash-prospector
    x = (x ^ x >> 15) * 0x846CA68B & low
    x = x ^ x >> 16
    signs = torch.empty(codes, words * WORD, dtype=dtype, device=device)
    for bit in range(WORD):
        signs[:, bit::WORD] = ((x >> bit & 1) * 2 - 1).view(codes, words)
    return signs[:, :f]


@lru_cache(maxsize=2)
def _held(codes, f, seed, device):
    return dictionary_signs(codes, f, seed, torch.int8, device).contiguous()


# ---- Plain torch -------------------------------------------------------------------------------------------
def _blocks(h, codes, seed):
    """(codes' slice, their signs [C, f], logits [2, n, C]) for each block of the dictionary; h [2, n, f], scaled."""
    signs = _held(codes, h.shape[2], seed, h.device)
    size = max(256, min(4096, 2 ** 17 // h.shape[1], 2 ** 20 // h.shape[2]))      # 1 MB of logits, 4 of signs
    for first in range(0, codes, size):
        at = slice(first, min(first + size, codes))
        rows = signs[at].to(h.dtype)
        yield at, rows, torch.mm(h.flatten(0, 1), rows.T).view(2, h.shape[1], -1)


def _forward_torch(h, codes, seed, reverse):
    """h [2, n, f], scaled -> lse in two parts [2, 2, n], m [2, c], E [2, n], R [2, n]."""
    (_, n, _), log_c = h.shape, math.log2(codes)
    top, total = h.new_full((2, n), -torch.inf), h.new_zeros(2, n)
    for _, _, s in _blocks(h, codes, seed):
        new = torch.maximum(top, s.amax(dim=2))
        total = total * (top - new).exp2() + s.sub_(new[:, :, None]).exp2_().sum(dim=2)
        top = new
    lse = torch.stack([top, total.log2()])
    m, E, R = h.new_empty(2, codes), h.new_zeros(2, n), h.new_zeros(2, n)
    for at, _, s in _blocks(h, codes, seed):
        log = s.sub_(lse[0, :, :, None]).sub_(lse[1, :, :, None])
        high = log.amax(dim=1, keepdim=True)                                               # [2, 1, C]
        p = (log - high).exp2_()
        mean = high + p.mean(dim=1, keepdim=True).log2()
        m[:, at] = mean[:, 0]
        if not reverse:
            R -= (p * (high - mean).exp2()).sum(dim=2) / codes
        p *= high.exp2()
        E += torch.linalg.vecdot(p, log.flip(0))
        if reverse:
            R += torch.linalg.vecdot(p, mean + log_c)
    return lse, m, E, R


def _backward_torch(h, codes, seed, reverse, lse, m, E, R, g_prior, g_cross):
    """sum_j 2n ds_ij w_j, [2, n, f], for upstream gradients of the two values."""
    dh, ln2, log_c = torch.zeros_like(h), math.log(2), math.log2(codes)
    for at, rows, s in _blocks(h, codes, seed):
        log, mean = s.sub_(lse[0, :, :, None]).sub_(lse[1, :, :, None]), m[:, None, at]
        p = log.exp2()
        slope = (E[:, :, None] - log.flip(0)).mul_(ln2 * g_cross).add_(g_cross)
        slope += g_prior * (ln2 * (mean + log_c - R[:, :, None]) if reverse else -R[:, :, None])
        slope.mul_(p).sub_(p.flip(0) * g_cross)
        if not reverse:
            slope -= (log - mean).exp2_() * (g_prior / codes)
        dh.flatten(0, 1).addmm_(slope.flatten(0, 1), rows)
    return dh


# ---- Triton ------------------------------------------------------------------------------------------------
# Static tile sizes, no atomics: bitwise reproducible. Each of four kernels makes its tiles of logits, 64 rows of one or
# both views times 32 codes, from features it loads and signs it makes: one hash a code and 32 features. _code_means
# owns codes and walks the rows; _row_sums and _row_terms own rows, walk one slab of the codes, leave partial results;
# _slopes writes ds for as many codes as 16 MB hold, which _times_signs multiplies by the signs before the next ones are
# made. Features past an edge are 0, rows and codes past theirs are set to -inf before an exp.
if triton is not None:

    @triton.jit
    def _signs(code, first, words, seed, WIDTH: tl.constexpr):
        """Features first to first + WIDTH, multiples of 32, of codes [C] -> [C, WIDTH] of +-1 in fp32."""
        word = first // 32 + tl.arange(0, WIDTH // 32)
        x = (code[:, None] * words + word[None, :]).to(tl.uint32) * 0x9E3779B1 + seed
        x = (x ^ (x >> 16)) * 0x7FEB352D
        x = (x ^ (x >> 15)) * 0x846CA68B
        x = x ^ (x >> 16)
        bits = (x[:, :, None] >> tl.arange(0, 32)[None, None, :].to(tl.uint32)) & 1
        return tl.reshape(bits, [code.shape[0], WIDTH]).to(tl.float32) * 2 - 1

    @triton.jit
    def _logits(h, row, rows, code, codes, f, words, seed, STEP: tl.constexpr, PRECISION: tl.constexpr):
        """s [R, C] of rows [R] of h and codes [C]; -inf past the edges."""
        s = tl.zeros([row.shape[0], code.shape[0]], tl.float32)
        for k in range(0, f, STEP):
            cols = k + tl.arange(0, STEP)[None, :]
            hk = tl.load(h + row.to(tl.int64)[:, None] * f + cols, mask=(row[:, None] < rows) & (cols < f), other=0.)
            s += tl.dot(hk, tl.trans(_signs(code, k, words, seed, STEP)), input_precision=PRECISION)
        return tl.where((row[:, None] < rows) & (code[None, :] < codes), s, -float("inf"))

    @triton.jit
    def _log_p(h, lse, row, n, code, codes, f, words, seed, STEP: tl.constexpr, PRECISION: tl.constexpr):
        """log2 p [R, C] of rows [R] of one view; lse [2 parts, 2 views, n] from that view on."""
        s = _logits(h, row, n, code, codes, f, words, seed, STEP, PRECISION)
        s -= tl.load(lse + row, mask=row < n, other=0.)[:, None]
        return s - tl.load(lse + 2 * n + row, mask=row < n, other=0.)[:, None]

    @triton.jit
    def _row_sums(h, top, total, rows, codes, f, words, seed, codes_per_slab, ROWS: tl.constexpr,
                  CODES: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr):
        """Partial maximum and sum of 2^s over one slab of the codes, for ROWS of both views' rows."""
        row, slab = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
        high, acc = tl.full([ROWS], -float("inf"), tl.float32), tl.zeros([ROWS], tl.float32)
        first = slab * codes_per_slab
        last = tl.minimum(first + codes_per_slab, codes)
        for start in range(first, last, CODES):
            s = _logits(h, row, rows, start + tl.arange(0, CODES), last, f, words, seed, STEP, PRECISION)
            new = tl.maximum(high, tl.max(s, axis=1))
            shift = tl.where(new == -float("inf"), 0., new)                        # rows past the edge
            acc = acc * tl.exp2(high - shift) + tl.sum(tl.exp2(s - shift[:, None]), axis=1)
            high = new
        at = slab.to(tl.int64) * rows + row
        tl.store(top + at, high, mask=row < rows)
        tl.store(total + at, acc, mask=row < rows)

    @triton.jit
    def _code_means(h, lse, m, n, codes, f, words, seed, ROWS: tl.constexpr, CODES: tl.constexpr, STEP: tl.constexpr,
                    PRECISION: tl.constexpr):
        """m of CODES codes in one view."""
        code, view = tl.program_id(0) * CODES + tl.arange(0, CODES), tl.program_id(1).to(tl.int64)
        high, acc = tl.full([CODES], -float("inf"), tl.float32), tl.zeros([CODES], tl.float32)
        for start in range(0, n, ROWS):
            log = _log_p(h + view * n * f, lse + view * n, start + tl.arange(0, ROWS), n, code, codes, f, words, seed,
                         STEP, PRECISION)
            new = tl.maximum(high, tl.max(log, axis=0))
            shift = tl.where(new == -float("inf"), 0., new)                        # codes past the edge
            acc = acc * tl.exp2(high - shift) + tl.sum(tl.exp2(log - shift[None, :]), axis=0)
            high = new
        tl.store(m + view * codes + code, high + tl.log2(tl.where(code < codes, acc, 1.) / n), mask=code < codes)

    @triton.jit
    def _both(h, lse, m, row, n, code, last, codes, f, words, seed, STEP: tl.constexpr, PRECISION: tl.constexpr):
        """For rows [R] of both views and codes [C] below last: log a, log b, a, b, a / mean, b / mean [R, C], 0 past
        the edges, and m [1, C] of both views."""
        n64 = tl.cast(n, tl.int64)
        a_log = _log_p(h, lse, row, n, code, last, f, words, seed, STEP, PRECISION)
        b_log = _log_p(h + n64 * f, lse + n, row, n, code, last, f, words, seed, STEP, PRECISION)
        m_a = tl.load(m + code, mask=code < last, other=0.)[None, :]
        m_b = tl.load(m + codes + code, mask=code < last, other=0.)[None, :]
        a, b, a_share, b_share = tl.exp2(a_log), tl.exp2(b_log), tl.exp2(a_log - m_a), tl.exp2(b_log - m_b)
        keep = (row[:, None] < n) & (code[None, :] < last)
        return tl.where(keep, a_log, 0.), tl.where(keep, b_log, 0.), a, b, a_share, b_share, m_a, m_b

    @triton.jit
    def _row_terms(h, lse, m, out, n, codes, f, words, seed, log_c, codes_per_slab, REVERSE: tl.constexpr,
                   ROWS: tl.constexpr, CODES: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr):
        """Partial E of both views and R of both views, over one slab of the codes, for ROWS images."""
        row, slab = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
        e_a, e_b = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
        r_a, r_b = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
        first = slab * codes_per_slab
        last = tl.minimum(first + codes_per_slab, codes)
        for start in range(first, last, CODES):
            a_log, b_log, a, b, a_share, b_share, m_a, m_b = _both(
                h, lse, m, row, n, start + tl.arange(0, CODES), last, codes, f, words, seed, STEP, PRECISION)
            e_a += tl.sum(a * b_log, axis=1)
            e_b += tl.sum(b * a_log, axis=1)
            if REVERSE:
                r_a += tl.sum(a * (m_a + log_c), axis=1)
                r_b += tl.sum(b * (m_b + log_c), axis=1)
            else:
                r_a -= tl.sum(a_share, axis=1) / codes
                r_b -= tl.sum(b_share, axis=1) / codes
        at = out + slab.to(tl.int64) * 4 * n + row
        tl.store(at, e_a, mask=row < n)
        tl.store(at + n, e_b, mask=row < n)
        tl.store(at + 2 * n, r_a, mask=row < n)
        tl.store(at + 3 * n, r_b, mask=row < n)

    @triton.jit
    def _slope(a, a_share, m, b, b_log, E, R, g_prior, g_cross, log_c, codes, REVERSE: tl.constexpr):
        """2n ds of one view, a, the other one being b."""
        LN2: tl.constexpr = 0.6931471805599453
        slope = g_cross * (a * (LN2 * (E[:, None] - b_log) + 1) - b)
        if REVERSE:
            slope += g_prior * LN2 * a * (m + log_c - R[:, None])
        else:
            slope -= g_prior * (a_share / codes + a * R[:, None])
        return slope

    @triton.jit
    def _slopes(h, lse, m, terms, upstream, out, n, codes, f, words, seed, log_c, first, last, REVERSE: tl.constexpr,
                ROWS: tl.constexpr, CODES: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr):
        """2n ds of both views, [2, n, last - first], for codes first to last."""
        row, place = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * CODES + tl.arange(0, CODES)
        g_prior, g_cross = tl.load(upstream), tl.load(upstream + 1)
        e_a, e_b = tl.load(terms + row, mask=row < n, other=0.), tl.load(terms + n + row, mask=row < n, other=0.)
        r_a = tl.load(terms + 2 * n + row, mask=row < n, other=0.)
        r_b = tl.load(terms + 3 * n + row, mask=row < n, other=0.)
        a_log, b_log, a, b, a_share, b_share, m_a, m_b = _both(h, lse, m, row, n, first + place, last, codes, f, words,
                                                               seed, STEP, PRECISION)
        at = out + row.to(tl.int64)[:, None] * (last - first) + place[None, :]
        keep = (row[:, None] < n) & (first + place[None, :] < last)
        tl.store(at, _slope(a, a_share, m_a, b, b_log, e_a, r_a, g_prior, g_cross, log_c, codes, REVERSE), mask=keep)
        tl.store(at + tl.cast(n, tl.int64) * (last - first),
                 _slope(b, b_share, m_b, a, a_log, e_b, r_b, g_prior, g_cross, log_c, codes, REVERSE), mask=keep)

    @triton.jit
    def _times_signs(slopes, out, rows, f, words, seed, first, last, codes_per_slab, ROWS: tl.constexpr,
                     CODES: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr):
        """slopes [rows, last - first] times the signs of codes first to last: STEP features, one slab of the codes."""
        row, slab, part = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1), tl.program_id(2) * STEP
        acc = tl.zeros([ROWS, STEP], tl.float32)
        start = slab * codes_per_slab
        end = tl.minimum(start + codes_per_slab, last - first)
        for k in range(start, end, CODES):
            place = k + tl.arange(0, CODES)
            ds = tl.load(slopes + row.to(tl.int64)[:, None] * (last - first) + place[None, :],
                         mask=(row[:, None] < rows) & (place[None, :] < end), other=0.)
            acc += tl.dot(ds, _signs(first + place, part, words, seed, STEP), input_precision=PRECISION)
        cols = part + tl.arange(0, STEP)[None, :]
        tl.store(out + (slab.to(tl.int64) * rows + row)[:, None] * f + cols, acc,
                 mask=(row[:, None] < rows) & (cols < f))

    PRECISION = "ieee" if torch.version.hip else "tf32x3"      # fp32 on tensor cores; AMD's take fp32 itself
    # The largest tiles found that spill no registers; static, so that results do not depend on a search.
    TILES = dict(ROWS=64, CODES=32, STEP=WORD, PRECISION=PRECISION, num_warps=8, num_stages=1)
    SUM_TILES = {**TILES, "STEP": 64}
    WORKSPACE = 2 ** 22                                # slopes at a time: 16 MB


def _slabs(codes, programs, tile):
    """Slabs of the codes so that some 264 programs run, two for each of 132 processors: (how many, codes in each)."""
    slabs = max(1, min(264 // programs, codes // (4 * tile)))
    per_slab = triton.cdiv(triton.cdiv(codes, slabs), tile) * tile
    return triton.cdiv(codes, per_slab), per_slab


def _launch_arguments(h, codes, seed):
    """n, codes, f, words, seeded offset of the hash as a signed 32-bit number."""
    f = h.shape[2]
    offset = seed * 0x85EBCA6B & 0xFFFFFFFF
    return h.shape[1], codes, f, triton.cdiv(f, WORD), offset - (offset >> 31 << 32)


def _on_device(h):
    return torch.cuda.device(h.device) if h.is_cuda else nullcontext()       # Triton launches on the current one


def _forward_triton(h, codes, seed, reverse):
    """As _forward_torch."""
    n, codes, f, words, offset = _launch_arguments(h, codes, seed)
    blocks = triton.cdiv(2 * n, TILES["ROWS"])
    slabs, per_slab = _slabs(codes, blocks, TILES["CODES"])
    top, total = h.new_empty((slabs, 2 * n)), h.new_empty((slabs, 2 * n))
    m = h.new_empty((2, codes))
    with _on_device(h):
        _row_sums[blocks, slabs](h, top, total, 2 * n, codes, f, words, offset, per_slab, **TILES)
        high = top.amax(dim=0)
        lse = torch.stack([high, (total * (top - high).exp2()).sum(dim=0).log2()]).view(2, 2, n)
        _code_means[triton.cdiv(codes, TILES["CODES"]), 2](h, lse, m, n, codes, f, words, offset, **TILES)
        blocks = triton.cdiv(n, TILES["ROWS"])
        slabs, per_slab = _slabs(codes, blocks, TILES["CODES"])
        terms = h.new_empty((slabs, 2, 2, n))
        _row_terms[blocks, slabs](h, lse, m, terms, n, codes, f, words, offset, math.log2(codes), per_slab, reverse,
                                  **TILES)
    E, R = terms.sum(dim=0)
    return lse, m, E, R


def _backward_triton(h, codes, seed, reverse, lse, m, E, R, g_prior, g_cross):
    """As _backward_torch."""
    n, codes, f, words, offset = _launch_arguments(h, codes, seed)
    terms, upstream = torch.stack([E, R]), torch.stack([g_prior, g_cross]).float()
    dh, most = torch.zeros_like(h), max(TILES["CODES"], WORKSPACE // (2 * n))
    blocks, parts = triton.cdiv(2 * n, TILES["ROWS"]), triton.cdiv(f, SUM_TILES["STEP"])
    for first in range(0, codes, most):
        last = min(first + most, codes)
        slopes = h.new_empty((2, n, last - first))
        slabs, per_slab = _slabs(last - first, blocks * parts, TILES["CODES"])
        out = h.new_empty((slabs, 2, n, f))
        with _on_device(h):
            _slopes[triton.cdiv(n, TILES["ROWS"]), triton.cdiv(last - first, TILES["CODES"])](
                h, lse, m, terms, upstream, slopes, n, codes, f, words, offset, math.log2(codes), first, last, reverse,
                **TILES)
            _times_signs[blocks, slabs, parts](slopes, out, 2 * n, f, words, offset, first, last, per_slab, **SUM_TILES)
        dh += out.sum(dim=0)
    return dh


# ---- Autograd ----------------------------------------------------------------------------------------------
class _DictionaryLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h1, h2, codes, seed, temperature, reverse, use_triton):
        work = torch.promote_types(torch.promote_types(h1.dtype, h2.dtype), torch.float32)
        h = torch.stack([h1.to(work), h2.to(work)]) / (temperature * math.log(2))                        # [2, n, f]
        lse, m, E, R = (_forward_triton if use_triton else _forward_torch)(h, codes, seed, reverse)
        ctx.save_for_backward(h1, h2, lse, m, E, R)
        ctx.options = codes, seed, temperature, reverse, use_triton
        return math.log(2) * (R.mean() if reverse else -m.mean()), -math.log(2) * E.mean()

    @staticmethod
    def backward(ctx, g_prior, g_cross):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():                # create_graph=True
            raise RuntimeError("dictionary_loss has no double backward")
        h1, h2, lse, m, E, R = ctx.saved_tensors
        codes, seed, temperature, reverse, use_triton = ctx.options
        with torch.autocast(h1.device.type, enabled=False):
            h = torch.stack([h1.to(lse.dtype), h2.to(lse.dtype)]) / (temperature * math.log(2))
            dh = (_backward_triton if use_triton else _backward_torch)(
                h, codes, seed, reverse, lse, m, E, R, g_prior, g_cross) / (2 * len(h1) * temperature)
        return dh[0].to(h1.dtype), dh[1].to(h2.dtype), None, None, None, None, None


# ---- Public ------------------------------------------------------------------------------------------------
def dictionary_loss(h1, h2, codes, seed, temperature, prior="reverse", impl="auto"):
    """FALCON's two terms on `codes` random codes: prior, cross_entropy, fp32 scalars (float64 for float64 input).

    h1, h2 [n, f]: features of two views of n images, any float dtype and strides, both with gradients.
    codes, seed: integers, codes >= 1, seed >= 0; the dictionary is dictionary_signs(codes, f, seed).
    temperature: above 0; no overflow however large the logits.
    prior: "reverse", KL(mean p || uniform) as the released code has it, or "forward", -1/c sum_j log mean p_j.
    impl: "auto" (Triton for CUDA tensors), "torch", "triton".

    Both terms are means over the two views; cross_entropy is -1/2 mean_i sum_j (a log b + b log a), no stop-gradient.
    Memory O(n f + c), never n x c; the torch path holds the signs beside it, c f bytes, and keeps the last two
    dictionaries. ValueError for shapes, dtypes, options; RuntimeError in a double backward. Source: Sansone et al.,
    arXiv 2410.04959, and emsansone/CPLearn.
    """
    if h1.ndim != 2 or h1.shape != h2.shape or not h1.numel():
        raise ValueError(f"h1 {list(h1.shape)} and h2 {list(h2.shape)} must both be [n, f], not empty")
    if not (h1.is_floating_point() and h2.is_floating_point()):
        raise ValueError(f"h1 {h1.dtype} and h2 {h2.dtype} must be floats")
    if not (codes >= 1 and seed >= 0 and temperature > 0):
        raise ValueError(f"codes {codes} must be at least 1, seed {seed} at least 0, temperature {temperature} above 0")
    if prior not in ("reverse", "forward"):
        raise ValueError(f"prior={prior!r}: reverse or forward")
    wide = torch.float64 in (h1.dtype, h2.dtype)
    if impl == "auto":
        impl = "triton" if h1.is_cuda and triton is not None and not wide else "torch"
    if impl not in ("torch", "triton") or (impl == "triton" and (triton is None or wide)):
        raise ValueError(f"impl={impl!r}: auto, torch, or triton (needs the triton package, takes at most fp32)")
    with torch.autocast(h1.device.type, enabled=False):
        return _DictionaryLoss.apply(h1, h2, codes, seed, temperature, prior == "reverse", impl == "triton")
