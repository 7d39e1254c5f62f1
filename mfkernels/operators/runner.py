from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..checks import as_first
from .dispatch import register_triton


class Runner:
    """Runs a registered operator from Python: its kernels, or its definition where none can run.

    `torch.library`'s wrapper of an autograd formula takes tens of microseconds a call, and the checks of many
    arguments as many again: more than some kernels. So eagerly an autograd function takes the wrapper's
    place, and the C++ kernels' own checks come first; where they refuse, ours say in words what is wrong.
    Compilers and function transforms see the registered operator.

    Args:
        op: the operator, `torch.ops.mfkernels.<op>`, whose gradient is `<op>_backward`.
        reference: its definition.
        check: raises where an argument does not fit.
        setup_context, backward: the autograd formula, as of `torch.library.register_autograd`; `backward`
            calls `Runner.backward`.
        result: what users get, of what the kernels return and the arguments; by default all that.
        library: other operators, PyTorch's or ours, in the place of the kernels, by default, where
            `by_library` says that on a CPU they are the faster way: given whether gradients are asked for,
            and the arguments, which are not checked yet. Not asked while compiling, which fixes no sizes.
        match: what autocast does with arguments of several dtypes; by default the first, a map, keeps its
            own, and the others follow.

    These functions take the operator's arguments, all of them, in order.
    """

    def __init__(
        self,
        op: str,
        reference: Callable[..., Any],
        check: Callable[..., None],
        setup_context: Callable[..., None],
        backward: Callable[..., Any],
        result: Callable[..., Any] | None = None,
        library: Callable[..., Any] | None = None,
        by_library: Callable[..., bool] | None = None,
        match: Callable[..., tuple[Any, ...]] = as_first,
    ) -> None:
        self._op, self._reference, self._check, self._result = op, reference, check, result
        self._library, self._by_library, self._match = library, by_library, match
        self._kernel = getattr(torch.ops.mfkernels, op).default
        self._backward_kernel = getattr(torch.ops.mfkernels, f"{op}_backward").default

        # Without a setup_context, with which apply would inspect the signature of forward each time.
        def forward(ctx: Any, *args: Any) -> Any:
            outputs = self._below_autograd(*args)
            setup_context(ctx, args, outputs)
            return outputs

        parts = dict(forward=staticmethod(forward), backward=staticmethod(backward))
        self._function: Any = type(op, (torch.autograd.Function,), parts)
        torch.library.register_autograd(f"mfkernels::{op}", backward, setup_context=setup_context)
        torch.library.register_autograd(f"mfkernels::{op}_backward", self._no_second_gradient)
        register_triton(op)

    def __call__(self, *args: Any) -> Any:
        args = self._match(*args)
        x, refused = args[0], None
        if self._library is not None and self._is_library_faster(args):
            self._check(*args)
            return self._library(*args)
        eager = is_eager()
        if eager and _kernels_check(args):
            try:
                return self._run(args)
            except Exception as error:
                refused = error
        self._check(*args)
        if refused is not None:
            raise refused
        if not backends.use_kernels(self._op, x):
            return self._reference(*args)
        return self._run(args) if eager else self._public(self._kernel(*args), args)

    def backward(self, *args: Any) -> Any:
        """Call the backward operator."""
        if torch.is_grad_enabled() or not is_eager():
            return self._backward_kernel(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return self._backward_kernel(*args)

    def _is_library_faster(self, args: tuple[Any, ...]) -> bool:
        if torch.compiler.is_compiling() or backends.current_backend() != "auto":
            return False
        on_cpu = isinstance(args[0], Tensor) and not args[0].is_cuda
        return on_cpu and self._by_library is not None and self._by_library(_tracked(args), *args)

    def _run(self, args: tuple[Any, ...]) -> Any:
        outputs = self._function.apply(*args) if _tracked(args) else self._below_autograd(*args)
        return self._public(outputs, args)

    def _below_autograd(self, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return self._kernel(*args)

    def _public(self, outputs: Any, args: tuple[Any, ...]) -> Any:
        return outputs if self._result is None else self._result(outputs, *args)

    def _no_second_gradient(self, ctx: Any, *grads: Tensor) -> None:
        """Refuse gradients of gradients: an error is better than a silent zero."""
        raise RuntimeError(
            f"{self._op}: gradients of gradients are not implemented in the kernels; "
            'use mfkernels.use_backend("reference") for them'
        )


def is_eager() -> bool:
    """Return whether no compiler, tracer, function transform or forward-mode differentiation is watching."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def _tracked(args: tuple[Any, ...]) -> bool:
    if not torch.is_grad_enabled():
        return False
    for a in args:  # noqa: SIM110 (any() takes as long again)
        if isinstance(a, Tensor) and a.requires_grad:
            return True
    return False


def _kernels_check(args: tuple[Any, ...]) -> bool:
    """Return whether the kernels check these arguments: those for CPUs do, but take True for 1."""
    x = args[0]
    if not (isinstance(x, Tensor) and x.is_cpu and x.dtype in backends.CPU_DTYPES):
        return False
    for a in args:
        if a is True:
            return False
    return backends.current_backend() == "auto"
