"""kernels/harness/images.py: own images as their users bring them, each layout, mode and mistake on disk, trained by a
process for an epoch.

Each test says its command and what is on the disk in the lines above it: see scripts.py.
"""
import errno
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kernels.harness import decode
from kernels.harness.cli import read_data
from kernels.harness.encoder import Encoder
from kernels.harness.images import Data
from kernels.harness.reading import read_images
from scripts import ALL, ROOT, SMALL, Run, call, command, forked, said, saved, snippet

ONCE = f"{SMALL} --epochs 1"
PICTURES = ["curves.png", "embedding.png", "neighbours.png", "views.png"]


# ---- Images ------------------------------------------------------------------------------------------------
def noise(seed, shape=(20, 20, 3), brightness=0):
    return np.random.default_rng(seed).integers(0, 120, shape).astype(np.uint8) + np.uint8(brightness)


def write(file, seed=0, shape=(20, 20, 3), brightness=0):
    """An image of noise, in the format that the file's name says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(seed, shape, brightness)).save(file)


def write_classes(folder, *names, count=20, first=0, ending="png", shape=(20, 20, 3)):
    """`count` images in each of these subfolders, brighter by class; another `first` gives other images."""
    for label, name in enumerate(names):
        for k in range(first, first + count):
            write(folder / name / f"{k:02}.{ending}", 100 * label + k, shape, 60 * label)


def write_arrays(folder, **arrays):
    """Arrays as .npy files of these names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


# ---- Layouts -----------------------------------------------------------------------------------------------
def class_folders(folder):
    write_classes(folder / "photos", "cat", "dog")


@command(f"{ONCE} --data photos", scripts=ALL, prepare=class_folders)
def test_class_subfolders(run):
    assert run.line() == "32 train and 8 test images, 3 channels, 16 x 16 (2-D), 2 classes"
    of_the_method = [note for note in run.notes() if note.startswith("note: --epochs 1: IConE learns little")]
    assert run.notes() == of_the_method and len(of_the_method) == (run.script == "icone.py")
    assert "trained encoder" in run.stdout
    assert run.features()["train_features"].shape == (32, 32)
    assert set(run.features()["test_labels"]) == {0, 1}
    assert {*PICTURES, "encoder.pt", "report.json"} <= {file.name for file in run.out().iterdir()}


def awkward(folder):
    """Two classes: one is a link, the other has links, spaces, accents, capitals and junk among its files."""
    write_classes(folder / "elsewhere", "猫", shape=(25, 40, 3))
    dogs = folder / "my photos" / "Hündchen #1"
    for k in range(10):
        write(dogs / f"ein Hund, {k} (100 %).JPEG", k, (50 + k, 20 + 3 * k, 3))
        (dogs / f"犬 {k}.PNG").symlink_to(folder / "elsewhere" / "猫" / f"{k:02}.png")
    for junk in ("notes.txt", ".DS_Store", "._00.png", "Thumbs.db"):
        (dogs / junk).write_text("no image")
    write(folder / "my photos" / ".thumbnails" / "small" / "00.png")
    (folder / "my photos" / "chats à poil").symlink_to(folder / "elsewhere" / "猫")


@command(f"{ONCE} --data 'my photos'", prepare=awkward)
def test_links_mixed_sizes_names_with_spaces_and_other_letters_and_junk_beside_them(run):
    assert run.line() == "32 train and 8 test images, 3 channels, 16 x 16 (2-D), 2 classes"


def split_with_classes(folder):
    write_classes(folder / "photos" / "train", "cat", "dog", "fox", count=12)
    write_classes(folder / "photos" / "val", "cat", "dog", "fox", count=4, first=50)


@command(f"{ONCE} --data photos", prepare=split_with_classes)
def test_train_and_val_with_class_subfolders(run):
    assert run.line() == "36 train and 12 test images, 3 channels, 16 x 16 (2-D), 3 classes"
    assert not run.notes()


def split_without_classes(folder):
    for k in range(24):
        write(folder / "photos" / "train" / f"{k}.png", k)
    for k in range(7):
        write(folder / "photos" / "test" / f"{k}.png", 100 + k)


@command(f"{ONCE} --data photos", prepare=split_without_classes)
def test_train_and_test_without_labels(run):
    assert run.line() == "24 train and 7 test images, 3 channels, 16 x 16 (2-D), no classes"
    assert run.features()["test_features"].shape == (7, 32)


def split_with_a_class_too_few(folder):
    write_classes(folder / "photos" / "train", "cat", "dog", "fox", count=8)
    write_classes(folder / "photos" / "test", "cat", "dog", count=4, first=50)


@command(f"{ONCE} --data photos", prepare=split_with_a_class_too_few)
def test_a_class_that_one_split_lacks_is_noted(run):
    assert run.line() == "24 train and 8 test images, 3 channels, 16 x 16 (2-D), 3 classes"
    note, = run.notes()
    assert "fox" in note
    assert "trained encoder" in run.stdout


def flat(folder):
    for k in range(40):
        write(folder / "photos" / f"{k}.png", k)


@command(f"{ONCE} --data photos", prepare=flat)
def test_a_flat_folder_trains_without_labels(run):
    assert run.line() == "32 train and 8 test images, 3 channels, 16 x 16 (2-D), no classes"
    assert run.notes()
    assert "k-NN" not in run.stdout
    assert "RankMe" in run.stdout
    assert set(run.features()) == {"train_features", "test_features", "train_files", "test_files"}
    assert {*PICTURES} <= {file.name for file in run.out().iterdir()}


def nested(folder):
    """Images at three depths, by years and days; a link back to the top must not be followed for ever."""
    for k in range(40):
        place = ("", "2023", "2024/May", "2024/June/3rd")[k % 4]
        write(folder / "photos" / place / f"{k}.png", k)
    (folder / "photos" / "2024" / "back").symlink_to(folder / "photos")


@command(f"{ONCE} --data photos", prepare=nested)
def test_nested_folders_train_without_labels_each_file_once(run):
    assert run.line() == "32 train and 8 test images, 3 channels, 16 x 16 (2-D), no classes"


@command(f"{ONCE} --data photos", prepare=lambda folder: write_classes(folder / "photos", "all", count=40))
def test_one_class_subfolder_is_noted_and_trains_without_probes(run):
    assert run.line().startswith("32 train and 8 test images, 3 channels, 16 x 16 (2-D), ")
    assert run.notes()
    assert "k-NN" not in run.stdout


def volumes(folder):
    for k in range(40):
        write_arrays(folder / "scans", **{f"scan {k}": noise(k, (8, 10, 12))})


@command(f"{ONCE} --data scans", prepare=volumes)
def test_a_folder_of_volumes(run):
    assert run.line() == "32 train and 8 test images, 1 channel, 8 x 10 x 12 (3-D), no classes"


def volumes_in_class_folders(folder):
    for k in range(40):
        write_arrays(folder / "scans" / f"class {k % 4}", **{f"{k}": (noise(k, (8, 8, 8)) / 255).astype(">f4")})


@command(f"{ONCE} --data scans", prepare=volumes_in_class_folders)
def test_volumes_of_floats_in_another_byte_order_in_class_subfolders(run):
    assert run.line() == "32 train and 8 test images, 1 channel, 8 x 8 x 8 (3-D), 4 classes"


# ---- Arrays and labels -------------------------------------------------------------------------------------
WORDS = np.array(["cat", "dog", "fox", "owl"])


def mapped(folder):
    """Arrays of their own files, with strings as labels."""
    labels = WORDS[np.arange(40) % 4]
    write_arrays(folder / "arrays", train_images=noise(0, (40, 16, 16, 3)), train_labels=labels,
                 test_images=noise(1, (12, 16, 16, 3)), test_labels=labels[:12])


@command(f"{ONCE} --data arrays", prepare=mapped)
def test_arrays_on_disk_with_strings_as_labels(run):
    assert run.line() == "40 train and 12 test images, 3 channels, 16 x 16 (2-D), 4 classes"
    assert run.features()["test_features"].shape == (12, 32)
    assert run.notes() == ["note: --size: without effect on these data"]
    assert not run.decoded()                                             # they are used where they lie


def mapped_volumes(folder):
    write_arrays(folder / "arrays", train_images=noise(0, (40, 8, 8, 8)))


@command(f"{ONCE} --data arrays", prepare=mapped_volumes)
def test_arrays_on_disk_without_labels_and_test_images(run):
    assert run.line() == "32 train and 8 test images, 1 channel, 8 x 8 x 8 (3-D), no classes"


BANDS = noise(0, (40, 16, 16, 12))
CLASSES = np.arange(40) % 4
COLUMN = CLASSES[:, None].astype(np.uint8)


@command(ONCE, prepare=saved(train_images=BANDS, train_labels=CLASSES.astype(float)))
def test_twelve_bands_are_a_volume_unless_one_says_otherwise_and_whole_floats_are_labels(run):
    assert run.line() == "32 train and 8 test images, 1 channel, 16 x 16 x 12 (3-D), 4 classes"


@command(f"{ONCE} --channels-last", prepare=saved(train_images=BANDS, train_labels=np.eye(4)[CLASSES]))
def test_twelve_bands_by_channels_last_and_one_hot_labels(run):
    assert run.line() == "32 train and 8 test images, 12 channels, 16 x 16 (2-D), 4 classes"


@command(ONCE, prepare=saved(train_images=BANDS[..., :4], train_labels=COLUMN))
def test_four_channels_are_colour_and_a_column_of_numbers_is_labels(run):
    assert run.line() == "32 train and 8 test images, 4 channels, 16 x 16 (2-D), 4 classes"


@command(ONCE, prepare=saved(train_images=BANDS[..., 0], train_labels=0 * CLASSES))
def test_one_class_is_noted_and_trains_without_probes(run):
    assert run.line().startswith("32 train and 8 test images, 1 channel, 16 x 16 (2-D), ")
    assert run.notes()
    assert "k-NN" not in run.stdout
    assert (run.out() / "encoder.pt").exists()


# ---- Modes -------------------------------------------------------------------------------------------------
RED, GREEN, BLUE, YELLOW = (220, 30, 30), (30, 180, 30), (40, 40, 210), (230, 220, 40)
SCENE = np.array([[RED, GREEN], [BLUE, YELLOW]], np.uint8).repeat(16, 0).repeat(16, 1)               # [32, 32, 3]
GRAY = np.asarray(Image.fromarray(SCENE).convert("L"))                                               # [32, 32]


def oriented(orientation):
    """The scene as a camera held otherwise saves it, and the tag by which it comes out upright."""
    undo = {2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
            5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, 1),
            7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: lambda x: np.rot90(x, -1)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    return Image.fromarray(np.ascontiguousarray(undo[orientation](SCENE))), {"exif": exif, "quality": 95}


def half_seen(mode):
    """The scene, its left half transparent."""
    image = Image.fromarray(SCENE).convert(mode)
    alpha = np.full((32, 32), 255, np.uint8)
    alpha[:, :16] = 0
    image.putalpha(Image.fromarray(alpha))
    return image


def coloured_modes():
    """What each file holds and is saved with, and what it must come out as [32, 32, 3]."""
    rgb, seen = Image.fromarray(SCENE), SCENE.copy()
    seen[:, :16] = 255                                                   # white shows through
    palette = rgb.quantize(8)
    gif = rgb.quantize(8)
    yield "jpeg.jpg", rgb, {"quality": 95}, SCENE
    yield "progressive.jpeg", rgb, {"quality": 95, "progressive": True}, SCENE
    yield "CMYK.jpg", rgb.convert("CMYK"), {"quality": 95}, SCENE
    yield "png.png", rgb, {}, SCENE
    yield "palette.png", palette, {}, SCENE
    yield "alpha.png", half_seen("RGB"), {}, seen
    yield "bmp.bmp", rgb, {}, SCENE
    yield "gif.gif", gif, {}, SCENE
    yield "animated.gif", gif, {"save_all": True, "append_images": [gif.rotate(90)]}, SCENE
    yield "tiff.tif", rgb, {}, SCENE
    yield "CMYK.tiff", rgb.convert("CMYK"), {"compression": "tiff_lzw"}, SCENE
    yield "webp.webp", rgb, {"lossless": True}, SCENE
    yield "alpha.webp", half_seen("RGB"), {"lossless": True}, seen
    for orientation in range(2, 9):
        yield f"held {orientation}.jpg", *oriented(orientation), SCENE


def gray_modes():
    """The same of files without colour, [32, 32]."""
    gray, seen = Image.fromarray(GRAY), GRAY.copy()
    seen[:, :16] = 255
    deep = Image.fromarray(GRAY.astype(np.uint16) * 257)
    yield "gray.png", gray, {}, GRAY
    yield "gray.jpg", gray, {"quality": 95}, GRAY
    yield "gray alpha.png", half_seen("L"), {}, seen
    yield "gray.tif", gray, {}, GRAY
    yield "16 bits.png", deep, {}, GRAY
    yield "16 bits.tif", deep, {}, GRAY
    yield "one bit.png", gray.point(lambda value: 255 * (value > 100), "1"), {}, 255 * (GRAY > 100).astype(np.uint8)


def write_modes(*makers):
    """What makes a folder of these files."""
    def make(folder):
        (folder / "modes").mkdir()
        for maker in makers:
            for name, image, options, _ in maker():
                image.save(folder / "modes" / name, **options)
    return make


def check_decoded(run, shown):
    """The decoded array holds what is shown {name: [32, 32] or [32, 32, 3]}, in the order of the names."""
    array, = run.decoded()
    assert len(array) == len(shown)
    inner = [4, 11]                                                      # away from edges, where squares mix
    if array.dtype == np.uint16:                                         # several kinds of numbers, each by its range
        array = np.moveaxis(array, 1, -1).squeeze() / 257
    for (name, expected), x in zip(sorted(shown.items()), array):
        expected = expected[::2, ::2][np.ix_(inner, inner)]
        difference = np.abs(x[np.ix_(inner, inner)].astype(int) - expected).max()
        assert difference <= 12, name                                    # JPEG, and inks that are no light


@command(f"{ONCE} --data modes", prepare=write_modes(coloured_modes, gray_modes))
def test_every_format_and_mode_comes_out_upright_and_in_its_colours(run):
    shown = {name: expected for name, _, _, expected in coloured_modes()}
    for name, _, _, expected in gray_modes():
        shown[name] = np.stack([expected] * 3, 2)
    assert "3 channels, 16 x 16 (2-D), no classes" in run.line()
    check_decoded(run, shown)


def three_of_each():
    for copy in ("a", "b", "c"):
        for name, *rest in gray_modes():
            yield f"{copy} {name}", *rest


@command(f"{ONCE} --data modes", prepare=write_modes(three_of_each))
def test_gray_images_of_every_depth_keep_one_channel(run):
    assert run.line() == "15 train and 6 test images, 1 channel, 16 x 16 (2-D), no classes"
    assert any("14 of 21 files equal an earlier one" in note for note in run.notes())
    check_decoded(run, {name: expected for name, _, _, expected in three_of_each()})


def oblong(folder):
    """Canvases on which the scene is the middle, and what is beside it is black."""
    (folder / "modes").mkdir()
    for k in range(20):
        beside = np.pad(SCENE, [(0, 0), (k, k), (0, 0)])
        beside = beside if k % 2 else beside.swapaxes(0, 1)
        image = Image.fromarray(np.ascontiguousarray(beside))
        image.resize([2 * side for side in image.size]).save(folder / "modes" / f"{k:02}.png")


@command(f"{ONCE} --data modes", prepare=oblong)
def test_the_shorter_side_is_fitted_and_the_middle_cut_out(run):
    check_decoded(run, {f"{k:02}": SCENE if k % 2 else SCENE.swapaxes(0, 1) for k in range(20)})


# ---- Several starts ----------------------------------------------------------------------------------------
def keep(folder):
    pass


def add(folder):
    write(folder / "photos" / "dog" / "new.png", 1000)


def change(folder):
    write(folder / "photos" / "cat" / "00.png", brightness=100)


def remove(folder):
    (folder / "photos" / "cat" / "07.png").unlink()


def where(done):
    """The array that a start speaks of."""
    path, = re.findall(r"runs/decoded/\S+?\.npy", done.stdout)
    return path


@command("; ".join([f"{ONCE} --data photos"] * 5), prepare=class_folders, between=(keep, add, change, remove))
def test_a_folder_is_decoded_once_until_a_file_is_added_changed_or_removed(run):
    assert run.line(1) == run.line(2) == "32 train and 8 test images, 3 channels, 16 x 16 (2-D), 2 classes"
    assert run.line(3).startswith("32 train and 9 test images")
    assert run.line(4).startswith("32 train and 9 test images")
    assert run.line(5).startswith("32 train and 8 test images")
    first, second, *later = map(where, run.done)
    assert first == second
    assert len({first, *later}) == 4
    assert run.metrics(1) == run.metrics(2)
    assert [len(array) for array in run.decoded()] == [40, 41, 41, 40]
    _, added, changed, removed = run.decoded()
    assert (added[0] != changed[0]).mean() > 0.9
    assert np.array_equal(added[1:], changed[1:])
    assert np.array_equal(np.delete(changed, 7, 0), removed)


@command("; ".join(f"{ONCE} --data photos --views {views}" for views in ("auto", "crops", "poses")),
         prepare=class_folders)
def test_colour_images_get_crops_unless_one_says_poses(run):
    losses = [run.metrics(number) for number in (1, 2, 3)]
    assert losses[0] == losses[1] != losses[2]


# ---- Mistakes: one line, exit code 2, no run folder ----------------------------------------------------------
def broken(folder):
    """Three of 23."""
    write_classes(folder / "photos", "cat", "dog", count=10)
    write(folder / "photos" / "cat" / "half.jpg", shape=(200, 200, 3))
    whole = (folder / "photos" / "cat" / "half.jpg").read_bytes()
    (folder / "photos" / "cat" / "half.jpg").write_bytes(whole[:len(whole) // 2])
    (folder / "photos" / "dog" / "empty.png").touch()
    (folder / "photos" / "dog" / "text.webp").write_text("no image")


def broken_volume(folder):
    volumes(folder)
    whole = (folder / "scans" / "scan 3.npy").read_bytes()
    (folder / "scans" / "scan 3.npy").write_bytes(whole[:-9])


def volumes_of_two_shapes(folder):
    volumes(folder)
    write_arrays(folder / "scans", **{"scan 9": noise(0, (8, 10, 11))})


def constant(folder):
    (folder / "photos").mkdir()
    for k in range(20):
        Image.new("RGB", (20, 20), (k, k, k)).save(folder / "photos" / f"{k}.png")


def no_test_images(folder):
    write_classes(folder / "photos" / "train", "cat", "dog")
    (folder / "photos" / "test" / "cat").mkdir(parents=True)


def wrong_names(folder):
    write_arrays(folder / "arrays", images=BANDS, labels=CLASSES)


def only_text(folder):
    (folder / "photos").mkdir()
    for k in range(20):
        (folder / "photos" / f"{k}.txt").write_text("no image")


def of_another_encoder(folder):
    saved(train_images=BANDS[..., 0])(folder)
    encoder = Encoder(3, 2, 4)
    torch.save({"config": encoder.config, "state_dict": encoder.state_dict()}, folder / "encoder.pt")


MULTI_LABEL = np.ones((40, 4), int)
NAN_LABELS = np.where(CLASSES, CLASSES, np.nan)
MISTAKES = [  # arguments, what makes the data, words the message must have
    ("--data photos", broken, r"photos/cat/half\.jpg.*\b2 other"),
    ("--data scans --strict", broken_volume, r"scans/scan 3\.npy"),
    ("--data scans --strict", volumes_of_two_shapes, r"8, 10, 11.*8, 10, 12"),
    ("--data photos", lambda folder: (folder / "photos").mkdir(), "photos"),
    ("--data photos", lambda folder: write(folder / "photos" / "one.png"), "photos"),
    ("--data photos", only_text, "photos.*png"),
    ("--data photos", no_test_images, "photos.* 0 test"),
    ("--data nowhere", class_folders, "nowhere"),
    ("--data photos/cat/00.png", class_folders, "00.png"),
    ("--data photos", constant, "photos"),
    ("--data scans --views crops", volumes, "crops.*poses"),
    ("--data arrays", wrong_names, "arrays.*npy"),
    ("--data small.npz", saved(images=BANDS, y=CLASSES), r"\bimages, y\b"),
    ("--data small.npz", saved(train_images=np.full((40, 16, 16), 7, np.uint8)), "small.npz"),
    ("--data small.npz", saved(train_images=BANDS, train_labels=MULTI_LABEL), r"train_labels.*40, 4\b"),
    ("--data small.npz", saved(train_images=BANDS, train_labels=CLASSES / 4), "train_labels.*float64"),
    ("--data small.npz", saved(train_images=BANDS, train_labels=CLASSES[:39]), r"train_labels.*\b39\b"),
    ("--data small.npz", saved(train_images=BANDS, train_labels=NAN_LABELS), "train_labels"),
    ("--data small.npz --init nowhere", saved(train_images=BANDS), "--init nowhere"),
    ("--data small.npz --init encoder.pt", of_another_encoder, r"--init encoder.pt.*\b3\b.*\b1\b")]


@pytest.mark.parametrize("run, message", [
    pytest.param(Run("vicreg.py", f"{ONCE} {arguments}", prepare), message, id=f"{arguments} {message}")
    for arguments, prepare, message in MISTAKES], indirect=["run"])
def test_a_mistake_gets_one_line_and_exit_code_2(run, message):
    assert run.returncode == 2, run.stderr
    assert len(run.stderr.splitlines()) == 1, run.stderr
    assert run.stderr.startswith("vicreg.py: ")
    assert re.search(message, run.stderr), run.stderr
    new = run.after.items() - run.before.items()                         # nothing overwritten, nothing new but
    assert {path.parent.name for path, _ in new} <= {"decoded"}          # what a second start will find
    assert not [*run.folder.glob("runs/vicreg*")]


def test_a_pipe_is_not_waited_for(finished, capsys):
    os.mkfifo(finished / "pipe")
    said(capsys, call(finished, "--data", "pipe"), "neither a file nor a folder")
    (finished / "photos").mkdir()
    os.mkfifo(finished / "photos" / "a.png")
    said(capsys, call(finished, "--data", "photos"), "holds 0 files")


# ---- Snippets of the harness's page ---------------------------------------------------------------------------
def cifar_batch(name):
    """Eight images of a file, each of one colour, as CIFAR-10 has them: [8, 3072], red, green and blue planes."""
    colours = np.random.default_rng(len(name) + ord(name[-1])).integers(0, 256, (8, 3)).astype(np.uint8)
    return colours, colours.repeat(1024, 1), np.arange(8) % 4


CIFAR = ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]


def python_batches():
    Path("cifar-10-batches-py").mkdir()
    for name in CIFAR:
        _, x, labels = cifar_batch(name)
        batch = {b"batch_label": b"", b"labels": labels.tolist(), b"data": x, b"filenames": [b"a.png"] * 8}
        Path("cifar-10-batches-py", name).write_bytes(pickle.dumps(batch, protocol=2))


def binary_batches():
    Path("cifar-10-batches-bin").mkdir()
    for name in CIFAR:
        _, x, labels = cifar_batch(name)
        np.insert(x, 0, labels, 1).tofile(Path("cifar-10-batches-bin", f"{name}.bin"))


@pytest.mark.parametrize("make, words", [
    (python_batches, "cifar-10-batches-py"),
    (binary_batches, "cifar-10-batches-bin")])
def test_cifars_own_files_train(make, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make()
    exec(snippet(words), {})
    arrays = np.load("cifar10.npz")
    expected = np.concatenate([cifar_batch(name)[0] for name in CIFAR])
    for where in ((0, 0), (31, 31)):
        ends = [arrays[f"{split}_images"][(slice(None), *where)] for split in ("train", "test")]
        assert np.array_equal(np.concatenate(ends), expected)
    noisy = {key: arrays[key] ^ noise(0, arrays[key].shape) if "images" in key else arrays[key] for key in arrays}
    np.savez("cifar10.npz", **noisy)                                     # images of one colour would be refused
    done = forked("vicreg.py", f"{ONCE} --data cifar10.npz".split(), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "data: 40 train and 8 test images, 3 channels, 32 x 32 (2-D), 4 classes; " in done.stdout


class Stand:
    """Stands for a library that this project does not install: what it is asked for is one of these."""

    def __init__(self, **parts):
        self.__dict__.update(parts)


def pictures(count=40):
    return [Image.fromarray(noise(k, (32, 32, 3))) for k in range(count)]


def torchvision():
    def SVHN(folder, download):
        return list(zip(pictures(), [k % 4 for k in range(40)]))
    return Stand(datasets=Stand(SVHN=SVHN))


def hugging_face():
    return Stand(load_dataset=lambda name, split: {"img": pictures(), "label": [k % 4 for k in range(40)]})


def nibabel():
    Path("scans").mkdir()
    for k in range(40):
        Path("scans", f"{k}.nii.gz").touch()

    def load(file):
        values = noise(int(file.name.split(".")[0]), (8, 8, 8)) * 31.
        return Stand(get_fdata=lambda dtype: values.astype(dtype) - 900)
    return Stand(load=load)


def tiff_stacks():
    Path("stacks").mkdir()
    for k in range(40):
        first, *others = map(Image.fromarray, noise(k, (6, 8, 10)))
        first.save(Path("stacks", f"{k}.tif"), save_all=True, append_images=others)


@pytest.mark.parametrize("words, library, make, data, said", [
    ("torchvision.datasets", "torchvision", torchvision, "svhn.npz", "3 channels, 32 x 32 (2-D), 4 classes"),
    ("load_dataset", "datasets", hugging_face, "cifar10.npz", "3 channels, 32 x 32 (2-D), 4 classes"),
    ("nibabel", "nibabel", nibabel, "volumes", "1 channel, 8 x 8 x 8 (3-D), no classes"),
    ("ImageSequence", "none", tiff_stacks, "volumes", "1 channel, 6 x 8 x 10 (3-D), no classes")])
def test_other_libraries_data_train(words, library, make, data, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, library, make())
    exec(snippet(words), {})
    done = forked("vicreg.py", f"{ONCE} --data {data}".split(), tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"data: 32 train and 8 test images, {said}; " in done.stdout


def test_names_are_no_formulas_and_stay_in_the_legend(tmp_path, monkeypatch):
    from kernels.harness import pictures as drawn
    legends = []
    real = drawn.save_figure
    monkeypatch.setattr(drawn, "save_figure", lambda figure, path: legends.append(figure) or real(figure, path))
    x, y = torch.rand(12, 1, 8, 8), torch.arange(12) % 3
    data = Data(x, y, x, y, np.array(["_background_", "a$^$b", "cat"]))
    drawn.plot_embedding(data, torch.randn(12, 4), tmp_path)
    names = [text.get_text() for text in legends[0].axes[0].get_legend().get_texts()]
    assert names == [" _background_", r"a\$^\$b", "cat"]
    history = [{"epoch": 1, "loss": 1., "knn": .5, "RankMe": 3.}]
    drawn.plot_curves(history, {"encoder of a$^$b": {"k-NN": .3}, "trained encoder": {"k-NN": .5}}, tmp_path)
    assert (tmp_path / "curves.png").exists()


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    def full(out, *_):
        out.write(b"the beginning")
        raise OSError(errno.ENOSPC, "No space left on device")

    write_classes(tmp_path / "photos", "cat", "dog", count=4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(decode, "write_rows", full)
    with pytest.raises(ValueError, match=r"cannot write what 8 files decode to .*No space left.*another folder"):
        read_images("photos")
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "runs"}
    assert [path.name for path in Path("runs").rglob("*")] == ["decoded"]


# ---- Much data ---------------------------------------------------------------------------------------------
class Watched:
    """A script's process, watched from its start: seconds to its first step, most resident bytes by the end of
    training and altogether."""

    def __init__(self, arguments, folder):
        self.start = time.monotonic()
        self.first_step = None
        self.trained = False
        self.training_peak = self.peak = 0
        self.lines = [""]
        command = [sys.executable, ROOT / "vicreg.py", *arguments.split()]
        self.process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self):
        """Follow the bars on stderr; that of training counts steps."""
        for byte in iter(lambda: self.process.stderr.read1(1), b""):
            if byte in b"\r\n":
                self.lines.append("")
                continue
            self.lines[-1] += byte.decode("latin-1")
            counted = re.search(r" ([1-9]\d*)/(\d+) .*step", self.lines[-1])
            if counted and not self.first_step:
                self.first_step = time.monotonic() - self.start
            self.trained = self.trained or bool(counted) and counted[1] == counted[2]

    def follow(self, seconds=None):
        """Wait for its end, or kill it so many seconds after its first step."""
        while self.process.poll() is None:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
            resident = re.search(r"VmHWM:\s+(\d+)", status)             # the most so far, KiB
            if not resident:                                             # it is ending
                break
            self.peak = 1024 * int(resident[1])
            if not self.trained:
                self.training_peak = self.peak
            if seconds and self.first_step and time.monotonic() - self.start - self.first_step > seconds:
                self.process.kill()
            time.sleep(0.1)
        self.process.wait()
        self.reader.join()
        assert self.first_step, self.lines[-20:]
        print(f"first step after {self.first_step:.1f} s, peak in training {self.training_peak / 1e9:.2f} GB, "
              f"altogether {self.peak / 1e9:.2f} GB")


def write_photographs(folder, count, side=224):
    """JPEGs of smooth noise, in two classes."""
    def make(k):
        coarse = Image.fromarray(noise(k, (14, 14, 3), 130 * (k % 2)))
        coarse.resize((side, side), Image.BICUBIC).save(folder / "photos" / f"class {k % 2}" / f"{k}.jpg")

    for label in (0, 1):
        (folder / "photos" / f"class {label}").mkdir(parents=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(make, range(count)))


@pytest.mark.slow
def test_two_thousand_photographs_begin_soon_and_take_little_memory(tmp_path):
    write_photographs(tmp_path, 2000)
    watched = Watched("--data photos --size 224 --batch 32 --epochs 1", tmp_path)
    watched.follow()
    assert watched.process.returncode == 0, watched.lines[-20:]
    assert watched.peak <= 1.6e9
    assert watched.first_step <= 20


@pytest.mark.slow
def test_a_hundred_thousand_small_images_take_little_memory(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (100_000, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "large.npz", train_images=images, train_labels=np.arange(100_000) % 10)
    del images
    watched = Watched("--data large.npz --batch 256 --width 4 --epochs 1", tmp_path)
    watched.follow()
    assert watched.process.returncode == 0, watched.lines[-20:]
    assert watched.training_peak <= 1.2e9


@pytest.mark.slow
def test_arrays_larger_than_memory_stay_on_the_disk(tmp_path):
    """8 GB, of which every twentieth image is noise; the others are holes in the file."""
    path = tmp_path / "arrays" / "train_images.npy"
    path.parent.mkdir()
    images = np.lib.format.open_memmap(path, "w+", np.uint8, (651_042, 64, 64, 3))
    images[::20] = noise(0, images[::20].shape)
    del images
    watched = Watched("--data arrays --batch 64 --width 4 --epochs 1", tmp_path)
    watched.follow(seconds=60)
    assert watched.peak <= 2e9


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@pytest.mark.slow
def test_decoding_uses_all_cores_and_is_done_once(tmp_path, monkeypatch, capsys):
    write_photographs(tmp_path, 2000, side=300)
    monkeypatch.chdir(tmp_path)
    paths = sorted(Path("photos").rglob("*.jpg"))
    single = timed(lambda: [np.asarray(Image.open(path).convert("RGB").resize((224, 224))) for path in paths[::10]]) / 200
    settings = decode.Settings(224)
    pairs = [(path, decode.look(path, settings)) for path in paths]
    target = decode.aim([kind for _, kind in pairs], settings, paths)
    decoded = decode.for_each(partial(decode.decode, settings=settings, target=target), pairs, "decoding")
    threads = timed(lambda: [None for _ in decoded]) / 2000
    first, second = (timed(lambda: read_data("photos", size=224)) for _ in range(2))
    with capsys.disabled():
        print(f"one thread {1 / single:.0f} images/s, all {1 / threads:.0f}; starts {first:.2f} s and {second:.2f} s")
    assert second <= first / 10
    assert single / threads >= 0.8 * os.cpu_count()
