"""Letters on textured grounds: colour images of 36 classes that neither pixels nor a pose solves, made here.

    python tests/experiments/glyphs.py --out glyphs.npz                 # a minute on one core
    python vicreg.py --data glyphs.npz --epochs 20

A to Z and 0 to 9 from the 21 plain fonts that matplotlib brings, each in a random font, pose and tint, dark on a
ground of coloured clouds, with grain. Capitals and digits alone: l and I, c and C would be one shape. O and 0 stay
apart by width, in some fonts by a dot: the hardest pair. Rotation ends at 45 degrees, so that 6 and 9, M and W do not
meet. Training and test images share the fonts.

What two views of one image share and other images lack is what these methods learn, be it the letter or the ground.
With stronger clouds or tints, and letters both dark and light, they learnt the ground first: after 3 epochs a linear
probe found .54 to .58 of the letters, as here, but k-NN .18 to .27 (SimCLR; trials of one seed).
"""
import argparse
import string
import sys
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).parents[2]))
from kernels import knn_accuracy
from kernels.harness.views import uniform, warp

CLASSES = string.ascii_uppercase + string.digits
SERIES = {  # the fonts' files begin with this, and go on with one of these
    "DejaVuSans": ["", "-Bold", "-Oblique", "-BoldOblique"],
    "DejaVuSansMono": ["", "-Bold", "-Oblique", "-BoldOblique"],
    "DejaVuSerif": ["", "-Bold", "-Italic", "-BoldItalic"],
    "STIXGeneral": ["", "Bol", "Italic", "BolIta"],
    "cm": ["r10", "b10", "ss10", "ti10", "tt10"]}
CANVAS = 96                                              # pixels of a drawn glyph
HEIGHT = 60                                              # of them those of an H
OCTAVES = 8, 16                                          # clouds of the ground: so many places on a side
STRENGTH = 0.035                                         # standard deviation of each


def draw_glyph(font, character):
    """One character, white on black, its middle in the canvas's middle: [CANVAS, CANVAS] uint8."""
    left, top, right, bottom = font.getbbox(character)
    corner = (CANVAS - left - right) / 2, (CANVAS - top - bottom) / 2
    image = Image.new("L", (CANVAS, CANVAS))
    ImageDraw.Draw(image).text(corner, character, 255, font)
    return np.asarray(image)


def draw_glyphs():
    """All characters in all fonts: [fonts, classes, CANVAS, CANVAS] float32 in [0, 1]."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    glyphs = []
    for series, styles in SERIES.items():
        for style in styles:
            path = str(folder / f"{series}{style}.ttf")
            _, top, _, bottom = ImageFont.truetype(path, 100).getbbox("H")
            font = ImageFont.truetype(path, round(100 * HEIGHT / (bottom - top)))
            glyphs.append([draw_glyph(font, character) for character in CLASSES])
    return torch.tensor(np.array(glyphs)) / 255


def clouds(n, channels, size, generator):
    """Smooth noise of several octaves: [n, channels, size, size]."""
    total = 0
    for places in OCTAVES:
        octave = torch.randn(n, channels, places, places, generator=generator)
        total = total + STRENGTH * F.interpolate(octave, [size, size], mode="bilinear")
    return total


def images(glyphs, labels, size, generator):
    """One image of each of labels [n]: [n, size, size, 3] uint8."""
    n = len(labels)
    font = torch.randint(len(glyphs), (n,), generator=generator)
    masks = glyphs[font, labels][:, None]                            # [n, 1, CANVAS, CANVAS]
    draw = partial(uniform, masks, generator)
    angles = draw(-45, 45).deg2rad()
    scale = draw(0.55, 1.1)                                          # an H has 11 to 22 of 32 pixels
    shift = draw(-0.4, 0.4, 2)
    masks = warp(masks, angles, scale, shift, [2 * size] * 2)
    masks = F.avg_pool2d(masks, 2)                                   # smooth edges

    light = 0.12 * torch.randn(n, 1, 1, 1, generator=generator)
    tint, tinge = 0.03 * torch.randn(2, n, 3, 1, 1, generator=generator)
    ground = 0.7 + light + tint + clouds(n, 1, size, generator) + clouds(n, 3, size, generator)
    ink = draw(0.45, 0.7) + tinge
    grain = 0.03 * torch.randn(n, 3, size, size, generator=generator)
    x = ground - masks * ink + grain
    return (255 * x.clamp(0, 1)).round().byte().movedim(1, -1).numpy()


def split(glyphs, n, size, seed):
    """n images, 1,000 at a time, and their labels, as many of each class as of the others: uint8."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randperm(n, generator=generator) % len(CLASSES)
    parts = [images(glyphs, part, size, generator) for part in labels.split(1000)]
    return np.concatenate(parts), labels.byte().numpy()


def contact_sheet(x, labels, path, rows=3, columns=12):
    """The first images, three times as large, each with its class above it."""
    side = 3 * x.shape[1]
    sheet = Image.new("RGB", (columns * (side + 4), rows * (side + 14)), "white")
    for k in range(min(len(x), rows * columns)):
        corner = k % columns * (side + 4), k // columns * (side + 14)
        ImageDraw.Draw(sheet).text(corner, CLASSES[labels[k]], "black")
        sheet.paste(Image.fromarray(x[k]).resize((side, side), Image.NEAREST), (corner[0], corner[1] + 12))
    sheet.save(path)


def raw_pixels(x, labels, x_test, test_labels, most=4000):
    """Test accuracy of what knows pixels alone, on up to `most` training images: k-NN, logistic regression."""
    x, x_test = (torch.tensor(part.reshape(len(part), -1) / 255, dtype=torch.float32) for part in (x, x_test))
    y, y_test = (torch.tensor(part, dtype=torch.int64) for part in (labels, test_labels))
    knn = knn_accuracy(x, y, x_test, y_test)
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200, C=1e-3))
    linear.fit(x[:most], y[:most])
    return knn, linear.score(x_test, y_test)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("glyphs.npz"), help="the .npz to write")
    parser.add_argument("--train", type=int, default=20_000, help="training images")
    parser.add_argument("--test", type=int, default=4_000, help="test images")
    parser.add_argument("--size", type=int, default=32, help="side of an image in pixels")
    parser.add_argument("--seed", type=int, default=0, help="the same one gives the same images")
    parser.add_argument("--sheet", type=Path, help="a picture of the first test images to write")
    args = parser.parse_args()

    glyphs = draw_glyphs()
    x, y = split(glyphs, args.train, args.size, 2 * args.seed)
    x_test, y_test = split(glyphs, args.test, args.size, 2 * args.seed + 1)
    np.savez(args.out, train_images=x, train_labels=y, test_images=x_test, test_labels=y_test)
    print(f"{args.out}: {len(x):,} + {len(x_test):,} images of {len(CLASSES)} classes, {len(glyphs)} fonts")
    if args.sheet:
        contact_sheet(x_test, y_test, args.sheet)
    knn, linear = raw_pixels(x, y, x_test, y_test)
    print(f"raw pixels: k-NN {knn:.3f}, linear {linear:.3f} (chance {1 / len(CLASSES):.3f})")


if __name__ == "__main__":
    main()
