"""The pages' tables, made again: each has its command in a comment above it, and must say what the command prints.
So must blocks of a command's output. Where it trains, one run is drawn at random and held to its row, and tables that
compare runs are passed over; or all are made.

    python -m pytest -m slow tests/test_numbers.py                       # less than an hour
    python -m pytest -m slow tests/test_numbers.py --every-run           # half a day; goes on where it stopped, in runs/
    python -m tests.test_numbers WORD                                    # writes tables whose command has WORD
"""
import builtins
import collections
import dis
import functools
import itertools
import math
import os
import re
import shlex
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "kernels").rglob("*.md")), *sorted((ROOT / "tests").rglob("*.md"))]
TABLE = re.compile(r"^<!-- (python .+?) -->\n\n?((?:\|.*\n)+|(?:    .*\n)+)", re.M)
NUMBER = re.compile(r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?")
TRAINS = re.compile("tests/experiments/(?!free_features|verdicts)")
FETCHED = "fashion-mnist", "mri.npz", "runs/fashion/fashion.npz"     # for tables of data that are not in the repository
NAMES = {"run", "method", "batch", "codes", "else", "views", "R, batch", "training images", "raw: k-NN",
         "images, R", "images", "visits", "encoder", "IConE less", "loss", "whose"}      # of rows


def missing(command):
    """What a command reads and is not there."""
    return [name for name in FETCHED if name in command and not (ROOT / name).exists()]


def tables(text):
    """[(command, table)] of a page."""
    return TABLE.findall(text.replace("\u00a0", " "))              # in tables "0.5 ± 0.1" and "3 ms" do not break


@functools.cache
def output(command):
    """The lines that it prints; a command with several tables runs once."""
    words = shlex.split(command)
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()


def printed(lines, stated):
    """The table with the header of the stated one, or the block with its first line, among lines; None if there is none."""
    first, *rest = stated.splitlines()
    indent = "" if first.startswith("|") else "    "
    for start, line in enumerate(lines):
        if indent + line == first:
            end = start + 1
            if indent:
                end += len(rest)
            while not indent and end < len(lines) and lines[end].startswith("|"):
                end += 1
            return "".join(f"{indent}{line}\n" for line in lines[start:end])
    return None


def cells(row):
    """Of a row of a table; of a line of output, the line."""
    if not row.startswith("|"):
        return [" ".join(row.split())]
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def agree(stated, found):
    """Whether two cells say the same: text to the letter; means within three stds of both, .02 at least; one run within
    five stds of the mean, where by Student's t nineteen of twenty fall about a mean and std of three; times within a
    factor of 3, since one machine's own differ by 2 from day to day; their ratios within 2; other numbers within .02 or
    three tenths."""
    stds = 3
    if "±" in stated and "±" not in found:
        found += " ± 0"
        stds = 5
    if NUMBER.sub("", stated) != NUMBER.sub("", found):
        return False
    ours, theirs = ([float(number.replace(",", "")) for number in NUMBER.findall(cell)] for cell in (stated, found))
    if "±" in stated:
        rounding = 10. ** -len(stated.split(" ")[0].partition(".")[2])
        return abs(ours[0] - theirs[0]) <= max(.02, rounding + stds * math.hypot(ours[1], theirs[1]))
    share = 2 / 3 if stated.endswith((" s", "ms")) else .5 if stated.endswith("x") else .3
    return all(abs(a - b) <= max(.02, share * max(abs(a), abs(b))) for a, b in zip(ours, theirs))


def differences(stated, found):
    """Cells of two tables, or lines of two blocks, that do not agree, as text."""
    wrong = []
    a, b = stated.splitlines(), found.splitlines()
    if len(a) != len(b):
        wrong.append(f"{len(a)} lines, {len(b)} printed")
    for mine, its in zip(a[1:], b[1:]):
        for name, one, other in zip(cells(a[0]), cells(mine), cells(its)):
            if not agree(one, other):
                wrong.append(f"{cells(mine)[0]}, {name}: the page has {one}, found {other}")
    return wrong


def rows(table):
    """{first cells, which name it: {column: cell}} of a table."""
    header, _, *lines = map(cells, table.splitlines())
    count = len([*itertools.takewhile(NAMES.__contains__, header)])
    return {tuple(line[:count]): dict(zip(header, line)) for line in lines}


def differences_of_drawn(stated, found):
    """As differences(), of the rows that `found` has. Where a row states spreads they are what one run is held to, and of
    cells without one the words."""
    wrong = []
    for name, its in rows(found).items():
        mine = rows(stated).get(name)
        if not mine:
            wrong.append(f"the page has no row {', '.join(name)}")
            continue
        for column, cell in its.items():
            held = "±" in mine[column] or "±" not in "".join(mine.values())
            if cell and not (agree(mine[column], cell) if held else NUMBER.sub("", mine[column]) == NUMBER.sub("", cell)):
                wrong.append(f"{', '.join(name)}, {column}: the page has {mine[column]}, one run {cell}")
    return wrong


def test_tables_that_differ_beyond_their_spread_are_told_apart():
    table = "| a | k-NN | s |\n|---|---|---|\n| x, `--y 3` | 0.900 ± 0.010 | 10 |\n"
    assert agree("10.0 ms", "18.0 ms") and not agree("10.0 ms", "31.0 ms") and not agree("1.9x", "0.9x")
    assert not differences(table, table.replace("0.900 ± 0.010", "0.930 ± 0.002").replace(" 10 ", " 12 "))
    assert len(differences(table, table.replace("0.900", "0.960"))) == 1
    assert len(differences(table, table.replace(" 10 ", " 15 "))) == 1
    assert len(differences(table, table.replace("x,", "z,"))) == 1
    assert len(differences(table, table + "| more | 1 | 1 |\n")) == 1
    assert agree("0.900 ± 0.010", "0.945") and not agree("0.900 ± 0.010", "0.955")
    assert agree("16 ± 0", "17") and not agree("16 ± 0", "18")
    block = "    what       theory    apart\n    a rate     0.25      1e-13\n"
    assert not differences(block, block.replace("1e-13", "4e-13").replace("0.25", "0.26"))
    assert len(differences(block, block.replace("1e-13", "0.13"))) == 1


def test_a_drawn_run_is_held_to_its_row():
    table = ("| run | seeds | k-NN | AMI | verdict |\n|---|---|---|---|---|\n| a | 3 | 0.900 ± 0.010 | 0.50 | healthy 3 of 3 |\n"
             "| b | 1 | 0.800 | 0.50 | healthy 1 of 1 |\n")
    header = table[:table.index("| a")]
    assert not differences_of_drawn(table, header + "| a | 1 | 0.910 | 0.90 | healthy 1 of 1 |\n")
    assert len(differences_of_drawn(table, header + "| a | 1 | 0.960 | 0.50 | collapsed 1 of 1 |\n")) == 2
    assert not differences_of_drawn(table, header + "| b | 1 | 0.800 | 0.51 | healthy 1 of 1 |\n")
    assert len(differences_of_drawn(table, header + "| b | 1 | 0.500 | 0.90 | healthy 1 of 1 |\n")) == 2


def codes_of(code):
    """A code object and those within it."""
    yield code
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from codes_of(part)


@pytest.mark.parametrize("folder", [".", "kernels", "kernels/harness", "tests", "tests/experiments"])
def test_every_name_is_one_that_its_file_has(folder):
    """Of experiments above all, which hardly anything runs: one could not start for want of an import."""
    for file in (ROOT / folder).glob("*.py"):
        steps = [step for code in codes_of(compile(file.read_text(), file, "exec")) for step in dis.get_instructions(code)]
        named = {step.argval for step in steps if step.opname in ("STORE_NAME", "STORE_GLOBAL")}
        used = {step.argval for step in steps if step.opname in ("LOAD_NAME", "LOAD_GLOBAL")}
        assert not used - named - {*dir(builtins), "__file__", "__annotations__"}, file


@pytest.fixture(scope="session")
def lines_of(request, tmp_path_factory):
    """Function command -> lines that it prints. All that train are run at the start, a core each."""
    chosen = {item.callspec.params["command"] for item in request.session.items
              if item.path == Path(__file__) and hasattr(item, "callspec")}
    chosen = {command for command in chosen if not missing(command)}
    trained = sorted((command for command in chosen if TRAINS.search(command)),
                     key=lambda command: "digits3d" not in command and "glyphs" not in command)      # the longest first
    if not (ROOT / "glyphs.npz").exists() and any("glyphs" in command or "views" in command or "long_tail" in command
                                                  for command in trained):
        output("python tests/experiments/glyphs.py --out glyphs.npz")
    if request.config.getoption("every_run"):
        return output
    folder = tmp_path_factory.mktemp("drawn")
    drawn = {command: f"{command} --draw 1 --jobs 1 --out {folder / str(k)}" for k, command in enumerate(trained)}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for command in trained:
            if "cost.py" not in command:                                 # which takes times
                pool.submit(output, drawn[command])                      # is cached, or fails again in its test
    return lambda command: output(drawn.get(command, command))


def each_table():
    """Of each table of each page page, command and table; the name says which of the command's on the page it is."""
    for page in PAGES:
        name, count = page.relative_to(ROOT), collections.Counter()
        for command, table in tables(page.read_text()):
            count[command] += 1
            short = re.sub(r"^python (-m |tests/experiments/)?", "", command)
            yield pytest.param(name, command, table, id=f"{name}: {short}, table {count[command]}")


@pytest.mark.slow
@pytest.mark.parametrize("page, command, table", [*each_table()])
def test_page_states_what_the_command_prints(page, command, table, lines_of, request):
    if missing(command):
        pytest.skip(f"put the data into {', '.join(missing(command))}: see tests/experiments/fashion.md and mri.py")
    drawn = TRAINS.search(command) and not request.config.getoption("every_run")
    if drawn and () in rows(table):
        pytest.skip("compares runs with each other: --every-run")
    found = printed(lines_of(command), table)
    assert found, f"{command} does not print it"
    wrong = (differences_of_drawn if drawn else differences)(table, found)
    assert not wrong, "\n".join(wrong)
    assert not drawn or rows(found), f"{command} prints no row"


def unbroken(row):
    """A row of a table whose "0.5 ± 0.1" and "3 ms" do not break; the former may where there are too many of it."""
    if sum(" ± " in cell for cell in row.split("|")) <= 6:
        row = row.replace(" ± ", "\u00a0±\u00a0")
    return row.replace(" ms", "\u00a0ms")


if __name__ == "__main__":
    for page in PAGES:
        text = page.read_text().replace("\u00a0", " ")
        for command, table in tables(text):
            if sys.argv[1] in command:
                print(page.relative_to(ROOT), command)
                text = text.replace(table, printed(output(command), table))
        page.write_text(re.sub(r"^\|.*", lambda row: unbroken(row[0]), text, flags=re.M))
