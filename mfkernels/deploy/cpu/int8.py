"""Post-training quantisation: which products over maps multiply bytes, and how their inputs are rounded."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...checks import check_tensor
from . import steps
from .deployed import Block, Deployed
from .packing import Rounding
from .steps import Linear

BINS = 2048  # of a histogram
BUDGET = 0.1  # of the error of the results, see `quantised`

Calibration = Tensor | Iterable[Any]


def quantised(build: Callable[[Mapping[int, Rounding]], Deployed], calibration: Calibration) -> Deployed:
    """Return a network in int8, with as many of its parts as the budget for the error allows.

    Inputs are rounded within the ranges that have the least squared error over their histograms. A part
    alone in int8 has an error: that of the results on the calibration's images, root mean square, divided by
    the deviation of the results from their mean. While the root of the sum of these errors' squares is
    larger than `BUDGET`, and then while the error that is measured of all together is, the part with the
    largest one goes back to float32.

    Args:
        build: returns the network whose products with these numbers are in int8.
        calibration: images, (N, C, H, W), or batches of them, which may be the first of several tensors.

    Raises:
        TypeError, ValueError: calibration is something else, is empty, or leads to numbers that are not
            finite.
    """
    exact = build({})
    batches = _batches(calibration)
    for batch in batches:
        exact.check(batch)
    parts = _parts(exact)
    roundings = _roundings(exact, batches, list(itertools.chain(*parts.values())))
    expected = [_results(exact, batch) for batch in batches]

    def measured(chosen: Iterable[str]) -> tuple[Deployed, float]:
        numbers = [number for part in chosen for number in parts[part]]
        network = build({number: roundings[number] for number in numbers})
        return network, _error([_results(network, batch) for batch in batches], expected)

    errors = {part: measured([part])[1] for part in parts}
    chosen = sorted(parts, key=errors.__getitem__)
    while sum(errors[part] ** 2 for part in chosen) > BUDGET**2:
        chosen.pop()
    network, error = measured(chosen)
    while error > BUDGET:  # of no part it is zero
        chosen.pop()
        network, error = measured(chosen)
    network.blocks = [
        Block(part, torch.int8 if part in chosen else torch.float32, errors[part]) for part in parts
    ]
    network.error = error
    return network


def _batches(calibration: Calibration) -> list[Tensor]:
    if torch.is_tensor(calibration):
        calibration = [calibration]
    if not isinstance(calibration, Iterable):
        raise TypeError(
            f"deploy: calibration must be a tensor or batches of images, got {type(calibration).__name__}"
        )
    found = [one[0] if isinstance(one, tuple | list) and one else one for one in calibration]
    for batch in found:
        check_tensor("deploy", "calibration", batch, "N C H W")
    if sum(len(batch) for batch in found) == 0:
        raise ValueError("deploy: calibration must have at least one image, got none")
    return found


def _parts(network: Deployed) -> dict[str, list[int]]:
    """Return the numbers of each part's products that can be in int8."""
    parts: dict[str, list[int]] = {}
    _, _, made = steps.parsed(network.plan[3:].tolist())
    for part, (_, fields) in zip(network.parts, made, strict=False):  # parts of the linear layers follow
        for field in fields:
            if isinstance(field, Linear) and field.zero > 0:
                parts.setdefault(part, []).append(field.zero)
    return parts


def _results(network: Deployed, batch: Tensor) -> Tensor:
    results = network(batch)
    maps = [results] if isinstance(results, Tensor) else results
    return torch.cat([one.flatten(1) for one in maps], 1).double()


def _error(got: list[Tensor], expected: list[Tensor]) -> float:
    off = sum(((a - b) ** 2).sum().item() for a, b in zip(got, expected, strict=True))
    own = sum(((b - b.mean(1, keepdim=True)) ** 2).sum().item() for b in expected)
    return (off / own) ** 0.5 if own > 0 else float(off > 0)


def _roundings(network: Deployed, batches: list[Tensor], numbers: list[int]) -> dict[int, Rounding]:
    """Return how the inputs of the products with these numbers are rounded best."""
    if not numbers:
        return {}
    count = max(numbers)
    ranges = torch.tensor([[torch.inf, -torch.inf]], dtype=torch.float64).repeat(count, 1)
    for batch in batches:
        found = _found(network, batch, ranges, 0)
        lowest, highest = torch.minimum(ranges[:, 0], found[:, 0]), torch.maximum(ranges[:, 1], found[:, 1])
        ranges = torch.stack([lowest, highest], 1)
    used = torch.tensor(numbers) - 1
    if not ranges[used].isfinite().all():
        raise ValueError("deploy: calibration leads to numbers that are not finite in the network")
    # Zero is a byte: what lies around a map is zero, and so is much in it.
    ranges = torch.stack([ranges[:, 0].clamp(max=0), ranges[:, 1].clamp(min=0)], 1)
    ranges[ranges[:, 1] == ranges[:, 0], 1] = 1
    counts = torch.stack([_found(network, batch, ranges, BINS) for batch in batches]).sum(0)
    return {i: _best(ranges[i - 1], counts[i - 1]) for i in numbers}


def _found(network: Deployed, batch: Tensor, ranges: Tensor, bins: int) -> Tensor:
    run: Any = torch.ops.mfkernels.deployed_calibrated
    return run(batch.float(), network.weights, network.plan, network.classes, ranges, bins)


def _best(limits: Tensor, counts: Tensor) -> Rounding:
    """Of ranges between these limits that with the least squared error."""
    low, high = limits.tolist()
    middles = low + (high - low) * (torch.arange(len(counts), dtype=torch.float64) + 0.5) / len(counts)
    shares = torch.linspace(0.05, 1, 39, dtype=torch.float64)
    lows = low * shares if low < 0 else shares.new_zeros(1)
    highs = high * shares if high > 0 else shares.new_zeros(1)
    best, least = Rounding(1.0, 0), torch.inf
    for one in lows.tolist():
        spans = highs - one
        scales = (255 / spans.where(spans > 0, torch.inf)).float().double()
        zeros = (-one * scales).round()
        bytes_ = (middles[:, None] * scales + zeros).round().clamp(0, 255)
        errors = counts @ (((bytes_ - zeros) / scales.where(scales > 0, 1)) - middles[:, None]) ** 2
        errors = errors.where(scales > 0, torch.inf)
        i = int(errors.argmin())
        if errors[i] < least:
            least, best = errors[i].item(), Rounding(scales[i].item(), int(zeros[i]))
    return best
