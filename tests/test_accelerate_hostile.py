"""`accelerate` on networks that somebody has changed, before it or after it, in ways that it cannot see from
classes and shapes alone: it leaves alone, honours, or notices at the next call."""

import copy
import pickle
import types
import warnings

import lookalikes
import pytest
import torch
from lookalikes import DMFLike, IFormerLike, MobileFormer
from test_accelerate import COUNTS, images, make
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

import mfkernels
from mfkernels.acceleration import Unfit

BLOCK = "features.2"  # of the small MobileFormer


def block_of(model: nn.Module) -> nn.Module:
    return model.get_submodule(BLOCK)


def modules(model: nn.Module) -> list[nn.Module]:
    return list(model.modules())


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-7, atol=1e-7)


# --- all or nothing -----------------------------------------------------------------------------------------


def failing_rule(module):
    if isinstance(module, lookalikes.MergeClassifier):
        raise RuntimeError("a mistake in this rule")


def wrong_rule(module):
    return nn.Identity() if isinstance(module, lookalikes.MergeClassifier) else None


def stopping_rule(module):
    if isinstance(module, lookalikes.MergeClassifier):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("rule", "error"),
    [(failing_rule, RuntimeError), (wrong_rule, ValueError), (stopping_rule, KeyboardInterrupt)],
)
def test_an_exception_undoes_everything(rule, error):
    model = make(MobileFormer)
    before = modules(model)
    with pytest.raises(error):
        mfkernels.accelerate(model, rules=[rule])
    after = modules(model)
    assert len(before) == len(after) and all(a is b for a, b in zip(before, after, strict=True))
    assert len(mfkernels.accelerate(model).replaced) == COUNTS[MobileFormer]


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


REWRITTEN = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "weight_norm": weight_norm,
    "parametrized": lambda layer: parametrize.register_parametrization(layer, "weight", Half()),
    "spectral_norm": parametrizations.spectral_norm,
}


@pytest.mark.parametrize("kind", REWRITTEN)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_rewritten_weights_are_left_alone(kind):
    model = make(MobileFormer)
    REWRITTEN[kind](block_of(model).conv1[0])
    plain = copy.deepcopy(model) if kind in ("parametrized", "spectral_norm") else None
    expected = model.eval()(images())
    report = mfkernels.accelerate(model)
    assert BLOCK in [entry.path for entry in report.left]
    assert close(model(images()), expected)
    if plain is not None:
        assert list(plain.state_dict()) == list(model.state_dict())


# --- the trial ----------------------------------------------------------------------------------------------


class TrainingAlone:
    """What somebody's copy of a released class may do in training alone."""

    @staticmethod
    def dropout(self, tokens):
        return F.dropout(lookalikes.GlobalBlock.forward(self, tokens), 0.5, self.training)

    @staticmethod
    def scale(self, tokens):
        return lookalikes.GlobalBlock.forward(self, tokens) * (1.01 if self.training else 1)

    @staticmethod
    def gradient(self, tokens):
        y = lookalikes.GlobalBlock.forward(self, tokens)
        return 2 * y - y.detach()

    @staticmethod
    def noise(self, tokens):
        y = lookalikes.GlobalBlock.forward(self, tokens)
        return y + 0.01 * torch.randn_like(y) if self.training else y


@pytest.mark.parametrize("change", ["dropout", "scale", "gradient", "noise"])
def test_what_is_done_in_training_alone(change):
    class GlobalBlock(lookalikes.GlobalBlock):
        forward = getattr(TrainingAlone, change)

    model = make(MobileFormer)
    block_of(model).global_block.__class__ = GlobalBlock
    report = mfkernels.accelerate(model)
    left = {entry.path: entry.why for entry in report.left}
    assert set(left) == {BLOCK, f"{BLOCK}.global_block"}
    assert all("in training" in why for why in left.values())


def test_statistics_in_training():
    """A batch norm whose running statistics somebody's code keeps as they are."""

    class Conv2d_BN(lookalikes.Conv2d_BN):
        def forward(self, x):
            bn = self.bn
            if not self.training:
                return bn(self.c(x))
            return F.batch_norm(self.c(x), None, None, bn.weight, bn.bias, True, bn.momentum, bn.eps)

    model = make(IFormerLike)
    model.blocks[0].proj.__class__ = Conv2d_BN
    report = mfkernels.accelerate(model)
    assert {entry.path for entry in report.left} == {"blocks.0", "blocks.0.proj"}


class OtherDropPath(lookalikes.DropPath):
    """Stochastic depth as many copies of it draw it."""

    def forward(self, x):
        if self.drop_prob == 0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        return x / keep * (keep + torch.rand((x.shape[0],) + (1,) * (x.dim() - 1))).floor().to(x)


@pytest.mark.parametrize("network", [MobileFormer, DMFLike])
@pytest.mark.parametrize("kind", [lookalikes.DropPath, OtherDropPath])
def test_stochastic_depth_passes_the_trial(network, kind):
    model = make(network, rate=0.4)
    for module in model.modules():
        if isinstance(module, lookalikes.DropPath):
            module.__class__ = kind
    report = mfkernels.accelerate(model)
    assert len(report.replaced) == COUNTS[network] and not report.left


def test_another_rate_fails_the_trial():
    class DropPath(lookalikes.DropPath):
        def forward(self, x):
            return F.dropout(x, self.drop_prob, self.training)

    model = make(MobileFormer, rate=0.4)
    block_of(model).global_block.drop_path.__class__ = DropPath
    report = mfkernels.accelerate(model)
    assert {entry.path for entry in report.left} == {BLOCK, f"{BLOCK}.global_block"}


def test_hooks_see_nothing_of_the_trial():
    model, calls = make(MobileFormer), []
    for layer in (block_of(model).conv1[0], block_of(model).global_block.q):
        layer.register_forward_hook(lambda *_: calls.append(1))
    mfkernels.accelerate(model)
    assert not calls
    model(images())
    assert len(calls) == 2


def test_random_numbers_go_on():
    torch.manual_seed(7)
    expected = torch.rand(3)
    model = make(MobileFormer)
    torch.manual_seed(7)
    mfkernels.accelerate(model)
    assert torch.equal(torch.rand(3), expected)


def test_networks_on_meta():
    with torch.device("meta"):
        model = MobileFormer()
    report = mfkernels.accelerate(model)
    assert len(report.replaced) == COUNTS[MobileFormer] and not report.left
    model.to_empty(device="cpu").double().load_state_dict(make(MobileFormer).state_dict())
    assert close(model.eval()(images()), make(MobileFormer).eval()(images()))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_off(context):
    model = make(MobileFormer)
    with context():
        assert len(mfkernels.accelerate(model).replaced) == COUNTS[MobileFormer]


# --- changes of parts, before and after ---------------------------------------------------------------------


def add_forward_hook(part):
    part.register_forward_hook(lambda module, given, result: _doubled(result))


def add_forward_pre_hook(part):
    part.register_forward_pre_hook(lambda module, given: tuple(_doubled(value) for value in given))


def add_backward_hook(part):
    part.register_full_backward_hook(lambda module, given, _: tuple(_doubled(g) for g in given))


def add_backward_pre_hook(part):
    part.register_full_backward_pre_hook(lambda module, given: tuple(_doubled(g) for g in given))


def patch_forward(part):
    part.forward = types.MethodType(lambda self, *given: _doubled(type(self).forward(self, *given)), part)


def set_epsilon(part):
    part.eps = 0.3


def set_class(part):
    kind = type(part)
    forward = lambda self, *given: _doubled(kind.forward(self, *given))  # noqa: E731
    part.__class__ = type("Changed", (kind,), {"forward": forward})


def _doubled(value):
    if isinstance(value, torch.Tensor):
        return 2 * value
    return value if value is None else type(value)(_doubled(v) for v in value)


PARTS = {
    MobileFormer: [
        "features.2",
        "features.2.act1",
        "features.2.hyper1",
        "features.2.hyper1.hyper",
        "features.2.hyper1.hyper.0",
        "features.2.hyper2.hyper.1",
        "features.2.conv1",
        "features.2.conv1.0",
        "features.2.conv2.1",
        "features.2.drop_path",
        "features.2.local_global",
        "features.2.local_global.drop_path",
        "features.2.global_block",
        "features.2.global_block.ffn",
        "features.2.global_block.ffn.1",
        "features.2.global_block.q",
        "features.2.global_block.ffn_norm",
        "features.2.global_block.drop_path",
        "features.2.global_local",
        "features.2.global_local.drop_path",
        "features.1.act3",
    ],
    DMFLike: [
        "former",
        "former.norm2",
        "former.token_attention",
        "former.token_attention.qkv",
        "former.mlp",
        "former.mlp.dropout",
        "mobile2former.norm",
        "pw",
        "pw.Kernel_Attention",
    ],
    IFormerLike: ["blocks.0", "blocks.0.q", "blocks.0.v_gate.bn", "blocks.0.proj.c", "stem", "stem.1"],
}
CHANGES = [
    add_forward_hook,
    add_forward_pre_hook,
    add_backward_hook,
    add_backward_pre_hook,
    patch_forward,
    set_epsilon,
    set_class,
]


def outcome(model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    result = model(images())
    result.square().mean().backward()
    return [result, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same(fast: nn.Module, plain: nn.Module) -> None:
    for one, other in zip(outcome(fast), outcome(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * max(1.0, other.abs().max().item()))


@pytest.mark.parametrize("network", PARTS, ids=lambda n: n.__name__)
@pytest.mark.parametrize("change", CHANGES)
def test_changes_before_and_after(network, change):
    """The changed network computes the same with `accelerate` as without, whether changed before or after."""
    fast = make(network)
    mfkernels.accelerate(fast)
    for path in PARTS[network]:
        plain, before, after = make(network), make(network), copy.deepcopy(fast)
        part = plain.get_submodule(path)
        if change is set_epsilon and not hasattr(part, "eps"):
            continue
        change(part)
        change(before.get_submodule(path))
        mfkernels.accelerate(before)
        change(after.get_submodule(path))
        for model in (plain, before, after):
            model.train(change in (add_backward_hook, add_backward_pre_hook, set_epsilon))
        try:
            assert_same(before, plain)
            assert_same(after, plain)
        except AssertionError as error:
            raise AssertionError(f"{change.__name__} of {path}: {error}") from error


def test_parts_in_an_adapter():
    """A layer inside of somebody's wrapper, which only knows how to be called."""

    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, *given):
            return _doubled(self.base(*given))

    for network, paths in PARTS.items():
        for path in paths:
            parent, _, name = path.rpartition(".")
            plain, fast = make(network).eval(), make(network).eval()
            mfkernels.accelerate(fast)
            for model in (plain, fast):
                holder = model.get_submodule(parent)
                holder._modules[name] = Adapter(holder._modules[name])
            if path == "pw.Kernel_Attention":
                continue  # DMFLike sets the temperature of every module that has one
            torch.testing.assert_close(fast(images()), plain(images()), msg=lambda m, p=path: f"{p}: {m}")


def test_a_train_of_its_own_before():
    """The usual way to freeze batch norms: a part that stays in eval mode."""
    model, plain = make(MobileFormer), make(MobileFormer)
    for network in (model, plain):
        part = block_of(network).conv1
        part.eval().train = lambda mode=True: None
    report = mfkernels.accelerate(model)
    assert {entry.path: entry.why for entry in report.left}[BLOCK] == "conv1 has a train of its own"
    assert_same(model.train(), plain.train())
    assert not block_of(model).conv1[1].training


def test_a_train_of_its_class():
    class Frozen(lookalikes.DnaBlock):
        def train(self, mode=True):
            super().train(mode)
            self.conv1.eval()
            return self

    Frozen.__name__ = "DnaBlock"
    model = make(MobileFormer)
    block_of(model).__class__ = Frozen
    report = mfkernels.accelerate(model)
    assert {entry.path: entry.why for entry in report.left}[BLOCK] == "itself has a train of its own"
    assert not block_of(model.train()).conv1[1].training


def test_state_hooks_before():
    """Somebody's conversion of old checkpoints is still there."""
    model = make(MobileFormer)
    calls = []
    block_of(model).hyper1.register_load_state_dict_pre_hook(lambda *_: calls.append(1))
    report = mfkernels.accelerate(model)
    assert {entry.path: entry.why for entry in report.left}[BLOCK].startswith("hyper1 has hooks")
    model.load_state_dict(make(MobileFormer).state_dict())
    assert calls


# --- parts of the original that somebody holds --------------------------------------------------------------


class Held:
    """Changes, after `accelerate`, of a block that somebody has held since before."""

    @staticmethod
    def hook(block):
        block.hyper1.register_forward_hook(lambda module, given, result: result / 2)

    @staticmethod
    def forward(block):
        block.act1.forward = lambda x, theta: x

    @staticmethod
    def rate(block):
        block.drop_path.drop_prob = 1 - 1e-12

    @staticmethod
    def frozen(block):
        block.conv1.eval().train = lambda mode=True: None


@pytest.mark.parametrize("change", ["hook", "forward", "rate", "frozen"])
def test_held_parts_are_noticed(change):
    fast, plain = make(MobileFormer), make(MobileFormer)
    held = block_of(fast)
    mfkernels.accelerate(fast)
    fast(images())
    plain(images())
    getattr(Held, change)(held)
    getattr(Held, change)(block_of(plain))
    with pytest.warns(UserWarning, match="a part of a DnaBlock was changed after `accelerate`"):
        fast.train()
        fast(images())
    plain.train()(images())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert_same(fast, plain)
    for (name, one), other in zip(fast.named_buffers(), plain.buffers(), strict=True):
        assert torch.allclose(one.double(), other.double(), rtol=1e-7, atol=1e-7), name


def test_held_parts_after_copies_and_conversion():
    """The original that runs has the parameters of now, in copies and pickles, too."""
    fast = make(MobileFormer)
    mfkernels.accelerate(fast)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), fast):
        other.float().load_state_dict(
            {name: value * 1.1 for name, value in other.state_dict().items()}, assign=True
        )
        expected = other.eval()(images().float())
        new = block_of(other)
        new.__dict__["_mfkernels_original"].hyper1.register_forward_hook(lambda *_: None)
        with pytest.warns(UserWarning, match="was changed after"):
            torch.testing.assert_close(other(images().float()), expected, rtol=1e-4, atol=1e-5)
        mfkernels.restore(other)
        torch.testing.assert_close(other(images().float()), expected, rtol=1e-4, atol=1e-5)


def test_untouched_networks_say_nothing():
    model = make(MobileFormer)
    mfkernels.accelerate(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)).eval()):
            other(images())


@pytest.mark.parametrize("network", [MobileFormer, DMFLike, IFormerLike])
def test_compiled_without_a_break(network):
    model = make(network).eval()
    mfkernels.accelerate(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), model(images()))


def test_unfit_is_no_error_of_the_network():
    """A part that cannot run at all is left alone."""

    class Mobile2Former(lookalikes.Mobile2Former):
        def forward(self, x, tokens):
            raise RuntimeError("not today")

    model = make(DMFLike)
    model.mobile2former.__class__ = Mobile2Former
    report = mfkernels.accelerate(model)
    assert [entry.why for entry in report.left] == ["it does not run as the released class does: not today"]
    assert issubclass(Unfit, Exception)
