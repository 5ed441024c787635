"""The images that need no download: scikit-learn's handwritten digits, each in one pose of its own."""
from functools import partial

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from .images import Data
from .views import uniform, warp

# How far digits turn (degrees either way), shrink and move (half canvases), and the side of their canvas.
POSES = {
    2: dict(turn=30, small=0.45, large=0.75, move=0.3, side=20),
    3: dict(turn=25, small=0.55, large=0.85, move=0.2, side=16)
}


def posed_digits(axes):
    """1,797 digits as Data, the same ones whatever the run's seed: 1,437 train; 360 test, in four poses each.

    axes=2: float32 [N, 1, 20, 20]. axes=3: slabs two to three voxels thick in [N, 1, 16, 16, 16]. Noise of
    std 0.1 is added last, so that values leave [0, 1].
    """
    digits = load_digits()
    labels = digits.target
    train, test = train_test_split(range(1797), test_size=360, stratify=labels, random_state=0)
    rows = train + 4 * test
    x = torch.tensor(digits.images[rows, None] / 16, dtype=torch.float32)    # [N, 1, 8, 8]
    y = torch.tensor(labels[rows])
    if axes == 3:
        x = torch.stack([x, x], 2)
        x = F.pad(x, (0, 0, 0, 0, 3, 3))                             # [N, 1, 8, 8, 8]

    pose = POSES[axes]
    planes = axes * (axes - 1) // 2
    generator = torch.Generator().manual_seed(0)
    draw = partial(uniform, x, generator)
    angles = draw(-pose["turn"], pose["turn"], planes).deg2rad()
    scale = draw(pose["small"], pose["large"])
    shift = draw(-pose["move"], pose["move"], axes)
    x = warp(x, angles, scale, shift, axes * [pose["side"]])
    x += 0.1 * torch.randn(x.shape, generator=generator)
    n = len(train)
    return Data(x[:n], y[:n], x[n:], y[n:], classes=digits.target_names)
