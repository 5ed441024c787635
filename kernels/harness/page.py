"""browse.html: images by what an encoder makes of them, in one file that needs neither server nor network.

    write_page(path, "stamps", load, h, names)       # load(rows) -> those images, float [n, C, *S] in [0, 1]

The most alike pairs come first, then groups by k-means, then what is farthest from all; a click shows an
image's nearest five with their cosines. Of more than 2,000 images a part is shown: alike and odd are those of
all, groups and the nearest five those of the images shown. Needs scikit-learn and Pillow beside torch.
"""
import base64
import html
import json
import re
import warnings
from io import BytesIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.cluster import KMeans

from .. import bank_topk
from .files import atomic_write_text
from .images import fixed_order, limited, names_of, pixels
from .pictures import part_shown, picture

SIDE = 64                                                # of a thumbnail, pixels
COLUMNS = 40                                             # of the sheet that holds them all
MOST = 2000                                              # thumbnails
PAIRS, ODD = 40, 24
ALIKE = 0.999                                            # a cosine of (near-)duplicates
HEADINGS = {"classes": "classes of 4 or more"}           # of columns whose name says too little here


# ---- What is near what -------------------------------------------------------------------------------------
def nearest(h, k=5):
    """The k nearest other rows of each of h [N, E] by cosine, the nearest first: cosines, rows [N, k]."""
    unit = F.normalize(h.float())
    k = min(k, len(h) - 1)
    cosines, rows = [], []
    for part in torch.arange(len(h)).split(512):
        values, found = bank_topk(unit[part], unit, k + 1)
        own = found == part[:, None]
        own[~own.any(1), k] = True                       # among equal ones it may not be found
        cosines.append(values[~own].view(-1, k))
        rows.append(found[~own].view(-1, k))
    return torch.cat(cosines).clamp(-1, 1), torch.cat(rows)


def alike_pairs(cosines, rows):
    """[(cosine, row, row)] of what nearest() gives, each pair once, the most alike first."""
    best = {}
    count = rows.shape[1]
    own = torch.arange(len(rows)).repeat_interleave(count)
    for row, other, value in zip(own.tolist(), rows.flatten().tolist(), cosines.flatten().tolist()):
        pair = min(row, other), max(row, other)
        best[pair] = value
    pairs = [(value, *pair) for pair, value in best.items()]
    pairs.sort(key=lambda pair: (-pair[0], pair[1:]))
    return pairs[:PAIRS]


def odd_rows(cosines):
    """Rows whose nearest others are the farthest away, the oddest first."""
    return cosines.mean(1).argsort(stable=True)[:ODD].tolist()


def groups(h):
    """k-means on unit features [n, E]: lists of rows, the largest group first, in each the most central."""
    unit = F.normalize(h.float()).numpy()
    count = max(1, min(20, round((len(h) / 10) ** 0.5)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                  # fewer distinct points than groups
        found = KMeans(count, n_init=2, random_state=0).fit(unit)
    away = np.linalg.norm(unit - found.cluster_centers_[found.labels_], axis=1)
    members = []
    for group in range(count):
        rows = np.flatnonzero(found.labels_ == group)
        order = away[rows].argsort(kind="stable")
        members.append(rows[order].tolist())
    members.sort(key=lambda rows: (-len(rows), rows))
    return [rows for rows in members if rows]


def shown_rows(pairs, odd, count):
    """Rows that the page shows, in order: all, or those of these pairs, the odd ones and others at random."""
    chosen = []
    for _, one, other in pairs:
        chosen += [one, other]
    chosen += odd
    chosen += fixed_order(count).tolist()
    once = [*dict.fromkeys(chosen)]
    return torch.tensor(once[:MOST]).sort().values


# ---- Thumbnails --------------------------------------------------------------------------------------------
def thumbnail(x):
    """[C, *S] in [0, 1] -> a Pillow image of SIDE x SIDE, within a border if it is not square."""
    image = Image.fromarray((picture(x) * 255).round().astype(np.uint8))
    scale = SIDE / max(image.size)
    size = [max(1, round(side * scale)) for side in image.size]
    filtered = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    image = image.resize(size, filtered)
    framed = Image.new("RGB", (SIDE, SIDE), "gray")
    left, top = [(SIDE - side) // 2 for side in size]
    framed.paste(image, (left, top))
    return framed


def sheet(load, rows):
    """All thumbnails on one sheet, row by row: (address that holds it, how many rows)."""
    lines = -(-len(rows) // COLUMNS)
    whole = Image.new("RGB", (SIDE * COLUMNS, SIDE * lines), "gray")
    for part in torch.arange(len(rows)).split(256):
        for place, x in zip(part.tolist(), load(rows[part])):
            line, column = divmod(place, COLUMNS)
            whole.paste(thumbnail(x), (SIDE * column, SIDE * line))
    file = BytesIO()
    whole.save(file, "jpeg", quality=80)
    return address("jpeg", file.getvalue()), lines


def address(kind, data):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


# ---- The page ----------------------------------------------------------------------------------------------
def table(rows):
    """{row: {column: number}} as HTML; a cell is empty where its row does not have that column."""
    cells = [cell for row in rows.values() for cell in row.items()]
    columns = [*dict.fromkeys(name for name, value in cells if not isinstance(value, list))]
    head = "".join(f"<th>{html.escape(HEADINGS.get(name, name))}</th>" for name in columns)
    lines = [f"<tr><th></th>{head}</tr>"]
    for name, row in rows.items():
        numbers = [f"{row[column]:.4g}" if column in row else "" for column in columns]
        cells = "".join(f"<td>{number}</td>" for number in numbers)
        lines.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
    return f"<div class='wide'><table>{''.join(lines)}</table></div>"


def write_page(path, title, load, h, names, classes=None, parts=None, lead="", tables=(), pictures=()):
    """Writes the page of images whose features are h [N, E], N >= 2, on the CPU.

    names, classes, parts   of each image: its file or number, and, if there are any, its class and its split
    lead, tables, pictures  a sentence, {row: {column: number}} each, and PNG files, shown above the images
    """
    cosines, near = nearest(h)
    pairs, odd = alike_pairs(cosines, near), odd_rows(cosines)
    alike = int((cosines[:, 0] >= ALIKE).sum())
    rows = shown_rows(pairs, odd, len(h))
    own = h[rows]
    place_of = {row: place for place, row in enumerate(rows.tolist())}
    if len(rows) < len(h):
        cosines, near = nearest(own)
    place, lines = sheet(load, rows)

    def of_shown(words):
        if words is None:
            return None
        chosen = [str(words[row]) for row in rows]
        return [word if word.strip() else "(empty)" for word in chosen]

    data = {
        "names": of_shown(names),
        "classes": of_shown(classes),
        "parts": of_shown(parts),
        "near": near.tolist(),
        "cosines": cosines.double().round(decimals=4).tolist(),
        "pairs": [[place_of[one], place_of[other], value] for value, one, other in pairs],
        "groups": groups(own),
        "odd": [place_of[row] for row in odd],
        "total": f"{len(h):,}",
        "alike": f"{alike:,}",
        "bound": ALIKE,
        "side": SIDE,
        "columns": COLUMNS,
        "lines": lines}
    # Names come from files: in a script "<" could end it, and strange letters are escaped by json.
    text = json.dumps(data).replace("<", "\\u003c")
    count, five = f"{len(h):,} images", "five"
    if len(rows) < len(h):
        count = f"{len(rows):,} of {count}: the most alike, the odd ones and others at random"
        five = "five of those shown"
    first, *_ = load(rows[:1])
    part = part_shown(*first.shape)
    if part:
        count += f"; of each is shown: {part}"
    figures = ""
    for file in pictures:
        shown = address("png", file.read_bytes())
        figures += f"<figure><img alt='{file.stem}' src='{shown}'></figure>"
    values = {
        "TITLE": html.escape(str(title)),
        "LEAD": html.escape(lead),
        "COUNT": count,
        "FIVE": five,
        "TABLES": "".join(map(table, tables)),
        "FIGURES": figures,
        "SHEET": place,
        "DATA": text}
    page = re.sub("@([A-Z]+)@", lambda found: values[found[1]], PAGE)
    atomic_write_text(path, page)


def page_of_run(data, found, findings, folder):
    """browse.html of a run: found as examine() gives it, of limited(data); findings as in report.json."""
    lead = findings["verdict"]
    everything = len(data.images) + len(data.test_images)
    data = limited(data)
    files, test_files = names_of(data)
    count = len(files)
    seen = count + len(test_files)
    if seen < everything:
        lead += f" Looked at are {seen:,} of the {everything:,} images, drawn at random."

    def load(rows):
        first, second = rows[rows < count], rows[rows >= count] - count
        x = pixels(data.images, first)
        x_test = pixels(data.test_images, second)
        return torch.cat([x, x_test])                    # rows are in order

    classes = None
    if data.labels is not None:
        labels = torch.cat([data.labels, data.test_labels])
        classes = np.array(data.classes)[labels]
    parts = ["train"] * count + ["test"] * len(test_files)
    tables = [findings["panels"]]
    if data.labels is not None:
        tables.insert(0, findings["probes"])
    h = torch.cat([found.h, found.h_test])
    names = [*files, *test_files]
    pictures = [folder / "curves.png"]
    write_page(folder / "browse.html", folder, load, h, names, classes, parts, lead, tables, pictures)


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>@TITLE@</title>
<style>
:root { color-scheme: light dark; --line: #8885; --faint: #666; --mark: #b45309 }
@media (prefers-color-scheme: dark) { :root { --faint: #999; --mark: #f59e0b } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0; display: grid; grid-template-columns: 1fr 300px }
main { padding: 1.2rem 1.6rem; min-width: 0 }
h1 { font-size: 1.3rem; margin: 0 } h2 { font-size: 1.05rem; margin: 1.8rem 0 .2rem }
p { margin: .3rem 0; max-width: 60rem } .faint { color: var(--faint); font-size: .85rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem; margin: .8rem 0 }
th, td { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid var(--line); font-weight: normal }
th:first-child { text-align: left; white-space: nowrap } td { font-variant-numeric: tabular-nums }
figure { margin: .8rem 0 } figure img { max-width: 100%; background: white; border-radius: 4px }
.images { display: flex; flex-wrap: wrap; gap: 3px; margin: .5rem 0 }
.image { width: 64px; height: 64px; border: 0; padding: 0; border-radius: 3px; cursor: pointer; flex: none;
 background-image: url('@SHEET@'); background-size: var(--width) var(--height) }
.image:focus-visible, .image.chosen { outline: 3px solid var(--mark); outline-offset: -1px }
.pairs { gap: .8rem } .pair { font-size: .8rem; text-align: center } .pair div { display: flex; gap: 2px }
aside { position: sticky; top: 0; height: 100vh; overflow: auto; box-sizing: border-box; padding: 1.2rem;
 border-left: 1px solid var(--line) }
aside .image { width: 192px; height: 192px; cursor: default; background-size: calc(3 * var(--width))
 calc(3 * var(--height)) }
aside li { display: flex; gap: .6rem; margin: .4rem 0; align-items: center }
aside ol { list-style: none; padding: 0 } aside li .image { width: 64px; height: 64px; cursor: pointer;
 background-size: var(--width) var(--height) }
.name { overflow-wrap: anywhere; font-size: .85rem } .other { color: var(--mark) }
@media (max-width: 800px) { body { display: block } aside { position: static; height: auto; border: 0 } }
</style>
<main>
<h1>@TITLE@</h1>
<p>@LEAD@</p>
<p class="faint">@COUNT@. Click one to see the @FIVE@ whose features have the largest cosine with its own.</p>
@TABLES@
@FIGURES@
<noscript><p>A script in this file puts the images in place; this browser does not run it.</p></noscript>
</main>
<aside id="chosen"><p class="faint">Click an image.</p></aside>
<script id="data" type="application/json">@DATA@</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const main = document.querySelector("main"), aside = document.getElementById("chosen");
const root = document.documentElement.style;
root.setProperty("--width", data.side * data.columns + "px");
root.setProperty("--height", data.side * data.lines + "px");

// Names are set as text, never as HTML.
function add(parent, tag, text, kind) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (kind) element.className = kind;
  return parent.appendChild(element);
}
function about(row) {
  return [data.classes && data.classes[row], data.parts && data.parts[row]].filter(Boolean).join(" · ");
}
function image(parent, row, times = 1) {
  const element = add(parent, "button", undefined, "image");
  const x = data.side * (row % data.columns), y = data.side * Math.floor(row / data.columns);
  element.style.backgroundPosition = -times * x + "px " + -times * y + "px";
  element.title = data.names[row];
  element.setAttribute("aria-label", data.names[row]);
  element.dataset.row = row;
  element.onclick = () => choose(row);
  return element;
}
function choose(row) {
  for (const one of document.querySelectorAll(".chosen")) one.classList.remove("chosen");
  for (const one of main.querySelectorAll(`[data-row="${row}"]`)) one.classList.add("chosen");
  aside.replaceChildren();
  image(aside, row, 3);
  add(aside, "p", data.names[row], "name");
  add(aside, "p", about(row), "faint");
  add(aside, "p", "nearest, with cosines", "faint");
  const list = add(aside, "ol");
  data.near[row].forEach((other, k) => {
    const line = add(list, "li");
    image(line, other);
    const words = add(line, "div");
    add(words, "div", data.cosines[row][k].toFixed(4));
    add(words, "div", data.names[other], "name");
    const differs = data.classes && data.classes[other] !== data.classes[row];
    add(words, "div", about(other), differs ? "other faint" : "faint");
  });
  history.replaceState(null, "", "#" + row);
}
function section(title, words) {
  add(main, "h2", title);
  add(main, "p", words, "faint");
  return add(main, "div", undefined, "images");
}
const pairs = section("Most alike", `The ${data.pairs.length} pairs with the largest cosines, each of an ` +
  "image and one of its nearest five: (near-)duplicates, if there are any. " +
  `${data.alike} of ${data.total} images have another at ${data.bound} or more.`);
pairs.classList.add("pairs");
for (const [one, other, cosine] of data.pairs) {
  const pair = add(pairs, "div", undefined, "pair");
  const both = add(pair, "div");
  image(both, one);
  image(both, other);
  add(pair, "span", cosine.toFixed(4));
}
data.groups.forEach((rows, k) => {
  let words = `${rows.length} images, the most central first`;
  if (data.classes) {
    const counts = Object.create(null);                  // a class may be named constructor
    for (const row of rows) counts[data.classes[row]] = (counts[data.classes[row]] || 0) + 1;
    const most = Object.entries(counts).sort((a, b) => b[1] - a[1]).slice(0, 3);
    const shares = most.map(([name, count]) => [name, Math.round(100 * count / rows.length)]);
    const seen = shares.filter(([, share]) => share).map(([name, share]) => `${share} % ${name}`);
    words += "; " + seen.join(", ");
  }
  const images = section(`Group ${k + 1}`, words);
  for (const row of rows) image(images, row);
});
const odd = section("Farthest from all", `The ${data.odd.length} of ${data.total} images whose nearest ` +
  "five have the smallest mean cosine, the oddest first.");
for (const row of data.odd) image(odd, row);
choose(+location.hash.slice(1) in data.names ? +location.hash.slice(1) : 0);
</script>
"""
