"""Detectors on one core: milliseconds of PyTorch, OpenVINO and `deploy`, as the table of docs/detection.md.

taskset -c 1 python benchmarks/detectors.py [NETWORK ...]

needs torchvision, and for OpenVINO's column openvino, onnx and onnxscript.
"""

import copy
import functools
import importlib.util
import io
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import mfkernels
from mfkernels import detection, segmentation
from mfkernels.bench.run import randomise
from mfkernels.models import create_model

ROUNDS = 5
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "retinanet, mobile_former_294m": lambda: detection.retinanet("mobile_former_294m"),
    "mask_rcnn, dmf_s": lambda: detection.mask_rcnn("dmf_s"),
    "semantic_fpn, iformer_m": lambda: segmentation.semantic_fpn("iformer_m"),
    "e2e_mobile_former_151m": lambda: create_model("e2e_mobile_former_151m"),
    "e2e_mobile_former_508m": lambda: create_model("e2e_mobile_former_508m"),
}
Call = Callable[[], Any]


class Levels(nn.Module):
    """What is a plan when deployed, of PyTorch's operators: a detector's network without its boxes."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        model = self.model
        if isinstance(model, detection.RetinaNet):
            return tuple(model.head(list(model.backbone(x).values())).values())
        if isinstance(model, detection.MaskRCNN):
            return tuple(model.backbone(x).values())
        if isinstance(model, segmentation.SemanticFPN):
            return model(x)["out"]
        found = model(x)
        return found.logits, found.boxes


def plain(model: nn.Module, x: Any) -> Call:
    def call() -> Any:
        with torch.inference_mode(), mfkernels.use_backend("reference"):
            return model(x)

    return call


def openvino(network: nn.Module, x: Tensor) -> Call:
    import openvino

    with torch.no_grad(), mfkernels.use_backend("reference"):
        program = torch.export.export(network, (x,)).run_decompositions(mfkernels.decompositions())
        file = io.BytesIO()
        torch.onnx.export(program, dynamo=True, verbose=False).save(file)  # type: ignore[union-attr]
    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(file.getvalue()), "CPU", settings)
    request = compiled.create_infer_request()
    return lambda: request.infer([x.numpy()])


def deployed_network(model: Any, x: Tensor, dtype: torch.dtype) -> Call:
    deployed: Any = mfkernels.deploy(model, dtype=dtype)
    if isinstance(model, detection.MaskRCNN):
        deployed = deployed.backbone
    elif isinstance(model, detection.RetinaNet):
        deployed, x = deployed.network, x.contiguous(memory_format=torch.channels_last)
    return lambda: deployed(x)


def forms(model: Any, x: Tensor) -> dict[str, Callable[[], Call]]:
    network = Levels(model)
    found: dict[str, Callable[[], Call]] = {
        "PyTorch": lambda: plain(network, x),
        "PyTorch, channels last": lambda: plain(
            copy.deepcopy(network).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
            x.contiguous(memory_format=torch.channels_last),
        ),
        "deploy": functools.partial(deployed_network, model, x, torch.float32),
    }
    if mfkernels._C.bf16_supported():
        found["deploy, bfloat16"] = functools.partial(deployed_network, model, x, torch.bfloat16)
    if importlib.util.find_spec("openvino") and importlib.util.find_spec("onnxscript"):
        found["OpenVINO"] = lambda: openvino(network, x)
    if isinstance(model, detection.RetinaNet | detection.MaskRCNN):
        images = [torch.rand(*x.shape[1:])]
        found["all of it: PyTorch"] = lambda: plain(model, images)
        found["all of it: deploy"] = lambda: plain(mfkernels.deploy(model), images)
    return found


def milliseconds(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or NETWORKS:
        torch.manual_seed(0)
        model = NETWORKS[name]().eval()
        body: Any = model.backbone
        body = getattr(body, "body", body)
        randomise(body, torch.randn(2, 3, 64, 64))
        made: dict[str, Call] = {}
        x = torch.randn(1, 3, 800, 1333)
        for form, make in forms(model.eval(), x).items():
            try:
                made[form] = make()
                made[form]()
            except Exception as error:
                print(f"{name}: {form}: {str(error).splitlines()[0]}", file=sys.stderr)
                made.pop(form, None)
        times: dict[str, list[float]] = {form: [] for form in made}
        for _ in range(ROUNDS):
            for form, call in made.items():
                times[form].append(milliseconds(call))
        for form, values in times.items():
            print(f"| {name} | {form} | {statistics.median(values):.0f} |", flush=True)


if __name__ == "__main__":
    main()
