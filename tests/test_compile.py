"""Kernels become GPU code without a GPU: tensor cores used, shared memory within the chip's, no spills on NVIDIA.

The compiler runs in a process of its own, since this one has Triton's interpreter on.
"""
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")

COMPILE = r"""
import json, os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import covariance as c, dictionary, similarity

KERNELS = {  # what is constant at launch, strides of 1 included
    "_column_stats": dict(constants=dict(stride_d=1, BLOCK_N=256, BLOCK_D=16)),
    "_product, Gram": dict(constants=dict(stride_l=1, GRAM=True, BLOCK=c.BLOCK, BLOCK_K=c.BLOCK_K)),
    "_product, covariance": dict(constants=dict(stride_n=1, GRAM=False, BLOCK=c.BLOCK, BLOCK_K=c.BLOCK_K)),
    "_fold": dict(constants=dict(HOLLOW=True, BLOCK=c.FOLD)),
    "_fold, D = 1": dict(constants=dict(n=1, size=1, splits=1, HOLLOW=True, BLOCK=c.FOLD)),    # 1 becomes a constant
    "_column_stats, D = 1": dict(constants=dict(stride_n=1, stride_d=1, D=1, BLOCK_N=256, BLOCK_D=16)),
    "_gradient, Gram": dict(constants=dict(stride_l=1, out_l=1, GRAM=True, BLOCK=c.BLOCK, BLOCK_K=c.BLOCK_K)),
    "_gradient, covariance": dict(constants=dict(stride_n=1, out_n=1, GRAM=False, BLOCK=c.BLOCK, BLOCK_K=c.BLOCK_K)),
}
for d in (1, 128):                                     # the smallest tiles and the largest
    tiles = similarity._tiles(d) | dict(stride_qd=1, stride_md=1) | (dict(d=1, B=1) if d == 1 else {})
    for softmax in (True, False):
        kind = f"d = {d}, {'softmax' if softmax else 'repulsion'}"
        flags = dict(SOFTMAX=softmax, EXCLUDE=d > 1)
        KERNELS[f"_slab, {kind}"] = dict(constants=dict(OUTPUT=d > 1, **flags, **tiles))
        KERNELS[f"_bank_rows, {kind}"] = dict(constants=dict(TARGET=softmax, **flags, **tiles))
for f in (1, 256):
    ones = dict(f=1, words=1, n=1, codes=1, rows=1, seed=1, last=1) if f == 1 else {}
    for name, reverse in [("_row_sums", None), ("_code_means", None), ("_times_signs", None)] + [
            (name, reverse) for name in ("_row_terms", "_slopes") for reverse in (True, False)]:
        tiles = dictionary.SUM_TILES if name == "_times_signs" else dictionary.TILES
        flags = {} if reverse is None else dict(REVERSE=reverse)
        KERNELS[f"{name}, f = {f}, {flags}"] = dict(constants=tiles | ones | flags)
INPUTS, INDICES = {"z", "x", "q", "bank"}, {"exclude", "target"}
POINTERS = {"mean", "var", "partial", "m", "squares", "scale", "a", "dx", "top", "total", "out", "value", "g", "dm",
            "h", "lse", "terms", "upstream", "slopes"}
TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32),
           "gfx942": GPUTarget("hip", "gfx942", 64)}

def kernel_of(name):
    module = next(module for module in (c, similarity, dictionary) if hasattr(module, name.split(",")[0]))
    return module, getattr(module, name.split(",")[0])

def compile(name, options, target, dtype):
    module, kernel = kernel_of(name)
    constants = {k: v for k, v in options["constants"].items() if k in kernel.arg_names}
    if "PRECISION" in kernel.arg_names:
        constants["PRECISION"] = "ieee" if target.backend == "hip" else "tf32x3"      # as the modules choose
    signature, hints = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        else:
            signature[argument] = ("*" + dtype if argument in INPUTS else "*i64" if argument in INDICES else
                                   "*fp32" if argument in POINTERS else
                                   "fp32" if argument == "log_c" else "i32")
            hints[i,] = [["tt.divisibility", 16]]                              # else loads are narrow
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, hints)
    tiles = dictionary.TILES if module is dictionary else similarity._tiles(16)
    launch = {k: tiles[k] for k in ("num_warps", "num_stages")} if module is not c else (
        c.LAUNCH if "PRECISION" in constants else {})
    return triton.compile(source, target=target, options=launch)

rows = []
for target_name in sys.argv[1:]:
    target = TARGETS[target_name]
    for name, options in KERNELS.items():
        for dtype in ("fp32", "bf16"):
            if dtype == "bf16" and not INPUTS & set(kernel_of(name)[1].arg_names):
                continue                               # its inputs are fp32 whatever the caller's are
            built = compile(name, options, target, dtype)
            row = dict(target=target_name, kernel=name, dtype=dtype, shared=built.metadata.shared)
            if target.backend == "cuda":
                with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                    file.write(built.asm["cubin"])
                    file.flush()
                    tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
                    usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
                row["spilled"] = sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage.stdout)))
                row["tensor_cores"] = sorted(set(re.findall(r"H(?:G)?MMA", built.asm["sass"])))
            else:
                row["spilled"] = sum(map(int, re.findall(r"vgpr_spill_count: *(\d+)", built.asm["amdgcn"])))
                row["tensor_cores"] = sorted(set(re.findall(r"v_mfma_\w+", built.asm["amdgcn"])))
            rows.append(row)
print(json.dumps(rows))
"""
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "gfx942": 65536}      # bytes a block may have


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    script = tmp_path_factory.mktemp("compile") / "compile_kernels.py"       # Triton reads kernels' source from files
    script.write_text(COMPILE)
    root = str(Path(__file__).parents[1])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": root}
    def compile(target):
        done = subprocess.run([sys.executable, script, target], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [row for rows in pool.map(compile, SHARED_LIMIT) for row in rows]


@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_fits_the_chip_without_spills(compiled, target):
    rows = [row for row in compiled if row["target"] == target]
    assert len(rows) == 44
    assert all(row["shared"] <= SHARED_LIMIT[target] and row["spilled"] == 0 for row in rows), rows


@pytest.mark.parametrize("target, instruction", [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("gfx942", "v_mfma_f32")])
def test_products_run_on_tensor_cores(compiled, target, instruction):
    rows = [row for row in compiled if row["target"] == target and not row["kernel"].startswith(("_column", "_fold"))]
    assert len(rows) == 38
    assert all(any(i.startswith(instruction) for i in row["tensor_cores"]) for row in rows), rows
