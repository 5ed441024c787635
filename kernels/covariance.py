"""Variance and covariance of one batch of embeddings: VICReg's two regularisers, fused, in closed form.

    variance_covariance(z [N, D]) -> variance, covariance       two scalars; Z_c = Z minus its column means

    variance   = 1/D sum_d max(0, gamma - sqrt(var_d + eps))     var_d = sum_n Z_c[n, d]^2 / (N - 1)
    covariance = 1/D sum_{i != j} C_ij^2                         C = Z_c^T Z_c / (N - 1)

Arithmetic and bytes. The textbook form with autograd multiplies three times by a D x D matrix, 6 N D^2
operations, and keeps several of these matrices: at (256, 8192) 103 GFLOP and over 1 GB, for an input of 8 MB.
But only the sum of squares of C is asked for, and the N x N Gram matrix has it too (Garrido et al., arXiv
2206.02574). With n = N (where 2N <= D) or D two products suffice, the first symmetric: 3 N D n operations,
n^2 scratch, four passes over Z (read by the forward; read, read and written by the backward). At (256, 8192)
that is 1.6 GFLOP and 34 MB.
The floor on an H100 (67 TFLOP/s in fp32, 3.35 TB/s) is 24 us, of which the memory needs 10; at 100 GFLOP/s a
laptop needs 16 ms.

All is computed in fp32, also inside autocast: near the whitened optimum bf16 operands make the gradient 16 %
wrong or more (4096 x 512), tf32 a few per cent, and fp16 flushes small covariances to 0. float64 stays
float64, for gradcheck. (The plain-torch path on a GPU obeys torch.backends.cuda.matmul.allow_tf32, off by
default; the Triton path does not.)
"""
import math

import torch
from torch import Tensor

from .launch import (free_to_look, on_device, opaque, pick, programs, refuse_double_backward,
                     refuse_transforms, tl, triton)


# ---- Reference: the specification --------------------------------------------------------------------------
def variance_covariance_reference(z, gamma=1.0, eps=1e-4):
    """Both terms as VICReg's released code defines them (facebookresearch/vicreg, main_vicreg.py): D x D,
    autograd."""
    n, d = z.shape
    z = z - z.mean(dim=0)
    std = torch.sqrt(z.var(dim=0) + eps)               # divisor N - 1
    variance = torch.relu(gamma - std).mean()
    c = z.T @ z / (n - 1)                              # [D, D]
    off_diagonal = c - torch.diag(torch.diagonal(c))
    return variance, off_diagonal.square().sum() / d


# ---- Derivation --------------------------------------------------------------------------------------------
# Let x [L, n] have the long axis first: x = Z (covariance side, n = D) or x = Z^T (Gram side, n = N). Then
# both are one program, M = x_c^T x_c [n, n] in the forward and x_c M in the backward:
#
#   covariance side   M = Z_c^T Z_c, its diagonal set to 0:    covariance = |M|^2 / ((N-1)^2 D)
#   Gram side         M = Z_c Z_c^T, |M|^2 = |Z_c^T Z_c|^2:    covariance = the same - sum_d var_d^2 / D
#
# Backward with upstream gradients g_v, g_k. From d covariance/dC = 2 offdiag(C)/D and
# dC = (dZ^T Z_c + Z_c^T dZ)/(N-1):
#
#   dZ = a x_c M + s x_c,    a = 4 g_k / (D (N-1)^2),    s_d = -g_v [std_d < gamma] / (D (N-1) std_d)
#   and on the Gram side the subtracted var_d^2 add      s_d -= 4 g_k var_d / (D (N-1))
#
# Each column of this dZ sums to zero by itself: the mean needs no further term.
#
# The Gram side subtracts the diagonal's part from the whole, and loses digits where the diagonal dominates.
# rank(C) <= N-1 bounds that for columns of like variance: with 2N <= D by a factor of 2 at most, so the Gram
# side is taken there and only there. (Whitened 4096 x 512 would come out 0.2-0.6 % wrong.) A few columns of
# far larger variance would still drown the rest, value and gradient. So the DOMINANT columns of largest
# variance, T [N, k], leave the matrix before anything is subtracted. With R the others and G = R R^T,
#
#   (N-1)^2 D covariance = |G|^2 - sum_{d in R} ((N-1) var_d)^2  +  2 tr(T^T G T)  +  |hollow(T^T T)|^2
#
# where hollow() sets the diagonal to 0. For columns of R, dZ is as above with M = G + T T^T, which is Z_c
# Z_c^T again, but nothing of T has to cancel in it. For those of T it is a (G T + T hollow(T^T T)) with no
# part of var_d^2 to add.
#
# On a CPU, which need not be waited for, columns are taken out only where it matters: where DOMINANT of them
# may hold more than half of the variance, or less than a quarter of |M|^2 is left by the subtraction.
#
# Squares of M overflow long before C does. So M, T and what is made of them are kept in units of u = 2^k,
# near the largest standard deviation: M / u^2 and T / u, exact. The results are multiplied by u at the end.

DOMINANT = 8                                           # a constant: a GPU's shapes may not depend on data


def _apart(variance):
    """The columns of largest variance, [k]."""
    count = min(DOMINANT, variance.numel())
    return variance.topk(count).indices


def _even(variance):
    """Whether any DOMINANT columns hold half of the variance at most, and nothing overflows with u = 1."""
    top, total = variance.amax().item(), variance.sum().item()
    return 1e-8 < top < 1e8 and 2 * DOMINANT * top <= total


def _unit(variance):
    """u, a power of 2, and 1 / u^2, both []."""
    _, exponent = torch.frexp(variance.amax())
    exponent = exponent.clamp(min=-120)                    # 1 / u^2 is a number in fp32
    one = variance.new_ones(())
    return torch.ldexp(one, exponent // 2), torch.ldexp(one, exponent // 2 * -2)


def _with_dominant(g, t):
    """G of the other columns, T -> sums of squares with T, G T + T hollow(T^T T) [N, k], M = G + T T^T.

    In float64: these are small, and on a GPU no setting for tf32 reaches them.
    """
    wide = t.double()
    across = g.double() @ wide                         # [N, k]
    among = (wide.T @ wide).fill_diagonal_(0)          # [k, k]
    squares = 2 * (wide * across).sum() + among.square().sum()
    pull = across + wide @ among
    m = g.add_(wide @ wide.T)
    return squares.to(t.dtype), pull.to(t.dtype), m


# ---- Plain torch -------------------------------------------------------------------------------------------
SMALL = 2 ** 16                                        # numbers that are not worth cutting in pieces
NARROW = 64                                            # columns that are not worth cutting in strips


def _cut(length, pieces, least):
    """Slices of an axis: so many pieces of one length, at least the least."""
    step = max(least, -(-length // pieces))
    return [slice(first, min(first + step, length)) for first in range(0, length, step)]


def _centre_torch(z):
    """z [N, D] -> Z_c [N, D], mean [2, D], var [D].

    Two passes: E[x^2] - E[x]^2 is 12 % wrong at mean 30, std 0.05. The mean is a sum of two numbers, because
    one rounded to fp32 leaves an offset in Z_c that shows in the gradient when the mean dwarfs the spread.
    """
    work = torch.promote_types(z.dtype, torch.float32)
    high = z.mean(dim=0, dtype=work)
    zc = z - high                                      # promoted to the working precision
    low = zc.mean(dim=0)
    zc -= low
    variance = zc.square().sum(dim=0) / (z.shape[0] - 1)
    return zc, torch.stack([high, low]), variance


def _product_torch(xc):
    """x_c [L, n] -> M [n, n]. M is symmetric: strips up to the diagonal, little more than half of the
    work."""
    n = xc.shape[1]
    if n <= NARROW:
        return torch.mm(xc.T, xc)
    m = xc.new_empty(n, n)
    for strip in _cut(n, 8, NARROW):
        upto = slice(0, strip.stop)
        before = slice(0, strip.start)
        m[strip, upto].addmm_(xc[:, strip].T, xc[:, upto], beta=0)
        m[before, strip] = m[strip, before].T
    return m


def _squares_torch(m):
    # Row by row: one fp32 vector_norm over 67 million elements is 1 % off in the square, this 4e-8.
    return torch.linalg.vector_norm(m, dim=1).square().sum()


def _backward_torch(z, mean, scale, m, a, gram):
    """a x_c M + s x_c, [N, D]. x_c is made again, piece by piece: the memory is M and the result. a: on a
    CPU a number."""
    n, d = z.shape
    dz = torch.empty_like(z, dtype=m.dtype)
    pieces = _cut(d, 4, 2 * SMALL // n) if gram else _cut(n, 8, SMALL // d)
    for piece in pieces:
        rows, columns = (slice(None), piece) if gram else (piece, slice(None))
        high, low = mean[:, columns]
        zc = (z[rows, columns] - high).sub_(low)
        out = dz[rows, columns]
        torch.mul(zc, scale[columns], out=out)
        factor = a
        if isinstance(a, Tensor):                      # of a GPU, whose value would have to be waited for
            zc *= a
            factor = 1
        pair = (m, zc) if gram else (zc, m)
        out.addmm_(*pair, alpha=factor)
    return dz


# ---- Triton ------------------------------------------------------------------------------------------------
# Kernels with static tile sizes and no atomics: bitwise reproducible. z is cast to fp32 right after each
# load, offsets are int64. What lies past an edge is loaded as 0, and set to 0 again once the mean is off.
if triton is not None:

    @triton.jit
    def _column_stats(
            z,  # [N, D], strides stride_n, stride_d
            partial,  # [4, splits, D]: rows of this split; their mean in two parts; squares about that mean
            N, D, rows_per_split,
            stride_n, stride_d,
            BLOCK_N: tl.constexpr,  # rows at a time
            BLOCK_D: tl.constexpr,  # columns of a program
    ):
        """Statistics of BLOCK_D columns over one split of the rows; the second pass comes from cache."""
        d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
        split = tl.program_id(1)
        columns = z + d.to(tl.int64) * stride_d
        first = split * rows_per_split
        last = tl.minimum(first + rows_per_split, N)
        count = (last - first).to(tl.float32)

        total = tl.zeros([BLOCK_D], tl.float32)
        for start in range(first, last, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)[:, None]
            inside = (n < last) & (d < D)
            x = tl.load(columns + n.to(tl.int64) * stride_n, mask=inside, other=0.)
            total += tl.sum(x.to(tl.float32), axis=0)
        high = total / count

        rest = tl.zeros([BLOCK_D], tl.float32)
        squares = tl.zeros([BLOCK_D], tl.float32)
        for start in range(first, last, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)[:, None]
            inside = (n < last) & (d < D)
            x = tl.load(columns + n.to(tl.int64) * stride_n, mask=inside, other=0.)
            xc = tl.where(n < last, x.to(tl.float32) - high, 0.)
            squares += tl.sum(xc * xc, axis=0)
            rest += tl.sum(xc, axis=0)
        low = rest / count

        stride = tl.num_programs(1) * D
        at = partial + split * D + d
        tl.store(at, count + tl.zeros([BLOCK_D], tl.float32), mask=d < D)
        tl.store(at + stride, high, mask=d < D)
        tl.store(at + 2 * stride, low, mask=d < D)
        tl.store(at + 3 * stride, squares - rest * low, mask=d < D)

    @triton.jit
    def _merge_stats(
            partial,  # [4, splits, D] of _column_stats
            mean,  # [2, D] out, two parts
            variance,  # [D] out
            N, D, splits,
            BLOCK_D: tl.constexpr,  # columns of a program
    ):
        """Mean and variance of all rows from those of the splits (Chan, Golub, LeVeque 1979)."""
        d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
        stride = splits * D
        total = tl.zeros([BLOCK_D], tl.float32)
        for split in range(0, splits):
            at = partial + split * D + d
            count = tl.load(at, mask=d < D, other=0.)
            total += count * tl.load(at + stride, mask=d < D, other=0.)
        high = total / N

        rest = tl.zeros([BLOCK_D], tl.float32)
        squares = tl.zeros([BLOCK_D], tl.float32)
        for split in range(0, splits):
            at = partial + split * D + d
            count = tl.load(at, mask=d < D, other=0.)
            off = tl.load(at + stride, mask=d < D, other=0.) - high
            off += tl.load(at + 2 * stride, mask=d < D, other=0.)
            rest += count * off
            squares += count * off * off + tl.load(at + 3 * stride, mask=d < D, other=0.)
        low = rest / N

        tl.store(mean + d, high, mask=d < D)
        tl.store(mean + D + d, low, mask=d < D)
        tl.store(variance + d, (squares - rest * low) / (N - 1), mask=d < D)

    @triton.jit
    def _load_centred(
            x,  # [L, n], strides stride_l, stride_n
            mean,  # [2, D], two parts
            rows, cols,  # which of them, int32 vectors
            L, n, D,
            stride_l, stride_n,
            GRAM: tl.constexpr,  # x = z^T: the means go with the rows; else x = z: with the columns
    ):
        """Tile x_c[rows, cols] in fp32, 0 outside."""
        inside = (rows[:, None] < L) & (cols[None, :] < n)
        at = rows.to(tl.int64)[:, None] * stride_l + cols.to(tl.int64)[None, :] * stride_n
        tile = tl.load(x + at, mask=inside, other=0.).to(tl.float32)
        d = rows[:, None] if GRAM else cols[None, :]
        high = tl.load(mean + d, mask=d < D, other=0.)
        low = tl.load(mean + D + d, mask=d < D, other=0.)
        return tl.where(inside, tile - high - low, 0.)

    @triton.jit
    def _product(
            x,  # [L, n], strides stride_l, stride_n
            mean,  # [2, D], two parts
            keep,  # [D], 0 for columns of z that the Gram matrix leaves out, else 1; only read with GRAM
            partial,  # [splits, n, n] out
            L, n, D,
            stride_l, stride_n,
            rows_per_split,
            GRAM: tl.constexpr,
            BLOCK: tl.constexpr,  # side of a tile of M
            BLOCK_K: tl.constexpr,  # rows of x at a time
            PRECISION: tl.constexpr,  # of tl.dot
    ):
        """partial[s, i, j] = x_c[rows of split s, tile i]^T x_c[the same rows, tile j], lower tiles only."""
        i = tl.program_id(0)
        j = tl.program_id(1)
        split = tl.program_id(2)
        if j > i:
            return
        ci = i * BLOCK + tl.arange(0, BLOCK)
        cj = j * BLOCK + tl.arange(0, BLOCK)
        first = split * rows_per_split
        last = tl.minimum(first + rows_per_split, L)
        acc = tl.zeros([BLOCK, BLOCK], tl.float32)
        for start in range(first, last, BLOCK_K):
            rows = start + tl.arange(0, BLOCK_K)
            xi = _load_centred(x, mean, rows, ci, last, n, D, stride_l, stride_n, GRAM)   # [BLOCK_K, BLOCK]
            xj = _load_centred(x, mean, rows, cj, last, n, D, stride_l, stride_n, GRAM)
            if GRAM:
                xi *= tl.load(keep + rows, mask=rows < last, other=0.)[:, None]
            acc += tl.dot(tl.trans(xi), xj, input_precision=PRECISION)
        at = (split.to(tl.int64) * n + ci.to(tl.int64)[:, None]) * n + cj[None, :]
        tl.store(partial + at, acc, mask=(ci[:, None] < n) & (cj[None, :] < n))

    @triton.jit
    def _fold(
            partial,  # [splits, n, n] of _product
            m,  # [n, n] out; may be partial itself, if there is one split
            squares,  # [tiles, tiles] out, sum of squares of M by lower tile
            shrink,  # [], what to multiply M with
            n, splits,
            HOLLOW: tl.constexpr,  # set the diagonal to 0
            BLOCK: tl.constexpr,  # side of a tile
    ):
        """M = sum of the partial products, mirrored into the upper tiles."""
        i = tl.program_id(0)
        j = tl.program_id(1)
        slot = squares + i * tl.num_programs(1) + j
        if j > i:
            tl.store(slot, 0.)
            return
        r = i * BLOCK + tl.arange(0, BLOCK)[:, None]
        c = j * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (r < n) & (c < n)
        at = r.to(tl.int64) * n + c
        acc = tl.zeros([BLOCK, BLOCK], tl.float32)
        for split in range(0, splits):
            acc += tl.load(partial + at, mask=inside, other=0.)
            partial += tl.cast(n, tl.int64) * n
        acc *= tl.load(shrink)
        if HOLLOW:
            acc = tl.where(r == c, 0., acc)
        tl.store(m + at, acc, mask=inside)
        if j < i:
            tl.store(m + c.to(tl.int64) * n + r, acc, mask=inside)
            acc *= 1.4142135623730951                  # it stands in M twice
        tl.store(slot, tl.sum(acc * acc))

    @triton.jit
    def _gradient(
            x,  # [L, n], strides stride_l, stride_n
            mean,  # [2, D], two parts
            scale,  # [D], s of the derivation
            m,  # [n, n]
            a,  # [], a of the derivation
            dx,  # [L, n] out, strides out_l, out_n
            L, n, D,
            stride_l, stride_n,
            out_l, out_n,
            GRAM: tl.constexpr,
            BLOCK: tl.constexpr,  # side of a tile of dx
            BLOCK_K: tl.constexpr,  # columns of x at a time
            PRECISION: tl.constexpr,  # of tl.dot
    ):
        """dx tile = a x_c M + s x_c."""
        rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        acc = tl.zeros([BLOCK, BLOCK], tl.float32)
        for start in range(0, n, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            xk = _load_centred(x, mean, rows, k, L, n, D, stride_l, stride_n, GRAM)     # [BLOCK, BLOCK_K]
            inside = (k[:, None] < n) & (cols[None, :] < n)
            mk = tl.load(m + k.to(tl.int64)[:, None] * n + cols[None, :], mask=inside, other=0.)
            acc += tl.dot(xk, mk, input_precision=PRECISION)
        xc = _load_centred(x, mean, rows, cols, L, n, D, stride_l, stride_n, GRAM)
        d = rows[:, None] if GRAM else cols[None, :]
        s = tl.load(scale + d, mask=d < D, other=0.)
        at = rows.to(tl.int64)[:, None] * out_l + cols.to(tl.int64)[None, :] * out_n
        tl.store(dx + at, tl.load(a) * acc + s * xc, mask=(rows[:, None] < L) & (cols[None, :] < n))

    STATS = dict(BLOCK_N=128, BLOCK_D=32)
    MERGE, FOLD = 128, 32
    # fp32 on tensor cores in three tf32 products; AMD's matrix cores take fp32 itself.
    PRODUCT = dict(BLOCK=64, BLOCK_K=32, PRECISION="ieee" if torch.version.hip else "tf32x3")
    LAUNCH = dict(num_warps=4, num_stages=3)


def _statistics_triton(z):
    """z [N, D] -> mean [2, D], var [D]."""
    n, d = z.shape
    blocks = triton.cdiv(d, STATS["BLOCK_D"])
    splits = max(1, min(programs(z) // blocks, n // (2 * STATS["BLOCK_N"])))
    rows_per_split = triton.cdiv(n, splits)
    splits = triton.cdiv(n, rows_per_split)
    partial = z.new_empty((4, splits, d), dtype=torch.float32)
    mean = z.new_empty((2, d), dtype=torch.float32)
    variance = z.new_empty(d, dtype=torch.float32)
    with on_device(z):
        _column_stats[blocks, splits](z, partial, n, d, rows_per_split, *z.stride(), **STATS)
        _merge_stats[(triton.cdiv(d, MERGE),)](partial, mean, variance, n, d, splits, MERGE)
    return mean, variance


def _product_triton(z, mean, keep, shrink, gram):
    """M / u^2 [n, n] and its sum of squares; keep [D]: columns of z in the Gram matrix; shrink: 1 / u^2."""
    x = z.T if gram else z                             # [L, n], a view
    long, n = x.shape
    tiles = triton.cdiv(n, PRODUCT["BLOCK"])
    lower = tiles * (tiles + 1) // 2
    # Split the long axis until the device is full; all partial products together stay within Z's size.
    splits = max(1, min(64, programs(z) // lower, long // n))
    step = PRODUCT["BLOCK_K"]
    per_split = triton.cdiv(triton.cdiv(long, splits), step) * step
    splits = triton.cdiv(long, per_split)

    partial = z.new_empty((splits, n, n), dtype=torch.float32)
    m = partial[0] if splits == 1 else z.new_empty((n, n), dtype=torch.float32)
    folds = triton.cdiv(n, FOLD)
    squares = z.new_empty((folds, folds), dtype=torch.float32)
    with on_device(z):
        _product[tiles, tiles, splits](x, mean, keep, partial, long, n, z.shape[1], *x.stride(), per_split,
                                       gram, **PRODUCT, **LAUNCH)
        _fold[folds, folds](partial, m, squares, shrink, n, splits, not gram, FOLD)
    return m, squares.sum()


def _backward_triton(z, mean, scale, m, a, gram):
    """As _backward_torch."""
    dz = torch.empty_like(z, dtype=torch.float32)
    x, dx = (z.T, dz.T) if gram else (z, dz)
    long, n = x.shape
    grid = triton.cdiv(long, PRODUCT["BLOCK"]), triton.cdiv(n, PRODUCT["BLOCK"])
    with on_device(z):
        _gradient[grid](x, mean, scale, m, a, dx, long, n, z.shape[1], *x.stride(), *dx.stride(), gram,
                        **PRODUCT, **LAUNCH)
    return dz


# ---- Both ways ---------------------------------------------------------------------------------------------
def _shapes_forward(z, gram, use_triton):
    n, d = z.shape
    side, k = (n, min(DOMINANT, d)) if gram else (d, 0)
    new = z.new_empty(0, dtype=torch.promote_types(z.dtype, torch.float32)).new_empty
    columns = new(k, dtype=torch.int64)
    return new(2, d), new(d), new(()), new(side, side), new(()), new(n, k), new(n, k), columns


def _covariance_side(z, use_triton):
    """mean, var, u, M / u^2, (N-1)^2 D covariance / u^4."""
    if use_triton:
        mean, variance = _statistics_triton(z)
        unit, shrink = _unit(variance)
        m, squares = _product_triton(z, mean, None, shrink, False)
    else:
        zc, mean, variance = _centre_torch(z)
        unit, shrink = _unit(variance)
        m = _product_torch(zc).mul_(shrink).fill_diagonal_(0)
        squares = _squares_torch(m)
    return mean, variance, unit, m, squares


def _gram_side(z, use_triton):
    """The same; T / u [N, k], (G T + T hollow(T^T T)) / u^3 [N, k], the columns of T [k], or -1."""
    if use_triton:
        mean, variance = _statistics_triton(z)
        unit, shrink = _unit(variance)
        columns = _apart(variance)
        t = z[:, columns].float() - mean[0, columns] - mean[1, columns]
        keep = torch.ones_like(variance).index_fill_(0, columns, 0)
        g, squares = _product_triton(z, mean, keep, shrink, True)
    else:
        zc, mean, variance = _centre_torch(z)
        if free_to_look(z) and _even(variance):
            m = _product_torch(zc.T)
            squares = _squares_torch(m)
            diagonal = variance.square().sum() * (len(z) - 1) ** 2
            if 4 * diagonal <= 3 * squares:            # two bits are lost at most
                t = m.new_zeros(len(z), min(DOMINANT, len(variance)))
                none = torch.full(t.shape[1:], -1)
                return mean, variance, m.new_ones(()), m, squares - diagonal, t, torch.zeros_like(t), none
            del m
        unit, shrink = _unit(variance)
        columns = _apart(variance)
        t = zc[:, columns]
        g = _product_torch(zc.index_fill_(1, columns, 0).T).mul_(shrink)
        squares = _squares_torch(g)
    diagonal = variance.index_fill(0, columns, 0) * shrink * (len(z) - 1)
    t = t / unit
    extra, pull, m = _with_dominant(g, t)
    return mean, variance, unit, m, squares - diagonal.square().sum() + extra, t, pull, columns


@opaque("covariance_forward", _shapes_forward)
def _forward(z: Tensor, gram: bool, use_triton: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                                               Tensor, Tensor]:
    """What _gram_side returns; on the covariance side no column is taken out: k = 0."""
    if gram:
        return _gram_side(z, use_triton)
    found = _covariance_side(z, use_triton)
    no_columns = found[1].new_empty(len(z), 0)                   # T, and its pull G T + T hollow(T^T T)
    none = no_columns.new_empty(0, dtype=torch.int64)
    return *found, no_columns, no_columns.clone(), none          # an op's outputs may not be one


def _shapes_backward(z, mean, variance, unit, m, *rest):
    return torch.empty_like(z, dtype=m.dtype)


@opaque("covariance_backward", _shapes_backward)
def _backward(z: Tensor, mean: Tensor, variance: Tensor, unit: Tensor, m: Tensor, t: Tensor, pull: Tensor,
              columns: Tensor, g_variance: Tensor, g_covariance: Tensor, gamma: float, eps: float, gram: bool,
              use_triton: bool) -> Tensor:
    """dZ of the derivation, [N, D]."""
    n, d = z.shape
    if free_to_look(z) and not use_triton:                       # numbers: fewer calls
        unit, g_variance, g_covariance = unit.item(), g_variance.item(), g_covariance.item()
    std = (variance + eps).sqrt_()
    hinge = torch.where(std < gamma, -g_variance / (d * (n - 1)) / std, 0)
    a = 4 * g_covariance / (d * (n - 1) ** 2)
    scale = hinge - variance * (a * (n - 1)) if gram else hinge
    product = _backward_triton if use_triton else _backward_torch
    a = a * unit * unit                                          # what M lacks
    if isinstance(a, float) and abs(a) > torch.finfo(m.dtype).max:
        a = math.copysign(math.inf, a)                           # as a tensor has it; a number is refused
    dz = product(z, mean, scale, m, a, gram)
    if gram and not (free_to_look(z) and columns[0] < 0):
        dz[:, columns] = (a * pull + hinge[columns] * t) * unit
    return dz


# ---- Autograd ----------------------------------------------------------------------------------------------
class _VarianceCovariance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, gamma, eps, gram, use_triton):
        n, d = z.shape
        mean, variance, unit, m, squares, t, pull, columns = _forward(z, gram, use_triton)
        ctx.save_for_backward(z, mean, variance, unit, m, t, pull, columns)
        ctx.options = gamma, eps, gram, use_triton
        short = torch.relu(gamma - (variance + eps).sqrt_())
        square = unit * unit
        return short.mean(), squares / ((n - 1) ** 2 * d) * square * square

    @staticmethod
    def backward(ctx, g_variance, g_covariance):
        refuse_double_backward("variance_covariance", "; impl='reference' has one")
        z, *kept = ctx.saved_tensors
        with torch.autocast(z.device.type, enabled=False):
            dz = _backward(z, *kept, g_variance, g_covariance, *ctx.options)
        return dz.to(z.dtype), None, None, None, None


# ---- Public ------------------------------------------------------------------------------------------------
def variance_covariance(z, gamma=1.0, eps=1e-4, impl="auto", side="auto"):
    """VICReg's variance and covariance terms of one view's embeddings, as its released code defines them.

    z       [N, D], N >= 2, any float dtype and strides, finite. Differentiable once, any upstream gradient.
    gamma   what the standard deviation of each dimension shall reach, in z's units. A number: no gradient.
    eps     added to the variance inside the root; at 0 a constant dimension has no gradient (NaN). A number.
    impl    "auto": Triton for CUDA tensors where it can be used, else "torch". "reference", "torch", "triton"
            force one; a forced "triton" takes CPU tensors if TRITON_INTERPRET=1 was set before import.
            "reference" is plain autograd: torch.func takes it, and a backward inside autocast is in bf16.
    side    "auto": the N x N Gram matrix if 2N <= D, else the D x D covariance. "gram", "covariance": that.

    Returns (variance, covariance), two scalars >= 0 but for rounding, computed and returned in fp32 also
    under autocast (float64 for float64). Extra memory with side="auto": about three times z in fp32, with
    its gradient. Up to eight columns may dominate the rest by any factor; where more do, side="covariance"
    keeps the digits. ValueError for a wrong rank, dtype, N < 2 or option; RuntimeError in a double backward,
    which impl="reference" alone has. Source: Bardes et al., arXiv 2105.04906, released code.
    """
    if z.ndim != 2 or not z.is_floating_point():
        raise ValueError(f"variance_covariance takes float embeddings [N, D], got {z.dtype} {list(z.shape)}: "
                         "flatten to two axes and convert with .float()")
    if z.shape[0] < 2 or z.shape[1] < 1:
        raise ValueError(f"variance_covariance got z {list(z.shape)}: a variance needs N >= 2 samples, "
                         "D >= 1 dimensions; use a larger batch")
    if side not in ("auto", "gram", "covariance"):
        raise ValueError(f"side={side!r}: auto, gram or covariance")
    for name, value in (("gamma", gamma), ("eps", eps)):
        if isinstance(value, Tensor):
            raise ValueError(f"{name} must be a number, not a tensor: it gets no gradient")
    with torch.autocast(z.device.type, enabled=False):
        if impl == "reference":
            work = torch.promote_types(z.dtype, torch.float32)
            return variance_covariance_reference(z.to(work), gamma, eps)
        refuse_transforms("variance_covariance", "impl='reference'")
        use_triton = pick(impl, [z]) == "triton"
        gram = side == "gram" or (side == "auto" and 2 * z.shape[0] <= z.shape[1])
        return _VarianceCovariance.apply(z, float(gamma), float(eps), gram, use_triton)
