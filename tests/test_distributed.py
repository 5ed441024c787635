"""Several processes, gloo on this machine: the same losses and gradients as one, runs that start by torchrun."""
import contextlib
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image

import ba_ssl
import falcon
import forked
import icone
import vicreg
from kernels.harness.files import load_checkpoint
from kernels.harness.processes import all_gather_object, data_parallel, local_slice
from test_faults import one_thread                                           # noqa: F401  a fixture: sums in one order

ROOT = Path(__file__).parents[1]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
BATCH, COUNT, FEATURES = 16, 40, 32


def model_of(name):
    """A small model as its script makes it, whose projector has BatchNorm where the method has."""
    torch.manual_seed(0)
    encoder = vicreg.Encoder(1, 2, width=4)
    if name == "vicreg":
        model = vicreg.VICReg(encoder, FEATURES, projector=(24, 16))
    elif name == "icone":
        model = icone.IConE(encoder, FEATURES, COUNT, bank=24)
        model.table.normal_()
        torch.nn.functional.normalize(model.table, out=model.table)
    elif name == "falcon":
        model = falcon.FALCON(encoder, FEATURES, falcon.FixedDictionary(64, 16), BATCH, projector=(16,))
    elif name == "alternating":
        dictionary = falcon.AlternatingDictionary(64, 16, BATCH)
        model = falcon.FALCON(encoder, FEATURES, dictionary, BATCH, projector=(16,))
    else:
        projector = () if name == "ba icone" else (24, 16)
        model = ba_ssl.BASSL(encoder, FEATURES, loss=name.split()[1], projector=projector, count=COUNT)
    return model.train()


def one_step(name):
    """Terms and gradients of one batch, of which this process has its part of the views."""
    generator = torch.Generator().manual_seed(1)
    views = torch.rand(2, BATCH, 1, 12, 12, generator=generator)
    index = torch.randperm(COUNT, generator=generator)[:BATCH]
    own = local_slice(BATCH)
    model = model_of(name)
    parallel = data_parallel(model)                                          # averages for as long as it lives
    takes_index = name == "icone" or name.startswith("ba ")
    terms, notes = parallel(views[0, own], views[1, own], *[index] * takes_index)
    sum(terms.values()).backward()
    found = {name: value.detach() for name, value in terms.items()}
    found.update({name: torch.as_tensor(value).detach() for name, value in notes.items()})
    found.update({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    if isinstance(model, icone.IConE):
        torch.optim.SGD(model.encoder.parameters(), 0.1).step()
        model.step()
        found["table"] = model.table
        found.update({f"buffer {key}": value for key, value in model.named_buffers()})
    return found


METHODS = ["vicreg", "icone", "falcon", "alternating", "ba simclr", "ba vicreg", "ba falcon", "ba icone"]


def worker(number, count, folder):
    """What torchrun sets, without its start of a new Python for each."""
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(count),
                      TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number,
                                         world_size=count)
    everything = all_gather_object({name: one_step(name) for name in METHODS})
    if number == 0:
        torch.save(everything, folder / "found.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def found(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    mp.start_processes(worker, (request.param, folder), nprocs=request.param, start_method="forkserver")
    return torch.load(folder / "found.pt")


def error(found, expected):
    """What to compare: all gradients as one vector, each term, note and buffer by itself."""
    gradients = [key for key in expected if "." in key and not key.startswith("buffer")]
    yield "gradients", *[torch.cat([some[key].flatten() for key in gradients]) for some in (found, expected)]
    yield from ((key, found[key], expected[key]) for key in expected.keys() - set(gradients))


@pytest.mark.parametrize("name", METHODS)
def test_losses_and_gradients_are_those_of_one_process(found, name):
    alone = one_step(name)
    for process in found:
        assert process[name].keys() == alone.keys()
        for key, ours, theirs in error(process[name], alone):
            ours, theirs = ours.double(), theirs.double()
            assert (ours - theirs).norm() <= 1e-6 * theirs.norm(), key


# ---- As a user starts it -----------------------------------------------------------------------------------
SMALL = ["--data", "small.npz", "--batch", "8", "--width", "4", "--projector", "16-16"]


def torchrun(folder, script, *arguments, count=2):
    """So many processes of a script on small.npz, started, in a group of their own; 1: without torchrun."""
    x = np.random.default_rng(0).integers(0, 255, (40, 8, 8)).astype(np.uint8)
    y = np.arange(40) % 3
    np.savez(folder / "small.npz", train_images=x, train_labels=y, test_images=x[:9], test_labels=y[:9])
    command = [sys.executable, str(ROOT / script), *arguments]
    if count > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    return subprocess.Popen(command, cwd=folder, text=True, start_new_session=True, env=ONE_THREAD,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def until_it_trains(started, folder):
    while not (folder / "run" / "metrics.jsonl").exists():
        assert started.poll() is None, started.communicate()[1]
        time.sleep(0.05)


def children(pid):
    """Processes that this one started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:                                                      # it has just ended
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return sorted(found)


def test_a_run_of_two_processes_is_ended_by_a_signal_and_goes_on_in_one(tmp_path):
    started = torchrun(tmp_path, "vicreg.py", *SMALL, "--epochs", "60", "--out", "run")
    until_it_trains(started, tmp_path)
    started.send_signal(signal.SIGTERM)
    stdout, stderr = started.communicate(timeout=60)
    assert started.returncode != 0
    assert stdout.count("data: 40 train") == 1                               # one process speaks
    line, = [line for line in stderr.splitlines() if "vicreg.py: ended by" in line]
    assert line.endswith("--resume run")
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert len(state["generators"]) == 2
    assert 0 < state["schedule"]["last_epoch"] < 300

    done = forked.run(ROOT / "vicreg.py", ["--resume", "run"], tmp_path)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [*range(1, 61)]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["vicreg.py", "icone.py", "falcon.py", "ba_ssl.py"])
def test_two_processes_to_the_end(tmp_path, script):
    options = ["--data", "small.npz", "--batch", "8", "--width", "4", "--epochs", "3", "--out", "run"]
    started = torchrun(tmp_path, script, *options)
    stdout, stderr = started.communicate(timeout=300)
    assert started.returncode == 0, stderr
    assert stdout.count("trained encoder") == 1
    assert {"report.json", "encoder.pt", "features.npz", "neighbours.png"} <= {
        file.name for file in (tmp_path / "run").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_where_one_process_fails_all_end_within_a_minute(tmp_path, victim):
    started = torchrun(tmp_path, "vicreg.py", *SMALL, "--epochs", "30000", "--out", "run")
    until_it_trains(started, tmp_path)
    workers = children(started.pid)
    assert len(workers) == 2
    os.kill(workers[victim], signal.SIGKILL)
    began = time.monotonic()
    _, stderr = started.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert started.returncode != 0
    assert f"rank      : {victim}" in stderr and "Signal 9" in stderr
    assert "Traceback" not in stderr.split("ChildFailedError")[0].rsplit("Traceback", 1)[0]      # but torchrun's own
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["config"]["epochs"] == 30000


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    """README: .860 ± .010, .885 ± .012 over three seeds."""
    reached = []
    for seed in range(3):
        out = tmp_path / str(seed)
        started = torchrun(tmp_path, "vicreg.py", "--seed", str(seed), "--out", str(out))
        _, stderr = started.communicate(timeout=900)
        assert started.returncode == 0, stderr
        reached.append(json.loads((out / "report.json").read_text())["probes"]["trained encoder"])
    assert np.mean([probes["k-NN"] for probes in reached]) >= 0.860 - 0.010
    assert np.mean([probes["linear"] for probes in reached]) >= 0.885 - 0.012


@pytest.mark.slow
def test_a_mistake_of_all_processes_is_told_once(tmp_path):
    started = torchrun(tmp_path, "vicreg.py", *SMALL, "--batch", "7")
    _, stderr = started.communicate(timeout=60)
    assert started.returncode != 0
    assert stderr.count("--batch 7 is that of all 2 processes") == 1


# ---- 50 kills ----------------------------------------------------------------------------------------------
SCRIPTS = ["vicreg.py", "icone.py", "falcon.py", "ba_ssl.py"]
# Random moments, and those at which a file is being written or has just been.
MOMENTS = ["last.pt.part", "report.json", "encoder.pt", "features.npz.part", *range(6)]
KILLS = [(script, 1, moment) for script in SCRIPTS for moment in MOMENTS]
KILLS += [(script, 2, moment) for script in SCRIPTS for moment in ("last.pt.part", "report.json", 0)]


def whole_files(folder):
    """Every file that has its name can be read to its end."""
    for file in folder.glob("*"):
        if file.suffix in (".json", ".jsonl"):
            lines = [file.read_text()] if file.suffix == ".json" else file.read_text().splitlines()
            assert all(json.loads(line) for line in lines)
        elif file.suffix == ".pt":
            load_checkpoint(file)
        elif file.suffix == ".npz":
            assert all(array is not None for array in np.load(file).values())
        elif file.suffix == ".png":
            Image.open(file).load()


def outcome(folder):
    """Metrics, report, features and weights of a finished run."""
    features = np.load(folder / "features.npz")
    weights = torch.load(folder / "encoder.pt", weights_only=True)["state_dict"]
    numbers = [features["train_features"], features["test_features"], *(weight.numpy() for weight in weights.values())]
    return (folder / "metrics.jsonl").read_text(), json.loads((folder / "report.json").read_text()), numbers


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """outcome(folder) of a whole run of a script in so many processes, and the seconds it took; made once."""
    @functools.cache
    def of(script, count):
        folder = tmp_path_factory.mktemp("whole")
        began = time.monotonic()
        started = torchrun(folder, script, *KILLED, count=count)
        _, stderr = started.communicate(timeout=300)
        assert started.returncode == 0, stderr
        return *outcome(folder / "run"), time.monotonic() - began
    return of


KILLED = ["--data", "small.npz", "--batch", "8", "--width", "4", "--epochs", "12", "--out", "run"]


@pytest.mark.slow
@pytest.mark.parametrize("script, count, moment", KILLS)
def test_a_kill_at_any_moment_loses_nothing(script, count, moment, uninterrupted, tmp_path):
    metrics, report, numbers, seconds = uninterrupted(script, count)
    started = torchrun(tmp_path, script, *KILLED, count=count)
    folder = tmp_path / "run"
    if isinstance(moment, str):
        while started.poll() is None and not (folder / moment).exists():
            pass
    else:
        time.sleep(random.Random(f"{script} {moment}").uniform(0.2, 1) * seconds)
    for process in [*children(started.pid), started.pid]:
        with contextlib.suppress(ProcessLookupError):                        # it has ended by itself
            os.kill(process, signal.SIGKILL)
    started.communicate()
    if folder.exists():
        whole_files(folder)
    again = ["--resume", "run"] if (folder / "last.pt").exists() else KILLED
    resumed = torchrun(tmp_path, script, *again, count=count)
    _, stderr = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, stderr
    metrics_again, report_again, numbers_again = outcome(folder)
    if count == 1:
        assert metrics_again == metrics and report_again == report
        assert all(np.array_equal(a, b) for a, b in zip(numbers, numbers_again))
    for a, b in zip(numbers, numbers_again):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
