"""Loads a build with CUDA where no GPU need be, and calls its operators by their schemas:

    python tests/cuda/load.py     # in the folder of the package

Without a GPU no kernel runs; what is shown is that the library finds all that it needs in this PyTorch, that
the operators are registered for CUDA devices, and that tensors of another device are refused in words."""

import torch

import mfkernels

OPERATORS = ("former_block", "dynamic_bottleneck", "token_chain")


def argument(kind: str):
    """Return some value of a schema's type."""
    values = {"Tensor": torch.zeros(1), "int": 1, "bool": False, "float": 1.0, "str": "released"}
    return [] if kind.startswith("List") else values.get(kind)


print(f"{mfkernels.__file__}, PyTorch {torch.__version__}, built with {mfkernels._C.build_info()}")
assert mfkernels.native.CUDA_LACKS is None, mfkernels.native.CUDA_LACKS
for name in OPERATORS:
    operator = getattr(torch.ops.mfkernels_cuda, name).default
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mfkernels_cuda::{name}", "CUDA"), name
    try:
        operator(*[argument(str(a.type)) for a in operator._schema.arguments])
    except NotImplementedError as error:
        assert "'CPU' backend" in str(error), error
    else:
        raise AssertionError(f"{name} ran on a CPU")
    print(operator._schema)
