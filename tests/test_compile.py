"""Kernels become GPU code without a GPU: tensor cores used, short loops, shared memory within the chip's, no spills.

The compiler runs in processes of its own, since this one has Triton's interpreter on: see compile_kernels.py.
"""
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")
EDGES = "sm_100"                                       # the target of those variants that are compiled once only

HERE = Path(__file__).parent
SHARED_LIMIT = {                                       # bytes a program may have
    "sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024,
}
PRODUCTS = ("_product", "_gradient", "_slab", "_bank_rows", "_row_sums", "_code_means", "_row_terms",
            "_slopes", "_times_signs")
# A target takes half a minute: one by default, all with -m slow.
OTHERS = "gfx942", "sm_80", "sm_86", "sm_100"
TARGETS = ["sm_90", *(pytest.param(chip, marks=pytest.mark.slow) for chip in OTHERS)]
INSTRUCTION = {"sm_80": "HMMA", "sm_86": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC", "gfx942": "v_mfma_f32"}

# Of each kernel at ordinary sizes: matrix instructions in its loop at the most, programs on a processor at the least.
AMPERE_LOOP = {"_product": 96, "_gradient": 96, "_slab": 144, "_bank_rows": 144, "_row_sums": 96, "_code_means": 96,
               "_times_signs": 96, "_row_terms": 192, "_slopes": 192}
LOOP = {
    "sm_80": AMPERE_LOOP,
    "sm_86": AMPERE_LOOP,
    "sm_90": {"_product": 12, "_gradient": 12, "_slab": 24, "_bank_rows": 24, "_row_sums": 12, "_code_means": 12,
              "_times_signs": 12, "_row_terms": 40, "_slopes": 40},
    "sm_100": {"_product": 12, "_gradient": 12, "_slab": 24, "_bank_rows": 24, "_row_sums": 24, "_code_means": 24,
               "_times_signs": 12, "_row_terms": 48, "_slopes": 24},
    "gfx942": {"_product": 16, "_gradient": 16, "_slab": 64, "_bank_rows": 64, "_row_sums": 48, "_code_means": 48,
               "_times_signs": 24, "_row_terms": 96, "_slopes": 48},
}
SPILLED = {("sm_86", "_row_terms"): 16}                # bytes: sums outside of the tensor cores take registers
PROGRAMS = {
    "sm_80": {"_product": 2, "_gradient": 2, "_column_stats": 4, "_fold": 4},
    "sm_86": {"_gradient": 2, "_column_stats": 4, "_fold": 4},
    "sm_90": {"_product": 3, "_gradient": 3, "_column_stats": 4, "_fold": 4, "_slab": 2, "_bank_rows": 2,
              "_times_signs": 2},
    "sm_100": {"_product": 2, "_gradient": 4, "_column_stats": 4, "_fold": 4, "_slab": 2, "_bank_rows": 2,
               "_times_signs": 2, "_slopes": 2},
    "gfx942": {"_product": 3, "_gradient": 2, "_column_stats": 4, "_fold": 4},
}


def compile(target):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, HERE / "compile_kernels.py", target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compiled(request):
    """What came of each target that a chosen test asks for."""
    slow = "slow" in request.config.option.markexpr
    chosen = [*SHARED_LIMIT] if slow else ["sm_90"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(chosen, pool.map(compile, chosen)))


@pytest.mark.parametrize("target", TARGETS)
def test_fits_the_chip_without_spills(compiled, target):
    assert len(compiled[target]) == (45 if target == EDGES else 27)
    for row in compiled[target]:
        assert row["spilled"] <= SPILLED.get((target, row["kernel"].split(",")[0]), 0), row
        assert row["shared"] <= SHARED_LIMIT[target], row


@pytest.mark.parametrize("target", TARGETS)
def test_products_run_on_tensor_cores(compiled, target):
    rows = [row for row in compiled[target] if row["kernel"].startswith(PRODUCTS)]
    assert len(rows) == (38 if target == EDGES else 23)
    for row in rows:
        assert any(name.startswith(INSTRUCTION[target]) for name in row["matrix"]), row


@pytest.mark.parametrize("target", TARGETS)
def test_loops_and_programs(compiled, target):
    """No matrix instruction more than the tiles need, registers and shared memory for several programs at once."""
    for row in compiled[target]:
        name = row["kernel"].split(",")[0]
        assert row["programs"] >= 1, row
        if "= 1" in row["kernel"]:                    # little is left of a loop there
            continue
        if name in LOOP[target]:
            assert 0 < row["loop_matrix"] <= LOOP[target][name], row
        if (target, row["kernel"]) != ("sm_100", "_slopes, f = 256, forward"):       # its 140 registers leave room for one
            assert row["programs"] >= PROGRAMS[target].get(name, 1), row


def test_dictionary_products_are_in_bf16_only(compiled):
    """Three bf16 products of exact parts, instead of one in tf32x3: no other matrix instruction on Hopper."""
    names = "_row_sums", "_code_means", "_row_terms", "_slopes", "_times_signs"
    rows = [row for row in compiled["sm_90"] if row["kernel"].startswith(names)]
    assert len(rows) == 7
    for row in rows:
        assert all(name.endswith("BF16") for name in row["matrix"]), row
