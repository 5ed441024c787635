"""The scripts as their users run them: processes in a folder of their own."""
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

import ba_ssl
import falcon
import forked
import icone
import vicreg

ROOT = Path(__file__).parents[1]
SCRIPTS = {"vicreg.py": vicreg, "icone.py": icone, "falcon.py": falcon, "ba_ssl.py": ba_ssl}
ROOMS = ["vicreg.py"]                                    # stands for all where only rooms that all share are at work
FILES = {"config.json", "curves.png", "embedding.png", "encoder.pt", "features.npz", "last.pt", "metrics.jsonl",
         "report.json"}
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}      # runs go as many at a time as there are cores
MORE_FILES = {"falcon.py": {"meters.json", "meters.png"}}
SMALL = "--data small.npz --batch 8 --epochs 3 --width 4".split()


def with_data(path):
    """The folder with a small data set in it: 40 training and 12 test images 12 x 12 in three classes."""
    rng = np.random.default_rng(0)
    np.savez(path / "small.npz", **images(rng, "train", 40, 12, 12), **images(rng, "test", 12, 12, 12))
    return path


def images(rng, split, n, *shape):
    labels = np.arange(n)[:, None] % 3
    x = rng.integers(0, 120, (n, *shape)) + 60 * labels.reshape(n, *[1] * len(shape))
    return {f"{split}_images": x.astype(np.uint8), f"{split}_labels": labels.astype(np.uint8)}


def command(script, *args):
    return [sys.executable, str(ROOT / script), *map(str, args)]


def run(folder, script, *args):
    return subprocess.run(command(script, *args), cwd=folder, capture_output=True, text=True, timeout=300,
                          env=ONE_THREAD)


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
    "eps over 1 / (codes - 1)": (lambda folder: (*SMALL, "--eps", .01, "--codes", 101), "--eps 0.01 must be below"),
    "a single code": (lambda folder: (*SMALL, "--codes", 1), "--codes"),
    "patches that do not fit": (lambda folder: (*SMALL, "--patch", 5), r"--patch 5 .*canvas \[12, 12\]"),
    "no head but for icone": (lambda folder: (*SMALL, "--projector", "none"), "--projector none.*give simclr"),
    "unknown option": (lambda folder: ("--epoch", 9), "--epoch"),
    "unknown device": (lambda folder: (*SMALL, "--device", "abacus"), "--device abacus")}


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- The runs: each a function (folder with small.npz, script) -> what its test looks at ---------------------
def with_options(*args):
    return lambda folder, script: forked.run(ROOT / script, args, folder)


def on_shape(shape, *args):
    def go(folder, script):
        rng = np.random.default_rng(0)
        np.savez(folder / "small.npz", **images(rng, "train", 40, *shape), **images(rng, "val", 12, *shape))
        return forked.run(ROOT / script, (*SMALL, *args), folder)
    return go


def without_labels(folder, script):
    np.savez(folder / "small.npz", train_images=np.load(folder / "small.npz")["train_images"])
    return forked.run(ROOT / script, SMALL, folder)


def copied(folder, script):
    shutil.copy(ROOT / script, folder)
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return subprocess.run([sys.executable, script, *SMALL, "--accumulate", "2"], cwd=folder, capture_output=True,
                          text=True)


def killed_and_resumed(folder, script):
    """Exit status of a whole run, and of one that went on after SIGKILL at a random moment."""
    long = *SMALL, "--epochs", 16
    whole = run(folder, script, *long, "--out", "whole")
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command(script, *long, "--out", "killed"), cwd=folder, stderr=log, stdout=log,
                                   env=ONE_THREAD)
    metrics = folder / "killed" / "metrics.jsonl"
    while not metrics.exists():
        assert process.poll() is None, (folder / "log").read_text()
        time.sleep(.01)
    time.sleep(random.uniform(0, 1.5))
    process.send_signal(signal.SIGKILL)
    process.wait()
    return whole, run(folder, script, "--resume", "killed")


def interrupted(folder, script):
    process = subprocess.Popen(  # a job in the background would inherit an ignored SIGINT
        command(script, *SMALL, "--epochs", 3000, "--out", "run"), cwd=folder, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        while not (folder / "run" / "metrics.jsonl").exists():
            assert process.poll() is None
            time.sleep(.01)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        return process.communicate(timeout=60)[1], process
    finally:
        process.kill()


def wrong(what):
    def go(folder, script):
        arguments = BAD[what][0](folder)
        before = snapshot(folder)
        return forked.run(ROOT / script, arguments, folder), before, snapshot(folder)
    return go


OF_FALCON = ["eps over 1 / (codes - 1)", "a single code"]
OF_BA_SSL = ["patches that do not fit", "no head but for icone"]
EACH = ["missing file", "sizes that are none", "temperature of 0"]
OWN = {"vicreg.py": [what for what in BAD if what not in OF_FALCON + OF_BA_SSL],        # the rooms', for all
       "icone.py": EACH, "falcon.py": [*EACH, *OF_FALCON],
       "ba_ssl.py": [*EACH, "batch over the data", *OF_BA_SSL]}
JOBS = {  # name: (scripts, function); where only shared rooms are at work, one script stands for all
    "built-in digits": (SCRIPTS, with_options("--epochs", 1, "--width", 4)),
    "killed and resumed": (SCRIPTS, killed_and_resumed),
    "ctrl c": (ROOMS, interrupted),
    "loss not finite": (ROOMS, with_options(*SMALL, "--lr", 1e30)),
    "colour images": (SCRIPTS, on_shape((12, 12, 3), "--amp", "bf16")),
    "volumes": (SCRIPTS, on_shape((8, 12, 8))),
    "without labels": (["vicreg.py", "falcon.py", "ba_ssl.py"], without_labels),
    "a copy": (SCRIPTS, copied),
    "help": (SCRIPTS, with_options("--help")),
    "one image": (SCRIPTS, with_options(*SMALL, "--batch", 1)),
    "one volume": (["icone.py"], on_shape((10, 10, 10), "--batch", 1)),
    "recipe": (["icone.py"], with_options(*SMALL, "--recipe", "reconstruction")),
    "recipe and more": (["icone.py"], with_options(
        *SMALL, "--recipe", "reconstruction", "--diversity", "koleo", "--projector", "16-8")),
    "released": (["falcon.py"], with_options(*SMALL, "--recipe", "released", "--codes", 64, "--projector", 16)),
    **{kind: (["falcon.py"], with_options(*SMALL, "--dictionary", kind)) for kind in ("alternating", "hybrid")},
    **{f"loss {loss}": (["ba_ssl.py"], with_options(*SMALL, "--loss", loss)) for loss in ("vicreg", "falcon", "icone")},
    "no fusion": (["ba_ssl.py"], with_options(*SMALL, "--no-fusion", "--patch", 5)),
    "mixup": (["ba_ssl.py"], with_options(*SMALL, "--batch", 40, "--mixing", "mixup")),      # 12 test images
    "no prior": (["falcon.py"], with_options(*SMALL, "--prior", "none")),
    **{what: ([script for script in SCRIPTS if what in OWN[script]], wrong(what)) for what in BAD}}


def jobs(*names):
    return pytest.mark.parametrize("job", [f"{script}: {name}" for name in names for script in JOBS[name][0]])


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """{job: (its folder, what its function returned)} for the tests that were chosen, as many at a time as cores."""
    chosen = {item.callspec.params["job"] for item in request.session.items
              if "job" in getattr(getattr(item, "callspec", None), "params", ())}
    folders = {job: tmp_path_factory.mktemp("run") for job in chosen}    # mktemp is not safe among threads
    def go(job):
        script, name = job.split(": ", 1)
        return folders[job], JOBS[name][1](with_data(folders[job]), script)
    chosen = sorted(chosen, key=lambda job: list(JOBS).index(job.split(": ", 1)[1]))           # the longest first
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(chosen, pool.map(go, chosen)))


def finished(outcomes, job):
    """Script and run folder of a run that ended well, and what it printed."""
    folder, done = outcomes[job]
    assert done.returncode == 0, done.stderr
    script = job.split(": ")[0]
    return script, folder / "runs" / f"{Path(script).stem}-1", done.stdout


def config_and_metrics(out):
    return json.loads((out / "config.json").read_text()), [
        json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# ---- The tests ---------------------------------------------------------------------------------------------
@jobs("built-in digits")
def test_a_run_ends_with_table_panel_verdict_and_files(outcomes, job):
    script, out, stdout = finished(outcomes, job)
    for row in ("raw pixels", "random encoder", "trained encoder"):
        knn, linear = map(float, re.search(rf"^{row} +(\S+) +(\S+)$", stdout, re.M).groups())
        assert .05 < knn < 1 and .05 < linear < 1
    for column in ("raw std", "std", "cosine", "RankMe", "participation", "alignment", "uniformity", "TwoNN"):
        assert column in stdout
    assert re.search(r"^(No collapse|COLLAPSED|DIMENSIONAL COLLAPSE)", stdout, re.M)
    assert "step/s" in outcomes[job][1].stderr                           # the progress bar
    assert {file.name for file in out.iterdir()} == FILES | MORE_FILES.get(script, set())
    _, (line,) = config_and_metrics(out)
    if script == "vicreg.py":
        terms = [line[name] for name in ("invariance", "variance", "covariance")]
        assert line["loss"] == pytest.approx(sum(terms)) and line["c_noise_floor"] == pytest.approx(511 / 127)
        assert line["covariance"] == pytest.approx(2 * line["c_per_view"])
    if script == "falcon.py":
        assert line["loss"] == pytest.approx(line["prior"] + line["cross_entropy"])
        meters = json.loads((out / "meters.json").read_text())
        assert set(line["meters"]) < set(meters) and 0 < meters["NMI of a random assignment"] < meters["NMI"] < 1
        assert "least loss: representation collapse, 0.7 log c 4.37" in stdout and "AMI" in stdout
    saved = torch.load(out / "encoder.pt", weights_only=True)
    encoder = SCRIPTS[script].Encoder(**saved["config"])
    encoder.load_state_dict(saved["state_dict"])
    features = np.load(out / "features.npz")
    h, = SCRIPTS[script].encode(encoder, SCRIPTS[script].load_data("digits").test_images)
    np.testing.assert_allclose(features["test_features"], h, atol=1e-4)
    assert features["train_features"].shape == (1437, 32) and features["test_labels"].shape == (1440,)


@jobs("killed and resumed")
def test_a_killed_run_resumes_to_the_same_numbers(outcomes, job):
    folder, done = outcomes[job]
    assert all(process.returncode == 0 for process in done), [process.stderr for process in done]
    a, b = ((folder / name / "metrics.jsonl").read_bytes() for name in ("whole", "killed"))
    assert a == b
    a, b = (torch.load(folder / name / "last.pt", weights_only=True)["model"] for name in ("whole", "killed"))
    assert all(torch.equal(a[key], b[key]) for key in a)


@jobs("ctrl c")
def test_ctrl_c_says_how_to_go_on(outcomes, job):
    stderr, process = outcomes[job][1]
    last = stderr.splitlines()[-1]
    assert process.returncode == 2 and "Traceback" not in stderr, stderr
    assert last.startswith(f"{job.split(':')[0]}: interrupted: nothing is lost") and "--resume" in last, stderr


@jobs("loss not finite")
def test_a_loss_that_is_not_finite_ends_the_run(outcomes, job):
    done = outcomes[job][1]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"the loss is (nan|inf) in epoch \d.*lower --lr", done.stderr.splitlines()[-1])


@jobs("colour images", "volumes")
def test_colour_images_in_mixed_precision_and_volumes(outcomes, job):
    assert "trained encoder" in finished(outcomes, job)[2]


@jobs("without labels")
def test_unlabelled_images_train_and_give_features(outcomes, job):
    _, out, stdout = finished(outcomes, job)
    assert "no class labels" in stdout and "k-NN" not in stdout and "RankMe" in stdout and "NMI" not in stdout
    features = np.load(out / "features.npz")
    assert features["train_features"].shape == (32, 32) and features["test_features"].shape == (8, 32)


@jobs("a copy")
def test_a_copy_with_kernels_alone_runs_and_accumulated_batches_make_one_step(outcomes, job):
    last = torch.load(finished(outcomes, job)[1] / "last.pt", weights_only=True)
    assert {float(part["step"]) for part in last["optimizer"]["state"].values()} == {6}     # 40 images // 16 x 3 epochs


@jobs("help")
def test_help_explains_every_option_with_its_default(outcomes, job):
    stdout = finished(outcomes, job)[2]
    for option in "data batch epochs lr seed device width projector imbalance out resume compile amp".split():
        assert re.search(rf"^ +--{option}\b", stdout, re.M), option
    assert stdout.count("(default:") >= 12
    for option in ("batch", "epochs", "lr"):
        assert re.search(rf"--{option} [^-]*\(default:\s+[\d.]+\)", stdout), option


@jobs(*BAD)
def test_bad_input_gets_one_line_and_exit_code_2(outcomes, job):
    _, (done, before, after) = outcomes[job]
    assert done.returncode == 2, done.stderr
    line, = done.stderr.splitlines()
    script, what = job.split(": ", 1)
    assert line.startswith(f"{script}: ") and re.search(BAD[what][1], line), line
    assert after == before                                               # nothing written, nothing overwritten


@jobs("one image", "one volume")
def test_icone_alone_trains_on_one_image_at_a_time(outcomes, job):
    script, done = job.split(": ")[0], outcomes[job][1]
    if script == "icone.py":
        _, (*_, line) = config_and_metrics(finished(outcomes, job)[1])
        assert line["loss"] == pytest.approx(line["alignment"] + line["diversity"]) and -1 <= line["cosine_to_all"] <= 1
    else:
        assert done.returncode == 2
        assert done.stderr == f"{script}: --batch 1 is too small: it must be at least 2 here\n"


@jobs("recipe", "recipe and more")
def test_icone_recipe_sets_what_is_not_given(outcomes, job):
    out = finished(outcomes, job)[1]
    config, expected = config_and_metrics(out)[0], dict(view_view=1, rows=0, table_init="normal", table_lr=1, weight=1)
    more = dict(diversity="koleo", projector=[16, 8]) if "more" in job else dict(diversity="relu2", projector=[])
    assert {**config, **expected, **more, "batch": 8} == config
    table = torch.load(out / "last.pt", weights_only=True)["model"]["table"]
    assert table.shape == (40, 8 if "more" in job else 32)               # with the run, not with the encoder
    assert set(torch.load(out / "encoder.pt", weights_only=True)["state_dict"]) == set(
        icone.Encoder(1, 2, width=4).state_dict())


@jobs("released", "alternating", "hybrid")
def test_falcon_recipe_and_dictionaries(outcomes, job):
    out = finished(outcomes, job)[1]
    config, keys = config_and_metrics(out)[0], torch.load(out / "last.pt", weights_only=True)["model"].keys()
    assert ("moving" in keys) == ("seen" in keys or "hybrid" in job) and ("seen" in keys) == ("alternating" in job)
    released = dict(norm="tanh", beta=1, temperature=1, weight_decay=1e-4, codes=64, projector=[16], batch=8)
    assert ({**config, **released} == config) == ("released" in job)


@jobs("no prior")
def test_falcon_without_its_prior_minimises_the_cross_entropy_alone(outcomes, job):
    for line in config_and_metrics(finished(outcomes, job)[1])[1]:
        assert line["loss"] == line["cross_entropy"] and line["prior"] >= 0


@jobs("loss vicreg", "loss falcon", "loss icone", "no fusion", "mixup")
def test_ba_ssl_base_methods_fusion_and_controls(outcomes, job):
    _, out, stdout = finished(outcomes, job)
    config, lines = config_and_metrics(out)
    last = torch.load(out / "last.pt", weights_only=True)
    assert ("table" in last["model"]) == (config["loss"] == "icone") == (last["optimizer"]["param_groups"][-1][
        "initial_lr"] == 10 * config["lr"])
    assert config["projector"] == ba_ssl.RECIPES[config["loss"]]["projector"]
    fused = "no fusion" not in job
    probes = json.loads((out / "report.json").read_text())["k-NN, linear"]
    assert fused == ("with the module" in stdout) == ("with the module" in probes) == ("of pure noise" in stdout)
    for line in lines:
        meters = line["meters"]
        assert meters["chance"] == pytest.approx(np.log(2 * config["batch"] - 1)) and meters["noise_nt_xent"] > 0
        assert ("gate" in meters) == fused
    if fused:
        assert (meters["gate"] == pytest.approx(.2)) if "mixup" in job else 0 < abs(meters["gate"]) < .2


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_compiled_model_trains(tmp_path, script):
    done = run(with_data(tmp_path), script, *SMALL, "--compile")
    assert done.returncode == 0, done.stderr
