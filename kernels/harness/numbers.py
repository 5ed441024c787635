"""What the numbers of images mean: one rule for a set, by which they become 0 to 1. Needs numpy alone.

    low, high, rule = number_range("uint16", sample)     # (sample - low) / (high - low), cut to [0, 1]
"""
import numpy as np

PERCENTILES = 0.1, 99.9


def number_range(dtype, sample, wanted=None):
    """(low, high, rule): which numbers become 0 and 1, and why, in words. sample: some of the numbers, 1-D.

    wanted: None, ("dtype",) for all that the kind of number holds (floats: 0 to 1), or (low, high).
    Without it uint8 that use their upper half are 0 to 255, floats that lie in 0 to 1 and pass 0.5 stay as
    they are, and of all else the 0.1 and 99.9 percentiles are 0 and 1: a hot pixel decides nothing.
    ValueError if the sample is one number.
    """
    dtype = np.dtype(dtype)
    limits = np.iinfo(dtype) if dtype.kind in "iu" else None
    least, greatest = sample.min(), sample.max()
    if wanted and len(wanted) == 2:
        return *map(float, wanted), "--range"
    if wanted:
        low, high = (limits.min, limits.max) if limits else (0, 1)
        return float(low), float(high), f"all that {dtype} holds"
    if dtype.name == "uint8" and greatest >= 128:
        return 0., 255., "all that uint8 holds"
    if dtype.kind == "b" or (dtype.kind == "f" and least >= 0 and 0.5 < greatest <= 1):
        return 0., 1., "as they are"
    low, high = np.percentile(sample.astype(np.float64), PERCENTILES)
    if low == high:                                      # a few bright pixels on one ground
        low, high = float(least), float(greatest)
        if low == high:
            raise ValueError(f"all numbers that were looked at are {least}")
        return low, high, "least and greatest"
    whole = limits and (high - low) / (float(limits.max) - limits.min) > 0.5
    if whole:
        return float(limits.min), float(limits.max), f"all that {dtype} holds"
    return float(low), float(high), "percentiles 0.1 and 99.9"
