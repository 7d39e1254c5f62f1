"""The runtimes: each makes of a float32 network and an example, whose dtype is that to be used, a function of
no arguments that runs it once."""

import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..backends import use_backend
from ..deploy import deploy

Call = Callable[[], Any]


class Skipped(Exception):
    """A runtime cannot run this network here; says why."""


def _need(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise Skipped(f"{module} is not installed")


def _mfkernels(model: nn.Module, x: Tensor, threads: int) -> Call:
    try:
        deployed = deploy(model, dtype=x.dtype)
    except (TypeError, RuntimeError) as error:
        raise Skipped(str(error)) from error
    return lambda: deployed(x)


def _eager(model: nn.Module, x: Tensor, threads: int) -> Call:
    model = model.to(x.dtype)

    def call() -> Tensor:
        with use_backend("reference"):
            return model(x)

    return call


def _channels_last(model: nn.Module, x: Tensor, threads: int) -> Call:
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return _eager(model, x.contiguous(memory_format=torch.channels_last), threads)


def _compile(model: nn.Module, x: Tensor, threads: int) -> Call:
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    model = model.to(x.dtype)

    def compiled(x: Tensor) -> Tensor:
        with use_backend("reference"):
            return model(x)

    inductor.freezing = True
    dynamo.recompile_limit = 1000  # each network counts as one more compilation of the same function
    function = torch.compile(compiled)
    try:
        function(x)
    except Exception as error:
        raise Skipped(f"torch.compile failed: {type(error).__name__}") from error
    return lambda: function(x)


def _onnxruntime(model: nn.Module, x: Tensor, threads: int) -> Call:
    _need("onnxruntime", "onnx", "onnxscript")
    if x.dtype != torch.float32:
        raise Skipped(f"it has no {str(x.dtype)[6:]} on a CPU")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    session = onnxruntime.InferenceSession(_onnx(model, x), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)[0]


def _onnx(model: nn.Module, x: Tensor) -> bytes:
    file = io.BytesIO()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it names every package that it can do without
    with use_backend("reference"), torch.inference_mode(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (x.clone(),), dynamo=True, verbose=False)
        assert program is not None
        program.save(file)  # type: ignore[arg-type]
    return file.getvalue()


def _openvino(model: nn.Module, x: Tensor, threads: int) -> Call:
    _need("openvino")
    os.environ.setdefault("OPENVINO_TELEMETRY", "0")
    import openvino

    precision, x = {torch.float32: "f32", torch.bfloat16: "bf16"}[x.dtype], x.float()
    with use_backend("reference"), torch.inference_mode(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = openvino.convert_model(model, example_input=x.clone(), input=[list(x.shape)])
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.compile_model(converted, "CPU", settings).create_infer_request()
    values = x.numpy()
    return lambda: next(iter(request.infer({0: values}, share_inputs=True).values()))


RUNTIMES: dict[str, Callable[[nn.Module, Tensor, int], Call]] = {
    "mfkernels": _mfkernels,
    "eager": _eager,
    "eager channels_last": _channels_last,
    "compile": _compile,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}


def result_of(call: Call) -> np.ndarray:
    out = call()
    return out.float().numpy() if isinstance(out, Tensor) else np.asarray(out)
