"""Runs beside each other: one table, the options in which they differ, one picture.

    python -m kernels.compare runs/vicreg-1 runs/vicreg-2 --out compare.png

Accuracies, where there are labels, and the panel are those at the end (report.json); over epochs the picture
has what metrics.jsonl has: the loss, RankMe of z and k-NN accuracy. A run that has not ended has no row of
them yet.
"""
import argparse
import json
import math
import sys
from pathlib import Path

COLUMNS = "k-NN", "linear", "1 a class", "5 a class", "10 a class"       # of the trained encoder
PANEL = "RankMe", "participation", "raw std", "cosine", "view ratio"     # of z
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
    except (OSError, ValueError) as error:
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
            row[name] = f"{numbers[name]:.4g}" if name in numbers else ""
    row["verdict"] = report["verdict"].split(":")[0]
    return row


def differing(runs):
    """{option: [text of each run]} of those that are not the same in all."""
    names = dict.fromkeys(name for run in runs for name in run["config"] if name not in NO_OPTIONS)
    found = {name: [str(run["config"].get(name, "")) for run in runs] for name in names}
    return {name: values for name, values in found.items() if len({*values}) > 1}


def print_columns(lines):
    """Lines of cells, each column as wide as its widest cell; columns that are empty in all are left out."""
    header, *rows = lines
    kept = [k for k in range(len(header)) if k == 0 or any(row[k] for row in rows)]
    widths = [max(len(line[k]) for line in lines) for k in kept]
    for line in lines:
        name, *cells = [line[k] for k in kept]
        print(name.ljust(widths[0]), *(cell.rjust(width + 1) for cell, width in zip(cells, widths[1:])))


def plot(runs, path):
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels = {"knn": "k-NN accuracy, test features", "RankMe": "RankMe of z, up to 256 test images",
              "loss": "loss"}
    there = {key for run in runs for line in run["history"] for key in line}
    panels = {key: title for key, title in panels.items() if key in there}
    for axis, (key, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for k, run in enumerate(runs):
            points = [(line["epoch"], line[key]) for line in run["history"] if key in line]
            if points:
                marker = "o" if len(points) < 50 else ""
                style = {"linestyle": ("-", "--", "-.", ":")[k % 4], "markersize": 9 - 2 * min(k, 3)}
                axis.plot(*zip(*points), marker=marker, label=run["name"], color=f"C{k}", alpha=0.8, **style)
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        values = [line[key] for run in runs for line in run["history"] if key in line]
        if key != "loss":
            axis.set_ylim(0, 1.03 if key == "knn" else 1.08 * max(values))
        if key == "loss" and 0 < 20 * min(values) < max(values) < math.inf:
            axis.set_yscale("log")
    figure.legend(handles=figure.get_axes()[-1].lines, loc="outside lower center", ncols=min(4, len(runs)))
    figure.savefig(path, dpi=120)


def main():
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
    print_columns([["", *rows[0]], *([run["name"], *row.values()] for run, row in zip(runs, rows))])
    options = differing(runs)
    if options:
        print("\noptions that differ")
        names = [run["name"] for run in runs]
        print_columns([["", *names], *([name, *values] for name, values in options.items())])
    elif len(runs) > 1:
        print("\nno options differ")
    if len({run["config"].get("digest") for run in runs}) > 1:
        print("\nnote: these runs were trained on different images: their accuracies are not of one test")
    try:
        plot(runs, args.out)
    except OSError as error:
        refuse(f"cannot write {args.out} ({error.strerror})")
    print(f"\n{args.out}")


if __name__ == "__main__":
    main()
