"""A block of DyMN with the class names, attributes and parameter names of EfficientAT, written plainly for
these tests: what `accelerate` recognises."""

import torch
from lookalikes_dynamic import each_its_own
from torch import nn


class DynamicConv(nn.Module):
    def __init__(self, inputs, outputs, context, size, stride=1, dilation=1, groups=1, kernels=4):
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = inputs, outputs, size
        self.stride, self.padding, self.dilation = stride, size // 2 * dilation, dilation
        self.groups, self.k, self.att_groups, self.temperature = groups, kernels, 1, 30
        self.residuals = nn.Sequential(nn.Linear(context, kernels))
        self.bias = None
        self.weight = nn.Parameter(torch.randn(1, 1, kernels, outputs * inputs // groups * size**2))

    def update_params(self, epoch):
        self.temperature = max(30 - epoch, 1)

    def forward(self, x, g=None):
        attention = (self.residuals(g[0].flatten(1)) / self.temperature).softmax(1)
        size = self.kernel_size
        return each_its_own(
            x, self.weight.view(self.k, self.out_channels, -1, size, size), attention, None, self
        )


class DyReLUB(nn.Module):
    def __init__(self, channels, context, M=2):
        super().__init__()
        self.channels, self.M = channels, M
        self.coef_net = nn.Sequential(nn.Linear(context, 2 * M * channels))
        self.register_buffer("lambdas", torch.tensor([1.0] * M + [0.5] * M))
        self.register_buffer("init_v", torch.eye(2 * M)[0])

    def get_relu_coefs(self, x):
        return 2 * self.coef_net(x).sigmoid() - 1

    def forward(self, x, g):
        theta = self.get_relu_coefs(g[0].flatten(1)).view(len(x), self.channels, -1)
        slopes, intercepts = (theta * self.lambdas + self.init_v).split(self.M, 2)
        return (x[..., None] * slopes[:, :, None, None] + intercepts[:, :, None, None]).amax(-1)


class CoordAtt(nn.Module):
    def forward(self, x, g):
        return x * torch.sigmoid(g[1]) * torch.sigmoid(g[2])


class DynamicWrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, g):
        return self.module(x)


class ContextGen(nn.Module):
    def __init__(self, context, inputs, hidden, stride):
        super().__init__()
        self.joint_conv = nn.Conv2d(inputs, context, 1, bias=False)
        self.joint_norm, self.joint_act = nn.BatchNorm2d(context), nn.Hardswish()
        self.conv_f, self.conv_t = nn.Conv2d(context, hidden, 1), nn.Conv2d(context, hidden, 1)
        self.pool_f = nn.AvgPool2d((3, 1), (stride, 1), (1, 0)) if stride > 1 else nn.Sequential()
        self.pool_t = nn.AvgPool2d((1, 3), (1, stride), (0, 1)) if stride > 1 else nn.Sequential()

    def forward(self, x, g):
        both = torch.cat([x.mean(3), x.mean(2)], 2)[..., None]
        both = self.joint_act(self.joint_norm(self.joint_conv(both)))
        rows, columns = both[:, :, : x.shape[2]], both[:, :, x.shape[2] :].transpose(2, 3)
        return both.mean(2, keepdim=True), self.conv_f(self.pool_f(rows)), self.conv_t(self.pool_t(columns))


class DY_Block(nn.Module):
    def __init__(self, inputs, hidden, outputs, stride, context=8):
        super().__init__()
        self.use_res_connect = stride == 1 and inputs == outputs
        self.exp_conv = DynamicConv(inputs, hidden, context, 1)
        self.exp_norm, self.exp_act = nn.BatchNorm2d(hidden), DynamicWrapper(nn.Hardswish(inplace=True))
        self.depth_conv = DynamicConv(hidden, hidden, context, 3, stride, groups=hidden)
        self.depth_norm, self.depth_act = nn.BatchNorm2d(hidden), DyReLUB(hidden, context)
        self.ca = CoordAtt()
        self.proj_conv = DynamicConv(hidden, outputs, context, 1)
        self.proj_norm = nn.BatchNorm2d(outputs)
        self.context_gen = ContextGen(context, inputs, hidden, stride)

    def forward(self, x, g=None):
        g = self.context_gen(x, g)
        y = self.exp_act(self.exp_norm(self.exp_conv(x, g)), g)
        y = self.ca(self.depth_act(self.depth_norm(self.depth_conv(y, g)), g), g)
        y = self.proj_norm(self.proj_conv(y, g))
        return y + x if self.use_res_connect else y
