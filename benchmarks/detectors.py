"""Time detectors on one core, deployed and in other runtimes, for the table of docs/detection.md.

    python benchmarks/detectors.py [NETWORK ...] && mfkernels bench --report

Each runtime that is installed has each network in its best form; see `mfkernels bench`. The networks over
pyramids need torchvision, `detr_resnet_50` needs transformers. What is measured replaces the results of all.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

import mfkernels
from mfkernels.bench.figures import RESULTS
from mfkernels.bench.run import (
    Chosen,
    Key,
    difference_of,
    forms_of,
    formulations,
    machine,
    measure,
    pinned,
    randomise,
)
from mfkernels.bench.runtimes import RUNTIMES, Call, Job, Skipped, result_of
from mfkernels.models import create_model

SECONDS = 20.0
# Of the others, those whose calls give all results.
RIVALS = [name for name in RUNTIMES if name not in ("mfkernels", "ncnn")]


def detr_resnet_50() -> nn.Module:
    """Return transformers' DETR with 41.5 M parameters, random weights."""
    import transformers

    body = transformers.ResNetConfig(out_features=["stage4"])
    return transformers.DetrForObjectDetection(
        transformers.DetrConfig(
            use_timm_backbone=False, use_pretrained_backbone=False, backbone_config=body, num_labels=91
        )
    )


def retinanet() -> nn.Module:
    from mfkernels import detection

    return detection.retinanet("mobile_former_294m")


def mask_rcnn() -> nn.Module:
    from mfkernels import detection

    return detection.mask_rcnn("dmf_s")


def semantic_fpn() -> nn.Module:
    from mfkernels import segmentation

    return segmentation.semantic_fpn("iformer_m")


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "e2e_mobile_former_151m": lambda: create_model("e2e_mobile_former_151m"),
    "e2e_mobile_former_214m": lambda: create_model("e2e_mobile_former_214m"),
    "e2e_mobile_former_294m": lambda: create_model("e2e_mobile_former_294m"),
    "e2e_mobile_former_508m": lambda: create_model("e2e_mobile_former_508m"),
    "detr_resnet_50": detr_resnet_50,
    "retinanet, mobile_former_294m": retinanet,
    "mask_rcnn, dmf_s": mask_rcnn,
    "semantic_fpn, iformer_m": semantic_fpn,
}


class Levels(nn.Module):
    """What is a plan when deployed, of PyTorch's operators: a detector's network without its boxes."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        model, kind = self.model, type(self.model).__name__
        if kind == "RetinaNet":
            return tuple(model.head(list(model.backbone(x).values())).values())
        if kind == "MaskRCNN":
            levels = list(model.backbone(x).values())
            scores, boxes = model.rpn.head(levels)
            return *levels, *scores, *boxes
        if kind == "SemanticFPN":
            return model(x)["out"]
        found = model(x)
        return found.logits, found[1] if isinstance(found, tuple) else found.pred_boxes


def deployed_network(model: Any, x: Tensor, dtype: torch.dtype) -> Call:
    """Return a call of what `Levels` has, deployed."""
    deployed: Any = mfkernels.deploy(model, dtype=dtype)
    kind = type(model).__name__
    if kind == "MaskRCNN":
        deployed = deployed.backbone

        def levels_and_proposals() -> tuple[Tensor, ...]:
            found = deployed(x)
            return *found.values(), *found.scores, *found.boxes

        return levels_and_proposals
    if kind == "RetinaNet":
        deployed, x = deployed.network, x.contiguous(memory_format=torch.channels_last)
    return lambda: tuple(deployed(x))


def chosen_forms(name: str, x: Tensor) -> dict[Key, Chosen]:
    """Return the network deployed, and in the best form of each other runtime."""
    torch.manual_seed(0)
    model = NETWORKS[name]()
    body: Any = getattr(model, "backbone", model)
    randomise(getattr(body, "body", body), torch.randn(2, 3, 64, 64))
    network = Levels(model.eval())
    with torch.no_grad(), mfkernels.use_backend("reference"):
        expected = result_of(lambda: network(x))
    job = Job({**formulations(model), "definition": network}, x, 1)
    found: dict[Key, Chosen] = {}
    if name != "detr_resnet_50":
        dtypes = [torch.float32, *([torch.bfloat16] if mfkernels._C.bf16_supported() else [])]
        for dtype in dtypes:
            call = deployed_network(model, x, dtype)
            found[name, "mfkernels", dtype] = Chosen("deployed", call, difference_of(call, expected))
    for runtime in RIVALS:
        try:
            forms = forms_of(f"{name} in {runtime}", runtime, job, expected)
        except Skipped as reason:
            print(f"{name}: {runtime}: skipped, {reason}", file=sys.stderr)
            continue
        if forms:
            found[name, runtime, torch.float32] = min(forms, key=lambda pair: pair[0])[1]
    return found


def main() -> None:
    x = torch.randn(1, 3, 800, 1333)
    log = RESULTS / "detectors" / "results.jsonl"
    log.parent.mkdir(exist_ok=True)
    log.unlink(missing_ok=True)
    with pinned(1):
        for name in sys.argv[1:] or NETWORKS:
            try:
                chosen = chosen_forms(name, x)
            except ImportError as error:
                print(f"{name}: skipped, {error}", file=sys.stderr)
                continue
            with log.open("a") as file:
                for entry in measure(chosen, x, 1, SECONDS):
                    print(f"{name}, {entry.runtime}, {entry.dtype}: {entry.median_ms:.0f} ms, {entry.form}")
                    file.write(json.dumps(machine() | asdict(entry)) + "\n")


if __name__ == "__main__":
    main()
