"""Steps of plans, alone: maps in other sizes, rows of the state as maps, and dense convolutions."""

import pytest
import torch
from test_deploy import BF16
from threads import on_threads
from torch import nn
from torch.nn import functional as F

from mfkernels.deploy.cpu.convolutions import Convolution
from mfkernels.deploy.cpu.packing import Formats
from mfkernels.deploy.cpu.plan import Plan
from mfkernels.deploy.cpu.pyramid import DeployedMaps, Result

SIZES = ((16, 24), (7, 5), (1, 1), (1, 9), (33, 2))


def planned(channels: int, dtype=torch.float32) -> tuple:
    """A plan, and its map: the image with this number of channels, as it is."""
    plan = Plan(nn.Identity(), Formats(dtype))
    conv = nn.Conv2d(channels, channels, 1)
    plan.names[conv] = "conv"
    return plan, plan.dense(None, conv, torch.eye(channels)[..., None, None], torch.zeros(channels))


def finished(plan: Plan, x, channels: int, reduction: int = 1) -> DeployedMaps:
    plan.hand_out(x)
    return plan.finished_maps(DeployedMaps, channels, [Result(x.channels, reduction)])


def image(channels: int, size, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(sum(size)))


def halved(plan, x):
    return plan.resize(x, "half")


@pytest.mark.parametrize("channels", [3, 20])
@pytest.mark.parametrize("size", SIZES)
def test_every_second_pixel(channels, size, instruction_set):
    plan, whole = planned(channels)
    x = image(channels, size)
    assert torch.equal(finished(plan, halved(plan, whole), channels, 2)(x)[0], F.max_pool2d(x, 1, 2))


@pytest.mark.parametrize("size", SIZES)
def test_nearest_as_large_as_another_map_and_added(size, instruction_set):
    plan, whole = planned(20)
    small = halved(plan, halved(plan, whole))
    deployed = finished(plan, plan.resize(small, whole, added=whole), 20)
    x = image(20, size)
    expected = x + F.interpolate(x[:, :, ::2, ::2][:, :, ::2, ::2], size, mode="nearest")
    assert torch.equal(deployed(x)[0], expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("like", ["image", "twice", "map"])
@pytest.mark.parametrize("added", [False, True])
def test_bilinear(size, like, added, instruction_set):
    plan, whole = planned(20)
    small = halved(plan, whole)
    if like == "twice":
        small = halved(plan, small)
    other = halved(plan, whole) if like == "twice" else whole
    target = whole if like == "map" else like
    even = like != "twice" or all(-(-side // 2) % 2 == 0 for side in size)
    if added and not even:
        pytest.skip("twice as large as half of it is not as large as it")
    made = plan.resize(small, target, "bilinear", added=other if added else None)
    reduction = 2 if like == "twice" else 1
    x = image(20, size)
    given = x[:, :, ::2, ::2]
    if like == "twice":
        expected = F.interpolate(given[:, :, ::2, ::2], scale_factor=2, mode="bilinear")
        added_map = given
    else:
        expected, added_map = F.interpolate(given, size, mode="bilinear"), x
    if not even:
        plan.hand_out(made)
        deployed = plan.finished_maps(DeployedMaps, 20, [Result(20, reduction)])
        with pytest.raises(RuntimeError, match="must be those of the plan's maps"):
            deployed(x)
        return
    got = finished(plan, made, 20, reduction)(x)[0]
    torch.testing.assert_close(got, expected + added_map if added else expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_bilinear_by_two_whatever_the_size(size, instruction_set):
    plan, whole = planned(20)
    made = plan.resize(halved(plan, whole), whole, "bilinear_by_two", added=whole)
    x = image(20, size)
    twice = F.interpolate(x[:, :, ::2, ::2], scale_factor=2, mode="bilinear")
    expected = x + twice[:, :, : size[0], : size[1]]
    torch.testing.assert_close(finished(plan, made, 20)(x)[0], expected, rtol=1e-5, atol=1e-6)


def test_a_map_of_another_size_is_not_added():
    plan, whole = planned(20)
    deployed = finished(plan, plan.resize(whole, "half", added=whole), 20, 2)
    with pytest.raises(RuntimeError, match=r"step 1 \(resize\): adds a map of another size"):
        deployed(image(20, (4, 4)))


def test_rows_of_the_state(instruction_set):
    plan, _ = planned(3)
    rows = torch.randn(5, 20)
    place = plan.place(5 * 32)
    plan.copy_weights(F.pad(rows, (0, 12)), place)
    deployed = finished(plan, plan.state_rows(place, 5, 20), 3, -5)
    got = deployed(image(3, (8, 6)))[0]
    assert got.shape == (2, 20, 5, 1) and torch.equal(got[1, :, :, 0], rows.t())
    program = torch.export.export(
        deployed, (torch.zeros(2, 3, 8, 6),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    assert torch.equal(program.module()(torch.zeros(3, 3, 8, 6))[0][2], got[0])


CONVOLUTIONS = [
    dict(kernel=kernel, stride=stride, inputs=inputs, outputs=outputs)
    for kernel, stride in ((3, 1), (3, 2), (5, 1), (5, 2), (1, 1))
    for inputs, outputs in ((16, 20), (48, 48), (20, 36), (32, 80))
]


def convolution(kernel, stride, inputs, outputs, dtype=torch.float32) -> tuple:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2), nn.BatchNorm2d(outputs), nn.ReLU()
    ).eval()
    layers[1].running_mean.normal_()
    layers[1].running_var.uniform_(0.5, 2)
    plan, x = planned(inputs, dtype)
    plan.names |= {layer: str(layer) for layer in layers}
    return layers, finished(plan, Convolution(plan, layers)(x), inputs, stride)


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_convolutions(options, instruction_set):
    layers, deployed = convolution(**options)
    for size in (*SIZES, (40, 90)):
        x = image(options["inputs"], size)
        with torch.inference_mode():
            expected = layers.double()(x.double())
        assert (deployed(x)[0] - expected).abs().max() < 1e-5 * expected.abs().max()


@BF16
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_convolutions_in_bfloat16(options, bf16_instruction_set):
    layers, deployed = convolution(**options, dtype=torch.bfloat16)
    for size in (*SIZES, (40, 90)):
        x = image(options["inputs"], size)
        with torch.inference_mode():
            expected = layers.double()(x.double())
        assert (deployed(x)[0] - expected).abs().max() < 2e-2 * expected.abs().max()


def test_the_same_bits_on_any_number_of_threads():
    _, deployed = convolution(3, 1, 32, 80)
    x = image(32, (150, 40), 1)
    first, *others = on_threads(lambda: deployed(x)[0])
    assert all(torch.equal(first, other) for other in others)
