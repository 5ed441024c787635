"""python -m kernels.collapse as its user runs it, with files from anywhere."""
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from scripts import ONE_THREAD, ROOT, call_command


def run(folder, *arguments):
    return call_command("harness.instrument", folder, *arguments)


def test_as_a_process(place):
    def process(*arguments):
        return subprocess.run([sys.executable, "-m", "kernels.collapse", *arguments], cwd=place, capture_output=True, text=True,
                              env={**ONE_THREAD, "PYTHONPATH": str(ROOT)})
    done = process("line.npy")
    assert done.returncode == 3 and "DIMENSIONAL COLLAPSE" in done.stdout and not done.stderr
    assert process("nowhere.npy").returncode == 2


def white(n=400, d=24, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embeddings")
    z = white()
    np.save(folder / "z.npy", z.astype(np.float32))
    for k in (1, 2):
        np.save(folder / f"z{k}.npy", (z + .1 * white(seed=k)).astype(np.float32))
        np.save(folder / f"blind{k}.npy", white(seed=10 + k))
    np.save(folder / "line.npy", white(d=1) @ white(1, 24))
    np.save(folder / "noise.npy", 1 + .05 * white(d=384))
    nan = z.copy()
    nan[17, 3] = np.nan
    np.save(folder / "nan.npy", nan)
    rare = z.copy()
    rare[390:] = 1
    np.save(folder / "rare.npy", rare)
    np.save(folder / "labels.npy", np.array(["cat"] * 390 + ["rare"] * 10))
    (folder / "labels.csv").write_text("class\n" + "cat\n" * 390 + "rare\n" * 10)
    np.savez(folder / "ours.npz", features=z, files=np.arange(400))
    np.savez(folder / "two.npz", a=z, b=z)
    np.savez(folder / "labelled.npz", z=rare, y=[0] * 390 + [1] * 10)
    torch.save(torch.from_numpy(z), folder / "z.pt")
    torch.save({"embeddings": torch.from_numpy(z), "epoch": 3}, folder / "dict.pt")
    lines = [f"{k}.png," + ",".join(map(str, row)) for k, row in enumerate(z)]
    (folder / "z.csv").write_text("\n".join(["file," + ",".join(map(str, range(24))), *lines]) + "\n")
    (folder / "plain.csv").write_text("\n".join(",".join(map(str, row)) for row in z) + "\n")
    for name, header in (("cats", ""), ("named", ",".join(map(str, range(24))) + ",class\n")):
        (folder / f"{name}.csv").write_text(header + "\n".join(",".join(map(str, row)) + ",cat" for row in z) + "\n")
    nan[:] = 1
    nan[17, 3] = np.nan
    np.save(folder / "nan and one point.npy", nan)
    np.save(folder / "images.npy", np.zeros((5, 8, 8), np.float32))
    np.save(folder / "objects.npy", np.array([{}, []], dtype=object))
    np.save(folder / "few.npy", z[:3])
    (folder / "words.csv").write_text("a,1\nb,c\n")
    (folder / "z.h5").write_bytes(b"x")
    (folder / "broken.npz").write_bytes(b"x")
    return folder


@pytest.mark.parametrize("arguments, code, words", [
    ("z.npy --views z1.npy z2.npy", 0, "No collapse: the squared distance"),
    ("z.npy", 4, "CANNOT TELL: spread in 23 of at most 24"), ("noise.npy", 4, "CANNOT TELL"),
    ("line.npy", 3, "DIMENSIONAL COLLAPSE"), ("z.npy --views blind1.npy blind2.npy", 3, "COLLAPSED, or not trained yet"),
    ("nan.npy", 4, "NOT FINITE: 1 of 400 embeddings (rows 17)"),
    ("rare.npy --labels labels.npy", 3, "PARTIAL COLLAPSE: each at one point are the images of 1 of 2 classes (rare)"),
    ("rare.npy --labels labels.csv", 3, "1 of 2 classes (rare)"),
    ("labelled.npz --labels labelled.npz", 3, "1 of 2 classes (1)"),
    ("z.npy --views z1.npy z2.npy --before z.npy --before-views z1.npy z2.npy", 4, "NOTHING LEARNT YET"),
    ("ours.npz", 4, "CANNOT TELL"), ("two.npz --key b", 4, "CANNOT TELL"), ("z.pt", 4, "CANNOT TELL"), ("dict.pt", 4, "CANNOT TELL"),
    ("z.csv", 4, "spread in 23 of at most 24"), ("plain.csv", 4, "spread in 23 of at most 24")])
def test_one_command_one_sentence_and_an_exit_code(place, arguments, code, words):
    done = run(place, *arguments.split())
    last = done.stdout.strip().splitlines()[-1]
    assert done.returncode == code and words in last, done.stderr or done.stdout
    assert "participation" in done.stdout and "samples" in done.stdout


def test_a_part_not_finite_and_the_rest_collapsed_is_collapsed(place):
    done = run(place, "nan and one point.npy")
    assert done.returncode == 3 and "The rest: COLLAPSED: all embeddings are equal" in done.stdout, done.stdout


@pytest.mark.parametrize("name", ["cats.csv", "named.csv", "z.csv", "plain.csv"])
def test_a_table_has_all_of_its_rows_named_or_not(place, name):
    done = run(place, name, "--labels", "labels.npy")
    samples, = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("samples")]
    assert samples == "400", done.stderr


@pytest.mark.parametrize("header", ["file", "", "Unnamed: 0", "id", "Label", "index"])
def test_a_column_of_row_numbers_or_labels_is_no_dimension(place, header):
    """As kernels.embed names the rows of arrays, and as pandas writes its index."""
    z = np.load(place / "z.npy")
    lines = [f"{k}," + ",".join(map(str, row)) for k, row in enumerate(z)]
    (place / "numbered.csv").write_text("\n".join([f"{header}," + ",".join(map(str, range(24))), *lines]) + "\n")
    done, plain = run(place, "numbered.csv"), run(place, "z.npy")
    assert done.returncode == 4 and done.stdout.splitlines()[1:] == plain.stdout.splitlines(), done.stdout
    assert f"numbered.csv: left out, as names or words: 1 columns ({header.lower()!r})" in done.stdout


def test_a_header_of_numbers_is_none_of_the_embeddings(place):
    """As pandas writes it without its index."""
    z = np.load(place / "z.npy")
    lines = [",".join(map(str, row)) for row in (range(24), *z)]
    (place / "numbers.csv").write_text("\n".join(lines) + "\n")
    done, plain = run(place, "numbers.csv"), run(place, "z.npy")
    assert done.stdout.splitlines()[1:] == plain.stdout.splitlines(), done.stdout
    assert "the first line, 0, 1, 2, ..., is taken as names" in done.stdout


@pytest.mark.parametrize("corner", ["", "filename", "path"])
def test_a_header_of_numbers_beside_names_is_none_of_the_embeddings(place, corner):
    """As pandas writes them with names as its index."""
    z = np.load(place / "z.npy")
    lines = [f"img{k}.png," + ",".join(map(str, row)) for k, row in enumerate(z)]
    (place / "indexed.csv").write_text("\n".join([f"{corner}," + ",".join(map(str, range(24))), *lines]) + "\n")
    done, plain = run(place, "indexed.csv"), run(place, "z.npy")
    assert done.stdout.splitlines()[2:] == plain.stdout.splitlines(), done.stdout
    assert "the first line, 0, 1, 2, ..., is taken as names" in done.stdout


@pytest.mark.parametrize("head, line", [
    (",path,{}", "{k},a b/{k}.png,{}"), ("path,split,{}", "{k}.png,train,{}"), ("{},path", "{},{k}.png"), ("path,{}", "{k}.png,{}")])
@pytest.mark.parametrize("first", [0, 1])
def test_a_header_of_numbers_beside_other_columns(place, head, line, first):
    z = np.load(place / "z.npy")
    lines = [head.format(",".join(str(k + first) for k in range(24)))]
    lines += [line.format(",".join(map(str, row)), k=k) for k, row in enumerate(z)]
    (place / "beside.csv").write_text("\n".join(lines) + "\n")
    found = dict(line.split()[:2] for line in run(place, "beside.csv").stdout.splitlines() if line.startswith(("samples", "width")))
    assert found == {"samples": "400", "width": "24"}


@pytest.mark.parametrize("row", [0, 7, 399])
@pytest.mark.parametrize("cell, words", [("", "holds an empty cell among its numbers"), ("n/a", "holds words among its numbers, as n/a")])
def test_a_cell_without_a_number_does_not_cost_its_column(place, row, cell, words):
    lines = (place / "plain.csv").read_text().splitlines()
    lines[row] = ",".join([cell, *lines[row].split(",")[1:]])
    (place / "gap.csv").write_text("\n".join([",".join(f"f{k}" for k in range(24)), *lines]) + "\n")
    done = run(place, "gap.csv")
    assert done.returncode == 2 and f"row {row + 1} {words}" in done.stderr, done.stderr or done.stdout


def test_images_without_a_label_and_rows_without_an_image(place):
    np.savez(place / "with names.npz", z=np.load(place / "rare.npy"), files=[f"{k}.png" for k in range(400)])
    rows = [f"{k}.png,{'rare' if k >= 390 else 'cat'}" for k in range(400)]
    (place / "t.csv").write_text("\n".join(["file,class", *rows, "zzz.png,cat"]) + "\n")
    done = run(place, "with names.npz", "--key", "z", "--labels", "t.csv")
    assert done.returncode == 3 and "note: 1 rows of t.csv name no embedding, as zzz.png" in done.stdout
    (place / "t.csv").write_text("\n".join(["file,class", "0.png,", *rows[1:]]) + "\n")
    done = run(place, "with names.npz", "--key", "z", "--labels", "t.csv")
    assert done.returncode == 2 and "t.csv has no label for 1 of 400 embeddings, as 0.png" in done.stderr
    done = run(place, "rare.npy", "--labels", "t.csv")
    assert done.returncode == 2 and "t.csv has no label in row 1: give each embedding one" in done.stderr


def test_a_folder_is_named_as_one(place):
    (place / "vicreg-1").mkdir()
    done = run(place, "vicreg-1")
    assert done.returncode == 2 and "vicreg-1 is a folder: give a file, as a run's features.npz" in done.stderr


@pytest.mark.parametrize("name, text", [
    ("l.txt", "label\n{}"), ("l.tsv", "y\n{}"), ("l.tsv", "file\tclass\n{}"), ("l.csv", "class\n{}")])
def test_files_of_labels(place, name, text):
    """A word with a comma in it is one word."""
    own = ["cat, brown"] * 390 + ["rare"] * 10
    rows = [f"{k}.png\t{label}" if "file" in text else label for k, label in enumerate(own)]
    (place / name).write_text(text.format("\n".join(rows) + "\n"))
    done = run(place, "rare.npy", "--labels", name)
    assert done.returncode == 3 and "1 of 2 classes (rare)" in done.stdout, done.stderr or done.stdout


@pytest.mark.parametrize("form", ["csv", "npz", "npy", "features.npz"])
@pytest.mark.parametrize("mark", [",", ";"])
def test_labels_of_a_table_go_by_the_names_of_files(place, form, mark):
    """Whatever the order of its rows."""
    z = np.load(place / "rare.npy")
    names = [f"sub/{k}.png" for k in range(len(z))]
    named = place / f"named rows.{form}"
    if form == "csv":
        rows = [f"{name}," + ",".join(map(str, row)) for name, row in zip(names, z)]
        named.write_text("\n".join(["file," + ",".join(map(str, range(24))), *rows]) + "\n")
    elif form == "npy":
        np.save(named, z)
        named.with_suffix(".txt").write_text("\n".join(names) + "\n")
    else:
        prefix = "test_" if form == "features.npz" else ""
        np.savez(named, **{f"{prefix}features": z, f"{prefix}files": names})
    order = np.random.default_rng(0).permutation(len(z))
    rows = [f"{names[k]}{mark}{'rare' if k >= 390 else 'cat'}" for k in order]
    (place / "by name.csv").write_text("\n".join([f"file{mark}class", *rows]) + "\n")
    done = run(place, named.name, "--labels", "by name.csv")
    assert done.returncode == 3 and "1 of 2 classes (rare)" in done.stdout, done.stderr or done.stdout
    (place / "by name.csv").write_text("\n".join([f"file{mark}class", *rows[1:]]) + "\n")
    done = run(place, named.name, "--labels", "by name.csv")
    assert done.returncode == 2 and "has no row for 1 of 400 embeddings, as sub/" in done.stderr


def test_labels_that_a_run_wrote_beside_its_features(place):
    np.savez(place / "run.npz", test_features=np.load(place / "rare.npy"), test_labels=[0] * 390 + [1] * 10, test_files=np.arange(400))
    assert run(place, "run.npz", "--labels", "run.npz").returncode == 3


@pytest.mark.parametrize("rows, words", [
    (["file,class", *(f"{k}.png,cat" for k in range(401))], "holds 401 labels for 400"),
    (["file,class", "a.png,cat", "a.png,dog"], "gives a.png two labels")])
def test_tables_that_are_not_of_these_embeddings(place, rows, words):
    z = np.load(place / "rare.npy")[:400]
    np.savez(place / "with names.npz", z=z, files=[f"a{k}.png" for k in range(400)])
    (place / "t.csv").write_text("\n".join(rows) + "\n")
    name = "with names.npz" if "two labels" in words else "rare.npy"
    done = run(place, name, "--key", "z", "--labels", "t.csv") if "names" in name else run(place, name, "--labels", "t.csv")
    assert done.returncode == 2 and words in done.stderr, done.stderr


def test_a_table_with_empty_rows_and_more_columns_than_words_and_another_systems_slashes(place):
    z = np.load(place / "rare.npy")
    np.savez(place / "with names.npz", z=z, files=[f"k/{k}.png" for k in range(400)])
    rows = [f"k\\{k}.png;{'rare' if k >= 390 else 'cat'}" for k in range(400)]
    (place / "t.csv").write_text("\n".join(["sep=;", "", 'file;class;"size, mm"', *reversed(rows), ";;", ";;"]) + "\n")
    done = run(place, "with names.npz", "--key", "z", "--labels", "t.csv")
    assert done.returncode == 3 and "1 of 2 classes (rare)" in done.stdout, done.stderr or done.stdout


def test_a_text_beside_embeddings_may_be_anything(place):
    np.save(place / "beside.npy", np.load(place / "rare.npy"))
    (place / "beside.txt").write_bytes("Gr\u00f6\u00dfe".encode("latin-1"))
    assert run(place, "beside.npy", "--labels", "labels.npy").returncode == 3
    (place / "t.csv").write_text("file,class\n" + "".join(f"{k},{'rare' if k >= 390 else 'cat'}\n" for k in range(400)))
    done = run(place, "beside.npy", "--labels", "t.csv")
    assert done.returncode == 3 and "rows are taken in their order" in done.stdout


@pytest.mark.parametrize("text, words", [
    ("cat\n" * 391 + "rare\n" * 10, "holds 401 labels for 400"),
    ("class\n" + "cat\n" * 389 + "rare\n" * 10, "holds 399 labels for 400"),
    ("class\n" + "cat\n" * 3 + "\n" + "cat\n" * 386 + "rare\n" * 10, ""),
    ("kind\n" + "cat\n" * 389 + "rare\n" * 10 + "\n", "has a line more than embeddings, and an empty last one"),
    ("kind\n" + "cat\n" * 390 + "rare\n" * 10 + "\n\n", "")])
def test_labels_of_one_column_are_not_off_by_one(place, text, words):
    """One too many, a name and one too few, an image without a label, empty lines at the end."""
    (place / "off.csv").write_text(text)
    done = run(place, "rare.npy", "--labels", "off.csv")
    assert done.returncode == (2 if words else 3) and words in done.stderr, done.stderr
    if not words:
        first, *_ = text.splitlines()
        assert f"off.csv: the first line, {first}, is taken as a name" in done.stdout
        assert "1 of 2 classes (rare)" in done.stdout         # of four rows at least, which the one without is not


def test_labels_that_lack_a_row_are_refused(place):
    (place / "l.csv").write_text("file,class\n" + "".join(f"{k}.png,cat\n" for k in range(399)))
    done = run(place, "rare.npy", "--labels", "l.csv")
    assert done.returncode == 2 and "l.csv holds 399 labels for 400" in done.stderr


def test_what_hides_all_others_is_left_out_and_the_rest_decides(place):
    z = 1 + 1e-3 * white()
    z[3], z[7, 0] = 1000 * white()[3], np.nan
    np.save(place / "both.npy", z)
    done = run(place, "both.npy")
    assert done.returncode == 3 and "NOT FINITE: 1 of 400" in done.stdout, done.stdout
    assert "The rest: OUTLIERS: 1 of 399 embeddings (rows 3)" in done.stdout and "The rest: COLLAPSED" in done.stdout


def test_x_and_y_are_a_plane_and_y_alone_labels(place):
    z = white(d=2)
    for header, width in (("x,y", 2), ("a,y", 1)):
        (place / "plane.csv").write_text(header + "\n" + "\n".join(",".join(map(str, row)) for row in z) + "\n")
        found, = [line.split()[1] for line in run(place, "plane.csv").stdout.splitlines() if line.startswith("width")]
        assert found == str(width)


@pytest.mark.parametrize("header, options", [("file,class", []), ("Label,group", []), ("group,kind", ["--labels-key", "kind"])])
def test_labels_of_a_table_of_several_columns(place, header, options):
    """The table that training takes by --labels, too."""
    own = ["cat"] * 390 + ["rare"] * 10
    rows = [",".join(label if head in ("class", "Label", "kind") else f"{k}.png" for head in header.split(","))
            for k, label in enumerate(own)]
    (place / "table.csv").write_text("\n".join([header, *rows]) + "\n")
    done = run(place, "rare.npy", "--labels", "table.csv", *options)
    assert done.returncode == 3 and "1 of 2 classes (rare)" in done.stdout, done.stderr or done.stdout
    (place / "table.csv").write_text("\n".join(["a,b", *rows]) + "\n")
    done = run(place, "rare.npy", "--labels", "table.csv")
    assert done.returncode == 2 and "has the columns a, b: say which are the labels, by --labels-key" in done.stderr


@pytest.mark.parametrize("name, mark", [("t.csv", ";"), ("comma.csv", ";"), ("t.TSV", "\t"), ("t.csv", "\t"), ("t.txt", " ")])
def test_tables_between_other_marks(place, name, mark):
    """As a spreadsheet with decimal commas and NumPy's savetxt write them."""
    text = "\n".join(mark.join(map(str, row)) for row in np.load(place / "z.npy")) + "\n"
    (place / name).write_text(text.replace(".", ",") if "comma" in name else text)
    assert run(place, name).stdout == run(place, "z.npy").stdout


@pytest.mark.parametrize("change, words", [
    (lambda lines: ["", *lines], ""), (lambda lines: [f"{line},a;b" for line in lines], ""),
    (lambda lines: [*lines[:-1], lines[-1].split(",")[0]], "is no table of rows of one length")])
def test_tables_with_an_empty_first_line_with_marks_in_words_and_cut_short(place, change, words):
    lines = [",".join(map(str, row)) for row in np.load(place / "z.npy")]
    (place / "odd.csv").write_text("\n".join(change(lines)) + "\n")
    done = run(place, "odd.csv")
    assert done.returncode == (2 if words else 4) and words in done.stderr, done.stderr


def test_mistakes_of_labels_name_their_file(place):
    np.save(place / "o.npy", np.array([{}, 1], dtype=object))
    done = run(place, "z.npy", "--labels", "o.npy")
    assert done.returncode == 2 and done.stderr.startswith("collapse: o.npy: it holds Python objects"), done.stderr
    done = run(place, "z.npy", "--labels", "labelled.npz", "--labels-key", "k")
    assert done.returncode == 2 and done.stderr.startswith("collapse: labelled.npz: "), done.stderr


def test_names_of_several_lines_are_cells_of_a_table(place):
    z = np.load(place / "z.npy")
    lines = [f'"a;{k}\r\n.png",' + ",".join(map(str, row)) for k, row in enumerate(z)]
    (place / "names.csv").write_text("\n".join(["file," + ",".join(map(str, range(24))), *lines]) + "\n", newline="")
    assert run(place, "names.csv").stdout.splitlines()[1:] == run(place, "z.npy").stdout.splitlines()


def table_of(z, head=None, mark=","):
    return "\n".join([*([head] if head is not None else []), *(mark.join(map(str, row)) for row in z)]) + "\n"


def as_r_writes(z, names):
    """A first line that is a cell shorter than the rows, which begin with their number."""
    return "\n".join([names, *(f'"{k + 1}",' + ",".join(map(str, row)) for k, row in enumerate(z))]) + "\n"


@pytest.mark.parametrize("name, text, words", [
    ("r.csv", lambda z: as_r_writes(z, ",".join(f'"V{k}"' for k in range(24))), "its first line names 24 columns, its rows have 25"),
    ("missing.csv", lambda z: table_of(z[:1]).replace(",", ",NA,", 1) + table_of(z[1:, [0, 0, *range(1, 24)]]),
     "row 1 holds words among its numbers"),
    ("empty.csv", lambda z: table_of(z[:1]).replace(",", ",,", 1) + table_of(z[1:, [0, 0, *range(1, 24)]]),
     "row 1 holds words among its numbers")])
def test_tables_whose_first_line_is_not_theirs_are_refused(place, name, text, words):
    (place / name).write_text(text(np.load(place / "z.npy")))
    done = run(place, name)
    assert done.returncode == 2 and words in done.stderr, done.stdout + done.stderr


@pytest.mark.parametrize("head", [",".join(map(str, [0, 1, *range(3, 25)])), ",".join(map(str, [*range(12)] * 2))])
def test_names_of_columns_may_have_gaps_and_be_there_twice(place, head):
    z = np.load(place / "z.npy")
    lines = [f"{k}.png," + ",".join(map(str, row)) for k, row in enumerate(z)]
    (place / "gaps.csv").write_text("\n".join([f"file,{head}", *lines]) + "\n")
    assert run(place, "gaps.csv").stdout.splitlines()[1:] == run(place, "z.npy").stdout.splitlines()


@pytest.mark.parametrize("name, head, mark", [
    ("sv.txt", "# embeddings of vicreg", " "), ("sv.csv", "# a,b", ","), ("excel.csv", "sep=;", ";")])
def test_what_stands_above_a_table_is_no_row_of_it(place, name, head, mark):
    (place / name).write_text(table_of(np.load(place / "z.npy"), head, mark))
    assert run(place, name).stdout == run(place, "z.npy").stdout


@pytest.mark.parametrize("odd", ["image_id", "patient", "image"])
def test_a_column_of_numbers_that_is_called_otherwise_is_no_dimension(place, odd):
    z = np.load(place / "z.npy")
    names = [f"0{k % 9 + 1}_0{k // 9 + 1}" if odd == "image" else str(k) for k in range(400)]
    lines = [",".join([odd, *(f"f{k}" for k in range(24))]), *(f"{name}," + ",".join(map(str, row)) for name, row in zip(names, z))]
    (place / "odd.csv").write_text("\n".join(lines) + "\n")
    done = run(place, "odd.csv")
    assert done.stdout.splitlines()[1:] == run(place, "z.npy").stdout.splitlines(), done.stdout
    said = "as names or words: 1 columns ('image')" if odd == "image" else f"since the others are called f0, f1, ...: {odd}"
    assert f"odd.csv: left out, {said}" in done.stdout
    (place / "plane.csv").write_text(table_of(z[:, :3], "x,y,frame"))
    assert "plane.csv: taken as dimensions: x, y, frame" in run(place, "plane.csv").stdout


@pytest.mark.parametrize("text", [
    '"class"\n' + "".join(f'"{k + 1}","cat"\n' for k in range(400)),
    '"file","class"\n' + "".join(f'"{k + 1}","{k}.png","cat"\n' for k in range(400))])
def test_labels_of_a_table_with_a_column_that_has_no_name_are_refused(place, text):
    (place / "l.csv").write_text(text)
    done = run(place, "rare.npy", "--labels", "l.csv")
    assert done.returncode == 2 and "its first line names" in done.stderr, done.stdout


@pytest.mark.parametrize("form", ["csv", "npz"])
def test_views_go_by_the_names_of_files(place, form):
    """Of loaders that shuffle."""
    z = np.load(place / "z.npy")
    files = [f"n{k}.{form}" for k in range(3)]
    for k, file in enumerate(files):
        order = np.random.default_rng(k).permutation(400)
        x = (z + .1 * white(seed=k))[order]
        if form == "npz":
            np.savez(place / file, features=x, files=order)
        else:
            lines = [f"{name}.png," + ",".join(map(str, row)) for name, row in zip(order, x)]
            (place / file).write_text("\n".join(["file," + ",".join(map(str, range(24))), *lines]) + "\n")
    done = run(place, files[0], "--views", *files[1:])
    assert done.returncode == 0 and "its rows are taken in the order of" in done.stdout, done.stdout
    np.savez(place / "a.npz", features=z + .1 * white(seed=1), files=[f"{k}_a" for k in range(400)])
    done = run(place, files[0], "--views", "a.npz", "a.npz")
    assert "note: a.npz names its images otherwise than" in done.stdout
    np.savez(place / "others.npz", features=z, files=np.arange(400) + 1)
    np.savez(place / "n.npz", features=z, files=np.arange(400))
    done = run(place, "n.npz", "--views", "n.npz", "others.npz")
    assert done.returncode == 2 and "others.npz names other images than n.npz" in done.stderr


def test_embeddings_before_training_are_of_the_same_images_and_network(place):
    np.save(place / "wide.npy", white(400, 48))
    np.save(place / "fewer.npy", white(50))
    for other in ("wide.npy", "fewer.npy"):
        done = run(place, "z.npy", "--before", other)
        assert done.returncode == 2 and f"--before {other} holds [" in done.stderr


def test_tensors_as_torch_saves_them(place):
    z = torch.from_numpy(np.load(place / "rare.npy"))
    torch.save(z.clone().requires_grad_(), place / "grad.pt")
    done = run(place, "grad.pt", "--out", "grad.png")
    assert done.returncode == 4 and (place / "grad.png").exists(), done.stderr
    y = torch.tensor([0] * 390 + [1] * 10)
    torch.save({"z": z, "y": y, "x": torch.zeros(7)}, place / "both.pt")
    for more in ([], ["--labels-key", "y"]):
        done = run(place, "both.pt", "--key", "z", "--labels", "both.pt", *more)
        assert done.returncode == 3 and "1 of 2 classes (1)" in done.stdout, done.stderr
    torch.save([z, z], place / "list.pt")
    torch.save({"z": z.to_sparse()}, place / "sparse.pt")
    torch.save({"z": z, "adjacent": z.to_sparse()}, place / "dense.pt")
    assert run(place, "dense.pt").returncode == 4
    for name, words in (("list.pt", "holds a list: save one tensor"), ("sparse.pt", "holds no dense tensor, but sparse ones: z: save")):
        done = run(place, name)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr) < 300, done.stderr
    done = run(place, "z.npy", "--labels-key", "y")
    assert done.returncode == 2 and "--labels-key is for --labels" in done.stderr


def test_which_of_several_arrays_is_taken(place):
    names = ["embeddings", "features", "z", "h", "test_features", "train_features"]
    arrays = {name: white(20, 5 + k) for k, name in enumerate(names)}
    for name in names:
        np.savez(place / "several.npz", **arrays, labels=np.arange(20), other=white(20, 40))
        assert run(place, "several.npz").stdout.splitlines()[0] == f"several.npz: {name}"
        del arrays[name]


def test_who_reads_may_go(place):
    done = subprocess.run(f"{sys.executable} -m kernels.collapse z.npy | true", shell=True, cwd=place, capture_output=True, text=True,
                          env={**ONE_THREAD, "PYTHONPATH": str(ROOT)})
    assert not done.stderr


def test_a_header_of_two_numbers_and_a_table_without_any(place):
    z = white(d=2)
    for first in ("", "0,1\n"):
        (place / "plane.csv").write_text(first + "\n".join(",".join(map(str, row)) for row in z) + "\n")
        found, = [line.split()[1] for line in run(place, "plane.csv").stdout.splitlines() if line.startswith("samples")]
        assert found == "400"
    (place / "odd.csv").write_text("0.1|2.3\n1.2|3.4\n0.2|2.1\n1.2|2.4\n")
    done = run(place, "odd.csv")
    assert done.returncode == 2 and "no column of numbers, as its cells are read, between blanks" in done.stderr


def test_the_verdict_stands_though_there_is_nothing_to_draw_or_nowhere_to(place):
    np.save(place / "none.npy", np.full((12, 5), np.nan))
    done = run(place, "none.npy", "--out", "none.png")
    assert done.returncode == 3 and "COLLAPSED: 12 of 12 embeddings are not finite" in done.stdout, done.stderr
    assert "no picture: fewer than two" in done.stdout and not (place / "none.png").exists()
    done = run(place, "line.npy", "--out", "nowhere/line.png")
    assert done.returncode == 2 and "DIMENSIONAL COLLAPSE" in done.stdout and "--out nowhere/line.png" in done.stderr


def test_an_error_names_the_file_that_has_it_and_objects_beside_embeddings_are_none(place):
    objects = np.array([{}, 1], dtype=object)
    np.save(place / "objects2.npy", objects)
    done = run(place, "z.npy", "--views", "z1.npy", "objects2.npy")
    assert done.returncode == 2 and done.stderr.startswith("collapse: objects2.npy: it holds Python objects"), done.stderr
    np.savez(place / "mixed.npz", embeddings=np.load(place / "z.npy"), ids=objects)
    assert run(place, "mixed.npz").returncode == 4
    np.savez(place / "files.npz", features=np.load(place / "z.npy"), test_files=np.arange(400))
    done = run(place, "files.npz", "--labels", "files.npz")
    assert done.returncode == 2 and "arrays of 400 (test_files): say which are the labels" in done.stderr


@pytest.mark.parametrize("name", ["z.npy", "line.npy", "nan.npy"])
def test_a_picture(place, name):
    done = run(place, name, "--out", "picture.png")
    assert "picture: picture.png" in done.stdout, done.stderr
    assert Image.open(place / "picture.png").size[0] > 1200


@pytest.mark.parametrize("arguments, words", [
    ("", "the following arguments are required: file"), ("nowhere.npy", "nowhere.npy"), ("z.h5", "z.h5 ends in .h5: give .npy"),
    ("two.npz", "two.npz holds a, b: say which are the embeddings, by --key"), ("two.npz --key c", "has no c, but a, b"),
    ("images.npy", "images.npy holds float32 [5, 8, 8]: embeddings are [N, D]"), ("objects.npy", "Python objects"),
    ("few.npy", "N >= 4"), ("broken.npz", "broken.npz"), ("words.csv", "words"),
    ("z.npy --views z1.npy few.npy", "views of the shape of z"), ("z.npy --labels few.npy", "holds 72 labels for 400"),
    ("z.npy --out x.jpeg", "its ending must be"), ("z.npy --before-views z1.npy z2.npy", "--before-views is for")])
def test_mistakes_end_in_one_line(place, arguments, words):
    done = run(place, *arguments.split())
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_a_mapped_million_is_read_in_parts(place):
    """The same as from memory; a slow test holds time and memory of a million rows."""
    np.save(place / "many.npy", white(9000, 8).astype(np.float16))
    done = run(place, "many.npy")
    assert done.returncode == 4 and "9,000" in done.stdout, done.stderr


MILLION = """
import resource, sys, time
sys.argv = ["collapse", "million.npy"]
started = time.monotonic()
from kernels.harness.instrument import main
try:
    main()
except SystemExit as end:
    print("code", end.code)
print(time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
def test_a_million_by_128_within_five_minutes_and_two_gigabytes(tmp_path):
    out = np.lib.format.open_memmap(tmp_path / "million.npy", "w+", np.float32, (1_000_000, 128))
    for first in range(0, 1_000_000, 10_000):
        out[first:first + 10_000] = white(10_000, 128, seed=first)
    out.flush()
    done = subprocess.run([sys.executable, "-c", MILLION], cwd=tmp_path, capture_output=True, text=True,
                          env={**ONE_THREAD, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)})
    *_, last = done.stdout.strip().splitlines()
    seconds, gigabytes = map(float, last.split())
    print(f"{seconds:.0f} s, {gigabytes:.2f} GB")
    assert "sample                      50,000" in done.stdout and "code 4" in done.stdout, done.stdout + done.stderr
    assert seconds < 300 and gigabytes < 2
