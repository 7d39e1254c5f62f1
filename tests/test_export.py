"""Programs that leave Python: torch.export, ONNX, AOTInductor."""

import logging

import pytest
import torch

import mfkernels
from mfkernels.bench.run import randomise
from mfkernels.models import DynamicMobileFormer, IFormer, MobileFormer

ROWS = [("D", 2, 8, 1, 1, 0), ("D", 3, 12, 1, 2, 4), ("M", 3, 12, 1, 1, 3)]
TYPES = ["ConvBlock_k7_r2"] * 2 + ["RepCPE_k3", "SHMABlock_r1_hdrr2", "FFN2d_r2"]
NETWORKS = {
    "mobile_former": lambda: MobileFormer(
        ROWS, num_classes=5, stem_channels=8, features=32, token_dim=32, token_num=3
    ),
    "spatial": lambda: MobileFormer(
        ROWS, num_classes=5, stem_channels=8, features=32, token_dim=32, token_num=3, token_id=-1
    ),
    "dmf": lambda: DynamicMobileFormer(
        [(24, 12, 2, 2, 4, 4), (24, 16, 1, 2, 4, 4)], stem_channels=8, lite_channels=(16, 8), features=32,
        head_features=32, num_classes=5, token_num=3, token_dim=32, groups=2,
    ),
    "iformer": lambda: IFormer((1, 1, 3, 0), (8, 12, 16, 24), TYPES, num_classes=5, kernels=(3, 3, 3, 3)),
    "windows": lambda: IFormer(
        (1, 1, 3, 0), (8, 12, 16, 24), [t + "_ws2" * t.startswith("SHMA") for t in TYPES], num_classes=5,
    ),
}  # fmt: skip
networks = pytest.mark.parametrize("name", NETWORKS)


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[name]()
    randomise(model, torch.randn(4, 3, 64, 64))
    return model.eval()


def exported(model: torch.nn.Module, x: torch.Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=64)
    return torch.export.export(model, (x,), dynamic_shapes=({0: batch},))


def ours_in(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if "mfkernels" in str(node.target)]


@networks
def test_decompositions(name):
    """No operator of ours is left, and the numbers are the same, for another batch size, too."""
    model, other = make(name).double(), torch.randn(3, 3, 64, 64, dtype=torch.float64)
    program = exported(model, torch.randn(2, 3, 64, 64, dtype=torch.float64))
    assert ours_in(program)
    plain = program.run_decompositions(mfkernels.decompositions())
    assert not ours_in(plain)
    with torch.inference_mode():
        expected = model(other)
        for ep in (program, plain):
            torch.testing.assert_close(ep.module()(other), expected, rtol=1e-8, atol=1e-8)


@networks
def test_onnx(name):
    """In ONNX Runtime, for another batch size."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    model, other = make(name), torch.randn(3, 3, 64, 64)
    program = exported(model, torch.randn(2, 3, 64, 64)).run_decompositions(mfkernels.decompositions())
    onnx = torch.onnx.export(program, dynamo=True, verbose=False)
    assert all(node.domain in ("", "pkg.onnxscript.torch_lib.common") for node in onnx.model.graph)
    content = onnx.model_proto.SerializeToString()
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: other.numpy()})[0]
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(got), model(other), rtol=1e-3, atol=1e-4)


def test_aotinductor_package(tmp_path):
    """With our operators, compiled, loaded back."""
    model, x = make("mobile_former"), torch.randn(2, 3, 64, 64)
    program = torch.export.export(model, (x,))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(path)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)
