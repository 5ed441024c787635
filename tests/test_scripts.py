"""The scripts as their users run them: subprocesses in a folder of their own."""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import icone
import vicreg

ROOT = Path(__file__).parents[1]
SCRIPTS = {"vicreg.py": vicreg, "icone.py": icone}
ROOMS = ["vicreg.py"]                                    # stands for all where only rooms that all share are at work
FILES = {"config.json", "curves.png", "embedding.png", "encoder.pt", "features.npz", "last.pt", "metrics.jsonl",
         "report.json"}
SMALL = "--data small.npz --batch 8 --epochs 3 --width 4".split()


def with_data(path):
    """The folder with a small data set in it: 40 training and 12 test images 12 x 12 in three classes."""
    rng = np.random.default_rng(0)
    np.savez(path / "small.npz", **images(rng, "train", 40, 12, 12), **images(rng, "test", 12, 12, 12))
    return path


@pytest.fixture
def folder(tmp_path):
    return with_data(tmp_path)


def images(rng, split, n, *shape):
    labels = np.arange(n)[:, None] % 3
    x = rng.integers(0, 120, (n, *shape)) + 60 * labels.reshape(n, *[1] * len(shape))
    return {f"{split}_images": x.astype(np.uint8), f"{split}_labels": labels.astype(np.uint8)}


def command(script, *args):
    return [sys.executable, str(ROOT / script), *map(str, args)]


def run(folder, script, *args):
    return subprocess.run(command(script, *args), cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_ends_with_table_panel_verdict_and_files(folder, script):
    done = run(folder, script, "--epochs", 1, "--width", 4)              # the built-in digits
    assert done.returncode == 0, done.stderr
    for row in ("raw pixels", "random encoder", "trained encoder"):
        knn, linear = map(float, re.search(rf"^{row} +(\S+) +(\S+)$", done.stdout, re.M).groups())
        assert .05 < knn < 1 and .05 < linear < 1
    for column in ("raw std", "std", "cosine", "RankMe", "participation", "alignment", "uniformity", "TwoNN"):
        assert column in done.stdout
    assert re.search(r"^(No collapse|COLLAPSED|DIMENSIONAL COLLAPSE)", done.stdout, re.M)
    assert "step/s" in done.stderr                                       # the progress bar
    out = folder / "runs" / f"{Path(script).stem}-1"
    assert {file.name for file in out.iterdir()} == FILES
    line, = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    if script == "vicreg.py":
        terms = [line[name] for name in ("invariance", "variance", "covariance")]
        assert line["loss"] == pytest.approx(sum(terms)) and line["c_noise_floor"] == pytest.approx(511 / 127)
        assert line["covariance"] == pytest.approx(2 * line["c_per_view"])
    saved = torch.load(out / "encoder.pt", weights_only=True)
    encoder = SCRIPTS[script].Encoder(**saved["config"])
    encoder.load_state_dict(saved["state_dict"])
    features = np.load(out / "features.npz")
    h, = SCRIPTS[script].encode(encoder, SCRIPTS[script].load_data("digits").test_images)
    np.testing.assert_allclose(features["test_features"], h, atol=1e-4)
    assert features["train_features"].shape == (1437, 32) and features["test_labels"].shape == (1440,)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_killed_run_resumes_to_the_same_numbers(folder, script):
    long = *SMALL, "--epochs", 16
    assert run(folder, script, *long, "--out", "whole").returncode == 0
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command(script, *long, "--out", "killed"), cwd=folder, stderr=log, stdout=log)
    metrics = folder / "killed" / "metrics.jsonl"
    while not metrics.exists():
        assert process.poll() is None, (folder / "log").read_text()
        time.sleep(.01)
    time.sleep(random.uniform(0, 1.5))
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(metrics.read_text().splitlines())
    done = run(folder, script, "--resume", "killed")
    assert done.returncode == 0, done.stderr
    assert metrics.read_bytes() == (folder / "whole" / "metrics.jsonl").read_bytes(), f"killed after {before} epochs"
    a, b = (torch.load(folder / name / "last.pt", weights_only=True)["model"] for name in ("whole", "killed"))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("script", ROOMS)
def test_ctrl_c_says_how_to_go_on(folder, script):
    process = subprocess.Popen(  # a job in the background would inherit an ignored SIGINT
        command(script, *SMALL, "--epochs", 3000, "--out", "run"), cwd=folder, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        while not (folder / "run" / "metrics.jsonl").exists():
            assert process.poll() is None
            time.sleep(.01)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    last = stderr.splitlines()[-1]
    assert process.returncode == 2 and "Traceback" not in stderr, stderr
    assert last.startswith(f"{script}: interrupted: nothing is lost") and "--resume" in last, stderr


@pytest.mark.parametrize("script", ROOMS)
def test_a_loss_that_is_not_finite_ends_the_run(folder, script):
    done = run(folder, script, *SMALL, "--lr", 1e30)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"the loss is (nan|inf) in epoch \d.*lower --lr", done.stderr.splitlines()[-1])


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("shape, extra", [((12, 12, 3), ("--amp", "bf16")), ((10, 10, 10), ())])
def test_colour_images_and_volumes(folder, script, shape, extra):
    rng = np.random.default_rng(0)
    np.savez(folder / "small.npz", **images(rng, "train", 40, *shape), **images(rng, "val", 12, *shape))
    done = run(folder, script, *SMALL, *extra)
    assert done.returncode == 0, done.stderr
    assert "trained encoder" in done.stdout


@pytest.mark.parametrize("script", ROOMS)
def test_unlabelled_images_train_and_give_features(folder, script):
    np.savez(folder / "small.npz", train_images=np.load(folder / "small.npz")["train_images"])
    done = run(folder, script, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "no class labels" in done.stdout and "k-NN" not in done.stdout and "RankMe" in done.stdout
    features = np.load(folder / "runs" / f"{Path(script).stem}-1" / "features.npz")
    assert features["train_features"].shape == (32, 32) and features["test_features"].shape == (8, 32)


def truncate(path):
    path.write_bytes(path.read_bytes()[:3000])


def damaged_checkpoint(folder):
    (folder / "half").mkdir()
    (folder / "half" / "config.json").write_text("{}")
    (folder / "half" / "last.pt").write_bytes(b"PK\x03\x04 and then nothing")
    return "--resume", "half"


def foreign_checkpoint(folder):
    (folder / "half").mkdir()
    torch.save({"config": Path("anything")}, folder / "half" / "last.pt")            # torch explains in many lines
    return "--resume", "half"


def without_checkpoint(folder):
    (folder / "half").mkdir()
    (folder / "half" / "config.json").write_text("{}")
    return "--resume", "half"


def used_folder(folder):
    (folder / "used").mkdir()
    (folder / "used" / "precious").write_text("data")
    return *SMALL, "--out", "used"


def truncated(folder):
    truncate(folder / "small.npz")
    return SMALL


def saved(**arrays):
    def make(folder):
        np.savez(folder / "small.npz", **arrays)
        return SMALL
    return make


def nan_pixels(folder):
    x = np.full((40, 12, 12), .5, np.float32)
    x[7, 3, 3] = np.nan
    return saved(train_images=x)(folder)


BAD = {  # what is wrong: (how it comes about -> arguments, words the message must have)
    "missing file": (lambda folder: ("--data", "nowhere.npz"), "nowhere.npz.*check the path"),
    "truncated file": (truncated, "small.npz cannot be read"),
    "not an archive": (lambda folder: ("--data", str(ROOT / "README.md")), "README.md cannot be read"),
    "no train_images": (saved(images=np.zeros((40, 12, 12), np.uint8)), "no train_images.*test_images"),
    "NaN pixels": (nan_pixels, "train_images holds NaN"),
    "too large values": (saved(train_images=np.full((40, 12, 12), 300, np.int64)), r"outside \[0, 1\]"),
    "channels first": (saved(train_images=np.zeros((40, 3, 12, 12), np.uint8)), r"\[40, 3, 12, 12\], not"),
    "wrong shape": (saved(train_images=np.zeros((40, 144), np.uint8)), r"uint8 \[40, 144\]"),
    "shapes that differ": (saved(train_images=np.zeros((40, 12, 12), np.uint8), test_images=np.zeros(
        (40, 9, 9), np.uint8)), r"\[1, 12, 12\].*\[1, 9, 9\]"),
    "batch over the data": (lambda folder: (*SMALL, "--batch", 41), "40 training.*--batch 41"),
    "imbalance without labels": (lambda folder: (*saved(train_images=np.zeros((40, 12, 12), np.uint8))(folder),
                                                 "--imbalance", 10), "--imbalance needs class labels"),
    "volumes in bf16 on a CPU": (lambda folder: ("--data", "digits3d", "--amp", "bf16", "--device", "cpu"), "GPU"),
    "folder below a file": (lambda folder: (*SMALL, "--out", "small.npz/run"), "cannot write into small.npz/run"),
    "folder in use": (used_folder, "used is not empty.*--resume used"),
    "resume of nothing": (lambda folder: ("--resume", "nowhere"), "cannot resume nowhere"),
    "resume of a half-written folder": (without_checkpoint, "cannot resume half.*start a new run"),
    "resume of a foreign checkpoint": (foreign_checkpoint, "cannot resume half.*start a new run"),
    "no CUDA here": (lambda folder: (*SMALL, "--device", "cuda:99"), "--device cuda:99.*try --device cpu"),
    "resume of a damaged checkpoint": (damaged_checkpoint, "cannot resume half.*start a new run"),
    "resume with other options": (lambda folder: ("--resume", "half", "--epochs", 9), "--resume takes no other option"),
    "sizes that are none": (lambda folder: ("--projector", "512-0"), "--projector"),
    "temperature of 0": (lambda folder: ("--temperature", 0), "--temperature"),
    "unknown option": (lambda folder: ("--epoch", 9), "--epoch"),
    "unknown device": (lambda folder: (*SMALL, "--device", "abacus"), "--device abacus")}


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


BAD_RUNS = [(script, wrong) for script in ROOMS for wrong in BAD] + [
    ("icone.py", wrong) for wrong in ("missing file", "sizes that are none", "temperature of 0")]


@pytest.fixture(scope="module")
def bad_runs(tmp_path_factory):
    """{(script, what is wrong): what the run ended with, the folder before and after}, as many at a time as cores."""
    def go(pair):
        script, wrong = pair
        folder = with_data(tmp_path_factory.mktemp("bad"))
        arguments = BAD[wrong][0](folder)
        before = snapshot(folder)
        return run(folder, script, *arguments), before, snapshot(folder)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(BAD_RUNS, pool.map(go, BAD_RUNS)))


@pytest.mark.parametrize("script, wrong", BAD_RUNS)
def test_bad_input_gets_one_line_and_exit_code_2(bad_runs, script, wrong):
    done, before, after = bad_runs[script, wrong]
    assert done.returncode == 2, done.stderr
    line, = done.stderr.splitlines()
    assert line.startswith(f"{script}: ") and re.search(BAD[wrong][1], line), line
    assert after == before                                               # nothing written, nothing overwritten


def test_vicreg_refuses_a_batch_of_one(folder):
    done = run(folder, "vicreg.py", *SMALL, "--batch", 1)
    assert done.returncode == 2 and done.stderr == "vicreg.py: --batch 1 is too small: it must be at least 2 here\n"


@pytest.mark.parametrize("shape", [(12, 12), (10, 10, 10)])
def test_icone_trains_on_one_image_at_a_time(folder, shape):
    rng = np.random.default_rng(0)
    np.savez(folder / "small.npz", **images(rng, "train", 40, *shape), **images(rng, "test", 12, *shape))
    done = run(folder, "icone.py", *SMALL, "--batch", 1)
    assert done.returncode == 0, done.stderr
    line = json.loads((folder / "runs" / "icone-1" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["loss"] == pytest.approx(line["alignment"] + line["diversity"]) and -1 <= line["cosine_to_all"] <= 1


def test_icone_saves_its_table_with_the_run_not_with_the_encoder(folder):
    assert run(folder, "icone.py", *SMALL).returncode == 0
    run_folder = folder / "runs" / "icone-1"
    assert torch.load(run_folder / "last.pt", weights_only=True)["model"]["table"].shape == (40, 32)
    assert set(torch.load(run_folder / "encoder.pt", weights_only=True)["state_dict"]) == set(
        icone.Encoder(1, 2, width=4).state_dict())


@pytest.mark.parametrize("options, expected", [
    ((), dict(diversity="relu2", view_view=1, rows=0, table_init="normal", table_lr=1, projector=[], weight=1)),
    (("--diversity", "koleo", "--projector", "16-8"), dict(diversity="koleo", projector=[16, 8], view_view=1))])
def test_icone_recipe_sets_what_is_not_given(folder, options, expected):
    done = run(folder, "icone.py", *SMALL, "--recipe", "reconstruction", *options)
    assert done.returncode == 0, done.stderr
    config = json.loads((folder / "runs" / "icone-1" / "config.json").read_text())
    assert {name: config[name] for name in expected} == expected and config["batch"] == 8


@pytest.mark.parametrize("script", SCRIPTS)
def test_accumulated_batches_make_one_step(folder, script):
    done = run(folder, script, *SMALL, "--accumulate", 2)
    assert done.returncode == 0, done.stderr
    last = torch.load(folder / "runs" / f"{Path(script).stem}-1" / "last.pt", weights_only=True)
    assert {float(part["step"]) for part in last["optimizer"]["state"].values()} == {6}     # 40 images // 16 x 3 epochs


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_copy_with_kernels_alone_runs(folder, script):
    shutil.copy(ROOT / script, folder)
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable, script, *SMALL], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_every_option_with_its_default(folder, script):
    done = run(folder, script, "--help")
    assert done.returncode == 0
    for option in "data batch epochs lr seed device width projector imbalance out resume compile amp".split():
        assert re.search(rf"^ +--{option}\b", done.stdout, re.M), option
    assert done.stdout.count("(default:") >= 12


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_compiled_model_trains(folder, script):
    done = run(folder, script, *SMALL, "--compile")
    assert done.returncode == 0, done.stderr
