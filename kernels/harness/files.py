"""Files that are never half written, checkpoints that are read whole, a folder that one run has.

    with atomic_write(folder / "last.pt") as file:      # the old file or the new one, whenever power fails
        torch.save(state, file)
    lock_folder(folder)                                 # BlockingIOError if another run has it
"""
import os
import zipfile
from contextlib import contextmanager

import numpy as np
import torch

try:
    import fcntl
except ImportError:                                                  # Windows has no such locks
    fcntl = None


@contextmanager
def atomic_write(path):
    """A file to write bytes to; once it is all on the disk it takes the place of `path`."""
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    with open(part, "xb") as file:                                   # x: does not follow a link put here
        try:
            yield file
        except BaseException as error:
            part.unlink(missing_ok=True)
            if isinstance(error, RuntimeError):                      # torch.save's, when the disk is full
                raise error.__context__ or error
            raise
        file.flush()
        os.fsync(file.fileno())
    try:
        part.replace(path)
    except OSError:                                                  # it is a folder, or in use
        part.unlink(missing_ok=True)
        raise


def atomic_write_text(path, text):
    """As Path.write_text, but whole or not at all."""
    with atomic_write(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def write_npy_header(file, dtype, shape):
    """The head of an .npy file, as long whatever its number of rows: it can be written anew once that is
    known."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def load_checkpoint(path):
    """A file of torch.save, on the CPU; ValueError if a bit has changed: torch does not look."""
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    if damaged:
        raise ValueError(f"{damaged} in it is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def lock_folder(folder):
    """Locks the folder until this process ends, however it ends; BlockingIOError if another one has it."""
    if fcntl:
        handle = os.open(folder, os.O_RDONLY)                        # stays open
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
