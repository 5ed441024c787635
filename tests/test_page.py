"""kernels/harness/page.py: what stands on browse.html, that names cannot do harm, that it asks for nothing else."""
import base64
import json
import re
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from kernels.harness import page
from kernels.harness.images import Data, limited
from scripts import SMALL, command

EVIL = ["</script><script>alert(1)</script>", "a\"b'c.png", "<b>&amp;.png", "\N{GRINNING FACE}/ü.png", "\udcff.png", "@DATA@",
        "a\u2028b.png"]


def data_of(path):
    text = Path(path).read_text()
    return text, json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)[1])


def sheet_of(text):
    place = re.search(r"url\('data:image/jpeg;base64,(.*?)'\)", text)[1]
    return np.asarray(Image.open(BytesIO(base64.b64decode(place)))).astype(float)


def thumbnail_of(sheet, row):
    top, left = [page.SIDE * number for number in divmod(row, page.COLUMNS)]
    return sheet[top:top + page.SIDE, left:left + page.SIDE]


def features(n, d=8, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def flat(rows):
    """Gray images, brighter by their number."""
    return (rows / 100).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)


def test_groups_have_the_most_central_first():
    h = features(300, 3)
    found = page.groups(h)
    assert len(found) == 5 and sum(map(len, found)) == 300 and found == sorted(found, key=lambda rows: -len(rows))
    unit = F.normalize(h)
    for rows in found:
        away = (unit[rows] - unit[rows].mean(0)).norm(dim=1)
        assert (away.diff() > -1e-3).all()
    assert len(page.groups(features(4))) == 1


def test_others_are_shown_at_random(monkeypatch):
    monkeypatch.setattr(page, "MOST", 30)
    rows = page.shown_rows([(1., 3, 4)], [7], 1000)
    assert len(rows) == 30 and {3, 4, 7} <= {*rows.tolist()} and rows.max() > 500


# ---- What is near what -------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [2, 5, 6, 300, 1100])
def test_nearest_is_that_of_all_cosines_without_the_row_itself(n):
    h = features(n)
    if n > 100:
        h[::7] = h[0]                                                # many equal ones, among which it is not its own
    cosines, rows = page.nearest(h)
    unit = F.normalize(h.double())
    every = unit @ unit.T
    every.fill_diagonal_(-2)
    k = min(5, n - 1)
    torch.testing.assert_close(cosines.double(), every.topk(k).values, rtol=0, atol=1e-6)
    torch.testing.assert_close(every.gather(1, rows), cosines.double(), rtol=0, atol=1e-6)
    assert (rows != torch.arange(n)[:, None]).all()
    assert all(len({*line}) == k for line in rows.tolist())


def test_duplicates_come_first_each_pair_once_and_the_odd_one_is_found():
    h = 1 + .3 * features(50)
    h[17] = h[3]
    h[40] = -h.mean(0)
    cosines, rows = page.nearest(h)
    (value, *first), *others = page.alike_pairs(cosines, rows)
    assert first == [3, 17] and value == pytest.approx(1, abs=1e-6)
    assert len({(one, other) for _, one, other in others}) == len(others) and all(one < other for _, one, other in others)
    assert [pair[0] for pair in others] == sorted((pair[0] for pair in others), reverse=True)
    assert page.odd_rows(cosines)[0] == 40


def test_groups_hold_each_row_once_the_largest_first():
    h = torch.cat([features(1, seed=k) + .01 * features(n, seed=9) for k, n in enumerate([60, 20, 20])])
    found = page.groups(h)
    assert sorted(sum(found, [])) == [*range(100)]
    assert [len(rows) for rows in found] == sorted(map(len, found), reverse=True)
    for rows in found:                                               # none holds rows of two of the clouds
        assert len({(row >= 60) + (row >= 80) for row in rows}) == 1
    assert page.groups(torch.ones(30, 4)) == [[*range(30)]] or sum(map(len, page.groups(torch.ones(30, 4)))) == 30


def test_of_many_images_the_alike_and_the_odd_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MOST", 200)
    h = 1 + .3 * features(1000)
    h[999] = h[500]
    h[7] = -h.mean(0)
    page.write_page(tmp_path / "browse.html", "many", flat, h, [f"{k}.png" for k in range(1000)])
    text, data = data_of(tmp_path / "browse.html")
    assert len(data["names"]) == 200 and {"999.png", "500.png", "7.png"} <= {*data["names"]}
    assert "200 of 1,000 images" in text
    one, other, _ = data["pairs"][0]
    assert {data["names"][one], data["names"][other]} == {"500.png", "999.png"}
    assert data["names"][data["odd"][0]] == "7.png"


def test_of_many_images_the_odd_ones_are_those_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MOST", 150)
    h = torch.cat([features(500), features(500) + .3 * features(500, seed=1)])      # each beside one that may not be shown
    page.write_page(tmp_path / "browse.html", "many", flat, h, [*range(1000)])
    text, data = data_of(tmp_path / "browse.html")
    assert [int(data["names"][place]) for place in data["odd"]] == page.odd_rows(page.nearest(h)[0])
    shown = torch.tensor([int(name) for name in data["names"]])
    cosines, rows = page.nearest(h[shown])
    assert data["near"] == rows.tolist() and np.allclose(data["cosines"], cosines.numpy(), atol=6e-5)
    assert "Click one to see the five of those shown whose features" in text


def test_where_all_are_shown_the_nearest_are_those_of_all(tmp_path):
    page.write_page(tmp_path / "browse.html", "few", flat, features(30), [*range(30)])
    text, _ = data_of(tmp_path / "browse.html")
    assert "Click one to see the five whose features" in text


def test_how_many_duplicates_there_are_beside_the_pairs_shown(tmp_path):
    h = features(120)
    h[60:] = h[:60]
    page.write_page(tmp_path / "browse.html", "", flat, h, [*range(120)])
    text, data = data_of(tmp_path / "browse.html")
    assert len(data["pairs"]) == 40 and (data["alike"], data["total"], data["bound"]) == ("120", "120", .999)
    assert "The ${data.pairs.length} pairs with the largest cosines" in text
    assert "${data.alike} of ${data.total} images have another at ${data.bound} or more" in text
    assert "The ${data.odd.length} of ${data.total} images whose nearest" in text


@pytest.mark.parametrize("shape, words", [((1, 8, 8), ""), ((7, 8, 8), "; of each is shown: mean of 7 channels"),
                                          ((4, 6, 8, 8), "; of each is shown: central slice along the first axis, "
                                           "channels 1 to 3 as RGB")])
def test_what_part_of_an_image_is_shown_is_said(tmp_path, shape, words):
    page.write_page(tmp_path / "browse.html", "", lambda rows: torch.ones(len(rows), *shape), features(8), [*range(8)])
    assert f"8 images{words}. Click one" in data_of(tmp_path / "browse.html")[0]


def test_a_class_without_a_name_is_said_to_be_empty(tmp_path):
    page.write_page(tmp_path / "browse.html", "", flat, features(4), [*range(4)], classes=np.array(["", "a", " ", "a"]))
    assert data_of(tmp_path / "browse.html")[1]["classes"] == ["(empty)", "a", "(empty)", "a"]


def test_a_table_has_the_columns_of_all_rows_and_empty_cells():
    text = page.table({"x": {"std": 1., "classes": 3, "names": [1]}, "y": {"std": 2., "view ratio": .5}})
    head, *rows = [re.findall("<t[hd]>(.*?)</t[hd]>", row) for row in re.findall("<tr>(.*?)</tr>", text)]
    assert head == ["", "std", "classes of 4 or more", "view ratio"]
    assert rows == [["x", "1", "3", ""], ["y", "2", "", "0.5"]]


# ---- The page ----------------------------------------------------------------------------------------------
def test_no_name_becomes_html_and_nothing_is_asked_for(tmp_path):
    n = len(EVIL)
    page.write_page(tmp_path / "browse.html", "<i>'title'</i> @DATA@", flat, features(n), EVIL, classes=EVIL, parts=EVIL,
                    lead="a < b & c", tables=[{"<u>": {"&": 1.}}])
    text, data = data_of(tmp_path / "browse.html")
    assert data["names"] == data["classes"] == data["parts"] == EVIL
    assert "alert(1)</script>" not in text and text.count("<script") == text.count("</script>") == 2
    assert "&lt;i&gt;" in text and "<i>" not in text and "a &lt; b &amp; c" in text and "<u>" not in text
    assert "default-src 'none'" in text and not re.search(r"https?:|//[a-z]|@import|<link|srcset", text)
    for address in re.findall(r"(?:src|href)\s*=\s*['\"]?([^'\" >]*)|url\('?([^')]*)", text):
        assert "".join(address).startswith("data:")
    assert "innerHTML" not in text and "document.write" not in text and "eval" not in text


def test_thumbnails_stand_where_the_page_looks_for_them(tmp_path):
    rows = torch.arange(90)
    page.write_page(tmp_path / "browse.html", "", flat, features(90), rows.tolist())
    text, data = data_of(tmp_path / "browse.html")
    sheet = sheet_of(text)
    assert sheet.shape == (page.SIDE * data["lines"], page.SIDE * data["columns"], 3) and data["lines"] == 3
    for row in (0, 39, 40, 89):
        assert np.abs(thumbnail_of(sheet, row) - 255 * row / 100).mean() < 2


@pytest.mark.parametrize("shape, inside", [((3, 10, 40), (16, 64)), ((1, 100, 50), (64, 32)), ((5, 8, 8), (64, 64)),
                                           ((1, 6, 20, 20), (64, 64))])
def test_a_thumbnail_keeps_its_sides_and_a_volume_shows_its_middle(shape, inside):
    x = torch.zeros(shape)
    if len(shape) == 4:
        x[:, 3] = 1
    else:
        x += 1
    shown = np.asarray(page.thumbnail(x)).astype(int)
    white = (shown > 250).all(2)
    assert (white.any(1).sum(), white.any(0).sum()) == inside
    assert (shown[~white] == 128).all()


def test_the_page_of_a_run_has_both_splits_in_order(tmp_path):
    data = Data(flat(torch.arange(30.)), torch.arange(30) % 2, flat(torch.arange(60., 70)), torch.arange(10) % 2,
                classes=["cat", "dog"], files=[f"{k}.png" for k in range(30)], test_files=[f"test/{k}.png" for k in range(10)])
    h = features(40)
    (tmp_path / "curves.png").write_bytes(page.base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="))
    findings = {"panels": {"z": {"std": 1.}}, "probes": {"raw pixels": {"k-NN": .5}}, "verdict": "No collapse: fine"}
    page.page_of_run(data, SimpleNamespace(h=h[:30], h_test=h[30:]), findings, tmp_path)
    text, data = data_of(tmp_path / "browse.html")
    assert data["names"][29:31] == ["29.png", "test/0.png"]
    assert data["classes"][:2] == ["cat", "dog"] and data["parts"] == ["train"] * 30 + ["test"] * 10
    assert "No collapse: fine" in text and "raw pixels" in text and "image/png;base64" in text
    sheet = sheet_of(text)
    for row, brightness in ((3, 3), (29, 29), (30, 60), (39, 69)):
        assert np.abs(thumbnail_of(sheet, row) - 255 * brightness / 100).mean() < 2
    cosines, rows = page.nearest(h)
    assert data["near"] == rows.tolist()
    assert np.allclose(data["cosines"], cosines.numpy(), atol=6e-5)


def test_the_page_of_a_large_run_says_of_how_many_images_its_own_are(tmp_path, monkeypatch):
    data = Data(flat(torch.arange(30.)), None, flat(torch.arange(60., 70)), None)
    monkeypatch.setattr(page, "limited", lambda data: limited(data, most=8))
    (tmp_path / "curves.png").write_bytes(b"")
    findings = {"panels": {"z": {"std": 1.}}, "verdict": "No collapse: fine."}
    page.page_of_run(data, SimpleNamespace(h=features(8), h_test=features(8)), findings, tmp_path)
    text, shown = data_of(tmp_path / "browse.html")
    assert "No collapse: fine. Looked at are 16 of the 40 images, drawn at random." in text and len(shown["names"]) == 16


@command(f"{SMALL} --epochs 1")
def test_a_run_writes_it(run):
    text, data = data_of(run.out() / "browse.html")
    with run.features() as found:
        assert data["names"] == [str(row) for row in [*found["train_files"], *found["test_files"]]]
        assert data["classes"] == [str(label) for label in [*found["train_labels"], *found["test_labels"]]]
    assert data["parts"] == ["train"] * 40 + ["test"] * 12
