"""tests/experiments/fashion.py and few_images.py: what is chosen is chosen on training images alone, and how many are drawn."""
import argparse
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "experiments"))
import common
import fashion
import few_images
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


def test_a_run_that_was_made_by_another_command_is_made_anew(tmp_path, monkeypatch):
    calls = []

    def made(command, **_):
        calls.append(command)
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(f'{{"number": {len(calls)}}}')

    monkeypatch.setattr(common.subprocess, "run", made)
    folder = tmp_path / "SimCLR 0"
    other = ["--seed", "0", "--lr", "1"]
    numbers = [common.run(folder, "ba_ssl.py", options)["number"] for options in (["--seed", 0], ["--seed", "0"], other, other)]
    assert numbers == [1, 1, 2, 2]
    assert common.run(folder, "vicreg.py", ["--seed", "0", "--lr", "1"])["number"] == 3


@pytest.mark.parametrize("part", ["views", "peers", "icone"])
def test_runs_that_choose_see_nothing_else(part, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion, "subset", lambda data, file, train, test, held_out=False: f"held out: {held_out}")
    seen = []
    monkeypatch.setattr(fashion, "make", lambda jobs, numbers, args: seen.extend(jobs.values()) or {})
    getattr(fashion, part)(argparse.Namespace(out=tmp_path, seeds=1, draw=None), None)
    assert seen and all("held out: True" in options for _, _, options in seen)


@pytest.mark.parametrize("count", [500, 2000])
@pytest.mark.parametrize("ratio", [1, 10, 100])
def test_so_many_images_are_drawn_of_even_and_of_unequal_classes(count, ratio):
    labels = torch.arange(60_000) % 10
    rows = few_images.some(labels, count, ratio)
    of_class = labels[rows].bincount()
    assert abs(len(rows) - count) <= 5 and len(rows.unique()) == len(rows)      # each class is rounded
    assert not torch.equal(rows.sort().values, rows)                            # not the first ones
    if ratio > 1:
        wanted = count * ratio ** -(torch.arange(10) / 9) / (ratio ** -(torch.arange(10) / 9)).sum()
        assert (of_class - wanted).abs().max() <= 0.51


def test_every_run_of_few_images_sees_as_many(tmp_path, monkeypatch):
    jobs = {}
    monkeypatch.setattr(few_images, "make", lambda made, numbers, args: jobs.update(made) or {})
    monkeypatch.setattr(few_images, "read_data", lambda name: numbered(2000, 40))
    monkeypatch.setattr(sys, "argv", ["few_images.py", "--data", "x", "--counts", "100", "400", "--seen", "800",
                                      "--out", str(tmp_path), "--seeds", "1"])
    few_images.main()
    for (count, ratio, size, name, _), (_, script, options) in jobs.items():
        with np.load(options[options.index("--data") + 1]) as found:
            assert len(found["test_images"]) == 40
            seen = len(found["train_images"]) * int(options[options.index("--epochs") + 1])
        assert abs(seen - 800) <= count and options[options.index("--batch") + 1] == str(size)
        assert size > 1 or (name, script) == ("IConE", "icone.py")
    assert len(jobs) == 2 * 2 * (1 + 4 + 4 + 4)
