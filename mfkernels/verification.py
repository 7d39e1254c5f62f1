"""Compare a fast network with a plain one, block by block."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .backends import use_backend
from .checks import tensors_in

OUTPUT = "output"


@dataclass(frozen=True)
class Row:
    """Hold the largest errors of one block's results against a float64 run.

    They are relative to the results' largest number: of the fast network, of the plain one in the same dtype,
    and how large the first may be.
    """

    block: str
    fast: float
    reference: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.fast <= self.allowed  # False for NaN


@dataclass(frozen=True)
class Verification:
    """The result of `verify`, a row a block, the network's own output last. As a string, a table."""

    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    def __str__(self) -> str:
        width = max(len(row.block) for row in self.rows)
        lines = [f"{'block':{width}}  error (fast)  error (plain)  ratio"]
        for row in self.rows:
            ratio = row.fast / row.reference if row.reference > 0 else float("inf") if row.fast > 0 else 1.0
            mark = "" if row.passed else "  TOO LARGE"
            lines.append(f"{row.block:{width}}  {row.fast:12.2e}  {row.reference:13.2e}  {ratio:5.2f}{mark}")
        verdict = "passed" if self.passed else "FAILED: an error of more than twice that of the plain network"
        return "\n".join([*lines, verdict])


def verify(
    reference_model: nn.Module,
    fast_model: nn.Module,
    inputs: Tensor | Sequence[Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Verification:
    """Compare a fast network with a plain one, block by block, against a float64 run of the plain one.

    The error of the fast network may be twice that of the plain network in the same dtype, which runs the
    plain definitions, and twice what rounding a result to that dtype does. Blocks are the modules that both
    networks have under the same name: the children of the network and the items of its lists. Of a network
    that has none of them, as `deploy` makes it, the output alone is compared.

    Args:
        reference_model: the plain network, in eval mode; it is copied for every run.
        fast_model: for example one that `accelerate` or `deploy` made, in eval mode, in `dtype`.
        inputs: what both are called with, or several of it: more make the errors less a matter of luck.
        dtype: of the comparison, narrower than float64: inputs are converted to it, and the copy of the plain
            network is.
        backend: which the fast network runs on, see `use_backend`.

    Returns:
        Errors of every block, and whether they pass.

    Raises:
        TypeError: an argument is no module or no tensor.
        ValueError: a network is in train mode, there are no inputs, or `dtype` is float64.
    """
    for name, model in (("reference_model", reference_model), ("fast_model", fast_model)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"verify: {name} must be an nn.Module, got {type(model).__name__}")
        if model.training:
            raise ValueError(f"verify: {name} must be in eval mode; call eval() first")
    if not dtype.is_floating_point or dtype.itemsize >= 8:
        raise ValueError(f"verify: dtype must be narrower than torch.float64, got {dtype}")
    batches = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if not batches:
        raise ValueError("verify: inputs must hold at least one tensor, got none")
    for x in batches:
        if not isinstance(x, Tensor):
            raise TypeError(f"verify: inputs must be tensors, got {type(x).__name__}")
    exact = copy.deepcopy(reference_model).double()
    plain = copy.deepcopy(reference_model).to(dtype)
    points = [path for path in _blocks(plain) if path in dict(fast_model.named_modules())]
    errors: dict[str, list[float]] = {}
    for x in batches:
        x = x.to(dtype)
        truth = _results(exact, points, x.double(), "reference")
        rounded = _results(plain, points, x, "reference")
        fast = _results(fast_model, points, x, backend)
        for path in truth:  # in the order in which they ran
            if path not in rounded or path not in fast:
                continue
            own = (_error(fast[path], truth[path]), _error(rounded[path], truth[path]))
            noise = _error([t.to(dtype) for t in truth[path]], truth[path])
            so_far = errors.setdefault(path, [0.0, 0.0, 0.0])
            errors[path] = [_larger(a, b) for a, b in zip(so_far, (*own, noise), strict=True)]
    return Verification(
        tuple(
            Row(path, fast_error, plain_error, 2 * plain_error + 2 * noise)
            for path, (fast_error, plain_error, noise) in errors.items()
        )
    )


def _blocks(model: nn.Module) -> Iterator[str]:
    lists = (nn.Sequential, nn.ModuleList)
    for name, child in model.named_children():
        if not isinstance(child, lists):
            yield name
            continue
        for index, item in child.named_children():
            if isinstance(item, lists):
                yield from (f"{name}.{index}.{inner}" for inner, _ in item.named_children())
            else:
                yield f"{name}.{index}"


def _results(model: nn.Module, points: Sequence[str], x: Tensor, backend: str) -> dict[str, list[Tensor]]:
    results: dict[str, list[Tensor]] = {}
    with _watched(model, points, results), torch.inference_mode(), use_backend(backend):
        results[OUTPUT] = _kept(model(x))
    return results


@contextmanager
def _watched(model: nn.Module, points: Sequence[str], results: dict[str, list[Tensor]]) -> Iterator[None]:
    def keep(path: str):  # type: ignore[no-untyped-def]
        return lambda module, inputs, output: results.__setitem__(path, _kept(output))

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in points]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _kept(value: object) -> list[Tensor]:
    """Copy the tensors, since a network may overwrite what a block returned."""
    return [tensor.clone() for tensor in tensors_in(value)]


def _error(values: list[Tensor], truth: list[Tensor]) -> float:
    """Return the largest relative error; infinite where shapes differ."""
    if [v.shape for v in values] != [t.shape for t in truth]:
        return float("inf")
    largest = 0.0
    for value, exact in zip(values, truth, strict=True):
        if exact.numel() > 0:
            scale = exact.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
            largest = _larger(largest, ((value.double() - exact).abs().max() / scale).item())
    return largest


def _larger(a: float, b: float) -> float:
    """NaN counts as the largest."""
    return b if b != b or b > a else a
