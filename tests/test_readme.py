import re
from pathlib import Path

import pytest

import mfkernels

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_code_runs(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    names: dict = {}
    for block in blocks:  # one after the other, as a reader would
        exec(block, names)
    assert names["logits"].shape == (1, 1000)


@pytest.mark.parametrize("name", mfkernels.ops.__all__)
def test_the_table_of_places_is_true(name):
    places = re.findall(r"^\| `([^`]*<op>[^`]*)`", README, re.MULTILINE)
    assert len(places) == 6
    for place in places:
        for path in (place.replace(".{h,cpp}", ".h"), place.replace(".{h,cpp}", ".cpp")):
            assert (ROOT / path.replace("<op>", name)).is_file(), path
