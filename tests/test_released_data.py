"""Our modules against numbers that the released implementations made: see tests/data/README.md."""

import dataclasses
import importlib.util
import json
import lzma

import pytest
import torch
from released_data import DATA, Case, build, load, paths, read, run, run_model, run_tiny
from tolerance import Errors, largest_error
from torch.utils.flop_counter import FlopCounterMode

import mfkernels
from mfkernels.models import create_model, list_models

FOLDERS = ("ops_mobileformer", "ops_dmf", "ops_iformer", "derived")
OPERATORS = [path for path in paths(*FOLDERS) if not path.name.startswith("if_fuse")]
FUSED = [path for path in paths("ops_iformer") if path.name.startswith("if_fuse")]
MODELS, TINY = paths("models"), paths("tiny")
HAS_TRITON = importlib.util.find_spec("triton") is not None

# A float64 run of ours meets a float64 run of theirs that was rounded to float32. Whole networks: their image
# and cotangent were rounded, too, and that comes back a few times over.
ROUNDING = 2.0**-24
ZERO = 1e-9  # the scale below which a gradient is zero in theory


def _ids(path) -> str:
    return path.name.split(".")[0]


def _run_all(case: Case, runner, dtype: torch.dtype, backend: str):
    with mfkernels.use_backend(backend):
        for mode in case.modes:
            yield from runner(case, mode, dtype)


def _run_operator(case: Case, mode: str, dtype: torch.dtype):
    return run(case, build(case), mode, dtype)


def _check_float64(case: Case, runner, backend: str, roundings: float) -> None:
    count = 0
    for name, ours, theirs in _run_all(case, runner, torch.float64, backend):
        bound = max(ZERO, roundings * ROUNDING * theirs.abs().max().item())
        error = largest_error(ours, theirs)
        assert error <= bound, f"{case.name} {name}: error {error:.3g}, bound {bound:.3g}"
        count += 1
    assert count > 0


def _check_float32(case: Case, runner, backend: str = "cpu") -> None:
    """Outputs under the one tolerance. Gradients are checked in float64, and operator by operator: through a
    whole block in float32 a single activation on the other side of its kink changes them at will. Where norms
    over few numbers amplify rounding, one run of the reference may be lucky: then up to eight of them count,
    whose weights differ in the last place."""
    errors = Errors()

    def add_reference(nudged: Case) -> None:
        for name, ours, theirs in _run_all(nudged, runner, torch.float32, "reference"):
            if ".out." in name or ".tap." in name:
                errors.reference(ours, theirs)

    add_reference(case)
    for name, ours, theirs in _run_all(case, runner, torch.float32, backend):
        if ".out." in name or ".tap." in name:
            errors.kernel(ours, theirs)
    for seed in range(8):
        if not errors.hold():
            add_reference(_perturbed(case, seed))
    errors.check(case.name)


@pytest.mark.parametrize("path", OPERATORS, ids=_ids)
def test_operator_reference(path):
    _check_float64(read(path), _run_operator, "reference", 2)


@pytest.mark.parametrize("path", OPERATORS, ids=_ids)
def test_operator_cpu(path, instruction_set):
    _check_float64(read(path), _run_operator, "cpu", 2)
    _check_float32(read(path), _run_operator)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("path", OPERATORS, ids=_ids)
def test_operator_triton(path):
    """Interpreted, where there is no GPU."""
    _check_float32(read(path), _run_operator, "triton")


@pytest.mark.parametrize("path", FUSED, ids=_ids)
def test_fuse(path):
    """Weights and biases of the folded layer, and that it does what the layers did."""
    case = read(path)
    module = build(case).double().eval()
    load(module, case.under("p") | case.under("b"), torch.float64)
    with torch.no_grad():
        fused, x = module.fuse(), case.tensors["in.x"]
        assert sorted(fused.state_dict()) == ["bias", "weight"]
        for name, value in fused.state_dict().items():
            theirs = case.tensors[f"fused.{name}"]
            assert largest_error(value, theirs) <= 2 * ROUNDING * theirs.abs().max(), name
        theirs = case.tensors["eval.out.y"]
        for ours in (module(x), fused(x)):
            assert largest_error(ours, theirs) <= 2 * ROUNDING * theirs.abs().max()


@pytest.mark.parametrize("path", MODELS, ids=_ids)
def test_model_reference(path):
    _check_float64(read(path), run_model, "reference", 8)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("path", [*MODELS, *TINY], ids=_ids)
def test_model_triton(path):
    """Interpreted, where there is no GPU; in eval mode."""
    case = dataclasses.replace(read(path), modes=("eval",))
    _check_float32(case, run_tiny if path in TINY else run_model, "triton")


@pytest.mark.parametrize("path", MODELS, ids=_ids)
def test_model_cpu(path, instruction_set):
    _check_float64(read(path), run_model, "cpu", 8)
    _check_float32(read(path), run_model)


@pytest.mark.parametrize("path", TINY, ids=_ids)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_tiny_network(path, mode, instruction_set):
    """These files were made in float32. The truth is a float64 run of ours; theirs and our reference are the
    same network in float32. Norms over two samples and the kinks of activations amplify rounding up to a
    thousand times, by luck: the reference's error is the largest of eight runs, whose weights differ in the
    last place."""
    case = read(path)
    theirs_errors, our_errors = Errors(), Errors()
    with mfkernels.use_backend("reference"):
        truth = {name: ours for name, ours, _ in run_tiny(case, mode, torch.float64)}
        for seed in range(8):
            for name, ours, _ in run_tiny(_perturbed(case, seed), mode, torch.float32):
                theirs_errors.reference(ours, truth[name])
                our_errors.reference(ours, truth[name])
    with mfkernels.use_backend("cpu"):
        for name, ours, _ in run_tiny(case, mode, torch.float64):
            scale = max(1.0, truth[name].abs().max().item())
            assert largest_error(ours, truth[name]) <= 1e-9 * scale, f"{case.name} {name}"
        for name, ours, theirs in run_tiny(case, mode, torch.float32):
            theirs_errors.kernel(theirs, truth[name])
            our_errors.kernel(ours, truth[name])
    theirs_errors.check(f"{case.name} {mode}, theirs")
    our_errors.check(f"{case.name} {mode}, ours")


def _perturbed(case: Case, seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def nudge(value: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(-1, 2, value.shape, generator=generator)
        return value * (1 + signs * ROUNDING) if value.is_floating_point() else value

    nudged = {k: nudge(v) if k.startswith(("in.", "p.", "state.")) else v for k, v in case.tensors.items()}
    return dataclasses.replace(case, tensors=nudged)


MANIFESTS = json.loads(lzma.decompress((DATA / "manifests.json.xz").read_bytes()))


def test_all_released_models_are_here():
    other_names = ["dmf_s", "dmf_xs", "dmf_xxs"]  # of those with numbers
    released = [name for name in MANIFESTS if not name.endswith("_distill")]
    assert sorted(released + other_names) == sorted(list_models())


@pytest.mark.parametrize("name", sorted(MANIFESTS))
def test_manifest(name):
    """Names, shapes and dtypes of the state dict, in order; parameters; multiply-adds at 224x224; parameters
    after folding."""
    manifest = MANIFESTS[name]
    options = dict(distillation=True) if name.endswith("_distill") else {}
    model = create_model(name.removesuffix("_distill"), **options).eval().requires_grad_(False)
    ours = [[key, list(value.shape), str(value.dtype)] for key, value in model.state_dict().items()]
    theirs = [[key, shape, f"torch.{dtype}"] for key, (shape, dtype) in manifest["state_dict"].items()]
    assert ours == theirs
    assert sum(p.numel() for p in model.parameters()) == manifest["params"]
    with mfkernels.use_backend("reference"), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224))
    assert counter.get_total_flops() // 2 == manifest["macs"]
    if "fused_params" in manifest:
        assert sum(p.numel() for p in model.fuse().parameters()) == manifest["fused_params"]
