"""What lies in a folder: which files are images, in which split they are, of which class."""
import csv
import json
import os
import re
import unicodedata
from collections import Counter
from pathlib import Path

from .sources import IMAGES, NIFTI, ending

TRAIN = "train", "training"
TEST = "test", "testing", "val", "valid", "validation"       # the first of them that is there
SPLITS = re.compile(rf"({'|'.join([*TRAIN, *TEST, 'dev'])})[-_]?\d*", re.IGNORECASE)    # val2017


# ---- Which files -------------------------------------------------------------------------------------------
def all_files(folder):
    """Every file below the folder, sorted; links are followed, also those to nothing, which cannot be read;
    hidden ones and pipes are not. Folders that may not be read, hidden images, what runs wrote, and links to
    folders that are read already, are named."""
    files = []
    seen = set()
    of_runs, again, hidden = [], [], []
    waiting = [str(folder)]                                  # itself, then links to folders: real ones first

    def name(error):
        print(f"note: left out {error.filename}: {error.strerror}")

    while waiting:
        start = waiting.pop(0)
        if Path(start).resolve() in seen:                    # also a link back to where it lies
            again.append(start)
            continue
        for root, folders, names in os.walk(start, onerror=name):
            of_run = root != str(folder) and written_by_runs(root, names)
            if of_run or Path(root).resolve() in seen:
                of_runs += [root] * of_run
                folders.clear()
                continue
            seen.add(Path(root).resolve())
            below = sorted(Path(root, name) for name in folders if not name.startswith("."))
            waiting += [str(path) for path in below if path.is_symlink()]
            folders[:] = [path.name for path in below if not path.is_symlink()]
            files += [Path(root, name) for name in names if not name.startswith(".")]
            hidden += [name for name in names if name[0] == "." and name[:2] != "._"     # macOS puts those
                       and ending(Path(name)) in (*IMAGES, *NIFTI, ".npy")]
    if hidden:
        print(f"note: left out {len(hidden):,} hidden files, as {min(hidden)}: names that begin with a dot")
    if of_runs:
        print(f"note: left out {len(of_runs)} folders that runs wrote, as {of_runs[0]}")
    if again:
        print(f"note: left out {len(again)} links to folders that are read already, as {again[0]}")
    # Nobody may ever write into a pipe.
    files = [file for file in files if file.is_file() or not file.exists()]
    return sorted(files, key=lambda file: file.parts)


def written_by_runs(folder, names):
    """Whether a folder of these files is a run's, or that of decoded images."""
    if Path(folder).resolve() == Path("runs", "decoded").resolve():
        return True
    try:
        found = json.loads(Path(folder, "config.json").read_text()) if "config.json" in names else {}
        return {"method", "version", "digest"} <= {*found} or {"experiment", "frustrated"} <= {*found}
    except (OSError, ValueError, TypeError):                 # of something else
        return False


def taken(files, least=5, order=(IMAGES, NIFTI, (".npy",))):
    """Of these the images, the NIfTI volumes or the .npy arrays: the first kind of which there are so many as
    a set must have; else that of which there are most."""
    kinds = [[file for file in files if ending(file) in endings] for endings in order]
    return next((found for found in kinds if len(found) >= least), max(kinds, key=len))


def left_out(files, kept):
    """What else lies there, in words: 248 .svg, 3 .txt."""
    others = set(files) - set(kept)
    counts = Counter(ending(file) or "without an ending" for file in others)
    by_count = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{count:,} {kind}" for kind, count in by_count[:6]]
    return ", ".join(shown) + ", ..." * (len(counts) > 6)


# ---- Splits ------------------------------------------------------------------------------------------------
def subfolder(folder, names):
    """That of these names, in any case, or None; the first name counts."""
    there = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            there.setdefault(path.name.lower(), path)
    return next((there[name] for name in names if name in there), None)


def splits(folder):
    """The folders of the training and the test images; the folder alone if it is not split."""
    train = subfolder(folder, TRAIN)
    if not train:
        return [folder]
    test = subfolder(folder, TEST)
    return [train, test] if test else [train]


# ---- Classes -----------------------------------------------------------------------------------------------
def by_folder(files, folder):
    """(class of each file or None, the reason why there are none): subfolders are classes.

    Two of them at least hold images, and nine of ten images lie in one of them, none deeper; None for a file
    that lies elsewhere.
    """
    depths = [len(file.relative_to(folder).parts) for file in files]
    names = [file.parent.name if depth == 2 else None for file, depth in zip(files, depths)]
    classes = {name for name in names if name is not None}
    if len(classes) < 2:
        few = "one subfolder" if classes else "no subfolder"
        deep = max(depths, default=0) > 2
        reason = f"images lie up to {max(depths)} levels deep" if deep else f"{few} holds images"
        return None, reason
    if all(map(SPLITS.fullmatch, classes)):
        return None, f"{' and '.join(sorted(classes))} are parts of a set, of which one must be called train"
    strays = names.count(None)
    if strays > len(files) / 10:
        return None, f"{strays:,} of {len(files):,} images lie beside or below the class folders"
    return names, None


def top_folder(file, folder):
    """--labels top: the first subfolder on the way to a file; None for one that lies in none."""
    first, *rest = file.relative_to(folder).parts
    return first if rest else None


def same_name(name):
    """Of a file, however its letters and accents are written; bytes that are no UTF-8 as kernels.embed writes
    them, \\udce4."""
    return unicodedata.normalize("NFC", str(Path(name))).encode(errors="backslashreplace").decode()


def cells_of(table):
    """Rows of a table, lists of words, without empty ones: between commas, semicolons or tabs, by which its
    first line names file and class, or else has columns at all. ValueError if it cannot be read."""
    try:
        with open(table, newline="", encoding="utf-8-sig") as text:
            lines = [line for line in text if line.strip() and not line.startswith("sep=")]
        if any("\0" in line for line in lines):
            raise csv.Error("it is no text")
        heads = {mark: next(csv.reader(lines, delimiter=mark, skipinitialspace=True), [])
                 for mark in ",;\t"}
        named = [mark for mark, head in heads.items()
                 if {"file", "class"} <= {word.strip().lower() for word in head}]
        wide = [mark for mark, head in heads.items() if len(head) > 1]
        mark, *_ = named or wide or ","
        read = csv.reader(lines, delimiter=mark, skipinitialspace=True)
        rows = [[cell.strip() for cell in row] for row in read]
        return [row for row in rows if any(row)] or [[]]
    except UnicodeDecodeError:
        raise ValueError(f"{table} is no UTF-8: save it as CSV UTF-8")
    except (OSError, csv.Error) as error:
        raise ValueError(f"{table} cannot be read ({error})")


def place_of(heads, name, table):
    """Which column has this name, or it alone in other capitals; None if none has."""
    if name in heads:
        return heads.index(name)
    found = [k for k, head in enumerate(heads) if head.lower() == name]
    if len(found) > 1:
        raise ValueError(f"{table} has {len(found)} columns {name}: one of them has to go")
    return found[0] if found else None


def rows_of(files, known):
    """For each of these names of files that of `known` which is its own, or None: the same, with another
    system's slashes, or without folders if that is one file's."""
    files = [same_name(file) for file in files]
    count = Counter(os.path.basename(file) for file in files)
    written = {name.replace("\\", os.sep): name for name in known} | {name: name for name in known}
    found = []
    for file in files:
        base = os.path.basename(file)
        found.append(written.get(file, written.get(base) if count[base] == 1 else None))
    return found


def by_table(files, folder, table):
    """--labels FILE.csv -> class of each file, group of each file; None for what the table does not say.

    Columns file, class and perhaps group, by these names in the first line. A file is named relative to the
    folder, or by its name alone if that is one file's. What was used, and what rows name no file, is printed.
    ValueError for a table that is not of this form.
    """
    heads, *rows = cells_of(table)
    places = {name: place_of(heads, name, table) for name in ("file", "class", "group")}
    if places["file"] is None or places["class"] is None:
        there = ", ".join(heads) or "none"
        raise ValueError(f"--labels {table} has the columns {there}: its first line must name file and "
                         "class, and may name group")
    known = {}
    for row in rows:
        if any(row[len(heads):]):
            raise ValueError(f"--labels {table}: the row {','.join(row)} has more cells than the first line: "
                             "put between quotes what holds a comma")
        row = {name: row[k] if k is not None and k < len(row) else "" for name, k in places.items()}
        if row["file"]:
            name = same_name(row["file"])
            own = known.setdefault(name, row)
            for what, many in (("class", "classes"), ("group", "groups")):
                if own[what] != row[what] and (what == "class" or own[what] and row[what]):
                    raise ValueError(f"--labels {table} gives {name} the {many} {own[what]} and "
                                     f"{row[what]}: one of them has to go")
                own[what] = own[what] or row[what]
    names = rows_of([file.relative_to(folder) for file in files], known)
    used = {*names}
    unused = [name for name in known if name not in used]
    count = Counter(same_name(file.name) for file in files)
    several = [name for name in unused if count[name] > 1]
    if several:
        print(f"note: {len(several):,} rows of {table} name more than one file, as {several[0]}: write it "
              "with its folder, FOLDER/NAME")
        unused = [name for name in unused if count[name] < 2]
    if not any(names):
        raise ValueError(f"--labels {table} names none of the {len(files):,} files, of which the first is "
                         f"{files[0].relative_to(folder)}: write names as these, below {folder}")
    others = [head for k, head in enumerate(heads) if head and k not in places.values()]
    group = "(no group: any may be split)" if places["group"] is None else "and group, of which none is split"
    print(f"--labels {table}: columns file, class {group}"
          + f"; left out: {', '.join(others)}" * bool(others))
    if unused:
        print(f"note: {len(unused):,} rows of {table} name no file that was read, as {unused[0]}")
    found = [known.get(name, {}) for name in names]
    return [row.get("class") or None for row in found], [row.get("group") or None for row in found]


# ---- Held out ----------------------------------------------------------------------------------------------
def joined(*marks):
    """What must stay together: a number for each file, the same for files that share one of their marks, also
    by way of others. marks: lists of the files' contents, groups, ...; None joins nothing."""
    first = {}                                               # of each mark the first file that has it
    leader = [*range(len(marks[0]))]

    def top(row):
        while leader[row] != row:
            leader[row] = leader[leader[row]]                # shortens the way for the next one
            row = leader[row]
        return row

    for kind, of_files in enumerate(marks):
        for row, value in enumerate(of_files):
            if value is not None:
                other = first.setdefault((kind, value), row)
                leader[top(row)] = top(other)
    return [top(row) for row in leader]


def hold_out(groups, split):
    """Rows for training and for testing, of which no group is on both sides. groups: of each row; split: as
    scikit-learn's train_test_split, of a list. A group of more than a fifth of all, as of blank images, is
    for training, if there are others to hold out."""
    members = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    fifth = len(groups) / 5
    large = [group for group, rows in members.items() if len(rows) > fifth]
    drawn = [group for group in members if len(members[group]) <= fifth]
    if len(drawn) < 2:
        large, drawn = [], [*members]
    left = sum(len(members[group]) for group in drawn)
    share = min(0.5, fifth / left) if large else 0.2
    train, test = split(drawn, test_size=share, random_state=0)
    return [[row for group in side for row in members[group]] for side in (large + train, test)]
