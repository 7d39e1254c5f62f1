"""The environment report, `mfkernels info`."""

import platform
import sys
from importlib import metadata
from pathlib import Path

import torch

from . import _C, __version__, native
from .backends import BACKENDS, unavailable


def report() -> str:
    """Versions, machine, instruction set and backends, ready to be pasted into a bug report."""
    build = _C.build_info()
    lines = [
        ("mfkernels", f"{__version__}, {Path(__file__).parent}"),
        (
            "built with",
            f"{build['compiler']}, torch {build['built_with_torch']}, CUDA kernels: {build['cuda']}",
        ),
        ("Python", f"{platform.python_version()}, {sys.executable}"),
        ("torch", torch.__version__),
        ("Triton", _version("triton")),
        ("system", platform.platform()),
        ("CPU", cpu_name()),
        ("CPU features", " ".join(_C.cpu_features()) or "none that matter here"),
        ("threads", f"{torch.get_num_threads()} (torch.get_num_threads)"),
        (
            "instruction set",
            f"{native.instruction_set()} of {', '.join(native.supported_instruction_sets())} "
            "(MFKERNELS_ISA overrides)",
        ),
        *(("GPU", line) for line in _gpus()),
        *((f"backend {name}", unavailable(name) or "available") for name in BACKENDS if name != "auto"),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def cpu_name() -> str:
    """Return the CPU's name, with family and model where the system tells them.

    On Arm, where Linux knows no name, return the numbers of its maker and of the part.
    """
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    name = fields.get("model name", platform.machine())
    if "CPU part" in fields:
        name += f", implementer {fields.get('CPU implementer')} part {fields['CPU part']}"
    family, model = fields.get("cpu family"), fields.get("model")
    return name if family is None else f"{name}, family {family} model {model}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch finds none"
        return [f"none: {why}"]
    lines = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            f"cuda:{index} {properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
    return lines
