"""MobileNets, EfficientNets, ResNets, and other chains of convolutions and residual blocks, as plans."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...models.features import FeatureInfo
from ...models.network import Stage
from ...nn.conv_bn import affine
from .deployed import Deployed
from .packing import Formats, fold, padded
from .plan import Map, Plan
from .pyramid import ChainMaps, margin_and_reduction, sizes_of
from .steps import SAME_PADDING, Linear

# By the names of the classes, of which others than PyTorch's have some, too.
_ACTIVATIONS = {
    **{"ReLU": "relu", "ReLU6": "relu6", "GELU": "gelu", "SiLU": "silu", "Swish": "silu"},
    **{"Hardswish": "hardswish", "HardSwish": "hardswish"},
}
_BETWEEN = {"ReLU": "relu", "SiLU": "silu", "Swish": "silu"}  # the convolutions of squeeze-and-excitation
_GATES = {"Hardsigmoid": "hardsigmoid", "HardSigmoid": "hardsigmoid", "Sigmoid": "sigmoid"}
# In eval mode, or where pixels are one.
_NOTHING = ("Identity", "Dropout", "DropPath", "StochasticDepth", "Flatten")
_SKIPS = ("use_res_connect", "has_skip", "residual")
_SHORTCUTS = ("downsample", "shortcut")  # of ResNets' blocks


class _Conv(NamedTuple):
    """A convolution, or a linear layer, its batch norm and its activation."""

    layer: Any
    norm: nn.BatchNorm2d | None
    then: str | None
    last: str  # the name of the last of them

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias."""
        if self.norm is not None:
            return fold(self.layer, self.norm)
        weight, bias = self.layer.weight.detach(), self.layer.bias
        return weight, weight.new_zeros(len(weight)) if bias is None else bias.detach()


class _Squeeze(NamedTuple):
    """Squeeze-and-excitation, and its activation."""

    module: nn.Module
    reduce: nn.Conv2d
    expand: nn.Conv2d
    between: str
    gate: str
    then: str | None
    last: str


class _Pool(NamedTuple):
    """The largest of some pixels."""

    layer: nn.MaxPool2d
    last: str


class _Part(NamedTuple):
    """Layers one after the other, and whether the input is added to what they make.

    Before that it goes through the layers of a shortcut; an activation may follow the sum.
    """

    name: str
    layers: list[Any]
    skip: bool
    last: str  # the name of the module whose result is the part's
    shortcut: list[Any]
    activation: str | None = None


class _Chain(NamedTuple):
    """A network: parts that make maps, and what its means go through; nothing where maps are its results."""

    parts: list[_Part]
    linears: list[tuple[str, _Conv]]


def mobilenet_chain(model: nn.Module) -> _Chain | None:
    """Return the parts of a network that is a chain of layers and residual blocks, in their order.

    The parts are convolutions, batch norms, ReLUs, SiLUs and the like, a pooling by the maximum, residual
    blocks of them with squeeze-and-excitation or without, a global average and linear layers; without the
    latter in networks that have a `feature_info`, as timm's of `features_only` do. Return None where `model`
    has other parts, or none of these.
    """
    try:
        flat = [(name, part) for name, part in _flat(model, "")]
    except _Unknown:
        return None
    parts, linears, pooled = [], [], False
    for name, part in flat:
        if isinstance(part, _Part):
            if pooled:
                return None
            parts.append(part)
        elif isinstance(part, nn.AdaptiveAvgPool2d):
            pooled = True
        elif isinstance(part, _Conv) and (pooled or isinstance(part.layer, nn.Linear)):
            pooled = True
            linears.append((name, part))
        elif pooled:
            return None
        else:
            parts.append(_Part(name, [part], False, part.last, []))
    if not parts or parts[0].skip or not isinstance(parts[0].layers[0], _Conv):
        return None
    whole = bool(linears) or (not pooled and hasattr(model, "feature_info"))
    return _Chain(parts, linears) if whole else None


class _Unknown(Exception):
    pass


def _flat(module: nn.Module, prefix: str) -> Iterator[tuple[str, Any]]:
    """Return the named convolutions, linear layers and poolings in their order.

    A residual block is a `_Part`.
    """
    found: list[tuple[str, Any]] = []
    # The convolution that replaces several, as in RepVGG, is the last child and called first.
    for name, child in sorted(module.named_children(), key=lambda child: child[0] != "reparam_conv"):
        path = f"{prefix}{name}"
        if isinstance(child, nn.Conv2d | nn.Linear):
            found.append((path, _Conv(child, None, None, path)))
        elif isinstance(child, nn.BatchNorm2d):
            _replace_last(found, path, norm=child)
            for inner in child.children():  # an activation of its own
                _activate(found, inner, path)
        elif isinstance(child, nn.AdaptiveAvgPool2d):
            found.append((path, child))
        elif isinstance(child, nn.MaxPool2d):
            found.append((path, _Pool(child, path)))
        elif (squeeze := _squeeze(child, path)) is not None:
            found.append((path, squeeze))
        elif any(hasattr(child, flag) for flag in (*_SKIPS, *_SHORTCUTS)):
            found.append((path, _block(child, path)))
        elif next(child.children(), None) is not None:
            for inner_path, inner in _flat(child, f"{path}."):
                found.append((inner_path, inner))
        else:
            _activate(found, child, path)
    yield from found


def _block(module: nn.Module, path: str) -> _Part:
    """Return a residual block; where it has a shortcut, one as ResNets have them."""
    parts = list(_flat(module, f"{path}."))
    beside = tuple(f"{path}.{name}" for name in _SHORTCUTS)
    shortcut = [layer for name, layer in parts if name.startswith(beside)]
    layers = [layer for name, layer in parts if not name.startswith(beside)]
    known = all(isinstance(layer, _Conv | _Squeeze) for layer in layers)
    if not known or not layers or not all(isinstance(layer, _Conv) for layer in shortcut):
        raise _Unknown
    if not any(hasattr(module, name) for name in _SHORTCUTS):
        return _Part(path, layers, any(getattr(module, flag, False) is True for flag in _SKIPS), path, [])
    # The last activation follows the sum. If there is but one, all layers have it.
    *before, last = layers
    activations = [layer.then for layer in layers if layer.then is not None]
    if len(activations) == 1:
        before = [layer._replace(then=activations[0]) for layer in before]
    layers = [*before, last._replace(then=None)]
    return _Part(path, layers, True, path, shortcut, activations[-1] if activations else None)


def _activate(found: list[tuple[str, Any]], module: nn.Module, path: str) -> None:
    kind = type(module).__name__
    if kind in _ACTIVATIONS:
        _replace_last(found, path, then=_ACTIVATIONS[kind])
    elif kind not in _NOTHING:
        raise _Unknown


def _replace_last(found: list[tuple[str, Any]], last: str, **values: Any) -> None:
    """Add a norm or an activation, the module `last`, to the last layer, which must have no later one."""
    if not found or not isinstance(found[-1][1], _Conv | _Squeeze):
        raise _Unknown
    path, layer = found[-1]
    if layer.then is not None or ("norm" in values and not _takes(layer, values["norm"])):
        raise _Unknown
    found[-1] = (path, layer._replace(last=last, **values))


def _takes(layer: _Conv | _Squeeze, norm: nn.BatchNorm2d) -> bool:
    return isinstance(layer, _Conv) and layer.norm is None and len(layer.layer.weight) == norm.num_features


def _squeeze(module: nn.Module, path: str) -> _Squeeze | None:
    """Two 1x1 convolutions that lead back to as many channels, an activation between them, and a gate.

    Those that are functions count as ReLU and hardsigmoid, until the network is tried.
    """
    convs: list[Any] = [child for child in module.children() if isinstance(child, nn.Conv2d)]
    others = [type(child).__name__ for child in module.children() if not isinstance(child, nn.Conv2d)]
    if len(convs) != 2 or any(conv.kernel_size != (1, 1) or conv.groups != 1 for conv in convs):
        return None
    reduce, expand = convs
    known = {"AdaptiveAvgPool2d", *_BETWEEN, *_GATES, *_NOTHING}
    if reduce.in_channels != expand.out_channels or not known.issuperset(others):
        return None
    activations = [*(_BETWEEN[name] for name in others if name in _BETWEEN), "relu"]
    gates = [*(_GATES[name] for name in others if name in _GATES), "hardsigmoid"]
    return _Squeeze(module, reduce, expand, activations[0], gates[0], None, path)


def deployed_mobilenet(model: nn.Module, chain: _Chain, formats: Formats) -> Deployed:
    """Return what `deploy` makes of a network that is this chain of parts.

    Raises:
        ValueError: a part that a plan cannot say, or the network computes something else than its parts in
            their order.
    """
    kind, maps = type(model).__name__, not chain.linears
    other = ValueError(f"deploy: the model ({kind}) computes something else than its parts in a row")
    # What a plan cannot say is refused before anything is tried.
    deployed = _Plan(model, chain, formats).run([len(chain.parts) - 1] if maps else None)
    images = torch.randn(4, deployed.in_channels, 64, 75, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        trial = _random_copy(model, images)
        same: Any = mobilenet_chain(trial)
        results = _results(trial, chain, images) if maps else None
        if maps:
            deployed = _Plan(model, chain, formats).run(results)
        try:
            got = _Plan(trial, same, Formats()).run(results)(images)
        except RuntimeError as error:  # parts that do not fit one another
            raise other from error
        expected = trial.double()(images.double())
    if not maps and (not torch.is_tensor(expected) or expected.shape != got.shape):
        raise ValueError(f"deploy: the model ({kind}) returns something else than logits")
    pairs = zip(got, expected, strict=True) if maps else [(got, expected)]
    if not all(
        one.shape == two.shape and (one - two).abs().max() <= 1e-3 * two.abs().max() for one, two in pairs
    ):
        raise other
    return deployed


def _results(model: nn.Module, chain: _Chain, images: Tensor) -> list[int]:
    """Return the parts, by their numbers, whose maps a network returns."""
    made: dict[str, Any] = {}
    names = {part.last for part in chain.parts}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: made.update({name: out}))
        for name, module in model.named_modules()
        if name in names
    ]
    returned = model(images)
    for hook in hooks:
        hook.remove()
    results = []
    for result in returned if isinstance(returned, list | tuple) else []:
        results += [i for i, part in enumerate(chain.parts) if made.get(part.last) is result]
    if len(results) != len(set(results)) or len(results) != len(returned) or not results:
        raise ValueError(
            f"deploy: the model ({type(model).__name__}) returns something else than maps of its parts"
        )
    return results


def _random_copy(model: nn.Module, images: Tensor) -> nn.Module:
    """With random weights, so that no part of it is hidden by zeros, and the statistics of these images."""
    trial = copy.deepcopy(model).float()
    generator = torch.Generator().manual_seed(1)
    for parameter in trial.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, (2 / parameter[0].numel()) ** 0.5, generator=generator)
        else:
            parameter.uniform_(0.2, 1.0, generator=generator)
    for module in trial.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
            module.momentum = 1.0
    trial(images)
    return trial.eval()


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return sizes_of(conv) in ((1, 1, 0), (1, 1, SAME_PADDING))


class _Plan(Plan):
    def __init__(self, model: nn.Module, chain: _Chain, formats: Formats) -> None:
        super().__init__(model, formats)
        self.chain = chain
        for module in self.names:
            self.check_settings(module)

    def run(self, results: list[int] | None = None) -> Deployed:
        """Return the network; `results` are the numbers of the parts whose maps it returns, if it does so."""
        if results is not None:
            return self.feature_maps(results)
        *_, last = self.chain.parts
        x: Any = None
        for part in self.chain.parts:
            with self.named(part.name):
                x = self.part_of(x, part, pooled=part is last)
        features = self.place(x.channels)
        with self.named("pool"):
            self.pool(x.channels, features)
        linears = [self.linear_of(layer) for _, layer in self.chain.linears]
        names = [name for name, _ in self.chain.linears]
        classes = self.chain.linears[-1][1].layer.weight.shape[0]
        in_channels = self.chain.parts[0].layers[0].layer.in_channels
        return self.finished(features, linears, names, in_channels, classes)

    def feature_maps(self, results: list[int]) -> Deployed:
        x: Any = None
        stages, margins, size = [], [], (0, 1)
        for i, part in enumerate(self.chain.parts[: max(results) + 1]):
            with self.named(part.name):
                x = self.part_of(x, part, pooled=False)
                layers = (layer.layer for layer in part.layers if not isinstance(layer, _Squeeze))
                size = margin_and_reduction(layers, size)
                if i in results:
                    self.hand_out(x)
                    stages.append(Stage(part.name, x.channels, size[1]))
                    margins.append(size[0])
        order = [sorted(results).index(i) for i in results]
        in_channels = self.chain.parts[0].layers[0].layer.in_channels
        maps = ChainMaps(FeatureInfo(stages, order), order, stages)
        return self.finished_pyramid(maps, in_channels, margins)

    def linear_of(self, layer: _Conv) -> tuple[Linear, str | None]:
        _, bias = layer.folded()
        weight = layer.layer.weight
        self.need(weight[0].numel() == weight.shape[1], layer.layer, "1x1 convolutions after the pooling")
        factor = 1.0 if layer.norm is None else affine(layer.norm)[0]
        return self.pack.row_linear(weight.flatten(1), bias, factor), layer.then

    def part_of(self, x: Map | None, part: _Part, pooled: bool) -> Map:
        """Return the map after the part; `pooled`: its means are wanted."""
        # A 1x1 convolution adds the input itself.
        *_, last = part.layers
        plain = isinstance(last, _Conv) and last.then is None and _is_pointwise(last.layer)
        adds = part.skip and plain and not part.shortcut and part.activation is None
        made = self.layers(x, part.layers, x if adds else None, int(pooled and (adds or not part.skip)))
        if part.skip and not adds:
            other = self.layers(x, part.shortcut, None, 0)
            sum_of_both = self.add(made, other, activation=part.activation, sums=int(pooled))
            if other is not x:
                self.free(other)
            made = self.replaced(made, sum_of_both)
        if x is not None:
            self.free(x)
        return made

    def layers(self, x: Any, layers: list[Any], added: Map | None, sums: int) -> Any:
        """Add layers; `added` and `sums` are of the last one. `x` is left."""
        made = x
        with ExitStack() as places:
            factors = -1
            for i, layer in enumerate(layers):
                rest = layers[i + 1 :]
                sums_now = int(isinstance(rest[0], _Squeeze)) if rest else sums
                if isinstance(layer, _Squeeze):
                    made = self.summed(made) if i == 0 else made
                    factors = self.factors(layer, made.channels, places)
                    if (
                        rest
                        and layer.then is None
                        and isinstance(rest[0], _Conv)
                        and _is_pointwise(rest[0].layer)
                    ):
                        continue  # which multiplies its inputs with the factors itself
                    new = self.multiplied(made, factors, layer.then, sums_now)
                else:
                    new = self.layer(made, layer, factors, None if rest else added, sums_now)
                if made is not x:
                    self.free(made)
                made, factors = new, -1
        return made

    def multiplied(self, x: Map, factors: int, activation: str | None, sums: int) -> Map:
        """Add a depthwise convolution of 1x1, whose weights lie in the state."""
        zeros = self.pack.add(torch.zeros(padded(x.channels)))
        return self.depthwise(x, 1, factors, zeros, mixed=True, activation=activation, sums=sums)

    def factors(self, squeeze: _Squeeze, channels: int, places: ExitStack) -> int:
        """Return the place of what multiplies the channels of the last map, and of summands that are zero."""
        self.need(squeeze.reduce.in_channels == channels, squeeze.module, "squeeze-and-excitation of the map")
        width = padded(channels)
        reduce, expand = (
            self.pack.row_linear(conv.weight.flatten(1), conv.bias)
            for conv in (squeeze.reduce, squeeze.expand)
        )
        (place,) = places.enter_context(self.places(2 * width))
        with self.places(width, reduce.outputs) as (means, hidden):
            self.pool(channels, means)
            self.linear(1, means, reduce, hidden, activation=squeeze.between)
            self.linear(1, hidden, expand, place, activation=squeeze.gate)
        self.copy_weights(torch.zeros(width), place + width)
        return place

    def layer(self, x: Map | None, layer: _Conv | _Pool, factors: int, added: Map | None, sums: int) -> Map:
        if isinstance(layer, _Pool):
            assert x is not None
            self.need(sums == 0, layer.layer, "poolings by the maximum that no mean follows")
            return self.max_pool(x, layer.layer)
        conv, activation = layer.layer, layer.then
        weight, bias = layer.folded()
        if x is not None and _is_pointwise(conv):
            linear = self.pack.map_linear(weight.flatten(1), bias, groups=conv.groups)
            options: dict[str, Any] = dict(groups=conv.groups, activation=activation, affine=factors)
            return self.pointwise(x, conv.out_channels, linear, added=added, sums=sums, **options)
        if x is not None and conv.groups == conv.in_channels == conv.out_channels > 1:
            return self.depthwise_conv(x, conv, weight, bias, activation=activation, sums=sums)
        return self.dense(x, conv, weight, bias, activation, sums=sums)
