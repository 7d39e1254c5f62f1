"""`accelerate` and `restore`, on small networks of the released structure."""

import copy
import io
import pickle

import lookalikes
import pytest
import torch
from lookalike_networks import DynamicMobileFormer, iFormer
from lookalikes import DMFLike, IFormerLike, MobileFormer
from torch import nn

import mfkernels
from mfkernels.acceleration import Unfit, adopt

COUNTS = {MobileFormer: 7, DMFLike: 6, IFormerLike: 3, DynamicMobileFormer: 13, iFormer: 20}
networks = pytest.mark.parametrize("network", COUNTS, ids=lambda n: n.__name__)


def make(network, **options) -> nn.Module:
    torch.manual_seed(0)
    model = network(**options).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.abs().max() == 0 or parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def images(batch=4) -> torch.Tensor:
    return torch.randn(batch, 3, 18, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(images()).square().mean().backward()
    optimizer.step()


def originals(model: nn.Module) -> list[str]:
    return [type(m).__name__ for m in model.modules() if type(m).__module__.startswith("lookalike")]


@networks
def test_same_numbers_in_training_and_in_inference(network):
    plain, fast = make(network), make(network)
    report = mfkernels.accelerate(fast)
    assert len(report.replaced) == COUNTS[network] and not report.left
    results = []
    for model in (plain, fast):
        out = model.train()(images())
        out.square().sum().backward()
        gradients = [p.grad for p in model.parameters()]
        results.append([out, *gradients, *(b.double() for b in model.buffers()), model.eval()(images())])
    for one, other in zip(*results, strict=True):
        # PyTorch's hardsigmoid, which our gates take, has a gradient rounded to float32 in float64, too.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7 * max(1.0, one.abs().max().item()))


@networks
def test_parameters_are_the_same_objects_under_the_same_names(network):
    model = make(network)
    before = dict(model.named_parameters()), dict(model.named_buffers()), list(model.state_dict())
    mfkernels.accelerate(model)
    for old, new in zip(before, (model.named_parameters(), model.named_buffers()), strict=False):
        new = dict(new)
        assert list(old) == list(new) and all(old[name] is new[name] for name in old)
    assert list(model.state_dict()) == before[2]


@networks
def test_optimizers_and_checkpoints_go_on(network, tmp_path):
    """An optimizer made before; a checkpoint of before into the fast network, and one of its own back."""
    plain, fast = make(network), make(network)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (plain, fast)]
    train(plain, optimizers[0])
    train(fast, optimizers[1])
    torch.save([plain.state_dict(), optimizers[0].state_dict()], tmp_path / "before.pt")
    mfkernels.accelerate(fast)
    model, optimizer = torch.load(tmp_path / "before.pt")
    fast.load_state_dict(model, strict=True)
    optimizers[1].load_state_dict(optimizer)
    for _ in range(3):
        train(plain, optimizers[0])
        train(fast, optimizers[1])
    for (name, one), other in zip(plain.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8, msg=name)
    make(network).load_state_dict(fast.state_dict(), strict=True)


@networks
def test_twice_changes_nothing(network):
    model = make(network)
    mfkernels.accelerate(model)
    modules = list(model.modules())
    report = mfkernels.accelerate(model)
    assert not report.replaced and not report.left
    assert all(one is other for one, other in zip(modules, model.modules(), strict=True))


@networks
def test_restore(network):
    """The original modules, with the weights and statistics of now, in the mode of now, in a dtype of now."""
    model = make(network)
    before, kinds = list(model.named_modules()), originals(model)
    mfkernels.accelerate(model)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model.float().eval()
    expected, state = model(images().float()), model.state_dict()
    report = mfkernels.restore(model)
    assert len(report.replaced) == COUNTS[network]
    assert originals(model) == kinds
    assert all(a == b for a, b in zip(before, model.named_modules(), strict=True))
    assert not any(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    torch.testing.assert_close(model(images().float()), expected, rtol=1e-4, atol=1e-5)
    assert not mfkernels.restore(model).replaced


@networks
def test_modes_of_layers_stay(network):
    """A batch norm that was frozen before stays frozen."""
    model = make(network).train()
    frozen = [m.eval() for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    mfkernels.accelerate(model)
    assert model.training and not any(m.training for m in frozen)
    assert all(m in set(model.modules()) for m in frozen)


@networks
def test_copies_and_pickles(network):
    model = make(network).eval()
    mfkernels.accelerate(model)
    expected = model(images())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images()), expected)
        mfkernels.restore(other)
        torch.testing.assert_close(other(images()), expected)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert buffer.tell() > 0


@networks
def test_drop_path_is_kept(network):
    """Whole slices are dropped, at the rate of the original, in training alone."""
    model = make(network, rate=0.5)
    mfkernels.accelerate(model)
    norms = [m.eval() for m in model.train().modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert not torch.equal(model(images()), model(images()))
    assert torch.equal(model.eval()(images()), model(images()))


def test_temperature_is_still_set_from_outside():
    model, plain = make(DMFLike).eval(), make(DMFLike).eval()
    mfkernels.accelerate(model)
    for network in (model, plain):
        network.update(30.0)
    torch.testing.assert_close(model(images()), plain(images()))
    assert not torch.allclose(model(images()), make(DMFLike).eval()(images()))


# --- what is left alone -------------------------------------------------------------------------------------


class Wrong:
    """Changes that look like the released classes, by what they change."""

    @staticmethod
    def other_formula(model):
        class GRN(lookalikes.GRN):  # as published by others: the mean over the channels
            def forward(self, x):
                norm = x.norm(dim=(2, 3), keepdim=True)
                return self.gamma * x * norm / (norm.mean(1, keepdim=True) + 1e-6) + self.beta + x

        model.grn = GRN(16).double()

    @staticmethod
    def other_scale(model):
        model.mobile2former.num_heads = 4

    @staticmethod
    def more_state(model):
        model.former.extra = nn.Linear(32, 32)

    @staticmethod
    def missing_attribute(model):
        del model.dw.groups

    @staticmethod
    def other_layer(model):
        class Scaled(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        model.former.mlp.fc1 = Scaled(32, 64, bias=False).double()

    @staticmethod
    def other_epsilon(model):
        model.former.norm2.eps = 1e-3

    @staticmethod
    def dropout_of_weights(model):
        model.mobile2former.attn_drop.p = 0.5

    @staticmethod
    def hook(model):
        model.former.mlp.register_forward_hook(lambda *a: None)


LEFT = {
    "other_formula": ("grn", "computes something else"),
    "more_state": ("former", "other parameters: extra.bias, extra.weight"),
    "missing_attribute": ("dw", "no attribute 'groups'"),
    "other_layer": ("former", "mlp.fc1 is a Scaled, expected Linear"),
    "other_epsilon": ("former", "norm2 has eps 0.001, expected 1e-05"),
    "dropout_of_weights": ("mobile2former", "dropout of the attention's weights"),
    "hook": ("former", "mlp has hooks"),
}


@pytest.mark.parametrize("change", LEFT)
def test_lookalikes_are_left_alone_and_reported(change):
    model = make(DMFLike).eval()
    getattr(Wrong, change)(model)
    expected = model(images()) if change != "missing_attribute" else None
    path, why = LEFT[change]
    before = model.get_submodule(path)
    report = mfkernels.accelerate(model)
    assert [entry.path for entry in report.left] == [path] and why in report.left[0].why
    assert len(report.replaced) == COUNTS[DMFLike] - 1
    assert model.get_submodule(path) is before
    assert f"{path}: {type(before).__name__} left alone" in str(report)
    if expected is not None:
        torch.testing.assert_close(model(images()), expected)


def test_parts_of_a_block_that_is_left_alone():
    """Where a whole block does not match, its attention still does."""
    model = make(MobileFormer)
    model.features[2].identity = False
    report = mfkernels.accelerate(model)
    assert [entry.path for entry in report.left] == ["features.2"]
    inner = {entry.path for entry in report.replaced if entry.path.startswith("features.2")}
    names = ("local_global", "global_block", "global_local", "conv1", "conv2", "conv3")
    assert inner == {f"features.2.{name}" for name in names}


@pytest.mark.parametrize("network", [MobileFormer, DynamicMobileFormer, iFormer])
def test_deploy_takes_released_networks(network):
    """As published and accelerated."""
    model = make(network).float().eval()
    expected = model(images().float())
    for fast in (False, True):
        if fast:
            mfkernels.accelerate(model)
        before = list(model.modules())
        torch.testing.assert_close(mfkernels.deploy(model)(images().float()), expected, rtol=1e-4, atol=1e-5)
        assert list(model.modules()) == before


def test_deploy_refuses_what_only_looks_so():
    model = make(MobileFormer).float().eval()
    model.stem[0] = nn.Conv2d(3, 8, 3, 2, 0, bias=False)
    with pytest.raises(TypeError, match="model is a MobileFormer, but 0 has padding"):
        mfkernels.deploy(model.eval())
    model = make(DynamicMobileFormer).float().eval()
    model.blocks[1].ffn.pw_conv1 = nn.Conv2d(12, 31, 1, bias=False)
    with pytest.raises(TypeError, match=r"model is a DynamicMobileFormer, but .*ffn.* has the shape"):
        mfkernels.deploy(model.eval())
    model = make(iFormer).float().eval()
    model.stages[0][0].block.token_channel_mixer.m[2] = nn.ReLU()
    with pytest.raises(TypeError, match="model is a iFormer, but it computes something else"):
        mfkernels.deploy(model.eval())
    with pytest.raises(TypeError, match=r"model must be a MobileFormer or .*, got DMFLike"):
        mfkernels.deploy(make(DMFLike).eval())


def test_other_networks():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    assert not mfkernels.accelerate(model).replaced
    own = mfkernels.models.create_model("dmf_96")
    assert not mfkernels.accelerate(own).replaced
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        mfkernels.accelerate("resnet50")


def test_a_module_in_two_places():
    model = make(IFormerLike)
    model.blocks[1] = model.blocks[0]
    mfkernels.accelerate(model)
    assert model.blocks[0] is model.blocks[1]
    assert isinstance(model.blocks[0], mfkernels.nn.SingleHeadModulationAttention)


# --- rules of the user's own --------------------------------------------------------------------------------


class TheirReLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.slopes = nn.Parameter(torch.rand(2, 8))

    def forward(self, x):
        return (self.slopes[:, :, None, None, None] * x.transpose(0, 1)).amax(0).transpose(0, 1)


class OurReLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.slopes = nn.Parameter(torch.empty(2, 8))

    def forward(self, x):
        return mfkernels.ops.dynamic_relu(x, self.slopes.expand(x.shape[0], -1, -1))


def rule(module):
    return adopt(OurReLU(), module) if type(module).__name__ == "TheirReLU" else None


def test_rules():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), TheirReLU())
    x = torch.randn(2, 3, 4, 5)
    expected, slopes = model(x), model[1].slopes
    report = mfkernels.accelerate(model, rules=[rule])
    assert [(r.path, r.was, r.now) for r in report.replaced] == [("1", "TheirReLU", "OurReLU")]
    assert model[1].slopes is slopes
    torch.testing.assert_close(model(x), expected)
    mfkernels.restore(model)
    assert isinstance(model[1], TheirReLU)


def test_a_rule_must_keep_the_parameters():
    model = nn.Sequential(TheirReLU())
    with pytest.raises(
        ValueError, match="returned a OurReLU whose parameters are not those of the TheirReLU"
    ):
        mfkernels.accelerate(model, rules=[lambda m: OurReLU() if isinstance(m, TheirReLU) else None])
    assert isinstance(model[0], TheirReLU)


def test_a_rule_may_refuse():
    def refuse(module):
        if isinstance(module, TheirReLU):
            raise Unfit("not today")

    report = mfkernels.accelerate(nn.Sequential(TheirReLU()), rules=[refuse])
    assert report.left[0].why == "not today"
