"""The host code of the CUDA operators against a stand-in for CUDA's runtime, which notes launches, refuses
what a device would refuse, and runs the kernels on the emulator: `tests/cuda/stand_in`."""

import ctypes
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import former_block
from emulated import CXX, FLAGS, FOLDER, name_of
from test_contract import channels_last, far_apart, guarded, reversed_axes, same
from test_cuda import BOTTLENECKS, CHAINS, expect_chain, make_bottleneck, make_chain
from tolerance import Errors

from mfkernels.deploy.gpu.dynamic_bottleneck import dynamic_bottleneck_reference
from mfkernels.deploy.gpu.token_chain import Made, TokenChain

MOST_SHARED = 227 * 1024  # bytes that a block may have on an H100
STREAM = 7

# All of it by `make gpu-bed`.
SLOW = [pytest.param(dtype, marks=pytest.mark.bed) for dtype in (torch.float32, torch.float16)]
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, *SLOW], ids=name_of)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The stand-in with the operators of `torch.ops.mfkernels_emulated`."""
    folder, torch_folder = tmp_path_factory.mktemp("host"), Path(torch.__file__).parent
    flags = [*FLAGS, "-fsanitize=alignment", "-Wno-attributes", "-DUSE_CUDA"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{FOLDER}/stand_in"]
    flags += ["-isystem", str(torch_folder / "include")]

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run([*CXX, *flags, "-c", "-o", target, source], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, (FOLDER / "host.cpp", FOLDER / "stand_in" / "runtime.cpp")))
    target = folder / "host.so"
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-ldl"]
    subprocess.run([*CXX, "-shared", "-o", target, *objects, *libraries], check=True)
    torch.ops.load_library(str(target))
    loaded = ctypes.CDLL(str(target))
    loaded.stand_in_log.restype = ctypes.c_char_p
    return loaded


@pytest.fixture
def device(library):
    """The stand-in, as new, with a stream that is current."""
    library.stand_in_reset(MOST_SHARED)
    library.stand_in_use_stream(ctypes.c_void_p(STREAM))
    yield library
    library.stand_in_use_stream(ctypes.c_void_p(0))


def noted(device) -> list[str]:
    """What happened; that kernels were allowed more memory is left out."""
    lines = device.stand_in_log().decode().splitlines()
    return [line for line in lines if not line.startswith("allowed")]


def run_former(tensors: dict, others: dict, layout=same):
    names = [
        "tokens", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "norm1_weight", "norm1_bias",
        "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "norm2_weight", "norm2_bias",
    ]  # fmt: skip
    given = [tensors.get(name) for name in names]
    others = dict(num_heads=4, form="released", eps=1e-5) | others
    run = torch.ops.mfkernels_emulated.former_block
    return run(*(None if t is None else layout(t) for t in given), *others.values())


@dtypes
def test_former_block(device, dtype):
    """At the edges."""
    for shape in former_block.CHOSEN[1:9]:
        errors = Errors()
        for seed in range(3 if shape["d"] < 100 else 1):
            sample = former_block.make(shape, torch.Generator().manual_seed(seed))
            given = {k: None if v is None else v.to(dtype) for k, v in sample.tensors.items()}
            others = dict(num_heads=4, form="released", eps=1e-5) | sample.others
            device.stand_in_reset(MOST_SHARED)
            got = run_former(given, sample.others)
            blocks = shape["B"] if shape["T"] else 0
            assert [line.rpartition(",")[0] for line in noted(device)] == [
                f"launch on stream {STREAM}: {blocks} blocks of 512 threads"
            ] * (blocks > 0)
            wide = {k: None if v is None else v.double() for k, v in given.items()}
            truth = former_block.REFERENCE(**wide, **others)
            errors.reference(former_block.REFERENCE(**given, **others), truth)
            errors.kernel(got, truth)
        errors.check(f"former_block {shape}")


@pytest.mark.parametrize("layout", [guarded, reversed_axes], ids=lambda f: f.__name__)
def test_former_block_in_layouts(device, layout):
    """Makes the same bits however tensors lie in memory; `guarded` ones begin where no vector does."""
    for shape in former_block.CHOSEN[5:9]:
        sample = former_block.make(shape, torch.Generator().manual_seed(0))
        given = {k: None if v is None else v.bfloat16() for k, v in sample.tensors.items()}
        expected = run_former(given, sample.others)
        assert torch.equal(run_former(given, sample.others, layout), expected), shape


def run_chain(block, tokens, gathered) -> Made:
    chain = TokenChain(block)
    given = tokens, gathered, chain.packed, chain.offsets, chain.sizes, 1e-5
    *made, back = torch.ops.mfkernels_emulated.token_chain(*given)
    return Made(*made, *back)


@dtypes
@pytest.mark.parametrize("layout", [same, guarded, reversed_axes, far_apart], ids=lambda f: f.__name__)
def test_token_chain(device, dtype, layout):
    shape = CHAINS[3]
    block, tokens, gathered = (value.to(dtype) for value in make_chain(shape, 0))
    truth, eager = expect_chain(block, tokens, gathered)
    made = run_chain(block, layout(tokens), layout(gathered))
    for name in Made._fields:
        errors = Errors()
        errors.reference(getattr(eager, name), getattr(truth, name))
        errors.kernel(getattr(made, name), getattr(truth, name))
        errors.check(name)
    assert len(noted(device)) == 1
    assert noted(device)[0].startswith(f"launch on stream {STREAM}: 1 blocks of 512 threads")
    run_chain(block, tokens[:, :0], gathered[:0])
    assert len(noted(device)) == 1, "without samples there is nothing to launch"


@pytest.mark.parametrize("dtype", [torch.bfloat16, SLOW[1]], ids=name_of)
@pytest.mark.parametrize("layout", [same, channels_last, guarded], ids=lambda f: f.__name__)
def test_dynamic_bottleneck(device, dtype, layout):
    run = torch.ops.mfkernels_emulated.dynamic_bottleneck
    for shape, others in BOTTLENECKS[3:]:
        drawn = make_bottleneck(shape, torch.Generator().manual_seed(0))
        given = {name: value.to(dtype) for name, value in drawn.items()}
        device.stand_in_reset(MOST_SHARED)
        got = run(
            *(layout(value) if value.dim() > 3 else value for value in given.values()), *others.values()
        )
        tiles = shape["B"] * -(-shape["H"] // 8) * -(-shape["W"] // 8)
        [line] = noted(device)
        assert line.startswith(f"launch on stream {STREAM}: {tiles} blocks of 256 threads")
        truth = dynamic_bottleneck_reference(**{k: v.double() for k, v in given.items()}, **others)
        errors = Errors()
        errors.reference(dynamic_bottleneck_reference(**given, **others), truth)
        errors.kernel(got, truth)
        errors.check(f"dynamic_bottleneck {shape}")
    bad = given | {"keys": given["keys"][..., 1:]}
    with pytest.raises(RuntimeError, match="keys must have shape"):
        run(*bad.values(), *others.values())
    with pytest.raises(RuntimeError, match="x must be bfloat16 or float16"):
        run(*(value.float() for value in given.values()), *others.values())
    empty = run(
        given["x"][:0], *(v[:0] if v.dim() == 3 else v for v in [*given.values()][1:]), *others.values()
    )
    assert empty.shape[0] == 0 and len(noted(device)) == 1


def former_of(batch: int, tokens: int, width: int, heads: int) -> tuple[dict, dict]:
    """Without a feed-forward network; its memory is never touched."""
    empty = {"tokens": torch.empty(batch, tokens, width, dtype=torch.bfloat16)}
    square, row = (torch.empty(width, n, dtype=torch.bfloat16) for n in (width, 1))
    empty |= dict(qkv_weight=square, proj_weight=square, norm1_weight=row[:, 0], norm1_bias=row[:, 0])
    return empty, dict(num_heads=heads)


def test_sizes_that_no_device_takes(device):
    # The largest grid there is, noted and not run; and one beyond. Memory that is not touched is not taken.
    run_former(*former_of(2**31 - 1, 1, 1, 1))
    assert noted(device)[0].startswith(f"launch on stream {STREAM}: 2147483647 blocks")
    with pytest.raises(RuntimeError, match="too many or too wide"):
        run_former(*former_of(2**31, 1, 1, 1))
    # So many heads that bytes of shared memory overflow 32 bits, to 0 or to a few.
    for tokens, width, heads in ((2048, 16, 16), (4095, 256, 256), (4096 - 32, 1024, 1024), (900, 64, 4)):
        with pytest.raises(RuntimeError, match=r"tokens of width \d+ need \d+ bytes of shared memory"):
            run_former(*former_of(1, tokens, width, heads))
    block, tokens, gathered = make_chain(CHAINS[3], 0)
    many = tokens[:, :1].expand(-1, 2**31, -1), gathered[:1].expand(2**31, -1, -1)
    with pytest.raises(RuntimeError, match="2147483648 samples"):
        run_chain(block, *many)
    assert len(noted(device)) == 1


def test_a_device_with_less_shared_memory(device):
    device.stand_in_reset(48 * 1024)
    shape, others = dict(B=1, C=160, E=64, O=160, H=7, W=7, T=6), dict(num_heads=2, skip=True)
    given = make_bottleneck(shape, torch.Generator().manual_seed(0))
    run = torch.ops.mfkernels_emulated.dynamic_bottleneck
    with pytest.raises(RuntimeError, match='this device has 49152; use the backend "triton"'):
        run(*(value.bfloat16() for value in given.values()), *others.values())
    assert not noted(device)


def test_capture(device):
    """Nothing that operators call is forbidden while a stream is captured; what is would be seen."""
    stream = ctypes.c_void_p(STREAM)
    sample = former_block.make(former_block.CHOSEN[5], torch.Generator().manual_seed(0))
    given = {k: None if v is None else v.bfloat16() for k, v in sample.tensors.items()}
    device.stand_in_capture(stream)
    run_former(given, sample.others, guarded)
    assert noted(device)[0].startswith(f"launch on stream {STREAM} captured: 1 blocks")
    assert device.stand_in_end_capture(stream)
    device.stand_in_capture(stream)
    assert device.stand_in_synchronize(stream) == 900
    with pytest.raises(RuntimeError, match="CUDA error 901: a launch in a capture that failed before"):
        run_former(given, sample.others)
    assert not device.stand_in_end_capture(stream)


def test_two_threads(device):
    """Each launches on its own stream, and more shared memory was asked for once for each kernel."""
    shape, others = dict(B=1, C=8, E=64, O=16, H=8, W=8, T=2), dict(num_heads=1, skip=False)
    drawn = make_bottleneck(shape, torch.Generator().manual_seed(0))
    given = [value.half() for value in drawn.values()]
    run, begin, results = torch.ops.mfkernels_emulated.dynamic_bottleneck, threading.Barrier(2), {}

    def work(stream: int):
        device.stand_in_use_stream(ctypes.c_void_p(stream))
        begin.wait()
        results[stream] = [run(*given, *others.values()) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(stream,)) for stream in (11, 12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, results[11][0]) for values in results.values() for a in values)
    streams = [line.split(":")[0] for line in noted(device)]
    assert sorted(streams) == ["launch on stream 11"] * 4 + ["launch on stream 12"] * 4
    assert device.stand_in_log().decode().count("allowed") <= 1


@pytest.mark.parametrize(
    "grid, threads, shared, stream, error, said",
    [
        ((1, 1, 1), 32, 49152, STREAM, 0, "launch on stream 7: 1 blocks of 32 threads, 49152 bytes"),
        ((0, 1, 1), 32, 0, STREAM, 9, "refused: a grid of 0 blocks"),
        ((2**31, 1, 1), 32, 0, STREAM, 9, "refused: a grid of 2147483648 blocks"),
        ((1, 65536, 1), 32, 0, STREAM, 9, "refused: a grid of 65536 blocks"),
        ((1, 1, 65536), 32, 0, STREAM, 9, "refused: a grid of 65536 blocks"),
        ((1, 1, 1), 1056, 0, STREAM, 9, "refused: blocks of 1056 threads"),
        ((1, 1, 1), 32, 49153, STREAM, 1, "refused: 49153 bytes of shared memory, where 49152 are allowed"),
        ((1, 1, 1), 32, 0, 0, 1, "refused: a launch on stream 0, the current one is 7"),
    ],
)
def test_the_stand_in_refuses(device, grid, threads, shared, stream, error, said):
    memory = torch.zeros(8)
    place = ctypes.c_void_p(memory.data_ptr())
    got = device.stand_in_launch(
        (ctypes.c_uint * 3)(*grid), threads, ctypes.c_size_t(shared), ctypes.c_void_p(stream), place
    )
    assert (got, noted(device)[0]) == (error, said)


def test_the_stand_in_refuses_misaligned_vectors(device):
    memory = torch.zeros(8)
    one = (ctypes.c_uint * 3)(1, 1, 1)
    for offset, error in ((0, 0), (4, 716), (8, 716)):
        place = ctypes.c_void_p(memory.data_ptr() + offset)
        assert device.stand_in_launch(one, 32, ctypes.c_size_t(0), ctypes.c_void_p(STREAM), place) == error
