"""Images from anywhere: folders of files, arrays larger than memory, published data sets.

    data = read_images("photos", size=64)        # class subfolders, train/ with test/ or val/, or neither

What cannot be read raises ValueError with one line that says what to do; what is left out, cut or scaled is
printed. Needs numpy, scikit-learn and Pillow beside torch, tifffile for TIFF; nibabel and datasets if met.
"""
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import train_test_split

from . import arrays, folders
from .decode import Kind, Settings, decode_all, picture_of
from .images import Data, Images, choose, in_parts, in_words, sample_rows, to_unit
from .prepare import Prepare, prepare_arrays
from .sources import IDX, IMAGES, NIFTI, TIFFS, ending, problem


# ---- Labels ------------------------------------------------------------------------------------------------
def class_of_each(name, y, count):
    """Labels as they come, [N], [N, 1] or one-hot [N, K] -> [N] whole numbers or strings."""
    one_hot = y.ndim == 2 and y.shape[1] > 1 and np.isin(y, (0, 1)).all() and (y.sum(1) == 1).all()
    y = y.argmax(1) if one_hot else y
    y = np.char.decode(y, "utf-8", "replace") if y.dtype.kind == "S" else y
    if y.dtype.kind == "f" and np.isfinite(y).all() and (y == y.round()).all():
        y = y.astype(np.int64)
    if y.size != count or y.dtype.kind not in "iubU" or (y.dtype.kind == "i" and y.min() < 0):
        raise ValueError(f"{name} is {y.dtype} {[*y.shape]} for {count} images: not one class each (whole "
                         "numbers from 0, strings, or one-hot); take it out to train without labels")
    return y.ravel()


def number_classes(name, y, y_test):
    """Labels of both splits, or None -> their numbers, tensors [N] int64 or None, and the classes."""
    classes = [] if y is None or y_test is None else np.unique(np.concatenate([y, y_test]))
    if len(classes) < 2 or len(np.unique(y)) < 2:
        print(f"note: {name} has no labels of two classes for training and testing: no probes")
        return None, None, ()
    once = np.setxor1d(y, y_test)
    if len(once):
        more = f" and {len(once) - 10} more" if len(once) > 10 else ""
        print(f"note: classes in one split only: {', '.join(map(str, once[:10]))}{more}")
    numbers = [torch.from_numpy(np.searchsorted(classes, labels)) for labels in (y, y_test)]
    return *numbers, classes


# ---- Images that are there twice ---------------------------------------------------------------------------
LOOKED_THROUGH = 2**31                                   # numbers: of more it would take minutes


def marks_of(images):
    """A number of 64 bits for each image, equal for equal ones, in a list."""
    marks = []
    for part in in_parts(images):
        x = images.numbers(part) if isinstance(images, Images) else images[part].numpy()
        marks += [hash(own.tobytes()) for own in x]
    return marks


def hold_out(images):
    """A fifth of the rows held out, and what is left; equal images are on one side."""
    rows = [*range(len(images))]
    if math.prod(images.shape) > LOOKED_THROUGH:
        print("note: whether images held out equal some of those for training was not looked at")
    else:
        rows = folders.joined(marks_of(images))
        twice = len(rows) - len({*rows})
        if twice:
            print(f"note: {twice:,} of {len(rows):,} images equal an earlier one: equal images are all for "
                  "training or all for testing")
    if len({*rows}) < 2:
        print(f"note: all {len(rows):,} images are equal, those held out, too")
        rows = range(len(rows))
    return folders.hold_out(rows, train_test_split)


def tell_of_known(images, test_images):
    """A note where test images are training images."""
    if math.prod(images.shape) > LOOKED_THROUGH:
        print("note: whether test images are among those for training was not looked at")
        return
    known = {*marks_of(images)}
    again = sum(mark in known for mark in marks_of(test_images))
    if again:
        print(f"note: {again:,} of {len(test_images):,} test images are training images, too")


# ---- Folders of files --------------------------------------------------------------------------------------
@dataclass
class File:
    """One file of a folder: its path, the folder of its split, its name in the whole folder; what decoding
    found, its row in the array and its content's mark; its class and group, if there are any."""
    path: Path
    part: Path
    name: str
    kind: Kind = None
    entry: dict = None
    label: str = None
    group: str = None


def names_of(files, most=3):
    """The first of these files, and how many more there are."""
    shown = ", ".join(file.name for file in files[:most])
    return shown + f" and {len(files) - most:,} more" * (len(files) > most)


def list_files(path):
    """All images of a folder as File, those of the training part first."""
    files = []
    parts = folders.splits(path)
    beside = [item.name for item in sorted(path.iterdir()) if item not in parts and item.name[0] != "."
              and (item.is_dir() or ending(item) in IMAGES)]
    if parts != [path] and beside:
        more = f" and {len(beside) - 5:,} more" if len(beside) > 5 else ""
        print(f"note: taken is what lies in {' and '.join(part.name for part in parts)}; left out, since "
              f"beside: {', '.join(beside[:5])}{more}")
    below = {part: folders.all_files(part) for part in parts}
    looked_at = [file for there in below.values() for file in there]
    chosen = {*folders.taken(looked_at)}
    for part, there in below.items():
        files += [File(file, part, str(file.relative_to(path))) for file in there if file in chosen]
    if len(files) < 5:
        endings = ", ".join(sorted(IMAGES))
        raise ValueError(f"{path} holds {len(files)} files that end in {endings}, .nii or .npy: 5 at least "
                         "are needed")
    others = folders.left_out(looked_at, [file.path for file in files])
    if others:
        print(f"note: taken {len(files):,} of {len(looked_at):,} files; left out: {others}")
    return files


def without_broken(files, path, strict):
    """Files that have a row, and [(name, reason)] of those without; ValueError if these are too many."""
    skipped = [(file.name, file.entry["reason"]) for file in files if file.entry["row"] is None]
    if len(skipped) > len(files) / 10 or (strict and skipped):
        (first, reason), *rest = skipped
        others = f"; {len(rest):,} other" if rest else ""
        allowed = "" if strict else ", of which one in ten may be skipped"
        remedy = "Repair or remove what is broken"
        if reason.startswith("its shape is"):
            remedy = "Bring all to one shape; of TIFFs --pages first takes one page"
        raise ValueError(f"{len(skipped):,} of {len(files):,} files cannot be read{allowed}: {path / first} "
                         f"({reason}){others}. {remedy}")
    return [file for file in files if file.entry["row"] is not None], skipped


def tell(files, settings):
    """Notes on what is cut off, left out or made colour."""
    cut = [file.entry["cut"] for file in files if "cut" in file.entry]
    if cut and np.mean(cut) > 0.1:
        print(f"note: to make images square {np.mean(cut):.0%} is cut off on average; --fit pad keeps all")
    paged = [file for file in files if file.kind.left_out]
    if paged and settings.pages in ("channels", "volume"):
        print(f"note: {len(paged):,} files hold pages or frames that are not taken, of another size or kind "
              f"than the first, or of no TIFF ({names_of(paged)})")
    elif paged:
        print(f"note: {len(paged):,} files hold more pages or frames than the first, which is taken "
              f"({names_of(paged)}); of TIFFs --pages channels or volume takes all")
    clear = [file for file in files if file.entry.get("clear")]
    if clear:
        tiffs = any(ending(file.path) in TIFFS for file in clear)
        print(f"note: {len(clear):,} files are transparent in part, where they become white "
              f"({names_of(clear)})" + "; a TIFF whose last channel is none of transparency has to say so "
              "(tifffile: extrasamples=[0]), or be given in an .npz" * tiffs)
    colour = [file for file in files if file.kind.channels == 3]
    gray = [file for file in files if file.kind.channels == 1]
    if gray and 0 < len(colour) < len(files) / 10:
        print(f"note: {len(colour):,} of {len(files):,} files have colour ({names_of(colour)}): all are "
              "taken as of 3 channels")


def set_classes(files, path, labels):
    """Gives files their class and group; -> those that have a class, where any has one, else all."""
    paths = [file.path for file in files]
    if labels == "top":
        classes = [folders.top_folder(file.path, file.part) for file in files]
    elif labels != "auto":
        classes, groups = folders.by_table(paths, path, labels)
        for file, group in zip(files, groups):
            file.group = group
    else:
        classes = []
        for part in dict.fromkeys(file.part for file in files):
            own = [file.path for file in files if file.part == part]
            found, reason = folders.by_folder(own, part)
            if not found:
                print(f"note: no classes, since {reason}; --labels top takes the first subfolder's name, "
                      "--labels FILE.csv a table's")
                return files
            classes += found
    for file, label in zip(files, classes):
        file.label = label
    strays = [file for file in files if file.label is None]
    if len(strays) == len(files):
        raise ValueError(f"{path}: no image lies in a subfolder or has a class: leave out --labels {labels}")
    if strays:
        table = labels not in ("auto", "top")
        place = f"in no row of {labels} with a class" if table else "in no class folder"
        print(f"note: left out {len(strays):,} images that are {place}: {names_of(strays)}")
    return [file for file in files if file.label is not None]


def two_sides(files, path):
    """Files for training and for testing: by folder, or a fifth held out. Equal files are on one side, and so
    are those of a group."""
    contents = [file.entry["content"] for file in files]
    together = folders.joined(contents, [file.group for file in files])
    parts = folders.splits(path)
    if len(parts) == 1:
        twice = len(files) - len({*contents})
        if twice:
            print(f"note: {twice:,} of {len(files):,} files equal an earlier one: equal files are all for "
                  "training or all for testing")
        if len({*together}) < 2:
            raise ValueError(f"{path}: all {len(files):,} files that are left are equal or of one group, so "
                             "that none can be held out: at least two are needed")
        return [[files[row] for row in rows] for rows in folders.hold_out(together, train_test_split)]
    known = {mark for mark, file in zip(together, files) if file.part == parts[0]}
    sides = [[file for file in files if file.part == part] for part in parts]
    again = [file for mark, file in zip(together, files) if file.part == parts[1] and mark in known]
    if again:
        print(f"note: left out {len(again):,} test images that are training images, too, or of a group with "
              f"one: {names_of(again)}")
        names = {file.name for file in again}
        sides[1] = [file for file in sides[1] if file.name not in names]
    return sides


def read_folder(path, settings, channels_last, wanted_range, labels, strict):
    """Image files, or volumes: in train/ with test/ or val/, or all together; with classes or without.

    -> what arrays.py's readers give, but as Images; and a dict of Data's further fields.
    """
    files = list_files(path)
    paths = [file.path for file in files]
    if wanted_range == ("dtype",) and ending(paths[0]) in NIFTI:
        raise ValueError("--range dtype: NIfTI's numbers are scaled, so that none is the largest of their "
                         "kind; give --range LOW HIGH, or leave it out")
    decoded = decode_all(paths, path.resolve().name, settings, wanted_range)
    for file, kind, entry in zip(files, decoded.kinds, decoded.entries):
        file.kind = kind
        file.entry = entry
    files, skipped = without_broken(files, path, strict)
    tell(files, settings)
    target = decoded.target
    fitted = not target["volumes"] and ending(paths[0]) != ".npy"
    tiffs = [file.kind for file in files if ending(file.path) in TIFFS]
    paged = any(kind.left_out or kind.sides or not kind.photo and kind.channels > 1 for kind in tiffs)
    array = np.load(decoded.path, mmap_mode="r")
    raw = arrays.Raw(array, "first")
    if target["photo"]:
        raw = arrays.Raw(array, "last" if array.ndim == 4 else None)
    elif ending(paths[0]) == ".npy":
        raw = arrays.raw_images(path, "its files together", array, channels_last)
    elif target["volumes"] and min(array.shape[2:]) < 4:
        raise ValueError(f"{path}: volumes of {[*array.shape[2:]]}, sides of 4 at least are needed")
    say_unused(*(() if fitted else settings[:2]), pages="auto" if paged else settings.pages,
               channels_last=channels_last and raw.channels != "last")
    scaled = target["ranges"]                            # each kind of file by its own, to 16 bits
    wanted = (0, 65535) if scaled else wanted_range
    found, numbers = to_unit(path.name, {"train_images": raw}, wanted, target["of"])
    images = found["train_images"]

    sides = two_sides(set_classes(files, path, labels), path)
    if not sides[0]:
        raise ValueError(f"{path}: no image of {folders.splits(path)[0].name}/ is left for training, "
                         f"{len(sides[1]):,} for testing")
    result = {}
    for split, side in zip(("train", "test"), sides):
        rows = [file.entry["row"] for file in side]
        result[f"{split}_images"] = choose(images, torch.tensor(rows, dtype=torch.int64))
        if side and side[0].label is not None:
            result[f"{split}_labels"] = np.array([file.label for file in side])

    prepare = Prepare(settings, target, raw.channels, images.low, images.high,
                      "last" if raw.channels == "last" or target["photo"] else "first")
    padded = Prepare(settings._replace(fit="pad"), target, raw.channels, images.low, images.high)

    def whole(rows):
        """Training images [n, C, size, size] with nothing cut off, decoded anew."""
        def again(row):
            try:
                return padded.array(sides[0][row].path)
            except Exception:                                        # it is not there any more
                return np.zeros(target["shape"], target["dtype"])
        return padded.scale(np.stack([again(row) for row in rows]))

    fitted = settings.fit != "pad" and not target["volumes"]
    names = [[file.name for file in side] for side in sides]
    if scaled:
        shares = [file.entry["outside"] for file in files]
        numbers = {"ranges": scaled, "outside": sum(shares) / len(shares)}
    more = {"files": names[0], "test_files": names[1], "skipped": skipped, "whole": whole if fitted else None,
            "prepare": prepare, "numbers": numbers}
    return result, more


def read_arrays(name, settings, channels_last):
    """What arrays.py's readers give, of a file or folder that holds arrays; None of a folder of files."""
    path = Path(name)
    if name.startswith("hf:"):
        return arrays.read_hugging_face(name, lambda image: picture_of(image, settings))
    if IDX.match(path.name) or (path.is_dir() and arrays.idx_files(path)):
        return arrays.read_idx_set(path)
    if path.is_file() and ending(path) in TIFFS:
        return arrays.read_tiff_stack(path)
    if path.is_file() and ending(path) == ".npy":
        return arrays.read_npy(path, channels_last)
    if path.is_dir() and not (path / "train_images.npy").exists():
        return None
    return arrays.read_npz(path, channels_last)


def say_unused(size=64, fit="crop", channels_last=False, pages="auto", labels="auto", strict=False,
               value_range=None):
    """A note on options of read_images that are given, but do nothing."""
    given = {"--size": size != 64, "--fit": fit != "crop", "--pages": pages != "auto",
             "--labels": labels != "auto", "--strict": strict, "--channels-last": channels_last,
             "--range": value_range}
    if any(given.values()):
        print(f"note: {', '.join(option for option in given if given[option])}: without effect on these data")


def say_built_in(name, **options):
    """Notes on what the user may have thought that a built-in set is."""
    if Path(name).exists():
        print(f"note: {name} are those built in; the file or folder of this name is ./{name}")
    say_unused(**options)


# ---- Public ------------------------------------------------------------------------------------------------
def read_images(name, size=64, channels_last=False, fit="crop", pages="auto", value_range=None, labels="auto",
                strict=False):
    """Data of a folder of image files or volumes, .npz, .npy, a TIFF stack, IDX files, or hf:NAME[:SPLIT].

    size, fit       image files are brought to size x size: the middle is cut out (crop), all is shown within
                    a border (pad), or it is stretched
    channels_last   arrays [N, H, W, C] are images of C channels; else only where C is 1, 3 or 4
    pages           of TIFFs whose pages are not said to be channels: auto, first, channels, volume
    value_range     (low, high), ("dtype",) or None: numbers.py
    labels          auto (subfolders), top (the first subfolder), or a .csv: columns file, class, group
    strict          one file that cannot be read ends it; otherwise one in ten is skipped
    A fifth is held out, the same in every run, where there is no test part. ValueError for what cannot be
    read; notes on what is odd are printed.
    """
    name = str(name)
    wrong = problem(name)
    if wrong:
        raise ValueError(wrong)
    path = Path(name)
    settings = Settings(size, fit, pages)
    found = read_arrays(name, settings, channels_last)
    if found:
        last = found["train_images"].channels == "last"
        found, numbers = to_unit(name, found, value_range)
        shape = found["train_images"].shape[1:]
        fitted = name.startswith("hf:")
        prepare = prepare_arrays(numbers["dtype"], shape, last, numbers["low"], numbers["high"],
                                 fit if fitted else "crop")
        more = {"numbers": numbers, "prepare": prepare}
        say_unused(*(() if fitted else (size, fit)), pages=pages, labels=labels, strict=strict,
                   channels_last=channels_last and not last)
    else:
        found, more = read_folder(path, settings, channels_last, value_range, labels, strict)
    print(in_words(more["numbers"]))
    x, y, x_test, y_test = [found.get(key) for key in arrays.KEYS]
    by_folder = "files" in more
    if y is not None:
        y = class_of_each(f"{name}: train_labels", y, len(x))
    if y_test is not None and x_test is None:
        print(f"note: {name} has test_labels but no test_images: they are left out")
    elif y_test is not None:
        y_test = class_of_each(f"{name}: test_labels", y_test, len(x_test))

    if x_test is None:
        if len(x) < 5:
            raise ValueError(f"{name} holds {len(x)} images: 16 at least are needed without test images")
        train, test = hold_out(x)
        x, x_test = choose(x, train), choose(x, test)
        more |= {"files": train, "test_files": test}
        if y is not None:
            y, y_test = y[train], y[test]
    elif not by_folder:
        tell_of_known(x, x_test)
    if y is None and by_folder:                                      # read_folder has said why
        y_test, classes = None, ()
    else:
        y, y_test, classes = number_classes(name, y, y_test)

    looked_at = sample_rows(len(x), 100)
    shown = (x[part].flatten(1) for part in in_parts(x, looked_at))
    flat = torch.cat([part.amax(1) == part.amin(1) for part in shown])
    if flat.all():
        raise ValueError(f"{name}: of {len(flat)} images looked at each is of one value throughout")
    if flat.any():
        names = [str(more["files"][row]) for row in looked_at[flat][:3]] if "files" in more else []
        named = f" ({', '.join(names)}{', ...' * (flat.sum() > 3)})" if names else ""
        print(f"note: {flat.sum()} of {len(flat)} images looked at are of one value throughout{named}")
    return Data(x, y, x_test, y_test, classes, **more)
