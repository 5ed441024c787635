"""Images from anywhere as tensors: an .npz archive, .npy arrays larger than memory, a folder of image files.

    data = read_images("photos", size=64)        # class subfolders, train/ with test/ or val/, or neither
    x = pixels(data.images, rows, "cuda")        # float32 [n, C, *S] in [0, 1]

Files are decoded in threads, once: into one uint8 array under runs/decoded, which later runs find. Arrays
that lie on disk stay there; nothing makes a float copy of a whole set. What cannot be read raises ValueError
with one line that says what to do. Needs numpy, scikit-learn, Pillow and tqdm beside torch.
"""
import hashlib
import os
import zlib
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.model_selection import train_test_split
from tqdm import tqdm

KEYS = "train_images train_labels test_images test_labels".split()

# images [N, C, *S], uint8 (0 to 255) or float (0 to 1): a tensor, or OnDisk. labels [N] int64, numbers of
# `classes`, or None. view(batch, generator): a random view of a batch, for who trains on it.
Data = namedtuple("Data", "images labels test_images test_labels classes view", defaults=[(), None])


# ---- Sets of images ----------------------------------------------------------------------------------------
def channels_first(array, channels_last):
    """[N, *S, C], or [N, *S] if not channels_last -> tensor [N, C, *S] of the same memory, but float64."""
    native = array.dtype.newbyteorder("=")
    x = torch.from_numpy(array.astype(native, copy=False))
    if x.dtype == torch.float64:
        x = x.float()
    return x.movedim(-1, 1) if channels_last else x[:, None]


class OnDisk:
    """The images `rows` of an .npy file, read when asked for: images[index] -> tensor [len(index), C, *S]."""

    def __init__(self, path, rows, channels_last):
        self.path = path
        self.rows = torch.as_tensor(rows)
        self.channels_last = channels_last
        self.shape = len(self), *self[:1].shape[1:]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        file = np.load(self.path, mmap_mode="r")                     # anew: what was read leaves the memory
        return channels_first(file[self.rows[index].numpy()], self.channels_last)


def choose(images, rows):
    """These rows as a set of their own."""
    if isinstance(images, OnDisk):
        return OnDisk(images.path, images.rows[rows], images.channels_last)
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


def digest(images):
    """CRC-32 of 100 of the images, begun with how many there are: whether a resumed run finds its own."""
    looked_at = images[sample_rows(len(images), 100)]
    return zlib.crc32(looked_at.numpy().tobytes(), len(images))


@torch.no_grad()
def encode(function, images, rows=None, device="cpu", axis=0):
    """function(batch [n, C, *S]) of all images, or of these rows: its results, joined at axis."""
    parts = [function(pixels(images, part, device)) for part in in_parts(images, rows)]
    return torch.cat(parts, axis)


def limited(data, most=10_000):
    """The data with `most` images of each split at most, the same in every run: what probes look at."""
    if max(len(data.images), len(data.test_images)) <= most:
        return data
    train = sample_rows(len(data.images), most)
    test = sample_rows(len(data.test_images), most)
    data = data._replace(images=choose(data.images, train), test_images=choose(data.test_images, test))
    if data.labels is None:
        return data
    return data._replace(labels=data.labels[train], test_labels=data.test_labels[test])


# ---- Arrays ------------------------------------------------------------------------------------------------
def image_set(path, key, array, channels_last):
    """Images of an array [N, *S] or [N, *S, C] in memory or mapped; ValueError if they are none."""
    last = channels_last or array.ndim == 5 or (array.ndim == 4 and array.shape[-1] in (1, 3, 4))
    sides = array.shape[1:array.ndim - last]
    if len(sides) not in (2, 3) or min(sides) < 4 or array.dtype.name not in ("uint8", "float32", "float64"):
        raise ValueError(f"{path}: {key} is {array.dtype} {[*array.shape]}, not uint8 or float [N, H, W], "
                         "[N, H, W, C], [N, D, H, W], [N, D, H, W, C], sides of 4 at least; C of 2, 5 or "
                         "more needs --channels-last")
    if isinstance(array, np.memmap):
        images = OnDisk(array.filename, range(len(array)), last)
    else:
        images = channels_first(array, last)

    if array.dtype != np.uint8:
        for part in in_parts(images):
            x = images[part]
            if not (x.min() >= 0 and x.max() <= 1):                  # NaN fails both
                raise ValueError(f"{path}: {key} holds NaN or values outside [0, 1] (uint8: 0 to 255): "
                                 "clean it first")
    return images


def read_arrays(path, channels_last):
    """MedMNIST's layout: an .npz archive, or a folder of .npy files, which stay on disk."""
    try:
        if path.is_dir():
            there = [file.stem for file in path.glob("*.npy")]
            found = {key: np.load(path / f"{key}.npy", mmap_mode="r") for key in KEYS if key in there}
        else:
            with np.load(path) as archive:
                there = archive.files
                found = {key: np.asarray(archive[key]) for key in KEYS if key in there}     # some are bytes
    except Exception as error:                                       # a bad archive raises any of seven kinds
        raise ValueError(f"{path} cannot be read as .npz ({error}): check the path, or fetch it again")
    if "train_images" not in found:
        raise ValueError(f"{path} has no train_images, but {', '.join(there) or 'nothing'}: the keys are "
                         f"{', '.join(KEYS)}, all but the first optional")
    for key in {"train_images", "test_images"} & found.keys():
        found[key] = image_set(path, key, found[key], channels_last)
    return found


# ---- Folders of files --------------------------------------------------------------------------------------
# What Pillow reads of photographs and microscopes; volumes come as .npy.
ENDINGS = set(".jpg .jpeg .png .bmp .gif .tif .tiff .webp".split())


def find_files(folder):
    """Image files below the folder, sorted; links are followed, hidden ones are not. Else .npy volumes."""
    files = []
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if Path(root).resolve() in seen:                             # a link back to where we came from
            folders.clear()
            continue
        seen.add(Path(root).resolve())
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(root, name) for name in names if not name.startswith(".")]
    files = sorted(file for file in files if not file.is_fifo())     # nobody may ever write into a pipe
    images = [file for file in files if file.suffix.lower() in ENDINGS]
    return images or [file for file in files if file.suffix == ".npy"]


def class_names(files, folder):
    """The subfolder of each file if all lie in one, none deeper, and they are two at least; else None."""
    names = [file.parent.name for file in files]
    flat = all(file.parent.parent == folder for file in files)
    return names if flat and len(set(names)) > 1 else None


def is_gray(file):
    """Whether an image is of one channel, 8 bits or 16; of volumes and of what is broken nobody asks."""
    try:
        with Image.open(file) as image:
            return image.mode in ("1", "L", "LA") or image.mode.startswith("I")
    except OSError:                                                  # decode() says what is wrong
        return True


def decode(file, size, mode):
    """An image file, upright, shorter side brought to `size`, centre cut out; what is transparent is white.

    mode "L" or "RGB" -> uint8 [size, size] or [size, size, 3]. A volume in an .npy file comes as it is.
    """
    if file.suffix == ".npy":
        volume = np.load(file)
        if volume.dtype != np.uint8 and not (volume.min() >= 0 and volume.max() <= 1):
            raise ValueError("NaN or values outside [0, 1]")
        return volume
    with Image.open(file) as image:
        image.draft(mode, (size, size))                              # large JPEGs: as many pixels as needed
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):                               # 16 bits
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return np.asarray(ImageOps.fit(image.convert(mode), (size, size)))


def for_each(function, files, task):
    """Yield function(file) in the files' order, computed in threads; ValueError at the end if some fail."""
    broken = {}

    def attempt(file):
        try:
            return function(file)
        except Exception as error:                                   # whatever Pillow meets in a file
            broken[file] = error

    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(files, task, delay=1, unit="file") as bar:
        for first in range(0, len(files), 1024):
            for result in pool.map(attempt, files[first:first + 1024]):
                bar.update()
                if not broken:
                    yield result
    if broken:
        file = min(broken)
        raise ValueError(f"{file} cannot be read ({broken[file]}); of the same kind: {len(broken) - 1} other."
                         " Repair or remove what is broken")


def write_array(path, arrays, count):
    """`count` arrays of one shape, one after the other, as one .npy file."""
    with open(path, "wb") as out:
        first = None
        for array in arrays:
            if first is None:
                first = array
                header = {"descr": np.lib.format.dtype_to_descr(first.dtype),
                          "fortran_order": False,
                          "shape": (count, *first.shape)}
                np.lib.format.write_array_header_1_0(out, header)
            if array.shape != first.shape or array.dtype != first.dtype:
                raise ValueError(f"volumes differ: {first.dtype} {[*first.shape]} and {array.dtype} "
                                 f"{[*array.shape]}; all must be of one shape and kind")
            out.write(array.tobytes())


def decode_all(files, name, size):
    """All files as one array in an .npy file under runs/decoded, made once -> its path.

    Its name holds a hash of all names, sizes and times: where one of them changes, it is made anew.
    """
    marks = [f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    mark = hashlib.sha256("\n".join([str(size), *marks]).encode()).hexdigest()[:12]
    path = Path("runs", "decoded", f"{name}-{mark}.npy")
    if path.exists():
        print(f"decoded images: found in {path}")
        return path

    mode = "L" if all(for_each(is_gray, files, "looking at")) else "RGB"
    arrays = for_each(partial(decode, size=size, mode=mode), files, "decoding")
    try:
        with TemporaryDirectory(prefix=".decoding-", dir=".") as scratch:        # gone if this ends early
            whole = Path(scratch, "images.npy")
            write_array(whole, arrays, len(files))
            path.parent.mkdir(parents=True, exist_ok=True)
            whole.replace(path)
    except OSError as error:                                         # a file that is broken raises ValueError
        raise ValueError(f"cannot write what {len(files)} files decode to below {Path.cwd()} "
                         f"({error.strerror}): make room, a smaller --size, or start in another folder")
    print(f"decoded images: kept in {path}; made anew where a file is added, removed or changed")
    return path


def read_folder(path, size, channels_last):
    """Image files, or volumes: in train/ with test/ or val/, or all together; class subfolders or none."""
    parts = [path]
    if (path / "train").is_dir():
        others = [path / name for name in ("test", "val") if (path / name).is_dir()]
        parts = [path / "train", *others[:1]]
    files = [find_files(part) for part in parts]
    together = sum(files, [])
    if len(together) < 5:
        raise ValueError(f"{path} holds {len(together)} files that end in {', '.join(sorted(ENDINGS))} or "
                         ".npy: 5 at least are needed")
    array = decode_all(together, path.resolve().name, size)
    whole = image_set(array, path.name, np.load(array, mmap_mode="r"), channels_last)

    found = {}
    rows = torch.arange(len(together)).split([len(group) for group in files])
    for split, part, group, own in zip(("train", "test"), parts, files, rows):
        found[f"{split}_images"] = choose(whole, own)
        names = class_names(group, part)
        if names:
            found[f"{split}_labels"] = np.array(names)
    return found


# ---- Labels ------------------------------------------------------------------------------------------------
def class_of_each(name, y, count):
    """Labels as they come, [N], [N, 1] or one-hot [N, K] -> [N] whole numbers or strings."""
    one_hot = y.ndim == 2 and y.shape[1] > 1 and np.isin(y, (0, 1)).all() and (y.sum(1) == 1).all()
    y = y.argmax(1) if one_hot else y
    if y.dtype.kind == "f" and (y == y.round()).all():
        y = y.astype(np.int64)
    if y.size != count or y.dtype.kind not in "iubUS" or (y.dtype.kind == "i" and y.min() < 0):
        raise ValueError(f"{name} is {y.dtype} {[*y.shape]} for {count} images: not one class each (whole "
                         "numbers from 0, strings, or one-hot); take it out to train without labels")
    return y.ravel()


def number_classes(name, y, y_test):
    """Labels of both splits, or None -> their numbers, tensors [N] int64 or None, and the classes."""
    classes = [] if y is None or y_test is None else np.unique(np.concatenate([y, y_test]))
    if len(classes) < 2:
        print(f"note: {name} has no labels of two classes for training and testing: no probes")
        return None, None, ()
    once = np.setxor1d(y, y_test)
    if len(once):
        print(f"note: classes in one split only: {', '.join(map(str, once[:10]))}")
    numbers = [torch.from_numpy(np.searchsorted(classes, labels)) for labels in (y, y_test)]
    return *numbers, classes


# ---- Public ------------------------------------------------------------------------------------------------
def read_images(name, size=64, channels_last=False):
    """Data of an .npz file or a folder: of image files, of .npy volumes, of train_images.npy and so on.

    size            image files are brought to size x size
    channels_last   arrays [N, H, W, C] are images of C channels; else only where C is 1, 3 or 4
    A fifth is held out, the same in every run, where there is no test part. ValueError for what cannot be
    read; notes on what is odd are printed.
    """
    path = Path(name)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{name} is neither a file nor a folder")
    if path.is_dir() and not (path / "train_images.npy").exists():
        found = read_folder(path, size, channels_last)
    else:
        found = read_arrays(path, channels_last)
    x, y, x_test, y_test = [found.get(key) for key in KEYS]
    if y is not None:
        y = class_of_each(f"{name}: train_labels", y, len(x))
    if y_test is not None and x_test is not None:
        y_test = class_of_each(f"{name}: test_labels", y_test, len(x_test))

    if x_test is None:
        if len(x) < 5:
            raise ValueError(f"{name} holds {len(x)} images: 5 at least are needed")
        train, test = train_test_split(range(len(x)), test_size=0.2, random_state=0)
        x, x_test = choose(x, train), choose(x, test)
        if y is not None:
            y, y_test = y[train], y[test]
    if x_test.shape[1:] != x.shape[1:]:
        raise ValueError(f"{name}: images of {[*x.shape[1:]]} for training, {[*x_test.shape[1:]]} for "
                         "testing; both must be of one shape")
    y, y_test, classes = number_classes(name, y, y_test)

    shown = x[sample_rows(len(x), 100)].flatten(1)
    flat = shown.amax(1) == shown.amin(1)
    if flat.all():
        raise ValueError(f"{name}: of {len(flat)} images looked at each is of one value throughout")
    if flat.any():
        print(f"note: {flat.sum()} of {len(flat)} images looked at are of one value throughout")
    return Data(x, y, x_test, y_test, classes)
