"""kernels/harness/reading.py on five hundred damaged files of the kinds that scientists have: what is read equals the
file, or the file is skipped with a reason, or all is refused in one line.

The first twelfth by default; `pytest -m slow tests/test_fuzz_reading.py` tries all, in a minute.
"""
import csv
import gzip
import io
import random
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile

from kernels.harness.reading import read_images
from damage import bounded, damaged, share

SIDE = 12


@pytest.fixture(autouse=True)
def bounds(tmp_path, monkeypatch, one_thread):
    """An empty folder."""
    monkeypatch.chdir(tmp_path)
    with bounded():
        yield


def read(*arguments, **options):
    """Data, or None if it is refused in one line; any other exception is a failure, and so is a word to the screen."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            data = read_images(*arguments, **options)
        except ValueError as error:
            assert 10 < len(str(error)) and "\n" not in str(error)
            return None
        assert not caught, caught[0]
    return data


def noise(kind, shape, seed=0):
    top = 1 if kind == "f4" else 4096 if kind == "u2" else 256
    return (np.random.default_rng(seed).random(shape) * top).astype(kind)


# ---- TIFF and NIfTI: one of twelve files is damaged --------------------------------------------------------
TIFFS = {"channels": ("u2", (3,), dict(imagej=True, metadata={"axes": "CYX"})),
         "OME": ("u2", (5,), dict(ome=True, metadata={"axes": "CYX"})),
         "interleaved": ("u2", (), dict(photometric="rgb")),
         "float": ("f4", (), dict()),
         "pages": ("u2", (4,), dict(photometric="minisblack")),
         "packed": ("u2", (2,), dict(compression="zlib", photometric="minisblack", planarconfig="separate")),
         "8 bits": ("u1", (), dict(photometric="minisblack", rowsperstrip=4))}


def write_tiffs(name):
    kind, channels, options = TIFFS[name]
    Path("set").mkdir()
    shape = (*channels, SIDE, SIDE) if name != "interleaved" else (SIDE, SIDE, 3)
    x = noise(kind, (12, *shape))
    for k, own in enumerate(x):
        tifffile.imwrite(f"set/{k:02}.tif", own, **options)
    if name in ("float", "8 bits"):
        return x[:, None]
    return x[:, :1] if name == "pages" else x.transpose(0, 3, 1, 2) if name == "interleaved" else x


def planes(content, like):
    """What tifffile reads of these bytes, as [C, H, W]."""
    with tifffile.TiffFile(io.BytesIO(content)) as tiff:
        x = tiff.series[0].asarray()
        axes = tiff.series[0].axes
    x = x.transpose([k for k, axis in enumerate(axes) if axis not in "YX"] + [axes.index("Y"), axes.index("X")])
    return x.reshape(-1, *x.shape[-2:])[:like]


@pytest.mark.parametrize("seed", share(200))
def test_bytes_of_a_tiff(seed):
    rng = random.Random(seed)
    name = rng.choice([*TIFFS])
    x = write_tiffs(name)
    path = Path("set/03.tif")
    path.write_bytes(damaged(path.read_bytes(), rng, heads=True))
    data = read("set", size=SIDE, value_range=(0, 4096))
    if data is None:
        return
    files = [*data.files, *data.test_files]
    found = np.concatenate([data.images[:].double(), data.test_images[:].double()]) * 4096
    skipped = dict(data.skipped)
    assert {*files, *skipped} == {f"{k:02}.tif" for k in range(12)}
    assert all(len(reason) > 2 and "\n" not in reason for reason in skipped.values())
    for file, own in zip(files, found):
        if file != path.name:
            assert np.allclose(own, x[int(file[:2])], atol=0.1), file
    if path.name in files:
        own = found[files.index(path.name)]
        try:
            expected = planes(path.read_bytes(), len(own)).astype(np.float64).clip(0, 4096)
        except Exception:                                                # Pillow reads what tifffile does not
            assert name == "8 bits"
            return
        if expected.shape == own.shape:
            assert np.allclose(own, expected, atol=0.1)


@pytest.mark.parametrize("seed", share(80))
def test_bytes_of_a_nifti(seed):
    nibabel = pytest.importorskip("nibabel")
    rng = random.Random(seed)
    ending = rng.choice(["nii", "nii.gz"])
    Path("set").mkdir()
    x = noise("u2", (12, 6, 7, 8)).astype(np.int16)
    for k, own in enumerate(x):
        nibabel.save(nibabel.Nifti1Image(own, np.eye(4)), f"set/{k:02}.{ending}")
    path = Path(f"set/03.{ending}")
    path.write_bytes(damaged(path.read_bytes(), rng, heads=True))
    data = read("set", value_range=(0, 4096))
    if data is None:
        return
    files = [*data.files, *data.test_files]
    found = np.concatenate([data.images[:].double(), data.test_images[:].double()]) * 4096
    assert {*files, *dict(data.skipped)} == {f"{k:02}.{ending}" for k in range(12)}
    for file, own in zip(files, found):
        expected = x[int(file[:2])]
        if file == path.name:
            expected = nibabel.load(path).get_fdata(dtype=np.float32).clip(0, 4096)
        assert np.allclose(own, expected.reshape(own.shape), atol=0.1)


# ---- IDX and tables ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", share(100))
def test_bytes_of_an_idx_file(seed):
    rng = random.Random(seed)
    Path("set").mkdir()
    x, y = noise("u1", (24, 8, 9)), (np.arange(24) % 3).astype(np.uint8)
    ending = rng.choice(["", ".gz"])
    content = {"train-images-idx3-ubyte": struct.pack(">HBBIII", 0, 8, 3, *x.shape) + x.tobytes(),
               "train-labels-idx1-ubyte": struct.pack(">HBBI", 0, 8, 1, 24) + y.tobytes()}
    harmed = rng.choice([*content])
    for name, own in content.items():
        own = gzip.compress(own) if ending else own
        own = damaged(own, rng, heads=True) if name == harmed else own
        content[name] = own
        Path("set", name + ending).write_bytes(own)
    data = read("set", value_range=(0, 255))
    if data is None:
        return
    data_found = np.concatenate([data.images[:], data.test_images[:]])
    assert len(data_found) == 24 or harmed == "train-images-idx3-ubyte"
    if ending:                                                           # gzip's checksums: the same
        assert np.array_equal(np.sort(data_found, None), np.sort(x, None))
    elif harmed == "train-images-idx3-ubyte":
        stored = np.frombuffer(content[harmed][16:], np.uint8)
        assert data_found.dtype != np.uint8 or np.array_equal(np.sort(data_found, None), np.sort(stored, None))
    for labels in (data.labels, data.test_labels):
        assert labels is None or 0 <= labels.min() <= labels.max() < len(data.classes)


@pytest.mark.parametrize("seed", share(120))
def test_bytes_of_a_table(seed):
    rng = random.Random(seed)
    Path("set").mkdir()
    for k, own in enumerate(noise("u1", (16, 8, 8))):
        tifffile.imwrite(f"set/{k:02}.tif", own)
    out = io.StringIO()
    rows = csv.writer(out)
    rows.writerow(["file", "class", "group"][:rng.choice([2, 3])])
    for k in range(16):
        rows.writerow([f"{k:02}.tif", rng.choice(["cat", 'a "dog", big', "öl"]), f"patient {k // 3}"])
    Path("labels.csv").write_bytes(damaged(out.getvalue().encode(), rng, heads=True))
    data = read("set", size=8, labels="labels.csv")
    if data is None:
        return
    with open("labels.csv", newline="", encoding="utf-8-sig") as file:
        heads, *rows = [own for own in ([cell.strip() for cell in row] for row in csv.reader(file)) if any(own)]
    rows = [dict(zip(map(str.lower, heads), row)) for row in rows]
    said = {row["file"]: row for row in reversed(rows) if row.get("file")}               # the first one counts
    sides = []
    for names, labels in ((data.files, data.labels), (data.test_files, data.test_labels)):
        assert all(said[name]["class"] for name in names)
        assert labels is None or [data.classes[label] for label in labels] == [said[name]["class"] for name in names]
        sides.append({said[name].get("group") for name in names} - {None, ""})
    assert not sides[0] & sides[1]
