"""What the three families of networks have in common, and what DMF and iFormer have of their own."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import mfkernels
from mfkernels.models import DynamicMobileFormer, IFormer, annealed_temperature, create_model, load_released

SMALL = ("mobile_former_26m", "dmf_96", "iformer_t")
PYRAMIDS = {
    "mobile_former_26m": [12, 24, 64, 96],
    "mobile_former_508m": [40, 72, 176, 240],
    "dmf_s": [40, 72, 176, 240],
    "dmf_xs": [30, 54, 132, 180],
    "dmf_xxs": [20, 36, 88, 120],
    "dmf_96": [12, 24, 64, 96],
    "iformer_t": [32, 64, 128, 256],
}
families = pytest.mark.parametrize("name", SMALL)


def _gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(1)
    model(x).square().sum().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("name", PYRAMIDS)
def test_pyramid(name):
    backbone = create_model(name, features_only=True).eval()
    assert backbone.feature_info.channels() == PYRAMIDS[name]
    assert backbone.feature_info.reduction() == [4, 8, 16, 32]
    with torch.inference_mode():
        maps = backbone(torch.randn(1, 3, 70, 64))
    assert [m.shape[1] for m in maps] == PYRAMIDS[name]
    assert [tuple(m.shape[2:]) for m in maps] == [(18, 16), (9, 8), (5, 4), (3, 2)]


@families
def test_pyramid_is_that_of_the_network(name):
    """With the same weights, and nothing left that has no part in it."""
    torch.manual_seed(0)
    network = create_model(name).eval()
    x, seen = torch.randn(1, 3, 64, 64), {}
    last = network.feature_stages[-1].name
    network.get_submodule(last).register_forward_hook(lambda m, i, o: seen.update(map=o))
    backbone = mfkernels.models.FeaturePyramid(copy.deepcopy(network), out_indices=(1, -1)).train()
    assert backbone.feature_info.channels() == [PYRAMIDS[name][1], PYRAMIDS[name][3]]
    assert backbone.feature_info.module_name()[1] == last
    with torch.inference_mode():
        network(x)
        maps = backbone.eval()(x)
    expected = seen["map"][0] if isinstance(seen["map"], tuple) else seen["map"]
    assert len(maps) == 2 and torch.equal(maps[1], expected)
    # The last map leads nowhere in the tokens of the last Former.
    unused = {n for n, g in _backward_of(backbone) if g is None}
    assert all("former" in n or "tokens" in n or "local_global" in n for n in unused), unused


@families
def test_pyramid_leaves_its_network_whole(name):
    network = create_model(name).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        before = network(x)
        backbone = mfkernels.models.FeaturePyramid(network)
        assert torch.equal(network(x), before)
    names = {n for n, _ in network.named_parameters()}
    kept = {n.removeprefix("network.") for n, _ in backbone.named_parameters()}
    assert kept < names


def _backward_of(backbone: nn.Module):
    sum(m.sum() for m in backbone(torch.randn(2, 3, 32, 32))).backward()
    return [(n, p.grad) for n, p in backbone.named_parameters()]


def test_pyramid_names_a_map_that_is_not_there():
    with pytest.raises(ValueError, match=r"out_indices must be of 4 maps, each at most once, got \(0, 4\)"):
        create_model("iformer_t", features_only=True, out_indices=(0, 4))
    with pytest.raises(ValueError, match="out_indices needs features_only"):
        create_model("iformer_t", out_indices=(0,))


@families
def test_checkpointing_changes_nothing(name):
    """Neither gradients nor running statistics, which a second forward pass would move twice."""
    torch.manual_seed(0)
    plain = create_model(name, num_classes=5, drop_path=0.3).double()
    kept = copy.deepcopy(plain)
    kept.set_grad_checkpointing()
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    for one, other in zip(_gradients(plain, x), _gradients(kept, x), strict=True):
        torch.testing.assert_close(one, other)
    for (key, one), other in zip(plain.named_buffers(), kept.buffers(), strict=True):
        assert torch.equal(one, other), key


@families
def test_channels_last(name):
    torch.manual_seed(0)
    model = create_model(name).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        expected = model(x)
        got = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, expected)


@families
def test_drop_path_and_dropout_only_in_training(name):
    options = dict(drop_path=0.5) | ({} if name.startswith("iformer") else dict(dropout=0.5))
    model = create_model(name, **options).train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    x = torch.randn(4, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@families
def test_training_step_compiles(name):
    compiled = torch.compile(create_model(name, num_classes=3), backend="aot_eager", fullgraph=True)
    compiled(torch.randn(2, 3, 32, 32)).sum().backward()
    assert any(p.grad is not None for p in compiled.parameters())


@families
def test_copies_pickles_and_functional_calls(name):
    torch.manual_seed(0)
    model = create_model(name, num_classes=3).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
    halves = {key: value / 2 for key, value in model.named_parameters()}
    got = torch.func.functional_call(model, halves, (x,))
    assert not torch.allclose(got, expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter /= 2
    assert torch.equal(model(x), got)


@families
def test_export(name):
    model = create_model(name, num_classes=3).eval()
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: batch},))
    other = torch.randn(5, 3, 64, 64)
    torch.testing.assert_close(program.module()(other), model(other))


@families
def test_autocast(name):
    """Runs, and stays near."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=3).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            got = model(x)
    assert (got.float() - expected).abs().max() < 0.1 * max(0.1, expected.abs().max())


@families
def test_bad_images(name):
    model = create_model(name)
    with pytest.raises(ValueError, match=r"x must have 3 channels, got shape \(1, 1, 8, 8\)"):
        model(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="x must have 4 dimensions"):
        model(torch.zeros(3, 8, 8))
    with pytest.raises(TypeError, match=r"floating-point dtype, got torch\.uint8"):
        model(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_near_names_are_suggested():
    with pytest.raises(ValueError, match="did you mean iformer_t"):
        create_model("iFormer-t")
    with pytest.raises(ValueError, match="must be one of mobile_former_26m"):
        create_model("resnet50")


@pytest.mark.parametrize("name", ["mobile_former_26m", "iformer_t"])
def test_checkpoint_of_another_family(name):
    with pytest.raises(ValueError, match=r"does not fit DynamicMobileFormer\nmissing \(\d+\)"):
        load_released(create_model("dmf_96"), create_model(name).state_dict())


def test_timm():
    """In a process of its own: importing timm registers the networks for good."""
    pytest.importorskip("timm")
    script = """
import timm, mfkernels, torch
mine = lambda name: timm.models.model_entrypoint(name).__module__ == "mfkernels.models.timm_registry"
taken = [name for name in mfkernels.models.list_models() if not mine(name)]
assert all(name.startswith("iformer") and mine("mfkernels_" + name) for name in taken)
iformer = "mfkernels_iformer_t" if "iformer_t" in taken else "iformer_t"
model = timm.create_model("dmf_96", num_classes=3, in_chans=1, drop_path_rate=0.1).eval()
assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 3)
pyramid = timm.create_model(iformer, features_only=True, out_indices=(1, 3))
assert pyramid.feature_info.channels() == [64, 256]
try:
    timm.create_model(iformer, pretrained=True)
except ValueError as error:
    assert "checkpoint=" in str(error)
else:
    raise AssertionError("no error")
mfkernels.models.register_with_timm()  # a second time changes nothing
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- DMF ----------------------------------------------------------------------------------------------------


def test_names_of_the_paper():
    for paper, number in (("dmf_s", "dmf_500"), ("dmf_xs", "dmf_285"), ("dmf_xxs", "dmf_198")):
        load_released(create_model(paper), create_model(number).state_dict())


def test_temperature():
    torch.manual_seed(0)
    model = create_model("dmf_96", basis="random").eval()
    x = torch.randn(1, 3, 32, 32)
    hot, cold = model(x), [model.set_temperature(30.0), model(x)][1]
    assert not torch.equal(hot, cold)
    assert "temperature" not in "".join(model.state_dict())
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        model.set_temperature(0)


def test_annealed_temperature():
    """From nearly 30 to 1 over ten epochs, a step at a time; 1 from their last step on."""
    steps = [annealed_temperature(i, 7) for i in range(100)]
    assert steps[0] == pytest.approx(1 + 29 * 69 / 70) and steps[34] == pytest.approx(1 + 29 * 35 / 70)
    assert steps[69:] == [1.0] * 31 and steps == sorted(steps, reverse=True)


def test_basis_and_activation_and_mean():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    zeros = create_model("dmf_96")
    assert zeros.channel_conv.weight.abs().max() == 0
    random = create_model("dmf_96", basis="random").eval()
    assert random.channel_conv.weight.abs().max() > 0
    outputs = [random(x)]
    for options in (dict(activation="softmax"), dict(mean="channels")):
        other = create_model("dmf_96", **options).eval()
        load_released(other, random.state_dict())
        with torch.no_grad():
            for module in other.modules():
                if isinstance(module, mfkernels.nn.GlobalResponseNorm):
                    module.gamma.fill_(0.5)
            outputs.append(other(x))
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[1], outputs[2])
    for options in (dict(activation="tanh"), dict(basis="ones"), dict(mean="x")):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            create_model("dmf_96", **options)


def test_from_released_dmf_says_what_is_missing():
    with pytest.raises(ValueError, match="params lacks stem, lite_bneck, block, channel_conv, head"):
        DynamicMobileFormer.from_released(params={})
    with pytest.raises(ValueError, match="qkv_bias must be False, got True"):
        DynamicMobileFormer.from_released(qkv_bias=True, params={})


# --- iFormer ------------------------------------------------------------------------------------------------


def test_fused_network_is_the_same():
    torch.manual_seed(0)
    model = create_model("iformer_t", num_classes=7, distillation=True, layer_scale=0.1).double()
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(3):
            model(x)  # moves the running statistics
    with pytest.raises(RuntimeError, match="train mode"):
        model.fuse()
    expected = model.eval()(x)
    fused = copy.deepcopy(model).fuse()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules())
    torch.testing.assert_close(fused(x), expected)


def test_windows():
    """A map that is one window is attended as a whole; a larger one is not."""
    torch.manual_seed(0)
    whole = create_model("iformer_m", num_classes=3).double().eval()
    windowed = create_model("iformer_m", num_classes=3, window_size=4).double().eval()
    load_released(windowed, whole.state_dict())
    small, large = (torch.randn(2, 3, n, n, dtype=torch.float64) for n in (64, 96))
    with torch.inference_mode():
        torch.testing.assert_close(windowed(small), whole(small))
        assert not torch.allclose(windowed(large), whole(large))
    with pytest.raises(ValueError, match="iformer_t has no form with window_size, got 16"):
        create_model("iformer_t", window_size=16)


@pytest.mark.parametrize(
    "types, message",
    [
        (["ConvBlock_q7"], "cannot read 'q7'"),
        (["Conv_k7"], "must begin with ConvBlock, SHMABlock, FFN2d, RepCPE"),
        (["SHMABlock_r1_wsp1"], "a window must be given with 'ws'"),
        (["SHMABlock_r1_hdrr2_ws4_wsp1"], "needs a 'wre1'"),
        (["SHMABlock_r1_hdrr2_ws4_wre1"], "needs a 'wre1'"),
        (["SHMABlock_r1_hdrr2_ws4_wsp1", "SHMABlock_r1_hdrr2_ws8_wre1"], "needs a 'wre1'"),
    ],
)
def test_block_strings_that_cannot_be_read(types, message):
    with pytest.raises(ValueError, match=message):
        mfkernels.nn.IFormerStage(8, types)


@pytest.mark.parametrize(
    "options",
    [
        dict(conv_stem_type="conv_stem", use_bn=True),
        dict(conv_stem_type="ConvNeXt", use_bn=False),
        dict(use_bn=True, last_proj=True),
        dict(use_bn=True, sep_downsample=False, dims=[8] * 4),
    ],
    ids=str,
)
def test_other_released_forms_of_iformer(options):
    settings = dict(depths=[1] * 4, dims=[8, 16, 24, 32], block_types=["ConvBlock_k7_r2"] * 4, num_classes=3)
    model = IFormer.from_released(**settings | options)
    out = model(torch.randn(2, 3, 64, 96))
    assert out.shape == (2, 3)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(block_types=None), "block_types must be a list"),
        (dict(block_types=["ConvBlock_k7_r2"] * 3), "must have 4 entries"),
        (dict(dims=[8, 8, 8]), "dims must have four values"),
        (dict(conv_stem_type="x"), "stem must be 'FusedIB'"),
        (dict(act_layer=nn.ReLU), "act_layer must be GELU, got ReLU"),
    ],
)
def test_from_released_iformer_says_what_does_not_fit(options, message):
    settings = dict(depths=[1] * 4, dims=[8] * 4, block_types=["ConvBlock_k7_r2"] * 4, use_bn=True)
    with pytest.raises(ValueError, match=message):
        IFormer.from_released(**settings | options)
