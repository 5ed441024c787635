"""Arrays that hold a whole set: .npz, .npy, IDX, a TIFF stack, Hugging Face's datasets.

Each reader gives {"train_images": Raw, "train_labels": array, ...}, all but the first optional.
"""
import gzip
import math
import struct
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np

from .decode import read_series, series_of
from .sources import IDX

KEYS = "train_images train_labels test_images test_labels".split()

# Images as they came. array: [N, *S] if channels is None, [N, *S, C] if it is "last", [N, C, *S] if "first".
Raw = namedtuple("Raw", "array channels")


def raw_images(path, key, array, channels_last):
    """Raw of an array [N, *S] or [N, *S, C] in memory or mapped; ValueError if it is none of images."""
    last = array.ndim == 5 or array.ndim == 4 and (channels_last or array.shape[-1] in (1, 3, 4))
    sides = array.shape[1:array.ndim - last]
    if array.ndim == 4 and not last and array.shape[1] in (1, 3) and min(array.shape[2:]) >= 4:
        place = 0 if key == "its files together" else 1
        raise ValueError(f"{path}: {key} is {array.dtype} {[*array.shape]}, not with channels last, as "
                         f"np.moveaxis(x, {place}, -1) puts them{' in each file' * (not place)}")
    if len(sides) not in (2, 3) or min(sides) < 4 or array.dtype.kind not in "biuf":
        raise ValueError(f"{path}: {key} is {array.dtype} {[*array.shape]}, not numbers [N, H, W], "
                         "[N, H, W, C], [N, D, H, W], [N, D, H, W, C], sides of 4 at least; C of 2, 5 or "
                         "more needs --channels-last")
    if not array.size:
        raise ValueError(f"{path}: {key} is {[*array.shape]} and holds no images")
    return Raw(array, "last" if last else None)


# ---- NumPy's files -----------------------------------------------------------------------------------------
def read_npz(path, channels_last):
    """MedMNIST's layout: an .npz archive, or a folder of .npy files, which stay on disk."""
    try:
        if path.is_dir():
            there = [file.stem for file in path.glob("*.npy")]
            found = {key: np.load(path / f"{key}.npy", mmap_mode="r") for key in KEYS if key in there}
        else:
            with np.load(path) as archive:
                there = archive.files
                found = {key: entry_of(archive, key) for key in KEYS if key in there}
    except Exception as error:                           # a bad archive raises any of seven kinds
        raise ValueError(f"{path} cannot be read as .npz ({without_advice(error)}): check the path, or fetch "
                         "it again")
    if "train_images" not in found:
        raise ValueError(f"{path} has no train_images, but {', '.join(there) or 'nothing'}: the keys are "
                         f"{', '.join(KEYS)}, all but the first optional")
    others = [key for key in there if key not in KEYS]
    if others:
        print(f"note: left out of {path}: {', '.join(others[:10])}{', ...' * (len(others) > 10)}; taken: "
              f"{', '.join(found)}")
    for key in {"train_images", "test_images"} & found.keys():
        found[key] = raw_images(path, key, found[key], channels_last)
    return found


def entry_of(archive, key):
    """An array of an .npz; some are bytes. ValueError names it."""
    try:
        return np.asarray(archive[key])
    except ValueError as error:
        raise ValueError(f"{key}: {without_advice(error)}")


def without_advice(error):
    """An error's words without NumPy's, to load what may run anything."""
    text = str(error)
    if "pickle" in text:
        return "it holds Python objects: write numbers, or strings, as array.astype(str) is"
    return text


def read_npy(path, channels_last):
    """One array of images, which stays on disk."""
    try:
        array = np.load(path, mmap_mode="r")
        if not isinstance(array, np.ndarray):
            raise ValueError("it is an .npz: name it so")
    except Exception as error:
        raise ValueError(f"{path} cannot be read as .npy ({without_advice(error)})")
    return {"train_images": raw_images(path, "it", array, channels_last)}


# ---- IDX: MNIST, Fashion-MNIST, KMNIST, EMNIST as they are published ---------------------------------------
IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def read_idx(path):
    """The array of an IDX file, plain or .gz; ValueError if it is cut short or none."""
    open_file = gzip.open if path.suffix == ".gz" else open
    try:
        with open_file(path, "rb") as file:
            zeros, kind, axes = struct.unpack(">HBB", file.read(4))
            if zeros or kind not in IDX_TYPES:
                raise ValueError("it does not begin as one")
            shape = struct.unpack(f">{axes}I", file.read(4 * axes))
            data = file.read()
    except (OSError, EOFError, struct.error, zlib.error, ValueError) as error:
        raise ValueError(f"{path} cannot be read as IDX ({error}): fetch it again")
    dtype = np.dtype(IDX_TYPES[kind])
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{path} is cut short: {len(data):,} bytes for {[*shape]} numbers of "
                         f"{dtype.itemsize}: fetch it again")
    return np.frombuffer(bytearray(data), dtype).reshape(shape)          # which may be written to


def idx_files(folder, name=None):
    """{(set, split, part): path} of the IDX files there; of the set of one file if `name` is given."""
    found = {}
    for path in sorted(folder.iterdir()):
        match = IDX.match(path.name)
        if match and path.is_file():
            split = "train" if match["split"] == "train" else "test"
            found.setdefault((match["set"], split, match["part"]), path)
    if name:
        own = IDX.match(name)["set"]
        found = {key: path for key, path in found.items() if key[0] == own}
    return found


def read_idx_set(path):
    """A folder of IDX files, or one of them, whose partners lie beside it."""
    folder = path if path.is_dir() else path.parent
    files = idx_files(folder, None if path.is_dir() else path.name)
    sets = sorted({key[0] for key in files})
    if len(sets) > 1:
        first, *_ = files.values()
        raise ValueError(f"{path} holds {len(sets)} sets of IDX files ({', '.join(sets)}): give one file, as "
                         f"{first}")
    found = {}
    for (_, split, part), file in files.items():
        array = read_idx(file)
        found[f"{split}_{part}"] = raw_images(file, "it", array, False) if part == "images" else array
    if "train_images" not in found:
        raise ValueError(f"{path} has no IDX file of training images (train-images-idx3-ubyte)")
    return found


# ---- TIFF --------------------------------------------------------------------------------------------------
def read_tiff_stack(path):
    """One TIFF, whose pages are the images: [N, H, W] or, where the file names channels, [N, C, H, W]."""
    import tifffile
    try:
        with tifffile.TiffFile(path) as tiff:
            alike, left_out = series_of(tiff)
            x, axes = read_series(alike)
            page = alike[0].keyframe
            kept = "transparency" if {1, 2} & {*page.extrasamples} else ""
            kept = "ink" if page.photometric.name == "SEPARATED" else kept
    except Exception as error:
        raise ValueError(f"{path} cannot be read as TIFF ({error})")
    if not {*"YX"} <= {*axes}:
        raise ValueError(f"{path} holds {x.dtype} along the axes {axes}, no images")
    pages = [k for k, axis in enumerate(axes) if axis not in "CSYX"]
    channels = [k for k, axis in enumerate(axes) if axis in "CS"]
    x = x.transpose(pages + channels + [axes.index("Y"), axes.index("X")])
    count = math.prod(x.shape[:len(pages)])
    *_, height, width = x.shape
    x = x.reshape(count, -1, height, width)
    if x.dtype.kind not in "biuf" or min(height, width) < 4:
        raise ValueError(f"{path} holds {x.dtype} {[*x.shape]}: pages of numbers, sides of 4 at least, are "
                         "needed")
    if left_out:
        print(f"note: {path}: left out {left_out:,} pages that are of another size or kind than the first")
    if kept:
        print(f"note: {path}: {kept} is kept as it is, of {x.shape[1]} channels")
    return {"train_images": Raw(x, "first")}


# ---- Hugging Face ------------------------------------------------------------------------------------------
def alike(name, images):
    """Gray images [H, W] and colour images [H, W, 3] of a set as one array, [N, H, W] or [N, H, W, 3]."""
    dtypes = sorted({str(image.dtype) for image in images})
    if len(dtypes) > 1:
        raise ValueError(f"{name} holds images of {' and '.join(dtypes)}: of one kind of number they must be")
    if len({image.ndim for image in images}) > 1:
        images = [image if image.ndim == 3 else np.stack([image] * 3, 2) for image in images]
    return np.stack(images)


def read_hugging_face(name, decode_image):
    """hf:NAME or hf:NAME:SPLIT, by the package datasets: NAME of the hub, or a folder of yours.

    Images are the first column of that kind, and so are classes. decode_image: PIL image -> [H, W] or
    [H, W, 3]. Without SPLIT train and test (or validation) are taken, rather one whose classes are known.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError("--data hf:... is read by the package datasets: pip install datasets")
    _, name, *rest = name.split(":")
    try:
        saved = any(Path(name, file).exists() for file in ("dataset_dict.json", "dataset_info.json"))
        found = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
        if not hasattr(found, "keys"):
            found = {"train": found}
        if rest:
            found = {"train": found[rest[0]]}
    except Exception as error:                           # of the network, the name, the format
        raise ValueError(f"hf:{name} cannot be loaded by datasets ({error})")
    if "train" not in found:
        raise ValueError(f"hf:{name} has no split train but {', '.join(found)}: give hf:{name}:SPLIT")
    features = found["train"].features
    of_kind = {}
    for column, feature in features.items():
        of_kind.setdefault(type(feature).__name__, column)
    if "Image" not in of_kind:
        raise ValueError(f"hf:{name} has no column of images, but {', '.join(features)}")
    taken = [of_kind[kind] for kind in ("Image", "ClassLabel") if kind in of_kind]
    rivals = [column for column, feature in features.items()
              if type(feature).__name__ in ("Image", "ClassLabel") and column not in taken]
    if rivals:
        print(f"note: hf:{name}: taken are the columns {' and '.join(taken)}; left out: {', '.join(rivals)}")
    there = [split for split in ("test", "validation", "valid") if split in found]
    labels = of_kind.get("ClassLabel")
    known = [split for split in there
             if labels is None or all(label is not None and label >= 0 for label in found[split][labels])]
    test = next(iter(known or there), None)              # the hub marks classes that are kept secret by -1
    parts = {"train": found["train"]} | ({"test": found[test]} if test else {})
    others = [split for split in found if split not in ("train", test)]
    if others:
        print(f"note: left out of hf:{name}: {', '.join(others)}; hf:{name}:SPLIT takes another one")
    arrays = {}
    for split, rows in parts.items():
        images = []
        try:
            for image in rows[of_kind["Image"]]:
                images.append(decode_image(image))
        except Exception as error:                       # any of Pillow's; None has no image
            raise ValueError(f"hf:{name}: image {len(images)} of {split} cannot be read ({error})")
        array = alike(f"hf:{name}", images)
        arrays[f"{split}_images"] = raw_images(f"hf:{name}", split, array, False)
        if "ClassLabel" in of_kind:
            arrays[f"{split}_labels"] = np.asarray(rows[of_kind["ClassLabel"]])
    return arrays
