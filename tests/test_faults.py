"""What goes wrong outside: signals, full disks, two runs in one folder, damaged and changed files."""
import argparse
import os
import random
import resource
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ba_ssl
import falcon
import icone
import vicreg
from kernels.harness import cli, probes, processes, run
from kernels.harness.files import atomic_write, load_checkpoint, lock_folder
from kernels.harness.images import Data
from kernels.harness.run import Run
from kernels.harness.views import posed_view

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small networks gain nothing by a second one, and beside other work it costs tenfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


# ---- Signals -----------------------------------------------------------------------------------------------
def small_data(view=posed_view):
    x = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(24) % 3
    return Data(x, y, x[:9], y[:9], view=view)


SCRIPTS = {"vicreg": vicreg, "icone": icone, "falcon": falcon, "ba_ssl": ba_ssl}


def model_and_optimizer(name):
    torch.manual_seed(0)
    encoder = vicreg.Encoder(1, 2, width=4)
    if name == "vicreg":
        model = vicreg.VICReg(encoder, 32, projector=(16, 16))
    elif name == "icone":
        model = icone.IConE(encoder, 32, 24, bank=12)                # a random bank: torch's own generator
        model.start_table(small_data().images)
    elif name == "falcon":
        model = falcon.FALCON(encoder, 32, falcon.FixedDictionary(64, 16), 8, projector=(16,))
    else:
        model = ba_ssl.BASSL(encoder, 32, ba_ssl.BatchFusion(8), projector=(16, 16))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    return model, optimizer


def trained(name, folder, view=posed_view, state=None):
    """A run of 4 epochs of 3 steps of 2 batches of 4: its history and weights."""
    folder.mkdir(exist_ok=True)
    size, accumulate = (8, 1) if name in ("falcon", "ba_ssl") else (4, 2)
    args = argparse.Namespace(batch=size, accumulate=accumulate, epochs=4, seed=0, device="cpu", amp="off",
                              compile=False, save_minutes=10., beta=1., beta_rise=1.)
    model, optimizer = model_and_optimizer(name)
    data = small_data(view)
    run = Run(args, data, folder, state)
    meters = [lambda model: {}] if name == "ba_ssl" else []
    SCRIPTS[name].train(model, optimizer, data, run, *meters)
    return run.history, model.state_dict()


@pytest.mark.parametrize("name", ["vicreg", "icone", "falcon", "ba_ssl"])
def test_a_signal_inside_an_epoch_saves_the_step_and_the_run_goes_on_to_the_bit(name, tmp_path, capsys):
    history, weights = trained(name, tmp_path / "whole")
    for attempt in range(5):
        folder = tmp_path / f"run{attempt}"
        rng = random.Random(attempt)
        left = rng.randrange(1, 24)
        if attempt == 0:                                             # the last of all views
            left = 48 if name in ("vicreg", "icone") else 24
        number = rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP])

        def view(x, generator):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), number)
            return posed_view(x, generator)

        with pytest.raises(SystemExit) as end:
            trained(name, folder, view)
        assert end.value.code == 128 + number
        line, = [line for line in capsys.readouterr().err.splitlines() if "--resume" in line]
        assert f"ended by {number.name}" in line and str(folder) in line
        state = load_checkpoint(folder / "last.pt")
        again, weights_again = trained(name, folder, state=state)
        assert again == history
        assert all(torch.equal(weights[key], weights_again[key]) for key in weights)


def test_a_checkpoint_within_an_epoch_is_no_older_than_save_minutes(tmp_path, monkeypatch):
    now = iter(range(0, 10**6, 400))                                 # each look at the clock is 400 s later
    monkeypatch.setattr(run.time, "monotonic", lambda: next(now))
    saves = []
    monkeypatch.setattr(run.torch, "save", lambda state, file: saves.append(state["done"]))
    trained("vicreg", tmp_path)
    within = [step for step in saves if step]
    assert len(saves) - len(within) == 5                             # the start, and after each of 4 epochs
    assert within == [2, 2, 2, 2]                                    # 800 s after each epoch's end, not 400


# ---- Whole runs --------------------------------------------------------------------------------------------
SMALL = ["--data", "small.npz", "--batch", "8", "--epochs", "1", "--width", "4", "--projector", "16-16"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with small.npz and a run of it, `run`."""
    folder = tmp_path_factory.mktemp("finished")
    x = np.random.default_rng(0).integers(0, 255, (24, 8, 8)).astype(np.uint8)
    y = np.arange(24) % 3
    np.savez(folder / "small.npz", train_images=x, train_labels=y, test_images=x[:9], test_labels=y[:9])
    assert call(folder, *SMALL, "--out", "run") == 0
    return folder


def call(folder, *arguments):
    """vicreg.py in this process -> its exit code; a traceback is an error of the test."""
    before = os.getcwd(), sys.argv, torch.get_rng_state()
    handlers = [signal.getsignal(number) for number in processes.SIGNALS]
    os.chdir(folder)
    sys.argv = ["vicreg.py", *map(str, arguments)]
    try:
        processes.launch(vicreg.main)
        return 0
    except SystemExit as end:
        return end.code
    finally:
        os.chdir(before[0])
        sys.argv = before[1]
        torch.set_rng_state(before[2])
        for number, handler in zip(processes.SIGNALS, handlers):
            signal.signal(number, handler)


def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def said(capsys, code, found):
    """It ended with exit code 2 and a line that holds this."""
    assert code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("vicreg.py: ") and found in line, line


def test_two_runs_in_one_folder_or_two_resumes_of_one(finished, tmp_path, capsys):
    folder = copied(finished, tmp_path)
    lock_folder(folder / "run")                                      # as a run does that is still at work
    before = (folder / "run" / "last.pt").read_bytes()
    said(capsys, call(folder, "--resume", "run"), "another run is at work in run")
    said(capsys, call(folder, *SMALL, "--out", "run"), "another run is at work in run")
    assert (folder / "run" / "last.pt").read_bytes() == before


def test_where_nothing_can_be_written_the_run_ends_before_it_trains(finished, tmp_path, capsys):
    """A file system that lets nobody write, root included."""
    folder = copied(finished, tmp_path)
    said(capsys, call(folder, *SMALL, "--out", "/proc/run"), "cannot write into /proc/run")


def test_a_full_disk_ends_in_one_line_and_the_last_checkpoint_stands(finished, tmp_path, capsys, monkeypatch):
    folder = copied(finished, tmp_path)
    before = (folder / "run" / "last.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))   # no file may grow beyond
    try:
        again = call(folder, "--resume", "run")
        anew = call(folder, *SMALL, "--out", "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vicreg.py: ")]
    assert (again, anew, len(lines)) == (2, 2, 2)
    assert all("cannot read or write" in line and "then go on with --resume" in line for line in lines)
    assert (folder / "run" / "last.pt").read_bytes() == before
    monkeypatch.setattr(cli, "lock_folder", lambda folder: None)           # this process has it still
    assert call(folder, *SMALL, "--out", "new") == 0                 # what the failure left does not block it


def test_a_folder_that_is_removed_ends_the_run_in_one_line(finished, tmp_path, capsys, monkeypatch):
    folder = copied(finished, tmp_path)

    def view(x, generator):
        shutil.rmtree(folder / "new", ignore_errors=True)
        return posed_view(x, generator)
    monkeypatch.setattr(cli, "posed_view", view)
    monkeypatch.setattr(probes, "plot_views", lambda *_: None)       # draws views before there is a checkpoint
    said(capsys, call(folder, *SMALL, "--out", "new"), "No such file or directory")


def test_images_that_are_all_the_same_end_with_a_report(finished, tmp_path, capsys):
    """t-SNE of equal features ends the process where nobody looks."""
    folder = copied(finished, tmp_path)
    arrays = dict(np.load(folder / "small.npz"))
    for split in ("train_images", "test_images"):
        arrays[split] = arrays[split][:1].repeat(len(arrays[split]), 0)
    np.savez(folder / "small.npz", **arrays)
    assert call(folder, *SMALL, "--out", "same") == 0
    assert {"report.json", "features.npz", "embedding.png"} <= {file.name for file in (folder / "same").iterdir()}
    assert "COLLAPSED" in capsys.readouterr().out


def test_a_pipe_is_not_waited_for(finished, tmp_path, capsys):
    folder = copied(finished, tmp_path)
    os.mkfifo(folder / "pipe")
    said(capsys, call(folder, "--data", "pipe"), "neither a file nor a folder")
    (folder / "photos").mkdir()
    os.mkfifo(folder / "photos" / "a.png")
    said(capsys, call(folder, "--data", "photos"), "holds 0 files")


# ---- Checkpoints -------------------------------------------------------------------------------------------
def test_changed_data_are_not_trained_on(finished, tmp_path, capsys):
    folder = copied(finished, tmp_path)
    arrays = dict(np.load(folder / "small.npz"))
    arrays["train_images"][3] += 1
    np.savez(folder / "small.npz", **arrays)
    said(capsys, call(folder, "--resume", "run"), "holds other images")


CHANGES = {
    "a weight of another shape": lambda state: state["model"].update({"projector.0.weight": torch.zeros(3, 3)}),
    "a weight missing": lambda state: state["model"].popitem(),
    "no optimizer": lambda state: state.pop("optimizer"),
    "a shorter history": lambda state: state["history"].clear(),
    "no generators": lambda state: state.update(generators=None),
    "a batch below the least": lambda state: state["config"].update(batch=-3),
    "a width of text": lambda state: state["config"].update(width="wide"),
    "an option less": lambda state: state["config"].pop("epochs"),
    "another encoder": lambda state: state["config"].update(encoder={"channels": 1, "axes": 7}),
    "no config": lambda state: state.update(config=7)}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_checkpoint_that_does_not_fit_is_refused(change, finished, tmp_path, capsys):
    folder = copied(finished, tmp_path)
    path = folder / "run" / "last.pt"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    before = path.read_bytes()
    said(capsys, call(folder, "--resume", "run"), "")
    assert path.read_bytes() == before
