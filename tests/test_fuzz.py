"""kernels/harness/images.py, files.py and cli.py on a thousand damaged files and odd command lines: each is refused in one
line, or does what it should.

The first twelfth by default; `pytest -m slow tests/test_fuzz.py` tries all, in a minute.
"""
import io
import random
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kernels.harness.cli import NOT_TYPED, options
from kernels.harness.reading import read_images
from damage import bounded, damaged, share
from scripts import SMALL, call, saved, small_arrays

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def bounds():
    with bounded():
        yield


def refused_or(check, read, *arguments):
    """read(*arguments) raises ValueError with one line, or what it gives passes check."""
    try:
        found = read(*arguments)
    except ValueError as error:
        assert 10 < len(str(error))
        return
    check(found)


# ---- .npz --------------------------------------------------------------------------------------------------
FEW = small_arrays(8, 8, count=24, test_count=9)


@pytest.mark.parametrize("seed", share(300))
def test_bytes_of_an_npz(seed, tmp_path):
    rng = random.Random(seed)
    saved(**FEW)(tmp_path)
    path = tmp_path / "small.npz"
    path.write_bytes(damaged(path.read_bytes(), rng))

    def check(data):                                                 # zip's checksums: the same or refused
        assert torch.equal(data.images, torch.from_numpy(FEW["train_images"])[:, None])
    refused_or(check, read_images, path)


HEADS = ["{'descr': '|u1', 'fortran_order': False, 'shape': (24, 8, 8), }",
         "{'descr': '|u1', 'fortran_order': True, 'shape': (8, 8, 24), }",
         "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 8, 8), }",
         "{'descr': '|u1', 'fortran_order': False, 'shape': (-24, 8, 8), }",
         "{'descr': '|u1', 'fortran_order': False, 'shape': (24, 8, 8, 0), }",
         "{'descr': '|O', 'fortran_order': False, 'shape': (24,), }",
         "{'descr': '<U1000000000', 'fortran_order': False, 'shape': (24,), }",
         "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (24, 8, 8), }",
         "{'shape': __import__('os').system('touch executed')}",
         "{" * 3000]
ODD = [np.zeros((24, 8, 8), complex), np.zeros((24, 8, 8), "M8[s]"), np.zeros(24), np.zeros(()),
       np.zeros((0, 8, 8), np.uint8), np.zeros((24, 8, 8, 0), np.uint8), np.full((24, 8, 8), np.nan),
       np.full((24, 8, 8), np.inf), np.full((24, 8, 8), 1e38), np.zeros((24, 1, 1), np.uint8),
       np.zeros((24, 8, 8, 2), np.uint8), np.zeros((24, 8, 8, 8, 8, 8), np.uint8), np.arange(24) * 10**8,
       np.full(24, 2**64 - 1, np.uint64), np.arange(24) - 3, np.array(["a", "b", ""] * 8), np.eye(24),
       np.arange(23), np.array([b"x", b"y"] * 12), np.full(24, np.nan), np.ones((24, 3)),
       np.random.default_rng(0).random((24, 8, 8)).astype(">f4"), np.zeros((24, 8, 8), bool)]


@pytest.mark.parametrize("seed", share(200))
def test_members_of_an_npz(seed, tmp_path, capsys):
    """Members of wrong kinds, and headers that a tool could write or an attacker would."""
    rng = random.Random(seed)
    with zipfile.ZipFile(tmp_path / "small.npz", "w") as archive:
        changed = rng.sample(sorted(FEW), rng.randint(1, 2))
        for name, array in FEW.items():
            file = io.BytesIO()
            np.save(file, array)
            content = file.getvalue()
            if name in changed:
                way = rng.randrange(5)
                if way == 0:
                    head = rng.choice(HEADS).encode()
                    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + array.tobytes()
                elif way == 1:
                    content = b"no magic"
                elif way == 2:
                    continue
                else:
                    file = io.BytesIO()
                    np.save(file, rng.choice(ODD))
                    content = file.getvalue()
            archive.writestr(f"{name}.npy", content)

    def check(data):
        assert data.images.ndim in (4, 5) and len(data.images) > 0 and len(data.test_images) > 0
        for x, y in ((data.images, data.labels), (data.test_images, data.test_labels)):
            assert x.dtype == torch.uint8 or (x.min() >= 0 and x.max() <= 1)
            assert y is None or (len(y) == len(x) and 0 <= y.min() and y.max() < len(data.classes) <= 48)
    refused_or(check, read_images, tmp_path / "small.npz")
    assert not Path("executed").exists() and not (tmp_path / "executed").exists()


# ---- Image files -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", share(300))
def test_bytes_of_an_image(seed, tmp_path, monkeypatch, capsys):
    rng = random.Random(seed)
    monkeypatch.chdir(tmp_path)                                      # decoded arrays lie under runs/
    kind = rng.choice(["png", "jpg", "gif", "tif", "webp", "bmp"])
    (tmp_path / "photos").mkdir()
    pattern = np.random.default_rng(0).integers(0, 255, (9, 10, 12, 3)).astype(np.uint8)
    for number, x in enumerate(pattern):
        Image.fromarray(x).save(tmp_path / "photos" / f"{number}.{kind}")
    path = tmp_path / "photos" / f"3.{kind}"
    path.write_bytes(damaged(path.read_bytes(), rng))

    def check(data):
        assert data.images.shape[1:] == data.test_images.shape[1:] == (3, 8, 8)
        assert len(data.images) + len(data.test_images) == 9
    refused_or(check, read_images, tmp_path / "photos", 8)


# ---- Checkpoints and command lines -------------------------------------------------------------------------
@pytest.mark.parametrize("seed", share(200))
def test_bytes_of_a_checkpoint(seed, finished, capsys):
    path = finished / "run" / "last.pt"
    before = torch.load(path, weights_only=True)["model"]
    path.write_bytes(damaged(path.read_bytes(), random.Random(seed)))
    code = call(finished, "--resume", "run")
    assert code in (0, 2)
    if code == 2:
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith("vicreg.py: ")
    else:
        after = torch.load(finished / "run" / "encoder.pt", weights_only=True)["state_dict"]
        assert all(torch.equal(before[f"encoder.{name}"], weight) for name, weight in after.items())


VALUES = ["", "0", "1", "2", "-1", "3", "1.5", "1e9", "1e30", "nan", "inf", "-inf", "none", "x", "9" * 30,
          "2147483648", "1e-300", "16-16", "16--16", "٣", "0x10", " 8 ", "8\n", "é"]


@pytest.mark.parametrize("seed", share(200))
def test_command_lines(seed, finished, capsys):
    rng = random.Random(seed)
    parser, _ = options("VICReg", "", batch=8, epochs=1, lr=1e-3)
    names = [*vars(parser.parse_args([])), "projector", "invariance", "nothing"]
    names = [name for name in names if name not in ("epochs", "compile", *NOT_TYPED)]
    words = [word for name in rng.sample(names, rng.randint(1, 3))
             for word in (f"--{name.replace('_', '-')}", rng.choice(VALUES))]
    code = call(finished, *SMALL.split(), *words)
    assert code in (0, 2), words
    if code == 2:
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vicreg.py: ")]
        assert len(lines) == 1
