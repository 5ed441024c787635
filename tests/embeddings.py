"""Embeddings of every kind of collapse and of none, and what the verdict on them must be."""
import math

import torch

from kernels import collapse_panel, verdict

HEALTHY, ONE_POINT, THIN, NOT_YET = "No collapse", "COLLAPSED", "DIMENSIONAL COLLAPSE", "NOT SPREAD YET"
CANNOT_TELL, PARTIAL, NOT_FINITE, NOTHING = "CANNOT TELL", "PARTIAL COLLAPSE", "NOT FINITE", "NOTHING LEARNT YET"


def white(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def near(z):
    """Two views that know their image."""
    scale = z.std()
    return z, z + 0.1 * scale * white(*z.shape, 8), z + 0.1 * scale * white(*z.shape, 9)


def blind(scale=1., d=64):
    return tuple(scale * white(500, d, k) for k in range(3))


def line():
    return white(500, 1) @ white(1, 64, 1)


def four_points():
    return white(4, 64)[torch.arange(500) % 4]


def positive():
    """All-positive features with a mean cosine of 0.97."""
    return 1 + 0.175 * white(500, 64)


def changed(z, rows, value, columns=slice(None)):
    z = z.clone()
    z[rows, columns] = value
    return z


def few_axes(count, noise, d=512):
    """Variance on so many axes, but for a little noise in all."""
    return white(2000, count) @ white(count, d, 1) / count ** .5 + noise * white(2000, d, 2)


def circle(n):
    """Even by chance, so that rows of the many lie closer than rows that count as equal."""
    turn = 2 * math.pi * torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.stack([turn.cos(), turn.sin()], 1)


def images_at_a_point(share, n=500):
    z = white(n, 64)
    z[:int(share * n)] = z[0]
    return z


CLASSES = torch.arange(500) % 5
RARE = torch.cat([torch.zeros(480), torch.ones(20)]).long()
UNTRAINED = near(.1 * white(500, 64) + 1)                            # as many dimensions, in one direction
def near_a_point(share, noise, n=1000, d=64):
    """Embeddings and views; of a share of the images nothing is left but noise, other noise in each view."""
    sets = []
    for seed in (10, 20, 30):
        z = white(n, d)
        k = int(share * n)
        z[:k] = white(1, d, 77) + noise * white(k, d, seed)
        z[k:] += .1 * white(n - k, d, seed + 1)
        sets.append(z)
    return sets


SYNTHETIC = {  # name: (embeddings of images, of two views; of the untrained network; labels), the verdict
    "white": ((near(white(500, 64)),), HEALTHY),
    "all positive": ((near(positive()),), HEALTHY),
    "small but whole": ((near(1e-3 * white(500, 64)),), HEALTHY),
    "as small as fp32 can be": ((near(1e-30 * white(500, 64)),), HEALTHY),
    "fewer samples than dimensions": ((near(white(12, 512)),), HEALTHY),
    "four samples": ((near(white(4, 64)),), HEALTHY),
    "half precision": ((tuple(z.half() for z in near(white(500, 64))),), HEALTHY),
    "bfloat16": ((tuple(z.bfloat16() for z in near(white(500, 64))),), HEALTHY),
    "NumPy arrays": ((tuple(z.numpy() for z in near(white(500, 64))),), HEALTHY),
    "big-endian arrays": ((tuple(z.numpy().astype(">f4") for z in near(white(500, 64))),), HEALTHY),
    "each image twice": ((near(white(250, 64).repeat(2, 1)),), HEALTHY),
    "each image twice, two thousand": ((near(white(1000, 512).repeat(2, 1)),), HEALTHY),
    "a few equal images": ((near(images_at_a_point(.02)),), HEALTHY),
    "a twentieth of the dimensions dead": ((near(changed(white(500, 64), slice(None), 3., slice(3))),), HEALTHY),
    "half of the dimensions dead": ((near(changed(white(500, 64), slice(None), 3., slice(32))),), HEALTHY),
    "rows of any length": ((near(white(500, 64) * white(500, 1, 3).abs()),), HEALTHY),
    "a thousand on a circle": ((near(circle(1000)),), HEALTHY),
    "five thousand on a circle": ((near(circle(5000)),), HEALTHY),
    "ten thousand on a circle": ((near(circle(10_000)),), HEALTHY),
    "healthy classes": ((near(white(500, 64)), None, CLASSES), HEALTHY),
    "clusters": ((near(white(5, 64)[CLASSES] + .5 * white(500, 64, 4)), None, CLASSES), HEALTHY),
    "trained": ((near(white(500, 64)), UNTRAINED), HEALTHY),
    "a constant": (((torch.ones(500, 64),) * 3,), ONE_POINT),
    "a constant, before it as well": (((torch.ones(500, 64),) * 3, (torch.ones(500, 64),) * 3), ONE_POINT),
    "zeros": (((torch.zeros(500, 64),) * 3,), ONE_POINT),
    "a constant plus noise": (((1 + 1e-3 * white(500, 64),) * 3,), ONE_POINT),
    "a constant plus noise, that training shrank": (((1 + 1e-3 * white(500, 64),) * 3, UNTRAINED), ONE_POINT),
    "a constant plus noise of each view": ((tuple(1 + 0.1 * white(500, 64, k) for k in range(3)),), ONE_POINT),
    "views as far apart as images": ((blind(),), ONE_POINT),
    "shrunk and blind": ((blind(.1), blind()), ONE_POINT),
    "shrunk to nothing and blind": ((blind(1e-14),), ONE_POINT),
    "shrunk to nothing and blind, which it was not before": ((blind(1e-25), blind()), ONE_POINT),
    "one dimension alive, and positive": ((tuple(changed(torch.zeros(500, 64).double(), slice(None), 1 + z.abs(), slice(2, 3))
                                                 for z in near(white(500, 1))),), ONE_POINT),
    "on a line and blind, which it was not before": ((tuple(white(500, 1, k) @ white(1, 64, 5) for k in range(3)), blind()),
                                                     ONE_POINT),
    "more than a tenth not finite": (((changed(white(500, 64), slice(60), math.nan),) * 3,), ONE_POINT),
    "none finite": (((white(500, 64) * math.inf,) * 3,), ONE_POINT),
    "a line": ((near(line()),), THIN),
    "a line, without views": ((line()[None],), THIN),
    "four points": (((four_points(),) * 3,), THIN),
    "a line and noise": ((near(line() + 0.05 * white(500, 64, 2)),), THIN),
    "two axes and noise": ((near(few_axes(2, .02)),), THIN),
    "two axes and more noise": ((near(few_axes(2, .05)),), THIN),
    "two axes of 128 and noise": ((near(few_axes(2, .05, 128)),), THIN),
    "five axes and noise": ((near(few_axes(5, .02)),), THIN),
    "half of the images at one point": ((near(images_at_a_point(.5)),), PARTIAL),
    "a fifth of the images at one point": ((near(images_at_a_point(.2)),), PARTIAL),
    "half of the images at a point but for noise": ((near_a_point(.5, .002),), PARTIAL),
    "nine tenths at a point but for noise": ((near_a_point(.9, .001),), PARTIAL),
    "a sixteenth at a point but for noise": ((near_a_point(.06, .007),), PARTIAL),
    "a fifth at one point, without views": ((images_at_a_point(.2)[None],), PARTIAL),
    "fifty distinct rows in five thousand": ((near(white(50, 64).repeat(100, 1)),), PARTIAL),
    "fifty nearly distinct rows": ((near(white(50, 64).repeat(100, 1) + 1e-6 * white(5000, 64, 3)),), PARTIAL),
    "a rare class at one point": ((near(changed(white(500, 64), slice(480, None), 1.)), None, RARE), PARTIAL),
    "each class at a point of its own": ((near(white(5, 64)[CLASSES]), None, CLASSES), [PARTIAL, THIN]),
    "noise, without views": ((white(500, 64)[None],), CANNOT_TELL),
    "a constant plus 5 % noise, without views": (((1 + .05 * white(500, 64))[None],), CANNOT_TELL),
    "width 1": ((near(white(500, 1)),), CANNOT_TELL),
    "width 1, positive": ((near(1 + white(500, 1).abs()),), CANNOT_TELL),
    "noise, both views of an image equal": (((white(500, 64),) * 3,), CANNOT_TELL),
    "one row seventy times as long": ((near(changed(white(500, 64), 7, 70 * white(1, 64))),),
                                      "OUTLIERS: 1 of 500 embeddings (rows 7) hold"),
    "four rows seventy times as long": ((near(changed(white(500, 64), slice(4), 70 * white(4, 64))),),
                                        "OUTLIERS: 4 of 500 embeddings (rows 0, 1, 2, ...) hold"),
    "NaN": ((tuple(changed(z, 3, math.nan, 5) for z in near(white(500, 64))),), NOT_FINITE),
    "an infinite view": (((white(500, 64), white(500, 64), changed(white(500, 64), 7, math.inf, 0)),), NOT_FINITE),
    "blind, and nothing is known of before": ((blind(), (math.nan * white(500, 64),) * 3), "COLLAPSED, or not trained yet"),
    "as before": ((blind(), blind()), NOT_YET),
    "blind and narrower, but in many dimensions": ((tuple(white(500, 20, k) @ white(20, 64, 5) for k in range(3)), blind()),
                                                   NOT_YET),
    "a plateau, thin and blind as before": ((tuple(white(500, 1, k) @ white(1, 64, 5) for k in range(3)),
                                             tuple(white(500, 1, k + 9) @ white(1, 64, 5) for k in range(3))), NOT_YET),
    "in one direction as before": (((1 + 1e-3 * white(500, 64),) * 3, (1 + 1e-3 * white(500, 64, 1),) * 3), NOT_YET),
    "a plateau, in one direction and few others, but hardly smaller than before": (
        (near(1 + .06 * white(500, 3) @ white(3, 64, 1)), near(.1 * white(500, 64))), NOT_YET),
    "in one direction and few others, and shrunk": (
        (near(1 + .06 * white(500, 3) @ white(3, 64, 1)), near(white(500, 64))), THIN),
    "one step": ((near(1.02 * white(500, 64)), near(white(500, 64))), NOTHING)}


def sentence_of(name):
    (z, *views), untrained, labels = [*SYNTHETIC[name][0], None, None][:3]
    return verdict(collapse_panel(z, *views, labels=labels), untrained and collapse_panel(*untrained))
