"""Small chains of convolutions and residual blocks, in the forms that other libraries write them in."""

import torch
from torch import Tensor, nn

from mfkernels.bench.run import randomise


class Squeeze(nn.Module):
    def __init__(
        self, channels: int, hidden: int, functional: bool, act=nn.ReLU, gate=nn.Hardsigmoid
    ) -> None:
        super().__init__()
        self.pool, self.functional = nn.AdaptiveAvgPool2d(1), functional
        self.fc1, self.fc2 = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        if not functional:
            self.activation, self.gate = act(), gate()

    def forward(self, x: Tensor) -> Tensor:
        if self.functional:
            y = self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True))))
            return x * nn.functional.hardsigmoid(y)
        return self.gate(self.fc2(self.activation(self.fc1(self.pool(x))))) * x


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act=None) -> nn.Sequential:
    layers = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layers, nn.BatchNorm2d(outputs, eps=0.001), *([act()] if act else []))


class Inverted(nn.Module):
    def __init__(self, inputs, outputs, hidden, kernel, stride, act, squeeze=0, functional=False) -> None:
        super().__init__()
        self.use_res_connect = stride == 1 and inputs == outputs
        layers = [] if hidden == inputs else [conv(inputs, hidden, 1, act=act)]
        layers.append(conv(hidden, hidden, kernel, stride, hidden, act))
        layers += [Squeeze(hidden, squeeze, functional)] if squeeze else []
        self.block = nn.Sequential(*layers, conv(hidden, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.use_res_connect else self.block(x)


class Named(nn.Module):
    """The same with its layers as attributes, each batch norm with its activation in it, as timm's."""

    def __init__(self, inputs, outputs, hidden, kernel, stride, act, squeeze) -> None:
        super().__init__()
        self.has_skip = stride == 1 and inputs == outputs
        self.conv_pw, self.bn1 = nn.Conv2d(inputs, hidden, 1, bias=False), BatchNormAct(hidden, act())
        self.conv_dw = nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False)
        self.bn2, self.aa = BatchNormAct(hidden, act()), nn.Identity()
        self.se = Squeeze(hidden, squeeze, False) if squeeze else nn.Identity()
        self.conv_pwl, self.bn3 = nn.Conv2d(hidden, outputs, 1), BatchNormAct(outputs, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv_dw(self.bn1(self.conv_pw(x))))
        y = self.bn3(self.conv_pwl(self.se(self.aa(y))))
        return x + y if self.has_skip else y


class BatchNormAct(nn.BatchNorm2d):
    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class StochasticDepth(nn.Module):
    """By its name, and in eval mode, torchvision's."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Efficient(Inverted):
    """As torchvision's: SiLU, a gate of sigmoid, and stochastic depth."""

    def __init__(self, inputs, outputs, hidden, kernel, stride, squeeze) -> None:
        super().__init__(inputs, outputs, hidden, kernel, stride, nn.SiLU)
        self.block.insert(len(self.block) - 1, Squeeze(hidden, squeeze, False, nn.SiLU, nn.Sigmoid))
        self.stochastic_depth = StochasticDepth()

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return self.stochastic_depth(y) + x if self.use_res_connect else y


class Chain(nn.Module):
    """A network whose classifier is a chain, and whose pooling is a function."""

    def __init__(self, features: list[nn.Module], classifier: list[nn.Module]) -> None:
        super().__init__()
        self.features, self.classifier = nn.Sequential(*features), nn.Sequential(*classifier)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def version2() -> nn.Module:
    act = nn.ReLU6
    features = [conv(3, 8, 3, 2, act=act), Inverted(8, 12, 8, 3, 1, act), Inverted(12, 20, 30, 3, 2, act)]
    features += [Inverted(20, 20, 50, 3, 1, act), conv(20, 70, 1, act=act)]
    return Chain(features, [nn.Dropout(0.2), nn.Linear(70, 5)])


def version3(functional: bool = False) -> nn.Module:
    features = [
        *(conv(3, 12, 3, 2, act=nn.Hardswish), Inverted(12, 12, 12, 3, 1, nn.ReLU, 8, functional)),
        *(Inverted(12, 20, 36, 5, 2, nn.ReLU, 8, functional), Inverted(20, 20, 36, 5, 1, nn.Hardswish)),
        *(Inverted(20, 20, 50, 3, 1, nn.Hardswish, 17, functional), conv(20, 70, 1, act=nn.Hardswish)),
    ]
    return Chain(features, [nn.Linear(70, 40), nn.Hardswish(inplace=True), nn.Dropout(0.2), nn.Linear(40, 5)])


def named() -> nn.Module:
    """All of it in one chain, which pools first and convolves then."""
    act = nn.Hardswish
    blocks = [
        Named(12, 12, 30, 3, 1, nn.ReLU, 0),
        Named(12, 20, 40, 5, 2, act, 12),
        Named(20, 20, 40, 3, 1, act, 9),
    ]
    return nn.Sequential(
        *(nn.Conv2d(5, 12, 3, 2, 1, bias=False), BatchNormAct(12, act()), nn.Sequential(*blocks)),
        *(nn.AdaptiveAvgPool2d(1), nn.Conv2d(20, 48, 1), act(), nn.Flatten(), nn.Linear(48, 5)),
    )


class Backbone(nn.Module):
    """A chain that returns maps, as timm's of `features_only` do."""

    feature_info = ()

    def __init__(self, chain: nn.Module, indices: tuple[int, ...]) -> None:
        super().__init__()
        *features, _ = chain.features
        self.features, self.indices = nn.ModuleList(features), indices

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for layers in self.features:
            x = layers(x)
            maps.append(x)
        return [maps[i] for i in self.indices]


def efficient() -> nn.Module:
    """With a SiLU in its stem, of a linear layer's, and a convolution of 5x5 and stride 2."""
    features = [
        *(conv(3, 12, 3, 2, act=nn.SiLU), Efficient(12, 20, 12, 3, 1, 3), Efficient(20, 24, 60, 5, 2, 5)),
        *(Efficient(24, 24, 72, 5, 1, 6), Inverted(24, 20, 50, 3, 2, nn.GELU), conv(20, 70, 1, act=nn.SiLU)),
    ]
    return Chain(features, [nn.Linear(70, 40), nn.SiLU(), nn.Dropout(0.2), nn.Linear(40, 5)])


class Conv2dSame(nn.Conv2d):
    """Padded as by TensorFlow, and by its name timm's."""

    def forward(self, x: Tensor) -> Tensor:
        missing = [
            max((-(-size // s) - 1) * s + k - size, 0)
            for size, s, k in zip(x.shape[2:], self.stride, self.kernel_size, strict=True)
        ]
        above, left = (rows // 2 for rows in missing)
        return super().forward(nn.functional.pad(x, (left, missing[1] - left, above, missing[0] - above)))


def tensorflow(model: nn.Module) -> nn.Module:
    """The network with TensorFlow's padding where a convolution has a stride."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d) and child.stride != (1, 1):
                sizes = (child.in_channels, child.out_channels, child.kernel_size, child.stride)
                setattr(module, name, Conv2dSame(*sizes, groups=child.groups, bias=child.bias is not None))
    return model


class Skip(nn.Sequential):
    """Any layers, whose input is added to what they make."""

    has_skip = True

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def fused() -> nn.Module:
    """As EfficientNetV2: dense convolutions in blocks and before the pooling; and other sizes."""
    act = nn.SiLU
    features = [
        *(conv(3, 16, 3, 2, act=act), Skip(conv(16, 16, 3, act=act)), conv(16, 40, 3, 2, act=act)),
        *(conv(40, 20, 1), Skip(conv(20, 50, 3), Squeeze(50, 6, False, act), act(), conv(50, 20, 1))),
        *(Skip(conv(20, 20, 3), Squeeze(20, 6, True)), Squeeze(20, 5, False, act), nn.ReLU6()),
        *(Skip(conv(20, 20, 3, 1, 20)), conv(20, 20, 7, 2, 20, act), conv(20, 20, 4, 1, 20)),
        *(nn.Conv2d(20, 20, 2, padding="same", groups=20), conv(20, 24, 1, 2), conv(24, 70, 3, act=act)),
    ]
    return Chain(features, [nn.Linear(70, 5)])


class Basic(nn.Module):
    """As torchvision's: one ReLU, called twice."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = None if inputs == outputs else conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """As a RegNet's: with groups and squeeze-and-excitation."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = conv(inputs, outputs, 1, act=nn.ReLU)
        self.conv2 = conv(outputs, outputs, 3, stride, groups, nn.ReLU)
        self.se = Squeeze(outputs, 9, False, gate=nn.Sigmoid)
        self.conv3 = conv(outputs, outputs, 1)
        self.act3 = nn.ReLU()
        self.downsample = nn.Identity() if inputs == outputs else conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.act3(self.conv3(self.se(self.conv2(self.conv1(x)))) + self.downsample(x))


def residual() -> nn.Module:
    """As ResNets and RegNets; the groups of one block are in panels of their own, those of another not."""
    features = [
        *(conv(3, 16, 7, 2, act=nn.ReLU), nn.MaxPool2d(3, 2, 1), Basic(16, 16, 1), Basic(16, 24, 2)),
        *(Bottleneck(24, 36, 1, 3), Bottleneck(36, 64, 2, 4), Bottleneck(64, 64, 1, 4)),
    ]
    return Chain(features, [nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU6(), nn.Linear(30, 5)])


NETWORKS = {
    **{"v2": version2, "v3": version3, "v3, functions": lambda: version3(True), "named": named},
    **{"efficient": efficient, "fused": fused, "residual": residual},
    "v3, same": lambda: tensorflow(version3()),
    **{f"{f.__name__}, same": lambda f=f: tensorflow(f()) for f in (efficient, fused)},
}


def make(name: str) -> nn.Module:
    """With statistics of random images."""
    torch.manual_seed(0)
    model = NETWORKS[name]()
    randomise(model, torch.randn(4, 5 if name == "named" else 3, 64, 64))
    return model.eval()
