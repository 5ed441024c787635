"""kernels/harness/run.py, and the four training loops that iterate it: what each of them must do, held on small models in
this process; and whole runs that signals, kills and losses that are not finite end.
"""
import copy
import json
import os
import random
import re
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kernels.harness import run as harness_run
from kernels.harness.files import load_checkpoint
from kernels.harness.order import through_window
from kernels.harness.views import posed_view
from scripts import ALL, ONE, SMALL, command, interrupted, killed_and_resumed
from small import LOOPS, small_data, small_model, small_options, train

pytestmark = pytest.mark.usefixtures("one_thread")
each_loop = pytest.mark.parametrize("name", LOOPS)


# ---- What every loop does ----------------------------------------------------------------------------------
@each_loop
def test_learning_rate_rises_for_a_tenth_and_falls_to_zero(name):
    learning_rate = LOOPS[name].learning_rate
    rates = [learning_rate(step, steps=100, batch=512) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == 2
    assert rates[10] == 2
    assert rates[55] == pytest.approx(1)
    assert rates[100] == pytest.approx(0)
    assert learning_rate(1, steps=1, batch=512) == 2                 # asked for after the last step
    assert rates == [LOOPS["vicreg"].learning_rate(step, steps=100, batch=512) for step in range(101)]


class Watched(harness_run.Run):
    """A run that notes what its loop does in each step and at the end of each epoch."""

    def start(self, model, optimizer, schedule):
        self.optimizer = optimizer
        self.images, self.rates, self.modes, self.losses, self.gradients = [], [], [], [], []
        return super().start(model, optimizer, schedule)

    def steps(self):
        for step in super().steps():
            before, state = copy.deepcopy(self.model), torch.get_rng_state()
            self.images.append([])
            self.losses.append([])
            self.rates.append(self.optimizer.param_groups[0]["lr"])
            yield step
            self.gradients.append((before, state, step, [weight.grad.clone() for weight in self.model.parameters()]))

    def own(self, index):
        self.images[-1].append(index)
        self.modes.append(("step", self.model.training))
        return super().own(index)

    def log(self, numbers):
        self.losses[-1].append(numbers["loss"].item())
        super().log(numbers)

    def end_epoch(self, measured):
        self.modes.append(("end", self.model.training))
        super().end_epoch(measured)


def as_it_is(x, generator):
    """A view in which nothing is drawn."""
    return x


@pytest.fixture(scope="module", params=LOOPS)
def watched(request, tmp_path_factory, one_thread):
    """A run of 4 epochs of 3 steps of 2 batches of 4 of 26 images, its beta at 1."""
    data = small_data(as_it_is, count=26)
    model = small_model(request.param, count=26)
    folder = tmp_path_factory.mktemp("watched")
    return train(request.param, model, data, folder, kind=Watched, beta_rise=0.)


def test_training_sees_each_image_once_an_epoch_and_drops_the_rest(watched):
    """26 images at 8 a step: 24 of them, in an order of their own each epoch."""
    assert len(watched.images) == 4 * 3
    assert all(len(batch) == 4 for step in watched.images for batch in step)
    epochs = [torch.cat(sum(watched.images[first:first + 3], [])) for first in (0, 3, 6, 9)]
    for epoch in epochs:
        assert len(epoch.unique()) == 24
    assert not torch.equal(epochs[0], epochs[1])


def test_steps_are_in_train_mode_and_epochs_end_in_eval_mode(watched):
    assert watched.modes == 4 * [*6 * [("step", True)], ("end", False)]


def test_a_loss_may_be_a_plain_number(tmp_path):
    """The bar shows it in the tenth step."""
    args = SimpleNamespace(device="cpu", seed=0, batch=4, accumulate=1, epochs=1)
    run = harness_run.Run(args, SimpleNamespace(images=range(8)), tmp_path, None)
    run.log({"loss": 0.5, "other": 2, "undefined": float("nan")})
    run.model = torch.nn.Linear(2, 2)
    run.check_finite()                                               # what is only logged may be none
    assert run.loss.item() == 0.5
    run.log({"loss": float("nan")})
    run.bar = SimpleNamespace(close=lambda: None)
    with pytest.raises(SystemExit):
        run.check_finite()


def test_means_of_numbers_in_bf16_do_not_stop_growing(tmp_path):
    args = SimpleNamespace(device="cpu", seed=0, batch=4, accumulate=1, epochs=1)
    run = harness_run.Run(args, SimpleNamespace(images=range(8)), tmp_path, None)
    for _ in range(1437):
        run.log({"loss": torch.tensor(.1, dtype=torch.bfloat16)})
    assert run.sums["loss"].item() / 1437 == pytest.approx(.1, rel=4e-3)


def test_each_step_has_the_schedules_rate(watched):
    expected = [1e-3 * LOOPS["vicreg"].learning_rate(step, steps=12, batch=8) for step in range(12)]
    assert watched.rates == pytest.approx(expected)


def test_accumulated_batches_make_one_step_of_their_mean_gradient_and_no_other(watched):
    """Made again from the weights and the random state before each step, by a model that has no gradient yet."""
    steps = {float(part["step"]) for part in watched.optimizer.state.values()}
    assert steps == {12}
    data = small_data(as_it_is, count=26)
    for (model, state, step, gradients), losses in zip(watched.gradients, watched.losses, strict=True):
        assert all(weight.grad is None for weight in model.parameters())
        with torch.random.fork_rng():
            torch.set_rng_state(state)
            for index, loss in zip(step, losses, strict=True):
                x = data.images[index] / 255
                takes_index = hasattr(model, "table") or hasattr(model, "fusion")
                terms, _ = model(x, x, *[index] * takes_index)
                total = sum(terms.values())
                assert total.item() == pytest.approx(loss, rel=1e-6)
                (total / 2).backward()
        for weight, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(weight.grad, gradient)


# ---- Signals and checkpoints inside an epoch ---------------------------------------------------------------
@each_loop
def test_a_signal_inside_an_epoch_saves_the_step_and_the_run_goes_on_to_the_bit(name, tmp_path, capsys):
    whole = train(name, small_model(name), small_data(), tmp_path / "whole")
    weights = whole.model.state_dict()
    for attempt in range(5):
        folder = tmp_path / f"run{attempt}"
        rng = random.Random(attempt)
        left = rng.randrange(1, 48)
        if attempt == 0:
            left = 48                                                # the last of all views
        number = rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP])

        def view(x, generator):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), number)
            return posed_view(x, generator)

        with pytest.raises(SystemExit) as end:
            train(name, small_model(name), small_data(view), folder)
        assert end.value.code == 128 + number
        line, = [line for line in capsys.readouterr().err.splitlines() if "--resume" in line]
        assert f"ended by {number.name}" in line and str(folder) in line
        state = load_checkpoint(folder / "last.pt")
        again = train(name, small_model(name), small_data(), folder, state)
        assert again.history == whole.history
        assert all(torch.equal(weights[key], weight) for key, weight in again.model.state_dict().items())


def test_a_checkpoint_within_an_epoch_is_no_older_than_save_minutes(tmp_path, monkeypatch):
    now = iter(range(0, 10**6, 400))                                 # each look at the clock is 400 s later
    monkeypatch.setattr(harness_run.time, "monotonic", lambda: next(now))
    saves = []
    monkeypatch.setattr(harness_run.torch, "save", lambda state, file: saves.append(state["done"]))
    train("vicreg", small_model("vicreg"), small_data(), tmp_path)
    within = [step for step in saves if step]
    assert len(saves) - len(within) == 5                             # the start, and after each of 4 epochs
    assert within == [2, 2, 2, 2]                                    # 800 s after each epoch's end, not 400


class Slow(harness_run.Run):
    """A run whose checkpoint takes much longer than its epochs; it notes after how many it is written."""
    written = []

    def write_checkpoint(self):
        self.written.append(len(self.history))
        super().write_checkpoint()
        harness_run.time.sleep(.3)


def test_a_checkpoint_is_written_where_it_pays_and_a_kill_before_it_costs_no_bits(tmp_path):
    whole = train("icone", small_model("icone"), small_data(), tmp_path / "whole", epochs=12)
    Slow.written.clear()
    left = 2 * 6 * 9 + 3                                             # views of nine epochs and of a step

    def view(x, generator):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt                                  # stands for a SIGKILL: nothing is saved
        return posed_view(x, generator)

    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train("icone", small_model("icone"), small_data(view), folder, kind=Slow, epochs=12)
    assert Slow.written == [0] and len((folder / "metrics.jsonl").read_text().splitlines()) == 9
    again = train("icone", small_model("icone"), small_data(), folder, load_checkpoint(folder / "last.pt"), Slow, epochs=12)
    assert Slow.written == [0, 0, 12]                                # a new start, and the end
    assert again.history == whole.history
    assert all(torch.equal(value, again.model.state_dict()[key]) for key, value in whole.model.state_dict().items())


def test_a_run_through_a_window_that_was_killed_inside_of_one_goes_on_to_the_bit(tmp_path):
    def through(*args):
        return harness_run.Run(*args, through_window(6))

    options = dict(kind=through, epochs=3, batch=1, accumulate=1, save_minutes=0.)       # four windows an epoch
    whole = train("icone", small_model("icone"), small_data(), tmp_path / "whole", **options)
    for left in (2 * 15 + 1, 2 * 32 + 1):

        def view(x, generator):
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            return posed_view(x, generator)

        folder = tmp_path / f"{left}"
        with pytest.raises(KeyboardInterrupt):
            train("icone", small_model("icone"), small_data(view), folder, **options)
        state = load_checkpoint(folder / "last.pt")
        assert state["done"] in (15, 8)
        again = train("icone", small_model("icone"), small_data(), folder, state, **options)
        assert again.history == whole.history
        assert all(torch.equal(value, again.model.state_dict()[key]) for key, value in whole.model.state_dict().items())


# ---- Whole runs --------------------------------------------------------------------------------------------
# ---- Longer ------------------------------------------------------------------------------------------------
@each_loop
def test_more_epochs_go_on_with_a_schedule_of_their_own(name, tmp_path):
    """4 epochs of 3 steps, then 3 more, then one: all else goes on where it stood, the learning rate begins anew."""
    short = train(name, small_model(name), small_data(), tmp_path / "run")
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    longer = train(name, small_model(name), small_data(), tmp_path / "run", state, Watched, epochs=7)
    assert longer.history[:4] == short.history and [line["epoch"] for line in longer.history] == [*range(1, 8)]
    before, *_ = longer.gradients[0]
    for key, value in before.state_dict().items():                   # projector, rows, dictionary, fusion
        assert torch.equal(value, short.model.state_dict()[key]), key
    rate = LOOPS[name].learning_rate
    expected = [1e-3 * rate(step, 9, 8) for step in range(9)]
    assert longer.rates == pytest.approx(expected) and longer.rates[0] > 0
    steps = {float(part["step"]) for part in longer.optimizer.state.values()}
    assert steps == {21}                                             # Adam's moments were kept
    if name == "falcon":
        assert [line["beta"] for line in longer.history[4:]] == [1, 1, 1]

    state = load_checkpoint(tmp_path / "run" / "last.pt")
    last = train(name, small_model(name), small_data(), tmp_path / "run", state, Watched, epochs=8)
    assert last.rates == pytest.approx([1e-3 * rate(step, 3, 8) for step in range(3)])


def test_a_signal_in_added_epochs_and_the_run_goes_on_to_the_bit(tmp_path):
    train("vicreg", small_model("vicreg"), small_data(), tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "whole")

    def added(folder, view=posed_view, epochs=7):
        state = load_checkpoint(folder / "last.pt")
        return train("vicreg", small_model("vicreg"), small_data(view), folder, state, epochs=epochs)

    left = 19

    def view(x, generator):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return posed_view(x, generator)

    whole = added(tmp_path / "whole")
    with pytest.raises(SystemExit):
        added(tmp_path / "run", view)
    again = added(tmp_path / "run")
    assert again.history == whole.history
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key


AGAIN = "--resume runs/vicreg-1"


def keep(name):
    """What copies the run's report and history to a file of this name."""
    def copy_of(folder):
        run = folder / "runs" / "vicreg-1"
        found = {"report": json.loads((run / "report.json").read_text()), "metrics": (run / "metrics.jsonl").read_text()}
        (folder / name).write_text(json.dumps(found))
    return copy_of


def cut_short(folder):
    path = folder / "runs" / "vicreg-1" / "last.pt"
    state = load_checkpoint(path)
    state["history"].pop()
    torch.save(state, path)


@command(f"{SMALL}; {AGAIN} --epochs 5; {AGAIN}; {AGAIN} --epochs 5; {AGAIN} --epochs 2; {AGAIN} --epochs 9",
         between=(keep("before"), keep("after"), keep("again"), lambda folder: None, cut_short))
def test_resume_with_more_epochs_as_a_user_does(run):
    assert [done.returncode for done in run.done] == [0, 0, 0, 2, 2, 2], run.done[1].stderr
    before, after, again = [json.loads((run.folder / name).read_text()) for name in ("before", "after", "again")]
    assert after["metrics"].startswith(before["metrics"]) and after["metrics"].count("\n") == 5
    assert after["report"]["probes"]["random encoder"] == before["report"]["probes"]["random encoder"]
    assert after["report"] != before["report"] and again == after    # that has ended, too
    assert json.loads((run.folder / "runs" / "vicreg-1" / "config.json").read_text())["epochs"] == 5
    for done, words in zip(run.done[3:], ("--epochs 5: the run stands at 5 of its 5", "--epochs 2: the run stands at 5 of its 5",
                                          "--epochs 9: the run stands at 4 of its 5; once it has ended it can be made longer")):
        assert words in done.stderr


# ---- Whole runs that are ended -----------------------------------------------------------------------------
@command(f"{SMALL} --epochs 16", scripts=ALL, way=killed_and_resumed, slow=["icone.py", "falcon.py", "ba_ssl.py"])
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


@pytest.mark.parametrize("epochs, probed", [(3, 3), (8, 8), (16, 8), (45, 9)])
def test_some_eight_epochs_are_probed(epochs, probed, tmp_path):
    run = harness_run.Run(small_options(epochs=epochs), small_data(), tmp_path)
    count = 0
    for number in range(epochs):
        run.history = [{}] * number
        count += run.probing()
    assert count == probed


@command(f"{SMALL} --epochs 3000", scripts=ONE, way=interrupted)
def test_ctrl_c_ends_in_one_line_that_says_how_to_go_on(run):
    assert run.returncode == 130
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("vicreg.py: ended by SIGINT") and last.endswith("vicreg.py --resume run")
    state = torch.load(run.folder / "run" / "last.pt", weights_only=True)
    assert state["schedule"]["last_epoch"] > 0


@command(f"{SMALL} --lr 1e20 --batch 16 --epochs 1", scripts=ALL, slow=["icone.py", "ba_ssl.py"])
def test_features_that_are_not_finite_end_the_run_in_one_line(run):
    """One step, whose weights are large, and finite."""
    assert run.returncode == 2
    *_, bar, line, nothing = run.stderr.split("\n")
    assert re.fullmatch(f"{run.script}: .* not finite.*: start anew, with a lower --lr", line) and nothing == ""


@command(f"{SMALL} --lr 1e30", scripts=ALL)
def test_a_loss_that_is_not_finite_stops_the_run(run):
    assert run.returncode == 2
    assert re.search(rf"{run.script}: loss or weights are not finite in epoch \d: .*lower --lr", run.stderr)
    *_, bar, line, nothing = run.stderr.split("\n")                  # a bar is drawn over itself: by "\r"
    assert "step/s" in bar
    assert line.startswith(f"{run.script}: loss or weights") and "\r" not in line
    assert nothing == ""
