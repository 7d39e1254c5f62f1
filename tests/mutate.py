"""Breaks a constant or a sign in each kernel, one after the other, and checks that the tests notice:

    python tests/mutate.py FOLDER [NAME ...]

works in FOLDER, on a copy of the sources. Each mutation is built and takes a minute or two; names choose
some. Fails if the tests of a mutated kernel pass.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Name: file, what stands there once, what is put in its place, and the tests that must fail.
MUTATIONS = {
    "dynamic_relu": ("csrc/cpu/dynamic_relu.cpp", "g * C(0.5)", "g * C(0.25)", "dynamic_relu"),
    "mobile_to_former_attention": (
        "csrc/ops/mobile_to_former_attention.cpp",
        "1 / std::sqrt(static_cast<double>(",
        "2 / std::sqrt(static_cast<double>(",
        "mobile_to_former",
    ),
    "former_to_mobile_attention": (
        "csrc/cpu/softmax.h",
        "- pivot - mean) * scale",
        "- pivot + mean) * scale",
        "former_to_mobile",
    ),
    "dynamic_conv2d": (
        "csrc/cpu/dynamic_conv2d.cpp",
        "first * args.stride_h - args.padding_h",
        "first * args.stride_h",
        "dynamic_conv2d",
    ),
    "global_response_norm": (
        "csrc/ops/global_response_norm.cpp",
        "through_mean -= ",
        "through_mean += ",
        "global_response_norm",
    ),
    "modulation_attention": (
        "csrc/cpu/modulation_attention.cpp",
        "grad * out * (s * (one - s))",
        "grad * out * (s * (one + s))",
        "modulation_attention",
    ),
    "former_block": ("csrc/cpu/former_block.cpp", "C(0.39894228040143267794)", "C(0.3989)", "former_block"),
    "token_hyper": ("csrc/cpu/token_hyper.cpp", "splat(C(-3))", "splat(C(-2))", "token_hyper"),
    "deploy": (
        "csrc/cpu/mobile_former_tokens.cpp",
        "variance + 1e-5",
        "variance + 1e-3",
        "test_same_numbers",
    ),
}


def survives(folder: Path, file: str, old: str, new: str, tests: str) -> bool:
    source, target = folder / "source", folder / "built"
    for place in (source, target):
        shutil.rmtree(place, ignore_errors=True)
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    text = (source / file).read_text()
    assert text.count(old) == 1, f"{file}: {old!r} stands there {text.count(old)} times"
    (source / file).write_text(text.replace(old, new))
    quiet = ["-q", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
    pip = [sys.executable, "-m", "pip", "install", *quiet, "--target", target, source]
    subprocess.run(pip, check=True)
    environment = os.environ | {"PYTHONPATH": str(target)}
    run = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-c", source / "pyproject.toml", "-k", tests]
    run += [source / "tests" / "test_contract.py", source / "tests" / "test_deploy.py"]
    done = subprocess.run([sys.executable, *run], cwd=target, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]
    return done.returncode == 0


def main() -> None:
    folder, *names = sys.argv[1:]
    alive = []
    for name, mutation in MUTATIONS.items():
        if names and name not in names:
            continue
        alive += [name] * survives(Path(folder).resolve(), *mutation)
        print(f"{name}: {'NOT NOTICED' if name in alive else 'noticed'}", flush=True)
    sys.exit(1 if alive else 0)


if __name__ == "__main__":
    main()
