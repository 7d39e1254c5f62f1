"""Plans of deployed networks: Python and C++ mean the same by them, and none can do harm."""

import copy
import re
import time
from pathlib import Path

import fuzz
import pytest
import torch
from threads import threads
from torch.utils.flop_counter import FlopCounterMode

import mfkernels
from mfkernels.deploy.cpu import packing, steps

CSRC = Path(__file__).parents[1] / "csrc"


def structs() -> dict[str, list[tuple[str, str]]]:
    """(type, name) of each field of each struct of plans, in C++."""
    text = (CSRC / "cpu/engine/deployed.h").read_text() + (CSRC / "cpu/engine/deployed_plan.h").read_text()
    text = re.sub(r"//[^\n]*", "", text)
    found = {}
    for name, body in re.findall(r"struct (\w+) \{(.*?)\n\};", text, re.DOTALL):
        fields = []
        for kind, names in re.findall(r"(\w+) ([\w, ]+);", body):
            fields += [(kind, field.strip()) for field in names.split(",")]
        found[name] = fields
    return found


HEADS = (steps.Header, steps.Layer, steps.Step, steps.Linear, steps.MapOut)


def in_cpp(kind: type) -> str:
    names = {
        "Header": "Plan",
        "Layer": "PlanLayer",
        "Linear": "PlanLinear",
        "MapOut": "MapOut",
        "Step": "PlanStep",
    }
    return names.get(kind.__name__, kind.__name__.removesuffix("Step") + "Step")


def test_structs_are_the_same_in_both_languages():
    cpp = structs()
    of_fields = {"int64_t": int, "PlanLinear": steps.Linear, "MapOut": steps.MapOut}
    for kind in (*HEADS, *dict.fromkeys(steps.KINDS.values())):
        expected = [(field, of_fields[type_]) for type_, field in cpp[in_cpp(kind)]]
        assert list(kind.__annotations__.items()) == expected, kind


@pytest.mark.parametrize(
    ("enum", "names"),
    [
        ("PlanKind", list(steps.KINDS)),
        ("PlanActivation", steps.ACTIVATIONS),
        ("PlanGating", steps.GATINGS),
        ("PlanNorm", steps.NORMS),
        ("PlanResampling", steps.RESAMPLINGS),
    ],
)
def test_enumerations_are_the_same_in_both_languages(enum, names):
    text = (CSRC / "cpu/engine/deployed.h").read_text() + (CSRC / "cpu/engine/deployed_plan.h").read_text()
    (body,) = re.findall(rf"enum {enum} : int64_t \{{(.*?)\}}", text, re.DOTALL)
    found = re.findall(r"k(\w+)", re.sub(r"//[^\n]*", "", body))
    words = [re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower() for name in found]
    assert words == ["no_activation" if name is None else name for name in names]


@pytest.fixture(scope="module")
def networks():
    with threads(1):  # a child of a process with threads of OpenMP's would wait for them
        yield fuzz.small_networks()


def test_changed_plans_do_no_harm(networks):
    """Their checksums are right: only what looks at the numbers keeps them from memory that is not theirs."""
    ends, findings = fuzz.hunt(
        range(3000),
        lambda number: fuzz.Case(0, number, networks, True).call(),
        str,
        time.time() + 300,
    )
    assert not findings, findings[0]
    assert ends["RuntimeError"] > 1000 and ends["a result"] > 50, ends


def test_what_is_wrong_is_named(networks):
    deployed, image, _ = networks[0]
    plan = deployed.plan[3:].tolist()
    layer = 1 + len(steps.Linear._fields)
    linears = plan[steps.Header._fields.index("linears")]
    first = len(steps.Header._fields) + layer * linears  # after the linear layers
    plan[first] = 99
    sealed = torch.tensor(mfkernels._C.sealed_plan(deployed.classes, plan))
    with pytest.raises(RuntimeError, match=r"deploy: plan: step 0 \(99\): is of an unknown kind"):
        torch.ops.mfkernels.deployed(image, deployed.weights, sealed, deployed.classes)


def test_steps_without_products_of_bytes_take_none(networks):
    """A matrix of bytes is smaller: what reads it as floats would read beyond the weights."""
    kind = list(steps.KINDS).index("dynamic_lite")
    deployed, image, _ = next(one for one in networks if "dynamic_lite" in str(one[0]))
    plan = deployed.plan[3:].tolist()
    plan[steps.Header._fields.index("int8")] = 1
    at = len(steps.Header._fields)
    while plan[at] != kind:
        at += len(steps.Step._fields) + plan[at + 1]
    last = at + len(steps.Step._fields) + plan[at + 1]
    plan[last - 2 : last] = [packing.bits_of_float(1.0), 0]
    sealed = torch.tensor(mfkernels._C.sealed_plan(deployed.classes, plan))
    with pytest.raises(RuntimeError, match=r"\(dynamic_lite\): rounds its inputs in a way it may not"):
        torch.ops.mfkernels.deployed_maps(image, deployed.weights, sealed, *fuzz.arguments_after(deployed))


def test_plans_are_printed(networks):
    for deployed, _, _ in networks:
        lines = [re.split(" {2,}", line.strip()) for line in str(deployed).splitlines()[2:-1]]
        assert [part for part, *_ in lines] == deployed.parts
        assert all(kind in steps.KINDS for _, kind, *_ in lines)


def test_networks_without_their_plan_are_printed(networks):
    deployed, _, _ = networks[0]
    changed = copy.deepcopy(deployed)
    changed.plan[5] += 1
    for network in (copy.deepcopy(deployed).to("meta"), changed):
        assert str(network).startswith("Deployed(classes=5, weights=0.")


def test_printed_plans_count_operations():
    """Of a network whose channels need no padding: its multiply-adds, but for softmax and the like."""
    model = mfkernels.models.create_model("iformer_t").eval()
    text = str(mfkernels.deploy(model))
    multiplied = sum(map(float, re.findall(r"([\d.]+) MFLOP", text))) / 2
    with (
        FlopCounterMode(display=False) as counter,
        mfkernels.use_backend("reference"),
        torch.inference_mode(),
    ):
        model(torch.randn(1, 3, 224, 224))
    assert multiplied == pytest.approx(counter.get_total_flops() / 2e6, rel=0.01)
    assert "map 0 -> map 1: 64 x 56 x 56, 5x5, gelu" in text
