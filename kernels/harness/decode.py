"""Image files as one array: each decoded once, in threads, whatever it holds; what is broken is named.

    decoded = decode_all(files, "photos", Settings(size=64))         # -> Decoded
    decoded.path                                                     # an .npy file under runs/decoded
    decoded.entries                                                  # of each file: its row, or why none

Photographs, 8 bits of gray or colour, are decoded by Pillow to uint8 [N, size, size] or [N, size, size, 3].
All else are numbers, [N, C, *S] of the files' own kind, which images.py brings to [0, 1] by one rule for the
set: deeper images, any number of channels (TIFF by tifffile), volumes (.npy, NIfTI, pages of a TIFF).
"""
import hashlib
import json
import logging
import math
import os
import re
import warnings
from collections import Counter, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from .. import __version__
from .files import atomic_write_text, write_npy_header
from .numbers import number_range
from .sources import NIFTI, TIFFS, ending

# What decides on what a file becomes. size: of a square canvas, None for its own sides. fit: crop, pad or
# stretch to it. pages: of a TIFF whose pages are not said to be channels: auto and first take the first,
# channels and volume all.
Settings = namedtuple("Settings", "size fit pages", defaults=[64, "crop", "auto"])
# What a file holds. photo: of 8 bits, for Pillow. sides: () if it is fitted to the canvas, else a volume's.
# left_out: pages or frames that are not taken.
Kind = namedtuple("Kind", "photo dtype channels sides left_out")
# target: what all files become, see aim().
Decoded = namedtuple("Decoded", "path entries target kinds")


GRAY = "1", "L", "LA"                                    # Pillow's modes
Image.MAX_IMAGE_PIXELS = None                            # large images are no attack here: they are one's own
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


# ---- One file: what it holds -------------------------------------------------------------------------------
def look(file, settings):
    """The Kind of a file, by its head; any of Pillow's and tifffile's errors if it cannot be read."""
    with open(file, "rb"):                               # rights and the disk come first, in their own words
        kind = ending(file)
    if kind == ".npy":
        array = np.load(file, mmap_mode="r")
        if array.dtype.kind not in "biuf":
            raise ValueError(f"it holds {array.dtype}, no numbers")
        return Kind(False, one_float(array.dtype), 1, array.shape, 0)
    if kind in NIFTI:
        shape = nifti(file).shape
        return Kind(False, "float32", math.prod(shape[3:]), shape[:3], 0)
    if kind in TIFFS:
        return look_into_tiff(file, settings.pages)
    with Image.open(file) as image:
        return kind_of_image(image)


def one_float(dtype):
    """The name of a kind of number. Floats are one kind, whatever their size: all are kept as float32."""
    return "float32" if dtype.kind == "f" else dtype.name


def kind_of_image(image):
    """The Kind of what Pillow has open; ValueError if it would read half of its bits."""
    raw_modes = [str(tile[3]) for tile in getattr(image, "tile", ())]
    if image.mode[:1] not in "IF" and re.search(";16[BLN]", " ".join(raw_modes)):
        raise ValueError(f"a {image.format} of 16 bits a colour, of which Pillow reads 8: write it as TIFF, "
                         "and give the file")
    frames = getattr(image, "n_frames", 1)
    if image.mode == "F" or image.mode.startswith("I"):
        dtype = {"F": "float32", "I": "int32"}.get(image.mode, "uint16")
        return Kind(False, dtype, 1, (), frames - 1)
    return Kind(True, "uint8", 1 if image.mode in GRAY else 3, (), frames - 1)


def look_into_tiff(file, pages):
    import tifffile                                      # a tenth of a second: only where there are any
    with tifffile.TiffFile(file) as tiff:
        alike, left_out = series_of(tiff)
        series = alike[0]
        page = series.keyframe
        if page.dtype is None or page.dtype.kind not in "biuf" or not {*"YX"} <= {*series.axes}:
            raise ValueError(f"it holds {page.dtype} along the axes {series.axes}, no images of numbers")
        refuse_gaps([page])
        count = dict.fromkeys("CSYX", 1) | {"pages": len(alike)}
        for axis, length in zip(series.axes, series.shape):          # axes of pages may have one name
            count[axis if axis in "CSYX" else "pages"] *= length
        samples, channels, planes = count["S"], count["C"], count["pages"]
        alpha = any(sample in (1, 2) for sample in page.extrasamples)
        unnamed = any(sample == 0 for sample in page.extrasamples)   # of which Pillow shows none
        colour = page.photometric.name in ("RGB", "YCBCR", "PALETTE", "SEPARATED", "CIELAB")
        eight_bits = page.dtype.name in ("uint8", "bool") and not unnamed
        whole = pages in ("channels", "volume") and planes > 1
        if eight_bits and channels == 1 and not whole and (colour or samples - alpha == 1):
            return Kind(True, "uint8", 3 if colour else 1, (), planes - 1 + left_out)
        channels *= samples * (planes if pages == "channels" else 1)
        sides = (count["Y"], count["X"])[::-1 if orientation(page) > 4 else 1]
        sides = (planes, *sides) if pages == "volume" and planes > 1 else ()
        return Kind(False, one_float(page.dtype), channels, sides, left_out + (0 if whole else planes - 1))


def series_of(tiff):
    """The series of a TIFF that are as its first, pages written one by one or positions of a stage; and how
    many pages the others have, of other sizes or kinds. What OME's lines name in other files is left out."""
    there = tiff.series
    if tiff.is_ome:
        own = [series for series in there if all(page and page.parent is tiff for page in series.pages)]
        there = own or there

    def kind(series):
        return series.axes, series.shape, series.dtype, series.keyframe.photometric

    alike = [series for series in there if kind(series) == kind(there[0])]
    return alike, sum(len(series.pages) for series in there) - sum(len(series.pages) for series in alike)


def read_series(alike):
    """Their numbers as one array, and the letters of its axes. Of 8 bits where 0 is white it is turned round,
    as Pillow does; deeper ones keep their numbers, as Pillow leaves them."""
    refuse_gaps([page for series in alike for page in series.pages])
    colours = getattr(alike[0].keyframe, "colormap", None)           # [3, 256]
    light = np.zeros(1) if colours is None else colours.sum(0, dtype=np.int64)
    if (np.diff(light) < 0).any():                       # else numbers rise with it, and are what is meant
        raise ValueError("its numbers are those of colours in a palette: write it as RGB")
    x = np.stack([series.asarray() for series in alike]) if len(alike) > 1 else alike[0].asarray()
    if alike[0].keyframe.photometric.name == "MINISWHITE" and x.dtype.name in ("bool", "uint8"):
        x = ~x
    axes = "Q" * (len(alike) > 1) + alike[0].axes
    return turned(x, axes, orientation(alike[0].keyframe)), axes


def orientation(page):
    """How a page of a TIFF lies, 1 to 8, upright if it does not say."""
    tag = page.tags.get(274)
    return int(tag.value) if tag else 1


def turned(x, axes, orientation):
    """Upright, as Pillow shows photographs."""
    rows, columns = axes.index("Y"), axes.index("X")
    if orientation > 4:
        x = x.swapaxes(rows, columns)
    if orientation in (3, 4, 7, 8):
        x = np.flip(x, rows)
    x = np.flip(x, columns) if orientation in (2, 3, 6, 7) else x
    return np.ascontiguousarray(x)                       # torch takes no array that runs backwards


def refuse_gaps(pages):
    """ValueError if pixels of these pages of a TIFF are not in the file: tifffile would make them 0, and
    Pillow take others."""
    gaps = [page is None or 0 in page.dataoffsets or 0 in page.databytecounts for page in pages]
    if any(gaps):
        raise ValueError("it says itself that some of its pixels are not there")


def nifti(file):
    try:
        import nibabel
    except ImportError:
        raise ValueError("NIfTI is read by the package nibabel: pip install nibabel")
    return nibabel.load(file)


# ---- One file: its pixels ----------------------------------------------------------------------------------
def fit_to(image, settings, background=0):
    """A Pillow image on the canvas: its middle, whole within a border, or stretched."""
    if not settings.size:                                # of its own sides
        return image
    canvas = settings.size, settings.size
    if settings.fit == "crop":
        return ImageOps.fit(image, canvas)
    if settings.fit == "pad":
        return ImageOps.pad(image, canvas, color=background)
    return image.resize(canvas)


class Surprise(Exception):
    """A file is not of the kind that a look at some of the files let expect."""


def photograph(data, settings, mode, looked_at=True):
    """-> uint8 [size, size] for mode L or [size, size, 3] for RGB, upright; what is transparent is white; the
    (width, height) it had, its Kind, and whether it is transparent anywhere. Not looked at, it is a Surprise
    if it is none or of colour for L."""
    with Image.open(BytesIO(data)) as image:
        kind = kind_of_image(image)
        if not looked_at and (not kind.photo or (kind.channels == 3 and mode == "L")):
            raise Surprise
        if settings.size:
            image.draft(mode, (settings.size, settings.size))        # large JPEGs: no more pixels than needed
        clear = is_clear(image)
        return photograph_of(image, settings, mode), image.size, kind, clear


def is_clear(image):
    """Whether any pixel of what Pillow has open is not opaque."""
    if not image.has_transparency_data:
        return False
    least, _ = image.convert("RGBA").getchannel("A").getextrema()
    return least < 255


def photograph_of(image, settings, mode="RGB"):
    """The same of an image that Pillow has open."""
    ImageOps.exif_transpose(image, in_place=True)
    background = "black"
    if image.has_transparency_data:
        background = "white"
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = image if image.mode == mode else image.convert(mode)
    return np.asarray(fit_to(image, settings, background))


def picture_of(image, settings):
    """[size, size] in the image's own numbers, or [size, size, 3] of 8 bits, of one that Pillow has open."""
    if not kind_of_image(image).photo:
        return on_canvas(np.asarray(image)[None], settings)[0]
    return photograph_of(image, settings, "L" if image.mode in GRAY else "RGB")


def tiff_planes(data, pages):
    """[C, H, W], or [C, pages, H, W] for pages="volume", in the file's own numbers."""
    import tifffile
    with tifffile.TiffFile(BytesIO(data)) as tiff:
        alike, _ = series_of(tiff)
        x, axes = read_series(alike if pages in ("channels", "volume") else alike[:1])
    channel_axes = [k for k, axis in enumerate(axes) if axis in "CS"]
    page_axes = [k for k, axis in enumerate(axes) if axis not in "CSYX"]
    if pages == "channels":
        channel_axes, page_axes = page_axes + channel_axes, []
    x = x.transpose(channel_axes + page_axes + [axes.index("Y"), axes.index("X")])
    shape = x.shape[len(channel_axes):]
    x = x.reshape(-1, *shape)
    if pages == "volume" and page_axes:
        return x.reshape(len(x), -1, *shape[-2:])
    return x[(slice(None), *[0] * len(page_axes))]


def compressed_tiff(data, kind):
    """[1, H, W] by Pillow, which without a further package knows compressions that tifffile does not."""
    with Image.open(BytesIO(data)) as image:
        same = {"uint16": "I;16", "float32": "F"}.get(kind.dtype) == image.mode[:4]
        if kind.channels > 1 or kind.sides or not same:              # Pillow would change the numbers
            raise ValueError("its compression is read by the package imagecodecs: pip install imagecodecs")
        return np.asarray(image)[None]


def numbers_of(file, data, settings, kind):
    """[C, *S] in the file's own numbers, 2-D ones fitted to the canvas; and the (width, height) it had."""
    if ending(file) == ".npy":
        x = np.load(BytesIO(data))
        return x, None
    if ending(file) in NIFTI:
        x = nifti(file).get_fdata(dtype=np.float32)
        x = np.moveaxis(x.reshape(*x.shape[:3], -1), -1, 0)
        return x, None
    if ending(file) in TIFFS:
        try:
            x = tiff_planes(data, settings.pages)
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            x = compressed_tiff(data, kind)
    else:
        with Image.open(BytesIO(data)) as image:
            x = np.asarray(ImageOps.exif_transpose(image))
            x = x[None] if x.ndim == 2 else np.moveaxis(x, -1, 0)
    if x.ndim == 4:
        return x, None
    height, width = x.shape[1:]
    return on_canvas(x, settings), (width, height)


def on_canvas(x, settings):
    """[C, H, W] of any numbers -> [C, size, size] of the same kind; as it is if it has that size."""
    if not settings.size or x.shape[1:] == (settings.size, settings.size):
        return x
    planes = []
    for plane in x:
        low, high = plane.min(), plane.max()
        image = Image.fromarray(plane.astype(np.float32))
        fitted = np.asarray(fit_to(image, settings, float(low)))
        planes.append(fitted.clip(low, high))            # bicubic goes beyond
    fitted = np.stack(planes)
    narrow = x.dtype.name in STORED                      # all others become float32 anyway
    return fitted.round().astype(x.dtype) if narrow else fitted


def decode(file_and_kind, settings, target):
    """-> the array that stands for a file, and what its entry says of it: content, share cut away, its kind.

    kind None: nobody has looked yet. Then the target is photographs, and anything else is a Surprise.
    """
    file, kind = file_and_kind
    if target["photo"] and kind and not kind.photo:      # Pillow would leave a band out
        raise ValueError(f"it holds {kind.dtype} of {kind.channels} channels, most are photographs")
    data = file.read_bytes()
    content = content_of(data)
    clear = False
    if target["photo"]:
        x, size, kind, clear = photograph(data, settings, target["mode"], looked_at=kind is not None)
    elif kind.photo:
        x, size, _, clear = photograph(data, settings, "L" if kind.channels == 1 else "RGB")
        x = x[None] if x.ndim == 2 else np.moveaxis(x, -1, 0)
    else:
        x, size = numbers_of(file, data, settings, kind)
        x = x.astype(x.dtype.newbyteorder("="), copy=False)
        if x.dtype.kind not in "biuf":
            raise ValueError(f"it holds {x.dtype}, no numbers")
        if x.dtype.kind == "f":
            x = x.astype(np.float32, copy=False)
            if not np.isfinite(x).all():                 # to which numbers beyond float32 belong
                raise ValueError("it holds NaN or infinite numbers")
    entry = {"content": content, "number": status_of(file).st_ino, "kind": list(kind),
             "outside": outside(x, kind.dtype, target)}
    if size and settings.fit == "crop":
        entry["cut"] = 1 - min(size) / max(size)
    if clear:
        entry["clear"] = True
    return finished(x, kind.dtype, target), entry


def outside(x, dtype, target):
    """Share of the numbers of what one file or array holds that the range of its kind cuts off; of a set of
    one kind that is not known yet: 0."""
    if not target["ranges"] or dtype not in target["ranges"]:
        return 0.
    low, high = target["ranges"][dtype]
    return float(((x < low) | (x > high)).mean())


def finished(x, dtype, target):
    """The target's array of what one file or array of this kind holds; ValueError for another shape."""
    if not target["photo"]:
        if len(x) == 1 and target["colour"]:
            x = x.repeat(3, 0)                           # gray among colour
        if target["ranges"]:                             # of several kinds: each by its own range
            if dtype not in target["ranges"]:
                raise ValueError(f"no {dtype} of those that were looked at could be read")
            low, high = target["ranges"][dtype]
            share = (x.astype(np.float64) - low) / (high - low)
            x = (share.clip(0, 1) * 65535).round()
        x = x.astype(target["dtype"], copy=False)
    if [*x.shape] != target["shape"]:
        raise ValueError(f"its shape is {[*x.shape]}; training's, or most files', is {target['shape']}")
    return np.ascontiguousarray(x)


# ---- All files ---------------------------------------------------------------------------------------------
def for_each(function, things, task, most=32):
    """Yield function(thing), or the exception that it raised, in their order, computed in threads. most: of
    the results a thread makes at a time; 1 where they are large."""
    def attempt(thing):
        try:
            return function(thing)
        except Exception as error:                       # whatever Pillow meets in a file
            return error

    threads = os.cpu_count()
    count = min(most, len(things) // (4 * threads) + 1)  # at a time: threads that often meet are slow
    parts = (things[first:first + count] for first in range(0, len(things), count))
    bar = tqdm(total=len(things), desc=task, delay=1, unit="file")
    with ThreadPoolExecutor(threads) as pool, bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")                  # Pillow's, by the screenful

        def begin(most):
            return [pool.submit(lambda part: [*map(attempt, part)], part) for part in islice(parts, most)]

        waiting = deque(begin((4 if most > 1 else 1) * threads))     # no more are in memory
        while waiting:
            results = waiting.popleft().result()
            waiting += begin(1)
            bar.update(len(results))
            yield from results


def one_line(error):
    text = " ".join(str(error).split())
    if isinstance(error, UnidentifiedImageError):
        return "cannot identify image file"              # Pillow goes on with a name or an address in memory
    if "pickle" in text and not isinstance(error, OSError):
        return "it holds Python objects or is no .npy file"          # not NumPy's advice, to run it
    return text.replace("<_io.BytesIO object", "the file").split(" at 0x")[0] or type(error).__name__


def most_common(values):
    return Counter(values).most_common(1)[0][0]


# As what numbers are kept; all others as float32.
STORED = {"bool": "uint8", "uint8": "uint8", "int8": "int8", "uint16": "uint16", "int16": "int16"}


def aim(kinds, settings, files):
    """What all files become: photo, mode, channels, shape, dtype, ranges by kind of number (None: one kind).

    The most common sides, and channels, decide; gray beside photographs in colour becomes colour, and files
    of other channels than most have no say.
    """
    kinds = [kind for kind in kinds if kind]
    sides = most_common([kind.sides for kind in kinds])
    kinds = [kind for kind in kinds if kind.sides == sides]
    channels = most_common([kind.channels for kind in kinds])
    alike = {1, 3} if channels in (1, 3) else {channels}
    kinds = [kind for kind in kinds if kind.channels in alike]
    colour = channels in (1, 3) and any(kind.photo and kind.channels == 3 for kind in kinds)
    channels = 3 if colour else channels
    photo = all(kind.photo for kind in kinds if colour or kind.channels == channels)
    target = {"photo": photo, "volumes": bool(sides), "channels": channels, "colour": colour,
              "ranges": None}
    if target["photo"]:
        target["mode"] = "L" if channels == 1 else "RGB"
        canvas = [settings.size] * 2
        shape = canvas if channels == 1 else [*canvas, 3]
        return target | {"shape": shape, "dtype": "uint8", "of": "uint8"}
    kinds = [kind for kind in kinds if kind.channels == channels or (colour and kind.channels == 1)]
    volume_file = any(ending(file) == ".npy" for file in files)
    shape = [*sides] if volume_file else [channels, *(sides or [settings.size] * 2)]
    target["shape"] = shape
    dtypes = sorted({kind.dtype for kind in kinds})
    dtype, = dtypes if len(dtypes) == 1 else ["uint16"]
    target["of"] = dtype                                 # before it is stored as something wider
    target["dtype"] = STORED.get(dtype, "float32")
    if len(dtypes) > 1:
        target["ranges"] = {dtype: None for dtype in dtypes}
    return target


def at_a_time(target):
    """How many files of it a thread decodes at a time: one, if they are large."""
    return max(1, min(32, 2**22 // max(1, math.prod(target["shape"]))))


def some_of(x, most=2**20):
    """At most so many of an array's numbers, at random, the same ones at each call; 1-D."""
    if x.size <= most:
        return x.ravel()
    return x.ravel()[np.random.default_rng(0).integers(x.size, size=most)]


def ranges_by_kind(files, kinds, settings, target, wanted_range):
    """{kind of number: (low, high)}, each of up to 50 files."""
    ranges = {}
    plain = target | {"ranges": None, "dtype": "float32"}
    for dtype in target["ranges"]:
        own = [pair for pair in zip(files, kinds) if pair[1] and pair[1].dtype == dtype]
        spread = own[::-(-len(own) // 50)]
        read = partial(decode, settings=settings, target=plain)
        found = for_each(read, spread, "sampling", at_a_time(target))
        sample = [some_of(result[0]) for result in found if not isinstance(result, Exception)]
        if not sample:
            continue
        sample = np.concatenate(sample)
        if wanted_range or sample.min() < sample.max():
            low, high, _ = number_range(dtype, sample, wanted_range)
        else:                                            # of one value, which becomes 0
            low = float(sample[0])
            high = low + 1
        ranges[dtype] = [low, high]
    return ranges


def kind_of(entry):
    if entry["kind"] is None:
        return None
    photo, dtype, channels, sides, left_out = entry["kind"]
    return Kind(photo, dtype, channels, tuple(sides), left_out)


def marks_of(files):
    """What changes if a file does: where it lies, links resolved, its size and time. Of a link to nothing its
    own."""
    resolved = cache(os.path.realpath)                   # of folders, of which many files are
    marks = []
    for file in files:
        name = os.fspath(file)
        folder, own = os.path.split(name)
        place = os.path.realpath(name) if os.path.islink(name) else os.path.join(resolved(folder), own)
        status = status_of(name)
        marks.append(f"{os.fsencode(place).hex()} {status.st_size} {status.st_mtime_ns}")
    return marks


def status_of(file):
    try:
        return os.stat(file)
    except OSError:                                      # a link to nothing
        return os.lstat(file)


def content_of(data):
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def moved(files, marks, entries):
    """Files that changed places have the marks of others, but a number on the disk of their own. Of all that
    have another number than what was decoded: {mark: content now} of those of other content; and whether
    there are others, whose entries get the number that they have now."""
    others = [(file, own) for file, own in zip(files, marks)
              if entries[own].get("number", 0) != status_of(file).st_ino and entries[own].get("content")]
    contents = for_each(lambda pair: content_of(pair[0].read_bytes()), others, "comparing")
    changed = {}
    for (file, own), content in zip(others, contents):
        if content != entries[own]["content"]:
            changed[own] = str(content)
        else:
            entries[own]["number"] = status_of(file).st_ino
    return changed, len(others) > len(changed)


@cache
def readers():
    """Versions of what reads files: another one may read what this one cannot."""
    found = [__version__]
    for package in ("pillow", "tifffile", "imagecodecs", "nibabel"):
        try:
            found.append(version(package))
        except PackageNotFoundError:
            found.append("none")
    return " ".join(found)


def read_index(path):
    """What stands beside an array, {"settings", "range", "target", "entries"}; None if either is cut short,
    another layout's or not there."""
    try:
        found = json.loads(path.read_text())
        array = np.load(path.with_suffix(".npy"), mmap_mode="r")
        target = found["target"]
        rows = [entry["row"] for entry in found["entries"].values() if entry["row"] is not None]
        whole = [*array.shape[1:]] == target["shape"] and array.dtype == target["dtype"]
        fits = whole and sorted(rows) == [*range(len(array))]
        [kind_of(entry) for entry in found["entries"].values()]
        return found if fits and {"settings", "range", "entries"} <= found.keys() else None
    except (ValueError, LookupError, TypeError, AttributeError, OSError, EOFError):
        return None


def known_entries(folder, name, settings):
    """The index of the newest array of the same name and settings, and its path; an empty one and None."""
    indexes = sorted(folder.glob(f"{glob_escape(name)}-*.json"), key=lambda path: -path.stat().st_mtime_ns)
    for index in indexes:
        found = read_index(index)
        if found and found["settings"] == settings:
            return found, index.with_suffix(".npy")
    return {"entries": {}, "target": None, "range": None}, None


def glob_escape(name):
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def decode_all(files, name, settings, wanted_range=None):
    """Decoded of all files: an array under runs/decoded, and for each file its entry.

    An entry has its row, or the reason why it has none. A second start finds the array; where files were
    added, changed or removed, only what is new is decoded. ValueError if nothing can be written.
    """
    folder = Path("runs", "decoded")
    marks = marks_of(files)
    words = [str(settings), str(wanted_range), readers(), *marks]

    def kept():
        key = hashlib.sha256("\n".join(words).encode()).hexdigest()[:12]
        path = folder / f"{name}-{key}.npy"
        found = read_index(path.with_suffix(".json"))
        return path, found if found and {*marks} <= found["entries"].keys() else None

    path, found = kept()
    passing = {own for own in marks if found and found["entries"][own].get("passing")}
    back = [own for own, file in zip(marks, files) if own in passing and opens(file)]
    changed, renumbered = moved(files, marks, found["entries"]) if found else ({}, False)
    if renumbered:                                       # else all are compared each time
        with suppress(OSError):
            atomic_write_text(path.with_suffix(".json"), json.dumps(found))
    if back or changed:                                  # another array: a run may be at work on that one
        words += [*back, *changed, *changed.values()]
        path, found = kept()
    if found:
        print(f"decoded images: found in {path}")
    else:
        once = dict(zip(marks, files))                   # links to one file are one
        found = decode_new([*once.values()], [*once], name, settings, wanted_range, path, changed)
        print(f"decoded images: kept in {path}; what is added or changed is decoded then")
    entries = [found["entries"][own] for own in marks]
    kinds = [kind_of(entry) for entry in entries]
    return Decoded(path, entries, found["target"], kinds)


def opens(file):
    """Whether a file can be read now."""
    try:
        with open(file, "rb") as data:
            return bool(data.read(1))
    except OSError:
        return False


def no_entry(error):
    """The entry of a file that could not be read. passing: by no fault of its own, it seems, but of rights,
    the disk or memory; it is tried again once it opens."""
    passing = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)
    return {"kind": None, "row": None, "reason": one_line(error), "passing": passing}


def decode_new(files, marks, name, settings, wanted_range, path, changed=()):
    """Writes path and its index, with rows of an earlier array where files are the same; changed: marks of
    files that are not."""
    made_by = [*settings, readers()]
    wanted_range = list(wanted_range) if wanted_range else None      # as JSON gives it back
    earlier, array = known_entries(path.parent, name, made_by)
    before = {own: entry for own, entry in earlier["entries"].items()
              if not entry.get("passing") and own not in changed}
    made_by = {"settings": made_by, "range": wanted_range}
    target = None if before else likely_target(files, settings)
    if target:                                           # a tenth faster than to look at all of them first
        entries = {own: {"kind": None, "row": None, "reason": None} for own in marks}
        pairs = [(file, None) for file in files]
        try:
            return write(path, marks, made_by, target, entries, pairs, settings)
        except Surprise:
            pass
    unseen = [file for file, own in zip(files, marks) if own not in before]
    seen = for_each(partial(look, settings=settings), unseen, "looking at")
    looked = dict(zip(unseen, [*seen]))
    entries = {}
    for file, own in zip(files, marks):
        found = looked.get(file)
        if own in before:
            entries[own] = dict(before[own])
        elif isinstance(found, Exception):
            entries[own] = no_entry(found)
        else:
            entries[own] = {"kind": list(found), "row": None, "reason": None}
    kinds = [kind_of(entries[own]) for own in marks]
    if not any(kinds):
        raise ValueError(f"none of {len(files)} files can be read; {files[0]}: {entries[marks[0]]['reason']}")
    target = aim(kinds, settings, files)
    if target["ranges"]:                                 # of these files, whatever an earlier array held
        target["ranges"] = ranges_by_kind(files, kinds, settings, target, wanted_range)
    if earlier["target"] != target:
        before = {}
        for own, kind in zip(marks, kinds):
            if kind:                                     # what was no image of that target may be one of this
                entries[own] = {"kind": entries[own]["kind"], "row": None, "reason": None}
    old = np.load(array, mmap_mode="r") if before else None
    pairs = [(file, kind) for file, own, kind in zip(files, marks, kinds) if kind and own not in before]
    return write(path, marks, made_by, target, entries, pairs, settings, before, old)


def likely_target(files, settings):
    """What all files become, by a look at fifty of them; None if they are few, or not all photographs."""
    if len(files) < 500 or any(ending(file) in (".npy", *NIFTI, *TIFFS) for file in files):
        return None
    some = files[::len(files) // 50]
    found = for_each(partial(look, settings=settings), some, "looking at")
    kinds = [kind for kind in found if isinstance(kind, Kind)]
    target = aim(kinds, settings, files) if kinds else {"photo": False}
    return target if target["photo"] else None


def write(path, marks, made_by, target, entries, pairs, settings, before=(), old=None):
    """Writes the array of all files and its index -> what read_index() gives.

    pairs: (file, kind) of those that are to be decoded; before: entries whose rows are taken from `old`.
    """
    read = partial(decode, settings=settings, target=target)
    results = for_each(read, pairs, "decoding", at_a_time(target))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".decoding-", dir=path.parent) as scratch:    # gone if this ends early
            part = Path(scratch, "images.npy")
            with open(part, "wb") as out, closing(results):
                write_rows(out, marks, entries, before, old, results, target)
            if old is not None:
                old._mmap.close()                        # Windows replaces no file that is mapped
            there = read_index(path.with_suffix(".json"))
            if there and {*marks} <= there["entries"].keys():
                return there                             # another start's, on which it may be at work
            part.replace(path)
            found = made_by | {"target": target, "entries": entries}
            text = Path(scratch, "index.json")
            text.write_text(json.dumps(found))
            text.replace(path.with_suffix(".json"))
    except OSError as error:                             # what a broken file raises is an entry's reason
        raise ValueError(f"cannot write what {len(marks)} files decode to below {Path.cwd()} "
                         f"({error.strerror}): make room, a smaller --size, or start in another folder")
    return found


def write_rows(out, marks, entries, before, old, results, target):
    """The arrays of all files that have one, one after the other; their entries get rows or reasons."""
    write_npy_header(out, target["dtype"], (len(marks), *target["shape"]))
    count = 0
    for own in marks:
        entry = entries[own]
        if entry["reason"]:
            continue
        if own in before:
            out.write(old[before[own]["row"]].tobytes())
        else:
            result = next(results)
            if isinstance(result, Surprise):
                raise result
            if isinstance(result, Exception):
                entry.update(no_entry(result), kind=entry["kind"])
                continue
            x, more = result
            out.write(x.tobytes())
            entry.update(more, reason=None)
        entry["row"] = count
        count += 1
    assert next(results, None) is None, "rows went to other files"
    out.seek(0)
    write_npy_header(out, target["dtype"], (count, *target["shape"]))
