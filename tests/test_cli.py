"""cli.py: types of options."""
import argparse
import math

import pytest

from kernels.harness import cli


@pytest.mark.parametrize("text, low, high", [("0", 1, math.inf), ("1", 0, 1), ("nan", 0, math.inf), ("-1", 0, 9)])
def test_bounds_refuse_what_lies_outside(text, low, high):
    with pytest.raises(argparse.ArgumentTypeError, match=rf"{text} does not lie in \[{low}, {high}\)"):
        cli.bounded(float, low, high)(text)


def test_layer_sizes():
    assert cli.layer_sizes("512-64") == [512, 64]
    with pytest.raises(argparse.ArgumentTypeError):
        cli.layer_sizes("512-0")
    with pytest.raises(ValueError):
        cli.layer_sizes("wide")
