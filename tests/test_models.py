"""What `create_model` offers beyond the released settings, checkpoints, and how the networks behave."""

import argparse
import copy

import pytest
import torch

import mfkernels
from mfkernels.models import MobileFormer, create_model, list_models, load_released

SMALL = "mobile_former_26m"

VARIANTS = {
    "spatial-aware": dict(token_id=-1),
    "token by index": dict(token_id=2),
    "one token": dict(token_num=1),
    "wide tokens": dict(token_dim=192),
    "no ffn": dict(ffn=False),
    "position mixing": dict(mixing="mlp", image_size=64),
    "both mixings": dict(mixing="mlp_attn", image_size=64),
    "kernel 5": dict(kernel_size=(5, 5)),
    "no gates": dict(gates=(False, False, False)),
    "all gates": dict(gates=(True, True, True)),
    "before the residual": dict(before_skip=True),
    "static activations": dict(se_flag=(0, 0, 0, 0)),
    "squeeze and excitation": dict(se_flag=(1, 0, 1, 1)),
    "projected keys": dict(local_projection=True),
    "dynamic head": dict(head_activation="dynamic_relu"),
    "pooled tokens": dict(class_tokens=0),
    "no groups": dict(groups=1),
}


def _randomised(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_the_same_on_both_backends(variant):
    model = _randomised(create_model(SMALL, num_classes=7, **VARIANTS[variant])).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    results = []
    for backend in ("reference", "cpu"):
        net = copy.deepcopy(model)
        with mfkernels.use_backend(backend):
            out = net(x)
            out.square().sum().backward()
        results.append([out, *(p.grad for p in net.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 100
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() <= 1e-9 * max(1.0, one.abs().max().item())


@pytest.mark.parametrize("name", list_models())
def test_any_batch_and_size(name):
    model = create_model(name, num_classes=3).eval()
    with torch.inference_mode():
        for batch, height, width in ((2, 33, 47), (1, 1, 1), (0, 32, 32)):
            assert model(torch.randn(batch, 3, height, width)).shape == (batch, 3)


def test_channels_last_is_kept_and_changes_nothing():
    model = create_model(SMALL).eval()
    x = torch.randn(2, 3, 64, 64)
    seen = []
    model.features[2].register_forward_hook(lambda *a: seen.append(a[2][0]))
    with torch.inference_mode():
        expected = model(x)
        got = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert seen[1].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, expected)


def test_drop_path_and_dropout_only_in_training():
    model = create_model(SMALL, drop_path=0.5, dropout=0.5, drop_branch=(0.2, 0.2))
    x = torch.randn(4, 3, 32, 32)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
            module.eval()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_drop_path_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(20000, 1)
    dropped = mfkernels.nn.DropPath(0.25)(x)
    torch.testing.assert_close(dropped.unique(), torch.tensor([0, 1 / 0.75]))
    assert abs(dropped.mean() - 1) < 0.02


@pytest.mark.parametrize("kind", ["maxdw", "sepdw"])
def test_ablations_of_the_depthwise_convolution(kind):
    """They fit only some widths, and the first does not fit the lite bottleneck."""
    model = MobileFormer([("D", 6, 32, 1, 2, 4)], depthwise=kind, num_classes=3)
    x = torch.randn(2, 3, 32, 32)
    with mfkernels.use_backend("reference"):
        expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(model(x), expected)


# --- checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "state_dict_ema", "module", "nested"])
def test_checkpoint_files(tmp_path, wrap):
    source = create_model(SMALL, num_classes=5)
    state = source.state_dict()
    renamed = {f"module.{k}": v for k, v in state.items()}
    content = {
        "plain": state,
        "module": renamed,
        "nested": {"epoch": 3, "args": argparse.Namespace(lr=0.1), "state_dict": renamed},
    }.get(wrap, {wrap: state, "epoch": 3})
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    model = create_model(SMALL, num_classes=5, checkpoint=path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_mismatch_lists_everything_and_changes_nothing():
    model = create_model(SMALL, num_classes=5)
    before = copy.deepcopy(model.state_dict())
    state = create_model(SMALL, num_classes=6).state_dict()
    state["extra.weight"] = torch.zeros(2)
    del state["stem.0.weight"], state["tokens.weight"]
    with pytest.raises(ValueError) as error:
        load_released(model, state)
    message = str(error.value)
    for part in (
        "missing (2)",
        "stem.0.weight",
        "tokens.weight",
        "unknown (1)",
        "extra.weight",
        "other shapes (2)",
    ):
        assert part in message
    assert "(6, " in message and "(5, " in message
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="weights_only=True"):
        create_model(SMALL, checkpoint=tmp_path / "evil.pth")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("state", [{}, {"epoch": 3}, {"model": 5}])
def test_no_state_dict(state):
    with pytest.raises(TypeError, match="expected names and tensors"):
        load_released(create_model(SMALL), state)


def test_from_released_has_the_released_defaults():
    """Of the constructor: position mixing, no gate, no FFN, kernel 3."""
    model = MobileFormer.from_released([["DnaBlock3", 6, 12, 1, 2, 4]], img_size=64, num_classes=3)
    names = model.state_dict().keys()
    assert any("local_global.mlp" in name for name in names)
    assert not any("alpha" in name or "ffn" in name for name in names)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 3)
