"""Kernels become GPU code without a GPU: tensor cores used, shared memory within the chip's, no spills.

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

HERE = Path(__file__).parent
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "gfx942": 65536}      # bytes a block may have
PRODUCTS = ("_product", "_gradient", "_slab", "_bank_rows", "_row_sums", "_code_means", "_row_terms",
            "_slopes", "_times_signs")
INSTRUCTION = {"sm_80": "HMMA", "sm_90": "HGMMA", "gfx942": "v_mfma_f32"}


def compile(target):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, HERE / "compile_kernels.py", target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compiled():
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(SHARED_LIMIT, pool.map(compile, SHARED_LIMIT)))


@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_fits_the_chip_without_spills(compiled, target):
    assert len(compiled[target]) > 40
    for row in compiled[target]:
        assert row["spilled"] == 0, row
        assert row["shared"] <= SHARED_LIMIT[target], row


@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_products_run_on_tensor_cores(compiled, target):
    rows = [row for row in compiled[target] if row["kernel"].startswith(PRODUCTS)]
    assert len(rows) > 35
    for row in rows:
        assert any(name.startswith(INSTRUCTION[target]) for name in row["matrix"]), row


def test_two_programs_of_the_bank_share_a_processor(compiled):
    """And its loop has no more matrix instructions than three tf32 products of both tiles need."""
    rows = [row for row in compiled["sm_90"] if row["kernel"].startswith(("_slab", "_bank_rows"))]
    for row in rows:
        assert row["programs"] >= 2, row
        assert row["loop_matrix"] <= 24, row


def test_dictionary_products_are_in_bf16_only(compiled):
    """Three bf16 products of exact parts, instead of one in tf32x3: no other matrix instruction on Hopper."""
    names = "_row_sums", "_code_means", "_row_terms", "_slopes", "_times_signs"
    rows = [row for row in compiled["sm_90"] if row["kernel"].startswith(names)]
    assert len(rows) == 14
    for row in rows:
        assert all(name.endswith("BF16") for name in row["matrix"]), row
