"""Deployed networks against the modules that they were made of."""

import copy
import io
import pickle
import re
import threading

import pytest
import torch
from test_models import VARIANTS
from tolerance import MeanErrors

import mfkernels
from mfkernels import _C, native
from mfkernels.bench.run import randomise
from mfkernels.models import MobileFormer, create_model, mobile_former

SMALL = "mobile_former_26m"
SIZES = ((1, 224, 224), (2, 65, 97), (3, 32, 40), (1, 1, 1), (1, 7, 300), (2, 300, 2), *[(4, 64, 64)] * 5)


def make(name: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    model = create_model(name, **options)
    randomise(model)
    return model.eval()


def plain(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(), mfkernels.use_backend("reference"):
        return model(x)


def truth(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return plain(copy.deepcopy(model).double(), x.double())


def check_numbers(model: torch.nn.Module, sizes, what: str) -> None:
    deployed = mfkernels.deploy(model)
    errors = MeanErrors()
    for seed, (batch, height, width) in enumerate(sizes):
        x = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))
        expected, got = truth(model, x), deployed(x)
        errors.reference(plain(model, x), expected)
        errors.kernel(got, expected)
        assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
    errors.check(what)


@pytest.mark.parametrize("name", mobile_former.NAMES)
def test_same_numbers(name, instruction_set):
    """Under the one tolerance, all images together; and within 1e-4 of the largest logit, as promised."""
    check_numbers(make(name, num_classes=101), SIZES, name)


BF16 = pytest.mark.skipif(not _C.bf16_supported(), reason="this processor does not multiply bfloat16")


@pytest.mark.parametrize("name", mobile_former.NAMES)
def test_bfloat16(name, bf16_instruction_set):
    """At most twice the error of the plain network in bfloat16."""
    model = make(name, num_classes=101)
    deployed, rounded = mfkernels.deploy(model, dtype=torch.bfloat16), copy.deepcopy(model).bfloat16()
    ours, reference, largest = [], [], []
    for seed, (batch, height, width) in enumerate(SIZES):
        x = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)).bfloat16()
        expected = truth(model, x)
        got = deployed(x.float())
        assert got.dtype == torch.float32
        assert torch.equal(deployed(x), got.bfloat16())
        ours.append((got - expected).abs().max())
        # oneDNN's convolution with AMX, as of PyTorch 2.13, makes NaN of the image that is two pixels wide.
        with torch.backends.mkldnn.flags(enabled=False):
            reference.append((plain(rounded, x) - expected).abs().max())
        largest.append(expected.abs().max())
    assert max(ours) <= 2 * max(reference)
    assert sum(ours) <= sum(reference) < sum(largest)


def test_bfloat16_variants_threads_and_copies(bf16_instruction_set):
    threads = torch.get_num_threads()
    for options in DEPLOYABLE.values():
        model = small_variant(options)
        x = torch.randn(2, model.in_channels, *((64, 64) if "image_size" in options else (37, 51)))
        deployed = mfkernels.deploy(model, dtype=torch.bfloat16)
        expected = truth(model, x)
        error = (deployed(x) - expected).abs().max()
        reference = (plain(copy.deepcopy(model).bfloat16(), x.bfloat16()) - expected).abs().max()
        assert error <= 2 * reference
        try:
            torch.set_num_threads(2)
            assert torch.equal(pickle.loads(pickle.dumps(deployed))(x), deployed(x))
            both = deployed(x)
            torch.set_num_threads(1)
            assert torch.equal(deployed(x), both)
        finally:
            torch.set_num_threads(threads)


@BF16
def test_bfloat16_needs_its_instructions():
    model = create_model(SMALL).eval()
    deployed = mfkernels.deploy(model, dtype=torch.bfloat16)
    before = native.instruction_set()
    native.set_instruction_set("generic")
    try:
        with pytest.raises(RuntimeError, match=r"needs a processor with avx512bf16 .* but generic is in use"):
            mfkernels.deploy(model, dtype=torch.bfloat16)
        with pytest.raises(RuntimeError, match="AVX512-BF16"):
            deployed(torch.ones(1, 3, 32, 32))
    finally:
        native.set_instruction_set(before)


@pytest.mark.skipif(_C.bf16_supported(), reason="this processor multiplies bfloat16")
def test_bfloat16_on_another_processor_is_an_error():
    with pytest.raises(RuntimeError, match="bfloat16 needs a processor with avx512bf16"):
        mfkernels.deploy(create_model(SMALL).eval(), dtype=torch.bfloat16)


DEPLOYABLE = {
    "one token": dict(token_num=1),
    "many tokens": dict(token_num=17),
    "another token": dict(token_id=2),
    "narrow tokens": dict(token_dim=40),
    "no ffn": dict(ffn=False),
    "no gates": dict(gates=(False, False, False)),
    "four heads": dict(num_heads=4),
    "no groups": dict(groups=1),
    "two class tokens": dict(class_tokens=2),
    "no class token": dict(class_tokens=-1),
    "odd channels": dict(in_channels=5, stem_channels=24, features=70),
    "kernel 5": dict(kernel_size=(5, 5)),
    "kernels 5 and 3": dict(kernel_size=(5, 3), groups=1),
    "all gates": dict(gates=(True, True, True)),
    "the last gate": dict(gates=(False, False, True)),
    "before the residual": dict(before_skip=True),
    "static activations": dict(se_flag=(0, 0, 0, 0)),
    "no activations": dict(se_flag=(-1, 0, -1, 0)),
    "squeeze and excitation": dict(se_flag=(1, 0, 1, 1)),
    "excitation of the output": dict(se_flag=(2, 0, 2, 1)),
    "all at once": dict(se_flag=(1, 0, 2, 1), before_skip=True, kernel_size=(3, 5)),
    "dynamic head": dict(head_activation="dynamic_relu"),
    "pooled tokens": dict(class_tokens=0),
    "spatial-aware": dict(token_id=-1),
    "spatial-aware, one token": dict(token_id=-1, token_num=1),
    "spatial-aware, many tokens": dict(token_id=-1, token_num=17, num_heads=4),
    "spatial-aware, excitation": dict(token_id=-1, se_flag=(1, 0, 2, 1), kernel_size=(3, 5)),
    "spatial-aware, before the residual": dict(token_id=-1, se_flag=(2, 0, 1, 1), before_skip=True),
    "spatial-aware, static": dict(token_id=-1, se_flag=(0, 0, 0, 0)),
    "projected keys": dict(local_projection=True),
    "projected, all gates": dict(local_projection=True, gates=(True, True, True), num_heads=4, groups=1),
    "projected, before the residual": dict(local_projection=True, before_skip=True),
    "kernels 7 and 9": dict(kernel_size=(7, 9)),
    "kernel 7": dict(kernel_size=(7, 7), groups=1, token_id=-1),
    "strides above 2": dict(strides=(3, 4)),
    "strides above 2, columns and rows": dict(strides=(2, 3), depthwise="sepdw", expansions=(4, 0, 6, 2)),
    "strides above 2, columns or rows, spatial-aware": dict(
        strides=(5, 3), depthwise="maxdw", token_id=-1, expansions=(3, 2, 6, 4)
    ),
    "position mixing": dict(mixing="mlp", image_size=64),
    "position mixing, all gates": dict(mixing="mlp", image_size=64, gates=(True, True, True), groups=1),
    "position mixing, one token": dict(mixing="mlp", image_size=64, token_num=1, token_dim=40),
    "both mixings": dict(mixing="mlp_attn", image_size=64),
    "both mixings, many tokens": dict(mixing="mlp_attn", image_size=64, token_num=17, num_heads=4),
    "both mixings, all gates": dict(mixing="mlp_attn", image_size=64, gates=(True, True, True)),
    "both mixings, before the residual": dict(mixing="mlp_attn", image_size=64, before_skip=True),
    "both mixings, spatial-aware": dict(mixing="mlp_attn", image_size=64, token_id=-1),
    "both mixings, projected": dict(
        mixing="mlp_attn", image_size=64, local_projection=True, gates=(True, True, True), num_heads=4
    ),
    "projected in vain": dict(mixing="mlp", image_size=64, local_projection=True, before_skip=True),
    "projected, spatial-aware": dict(local_projection=True, token_id=-1, se_flag=(2, 0, 1, 1)),
    "columns and rows": dict(depthwise="sepdw", expansions=(4, 0, 6, 2)),
    "columns and rows, spatial-aware": dict(
        depthwise="sepdw", expansions=(2, 4, 2, 4), groups=1, token_id=-1
    ),
    "columns or rows": dict(depthwise="maxdw", expansions=(3, 2, 6, 4)),
    "columns or rows, excitation": dict(
        depthwise="maxdw", expansions=(2, 4, 6, 1), se_flag=(1, 0, -1, 1), token_id=-1
    ),
}


def small_variant(options: dict) -> MobileFormer:
    options = dict(groups=4, token_num=3, expansions=(3, 0, 6, 4)) | options
    channels, (a, b, c, d) = options.get("in_channels", 3), options.pop("expansions")
    s, t = options.pop("strides", (2, 2))
    rows = [("D", a, 12, 1, s, b), ("M", 3, 12, 1, 1, 3), ("D", c, 20, 1, t, d), ("M", 4, 20, 1, 1, 4)]
    torch.manual_seed(0)
    model = MobileFormer(rows, num_classes=7, **options)
    randomise(model, torch.randn(4, channels, 64, 64))
    return model.eval()


@pytest.mark.parametrize("variant", DEPLOYABLE)
def test_variants(variant):
    model = small_variant(DEPLOYABLE[variant])
    channels = model.in_channels
    deployed = mfkernels.deploy(model)
    for size in ((2, channels, 64, 64), (1, channels, 37, 51)):
        x = torch.randn(size)
        if size[2] == 37 and "image_size" in DEPLOYABLE[variant]:
            with pytest.raises(RuntimeError, match=r"deploy: x has a size .* of maps of 256 pixels"):
                deployed(x)
            continue
        expected = truth(model, x)
        assert (deployed(x) - expected).abs().max() < 2e-5 * expected.abs().max()


def test_mixed_slopes(instruction_set):
    """Of maps whose pixels are several tasks', of odd sizes, and of one pixel."""
    model = make(SMALL, num_classes=101, token_id=-1)
    check_numbers(model, SIZES[:6], "spatial-aware")
    printed = str(mfkernels.deploy(model))
    assert "weights of 3 tokens" in printed and ", mixed by map" in printed


def test_mixed_slopes_take_little_memory():
    """The tokens' weights at each position, not the slopes of each channel there."""
    plain, mixed = (mfkernels.deploy(small_variant(dict(token_id=i))) for i in (0, -1))
    maps = [max(int(c) for c in re.findall(r"map \d: (\d+) x", str(network))) for network in (plain, mixed)]
    assert maps[0] == maps[1]


@pytest.mark.parametrize("rows", [[], [("D", 6, 12, 1, 2, 4)], [("D", 2, 12, 1, 2, 0)]], ids=len)
def test_short_networks(rows):
    model = MobileFormer(rows, num_classes=3)
    randomise(model)
    model.eval()
    x = torch.randn(2, 3, 40, 40)
    expected = truth(model, x)
    assert (mfkernels.deploy(model)(x) - expected).abs().max() < 2e-5 * expected.abs().max()


def test_every_variant_is_deployed():
    assert set(VARIANTS) - {"token by index", "wide tokens"} <= set(DEPLOYABLE)


def test_what_is_not_known_is_named():
    model = create_model("mobile_former_52m", kernel_size=(4, 4)).eval()
    with pytest.raises(ValueError, match=r"deploy: [a-z_0-9.]+ \(Conv2d\): only depthwise convolutions of"):
        mfkernels.deploy(model)


def test_strange_parts_are_named():
    class Mine(torch.nn.Module):
        pass

    model = create_model(SMALL).eval()
    model.features[2] = Mine().eval()
    with pytest.raises(ValueError, match=r"deploy: features\.2 \(Mine\): unknown"):
        mfkernels.deploy(model)
    model = create_model(SMALL).eval()
    model.features[1].act1 = Mine().eval()
    with pytest.raises(ValueError, match=r"deploy: features\.1\.act1 \(Mine\): unknown"):
        mfkernels.deploy(model)
    model = create_model(SMALL).eval()
    model.features[4].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"deploy: features\.4 .*: has a forward hook"):
        mfkernels.deploy(model)


def test_bad_arguments():
    model = create_model(SMALL)
    with pytest.raises(ValueError, match="must be in eval mode"):
        mfkernels.deploy(model)
    model.eval()
    model.features[3].conv1.train()
    with pytest.raises(ValueError, match=r"but features\.3\.conv1 is not"):
        mfkernels.deploy(model)
    with pytest.raises(TypeError, match=r"must be a MobileFormer or .* or FeaturePyramid, got Linear"):
        mfkernels.deploy(torch.nn.Linear(2, 2).eval())
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got int"):
        mfkernels.deploy(5)
    with pytest.raises(
        TypeError, match=r"dtype must be torch\.float32, torch\.bfloat16 or torch\.int8, got torch\.float16"
    ):
        mfkernels.deploy(model.eval(), dtype=torch.float16)
    deployed = mfkernels.deploy(model)
    for bad, kind, message in (
        (torch.ones(3, 8, 8), ValueError, "x must have 4 dimensions"),
        (torch.ones(1, 4, 8, 8), ValueError, r"x must have shape \(B, 3, H, W\)"),
        (torch.ones(1, 3, 0, 8), ValueError, r"got \(1, 3, 0, 8\)"),
        (torch.ones(1, 3, 8, 8).double(), TypeError, "float32 tensor on the CPU, got torch.float64"),
        (torch.ones(1, 3, 8, 8, requires_grad=True), ValueError, "must not require gradients"),
        ("image", TypeError, "x must be a tensor, got str"),
    ):
        with pytest.raises(kind, match=message):
            deployed(bad)


@pytest.fixture(scope="module")
def pair():
    model = make(SMALL)
    return model, mfkernels.deploy(model)


def test_the_model_is_left_alone():
    model = make(SMALL)
    before = copy.deepcopy(model.state_dict())
    deployed = mfkernels.deploy(model)
    x = torch.randn(1, 3, 48, 48)
    first = deployed(x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(deployed(x), first)


def test_strides_and_batches(pair):
    _, deployed = pair
    x = torch.randn(3, 3, 50, 41)
    expected = deployed(x)
    buffer = torch.full((3, 3, 60, 90), float("nan"))
    buffer[:, :, 5:55, 4:86:2] = x
    for other in (
        x.contiguous(memory_format=torch.channels_last),
        x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2),
        buffer[:, :, 5:55, 4:86:2],
    ):
        assert torch.equal(deployed(other), expected)
    for i in range(3):
        torch.testing.assert_close(deployed(x[i : i + 1]), expected[i : i + 1])
    assert deployed(x[:0]).shape == (0, 1000)
    assert torch.equal(deployed(x[:1].expand(2, -1, -1, -1))[1], deployed(x[:1].expand(2, -1, -1, -1))[0])


def test_same_bits_on_any_number_of_threads(pair):
    _, deployed = pair
    threads = torch.get_num_threads()
    x = torch.randn(3, 3, 200, 150)
    try:
        results = []
        for count in (1, 2, 3, 4, 4):
            torch.set_num_threads(count)
            results.append(deployed(x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_calls_at_the_same_time(pair):
    _, deployed = pair
    images = [torch.randn(1, 3, 64 + 16 * i, 48) for i in range(4)]
    expected = [deployed(x) for x in images]
    wrong = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(deployed(images[i]), expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i % 4,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_sizes_in_any_order(pair):
    """Working memory is kept between calls: a large image must leave nothing for a small one."""
    _, deployed = pair
    images = [torch.randn(1, 3, size, size) for size in (32, 200, 31, 200, 33, 1)]
    expected = [mfkernels.deploy(pair[0])(x) for x in images]
    assert all(torch.equal(deployed(x), y) for x, y in zip(images, expected, strict=True))


def test_infinities_and_nan_do_not_stay(pair):
    _, deployed = pair
    x = torch.randn(1, 3, 40, 40)
    expected = deployed(x)
    for bad in (float("nan"), float("inf")):
        assert not deployed(torch.full((1, 3, 90, 90), bad)).isfinite().all()
        assert torch.equal(deployed(x), expected)


def test_copies_pickles_and_state(pair):
    _, deployed = pair
    x = torch.randn(1, 3, 40, 40)
    expected = deployed(x)
    file = io.BytesIO()
    torch.save(deployed, file)
    file.seek(0)
    for other in (
        copy.deepcopy(deployed),
        pickle.loads(pickle.dumps(deployed)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(other(x), expected)


def test_export_and_compile(pair):
    _, deployed = pair
    x = torch.randn(2, 3, 40, 48)
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    program = torch.export.export(deployed, (x,), dynamic_shapes=(sizes,))
    other = torch.randn(3, 3, 33, 64)
    assert torch.equal(program.module()(other), deployed(other))
    compiled = torch.compile(deployed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), deployed(x))


def test_opcheck(pair):
    _, deployed = pair
    arguments = (torch.randn(1, 3, 32, 32), deployed.weights, deployed.plan, deployed.classes)
    torch.library.opcheck(torch.ops.mfkernels.deployed.default, arguments)


def test_foreign_weights_are_an_error(pair):
    _, deployed = pair
    call = torch.ops.mfkernels.deployed
    x = torch.randn(1, 3, 32, 32)
    for weights, plan in (
        (deployed.weights.double(), deployed.plan),
        (deployed.weights, deployed.plan[:-1]),
        (deployed.weights, deployed.plan[:5]),
        (deployed.weights[:100], deployed.plan),
        (deployed.weights, deployed.plan.int()),
    ):
        with pytest.raises(RuntimeError, match=r"deploy: (weights|plan|classes) must "):
            call(x, weights, plan, deployed.classes)


def test_times_name_every_part(pair):
    model, deployed = pair
    times = deployed.times(torch.randn(1, 3, 64, 64))
    assert all(seconds >= 0 for seconds in times.values()) and sum(times.values()) > 0
    assert {name for name in times if name.startswith("features") and "tokens" not in name} == {
        f"features.{i}" for i in range(len(model.features))
    }
