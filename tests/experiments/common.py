"""What the experiments share: runs of the scripts, made once and side by side, statistics over seeds, data to write."""
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from scipy import stats

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))                                            # scripts and kernels, for those who import this
from kernels import __version__  # noqa: E402 (it is in reach only now)

METHODS = {  # name in tables: script, its options
    "IConE": ("icone.py", []), "VICReg": ("vicreg.py", []), "SimCLR": ("ba_ssl.py", ["--no-fusion"])}


VIEWS_OF = {"digits": ["--views", "poses"]}                              # of copies in files, whose default is crops


# ---- Runs --------------------------------------------------------------------------------------------------
def made_by(script, options):
    """What decides a run's numbers: its command, the version, and the contents of the files that it names."""
    command = [str(script), *map(str, options)]
    files = [word for word in command[1:] if Path(word).is_file()]
    return {"command": command, "version": __version__, "files": [zlib.crc32(Path(file).read_bytes()) for file in files]}


def run(folder, script, options):
    """The report of one run, which is not repeated if it is already there, made by the same."""
    command = made_by(script, options)
    kept = folder / "command.json"
    same = kept.exists() and json.loads(kept.read_text()) == command
    if not (same and (folder / "report.json").exists()):
        shutil.rmtree(folder, ignore_errors=True)                        # what a kill left of it
        subprocess.run([sys.executable, ROOT / script, "--out", folder, "--device", "cpu", *options], check=True,
                       stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        kept.write_text(json.dumps(command))
    return json.loads((folder / "report.json").read_text())


def options_of_all(parser, folder):
    """The options that every experiment has."""
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--draw", type=int, help="make so many runs, drawn at random, and print their rows alone")
    parser.add_argument("--out", type=Path, default=Path("runs", folder))
    return parser.parse_args()


def make(jobs, numbers, args):
    """{key: numbers(job)}; the last part of a key is the seed, and whole tables of a seed come first."""
    keys = random.sample([*jobs], args.draw) if args.draw else sorted(jobs, key=lambda key: key[-1])
    with ThreadPoolExecutor(args.jobs) as pool:
        return dict(zip(keys, pool.map(lambda key: numbers(jobs[key]), keys)))


def of(results, *row):
    """Those of a row, in order of their seeds."""
    return [value for key, value in results.items() if key[:-1] == row]


def apart(results, row, other, value):
    """value(result) of a row less that of another row, for each seed that both have."""
    return [value(results[(*row, seed)]) - value(results[(*other, seed)])
            for *key, seed in results if key == [*row] and (*other, seed) in results]


# ---- Statistics --------------------------------------------------------------------------------------------
def spread(values, decimals=3):
    """mean ± std; of one value itself."""
    std = f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{decimals}f}{std}"


def over(ours, theirs):
    """Ours less theirs, means of two methods, and half the width of the 95 % interval by Welch's t: seeds of different
    methods have nothing in common but a number. Nothing for fewer than two."""
    if min(len(ours), len(theirs)) < 2:
        return ""
    found = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval()
    return f"{statistics.mean(ours) - statistics.mean(theirs):+.3f} ± {(found.high - found.low) / 2:.3f}"


def half_width(values):
    """Of the 95 % interval of their mean, by Student's t."""
    return stats.t.ppf(.975, len(values) - 1) * statistics.stdev(values) / len(values) ** .5


def interval(values):
    """Their mean and half the width of its 95 % interval; nothing for fewer than two."""
    return "" if len(values) < 2 else f"{statistics.mean(values):+.3f} ± {half_width(values):.3f}"


# ---- Data --------------------------------------------------------------------------------------------------
def thinned(labels, ratio, count=None):
    """Rows of labels [N] to keep: the first of each class, largest class over smallest = ratio; so many in all, but for
    rounding, or as many as the largest class allows."""
    classes, counts = labels.unique(return_counts=True)
    shares = ratio ** -torch.linspace(0, 1, len(classes))
    largest = count / shares.sum() if count else counts.max()
    rows = []
    for label, share in zip(classes, shares):
        most = max(1, round(float(share * largest)))
        rows.append((labels == label).nonzero()[:most, 0])
    return torch.cat(rows)


def channels_last(images):
    """[N, C, *S] -> [N, *S] or [N, *S, 3]; floats' noise below 0 and above 1 is cut off, as .npz files must be."""
    if images.dtype != torch.uint8:
        images = images.clamp(0, 1)
    return images[:, 0].numpy() if images.shape[1] == 1 else images.movedim(1, -1).numpy()


def save_npz(file, x, y, x_test, y_test):
    """Images [N, C, *S] and labels [N] for training and for testing, as the scripts read them."""
    np.savez(file, train_images=channels_last(x), train_labels=np.asarray(y),
             test_images=channels_last(x_test), test_labels=np.asarray(y_test))
