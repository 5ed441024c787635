"""python -m kernels.embed as its user runs it: names, features, formats, what is like an image, what is refused."""
import csv
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from PIL import Image

from kernels.harness import instrument
from kernels.harness.embedding import files_of, write_features
from kernels.harness.prepare import load_encoder
from kernels.harness.reading import read_images
from scripts import ONE_THREAD, ROOT, SMALL, call, call_command

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def as_it_was():
    """The command sets how signals end it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("form", ["npz", "npy", "csv"])
def test_a_signal_leaves_nothing_behind(number, form, place, tmp_path, monkeypatch):
    from kernels.harness import embedding
    real = embedding.embed

    def interrupted(*arguments):
        yield from real(*arguments)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(embedding, "embed", interrupted)
    done = embed(place, "run", "new", "--out", tmp_path / f"f.{form}")
    assert done.returncode == 130 and done.stderr.strip().endswith("before all was done: give the command again")
    assert not [*tmp_path.iterdir()]


def embed(folder, *arguments):
    return call_command("embed", folder, *arguments)


def image(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape or (20, 24)).astype(np.uint8)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images, a run of them, and others: one broken, one a copy, one in colour."""
    folder = tmp_path_factory.mktemp("embed")
    for k in range(20):
        file = folder / "set" / ("a" if k % 2 else "b") / f"{k:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image(k)).save(file)
    assert call(folder, *SMALL.split(), "--data", "set", "--epochs", "1", "--out", "run") == 0
    new = folder / "new" / "sub folder"
    new.mkdir(parents=True)
    for k in range(12):
        Image.fromarray(image(100 + k)).save(new / f"{k:02}, \"x\".png")
    Image.fromarray(image(5)).save(folder / "new" / "copy of 5.png")
    Image.fromarray(image(9, 20, 24, 3)).save(folder / "new" / "colour.png")
    (folder / "new" / "broken.png").write_bytes(b"none")
    (folder / "new" / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def embedded(place):
    done = embed(place, "run", "new", "--out", "f.npz", "--like", "set/a/05.png")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_features_with_names_as_prepare_and_encoder_give_them(place, embedded):
    with np.load(place / "f.npz") as found:
        assert {*found} == {"features", "files"}
        features, files = found["features"], found["files"].tolist()
    assert files == sorted(files) and len(files) == 14 and "sub folder/03, \"x\".png" in files
    encoder, prepare = load_encoder(place / "run")
    with torch.no_grad():
        expected = encoder(prepare([place / "new" / file for file in files]))
    assert features.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(features), expected, rtol=1e-5, atol=1e-6)
    with np.load(place / "run" / "features.npz") as stored:          # the copy of a training image has its row
        own = [*stored["train_files"], *stored["test_files"]].index("a/05.png")
        row = np.concatenate([stored["train_features"], stored["test_features"]])[own]
    assert np.allclose(features[files.index("copy of 5.png")], row, rtol=1e-5)


def test_what_was_changed_or_left_out_is_said(place, embedded):
    assert "embedded: 14 images of new, 32 features each; f.npz" in embedded
    assert "note: 1 images were colour, taken as gray" in embedded
    assert "note: 1 could not be read, listed in f.skipped.txt: broken.png: cannot identify image file" in embedded
    assert (place / "f.skipped.txt").read_text() == "broken.png: cannot identify image file\n"


def test_the_ten_nearest_the_copy_first(place, embedded):
    lines = embedded[embedded.index("  cosine  file"):].splitlines()[1:]
    assert len(lines) == 10 and lines[0] == "  1.0000  copy of 5.png"
    cosines = [float(line.split()[0]) for line in lines]
    assert cosines == sorted(cosines, reverse=True)
    encoder, prepare = load_encoder(place / "run")
    with np.load(place / "f.npz") as found, torch.no_grad():
        unit = F.normalize(torch.from_numpy(found["features"]))
        every = (unit @ F.normalize(encoder(prepare(place / "set/a/05.png"))).T).flatten()
    assert np.allclose(cosines, every.sort(descending=True).values[:10], atol=6e-5)


def test_a_page_beside_it(place, embedded):
    text = (place / "f.html").read_text()
    assert "Features of new by the encoder of run" in text and "copy of 5.png" in text


def test_like_among_the_runs_own(place):
    done = embed(place, "run", "--like", "new/copy of 5.png")
    assert done.returncode == 0, done.stderr
    assert embed(place, "run/encoder.pt", "--like", "new/copy of 5.png").stdout == done.stdout
    lines = done.stdout.splitlines()
    assert len(lines) == 11 and lines[1].split()[:2] == ["1.0000", "a/05.png"] and lines[1].endswith(("(train)", "(test)"))


def test_npy_and_csv_and_one_file(place, embedded):
    with np.load(place / "f.npz") as found:
        features, files = found["features"], found["files"].tolist()
    for out in ("g.npy", "g.csv"):
        done = embed(place, "run/encoder.pt", "new", "--out", out, "--no-page", "--batch", 4)
        assert done.returncode == 0, done.stderr
    assert not (place / "g.html").exists()
    assert np.allclose(np.load(place / "g.npy"), features, rtol=1e-5)
    assert (place / "g.txt").read_text().splitlines() == files
    header, *rows = csv.reader((place / "g.csv").open(newline=""))
    assert header == ["file", *map(str, range(32))] and [row[0] for row in rows] == files
    assert np.allclose(np.array([row[1:] for row in rows], float), features, rtol=1e-5)
    done = embed(place, "run", "new/colour.png", "--out", "one.npz")
    assert done.returncode == 0, done.stderr
    with np.load(place / "one.npz") as found:
        assert found["files"].tolist() == ["colour.png"] and found["features"].shape == (1, 32)


def test_arrays_by_rows(place):
    x = np.stack([image(k, 16, 16) for k in range(30)])
    np.save(place / "x.npy", x)
    np.savez(place / "x.npz", train_images=x[:20], test_images=x[20:])
    encoder, prepare = load_encoder(place / "run")
    with torch.no_grad():
        expected = encoder(prepare([*x])).numpy()
    for name, names in (("x.npy", [str(k) for k in range(30)]),
                        ("x.npz", [f"train {k}" for k in range(20)] + [f"test {k}" for k in range(10)])):
        done = embed(place, "run", name, "--out", "h.npz", "--no-page")
        assert done.returncode == 0, done.stderr
        with np.load(place / "h.npz") as found:
            assert found["files"].tolist() == names
            assert np.allclose(found["features"], expected, rtol=1e-5, atol=1e-6)


def test_as_a_process(place):
    def run(*arguments):
        return subprocess.run([sys.executable, "-m", "kernels.embed", *arguments], cwd=place, capture_output=True, text=True,
                              env={**ONE_THREAD, "PYTHONPATH": str(ROOT)})
    done = run("run", "set", "--out", "process.npz", "--no-page")
    assert done.returncode == 0 and done.stdout == "embedded: 20 images of set, 32 features each; process.npz\n", done.stderr
    done = run("run", "set", "--out", "process.txt")
    assert done.returncode == 2 and done.stderr.startswith("embed: --out process.txt") and not done.stdout


@pytest.mark.parametrize("arguments, words", [
    ([], "the following arguments are required: run"), (["run"], "give data and --out"),
    (["run", "new"], "give data and --out"), (["run", "--out", "f.npz"], "give data and --out"),
    (["run", "new", "--out", "f.txt"], "its ending must be .npz, .npy, .csv"),
    (["run", "new", "--out", "no/f.npz"], "there is no folder no"), (["run", "new", "--out", "f.npz", "--batch", "0"], "--batch 0"),
    (["set", "new", "--out", "f.npz"], "set/encoder.pt does not serve"),
    (["run", "nowhere", "--out", "e.npz"], "nowhere is not there"), (["run", "empty", "--out", "e.npz"], "empty holds no files"),
    (["run", "bad", "--out", "e.npz"], "2 of 4 cannot be embedded"), (["run", "deep", "--out", "e.npz"], "it holds uint16"),
    (["run", "--like", "new/broken.png"], "--like new/broken.png cannot be read"),
    (["run", "new", "--out", "e.npz", "--device", "cuda:99"], "cannot use --device cuda:99")])
def test_mistakes_end_in_one_line_and_write_nothing(place, arguments, words):
    for folder in ("empty", "bad", "deep"):
        (place / folder).mkdir(exist_ok=True)
    for k in range(4):
        Image.fromarray(image(k)).save(place / "bad" / f"{k}.png")
        Image.fromarray(image(k).astype(np.uint16) * 257).save(place / "deep" / f"{k}.png")
    for k in range(2):
        (place / "bad" / f"{k}.png").write_bytes(b"none")
    before = {*place.iterdir()}
    done = embed(place, *arguments)
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr and {*place.iterdir()} == before


@pytest.fixture
def few(place, tmp_path):
    """A folder with a copy of the run, a set of four images, and arrays."""
    shutil.copytree(place / "run", tmp_path / "run")
    for k in range(4):
        (tmp_path / "set").mkdir(exist_ok=True)
        Image.fromarray(image(k)).save(tmp_path / "set" / f"{k}.png")
    x = np.stack([image(k, 16, 16) for k in range(4)])
    np.savez(tmp_path / "x.npz", train_images=x)
    np.save(tmp_path / "x.npy", x)
    return tmp_path


@pytest.mark.parametrize("data, out, words", [
    ("x.npz", "x.npz", "x.npz is the data itself"), ("x.npy", "x.npy", "x.npy is the data itself"),
    ("x.npz", "run/../x.npz", "x.npz is the data itself"), ("x.npz", "link.npz", "link.npz is the data itself"),
    ("set", "x.npz", "x.npz is there"), ("set", "x.npy", "x.npy is there"),
    ("set", "run/features.npz", "run/features.npz is there"), ("set", "run/browse.npy", "run/browse.html is there"),
    ("set", "page.csv", "page.html is there"), ("set", "table.csv", "table.csv is there"),
    ("set", "words.npy", "words.txt is there"), ("set", "notes.npz", "notes.skipped.txt is there"),
    ("set", "folder.npz", "folder.npz is there"), ("set", "own.npy", "own.npy is there"),
    ("set", "classes.csv", "classes.csv is there"), ("set", "todo.npz", "todo.skipped.txt is there")])
def test_no_file_of_anybody_else_is_overwritten(few, data, out, words):
    (few / "link.npz").symlink_to("x.npz")
    (few / "page.html").write_text("<p>Features of my dog")
    (few / "table.csv").write_text("file,class\na.png,dog\n")
    (few / "words.txt").write_text("mine\n")
    (few / "notes.skipped.txt").write_text("mine\n")
    (few / "todo.skipped.txt").write_text("todo: buy milk\n")
    (few / "classes.csv").write_text("file,0,1,class\na.png,.1,.2,dog\n")
    (few / "own.txt").write_text("cat\ndog\n")
    np.save(few / "own.npy", np.eye(2))
    (few / "folder.npz").mkdir()
    before = {file: file.read_bytes() for file in few.rglob("*") if file.is_file()}
    done = embed(few, "run", data, "--out", out)
    assert done.returncode == 2 and f"embed: --out {out}: " in done.stderr and words in done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout
    assert {file: file.read_bytes() for file in few.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("form", ["npz", "npy", "csv"])
def test_an_earlier_output_is_replaced_and_what_it_had_beside_it(few, form):
    out = f"f.{form}"
    for k in range(4, 20):
        Image.fromarray(image(k)).save(few / "set" / f"{k}.png")
    (few / "set" / "broken.png").write_bytes(b"none")
    (few / "f").mkdir()                                              # beside, and none of its own
    assert embed(few, "run", "set", "--out", out).returncode == 0
    assert (few / "f.html").exists() and "broken.png: " in (few / "f.skipped.txt").read_text()
    assert embed(few, "run", "set", "--out", out).returncode == 0
    (few / "set" / "broken.png").unlink()
    done = embed(few, "run", "set", "--out", out, "--no-page")
    assert done.returncode == 0, done.stderr
    assert "removed: f.html, of an earlier output" in done.stdout and "removed: f.skipped.txt" in done.stdout
    assert not (few / "f.html").exists() and not (few / "f.skipped.txt").exists() and (few / out).exists()


def test_what_lies_beside_is_left_if_it_is_no_earlier_output(few):
    assert embed(few, "run", "set", "--out", "f.npz", "--no-page").returncode == 0
    (few / "f.html").write_text("mine")
    done = embed(few, "run", "set", "--out", "f.npz", "--no-page")
    assert done.returncode == 0 and "removed" not in done.stdout and (few / "f.html").read_text() == "mine"


def test_the_page_of_another_format_of_that_name_stays(few):
    assert embed(few, "run", "set", "--out", "f.npz").returncode == 0
    for _ in range(2):
        done = embed(few, "run", "set", "--out", "f.csv", "--no-page")
        assert done.returncode == 0 and "removed" not in done.stdout and (few / "f.html").exists()


def test_names_with_lines_of_their_own_and_letters_of_no_alphabet(few):
    names = ["a\rb.png", "a\u2028b.png", "a\nb\x0c.png", "a\"b,.png", os.fsdecode(b"a\xff.png")]
    for k, name in enumerate(names):
        Image.fromarray(image(k)).save(few / "new.png")
        (few / "new.png").rename(few / "set" / name)
    (few / "set" / "b\n\xad.png").write_bytes(b"none")
    count = len(names) + 4
    for k in range(10):
        Image.fromarray(image(k)).save(few / "set" / f"more {k}.png")
    count += 10
    for out in ("f.npy", "f.csv"):
        done = embed(few, "run", "set", "--out", out)
        assert done.returncode == 0, done.stderr
    assert len((few / "f.txt").read_text(encoding="utf-8").splitlines()) == count
    assert len((few / "f.skipped.txt").read_text(encoding="utf-8").splitlines()) == 1
    head, *rows = csv.reader((few / "f.csv").open(newline="", encoding="utf-8"))
    assert {len(row) for row in rows} == {len(head)} == {33} and len(rows) == count
    assert {*names[:-1], r"a\udcff.png"} <= {row[0] for row in rows}
    assert np.allclose([[float(cell) for cell in row[1:]] for row in rows], np.load(few / "f.npy"), rtol=1e-5)


def test_names_that_are_no_utf8_stay_apart(few):
    for byte in b"\xe4\xf6\xfc":
        Image.fromarray(image(byte)).save(few / "new.png")
        (few / "new.png").rename(few / "set" / os.fsdecode(b"M%c.png" % byte))
    expected = {r"M\udce4.png", r"M\udcf6.png", r"M\udcfc.png"}
    for out in ("f.csv", "f.npy"):
        done = embed(few, "run", "set", "--out", out, "--like", "set/" + os.fsdecode(b"M\xe4.png"))
        assert done.returncode == 0, done.stderr
        text = (few / out).with_suffix(".txt" if out == "f.npy" else ".csv").read_text(encoding="utf-8")
        assert all(text.count(name) == 1 and name in done.stdout for name in expected)


def write_volumes(folder, x, form):
    """A file of each of x, 00.npy and so on."""
    folder.mkdir()
    for k, own in enumerate(x):
        file = folder / f"{k:02}.{form}"
        if form == "npy":
            np.save(file, own)
        elif form == "tif":
            tifffile.imwrite(file, own)
        else:
            nibabel = pytest.importorskip("nibabel")
            nibabel.save(nibabel.Nifti1Image(own, np.eye(4)), file)


@pytest.mark.parametrize("form, stray", [("tif", "npy"), ("npy", "nii.gz")])
def test_a_stray_file_does_not_take_the_place_of_all_volumes(form, stray, tmp_path):
    x = np.random.default_rng(0).integers(0, 4000, (12, 8, 16, 16)).astype(np.uint16)
    write_volumes(tmp_path / "set", x, form)
    data = read_images(str(tmp_path / "set"), 16, pages="volume" if form == "tif" else "auto")
    if stray == "npy":
        np.save(tmp_path / "set" / "notes.npy", x[0])
    else:
        (tmp_path / "set" / "template.nii.gz").write_bytes(b"x")
    names, _ = files_of(tmp_path / "set", data.prepare)
    assert names == [f"{k:02}.{form}" for k in range(12)]


@pytest.mark.parametrize("content, words", [
    (b"", "No data left"), (b"none", "cannot be read as .npy"), (b"PK\x03\x04", "cannot be read as .npy")])
def test_a_broken_npy_ends_in_one_line(content, words, place, tmp_path):
    np.savez(tmp_path / "set.npz", train_images=np.random.default_rng(0).random((40, 8, 8, 8), dtype=np.float32))
    assert call(tmp_path, *SMALL.split(), "--data", "set.npz", "--epochs", "1", "--out", "run") == 0
    (tmp_path / "b.npy").write_bytes(content)
    done = embed(tmp_path, "run", "b.npy", "--out", "f.npz")
    assert done.returncode == 2 and words in done.stderr and "b.npy" in done.stderr and "unsafely" not in done.stderr
    np.save(tmp_path / "one.npy", np.random.default_rng(1).random((8, 8, 8), dtype=np.float32))
    done = embed(tmp_path, "run", "one.npy", "--out", "f.npz")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "f.npz") as found:
        assert found["features"].shape[0] == 1 and [*found["files"]] == ["one.npy"]


def test_white_for_transparency_is_said(place):
    x = image(7, 20, 24, 4)
    Image.fromarray(x).save(place / "clear.png")
    done = embed(place, "run", "clear.png", "--out", "clear.npz")
    assert done.returncode == 0 and "transparent in part, where they became white" in done.stdout, done.stderr or done.stdout


@pytest.mark.parametrize("form", ["nii", "npy"])
def test_volumes_are_taken_though_pictures_lie_beside_and_one_alone_is_one(form, tmp_path):
    x = np.random.default_rng(0).integers(0, 4000, (24, 12, 12, 12)).astype(np.int16)
    write_volumes(tmp_path / "set", x, form)
    assert call(tmp_path, *SMALL.split(), "--data", "set", "--epochs", "1", "--out", "run") == 0
    for k in range(5):
        Image.fromarray(image(k)).save(tmp_path / "set" / f"preview {k}.png")
    done = embed(tmp_path, "run", "set", "--out", "all.npz")
    assert done.returncode == 0 and "taken 24 of 29 files; left out: 5 .png" in done.stdout, done.stderr or done.stdout
    done = embed(tmp_path, "run", f"set/03.{form}", "--out", "one.npz")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "all.npz") as several, np.load(tmp_path / "one.npz") as one:
        assert [*one["files"]] == [f"03.{form}"]
        assert np.allclose(one["features"], several["features"][[*several["files"]].index(f"03.{form}")], atol=1e-5)


def test_collapse_reads_names_of_no_alphabet(tmp_path):
    names = ["a\u2028b.png", os.fsdecode(b"a\xff.png"), "a\x0c\x85.png", "c.png"]
    h = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    for form in ("csv", "npy"):
        write_features(tmp_path / f"f.{form}", names, [(range(4), h)], 8)
        assert np.allclose(instrument.read(tmp_path / f"f.{form}"), h, rtol=1e-6)
        found = instrument.names_of(tmp_path / f"f.{form}", None, 4)
        assert found[1] == r"a\udcff.png" and found[3] == "c.png"


MEMORY = """
import resource, sys, numpy as np, torch
from pathlib import Path
from kernels.harness import embedding
from kernels.harness.encoder import Encoder
from kernels.harness.prepare import prepare_arrays
count = int(sys.argv[1])
torch.set_num_threads(2)
prepare = prepare_arrays("uint8", (1, 8, 8), low=0, high=255)
x = np.zeros((8, 8), np.uint8)
names = [f"folder/{k:07}.png" for k in range(count)]
encoder = Encoder(1, 2, width=4).eval()
parts = embedding.embed(encoder, prepare, names, lambda row: x)
embedding.write_features(Path("f.npz"), names, parts, 32)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
def test_memory_is_flat_in_the_number_of_images(tmp_path):
    def peak(count):
        done = subprocess.run([sys.executable, "-c", MEMORY, str(count)], cwd=tmp_path, capture_output=True, text=True,
                              env={**ONE_THREAD, "PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr
        with np.load(tmp_path / "f.npz") as found:
            assert len(found["features"]) == len(found["files"]) == count
        return float(done.stdout)
    few, many = peak(10_000), peak(100_000)
    print(f"peak memory: 10,000 images {few:.0f} MB, 100,000 {many:.0f} MB")
    assert many < few + 40                                           # MB: names are kept
