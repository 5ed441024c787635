"""The scripts as their users run them: processes in a folder of their own.

Each test says its command in the line above it; `run` is what came of it. All runs that the chosen tests need are
made before the first of them, as many at a time as there are cores.
"""
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import ba_ssl
import forked
import icone
from kernels.harness.files import load_checkpoint

ROOT = Path(__file__).parents[1]
ALL = ["vicreg.py", "icone.py", "falcon.py", "ba_ssl.py"]
ROOMS = ["vicreg.py"]                                    # stands for all where only rooms that all share are at work
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL = "--data small.npz --batch 8 --epochs 3 --width 4"


# ---- Data --------------------------------------------------------------------------------------------------
def images(split, n, *shape):
    """Noise, brighter by class, in three classes."""
    rng = np.random.default_rng(0)
    labels = np.arange(n)[:, None] % 3
    brightness = 60 * labels.reshape(n, *[1] * len(shape))
    x = rng.integers(0, 120, (n, *shape)) + brightness
    return {f"{split}_images": x.astype(np.uint8), f"{split}_labels": labels.astype(np.uint8)}


def arrays(*shape):
    """What makes small.npz: 40 training and 12 test images of this shape."""
    def make(folder):
        np.savez(folder / "small.npz", **images("train", 40, *shape), **images("test", 12, *shape))
    return make


def saved(**members):
    """What makes small.npz of these arrays."""
    def make(folder):
        np.savez(folder / "small.npz", **members)
    return make


# ---- Runs --------------------------------------------------------------------------------------------------
class Run:
    """A script's run on small.npz; once it is made: its folder, returncode, stdout, stderr, and files before and after."""

    def __init__(self, script, arguments, prepare, way):
        self.script, self.arguments, self.prepare, self.way = script, arguments.split(), prepare, way

    def make(self, folder):
        self.folder = folder
        arrays(12, 12)(folder)
        if self.prepare:
            self.prepare(folder)
        self.before = snapshot(folder)
        self.way(self)
        self.after = snapshot(folder)

    @property
    def out(self):
        """The run's own folder, after a run that ended well."""
        assert self.returncode == 0, self.stderr
        return self.folder / "runs" / f"{Path(self.script).stem}-1"

    def config(self):
        return json.loads((self.out / "config.json").read_text())

    def metrics(self):
        return [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]

    def checkpoint(self):
        return torch.load(self.out / "last.pt", weights_only=True)


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def keep(run, done):
    run.returncode, run.stdout, run.stderr = done.returncode, done.stdout, done.stderr


def once(run):
    keep(run, forked.run(ROOT / run.script, run.arguments, run.folder))


def process(run, *arguments, script=None):
    """The script in a process of its own, from the start."""
    command = [sys.executable, str(script or ROOT / run.script), *map(str, arguments)]
    return subprocess.run(command, cwd=run.folder, capture_output=True, text=True, timeout=300, env=ONE_THREAD)


def as_a_copy(run):
    """The script and kernels/, nothing else, in another folder."""
    shutil.copy(ROOT / run.script, run.folder)
    shutil.copytree(ROOT / "kernels", run.folder / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    keep(run, process(run, *run.arguments, script=run.script))


def start(run, *arguments):
    """A process, once its run folder `run` has its first metrics."""
    command = [sys.executable, str(ROOT / run.script), *run.arguments, *arguments, "--out", "run"]
    started = subprocess.Popen(  # a job in the background would inherit an ignored SIGINT
        command, cwd=run.folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=ONE_THREAD,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not (run.folder / "run" / "metrics.jsonl").exists():
        assert started.poll() is None, started.communicate()[1]
        time.sleep(0.01)
    return started


def killed_and_resumed(run):
    """A whole run in folder `whole`; one in `run` that went on after a SIGKILL at a random moment."""
    whole = process(run, *run.arguments, "--out", "whole")
    assert whole.returncode == 0, whole.stderr
    started = start(run)
    time.sleep(random.uniform(0, 1.5))
    started.kill()
    started.communicate()
    keep(run, process(run, "--resume", "run"))


def interrupted(run):
    """Ctrl-C after a second."""
    started = start(run)
    time.sleep(1)
    started.send_signal(signal.SIGINT)
    _, run.stderr = started.communicate(timeout=60)
    run.returncode = started.returncode


the_run = functools.cache(Run)                           # tests of the same command share what came of it


def command(arguments, scripts, prepare=None, way=once):
    """Gives a test its runs: these arguments with each of the scripts."""
    params = [pytest.param(the_run(script, arguments, prepare, way), id=script) for script in scripts]
    return pytest.mark.parametrize("run", params, indirect=True)


@pytest.fixture(scope="module")
def made(request, tmp_path_factory):
    """All runs of the chosen tests, the longest first."""
    return forked.make_all(request, tmp_path_factory, Run, key=lambda run: run.way is once)


@pytest.fixture
def run(request, made):
    made[request.param].result()                                         # raises what went wrong while it was made
    return request.param


# ---- Whole runs --------------------------------------------------------------------------------------------
@command("--epochs 1 --width 4", ALL)
def test_a_run_ends_with_tables_verdict_and_files(run):
    files = {"config.json", "curves.png", "embedding.png", "encoder.pt", "features.npz", "last.pt", "metrics.jsonl",
             "neighbours.png", "report.json", "views.png"}
    if run.script == "falcon.py":
        files |= {"meters.json", "meters.png"}
    assert {file.name for file in run.out.iterdir()} == files

    for row in ("raw pixels", "random encoder", "trained encoder"):
        cells = re.search(rf"^{row}((?: +\S+){{5}})$", run.stdout, re.M)[1].split()
        assert all(0.05 < float(accuracy) < 1 for accuracy in cells)         # k-NN, linear; 1, 5, 10 labels a class
    for row in ("untrained z", "encoder h", "projector z"):
        assert re.search(rf"^{row} +1440 ", run.stdout, re.M)
    for column in ("raw std", "std", "cosine", "RankMe", "participation", "uniformity", "TwoNN", "alignment", "view ratio"):
        assert column in run.stdout
    verdict = json.loads((run.out / "report.json").read_text())["verdict"]
    assert verdict in run.stdout
    assert re.match("No collapse|NOT SPREAD YET|DIMENSIONAL COLLAPSE|COLLAPSED", verdict)
    assert "step/s" in run.stderr                                        # the progress bar

    encoder = torch.load(run.out / "encoder.pt", weights_only=True)
    icone.Encoder(**encoder["config"]).load_state_dict(encoder["state_dict"])
    features = np.load(run.out / "features.npz")
    assert features["train_features"].shape == (1437, 32)
    assert features["test_labels"].shape == (1440,)


@command("--epochs 1 --width 4", ["vicreg.py"])
def test_vicreg_logs_its_terms_and_the_noise_floor(run):
    line, = run.metrics()
    assert line["loss"] == pytest.approx(line["invariance"] + line["variance"] + line["covariance"])
    assert line["covariance"] == pytest.approx(2 * line["c_per_view"])
    assert line["c_noise_floor"] == pytest.approx(511 / 127)


@command("--epochs 1 --width 4", ["falcon.py"])
def test_falcon_logs_its_terms_and_the_meters_of_four_collapses(run):
    line, = run.metrics()
    assert line["loss"] == pytest.approx(line["prior"] + line["cross_entropy"])
    meters = json.loads((run.out / "meters.json").read_text())
    assert set(line["meters"]) < set(meters)
    assert 0 < meters["NMI of a random assignment"] < meters["NMI"] < 1
    assert "AMI" in run.stdout
    assert "least loss: representation collapse, log c 8.32" in run.stdout
    assert line["beta"] == pytest.approx(23 / 44)                        # it rises from 1/22 to 1, mean of the epoch


@pytest.mark.slow
@command(f"{SMALL} --epochs 16", ["icone.py", "falcon.py", "ba_ssl.py"], way=killed_and_resumed)
def test_a_killed_run_of_the_others_resumes_to_the_bit(run):
    test_a_killed_run_resumes_to_the_bit(run)


@command(f"{SMALL} --epochs 16", ROOMS, way=killed_and_resumed)
def test_a_killed_run_resumes_to_the_bit(run):
    assert run.returncode == 0, run.stderr
    whole, resumed = run.folder / "whole", run.folder / "run"
    assert (whole / "metrics.jsonl").read_text() == (resumed / "metrics.jsonl").read_text()
    a, b = (torch.load(folder / "last.pt", weights_only=True) for folder in (whole, resumed))
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]), name
    for name in ("train_features", "test_features"):
        assert np.array_equal(np.load(whole / "features.npz")[name], np.load(resumed / "features.npz")[name])
    assert json.loads((whole / "report.json").read_text()) == json.loads((resumed / "report.json").read_text())


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


@command(f"{SMALL} --epochs 3000", ROOMS, way=interrupted)
def test_ctrl_c_ends_in_one_line_that_says_how_to_go_on(run):
    assert run.returncode == 130
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("vicreg.py: ended by SIGINT") and last.endswith("vicreg.py --resume run")
    state = torch.load(run.folder / "run" / "last.pt", weights_only=True)
    assert state["schedule"]["last_epoch"] > 0


@command(f"{SMALL} --lr 1e30", ROOMS)
def test_a_loss_that_is_not_finite_stops_the_run(run):
    assert run.returncode == 2
    assert re.search(r"vicreg.py: loss or weights are not finite after epoch \d: .*lower --lr", run.stderr)


@command(f"{SMALL} --amp bf16", ALL, arrays(12, 12, 3))
def test_colour_images_in_mixed_precision(run):
    assert run.out.exists()
    assert "trained encoder" in run.stdout


@command(SMALL, ALL, arrays(8, 12, 8))
def test_volumes(run):
    assert run.out.exists()
    assert "trained encoder" in run.stdout


@command(SMALL, ["vicreg.py", "falcon.py", "ba_ssl.py"], saved(train_images=images("train", 40, 12, 12)["train_images"]))
def test_images_without_labels_train_and_give_features(run):
    features = np.load(run.out / "features.npz")
    assert features["train_features"].shape == (32, 32)
    assert features["test_features"].shape == (8, 32)                    # a fifth is held out
    assert "note: small.npz has no labels of two classes" in run.stdout
    assert "RankMe" in run.stdout
    assert "k-NN" not in run.stdout
    assert "NMI" not in run.stdout


@command(f"{SMALL} --accumulate 2", ["vicreg.py", "falcon.py"], way=as_a_copy)
def test_a_copy_with_kernels_alone_runs_and_accumulated_batches_make_one_step(run):
    steps = {float(part["step"]) for part in run.checkpoint()["optimizer"]["state"].values()}
    assert steps == {6}                                                  # 40 images // 16 x 3 epochs


@pytest.mark.slow
@command(f"{SMALL} --accumulate 2", ["icone.py", "ba_ssl.py"], way=as_a_copy)
def test_a_copy_of_the_others_does_too(run):
    test_a_copy_with_kernels_alone_runs_and_accumulated_batches_make_one_step(run)
@command("--help", ALL)
def test_help_explains_every_option_with_its_default(run):
    assert run.returncode == 0
    for option in "data batch epochs lr seed device width projector out resume compile amp".split():
        assert re.search(rf"^ +--{option}\b", run.stdout, re.M), option
    for option in ("batch", "epochs", "lr"):
        assert re.search(rf"--{option} [^-]*\(default:\s+[\d.]+\)", run.stdout), option
    assert run.stdout.count("(default:") >= 12


@pytest.mark.slow
@command(f"{SMALL} --compile", ALL)
def test_a_compiled_model_trains_as_an_eager_one(run):
    compiled = run.metrics()
    assert len(compiled) == 3
    eager = process(run, *run.arguments[:-1], "--out", "eager")
    assert eager.returncode == 0, eager.stderr
    lines = (run.folder / "eager" / "metrics.jsonl").read_text().splitlines()
    for line, own in zip(map(json.loads, lines), compiled, strict=True):
        assert own["loss"] == pytest.approx(line["loss"], rel=1e-3)


# ---- IConE -------------------------------------------------------------------------------------------------
@command(f"{SMALL} --batch 1", ["icone.py"])
def test_icone_trains_on_one_image_at_a_time(run):
    last = run.metrics()[-1]
    assert last["loss"] == pytest.approx(last["alignment"] + last["diversity"])
    assert -1 <= last["cosine_to_all"] <= 1


@command(f"{SMALL} --batch 1", ["icone.py"], arrays(10, 10, 10))
def test_icone_trains_on_one_volume_at_a_time(run):
    assert len(run.metrics()) == 3


@command(f"{SMALL} --batch 1", ["vicreg.py", "falcon.py", "ba_ssl.py"])
def test_the_others_refuse_one_image_at_a_time(run):
    assert run.returncode == 2
    assert run.stderr == f"{run.script}: argument --batch: 1 does not lie in [2, inf)\n"


@command(f"{SMALL} --diversity relu2 --weight 2 --view-view 1 --centre 0 --table-init normal --projector 16-8",
         ["icone.py"])
def test_icone_has_the_third_partys_form_by_options(run):
    checkpoint = run.checkpoint()
    assert "view_view" in run.metrics()[0]
    assert checkpoint["model"]["table"].shape == (40, 8)                 # with the run
    assert not any("mean" in name for name in checkpoint["model"])       # no centre
    encoder = torch.load(run.out / "encoder.pt", weights_only=True)      # not with the encoder
    assert set(encoder["state_dict"]) == set(icone.Encoder(1, 2, width=4).state_dict())


# ---- FALCON ------------------------------------------------------------------------------------------------
@command(f"{SMALL} --recipe released --codes 64 --projector 16", ["falcon.py"])
def test_falcons_released_recipe_sets_what_is_not_given(run):
    expected = dict(norm="tanh", beta=1, beta_rise=0, temperature=1, weight_decay=1e-4, codes=64, projector=[16], batch=8)
    assert {name: run.config()[name] for name in expected} == expected


@command(f"{SMALL} --dictionary alternating", ["falcon.py"])
def test_falcons_alternating_dictionary_is_in_the_checkpoint_with_what_it_saw(run):
    assert {f"dictionary.{name}" for name in ("learned", "seen", "count")} < run.checkpoint()["model"].keys()


@command(f"{SMALL} --dictionary hybrid", ["falcon.py"])
def test_falcons_hybrid_dictionary_is_in_the_checkpoint(run):
    names = run.checkpoint()["model"].keys()
    assert "dictionary.learned" in names
    assert "dictionary.seen" not in names


@command(f"{SMALL} --prior none", ["falcon.py"])
def test_falcon_without_its_prior_minimises_the_cross_entropy_alone(run):
    for line in run.metrics():
        assert line["loss"] == line["cross_entropy"]
        assert line["prior"] >= 0


# ---- BA-SSL ------------------------------------------------------------------------------------------------
def check_meters(run):
    for line in run.metrics():
        assert line["meters"]["chance"] == pytest.approx(np.log(2 * run.config()["batch"] - 1))
        assert line["meters"]["noise_nt_xent"] > 0


def check_base(run, loss):
    """A fused run with this base method has its projector, and a row for features behind the module."""
    assert run.config()["projector"] == ba_ssl.RECIPES[loss]["projector"]
    check_meters(run)
    meters = run.metrics()[-1]["meters"]
    assert meters["others"] > 0.05 and meters["bias"] < 0.1 * meters["others"]
    assert re.search("^with the module", run.stdout, re.M)
    assert "of pure noise" in run.stdout


@command(f"{SMALL} --loss vicreg", ["ba_ssl.py"])
def test_ba_ssl_on_vicreg(run):
    check_base(run, "vicreg")


@command(f"{SMALL} --loss falcon", ["ba_ssl.py"])
def test_ba_ssl_on_falcon(run):
    check_base(run, "falcon")


@command(f"{SMALL} --loss icone", ["ba_ssl.py"])
def test_ba_ssl_on_icone_has_a_table_with_its_own_learning_rate(run):
    check_base(run, "icone")
    checkpoint = run.checkpoint()
    assert "table" in checkpoint["model"]
    assert checkpoint["optimizer"]["param_groups"][-1]["initial_lr"] == 10 * run.config()["lr"]


@command(f"{SMALL} --no-fusion --patch 5", ["ba_ssl.py"])
def test_ba_ssl_without_fusion_is_the_base_method_alone(run):
    check_meters(run)
    assert "others" not in run.metrics()[-1]["meters"]
    assert "with the module" not in run.stdout
    assert not any(name.startswith("fusion") for name in run.checkpoint()["model"])


@command(f"{SMALL} --batch 40 --mixing mixup", ["ba_ssl.py"])                        # more than the 12 test images
def test_ba_ssls_mixup_has_nothing_to_learn(run):
    check_meters(run)
    assert run.metrics()[-1]["meters"]["others"] > 0.05
    assert not any(name.startswith("fusion") for name in run.checkpoint()["model"])


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
    (SMALL, ROOMS, truncated, "small.npz cannot be read"),
    (f"--data {ROOT}/README.md", ROOMS, None, "README.md cannot be read"),
    (SMALL, ROOMS, saved(images=BLACK), "no train_images.*test_images"),
    (SMALL, ROOMS, saved(train_images=one_nan()), "train_images holds NaN"),
    (SMALL, ROOMS, saved(train_images=np.full((40, 12, 12), 300.)), r"outside \[0, 1\]"),
    (SMALL, ROOMS, saved(train_images=np.full((40, 12, 12), 300, np.int64)), "int64.*not uint8 or float"),
    (SMALL, ROOMS, saved(train_images=np.zeros((40, 3, 12, 12), np.uint8)), r"\[40, 3, 12, 12\], not"),
    (SMALL, ROOMS, saved(train_images=np.zeros((40, 144), np.uint8)), r"uint8 \[40, 144\]"),
    (SMALL, ROOMS, saved(train_images=BLACK, test_images=BLACK[:, :9, :9]), r"\[1, 12, 12\].*\[1, 9, 9\]"),
    (f"{SMALL} --batch 41", ["vicreg.py", "ba_ssl.py"], None, "40 training.*--batch 41"),
    ("--data digits3d --amp bf16 --device cpu", ROOMS, None, "GPU"),
    (f"{SMALL} --out small.npz/run", ROOMS, None, "cannot write into small.npz/run"),
    (f"{SMALL} --out used", ROOMS, used_folder, "used is not empty.*--resume used"),
    ("--resume nowhere", ROOMS, None, "cannot resume nowhere"),
    ("--resume half", ROOMS, run_folder(), "cannot resume half.*start a new run"),
    ("--resume half", ROOMS, run_folder(b"PK\x03\x04 and then nothing"), "cannot resume half.*start a new run"),
    ("--resume half", ROOMS, foreign_checkpoint, "cannot resume half.*start a new run"),
    ("--resume half --epochs 9", ROOMS, run_folder(), "--resume takes no other option"),
    ("--resume=", ROOMS, None, "--resume: it is empty"),
    (f"{SMALL} --out=", ROOMS, None, "--out: it is empty"),
    (f"{SMALL} --seed {2 ** 64}", ROOMS, None, "--seed"),
    (f"{SMALL} --device meta", ROOMS, None, "--device meta.*try --device cpu"),
    (f"{SMALL} --device cuda:99", ROOMS, None, "--device cuda:99.*try --device cpu"),
    (f"{SMALL} --device abacus", ROOMS, None, "--device abacus"),
    ("--epoch 9", ROOMS, None, "--epoch"),
    ("--lr -1", ROOMS, None, r"--lr: -1 does not lie in \[0, inf\)"),
    ("--projector 512-0", ALL, None, "--projector"),
    ("--temperature 0", ALL, None, "--temperature"),
    (f"{SMALL} --eps 0.01 --codes 101", ["falcon.py"], None, "--eps 0.01 must be below"),
    (f"{SMALL} --codes 1", ["falcon.py"], None, "--codes"),
    (f"{SMALL} --patch 5", ["ba_ssl.py"], None, r"--patch 5 .*canvas \[12, 12\]"),
    (f"{SMALL} --projector none", ["ba_ssl.py"], None, "--projector none.*give simclr")]


@pytest.mark.parametrize("run, message", [
    pytest.param(Run(script, arguments, prepare, once), message, id=f"{script}-{message}")
    for arguments, scripts, prepare, message in BAD for script in scripts], indirect=["run"])
def test_bad_input_gets_one_line_and_exit_code_2(run, message):
    assert run.returncode == 2, run.stderr
    line, = run.stderr.splitlines()
    assert line.startswith(f"{run.script}: ")
    assert re.search(message, line), line
    assert run.after == run.before                                       # nothing written, nothing overwritten
