"""The pages: their code runs, their links and paths exist."""

import inspect
import re
from pathlib import Path

import pytest

import mfkernels

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
)
ADDING = (ROOT / "docs" / "adding_an_operator.md").read_text()


def code_of(page):
    return re.findall(r"^```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page)])
def test_the_code_runs(page, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    if page == "docs/detection.md":
        pytest.importorskip("pycocotools", reason="detectors need torchvision and pycocotools")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in code_of(page):  # one after the other, as a reader would
        exec(block, names)
    assert {"README.md", "docs/using.md"} <= {page for page in PAGES if len(code_of(page)) >= 3}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", prose):
        assert ((ROOT / page).parent / link).exists(), link


def test_every_public_name_is_in_the_reference():
    named = re.findall(r"^::: ([\w.]+)", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    for name in mfkernels.__all__:
        value = getattr(mfkernels, name)
        path = value.__name__ if inspect.ismodule(value) else f"{value.__module__}.{value.__qualname__}"
        assert any(known == path or known.startswith(f"{path}.") for known in named), name


@pytest.mark.parametrize("name", mfkernels.ops.__all__)
def test_the_table_of_places_is_true(name):
    places = re.findall(r"^\| `([^`]*<op>[^`]*)`", ADDING, re.MULTILINE)
    assert len(places) == 6
    for place in places:
        for path in (place.replace(".{h,cpp}", ".h"), place.replace(".{h,cpp}", ".cpp")):
            assert (ROOT / path.replace("<op>", name)).is_file(), path
