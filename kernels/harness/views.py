"""Random views of a batch of images, two of which training compares: poses, or crops and colours.

    view(x [N, C, *S], generator) -> [N, C, *S]        float32; images in [0, 1], views may lie outside

TO TRY OTHER VIEWS write such a function and give it to a script's data: data._replace(view=yours). All
randomness has to come from the generator, so that a run can be repeated.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F


def uniform(x, generator, low, high, size=1):
    """Random numbers for each sample of x [N, C, *S], which broadcast over it: [N, size, 1, ...]."""
    axes = x.ndim - 2
    numbers = torch.empty(len(x), size, *[1] * axes, device=x.device)
    return numbers.uniform_(low, high, generator=generator)


PIECE = 2 ** 23                        # bytes of images at a time on a CPU, which caches hold


def two_views(x, generator, view):
    """view(x, generator), twice; of large images piece by piece."""
    many = len(x)
    if not x.is_cuda:
        many = max(1, PIECE // x[0].nbytes)
    parts = x.split(many)
    first = [view(part, generator) for part in parts]
    second = [view(part, generator) for part in parts]
    return torch.cat(first), torch.cat(second)


# ---- Poses -------------------------------------------------------------------------------------------------
def warp(x, angles, scale, shift, sides, padding="zeros"):
    """Rotate, scale about the centre, then shift each of x [N, C, *S], images or volumes; one resampling.

    angles   [N, 1], in 3-D rotation vectors [N, 3], radians
    scale    [N], or [N, axes], last axis first
    shift    [N, axes], half canvases, last axis first
    padding  what lies outside: zeros, or what lies at the border
    All three may have more axes of length 1. -> [N, C, *sides].
    """
    # affine_grid wants for each place of the result the place of x that it comes from: the inverse of the
    # pose, in half canvases, last axis first.
    n, channels, *own_sides = x.shape
    axes = len(own_sides)
    i, j = torch.triu_indices(axes, axes, 1, device=x.device)        # the planes of rotation
    skew = x.new_zeros(n, axes, axes)
    skew[:, i, j] = angles.flatten(1)
    turn = torch.linalg.matrix_exp(skew - skew.mT)
    inverse = turn / scale.view(n, 1, -1)

    length = x.new_tensor(sides[::-1])
    inverse = inverse * length
    inverse = inverse / length[:, None]                              # pixels stay square on other canvases
    shift = shift.view(n, axes, 1)
    offset = -inverse @ shift
    theta = torch.cat([inverse, offset], 2)                          # [N, axes, axes + 1]
    grid = F.affine_grid(theta, [n, channels, *sides], align_corners=False)
    return F.grid_sample(x, grid, padding_mode=padding, align_corners=False)


def posed_view(x, generator, pose=1., noise=1., padding="zeros"):
    """One view of each of x [N, C, *S] by pose, light and noise: digits, microscopy, volumes.

    Ranges of our own, times pose for turns, sizes and shifts, and noise for the noise. padding: see warp.
    Three channels also get a colour cast, saturation, gray in a fifth, and flips.
    """
    draw = partial(uniform, x, generator)
    axes = x.ndim - 2
    planes = axes * (axes - 1) // 2
    angles = pose * draw(-0.45, 0.45, planes)                        # 26 degrees either way
    size = pose * draw(-0.4, 0.4)
    scale = size.exp()                                               # 0.67 to 1.49
    shift = pose * draw(-0.25, 0.25, axes)
    x = warp(x, angles, scale, shift, x.shape[2:], padding)

    if x.shape[1] == 3:
        x = x * draw(0.7, 1.3, 3)                                    # colour cast
        gray = x.mean(1, keepdim=True)
        keep_colour = draw(0, 1) >= 0.2
        saturation = draw(0.6, 1.4)
        x = torch.lerp(gray, x, keep_colour * saturation)
        flipped = draw(0, 1) < 0.5
        x = torch.where(flipped, x.flip(-1), x)

    contrast = draw(0.6, 1.4)
    brightness = draw(-0.2, 0.2)
    noise_level = noise * draw(0, 0.1)
    grain = torch.empty_like(x)
    grain.normal_(generator=generator)
    return contrast * x + brightness + noise_level * grain


# ---- Crops and colours -------------------------------------------------------------------------------------
LUMA = 0.299, 0.587, 0.114             # how much of brightness the eye takes from red, green, blue


def random_crop(x, generator, least=0.08, flips=True):
    """A box of `least` to all of the area of each of x [N, C, H, W], sides at most 4 : 3, brought to H x W.

    flips: half of the boxes are read from right to left.
    """
    draw = partial(uniform, x, generator)
    area = draw(least, 1)
    stretch = math.log(4 / 3)
    ratio = draw(-stretch, stretch).exp()                            # of width to height
    box = torch.cat([area * ratio, area / ratio], 1)
    box = box.sqrt()
    box = box.clamp(max=1)                                           # [N, 2, 1, 1], in canvases
    sides = x.new_tensor(x.shape[:1:-1])                             # last axis first
    half_a_pixel = 1 / sides.view(2, 1, 1)
    room = (1 - box) * (1 - half_a_pixel)                            # what lies outside would be black
    centre = room * draw(-1, 1, 2)
    if flips:
        upright = torch.ones_like(area)
        side = torch.where(draw(-1, 1) < 0, -upright, upright)       # sign() is now and then 0
        box = box * torch.cat([side, upright], 1)
    no_turn = torch.zeros_like(area)
    return warp(x, no_turn, 1 / box, -centre / box, x.shape[2:])


def random_light(x, generator):
    """Jitter of x [N, C, H, W], any channels, in four fifths: random_colours's brightness and contrast."""
    draw = partial(uniform, x, generator)
    brightness = draw(0.6, 1.4)
    contrast = draw(0.6, 1.4)
    mean = x.mean((1, 2, 3), keepdim=True)
    jittered = brightness * torch.lerp(mean, x, contrast)
    x = torch.where(draw(0, 1) < 0.8, jittered, x)
    return x.clamp(0, 1)


def random_colours(x, generator):
    """Jitter of x [N, 3, H, W] in four fifths: brightness, contrast, saturation, hue; gray in a fifth.

    Each step is linear in the colours of a pixel, so all are one 3 x 3 matrix and one offset a sample. What
    leaves 0 to 1 is cut at the end, not after each step.
    """
    def draw(low, high):
        return uniform(x, generator, low, high).flatten(1)[:, None]  # [N, 1, 1], beside matrices

    eye = torch.eye(3, device=x.device)
    luma = x.new_tensor(LUMA).expand(3, 3)                           # colours to three times their brightness
    across = eye.roll(1, 0) - eye.roll(1, 1)                         # across the gray axis: turns hue
    brightness = draw(0.6, 1.4)
    contrast = draw(0.6, 1.4)
    saturation = draw(0.8, 1.2)
    turn = 2 * math.pi / math.sqrt(3) * draw(-0.1, 0.1)
    to_hue = torch.matrix_exp(turn * across)

    mean = luma @ x.mean((2, 3))[:, :, None]                         # [N, 3, 1]
    offset = (1 - contrast) * brightness * mean
    colours = to_hue @ torch.lerp(luma, eye, saturation)
    colours = contrast * brightness * colours
    jittered = draw(0, 1) < 0.8
    offset = offset * jittered
    colours = torch.where(jittered, colours, eye)
    gray = draw(0, 1) < 0.2
    colours = torch.where(gray, luma @ colours, colours)
    jittered_x = torch.baddbmm(offset, colours, x.flatten(2))
    return jittered_x.clamp_(0, 1).view_as(x)


def blur(x, sigma):
    """Gaussian blur of x [N, C, H, W], sigma [N, 1, 1, 1] pixels; the kernel spans a tenth of the canvas.

    By products with banded matrices: a convolution of each image by its own kernel takes twice as long.
    """
    n, channels, height, width = x.shape
    radius = max(1, width // 20)

    def band(side):
        place = torch.arange(side + 2 * radius, device=x.device)
        away = place[:, None] - place[:side] - radius                # from a padded pixel to one made
        outside = away.abs() > radius
        away = away / sigma.view(n, 1, 1)                            # [N, side + 2 radius, side], in sigmas
        tiny = away.abs() > 10                                       # denormal numbers would be slow
        exponent = -away.square() / 2
        exponent = exponent.masked_fill(outside | tiny, -torch.inf)
        return exponent.softmax(1)

    x = F.pad(x, [radius] * 4, "replicate")
    x = x.transpose(1, 2).flatten(1, 2) @ band(width)                # [N, (H + 2 radius) C, W]
    x = band(height).mT @ x.view(n, -1, channels * width)            # [N, H, C W]
    return x.view(n, height, channels, width).transpose(1, 2)


def cropped_view(x, generator, least=0.08, flips=True):
    """One view of each of x [N, C, H, W], photographs: crop, flip, colours, gray, blur, solarisation.

    Colours where C is 3; of others brightness and contrast.
    Ranges and rates of BYOL, arXiv 2006.07733, table 6, which VICReg took over. Our reading: blur and
    solarisation at the mean of its two views' rates; colour jitter in a fixed order; hue about the gray axis.
    """
    x = random_crop(x, generator, least, flips)
    jitter = random_colours if x.shape[1] == 3 else random_light
    x = jitter(x, generator)

    def sometimes(rate, change):
        chosen = uniform(x, generator, 0, 1).flatten() < rate
        chosen = chosen.nonzero().flatten()
        if len(chosen):                                              # a blur of no image is an error
            x[chosen] = change(x[chosen])

    sometimes(0.55, lambda x: blur(x, uniform(x, generator, 0.1, 2)))
    sometimes(0.1, lambda x: torch.minimum(x, 1 - x))                # invert what is brighter than half
    return x


# ---- Which of them -----------------------------------------------------------------------------------------
# k-NN on Fashion-MNIST under SimCLR, VICReg, FALCON, raw pixels .822; one seed, on a part held out from
# training (python tests/experiments/fashion.py views). With few labels, too, crops from 40 % are ahead.
#   poses .749 .752 .756                                     half as strong .748 .747 .754
#   crops from 8 %, not mirrored .819 .805 .790   20 % .832 .807 .802   40 % .834 .828 .800
#                   mirrored     .820 .801 .790        .825 .809 .793        .828 .823 .808
def view_for(images, views="auto", crop=None, flips="auto", pose=1., noise=1., padding="zeros"):
    """A view for images [N, C, *S]: crops for flat ones, poses for volumes, which have no other; or as asked.

    crop: least share of a crop's area; not given, .08 for colour, .4 for others. flips: "auto" is "on" for
    colour, "off" for others. padding: of poses. Prints which it is. ValueError for what does not go together.
    """
    flat = len(images.shape) == 4
    if views == "auto":
        views = "crops" if flat else "poses"

    if views == "poses":
        if crop or flips != "auto":
            raise ValueError("--crop and --flips are of crops: give --views crops, or leave them out")
        print(f"views: poses, of strength {pose:g}, noise {noise:g}")
        return partial(posed_view, pose=pose, noise=noise, padding=padding)

    if not flat:
        raise ValueError("--views crops: volumes have poses alone")
    if (pose, noise) != (1, 1):
        raise ValueError("--pose and --noise are of poses: give --views poses, or leave them out")
    colour = images.shape[1] == 3
    if crop is None:
        crop = 0.08 if colour else 0.4
    if flips == "auto":
        flips = "on" if colour else "off"
    mirrored = "half of them mirrored" if flips == "on" else "not mirrored"
    print(f"views: crops from {crop:.0%} of the area, {mirrored}")
    return partial(cropped_view, least=crop, flips=flips == "on")
