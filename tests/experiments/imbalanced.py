"""Posed digits, or another .npz, with its training classes thinned: class k of K keeps R^(-k/(K-1)) of the largest.

    python tests/experiments/imbalanced.py 100 thinned.npz                       # posed digits, R = 100
    python tests/experiments/imbalanced.py 10 thinned.npz --data glyphs.npz
    python vicreg.py --data thinned.npz --batch 64

Test images stay as they are. At least one image of each class is kept.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import vicreg


def thinned(labels, ratio):
    """Rows of labels [N] to keep: the first of each class, largest class over smallest = ratio."""
    classes, counts = labels.unique(return_counts=True)
    shares = ratio ** -torch.linspace(0, 1, len(classes))
    rows = []
    for label, share in zip(classes, shares):
        most = max(1, round(float(share * counts.max())))
        rows.append((labels == label).nonzero()[:most, 0])
    return torch.cat(rows)


def channels_last(images):
    """[N, C, *S] -> [N, *S] or [N, *S, 3]; floats' noise below 0 and above 1 is cut off, as .npz files must be."""
    if images.dtype != torch.uint8:
        images = images.clamp(0, 1)
    return images[:, 0].numpy() if images.shape[1] == 1 else images.movedim(1, -1).numpy()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ratio", type=float, help="largest class over smallest")
    parser.add_argument("out", type=Path, help="the .npz to write")
    parser.add_argument("--data", default="digits", help="digits, digits3d or a .npz file")
    args = parser.parse_args()
    data = vicreg.load_data(args.data)
    rows = thinned(data.labels, args.ratio)
    np.savez(args.out, train_images=channels_last(data.images[rows]), train_labels=data.labels[rows].numpy(),
             test_images=channels_last(data.test_images), test_labels=data.test_labels.numpy())
    print(f"{args.out}: {len(rows)} training images, by class {data.labels[rows].bincount().tolist()}")


if __name__ == "__main__":
    main()
