"""README's tables, made again: each has its command in a comment above it, and must say what the command prints.
So must blocks of a command's output.

    python -m pytest -m slow tests/test_numbers.py                       # hours; experiments go on where they stopped, in runs/
    python -m tests.test_numbers WORD                                    # writes the tables whose command has WORD
"""
import functools
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TABLE = re.compile(r"^<!-- (python .+?) -->\n\n?((?:\|.*\n)+|(?:    .*\n)+)", re.M)
NUMBER = re.compile(r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?")


def tables(text):
    """[(command, table)] of a README."""
    return TABLE.findall(text.replace("\u00a0", " "))              # in tables "0.5 ± 0.1" and "3 ms" do not break


@functools.cache
def output(command):
    """The lines that it prints; a command with several tables in README runs once."""
    words = shlex.split(command)
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()


def printed(command, stated):
    """The table with the header of the stated one, or the block with its first line, among what a command prints."""
    lines = output(command)
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
    raise AssertionError(f"{command} does not print {first}")


def cells(row):
    """Of a row of a table; of a line of output, the line."""
    if not row.startswith("|"):
        return [" ".join(row.split())]
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def agree(stated, found):
    """Whether two cells say the same: text to the letter; means within three stds of both, .02 at least; times and
    their ratios, which are another machine's, within a factor of 2; other numbers within .02 or three tenths."""
    if NUMBER.sub("", stated) != NUMBER.sub("", found):
        return False
    ours, theirs = ([float(number.replace(",", "")) for number in NUMBER.findall(cell)] for cell in (stated, found))
    if "±" in stated:
        return abs(ours[0] - theirs[0]) <= max(.02, 3 * math.hypot(ours[1], theirs[1]))
    share = .5 if stated.endswith((" s", "ms", "x")) else .3
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
                wrong.append(f"{cells(mine)[0]}, {name}: README has {one}, found {other}")
    return wrong


def test_tables_that_differ_beyond_their_spread_are_told_apart():
    table = "| a | k-NN | s |\n|---|---|---|\n| x, `--y 3` | 0.900 ± 0.010 | 10 |\n"
    assert agree("10.0 ms", "18.0 ms") and not agree("10.0 ms", "21.0 ms") and not agree("1.9x", "0.9x")
    assert not differences(table, table.replace("0.900 ± 0.010", "0.930 ± 0.002").replace(" 10 ", " 12 "))
    assert len(differences(table, table.replace("0.900", "0.960"))) == 1
    assert len(differences(table, table.replace(" 10 ", " 15 "))) == 1
    assert len(differences(table, table.replace("x,", "z,"))) == 1
    assert len(differences(table, table + "| more | 1 | 1 |\n")) == 1
    block = "    what       theory    apart\n    a rate     0.25      1e-13\n"
    assert not differences(block, block.replace("1e-13", "4e-13").replace("0.25", "0.26"))
    assert len(differences(block, block.replace("1e-13", "0.13"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("command, table", tables(README.read_text()))
def test_readme_states_what_the_command_prints(command, table):
    wrong = differences(table, printed(command, table))
    assert not wrong, "\n".join(wrong)


if __name__ == "__main__":
    text = README.read_text().replace("\u00a0", " ")
    for command, table in tables(text):
        if sys.argv[1] in command:
            print(command)
            text = text.replace(table, printed(command, table))
    text = re.sub(r"^\|.*", lambda row: row[0].replace(" ± ", "\u00a0±\u00a0").replace(" ms", "\u00a0ms"), text, flags=re.M)
    README.write_text(text)
