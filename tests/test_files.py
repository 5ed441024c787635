"""kernels/harness/files.py: files that are whole or not there, checkpoints whose every bit counts, one run in a folder; and
what a run makes of a full disk, a folder that goes away, another run in its own.
"""
import resource
import shutil

import numpy as np
import pytest
import torch

from kernels.harness import cli, probes
from kernels.harness.files import atomic_write, load_checkpoint, lock_folder
from kernels.harness.views import posed_view
from scripts import SMALL, call, said


# ---- Files and folders -------------------------------------------------------------------------------------
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "last.pt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"half of the n")
        1 / 0
    assert path.read_text() == "old"
    with atomic_write(path) as file:                                   # what the failure left is no obstacle
        file.write(b"new")
    assert path.read_text() == "new"
    assert [*tmp_path.iterdir()] == [path]


def test_nothing_is_left_where_a_folder_is_in_the_way(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError), atomic_write(tmp_path / "a") as file:
        file.write(b"x")
    assert [*tmp_path.iterdir()] == [tmp_path / "a"]


def test_a_link_put_in_the_way_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "last.pt.part").symlink_to(victim)
    (tmp_path / "last.pt").symlink_to(victim)
    with atomic_write(tmp_path / "last.pt") as file:
        file.write(b"new")
    assert victim.read_text() == "mine"
    assert (tmp_path / "last.pt").read_text() == "new"


def test_a_folder_is_held_once(tmp_path):
    lock_folder(tmp_path)
    with pytest.raises(BlockingIOError):
        lock_folder(tmp_path)


def test_a_checkpoint_with_one_bit_changed_is_refused_or_holds_the_same(tmp_path):
    """Where a bit means nothing, as in the padding between parts, nothing is lost."""
    path = tmp_path / "last.pt"
    weights = torch.arange(5000.)
    torch.save({"weights": weights, "history": [{"loss": 0.5}]}, path)
    whole = path.read_bytes()
    assert torch.equal(load_checkpoint(path)["weights"], weights)
    refused = 0
    for place in np.random.default_rng(0).integers(0, len(whole), 200):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1:])
        try:
            state = load_checkpoint(path)
        except Exception:                                                # as those who call load() take it
            refused += 1
            continue
        assert torch.equal(state["weights"], weights)
        assert state["history"] == [{"loss": 0.5}]
    assert refused >= 180


# ---- Runs --------------------------------------------------------------------------------------------------
def test_two_runs_in_one_folder_or_two_resumes_of_one(finished, capsys):
    lock_folder(finished / "run")                                    # as a run does that is still at work
    before = (finished / "run" / "last.pt").read_bytes()
    said(capsys, call(finished, "--resume", "run"), "another run is at work in run")
    said(capsys, call(finished, *SMALL.split(), "--out", "run"), "another run is at work in run")
    assert (finished / "run" / "last.pt").read_bytes() == before


def test_where_nothing_can_be_written_the_run_ends_before_it_trains(finished, capsys):
    """A file system that lets nobody write, root included."""
    said(capsys, call(finished, *SMALL.split(), "--out", "/proc/run"), "cannot write into /proc/run")


def test_a_full_disk_ends_in_one_line_and_the_last_checkpoint_stands(finished, capsys, monkeypatch):
    before = (finished / "run" / "last.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))   # no file may grow beyond
    try:
        again = call(finished, "--resume", "run")
        anew = call(finished, *SMALL.split(), "--out", "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vicreg.py: ")]
    assert (again, anew, len(lines)) == (2, 2, 2)
    assert all("cannot read or write" in line and "then go on with --resume" in line for line in lines)
    assert (finished / "run" / "last.pt").read_bytes() == before
    monkeypatch.setattr(cli, "lock_folder", lambda folder: None)     # this process has it still
    assert call(finished, *SMALL.split(), "--out", "new") == 0    # what the failure left does not block it


def test_a_folder_that_is_removed_ends_the_run_in_one_line(finished, capsys, monkeypatch):
    def view(x, generator):
        shutil.rmtree(finished / "new", ignore_errors=True)
        return posed_view(x, generator)
    monkeypatch.setattr(cli, "view_for", lambda *_: view)
    monkeypatch.setattr(probes, "plot_views", lambda *_: None)       # draws views before there is a checkpoint
    said(capsys, call(finished, *SMALL.split(), "--out", "new"), "No such file or directory")
