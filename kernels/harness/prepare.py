"""From a file or an array to what an encoder takes, as its training did: size, fit, channels, range.

    encoder, prepare = load_encoder("runs/vicreg-1")
    h = encoder(prepare("new.png"))              # [1, 8 x width]; a list of files gives a row for each

Needs numpy and Pillow beside torch, tifffile for TIFF.
"""
import os
from collections import Counter
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from PIL import Image, ImageOps

from .. import __version__
from . import decode
from .arrays import Raw
from .decode import Kind, Settings
from .encoder import Encoder
from .files import atomic_write, load_checkpoint
from .images import Images, pixels
from .sources import ending


class Prepare:
    """prepare(thing) -> float32 [1, C, *S], of a list of n things [n, C, *S].

    A thing is a file; an image that Pillow has open (a JPEG twice the canvas or larger comes out a little
    otherwise: from files it is decoded at a half or less of its size); or an array, of one image [H, W] or
    volume [D, H, W], with channels where training's had them: [H, W, C] for photographs. ValueError, or what
    Pillow or tifffile raise, for what it cannot be; of other numbers than training's it cannot be.

    settings, target    how a file becomes an array, of decode.py, which decoded the training images by them
    layout              where that array has its channels: first, last, or None; given: where arrays do
    arrays              whether training's images came as arrays, not as files
    low, high           the numbers in it that become 0 and 1; None: they stay as they are
    taken_as            counts {what, in words: things that were changed for it}, as colour taken as gray
    seen, outside       numbers that were scaled, and those of them that lay outside low to high, and were
                        cut; far: where they stay as they are, those beyond -1 to 2
    """

    def __init__(self, settings, target, layout, low, high, given="first", arrays=False):
        self.settings = Settings(*settings)
        self.target = target
        self.layout = layout
        self.low = low
        self.high = high
        self.given = given
        self.arrays = arrays
        self.taken_as = Counter()
        self.lock = Lock()                               # files are read in threads
        self.seen = self.outside = self.far = 0

    def state(self):
        """What makes it again: Prepare(**state), of numbers, words and lists alone."""
        return {"settings": [*self.settings], "target": self.target, "layout": self.layout,
                "low": self.low, "high": self.high, "given": self.given, "arrays": self.arrays}

    def __call__(self, things):
        things = things if isinstance(things, (list, tuple)) else [things]
        return self.scale(np.stack([self.array(thing) for thing in things]))

    def scale(self, arrays):
        """[n, ...] as array() gives them -> float32 [n, C, *S]."""
        if self.low is None:
            far = np.count_nonzero((arrays < -1) | (arrays > 2))
            with self.lock:
                self.seen += arrays.size
                self.far += far
            return torch.from_numpy(arrays)
        images = Images(Raw(arrays, self.layout), self.low, self.high)
        if not images.plain:
            cut = np.count_nonzero((arrays < self.low) | (arrays > self.high))
            with self.lock:                              # threads that read count, too
                self.seen += arrays.size
                self.outside += cut
        return pixels(images, images.rows)

    def array(self, thing):
        """One thing as training would have kept it, before its numbers become 0 to 1."""
        if isinstance(thing, (str, os.PathLike)):
            return self.from_file(Path(thing))
        if isinstance(thing, Image.Image):
            return self.from_image(thing)
        return self.from_array(np.asarray(thing))

    # ---- Files ---------------------------------------------------------------------------------------------
    def from_file(self, file):
        if file.is_dir():
            raise ValueError(f"{file} is a folder: give a list of its files, or use python -m kernels.embed")
        kind = decode.look(file, self.settings)
        if ending(file) == ".npy":
            return self.from_array(np.load(file))
        dtype = self.own_float(kind.dtype)
        self.refuse_other_numbers(dtype)
        if self.target["photo"] and not kind.photo:
            raise ValueError(f"it holds {kind.channels} channels that are not said to be colours, training's "
                             "images are photographs")
        x, entry = decode.decode((file, kind._replace(dtype=dtype)), self.settings, self.target)
        self.note(kind, "clear" in entry)
        self.count(entry["outside"], x)
        return self.to_unit(x, dtype)

    def own_float(self, dtype):
        """Floats of any size are as training's."""
        of = self.target["of"]
        return of if dtype.startswith("float") and of.startswith("float") else dtype

    def refuse_other_numbers(self, dtype):
        of, ranges = self.target["of"], self.target["ranges"]
        if not (dtype in ranges if ranges else dtype == of or self.of_bytes(dtype)):
            raise ValueError(f"it holds {dtype}, training's images {' and '.join(ranges or [of])}: what its "
                             "numbers mean to the encoder is not known")

    def of_bytes(self, dtype):
        """Whether it is bytes for an encoder of floats 0 to 1: they are 255ths."""
        unit = (self.low, self.high) in ((0, 1), (None, None))
        return dtype == "uint8" and self.target["of"].startswith("float") and unit

    def to_unit(self, x, dtype):
        return x / x.dtype.type(255) if self.of_bytes(dtype) else x

    def finished(self, x, dtype):
        found = decode.finished(x, dtype, self.target)
        self.count(decode.outside(x, dtype, self.target), found)
        return self.to_unit(found, dtype)

    def count(self, share, x):
        """Counts what the range of its kind cut off x."""
        with self.lock:
            self.outside += round(share * x.size)

    def note(self, kind, clear=False):
        """Counts what was changed for it; clear: it is transparent somewhere."""
        found = ["transparent in part, where they became white"] * clear
        channels = kind.channels, self.target["channels"]
        if kind.photo and channels == (3, 1):
            found.append("colour, taken as gray")
        elif channels == (1, 3):
            found.append("gray, taken as three equal channels")
        if kind.left_out:
            whole = self.settings.pages in ("channels", "volume")
            found.append("pages or frames that are not taken" if whole else
                         "more pages or frames than the first, which is taken")
        with self.lock:
            self.taken_as.update(found)

    # ---- Images and arrays ---------------------------------------------------------------------------------
    def from_image(self, image):
        kind = decode.kind_of_image(image)
        if not kind.photo:
            return self.from_array(np.asarray(ImageOps.exif_transpose(image)))
        self.refuse_other_numbers(kind.dtype)
        mode = "L" if self.target["channels"] == 1 else "RGB"
        clear = decode.is_clear(image)
        x = decode.photograph_of(image.copy(), self.settings, mode)
        if not self.target["photo"]:
            x = x[None] if x.ndim == 2 else np.moveaxis(x, -1, 0)
        self.note(kind, clear)
        return self.finished(x, "uint8")

    def from_array(self, x):
        axes = len(self.target["shape"]) - bool(self.layout)         # without channels
        if x.ndim not in (axes, axes + 1) or x.dtype.kind not in "biuf":
            raise ValueError(f"it is {x.dtype} {[*x.shape]}, no image of {axes} axes, or of {axes + 1} with "
                             "channels; several are given as a list")
        dtype = self.own_float(x.dtype.name)
        if self.target["photo"] and x.ndim > axes and x.shape[-1] not in (1, 3, 4):
            raise ValueError(f"it is {x.dtype} {[*x.shape]}: channels come last, 1, 3 or 4 of them; several "
                             "images are given as a list")
        mixed = self.target["ranges"] and axes == 2 and (x.ndim == 2 or x.shape[2] in (1, 3))
        if dtype == "uint8" and (self.target["photo"] or mixed):     # as Pillow reads the file
            flat = x.ndim == 3 and x.shape[2] == 1
            return self.from_image(Image.fromarray(x[..., 0] if flat else x))
        self.refuse_other_numbers(dtype)
        if x.dtype.kind == "f" and not np.isfinite(x.astype(np.float32)).all():
            raise ValueError("it holds NaN or infinite numbers")
        if self.layout == "first":
            x = x[None] if x.ndim == axes else x if self.given == "first" else np.moveaxis(x, -1, 0)
            x = x if axes == 3 else decode.on_canvas(x, self.settings)
        return self.finished(x, dtype)


def prepare_arrays(dtype, shape, channels_last=False, low=None, high=None, fit="crop"):
    """Prepare for a set that came as one array of this dtype, of images [C, *S] of this shape."""
    channels, *sides = shape
    volume = len(sides) == 3
    photo = dtype == "uint8" and channels in (1, 3) and not volume
    size = sides[0] if len({*sides}) == 1 else None
    settings = Settings(size, fit)
    kind = Kind(photo, dtype, channels, (*sides,) if volume else (), 0)
    target = decode.aim([kind], settings, [])
    if photo:
        layout = "last" if channels == 3 else None
        target["shape"] = [*sides] + [3] * (channels == 3)
    else:
        layout = "first"
        target["shape"] = [*shape]
    given = "last" if channels_last or photo else "first"
    return Prepare(settings, target, layout, low, high, given, arrays=True)


def save_encoder(encoder, data, folder):
    """encoder.pt in a run's folder: all that load_encoder() needs; numbers: what those in files became."""
    prepare = data.prepare or prepare_arrays("float32", data.images.shape[1:])
    saved = {"version": __version__, "config": getattr(encoder, "config", {}), "prepare": prepare.state(),
             "numbers": data.numbers, "state_dict": encoder.state_dict()}
    with atomic_write(folder / "encoder.pt") as file:
        torch.save(saved, file)


def load_encoder(run, encoder=None):
    """(encoder, prepare) of a run's folder, or of an encoder.pt, on the CPU, in eval mode.

    encoder: the network whose weights they are, if it is none of Encoder's. ValueError if there is no
    encoder.pt that serves.
    """
    path = Path(run)
    file = path / "encoder.pt" if path.is_dir() else path
    own_backbone = False
    try:
        saved = load_checkpoint(file)
        own_backbone = not encoder and saved["config"] == {}
        encoder = encoder or Encoder(**saved["config"])
        encoder.load_state_dict(saved["state_dict"])
        prepare = Prepare(**saved["prepare"])
    except KeyError as error:
        raise ValueError(f"{file} has no {error}, it is an earlier version's: train anew, or --init from it")
    except Exception as error:                                       # missing, cut short, another network's
        if own_backbone:
            raise ValueError(f"{file} is of a backbone of one's own: load_encoder(RUN, BACKBONE) reads it")
        raise ValueError(f"{file} does not serve ({' '.join(str(error).split())}): give a finished run")
    return encoder.eval(), prepare
