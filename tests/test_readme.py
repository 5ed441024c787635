"""README: its length, its links and pictures, and that what it names is there."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def visible():
    """README with all that is folded left out."""
    text = README
    inner = re.compile(r"<details>(?:(?!</?details>).)*</details>", re.S)
    while inner.search(text):
        text = inner.sub("", text)
    assert "details>" not in text
    return text


def test_what_is_not_folded_reads_in_minutes():
    assert len(visible().encode()) <= 13_000
    assert visible().index(".venv/bin/python vicreg.py\n") < 2000                         # the command of the first run


@pytest.mark.parametrize("anchor", sorted(set(re.findall(r"\]\(#([\w-]+)\)", README))))
def test_links_within_have_their_anchor(anchor):
    assert README.count(f'<a id="{anchor}"></a>') == 1


def test_files_that_are_linked_or_named_are_there():
    for name in re.findall(r"\]\(([\w./-]+)\)", README) + re.findall(r'src="([^"]+)"', README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"python (\S+\.py)", README) + re.findall(r"`((?:tests|kernels)/\S+?\.py)`", README):
        assert (ROOT / name).exists() or name == "loss.py", name


def test_pictures_are_all_shown():
    for picture in (ROOT / ".github" / "assets").iterdir():
        assert f".github/assets/{picture.name}" in README, picture.name


def test_figures_of_the_claims_stand_elsewhere_too():
    text = README.replace("\u00a0", " ")
    start, end = (text.index(f'<a id="{anchor}">') for anchor in ("which-claims-hold", "results-in-full"))
    figures = re.findall(r"[-+]?\d+\.\d{3}(?: ± \d+\.\d{3})?", text[start:end])
    assert len(figures) > 50
    for figure in figures:
        assert figure in text[:start] + text[end:], figure
