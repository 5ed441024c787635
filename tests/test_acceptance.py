"""kernels/acceptance.py on the CPU: complete, correctness green, and a bar that fails is one row that fails."""
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from kernels import acceptance
from kernels.launch import triton

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A run with one bar out of reach: the process, and its JSON file."""
    folder = tmp_path_factory.mktemp("acceptance")
    command = [sys.executable, "-m", "kernels.acceptance", "--out", folder, "--quick", "--bar", "repeats torch=-1"]
    environment = dict(os.environ, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done, json.loads((folder / "acceptance.json").read_text())


def test_all_of_part_a_is_green_but_for_the_bar_out_of_reach(quick):
    done, report = quick
    rows = {row["name"]: row for row in report["rows"] if row["part"] == "A"}
    failed = rows.pop("repeats torch")
    assert failed["verdict"] == "FAIL" and failed["figure"] == 0 and failed["bar"] == -1
    assert done.returncode == 1
    missing = [name for name, row in rows.items() if row["verdict"] == "not here"]
    gpu = {f"{check} {impl}" for check in ("graph", "stream", "waiting") for impl in ("torch", "triton")}
    assert set(missing) == gpu if triton else set(missing) > gpu
    for name, row in rows.items():
        assert name in missing or row["verdict"] == "PASS", (row, done.stderr)


def test_the_rest_still_runs_and_all_of_it_is_in_the_table(quick):
    done, report = quick
    names = [row["name"] for row in report["rows"]]
    assert len(report["times"]) == 3
    assert names.index("repeats torch") < names.index("padding torch") < names.index("dictionary 32x4096x64 less")
    for row in report["rows"]:
        line, = (line for line in done.stdout.splitlines() if line.startswith(f"{row['part']}  {row['name']} "))
        assert row["verdict"] in line
        assert row["verdict"] != "not here" or row["note"]


def test_a_bar_that_there_is_not_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["acceptance", "--out", str(tmp_path), "--bar", "speed=1"])
    with pytest.raises(SystemExit):
        acceptance.main()
    assert "no bar named speed" in capsys.readouterr().err


@pytest.mark.parametrize("end, words", [
    (lambda: os.kill(os.getpid(), signal.SIGKILL), "ended with code -9"), (lambda: signal.pause(), "stopped after"),
    (lambda: 1 / 0, "ZeroDivisionError")])
def test_a_group_that_dies_hangs_or_raises_loses_only_what_was_to_come(end, words, monkeypatch):
    def answers(group, device, quick):
        yield "first", 3.
        end()
    monkeypatch.setattr(acceptance, "answers", answers)
    monkeypatch.setattr(acceptance, "GROUP_LIMIT", 1)
    found = acceptance.collect("torch", "cpu", True, limit=1)
    assert found["first"] == 3.
    verdict, note = found[""]
    assert verdict == "FAIL" and words in note


def test_a_group_that_the_others_left_no_time_has_not_failed(monkeypatch):
    monkeypatch.setattr(acceptance, "answers", lambda *which: signal.pause())
    assert acceptance.collect("torch", "cpu", True, limit=0)[""] == (
        "not here", "no time was left: run it again, compiled kernels are kept")


def test_a_group_that_hangs_with_time_enough_has_failed(monkeypatch):
    monkeypatch.setattr(acceptance, "answers", lambda *which: signal.pause())
    monkeypatch.setattr(acceptance, "GROUP_LIMIT", 2.5)
    assert acceptance.collect("torch", "cpu", True, limit=1)[""] == ("FAIL", "stopped after 1 s")


def test_a_form_of_ours_that_is_wrong_is_no_note_beside_a_pass(monkeypatch):
    monkeypatch.setattr(acceptance, "check", lambda case: [("torch", "disagrees with float64")])
    with pytest.raises(AssertionError, match="torch: disagrees"):
        acceptance.measured("bank", (8, 100, 16), "cpu", True)


@pytest.mark.parametrize("sense, figure, verdict", [
    ("<=", 1, "PASS"), ("<=", 1.1, "FAIL"), (">=", 1, "PASS"), (">=", .9, "FAIL"), ("<=", float("nan"), "FAIL"),
    (">=", float("nan"), "FAIL"), ("<=", ("not here", "needs a GPU"), "not here")])
def test_verdicts(sense, figure, verdict):
    assert acceptance.judge(acceptance.Bar("speed", sense, 1), figure, "A").verdict == verdict


def test_every_check_has_a_bar_and_every_size_a_case():
    assert acceptance.CHECKS.keys() == acceptance.BARS.keys()
    for device in ("cuda", "cpu"):
        for group, bars in acceptance.groups(device, quick=False).items():
            assert bars, group


def broken(form):
    def refuse(*inputs):
        raise torch.OutOfMemoryError("64 GiB")
    return {"breaks": refuse, "wrong": lambda z: 2 * form(z)}


@pytest.mark.parametrize("how", ["breaks", "wrong"])
@pytest.mark.parametrize("form", ["textbook", "facebookresearch", "torch"])
def test_a_form_that_breaks_or_is_wrong_is_named_and_the_others_are_timed(form, how, monkeypatch):
    case = acceptance.case_of("covariance", (8, 20), "cpu")
    if (form, how) == ("textbook", "wrong"):
        pytest.skip("it is what the others are held to")
    forms = {**case.forms, form: broken(case.forms[form])[how]}
    monkeypatch.setattr(acceptance, "case_of", lambda *arguments: case._replace(forms=forms))
    answer = partial(acceptance.figures, "covariance", (8, 20), "cpu", True)
    if form == "torch":
        with pytest.raises(AssertionError, match="torch: .*64 GiB" if how == "breaks" else "disagrees with float64"):
            list(answer())
        return
    found = dict(answer())
    assert isinstance(found["times"][form], str)
    assert found["covariance 8x20 of the fastest"] > 0
    if form == "textbook":
        assert acceptance.outcome(found["covariance 8x20 faster"]) == ("not here", "textbook: OutOfMemoryError: 64 GiB")
    else:
        assert found["covariance 8x20 faster"] > 0
