"""What `deploy` returns."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import _C
from ...checks import check_tensor, register_fake
from .description import description
from .packing import Formats


class Block(NamedTuple):
    """Name a part of a network in int8: its precision, and its error alone in int8, see `Deployed.error`."""

    part: str
    dtype: torch.dtype
    error: float


class Deployed(nn.Module):
    """A network prepared for inference on a CPU.

    Its state is the weights, and of which plan they are: other states are refused when they are loaded
    (RuntimeError), and so is a pickle whose plan another version wrote, or somebody changed.

    Args:
        weights, plan: what the operators want, the plan without format and checksum.
        formats: of its weights.
        in_channels, classes: of its images and its results.
        parts: names of what `times` measures.

    Attributes:
        blocks: of a network in int8 its parts that can be in int8; of others empty.
        error: of a network in int8 the error of its results on the calibration's images, root mean square,
            divided by the results' deviation from their mean; of others 0.
    """

    weights: Tensor
    plan: Tensor

    def __init__(
        self,
        weights: Tensor,
        plan: list[int],
        *,
        formats: Formats,
        in_channels: int,
        classes: int,
        parts: list[str],
    ) -> None:
        super().__init__()
        self.dtype, self.in_channels, self.classes = formats.dtype, in_channels, classes
        self.narrow = formats.weights
        self.blocks: list[Block] = []
        self.error = 0.0
        self.parts = parts
        self.register_buffer("weights", weights)
        sealed = torch.tensor(_C.sealed_plan(classes, plan), dtype=torch.int64)
        self.register_buffer("plan", sealed, persistent=False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Run (B, C, H, W) images on the CPU and return (B, classes), in the dtype of the images.

        The dtype is float32, or that of the network.

        Raises:
            TypeError, ValueError: an input that does not fit, named.
        """
        self.check(x)
        run: Any = torch.ops.mfkernels.deployed
        return run(x.float(), self.weights, self.plan, self.classes).to(x.dtype)

    def times(self, x: Tensor) -> dict[str, float]:
        """Return the seconds that each part takes for one image, (1, C, H, W).

        Keys are the names of the network's parts; those of the tokens have " tokens" behind the name.
        """
        self.check(x)
        run: Any = torch.ops.mfkernels.deployed_times
        times = dict.fromkeys(self.parts, 0.0)
        seconds = run(x.float(), self.weights, self.plan, self.classes).tolist()
        for part, value in zip(self.parts, seconds, strict=True):
            times[part] += value
        return times

    def report(self, x: Tensor) -> str:
        """Return a table of the parts of a network in int8, for one image, (1, C, H, W).

        It has each part's precision, its error alone in int8, and its milliseconds.

        Raises:
            ValueError: the network is not in int8.
        """
        if not self.blocks:
            raise ValueError("deploy: a report needs a network in int8, got one without")
        times = self.times(x)
        rows = [("part", "precision", "error", "ms")]
        for part, dtype, error in self.blocks:
            rows.append((part, str(dtype)[6:], f"{error:.1e}", f"{1e3 * times[part]:.3f}"))
        others = sum(times.values()) - sum(times[block.part] for block in self.blocks)
        rows.append(("others", "float32", "", f"{1e3 * others:.3f}"))
        rows.append(("all", "", f"{self.error:.1e}", f"{1e3 * sum(times.values()):.3f}"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )

    def check(self, x: Tensor) -> None:
        """Check that these are images for the network.

        Raises:
            TypeError, ValueError: x does not fit.
        """
        check_tensor("deploy", "x", x, "B C H W")
        if x.dtype not in (torch.float32, self.dtype) or x.device.type not in ("cpu", "meta"):
            allowed = " or ".join(str(dtype)[6:] for dtype in dict.fromkeys((torch.float32, self.dtype)))
            raise TypeError(f"deploy: x must be a {allowed} tensor on the CPU, got {x.dtype} on {x.device}")
        if x.shape[1] != self.in_channels or x.shape[2] < 1 or x.shape[3] < 1:
            raise ValueError(
                f"deploy: x must have shape (B, {self.in_channels}, H, W), H and W at least 1, "
                f"got {tuple(x.shape)}"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("deploy: x must not require gradients: a deployed network has none")

    def get_extra_state(self) -> Tensor:
        """Format and checksum of the plan."""
        return self.plan[:2].clone()

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing: the plan stays, and `load_state_dict` has checked that it is of the weights."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        wrong = self._unfit(state_dict, prefix)
        if wrong is None:
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)
        else:
            lists[-1].append(f"deploy: {wrong}; nothing was loaded")

    def _unfit(self, state: dict[str, Any], prefix: str) -> str | None:
        """Why a state is not one of this network; None where it may be."""
        if f"{prefix}plan" in state:
            return f"{prefix}plan is of an older version of mfkernels and not taken: deploy the network again"
        weights, made = state.get(f"{prefix}weights"), state.get(f"{prefix}_extra_state")
        if weights is None and made is None:
            return None
        size, own = tuple(self.weights.shape), self.plan[:2].tolist()
        if not isinstance(weights, Tensor) or weights.dtype != torch.float32 or weights.shape != size:
            return f"{prefix}weights must be float32 of shape {size}, got {_kind(weights)}"
        if not isinstance(made, Tensor) or made.tolist() != own:
            came = made.tolist() if isinstance(made, Tensor) else _kind(made)
            return (
                f"{prefix}_extra_state must be {own}, format and checksum of the plan, got {came}: "
                "these are the weights of another network"
            )
        return None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in ("weights", "plan"):
            if not isinstance(self._buffers.get(name), Tensor):
                raise RuntimeError(f"deploy: {name} must be a tensor, got {_kind(self._buffers.get(name))}")
        if self._plan_is_there():
            _C.check_plan(self.plan.tolist())

    def _plan_is_there(self) -> bool:
        """Whether the plan has numbers: neither a compiler's nor on meta."""
        return type(self.plan) is Tensor and self.plan.device.type == "cpu"

    def extra_repr(self) -> str:
        """Return what it is, and then its plan: a line a step, see `mfkernels.deploy.cpu.description`."""
        text = f"{self._results()}, weights={self.weights.numel() * 4 / 1e6:.1f} MB"
        if self.narrow is not None:
            text += f", those of linear layers in {str(self.narrow)[6:]}"
        if not self._plan_is_there():
            return text
        plan = self.plan.tolist()
        try:
            _C.check_plan(plan)
        except RuntimeError:  # which a call says, not who prints it
            return text
        return f"{text}, a line a step, for an image of 224x224:\n{description(plan[3:], self.parts, 224)}"

    def _results(self) -> str:
        return f"classes={self.classes}"


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__


def _fake(x: Tensor, weights: Tensor, plan: Tensor, classes: int) -> Tensor:
    return x.new_empty((x.shape[0], classes))


register_fake("deployed")(_fake)
