"""README's tables, made again: each has its command in a comment above it, and must say what the command prints.

    python -m pytest -m slow tests/test_numbers.py                       # hours; experiments go on where they stopped, in runs/
    python -m tests.test_numbers WORD                                    # writes the tables whose command has WORD
"""
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TABLE = re.compile(r"^<!-- (python .+?) -->\n((?:\|.*\n)+)", re.M)
NUMBER = re.compile(r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?")


def tables(text):
    """[(command, table)] of a README."""
    return TABLE.findall(text)


def printed(command, header):
    """The table with this header among what a command prints."""
    words = shlex.split(command)
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    lines = iter(done.stdout.splitlines())
    for line in lines:
        if line == header:
            rows = [line]
            for line in lines:
                if not line.startswith("|"):
                    break
                rows.append(line)
            return "\n".join(rows) + "\n"
    raise AssertionError(f"{command} prints no table with the header {header}")


def cells(row):
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def agree(stated, found):
    """Whether two cells say the same: text to the letter; means within three stds of both, .02 at least; times and
    their ratios, which are another machine's, within a factor of 2; other numbers within .02 or three tenths."""
    if NUMBER.sub("", stated) != NUMBER.sub("", found):
        return False
    ours, theirs = ([float(number.replace(",", "")) for number in NUMBER.findall(cell)] for cell in (stated, found))
    if "±" in stated:
        return abs(ours[0] - theirs[0]) <= max(.02, 3 * math.hypot(ours[1], theirs[1]))
    share = .5 if stated.endswith(("ms", "x")) else .3
    return all(abs(a - b) <= max(.02, share * max(abs(a), abs(b))) for a, b in zip(ours, theirs))


def differences(stated, found):
    """Cells of two tables that do not agree, as text."""
    wrong = []
    a, b = stated.splitlines(), found.splitlines()
    if len(a) != len(b):
        wrong.append(f"{len(a)} lines, {len(b)} printed")
    for mine, its in zip(a[2:], b[2:]):
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


@pytest.mark.slow
@pytest.mark.parametrize("command, table", tables(README.read_text()))
def test_readme_states_what_the_command_prints(command, table):
    wrong = differences(table, printed(command, table.splitlines()[0]))
    assert not wrong, "\n".join(wrong)


if __name__ == "__main__":
    text = README.read_text()
    for command, table in tables(text):
        if sys.argv[1] in command:
            print(command)
            text = text.replace(f"<!-- {command} -->\n{table}", f"<!-- {command} -->\n{printed(command, table.splitlines()[0])}")
    README.write_text(text)
