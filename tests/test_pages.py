"""The pages: README's length, and that what they link, name or show is there."""
import re
from pathlib import Path

import pytest

from test_claims import stated

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted(str(page.relative_to(ROOT)) for page in (ROOT / "tests" / "experiments").glob("*.md"))
PAGES = ["README.md", "kernels/README.md", "kernels/harness/README.md", "tests/README.md",
         ".github/CONTRIBUTING.md", *EXPERIMENTS]
TEXT = {page: (ROOT / page).read_text() for page in PAGES}
README = TEXT["README.md"]
each_page = pytest.mark.parametrize("page", PAGES)


def prose(page):
    """A page without its blocks of code."""
    text = re.sub(r"^```.*?^```$", "", TEXT[page], flags=re.M | re.S)
    return re.sub(r"^    .*\n", "", text, flags=re.M)


def links(page):
    """What a page links to and shows, as it stands there."""
    text = prose(page)
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)


def anchors(page):
    """Names of a page's headings as GitHub makes them, and of its <a id>."""
    found = re.findall(r'<a id="([^"]+)">', prose(page))
    for heading in re.findall(r"^#+ +(.*?) *#*$", prose(page), re.M):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)             # a link's words alone
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        count = sum(name == slug or re.fullmatch(rf"{re.escape(slug)}-\d+", name) is not None for name in found)
        found.append(f"{slug}-{count}" if count else slug)
    return found


def test_readme_is_one_page_and_begins_with_a_command():
    assert len(README.encode()) <= 14_000
    assert "<details" not in README
    assert README.index(".venv/bin/python vicreg.py\n") < 2000              # the command of the first run


@each_page
def test_links_lead_to_files_and_headings(page):
    assert links(page) or page == "tests/README.md"
    for link in links(page):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent.joinpath(name).resolve() if name else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(str(target.relative_to(ROOT))), link


def test_all_pages_are_linked_from_readme():
    for page in PAGES[1:]:
        assert page in links("README.md"), page


@each_page
def test_files_of_commands_and_in_backticks_are_there(page):
    text = TEXT[page]
    names = re.findall(r"python (\S+\.py)", text) + re.findall(r"`([\w./-]+\.(?:py|md|yml|txt))\b[^`\n]*`", text)
    modules = re.findall(r"python -m ((?:kernels|tests)\.[\w.]+)", text)
    names += [module.replace(".", "/") + ".py" for module in modules]
    names += re.findall(r"pytest .*?(tests/\w+\.py)", text)
    names += re.findall(r"`((?:tests|kernels|\.github)/[\w./]*)`", text)
    for name in set(names) - {"barlow.py", "skipped.txt"}:           # which a reader and a run write
        assert (ROOT / name).exists() or (ROOT / page).parent.joinpath(name).exists(), name


def test_pictures_are_all_shown():
    shown = {(ROOT / page).parent.joinpath(link).resolve() for page in PAGES for link in links(page)}
    for picture in (ROOT / ".github" / "assets").iterdir():
        assert picture in shown, picture.name


def test_the_front_page_states_what_its_slow_test_asks_for():
    for script in ("vicreg.py", "icone.py", "falcon.py", "ba_ssl.py"):
        knn, linear, seconds = stated(script)
        assert .8 < float(knn.split()[0]) < 1 and .8 < float(linear.split()[0]) < 1 and 30 < int(seconds) < 600


def test_figures_of_the_claims_stand_elsewhere_too():
    page = "tests/experiments/README.md"
    text = TEXT[page].replace("\u00a0", " ")
    start = text.index("\n## Which claims hold\n")
    end = text.index("\n## ", start + 1)
    others = [TEXT[other].replace("\u00a0", " ") for other in PAGES if other != page]
    elsewhere = "\n".join([text[:start], text[end:], *others])
    figures = re.findall(r"[-+]?\d+\.\d{3}(?: ± \d+\.\d{3})?", text[start:end])
    assert len(figures) > 50
    for figure in figures:
        assert figure in elsewhere, figure
