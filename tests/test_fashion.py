"""tests/experiments/fashion.py: what is chosen is chosen on training images alone."""
import argparse
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "experiments"))
import fashion
from kernels.harness.images import Data


def numbered(train=200, test=50):
    """Images each of one gray value of its own, those for testing above 200."""
    def images(first, count):
        values = torch.arange(first, first + count, dtype=torch.uint8)
        return values.view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous(), torch.arange(count) % 10
    return Data(*images(0, train), *images(200, test))


def test_views_are_chosen_on_a_part_held_out_from_training(tmp_path):
    fashion.subset(numbered(), tmp_path / "choice.npz", 120, 40, held_out=True)
    with np.load(tmp_path / "choice.npz") as found:
        known, asked = (set(found[f"{split}_images"][:, 0, 0].tolist()) for split in ("train", "test"))
        assert len(known) == 120 and len(asked) == 40
        assert max(known | asked) < 200 and not known & asked              # no image for testing, none twice
        assert np.array_equal(found["test_labels"], found["test_images"][:, 0, 0] % 10)


def test_a_subset_is_tested_on_the_images_for_testing(tmp_path):
    fashion.subset(numbered(), tmp_path / "fashion.npz", 120, 40)
    with np.load(tmp_path / "fashion.npz") as found:
        assert found["train_images"].max() < 200 <= found["test_images"].min()


@pytest.mark.parametrize("part", ["views", "peers", "icone"])
def test_runs_that_choose_see_nothing_else(part, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion, "subset", lambda data, file, train, test, held_out=False: f"held out: {held_out}")
    seen = []
    monkeypatch.setattr(fashion, "make", lambda jobs, numbers, args: seen.extend(jobs.values()) or {})
    getattr(fashion, part)(argparse.Namespace(out=tmp_path, seeds=1, draw=None), None)
    assert seen and all("held out: True" in options for _, _, options in seen)
