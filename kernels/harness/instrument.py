"""What python -m kernels.collapse does: embeddings from any file, a panel, one sentence, a picture.

    python -m kernels.collapse emb.npy                                  # spread? how far that can be told
    python -m kernels.collapse emb.npy --views a.npy b.npy              # of two views of each image: healthy?
    python -m kernels.collapse emb.npz --key z --before untrained.npz --labels labels.npy

Exit code 0: no collapse; 3: collapsed, wholly or in part; 4: cannot tell, or not yet; 2: a mistake.
"""
import argparse
import math
import re
import sys
from collections import Counter
from itertools import dropwhile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..collapse import _Rows, collapse_panel, verdict
from .files import atomic_write
from .folders import cells_of, place_of, rows_of, same_name
from .processes import for_a_reader, print_any_name

HEALTHY, COLLAPSED, UNKNOWN, MISTAKE = 0, 3, 4, 2
TRIED = "embeddings", "features", "z", "h", "test_features", "train_features"      # keys, in this order
COLUMNS = "file", "files", "name", "id", "label", "labels", "class", "classes", "target", "y"     # of words
SHOWN = 5000                                             # rows in the picture


def refuse(message):
    print(f"collapse: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(MISTAKE)


class NamedError(ValueError):
    """Says of which file it is."""


def about(name, error):
    """What is wrong with that file; NumPy, torch and csv raise a dozen kinds."""
    text = str(error) or type(error).__name__
    if isinstance(error, NamedError) or str(name) in text or "--" in text:
        return text
    objects = "pickle" in text or "Python objects" in text
    return f"{name}: " + ("it holds Python objects, no numbers" if objects else text)


# ---- Files -------------------------------------------------------------------------------------------------
def choose(path, names, key, shape_of):
    """The key to take of a file that holds several arrays."""
    if key:
        if key not in names:
            raise ValueError(f"{path} has no {key}, but {', '.join(names)}")
        return key
    tables = [name for name in names if len(shape_of(name)) == 2 and min(shape_of(name)) > 0]
    known = [name for name in TRIED if name in tables]
    if known or len(tables) == 1:
        return (known or tables)[0]
    raise ValueError(f"{path} holds {', '.join(names) or 'nothing'}: say which are the embeddings, by --key")


def shape_in(found, name):
    """Of an array of an .npz; () of one of Python objects, which is not read."""
    try:
        return found[name].shape
    except ValueError:
        return ()


def read(path, key=None):
    """An array or tensor [N, D] of a .npy, .npz, .pt, .csv or .safetensors file, .npy mapped.

    What is one axis more is refused; ValueError or OSError for what cannot be read.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a file, as a run's features.npz")
    if kind == ".npy":
        return np.load(path, mmap_mode="r")
    if kind == ".npz":
        with np.load(path) as found:
            name = choose(path, found.files, key, lambda name: shape_in(found, name))
            print(f"{path}: {name}")
            if name in ("test_features", "train_features"):
                print("note: these are an encoder's features h; the verdict at the end of a run looks at its "
                      "projector's z")
            return found[name]
    if kind in (".pt", ".pth"):
        found = torch.load(path, map_location="cpu", weights_only=True)
        found = tensors_in(found)
        if "" in found:
            return found[""]
        name = choose(path, [*found], key, lambda name: found[name].shape)
        print(f"{path}: {name}")
        return found[name]
    if kind == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ValueError(f"{path} is read by the package safetensors: pip install safetensors")
        found = load_file(path)
        name = choose(path, [*found], key, lambda name: found[name].shape)
        print(f"{path}: {name}")
        return found[name]
    if kind in (".csv", ".tsv", ".txt"):
        return read_table(path)
    raise ValueError(f"{path} ends in {kind or 'nothing'}: give .npy, .npz, .pt, .csv or .safetensors")


def tensors_in(found):
    """{name: tensor} of what a .pt file holds, "" of a tensor alone; ValueError if it holds none."""
    found = {"": found} if isinstance(found, torch.Tensor) else found
    if not isinstance(found, dict):
        raise ValueError(f"holds a {type(found).__name__}: save one tensor [N, D], or a dict of them")
    tensors = {name: value.detach() for name, value in found.items() if isinstance(value, torch.Tensor)}
    dense = {name: value for name, value in tensors.items()
             if value.layout == torch.strided and not value.is_quantized}
    if not dense:
        odd = f", but sparse ones: {', '.join(tensors)}" * bool(tensors)
        raise ValueError(f"holds no dense tensor{odd}: save one [N, D]")
    return dense


def read_table(path):
    """Numbers of a .csv, [N, D]; columns of words, and those named as rows or labels are (file, id, class, an
    index without a name), are left out, and so is a first line of names. Between cells are semicolons, where
    a decimal comma may be, or tabs, if all lines have them; else commas, or blanks. Lines before it that
    begin with # or sep= say something else."""
    import csv
    def number(word):
        try:
            return None if "_" in word else float(word.replace(",", ".") if mark == ";" else word)
        except ValueError:
            return None

    with open(path, newline="", encoding="utf-8-sig") as file:
        text = [*dropwhile(lambda line: not line.strip() or line.startswith(("#", "sep=")), file)]
        first = text[0] if text else ""
        read = {}
        for mark in [mark for mark in ";\t," if mark in first] + [None]:
            cells = csv.reader(text, delimiter=mark) if mark else map(str.split, text)
            read[mark] = lines = [line for line in cells if line]
            whole = min(map(len, lines), default=0) > 1
            if whole and not {*map(number, lines[-1])} <= {None}:
                break
        else:                                            # none serves: that by which most lines have cells
            mark = max(read, key=lambda mark: sum(len(line) > 1 for line in read[mark]))
            lines = read[mark]

    # Names: words above numbers; or, where the others are numbers (0, 1, ...) as kernels.embed writes them,
    # one of these words above words.
    named = len(lines) > 1 and any(
        number(above) is None and (number(below) is not None or above.strip().lower() in COLUMNS)
        for above, below in zip(*lines[:2]))
    if len(lines) > 1 and not named:                     # numbers as pandas writes them, beside words or not
        above = [word for word, below in zip(*lines[:2]) if number(below) is not None]
        counted = [[str(k) for k in range(first, first + len(above))] for first in (0, 1)]
        beside = len(lines[0]) > len(above)              # words above words
        named = above in counted[:1 + beside] and (len(above) > 2 or all("." in word for word in lines[1]))
        if named:
            print(f"{path}: the first line, {', '.join(above[:3])}, ..., is taken as names of columns")
    rows = lines[named:]
    if not rows or len({len(row) for row in rows}) != 1:
        raise ValueError(f"{path} is no table of rows of one length")
    if named and len(lines[0]) != len(rows[0]):
        raise ValueError(f"{path}: its first line names {len(lines[0])} columns, its rows have "
                         f"{len(rows[0])}")
    above = [word for word in lines[0] if number(word) is not None] if named else []
    if not all(word.strip().isdigit() for word in above):        # numbers, and no names 0, 1, 3, ...
        raise ValueError(f"{path}: row 1 holds words among its numbers, and is no line of names")
    names = [word.strip().lower() for word in lines[0]] if named else [str(k) for k in range(len(rows[0]))]
    no_embedding = {"", "index", *COLUMNS} - ({"y"} if "x" in names else set())        # x, y: a plane
    some = rows[::-(-len(rows) // 100)]                  # a column of numbers may lack one
    columns = [k for k, name in enumerate(names) if name not in no_embedding
               and not name.startswith("unnamed")
               and 2 * sum(number(row[k]) is not None for row in some) > len(some)]
    words = [k for k in range(len(names)) if k not in columns]
    columns = without_odd_ones(path, names, columns) if named else columns
    others = [repr(name) if named else f"number {k + 1}" for k, name in enumerate(names) if k in words]
    if others:
        print(f"{path}: left out, as names or words: {len(others)} columns ({', '.join(others[:5])}"
              f"{', ...' * (len(others) > 5)})")
    if not columns:
        between = {";": "semicolons", "\t": "tabs", ",": "commas"}.get(mark, "blanks")
        raise ValueError(f"{path} has no column of numbers, as its cells are read, between {between}")
    x = np.array([[number(row[k]) for k in columns] for row in rows], dtype=object)
    if None in x:
        row, column = np.argwhere(x == None)[0]          # noqa: E711, of each element
        word = rows[row][columns[column]].strip()
        raise ValueError(f"{path}: row {row + 1} holds {'words' if word else 'an empty cell'} among its "
                         f"numbers{', as ' * bool(word)}{word}")
    return x.astype(np.float64)


def without_odd_ones(path, names, columns):
    """Of columns of numbers those that are called alike, f0, f1, ..., if these are all but two or so: the
    others number images or patients. What is taken of names that differ is printed."""
    stems = {k: re.sub(r"\d+$", "", names[k]) for k in columns}
    (stem, most), *others = Counter(stems.values()).most_common() or [("", 0)]
    if others and most >= 4 and len(columns) - most <= 2:
        odd = ", ".join(names[k] for k in columns if stems[k] != stem)
        print(f"{path}: left out, since the others are called {stem}0, {stem}1, ...: {odd}")
        return [k for k in columns if stems[k] == stem]
    if others:
        shown = ", ".join(names[k] for k in columns[:8]) + ", ..." * (len(columns) > 8)
        print(f"{path}: taken as dimensions: {shown}")
    return columns


def as_floats(x, path):
    """Integers as float64, and what is no table refused."""
    shape = [*x.shape]
    if x.ndim != 2:
        raise ValueError(f"{path} holds {x.dtype} {shape}: embeddings are [N, D], one row an image")
    kind = "f" if isinstance(x, torch.Tensor) and x.is_floating_point() else \
        "i" if isinstance(x, torch.Tensor) else x.dtype.kind
    if kind not in "fiub":
        raise ValueError(f"{path} holds {x.dtype} {shape}, no numbers")
    if kind != "f":
        return x.double() if isinstance(x, torch.Tensor) else x.astype(np.float64)
    return x


def names_of(path, key, count):
    """The names of embeddings' images, where their file has them, as kernels.embed and runs write it."""
    path = Path(path)
    kind = path.suffix.lower()
    names = []
    try:
        if kind == ".npz":
            with np.load(path) as found:
                keys = ["train_files"] if key == "train_features" else ["files", "test_files", "train_files"]
                there = [found[name] for name in keys if name in found.files]
            names = next((names for names in there if names.size == count), [])
        elif kind == ".csv":
            heads, *rows = cells_of(path)
            names = [row[0] for row in rows] if heads[0] in ("file", "files", "name") else []
        elif kind == ".npy" and path.with_suffix(".txt").is_file():
            names = path.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):                        # that file is of something else
        pass
    return [*map(as_text, names)] if len(names) == count else None


def as_text(name):
    """A name, bytes that are no UTF-8 as kernels.embed writes them, \\udce4."""
    return str(name).encode(errors="backslashreplace").decode()


def label_column(path, key, count, names):
    """Words of a file of one column, also empty ones, without a first line that is its name; of several
    columns that named class or label, or `key`. names(): those of the embeddings' images, or None.

    Where both name files, labels go by them. count: of embeddings.
    """
    rows = cells_of(path)
    wanted = [key] if key else ["class", "label", "classes", "labels", "target", "y"]
    places = [place_of(rows[0], name, path) for name in wanted]
    column = next((k for k in places if k is not None), None)
    if len(rows[0]) == 1 or (column is None and len({*map(len, rows)}) > 1):
        text = path.read_text(encoding="utf-8-sig")
        if any(re.match(r'\s*"[^"]*"\s*[,;\t]', line) for line in text.splitlines()):
            raise ValueError(f"{path}: its first line names one column, its rows have more")
        words = [line.strip().strip('"') for line in text.splitlines()]
        while len(words) > count + 1 and not words[-1]:
            words.pop()
        first, *others = words
        known = first.lower() in COLUMNS
        if first in others or not known and len(words) != count + 1:
            return words if words[-1] or len(words) <= count else words[:-1]
        if not known and not words[-1]:
            raise ValueError(f"{path} has a line more than embeddings, and an empty last one: remove that, "
                             f"or its first line, {first}, or call it class if it is a name")
        print(f"{path}: the first line, {first}, is taken as a name")
        return others
    heads, *rows = rows
    if column is None:
        raise ValueError(f"{path} has the columns {', '.join(heads)}: say which are the labels, by "
                         "--labels-key")
    if any(any(row[len(heads):]) for row in rows):
        raise ValueError(f"{path}: its first line names {len(heads)} columns, its rows have more")
    file = place_of(heads, "file", path)
    if any(len(row) <= max(column, file or 0) for row in rows):
        raise ValueError(f"{path} is no table of rows of one length")
    files = None if file is None else names()
    if files is None:
        print(f"note: {path}: rows are taken in their order")
        if not all(row[column] for row in rows):
            row = [bool(row[column]) for row in rows].index(False)
            raise ValueError(f"{path} has no label in row {row + 1}: give each embedding one")
        return [row[column] for row in rows]
    known = {}
    for row in rows:
        if known.setdefault(same_name(row[file]), row[column]) != row[column]:
            raise ValueError(f"{path} gives {row[file]} two labels: one of them has to go")
    own = rows_of(files, known)
    no_row = [name for name, row in zip(files, own) if row is None]
    no_label = [name for name, row in zip(files, own) if row is not None and not known[row]]
    for what, lost in {"row": no_row, "label": no_label}.items():
        if lost:
            raise ValueError(f"{path} has no {what} for {len(lost):,} of {len(files):,} embeddings, as "
                             f"{lost[0]}")
    used = {*own}
    others = [name for name in known if name not in used]
    if others:
        print(f"note: {len(others):,} rows of {path} name no embedding, as {others[0]}")
    return [known[row] for row in own]


def read_labels(path, key, count, names):
    """Labels [N] as numbers, and what they are called. names(): of the embeddings' images, or None."""
    path = Path(path)
    if path.suffix.lower() in (".csv", ".tsv", ".txt"):
        words = label_column(path, key, count, names)
    elif path.suffix.lower() == ".npz":
        with np.load(path) as found:
            there = [name for name in found.files if math.prod(shape_in(found, name) or (0,)) == count]
            own = [name for name in there if "label" in name] or there
            if not key and (len(own) != 1 or own[0].endswith("files")):
                raise ValueError(f"{path} has {len(there)} arrays of {count} ({', '.join(there)}): say "
                                 "which are the labels, by --labels-key")
            print(f"{path}: labels {key or own[0]}")
            words = found[key or own[0]].ravel()
    elif path.suffix.lower() in (".pt", ".pth") and not key:
        found = tensors_in(torch.load(path, map_location="cpu", weights_only=True))
        there = [name for name, value in found.items() if value.numel() == count]
        if len(there) != 1:
            raise ValueError(f"{path} has {len(there)} tensors of {count}: say which are the labels, by "
                             "--labels-key")
        words = found[there[0]].numpy().ravel()
    else:
        words = np.asarray(read(path, key)).ravel()
    if len(words) != count:
        raise ValueError(f"{path} holds {len(words):,} labels for {count:,} embeddings")
    names, labels = np.unique(np.asarray(words).astype(str), return_inverse=True)
    return torch.from_numpy(labels.ravel()), names


# ---- The picture -------------------------------------------------------------------------------------------
def plot(z, path, sentence):
    """First two principal components, spectrum, distances to the nearest other, of up to 5,000 rows."""
    from matplotlib.figure import Figure
    x = _Rows(z).some(SHOWN).whole().double()
    x = x[x.isfinite().all(dim=1)]
    if len(x) < 2:
        print("no picture: fewer than two embeddings are finite")
        return
    x = x - x.mean(dim=0)
    _, singular, axes = torch.linalg.svd(x, full_matrices=False)
    variances = singular.square() / (len(x) - 1)
    points = x @ axes[:2].T
    distances = torch.cat([torch.cdist(part, x).topk(2, largest=False).values[:, 1] for part in x.split(500)])
    typical = (2 * variances.sum()).sqrt().clamp(min=1e-300)

    figure = Figure(figsize=(14, 4.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    shown = F.pad(points, (0, max(0, 2 - points.shape[1])))
    left.scatter(*shown.T, s=4, alpha=0.5)
    left.set(title=f"{len(x):,} embeddings, first two components", aspect="equal", adjustable="datalim")
    share = (variances / variances.sum().clamp(min=1e-300)).clamp(min=1e-12)
    middle.semilogy(range(1, len(share) + 1), share)
    middle.set(title="share of the variance", xlabel="component", ylim=(None, 1.5))
    right.hist((distances / typical).numpy(), bins=60, range=(0, max(1, float((distances / typical).max()))))
    right.set(title="distance to the nearest other", xlabel="in distances of two images (root mean square)")
    figure.suptitle(sentence.replace("$", r"\$"), fontsize=10, wrap=True)
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=120)
    print(f"picture: {path}")


# ---- The command -------------------------------------------------------------------------------------------
def code_of(sentence):
    """Of a sentence of verdict(); where a part is not finite and the rest has collapsed, that of the rest."""
    if sentence.startswith("No collapse"):
        return HEALTHY
    _, _, rest = sentence.rpartition("The rest: ")
    return COLLAPSED if "COLLAPSE" in rest.split(":")[0] else UNKNOWN


def in_words(value):
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def embeddings(names, key):
    found = []
    for name in names:
        try:
            found.append(as_floats(read(name, key), name))
        except Exception as error:
            raise NamedError(about(name, error))
    return found


def in_one_order(args, files, sets):
    """Embeddings of one image in one row each, where files name their images; ValueError if these differ."""
    if len(files) < 2:
        return sets
    first, *named = [names_of(file, args.key, len(x)) for file, x in zip(files, sets)]
    for k, names in enumerate(named, 1):
        if not first or not names or names == first:
            continue
        if not {*names} & {*first}:                      # 1_a.png and 1_b.png, say
            print(f"note: {files[k]} names its images otherwise than {files[0]}: rows are taken in order")
            continue
        place = {name: row for row, name in enumerate(names)}
        if len(place) < len(names) or {*names} != {*first}:
            raise NamedError(f"{files[k]} names other images than {files[0]}, or one twice")
        sets[k] = sets[k][[place[name] for name in first]]
        print(f"{files[k]}: its rows are taken in the order of {files[0]}, by their names")
    return sets


def main():
    with for_a_reader():
        command()


def command():
    print_any_name()
    codes = "Exit code 0: no collapse; 3: collapsed; 4: cannot tell, or not yet; 2: a mistake."
    parser = argparse.ArgumentParser("python -m kernels.collapse", allow_abbrev=False, epilog=codes,
                                     description="Have these embeddings collapsed? A panel and one sentence.")
    parser.error = refuse
    add = parser.add_argument
    add("file", help="embeddings [N, D]: .npy, .npz, .pt, .csv, .safetensors")
    add("--views", nargs=2, default=[], metavar="FILE", help="embeddings of two views of each image")
    add("--before", help="embeddings of the same images by the untrained network")
    add("--before-views", nargs=2, default=[], metavar="FILE", help="and of their two views")
    add("--labels",
        help="a class or group of each image: .npy, .npz, or a table, of one column or with a column class")
    add("--key", help="of a file that holds several arrays: which are the embeddings; if not given the first "
        f"of {', '.join(TRIED)} that is there")
    add("--labels-key", help="and which the labels")
    add("--out", type=Path, help="a picture: .png, .pdf or .svg")
    args = parser.parse_args()
    if args.out and args.out.suffix.lower() not in (".png", ".pdf", ".svg"):
        refuse(f"--out {args.out}: its ending must be .png, .pdf or .svg")
    if args.before_views and not (args.before and args.views):
        refuse("--before-views is for --before and --views")
    if args.labels_key and not args.labels:
        refuse("--labels-key is for --labels")
    files = [args.file, *args.views]
    try:
        z, *views = in_one_order(args, files, embeddings(files, args.key))
        labels = names = None
        if args.labels:
            try:
                labels, names = read_labels(args.labels, args.labels_key, len(z),
                                            lambda: names_of(args.file, args.key, len(z)))
            except Exception as error:
                raise NamedError(about(args.labels, error))
        panel = collapse_panel(z, *views, labels=labels)
        if names is not None:
            panel["classes at one point"] = [str(names[k]) for k in panel.get("classes at one point", [])]
        before = None
        if args.before:
            files = [args.before, *args.before_views]
            earlier = in_one_order(args, files, embeddings(files, args.key))
            if earlier[0].shape != z.shape:
                raise NamedError(f"--before {args.before} holds {[*earlier[0].shape]}, {args.file} "
                                 f"{[*z.shape]}: of the same images by the same network they must be")
            before = collapse_panel(*earlier)
        sentence = verdict(panel, before)
        for name, value in panel.items():
            earlier = f"   before {in_words(before[name])}" if before and name in before else ""
            print(f"{name:22}{in_words(value):>12}{earlier}")
    except BrokenPipeError:
        raise
    except Exception as error:
        refuse(about(args.file, error))
    trouble = ""
    if args.out:
        try:
            plot(z, args.out, sentence)
        except Exception as error:                       # the sentence is not lost for it
            trouble = about(f"--out {args.out}", error)
    print(f"\n{sentence}", flush=True)
    if trouble:
        refuse(trouble)
    sys.exit(code_of(sentence))
