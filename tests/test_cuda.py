"""The CUDA kernels without a GPU: on an emulator, against the truth; and compiled, where nvcc is, for the
GPUs that they are written for, without spilling registers."""

import copy
import ctypes
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import former_block, integers, normal
from emulated import build, failure, name_of
from test_contract import LAYOUTS, Comparison, channels_last, expect, guarded, reversed_axes, same
from tolerance import Errors

import mfkernels
from mfkernels.deploy.gpu.dynamic_bottleneck import dynamic_bottleneck_reference
from mfkernels.deploy.gpu.token_chain import Made, TokenChain, token_chain_reference
from mfkernels.nn import MobileFormerBlock

ROOT = Path(__file__).parent.parent
NVCC = shutil.which("nvcc")
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
FORWARDS, BACKWARDS, ANY = 0, 1, 2  # in which order threads run; any: by this seed or a larger one

# float16 differs from bfloat16 in its numbers alone.
HALF = pytest.param(torch.float16, marks=pytest.mark.bed)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, HALF], ids=name_of)


def same_in_any_order(run, seed: int, dtype: torch.dtype):
    """What `run` makes, given an order. Half precision differs in the numbers, not in what threads do."""
    orders = (ANY, FORWARDS, BACKWARDS) if seed == 0 and dtype == torch.float32 else (ANY + seed,)
    first, *others = map(run, orders)
    for other in others:
        pairs = zip(first, other, strict=True) if isinstance(first, tuple) else [(first, other)]
        assert all(torch.equal(a, b) for a, b in pairs)
    return first


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The library of a file of `tests/cuda`, built once."""
    built: dict[str, ctypes.CDLL] = {}

    def library(name: str) -> ctypes.CDLL:
        if name not in built:
            source = ROOT / "tests" / "cuda" / f"{name}.cpp"
            built[name] = build(source, tmp_path_factory.mktemp("cuda") / f"{name}.so", "-g")
        return built[name]

    return library


def run_former(library, tensors: dict, num_heads: int, form: str, eps: float, seed: int):
    tokens, *weights = [None if t is None else t.contiguous() for t in tensors.values()]
    weights += [None] * (12 - len(weights))
    hidden = 0 if tensors.get("fc1_weight") is None else tensors["fc1_weight"].shape[0]
    out = torch.full_like(tokens, float("nan"))
    pointers = (ctypes.c_void_p * 12)(*(None if t is None else t.data_ptr() for t in weights))
    failed = getattr(library, f"former_block_{name_of(tokens.dtype)}")(
        ctypes.c_void_p(tokens.data_ptr()), ctypes.c_void_p(out.data_ptr()), pointers, *tokens.shape,
        num_heads, hidden, int(form == "standard"), ctypes.c_float(eps), seed,
    )  # fmt: skip
    assert not failed, failure(library)
    return out


@dtypes
@pytest.mark.parametrize("shape", former_block.CHOSEN, ids=str)
def test_former_block_emulated(emulated, shape, dtype):
    """The one tolerance; no race; and the same bits in whatever order the threads run."""
    if 0 in (shape["B"], shape["T"]):
        pytest.skip("nothing to launch")
    errors = Errors()
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        expected = expect(former_block, former_block.make(shape, generator), generator, dtype)
        given = {k: None if v is None else v.to(dtype) for k, v in expected.sample.tensors.items()}
        others = dict(num_heads=4, form="released", eps=1e-5) | expected.sample.others
        run = partial(run_former, emulated("former_block"), given, *others.values())
        first = same_in_any_order(run, seed, dtype)
        errors.reference(expected.eager["output 0"], expected.truth["output 0"])
        errors.kernel(first, expected.truth["output 0"])
        if first.numel() > 5000:
            break
    errors.check(f"former_block {shape}")


# Sizes of dynamic_bottleneck, and its other arguments.
BOTTLENECKS = [
    # of the networks
    (dict(B=1, C=20, E=60, O=20, H=17, W=16, T=6), dict(num_heads=2, skip=True)),
    (dict(B=1, C=80, E=320, O=112, H=14, W=9, T=6), dict(num_heads=2, skip=False)),
    (dict(B=1, C=160, E=960, O=160, H=7, W=7, T=6), dict(num_heads=2, skip=True)),
    # edges
    (dict(B=1, C=1, E=1, O=1, H=1, W=1, T=2), dict(num_heads=1, skip=True)),
    (dict(B=3, C=5, E=13, O=9, H=1, W=23, T=8), dict(num_heads=3, skip=False)),
    (dict(B=2, C=17, E=65, O=65, H=9, W=8, T=3), dict(num_heads=5, skip=False)),
    (dict(B=1, C=33, E=128, O=129, H=8, W=3, T=7), dict(num_heads=1, skip=False)),
    (dict(B=1, C=16, E=64, O=256, H=5, W=10, T=1), dict(num_heads=4, skip=False)),
]


def make_bottleneck(shape: dict, generator: torch.Generator, draw=normal) -> dict[str, torch.Tensor]:
    B, C, E, outputs, H, W, T = shape.values()
    tensors = dict(
        x=draw(generator, B, C, H, W), slopes1=draw(generator, B, 2, E), slopes2=draw(generator, B, 2, E),
        expand_weight=draw(generator, E, C, 1, 1), expand_bias=draw(generator, E),
        depthwise_weight=draw(generator, E, 1, 3, 3), depthwise_bias=draw(generator, E),
        project_weight=draw(generator, outputs, E, 1, 1), project_bias=draw(generator, outputs),
        keys=draw(generator, B, T, outputs), values=draw(generator, B, T, outputs),
    )  # fmt: skip
    if draw is normal:  # results of the order of one
        for name in ("expand_weight", "depthwise_weight", "project_weight"):
            tensors[name] /= tensors[name][0].numel() ** 0.5
    return tensors


def run_bottleneck(library, tensors: dict, num_heads: int, skip: bool, layout, seed: int):
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    x, outputs = layout(tensors["x"]), tensors["project_weight"].shape[0]
    out = layout(torch.full((x.shape[0], outputs, *x.shape[2:]), float("nan"), dtype=x.dtype))
    pointers = (ctypes.c_void_p * 10)(*(t.data_ptr() for t in list(tensors.values())[1:]))
    sizes = x.shape[1], len(tensors["expand_bias"]), outputs, *x.shape[2:]
    failed = getattr(library, f"dynamic_bottleneck_{name_of(x.dtype)}")(
        ctypes.c_void_p(x.data_ptr()), (ctypes.c_int64 * 4)(*x.stride()), ctypes.c_void_p(out.data_ptr()),
        (ctypes.c_int64 * 4)(*out.stride()), pointers, len(x), (ctypes.c_int * 5)(*sizes),
        tensors["keys"].shape[1], num_heads, int(skip), seed,
    )  # fmt: skip
    assert not failed, failure(library)
    return out


@dtypes
@pytest.mark.parametrize("shape, others", BOTTLENECKS, ids=str)
def test_dynamic_bottleneck_emulated(emulated, shape, others, dtype):
    errors, library = Errors(), emulated("dynamic_bottleneck")
    for seed in range(1 if shape["C"] > 50 else 4):
        drawn = make_bottleneck(shape, torch.Generator().manual_seed(seed))
        given = {name: value.to(dtype) for name, value in drawn.items()}
        run = partial(run_bottleneck, library, given, *others.values(), channels_last if seed % 2 else same)
        truth = dynamic_bottleneck_reference(**{k: v.double() for k, v in given.items()}, **others)
        errors.reference(dynamic_bottleneck_reference(**given, **others), truth)
        errors.kernel(same_in_any_order(run, seed, dtype), truth)
    errors.check(f"dynamic_bottleneck {shape}")


@pytest.mark.parametrize("layout", [channels_last, guarded, reversed_axes], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape, others", BOTTLENECKS, ids=str)
def test_dynamic_bottleneck_in_layouts(emulated, shape, others, layout):
    """Makes the same bits of maps however they lie in memory."""
    drawn = make_bottleneck(shape, torch.Generator().manual_seed(0))
    given = {name: value.float() for name, value in drawn.items()}
    run = partial(run_bottleneck, emulated("dynamic_bottleneck"), given, *others.values())
    assert torch.equal(run(layout, FORWARDS), run(same, BACKWARDS))


def test_dynamic_bottleneck_integers_are_exact(emulated):
    """To one token attention is exact, too."""
    shape, others = dict(B=2, C=19, E=70, O=19, H=11, W=9, T=1), dict(num_heads=1, skip=True)

    def draw(generator, *sizes):
        return integers(generator, -2, 2, *sizes).float()

    given = make_bottleneck(shape, torch.Generator().manual_seed(0), draw)
    expected = dynamic_bottleneck_reference(**given, **others)
    assert expected.abs().max() > 100
    got = run_bottleneck(emulated("dynamic_bottleneck"), given, **others, layout=same, seed=ANY)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_dynamic_bottleneck_not_finite(emulated, bad):
    shape, others = dict(B=1, C=5, E=13, O=9, H=9, W=9, T=4), dict(num_heads=3, skip=False)
    given = {k: v.float() for k, v in make_bottleneck(shape, torch.Generator().manual_seed(0)).items()}
    given["x"][0, 2, 4, 4] = bad
    given["slopes1"].abs_()
    given["slopes2"].abs_()
    expected = dynamic_bottleneck_reference(**given, **others)
    got = run_bottleneck(emulated("dynamic_bottleneck"), given, **others, layout=same, seed=ANY)
    assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.isinf(), expected.isinf())
    assert got.isfinite().any() and not got.isfinite().all()


# Of a block: B, and the arguments of a MobileFormerBlock.
CHAINS = [
    # of the networks
    dict(B=2, T=6, d=192, C=40, O=40, expansion=4),
    dict(B=1, T=3, d=128, C=12, O=12, expansion=6),
    # edges
    dict(B=3, T=1, d=8, C=2, O=4, expansion=1),
    dict(B=1, T=9, d=20, C=30, O=6, expansion=3, ffn=False, token_id=8),
    dict(B=2, T=5, d=36, C=70, O=14, expansion=2, gates=(False, False, False), token_id=2, hyper_reduction=1),
]


def make_chain(shape: dict, seed: int) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """A block, tokens, and what they gathered."""
    B, T, d, C, outputs, *_ = shape.values()
    others = {name: value for name, value in shape.items() if name not in "BTdCO"}
    block = MobileFormerBlock(C, outputs, token_dim=d, token_num=T, **others).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for value in block.parameters():
        value.copy_(normal(generator, *value.shape) / (value.shape[1] ** 0.5 if value.dim() == 2 else 1))
    return block, normal(generator, T, B, d).float(), normal(generator, B, T, C).float()


def expect_chain(block, tokens, gathered) -> tuple[Made, Made]:
    """The truth, and what the definition makes in float32."""
    with mfkernels.use_backend("reference"):
        eager = token_chain_reference(block, tokens, gathered)
        return token_chain_reference(copy.deepcopy(block).double(), tokens.double(), gathered.double()), eager


def run_chain(library, block, tokens, gathered, seed: int) -> Made:
    def integers(values):
        return (ctypes.c_int64 * len(values))(*values)

    chain, functions = TokenChain(block), [hyper.hyper[2].out_features for _, hyper in block._generators()]
    T, B, _ = tokens.shape
    shapes = [tokens.shape, *((B, 2, n // 2) for n in functions), (2, B, T, block.global_local.channels)]
    results = [torch.full(shape, float("nan"), dtype=tokens.dtype) for shape in shapes]
    sizes = [B, T, tokens.shape[2], *chain.sizes, *tokens.stride()[:2]]
    pointers = (ctypes.c_void_p * 4)(*(t.data_ptr() for t in results))
    failed = getattr(library, f"token_chain_{name_of(tokens.dtype)}")(
        *(ctypes.c_void_p(t.data_ptr()) for t in (tokens, gathered, chain.packed)), integers(chain.offsets),
        integers(sizes), ctypes.c_float(1e-5), pointers, seed,
    )  # fmt: skip
    assert not failed, failure(library)
    return Made(*results[:3], *results[3])


@dtypes
@pytest.mark.parametrize("shape", CHAINS, ids=str)
def test_token_chain_emulated(emulated, shape, dtype):
    errors = {name: Errors() for name in Made._fields}
    for seed in range(4):
        block, tokens, gathered = (value.to(dtype) for value in make_chain(shape, seed))
        tokens = tokens if seed else tokens[:, :1].expand(tokens.shape)  # as a network's first tokens are
        truth, eager = expect_chain(block, tokens, gathered)
        run = partial(run_chain, emulated("token_chain"), block, tokens, gathered)
        made = same_in_any_order(run, seed, dtype)
        for name, error in errors.items():
            error.reference(getattr(eager, name), getattr(truth, name))
            error.kernel(getattr(made, name), getattr(truth, name))
    for name, error in errors.items():
        error.check(f"token_chain {shape}, {name}")


# Whether a library's kernel makes the right numbers and has no race.


def chain_is_right(library) -> bool:
    given = make_chain(CHAINS[4], 0)
    truth, _ = expect_chain(*given)
    pairs = zip(run_chain(library, *given, ANY), truth, strict=True)
    return all(torch.allclose(value, expected.float(), atol=1e-4) for value, expected in pairs)


def former_is_right(library) -> bool:
    sample = former_block.make(dict(B=1, T=9, d=24, h=40, heads=2), torch.Generator().manual_seed(0))
    given = {k: None if v is None else v.float() for k, v in sample.tensors.items()}
    others = dict(num_heads=4, form="released", eps=1e-5) | sample.others
    truth = former_block.REFERENCE(**given, **others)
    return torch.allclose(run_former(library, given, **others, seed=ANY), truth, atol=1e-4)


def bottleneck_is_right(library) -> bool:
    shape, others = dict(B=1, C=130, E=80, O=130, H=9, W=5, T=5), dict(num_heads=2, skip=True)
    given = {k: v.float() for k, v in make_bottleneck(shape, torch.Generator().manual_seed(0)).items()}
    truth = dynamic_bottleneck_reference(**given, **others)
    return torch.allclose(run_bottleneck(library, given, **others, layout=same, seed=ANY), truth, atol=1e-3)


CHECKS = {
    "former_block": former_is_right,
    "dynamic_bottleneck": bottleneck_is_right,
    "token_chain": chain_is_right,
}
# Of each kernel: what stands there once, and what is put in its place.
MUTATIONS = {
    "former_block": [(" / s.width + s.eps", " / s.width + 0.1f"), ("0.70710678118654752f", "0.7f")],
    "dynamic_bottleneck": [
        ("top - 1, left - 1);\n\n", "top, left - 1);\n\n"),
        ("there && c + i < channels ? bent", "c + i < channels ? bent"),
        ("(kind - kKernel)", "(kind - kKernel) % 8"),
        ("kHalo + pixel % kTile + 1", "kHalo + pixel % kTile"),
        ("weights[t] *= scale", "weights[t] *= 1"),
        ("head * depth", "head"),
        ("t < tokens ? expf", "t <= tokens ? expf"),
        ("value / sum", "value"),
        ("return one > other || one != one ? one : other", "return one"),
    ],
    "token_chain": [
        ("value + 3 > 6 ? 6", "value + 3 > 5 ? 5"),
        ("between[n] = value < 0 ? 0 : value", "between[n] = value"),
        ("x + s.token * row", "x"),
        ("between + i * s.units", "between"),
        ("2 * n < functions", "2 * n <= functions"),
        ("n < s.outputs ? sample", "n < s.outputs - 1 ? sample"),
    ],
}


@pytest.mark.parametrize("kernel", CHECKS)
def test_the_emulator_sees_defects(kernel, tmp_path):
    """With other constants the kernel gives other numbers; without any one of its barriers it has a race."""
    text = (ROOT / "csrc" / "cuda" / f"{kernel}.cuh").read_text()
    broken = [text]
    for match in re.finditer(r"__syncthreads\(\);", text):
        broken.append(f"{text[: match.start()]};{text[match.end() :]}")
    barriers = len(broken) - 1
    for old, new in MUTATIONS[kernel]:
        assert text.count(old) == 1, old
        broken.append(text.replace(old, new))
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(ROOT / "tests" / "cuda", tmp_path / "tests" / "cuda")
    for index, defect in enumerate(broken):
        (tmp_path / "csrc" / "cuda" / f"{kernel}.cuh").write_text(defect)
        source = tmp_path / "tests" / "cuda" / f"{kernel}.cpp"
        library = build(source, tmp_path / f"{index}.so", "-DMFK_ONE_TYPE")
        what = f"defect {index} of {len(broken) - 1}"
        if 0 < index <= barriers:
            with pytest.raises(AssertionError, match="race in shared memory"):
                CHECKS[kernel](library)
        elif index == 0:
            assert CHECKS[kernel](library)
        else:
            assert not _is_right(CHECKS[kernel], library), what


def _is_right(check, library) -> bool:
    try:
        return check(library)
    except AssertionError:  # the emulator saw it
        return False


TOYS = {
    # A kernel of `toys.cpp`, and what is said of it with barriers and without.
    "shift": ("", "race .* written by thread .* read by thread|race .* read by thread .* written by thread"),
    "within_warps": ("", "race in shared memory"),
    "reuse": ("", "race in shared memory"),
    "agree": ("race .* written .* written",) * 2,
    "beyond": ("memory beside the shared one was read by thread 63",) * 2,
    "crooked": ("memory at 4 bytes behind a multiple of 16 was taken as more by thread 0",) * 2,
    "alone": ("threads waited for others that never came",) * 2,
}


@pytest.mark.parametrize("seed", range(ANY, ANY + 4))
@pytest.mark.parametrize("name", TOYS)
def test_the_emulator_sees_defects_of_toys(emulated, name, seed):
    memory = (ctypes.c_float * 68)()
    aligned = ctypes.addressof(memory) + -ctypes.addressof(memory) % 16
    for meets, expected in zip((1, 0), TOYS[name], strict=True):
        failed = emulated("toys").toy(name.encode(), ctypes.c_void_p(aligned), meets, seed)
        said = failure(emulated("toys"))
        assert bool(failed) == bool(said) == bool(expected), said
        assert re.search(expected, said), said
        if "race" in said and shutil.which("addr2line"):
            assert re.search(r"toys\.cpp:\d.*toys\.cpp:\d", said), said


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_former_block_on_a_gpu(dtype, layout):
    if reason := mfkernels.backends.unavailable("cuda"):
        pytest.skip(reason)
    for shape in former_block.CHOSEN:
        comparison = Comparison(former_block, dtype, "cuda", "cuda")
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            sample = former_block.make(shape, generator)
            comparison.add(expect(former_block, sample, generator, dtype), layout)
        comparison.check(f"{shape}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_token_chain_on_a_gpu(dtype):
    if reason := mfkernels.backends.unavailable("cuda"):
        pytest.skip(reason)
    for shape in CHAINS:
        errors = {name: Errors() for name in Made._fields}
        for seed in range(3):
            block, tokens, gathered = (value.to("cuda", dtype) for value in make_chain(shape, seed))
            truth, eager = expect_chain(block, tokens, gathered)
            made = TokenChain(block)(tokens, gathered)
            for name, error in errors.items():
                error.reference(getattr(eager, name), getattr(truth, name))
                error.kernel(getattr(made, name), getattr(truth, name))
        for name, error in errors.items():
            error.check(f"token_chain {dtype} {shape}, {name}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [same, channels_last, guarded], ids=lambda f: f.__name__)
def test_dynamic_bottleneck_on_a_gpu(dtype, layout):
    """On another stream and in a graph, too."""
    if reason := mfkernels.backends.unavailable("cuda"):
        pytest.skip(reason)
    run = torch.ops.mfkernels_cuda.dynamic_bottleneck
    large = dict(B=2, C=240, E=1440, O=240, H=61, W=97, T=6), dict(num_heads=2, skip=True)
    for shape, others in [*BOTTLENECKS, large]:
        errors = Errors()
        for seed in range(3):
            drawn = make_bottleneck(shape, torch.Generator().manual_seed(seed))
            given = {name: value.to("cuda", dtype) for name, value in drawn.items()}
            truth = dynamic_bottleneck_reference(**{k: v.double() for k, v in given.items()}, **others)
            errors.reference(dynamic_bottleneck_reference(**given, **others), truth)
            given["x"] = layout(given["x"])
            got = run(*given.values(), *others.values())
            errors.kernel(got, truth)
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):
                again = run(*given.values(), *others.values())
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                recorded = run(*given.values(), *others.values())
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(again, got) and torch.equal(recorded, got)
        errors.check(f"dynamic_bottleneck {shape}")


@pytest.mark.gpu
def test_dynamic_bottleneck_refuses():
    if reason := mfkernels.backends.unavailable("cuda"):
        pytest.skip(reason)
    drawn = make_bottleneck(BOTTLENECKS[0][0], torch.Generator().manual_seed(0))
    given = {name: value.to("cuda", torch.bfloat16) for name, value in drawn.items()}
    run = torch.ops.mfkernels_cuda.dynamic_bottleneck
    bad = {name: value[..., 1:] for name, value in given.items() if name != "x"}
    for name, value in bad.items():
        with pytest.raises(RuntimeError, match=f"{name} must have shape"):
            run(*(given | {name: value}).values(), 2, True)
    with pytest.raises(RuntimeError, match="x must be bfloat16 or float16"):
        run(*(value.float() for value in given.values()), 2, True)


@pytest.mark.skipif(NVCC is None, reason="no nvcc was found")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ids=lambda path: path.stem)
def test_compiles_without_spills(source, architecture, tmp_path, record_property):
    include = Path(torch.__file__).parent / "include"
    flags = [
        "-std=c++17",
        "-O3",
        f"-arch={architecture}",
        "-cubin",
        "-Xptxas=-v",
        "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ]
    command = [NVCC, *flags, f"-I{include}", "-o", tmp_path / "out.cubin", source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    stacks = [int(n) for n in re.findall(r"(\d+) bytes stack frame", done.stderr)]
    # As many as all threads of a block have together, or of the two that the kernel's launch bounds ask for.
    most = 128 if source.stem != "dynamic_bottleneck" else 255
    assert stacks and not any(stacks) and max(registers) <= most, done.stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr)]
    record_property("registers", registers)
    assert registers, done.stderr
    assert spills and not any(spills), done.stderr
