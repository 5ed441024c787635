"""Variance and covariance of one batch of embeddings: VICReg's two regularisers, fused, in closed form.

    variance_covariance(z [N, D]) -> variance, covariance       two scalars; Z_c = Z minus its column means

    variance   = 1/D sum_d max(0, gamma - sqrt(var_d + eps))     var_d = sum_n Z_c[n, d]^2 / (N - 1)
    covariance = 1/D sum_{i != j} C_ij^2                         C = Z_c^T Z_c / (N - 1)

Arithmetic and bytes. The textbook form with autograd multiplies three times by a D x D matrix, 6 N D^2 operations,
and keeps several of these matrices: at (256, 8192) 103 GFLOP and over 1 GB, for an input of 8 MB. But only the sum
of squares of C is asked for, and the N x N Gram matrix has it too (Garrido et al., arXiv 2206.02574). With
n = N (where 2N <= D) or D two products suffice, the first symmetric: 3 N D n operations, n^2 scratch, four passes
over Z (read by the forward; read, read and written by the backward). At (256, 8192) that is 1.6 GFLOP and 34 MB.
The floor on an H100 (67 TFLOP/s in fp32, 3.35 TB/s) is 24 us, of which the memory needs 10; at 100 GFLOP/s a laptop
needs 16 ms.

All is computed in fp32, also inside autocast: near the whitened optimum bf16 operands make the gradient 16 % wrong
or more (4096 x 512), tf32 a few per cent, and fp16 flushes small covariances to 0. float64 stays float64, for
gradcheck. (The plain-torch path on a GPU obeys torch.backends.cuda.matmul.allow_tf32, off by default; the Triton path
does not.)
"""
from contextlib import nullcontext

import torch

try:
    import triton
    import triton.language as tl
except ImportError:                                    # no wheel here: all but impl="triton" works
    triton = None


# ---- Reference: the specification --------------------------------------------------------------------------
def variance_covariance_reference(z, gamma=1.0, eps=1e-4):
    """Both terms as VICReg's released code defines them (facebookresearch/vicreg, main_vicreg.py): D x D, autograd."""
    n, d = z.shape
    z = z - z.mean(dim=0)
    std = torch.sqrt(z.var(dim=0) + eps)               # divisor N - 1
    variance = torch.relu(gamma - std).mean()
    c = z.T @ z / (n - 1)                              # [D, D]
    off_diagonal = c - torch.diag(torch.diagonal(c))
    return variance, off_diagonal.square().sum() / d


# ---- Derivation --------------------------------------------------------------------------------------------
# Let x be the matrix with the long axis first, [L, n]: x = Z (covariance side, n = D) or x = Z^T (Gram side, n = N).
# Then both sides are one program, M = x_c^T x_c [n, n] in the forward and x_c M in the backward:
#
#   covariance side   M = Z_c^T Z_c with its diagonal set to 0:   covariance = |M|^2 / ((N-1)^2 D)
#   Gram side         M = Z_c Z_c^T, |M|^2 = |Z_c^T Z_c|^2:       covariance = (|M|^2 / (N-1)^2 - sum_d var_d^2) / D
#
# The Gram side subtracts the diagonal's part from the whole, and loses digits as far as the diagonal dominates.
# rank(C) <= N-1 bounds that for columns of like variance: with 2N <= D by a factor of 2 at most, so the Gram side is
# taken there and only there. (Whitened 4096 x 512 would come out .2-.6 % wrong. One dimension x1000 does, .4-1.5 %,
# at any shape: then force side="covariance". A test holds both.)
#
# Backward with upstream gradients g_v, g_k. d covariance/dC = 2 offdiag(C)/D, dC = (dZ^T Z_c + Z_c^T dZ)/(N-1), so
#
#   dZ = a x_c M + s x_c,    a = 4 g_k / (D (N-1)^2),    s_d = -g_v [std_d < gamma] / (D (N-1) std_d)
#   and on the Gram side the subtracted var_d^2 add      s_d -= 4 g_k var_d / (D (N-1))
#
# Each column of this dZ sums to zero by itself: the mean needs no further term.

def _scale(variance, g_variance, g_covariance, gamma, eps, n, gram):
    """s_d of the derivation, [D]."""
    d, std = variance.numel(), (variance + eps).sqrt()
    s = torch.where(std < gamma, -g_variance / (d * (n - 1) * std), 0)
    return s - 4 * g_covariance * variance / (d * (n - 1)) if gram else s


# ---- Plain torch -------------------------------------------------------------------------------------------
def _forward_torch(z, gram):
    """z [N, D] -> mean [2, D], var [D], M [n, n], |M|^2.

    Two passes: E[x^2] - E[x]^2 is 12 % wrong at mean 30, std .05. The mean is a sum of two numbers, because one rounded
    to fp32 leaves an offset in z_c that shows in the gradient when the mean is far larger than the spread.
    """
    high = z.mean(dim=0, dtype=torch.promote_types(z.dtype, torch.float32))
    zc = z - high                                      # [N, D], promoted to the working precision
    low = zc.mean(dim=0)
    zc -= low
    variance = zc.square().sum(dim=0) / (z.shape[0] - 1)
    xc = zc.T if gram else zc                          # [L, n]
    n, step = xc.shape[1], -(-xc.shape[1] // 4)
    m = xc.new_empty(n, n)
    for i in range(0, n, step):                        # M is symmetric: four strips up to the diagonal, 5/8 of the work
        j = min(i + step, n)
        m[i:j, :j].addmm_(xc[:, i:j].T, xc[:, :j], beta=0)
        m[:i, i:j] = m[i:j, :i].T
    if not gram:
        m.fill_diagonal_(0)
    # Row by row: one fp32 vector_norm over 67 million elements is 1 % off in the square, this is exact to 4e-8.
    return torch.stack([high, low]), variance, m, torch.linalg.vector_norm(m, dim=1).square().sum()


def _backward_torch(z, mean, scale, m, a, gram):
    """a x_c M + s x_c, [N, D]. x_c is made again, an eighth at a time: the memory is M and the result."""
    dz = torch.empty_like(z, dtype=m.dtype)
    axis = 1 if gram else 0
    views = (z, dz, *(row.expand_as(z) for row in (*mean, scale)))
    for zi, out, high, low, si in zip(*(v.split(-(-z.shape[axis] // 8), dim=axis) for v in views)):
        zc = (zi - high).sub_(low)
        out.copy_(zc).mul_(si)
        zc *= a
        out.addmm_(m, zc) if gram else out.addmm_(zc, m)
    return dz


# ---- Triton ------------------------------------------------------------------------------------------------
# Four kernels with static tile sizes and no atomics: bitwise reproducible. z is cast to fp32 right after each load,
# offsets are int64. What lies past an edge is loaded as 0, and set to 0 again once the mean has been subtracted.
if triton is not None:

    @triton.jit
    def _column_stats(z, mean, var, N, D, stride_n, stride_d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
        """Mean of BLOCK_D columns; in a second pass, from cache, the mean's rounded-off part and the variance."""
        d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
        columns = z + d.to(tl.int64) * stride_d
        total = tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, N, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)[:, None]
            x = tl.load(columns + n.to(tl.int64) * stride_n, mask=(n < N) & (d < D), other=0.)
            total += tl.sum(x.to(tl.float32), axis=0)
        high = total / N
        squares, total = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, N, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)[:, None]
            x = tl.load(columns + n.to(tl.int64) * stride_n, mask=(n < N) & (d < D), other=0.)
            xc = tl.where(n < N, x.to(tl.float32) - high, 0.)
            squares += tl.sum(xc * xc, axis=0)
            total += tl.sum(xc, axis=0)
        low = total / N
        tl.store(mean + d, high, mask=d < D)
        tl.store(mean + D + d, low, mask=d < D)
        tl.store(var + d, (squares - total * low) / (N - 1), mask=d < D)

    @triton.jit
    def _load_centred(x, mean, rows, cols, L, n, D, stride_l, stride_n, GRAM: tl.constexpr):
        """Tile x_c[rows, cols] in fp32, 0 outside. Means go with the columns of x = z, with the rows of x = z^T."""
        inside = (rows[:, None] < L) & (cols[None, :] < n)
        tile = tl.load(x + rows.to(tl.int64)[:, None] * stride_l + cols.to(tl.int64)[None, :] * stride_n,
                       mask=inside, other=0.).to(tl.float32)
        d = rows[:, None] if GRAM else cols[None, :]
        tile = tile - tl.load(mean + d, mask=d < D, other=0.) - tl.load(mean + D + d, mask=d < D, other=0.)
        return tl.where(inside, tile, 0.)

    @triton.jit
    def _product(x, mean, partial, L, n, D, stride_l, stride_n, rows_per_split, GRAM: tl.constexpr,
                 BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
        """partial[s, i, j] = x_c[rows of split s, tile i]^T x_c[the same rows, tile j], lower tiles only."""
        i, j, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        if j > i:
            return
        ci, cj = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
        first = s * rows_per_split
        last = tl.minimum(first + rows_per_split, L)
        acc = tl.zeros([BLOCK, BLOCK], tl.float32)
        for start in range(first, last, BLOCK_K):
            rows = start + tl.arange(0, BLOCK_K)
            xi = _load_centred(x, mean, rows, ci, last, n, D, stride_l, stride_n, GRAM)   # [BLOCK_K, BLOCK]
            xj = _load_centred(x, mean, rows, cj, last, n, D, stride_l, stride_n, GRAM)
            acc += tl.dot(tl.trans(xi), xj, input_precision=PRECISION)
        out = partial + (s.to(tl.int64) * n + ci.to(tl.int64)[:, None]) * n + cj[None, :]
        tl.store(out, acc, mask=(ci[:, None] < n) & (cj[None, :] < n))

    @triton.jit
    def _fold(partial, m, squares, n, size, splits, HOLLOW: tl.constexpr, BLOCK: tl.constexpr):
        """M = sum of the partial products, mirrored into the upper tiles; one sum of squares per lower tile."""
        i, j = tl.program_id(0), tl.program_id(1)
        slot = squares + i * tl.num_programs(1) + j
        if j > i:
            tl.store(slot, 0.)
            return
        r = i * BLOCK + tl.arange(0, BLOCK)[:, None]
        c = j * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (r < n) & (c < n)
        at = r.to(tl.int64) * n + c
        acc = tl.zeros([BLOCK, BLOCK], tl.float32)
        for s in range(0, splits):
            acc += tl.load(partial + at, mask=inside, other=0.)
            partial += size
        if HOLLOW:
            acc = tl.where(r == c, 0., acc)
        tl.store(m + at, acc, mask=inside)
        if j < i:
            tl.store(m + c.to(tl.int64) * n + r, acc, mask=inside)
            acc *= 1.4142135623730951                                          # it stands in M twice
        tl.store(slot, tl.sum(acc * acc))

    @triton.jit
    def _gradient(x, mean, scale, m, a, dx, L, n, D, stride_l, stride_n, out_l, out_n, GRAM: tl.constexpr,
                  BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
        """dx tile = a x_c M + s x_c."""
        rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        acc = tl.zeros([BLOCK, BLOCK], tl.float32)
        for start in range(0, n, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            xk = _load_centred(x, mean, rows, k, L, n, D, stride_l, stride_n, GRAM)     # [BLOCK, BLOCK_K]
            mk = tl.load(m + k.to(tl.int64)[:, None] * n + cols[None, :],
                         mask=(k[:, None] < n) & (cols[None, :] < n), other=0.)
            acc += tl.dot(xk, mk, input_precision=PRECISION)
        xc = _load_centred(x, mean, rows, cols, L, n, D, stride_l, stride_n, GRAM)
        d = rows[:, None] if GRAM else cols[None, :]
        s = tl.load(scale + d, mask=d < D, other=0.)
        out = dx + rows.to(tl.int64)[:, None] * out_l + cols.to(tl.int64)[None, :] * out_n
        tl.store(out, tl.load(a) * acc + s * xc, mask=(rows[:, None] < L) & (cols[None, :] < n))

    BLOCK, BLOCK_K, FOLD = 64, 32, 32
    # fp32 on tensor cores in three tf32 products; AMD's matrix cores take fp32 itself.
    PRECISION = "ieee" if torch.version.hip else "tf32x3"
    LAUNCH = dict(num_warps=4, num_stages=3)


def _on_device(z):
    return torch.cuda.device(z.device) if z.is_cuda else nullcontext()       # Triton launches on the current one


def _forward_triton(z, gram):
    """As _forward_torch."""
    (N, D), new = z.shape, z.new_empty
    x = z.T if gram else z                             # [L, n], a view
    L, n = x.shape
    tiles, folds = triton.cdiv(n, BLOCK), triton.cdiv(n, FOLD)
    # Split the long axis until some 264 programs run, two for each of 132 processors; the partials within Z's size.
    splits = max(1, min(64, 264 // (tiles * (tiles + 1) // 2), L // n))
    rows_per_split = triton.cdiv(triton.cdiv(L, splits), BLOCK_K) * BLOCK_K
    splits = triton.cdiv(L, rows_per_split)
    mean, variance = new((2, D), dtype=torch.float32), new(D, dtype=torch.float32)
    partial, squares = new((splits, n, n), dtype=torch.float32), new((folds, folds), dtype=torch.float32)
    m = partial[0] if splits == 1 else new((n, n), dtype=torch.float32)       # a fold may work in place
    with _on_device(z):
        _column_stats[(triton.cdiv(D, 16),)](z, mean, variance, N, D, *z.stride(), BLOCK_N=256, BLOCK_D=16)
        _product[(tiles, tiles, splits)](x, mean, partial, L, n, D, *x.stride(), rows_per_split,
                                         gram, BLOCK, BLOCK_K, PRECISION, **LAUNCH)
        _fold[(folds, folds)](partial, m, squares, n, n * n, splits, not gram, FOLD)
    return mean, variance, m, squares.sum()


def _backward_triton(z, mean, scale, m, a, gram):
    """As _backward_torch."""
    dz = torch.empty(z.shape, dtype=torch.float32, device=z.device)
    x, dx = (z.T, dz.T) if gram else (z, dz)
    with _on_device(z):
        _gradient[tuple(triton.cdiv(length, BLOCK) for length in x.shape)](
            x, mean, scale, m, a, dx, *x.shape, z.shape[1], *x.stride(), *dx.stride(),
            gram, BLOCK, BLOCK_K, PRECISION, **LAUNCH)
    return dz


# ---- Autograd ----------------------------------------------------------------------------------------------
class _VarianceCovariance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, gamma, eps, gram, use_triton):
        mean, variance, m, squares = (_forward_triton if use_triton else _forward_torch)(z, gram)
        n, d = z.shape
        ctx.save_for_backward(z, mean, variance, m)
        ctx.options = gamma, eps, gram, use_triton
        covariance = squares / (n - 1) ** 2
        if gram:
            covariance = covariance - variance.square().sum()
        return torch.relu(gamma - (variance + eps).sqrt()).mean(), covariance / d

    @staticmethod
    def backward(ctx, g_variance, g_covariance):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():          # create_graph=True
            raise RuntimeError("variance_covariance has no double backward; impl='reference' has one")
        z, mean, variance, m = ctx.saved_tensors
        gamma, eps, gram, use_triton = ctx.options
        n, d = z.shape
        scale = _scale(variance, g_variance, g_covariance, gamma, eps, n, gram)
        a = 4 * g_covariance / (d * (n - 1) ** 2)
        with torch.autocast(z.device.type, enabled=False):
            dz = (_backward_triton if use_triton else _backward_torch)(z, mean, scale, m, a, gram)
        return dz.to(z.dtype), None, None, None, None


# ---- Public ------------------------------------------------------------------------------------------------
def variance_covariance(z, gamma=1.0, eps=1e-4, impl="auto", side="auto"):
    """VICReg's variance and covariance terms of one view's embeddings, as its released code defines them.

    z       [N, D], N >= 2, any float dtype and strides, finite. Differentiable once, any upstream gradient.
    gamma   what the hinge wants the standard deviation of each dimension to reach, in z's units.
    eps     added to the variance inside the root; at 0 a constant dimension has no gradient (NaN).
    impl    "auto": Triton for CUDA tensors where triton is installed, else "torch". "reference", "torch", "triton"
            force one; a forced "triton" takes CPU tensors if TRITON_INTERPRET=1 was set before import.
    side    "auto": the N x N Gram matrix if 2N <= D, else the D x D covariance. "gram", "covariance" force one.

    Returns (variance, covariance), two scalars >= 0 but for rounding, computed and returned in fp32 also under
    autocast (float64 for float64). Extra memory with side="auto": about three times z in fp32, gradient included.
    Raises ValueError for a wrong rank, dtype, N < 2 or option; RuntimeError in a double backward, which only
    impl="reference" has. Source: Bardes et al., arXiv 2105.04906, released code; README lists other conventions.
    """
    if z.ndim != 2 or not z.is_floating_point():
        raise ValueError(f"variance_covariance takes float embeddings [N, D], got {z.dtype} {list(z.shape)}: "
                         "flatten to two axes and convert with .float()")
    if z.shape[0] < 2 or z.shape[1] < 1:
        raise ValueError(f"variance_covariance got z {list(z.shape)}: a variance needs N >= 2 samples, D >= 1 "
                         "dimensions; use a larger batch")
    if impl not in ("auto", "reference", "torch", "triton") or side not in ("auto", "gram", "covariance"):
        raise ValueError(f"impl={impl!r}, side={side!r}: impl is auto, reference, torch or triton; "
                         "side is auto, gram or covariance")
    if impl == "auto":
        impl = "triton" if z.is_cuda and triton is not None and z.dtype != torch.float64 else "torch"
    if impl == "triton" and (triton is None or z.dtype == torch.float64):
        raise ValueError("impl='triton' needs the triton package and at most fp32 input: use impl='torch'")
    gram = side == "gram" or (side == "auto" and 2 * z.shape[0] <= z.shape[1])
    with torch.autocast(z.device.type, enabled=False):
        if impl == "reference":
            return variance_covariance_reference(z.to(torch.promote_types(z.dtype, torch.float32)), gamma, eps)
        return _VarianceCovariance.apply(z, gamma, eps, gram, impl == "triton")
