"""Runs beside each other: one table, the options in which they differ, one picture.

    python -m kernels.compare runs/vicreg-1 runs/vicreg-2 --out compare.png

Accuracies, where there are labels, and the panel are those at the end (report.json); over epochs the picture
has what metrics.jsonl has: the loss, RankMe of z and k-NN accuracy. The cells of a run that has not ended
are empty.
"""
import argparse
import json
import math
import sys
from pathlib import Path

from .harness.processes import for_a_reader, print_any_name

COLUMNS = "k-NN", "linear", "1 a class", "5 a class", "10 a class"       # of the trained encoder
PANEL = "RankMe", "participation", "raw std", "cosine", "view ratio"     # of z
PANELS = {"knn": "k-NN accuracy, test features", "RankMe": "RankMe of z, up to 256 test images",
          "loss": "loss"}
STYLES = "-", "--", "-.", ":"
NO_OPTIONS = "encoder", "digest", "numbers", "version", "out", "resume", "device"


def refuse(message):
    print(f"compare: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def read_run(folder):
    """{"name", "config", "history", "report"} of a run's folder; report None if it has not ended."""
    try:
        config = json.loads((folder / "config.json").read_text())
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        history = [json.loads(line) for line in lines]
        report = folder / "report.json"
        report = json.loads(report.read_text()) if report.exists() else None
        if not all(isinstance(part, dict) for part in (config, *history, report or {})):
            raise ValueError("its files do not hold what a run writes")
        if report and not config.get("epochs", 0) <= len(history) == report.get("epochs", len(history)):
            report = None                                # it was ended, and is being made longer
    except (OSError, TypeError, ValueError) as error:
        refuse(f"{folder} is not the folder of a run that has begun to train ({error})")
    return {"name": str(folder), "config": config, "history": history, "report": report}


def results(run):
    """{column: text} of a run's row."""
    row = {"epochs": str(len(run["history"]))}
    report = run["report"] or {"probes": {}, "panels": {}, "verdict": "not ended"}
    accuracy = report["probes"].get("trained encoder", {})
    panel = report["panels"].get("projector z", {})
    for names, numbers in ((COLUMNS, accuracy), (PANEL, panel)):
        for name in names:
            known = isinstance(numbers.get(name), int | float)
            row[name] = f"{numbers[name]:.4g}" if known else ""
    row["verdict"] = " / ".join(part.split(":")[0] for part in report["verdict"].split(" The rest: "))
    return row


def differing(runs):
    """{option: [text of each run]} of those that are not the same in all."""
    found = {}
    for name in dict.fromkeys(name for run in runs for name in run["config"]):
        values = [str(run["config"].get(name, "-")) or '""' for run in runs]
        if name not in NO_OPTIONS and len({*values}) > 1:
            found[name] = values
    return found


def print_columns(lines):
    """Lines of cells, each column as wide as its widest cell; columns that are empty in all are left out."""
    names, *columns = zip(*lines)
    columns = [column for column in columns if any(column[1:])]
    padded = []
    for column in columns:
        width = max(map(len, column))
        padded.append([cell.rjust(width + 1) for cell in column])
    width = max(map(len, names))
    for name, *cells in zip(names, *padded):
        print(name.ljust(width), *cells)


def plot(runs, path):
    from matplotlib.figure import Figure

    from .harness.pictures import epoch_axis, plain, save_figure, shortened
    names = [shortened(run["name"], 120) for run in runs]
    width = 0.7 + 0.1 * max(map(len, names))             # of a column of the legend, inches
    columns = min(4, len(runs), max(1, int(12.5 / width)))
    rows = math.ceil(len(runs) / columns)
    figure = Figure(figsize=(13, 4.4 + 0.22 * rows), layout="constrained")
    there = {key for run in runs for line in run["history"] for key in line}
    panels = [key for key in PANELS if key in there]
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, key in zip(axes[0], panels):
        seen = []
        for k, run in enumerate(runs):
            lines = [line for line in run["history"] if key in line]
            epochs = [line["epoch"] for line in lines]
            values = [line[key] for line in lines]
            style = {"color": f"C{k}", "linestyle": STYLES[k % 4]}
            if len(values) < 50:                         # runs that are alike show around each other
                style |= {"marker": "o", "markersize": 9 - 2 * min(k, 3)}
            axis.plot(epochs, values, label=plain(names[k]), alpha=0.8, **style)
            seen += values
        axis.set_title(PANELS[key])
        epoch_axis(axis, max(len(run["history"]) for run in runs))
        if key == "knn":
            axis.set_ylim(0, 1.03)
        elif key == "RankMe":
            axis.set_ylim(0, 1.08 * max(filter(math.isfinite, seen), default=1))
        elif 0 < 20 * min(seen) < max(seen) < math.inf:
            axis.set_yscale("log")
    figure.legend(handles=axis.lines, loc="outside lower center", ncols=columns)
    save_figure(figure, path)


def main():
    print_any_name()
    title, *_ = __doc__.split("\n")
    parser = argparse.ArgumentParser("python -m kernels.compare", description=title, allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--out", type=Path, default="compare.png", help="the picture: compare.png")
    args = parser.parse_args()
    if args.out.suffix.lower() not in (".png", ".pdf", ".svg"):
        refuse(f"--out {args.out}: its ending must be .png, .pdf or .svg")
    runs = [read_run(folder) for folder in args.runs]

    rows = [results(run) for run in runs]
    lines = [["", *rows[0]]]
    for run, row in zip(runs, rows):
        lines.append([run["name"], *row.values()])
    print_columns(lines)
    options = differing(runs)
    if options:
        print("\noptions that differ")
        lines = [["", *(run["name"] for run in runs)]]
        for name, values in options.items():
            lines.append([name, *values])
        print_columns(lines)
    elif len(runs) > 1:
        print("\nno options differ")
    images = {run["config"].get("digest") for run in runs}
    if len({run["config"].get("version") for run in runs}) > 1:
        print("\nnote: these runs are of different versions: whether they are of one test is not known")
    elif len(images) > 1:
        print("\nnote: these runs have different images or labels: their accuracies are not of one test")
    if not any(PANELS.keys() & line.keys() for run in runs for line in run["history"]):
        ended = any(run["history"] for run in runs)
        print("\nno picture: no run has", "logged any of what it shows" if ended else "ended an epoch yet")
        return
    try:
        plot(runs, args.out)
    except OSError as error:
        refuse(f"cannot write {args.out} ({error.strerror})")
    print(f"\n{args.out}")


if __name__ == "__main__":
    with for_a_reader():
        main()
