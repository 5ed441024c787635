"""kernels/harness/reading.py: what people bring, and the value that each must give: numbers of all kinds, channels and
pages, arrays, broken files, what is kept, what is cut, splits and labels, names, and what is refused.

Files are written here by tifffile, Pillow and NumPy, read in this process, and compared with what was written.
"""
import gzip
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from scipy.stats import spearmanr
from sklearn.model_selection import train_test_split

from damage import deep_colour_png
from kernels import knn_accuracy
from kernels.harness import decode, sources
from kernels.harness.arrays import Raw
from kernels.harness.cli import read_data
from kernels.harness.digits import posed_digits
from kernels.harness.encoder import Encoder
from kernels.harness.images import Images, encode, in_words, some_numbers
from kernels.harness.numbers import number_range
from kernels.harness.reading import read_images
from kernels.harness.views import cropped_view, posed_view, random_crop

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, which is the current one; one thread, as in all that run beside others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_num_threads(threads)


# ---- Files -------------------------------------------------------------------------------------------------
def numbers(kind="u1", low=0, high=256, shape=(20, 16, 16), seed=0):
    """Random numbers in [low, high): [N, *S]."""
    x = np.random.default_rng(seed).random(shape)
    return (low + x * (high - low)).astype(kind)


def tiff(file, x, **options):
    tifffile.imwrite(f"{file}.tif", x, **options)


def png(file, x):
    Image.fromarray(x).save(f"{file}.png")


def npy(file, x):
    np.save(f"{file}.npy", x)


def write(folder, x, form=png, names=None, **options):
    """A file of each of x, named by its number if not by these names."""
    for k, own in enumerate(x):
        file = Path(folder, names[k] if names else f"{k:03}")
        file.parent.mkdir(parents=True, exist_ok=True)
        form(file, own, **options)


def by_number(data):
    """All images [N, C, *S] of files that are named by their numbers, in that order, float64."""
    files = [*data.files, *data.test_files]
    x = np.concatenate([data.images[:].double(), data.test_images[:].double()])
    return x[np.argsort([int(re.findall(r"\d+", Path(name).name)[0]) for name in files])]


def rank_correlation(x, y):
    return spearmanr(np.ravel(x), np.ravel(y)).statistic


def notes(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]


# ---- What numbers mean -------------------------------------------------------------------------------------
KINDS = {
    "uint8": ("u1", 0, 256), "10 bits": ("u2", 0, 1024), "12 bits": ("u2", 0, 4096),
    "14 bits": ("u2", 0, 16384), "uint16": ("u2", 0, 65536), "uint32": ("u4", 0, 2**32 - 1),
    "24 of 32 bits": ("u4", 0, 2**24), "int8": ("i1", -128, 128), "int16, CT": ("i2", -1000, 3000),
    "int16": ("i2", -32768, 32767), "int32": ("i4", -2e9, 2e9), "int32, few": ("i4", -500, 70000),
    "float 0..1": ("f4", 0, 1), "float 0..255": ("f4", 0, 255), "float 0..4095": ("f4", 0, 4095),
    "negative float": ("f4", -3, 5), "big-endian float": (">f4", -3, 5), "float64": ("f8", -1e5, 1e5),
    "float16": ("f2", 0, 1)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["tiff", "cut tiff", "volumes", "npz", "npy"])
def test_brightness_rises_with_the_file(kind, form, capsys):
    shape = (12, 6, 8, 8) if form == "volumes" else (12, 16, 24) if form == "cut tiff" else (12, 16, 16)
    x = numbers(*KINDS[kind], shape)
    if form in ("npz", "npy"):
        np.savez("x.npz", train_images=x, test_images=x)
        np.save("x.npy", np.concatenate([x] * 2))                    # of which a fifth is held out
        data = read_images(f"x.{form}", size=16)
        found = np.asarray(data.images[:].double()) / (255 if data.images[:1].dtype == torch.uint8 else 1)
        low, high = (data.numbers[key] for key in ("low", "high"))
        wanted = ((x.astype(np.float64) - low) / (high - low)).clip(0, 1)[:, None]
        if form == "npy":
            assert len(data.images) + len(data.test_images) == 24
            return
        assert np.allclose(found, wanted, atol=2e-6)
    else:
        write("set", x, npy if form == "volumes" else tiff)
        found = by_number(read_images("set", size=16))
        x = x[..., 4:-4] if form == "cut tiff" else x
    assert "numbers: " in capsys.readouterr().out
    assert rank_correlation(found, x) >= 0.9995


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_deep_png_keeps_all_its_levels(bits):
    x = numbers("u2", 0, 2**bits)
    write("set", x)
    data = read_images("set", size=16)
    found = by_number(data)
    assert data.images.shape[1:] == (1, 16, 16)
    assert len(np.unique(found)) > 0.5 * len(np.unique(x))           # there were 4 to 16 of them
    assert rank_correlation(found, x) >= 0.9995


def test_the_rule_its_range_and_what_lies_outside_are_told(capsys):
    x = numbers("u2", 100, 3000)
    x[0, 0, 0] = 65535                                               # a hot pixel
    write("set", x, tiff)
    data = read_images("set", size=16)
    low, high = np.percentile(x, (0.1, 99.9))
    outside = ((x < low) | (x > high)).mean()
    assert data.numbers == {"dtype": "uint16", "low": pytest.approx(low), "high": pytest.approx(high),
                            "rule": "percentiles 0.1 and 99.9", "outside": pytest.approx(outside)}
    line, = [line for line in capsys.readouterr().out.splitlines() if line.startswith("numbers: ")]
    assert line == in_words(data.numbers)
    assert f"uint16, {low:,.6g} to {high:,.6g} become 0 to 1" in line and f"{outside:.2%}" in line
    found = by_number(data)[:, 0]
    assert np.allclose(found, ((x - low) / (high - low)).clip(0, 1), atol=1e-6)
    json.dumps(data.numbers)                                         # as config.json has it


@pytest.mark.parametrize("wanted, low, high", [((0, 4095), 0, 4095), (("dtype",), 0, 65535)])
@pytest.mark.parametrize("form", ["tiff", "npz"])
def test_a_range_of_ones_own(wanted, low, high, form):
    x = numbers("u2", 0, 6000)
    np.savez("set.npz", train_images=x, test_images=x)
    write("set", x, tiff)
    data = read_images("set" if form == "tiff" else "set.npz", size=16, value_range=wanted)
    found = by_number(data) if data.files else data.images[:].numpy()
    assert (data.numbers["low"], data.numbers["high"]) == (low, high)
    assert data.numbers["outside"] == pytest.approx(((x < low) | (x > high)).mean(), abs=1e-6)
    assert np.allclose(found[:, 0], (x / high).clip(0, 1), atol=1e-6)


def test_a_range_of_ones_own_for_photographs():
    x = numbers()
    write("set", x)
    found = by_number(read_images("set", size=16, value_range=(50, 150)))
    assert np.allclose(found[:, 0], ((x - 50.) / 100).clip(0, 1), atol=1e-6)


@pytest.mark.parametrize("dtype, sample, expected", [
    ("uint8", [0, 40, 255], (0, 255, "all that uint8 holds")),
    ("bool", [0, 1], (0, 1, "as they are")),
    ("float32", [0, 0.2, 1], (0, 1, "as they are")),
    ("float32", [0] * 1000 + [3], (0, pytest.approx(3, abs=3), None)),
    ("uint16", [0] * 5000 + [9], (0, 9, "least and greatest")),
    ("int16", [-32000, 32000], (-32768, 32767, "all that int16 holds"))])
def test_rules(dtype, sample, expected):
    low, high, rule = number_range(dtype, np.array(sample, dtype))
    assert (low, high) == expected[:2] and rule == (expected[2] or rule)


def test_one_number_throughout_is_refused():
    write("set", np.full((9, 16, 16), 700, "u2"), tiff)
    with pytest.raises(ValueError, match="set: all numbers that were looked at are 700"):
        read_images("set", size=16)


def test_several_kinds_of_numbers_in_one_folder_each_have_their_range(capsys):
    shape = 10, 16, 16
    eight, deep, real = numbers(shape=shape), numbers("u2", 0, 4096, shape), numbers("f4", -1, 1, shape)
    write("set", eight, png)
    write("set", deep, tiff, [f"{k}" for k in range(10, 20)])
    write("set", real, tiff, [f"{k}" for k in range(20, 30)])
    data = read_images("set", size=16)
    found = by_number(data)[:, 0]
    for part, x in zip((found[:10], found[10:20], found[20:]), (eight, deep, real)):
        assert rank_correlation(part, x) >= 0.9995
        assert part.min() <= 0.005 and part.max() >= 0.995
    assert np.allclose(found[:10], eight / 255, atol=1e-4)
    assert data.numbers["ranges"].keys() == {"uint8", "uint16", "float32"}
    assert "each kind of file by its own range" in capsys.readouterr().out
    json.dumps(data.numbers)
    for low, high in ((0, 255), (0, 65535)):                         # not the earlier range, which is kept
        ranges = read_images("set", size=16, value_range=(low, high)).numbers["ranges"]
        assert {*map(tuple, ranges.values())} == {(low, high)}


def test_a_kind_of_one_value_does_not_end_the_others():
    write("set", numbers("u2", 0, 4096), tiff)
    png("set/020", np.zeros((16, 16), np.uint8))
    assert len(by_number(read_images("set", size=16))) == 21


def as_png(folder, x, labels, bits):
    x = (x.clamp(0, 1) * (2**bits - 1)).round()[:, 0].numpy().astype(np.uint8 if bits == 8 else np.uint16)
    write(folder, x, names=[f"{label}/{k:04}" for k, label in enumerate(labels)])


def posed_pngs(*bits, train=1437, test=1440):
    """The posed digits as PNG files of so many bits, in folders of these names."""
    data = posed_digits(2)
    for own in bits:
        as_png(f"{own} bits/train", data.images[:train], data.labels[:train], own)
        as_png(f"{own} bits/test", data.test_images[:test], data.test_labels[:test], own)


def test_twelve_bits_are_as_good_as_eight():
    posed_pngs(8, 12, train=700, test=500)
    torch.manual_seed(0)
    encoder = Encoder(channels=1, axes=2, width=8)
    found = {}
    for bits in (8, 12):
        data = read_images(f"{bits} bits", size=20)
        for name, features in (("pixels", torch.nn.Flatten()), ("random encoder", encoder.eval())):
            h, h_test = encode(features, data.images), encode(features, data.test_images)
            found[bits, name] = knn_accuracy(h, data.labels, h_test, data.test_labels)
    for name in ("pixels", "random encoder"):
        assert found[8, name] > 0.15                                 # chance: 0.1
        assert found[12, name] == pytest.approx(found[8, name], abs=0.02)


@pytest.mark.slow
def test_twelve_bits_train_as_well_as_eight():
    posed_pngs(8, 12)
    knn = {}
    for bits in (8, 12):
        done = start("--data", f"{bits} bits", "--size", "20", "--views", "poses", "--out", f"run {bits}")
        assert done.returncode == 0, done.stderr
        knn[bits] = json.loads(Path(f"run {bits}", "report.json").read_text())["probes"]["trained encoder"]["k-NN"]
    print(knn)
    assert knn[8] > 0.8 and knn[12] == pytest.approx(knn[8], abs=0.02)


# ---- Channels and pages ------------------------------------------------------------------------------------
def stacks(channels, kind="u2", high=4096, seed=0):
    return numbers(kind, 0, high, (12, channels, 16, 16), seed)


CHANNELS = {
    "ImageJ": (2, "u2", dict(imagej=True, metadata={"axes": "CYX"})),
    "ImageJ, 8 bits": (3, "u1", dict(imagej=True, metadata={"axes": "CYX"})),
    "OME": (5, "u2", dict(ome=True, metadata={"axes": "CYX"})),
    "OME, float": (2, "f4", dict(ome=True, metadata={"axes": "CYX"})),
    "planar": (4, "u2", dict(photometric="minisblack", planarconfig="separate")),
    "planar, 8 bits": (5, "u1", dict(photometric="minisblack", planarconfig="separate")),
    "planar RGB": (3, "u1", dict(photometric="rgb", planarconfig="separate")),
    "interleaved": (5, "u2", dict(photometric="minisblack", planarconfig="contig")),
    "interleaved, 8 bits": (2, "u1", dict(photometric="minisblack", planarconfig="contig")),
    "deep RGB": (3, "u2", dict(photometric="rgb")),
    "RGB and one more": (4, "u1", dict(photometric="rgb", extrasamples=["unspecified"])),
    "compressed": (3, "u2", dict(photometric="rgb", compression="zlib")),
    "tiled": (2, "u2", dict(imagej=False, photometric="minisblack", planarconfig="separate", tile=(16, 16)))}


@pytest.mark.parametrize("name", CHANNELS)
def test_all_channels(name):
    channels, kind, options = CHANNELS[name]
    x = stacks(channels, kind, 256 if kind == "u1" else 4096)
    x[:, 0] //= 2                                                    # a channel is told from the others
    contig = options.get("planarconfig") == "contig" or (options.get("photometric") == "rgb"
                                                         and "planarconfig" not in options)
    write("set", x.transpose(0, 2, 3, 1) if contig else x, tiff, **options)
    data = read_images("set", size=16)
    found = by_number(data)
    assert found.shape == x.shape
    for channel in range(channels):
        assert rank_correlation(found[:, channel], x[:, channel]) >= 0.9995
    low, high = data.numbers["low"], data.numbers["high"]
    found = found if data.images[:1].dtype != torch.uint8 else found / 255
    assert np.allclose(found, ((x.astype(float) - low) / (high - low)).clip(0, 1), atol=1e-5)


@pytest.mark.parametrize("kind", ["u2", "f4"])
@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate"])
def test_compressed_tiffs(kind, compression):
    x = numbers(kind, 0, 4096)
    write("set", x, lambda file, own: Image.fromarray(own).save(f"{file}.tif", compression=compression))
    assert rank_correlation(by_number(read_images("set", size=16)), x) >= 0.9995


def test_a_compression_that_needs_a_package_names_it(monkeypatch):
    def unable(data, pages):
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")
    able = decode.tiff_planes
    monkeypatch.setattr(decode, "tiff_planes", unable)
    write("set", stacks(2), tiff, photometric="minisblack", planarconfig="separate")
    with pytest.raises(ValueError, match=r"set/000.tif \(.*pip install imagecodecs\)"):
        read_images("set", size=16)
    monkeypatch.setattr(decode, "tiff_planes", able)                 # it is installed, and they are tried anew
    monkeypatch.setattr(decode, "readers", lambda: "imagecodecs 2026")
    assert by_number(read_images("set", size=16)).shape == (12, 2, 16, 16)


@pytest.mark.parametrize("kind, high", [("u2", 4096), ("u1", 256), ("f4", 1)])
@pytest.mark.parametrize("pages, expected", [("auto", (1, 16, 16)), ("first", (1, 16, 16)),
                                             ("channels", (7, 16, 16)), ("volume", (1, 7, 16, 16))])
def test_pages(pages, expected, kind, high, capsys):
    x = stacks(7, kind, high)
    write("set", x, tiff, photometric="minisblack")
    data = read_images("set", size=16, pages=pages)
    found = by_number(data)
    assert found.shape == (12, *expected)
    assert rank_correlation(found, x if 7 in expected else x[:, 0]) >= 0.9995
    said = [line for line in notes(capsys) if "more pages" in line]
    assert len(said) == (pages in ("auto", "first"))
    assert not said or ("12 files" in said[0] and "000.tif" in said[0] and "--pages channels or volume" in said[0])


def test_pages_of_channels_and_of_two_kinds():
    x = numbers("u2", 0, 4096, (6, 4, 3, 16, 16))                    # pages, channels
    write("ome", x, tiff, ome=True, metadata={"axes": "ZCYX"})
    assert np.shape(by_number(read_images("ome", size=16))) == (6, 3, 16, 16)
    found = by_number(read_images("ome", size=16, pages="volume"))
    assert rank_correlation(found, x.transpose(0, 2, 1, 3, 4)) >= 0.9995
    found = by_number(read_images("ome", size=16, pages="channels"))
    assert found.shape == (6, 12, 16, 16) and rank_correlation(found, x) >= 0.9995
    write("shaped", x.reshape(6, 2, 2, 3, 16, 16), tiff, photometric="minisblack")     # axes QQQYX
    assert by_number(read_images("shaped", size=16, pages="volume")).shape == (6, 1, 12, 16, 16)


def test_pages_of_another_size_are_noted(capsys):
    def form(file, x):
        with tifffile.TiffWriter(f"{file}.tif") as out:
            out.write(x)
            out.write(x[:8, :8])
    write("set", numbers("u2"), form)
    read_images("set", size=16)
    assert any("20 files hold more pages" in line for line in notes(capsys))


def one_by_one(file, x):
    """Each page by a call of its own: to tifffile a series each."""
    with tifffile.TiffWriter(f"{file}.tif") as out:
        for page in x:
            out.write(page)


@pytest.mark.parametrize("pages, expected", [("auto", (1, 16, 16)), ("channels", (7, 16, 16)), ("volume", (1, 7, 16, 16))])
def test_pages_that_were_written_one_by_one(pages, expected, capsys):
    x = numbers("u2", 0, 4096, (12, 7, 16, 16))
    write("set", x, one_by_one)
    found = by_number(read_images("set", size=16, pages=pages))
    assert found.shape == (12, *expected)
    assert rank_correlation(found, x if pages != "auto" else x[:, 0]) >= 0.9995
    assert any("more pages" in line for line in notes(capsys)) == (pages == "auto")


@pytest.mark.parametrize("pages", ["auto", "channels", "volume"])
def test_ome_files_that_name_each_other(pages):
    """A position in each file, and what is in all of them in each."""
    from xml.sax.saxutils import quoteattr
    x = numbers("u2", 0, 4096, (6, 16, 16))
    names = [f"p{k}.ome.tif" for k in range(6)]
    images = "".join(
        f'<Image ID="Image:{k}" Name={quoteattr(name)}><Pixels ID="Pixels:{k}" DimensionOrder="XYCZT" Type="uint16" SizeX="16" '
        f'SizeY="16" SizeC="1" SizeZ="1" SizeT="1"><Channel ID="Channel:{k}:0" SamplesPerPixel="1"/><TiffData IFD="0" PlaneCount="1">'
        f'<UUID FileName={quoteattr(name)}>urn:uuid:{k:08}-0000-0000-0000-000000000000</UUID></TiffData></Pixels></Image>'
        for k, name in enumerate(names))
    Path("set").mkdir()
    for k, name in enumerate(names):
        text = (f'<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
                f'UUID="urn:uuid:{k:08}-0000-0000-0000-000000000000">{images}</OME>')
        tifffile.imwrite(f"set/{name}", x[k], description=text, metadata=None)
    found = by_number(read_images("set", size=16, pages=pages))
    assert rank_correlation(found, x) >= 0.9995


def test_of_pages_one_by_one_only_the_first_is_read_where_it_is_taken(monkeypatch):
    write("set", numbers("u2", 0, 4096, (8, 7, 16, 16)), one_by_one)
    counts = []
    real = decode.read_series
    monkeypatch.setattr(decode, "read_series", lambda alike: counts.append(len(alike)) or real(alike))
    read_images("set", size=16)
    assert {*counts} == {1}


def test_pages_of_another_size_are_noted_without_advice_that_was_followed(capsys):
    write("set", numbers("u2", 0, 4096, (12, 7, 16, 16)), lambda file, x: one_by_one(file, [*x, x[0, :8, :8]]))
    assert read_images("set", size=16, pages="volume").images.shape[1:] == (1, 7, 16, 16)
    said, = [line for line in notes(capsys) if "pages" in line]
    assert "12 files hold pages or frames that are not taken" in said and "--pages" not in said


@pytest.mark.parametrize("kind", ["u1", "u2"])
@pytest.mark.parametrize("form", ["folder", "stack"])
def test_where_0_is_white_it_is_turned_round_as_by_pillow(kind, form):
    x = numbers(kind, 0, 256 ** int(kind[1]))
    if form == "folder":
        write("set", x, tiff, photometric="miniswhite")
        data = read_images("set", size=16)
        found, x = by_number(data), x[:, None]
        own = data.prepare(f"set/{data.files[0]}")
        torch.testing.assert_close(own, data.prepare(Image.open(f"set/{data.files[0]}")), rtol=0, atol=0)
    else:
        x[:, 1:] //= 8                                               # dark, but for a row
        tiff("stack", x, photometric="miniswhite")
        data = read_images("stack.tif")
        found = np.sort(np.concatenate([data.images[:], data.test_images[:]]), None)
        x = np.sort(x, None)[::-1 if kind == "u1" else 1]
        assert (found[found.size // 2] > 0.8 * found.max()) == (kind == "u1")
    assert rank_correlation(found, x) * (-1 if kind == "u1" else 1) >= 0.9995


def test_frames_of_a_gif_are_noted(capsys):
    def form(file, x):
        first, second = Image.fromarray(x), Image.fromarray(255 - x)
        first.save(f"{file}.gif", save_all=True, append_images=[second])
    write("set", numbers(), form)
    read_images("set", size=16)
    assert any("20 files hold more pages or frames" in line for line in notes(capsys))


def test_one_colour_image_among_gray_ones_is_named(capsys):
    write("set", numbers())
    png("set/020", numbers(shape=(16, 16, 3)))
    assert by_number(read_images("set", size=16)).shape == (21, 3, 16, 16)
    said, = [line for line in notes(capsys) if "have colour" in line]
    assert "1 of 21 files" in said and "020.png" in said


@pytest.mark.parametrize("odd", [
    numbers(shape=(16, 16, 3)), numbers("u2", 0, 4096, (16, 16)), None], ids=["colour", "12 bits", "none"])
def test_of_many_files_one_that_a_first_look_did_not_see_decides_as_much(odd, monkeypatch):
    """Of 600 files 50 are looked at; what they let expect is dropped where one file is of another kind."""
    x = numbers(shape=(600, 16, 16))
    write("set", x)
    Path("set/004.png").write_bytes(b"broken")
    if odd is not None:
        png("set/005", odd)
    found = read_images("set", size=16)
    monkeypatch.setattr(decode, "likely_target", lambda files, settings: None)
    monkeypatch.chdir("set")                                         # where nothing is decoded yet
    expected = read_images(".", size=16)
    assert found.files == expected.files and found.skipped == expected.skipped != []
    assert found.numbers == expected.numbers and np.array_equal(by_number(found), by_number(expected))
    assert found.images.shape[1] == (3 if odd is not None and odd.ndim == 3 else 1)


def test_one_channel_among_three_that_are_no_colours_is_not_shown_thrice():
    write("set", stacks(3), tiff, imagej=True, metadata={"axes": "CYX"})
    tiff("set/012", numbers("u2", 0, 4096, (16, 16)))
    data = read_images("set", size=16)
    assert data.skipped == [("012.tif", "its shape is [1, 16, 16]; training's, or most files', is [3, 16, 16]")]


# ---- Arrays ------------------------------------------------------------------------------------------------
CODES = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}


def idx(x):
    head = struct.pack(f">HBB{x.ndim}I", 0, CODES[x.dtype.str[1:]], x.ndim, *x.shape)
    return head + x.astype(x.dtype.newbyteorder(">")).tobytes()


IDX_NAMES = {
    "MNIST": ("{}", "train-{}-idx{}-ubyte", "t10k-{}-idx{}-ubyte"),
    "MNIST, unpacked by hand": ("{}", "train-{}.idx{}-ubyte", "t10k-{}.idx{}-ubyte"),
    "packed": ("{}.gz", "train-{}-idx{}-ubyte", "t10k-{}-idx{}-ubyte"),
    "EMNIST": ("{}.gz", "emnist-letters-train-{}-idx{}-ubyte", "emnist-letters-test-{}-idx{}-ubyte")}


def write_idx(names, kind="u1", folder="idx"):
    """-> {split: (images, labels)}"""
    ending, *patterns = IDX_NAMES[names]
    Path(folder).mkdir(exist_ok=True)
    written = {}
    for split, pattern, count in zip(("train", "test"), patterns, (24, 9)):
        x = numbers(kind, 0 if kind == "u1" else -900, 256 if kind == "u1" else 3000, (count, 14, 14))
        y = (np.arange(count) % 3).astype(np.uint8)
        for part, array in (("images", x), ("labels", y)):
            content = idx(array)
            path = Path(folder, ending.format(pattern.format(part, array.ndim)))
            path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        written[split] = x, y
    return written


@pytest.mark.parametrize("names", IDX_NAMES)
@pytest.mark.parametrize("by", ["folder", "file"])
def test_idx_as_published(names, by):
    written = write_idx(names)
    file = sorted(Path("idx").iterdir())[-1]
    data = read_images("idx" if by == "folder" else file)
    for split, x, y in (("train", data.images, data.labels), ("test", data.test_images, data.test_labels)):
        assert np.array_equal(x[:][:, 0], written[split][0])
        assert np.array_equal(y, written[split][1])


def test_idx_of_other_numbers():
    written = write_idx("MNIST", "i2")
    data = read_images("idx")
    assert data.numbers["dtype"].endswith(("i2", "int16"))
    assert rank_correlation(data.images[:], written["train"][0]) >= 0.9995


def test_several_idx_sets_in_a_folder():
    written = write_idx("EMNIST")
    write_idx("packed")
    with pytest.raises(ValueError, match="2 sets of IDX files .*emnist-letters.*give one file"):
        read_images("idx")
    data = read_images("idx/emnist-letters-test-labels-idx1-ubyte.gz")
    assert np.array_equal(data.images[:][:, 0], written["train"][0])


@pytest.mark.parametrize("harm, words", [
    (lambda data: data[:-1], "cut short: 4,703 bytes for"), (lambda data: b"", "cannot be read as IDX"),
    (lambda data: b"\x08" + data, "does not begin as one"), (lambda data: data[:6], "cannot be read as IDX")])
def test_damaged_idx(harm, words):
    write_idx("MNIST")
    path = Path("idx/train-images-idx3-ubyte")
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(ValueError, match=words):
        read_images("idx")


def test_a_single_npy_stays_on_the_disk_and_volumes_are_volumes():
    np.save("x.npy", numbers("u2", 0, 4096, (20, 6, 8, 8)))
    data = read_images("x.npy")
    assert data.images.shape == (16, 1, 6, 8, 8) and len(data.test_images) == 4
    assert isinstance(data.images.raw.array, np.memmap)
    np.save("x.npy", numbers(shape=(20, 8, 8, 5)))
    assert read_images("x.npy", channels_last=True).images.shape == (16, 5, 8, 8)


@pytest.mark.parametrize("axes, shape, expected", [
    ("TYX", (20, 16, 12), (16, 1, 16, 12)), ("ZCYX", (20, 2, 16, 12), (16, 2, 16, 12)),
    ("TZYX", (5, 4, 16, 12), (16, 1, 16, 12))])
def test_a_tiff_stack(axes, shape, expected):
    x = numbers("u2", 0, 4096, shape)
    tiff("stack", x, imagej=True, metadata={"axes": axes})
    data = read_images("stack.tif")
    assert data.images.shape == expected
    found = np.concatenate([data.images[:], data.test_images[:]])
    assert np.sort(found, None) == pytest.approx(np.sort(x.reshape(found.shape).clip(
        data.numbers["low"], data.numbers["high"]) - data.numbers["low"], None) / (
        data.numbers["high"] - data.numbers["low"]), abs=1e-5)


def test_a_stack_written_page_by_page_and_one_of_several_positions(capsys):
    x = numbers("u2", 0, 4096)
    one_by_one("stack", [*x, *x[:3, :8, :8]])
    data = read_images("stack.tif")
    assert data.images.shape == (16, 1, 16, 16) and len(data.test_images) == 4
    assert any("stack.tif: left out 3 pages" in line for line in notes(capsys))
    with tifffile.TiffWriter("ome.tif", ome=True) as out:
        for position in x.reshape(4, 5, 16, 16):
            out.write(position, metadata={"axes": "TYX"})
    data = read_images("ome.tif")
    found = np.concatenate([data.images[:], data.test_images[:]])
    assert found.shape == (20, 1, 16, 16) and rank_correlation(np.sort(found, None), np.sort(x, None)) >= 0.9995
    assert not any("left out" in line for line in notes(capsys))


def test_one_image_is_no_stack():
    tiff("stack", numbers("u2", shape=(16, 12)))
    with pytest.raises(ValueError, match="stack.tif holds 1 images: 16 at least"):
        read_images("stack.tif")


def test_what_an_archive_holds_beside_is_named(capsys):
    x = numbers()
    np.savez("x.npz", train_images=x, test_image=x, val_images=x, val_labels=np.arange(20))
    read_images("x.npz")
    assert "note: left out of x.npz: test_image, val_images, val_labels; taken: train_images" in notes(capsys)
    Path("x.npz").rename("x.npy")
    with pytest.raises(ValueError, match="x.npy cannot be read as .npy .it is an .npz: name it so"):
        read_images("x.npy")


def test_options_that_do_nothing_are_named(capsys):
    without = "without effect on these data"
    np.savez("x.npz", train_images=numbers())
    read_images("x.npz", size=32, fit="pad", strict=True, channels_last=False)
    assert f"note: --size, --fit, --strict: {without}" in notes(capsys)
    tiff("stack", numbers("u2"), photometric="minisblack")
    read_images("stack.tif", channels_last=True)
    assert f"note: --channels-last: {without}" in notes(capsys)
    np.save("gray.npy", numbers())
    assert read_images("gray.npy", channels_last=True).images.shape[1:] == (1, 16, 16)
    assert f"note: --channels-last: {without}" in notes(capsys)
    write("set", numbers())
    read_images("set", size=16, channels_last=True)
    assert f"note: --channels-last: {without}" in notes(capsys)
    write("volumes", numbers("f4", 0, 9, (12, 6, 7, 8)), npy)
    read_images("volumes", size=32, fit="pad", pages="volume")
    assert f"note: --size, --fit, --pages: {without}" in notes(capsys)
    read_data("digits", size=32, labels="top", value_range=("dtype",))
    assert f"note: --size, --labels, --range: {without}" in notes(capsys)
    np.save("x.npy", numbers(shape=(20, 8, 8, 5)))
    read_images("x.npy", channels_last=True)
    read_data("digits")
    assert not any(without in line for line in notes(capsys))


def test_numbers_beyond_float32():
    x = numbers("f8", 0, 1e300)
    np.savez("x.npz", train_images=x, test_images=x)
    assert rank_correlation(read_images("x.npz").images[:], x) >= 0.9995


# ---- NIfTI, Hugging Face -----------------------------------------------------------------------------------
def nifti(file, x):
    import nibabel
    nibabel.save(nibabel.Nifti1Image(x, np.eye(4)), f"{file}.nii.gz")


@pytest.mark.parametrize("shape, expected", [((8, 9, 10), (1, 8, 9, 10)), ((8, 9, 10, 2), (2, 8, 9, 10))])
def test_nifti(shape, expected):
    pytest.importorskip("nibabel")
    x = numbers("i2", -1000, 3000, (20, *shape))
    write("scans", x, nifti)
    Path("scans/020.nii.gz").write_bytes(Path("scans/019.nii.gz").read_bytes()[:-200])
    data = read_images("scans")
    found = by_number(data)
    assert found.shape == (20, *expected)
    assert rank_correlation(found, np.moveaxis(x.reshape(20, 8, 9, 10, -1), -1, 1)) >= 0.9995
    assert [name for name, _ in data.skipped] == ["020.nii.gz"]


@pytest.mark.parametrize("package, name, words", [
    ("nibabel", "scans", "pip install nibabel"), ("datasets", "hf:mnist", "pip install datasets")])
def test_a_package_that_is_missing_is_named(package, name, words, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    Path("scans").mkdir()
    for k in range(9):
        Path(f"scans/{k}.nii.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=words):
        read_images(name)


@pytest.fixture
def huggingface(monkeypatch, tmp_path):
    """The package, without a network; make(x, labels) -> a Dataset."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()

    def make(x, labels):
        features = datasets.Features({"id": datasets.Value("int64"), "picture": datasets.Image(),
                                      "kind": datasets.ClassLabel(names=["cat", "dog", "fox"])})
        columns = {"id": [*range(len(x))], "picture": [Image.fromarray(own) for own in x], "kind": labels}
        return datasets.Dataset.from_dict(columns, features=features)
    datasets.make = make
    return datasets


@pytest.mark.parametrize("x", [numbers(), numbers(shape=(20, 16, 16, 3)), numbers("u2", 0, 4096)],
                         ids=["gray", "colour", "deep"])
def test_hugging_face(x, huggingface):
    y = np.arange(20) % 3
    parts = {"train": huggingface.make(x, y), "validation": huggingface.make(x[::-1][:9], y[:9])}
    huggingface.DatasetDict(parts).save_to_disk("set")
    data = read_images("hf:set", size=16)
    expected = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)
    assert data.images.shape == expected.shape and len(data.test_images) == 9
    assert rank_correlation(data.images[:], expected) >= 0.9995
    assert np.array_equal(data.labels, y) and np.array_equal(data.test_labels, y[:9])
    assert len(read_images("hf:set:train", size=16).images) == 16    # of which a fifth is held out
    huggingface.DatasetDict(parts | {"test": huggingface.make(x[:9], [-1] * 9)}).save_to_disk("secret")
    assert np.array_equal(read_images("hf:secret", size=16).test_labels, y[:9])          # of validation
    for name, words in (("hf:set:spring", "spring"), ("hf:nowhere", "cannot be loaded")):
        with pytest.raises(ValueError, match=words):
            read_images(name)


def test_hugging_face_gray_among_colour_and_a_folder(huggingface):
    gray, colour = numbers(shape=(6, 16, 16)), numbers(shape=(6, 16, 16, 3))
    huggingface.make([*gray, *colour], [0] * 6 + [1] * 6).save_to_disk("mixed")
    assert read_images("hf:mixed", size=16).images.shape[1:] == (3, 16, 16)
    write("plain/cat", colour)
    write("plain/dog", colour[::-1] // 2)
    data = read_images("hf:plain", size=16)
    assert data.images.shape[1:] == (3, 16, 16) and len(data.classes) == 2


# ---- What cannot be read -----------------------------------------------------------------------------------
def start(*arguments, **environment):
    """vicreg.py as a process of its own."""
    return subprocess.run([sys.executable, ROOT / "vicreg.py", *arguments], capture_output=True, text=True,
                          timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def odd_names():
    """(name, words) of all that --data cannot be."""
    for endings, (what, _) in sources.OTHERS.items():
        yield f"x{endings[0]}", rf"x{re.escape(endings[0])} is {what}: \w+"
    yield "x.tar.gz", "is a packed archive: unpack"
    yield "x.png", "is one image: give the folder"
    yield "x.nii.gz", "is one volume: give the folder"
    yield "x.docx", "cannot be read: give a folder of images"
    yield "pipe", "neither a file nor a folder"
    yield "dangling", "neither a file nor a folder"
    yield "~/pictures", r"is not there: the shell left its ~"
    yield "nowhere", "is not there: check the path"
    yield "nowhere\nat all", "is not there: check the path"
    yield "https://example.com/x.zip", "is an address: fetch it first"
    yield "s3://bucket/x", "is an address: fetch it first"


@pytest.mark.parametrize("name, words", [*odd_names()])
def test_a_wrong_name_is_told_in_one_line_at_once(name, words):
    if name == "pipe":
        os.mkfifo(name)
    elif name == "dangling":
        Path(name).symlink_to("nothing")
    elif name.startswith("x."):
        Path(name).write_bytes(b"anything")
    with pytest.raises(ValueError, match=words):
        read_images(name)
    before = time.monotonic()
    done = start("--data", name)
    assert time.monotonic() - before < 3                             # 0.1; a busy machine
    assert done.returncode == 2
    line, = done.stderr.splitlines()
    assert re.match(rf"vicreg.py: .*{words}", line.replace(" at all", "\nat all") if "\n" in name else line, re.S)


@pytest.mark.parametrize("words", [("--data=x.h5",), ("--data", "digits", "--data", "x.h5")])
def test_the_last_data_counts_however_it_is_given(words):
    Path("x.h5").touch()
    done = start(*words)
    assert done.returncode == 2 and "is an HDF5 file" in done.stderr


# ---- Broken files ------------------------------------------------------------------------------------------
def bytes_of(form, x, **options):
    file = io.BytesIO()
    Image.fromarray(x).save(file, form, **options)
    return file.getvalue()


def broken_images():
    """{name: (what is in it, the reason)}"""
    x = numbers(shape=(64, 64, 3))
    file = io.BytesIO()
    tifffile.imwrite(file, numbers("u2", shape=(64, 64)))
    deep = file.getvalue()
    return {
        "zero.jpg": (b"", "cannot identify"), "cut.png": (bytes_of("PNG", x)[:4000], "truncated"),
        "cut.jpg": (bytes_of("JPEG", x)[:1500], "truncated"), "half.gif": (bytes_of("GIF", x)[:300], r"\w"),
        "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "cannot identify"),
        "text.png": (b"no image\n" * 9, "cannot identify"),
        "deep colour.png": (deep_colour_png(), "16 bits a colour.*write it as TIFF"),
        "corrupt.tif": (deep[:8] + bytes(500), r"\w"), "cut.tif": (deep[:4000], "failed to read")}


def write_broken():
    for name, (content, _) in broken_images().items():
        Path("set", name).write_bytes(content)
    if Path("/proc/self/mem").exists():                              # what a failing disk says
        Path("set", "unreadable.png").symlink_to("/proc/self/mem")


def test_broken_files_are_skipped_each_with_its_reason(capsys):
    x = numbers(shape=(95, 16, 16))
    write("set", x)
    write_broken()
    data = read_images("set", size=16)
    skipped = dict(data.skipped)
    assert skipped.pop("unreadable.png", "Input/output error").endswith("Input/output error")
    assert skipped.keys() == broken_images().keys()
    for name, (_, reason) in broken_images().items():
        assert re.search(reason, skipped[name]), skipped[name]
        assert "\n" not in skipped[name] and "0x" not in skipped[name]
    assert len(data.images) + len(data.test_images) == 95
    assert np.allclose(by_number(data)[:, 0], x / 255, atol=1e-4)    # as if they were not there


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_skipped():
    write("set", numbers())
    Path("set/003.png").chmod(0)
    data = read_images("set", size=16)
    assert data.skipped == [("003.png", "[Errno 13] Permission denied: 'set/003.png'")]


def test_what_could_not_be_read_for_now_is_tried_again(looked_at, monkeypatch):
    """A file without rights, a share that was gone: neither its name nor its time changes when it is back."""
    write("set", numbers())
    Path("set/004.png").write_bytes(b"broken for good")
    gone = True
    real = Path.read_bytes, decode.opens

    def read_bytes(path):
        if gone and path.name == "003.png":
            raise PermissionError(13, "Permission denied", str(path))
        return real[0](path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    monkeypatch.setattr(decode, "opens", lambda file: not (gone and file.name == "003.png") and real[1](file))
    assert dict(read_images("set", size=16).skipped)["003.png"] == "[Errno 13] Permission denied: 'set/003.png'"
    looked_at.clear()
    at_work = read_images("set", size=16)
    assert [name for name, _ in at_work.skipped] == ["003.png", "004.png"] and not looked_at
    gone = False
    data = read_images("set", size=16)
    assert [name for name, _ in data.skipped] == ["004.png"] and {*looked_at} == {"003.png"}
    assert np.allclose(by_number(data)[:, 0], np.delete(numbers(), 4, 0))
    looked_at.clear()
    read_images("set", size=16)
    assert not looked_at
    assert np.allclose(by_number(at_work)[:, 0], np.delete(numbers(), [3, 4], 0))    # its rows are what they were


def test_a_folder_that_may_not_be_read_is_named(capsys, monkeypatch):
    real = os.scandir

    def scandir(folder="."):
        if str(folder).endswith("cat"):
            raise PermissionError(13, "Permission denied", folder)
        return real(folder)

    for name in ("cat", "dog", "fox"):
        write(f"set/{name}", numbers())
    monkeypatch.setattr(os, "scandir", scandir)
    assert list(read_images("set", size=16).classes) == ["dog", "fox"]
    assert "note: left out set/cat: Permission denied" in notes(capsys)


def test_a_stray_picture_does_not_hide_volumes(capsys):
    x = numbers("f4", 0, 9, (12, 6, 7, 8))
    write("set", x, npy)
    png("set/preview", numbers()[0])
    assert rank_correlation(by_number(read_images("set")), x) >= 0.9995
    assert "note: taken 12 of 13 files; left out: 1 .png" in notes(capsys)


def test_training_and_test_parts_are_of_one_kind(capsys):
    """Whatever else lies in one of them."""
    x = numbers(shape=(16, 16, 16))
    write("set/train", x[:12])
    write("set/test", x[12:], names=[f"{k}" for k in range(12, 16)])
    write("set/test", x[:5], npy, names=[f"features {k}" for k in range(5)])
    data = read_images("set", size=16)
    assert len(data.images) == 12 and len(data.test_images) == 4
    assert "note: taken 16 of 21 files; left out: 5 .npy" in notes(capsys)


def test_runs_on_another_disk(monkeypatch):
    """runs may be a link: what is decoded is written there at once, not moved there."""
    write("set", numbers())
    real = Path.replace

    def replace(path, target):
        assert path.resolve().parents[1] == Path(target).resolve().parent, "Invalid cross-device link"
        return real(path, target)

    Path("elsewhere").mkdir()
    Path("runs").symlink_to("elsewhere")
    monkeypatch.setattr(Path, "replace", replace)
    assert read_images("set", size=16).images.shape == (16, 1, 16, 16)
    assert [*Path("elsewhere/decoded").glob("set-*.npy")] and not [*Path().glob(".decoding*")]


def volume(x):
    file = io.BytesIO()
    np.save(file, x)
    return file.getvalue()


def test_broken_volumes_are_skipped():
    x = numbers("f4", 0, 9, (50, 6, 7, 8))
    write("set", x, npy)
    harmed = np.where(x[0] > 8.9, np.nan, x[0])
    broken = {"wrong shape": (volume(x[0][:5]), r"shape is \[5, 7, 8\]; training's, or most files', is \[6, 7, 8\]"),
              "nan": (volume(harmed.astype("f4")), "NaN or infinite"),
              "beyond": (volume(np.full((6, 7, 8), 1e300)), "NaN or infinite"),
              "cut": (volume(x[0])[:-9], r"\w"), "none": (b"text", "no .npy file"),
              "pickle": (volume(np.array([{"run": "me"}] * 9)), "Python objects"),
              "complex": (volume(x[0].astype(complex)), "complex128, no numbers")}
    for count, (name, (content, reason)) in enumerate(broken.items()):
        for other in Path("set").glob("[a-z]*"):
            other.unlink()
        Path("set", f"{name}.npy").write_bytes(content)
        if name in ("beyond", "cut"):
            Path("set", f"{name} 2.npy").write_bytes(content)
        data = read_images("set")
        for _, found in data.skipped:
            assert re.search(reason, found), found
            assert "pickle" not in found
        assert {own.split(" 2")[0] for own, _ in data.skipped} in ({f"{name}.npy"}, {name, f"{name}.npy"})
        if name not in ("beyond",):
            assert data.numbers["dtype"] == "float32"                # decided by those that can be read
        assert rank_correlation(by_number(data), x) >= 0.9995


@pytest.mark.parametrize("count, strict", [(2, False), (1, True), (19, False)])
def test_more_than_one_in_ten_or_strict_ends_it_and_names_one(count, strict):
    write("set", numbers())
    for k in range(count):
        Path(f"set/{k:03}.png").write_bytes(b"")
    if count == 2:
        Path("set/020.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"of 2[01] files cannot be read.*set/000.png \(cannot identify.*Repair"):
        read_images("set", size=16, strict=strict)


def test_all_broken():
    Path("set").mkdir()
    for k in range(9):
        Path(f"set/{k}.jpg").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="none of 9 files can be read; set/0.jpg: cannot identify"):
        read_images("set")


def test_what_one_start_decoded_before_it_ended_is_kept(looked_at):
    write("set", numbers())
    for k in range(4):
        Path(f"set/{k:03}.png").write_bytes(b"")
    with pytest.raises(ValueError):
        read_images("set", size=16)
    for k in range(4):
        Path(f"set/{k:03}.png").unlink()
    looked_at.clear()
    read_images("set", size=16)
    assert looked_at == []


def test_pillows_warnings_do_not_reach_the_screen(recwarn):
    def form(file, x):
        image = Image.fromarray(x).quantize(16)
        image.save(f"{file}.png", transparency=bytes(range(16)))     # "should be converted to RGBA images"
    write("set", numbers(shape=(20, 16, 24)), form)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Image.open("set/000.png").convert("RGB")
        assert caught                                                # Pillow has something to say
        caught.clear()
        data = read_images("set", size=16)
        data.whole(range(5))
        assert not caught


def test_a_very_large_image_is_read():
    write("set", numbers())
    Image.new("1", (15_000, 12_000), 1).save("set/020.png")
    data = read_images("set", size=16)
    assert not data.skipped and (by_number(data)[20] == 255).all()


# ---- What is kept ------------------------------------------------------------------------------------------
@pytest.fixture
def looked_at(monkeypatch):
    """Names of the files that were decoded, or looked into."""
    names = []
    real = decode.decode, decode.look

    def decoded(file_and_kind, settings, target):
        names.append(file_and_kind[0].name)
        return real[0](file_and_kind, settings, target)

    def looked(file, settings):
        names.append(file.name)
        return real[1](file, settings)
    monkeypatch.setattr(decode, "decode", decoded)
    monkeypatch.setattr(decode, "look", looked)
    return names


def same(first, second):
    return np.array_equal(by_number(first), by_number(second)) and first.skipped == second.skipped


@pytest.mark.parametrize("form, kind", [(png, "u1"), (tiff, "u2"), (npy, "f4")])
def test_a_second_start_decodes_what_is_new_alone(form, kind, looked_at):
    x = numbers(kind, 0, 200, (20, 16, 16))
    write("set", x, form)
    ending = next(Path("set").iterdir()).suffix
    Path(f"set/020{ending}").write_bytes(b"broken")
    first = read_images("set", size=16)
    assert {*looked_at} == {f"{k:03}{ending}" for k in range(21)}
    looked_at.clear()
    second = read_images("set", size=16)
    assert same(first, second) and not looked_at and len(second.skipped) == 1

    form(Path("set/021"), x[0] // 2 + 9)                             # added
    third = read_images("set", size=16)
    assert {*looked_at} == {f"021{ending}"}
    looked_at.clear()
    Path(f"set/005{ending}").unlink()                                # removed
    fourth = read_images("set", size=16)
    assert not looked_at and len(fourth.images) + len(fourth.test_images) == 20
    form(Path("set/007"), x[0] // 3 + 5)                             # changed
    os.utime(f"set/007{ending}", ns=(0, 0))
    fifth = read_images("set", size=16)
    assert {*looked_at} == {f"007{ending}"}
    assert not same(fourth, fifth) and len(third.images) + len(third.test_images) == 21
    kept = by_number(fifth)
    Path("runs").rename("kept")
    anew = read_images("set", size=16)                               # all of it: the same
    assert len(kept) == 20 and np.array_equal(by_number(anew), kept) and anew.skipped == fifth.skipped


def cut(file):
    whole = Path(file).read_bytes()
    Path(file).write_bytes(whole[:len(whole) // 2])


@pytest.mark.parametrize("form", [png, tiff])
def test_a_broken_file_shifts_no_other_once_all_become_something_else(form):
    """Its head is whole; then one image in colour comes, and all are decoded anew."""
    x = numbers(shape=(40, 16, 16)) // 2
    write("set", x, form)
    ending = next(Path("set").iterdir()).suffix
    cut(f"set/010{ending}")
    read_images("set", size=16)
    png(Path("set/900"), numbers(shape=(16, 16, 3)))
    data = read_images("set", size=16)
    assert [name for name, _ in data.skipped] == [f"010{ending}"]
    assert np.array_equal(by_number(data)[:-1, 0], np.delete(x, 10, 0))


def test_what_was_of_another_shape_is_taken_once_most_are_of_it():
    x = numbers("f4", shape=(11, 12, 12, 12))
    write("set", [one[:8] if k < 6 else one for k, one in enumerate(x)], npy)
    with pytest.raises(ValueError, match="one shape"):
        read_images("set")
    for k in range(6):
        Path(f"set/{k:03}.npy").unlink()
    data = read_images("set")
    assert len(data.images) + len(data.test_images) == 5 and not data.skipped


def test_ranges_of_several_kinds_are_of_these_files_alone():
    """Not of another folder of that name, nor of the few that were there first."""
    for name, high in (("a/images", 500), ("b/images", 50_000)):
        write(name, numbers(shape=(8, 16, 16)), png)
        write(name, numbers("u2", 0, high, (8, 16, 16)), tiff)
    assert read_images("a/images", size=16).numbers["ranges"]["uint16"][1] <= 500
    assert read_images("b/images", size=16).numbers["ranges"]["uint16"][1] > 49_000
    write("a/images", numbers("u2", 0, 50_000, (30, 16, 16)), tiff, [f"{k}" for k in range(100, 130)])
    grown = read_images("a/images", size=16)
    assert grown.numbers["ranges"]["uint16"][1] > 49_000
    Path("runs").rename("kept")
    assert same(grown, read_images("a/images", size=16))


@pytest.mark.parametrize("turn", [2, 3, 6])
def test_a_stack_is_turned_too(turn):
    x = numbers(shape=(20, 16, 16))
    tiff("plain", x, photometric="minisblack")
    tiff("turned", x, photometric="minisblack", extratags=[(274, "H", 1, turn, True)])
    plain, turned = (read_images(f"{name}.tif").images[:].numpy() for name in ("plain", "turned"))
    expected = {2: plain[..., ::-1],
                3: plain[..., ::-1, ::-1], 6: plain.swapaxes(-1, -2)[..., ::-1]}[turn]
    assert np.array_equal(turned, expected)


def test_what_the_range_of_a_kind_cuts_is_said(capsys):
    """One bright image in two hundred, which is not among those that were looked at."""
    x = numbers("u2", 0, 1000, (200, 16, 16))
    x[101] += 50_000
    write("set", x, tiff)
    write("set", numbers(shape=(20, 16, 16)), names=[f"{k}" for k in range(500, 520)])
    data = read_images("set", size=16)
    assert data.numbers["outside"] == pytest.approx(1 / 220, rel=.5)
    assert "of the pixels lie outside and are cut" in capsys.readouterr().out
    data.prepare("set/101.tif")
    assert data.prepare.outside == data.prepare.seen == 256


def test_one_file_of_other_channels_decides_nothing():
    write("set", numbers(shape=(30, 16, 16, 3)))
    write("set", numbers(shape=(3, 16, 16)), names=[f"{k}" for k in range(100, 103)])
    tiff(Path("set/200"), numbers(shape=(16, 16, 4)), photometric="rgb", extrasamples=(0,))
    data = read_images("set", size=16)
    assert tuple(data.images.shape[1:]) == (3, 16, 16) and [name for name, _ in data.skipped] == ["200.tif"]
    assert len(data.images) + len(data.test_images) == 33


def test_floats_that_pillow_reads_are_floats():
    x = numbers("f4", -1, 3)
    for k, own in enumerate(x):
        Image.fromarray(own).save(f"{k}.tif")
        Path(f"{k}.tif").rename(f"{k}.png")
    data = read_images(".", size=16)
    assert data.numbers["dtype"] == "float32"
    assert rank_correlation(by_number(data)[:, 0], x) > .9999


def test_numbers_are_looked_at_from_the_whole_set():
    """Of small images more than are looked at, sorted by brightness; and a test part that is small."""
    x = numbers(shape=(20_000, 16, 16))
    x[:5000] %= 100
    np.save("x.npy", x)
    assert read_images("x.npy").numbers["high"] == 255
    np.savez("x.npz", train_images=numbers("u2", 0, 1000, (400, 16, 16)), test_images=numbers("u2", 0, 50_000, (4, 16, 16)))
    assert read_images("x.npz").numbers["outside"] < .02


def test_numbers_are_looked_at_in_all_columns():
    """A step through the numbers that the sides divide would meet some columns alone: here the dark ones."""
    x = np.zeros((100, 16, 16, 16), np.uint8)
    x[..., 4:12] = 1
    for step in (2, 8, 16, 48, 64):
        some = some_numbers(Images(Raw(x, None), 0, 1), x.size // step)
        assert abs(some.mean() - .5) < .05


@pytest.mark.parametrize("fill", [-9999, 32767])
def test_a_number_that_stands_for_no_data_is_said(fill, capsys):
    x = numbers("i2", 0, 500, (20, 64, 64))
    np.savez("x.npz", train_images=x)
    read_images("x.npz")
    assert not any("lies between" in line for line in notes(capsys))
    x[:, :2] = fill
    np.savez("x.npz", train_images=x)
    read_images("x.npz")
    said, = [line for line in notes(capsys) if "lies between" in line]
    assert "stands for no data, --range LOW HIGH" in said
    read_images("x.npz", value_range=(0, 500))
    assert not any("lies between" in line for line in notes(capsys))
    x[np.arange(20), np.arange(20)] = fill
    np.savez("mask.npz", train_images=(x == fill).astype("f4") * 7)
    read_images("mask.npz")
    assert not any("lies between" in line for line in notes(capsys))


def test_folders_that_change_places_change_labels():
    """Equal sizes and times: unpacked archives have them."""
    for name, low in (("cat", 10), ("dog", 200)):
        write(f"set/{name}", numbers(low=low, high=low + 9), npy)
    for file in Path("set").rglob("*.npy"):
        os.utime(file, (1.7e9, 1.7e9))
    read_images("set")
    for before, after in (("cat", "other"), ("dog", "cat"), ("other", "dog")):
        Path("set", before).rename(Path("set", after))
    data = read_images("set")
    for row, name in enumerate(data.files):
        assert np.array_equal(data.images[[row]][0, 0], np.load(Path("set", name)))
        assert data.classes[data.labels[row]] == name[:3]


def test_links_to_nothing_cannot_be_read():
    write("store", numbers())
    Path("set").mkdir()
    for k in range(20):
        Path(f"set/{k:03}.png").symlink_to(f"../store/{k:03}.png")
    Path("store/007.png").rename("007.png")
    data = read_images("set", size=16)
    assert [name for name, _ in data.skipped] == ["007.png"]
    with pytest.raises(ValueError, match="007.png .*No such file"):
        read_images("set", size=16, strict=True)
    Path("007.png").rename("store/007.png")
    assert np.allclose(by_number(read_images("set", size=16))[:, 0], numbers())
    for k in range(3):
        Path(f"store/{k:03}.png").unlink()
    with pytest.raises(ValueError, match="3 of 20 files cannot be read"):
        read_images("set", size=16)


def test_a_link_in_a_class_takes_no_other_class_away(capsys):
    for name in ("ant", "bee", "cat"):
        write(f"set/{name}", numbers(seed=ord(name[0])))
    Path("set/ant/also").symlink_to("../bee")
    data = read_images("set", size=16, labels="top")
    assert [*data.classes] == ["ant", "bee", "cat"] and len(data.images) + len(data.test_images) == 60
    assert any("left out 1 links to folders that are read already, as set/ant/also" in line
               for line in notes(capsys))


def test_floats_of_two_sizes_are_one_kind():
    x = numbers("f4", 0, 100)
    write("set", [own.astype("f8") * 10 if k % 2 else own for k, own in enumerate(x)], npy)
    found = by_number(read_images("set"))
    assert 8 < found[1::2].mean() / found[::2].mean() < 12


def test_two_starts_at_once_of_which_one_cannot_read_a_file(monkeypatch):
    """The rows of the first that ended stay: it may be at work on them."""
    write("set", numbers())
    real = decode.write_rows
    first = []

    def slow(*arguments):
        real(*arguments)
        if not first:                                                # another start ends meanwhile
            first.append(True)
            with monkeypatch.context() as other:
                other.setattr(Path, "read_bytes", without)
                first.append(read_images("set", size=16))

    read_bytes = Path.read_bytes

    def without(path):
        if path.name == "003.png":
            raise MemoryError
        return read_bytes(path)

    monkeypatch.setattr(decode, "write_rows", slow)
    second = read_images("set", size=16)
    for data in (first[1], second):
        assert np.allclose(by_number(data)[:, 0], np.delete(numbers(), 3, 0))
        assert data.skipped == [("003.png", "MemoryError")]
    assert np.allclose(by_number(read_images("set", size=16))[:, 0], numbers())  # there is memory again


def test_what_is_unpacked_anew_is_compared_and_not_decoded_anew(looked_at, capsys):
    """At the same place and time, by other numbers on the disk."""
    write("set", numbers())
    before = read_images("set", size=16)
    for file in Path("set").iterdir():
        data, time = file.read_bytes(), file.stat().st_mtime_ns
        Path("copy").write_bytes(data)
        Path("copy").replace(file)
        os.utime(file, ns=(time, time))
    looked_at.clear()
    for _ in range(2):
        assert same(before, read_images("set", size=16))
    assert not looked_at and len([*Path("runs/decoded").glob("*.npy")]) == 1


def test_a_look_up_table_of_one_hue_leaves_the_numbers(capsys):
    ramp = np.zeros((3, 256), np.uint16)
    ramp[1] = np.arange(256) * 257
    x = numbers(shape=(10, 16, 16))
    tifffile.imwrite("green.tif", x, photometric="palette", colormap=ramp)
    data = read_images("green.tif")
    assert np.array_equal(data.images[:][:, 0], x[data.files])


def test_volumes_of_two_channels_are_prepared_as_they_were_read():
    write("set", numbers("f4", shape=(12, 8, 8, 8, 2)), npy)
    data = read_images("set")
    assert np.allclose(data.prepare(f"set/{data.files[0]}"), data.images[[0]])


def test_a_large_group_of_equal_images_is_for_training():
    x = numbers(shape=(100, 16, 16))
    x[:50] = 0
    x[50:80] = 9
    np.savez("x.npz", train_images=x)
    data = read_images("x.npz")
    assert len(data.test_images) == 10 and data.test_images[:].float().std() > 0
    assert len(data.images) == 90


def test_drawings_masks_and_label_maps_have_gaps_and_no_note(capsys):
    drawing = np.where(numbers("f4", 0, 1, (30, 64, 64)) < .1, numbers(low=0, high=4, shape=(30, 64, 64)),
                       numbers(low=249, high=256, shape=(30, 64, 64)))
    maps = np.array([0, 1, 4], np.uint8)[numbers(low=0, high=3, shape=(30, 64, 64))]
    for x in (drawing.astype(np.uint8), maps, 255 * (numbers(shape=(30, 64, 64)) < 20).astype(np.uint8)):
        np.savez("x.npz", train_images=x)
        read_images("x.npz")
        assert not any("lies between" in line for line in notes(capsys))


def test_empty_arrays_are_refused_in_a_line():
    write("set", np.zeros((12, 0, 16, 16), np.uint8), npy)
    with pytest.raises(ValueError):
        read_images("set")


def test_palettes_ink_and_transparency_in_stacks(capsys):
    colours = [Image.fromarray(x).quantize(64) for x in numbers(shape=(10, 16, 16, 3))]
    colours[0].save("palette.tif", save_all=True, append_images=colours[1:])
    with pytest.raises(ValueError, match="palette: write it as RGB"):
        read_images("palette.tif")
    tiff("alpha", numbers(shape=(10, 16, 16, 4)), photometric="rgb", extrasamples=["unassalpha"])
    assert read_images("alpha.tif").images.shape[1:] == (4, 16, 16)
    assert any("transparency is kept as it is, of 4 channels" in line for line in notes(capsys))
    tiff("ink", numbers(shape=(10, 16, 16, 4)), photometric="separated")
    read_images("ink.tif")
    assert any("ink is kept as it is, of 4 channels" in line for line in notes(capsys))


@pytest.mark.parametrize("names", [["test", "val"], ["train2017", "val2017"]])
def test_parts_of_a_set_are_no_classes(names, capsys):
    for name in names:
        write(f"set/{name}", numbers(seed=len(name)))
    data = read_images("set", size=16)
    assert data.labels is None
    assert any("are parts of a set, of which one must be called train" in line for line in notes(capsys))


def test_no_training_image_is_left():
    write("set/test", numbers())
    Path("set/train").mkdir()
    with pytest.raises(ValueError, match="no image of train/ is left for training, 20 for testing"):
        read_images("set", size=16)


def test_a_folder_that_is_called_as_the_built_in_set(capsys):
    read_data("digits")
    assert not notes(capsys)
    write("digits", numbers())
    read_data("digits")
    said, = notes(capsys)
    assert said.endswith("is ./digits")
    assert len(read_data("./digits").images) == 16


def test_reasons_name_what_is_wrong():
    write("pickles", numbers())
    Path("pickles/003.png").write_bytes(b"junk")
    assert read_images("pickles", size=16).skipped == [("003.png", "cannot identify image file")]


@pytest.mark.parametrize("kind", ["object", "bytes", "inf"])
def test_labels_as_libraries_write_them(kind):
    labels = {"object": np.array(["ant", "bee"] * 10, object), "bytes": np.array([b"ant", b"bee"] * 10),
              "inf": np.array([0, np.inf] * 10)}
    np.savez("x.npz", train_images=numbers(), train_labels=labels[kind])
    if kind == "bytes":
        assert [*read_images("x.npz").classes] == ["ant", "bee"]
        return
    words = {"object": "train_labels: it holds Python objects: write numbers, or strings, as array.astype.str. is",
             "inf": "is float64 .20. for 20 images: not one class each"}
    with pytest.raises(ValueError, match=words[kind]):
        read_images("x.npz")


def test_labels_of_no_images_and_floats_that_torch_has_not(capsys):
    x = numbers("f4", 0, 1).astype(np.longdouble)
    np.savez("x.npz", train_images=x, train_labels=np.arange(20) % 2, test_labels=np.arange(9) % 2)
    data = read_images("x.npz")
    assert len(data.images) == 16 and np.allclose(data.images[:][:, 0], x[[int(row) for row in data.files]])
    assert any("has test_labels but no test_images: they are left out" in line for line in notes(capsys))


def test_a_nifti_of_five_axes_of_which_two_are_one():
    nibabel = pytest.importorskip("nibabel")
    for k, x in enumerate(numbers("f4", shape=(8, 8, 9, 10))):
        Path("set").mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(x[..., None, None].repeat(3, -1), np.eye(4)), f"set/{k}.nii")
    assert read_images("set").images.shape[1:] == (3, 8, 9, 10)


def test_what_runs_wrote_into_the_data_is_none_of_it(capsys):
    write("photos", numbers())
    first = read_images("photos", size=16)
    os.chdir("photos")
    for folder in (Path("runs/vicreg-1"), Path("own out")):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"method": "VICReg", "version": "2", "digest": 1}')
        Image.new("RGB", (99, 99)).save(folder / "views.png")
    read_images(".", size=16)
    np.save("runs/decoded/another.npy", np.zeros((9, 9)))
    capsys.readouterr()
    assert same(first, read_images(".", size=16))
    assert "note: left out 3 folders that runs wrote, as ./own out" in notes(capsys)
    Path("own out/config.json").write_text('{"method": "brightfield"}')          # of a microscope
    assert "own out/views.png" in [*(data := read_images(".", size=16)).files, *data.test_files]


def test_which_of_two_names_of_a_folder_counts_is_the_same_on_any_disk(monkeypatch):
    for name in ("cat", "dog"):
        write(f"set/{name}", numbers(seed=len(name) + ord(name[0])))
    Path("set/a kitten").symlink_to("cat")
    real = os.walk

    def other(*arguments, **options):
        for root, folders, names in real(*arguments, **options):
            folders.sort()
            yield root, folders, names

    for walk in (real, other):
        monkeypatch.setattr(os, "walk", walk)
        assert list(read_images("set", size=16).classes) == ["cat", "dog"]


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_deep_image_is_turned_as_its_file_says(turn):
    """As Pillow turns photographs of the same numbers."""
    x = numbers(shape=(6, 16, 16))
    write("eight", x, tiff, extratags=[(274, "H", 1, turn, True)])
    write("deep", 200 * x.astype("u2"), tiff, extratags=[(274, "H", 1, turn, True)])
    expected, found = by_number(read_images("eight", size=16)), by_number(read_images("deep", size=16))
    assert rank_correlation(found, expected) > .9999
    same_place = np.allclose(expected[:, 0], x)
    assert same_place == (turn == 1)


def test_other_settings_and_sets_are_kept_apart(looked_at):
    write("set", numbers(shape=(20, 16, 32)))
    for options in (dict(size=16), dict(size=8), dict(size=16, fit="pad"), dict(size=16, fit="stretch")):
        looked_at.clear()
        read_images("set", **options)
        assert len(looked_at) == 40
    looked_at.clear()
    read_images("set", size=8)
    read_images("set", size=16, value_range=(0, 100))
    assert not looked_at


def cut_json(json_file, npy_file):
    json_file.write_text(json_file.read_text()[:-100])


def foreign(text):
    def harm(json_file, npy_file):
        json_file.write_text(text)
    return harm


def cut_npy(json_file, npy_file):
    npy_file.write_bytes(npy_file.read_bytes()[:-10])


def other_npy(json_file, npy_file):
    np.save(npy_file, np.zeros((3, 4)))


@pytest.mark.parametrize("harm", [cut_json, foreign(""), foreign("[1]"), foreign("{}"), foreign("null"),
                                  foreign('{"entries": 5, "settings": [], "target": {}, "range": null}'),
                                  cut_npy, other_npy])
def test_a_cache_that_is_cut_short_or_anothers_is_ignored(harm, looked_at):
    write("set", numbers())
    first = read_images("set", size=16)
    path, = Path("runs/decoded").glob("*.npy")
    harm(path.with_suffix(".json"), path)
    Path("runs/decoded/set-other.json").write_text("{]")
    looked_at.clear()
    assert same(first, read_images("set", size=16)) and len(looked_at) == 40
    looked_at.clear()
    assert same(first, read_images("set", size=16)) and not looked_at


def test_links_to_one_file_are_decoded_once(looked_at):
    write("set", numbers())
    for k in range(10):
        Path(f"set/{k + 20:03}.png").symlink_to(f"{k:03}.png")
    first = read_images("set", size=16)
    assert len(looked_at) == 40
    looked_at.clear()
    assert same(first, read_images("set", size=16)) and not looked_at


# ---- What is cut -------------------------------------------------------------------------------------------
def wide(kind):
    """Gray images [32 wide, 16 high]: 50 at the left, 100 to 115 in the middle by row, 200 at the right."""
    x = np.empty((20, 16, 32), kind)
    x[:] = 100 + np.arange(16)[:, None]
    x[..., :8], x[..., 24:] = 50, 200
    x[:, 8, 16] += np.arange(20, dtype=kind)                         # or all were equal
    return x


@pytest.mark.parametrize("kind, form", [("u1", png), ("u2", tiff), ("u2", png), ("f4", tiff)])
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_fit(kind, form, fit, capsys):
    write("set", wide(kind), form)
    data = read_images("set", size=16, fit=fit, value_range=(0, 255))
    x = by_number(data)[0, 0]
    x = 255 * x if x.max() <= 1 else x
    border = 0 if kind == "u1" else 50                               # numbers have no black: the least of them
    corners = {"crop": (100, 100, 115, 115), "stretch": (50, 200, 50, 200), "pad": (border,) * 4}
    assert [x[0, 0], x[0, -1], x[-1, 0], x[-1, -1]] == pytest.approx(corners[fit], abs=1.5)
    if fit == "pad":
        assert [x[4, 0], x[11, 15]] == pytest.approx([50, 200], abs=1.5) and x[3] == pytest.approx(border, abs=1e-3)
    said = [line for line in notes(capsys) if "cut off" in line]
    assert said == ["note: to make images square 50% is cut off on average; --fit pad keeps all"] * (fit == "crop")
    assert (data.whole is None) == (fit == "pad")
    if data.whole:
        whole = data.whole(torch.arange(3)).double().numpy()
        whole = 255 * whole if whole.max() <= 1 else whole
        assert whole.shape == (3, 1, 16, 16)
        assert whole[0, 0, [0, 4, 11], [0, 0, 15]] == pytest.approx([border, 50, 200], abs=1.5)


def test_the_whole_of_a_file_that_is_gone_is_blank():
    write("set", numbers(shape=(20, 16, 24)))
    data = read_images("set", size=16)
    Path("set", data.files[1]).unlink()
    whole = data.whole(torch.arange(3))
    assert whole[0].max() > 0 and whole[1].max() == 0


def test_little_is_cut_without_a_note(capsys):
    write("set", numbers(shape=(20, 16, 17)))
    read_images("set", size=16)
    assert not [line for line in notes(capsys) if "cut off" in line]


# ---- Splits ------------------------------------------------------------------------------------------------
def write_classes(folder, names=("cat", "dog"), count=10, seed=0):
    for k, name in enumerate(names):
        write(Path(folder, name), numbers(shape=(count, 16, 16), seed=seed + k))


@pytest.mark.parametrize("train, test", [("train", "test"), ("Training", "Testing"), ("TRAIN", "valid"),
                                         ("train", "val"), ("Train", "VALIDATION")])
def test_splits_in_any_case(train, test, capsys):
    write_classes(f"set/{train}")
    write_classes(f"set/{test}", count=4, seed=9)
    data = read_images("set", size=16)
    assert (len(data.images), len(data.test_images)) == (20, 8) and [*data.classes] == ["cat", "dog"]
    assert all(name.startswith(f"{train}/") for name in data.files)
    assert all(name.startswith(f"{test}/") for name in data.test_files)
    assert not notes(capsys)


def test_what_lies_beside_the_splits_is_named(capsys):
    for k, part in enumerate(("train", "test", "val", "bus")):
        write_classes(f"set/{part}", count=5, seed=10 * k)
    read_images("set", size=16)
    assert notes(capsys) == ["note: taken is what lies in train and test; left out, since beside: bus, val"]


def test_stray_images_are_named_and_the_labels_kept(capsys):
    write_classes("set", ("cat", "dog", "fox"))
    png("set/stray", numbers(shape=(16, 16)))
    png("set/cat/deeper", numbers(shape=(16, 16), seed=5))
    Path("set/cat/deep").mkdir()
    Path("set/cat/deeper.png").rename("set/cat/deep/deeper.png")
    data = read_images("set", size=16)
    assert len(data.images) + len(data.test_images) == 30 and [*data.classes] == ["cat", "dog", "fox"]
    assert notes(capsys) == ["note: left out 2 images that are in no class folder: cat/deep/deeper.png, stray.png"]


def test_what_else_lies_there_is_counted(capsys):
    write_classes("set")
    for name in ("a.svg", "b.SVG", "notes.txt", ".hidden", "README"):
        Path("set", name).touch()
    read_images("set", size=16)
    assert notes(capsys) == ["note: taken 20 of 24 files; left out: 2 .svg, 1 .txt, 1 without an ending"]


def test_pixels_that_a_tiff_says_are_not_there():
    write("set", numbers("u2"), tiff)
    with tifffile.TiffFile("set/003.tif", mode="r+") as file:
        file.pages[0].tags["StripByteCounts"].overwrite(0)
    data = read_images("set", size=16)
    assert data.skipped == [("003.tif", "it says itself that some of its pixels are not there")]


def deep_classes():
    for k, place in enumerate(("animals/cats/big", "animals/cats", "tools/hammers", "plants/trees/oak/old")):
        write(Path("set", place), numbers(shape=(6, 16, 16), seed=k), names=[f"{k}{j}" for j in range(6)])


def test_deeper_folders_have_no_classes_unless_the_top_ones_are(capsys):
    deep_classes()
    data = read_images("set", size=16)
    assert data.labels is None
    reason, = notes(capsys)
    assert "no classes, since images lie up to 5 levels deep; --labels top" in reason
    data = read_images("set", size=16, labels="top")
    assert [*data.classes] == ["animals", "plants", "tools"] and not notes(capsys)
    for labels, files in ((data.labels, data.files), (data.test_labels, data.test_files)):
        assert [data.classes[label] for label in labels] == [name.split("/")[0] for name in files]


def table(rows, header="file,class,group", name="labels.csv"):
    Path(name).write_text("\n".join([header, *rows]) + "\n", encoding="utf-8-sig")


@pytest.mark.parametrize("named", ["path", "name"])
def test_labels_of_a_table(named, capsys):
    deep_classes()
    files = sorted(str(path.relative_to("set")) for path in Path("set").rglob("*.png"))
    kinds = {name: "öl" if k % 2 else "wasser, kalt" for k, name in enumerate(files)}
    rows = [f'{name if named == "path" else Path(name).name},"{kinds[name]}"' for name in files[2:]]
    table(rows, "file,class")
    data = read_images("set", size=16, labels="labels.csv")
    assert [*data.classes] == ["wasser, kalt", "öl"]
    for labels, names in ((data.labels, data.files), (data.test_labels, data.test_files)):
        assert [data.classes[label] for label in labels] == [kinds[name] for name in names]
    assert notes(capsys) == [f"note: left out 2 images that are in no row of labels.csv with a class: {files[0]}, {files[1]}"]


def test_tables_as_people_write_them(capsys):
    """Capitals and spaces in the first line, semicolons, the other way to write an accent, another system's slashes."""
    import unicodedata
    write("set/a", numbers(), names=[f"Gr\u00f6\u00dfe {k:02}" for k in range(20)])
    rows = [f"a\\Gr\u00f6\u00dfe {k:02}.png; {'krank ' if k % 2 else 'gesund'};P{k // 4} ;x" for k in range(20)]
    lines = ["File; Class ;Group;Patient", *rows, "a\\gone.png;krank;P9;x"]
    Path("table.csv").write_text(unicodedata.normalize("NFD", "\n".join(lines)) + "\n")
    data = read_images("set", size=16, labels="table.csv")
    assert list(data.classes) == ["gesund", "krank"] and len(data.files) + len(data.test_files) == 20
    patients = [{int(name[-6:-4]) // 4 for name in side} for side in (data.files, data.test_files)]
    assert not patients[0] & patients[1]
    said = capsys.readouterr().out
    assert "--labels table.csv: columns file, class and group, of which none is split; left out: Patient" in said
    assert "note: 1 rows of table.csv name no file that was read" in said
    Path("table.csv").write_text("file,class,patient\n" + "".join(f"{k:02}.png,{k % 2},{k // 4}\n" for k in range(20)))
    write("flat", numbers(), names=[f"{k:02}" for k in range(20)])
    read_images("flat", size=16, labels="table.csv")
    assert "columns file, class (no group: any may be split); left out: patient" in capsys.readouterr().out
    Path("table.csv").write_text("file,class,Class\n" + "".join(f"{k:02}.png,{'ab'[k % 2]},{k}\n" for k in range(20)))
    assert list(read_images("flat", size=16, labels="table.csv").classes) == ["a", "b"]
    Path("table.csv").write_text("file,Class,CLASS\n00.png,0,a\n")
    with pytest.raises(ValueError, match="table.csv has 2 columns class"):
        read_images("flat", size=16, labels="table.csv")
    Path("table.csv").write_text("file,class,group\n00.png,0,a\n00.png,0,b\n01.png,1,a\n")
    with pytest.raises(ValueError, match="gives 00.png the groups a and b"):
        read_images("flat", size=16, labels="table.csv")
    Path("table.csv").write_bytes("file,class\nGr\u00f6\u00dfe.png,0\n".encode("latin-1"))
    with pytest.raises(ValueError, match="is no UTF-8: save it as CSV UTF-8"):
        read_images("flat", size=16, labels="table.csv")
    with pytest.raises(ValueError, match="no image lies in a subfolder or has a class: leave out --labels top"):
        read_images("flat", size=16, labels="top")


def test_an_object_on_a_dark_ground_is_seen(capsys):
    """Whatever the sides are: places are drawn, not counted off."""
    x = np.zeros((6, 100, 100, 100), np.uint8)
    x[:, 20:80, 20:80, 20:80] = 200
    np.savez("x.npz", train_images=x)
    read_images("x.npz")
    assert not any("half of the images" in line for line in notes(capsys))


@pytest.mark.parametrize("kind, usual, bright", [("u2", 2000, 65535), ("u1", 20, 250), ("f4", 1., 1000.)])
def test_one_bright_image_that_sets_the_range_is_said(kind, usual, bright, capsys):
    x = numbers(kind, 0, usual, (40, 16, 16))
    np.savez("x.npz", train_images=x)
    read_images("x.npz")
    assert not any("half of the images" in line for line in notes(capsys)) or kind == "u1"
    x[7] = bright
    x[7, :8] = 0.9 * bright
    np.savez("x.npz", train_images=x)
    read_images("x.npz")
    said, = [line for line in notes(capsys) if "half of the images stay below" in line]
    assert "--range LOW HIGH" in said
    read_images("x.npz", value_range=(0, usual))
    assert not any("half of the images" in line for line in notes(capsys))


def test_no_group_is_on_both_sides():
    """Patients of four images each; a file of each equals one of the next patient's in half of them."""
    x = numbers(shape=(80, 16, 16))
    x[4:40:8] = x[0:36:8]
    write("set", x)
    groups = {f"{k:03}.png": f"patient {k // 4}" for k in range(80)}
    table([f"{name},{'ill' if k % 8 < 3 else 'well'},{group}" for k, (name, group) in enumerate(groups.items())])
    data = read_images("set", size=16, labels="labels.csv")
    train, test = ({groups[name] for name in names} for names in (data.files, data.test_files))
    assert train and test and not train & test
    train, test = ({x[int(name[:3])].tobytes() for name in names} for names in (data.files, data.test_files))
    assert not train & test
    assert 8 <= len(data.test_files) <= 32


def test_test_images_of_a_group_in_training_are_left_out(capsys):
    x = numbers(shape=(30, 16, 16))
    write("set/train", x[:20])
    write("set/test", x[20:], names=[f"{k:03}" for k in range(20, 30)])
    rows = [f"train/{k:03}.png,{'ab'[k % 2]},p{k}" for k in range(20)]
    rows += [f"test/{k:03}.png,{'ab'[k % 2]},p{k - 5}" for k in range(20, 30)]
    table(rows)
    data = read_images("set", size=16, labels="labels.csv")
    assert (len(data.images), len(data.test_images)) == (20, 5)
    assert "left out 5 test images" in notes(capsys)[0]


@pytest.mark.parametrize("rows, header, words", [
    (["000.png,cat", "000.png,dog"], "file,class", "gives 000.png the classes cat and dog"),
    (["000.png,cat\0"], "file,class", "cannot be read .it is no text"),
    (["000.png,cat"], "name,label", "has the columns name, label: its first line must name file and class"),
    ([], "", "has the columns none"), (["x.png,cat"], "file,class", "names none of the 20 files"),
    (None, "", "cannot be read"), (["000.png,cell, small"], "file,class", "has more cells than the first line"),
    (["000.png,cat,p"] * 20, "file,class,group", "of one group|5 at least")])
def test_tables_that_do_not_serve(rows, header, words):
    write("set", numbers())
    if rows is not None:
        table(rows, header)
    with pytest.raises(ValueError, match=words):
        read_images("set", size=16, labels="labels.csv")


def test_all_of_one_group_cannot_be_held_out():
    write("set", numbers())
    table([f"{k:03}.png,{'ab'[k % 2]},p" for k in range(20)])
    with pytest.raises(ValueError, match="set: all 20 files that are left are equal or of one group"):
        read_images("set", size=16, labels="labels.csv")


def test_equal_files_and_links_are_on_one_side(capsys):
    x = numbers(shape=(40, 16, 16))
    write("set", x)
    for k in range(20):
        Path(f"set/copy of {k:03}.png").write_bytes(Path(f"set/{k:03}.png").read_bytes())
        Path(f"set/link to {k:03}.png").symlink_to(f"{k:03}.png")
    data = read_images("set", size=16)
    train, test = ({re.findall(r"\d+", name)[0] for name in names} for names in (data.files, data.test_files))
    assert len(train) == 32 and len(test) == 8 and not train & test
    assert len(data.files) + len(data.test_files) == 80
    assert "40 of 80 files equal an earlier one" in "".join(notes(capsys))


def test_equal_images_of_arrays_are_on_one_side_or_said(capsys):
    x = numbers(shape=(40, 16, 16))
    np.savez("x.npz", train_images=np.concatenate([x] * 3))
    data = read_images("x.npz")
    train, test = ({own.numpy().tobytes() for own in images[:]} for images in (data.images, data.test_images))
    assert not train & test and (len(data.images), len(data.test_images)) == (96, 24)
    assert "note: 80 of 120 images equal an earlier one: equal images are all for training or all for testing" in notes(capsys)
    np.savez("x.npz", train_images=x, test_images=np.concatenate([x[:7], 255 - x[:5]]))
    assert len(read_images("x.npz").test_images) == 12
    assert "note: 7 of 12 test images are training images, too" in notes(capsys)
    np.savez("x.npz", train_images=np.repeat(x[:1], 9, 0))
    read_images("x.npz")
    assert "note: all 9 images are equal, those held out, too" in notes(capsys)


def test_rows_are_held_out_as_scikit_learn_does():
    np.save("x.npy", numbers(shape=(40, 16, 16)))
    train, test = train_test_split(range(40), test_size=.2, random_state=0)
    data = read_images("x.npy")
    assert [*data.files] == train and [*data.test_files] == test


def test_test_images_that_are_trained_on_are_left_out(capsys):
    write_classes("set/train")
    write_classes("set/test", count=8, seed=9)
    for k in range(3):
        Path(f"set/test/cat/again {k}.png").write_bytes(Path(f"set/train/dog/{k:03}.png").read_bytes())
    data = read_images("set", size=16)
    assert len(data.images) == 20 and len(data.test_images) == 16
    said, = notes(capsys)
    assert "left out 3 test images" in said and "test/cat/again 0.png" in said


@pytest.mark.parametrize("train, test", [(["cat"], ["cat", "dog"]), (["cat"], ["cat"])])
def test_training_labels_of_one_class_mean_no_probes(train, test, capsys):
    write("set", numbers(shape=(30, 16, 16)))
    Path("set/train").mkdir(), Path("set/test").mkdir()
    for k in range(30):
        Path(f"set/{k:03}.png").rename(f"set/{'train' if k < 20 else 'test'}/{k:03}.png")
    table([f"{k:03}.png,{train[k % len(train)] if k < 20 else test[k % len(test)]}" for k in range(30)], "file,class")
    data = read_images("set", size=16, labels="labels.csv")
    assert data.labels is None and data.test_labels is None and len(data.classes) == 0
    assert notes(capsys) == ["note: set has no labels of two classes for training and testing: no probes"]


def test_more_than_ten_classes_in_one_split_only(capsys):
    write("set/train", numbers(shape=(34, 16, 16)), names=[f"class {k % 17:02}/{k}" for k in range(34)])
    write("set/test", numbers(shape=(8, 16, 16), seed=3), names=[f"class {k % 2:02}/{k}" for k in range(8)])
    read_images("set", size=16)
    said, = notes(capsys)
    assert said.endswith("class 11 and 5 more") and said.count("class ") == 10


def test_too_few_files():
    write("set", numbers(shape=(4, 16, 16)))
    with pytest.raises(ValueError, match="set holds 4 files that end in .bmp, .gif.*5 at least"):
        read_images("set")


def test_volumes_that_are_too_flat():
    write("set", stacks(2), tiff, photometric="minisblack")
    with pytest.raises(ValueError, match=r"volumes of \[2, 16, 16\], sides of 4 at least"):
        read_images("set", pages="volume")


# ---- Names -------------------------------------------------------------------------------------------------
@pytest.fixture
def strange_names():
    """Class folders and files with names that are not UTF-8 or not ASCII, some broken; fits under LC_ALL=C."""
    x = numbers(shape=(60, 16, 24))
    for k, own in enumerate(x):
        folder = os.fsencode("set/") + (b"train/" if k < 40 else b"test/")
        folder += ["猫".encode(), b"caf\xe9", "Füchse".encode()][k % 3 if k < 40 else k % 2]
        os.makedirs(folder, exist_ok=True)
        path = folder + b"/%02d \xff.png" % k
        image = Image.fromarray(own).quantize(16)
        with open(path, "wb") as file:
            image.save(file, "PNG", transparency=bytes(range(16)))
        if k in (3, 4, 5):
            with open(path, "wb") as file:
                file.write(b"no image")


def test_names_that_are_not_utf8(strange_names):
    data = read_images("set", size=16)
    assert len(data.images) == 37 and len(data.test_images) == 20 and len(data.classes) == 3
    assert {os.fsencode(name)[-6:] for name, _ in data.skipped} == {b" \xff.png"}
    assert [*data.classes][0].startswith("F")
    read_images("set", size=16)                                      # and are found again


@pytest.mark.slow
def test_a_run_with_strange_names_on_a_terminal_of_ascii(strange_names):
    done = start(*"--data set --size 16 --batch 8 --epochs 1 --width 4 --projector 16-16 --out run".split(),
                 PYTHONIOENCODING="ascii", PYTHONWARNINGS="default")
    assert done.returncode == 0, done.stderr
    assert "UserWarning" not in done.stderr and "transparency" not in done.stderr.lower()
    line, = [line for line in done.stdout.splitlines() if line.startswith("data: ")]
    assert "37 train and 20 test images, 3 channels, 16 x 16 (2-D), 3 classes, 3 files skipped (skipped.txt); " in line
    assert r"classes in one split only: F\xfcchse" in done.stdout
    skipped = Path("run/skipped.txt").read_text().splitlines()
    assert len(skipped) == 3 and all("cannot identify image file" in line for line in skipped)
    assert {"views.png", "encoder.pt", "neighbours.png"} <= {file.name for file in Path("run").iterdir()}


# ---- Views -------------------------------------------------------------------------------------------------
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_crops_of_any_number_of_channels(channels):
    x = torch.rand(16, channels, 24, 32, generator=generator())
    own = generator()
    first, second = cropped_view(x, own), cropped_view(x, own)
    for view in (first, second):
        assert view.shape == x.shape and view.min() >= 0 and view.max() <= 1 + 1e-6    # a blur's weights sum to 1
    assert ((first - second).abs().mean((1, 2, 3)) > 0.02).all() and ((first - x).abs().mean((1, 2, 3)) > 0.02).all()


@pytest.mark.parametrize("shape", [(2, 16, 16), (1, 8, 10, 12)])
def test_without_pose_and_noise_only_light_changes(shape):
    x = torch.rand(8, *shape, generator=generator())
    view = posed_view(x, generator(), pose=0, noise=0)
    x, view = x.flatten(1), view.flatten(1)
    contrast = view.std(1) / x.std(1)
    brightness = view.mean(1) - contrast * x.mean(1)
    assert torch.allclose(view, contrast[:, None] * x + brightness[:, None], atol=1e-4)
    assert ((contrast > 0.59) & (contrast < 1.41) & (brightness.abs() < 0.21)).all()
    assert len(contrast.unique()) == 8


def test_pose_and_noise_have_strengths():
    x = torch.rand(32, 1, 16, 16, generator=generator())
    less = [(posed_view(x, generator(), pose=pose, noise=0) - posed_view(x, generator(), pose=0, noise=0)).abs().mean()
            for pose in (0.1, 0.5, 1)]
    assert 0 < less[0] < less[1] < less[2]
    still = posed_view(x, generator(), noise=0)
    grain = [(posed_view(x, generator(), noise=noise) - still).std().item() for noise in (1, 3)]
    assert grain[1] == pytest.approx(3 * grain[0], rel=1e-3)


@pytest.mark.parametrize("padding, black", [("border", False), ("zeros", True)])
def test_a_border_leaves_no_black_in_volumes(padding, black):
    x = torch.ones(32, 1, 8, 10, 12)
    view = posed_view(x, generator(), noise=0, padding=padding).flatten(1)
    assert ((view.amax(1) - view.amin(1)).max() > 0.3) == black


def test_volumes_get_poses_with_that_border_and_flat_images_crops_mirrored_where_they_are_of_colour(capsys):
    np.save("x.npy", numbers(shape=(20, 8, 8, 8)))
    write("set", numbers())
    views = read_data("x.npy").view, read_data("set", size=16).view, read_data("digits3d").view, read_data("digits").view
    assert [view.func for view in views] == [posed_view, cropped_view, posed_view, posed_view]
    assert views[0].keywords == {"pose": 1, "noise": 1, "padding": "border"}
    assert views[1].keywords == {"least": .4, "flips": False}
    assert views[2].keywords["padding"] == "zeros"
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("views: ")]
    assert said == ["views: poses, of strength 1, noise 1", "views: crops from 40% of the area, not mirrored",
                    *["views: poses, of strength 1, noise 1"] * 2]
    write("set", numbers(shape=(20, 12, 12, 3)))
    assert read_data("set", size=16).view.keywords == {"least": .08, "flips": True}
    assert read_data("set", "crops", .4, "off", size=16).view.keywords == {"least": .4, "flips": False}


def test_a_draw_of_0_is_a_side_too(monkeypatch):
    """One float in 16 million: half of the crops are mirrored by the sign of a draw, whose sign was 0 then."""
    from kernels.harness import views
    real, draws = views.uniform, []

    def uniform(x, generator, low, high, count=1):
        draws.append((low, high, count))
        found = real(x, generator, low, high, count)
        return found * 0 if draws.count((-1, 1, 1)) and draws[-1] == (-1, 1, 1) else found

    x = torch.rand(8, 3, 12, 12)
    monkeypatch.setattr(views, "uniform", uniform)
    view = random_crop(x, torch.Generator().manual_seed(0))
    assert (-1, 1, 1) in draws and view.isfinite().all()
    monkeypatch.undo()
    again = random_crop(torch.rand(200_000, 1, 4, 4), torch.Generator().manual_seed(7))
    assert again.isfinite().all()


@pytest.mark.parametrize("sides", [(96, 160), (8, 64), (64, 8), (16, 16)])
def test_crops_of_a_white_image_are_white(sides):
    own = generator()
    for _ in range(20):
        view = random_crop(torch.ones(32, 1, *sides), own)
        assert torch.allclose(view, torch.ones(1), atol=1e-5)


# ---- A run with all of it ----------------------------------------------------------------------------------
def call(*arguments):
    """vicreg.py in this process -> exit code."""
    import vicreg
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    handlers = [signal.getsignal(number) for number in numbers]
    before = sys.argv, torch.get_rng_state()
    sys.argv = ["vicreg.py", *arguments]
    try:
        vicreg.launch(vicreg.main)
        return 0
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before[0]
        torch.set_rng_state(before[1])
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)


def test_options_of_reading_and_views_are_kept_and_resumed(capsys):
    for part, count, place in (("train", 40, "deep/"), ("test", 12, "")):
        names = [f"class {k % 4}/{place}{k}" for k in range(count)]
        write(f"set/{part}", numbers("u2", 0, 5000, (count, 16, 24), count), tiff, names=names)
    words = ("--data set --size 16 --batch 8 --epochs 6 --width 4 --projector 16-16 --fit pad --range 0 4095 "
             "--labels top --views poses --pose 0.5 --noise 0 --out run")
    process = subprocess.Popen([sys.executable, ROOT / "vicreg.py", *words.split()], stderr=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (Path("run/metrics.jsonl").exists() and Path("run/metrics.jsonl").read_text()):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "40 train and 12 test images, 1 channel, 16 x 16 (2-D), 4 classes; " in said
    assert call("--resume", "run") == 0
    assert "decoded images: found in" in capsys.readouterr().out
    config = json.loads(Path("run/config.json").read_text())
    assert config["range"] == [0, 4095] and config["fit"] == "pad" and config["labels"] == "top"
    assert (config["pose"], config["noise"]) == (0.5, 0)
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 6
    kept = torch.load("run/encoder.pt", weights_only=True)["numbers"]
    assert kept == config["numbers"]
    assert (kept["dtype"], kept["low"], kept["high"], kept["rule"]) == ("uint16", 0, 4095, "--range")
    assert 0.005 < kept["outside"] < 0.1                              # the canvas is half as fine: means


@pytest.mark.parametrize("words, said", [
    ("--range 5", "--range 5: give two numbers"), ("--range 1 2 3", "--range 1 2 3: give two numbers"),
    ("--range low high", "give two numbers"), ("--range 9 9", "--range 9 9: the first number must be less"),
    ("--range 9 -3", "the first number must be less"), ("--range nan 1", "must be less"),
    ("--range 0 inf", "must be less"), ("--pose -1", "--pose"), ("--noise nan", "--noise"),
    ("--fit round", "--fit"), ("--pages all", "--pages"), ("--labels=", "--labels"),
    ("--views crops --pose 2", "--pose and --noise are of poses"), ("--crop 0", "--crop"), ("--crop 1.1", "--crop"),
    ("--views poses --flips on", "--crop and --flips are of crops"), ("--flips maybe", "--flips")])
def test_options_that_make_no_sense(words, said, capsys):
    write("set", numbers(shape=(20, 16, 16, 3)))
    assert call("--data", "set", "--size", "16", "--batch", "4", *words.split()) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("vicreg.py: ") and said in line


def test_hidden_files_are_said(capsys):
    x = numbers()
    write("f", x, names=[f"{'.' if k % 4 == 0 else ''}{k}" for k in range(20)])
    Path("f/._1.png").write_bytes(b"macOS's")
    Path("f/.DS_Store").write_bytes(b"macOS's")
    data = read_images("f", 16)
    assert len(data.images) + len(data.test_images) == 15
    assert "note: left out 5 hidden files, as .0.png: names that begin with a dot" in notes(capsys)


@pytest.mark.parametrize("form", ["png", "tif"])
def test_transparency_that_changes_pixels_is_said(form, capsys):
    """tifffile marks a fourth channel as transparency, whatever it is."""
    x = numbers(shape=(20, 16, 16, 4))
    write("f", x, png if form == "png" else tiff, **{} if form == "png" else {"photometric": "rgb"})
    data = read_images("f", 16)
    a = x[..., 3:] / 255.
    assert np.abs(by_number(data) - np.moveaxis(x[..., :3] * a + 255 * (1 - a), -1, 1)).max() < 1.01
    said, = [note for note in notes(capsys) if "transparent" in note]
    assert said.startswith("note: 20 files are transparent in part, where they become white (000.")
    assert ("extrasamples=[0]" in said) == (form == "tif")
    x[..., 3] = 255
    write("opaque", x, png if form == "png" else tiff, **{} if form == "png" else {"photometric": "rgb"})
    read_images("opaque", 16)
    assert not [note for note in notes(capsys) if "transparent" in note]


def test_a_fourth_channel_that_says_so_is_kept():
    """What the note advises."""
    x = numbers(shape=(20, 16, 16, 4))
    write("f", x, tiff, photometric="rgb", extrasamples=[0])
    data = read_images("f", 16)
    assert data.images.shape[1] == 4
    assert rank_correlation(by_number(data), np.moveaxis(x, -1, 1)) > .999


def test_the_range_of_a_kind_is_none_of_niftis():
    pytest.importorskip("nibabel")
    for k, own in enumerate(numbers(shape=(20, 8, 8, 8))):
        Path("f").mkdir(exist_ok=True)
        nifti(f"f/{k:02}", own)
    with pytest.raises(ValueError, match="--range dtype: NIfTI's numbers are scaled.*give --range LOW HIGH"):
        read_images("f", value_range=("dtype",))


def test_options_that_do_nothing_for_these_files_are_said(capsys):
    write("one page", numbers(), tiff)
    read_images("one page", 16, pages="volume")
    write("arrays", numbers(shape=(20, 8, 8, 8)), npy)
    read_images("arrays", channels_last=False)
    assert "note: --pages: without effect on these data" in notes(capsys)
    write("flat", numbers(), npy)
    read_images("flat", channels_last=True)
    assert "note: --channels-last: without effect on these data" in notes(capsys)
    write("pages", numbers(shape=(20, 5, 16, 16)), tiff)
    read_images("pages", pages="volume")
    write("bands", numbers(shape=(20, 8, 8, 5)), npy)
    read_images("bands", channels_last=True)
    assert not [note for note in notes(capsys) if "without effect" in note]


@pytest.mark.parametrize("rows, words", [
    ([f"{k}.png" for k in range(10)], "name more than one file, as 0.png: write it with its folder"),
    (["elsewhere/0.png"], "names none of the 20 files, of which the first is A/0.png: write names as these, below f")])
def test_names_of_several_files_are_named(rows, words, capsys):
    write("f", numbers(), names=[f"{'AB'[k % 2]}/{k // 2}" for k in range(20)])
    table([f"{name},cat" for name in rows], "file,class")
    with pytest.raises(ValueError) as error:
        read_images("f", 16, labels="labels.csv")
    assert words in str(error.value) + " ".join(notes(capsys))


def test_tables_with_a_blank_after_the_comma():
    write("f", numbers(), names=[f"{k}, x" for k in range(20)])
    table([f'{"AB"[k % 2]}, "{k}, x.png"' for k in range(20)], 'class, "file"')
    data = read_images("f", 16, labels="labels.csv")
    found = dict(zip([*data.files, *data.test_files], [*data.labels.tolist(), *data.test_labels.tolist()]))
    assert all(found[f"{k}, x.png"] == k % 2 for k in range(20))


def test_channels_that_come_first_are_told_how_to_come_last():
    np.savez("f.npz", train_images=numbers(shape=(20, 3, 16, 16)))
    with pytest.raises(ValueError, match=r"\[20, 3, 16, 16\], not with channels last, as np.moveaxis\(x, 1, -1\) puts them"):
        read_images("f.npz")


@pytest.mark.parametrize("channels", [(), (3,)])
def test_of_two_kinds_an_array_is_prepared_as_its_file(channels):
    write("f", numbers(shape=(10, 40, 30, *channels)), names=[f"a{k}" for k in range(10)])
    write("f", numbers("u2", high=4096, shape=(10, 40, 30)), names=[f"b{k}" for k in range(10)])
    data = read_images("f", 16)
    for name in ("a3", "b3"):
        with Image.open(f"f/{name}.png") as image:
            array = np.asarray(image)
        torch.testing.assert_close(data.prepare(array), data.prepare(f"f/{name}.png"), rtol=0, atol=0)
