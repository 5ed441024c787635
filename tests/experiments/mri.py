"""Patches of a brain: volumes of 24^3 voxels of an MRI template, whose classes are the regions of an atlas.

    apt-get download mricron-data && dpkg -x mricron-data*.deb DIR       # Debian; any ch2.nii.gz and aal.nii.gz will do
    python tests/experiments/mri.py --templates DIR/usr/share/mricron/templates --out mri.npz
    python tests/experiments/batch_sizes.py --seeds 3 --data mri.npz --sizes 4 64 --epochs 20 --options width=8 views=poses

ch2 is one head, 27 times scanned and averaged, at 1 mm (Holmes et al. 1998); aal names its regions, one number on the left
and the next on the right (Tzourio-Mazoyer et al. 2002). Left patches are for training, right ones, mirrored, for testing. A
patch's class is the region at its middle. None reaches over the midline, so that no voxel is in both parts; patches of one
side overlap. One head is not a study: this asks what an encoder tells apart, not what it would in another person. Needs
nibabel.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from kernels import knn_accuracy

SIDE = 24
FEWEST = 300                                                             # places of a region that is a class


def middles(atlas, x):
    """{class: (places [P, 3] on the left, on the right)} where a whole patch lies in one half; x [X]: mm to the right."""
    half = SIDE // 2
    inside = np.zeros(atlas.shape, bool)
    inside[half:-half, half:-half, half:-half] = True
    found = {}
    for left in range(1, 108, 2):                                        # from 109 on regions lie on the midline
        own = []
        for name, side in ((left, -x), (left + 1, x)):
            places = np.argwhere((atlas == name) & inside & (side > half)[:, None, None])
            own.append(places)
        if min(map(len, own)) >= FEWEST:
            found[left // 2] = own
    return found


def cut(head, places, mirrored):
    """Patches [P, 24, 24, 24] of a volume about these places [P, 3]."""
    half = SIDE // 2
    patches = np.stack([head[tuple(slice(at - half, at + half) for at in place)] for place in places])
    return patches[:, ::-1] if mirrored else patches


def main():
    import nibabel
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--templates", type=Path, required=True, help="folder of ch2.nii.gz and aal.nii.gz")
    parser.add_argument("--out", type=Path, default=Path("mri.npz"), help="the .npz to write")
    parser.add_argument("--train", type=int, default=40, help="patches of each class")
    parser.add_argument("--test", type=int, default=20, help="patches of each class")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    head, atlas = (nibabel.as_closest_canonical(nibabel.load(args.templates / f"{name}.nii.gz")) for name in ("ch2", "aal"))
    if head.shape != atlas.shape or not np.allclose(head.affine, atlas.affine):
        sys.exit("ch2 and aal are not on one grid")
    x = head.affine[0, 0] * np.arange(head.shape[0]) + head.affine[0, 3]
    voxels = np.asarray(head.dataobj)
    found = middles(np.asarray(atlas.dataobj), x)
    rng = np.random.default_rng(args.seed)
    sets = {}
    for side, (split, count) in enumerate((("train", args.train), ("test", args.test))):
        places = [rng.choice(own[side], count, replace=False) for own in found.values()]
        sets[f"{split}_images"] = cut(voxels, np.concatenate(places), mirrored=side == 1)
        sets[f"{split}_labels"] = np.repeat(np.arange(len(found)), count)
    np.savez(args.out, **sets)
    known, asked = (torch.from_numpy(sets[f"{split}_images"].reshape(-1, SIDE**3).astype(np.float32)) for split in ("train", "test"))
    accuracy = knn_accuracy(known, torch.from_numpy(sets["train_labels"]), asked, torch.from_numpy(sets["test_labels"]))
    print(f"{args.out}: {len(found)} regions, {len(known):,} + {len(asked):,} patches, {voxels.dtype}; "
          f"raw voxels: k-NN {accuracy:.3f} (chance {1 / len(found):.3f})")


if __name__ == "__main__":
    main()
