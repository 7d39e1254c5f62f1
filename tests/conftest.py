import dataclasses
import functools
import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():  # before Triton is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import mfkernels


def quicken_interpreter() -> None:
    """Triton's interpreter patches the language whenever a kernel calls a function, makes a table whenever
    it looks up a type: a third of its time. Once is enough, for a launch and a module."""
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    class Launch:
        def __init__(self, scope):
            self.scope = scope

        def restore(self):
            patched.clear()
            self.scope.restore()

    def patch_once(function):
        module, is_launch = id(function.__globals__), not patched
        if module not in patched:
            patched.add(module)
            scope = patch(function)
            return Launch(scope) if is_launch else scope

    interpreter._patch_lang = patch_once
    look_up = interpreter._get_np_dtype
    of_scalar = functools.cache(look_up)

    def numpy_type(type_):
        scalar = type_.scalar
        return of_scalar(scalar) if type(scalar) is interpreter.tl.dtype else look_up(scalar)

    interpreter._get_np_dtype = numpy_type

    # Each sum of integers is made and compared in 64 bits, too: a fifth of the time. Small maps have no place
    # for an index beyond 32 bits.
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )
    remember_types(interpreter.tl.block_type, interpreter.tl.tensor)


def remember_types(block_type: type, tensor: type) -> None:
    """Triton makes a type for every value, checks its shape, and wraps each number of it: another fifth of
    the interpreter's time. Once for a shape is enough."""
    make_type, make_tensor, known = block_type.__init__, tensor.__init__, {}

    def new_type(self, element_ty, shape):
        key = (*shape,)
        if key not in known:
            make_type(self, element_ty, shape)
            value = tensor.__new__(tensor)
            make_tensor(value, None, self)
            known[key] = dict(shape=self.shape, numel=self.numel, of_tensor=(value.shape, value.numel))
        vars(self).update(known[key])
        self.element_ty = element_ty

    def new_tensor(self, handle, type):
        if type.is_block():
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = type.of_tensor
        else:
            make_tensor(self, handle, type)

    block_type.__init__, tensor.__init__ = new_type, new_tensor
    block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>", lambda self, name: None)


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    quicken_interpreter()

# Test processes side by side share the cores: threads of theirs would wait for one another.
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))


def pytest_collection_modifyitems(config, items):
    for item in items:
        # Not item.keywords, which have the names of folders, too.
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and PyTorch finds none"))
        if item.get_closest_marker("bed") and config.option.markexpr != "bed":
            item.add_marker(pytest.mark.skip(reason="slow: make gpu-bed runs it"))


@pytest.fixture(autouse=True)
def float32_is_float32(request, monkeypatch):
    """On a GPU cuDNN would compute the definitions' convolutions in TF32."""
    if request.node.get_closest_marker("gpu"):
        for setting in (torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul):
            monkeypatch.setattr(setting, "fp32_precision", "ieee")


@pytest.fixture
def one_thread():
    """Runs the test on one thread, as each process of a training does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def use_instruction_set(name):
    if name not in mfkernels.native.supported_instruction_sets():
        pytest.skip(f"this machine cannot run {name} kernels")
    before = mfkernels.native.instruction_set()
    mfkernels.native.set_instruction_set(name)
    yield name
    mfkernels.native.set_instruction_set(before)


@pytest.fixture(params=["generic", "avx2", "avx512"])
def instruction_set(request):
    """Runs the test once for each instruction set of the operators that this machine can run."""
    yield from use_instruction_set(request.param)


@pytest.fixture(params=["avx512", "amx", "i8mm"])
def bf16_instruction_set(request):
    """Runs the test once for each instruction set of networks in bfloat16 that this machine can run."""
    if not mfkernels._C.bf16_supported():
        pytest.skip("this processor does not multiply bfloat16")
    yield from use_instruction_set(request.param)
