"""Breaks a constant or a sign in each kernel, one after the other, and checks that the tests notice:

    python tests/mutate.py FOLDER [NAME ...]

works in FOLDER, on a copy of the sources, which is built there once, some minutes, and again where it is
mutated. Triton kernels run interpreted. Names choose some mutations. Fails if the tests of a mutated kernel
pass.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Name: file, what stands there once, what is put in its place, and the tests that must fail.
MUTATIONS = {
    "dynamic_relu": ("csrc/cpu/operators/split_gradient.h", "share = g / ties", "share = g", "dynamic_relu"),
    "mobile_to_former_attention": (
        "csrc/ops/mobile_to_former_attention.cpp",
        "1 / std::sqrt(static_cast<double>(",
        "2 / std::sqrt(static_cast<double>(",
        "mobile_to_former",
    ),
    "mobile_to_former_attention, masked": (
        "csrc/cpu/operators/mobile_to_former_attention.cpp",
        "hide<C>(grad_x, depth, width, seen, 0)",
        "hide<C>(grad_x, depth, width, seen, 1)",
        "mobile_to_former",
    ),
    "former_to_mobile_attention": (
        "csrc/cpu/simd/softmax.h",
        "- pivot - mean) * scale",
        "- pivot + mean) * scale",
        "former_to_mobile",
    ),
    "dynamic_conv2d": (
        "csrc/cpu/operators/dynamic_planes.h",
        "first * args.stride_h - args.padding_h",
        "first * args.stride_h",
        "dynamic_conv2d",
    ),
    "dynamic_conv2d, depthwise": (
        "csrc/cpu/operators/dynamic_depthwise.cpp",
        "ky = y - r;",
        "ky = y - r - 1;",
        "dynamic_conv2d",
    ),
    "dynamic_conv2d, depthwise with a stride": (
        "csrc/cpu/operators/dynamic_strided.cpp",
        "load(to + p) + weight * load(g + p)",
        "load(to + p) - weight * load(g + p)",
        "dynamic_conv2d",
    ),
    "global_response_norm": (
        "csrc/ops/global_response_norm.cpp",
        "sum -= call.gamma[c]",
        "sum += call.gamma[c]",
        "global_response_norm",
    ),
    "modulation_attention": (
        "csrc/cpu/operators/modulation_attention.cpp",
        "load(y.data + i) * (one - s)",
        "load(y.data + i) * (one + s)",
        "modulation_attention",
    ),
    "modulation_attention, several groups of queries": (
        "csrc/cpu/operators/modulation_attention.cpp",
        "parts + k * size + i",
        "parts + i",
        "modulation_attention",
    ),
    "linear layers of many rows": (
        "csrc/cpu/operators/token_rows.h",
        "linear.bias[o + i]",
        "linear.bias[i]",
        "token_hyper",
    ),
    "batch_norm": (
        "csrc/cpu/operators/batch_norm.cpp",
        "variance[i] / count",
        "variance[i] / (count - 1)",
        "batch_norm",
    ),
    "former_block": (
        "csrc/cpu/simd/elementary.h",
        "t * 0.39894228040143267794f",
        "t * 0.3989f",
        "former_block or batch_norm",
    ),
    "pointwise_conv_bn": (
        "csrc/cpu/operators/pointwise_conv_bn.cpp",
        "(sum - mean) * factor",
        "sum * factor",
        "pointwise_conv_bn",
    ),
    "token_hyper": ("csrc/cpu/operators/token_hyper.cpp", "splat(C(-3))", "splat(C(-2))", "token_hyper"),
    "deployed_norm": (
        "csrc/cpu/engine/deployed_state_steps.cpp",
        "static_cast<float>(1 / __builtin_sqrt((variance > 0 ? variance : 0) + eps",
        "static_cast<float>(1 / __builtin_sqrt((variance > 0 ? variance : 0) + 100 * eps",
        "test_deploy.py and test_same_numbers",
    ),
    "deployed_int8": (
        "csrc/cpu/engine/bytes.h",
        "most(255 - static_cast<float>(linear.zero))",
        "most(127 - static_cast<float>(linear.zero))",
        "test_int8.py and test_pointwise",
    ),
    "deployed_narrow": (
        "csrc/cpu/engine/deployed_narrow.cpp",
        "sum * factor + last",
        "sum + last",
        "test_narrow_weights.py and test_same_numbers",
    ),
    "deployed_response_norm": (
        "csrc/cpu/engine/deployed_state_steps.cpp",
        "1 + gamma[c] * response",
        "1 - gamma[c] * response",
        "test_deploy_dmf_iformer.py and test_variants",
    ),
    "deployed_attention": (
        "csrc/cpu/engine/deployed_attention.h",
        "context = y * inverse[p]",
        "context = y * inverse[0]",
        "test_deploy_dmf_iformer.py and test_variants",
    ),
}
# The same in each operator's triton.py.
TRITON = {
    "batch_norm": ("spread + distance * distance * sizes[:, None]", "spread"),
    "dynamic_relu": ("total += slope * part", "total += slope"),
    "mobile_to_former_attention": ("rescale = tl.exp(top - higher)", "rescale = tl.exp(higher - top)"),
    "former_to_mobile_attention": ("- mean[None, :]) * scale", "+ mean[None, :]) * scale"),
    "dynamic_conv2d": ("return value + scale * others", "return value + others"),
    "global_response_norm": ("factor = 1.0 + load_vector", "factor = load_vector"),
    "modulation_attention": ("rescale = tl.exp(top - higher)", "rescale = tl.exp(higher - top)"),
    "former_block": ("0.3989422804014327", "0.3989"),
    "pointwise_conv_bn": ("0.7071067811865476", "0.7071"),
    "token_hyper": ("(y > -3) & (y < 3)", "(y > -2) & (y < 3)"),
}
MUTATIONS |= {
    f"{op} in Triton": (
        f"mfkernels/operators/{op}/triton.py",
        old,
        new,
        f"test_triton.py and interpreted and {op}",
    )
    for op, (old, new) in TRITON.items()
}
MUTATIONS["mobile_to_former_attention, masked in Triton"] = (
    "mfkernels/operators/mobile_to_former_attention/triton.py",
    "(tl.load(mask + b * pixels + p, inside, 1) == 0)",
    "(tl.load(mask + p, inside, 1) == 0)",
    "test_triton.py and interpreted and mobile_to_former_attention",
)
MUTATIONS["activated_depthwise in Triton"] = (
    "mfkernels/deploy/gpu/activated_depthwise_triton.py",
    "e // (outputs // channels)",
    "e % channels",
    "test_activated_depthwise.py",
)
MUTATIONS["kernel_scores in Triton"] = (
    "mfkernels/deploy/gpu/kernel_scores_triton.py",
    "inside_c, value / pixels)",
    "inside_c, value)",
    "test_deployed_kernels.py",
)
FILES = (
    "test_activated_depthwise.py",
    "test_contract.py",
    "test_deploy.py",
    "test_deploy_dmf_iformer.py",
    "test_deployed_kernels.py",
    "test_triton.py",
)


def copy_sources(source: Path) -> None:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)


def survives(source: Path, target: Path, file: str, old: str, new: str, tests: str) -> bool:
    before = (source / file).read_text()
    (source / file).write_text(mutated(source / file, old, new))
    quiet = ["-q", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--upgrade"]
    # What was built stays in the sources' folder: only the mutated file is compiled again.
    pip = [sys.executable, "-m", "pip", "install", *quiet, "--target", target, source]
    subprocess.run(pip, check=True)
    environment = os.environ | {"PYTHONPATH": str(target)}
    run = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-c", source / "pyproject.toml", "-k", tests]
    run += [source / "tests" / name for name in FILES]
    done = subprocess.run([sys.executable, *run], cwd=target, env=environment, capture_output=True, text=True)
    (source / file).write_text(before)
    assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]
    return done.returncode == 0


def mutated(file: Path, old: str, new: str) -> str:
    text = file.read_text()
    assert text.count(old) == 1, f"{file}: {old!r} stands there {text.count(old)} times"
    return text.replace(old, new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME")
    options = parser.parse_args()
    source, target = (options.folder.resolve() / name for name in ("source", "built"))
    for place in (source, target):  # of another time
        shutil.rmtree(place, ignore_errors=True)
    copy_sources(source)
    file, old, _, tests = MUTATIONS["dynamic_relu"]
    assert survives(source, target, file, old, old, tests), "tests fail where nothing is broken"
    alive = []
    for name, mutation in MUTATIONS.items():
        if options.names and name not in options.names:
            continue
        alive += [name] * survives(source, target, *mutation)
        print(f"{name}: {'NOT NOTICED' if name in alive else 'noticed'}", flush=True)
    sys.exit(1 if alive else 0)


if __name__ == "__main__":
    main()
