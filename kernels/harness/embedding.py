"""Features of images, as they come: read as the encoder's training did, encoded, written, compared.

    names, read = open_data("photos", prepare)
    for rows, h, skipped in embed(encoder, prepare, names, read): ...

Files are decoded while others are encoded; no more than a few batches are in memory.
"""
import os
import zipfile
from contextlib import suppress
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F

from .arrays import Raw, read_tiff_stack
from .decode import Settings, at_a_time, for_each, one_line
from .digits import posed_digits
from .files import atomic_write, atomic_write_text, write_npy_header
from .folders import all_files, left_out, taken
from .images import sample_rows
from .page import write_page
from .prepare import load_encoder
from .reading import read_arrays
from .sources import BUILT_IN, IMAGES, NIFTI, TIFFS, ending, problem

COMPARED = 10_000                                        # features, at most, for the page


# ---- What is embedded: names [n], and read(row) -> an array as prepare.array() gives it --------------------
def files_of(path, prepare):
    """The image files below a folder, by names relative to it; or one file."""
    if not path.is_dir():
        return [path.name], lambda row: prepare.array(path)
    there = all_files(path)
    least = 1 if prepare.target["photo"] and not prepare.arrays else 5
    order = IMAGES, NIFTI, (".npy",)
    if prepare.target["volumes"] and prepare.settings.pages != "volume":     # of no TIFFs: pictures come last
        order = (NIFTI, (".npy",), IMAGES) if prepare.layout == "first" else ((".npy",), NIFTI, IMAGES)
    files = taken(there, least, order)
    names = [os.path.relpath(file, path) for file in files]
    if not names:
        raise ValueError(f"{path} holds no files that end in {', '.join(sorted(IMAGES))}, .nii or .npy")
    others = left_out(there, files)
    if others:
        print(f"note: taken {len(files):,} of {len(there):,} files; left out: {others}")
    return names, lambda row: prepare.array(path / names[row])


def rows_of(found, prepare):
    """The images of arrays: those for training, those for testing."""
    sets = [(split, found[f"{split}_images"]) for split in ("train", "test") if f"{split}_images" in found]
    places = [(split, raw, row) for split, raw in sets for row in range(len(raw.array))]
    names = [f"{split} {row}" if len(sets) > 1 else str(row) for split, _, row in places]

    def read(row):
        _, raw, own = places[row]
        x = raw.array[own]
        if raw.channels and raw.channels != prepare.given:
            x = np.moveaxis(x, -1, 0) if raw.channels == "last" else np.moveaxis(x, 0, -1)
        return prepare.array(x)

    return names, read


def pages_of(path, prepare):
    """What a TIFF is as a stack, if training's images came as arrays and its pages are such images; or else
    None, since it is one image, as a file of a folder is."""
    if not prepare.arrays or prepare.target["volumes"]:
        return None
    try:
        found = read_tiff_stack(path)
    except ValueError:
        return None
    count, *shape = found["train_images"].array.shape
    own = prepare.target["shape"]
    return found if count > 1 and own in (shape, shape[1:], [*shape[1:], shape[0]]) else None


def open_data(name, prepare):
    """Of any --data, or one image file; ValueError or OSError if it cannot be read."""
    path = Path(name)
    if name in BUILT_IN:
        data = posed_digits(axes=BUILT_IN[name])
        sets = {"train_images": data.images, "test_images": data.test_images}
        return rows_of({key: Raw(x.numpy(), "first") for key, x in sets.items()}, prepare)
    if path.is_file() and ending(path) in (*IMAGES, *NIFTI):
        stack = pages_of(path, prepare) if ending(path) in TIFFS else None
        return rows_of(stack, prepare) if stack else files_of(path, prepare)
    wrong = problem(name)
    if wrong:
        raise ValueError(wrong)
    if prepare.target["volumes"] and ending(path) == ".npy" and path.is_file():
        with suppress(Exception):                        # read_arrays says what is wrong
            axes = len(prepare.target["shape"]) - bool(prepare.layout)
            if np.load(path, mmap_mode="r").ndim == axes:            # one volume, and no set of images
                return files_of(path, prepare)
    channels_last = prepare.given == "last" and not prepare.target["photo"]
    found = read_arrays(name, Settings(prepare.settings.size or 64, prepare.settings.fit), channels_last)
    return rows_of(found, prepare) if found else files_of(path, prepare)


# ---- Features, as they come --------------------------------------------------------------------------------
@torch.inference_mode()
def embed(encoder, prepare, names, read, device="cpu", batch=256):
    """Yield (rows, features [n, E] on the CPU, [(name, reason)] of those that cannot be read), in order."""
    results = for_each(read, range(len(names)), "embedding", at_a_time(prepare.target))
    for first in range(0, len(names), batch):
        rows, arrays, skipped = [], [], []
        for row, result in enumerate(islice(results, batch), first):
            if isinstance(result, Exception):
                skipped.append((names[row], one_line(result)))
            else:
                rows.append(row)
                arrays.append(result)
        h = torch.empty(0, encoder.features)
        if rows:
            h = encoder(prepare.scale(np.stack(arrays)).to(device)).cpu()
            wrong = (~h.isfinite().all(dim=1)).nonzero().flatten()
            if len(wrong):
                raise ValueError(f"the features of {names[rows[wrong[0]]]} are not finite: its numbers are "
                                 "far from those of training's images")
        yield rows, h, skipped


class Nearest:
    """The ten of all features that are seen whose cosine with one image's is largest."""

    def __init__(self, query):
        self.query = F.normalize(query)                  # [1, E]
        self.found = []

    def see(self, names, h):
        if len(h):
            cosines = (F.normalize(h) @ self.query.T).flatten().clamp(-1, 1)
            self.found += zip(cosines.tolist(), map(str, names))
            self.found = sorted(self.found, key=lambda pair: -pair[0])[:10]

    def tell(self):
        print("  cosine  file")
        for cosine, name in self.found:
            print(f"{cosine:8.4f}  {as_line(name)}")


# ---- Files of features -------------------------------------------------------------------------------------
def as_line(name):
    """A file's name as one line of text that any program reads; bytes that are no UTF-8 as \\udce4."""
    return " ".join(name.splitlines()).encode(errors="backslashreplace").decode()


def csv_line(name, h):
    quoted = name.replace('"', '""')
    numbers = ",".join(f"{value:.8g}" for value in h)
    line = f'"{quoted}",{numbers}\n'                      # a name may have lines of its own
    return line.encode(errors="backslashreplace")


def write_features(path, names, parts, width):
    """Writes what embed() gives to .npz (features, files), .npy (and names to a .txt beside) or .csv."""
    kept = []
    with TemporaryDirectory(prefix=".embedding-", dir=path.parent) as scratch, atomic_write(path) as out:
        rows_file = out if path.suffix != ".npz" else open(Path(scratch, "features.npy"), "wb")
        if path.suffix == ".csv":
            head = ",".join(["file", *map(str, range(width))])
            out.write(f"{head}\n".encode())
        else:
            write_npy_header(rows_file, np.float32, (len(names), width))
        for rows, h, *_ in parts:
            own = [names[row] for row in rows]
            kept += own
            if path.suffix == ".csv":
                out.writelines(map(csv_line, own, h.tolist()))
            else:
                rows_file.write(h.numpy().tobytes())
        if path.suffix != ".csv":
            rows_file.seek(0)
            write_npy_header(rows_file, np.float32, (len(kept), width))
        if path.suffix == ".npz":
            rows_file.close()
            with zipfile.ZipFile(out, "w") as archive:
                archive.write(rows_file.name, "features.npy")
                longest = max(map(len, kept), default=1)
                with archive.open("files.npy", "w", force_zip64=True) as inner:
                    write_npy_header(inner, f"<U{longest}", (len(kept),))
                    for first in range(0, len(kept), 10_000):
                        inner.write(np.array(kept[first:first + 10_000], f"<U{longest}").tobytes())
    if path.suffix == ".npy":
        lines = [f"{as_line(name)}\n" for name in kept]
        atomic_write_text(path.with_suffix(".txt"), "".join(lines))
    return kept


def is_own(file):
    """Whether a file is what this command writes under such a name."""
    try:
        if file.suffix == ".npz":
            with zipfile.ZipFile(file) as archive:
                return {*archive.namelist()} == {"features.npy", "files.npy"}
        if file.suffix == ".npy":
            array = np.load(file, mmap_mode="r")
            names = file.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
            return array.dtype == np.float32 and array.ndim == 2 and len(array) == len(names)
        if file.suffix == ".csv":
            with open(file, encoding="utf-8") as text:
                first, *numbers = text.readline().strip().split(",")
            return first == "file" and numbers == [*map(str, range(len(numbers)))] != []
        if file.suffix == ".html":
            text = file.read_bytes()
            return b"<p>Features of " in text and b'<script id="data" type="application/json">' in text
        if file.name.endswith(".skipped.txt"):
            out = file.name.removesuffix(".skipped.txt")
            beside = [file.with_name(out + ending) for ending in (".npz", ".npy", ".csv")]
            listed = all(": " in line for line in file.read_text(encoding="utf-8").splitlines())
            return listed and any(map(is_own, filter(Path.exists, beside)))
        return is_own(file.with_suffix(".npy"))          # the names beside it
    except Exception:                                    # any of a dozen kinds, of files of another kind
        return False


def refuse_to_overwrite(args):
    """ValueError if --out, or what is written beside it, is a file of anybody else's."""
    written = [args.out, args.out.with_suffix(".skipped.txt")]
    if args.out.suffix == ".npy":
        written.append(args.out.with_suffix(".txt"))
    if not args.no_page:
        written.append(args.out.with_suffix(".html"))
    for file in filter(Path.exists, written):
        if os.path.exists(args.data) and file.samefile(args.data):
            raise ValueError(f"--out {args.out}: {file} is the data itself: give another --out")
        if not is_own(file):
            raise ValueError(f"--out {args.out}: {file} is there, and is not known to be an earlier output "
                             "of this command: give another --out, or move that file away")


def another_beside(out):
    """Whether the page and the list beside may be those of an output of this name in another format."""
    others = {".npz", ".npy", ".csv"} - {out.suffix}
    return any(out.with_suffix(ending).exists() for ending in others)


def remove_stale(file):
    """What an earlier output had beside it, and this one has not."""
    if is_own(file):
        file.unlink()
        print(f"removed: {file}, of an earlier output")


# ---- The command python -m kernels.embed -------------------------------------------------------------------
def command(args):
    """ValueError or OSError with one line that says what is wrong."""
    if args.out:
        refuse_to_overwrite(args)
    encoder, prepare = load_encoder(args.run)
    nearest = None
    if args.like:
        nearest = Nearest(query_of(args.like, encoder, prepare))
        prepare = load_encoder(args.run)[1]              # its counts are those of data alone
    if not args.data:
        return like_in_run(args.run, nearest)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        encoder.to(device)
    except Exception as error:                           # any of a dozen kinds
        raise ValueError(f"cannot use --device {device} ({one_line(error)}): try --device cpu")
    names, read = open_data(args.data, prepare)
    wanted = {*sample_rows(len(names), COMPARED).tolist()}
    compared, features, skipped = [], [], []

    def watched():
        for rows, h, broken in embed(encoder, prepare, names, read, device, args.batch):
            skipped.extend(broken)
            chosen = [k for k, row in enumerate(rows) if row in wanted]
            compared.extend(rows[k] for k in chosen)
            features.append(h[chosen])
            if nearest:
                nearest.see([names[row] for row in rows], h)
            yield rows, h
        if len(skipped) > len(names) / 10:
            (name, reason), *rest = skipped
            raise ValueError(
                f"{len(skipped):,} of {len(names):,} cannot be embedded, of which one in ten may be skipped: "
                f"{name} ({reason}); {len(rest):,} other")

    stale = args.out and args.out.exists() and not another_beside(args.out)
    if args.out:
        kept = write_features(args.out, names, watched(), encoder.features)
        count = len(kept)
    else:
        count = sum(len(rows) for rows, _ in watched())
    tell(args, prepare, count, skipped, encoder)
    if stale and not skipped:
        remove_stale(args.out.with_suffix(".skipped.txt"))
    page = args.out and args.out.with_suffix(".html")
    if page and not args.no_page and len(compared) > 1:
        def load(rows):
            return prepare.scale(np.stack([read(compared[row]) for row in rows]))
        lead = f"Features of {args.data} by the encoder of {args.run}."
        if count > len(compared):
            lead += f" Compared are {len(compared):,} of {count:,}, drawn at random."
        write_page(page, args.data, load, torch.cat(features), [names[row] for row in compared], lead=lead)
        print(f"page: {page}")
    elif stale:
        remove_stale(page)
    if nearest:
        nearest.tell()


def query_of(file, encoder, prepare):
    try:
        with torch.inference_mode():
            query = encoder(prepare(file))
        for what in prepare.taken_as:
            print(f"--like {file}: {what}")
        if prepare.far:
            print(f"--like {file}: {prepare.far / prepare.seen:.2%} of its pixels lie far outside 0 to 1")
        if prepare.outside:
            share = prepare.outside / prepare.seen
            print(f"--like {file}: {share:.2%} of its pixels lie outside training's range, and are cut")
        return query
    except Exception as error:                           # any of Pillow's
        raise ValueError(f"--like {file} cannot be read ({one_line(error)})")


def like_in_run(run, nearest):
    run = Path(run)
    path = (run if run.is_dir() else run.parent) / "features.npz"
    try:
        with np.load(path) as found:
            for split in ("train", "test"):
                names = [f"{name} ({split})" for name in found[f"{split}_files"]]
                nearest.see(names, torch.from_numpy(found[f"{split}_features"]))
    except Exception as error:                           # missing, cut short, an earlier version's
        raise ValueError(f"{path} has no features with names ({one_line(error)}): give data after the run")
    nearest.tell()


def tell(args, prepare, count, skipped, encoder):
    """What was done, and what was changed or left out."""
    print(f"embedded: {count:,} images of {args.data}, {encoder.features} features each"
          + (f"; {args.out}" if args.out else ""))
    for what, how_many in prepare.taken_as.items():
        print(f"note: {how_many:,} images were {what}")
    if prepare.far:
        print(f"note: {prepare.far / prepare.seen:.2%} of the pixels lie far outside 0 to 1, where "
              "training's images lay")
    if prepare.outside:
        of = f"{prepare.low:,.6g} to {prepare.high:,.6g}, the range of training's images,"
        if prepare.target["ranges"]:
            of = "the ranges of training's kinds of files,"
        print(f"note: {prepare.outside / prepare.seen:.2%} of the pixels lie outside {of} and are cut")
    if skipped:
        lines = "".join(f"{as_line(name)}: {reason}\n" for name, reason in skipped)
        place = ""
        if args.out:
            place = f", listed in {args.out.with_suffix('.skipped.txt')}"
            atomic_write_text(args.out.with_suffix(".skipped.txt"), lines)
        print(f"note: {len(skipped):,} could not be read{place}: {lines.splitlines()[0]}")
