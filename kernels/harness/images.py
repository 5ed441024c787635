"""Sets of images as tensors in [0, 1]: in memory, or on the disk and read when asked for.

    x = pixels(data.images, rows, "cuda")        # float32 [n, C, *S] in [0, 1], of reading.py's Data
    h = encode(encoder, data.images)             # [N, E]

Arrays that lie on disk stay there, and nothing makes a float copy of a whole set. Needs numpy and tqdm beside
torch.
"""
import math
import zlib
from collections import namedtuple

import numpy as np
import torch
from tqdm import tqdm

from .numbers import number_range
from .processes import NotFinite

# images [N, C, *S]: a tensor, uint8 (0 to 255) or float (0 to 1), or Images, which gives such tensors.
# labels [N] int64, numbers of `classes`, or None.
# view(batch, generator): a random view of a batch, for who trains on it.
# files, test_files: the name of each image, relative to the folder; of arrays its row; or None.
# skipped: [(name, reason)] of files that cannot be read.
# numbers: what became of the numbers in the files, {"dtype", "low", "high", "rule", "outside"}.
# whole(rows): training images before anything was cut off, or None.
# prepare: prepare.py's Prepare, by which other files become such images, or None.
FIELDS = "images labels test_images test_labels classes view files test_files skipped numbers whole prepare"
Data = namedtuple("Data", FIELDS, defaults=[(), None, None, None, (), None, None, None])


# ---- Sets of images ----------------------------------------------------------------------------------------
class Images:
    """The images `rows` of an array in memory or mapped from an .npy file, brought to [0, 1] when asked for.

    images[index] -> tensor [len(index), C, *S]: uint8 if low, high are 0, 255 and the array is, else float32.
    """

    def __init__(self, raw, low, high, rows=None):
        self.raw = raw
        self.low = low
        self.high = high
        self.rows = torch.arange(len(raw.array)) if rows is None else torch.as_tensor(rows)
        self.plain = raw.array.dtype == np.uint8 and (low, high) == (0, 255)
        self.shape = len(self), *self[:1].shape[1:]

    def __len__(self):
        return len(self.rows)

    def numbers(self, index):
        """As the file has them, channels first."""
        array = self.raw.array
        if isinstance(array, np.memmap):
            array = np.load(array.filename, mmap_mode="r")           # anew: what was read leaves the memory
        x = array[self.rows[index].numpy()]
        if self.raw.channels is None:
            return x[:, None]
        return x if self.raw.channels == "first" else np.moveaxis(x, -1, 1)

    def __getitem__(self, index):
        x = self.numbers(index)
        if self.plain:
            return torch.from_numpy(np.ascontiguousarray(x))
        exact = x.dtype.itemsize <= 2 or x.dtype.name == "float32"   # as float32
        x = x.astype(np.float32 if exact else np.float64)
        x -= x.dtype.type(self.low)
        x /= x.dtype.type(self.high - self.low)
        x = x.clip(0, 1).astype(np.float32, copy=False)
        return torch.from_numpy(x)


def choose(images, rows):
    """These rows as a set of their own."""
    if isinstance(images, Images):
        return Images(images.raw, images.low, images.high, images.rows[rows])
    return images[rows]


def pixels(images, rows, device="cpu"):
    """These rows as float [len(rows), C, *S] on the device."""
    x = images[rows].to(device).contiguous()
    return x / 255 if x.dtype == torch.uint8 else x


def in_parts(images, rows=None):
    """Row numbers in parts of 256 images, fewer if they are large; a bar where it takes seconds."""
    if rows is None:
        rows = torch.arange(len(images))
    fitting = max(1, 2**23 // images[:1].numel())
    return tqdm(rows.split(min(256, fitting)), delay=3, leave=False)


def fixed_order(n):
    """Row numbers 0 to n - 1 in random order, the same one in every run."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def sample_rows(n, most):
    """All row numbers below n, or `most` at random, in order."""
    return fixed_order(n)[:most].sort().values


def digest(data):
    """CRC-32 of 100 training and 100 test images, of how many there are, of all labels and classes: whether a
    resumed run finds its own, and whether two runs' accuracies are of one test."""
    mark = zlib.crc32("\n".join(map(str, data.classes)).encode(errors="replace"))
    for images, labels in ((data.images, data.labels), (data.test_images, data.test_labels)):
        mark ^= len(images)
        for part in in_parts(images, sample_rows(len(images), 100)):
            mark = zlib.crc32(images[part].numpy().tobytes(), mark)
        if labels is not None:
            mark = zlib.crc32(labels.numpy().tobytes(), mark)
    return mark


@torch.no_grad()
def encode(function, images, rows=None, device=None, axis=0):
    """function(batch [n, C, *S]) of all images, or of these rows: its results, joined at axis.

    device: where batches are; if not given, where the weights of a module are, or on the CPU. NotFinite if a
    result is NaN or infinite.
    """
    if device is None:
        weights = function.parameters() if isinstance(function, torch.nn.Module) else ()
        device = next((weight.device for weight in weights), "cpu")
    parts = [function(pixels(images, part, device)) for part in in_parts(images, rows)]
    found = torch.cat(parts, axis)
    if not found.isfinite().all():
        raise NotFinite("what it gives is not finite")
    return found


def limited(data, most=10_000):
    """The data with `most` images of each split at most, the same in every run: what probes look at."""
    if max(len(data.images), len(data.test_images)) <= most:
        return data
    train = sample_rows(len(data.images), most)
    test = sample_rows(len(data.test_images), most)
    files, test_files = names_of(data)
    data = data._replace(images=choose(data.images, train), test_images=choose(data.test_images, test),
                         files=files[train], test_files=test_files[test])
    if data.labels is None:
        return data
    return data._replace(labels=data.labels[train], test_labels=data.test_labels[test])


def names_of(data):
    """Of each training and each test image its file, or its row in the array that it came in."""
    if data.files is None:
        return np.arange(len(data.images)), np.arange(len(data.test_images))
    return np.array(data.files), np.array(data.test_files)


def class_names(data, rows):
    """The names of the classes of these test images, a list; None if there are no labels."""
    if data.labels is None:
        return None
    return [str(data.classes[label]) for label in data.test_labels[rows]]


# ---- What the numbers mean ---------------------------------------------------------------------------------
def extremes(name, images):
    """Least and greatest of all numbers; ValueError if one of them is NaN or infinite."""
    least, greatest = np.inf, -np.inf
    for part in in_parts(images):
        x = images.numbers(part)
        least, greatest = min(least, x.min()), max(greatest, x.max())
        if not np.isfinite([least, greatest]).all():                 # min and max pass NaN on
            raise ValueError(f"{name} holds NaN or infinite numbers: clean it first")
    return least, greatest


def some_numbers(images, most):
    """Some of the numbers in the files, 1-D: of 100 to 4,000 images, drawn at random, evenly from each."""
    each = images[:1].numel()
    rows = sample_rows(len(images), min(4000, max(100, most // each)))
    step = max(1, each * len(rows) // most)
    while math.gcd(step, each) > 1:                                  # else of some columns alone
        step += 1
    parts = [images.numbers(part).ravel()[::step] for part in in_parts(images, rows)]
    return np.concatenate(parts)


def tell_of_unused(name, images, low, high):
    """A note where most of the range serves a few images, or one number that may stand for no data."""
    each = images[:1].numel()
    places = np.random.default_rng(0).integers(each, size=10_000)
    rows = sample_rows(len(images), 50).split(1)
    some = np.stack([images.numbers(row).ravel()[places].astype(np.float64) for row in rows])
    some = some.clip(low, high)
    middle = float(np.median(np.percentile(some, 99.9, axis=1)))
    levels = np.percentile(some, np.linspace(0, 100, 1001), method="nearest")
    gap = np.diff(levels).argmax()
    start, end = levels[gap:gap + 2]
    ends = sorted(len(np.unique(side)) for side in (levels[:gap + 1], levels[gap + 1:]))
    filled = ends[0] == 1 and ends[1] >= 10                          # else a mask's or a drawing's few
    found = None
    if middle < low + (high - low) / 5:
        share = (middle - low) / (high - low)
        found = (f"half of the images stay below {middle:,.6g}, {share:.0%} of the range {low:,.6g} to "
                 f"{high:,.6g}, which few others fill; --range LOW HIGH decides otherwise")
    elif end - start > .6 * (high - low) and filled:
        found = (f"next to no pixel lies between {start:,.6g} and {end:,.6g}, most of the range {low:,.6g} "
                 f"to {high:,.6g}: if one end of it stands for no data, --range LOW HIGH leaves it out")
    if found:
        print(f"note: {name}: {found}")


def to_unit(name, found, wanted=None, kind=None):
    """{key: Raw} of one set -> {key: Images or tensor}, and what became of the numbers: one rule for all.

    wanted: as of number_range. kind: of the numbers in the files, if they are kept as another one.
    """
    sets = {key: found[key] for key in ("train_images", "test_images") if key in found}
    kinds = [raw.array.dtype.name for raw in sets.values()]
    if len(set(kinds)) > 1:
        raise ValueError(f"{name}: training images are {kinds[0]}, test images {kinds[1]}; both must be of "
                         "one kind")
    dtype = np.dtype(kinds[0])
    plain = {key: Images(raw, 0, 1) for key, raw in sets.items()}
    shapes = [[*images.shape[1:]] for images in plain.values()]
    if shapes[0] != shapes[-1]:
        raise ValueError(f"{name}: images of {shapes[0]} for training, {shapes[1]} for testing; both must be "
                         "of one shape")
    total = sum(map(len, plain.values()))
    sample = np.concatenate([some_numbers(images, 1 + 2**22 * len(images) // total)
                             for images in plain.values()])
    if dtype.kind == "f":
        ends = [extremes(f"{name}: {key}", images) for key, images in plain.items()]
        sample = np.append(sample, np.array(ends, dtype))
    try:
        low, high, rule = number_range(kind or dtype, sample, wanted)
    except ValueError as error:
        raise ValueError(f"{name}: {error}")
    if not wanted:
        tell_of_unused(name, plain["train_images"], low, high)
    outside = float(((sample < low) | (sample > high)).mean())
    scaled = {key: tensor_or_images(Images(raw, low, high), outside) for key, raw in sets.items()}
    numbers = {"dtype": str(kind or dtype), "low": low, "high": high, "rule": rule, "outside": outside}
    return found | scaled, numbers


def tensor_or_images(images, outside):
    """Images in memory that need no scaling as a tensor of that memory (float64: a copy); else as given.
    outside: the share of numbers that are to be cut."""
    array = images.raw.array
    as_they_are = array.dtype.kind == "f" and (images.low, images.high) == (0, 1) and not outside
    if isinstance(array, np.memmap) or not (images.plain or as_they_are):
        return images
    known = array.dtype.itemsize <= 8                                # else torch knows no such number
    x = torch.from_numpy(array.astype(array.dtype.newbyteorder("=") if known else np.float32, copy=False))
    if x.dtype != torch.uint8:
        x = x.float()
    if images.raw.channels is None:
        return x[:, None]
    return x if images.raw.channels == "first" else x.movedim(-1, 1)


def in_words(numbers):
    """The line on them that every run prints."""
    def between(low, high):
        return f"{low:,.6g} to {high:,.6g}"

    outside = ""
    if numbers["outside"]:
        outside = f"; {numbers['outside']:.2%} of the pixels lie outside and are cut"
    if "ranges" in numbers:
        ranges = [f"{dtype} {between(*ends)}" for dtype, ends in numbers["ranges"].items()]
        return f"numbers: each kind of file by its own range, {', '.join(ranges)}, becomes 0 to 1{outside}"
    ends = between(numbers["low"], numbers["high"])
    return f"numbers: {numbers['dtype']}, {ends} become 0 to 1 ({numbers['rule']}{outside})"
