"""`verify`, as a function and as a command."""

import copy

import pytest
import torch
from lookalikes import DMFLike
from torch import nn

import mfkernels
from mfkernels import cli, verification
from mfkernels.bench.run import randomise
from mfkernels.models import create_model


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = create_model(name, num_classes=7)
    randomise(model, torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    return model.eval()


def images(count=4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, 3, 64, 64 + 8 * i, generator=generator) for i in range(count)]


@pytest.mark.parametrize("name", ["mobile_former_26m", "dmf_96", "iformer_t"])
def test_networks_of_ours_pass(name):
    model = make(name)
    result = mfkernels.verify(model, model, images())
    assert result.passed and str(result).endswith("passed")
    names = [row.block for row in result.rows]
    lists = {"mobile_former_26m": "features.3", "dmf_96": "blocks.3", "iformer_t": "stages.2.3"}
    assert lists[name] in names and names[-1] == "output"
    assert all(0 < row.reference < 1e-3 for row in result.rows if row.block not in ("stem",))


def test_deployed_and_accelerated_networks_pass():
    model = make("iformer_t")  # in the others rounding comes back a hundred times over, by luck
    result = mfkernels.verify(model, mfkernels.deploy(model), images())
    assert result.passed and [row.block for row in result.rows] == ["output"]
    torch.manual_seed(0)
    plain = DMFLike().eval()
    fast = copy.deepcopy(plain)
    mfkernels.accelerate(fast)
    result = mfkernels.verify(plain, fast, images())
    assert result.passed and "mobile2former" in [row.block for row in result.rows]


def test_a_wrong_block_is_named():
    model = make("iformer_t")
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.stages[2][3].block.token_channel_mixer.m[1].c.weight.mul_(1.001)
    result = mfkernels.verify(model, wrong, images())
    failed = [row.block for row in result.rows if not row.passed]
    assert failed[0] == "stages.2.3" and failed[-1] == "output" and not result.passed
    assert "stages.2.3" in str(result) and "TOO LARGE" in str(result) and "FAILED" in str(result)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_fails(value):
    model = make("iformer_t")
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.classifier.classifier.l.bias[0] = value
    assert not mfkernels.verify(model, wrong, images(1)).passed


def test_another_shape_fails():
    model = make("iformer_t")
    assert not mfkernels.verify(model, create_model("iformer_t", num_classes=8).eval(), images(1)).passed


def test_bad_arguments():
    model = make("iformer_t")
    training = copy.deepcopy(model).train()
    with pytest.raises(ValueError, match="reference_model must be in eval mode"):
        mfkernels.verify(training, model, images(1))
    with pytest.raises(ValueError, match="fast_model must be in eval mode"):
        mfkernels.verify(model, training, images(1))
    with pytest.raises(TypeError, match=r"fast_model must be an nn\.Module, got str"):
        mfkernels.verify(model, "iformer_t", images(1))
    with pytest.raises(ValueError, match="at least one tensor"):
        mfkernels.verify(model, model, [])
    with pytest.raises(TypeError, match="inputs must be tensors, got int"):
        mfkernels.verify(model, model, [3])
    with pytest.raises(ValueError, match=r"narrower than torch\.float64"):
        mfkernels.verify(model, model, images(1), dtype=torch.float64)


def test_command(capsys, tmp_path):
    for name in ("mobile_former_26m", "dmf_96"):
        assert cli.main(["verify", name, "--deploy"]) == 0
        assert "passed" in capsys.readouterr().out
    path = tmp_path / "weights.pth"
    torch.save(create_model("mobile_former_26m").state_dict(), path)
    with pytest.raises(SystemExit) as status:
        cli.main(["verify", "mobile_former_52m", "--checkpoint", str(path)])
    assert status.value.code == 1 and "does not fit MobileFormer" in capsys.readouterr().err


def test_command_fails_where_a_network_does(monkeypatch, capsys):
    rows = (verification.Row("output", fast=1e-3, reference=1e-4, allowed=2e-4),)
    monkeypatch.setattr(verification, "verify", lambda *a, **k: verification.Verification(rows))
    assert cli.main(["verify", "mobile_former_26m"]) == 1
    assert "FAILED" in capsys.readouterr().out
