"""Calls every registered operator with arguments that fit and, more often, with some that do not:

    python tests/fuzz.py [--seconds 600] [--calls 1000000] [--seed 0] [--case NUMBER] [--jobs COUNT] [--plans]

Each call must end in a result or in an exception. It is a finding if it kills the process or takes a minute,
if a result is on the CPU though an argument is on meta, if a plan that was changed is taken with its old
checksum, if arguments that fit are refused, or if numbers are wrong. With `--plans` all calls are of deployed
networks whose plans were changed, and have the right checksum. Calls are made in child processes, which tell
their number before they make one: `--case` makes it again. Fails if there was a finding.
"""

import argparse
import copy
import math
import mmap
import os
import random
import resource
import signal
import struct
import sys
import time
import traceback
import warnings
from collections import Counter

import mobilenets
import torch
from cases import modules
from torch import Tensor, nn

import mfkernels
from mfkernels.checks import tensors_in
from mfkernels.deploy.cpu import int8
from mfkernels.deploy.cpu.convolutions import Convolution
from mfkernels.deploy.cpu.packing import Formats
from mfkernels.deploy.cpu.plan import Plan
from mfkernels.deploy.cpu.pyramid import DeployedMaps, Result
from mfkernels.models import DynamicMobileFormer, EndToEndMobileFormer, IFormer, MobileFormer
from mfkernels.models.features import FeaturePyramid
from mfkernels.nn import Attention2d, PreNormModulationAttention

DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16)
OTHER_DTYPES = (*DTYPES, torch.float16, torch.int64, torch.bool, torch.complex64)
NUMBERS = [0, 1, 2, 3, 7, -1, *(sign * (1 << power) for power in (16, 31, 32, 61, 62) for sign in (1, -1))]
NUMBERS += [(1 << 31) - 1, (1 << 63) - 1, -(1 << 63)]
FLOATS = [0.0, -1.0, 1e300, 1e-300, float("inf"), float("nan")]
ERROR = {torch.float32: 1e-3, torch.float64: 1e-8, torch.bfloat16: 0.1}  # of the largest number
OPERATORS = torch.ops.mfkernels


# --- arguments ------------------------------------------------------------


def tampered(rng: random.Random, plan: list[int]) -> list[int]:
    """A plan of which some words are others: numbers of any kind, of the plan itself, or nearly as before."""
    plan = list(plan)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        i = rng.randrange(len(plan))
        near = plan[i] + rng.choice([-1, 1]) * rng.choice([1, 2, 8, 16, 64, 1000])
        plan[i] = rng.choice([rng.choice(NUMBERS), rng.choice(plan), near, near])
        plan[i] = (plan[i] + (1 << 63)) % (1 << 64) - (1 << 63)  # as 64 bits
    if rng.random() < 0.05:
        del plan[rng.randrange(len(plan)) :]
    return plan


def deployed_operator(deployed) -> str:
    return "deployed" if deployed.classes else "deployed_maps"


def arguments_after(deployed) -> list:
    """Of the operator, those that follow the plan."""
    of_maps = [] if deployed.classes else [deployed._channels, deployed._reductions, deployed._margins]
    return of_maps or [deployed.classes]


def laid_out(rng: random.Random, x: Tensor) -> Tensor:
    """The same numbers with other strides."""
    kind = rng.randrange(6)
    if kind == 0 and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if kind == 1 and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == 2:  # every second element, among NaN
        wide = torch.full([2 * size + 1 for size in x.shape], float("nan"), dtype=x.dtype)
        apart = wide[tuple(slice(1, 2 * size + 1, 2) for size in x.shape)]
        return apart.copy_(x)
    if kind == 3:  # not aligned
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return x


def broken_tensor(rng: random.Random, x: Tensor) -> object:
    if x.numel() > 1 << 20:  # broken already
        return x
    kind, shape = rng.randrange(11), list(x.shape)
    if kind == 0 and shape:
        axis = rng.randrange(len(shape))
        shape[axis] = max(0, shape[axis] + rng.choice([-1, 1, 5, 16, -shape[axis]]))
        return torch.randn(shape).to(x.dtype)
    if kind == 1:
        return x.to(rng.choice(OTHER_DTYPES))
    if kind == 2:
        return torch.randn([*shape, 1]).to(x.dtype)
    if kind == 3:
        return torch.randn(shape[1:]).to(x.dtype)
    if kind == 4:
        return None
    if kind == 5:
        return rng.choice([3, "x", 1.5, True, [x]])
    if kind == 6:
        return x.to("meta")
    if kind == 7:
        return torch.randn(rng.choice([[], [0]])).to(x.dtype)
    if kind == 8 and x.numel() and x.is_floating_point():
        other = x.clone().flatten()
        other[rng.randrange(other.numel())] = rng.choice([float("nan"), float("inf"), 1e-41, 3e38])
        return other.view(x.shape)
    if kind == 9 and shape and x.numel():  # elements that share their memory
        axis = rng.randrange(len(shape))
        shape[axis] = rng.choice([1 << 12, 1 << 33, 1 << 40])
        return x.narrow(axis, 0, 1).expand(shape)
    return x.to_sparse()


def broken(rng: random.Random, value: object) -> object:
    """Something else in the place of an argument."""
    if isinstance(value, Tensor):
        return broken_tensor(rng, value)
    if isinstance(value, bool):
        return rng.choice([not value, 2, None])
    if isinstance(value, int):
        return rng.choice(NUMBERS)
    if isinstance(value, float):
        return rng.choice([*FLOATS, None])
    if isinstance(value, str):
        return rng.choice(["", "x", "gelu", "paper", "standard", "released", "x" * 1000, None])
    if isinstance(value, list):
        numbers = [rng.choice(NUMBERS) for _ in value]
        mixed = [rng.choice(pair) for pair in zip(value, numbers, strict=True)]
        return rng.choice([numbers, mixed, mixed, value[:1], value * 2])
    return rng.choice([torch.randn(3), torch.randn(2, 3, 4, 5), 0.5, 7])


def backward_arguments(rng: random.Random, name: str, arguments: list, outputs: list[Tensor]) -> list:
    """The arguments of the backward operator, by the names in both schemas."""
    forward = getattr(OPERATORS, name).default._schema
    given = {a.name: a.default_value if a.has_default_value() else None for a in forward.arguments}
    given |= dict(zip(given, arguments, strict=False))
    made = {r.name or "out": y for r, y in zip(forward.returns, outputs, strict=True)}
    made |= {"other": outputs[-1]}
    given["measured"] = given.get("mean") is None
    values: list = []
    for argument in getattr(OPERATORS, f"{name}_backward").default._schema.arguments:
        what = argument.name.removeprefix("grad_")
        if what != argument.name:
            y = made.get(what, outputs[0])
            absent = "Optional" in str(argument.type) and (y.numel() == 0 or rng.random() < 0.3)
            values.append(None if absent else torch.randn(y.shape).to(y.dtype))
        else:
            values.append(made.get(what) if given.get(what) is None else given[what])
    return values


# --- cases ------------------------------------------------------------


class Case:
    """Call number `number` of a seed: `name` of the operator, `arguments`, and whether they were broken."""

    def __init__(self, seed: int, number: int, networks: list, plans: bool = False) -> None:
        self.rng = rng = random.Random(f"{seed} {number}")
        torch.manual_seed(rng.randrange(1 << 40))
        self.sample = self.module = self.network = None
        self.broken, self.resealed = 0, False
        if plans:
            self._tampered(rng.choice(networks))
        elif rng.random() < 0.1:
            self._deployed(rng.choice(networks))
        else:
            self._operator()

    def _operator(self) -> None:
        rng = self.rng
        self.module = module = rng.choice(modules())
        shape = rng.choice(module.CHOSEN) if rng.random() < 0.2 else module.random_shape(rng)
        dtype = rng.choice(DTYPES)
        sample = module.make(shape, torch.Generator().manual_seed(rng.randrange(1 << 40)))
        sample = self.sample = sample.map(lambda t: t.to(dtype))
        self.name, self.arguments = module.NAME, list(module.native(sample))
        if rng.random() < 0.5:
            outputs = tensors_in(getattr(OPERATORS, self.name)(*self.arguments))
            self.arguments = backward_arguments(rng, self.name, self.arguments, outputs)
            self.name, self.sample = f"{self.name}_backward", None
        self.arguments = [laid_out(rng, a) if isinstance(a, Tensor) else a for a in self.arguments]
        for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
            self._break()

    def _deployed(self, network: tuple) -> None:
        deployed, image, _ = network
        rng, self.network = self.rng, network
        self.name = deployed_operator(deployed)
        if deployed.classes and rng.random() < 0.3:
            self.name = "deployed_times"
        self.arguments = [image, deployed.weights, deployed.plan, *arguments_after(deployed)]
        kind = rng.randrange(4)
        if kind == 1:  # one word of the plan
            plan = deployed.plan.clone()
            plan[rng.randrange(len(plan))] = rng.choice(NUMBERS)
            if not torch.equal(plan, deployed.plan):
                self.arguments[2], self.broken = plan, 1
        elif kind > 1:
            self._break()

    def _tampered(self, network: tuple) -> None:
        deployed, image, _ = network
        self.network, self.name, self.resealed = network, deployed_operator(deployed), True
        plan = tampered(self.rng, deployed.plan[3:].tolist())
        sealed = torch.tensor(mfkernels._C.sealed_plan(deployed.classes, plan))
        self.arguments, self.broken = [image, deployed.weights, sealed, *arguments_after(deployed)], 1

    def _break(self) -> None:
        i = self.rng.randrange(len(self.arguments))
        try:
            self.arguments[i] = broken(self.rng, self.arguments[i])
        except (RuntimeError, TypeError):  # PyTorch cannot make it
            return
        self.broken += 1

    def call(self) -> str:
        """Either "a result", or the kind of the exception.

        Raises:
            AssertionError: a result that should not be.
        """
        try:
            outputs = tensors_in(getattr(OPERATORS, self.name)(*self.arguments))
        except Exception as error:
            if not self.broken:
                raise AssertionError(f"arguments that fit are refused: {error}") from error
            return type(error).__name__
        given = tensors_in(self.arguments)
        devices = {t.device for t in given}
        assert len(devices) == 1 or not any(y.is_cpu for y in outputs), (
            "a result on the CPU, an argument on meta"
        )
        if self.network is not None:
            deployed, _, result = self.network
            taken = self.arguments[2]
            if not self.resealed:
                assert taken.is_meta or torch.equal(taken, deployed.plan), "a plan that was changed is taken"
            if not self.broken and not self.name.endswith("times"):
                assert torch.equal(outputs[0], result), "other numbers than before"
        elif self.sample is not None and not self.broken and self.rng.random() < 0.2:
            self._compare()
        return "a result"

    def _compare(self) -> None:
        exact = self.sample.map(lambda t: t.double())
        pairs = zip(
            tensors_in(self.sample.call(self.module.OP)),
            tensors_in(exact.call(self.module.REFERENCE)),
            strict=True,
        )
        for y, truth in pairs:
            error = (y.double() - truth).abs().amax().item() if y.numel() else 0.0
            largest = max(truth.abs().amax().item(), 1.0) if y.numel() else 1.0
            assert error <= ERROR[y.dtype] * largest, (
                f"wrong numbers: error {error} where the largest is {largest}"
            )

    def __str__(self) -> str:
        return f"{self.name}({', '.join(_words(a) for a in self.arguments)})"


def _words(value: object) -> str:
    if isinstance(value, Tensor):
        strides = tuple(value.stride()) if value.layout == torch.strided else value.layout
        return f"<{str(value.dtype)[6:]} {tuple(value.shape)} strides {strides} {value.device}>"
    return repr(value)[:80]


def small_networks() -> list:
    """(deployed network, image, its result)."""
    torch.manual_seed(0)
    rows = [("D", 2, 8, 1, 1, 0), ("D", 3, 12, 1, 2, 4), ("M", 3, 12, 1, 1, 3)]
    types = ["ConvBlock_k7_r2", "RepCPE_k3", "SHMABlock_r1_hdrr2_nh1_ws2"]
    before = PreNormModulationAttention(40)
    models = (
        MobileFormer(rows, num_classes=5, stem_channels=8, features=32, token_dim=32, token_num=3),
        DynamicMobileFormer(
            [(24, 12, 2, 2, 4, 4), (24, 16, 1, 2, 4, 4)], stem_channels=8, lite_channels=(16, 8), features=32,
            head_features=32, num_classes=5, token_num=3, token_dim=32, groups=2,
        ),
        IFormer((1, 0, 0, 2), (12, 20, 36, 40), types, num_classes=5),
        MobileFormer(
            [*rows[1:], ("M", 3, 12, 1, 1, 3)], num_classes=5, stem_channels=8, features=32, token_dim=32,
            token_num=3, token_id=-1, kernel_size=(3, 5),
        ),
        IFormer((1, 0, 0, 2), (12, 20, 36, 40), [types[0], types[2], types[2]], num_classes=5),
        IFormer(
            (1, 1, 1, 0), (12,) * 4, [types[0], "SHMABlock_r1_ws3_wsp1_wre1", types[2]], num_classes=5,
            norm="layer", stem="ConvNeXt", downsample=False,
        ),
    )  # fmt: skip
    for block, mixer in zip(models[4].stages[3], (Attention2d(40, num_heads=2), before), strict=True):
        block.block.token_channel_mixer.m = mixer
    models = [model.eval() for model in models]
    pyramids = [FeaturePyramid(copy.deepcopy(model)).eval() for model in models[:3]]
    image = torch.randn(1, 3, 20, 25)
    mixed = rows[1:]
    rows = [rows[0], *(("D", 3, width, 1, 2, 2) for width in (12, 16, 20, 24))]
    backbone = MobileFormer(rows, stem_channels=8, features=32, token_dim=32, token_num=3, token_id=-1)
    detector = EndToEndMobileFormer(
        FeaturePyramid(backbone), (1, 1), num_classes=4, queries=5, channels=24, num_heads=2, expansion=2
    ).eval()
    chains = [mobilenets.make(name) for name in ("v3", "efficient", "fused, same", "residual")]
    made = [mfkernels.deploy(model) for model in (*models, *pyramids, *chains, detector)]
    made.append(resizing())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    int8.BUDGET = math.inf  # all parts
    made += [
        mfkernels.deploy(model, dtype=torch.int8, calibration=images) for model in (*models[:3], chains[-1])
    ]
    narrow = zip(models, (torch.int8, torch.bfloat16, torch.int8), strict=False)
    made += [mfkernels.deploy(model, weights=weights) for model, weights in narrow]
    mixing = MobileFormer(
        mixed, num_classes=5, stem_channels=8, features=32, token_dim=32, token_num=3, mixing="mlp_attn",
        image_size=24,
    )  # fmt: skip
    pairs = [(deployed, image) for deployed in made]
    pairs.append((mfkernels.deploy(mixing.eval()), torch.randn(1, 3, 24, 24)))
    return [(deployed, x, result_of(deployed, x)) for deployed, x in pairs]


def result_of(deployed, image: Tensor) -> Tensor:
    """The first one of its operator."""
    run = getattr(OPERATORS, deployed_operator(deployed))
    return tensors_in(run(image, deployed.weights, deployed.plan, *arguments_after(deployed)))[0]


def resizing() -> DeployedMaps:
    """A network whose steps are convolutions and maps in other sizes, as of a feature pyramid network."""
    plan = Plan(nn.Identity(), Formats())
    conv, other = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, 2, 1)
    plan.names |= {conv: "conv", other: "other"}
    with plan.named("levels"):
        finest = plan.dense(None, conv, conv.weight, conv.bias)
        layer, levels = Convolution(plan, [other]), [finest]
        levels += [layer(finest), plan.resize(finest, "half")]
        plan.hand_out(plan.resize(levels[1], finest, "nearest", added=finest))
        plan.hand_out(plan.resize(levels[2], finest, "bilinear_by_two", added=finest))
        plan.hand_out(plan.resize(layer(levels[2]), "image", "bilinear"))
        plan.hand_out(plan.resize(plan.resize(levels[1], "twice", "bilinear"), "half"))
    results = [Result(16, 1)] * 3 + [Result(16, 2)]
    return plan.finished_maps(DeployedMaps, 3, results)


# --- processes ------------------------------------------------------------


def hunt(numbers: range, call, describe, until: float) -> tuple[Counter, list[str]]:
    """Calls `call(number)` in child processes till the time is over: how often it ended in what, and
    findings. A child that dies is one, `describe(number)` says of what, and another goes on after it."""
    ends, findings, at = Counter(), [], 0
    current = mmap.mmap(-1, 8)
    while at < len(numbers) and time.time() < until:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            _work(numbers[at:], call, until, current, write)
        os.close(write)
        with os.fdopen(read) as lines:
            for line in lines:
                what, _, text = line.rstrip("\n").partition("\t")
                ends[what] += 1
                if what == "finding":
                    findings.append(text.replace("\\n", "\n"))
        _, status = os.waitpid(child, 0)
        if status == 0:
            break
        number = struct.unpack("q", current[:])[0]
        how = (
            signal.Signals(os.WTERMSIG(status)).name
            if os.WIFSIGNALED(status)
            else f"exit {os.WEXITSTATUS(status)}"
        )
        ends["finding"] += 1
        findings.append(f"case {number} killed the process ({how}): {describe(number)}")
        at = numbers.index(number) + 1
    return ends, findings


def _work(numbers: range, call, until: float, current: mmap.mmap, write: int) -> None:
    """In the child; does not return."""
    with os.fdopen(write, "w", buffering=1) as lines:
        for number in numbers:
            if time.time() > until:
                break
            current[:] = struct.pack("q", number)
            signal.setitimer(signal.ITIMER_PROF, 60)  # of this process's own time
            signal.alarm(600)
            try:
                lines.write(f"{call(number)}\n")
            except AssertionError as error:
                lines.write(f"finding\tcase {number}: {error}\n".replace("\n", "\\n", str(error).count("\n")))
            except BaseException:
                text = f"case {number}: {traceback.format_exc()}".rstrip().replace("\n", "\\n")
                lines.write(f"finding\t{text}\n")
    os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int)
    parser.add_argument("--plans", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    networks = small_networks()
    if given.case is not None:
        case = Case(given.seed, given.case, networks, given.plans)
        print(case, flush=True)
        print(case.call())
        return 0
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):  # which has a limit of its own
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.RLIM_INFINITY))
    until, jobs = time.time() + given.seconds, []
    for job in range(given.jobs):
        read, write = os.pipe()
        if os.fork() == 0:
            with os.fdopen(write, "w") as out:
                ends, findings = hunt(
                    range(job, given.calls, given.jobs),
                    lambda number: Case(given.seed, number, networks, given.plans).call(),
                    lambda number: Case(given.seed, number, networks, given.plans),
                    until,
                )
                print(*(f"{finding} [seed {given.seed}]" for finding in findings), sep="\n", file=sys.stderr)
                out.write(repr(dict(ends)))
            os._exit(0)
        os.close(write)
        jobs.append(os.fdopen(read))
    ends = Counter()
    for job in jobs:
        ends.update(eval(job.read() or "{'finding': 1}"))
    for what, count in ends.most_common():
        print(f"{count:8d} {what}")
    found = ends["finding"]
    print(f"{sum(ends.values())} calls with seed {given.seed}, {found} findings")
    return found > 0


if __name__ == "__main__":
    sys.exit(main())
