"""kernels/harness/prepare.py: the nearest stored row of a training file is its own, whatever the file is."""
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from PIL import Image

from damage import deep_colour_png
from kernels.harness import arrays, decode, embedding, probes
from kernels.harness.arrays import Raw
from kernels.harness.cli import read_data
from kernels.harness.encoder import Encoder
from kernels.harness.images import encode
from kernels.harness.prepare import load_encoder, save_encoder
from scripts import ROOT, SMALL, call

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT = 16


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def noise(*shape, kind="u1", high=256, seed=0):
    """Blobs, so that what is brought to another size is still told apart."""
    x = np.random.default_rng(seed).random(shape)
    return (x * high).astype(kind)


# ---- Sets of files: each writes COUNT of them below `set` --------------------------------------------------
def every(write):
    def make():
        Path("set").mkdir()
        for k in range(COUNT):
            write(f"set/{k:02}", k)
        return "set"
    return make


def rgba(name, k):
    Image.fromarray(noise(20, 24, 4, seed=k)).save(name + ".png")


def palette(name, k):
    image = Image.fromarray(noise(20, 20, 3, seed=k)).quantize(16)
    image.save(name + ".gif" if k % 2 else name + ".png", **{"transparency": 3} if k % 3 else {})


def elongated(name, k):
    Image.fromarray(noise(10, 70, 3, seed=k) if k % 2 else noise(80, 20, 3, seed=k)).save(name + ".jpg", quality=95)


def turned(name, k):
    exif = Image.Exif()
    exif[0x0112] = 1 + k % 8                             # its orientation
    Image.fromarray(noise(24, 40, seed=k)).save(name + ".jpg", exif=exif, quality=95)


def sixteen_bits(name, k):
    Image.fromarray(noise(24, 40, kind="u2", high=65536, seed=k)).save(name + ".png")


def twelve_bits(name, k):
    tifffile.imwrite(name + ".tif", noise(30, 20, kind="u2", high=4096, seed=k))


def floats(name, k):
    tifffile.imwrite(name + ".tif", noise(16, 16, kind="f4", high=4095, seed=k) - 1000)


def five_channels(name, k):
    tifffile.imwrite(name + ".tif", noise(5, 20, 16, kind="u2", high=900, seed=k), imagej=True, metadata={"axes": "CYX"})


def of_several_kinds(name, k):
    if k % 2:
        sixteen_bits(name, k)
    else:
        Image.fromarray(noise(20, 20, seed=k)).save(name + ".png")


def volumes(name, k):
    np.save(name + ".npy", noise(8, 10, 12, kind="i2", high=2000, seed=k))


SETS = [rgba, palette, elongated, turned, sixteen_bits, twelve_bits, floats, five_channels, of_several_kinds, volumes]


def finish(data, folder="run"):
    """What a run leaves of a random encoder."""
    Path(folder).mkdir()
    torch.manual_seed(0)
    channels, *sides = data.images.shape[1:]
    encoder = Encoder(channels, len(sides), width=8)
    with torch.no_grad():
        h, h_test = [encode(encoder, x) for x in (data.images, data.test_images)]
    found = probes.Findings(h, h_test, {}, {})
    save_encoder(encoder, data, Path(folder))
    probes.save_features(encoder, data, found, Path(folder))


def own_rows(things_of):
    """Embeds each stored row's thing anew: the nearest stored row is its own, at cosine 1."""
    encoder, prepare = load_encoder("run")
    with np.load("run/features.npz") as found:
        stored = np.concatenate([found["train_features"], found["test_features"]])
        names = [*found["train_files"], *found["test_files"]]
        things = things_of(found)
    bank = F.normalize(torch.from_numpy(stored))
    assert len({*names}) == len(names) == len(things) == len(bank)
    for row, thing in enumerate(things):
        with torch.no_grad():
            cosines = F.normalize(encoder(prepare(thing))) @ bank.T
        assert cosines.argmax() == row and abs(cosines.max() - 1) < 1e-6, names[row]
    with torch.no_grad():
        together = encoder(prepare(things[:5]))
    torch.testing.assert_close(together, torch.from_numpy(stored[:5]), rtol=1e-5, atol=1e-6)
    return prepare


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("write", SETS, ids=lambda write: write.__name__)
def test_the_nearest_row_of_a_file_is_its_own(write, fit):
    name = every(write)()
    finish(read_data(name, size=16, fit=fit))
    prepare = own_rows(lambda found: [Path("set", file) for split in ("train", "test") for file in found[f"{split}_files"]])
    clear = {"transparent in part, where they became white"} if write in (rgba, palette) else {*()}
    assert {*prepare.taken_as} == clear or write is volumes


KINDS = {"uint8": ("u1", 256, (20, 12, 12)), "colour": ("u1", 256, (20, 12, 12, 3)), "oblong": ("u1", 256, (20, 8, 12)),
         "uint16": ("u2", 5000, (20, 12, 12)), "float": ("f4", 1, (20, 12, 12)), "float64": ("f8", 70, (20, 12, 12)),
         "volumes": ("u1", 200, (20, 6, 8, 10)), "channels": ("u2", 5000, (20, 8, 8, 5))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["npz", "npy"])
def test_the_nearest_row_of_an_array_is_its_own(kind, form):
    dtype, high, shape = KINDS[kind]
    x = noise(*shape, kind=dtype, high=high)
    np.save("x.npy", x)
    np.savez("x.npz", train_images=x)
    finish(read_data(f"x.{form}", channels_last=kind == "channels"))
    own_rows(lambda found: [x[row] for split in ("train", "test") for row in found[f"{split}_files"]])


def test_the_nearest_row_of_a_posed_digit_is_its_own():
    data = read_data("digits")
    finish(data)
    encoder, prepare = load_encoder("run")
    stored = np.load("run/features.npz")["test_features"][:50]
    with torch.no_grad():
        h = encoder(prepare([*data.test_images[:50, 0].numpy()]))
    torch.testing.assert_close(h, torch.from_numpy(stored), rtol=1e-5, atol=1e-6)      # noise beyond [0, 1] stays


# ---- Other files than training's ---------------------------------------------------------------------------
def trained_on(write):
    finish(read_data(every(write)(), size=16))
    return load_encoder("run")[1]


def test_an_open_image_and_an_array_are_as_their_file():
    prepare = trained_on(rgba)
    expected = prepare("set/03.png")
    torch.testing.assert_close(prepare(Image.open("set/03.png")), expected, rtol=0, atol=0)
    torch.testing.assert_close(prepare(np.asarray(Image.open("set/03.png"))), expected, rtol=0, atol=0)
    image = Image.open("set/03.png")
    prepare(image)
    assert image.mode == "RGBA" and image.size == (24, 20)          # it was not changed


def test_what_is_changed_is_counted():
    prepare = trained_on(turned)
    rgba("colour", 0)
    gray = prepare("colour.png")
    white = Image.new("RGBA", (24, 20), "white")
    flat = Image.alpha_composite(white, Image.open("colour.png")).convert("L")
    torch.testing.assert_close(gray, prepare(flat), rtol=0, atol=0)
    assert prepare.taken_as == {"colour, taken as gray": 1, "transparent in part, where they became white": 1}

    prepare = load_encoder("run")[1]
    frames = [Image.fromarray(noise(16, 16, seed=k)) for k in range(3)]
    frames[0].save("frames.gif", save_all=True, append_images=frames[1:])
    prepare("frames.gif")
    assert any("more pages or frames" in what for what in prepare.taken_as)


def test_bytes_for_an_encoder_of_floats_are_255ths():
    np.save("x.npy", noise(20, 16, 16, kind="f4", high=1))
    finish(read_data("x.npy"))
    prepare = load_encoder("run")[1]
    x = noise(16, 16)
    Image.fromarray(x).save("x.png")
    for thing in ("x.png", x):
        torch.testing.assert_close(prepare(thing)[0, 0], torch.from_numpy(x) / 255, rtol=1e-6, atol=0)


def flat_npy(name, k):
    np.save(name + ".npy", noise(12, 12, kind="f4", high=1, seed=k))


def colour_npy(name, k):
    np.save(name + ".npy", noise(12, 12, 3, seed=k))


@pytest.mark.parametrize("write", [flat_npy, colour_npy, volumes])
def test_an_npy_and_its_array_and_a_stack_of_them_are_as_in_their_folder(write):
    prepare = trained_on(write)
    arrays = [np.load(f"set/{k:02}.npy") for k in range(COUNT)]
    np.save("stack.npy", np.stack(arrays))
    names, read = embedding.open_data("stack.npy", prepare)
    for k, x in enumerate(arrays):
        expected = prepare(f"set/{k:02}.npy")
        torch.testing.assert_close(prepare(x), expected, rtol=0, atol=0)
        torch.testing.assert_close(prepare.scale(read(k)[None]), expected, rtol=0, atol=0)
    assert len(names) == COUNT


@pytest.mark.parametrize("shape, kind", [((20, 6, 8, 10), "f4"), ((20, 12, 12, 3), "u1"), ((20, 12, 12), "u1"), ((20, 12, 12), "f4")])
def test_npy_files_are_as_the_rows_of_an_archive(shape, kind):
    x = noise(*shape, kind=kind, high=256 if kind == "u1" else 1)
    np.savez("x.npz", train_images=x)
    finish(read_data("x.npz"))
    prepare = load_encoder("run")[1]
    np.save("own.npy", x[3])
    torch.testing.assert_close(prepare("own.npy"), prepare(x[3]), rtol=0, atol=0)
    np.save("own.npy", np.where(x[3] == x[3].max(), np.nan, x[3]).astype("f4"))
    with pytest.raises(ValueError, match="NaN or infinite|it holds float32, training's images uint8"):
        prepare("own.npy")


def test_the_pages_of_a_stack_are_its_images_when_embedded_too():
    x = noise(20, 2, 16, 12, kind="u2", high=4000)
    tifffile.imwrite("stack.tif", x, imagej=True, metadata={"axes": "TCYX"})
    finish(read_data("stack.tif"))
    prepare = load_encoder("run")[1]
    names, read = embedding.open_data("stack.tif", prepare)
    assert len(names) == 20
    torch.testing.assert_close(prepare.scale(read(3)[None]), prepare(x[3]), rtol=0, atol=0)
    colour = noise(7, 12, 12, 3)
    tifffile.imwrite("rgb.tif", colour, photometric="rgb")
    finish(read_data("rgb.tif"), "rgb")
    prepare = load_encoder("rgb")[1]
    names, read = embedding.open_data("rgb.tif", prepare)
    assert len(names) == 7
    torch.testing.assert_close(prepare.scale(read(2)[None]), prepare(colour[2]), rtol=0, atol=0)
    finish(read_data(every(twelve_bits)(), size=16), "other")
    trained = load_encoder("other")[1]
    tifffile.imwrite("pages.tif", noise(3, 30, 20, kind="u2", high=4096), photometric="minisblack")
    names, read = embedding.open_data("pages.tif", trained)
    assert names == ["pages.tif"] and read(0).shape == (1, 16, 16)       # as of the files of its folder: the first page


@pytest.mark.parametrize("kind, other", [("f4", "f8"), ("f8", "f4"), ("f8", "f2")])
def test_floats_of_any_size_are_one_kind(kind, other):
    Path("set").mkdir()
    for k in range(COUNT):
        tifffile.imwrite(f"set/{k:02}.tif", noise(16, 16, kind=kind, high=4095, seed=k))
    finish(read_data("set", size=16))
    prepare = load_encoder("run")[1]
    x = noise(16, 16, kind=other, high=4095, seed=3)
    tifffile.imwrite("other.tif", x)
    torch.testing.assert_close(prepare("other.tif"), prepare(x), rtol=0, atol=0)


def test_channels_that_are_no_colours_are_none_to_an_encoder_of_photographs():
    prepare = trained_on(turned)
    tifffile.imwrite("two.tif", noise(2, 40, 24), imagej=True, metadata={"axes": "CYX"})
    with pytest.raises(ValueError, match="it holds 2 channels that are not said to be colours"):
        prepare("two.tif")


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_hugging_face_images_are_fitted_as_training_fitted_them(fit, monkeypatch):
    """By the reader alone, since the package may not be there."""
    files = [Image.fromarray(noise(16, 30, 3, seed=k)) for k in range(20)]

    def read(name, decode_image):
        return {"train_images": Raw(np.stack([decode_image(image) for image in files]), "last")}

    monkeypatch.setattr(arrays, "read_hugging_face", read)
    finish(read_data("hf:any", size=12, fit=fit))
    own_rows(lambda found: [files[row] for split in ("train", "test") for row in found[f"{split}_files"]])
    prepare = load_encoder("run")[1]
    names, read = embedding.open_data("hf:any", prepare)
    torch.testing.assert_close(prepare.scale(read(3)[None]), prepare(files[3]), rtol=0, atol=0)


def test_numbers_outside_trainings_range_are_cut_and_counted():
    prepare = trained_on(twelve_bits)
    x = np.zeros((16, 16), np.uint16)
    x[0] = 60000
    found = prepare(x)
    assert found.max() == 1 and found[0, 0, 0].min() == 1
    assert prepare.outside == 256 and prepare.seen == 256           # below the percentile, and above


def test_numbers_that_are_not_scaled_and_lie_far_from_trainings_are_counted_and_features_of_none_refused():
    finish(read_data("digits"))
    encoder, prepare = load_encoder("run")
    x = np.full((20, 20), .5, np.float32)
    prepare(x)
    assert prepare.far == 0 and prepare.seen == 400
    prepare(3.8 * x)                                                 # 1.9
    assert prepare.far == 0
    prepare(5 * x)
    assert prepare.far == 400
    with pytest.raises(ValueError, match="the features of b.npy are not finite"):
        [*embedding.embed(encoder, prepare, ["a.npy", "b.npy"], lambda row: prepare.array([x, 1e38 * x][row]))]


@pytest.mark.parametrize("write, thing, words", [
    (rgba, noise(16, 16, kind="u2"), "it holds uint16, training's images uint8"),
    (twelve_bits, noise(16, 16), "it holds uint8, training's images uint16"),
    (rgba, noise(5, 16, 16), "channels come last, 1, 3 or 4 of them; several images are given as a list"),
    (rgba, noise(16), r"it is uint8 \[16\], no image of 2 axes"), (rgba, np.array([["a"]]), "no image of 2 axes"),
    (five_channels, noise(16, 16, kind="u2"), r"its shape is \[1, 16, 16\]"),
    (volumes, noise(8, 10, 13, kind="i2"), r"its shape is \[8, 10, 13\]"),
    (volumes, noise(8, 10, kind="i2"), "no image of 3 axes")])
def test_what_it_cannot_be_is_said(write, thing, words):
    prepare = trained_on(write)
    with pytest.raises(ValueError, match=words):
        prepare(thing)


@pytest.mark.parametrize("kind, low, high", [("u2", 0, 60_000), ("i2", -30_000, 30_000)])
def test_what_is_brought_to_another_size_stays_within_its_numbers(kind, low, high):
    """Bicubic interpolation goes beyond them, and what does not fit the kind of number would come out at its other end."""
    x = np.full((1, 32, 32), low, kind)
    x[0, ::4, :16] = high
    y = decode.on_canvas(x, decode.Settings(24))[0].astype(int)
    assert y.min() == low and y.max() < low + .8 * (high - low) and (y[:, 14:] == low).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_an_open_image_of_which_pillow_reads_half_the_bits_is_refused(kind):
    prepare = trained_on(rgba)
    if kind == "TIFF":
        tifffile.imwrite("deep", noise(16, 16, 3, kind="u2", high=4096), photometric="rgb")
    else:
        Path("deep").write_bytes(deep_colour_png())
    with pytest.raises(ValueError, match=f"a {kind} of 16 bits a colour"):
        prepare(Image.open("deep"))


def test_a_plane_for_an_encoder_of_volumes_is_refused():
    prepare = trained_on(volumes)
    twelve_bits("plane", 0)
    with pytest.raises(ValueError, match="it holds uint16, training's images int16|its shape is"):
        prepare("plane.tif")


# ---- encoder.pt --------------------------------------------------------------------------------------------
def test_encoder_pt_of_another_backbone_takes_it_as_an_argument():
    data = read_data(every(rgba)(), size=16)

    class Other(torch.nn.Module):
        features = 8

        def __init__(self):
            super().__init__()
            self.convolution = torch.nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return self.convolution(x).mean((2, 3))

    Path("run").mkdir()
    save_encoder(Other(), data, Path("run"))
    with pytest.raises(ValueError, match="run/encoder.pt"):
        load_encoder("run")
    encoder, prepare = load_encoder("run", Other())
    assert encoder(prepare("set/00.png")).shape == (1, 8) and not encoder.training


def test_no_encoder_and_an_earlier_ones():
    with pytest.raises(ValueError, match="nowhere/encoder.pt|nowhere does not serve.*give a finished run"):
        load_encoder("nowhere")
    trained_on(rgba)
    saved_before = torch.load("run/encoder.pt", weights_only=True)
    del saved_before["prepare"]
    torch.save(saved_before, "run/encoder.pt")
    with pytest.raises(ValueError, match="earlier version's"):
        load_encoder("run")


def test_readmes_lines(finished, monkeypatch):
    """As a user: train on files, and run README's lines on one of them."""
    monkeypatch.chdir(finished)
    every(turned)()
    assert call(finished, *SMALL.split(), "--data", "set", "--epochs", "1", "--out", "runs/vicreg-1") == 0
    lines, = re.findall(r"^```python\n(from kernels.harness.prepare import load_encoder.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    names = {}
    Path("new.png").write_bytes(Path("set/03.jpg").read_bytes())
    exec(lines, names)
    with np.load("runs/vicreg-1/features.npz") as found:
        files = [*found["train_files"], *found["test_files"]]
        stored = np.concatenate([found["train_features"], found["test_features"]])
    h = names["h"].detach().numpy()
    assert np.allclose(h[0], stored[files.index("03.jpg")], rtol=1e-5)
