"""Attention maps: they are the weights that the network itself uses, and sum to 1."""

import pytest
import torch
from torch.nn import functional as F

import mfkernels
from mfkernels import attention_maps, cli, nn
from mfkernels.models import EndToEndMobileFormer, FeaturePyramid, MobileFormer, create_model

TINY = [("D", 2, 8, 1, 1, 0), ("D", 3, 12, 1, 2, 2), ("M", 3, 12, 1, 1, 3)]


def watched(model: torch.nn.Module, *inputs: torch.Tensor) -> tuple[dict, dict]:
    """The maps, and from each part's name to the part, its arguments and what it returns."""
    calls = {}

    def hook(name):
        return lambda part, args, kwargs, out: calls.update({name: (part, args, kwargs, out)})

    handles = [
        part.register_forward_hook(hook(name), with_kwargs=True) for name, part in model.named_modules()
    ]
    with torch.no_grad():
        model(*inputs)
    for handle in handles:
        handle.remove()
    maps = attention_maps(model, *inputs)
    return maps, {name: calls[name] for name in maps}


def attended(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(B, T, C): what tokens gather from a map (B, C, H, W)."""
    values = x.flatten(2).unflatten(1, (weights.shape[1], -1))
    return (weights.flatten(3) @ values.transpose(2, 3)).transpose(1, 2).flatten(2)


def given(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W): what pixels gather from values (B, T, C)."""
    by_head = values.unflatten(2, (weights.shape[1], -1)).permute(0, 2, 3, 1)
    return (by_head @ weights.flatten(3)).flatten(1, 2).unflatten(-1, weights.shape[3:])


@torch.no_grad()
def output_by_the_weights(kind: str, weights: torch.Tensor, part, args, kwargs) -> torch.Tensor:
    """A part's output from its attention weights and its other layers."""
    if kind == "kernels":
        return weights
    if kind == "pixels":
        (x,) = args
        size, window = x.shape[2:], part.window_size
        if window is not None:
            x = F.pad(x, (0, -x.shape[3] % window, 0, -x.shape[2] % window))
        values, gate = part.v_gate(x).sigmoid().chunk(2, 1)
        if window is not None:
            values = nn.iformer_block.split_windows(values, window)
        y = (values.flatten(2) @ weights.flatten(2).transpose(1, 2)).view_as(values)
        y = y if window is None else nn.iformer_block.join_windows(y, *x.shape[2:])
        return part.proj(y * gate)[:, :, : size[0], : size[1]]
    x, tokens = args[0] if len(args) == 1 else args[:2]
    if isinstance(part, nn.DMFMobileToFormer):
        return part.fc(attended(weights, x)) + part.norm(tokens)
    if kind == "mobile_to_former":
        gathered = attended(weights, x).transpose(0, 1) * (2 * part.alpha(tokens))
        return part.layer_norm(tokens + part.proj(gathered))
    return x + given(weights, part.proj(tokens).transpose(0, 1))


def check_all(model: torch.nn.Module, kinds: set[str], *inputs: torch.Tensor) -> dict:
    maps, calls = watched(model, *inputs)
    assert {found.kind for found in maps.values()} == kinds
    for name, (kind, weights) in maps.items():
        part, args, kwargs, out = calls[name]
        if kind != "kernels":
            axes = {"mobile_to_former": (3, 4), "former_to_mobile": 2, "pixels": (2, 3)}[kind]
            sums = weights.sum(axes)
            torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-12)
            assert weights.min() >= 0
        ours = output_by_the_weights(kind, weights, part, args, kwargs)
        theirs = out[0] if isinstance(out, tuple) else out
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    return maps


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_mobile_former():
    model = create_model("mobile_former_26m").double().eval()
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    maps = check_all(model, {"mobile_to_former", "former_to_mobile"}, x)
    blocks = [name for name, part in model.named_modules() if hasattr(part, "global_local")]
    order = [f"{block}.{part}" for block in blocks for part in ("local_global", "global_local")]
    assert list(maps) == [*order, "local_global"]
    assert maps["features.1.local_global"].weights.shape == (2, 2, 3, 16, 24)
    assert maps["local_global"].weights.shape == (2, 2, 3, 2, 3)


@pytest.mark.parametrize("token_id", [0, -1])
def test_spatial_aware_and_projections(token_id):
    settings = dict(stem_channels=8, token_dim=32, token_num=4, token_id=token_id)
    model = MobileFormer(TINY, **settings).double().eval()
    check_all(model, {"mobile_to_former", "former_to_mobile"}, torch.randn(1, 3, 32, 48, dtype=torch.float64))
    projected = MobileFormer(TINY, local_projection=True, **settings).double().eval()
    maps, calls = watched(projected, torch.randn(1, 3, 32, 48, dtype=torch.float64))
    name = "features.1.global_local"
    part, ((x, tokens),), _, out = calls[name]
    taken = given(maps[name].weights, part.proj(tokens).transpose(0, 1))
    torch.testing.assert_close(x + part.fuse(taken), out)
    name = "features.1.local_global"
    part, ((x, tokens),), _, (out, logits) = calls[name]
    torch.testing.assert_close(maps[name].weights, logits.flatten(3).softmax(-1).view_as(logits))


def test_dmf():
    model = create_model("dmf_xxs").double().eval()
    for part in model.modules():
        if isinstance(part, nn.KernelAttention):
            torch.nn.init.normal_(part.net2.weight)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    maps = check_all(model, {"mobile_to_former", "kernels"}, x)
    scores = maps["blocks.0.dynamic_mobile.pw_conv1.Kernel_Attention"].weights
    assert scores.dim() == 2 and scores.std() > 0


@pytest.mark.parametrize(("name", "size"), [("iformer_t", 64), ("iformer_m_faster", 288)])
def test_iformer(name, size):
    """At 288 the third stage has 18x18 pixels, which are four windows."""
    model = create_model(name).double().eval()
    check_all(model, {"pixels"}, torch.randn(1, 3, size, size, dtype=torch.float64))


def test_attention_within_windows():
    block = nn.SHMABlock(16, window_size=4).double().eval()
    maps = check_all(block, {"pixels"}, torch.randn(2, 16, 7, 9, dtype=torch.float64))
    assert maps["token_channel_mixer.m"].weights.shape == (2 * 6, 16, 4, 4)


def test_detector_with_padding():
    network = MobileFormer([*TINY, ("D", 3, 16, 1, 2, 2)], stem_channels=8, token_dim=32, token_num=3)
    model = EndToEndMobileFormer(FeaturePyramid(network), (1, 1), num_classes=2, queries=5, channels=32)
    model = model.double().eval()
    x, mask = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.zeros(2, 64, 64, dtype=torch.bool)
    mask[1, 40:] = True
    maps = attention_maps(model, x, mask)
    for name in ("backbone.network.features.1.local_global", "scales.1.0.local_global"):
        weights = maps[name].weights
        rows = -(-40 * weights.shape[3] // 64)
        assert weights[1, :, :, rows:].abs().max() == 0 and weights[1, :, :, :rows].min() > 0
        torch.testing.assert_close(weights.sum((3, 4)), torch.ones(2, 2, weights.shape[2]).double())
    assert maps["scales.0.0.global_local"].weights.shape[2] == 5


def test_it_leaves_the_model_as_it_was():
    model, x = create_model("mobile_former_26m").eval(), torch.randn(1, 3, 64, 64)
    before = model(x)
    attention_maps(model, x)
    assert torch.equal(model(x), before)
    assert not any(part._forward_pre_hooks for part in model.modules())
    with pytest.raises(ValueError, match="must have 3 channels"):
        attention_maps(model, torch.randn(1, 4, 64, 64))
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_bad_arguments():
    model, x = create_model("mobile_former_26m"), torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match="model must be in eval mode"):
        attention_maps(model, x)
    model.eval()
    with pytest.raises(TypeError, match=r"a deployed network has not\), got Deployed"):
        attention_maps(mfkernels.deploy(model), x)
    with pytest.raises(TypeError, match=r"must have bridges.*got Linear"):
        attention_maps(torch.nn.Linear(3, 3), x)
    with pytest.raises(TypeError, match="x must be a"):
        attention_maps(model, [1.0])
    with pytest.raises(ValueError, match="x must have 4 dimensions"):
        attention_maps(model, torch.randn(3, 64, 64))


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("mobile_former_26m", {"bridge.png", "mobile_to_former.png", "former_to_mobile.png"}),
        ("dmf_xxs", {"mobile_to_former.png", "kernels.png"}),
        ("iformer_t", {"pixels.png"}),
    ],
)
def test_figures(name, files, tmp_path, capsys):
    pillow = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    photo = tmp_path / "photo.png"
    pillow.new("RGB", (90, 60), (0, 0, 255)).save(photo)
    arguments = ["attention", str(photo), "--model", name, "--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    assert "random weights" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    for path in (tmp_path / "out").iterdir():
        assert len(pillow.open(path).convert("RGB").getcolors(1 << 24)) > 50
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--checkpoint", "none.pth"])
    assert stop.value.code != 0 and "none.pth" in capsys.readouterr().err.splitlines()[-1]


def test_pictures_show_the_weights_on_the_photo():
    figures = pytest.importorskip("mfkernels.attention_figures")
    weights = torch.zeros(1, 1, 2, 2, 2)
    weights[0, 0, 0, 0, 0], weights[0, 0, 1, 1, 1] = 1, 1
    maps = {"features.3.local_global": mfkernels.AttentionMap("mobile_to_former", weights)}
    made = figures._figures(maps, torch.zeros(3, 8, 8))
    assert [name for name, figure in made.items() if figure] == ["mobile_to_former.png"]
    (axes,) = made["mobile_to_former.png"].axes
    shown = axes.images[0].get_array()
    side = shown.shape[0]
    assert shown.shape == (side, 2 * side, 3)
    first, second = shown[:, :side], shown[:, side:]
    # Red over black where the weight is, blue over black where it is not.
    for picture, there, elsewhere in ((first, 8, -8), (second, -8, 8)):
        red, blue = picture[there, there], picture[elsewhere, elsewhere]
        assert red[0] > 0.2 and red[2] < 0.01 and blue[2] > 0.2 and blue[0] < 0.01
    assert [label.get_text() for label in axes.get_yticklabels()] == ["features.3, head 1"]
