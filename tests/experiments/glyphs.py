"""Letters on textured grounds: colour images of 36 classes that neither pixels nor a pose solves, made here.

    python tests/experiments/glyphs.py --out glyphs.npz                 # a minute on one core
    python vicreg.py --data glyphs.npz --epochs 20

A to Z and 0 to 9 from the 21 plain fonts that matplotlib brings, each in a random font, pose and colour, on a
ground of two other colours (gradient, stripes, rings or clouds) under coloured noise. Capitals and digits alone:
l and I, c and C would be one shape. O and 0 stay apart by width, in one font by a dot: the hardest pair; rotation
ends at 30 degrees, so that 6 and 9, M and W, N and Z do not meet. Training and test images share the fonts.
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
from vicreg import uniform, warp

CLASSES = string.ascii_uppercase + string.digits
SERIES = {  # the fonts' files begin with this, and go on with one of these
    "DejaVuSans": ["", "-Bold", "-Oblique", "-BoldOblique"],
    "DejaVuSansMono": ["", "-Bold", "-Oblique", "-BoldOblique"],
    "DejaVuSerif": ["", "-Bold", "-Italic", "-BoldItalic"],
    "STIXGeneral": ["", "Bol", "Italic", "BolIta"],
    "cm": ["r10", "b10", "ss10", "ti10", "tt10"]}
CANVAS = 96                                              # pixels of a drawn glyph
HEIGHT = 60                                              # of them those of an H


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
    """Noise of four octaves, 2 x 2 to 16 x 16 places, each as strong as it happens: [n, channels, size, size]."""
    total = 0
    for places in (2, 4, 8, 16):
        octave = torch.randn(n, channels, places, places, generator=generator)
        strength = uniform(octave, generator, 0, 1)
        total = total + strength * F.interpolate(octave, [size, size], mode="bilinear")
    return total


def textures(n, size, generator):
    """How much of the second of two colours a place has: [n, 1, size, size] in [0, 1]."""
    line = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(line, line, indexing="ij")
    draw = partial(uniform, torch.empty(n, 1, 1, 1), generator)
    angle = draw(0, 2 * torch.pi)
    along = x * angle.cos() + y * angle.sin()                        # [n, 1, size, size]
    radius = torch.hypot(x - draw(-1, 1), y - draw(-1, 1))
    frequency = draw(4, 20)
    phase = draw(0, 2 * torch.pi)
    kinds = torch.stack([
        2 * along,                                                   # gradient
        2 * torch.sin(frequency * along + phase),                    # stripes
        2 * torch.sin(frequency * radius + phase),                   # rings
        clouds(n, 1, size, generator)])
    kind = torch.randint(len(kinds), (n,), generator=generator)
    sharpness = draw(0.5, 4)
    return torch.sigmoid(sharpness * kinds[kind, torch.arange(n)])


def colours(n, generator, candidates=5):
    """A ground's two colours, and of some candidates the one farthest from both: three of [n, 3, 1, 1]."""
    ground = torch.rand(n, 2, 3, generator=generator)
    ink = torch.rand(n, candidates, 3, generator=generator)
    luma = torch.tensor([0.299, 0.587, 0.114])                       # what the eye reads letters by
    distance = ((ink[:, :, None] - ground[:, None]) @ luma).abs()    # [n, candidates, 2]
    best = distance.amin(2).argmax(1)
    chosen = ink[torch.arange(n), best]
    return [colour[:, :, None, None] for colour in (*ground.unbind(1), chosen)]


def images(glyphs, labels, size, generator):
    """One image of each of labels [n]: [n, size, size, 3] uint8."""
    n = len(labels)
    font = torch.randint(len(glyphs), (n,), generator=generator)
    masks = glyphs[font, labels][:, None]                            # [n, 1, CANVAS, CANVAS]
    draw = partial(uniform, masks, generator)
    angles = draw(-30, 30).deg2rad()
    scale = draw(0.7, 1.2)                                           # an H has 14 to 24 of 32 pixels
    shift = draw(-0.2, 0.2, 2)
    masks = warp(masks, angles, scale, shift, [2 * size] * 2)
    masks = F.avg_pool2d(masks, 2)                                   # smooth edges

    first, second, ink = colours(n, generator)
    ground = torch.lerp(first, second, textures(n, size, generator))
    x = torch.lerp(ground, ink.expand_as(ground), masks)
    grain = clouds(n, 3, size, generator) + torch.randn(x.shape, generator=generator)
    x = x + draw(0.02, 0.08) * grain
    return (255 * x.clamp(0, 1)).round().byte().movedim(1, -1).numpy()


def split(glyphs, n, size, seed):
    """n images, 1,000 at a time, and their labels, as many of each class as of the others: uint8."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randperm(n, generator=generator) % len(CLASSES)
    parts = [images(glyphs, part, size, generator) for part in labels.split(1000)]
    return np.concatenate(parts), labels.byte().numpy()


def contact_sheet(x, labels, path, rows=12, columns=24):
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
