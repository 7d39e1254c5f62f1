"""Deployed Dynamic Mobile-Formers and iFormers against the modules that they were made of."""

import copy
import pickle

import pytest
import torch
from test_deploy import check_numbers, make, plain, truth
from threads import on_threads

import mfkernels
from mfkernels.bench.run import randomise
from mfkernels.models import DynamicMobileFormer, IFormer, create_model
from mfkernels.nn import Attention2d, PreNormModulationAttention

SIZES = ((1, 160, 160), (2, 65, 97), (3, 32, 40), (1, 1, 1), (1, 7, 300), *[(4, 64, 64)] * 3)
NAMES = ("dmf_96", "dmf_xxs", "dmf_s", "iformer_t", "iformer_m", "iformer_m_faster", "iformer_h")


@pytest.mark.parametrize("name", NAMES)
def test_same_numbers(name):
    """Under the one tolerance, all images together, and within 1e-4 of the largest logit."""
    check_numbers(make(name, num_classes=101), SIZES, name)


def small_dmf(**options) -> DynamicMobileFormer:
    """Channels that are no multiples of 16, groups whose channels are none either."""
    rows = [(20, 12, 2, 2, 4, 4), (36, 12, 1, 3, 4, 2), (40, 20, 2, 2, 1, 4), (20, 20, 1, 5, 3, 1)]
    settings: dict = dict(stem_channels=8, lite_channels=(12, 6), features=70, head_features=40, groups=2)
    return DynamicMobileFormer(
        **(dict(rows=rows, num_classes=7, token_dim=64, token_num=3) | settings | options)
    )


TYPES = (
    *("ConvBlock_k7_r3", "ConvBlock_k5_r2", "ConvBlock_k3_r2_reparam0", "RepCPE_k3", "FFN2d_r2"),
    *("SHMABlock_r1_hdrr2_act0_nh1", "FFN2d_r3", "RepCPE_k5"),
)


def small_iformer(types=TYPES, **options) -> IFormer:
    settings = dict(depths=(2, 2, 3, 1), dims=(12, 20, 36, 40), block_types=types, num_classes=7)
    return IFormer(**(settings | options))


WINDOWED = (
    *("ConvBlock_k7_r3", "RepCPE_k3", "ConvBlock_k3_r2", "SHMABlock_r1_hdrr2_nh1_ws3"),
    *("SHMABlock_r1_hdrr2_nh1_ws4_wsp1", "RepCPE_k3", "SHMABlock_r1_hdrr2_nh1_ws4_wre1"),
    "SHMABlock_r1_hdrr4_nh1_ws2",
)
NESTED = (
    *WINDOWED[:4],
    *("SHMABlock_r1_hdrr2_nh1_ws5_wsp1", "SHMABlock_r1_hdrr2_nh1_ws2", "SHMABlock_r1_hdrr2_nh1_ws5_wre1"),
    "FFN2d_r2",
)


def halving_dmf() -> DynamicMobileFormer:
    """With a dynamic depthwise convolution of stride 2 in its second block."""
    model = small_dmf()
    model.blocks[1].dynamic_mobile.dw_conv.stride = 2
    return model


def pointwise_halving_dmf() -> DynamicMobileFormer:
    """With a 1x1 dynamic convolution of stride 2 in its second block and its last."""
    model = small_dmf()
    model.blocks[1].dynamic_mobile.pw_conv1.stride = 2
    model.blocks[3].dynamic_mobile.pw_conv2.stride = 2
    return model


def striding_dmf() -> DynamicMobileFormer:
    """With convolutions of one kernel and of several, of strides above 2."""
    model = small_dmf()
    model.blocks[0].dynamic_mobile.downsample[0].stride = (3, 3)
    model.blocks[1].dynamic_mobile.dw_conv.stride = 3
    model.blocks[3].dynamic_mobile.pw_conv2.stride = 4
    model.lite_bottleneck.pw_conv2.stride = (3, 3)
    return model


def with_attention(make_mixer) -> IFormer:
    """An iFormer with other attention than its own in its sixth block."""
    model = small_iformer(layer_scale=0.3)
    blocks = [block for stage in model.stages for block in stage]
    blocks[5].block.token_channel_mixer.m = make_mixer(36)
    return model


SMALL = {
    "dmf, strided": halving_dmf,
    "dmf, 1x1 strided": pointwise_halving_dmf,
    "dmf, strides above 2": striding_dmf,
    "dmf, many kernels": lambda: small_dmf(
        rows=[(20, 12, 1, 2, 17, 40), (20, 12, 1, 2, 33, 1)], activation="softmax"
    ),
    "iformer, plain attention": lambda: with_attention(Attention2d),
    "iformer, heads": lambda: with_attention(lambda c: Attention2d(c, num_heads=3)),
    "iformer, norm before": lambda: with_attention(PreNormModulationAttention),
    "iformer, norm before, values first": lambda: with_attention(
        lambda c: PreNormModulationAttention(c, reduction=4, form="released")
    ),
    "dmf": lambda: small_dmf(),
    "dmf, one group": lambda: small_dmf(groups=1),
    "dmf, softmax, hot": lambda: small_dmf(activation="softmax", temperature=3.0),
    "dmf, response norm of channels": lambda: small_dmf(mean="channels"),
    "dmf, one token": lambda: small_dmf(token_num=1, token_dim=32),
    "dmf, many tokens": lambda: small_dmf(token_num=17, token_dim=96, in_channels=5),
    "dmf, halved at the end": lambda: small_dmf(rows=[(20, 12, 1, 2, 4, 4), (24, 16, 2, 2, 2, 2)]),
    "iformer": lambda: small_iformer(),
    "iformer, layer scale": lambda: small_iformer(layer_scale=0.3),
    "iformer, plain stem": lambda: small_iformer(stem="conv_stem", kernels=(3, 5, 3, 3), in_channels=5),
    "iformer, projection": lambda: small_iformer(last_projection=True, distillation=True),
    "iformer, as in the paper": lambda: small_iformer(form="paper"),
    "iformer, one size": lambda: small_iformer(downsample=False, dims=(16,) * 4),
    "iformer, reparameterized": lambda: small_iformer(("ConvBlock_k7_r2_reparam1",) * 8),
    "iformer, windows": lambda: small_iformer(WINDOWED),
    "iformer, windows at the end": lambda: small_iformer(
        (*TYPES[:7], "SHMABlock_r1_hdrr2_nh1_ws4_wsp1_wre1")
    ),
    "iformer, windows in windows": lambda: small_iformer(NESTED),
    "iformer, nothing in the last stage": lambda: small_iformer(TYPES[:7], depths=(2, 2, 3, 0)),
    "iformer, layer norms": lambda: small_iformer(norm="layer"),
    "iformer, layer norms and windows": lambda: small_iformer(NESTED, norm="layer", layer_scale=0.3),
    "iformer, ConvNeXt's stem": lambda: small_iformer(stem="ConvNeXt", in_channels=5),
    "iformer, as ConvNeXt": lambda: small_iformer(norm="layer", stem="ConvNeXt", dims=(16, 20, 48, 40)),
    "iformer, one size, layer norm": lambda: small_iformer(
        norm="layer", downsample=False, dims=(12,) * 4, stem="ConvNeXt"
    ),
    "iformer, large depthwise convolutions": lambda: small_iformer(
        ("ConvBlock_k9_r2", *TYPES[1:6], "RepCPE_k11", "ConvBlock_k1_r2")
    ),
    "iformer, kernels of other sizes": lambda: small_iformer(kernels=(1, 4, 2, 7), stem="conv_stem"),
}
SIZES_OF_SMALL = ((2, 64, 64), (1, 37, 51), (1, 90, 20), (1, 1, 1))


def make_small(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = SMALL[name]()
    randomise(model, torch.randn(4, model.in_channels, 64, 64))
    return model.eval()


@pytest.mark.parametrize("name", SMALL)
def test_variants(name, instruction_set):
    model = make_small(name)
    deployed = mfkernels.deploy(model)
    taken = 0
    for size in SIZES_OF_SMALL:
        x = torch.randn(size[0], model.in_channels, *size[1:])
        try:
            expected = truth(model, x)
        except RuntimeError:  # a convolution without padding finds too few pixels
            with pytest.raises(RuntimeError, match=r"deploy: x has a size .* would make an empty map"):
                deployed(x)
            continue
        assert (deployed(x) - expected).abs().max() < 2e-5 * expected.abs().max()
        taken += 1
    assert taken == len(SIZES_OF_SMALL) or "norm" in name or "ConvNeXt" in name


@pytest.mark.parametrize("shift", [10.0, 1000.0])
def test_group_norms_of_maps_far_from_zero(shift):
    """Their variance must not be a small difference of large sums."""
    model = make_small("dmf")
    for block in model.blocks:
        block.dynamic_mobile.bn3.bias.data += shift
    check_numbers(model, [(2, 64, 64)] * 8, f"shifted by {shift}")


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16(name, bf16_instruction_set):
    """At most twice the error of the plain network in bfloat16, over several images."""
    model = make_small(name)
    deployed, rounded = mfkernels.deploy(model, dtype=torch.bfloat16), copy.deepcopy(model).bfloat16()
    ours, reference = [], []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, model.in_channels, 64, 48, generator=generator).bfloat16()
        expected = truth(model, x)
        ours.append((deployed(x.float()) - expected).abs().max())
        reference.append((plain(rounded, x) - expected).abs().max())
    assert max(ours) <= 2 * max(reference)


def test_fused_networks_and_copies():
    model = make_small("iformer")
    x = torch.randn(2, 3, 64, 64)
    before = copy.deepcopy(model.state_dict())
    deployed = mfkernels.deploy(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    expected = deployed(x)
    torch.testing.assert_close(mfkernels.deploy(copy.deepcopy(model).fuse())(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(deployed))(x), expected)


@pytest.mark.parametrize("name", ["dmf", "iformer", "iformer, windows"])
def test_batches_strides_and_threads(name):
    model = make_small(name)
    deployed = mfkernels.deploy(model)
    x = torch.randn(5, 3, 150, 130)
    results = on_threads(lambda: deployed(x))
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(deployed(x.contiguous(memory_format=torch.channels_last)), results[0])
    assert torch.equal(torch.cat([deployed(image[None]) for image in x]), results[0]) or torch.allclose(
        torch.cat([deployed(image[None]) for image in x]), results[0], rtol=1e-5, atol=1e-6
    )
    assert deployed(x[:0]).shape == (0, 7)
    assert not deployed(torch.full((1, 3, 64, 64), float("nan"))).isfinite().any()
    assert torch.equal(deployed(x), results[0])


@pytest.mark.parametrize("name", ["dmf", "iformer"])
def test_export_and_opcheck(name):
    deployed = mfkernels.deploy(make_small(name))
    x = torch.randn(2, 3, 40, 48)
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    program = torch.export.export(deployed, (x,), dynamic_shapes=(sizes,))
    other = torch.randn(3, 3, 33, 64)
    assert torch.equal(program.module()(other), deployed(other))
    arguments = (x, deployed.weights, deployed.plan, deployed.classes)
    torch.library.opcheck(torch.ops.mfkernels.deployed.default, arguments)


def test_foreign_plans_are_an_error():
    deployed = mfkernels.deploy(make_small("dmf"))
    other = mfkernels.deploy(make_small("iformer"))
    call = torch.ops.mfkernels.deployed
    x = torch.randn(1, 3, 32, 32)
    longer = deployed.plan.clone()
    longer[-3] += 1
    for weights, plan, classes in (
        (deployed.weights, other.plan, 7),
        (deployed.weights, deployed.plan[:-1], 7),
        (deployed.weights, deployed.plan[:4], 7),
        (deployed.weights.double(), deployed.plan, 7),
        (deployed.weights, deployed.plan, 700),
    ):
        with pytest.raises(RuntimeError, match=r"deploy: (weights|plan|classes) must "):
            call(x, weights, plan, classes)


@pytest.mark.parametrize(
    ("make_model", "message"),
    [
        (lambda: small_iformer(("ConvBlock_k4_r2",) * 8), "only depthwise convolutions of odd squares"),
        (lambda: other_padding(), "only convolutions padded by half of them"),
    ],
)
def test_what_is_not_known_is_named(make_model, message):
    with pytest.raises(ValueError, match=f"deploy: .*{message}"):
        mfkernels.deploy(make_model().eval())


def other_padding() -> DynamicMobileFormer:
    model = small_dmf()
    model.blocks[0].dynamic_mobile.dw_conv.padding = 0
    return model


def test_settings_are_checked():
    """Of layers that are of a known class."""

    def layers(model):
        return model.stages[0][0].block.token_channel_mixer.m

    for change, message in (
        (lambda m: setattr(layers(m)[2], "approximate", "tanh"), "GELU"),
        (lambda m: setattr(m.downsample_layers[1][0].c, "dilation", (2, 2)), "without dilation"),
        (lambda m: setattr(m.downsample_layers[1][0].c, "padding", (0, 1)), "padded by half"),
        (lambda m: setattr(m.downsample_layers[1][0].c, "padding", (2, 2)), "padded by half"),
        (
            lambda m: setattr(m.stages[0][0].block.token_channel_mixer.m[0].c, "stride", (3, 3)),
            "keep the size",
        ),
    ):
        model = small_iformer().eval()
        change(model)
        with pytest.raises(ValueError, match=f"deploy: [a-z_0-9.]+ .*only .*{message}"):
            mfkernels.deploy(model)
    model = small_dmf().eval()
    model.blocks[1].norm.num_groups = 2
    with pytest.raises(ValueError, match=r"deploy: blocks\.1\.norm .*only group norms of one group"):
        mfkernels.deploy(model)


def test_hooks_are_named():
    model = create_model("dmf_96").eval()
    model.blocks[3].former.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"deploy: blocks\.3\.former .*: has a forward hook"):
        mfkernels.deploy(model)


def test_times_name_every_part():
    model = make_small("dmf")
    times = mfkernels.deploy(model).times(torch.randn(1, 3, 64, 64))
    assert all(seconds > 0 for seconds in times.values())
    assert {f"blocks.{i}" for i in range(4)} | {"stem", "blocks.0 tokens", "head.fc2"} <= set(times)
