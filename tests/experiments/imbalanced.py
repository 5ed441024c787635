"""Posed digits, or another .npz, with its training classes thinned: class k of K keeps R^(-k/(K-1)) of the largest.

    python tests/experiments/imbalanced.py 100 thinned.npz                       # posed digits, R = 100
    python tests/experiments/imbalanced.py 10 thinned.npz --data glyphs.npz
    python vicreg.py --data thinned.npz --batch 64 --views poses                 # as digits have, if they are digits

Test images stay as they are. At least one image of each class is kept.
"""
import argparse
from pathlib import Path

from common import save_npz, thinned

from kernels.harness.cli import read_data


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ratio", type=float, help="largest class over smallest")
    parser.add_argument("out", type=Path, help="the .npz to write")
    parser.add_argument("--data", default="digits", help="digits, digits3d or a .npz file")
    args = parser.parse_args()
    data = read_data(args.data)
    rows = thinned(data.labels, args.ratio)
    save_npz(args.out, data.images[rows], data.labels[rows], data.test_images, data.test_labels)
    print(f"{args.out}: {len(rows)} training images, by class {data.labels[rows].bincount().tolist()}")


if __name__ == "__main__":
    main()
