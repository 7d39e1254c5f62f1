"""The runtimes.

Each is a function that gives the forms in which it may run a network: pairs of a name and a function that
makes a call, itself a function of no arguments that runs the network once on the images.
"""

import copy
import functools
import importlib.metadata
import importlib.util
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..backends import use_backend
from ..deploy import deploy

Call = Callable[[], Any]
Form = tuple[str, Callable[[], Call]]


class Skipped(Exception):
    """A runtime cannot run this network here; says why."""


@dataclass
class Job:
    """A network in its formulations (float32), the images in float32, and how it is to run."""

    formulations: dict[str, nn.Module]
    x: Tensor
    threads: int
    dtype: torch.dtype = torch.float32  # torch.int8 stands for quantised weights and activations
    exported: dict[tuple[str, bool], bytes] = field(default_factory=dict)

    def onnx(self, formulation: str, dynamo: bool) -> bytes:
        """Return the network in ONNX, by PyTorch's newer exporter or by that of TorchScript."""
        key = formulation, dynamo
        if key not in self.exported:
            self.exported[key] = _onnx(self.formulations[formulation], self.x, dynamo)
        return self.exported[key]


ONNX = {"ONNX": True, "ONNX by TorchScript": False}  # name: whether the newer exporter makes it


def _need(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise Skipped(f"{module} is not installed")


def _only(job: Job, *dtypes: torch.dtype) -> None:
    if job.dtype not in dtypes:
        raise Skipped(f"it is not measured in {str(job.dtype)[6:]}")


def _mfkernels(job: Job) -> Iterator[Form]:
    _only(job, torch.float32, torch.bfloat16, torch.int8)

    def make() -> Call:
        calibration = _calibration(job.x) if job.dtype == torch.int8 else None
        deployed = deploy(job.formulations["definition"], dtype=job.dtype, calibration=calibration)
        x = job.x if job.dtype == torch.int8 else job.x.to(job.dtype)
        return lambda: deployed(x)

    yield "deployed", make


def _eager(job: Job) -> Iterator[Form]:
    _only(job, torch.float32, torch.bfloat16)
    for name, model in job.formulations.items():
        for suffix, layout in (("", torch.contiguous_format), (", channels last", torch.channels_last)):
            yield name + suffix, functools.partial(_in_pytorch, model, job, layout)


def _in_pytorch(model: nn.Module, job: Job, layout: torch.memory_format) -> Call:
    model = copy.deepcopy(model).to(job.dtype).to(memory_format=layout)  # type: ignore[call-overload]
    x = job.x.to(job.dtype).contiguous(memory_format=layout)

    def call() -> Tensor:
        with use_backend("reference"):
            return model(x)

    return call


def _compile(job: Job) -> Iterator[Form]:
    _only(job, torch.float32, torch.bfloat16)
    for name, model in job.formulations.items():
        yield name, functools.partial(_compiled, model, job)


def _compiled(model: nn.Module, job: Job) -> Call:
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    model, x = copy.deepcopy(model).to(job.dtype), job.x.to(job.dtype)

    def compiled(x: Tensor) -> Tensor:
        with use_backend("reference"):
            return model(x)

    inductor.freezing = True
    dynamo.recompile_limit = 1000  # each network counts as one more compilation of the same function
    function = torch.compile(compiled)
    return lambda: function(x)


def _onnxruntime(job: Job) -> Iterator[Form]:
    _need("onnxruntime", "onnx", "onnxscript")
    _only(job, torch.float32)
    for name in job.formulations:
        for how, dynamo in ONNX.items():
            yield f"{name}, {how}", functools.partial(_in_onnxruntime, job, name, dynamo)


def _in_onnxruntime(job: Job, formulation: str, dynamo: bool) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = job.threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    network = job.onnx(formulation, dynamo)
    session = onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: job.x.numpy()}
    return lambda: session.run(None, feed)[0]


def _onnx(model: nn.Module, x: Tensor, dynamo: bool) -> bytes:
    file = io.BytesIO()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it names every package that it can do without
    with use_backend("reference"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
            assert program is not None
            program.save(file)  # type: ignore[arg-type]
        else:
            torch.onnx.export(model, (x,), file, dynamo=False, opset_version=18)  # type: ignore[arg-type]
    return file.getvalue()


def _openvino(job: Job) -> Iterator[Form]:
    os.environ.setdefault("OPENVINO_TELEMETRY", "0")
    _need("openvino", *(["nncf"] if job.dtype == torch.int8 else []))
    if job.dtype == torch.bfloat16:
        import openvino

        if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise Skipped("the processor has no bfloat16, so it would compute in float32")
    for name, model in job.formulations.items():
        yield f"{name}, PyTorch", functools.partial(_pytorch_in_openvino, job, model)
        for how, dynamo in ONNX.items() if importlib.util.find_spec("onnxscript") else ():
            yield f"{name}, {how}", functools.partial(_onnx_in_openvino, job, name, dynamo)


def _pytorch_in_openvino(job: Job, model: nn.Module) -> Call:
    import openvino

    with use_backend("reference"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = openvino.convert_model(model, example_input=job.x, input=[list(job.x.shape)])
    return _in_openvino(job, network)


def _onnx_in_openvino(job: Job, formulation: str, dynamo: bool) -> Call:
    import openvino

    return _in_openvino(job, openvino.Core().read_model(io.BytesIO(job.onnx(formulation, dynamo))))


def _in_openvino(job: Job, network: Any) -> Call:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": job.threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "bf16" if job.dtype == torch.bfloat16 else "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    if job.dtype == torch.int8:
        network = _quantised(network, job.x)
    request = openvino.compile_model(network, "CPU", settings).create_infer_request()
    values = job.x.numpy()
    return lambda: next(iter(request.infer({0: values}, share_inputs=True).values()))


def _calibration(x: Tensor) -> list[Tensor]:
    """Return the images and others like them."""
    generator = torch.Generator().manual_seed(1)
    return [x, *(torch.randn(x.shape, generator=generator) for _ in range(7))]


def _quantised(network: Any, x: Tensor) -> Any:
    """Quantise statically."""
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    images = _calibration(x)
    dataset = nncf.Dataset([image.numpy() for image in images])
    with _quiet():
        return nncf.quantize(network, dataset, subset_size=len(images))


def _litert(job: Job) -> Iterator[Form]:
    _need("litert_torch", "ai_edge_litert")
    _only(job, torch.float32)
    for name, model in job.formulations.items():
        yield name, functools.partial(_in_litert, model, job)


def write_litert(model: nn.Module, x: Tensor, path: Path) -> None:
    """Write the network in LiteRT's format, for images of this shape."""
    with _quiet(), use_backend("reference"):
        import litert_torch

        litert_torch.convert(model, (x,)).export(str(path))


def _in_litert(model: nn.Module, job: Job) -> Call:
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        from ai_edge_litert.interpreter import Interpreter

        path = Path(folder, "network.tflite")
        write_litert(model, job.x, path)
        interpreter = Interpreter(model_content=path.read_bytes(), num_threads=job.threads)
    interpreter.allocate_tensors()
    taken, given = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    values = job.x.numpy()

    def call() -> np.ndarray:
        interpreter.set_tensor(taken, values)
        interpreter.invoke()
        return interpreter.get_tensor(given)

    return call


def _ncnn(job: Job) -> Iterator[Form]:
    _need("ncnn", "pnnx")
    _only(job, torch.float32)
    if job.x.shape[0] != 1:
        raise Skipped("it takes one image at a time")
    for name, model in job.formulations.items():
        yield name, functools.partial(_in_ncnn, model, job)


def write_ncnn(model: nn.Module, x: Tensor, path: Path) -> None:
    """Write the network in ncnn's format into two files: of this name, and ".ncnn.param" or ".ncnn.bin"."""
    import pnnx

    with _quiet(), use_backend("reference"):
        pnnx.export(model, f"{path}.pt", x, fp16=False, check_trace=False)


def _in_ncnn(model: nn.Module, job: Job) -> Call:
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads, net.opt.use_fp16_arithmetic, net.opt.use_fp16_storage = job.threads, False, False
    net.opt.use_fp16_packed = net.opt.use_bf16_storage = False
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network")
        write_ncnn(model, job.x, path)
        if net.load_param(f"{path}.ncnn.param") or net.load_model(f"{path}.ncnn.bin"):
            raise RuntimeError("pnnx made a network that ncnn cannot load")
    image = ncnn.Mat(job.x[0].numpy())

    def call() -> np.ndarray:
        extractor = net.create_extractor()
        extractor.input("in0", image)
        status, out = extractor.extract("out0")
        if status:
            raise RuntimeError(f"ncnn returned {status}")
        return np.array(out)[None]

    return call


class _quiet:
    """Nothing that a converter or its processes write is shown."""

    def __enter__(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.kept, self.null = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            os.dup2(self.null, number)

    def __exit__(self, *error: object) -> None:
        for number, kept in zip((1, 2), self.kept, strict=True):
            os.dup2(kept, number)
            os.close(kept)
        os.close(self.null)


RUNTIMES: dict[str, Callable[[Job], Iterator[Form]]] = {
    "mfkernels": _mfkernels,
    "eager": _eager,
    "compile": _compile,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "litert": _litert,
    "ncnn": _ncnn,
}
_PACKAGES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "litert": "ai-edge-litert", "ncnn": "ncnn"}


def version(runtime: str) -> str:
    """Return the version of the package that a runtime is of."""
    return importlib.metadata.version(_PACKAGES[runtime]) if runtime in _PACKAGES else ""


def result_of(call: Call) -> np.ndarray:
    """Call the network and return its result, the first of several, in float32."""
    out = call()
    out = out[0] if isinstance(out, tuple) else out
    return out.float().numpy() if isinstance(out, Tensor) else np.asarray(out)
