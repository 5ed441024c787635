"""python -m kernels.compare as its user runs it."""
import json
import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from kernels.harness import pictures
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


def test_the_report_of_a_run_that_was_made_longer_since_is_old(runs):
    """It stays until the next one is written, for good if that is never."""
    report = runs / "other" / "report.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | {"epochs": 1}))
    table, *_ = run_compare(runs, "run", "other").stdout.split("\n\n")
    _, first, other = [line.split() for line in table.splitlines()]
    assert other == ["other", "2", "not", "ended"] and "ended" not in first


def test_an_option_that_one_of_two_runs_has(runs):
    config = json.loads((runs / "run" / "config.json").read_text())
    (runs / "other" / "config.json").write_text(json.dumps(config | {"epochs": 2, "temperature": .1}))
    config.pop("lr")
    (runs / "run" / "config.json").write_text(json.dumps(config | {"epochs": 2, "note": ""}))
    done = run_compare(runs, "run", "other")
    lines = [line.split() for line in done.stdout.split("\n\n")[1].splitlines()[1:]]
    assert lines == [["run", "other"], ["note", '""', "-"], ["lr", "-", "0.003"], ["temperature", "-", "0.1"]]


def figure_of(runs, monkeypatch, *names):
    """The figure of a comparison, drawn but not saved."""
    figures = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: figures.append(figure))
    done = run_compare(runs, *names)
    assert done.returncode == 0, done.stderr
    figures[0].draw_without_rendering()
    return figures[0]


@pytest.mark.parametrize("length", [4, 40, 100, 200])
def test_a_legend_has_all_runs_however_long_their_names(runs, monkeypatch, length):
    names = [f"{k}{'/' if length == 200 else ''}{'x' * (length - 2)}" for k in range(5)]
    for name in names:
        shutil.copytree(runs / "run", runs / name)
    figure = figure_of(runs, monkeypatch, *names)
    box = figure.legends[0].get_window_extent()
    assert 0 <= box.x0 and box.x1 <= figure.bbox.x1 and 0 <= box.y0
    assert len(figure.legends[0].get_texts()) == 5 and all(axis.bbox.y0 > box.y1 for axis in figure.axes)


def test_one_epoch_has_an_axis_of_whole_numbers(runs, monkeypatch):
    for name in ("run", "other"):
        first, *_ = (runs / name / "metrics.jsonl").read_text().splitlines()
        (runs / name / "metrics.jsonl").write_text(first + "\n")
    for axis in figure_of(runs, monkeypatch, "run", "other").axes:
        low, high = axis.get_xlim()
        assert [tick for tick in axis.get_xticks() if low <= tick <= high] == [1, 2]


def test_letters_that_the_font_lacks_and_a_reader_that_stops(runs):
    (runs / "other").rename(runs / "\u65e5\u672c-1")
    command = [sys.executable, "-m", "kernels.compare", "run", "\u65e5\u672c-1"]
    environment = {**ONE_THREAD, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=runs, capture_output=True, env=environment)
    assert done.returncode == 0 and not done.stderr and (runs / "compare.png").exists()
    read, write = os.pipe()
    os.close(read)                                                   # as head leaves it
    done = subprocess.run(command, cwd=runs, stdout=write, stderr=subprocess.PIPE, env=environment)
    os.close(write)
    assert not done.stderr


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "report.json"])
def test_a_file_of_another_kind_is_refused_in_one_line(runs, name):
    (runs / "other" / name).write_text("[1, 2]\n")
    done = run_compare(runs, "run", "other")
    assert done.returncode == 2 and "other is not the folder of a run" in done.stderr and done.stderr.count("\n") == 1


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


def test_runs_of_other_scripts_that_log_other_things(runs):
    (runs / "other" / "metrics.jsonl").write_text('{"epoch": 1, "accuracy": 0.5}\n')
    report = json.loads((runs / "other" / "report.json").read_text())
    report["epochs"] = report["probes"]["trained encoder"]["k-NN"] = None
    (runs / "other" / "report.json").write_text(json.dumps(report))
    done = run_compare(runs, "other")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("no picture: no run has logged any of what it shows")


def test_a_run_beside_itself(runs):
    shutil.copytree(runs / "run", runs / "copy")
    assert "no options differ" in run_compare(runs, "run", "copy").stdout


@pytest.mark.parametrize("arguments, words", [
    ([], "required: runs"), (["run", "nowhere"], "nowhere is not the folder of a run"),
    (["run", "--out", "x.jpeg"], "its ending must be"), (["run", "--out", "no/c.png"], "cannot write no/c.png")])
def test_mistakes_end_in_one_line(finished, arguments, words):
    done = run_compare(finished, *arguments)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
