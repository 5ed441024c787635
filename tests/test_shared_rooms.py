"""The rooms that scripts share are the same to the letter. `python tests/test_shared_rooms.py` copies vicreg.py's."""
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OTHERS = ["icone.py", "falcon.py", "ba_ssl.py"]
FIRST, LAST = "# ==== The same in every script ", "# ==== Command line "


def parts(script):
    """Text before, of, and after the shared rooms."""
    text = (ROOT / script).read_text()
    first, last = text.index(FIRST), text.index(LAST)
    return text[:first], text[first:last], text[last:]


@pytest.mark.parametrize("script", OTHERS)
def test_shared_rooms_are_the_same_to_the_letter(script):
    assert parts(script)[1] == parts("vicreg.py")[1]


def test_each_script_imports_what_the_rooms_use():
    def imports(script):
        return {line for line in parts(script)[0].splitlines()
                if line.startswith(("import", "from")) and not line.startswith("from kernels")}
    assert all(imports(script) >= imports("vicreg.py") for script in OTHERS)


if __name__ == "__main__":
    for script in OTHERS:
        before, _, after = parts(script)
        (ROOT / script).write_text(before + parts("vicreg.py")[1] + after)
        print(f"{script}: rooms copied from vicreg.py")
