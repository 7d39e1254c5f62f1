"""`deploy` on a GPU, with a double of PyTorch's graphs: what it records, keeps, waits for, falls back to."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from test_deploy import make, randomise
from tolerance import Errors

import mfkernels
from mfkernels.deploy.folding import fold_batch_norms
from mfkernels.deploy.gpu import fused_block, graph
from mfkernels.deploy.gpu.activated_depthwise import activated_depthwise_of
from mfkernels.deploy.gpu.dynamic_bottleneck import is_bottleneck
from mfkernels.deploy.gpu.fused_block import FusedBlock, forms, with_fused_blocks
from mfkernels.deploy.gpu.fused_dmf_block import FusedDMFBlock, FusedDynamicConv, with_fused_dmf_blocks
from mfkernels.deploy.gpu.fused_iformer import (
    AttentionResidual,
    PointwiseResidual,
    is_attention,
    is_pair,
    with_pointwise_kernels,
)
from mfkernels.deploy.gpu.graph import MOST_SHAPES, Captured, deployed_on_gpu
from mfkernels.deploy.gpu.token_chain import is_chain
from mfkernels.deploy.gpu.token_steps import LastBridge, is_bridge
from mfkernels.models import DynamicMobileFormer, FeaturePyramid, MobileFormer
from mfkernels.models.iformer import _fuse
from mfkernels.nn import IFormerStage, MobileFormerBlock, MobileFormerDownsample, MobileToFormer, Residual


class Double:
    """Runs on the CPU what a graph would; notes what was done, in order."""

    def __init__(self):
        self.log, self.recording, self.refuses = [], False, None
        self.milliseconds = iter(())  # of the graphs

    def is_recording(self):
        return self.recording

    def on(self, device):
        return nullcontext()

    def pool(self):
        self.log.append("pool")
        return object()

    def event(self):
        self.log.append("event")
        return len(self.log)

    def wait(self, event):
        assert self.log[event - 1] == "event"
        self.log.append("wait")

    def finish(self, event):
        assert self.log[event - 1] == "event"
        self.log.append("finish")

    def record(self, run, pool):
        assert pool is not None
        if self.refuses:
            raise self.refuses("operation not permitted when stream is capturing\nmore")
        self.recording, output, self.recording = True, run(), False
        self.log.append("record")

        def replay():
            self.log.append("replay")
            results = (r if isinstance(r, list) else [r] for r in (output, run()))
            for kept, made in zip(*results, strict=True):
                kept.copy_(made)

        replay.milliseconds = next(self.milliseconds, 1.0)
        return output, replay

    def time(self, replay):
        self.log.append("time")
        return replay.milliseconds


@pytest.fixture
def double(monkeypatch):
    found = Double()
    monkeypatch.setattr(graph, "_gpu", found)
    return found


def image(*shape, seed=0):
    return torch.randn(shape or (2, 3, 64, 64), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["mobile_former_26m", "dmf_xxs", "iformer_t"])
def test_same_numbers(double, name):
    model = make(name, num_classes=7)
    deployed = deployed_on_gpu(model, torch.float32)
    kinds = [type(m) for m in deployed.modules()]
    before = [type(m) for m in model.modules()]
    assert kinds.count(torch.nn.BatchNorm2d) < before.count(torch.nn.BatchNorm2d)
    for seed in range(3):
        with torch.no_grad():
            expected = model(image(seed=seed))
        got = deployed(image(seed=seed))
        assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
    forms = len(deployed.forms)
    made = ["pool", *["record"] * forms, *["time"] * (forms if forms > 1 else 0)]
    assert double.log == [*made, "replay", "event", *["wait", "replay", "event"] * 2]


@pytest.mark.parametrize("name", ["mobile_former_26m", "dmf_96", "iformer_t"])
def test_pyramids(double, name):
    """Their maps are the caller's, too."""
    pyramid = FeaturePyramid(make(name), (1, 0)).eval()
    deployed = deployed_on_gpu(pyramid, torch.float32)
    assert deployed.feature_info.channels() == pyramid.feature_info.channels()
    results = [deployed(image(seed=seed)) for seed in (1, 2)]
    for seed, maps in zip((1, 2), results, strict=True):
        with torch.no_grad():
            expected = pyramid(image(seed=seed))
        assert isinstance(maps, list) and len(maps) == 2
        for one, other in zip(maps, expected, strict=True):
            assert (one - other).abs().max() < 1e-4 * other.abs().max()
    assert double.log[:2] == ["pool", "record"]


def small(double, dtype=torch.float32):
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, 2), torch.nn.BatchNorm2d(4), torch.nn.Flatten(1))
    return Captured([layers], dtype)


def test_results_are_the_callers(double):
    """The next call does not write over them; nor does the caller write into what is kept."""
    deployed = small(double)
    first, second = image(seed=1), image(seed=2)
    one = deployed(first)
    kept = one.clone()
    deployed(second)
    assert torch.equal(one, kept)
    one.zero_()
    assert torch.equal(deployed(first), kept)


def test_shapes_are_bounded(double):
    deployed = small(double)
    for size in (*range(4, 4 + MOST_SHAPES + 1), 4 + MOST_SHAPES):
        deployed(image(1, 3, size, size))
    assert double.log.count("record") == MOST_SHAPES + 1 and double.log.count("pool") == 1
    # The image that goes is not given back while a replay reads it.
    assert double.log.count("finish") == 1 and double.log.index("finish") > double.log.index("event")
    deployed(image(1, 3, 5, 5))
    assert double.log.count("record") == MOST_SHAPES + 1
    deployed(image(1, 3, 4, 4))  # the first to go
    assert double.log.count("record") == MOST_SHAPES + 2


def test_dtypes_and_strides_have_graphs_of_their_own(double):
    deployed = small(double, torch.bfloat16)
    assert deployed(image()).dtype == torch.float32
    assert deployed(image().bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.float16):
        deployed(image().to(memory_format=torch.channels_last))
    assert double.log.count("record") == 3


class Times(torch.nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(float(factor)))

    def forward(self, x):
        if x.shape[2] < self.factor:
            raise RuntimeError("too small for this form")
        return self.factor * x


def test_the_fastest_form_is_taken(double):
    """For each shape; forms that cannot run it are left out, but for the first."""
    deployed = Captured([Times(1), Times(2), Times(3)], torch.float32)
    double.milliseconds = iter((3.0, 1.0, 2.0, 1.0, 2.0, 3.0, 4.0, 3.0))
    for size, factor in ((8, 2), (9, 1), (2, 2), (1, 1)):
        ones = torch.ones(1, 1, size, size)
        for _ in range(2):
            assert torch.equal(deployed(ones), factor * ones)
    assert double.log.count("record") == 3 + 3 + 2 + 1 and double.log.count("time") == 3 + 3 + 2


def tiny():
    rows = [("D", 2, 8, 1, 1, 0), ("D", 3, 12, 1, 2, 4), ("M", 3, 12, 1, 1, 3), ("M", 3, 16, 1, 1, 3)]
    model = MobileFormer(rows, num_classes=5, stem_channels=8, features=32, token_dim=32, token_num=3)
    randomise(model)
    return model.eval()


@pytest.mark.parametrize("whole, in_steps", [(False, False), (True, False), (False, True)])
def test_fused_blocks_do_the_same(whole, in_steps):
    model = tiny().double()
    folded = fold_batch_norms(copy.deepcopy(model))
    fused = with_fused_blocks(folded, whole, in_steps)
    blocks = [block for block in fused.modules() if isinstance(block, FusedBlock)]
    assert len(blocks) == 3 and sum(block.whole for block in blocks) == 2 * whole
    assert not any(isinstance(block, FusedBlock) for block in folded.modules())
    assert isinstance(fused.local_global, LastBridge) == in_steps
    assert {id(p) for p in fused.parameters()} == {id(p) for p in folded.parameters()}
    with torch.no_grad():
        expected, got = (form(image(2, 3, 66, 74).double()) for form in (model, fused))
    assert (got - expected).abs().max() < 1e-10 * expected.abs().max()


def tiny_dmf(**options):
    rows = [(12, 8, 2, 2, 2, 2), (12, 8, 1, 2, 1, 3), (16, 12, 2, 2, 2, 1)]
    given = dict(stem_channels=4, lite_channels=(8, 6), features=20, head_features=16, token_dim=32)
    model = DynamicMobileFormer(rows, num_classes=5, groups=2, **given, **options)
    randomise(model)
    return model.eval()


@pytest.mark.parametrize("options", [dict(), dict(activation="softmax", temperature=3.0)], ids=str)
def test_fused_dmf_blocks_do_the_same(options):
    model = tiny_dmf(**options).double()
    folded = fold_batch_norms(copy.deepcopy(model))
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    fused = with_fused_dmf_blocks(folded, pointwise=False)
    kinds = [type(m) for m in fused.modules()]
    assert kinds.count(FusedDMFBlock) == 3 and kinds.count(FusedDynamicConv) == 7
    with torch.no_grad():
        others = folded, fused, with_fused_dmf_blocks(folded, pointwise=True)
        expected, *got = (form(image(2, 3, 66, 74).double()) for form in (model, *others))
    for result in got:
        assert (result - expected).abs().max() < 1e-10 * expected.abs().max()


def test_only_released_dmf_blocks_are_fused():
    """Not with norms that are not folded, or with hooks."""
    assert with_fused_dmf_blocks(tiny_dmf(), pointwise=False) is None
    folded = fold_batch_norms(tiny_dmf())
    folded.blocks[1].ffn.grn.register_forward_hook(print)
    fused = with_fused_dmf_blocks(folded, pointwise=False)
    assert [isinstance(block, FusedDMFBlock) for block in fused.blocks] == [True, False, True]


def test_fused_iformers_do_the_same():
    model = make("iformer_t", num_classes=7).double()
    folded = copy.deepcopy(model).fuse()
    fused = with_pointwise_kernels(folded)
    parts = [m for m in folded.modules() if isinstance(m, Residual)]
    kinds = [type(m) for m in fused.modules()]
    assert kinds.count(PointwiseResidual) == sum(map(is_pair, parts)) > 0
    assert kinds.count(AttentionResidual) == sum(map(is_attention, parts)) > 0
    assert Residual not in kinds
    with torch.no_grad():
        expected, got = (form(image(2, 3, 70, 57).double()) for form in (model, fused))
    assert (got - expected).abs().max() < 1e-10 * expected.abs().max()


def test_only_released_residual_parts_of_iformer_are_fused():
    """Not with norms that are not folded, with layer scales, in windows or with hooks."""

    def parts(block_type, fuse=True, **options):
        stage = IFormerStage(8, [block_type], **options).eval()
        if fuse:
            _fuse(stage)
        return [m for m in stage.modules() if isinstance(m, Residual)]

    for block_type, fits in (
        ("ConvBlock_k7_r4", is_pair),
        ("FFN2d_r3", is_pair),
        ("SHMABlock_r1", is_attention),
    ):
        (found,) = parts(block_type)
        assert fits(found) and is_pair(found) != is_attention(found)
        found.m.register_forward_hook(print)
        assert not fits(found)
        for other in (dict(fuse=False), dict(layer_scale=0.1)):
            assert not any(map(fits, parts(block_type, **other))), other
    assert not any(map(is_attention, parts("SHMABlock_r1_ws7")))


def block(kind=MobileFormerBlock, **others):
    expansion = 2 if kind is MobileFormerBlock else (2, 4)
    given = dict(expansion=expansion, token_dim=16, token_num=3) | others
    return fold_batch_norms(kind(8, 8, **given).eval())


def test_only_released_bottlenecks_are_one_kernel():
    assert is_bottleneck(block())
    others = [dict(stride=2), dict(groups=2), dict(before_skip=True), dict(kernel_size=(5, 5))]
    others += [dict(depthwise="maxdw"), dict(se_flag=(2, 0, 0, 0)), dict(se_flag=(2, 0, 2, 1))]
    for other in others:
        assert not is_bottleneck(block(**other)), other
    assert not is_bottleneck(MobileFormerBlock(8, 8, expansion=2, token_dim=16, token_num=3))
    wide = MobileFormerBlock(8, 257, expansion=2, token_dim=16, token_num=3).eval()
    assert not is_bottleneck(fold_batch_norms(wide))


def test_only_released_depthwise_convolutions_are_one_kernel_with_their_activations():
    others = [dict(kernel_size=(5, 5)), dict(se_flag=(2, 0, 2, 1)), dict(depthwise="maxdw")]
    normal, down = block(), block(kind=MobileFormerDownsample)
    for found, conv in ((normal, normal.conv2[0]), (down, down.conv3[0])):
        assert activated_depthwise_of(found) is conv
        for other in others:
            assert activated_depthwise_of(block(kind=type(found), **other)) is None, other
        conv.register_forward_hook(print)
        assert activated_depthwise_of(found) is None
    for other in (dict(stride=2), dict(before_skip=True)):
        assert activated_depthwise_of(block(**other)) is None, other
    assert activated_depthwise_of(block(kind=MobileFormerDownsample, depthwise="sepdw")) is None
    assert activated_depthwise_of(MobileFormerBlock(8, 8, expansion=2, token_dim=16, token_num=3)) is None


def test_only_released_token_chains_are_one_kernel():
    for other in (dict(), dict(ffn=False), dict(gates=(False, False, False)), dict(token_id=2)):
        assert is_chain(block(**other)), other
    others = [dict(token_id=-1), dict(se_flag=(2, 0, 0, 0)), dict(se_flag=(1, 0, 1, 0))]
    others += [dict(gates=gates) for gates in ((True, True, False), (True, False, True))]
    others += [dict(mixing="mlp", positions=16), dict(local_projection=True)]
    for other in others:
        assert not is_chain(block(**other)), other
    strange = block()
    strange.global_block.layer_norm.eps = 1e-3
    assert not is_chain(strange)


def test_only_released_bridges_are_the_last():
    def bridge(**options):
        return MobileToFormer(8, 16, **options)

    assert is_bridge(bridge()) and is_bridge(bridge(gate=False))
    for other in (dict(mixing="mlp_attn", token_num=2, positions=9), dict(local_projection=True)):
        assert not is_bridge(bridge(**other)), other
    hooked = bridge()
    hooked.proj.register_forward_hook(print)
    assert not is_bridge(hooked)


def test_forms(monkeypatch):
    model = fold_batch_norms(tiny())
    other = torch.nn.Sequential(model)
    for triton, lacks, single, half in (
        (False, "a compiler", [], []),
        (True, "a compiler", [0], [0]),
        (False, None, [0], [0, 2]),
        (True, None, [0, 0], [0, 0, 2]),
    ):
        monkeypatch.setattr(fused_block, "TRITON_INSTALLED", triton)
        monkeypatch.setattr(fused_block, "CUDA_LACKS", lacks)
        assert forms(other, torch.bfloat16) == [other]
        for dtype, whole in ((torch.float32, single), (torch.bfloat16, half)):
            first, *rest = forms(model, dtype)
            assert first is model
            assert [sum(getattr(block, "whole", False) for block in form.modules()) for form in rest] == whole
    kept = deployed_on_gpu(tiny(), torch.bfloat16).forms
    assert {p.dtype for p in kept.state_dict().values() if p.is_floating_point()} == {torch.bfloat16}
    assert {id(p) for p in kept[2].parameters()} == {id(p) for p in kept[0].parameters()}


class OutOfResources(Exception):
    """As Triton's: of no class of PyTorch's."""


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, OutOfResources])
def test_a_shape_falls_back_with_a_word(double, error):
    deployed, double.refuses = small(double), error
    with pytest.warns(UserWarning, match="without a CUDA graph: operation not permitted when stream"):
        got = deployed(image())
    double.refuses = None
    assert torch.equal(deployed(image()), got) and "record" not in double.log
    deployed(image(1, 3, 5, 5))
    assert double.log.count("record") == 1


def test_float32_is_not_tf32(double):
    """While a network runs or is recorded; what the user has set is there again after it."""
    seen = []

    class Asks(torch.nn.Module):
        def forward(self, x):
            seen.append(torch.backends.cudnn.conv.fp32_precision)
            return x + self.zero

    network = Asks()
    network.zero = torch.nn.Parameter(torch.zeros(()))
    before = torch.backends.cudnn.conv.fp32_precision
    Captured([network], torch.float32)(image())
    assert before == "tf32" and set(seen) == {"ieee"}
    assert torch.backends.cudnn.conv.fp32_precision == before and torch.backends.cudnn.allow_tf32


def test_inside_of_other_graphs_and_compilers(double):
    deployed = small(double)
    double.recording = True
    deployed(image())
    double.recording = False
    program = torch.export.export(deployed, (image(),))
    torch.testing.assert_close(program.module()(image()), deployed(image()))
    assert double.log.count("record") == 1


def test_inference_mode_or_not(double):
    deployed = small(double)
    with torch.inference_mode():
        first = deployed(image())
    assert torch.equal(deployed(image()), first)
    with torch.inference_mode():
        assert torch.equal(deployed(image() + 0), first)


def test_copies_record_their_own(double):
    deployed = small(double)
    expected = deployed(image())
    for other in (copy.deepcopy(deployed), pickle.loads(pickle.dumps(deployed))):
        assert torch.equal(other(image()), expected)
    assert double.log.count("record") == 3
    deployed.double().dtype = torch.float64
    torch.testing.assert_close(deployed(image()), expected)
    assert double.log.count("record") == 4


def test_bad_input(double):
    deployed = small(double)
    with pytest.raises(TypeError, match=r"x must be a float32 tensor, got torch.float16"):
        deployed(image().half())
    with pytest.raises(ValueError, match="x must be on the network's device, cpu, got meta"):
        deployed(image().to("meta"))
    with pytest.raises(ValueError, match="x must not require gradients"):
        deployed(image().requires_grad_())
    with pytest.raises(ValueError, match="x must have 4 dimensions"):
        deployed(image()[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["mobile_former_26m", "mobile_former_214m", "dmf_xxs", "iformer_t"])
def test_on_a_gpu(name, dtype):
    """The same numbers, on another stream, too; and a graph it is: the network itself is not called. In half
    precision as near to float64 as the plain network in that precision is, by the one tolerance."""
    model = make(name, num_classes=7).cuda()
    exact, half = copy.deepcopy(model).double(), copy.deepcopy(model).to(dtype)
    deployed = mfkernels.deploy(model, dtype=dtype)
    cuda, triton = (mfkernels.backends.unavailable(backend) is None for backend in ("cuda", "triton"))
    fused = triton + cuda + (cuda and dtype != torch.float32)
    assert len(deployed.forms) == 1 + {"mo": fused, "dm": 2 * triton, "if": triton}[name[:2]]
    errors = {form: Errors() for form in ("fastest", *range(len(deployed.forms)))}
    for seed, stream in enumerate((torch.cuda.current_stream(), torch.cuda.Stream())):
        x = image(seed=seed).cuda()
        torch.cuda.synchronize()
        with torch.no_grad(), torch.cuda.stream(stream), mfkernels.use_backend("reference"):
            truth, plain = exact(x.double()), half(x.to(dtype))
        with torch.no_grad(), torch.cuda.stream(stream):
            results = {"fastest": deployed(x).to(dtype)}
            results |= {i: form(x.to(dtype)) for i, form in enumerate(deployed.forms)}
        torch.cuda.synchronize()
        for form, error in errors.items():
            error.reference(plain, truth)
            error.kernel(results[form], truth)
            if dtype == torch.float32:  # what is promised
                assert (results[form] - truth).abs().max() < 1e-4 * truth.abs().max(), form
    for form, error in errors.items():
        error.check(f"{name} {dtype}, form {form}")
    got = deployed(x)
    for form in deployed.forms:
        form.forward = None
    assert torch.equal(deployed(x), got)
