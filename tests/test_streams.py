"""Former beside Mobile: a double of CUDA's streams, on a CPU, notes what every operator reads and writes and
on which stream, and fails where a read is not behind an event of the write. It cannot see the backward pass,
whose streams autograd keeps in step."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mfkernels
from mfkernels import streams
from mfkernels.models import DynamicMobileFormer, create_model
from mfkernels.nn import DMFBlock, MobileFormerBlock, MobileFormerDownsample


class Stream:
    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: dict[
            str, int
        ] = {}  # of every stream, how many of its operators are done before what comes

    def wait_stream(self, other: "Stream") -> None:
        for name, count in other.seen.items():
            self.seen[name] = max(self.seen.get(name, 0), count)


class Double(TorchDispatchMode):
    """In the place of `streams._gpu`. Every storage has an owner; the others that use it must be recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.side = Stream("main"), Stream("side")
        self.current = self.main
        self.written: dict[int, tuple[str, int]] = {}
        self.read: dict[int, dict[str, int]] = {}
        self.recorded: set[tuple[int, str]] = set()
        self.ran: list[tuple[str, str, int]] = []  # stream, operator, how much of the side was done before it
        self.alive: list[torch.Tensor] = []  # or memory would be used again

    def has(self, x):
        return True

    def streams(self, x):
        return self.main, self.side

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def record(self, x, stream):
        self.recorded.add((_memory(x), stream.name))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        now = self.current
        now.seen[now.name] = now.seen.get(now.name, 0) + 1
        pairs = zip(args, function._schema.arguments, strict=False)
        changed = [a for a, s in pairs if s.alias_info is not None and s.alias_info.is_write]
        for tensor in _tensors((args, kwargs)):
            self._behind(*self.written.get(_memory(tensor), (now.name, 0)), f"{function} reads")
            self.alive.append(tensor)
            self.read.setdefault(_memory(tensor), {})[now.name] = now.seen[now.name]
        given = {_memory(t) for t in _tensors((args, kwargs))}
        for tensor in _tensors((result, changed)):
            if _memory(tensor) in given and not any(tensor is t for t in _tensors(changed)):
                continue  # a view
            for name, count in self.read.get(_memory(tensor), {}).items():
                self._behind(name, count, f"{function} overwrites")
            self.written[_memory(tensor)] = now.name, now.seen[now.name]
        self.alive += _tensors(result)
        self.ran.append((now.name, str(function), now.seen.get("side", 0)))
        return result

    def _behind(self, name, count, what):
        done = self.current.seen.get(name, 0) >= count
        assert done, f"{what} on {self.current.name} what {name} may still do"

    def check_memory(self):
        """What a stream used of another one's memory, that one knows of."""
        for memory, (owner, _) in self.written.items():
            for name in self.read.get(memory, {}):
                assert name == owner or (memory, name) in self.recorded, f"{name} used memory of {owner}"


def _tensors(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def _memory(tensor):
    return tensor.untyped_storage()._cdata


@pytest.fixture
def double(monkeypatch):
    found = Double()
    monkeypatch.setattr(streams, "_gpu", found)
    return found


def mobile_former(kind, stride=2, **options):
    options |= dict(expansion=(2, 3) if kind is MobileFormerDownsample else 2, token_dim=16, token_num=3)
    return kind(8, 12, stride, **options), (torch.randn(2, 8, 6, 6), torch.randn(3, 2, 16))


def dmf(stride):
    options = dict(token_dim=32, groups=2, pointwise_kernels=2, depthwise_kernels=2)
    return DMFBlock(8, 16, 8, stride=stride, **options), (torch.randn(2, 8, 6, 6), torch.randn(2, 3, 32))


BLOCKS = {
    "block": lambda: mobile_former(MobileFormerBlock),
    "block, mixed": lambda: mobile_former(MobileFormerBlock, 1, token_id=-1),
    "block, squeeze and excitation": lambda: mobile_former(MobileFormerBlock, se_flag=(1, 0, 1, 1)),
    "downsample": lambda: mobile_former(MobileFormerDownsample),
    "DMF": lambda: dmf(1),
    "DMF, stride 2": lambda: dmf(2),
}


def same_twice(module, inputs, double, train):
    """Beside one another, and one after the other."""
    module.train(train)
    torch.manual_seed(0)
    with mfkernels.use_streams(False):
        expected = module(*inputs)
    torch.manual_seed(0)
    inputs = [x.clone() for x in inputs]
    with double:
        inputs = [x.clone() for x in inputs]  # now written on the main stream
        got = module(*inputs)
    for one, other in zip(_tensors(expected), _tensors(got), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_every_read_is_behind_an_event(double, name, train):
    torch.manual_seed(0)
    block, inputs = BLOCKS[name]()
    same_twice(block, inputs, double, train)
    double.check_memory()
    assert any("attention" in op or "former" in op for stream, op, _ in double.ran if stream == "side")
    assert not any("dynamic_relu" in op or "gelu" in op for stream, op, _ in double.ran if stream == "side")
    # And there was something beside it: Mobile's first work on the main stream waits for nothing of it.
    beside = [op for stream, op, done in double.ran if stream == "main" and done == 0]
    assert any("convolution" in op or "mean" in op for op in beside)


@pytest.mark.parametrize("network", ["mobile_former", "dmf"])
def test_whole_networks(double, network):
    torch.manual_seed(0)
    if network == "dmf":
        rows = [(16, 8, 2, 2, 2, 2), (16, 8, 1, 2, 2, 2)]
        model = DynamicMobileFormer(
            rows, stem_channels=8, lite_channels=(8, 8), features=16, head_features=8, num_classes=3,
            token_num=2, token_dim=32, groups=2,
        )  # fmt: skip
    else:
        model = create_model("mobile_former_26m", num_classes=3)
    same_twice(model, [torch.randn(2, 3, 32, 32)], double, False)
    double.check_memory()
    assert sum(stream == "side" for stream, *_ in double.ran) > 10


@pytest.mark.parametrize("lost", ["fork", "join"])
def test_the_double_sees_a_lost_event(double, monkeypatch, lost):
    block, inputs = BLOCKS["block"]()
    stream = double.side if lost == "fork" else double.main
    monkeypatch.setattr(stream, "wait_stream", lambda other: None)
    with pytest.raises(AssertionError, match="may still do"):
        same_twice(block, inputs, double, False)


def test_the_double_sees_lost_records(double, monkeypatch):
    block, inputs = BLOCKS["block"]()
    monkeypatch.setattr(double, "record", lambda x, stream: None)
    same_twice(block, inputs, double, False)
    with pytest.raises(AssertionError, match="used memory of"):
        double.check_memory()


def test_the_switch(double):
    block, inputs = BLOCKS["block"]()
    with mfkernels.use_streams(False), double:
        block(*inputs)
    assert {stream for stream, *_ in double.ran} == {"main"}
    with pytest.raises(TypeError, match="on must be a bool, got str"), mfkernels.use_streams("yes"):
        pass


def test_not_on_a_cpu():
    assert not streams._Cuda().has(torch.ones(1))
