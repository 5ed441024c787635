"""Compile every kernel for one target, without a GPU, and print what became of it as JSON.

    python tests/compile_kernels.py sm_90              # or sm_80, sm_86, sm_100, gfx942

Not under TRITON_INTERPRET. A second argument is a part of the names of the kernels wanted.

For each kernel: shared memory, bytes spilled, registers, programs that a processor can hold, and, of its
largest loop, how many instructions and matrix instructions it has. The loop is what lies between a label and
the branch back to it that enclose most matrix instructions.

Sizes and strides of 1 become constants when a kernel is started; these variants are compiled for EDGES only.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1]))
from kernels import bank, covariance, dictionary  # noqa: E402

TARGETS = {name: GPUTarget("cuda", int(name[3:]), 32) for name in ("sm_80", "sm_86", "sm_90", "sm_100")}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
EDGES = "sm_100"
REGISTERS = 65536                                      # of an NVIDIA processor
AMD_REGISTERS = 512                                    # of a lane, on each of the four units of an AMD processor
SHARED = {                                             # bytes of a processor
    "sm_80": 164 * 1024, "sm_86": 100 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024, "gfx942": 64 * 1024,
}

INPUTS = {"z", "x", "q", "bank"}                       # of any float dtype
INDICES = {"exclude", "target"}
PARTS = {"_row_sums": ["h"], "_code_means": ["h"], "_row_terms": ["h"], "_slopes": ["h", "out"],
         "_times_signs": ["slopes"]}                   # in bf16
FLOATS = {"mean", "variance", "keep", "partial", "m", "squares", "scale", "a", "dx", "top", "total", "out",
          "value", "g", "dm", "rest", "terms", "upstream", "shrink", "positive"}


def kernels(target_name):
    """name: (module, constants at launch, launch options); the smallest sizes become constants themselves."""
    product = covariance.PRODUCT
    table = {
        "_column_stats": (covariance, dict(stride_d=1, **covariance.STATS), {}),
        "_column_stats, D = 1": (covariance, dict(stride_n=1, stride_d=1, D=1, **covariance.STATS), {}),
        "_merge_stats": (covariance, dict(BLOCK_D=covariance.MERGE), {}),
        "_fold": (covariance, dict(HOLLOW=True, BLOCK=covariance.FOLD), {}),
        "_fold, D = 1": (covariance, dict(n=1, splits=1, HOLLOW=True, BLOCK=covariance.FOLD), {}),
    }
    for side, gram in (("Gram", True), ("covariance", False)):
        strides = dict(stride_l=1, out_l=1) if gram else dict(stride_n=1, out_n=1)
        for name in ("_product", "_gradient"):
            table[f"{name}, {side}"] = covariance, dict(GRAM=gram, **strides, **product), covariance.LAUNCH
    edges = target_name == EDGES
    if not edges:
        table = {name: row for name, row in table.items() if "= 1" not in name}
    for d in (1, 128) if edges else (128,):            # beyond 128 the same kernel makes more slices
        tiles = bank._tiles(d, hopper=target_name in ("sm_90", "sm_100"))
        ones = dict(d=1, B=1) if d == 1 else {}
        for softmax in (True, False):
            flags = dict(SOFTMAX=softmax, EXCLUDE=d > 1, OUTPUT=d > 1, TARGET=softmax)
            constants = dict(stride_qd=1, stride_md=1, **ones, **flags, **tiles)
            for name in ("_slab", "_bank_rows"):
                kind = "softmax" if softmax else "repulsion"
                table[f"{name}, d = {d}, {kind}"] = bank, constants, tiles
    for f in (1, 256) if edges else (256,):
        ones = dict(f=1, words=1, n=1, codes=1, rows=1, last=1, first=1) if f == 1 else {}
        for name, tiles in [("_row_sums", dictionary.ONE_VIEW), ("_code_means", dictionary.ONE_VIEW),
                            ("_times_signs", dictionary.SUM)]:
            table[f"{name}, f = {f}"] = dictionary, {**tiles, **ones}, tiles
        for name in ("_row_terms", "_slopes"):
            for reverse in (True, False):
                tiles = dictionary.TWO_VIEWS
                key = f"{name}, f = {f}, {'reverse' if reverse else 'forward'}"
                table[key] = dictionary, {**tiles, **ones, "REVERSE": reverse}, tiles
    return table


def argument_type(kernel, name, dtype):
    if name in PARTS.get(kernel, []):
        return "*bf16"
    if name in INPUTS:
        return "*" + dtype
    if name in INDICES:
        return "*i64"
    if name in FLOATS:
        return "*fp32"
    return "fp32" if name == "log_c" else "i32"


def compile(name, module, constants, launch, target, dtype):
    kernel = getattr(module, name.split(",")[0])
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    if "PRECISION" in constants:
        constants["PRECISION"] = "ieee" if target.backend == "hip" else "tf32x3"  # as the modules choose
    signature, hints = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        else:
            signature[argument] = argument_type(name.split(",")[0], argument, dtype)
            hints[i,] = [["tt.divisibility", 16]]      # else loads are narrow
    places = {(kernel.arg_names.index(k),): v for k, v in constants.items()}
    source = ASTSource(kernel, signature, places, hints)
    options = {k: launch[k] for k in ("num_warps", "num_stages") if k in launch}
    return triton.compile(source, target=target, options=options)


def loop_of(code, matrix):
    """(instructions, matrix instructions) of the loop with most matrix instructions."""
    labels, instructions = {}, []
    for line in code.splitlines():
        label = re.match(r"\s*([.\w]+):\s*(;.*)?$", line)
        if label:
            labels[label[1]] = len(instructions)
        elif line.rstrip().endswith(";") or re.match(r"\s+[a-z]+_\w+", line):        # NVIDIA's, AMD's
            instructions.append(line)
    best = 0, 0
    for end, line in enumerate(instructions):
        jump = re.search(r"BRA\S*\s+(?:\S+,\s*)?(\w+);|s_c?branch\w*\s+([.\w]+)", line)
        start = labels.get(jump[1] or jump[2], end + 1) if jump else end + 1
        if start <= end:
            body = instructions[start:end + 1]
            count = sum(bool(re.search(matrix, x)) for x in body)
            if count > best[1]:
                best = len(body), count
    return best


def describe(built, target_name, launch):
    row = dict(shared=built.metadata.shared)
    if target_name == "gfx942":
        text = built.asm["amdgcn"]
        row["spilled"] = sum(map(int, re.findall(r"vgpr_spill_count: *(\d+)", text)))
        row["registers"] = max(map(int, re.findall(r"\.vgpr_count: *(\d+)", text)))
        waves = 4 * min(8, AMD_REGISTERS // row["registers"])          # in flight on four units
        by_shared = SHARED[target_name] // max(1, row["shared"])
        row["programs"] = min(waves // built.metadata.num_warps, by_shared)
        row["matrix"] = sorted(set(re.findall(r"v_mfma_\w+", text)))
        row["loop"], row["loop_matrix"] = loop_of(text, "v_mfma_")
        return row
    tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [tool, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    threads = 32 * built.metadata.num_warps
    row["registers"] = max(map(int, re.findall(r"REG:(\d+)", usage)))
    row["spilled"] = sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage)))
    by_registers = REGISTERS // (threads * row["registers"])
    by_shared = SHARED[target_name] // max(1, row["shared"] + 1024)
    row["programs"] = min(by_registers, by_shared, 2048 // threads)
    sass = built.asm["sass"]
    row["matrix"] = sorted(set(re.findall(r"H(?:G)?MMA[.\w]*|UTC\w*MMA[.\w]*", sass)))
    row["loop"], row["loop_matrix"] = loop_of(sass, r"HG?MMA|UTC\w*MMA")
    return row


def main():
    target_name = sys.argv[1]
    only = sys.argv[2] if len(sys.argv) > 2 else ""
    target = TARGETS[target_name]
    rows = []
    for name, (module, constants, launch) in kernels(target_name).items():
        arguments = getattr(module, name.split(",")[0]).arg_names
        for dtype in ("fp32", "bf16"):
            if only not in name or (dtype == "bf16" and not INPUTS & set(arguments)):
                continue                               # its inputs are fp32 whatever the caller's are
            built = compile(name, module, constants, launch, target, dtype)
            rows.append(dict(kernel=name, dtype=dtype, **describe(built, target_name, launch)))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
