from pathlib import Path

import pytest

from mfkernels.info import cpu_name

ARM = "processor\t: 0\nBogoMIPS\t: 108.00\nCPU implementer\t: 0x41\nCPU variant\t: 0x0\nCPU part\t: 0xd08\n"
X86 = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\n"


@pytest.mark.parametrize(
    "text, expected", [(ARM, "{}, implementer 0x41 part 0xd08"), (X86, "AMD EPYC, family 25 model 1")]
)
def test_the_processor_is_named(monkeypatch, text, expected):
    monkeypatch.setattr(Path, "read_text", lambda path: text)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert cpu_name() == expected.format("aarch64")
