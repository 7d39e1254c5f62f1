"""Every wrong argument gets an exception that names it, says what came and what was expected."""

import re

import pytest
import torch
from torch import ones

import mfkernels
from mfkernels import models, nn, ops

X = ones(2, 8, 4, 5)


def relu(x=X, slopes=None, **others):
    return ops.dynamic_relu(x, ones(2, 3, 8) if slopes is None else slopes, **others)


def gather(x=X, q=None, num_heads=2, **others):
    return ops.mobile_to_former_attention(x, ones(2, 3, 8) if q is None else q, num_heads, **others)


def scatter(x=X, k=None, v=None, num_heads=2):
    k, v = ones(2, 3, 8) if k is None else k, ones(2, 3, 8) if v is None else v
    return ops.former_to_mobile_attention(x, k, v, num_heads)


def convolve(x=X, weight=None, basis=None, attention=None, **others):
    weight = ones(6, 4, 3, 3) if weight is None else weight
    basis = ones(5, 6, 4, 3, 3) if basis is None else basis
    attention = ones(2, 5) if attention is None else attention
    return ops.dynamic_conv2d(x, weight, basis, attention, **dict(groups=2) | others)


def modulate(q=X, k=X, v=None, gate=None, **others):
    v, gate = ones(2, 3, 4, 5) if v is None else v, ones(2, 3, 4, 5) if gate is None else gate
    return ops.modulation_attention(q, k, v, gate, **others)


def respond(x=X, gamma=None, beta=None, **others):
    gamma, beta = ones(8) if gamma is None else gamma, ones(8) if beta is None else beta
    return ops.global_response_norm(x, gamma, beta, **others)


def normalise(x=X, weight=None, bias=None, **others):
    weight, bias = ones(8) if weight is None else weight, ones(8) if bias is None else bias
    return ops.batch_norm(x, weight, bias, **others)


def convolve_and_normalise(x=X, weight=None, **others):
    given = dict(weight=ones(6, 8, 1, 1) if weight is None else weight)
    given |= {name: ones(6) for name in ("gamma", "beta", "mean", "variance")}
    return ops.pointwise_conv_bn(x, **given | others)


def form(tokens=None, **others):
    square, row = ones(8, 8), ones(8)
    given = dict(
        tokens=ones(2, 3, 8) if tokens is None else tokens, qkv_weight=square, qkv_bias=row,
        proj_weight=square, proj_bias=row, norm1_weight=row, norm1_bias=row, fc1_weight=ones(6, 8),
        fc1_bias=ones(6), fc2_weight=ones(8, 6), fc2_bias=row, norm2_weight=row, norm2_bias=row,
    )  # fmt: skip
    return ops.former_block(**given | others)


def generate(token=None, **others):
    given = dict(weight1=ones(4, 8), bias1=ones(4), weight2=ones(6, 4), bias2=ones(6))
    return ops.token_hyper(ones(2, 8) if token is None else token, **given | others)


CALLS = {
    # dynamic_conv2d
    "conv no tensor": (lambda: convolve(x=3), TypeError, "x must be a tensor, got int"),
    "conv weight": (
        lambda: convolve(weight=ones(6, 8, 3, 3)),
        ValueError,
        "weight must have shape (O, C/groups, kh, kw) = (6, 4, 3, 3), got (6, 8, 3, 3)",
    ),
    "conv basis": (lambda: convolve(basis=ones(5, 6, 4, 3, 1)), ValueError, "basis must have shape"),
    "conv attention of a basis": (
        lambda: convolve(basis=ones(0, 6, 4, 3, 3)),
        ValueError,
        "attention must have shape (B, K) = (2, 0), got (2, 5)",
    ),
    "conv attention": (
        lambda: convolve(attention=ones(5, 2)),
        ValueError,
        "attention must have shape (B, K) = (2, 5), got (5, 2)",
    ),
    "conv dtype": (
        lambda: convolve(attention=ones(2, 5).double()),
        TypeError,
        "attention must have the dtype of x, torch.float32, got torch.float64",
    ),
    "conv bias": (lambda: convolve(bias=ones(5)), ValueError, "bias must have shape (O) = (6,), got (5,)"),
    "conv basis bias": (
        lambda: convolve(basis_bias=ones(6)),
        ValueError,
        "basis_bias must have 2",
    ),
    "conv groups": (
        lambda: convolve(groups=3),
        ValueError,
        "groups must be positive and divide the channels of x and the outputs, got 3 for 8 channels",
    ),
    "conv no groups": (lambda: convolve(groups=0), ValueError, "groups must be positive"),
    "conv groups type": (lambda: convolve(groups=2.0), TypeError, "groups must be an int, got float"),
    "conv stride": (lambda: convolve(stride=0), ValueError, "stride must be at least 1, got 0"),
    "conv stride type": (
        lambda: convolve(stride=(1, 2, 3)),
        TypeError,
        "stride must be an int or a pair of ints, got (1, 2, 3)",
    ),
    "conv padding": (lambda: convolve(padding=(0, -1)), ValueError, "padding must be at least 0"),
    "conv padding type": (lambda: convolve(padding="same"), TypeError, "padding must be an int or a pair"),
    "conv dilation": (lambda: convolve(dilation=0), ValueError, "dilation must be at least 1, got 0"),
    "conv small": (lambda: convolve(dilation=2), ValueError, "x is too small: 4 x 5 pixels"),
    # modulation_attention
    "modulate keys": (lambda: modulate(k=ones(2, 7, 4, 5)), ValueError, "k must have shape (B, D, H, W)"),
    "modulate values": (lambda: modulate(v=ones(2, 3, 5, 4)), ValueError, "v must have shape (B, C, H, W)"),
    "modulate gate": (
        lambda: modulate(gate=ones(2, 4, 4, 5)),
        ValueError,
        "gate must have shape (B, C, H, W) = (2, 3, 4, 5), got (2, 4, 4, 5)",
    ),
    "modulate form": (
        lambda: modulate(form="coded"),
        ValueError,
        "form must be 'released' or 'paper', got 'coded'",
    ),
    "modulate window": (
        lambda: modulate(window_size=3),
        ValueError,
        "window_size must be positive and divide height and width, got 3 for 4 x 5 pixels",
    ),
    "modulate window type": (
        lambda: modulate(window_size=1.0),
        TypeError,
        "window_size must be None or an int, got float",
    ),
    "modulate no depth": (
        lambda: modulate(q=ones(2, 0, 4, 5), k=ones(2, 0, 4, 5)),
        ValueError,
        "q must have at least one channel",
    ),
    "modulate dtype": (lambda: modulate(v=ones(2, 3, 4, 5).half()), TypeError, "v must have the dtype of q"),
    # global_response_norm
    "respond gamma": (
        lambda: respond(gamma=ones(7)),
        ValueError,
        "gamma must have shape (C) = (8,)",
    ),
    "respond beta": (lambda: respond(beta=ones(1, 8, 1, 1)), ValueError, "beta must have 1 dimensions (C)"),
    "respond mean": (
        lambda: respond(mean="pixels"),
        ValueError,
        "mean must be 'channels' or 'released', got 'pixels'",
    ),
    # pointwise_conv_bn
    "conv and norm weight": (
        lambda: convolve_and_normalise(weight=ones(6, 7, 1, 1)),
        ValueError,
        "weight must have shape (O, C, 1, 1) = (6, 8, 1, 1), got (6, 7, 1, 1)",
    ),
    "conv and norm kernel": (
        lambda: convolve_and_normalise(weight=ones(6, 8, 3, 3)),
        ValueError,
        "weight must have shape (O, C, 1, 1) = (6, 8, 1, 1), got (6, 8, 3, 3)",
    ),
    "conv and norm mean": (
        lambda: convolve_and_normalise(mean=ones(8)),
        ValueError,
        "mean must have shape (O) = (6,)",
    ),
    "conv and norm dtype": (
        lambda: convolve_and_normalise(gamma=ones(6).double()),
        TypeError,
        "gamma must have the dtype of x, torch.float32, got torch.float64",
    ),
    "conv and norm without pixels": (
        lambda: convolve_and_normalise(X[:, :, :0]),
        ValueError,
        "x must have channels and pixels",
    ),
    "conv and norm activation": (
        lambda: convolve_and_normalise(activation="relu"),
        ValueError,
        "activation must be 'none' or 'gelu', got 'relu'",
    ),
    # batch_norm
    "normalise weight": (
        lambda: normalise(weight=ones(7)),
        ValueError,
        "weight must have shape (C) = (8,)",
    ),
    "normalise bias": (
        lambda: normalise(bias=ones(8).double()),
        TypeError,
        "bias must have the dtype of x, torch.float32, got torch.float64",
    ),
    "normalise half a statistic": (
        lambda: normalise(mean=ones(8)),
        ValueError,
        "variance is None and mean is given, expected both or none",
    ),
    "normalise half precision": (
        lambda: normalise(X.bfloat16(), ones(8), ones(8).half()),
        TypeError,
        "bias must have the dtype of x, torch.bfloat16 or torch.float32, got torch.float16",
    ),
    "normalise activation": (
        lambda: normalise(activation="relu"),
        ValueError,
        "activation must be 'none' or 'gelu', got 'relu'",
    ),
    "normalise vectors": (lambda: normalise(ones(2, 8)), ValueError, "x must have 4 dimensions (B, C, H, W)"),
    # former_block
    "form tokens": (lambda: form(tokens=ones(3, 8)), ValueError, "tokens must have 3 dimensions (B, T, d)"),
    "form heads": (
        lambda: form(num_heads=3),
        ValueError,
        "num_heads must be positive and divide the width of tokens, got 3 for 8 values",
    ),
    "form form": (lambda: form(form="pre"), ValueError, "form must be 'released' or 'standard', got 'pre'"),
    "form queries": (
        lambda: form(form="standard"),
        ValueError,
        "qkv_weight must have shape (3d, d) = (24, 8), got (8, 8)",
    ),
    "form missing": (
        lambda: form(norm2_weight=None),
        TypeError,
        "norm2_weight must be a tensor, got None",
    ),
    "form too much": (lambda: form(fc1_weight=None), TypeError, "fc1_bias must be None without fc1_weight"),
    "form hidden": (
        lambda: form(fc2_weight=ones(8, 7)),
        ValueError,
        "fc2_weight must have shape (d, h) = (8, 6), got (8, 7)",
    ),
    # token_hyper
    "generate token": (
        lambda: generate(token=ones(2, 3, 8)),
        ValueError,
        "token must have 2 dimensions",
    ),
    "generate width": (
        lambda: generate(token=ones(2, 7)),
        ValueError,
        "weight1 must have shape (h, d) = (4, 7), got (4, 8)",
    ),
    "generate functions": (
        lambda: generate(num_functions=3),
        ValueError,
        "num_functions must be 1 or 2",
    ),
    "generate outputs": (
        lambda: generate(weight2=ones(5, 4), bias2=ones(5)),
        ValueError,
        "weight2 must have a multiple of num_functions = 2 outputs, got 5",
    ),
    "generate half": (
        lambda: generate(other_weight1=ones(4, 8)),
        TypeError,
        "other_bias1 must be a tensor, got NoneType",
    ),
    # dynamic_relu
    "relu no tensor": (lambda: relu(x=[1.0]), TypeError, "x must be a tensor, got list"),
    "relu integers": (
        lambda: relu(x=X.int()),
        TypeError,
        "x must have a floating-point dtype, got torch.int32",
    ),
    "relu sparse": (
        lambda: relu(x=X.to_sparse()),
        TypeError,
        "x must be a dense tensor, got layout torch.sparse_coo",
    ),
    "relu dimensions": (
        lambda: relu(x=X[0]),
        ValueError,
        "x must have 4 dimensions (B, C, H, W), got shape (8, 4, 5)",
    ),
    "relu channels": (
        lambda: relu(slopes=ones(2, 3, 7)),
        ValueError,
        "slopes must have shape (B, K, C) = (2, 3, 8), got (2, 3, 7)",
    ),
    "relu functions": (
        lambda: relu(slopes=ones(2, 0, 8)),
        ValueError,
        "slopes must hold at least one function",
    ),
    "relu intercepts": (lambda: relu(intercepts=ones(2, 2, 8)), ValueError, "intercepts must have shape"),
    "relu dtype": (
        lambda: relu(slopes=ones(2, 3, 8).double()),
        TypeError,
        "slopes must have the dtype of x, torch.float32, got torch.float64",
    ),
    "relu device": (
        lambda: relu(slopes=ones(2, 3, 8, device="meta")),
        ValueError,
        "slopes must be on the device of x, cpu, got meta",
    ),
    "relu attention": (
        lambda: relu(slopes=ones(2, 6, 3, 8), attention=ones(2, 6, 5, 4)),
        ValueError,
        "attention must have shape (B, M, H, W) = (2, 6, 4, 5), got (2, 6, 5, 4)",
    ),
    "relu attention slopes": (
        lambda: relu(attention=ones(2, 6, 4, 5)),
        ValueError,
        "slopes must have 4 dimensions (B, M, K, C), got shape (2, 3, 8)",
    ),
    "relu no tokens": (
        lambda: relu(slopes=ones(2, 0, 3, 8), attention=ones(2, 0, 4, 5)),
        ValueError,
        "attention must have at least one token (M >= 1), got M = 0",
    ),
    # mobile_to_former_attention
    "gather queries": (
        lambda: gather(q=ones(3, 3, 8)),
        ValueError,
        "q must have shape (B, M, C) = (2, 3, 8), got (3, 3, 8)",
    ),
    "gather heads": (
        lambda: gather(num_heads=3),
        ValueError,
        "num_heads must be positive and divide the channels of x, got 3 for 8 channels",
    ),
    "gather no heads": (lambda: gather(num_heads=0), ValueError, "num_heads must be positive"),
    "gather heads type": (lambda: gather(num_heads=2.0), TypeError, "num_heads must be an int, got float"),
    "gather no pixels": (lambda: gather(x=ones(2, 8, 0, 5)), ValueError, "x must have at least one pixel"),
    "gather dtype": (lambda: gather(q=ones(2, 3, 8).bfloat16()), TypeError, "q must have the dtype of x"),
    "gather mask": (
        lambda: gather(mask=ones(2, 5, 4) > 0),
        ValueError,
        "mask must have shape (B, H, W) = (2, 4, 5), got (2, 5, 4)",
    ),
    "gather mask dtype": (
        lambda: gather(mask=ones(2, 4, 5)),
        TypeError,
        "mask must be a bool tensor, got torch.float32",
    ),
    "gather mask type": (lambda: gather(mask=True), TypeError, "mask must be a bool tensor, got bool"),
    "gather mask layout": (
        lambda: gather(mask=(ones(2, 4, 5) > 0).to_sparse()),
        TypeError,
        "mask must be a dense tensor, got layout torch.sparse_coo",
    ),
    "gather mask device": (
        lambda: gather(mask=ones(2, 4, 5, device="meta") > 0),
        ValueError,
        "mask must be on the device of x, cpu, got meta",
    ),
    # former_to_mobile_attention
    "scatter keys": (
        lambda: scatter(k=ones(2, 8)),
        ValueError,
        "k must have 3 dimensions (B, M, C), got shape (2, 8)",
    ),
    "scatter values": (
        lambda: scatter(v=ones(2, 4, 8)),
        ValueError,
        "v must have shape (B, M, C) = (2, 3, 8), got (2, 4, 8)",
    ),
    "scatter no tokens": (
        lambda: scatter(k=ones(2, 0, 8), v=ones(2, 0, 8)),
        ValueError,
        "k must hold at least one token (M >= 1), got M = 0",
    ),
    "scatter heads": (lambda: scatter(num_heads=-2), ValueError, "num_heads must be positive"),
    # modules
    "block channels": (
        lambda: _block()(ones(1, 9, 4, 4), ones(3, 1, 16)),
        ValueError,
        "MobileFormerBlock: x must have 8 channels, got shape (1, 9, 4, 4)",
    ),
    "block tokens": (
        lambda: _block()(ones(1, 8, 4, 4), ones(3, 1, 12)),
        ValueError,
        "MobileFormerBlock: tokens must have shape (T, B, d) with d = 16, got (3, 1, 12)",
    ),
    "block batch": (
        lambda: _block()(ones(2, 8, 4, 4), ones(3, 1, 16)),
        ValueError,
        "tokens (T, B, d) and x (B, C, H, W) must have the same batch size",
    ),
    "block alone": (lambda: _block()(ones(2, 8, 4, 4)), TypeError, "expected x and tokens, or one pair"),
    "block mixing": (
        lambda: _block(mixing="conv"),
        ValueError,
        "mixing must be 'attn', 'mlp' or 'mlp_attn', got 'conv'",
    ),
    "block positions": (lambda: _block(mixing="mlp"), ValueError, "mixing 'mlp' needs positions, got None"),
    "block size": (
        lambda: _block(mixing="mlp", positions=16)(ones(1, 8, 5, 4), ones(3, 1, 16)),
        ValueError,
        "built with position mixing for maps of 16 pixels, got 5 x 4",
    ),
    "block token": (lambda: _block(token_id=3), ValueError, "token_id must be below token_num = 3, got 3"),
    "relu module": (lambda: nn.DynamicReLU()(X, None), TypeError, "DynamicReLU: theta must be given"),
    "relu module shape": (
        lambda: nn.DynamicReLU()(X, ones(2, 8)),
        ValueError,
        "DynamicReLU: theta must have shape (2, 16) or (2, 16, H, W), got (2, 8)",
    ),
    "head classes": (
        lambda: nn.ClassifierHead(8, 5, features=6, token_dim=16, class_tokens=4)(
            ones(1, 8, 2, 2), ones(3, 1, 16)
        ),
        ValueError,
        "ClassifierHead: needs 4 class tokens, got tokens of shape (3, 1, 16)",
    ),
    # models
    "model name": (
        lambda: models.create_model("mobile_former_27m"),
        ValueError,
        "name must be one of mobile_former_26m, ",
    ),
    "model option": (lambda: models.create_model("mobile_former_26m", tokens=3), TypeError, "'tokens'"),
    "model file": (
        lambda: models.create_model("mobile_former_26m", checkpoint="none.pth"),
        FileNotFoundError,
        "checkpoint: no file none.pth",
    ),
    "model image": (
        lambda: models.create_model("mobile_former_26m")(ones(1, 4, 32, 32)),
        ValueError,
        "MobileFormer: x must have 3 channels, got shape (1, 4, 32, 32)",
    ),
    "released kind": (
        lambda: models.MobileFormer.from_released([["Block", 2, 8, 1, 1, 0]]),
        ValueError,
        "block_args[0] must begin with 'DnaBlock' or 'DnaBlock3', got 'Block'",
    ),
    "released act": (
        lambda: models.MobileFormer.from_released([["DnaBlock3", 2, 8, 1, 1, 0]], last_act="gelu"),
        ValueError,
        "last_act must be 'relu' or 'dyrelu', got 'gelu'",
    ),
    # the rest
    "backend": (
        lambda: mfkernels.use_backend("gpu").__enter__(),
        ValueError,
        "name must be one of auto, reference, ",
    ),
}


def _block(**options):
    return nn.MobileFormerBlock(8, 8, expansion=2, token_dim=16, token_num=3, **options)


@pytest.mark.parametrize("name", CALLS)
def test_exception_names_the_argument(name):
    call, kind, message = CALLS[name]
    with pytest.raises(kind, match=re.escape(message)):
        call()


def test_registered_operators_check_too():
    """Whoever calls torch.ops directly gets an exception, not a crash."""
    call = torch.ops.mfkernels
    for wrong in (
        lambda: call.dynamic_relu(X, ones(2, 3, 7)),
        lambda: call.dynamic_relu(X, ones(2, 3, 8).double()),
        lambda: call.dynamic_relu(X.half(), ones(2, 3, 8).half()),
        lambda: call.dynamic_relu(X, ones(2, 6, 3, 8), None, ones(2, 6, 5, 4)),
        lambda: call.dynamic_relu_backward(ones(2, 8, 4, 4), X, ones(2, 3, 8)),
        lambda: call.mobile_to_former_attention(X, ones(2, 3, 8), 3),
        lambda: call.mobile_to_former_attention(X, ones(2, 3, 9), 2),
        lambda: call.mobile_to_former_attention(X, ones(2, 3, 8), 2, None, False, ones(2, 4, 4) > 0),
        lambda: call.mobile_to_former_attention(X, ones(2, 3, 8), 2, None, False, ones(2, 4, 5)),
        lambda: call.mobile_to_former_attention_backward(None, None, X, ones(2, 3, 8), ones(2, 2, 3, 3), 2),
        lambda: call.mobile_to_former_attention_backward(
            None, None, X, ones(2, 3, 8), ones(2, 2, 3, 2), 2, None, ones(2, 5, 4) > 0
        ),
        lambda: call.former_to_mobile_attention(X, ones(2, 3, 8), ones(2, 4, 8), 2),
        lambda: call.former_to_mobile_attention_backward(X[:1], X, ones(2, 3, 8), ones(2, 3, 8), 2),
        lambda: call.batch_norm(X, ones(8), ones(7)),
        lambda: call.batch_norm(X, ones(8), ones(8), ones(8), None),
        lambda: call.pointwise_conv_bn(X, ones(6, 7, 1, 1), *[ones(6)] * 4),
        lambda: call.pointwise_conv_bn(X, ones(6, 8, 1, 1), *[ones(8)] * 4),
        lambda: call.pointwise_conv_bn(X, ones(6, 8, 1, 1), *[ones(6)] * 4, 1e-5, "relu"),
        lambda: call.batch_norm_backward(X[:1], None, None, X, *[ones(8)] * 4, True),
    ):
        with pytest.raises(RuntimeError, match=r"dynamic_relu|_attention|batch_norm|conv_bn"):
            wrong()
