"""kernels/harness/processes.py: several processes, gloo on this machine: the same losses and gradients as one, runs that
start by torchrun, signals and kills that end them.
"""
import contextlib
import functools
import json
import os
import random
import signal
import time

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image

from kernels.harness.files import load_checkpoint
from kernels.harness import processes
from kernels.harness.processes import all_gather_object, data_parallel, local_slice
from scripts import ALL, SMALL, children, forked, saved, small_arrays, torchrun, until_it_trains
from small import small_model

pytestmark = pytest.mark.usefixtures("one_thread")
BATCH, COUNT = 16, 40


def one_step(name):
    """Terms and gradients of one batch, of which this process has its part of the views."""
    generator = torch.Generator().manual_seed(1)
    views = torch.rand(2, BATCH, 1, 12, 12, generator=generator)
    index = torch.randperm(COUNT, generator=generator)[:BATCH]
    own = local_slice(BATCH)
    model = small_model(name, BATCH, COUNT)
    parallel = data_parallel(model)                                          # averages for as long as it lives
    takes_index = name == "icone" or name.startswith("ba ")
    terms, notes = parallel(views[0, own], views[1, own], *[index] * takes_index)
    sum(terms.values()).backward()
    found = {name: value.detach() for name, value in terms.items()}
    found.update({name: torch.as_tensor(value).detach() for name, value in notes.items()})
    found.update({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    if name == "icone":
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
@pytest.fixture
def here(tmp_path):
    """A folder where small.npz is."""
    saved(**small_arrays())(tmp_path)
    return tmp_path


def test_a_run_of_two_processes_is_ended_by_a_signal_and_goes_on_in_one(here):
    started = torchrun("vicreg.py", [*SMALL.split(), "--epochs", "60", "--out", "run"], here)
    until_it_trains(started, here)
    started.send_signal(signal.SIGTERM)
    stdout, stderr = started.communicate(timeout=60)
    assert started.returncode != 0
    assert stdout.count("data: 40 train") == 1                               # one process speaks
    line, = [line for line in stderr.splitlines() if "vicreg.py: ended by" in line]
    assert line.endswith("--resume run")
    state = torch.load(here / "run" / "last.pt", weights_only=True)
    assert len(state["generators"]) == 2
    assert 0 < state["schedule"]["last_epoch"] < 300

    done = forked("vicreg.py", ["--resume", "run"], here)
    assert done.returncode == 0, done.stderr
    lines = (here / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [*range(1, 61)]


@pytest.mark.slow
@pytest.mark.parametrize("script", ALL)
def test_two_processes_to_the_end(here, script):
    started = torchrun(script, [*SMALL.split(), "--out", "run"], here)
    stdout, stderr = started.communicate(timeout=300)
    assert started.returncode == 0, stderr
    assert stdout.count("trained encoder") == 1
    assert {"report.json", "encoder.pt", "features.npz", "neighbours.png"} <= {
        file.name for file in (here / "run").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_where_one_process_fails_all_end_within_a_minute(here, victim):
    started = torchrun("vicreg.py", [*SMALL.split(), "--epochs", "30000", "--out", "run"], here)
    until_it_trains(started, here)
    workers = children(started.pid)
    assert len(workers) == 2
    os.kill(workers[victim], signal.SIGKILL)
    began = time.monotonic()
    _, stderr = started.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert started.returncode != 0
    assert f"rank      : {victim}" in stderr and "Signal 9" in stderr
    assert "Traceback" not in stderr.split("ChildFailedError")[0].rsplit("Traceback", 1)[0]      # but torchrun's own
    assert torch.load(here / "run" / "last.pt", weights_only=True)["config"]["epochs"] == 30000


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    """The front page: .860 ± .010, .885 ± .012 over three seeds."""
    reached = []
    for seed in range(3):
        out = tmp_path / str(seed)
        started = torchrun("vicreg.py", ["--seed", seed, "--out", out], tmp_path)
        _, stderr = started.communicate(timeout=900)
        assert started.returncode == 0, stderr
        reached.append(json.loads((out / "report.json").read_text())["probes"]["trained encoder"])
    assert np.mean([probes["k-NN"] for probes in reached]) >= 0.860 - 0.010
    assert np.mean([probes["linear"] for probes in reached]) >= 0.885 - 0.012


@pytest.mark.slow
def test_a_mistake_of_all_processes_is_told_once(here):
    started = torchrun("vicreg.py", [*SMALL.split(), "--batch", "7"], here)
    _, stderr = started.communicate(timeout=60)
    assert started.returncode != 0
    assert stderr.count("--batch 7 is that of all 2 processes") == 1


# ---- 50 kills ----------------------------------------------------------------------------------------------
KILLED = [*SMALL.split(), "--epochs", "12", "--out", "run"]
# Random moments, and those at which a file is being written or has just been.
MOMENTS = ["last.pt.part", "report.json", "encoder.pt", "features.npz.part", *range(6)]
KILLS = [(script, 1, moment) for script in ALL for moment in MOMENTS]
KILLS += [(script, 2, moment) for script in ALL for moment in ("last.pt.part", "report.json", 0)]


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
        saved(**small_arrays())(folder)
        began = time.monotonic()
        started = torchrun(script, KILLED, folder, count)
        _, stderr = started.communicate(timeout=300)
        assert started.returncode == 0, stderr
        return *outcome(folder / "run"), time.monotonic() - began
    return of


@pytest.mark.slow
@pytest.mark.parametrize("script, count, moment", KILLS)
def test_a_kill_at_any_moment_loses_nothing(script, count, moment, uninterrupted, here):
    metrics, report, numbers, seconds = uninterrupted(script, count)
    started = torchrun(script, KILLED, here, count)
    folder = here / "run"
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
    resumed = torchrun(script, again, here, count)
    _, stderr = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, stderr
    metrics_again, report_again, numbers_again = outcome(folder)
    if count == 1:
        assert metrics_again == metrics and report_again == report
        assert all(np.array_equal(a, b) for a, b in zip(numbers, numbers_again))
    for a, b in zip(numbers, numbers_again):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("count, begin", [(1, "python"), (2, "torchrun --standalone --nproc_per_node=2")])
def test_a_signal_says_how_to_go_on_with_as_many_processes(count, begin, monkeypatch, capsys):
    monkeypatch.setattr(processes, "world_size", lambda: count)
    monkeypatch.setattr(processes.sys, "argv", ["ba_ssl.py"])
    with pytest.raises(SystemExit):
        processes.end_by_signal(signal.SIGTERM, "runs/one")
    assert capsys.readouterr().err.endswith(f"go on with: {begin} ba_ssl.py --resume runs/one\n")
