"""kernels/harness/cli.py: types of options, --help, what is refused before a run begins or is resumed: in one line, with
exit code 2, and nothing is written.
"""
import argparse
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.harness import cli
from kernels.harness.images import Data, digest
from scripts import ALL, ONE, ROOT, SMALL, Run, call, command, said, saved


# ---- Options -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text, low, high", [("0", 1, math.inf), ("1", 0, 1), ("nan", 0, math.inf), ("-1", 0, 9)])
def test_bounds_refuse_what_lies_outside(text, low, high):
    with pytest.raises(argparse.ArgumentTypeError, match=rf"{text} does not lie in \[{low}, {high}\)"):
        cli.bounded(float, low, high)(text)


def test_layer_sizes():
    assert cli.layer_sizes("512-64") == [512, 64]
    with pytest.raises(argparse.ArgumentTypeError):
        cli.layer_sizes("512-0")
    with pytest.raises(ValueError):
        cli.layer_sizes("wide")


@command("--help", scripts=ALL)
def test_help_explains_every_option_with_its_default(run):
    assert run.returncode == 0
    for option in "data batch epochs lr seed device width projector out resume compile amp".split():
        assert re.search(rf"^ +--{option}\b", run.stdout, re.M), option
    for option in ("batch", "epochs", "lr"):
        assert re.search(rf"--{option} [^-]*\(default:\s+[\d.]+\)", run.stdout), option
    assert run.stdout.count("(default:") >= 12


@command("--loss vicreg --help; --recipe released --help", scripts=["ba_ssl.py", "falcon.py"])
def test_help_has_the_defaults_that_another_option_sets(run):
    loss, recipe = [" ".join(done.stdout.split()) for done in run.done]
    if run.script == "ba_ssl.py":
        assert "projector PROJECTOR sizes of its layers; icone: none (default: [512, 512])" in loss
    else:
        assert "size of the dictionary (default: 16384)" in recipe


@command(f"{SMALL} --batch 1", scripts=["vicreg.py", "falcon.py", "ba_ssl.py"])
def test_the_others_refuse_one_image_at_a_time(run):
    assert run.returncode == 2
    assert run.stderr == f"{run.script}: argument --batch: 1 does not lie in [2, inf)\n"


# ---- Bad input: one line, exit code 2, nothing written ------------------------------------------------------
def truncated(folder):
    path = folder / "small.npz"
    path.write_bytes(path.read_bytes()[:3000])


def run_folder(checkpoint=None):
    """What makes a folder `half` with a configuration and these bytes as its checkpoint."""
    def make(folder):
        (folder / "half").mkdir()
        (folder / "half" / "config.json").write_text("{}")
        if checkpoint:
            (folder / "half" / "last.pt").write_bytes(checkpoint)
    return make


def foreign_checkpoint(folder):
    (folder / "half").mkdir()
    torch.save({"config": Path("anything")}, folder / "half" / "last.pt")            # torch explains in many lines


def test_the_mark_of_a_set_is_of_its_test_images_and_labels_too():
    x, y = torch.rand(20, 1, 4, 4), torch.arange(20) % 2
    data = Data(x, y, x[:8], y[:8], ("a", "b"))
    marks = {digest(data), digest(data._replace(test_images=x[1:9])), digest(data._replace(test_labels=1 - y[:8])),
             digest(data._replace(labels=1 - y)), digest(data._replace(classes=("a", "c"))), digest(data._replace(images=x[1:])),
             digest(data._replace(test_images=x[:7])), digest(data._replace(labels=None, test_labels=None, classes=()))}
    assert len(marks) == 8 and digest(Data(x.clone(), y, x[:8].clone(), y[:8], ("a", "b"))) in marks


def used_folder(folder):
    (folder / "used").mkdir()
    (folder / "used" / "precious").write_text("data")


def one_nan():
    x = np.full((40, 12, 12), 0.5, np.float32)
    x[7, 3, 3] = np.nan
    return x


BLACK = np.zeros((40, 12, 12), np.uint8)
BAD = [  # arguments, scripts, what makes the data, words the message must have
    ("--data nowhere.npz", ALL, None, "nowhere.npz.*check the path"),
    (SMALL, ONE, truncated, "small.npz cannot be read"),
    (f"{SMALL} --bank {10**20}", ["icone.py"], None, "does not lie in .3, 2147483648"),
    (f"--data {ROOT}/README.md", ONE, None, "README.md cannot be read"),
    (SMALL, ONE, saved(images=BLACK), "no train_images.*test_images"),
    (SMALL, ONE, saved(train_images=one_nan()), "train_images holds NaN"),
    (SMALL, ONE, saved(train_images=np.full((40, 12, 12), 300.)), r"small.npz: all numbers .* are 300"),
    (SMALL, ONE, saved(train_images=np.full((40, 12, 12), 300, np.int64)), r"small.npz: all numbers .* are 300"),
    (SMALL, ONE, saved(train_images=np.zeros((40, 12, 12), complex)), "complex128.*not numbers"),
    (f"{SMALL} --range 5", ONE, None, "--range 5: give two numbers"),
    (f"{SMALL} --range 9 5", ONE, None, "--range 9 5: the first number must be less"),
    (SMALL, ONE, saved(train_images=np.zeros((40, 3, 12, 12), np.uint8)), r"\[40, 3, 12, 12\], not"),
    (SMALL, ONE, saved(train_images=np.zeros((40, 144), np.uint8)), r"uint8 \[40, 144\]"),
    (SMALL, ONE, saved(train_images=BLACK, test_images=BLACK[:, :9, :9]), r"\[1, 12, 12\].*\[1, 9, 9\]"),
    (f"{SMALL} --batch 41", ["vicreg.py", "ba_ssl.py"], None, "40 training.*--batch 41"),
    ("--data digits3d --amp bf16 --device cpu", ONE, None, "GPU"),
    (f"{SMALL} --out small.npz/run", ONE, None, "cannot write into small.npz/run"),
    (f"{SMALL} --out used", ONE, used_folder, "used is not empty.*--resume used"),
    ("--resume nowhere", ONE, None, "cannot resume nowhere"),
    ("--resume half", ONE, run_folder(), "cannot resume half.*start a new run"),
    ("--resume half", ONE, run_folder(b"PK\x03\x04 and then nothing"), "cannot resume half.*start a new run"),
    ("--resume half", ONE, foreign_checkpoint, "cannot resume half.*start a new run"),
    ("--resume half --lr 9", ONE, run_folder(), "--resume takes no other option but --epochs"),
    ("--resume=", ONE, None, "--resume: it is empty"),
    (f"{SMALL} --out=", ONE, None, "--out: it is empty"),
    (f"{SMALL} --seed {2 ** 64}", ONE, None, "--seed"),
    (f"{SMALL} --device meta", ONE, None, "--device meta.*try --device cpu"),
    (f"{SMALL} --device cuda:99", ONE, None, "--device cuda:99.*try --device cpu"),
    (f"{SMALL} --device abacus", ONE, None, "--device abacus"),
    ("--epoch 9", ONE, None, "--epoch"),
    ("--lr -1", ONE, None, r"--lr: -1 does not lie in \[0, inf\)"),
    ("--projector 512-0", ALL, None, "--projector"),
    ("--temperature 0", ALL, None, "--temperature"),
    (f"{SMALL} --eps 0.01 --codes 101", ["falcon.py"], None, "--eps 0.01 must be below"),
    (f"{SMALL} --eps 0.5 --codes 2", ["falcon.py"], None, "--eps 0.5 must be below"),
    (f"{SMALL} --beta-rise 1.05", ["falcon.py"], None, "1.05 does not lie in"),
    (f"{SMALL} --codes 1", ["falcon.py"], None, "--codes"),
    (f"{SMALL} --no-fusion --share .5", ["ba_ssl.py"], None, "--no-fusion has no --share: leave out either"),
    (f"{SMALL} --loss vicreg --temperature 1", ["ba_ssl.py"], None, "--loss vicreg has no --temperature: leave out either"),
    (f"{SMALL} --mixing mixup --layers 3", ["ba_ssl.py"], None, "--mixing mixup has no --layers: leave out either"),
    (f"{SMALL} --mixing mixup --batch 2", ["ba_ssl.py"], None, "--batch 2 leaves each process too few to mix"),
    (f"{SMALL} --diversity relu2 --temperature 1", ["icone.py"], None, "--temperature is of --diversity logsumexp"),
    (f"{SMALL} --projector 64-1", ["icone.py"], None, r"--projector: .*1 does not lie in \[2, |--projector: invalid"),
    (f"{SMALL} --width 2", ONE, None, r"--width: 2 does not lie in \[3, "),
    (f"{SMALL} --batch 2 --patch 1", ["ba_ssl.py"], None, "--batch 2 leaves each process too few to mix"),
    (f"{SMALL} --patch 5", ["ba_ssl.py"], None, r"--patch 5 .*canvas \[12, 12\]"),
    (f"{SMALL} --projector none", ["ba_ssl.py"], None, "--projector none.*give simclr")]


@pytest.mark.parametrize("run, message", [
    pytest.param(Run(script, arguments, prepare), message, id=f"{script}-{message}")
    for arguments, scripts, prepare, message in BAD for script in scripts], indirect=["run"])
def test_bad_input_gets_one_line_and_exit_code_2(run, message):
    assert run.returncode == 2, run.stderr
    line, = run.stderr.splitlines()
    assert line.startswith(f"{run.script}: ")
    assert re.search(message, line), line
    assert run.after == run.before                                       # nothing written, nothing overwritten


# ---- Resume ------------------------------------------------------------------------------------------------
def test_changed_data_are_not_trained_on(finished, capsys):
    arrays = dict(np.load(finished / "small.npz"))
    arrays["train_images"][3] += 1
    np.savez(finished / "small.npz", **arrays)
    said(capsys, call(finished, "--resume", "run"), "holds other images or labels")


def test_another_scripts_run_is_not_resumed(finished, capsys):
    before = (finished / "run" / "last.pt").read_bytes()
    assert call(finished, "--resume", "run", script="icone.py") == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("icone.py: cannot resume run") and "start a new run" in line
    assert (finished / "run" / "last.pt").read_bytes() == before


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
def test_a_checkpoint_that_does_not_fit_is_refused(change, finished, capsys):
    path = finished / "run" / "last.pt"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    before = path.read_bytes()
    said(capsys, call(finished, "--resume", "run"), "")
    assert path.read_bytes() == before
