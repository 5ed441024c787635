"""python -m kernels.compare as its user runs it."""
import json
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from scripts import ONE_THREAD, ROOT, SMALL, call, call_command


def run_compare(folder, *arguments):
    return call_command("compare", folder, *arguments)


@pytest.fixture
def runs(finished):
    assert call(finished, *SMALL.split(), "--lr", "0.01", "--epochs", "2", "--out", "other") == 0
    return finished


def test_a_table_the_options_that_differ_and_a_picture(runs):
    done = run_compare(runs, "run", "other")
    assert done.returncode == 0, done.stderr
    table, options, last = done.stdout.strip().split("\n\n")
    header, first, second = [line.split() for line in table.splitlines()]
    for name, row in (("run", first), ("other", second)):
        report = json.loads((runs / name / "report.json").read_text())
        assert row[0] == name and row[1] == str({"run": 3, "other": 2}[name])
        assert row[header.index("k-NN") + 1] == f"{report['probes']['trained encoder']['k-NN']:.4g}"
        assert f"{report['panels']['projector z']['RankMe']:.4g}" in row
        assert report["verdict"].split(":")[0] in table
    lines = {line.split()[0]: line.split()[1:] for line in options.splitlines()[1:]}
    assert lines["lr"] == ["0.003", "0.01"] and lines["epochs"] == ["3", "2"] and lines["projector"]
    assert lines.keys() == {"run", "lr", "epochs", "projector"}
    assert last == "compare.png" and Image.open(runs / "compare.png").size[0] > 1000


def test_a_run_that_has_not_ended_and_other_images(runs):
    (runs / "other" / "report.json").unlink()
    config = json.loads((runs / "other" / "config.json").read_text())
    (runs / "other" / "config.json").write_text(json.dumps(config | {"digest": 1}))
    done = run_compare(runs, "run", "other", "--out", "c.svg")
    assert done.returncode == 0 and "not ended" in done.stdout and (runs / "c.svg").exists()
    assert "note: these runs have different images or labels" in done.stdout


def test_a_run_that_is_being_made_longer_has_no_old_accuracies(runs):
    config = json.loads((runs / "other" / "config.json").read_text())
    (runs / "other" / "config.json").write_text(json.dumps(config | {"epochs": 4}))      # as --resume leaves it
    done = run_compare(runs, "run", "other")
    other, = [line.split() for line in done.stdout.split("\n\n")[0].splitlines() if line.startswith("other")]
    assert other[:2] == ["other", "2"] and other[2:] == ["not", "ended"]


def test_a_rank_that_is_no_number_and_a_name_that_the_terminal_cannot_show(runs):
    lines = (runs / "other" / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0]) | {"RankMe": float("nan")}
    (runs / "other" / "metrics.jsonl").write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    (runs / "other").rename(runs / "\u8d70")
    done = subprocess.run([sys.executable, "-m", "kernels.compare", "run", "\u8d70"], cwd=runs, capture_output=True,
                          env={**ONE_THREAD, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0 and b"\\u8d70" in done.stdout, done.stderr


def test_runs_that_have_not_ended_an_epoch(runs):
    for name in ("run", "other"):
        (runs / name / "report.json").unlink()
        (runs / name / "metrics.jsonl").write_text("")
    done = run_compare(runs, "run", "other")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("no picture: no run has ended an epoch yet") and not (runs / "compare.png").exists()


def test_a_run_beside_itself(runs):
    shutil.copytree(runs / "run", runs / "copy")
    assert "no options differ" in run_compare(runs, "run", "copy").stdout


@pytest.mark.parametrize("arguments, words", [
    ([], "required: runs"), (["run", "nowhere"], "nowhere is not the folder of a run"),
    (["run", "--out", "x.jpeg"], "its ending must be"), (["run", "--out", "no/c.png"], "cannot write no/c.png")])
def test_mistakes_end_in_one_line(finished, arguments, words):
    done = run_compare(finished, *arguments)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
