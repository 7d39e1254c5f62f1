"""Numbers made by the released implementations (tests/data), and how to run our modules on them."""

import io
import json
import lzma
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import mfkernels.nn as mnn
from mfkernels.models import DynamicMobileFormer, IFormer, MobileFormer, create_model

DATA = Path(__file__).parent / "data"


@dataclass
class Case:
    name: str
    tensors: dict[str, Tensor]
    config: dict
    modes: list[str] = field(default_factory=lambda: ["eval", "train"])
    outputs: list[str] = field(default_factory=lambda: ["logits"])
    fp32_err: dict = field(default_factory=dict)

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name begins with `prefix.`, without it; floats in float64."""
        return {k[len(prefix) + 1 :]: v for k, v in self.tensors.items() if k.startswith(prefix + ".")}


def paths(*folders: str) -> list[Path]:
    """The files of these folders, ours and those of MFKERNELS_TEST_DATA."""
    roots = [DATA] + [Path(p) for p in [os.environ.get("MFKERNELS_TEST_DATA")] if p]
    found = {}
    for folder in folders:
        for root in roots:
            for path in sorted((root / folder).glob("*_*")):
                found.setdefault(path.name.split(".")[0], path)
    return list(found.values())


def read(path: Path) -> Case:
    name = path.name.split(".")[0]
    meta: dict = {}
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "np") as file:
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            meta = {k: _json(v) for k, v in (file.metadata() or {}).items()}
    else:
        raw = path.read_bytes()
        raw = lzma.decompress(raw) if path.suffix == ".xz" else raw
        with np.load(io.BytesIO(raw)) as file:
            arrays = {key: file[key] for key in file.files}
        if "meta" in arrays:
            meta = json.loads(str(arrays.pop("meta")))
    tensors = {k: torch.from_numpy(v) for k, v in arrays.items()}
    tensors = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
    keys = ("modes", "outputs", "fp32_err")
    return Case(name, tensors, meta.get("config", {}), **{k: meta[k] for k in keys if k in meta})


def _json(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return text


# --- operators, blocks and heads: one function a kind of file, from its settings to a module ---------------


def _bridge(c: dict) -> dict:
    return dict(
        num_heads=c.get("heads", 2),
        mixing=c.get("type", "attn"),
        token_num=c["T"],
        positions=c["H"] * c["W"],
        local_projection=c.get("local_proj", False),
    )


def _l2g(c: dict) -> nn.Module:
    return mnn.MobileToFormer(c["C"], c["d"], gate=c.get("gate", True), **_bridge(c))


def _g2l(c: dict) -> nn.Module:
    return mnn.FormerToMobile(c["C"], c["d"], gate=c.get("gate", False), **_bridge(c))


def _former(c: dict) -> nn.Module:
    return mnn.Former(
        c["d"],
        token_num=c["T"],
        ffn=c.get("ffn", True),
        gate=c.get("gate", False),
        mixing=c.get("type", "attn"),
    )


class _Activation(nn.Module):
    """Returns y and theta, as the files hold them."""

    def __init__(self, c: dict) -> None:
        super().__init__()
        functions, spatial = c["num_func"], c.get("token_id", 0) == -1
        if functions > 0:
            self.hyper = mnn.HyperNetwork(c["d"], functions * c["C"], token_id=c.get("token_id", 0))
        self.act = mnn.DynamicReLU(functions, relu6_first=c.get("relu_first", True))
        self.spatial = spatial

    def forward(self, x, tokens=None, alpha=None):
        if self.act.num_functions < 1:
            return self.act(x)
        theta = self.hyper(tokens)
        if not self.spatial:
            return self.act(x, theta), theta[..., None, None]
        return self.act(x, theta, alpha), torch.einsum("btc,bthw->bchw", theta, alpha)


class _RawActivation(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        self.act = mnn.DynamicReLU(c["num_func"], relu6_first=c.get("relu_first", True))

    def forward(self, x, theta):
        return self.act(x, theta)


def _block_options(c: dict) -> dict:
    keys = dict(token_dim="d", token_num="T", token_id="token_id", groups="groups", ffn="ffn")
    options = {ours: c[theirs] for ours, theirs in keys.items() if theirs in c}
    options["mixing"] = c.get("type", "attn")
    options["positions"] = c["H"] * c["W"]
    if "k" in c:
        options["kernel_size"] = tuple(c["k"])
    if "se_flag" in c:
        options["se_flag"] = tuple(c["se_flag"])
    if "gates" in c:
        options["gates"] = tuple(c["gates"])
    if "heads" in c:
        options["num_heads"] = c["heads"]
    return options


def _block(c: dict) -> nn.Module:
    sizes = (c["Cin"], c["Cout"], c["stride"])
    if c["e2"] == 0:
        return mnn.LiteBottleneck(*sizes, expansion=c["e1"], groups=c.get("groups", 1))
    before = c.get("before_skip", False)
    return mnn.MobileFormerBlock(*sizes, expansion=c["e1"], before_skip=before, **_block_options(c))


def _down(c: dict) -> nn.Module:
    sizes = (c["Cin"], c["Cout"], c["stride"])
    kind = c.get("dw", "dw")
    if c["e2"] == 0:
        return mnn.LiteBottleneck(*sizes, expansion=c["e1"], groups=c.get("groups", 1), depthwise=kind)
    return mnn.MobileFormerDownsample(
        *sizes, expansion=(c["e1"], c["e2"]), depthwise=kind, **_block_options(c)
    )


def _head(c: dict) -> nn.Module:
    return mnn.ClassifierHead(
        c["C"],
        c["classes"],
        features=c["F"],
        token_dim=c["d"],
        groups=c.get("groups", 1),
        class_tokens=c.get("cls", 1),
        activation="dynamic_relu" if c.get("act") == "dyrelu" else "relu6",
    )


def _shuffle(c: dict) -> nn.Module:
    return mnn.ChannelShuffle(c["groups"])


class _Dynamic(nn.Module):
    """The convolution under the name that some files have for it."""

    def __init__(self, c: dict) -> None:
        super().__init__()
        self.m = _dynamic(c, activation="softmax")

    def forward(self, x, z):
        return self.m(x, z)


def _dynamic(c: dict, **options) -> nn.Module:
    options |= dict(num_kernels=c["K"], groups=c["groups"], temperature=c.get("temp", 1.0))
    return mnn.DynamicResidualConv2d(c["Cin"], c["Cout"], c["k"], token_dim=c.get("d", 32), **options)


def _kernel_attention(c: dict) -> nn.Module:
    return mnn.KernelAttention(c["C"], c["d"], c["K"], temperature=c.get("temp", 1.0))


def _bottleneck(c: dict) -> nn.Module:
    if c.get("grn"):
        return mnn.InvertedResidualFFN(c["Cin"], c["hidden"])
    options = dict(stride=c.get("stride", 1), groups=c.get("groups", 1))
    return mnn.InvertedBottleneck(c["Cin"], c["hidden"], c["Cout"], **options)


def _mobile(c: dict) -> dict:
    return dict(
        in_channels=c["Cin"],
        hidden_channels=c["hidden"],
        out_channels=c["Cout"],
        token_dim=c["d"],
        stride=c["stride"],
        groups=c["groups"],
        pointwise_kernels=c["fc_K"],
        depthwise_kernels=c["conv_K"],
    )


def _shma(c: dict, **options) -> nn.Module:
    options |= dict(ratio=c.get("ratio", 1), num_heads=c.get("heads", 1), window_size=c.get("ws"))
    return mnn.SingleHeadModulationAttention(c["C"], reduction=c["R"], **options)


def _classifier(c: dict) -> nn.Module:
    return mnn.IFormerClassifier(c["C"], c["classes"], distillation=c["distill"])


class _Classifier(nn.Module):
    """The classifier under the name that some files have for it."""

    def __init__(self, c: dict) -> None:
        super().__init__()
        self.c = _classifier(c)

    def forward(self, x):
        return self.c(x)


def _fused(c: dict) -> nn.Module:
    """What is folded into one layer."""
    channels = c["C"]
    return {
        "conv_bn": lambda: mnn.ConvBN(
            channels, c["Cout"], c["k"], c["stride"], c["k"] // 2, c.get("groups", 1)
        ),
        "bn_conv": lambda: mnn.BNConv(channels, c["Cout"]),
        "bn_linear": lambda: mnn.BNLinear(channels, c["Cout"]),
        "repdw": lambda: mnn.ReparameterizedDepthwise(channels),
        "cpe": lambda: mnn.RepCPE(channels).cpe,
        "cls_distill": lambda: mnn.IFormerClassifier(channels, c["Cout"], distillation=True),
    }[c["kind"]]()


BUILDERS = {
    "mf_l2g": _l2g,
    "mf_g2l": _g2l,
    "mf_former": _former,
    "mf_dyrelu_raw": _RawActivation,
    "mf_dyrelu": _Activation,
    "mf_block": _block,
    "mf_down": _down,
    "mf_head": _head,
    "mf_shuffle": _shuffle,
    "dmf_dyconv": _dynamic,
    "dmf_katt": _kernel_attention,
    "dmf_grn": lambda c: mnn.GlobalResponseNorm(c["C"]),
    "dmf_bneck": _bottleneck,
    "dmf_m2f": lambda c: mnn.DMFMobileToFormer(c["C"], c["d"], num_heads=c["heads"]),
    "dmf_f2m": lambda c: mnn.DMFFormerToMobile(c["C"], c["d"], num_heads=c["heads"]),
    "dmf_former": lambda c: mnn.DMFFormer(c["d"]),
    "dmf_dymobile": lambda c: mnn.DynamicMobile(**_mobile(c)),
    "dmf_block": lambda c: mnn.DMFBlock(**_mobile(c), num_heads=c["heads"], ffn_ratio=c["R"]),
    "dmf_stem": lambda c: mnn.DMFStem(3, c["C"]),
    "dmf_head": lambda c: mnn.DMFHead(c["C"], c["d"], c["F"], c["classes"]),
    "if_shma": _shma,
    "if_block": lambda c: mnn.IFormerBlock(c["C"], c["spec"], layer_scale=c.get("ls", 0.0)),
    "if_chain": lambda c: mnn.IFormerStage(c["C"], c["specs"]),
    "if_edge": lambda c: mnn.FusedInvertedBottleneck(
        c["C"], c["Cout"], c["k"], c["stride"], expansion=c["exp"]
    ),
    "if_ln2d": lambda c: mnn.LayerNorm2d(c["C"]),
    "if_repdw": lambda c: mnn.ReparameterizedDepthwise(c["C"]),
    "if_cls": _classifier,
    "if_cls_1_train": _Classifier,
    "if_fuse": _fused,
    "derived_dyconv": _Dynamic,
    "derived_grn": lambda c: mnn.GlobalResponseNorm(c["C"], mean="channels"),
    "derived_shma": lambda c: _shma(c, form="paper"),
    "derived_sha": lambda c: mnn.Attention2d(c["C"]),
    "derived_mha": lambda c: mnn.Attention2d(c["C"], num_heads=c["heads"]),
    "derived_silu": lambda c: mnn.PreNormModulationAttention(c["C"], reduction=c["R"]),
    "derived_adapt": lambda c: mnn.AdaptPosition(c["d"]),
}


def build(case: Case) -> nn.Module:
    """By the longest name of `BUILDERS` that the case's begins with."""
    name = max((name for name in BUILDERS if case.name.startswith(name)), key=len)
    return BUILDERS[name](case.config)


def run(case: Case, module: nn.Module, mode: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, ours, theirs) of all outputs, gradients and running statistics of one mode."""
    module = module.to(dtype).train(mode == "train")
    load(module, case.under("p") | case.under("b"), dtype)
    given = case.under("in")
    order = [k for k in ("x", "tokens", "z", "alpha", "theta", "pos", "feat") if k in given]
    inputs = {k: leaf(given[k], dtype) for k in order}
    outputs = module(*inputs.values())
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    named = {name: out for name, out in zip(case.outputs, outputs, strict=False) if out is not None}
    cotangents = case.under("cot")
    sum(
        (out * cotangents[name].to(dtype)).sum() for name, out in named.items() if out.requires_grad
    ).backward()
    expected = case.under(mode)
    ours = {f"out.{k}": v for k, v in named.items()}
    ours |= {f"gin.{k}": v.grad for k, v in inputs.items()}
    ours |= {f"gp.{k}": v.grad for k, v in module.named_parameters()}
    ours |= {f"buf.{k}": v for k, v in module.named_buffers()}
    for name, value in expected.items():
        assert ours.get(name) is not None, f"{case.name} {mode}: no {name}"
        yield f"{mode}.{name}", ours[name].detach().double(), value
    for name, value in ours.items():  # nothing extra but the gradients that theirs has no path to
        known = name in expected or name.startswith("buf.") or value is None or value.abs().max() == 0
        assert known, f"{case.name} {mode}: {name} is not in the file"


def leaf(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().clone().to(dtype).requires_grad_()


def load(module: nn.Module, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    for name, value in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, torch.zeros_like(value))
    module.load_state_dict(state, strict=True)


# --- whole networks ------------------------------------------------------------------------------------


def build_model(case: Case) -> nn.Module:
    c = case.config
    if "model" in c:
        return create_model(c["model"].lower(), num_classes=c["num_classes"])
    if "depths" in c:
        return _iformer(c["depths"], c["dims"], c["block_types"])
    return MobileFormer.from_released(
        block_args=[[kind, e1, ch, n, s, e2] for kind, e1, ch, n, s, e2 in c["blocks"]],
        num_classes=c["num_classes"],
        stem_chs=c["stem"],
        num_features=c["features"],
        token_dim=c["d"],
        token_num=c["T"],
        hyper_token_id=c["token_id"],
        group_num=c["groups"],
        gbr_type="attn",
        gbr_dynamic=[True, False, False],
        gbr_ffn=True,
    )


def _iformer(depths: list[int], dims: list[int], block_types: list[str], **options) -> nn.Module:
    return IFormer.from_released(
        depths=depths,
        dims=dims,
        block_types=block_types,
        num_classes=10,
        use_bn=True,
        conv_stem_type="FusedIB",
        downsample_kernels=[5, 3, 3, 3],
        **options,
    )


TINY_DMF = {
    "alpha": 1.0,
    "stem": {"out_channels": 8, "kernel_size": 3},
    "lite_bneck": {
        "in_channels": 8, "hidden_channels": 16, "out_channels": 8, "fc_groups": 1, "kernel_size": 3,
        "stride": 1, "padding": 1,
    },
    "block": {
        "in_channels": [8, 12, 12], "hidden_channels": [48, 36, 72], "out_channels": [12, 12, 16],
        "kernel_sizes": [3] * 3, "strides": [2, 1, 2], "paddings": [1] * 3, "fc_groups": 2,
        "ffn_expansion": 2.7, "fc_Ks": [8] * 3, "conv_Ks": [8] * 3, "num_heads": [2] * 3,
    },
    "channel_conv": {"in_channels": 16, "out_channels": 48},
    "head": {"in_channels": 48, "hidden_channels": 40},
}  # fmt: skip


def _tiny_iformer(name: str) -> nn.Module:
    first, last = ("_ws4_wsp1", "_ws4_wre1") if name.endswith("_window") else ("", "")
    types = ["ConvBlock_k7_r3"] * 3
    for attention in (f"hdrr2_act0_nh1{first}", f"hdrr2_act0_nh1{last}", "hdrr4_act0_nh1"):
        types += ["RepCPE_k3", f"SHMABlock_r1_{attention}", "FFN2d_r2"]
    return _iformer([1, 1, 7, 3], [16, 16, 32, 48], types, distillation=name.endswith("_distill"))


TINY_ROWS = [
    ["DnaBlock3", 2, 8, 1, 1, 0],
    ["DnaBlock3", 6, 12, 1, 2, 4],
    ["DnaBlock", 3, 12, 1, 1, 4],
    ["DnaBlock3", 6, 16, 1, 2, 4],
    ["DnaBlock", 4, 24, 1, 1, 4],
]
TINY_OPTIONS = {
    "mf_model_tiny": {},
    "mf_model_tiny_spatial": {"hyper_token_id": -1},
    "mf_model_tiny_group4": {"group_num": 4},
    "mf_model_tiny_onetoken_noffn": {"token_num": 1, "gbr_ffn": False},
}


def build_tiny(name: str) -> nn.Module:
    if name.startswith("dmf"):
        return DynamicMobileFormer.from_released(num_classes=10, tokens=[4, 64], params=TINY_DMF)
    if name.startswith("ifm"):
        return _tiny_iformer(name)
    settings = dict(
        block_args=TINY_ROWS, num_classes=10, img_size=32, stem_chs=8, num_features=48, token_dim=32,
        token_num=4, gbr_type="attn", gbr_dynamic=[True, False, False], gbr_ffn=True, cnn_exp=(6, 4),
        mlp_token_exp=4, hyper_reduction_ratio=4, attn_num_heads=2, last_act="relu",
    )  # fmt: skip
    return MobileFormer.from_released(**(settings | TINY_OPTIONS[name]))


def run_model(case: Case, mode: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, ours, theirs): logits, inner points, sampled gradients, running statistics."""
    module = build_model(case).to(dtype).train(mode == "train")
    load(module, case.under("p") | case.under("b"), dtype)
    x = leaf(case.tensors[f"in.x_{mode}"], dtype)
    taps: dict[str, Tensor] = {}
    _tap(module, taps)
    logits = module(x)
    (logits * case.tensors[f"{mode}.cot.logits"].to(dtype)).sum().backward()
    ours = {"out.logits": logits, "gin.x": x.grad} | {f"tap.{k}": v for k, v in taps.items()}
    ours |= {f"buf.{k}": v for k, v in module.named_buffers()}
    for name, parameter in module.named_parameters():
        flat = parameter.grad.double().flatten()
        n, m = flat.numel(), min(flat.numel(), 48)
        ours[f"gs.{name}"] = flat[[(i * n) // m for i in range(m)]]
        ours[f"gn.{name}"] = torch.stack([flat.sum(), flat.norm()])
    for name, value in case.under(mode).items():
        if not name.startswith("cot."):
            yield f"{mode}.{name}", ours[name].detach().double(), value


def _tap(module: nn.Module, taps: dict[str, Tensor]) -> None:
    def keep(name):
        def hook(_module, _inputs, output):
            pair = output if isinstance(output, tuple) else (output, None)
            taps[name] = pair[0]
            if pair[1] is not None:
                taps[f"{name}.tokens"] = pair[1]

        return hook

    points = {"stem": "stem", "last_tokens": "local_global", "lite": "lite_bottleneck"}
    points |= {"end_m2f": "end_mobile2former", "end_former": "end_former", "channel_conv": "channel_conv"}
    for name, _ in module.named_modules():
        parts = name.split(".")
        if len(parts) == 2 and parts[0] in ("features", "blocks"):
            points[f"block{parts[1]}"] = name
        elif len(parts) == 2 and parts[0] == "downsample_layers":
            points[f"down{parts[1]}"] = name
        elif len(parts) == 3 and parts[0] == "stages":
            points[f"s{parts[1]}b{parts[2]}"] = name
    for point, name in points.items():
        if hasattr(module, name.split(".")[0]):
            module.get_submodule(name).register_forward_hook(keep(point))


def run_tiny(case: Case, mode: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    module = build_tiny(case.name).to(dtype).train(mode == "train")
    load(module, case.under("state"), dtype)
    x = leaf(case.tensors["in.x"], dtype)
    outputs = module(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = [case.tensors[f"cotangent.{i}"].to(dtype) for i in range(len(outputs))]
    sum((out * cotangent).sum() for out, cotangent in zip(outputs, cotangents, strict=True)).backward()
    ours = {f"out.{i}": out for i, out in enumerate(outputs)} | {"grad_in.x": x.grad}
    ours |= {f"grad_param.{k}": v.grad for k, v in module.named_parameters()}
    ours |= {f"buffer.{k}": v for k, v in module.named_buffers()}
    for name, value in case.under(mode).items():
        yield f"{mode}.{name}", ours[name].detach().double(), value
