"""Damaged and odd files, and the bounds within which each must be read or refused."""
import resource
import struct
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import pytest


def share(count):
    """count seeds: the first twelfth by default, the rest slow."""
    return [pytest.param(seed, marks=[pytest.mark.slow] * (seed >= count // 12)) for seed in range(count)]


@contextmanager
def bounded():
    """10 s and 2 GB more than there is now."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, before[1]))
    start = time.monotonic()
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.monotonic() - start < 10


def damaged(data, rng, heads=False):
    """Bytes with one to three faults of the kinds that disks, transfers and editors make.

    heads: half of them in the first 400 bytes, which are few, and matter.
    """
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        reach = min(len(data), rng.choice([400, 10**9])) if heads else len(data)
        if not reach:
            break
        at = rng.randrange(reach)
        span = min(rng.choice([1, 2, 16, 512]), len(data) - at)
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at:at + span] = rng.randbytes(span)
        elif kind == 2:
            data[at:at + span] = bytes(span)
        elif kind == 3:
            del data[at:at + span]
        elif kind == 4:
            data[at:at] = data[at:at + span]
        else:
            del data[max(8, at):]
    return bytes(data)


def deep_colour_png():
    """16 bits of red, green and blue, of which Pillow shows the upper half."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    rows = b"".join(b"\0" + bytes(range(96)) for _ in range(16))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
