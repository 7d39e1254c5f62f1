"""Networks on a GPU as CUDA graphs: one launch for a whole network."""

import copy
import itertools
import statistics
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...checks import check_tensor
from ...models.features import FeatureInfo, FeaturePyramid
from ...models.iformer import IFormer
from ...operators.runner import is_eager
from ..folding import fold_batch_norms
from .fused_block import forms

# Each keeps its input and its result; what is between them is shared by all.
MOST_SHAPES = 8


def deployed_on_gpu(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of `model` as a `Captured`.

    Its batch norms are folded where a convolution is before them.
    """
    model = copy.deepcopy(model).requires_grad_(False)
    network = model.network if isinstance(model, FeaturePyramid) else model
    folded = network.fuse() if isinstance(network, IFormer) else fold_batch_norms(network)
    if not isinstance(model, FeaturePyramid):
        return Captured(forms(folded, dtype), dtype)
    captured = Captured([model], dtype)
    captured.feature_info = model.feature_info
    return captured


def _each(result: Tensor | list[Tensor], f: Callable[[Tensor], Tensor]) -> Any:
    """Of a result, or of the maps of a pyramid."""
    return [f(x) for x in result] if isinstance(result, list) else f(result)


class _Shape(NamedTuple):
    """A graph that makes `output` of `image` when `replay` is called."""

    image: Tensor
    output: Tensor | list[Tensor]
    replay: Callable[[], None]


class Captured(nn.Module):
    """A network whose kernels are recorded when it first sees a shape, and then launched all at once.

    The graphs of the last `MOST_SHAPES` shapes are kept, in one pool of memory. A shape for which the network
    cannot be recorded runs as it is, and a warning says why.

    Args:
        forms: the network, in eval mode, on a GPU; and others that do the same. For each shape that one is
            taken whose graph is the fastest. They are changed.
        dtype: of weights and activations.
    """

    feature_info: FeatureInfo  # of a pyramid

    def __init__(self, forms: Sequence[nn.Module], dtype: torch.dtype) -> None:
        super().__init__()
        self.forms, self.dtype = nn.ModuleList(forms).to(dtype).eval(), dtype
        self._reset()

    def _reset(self) -> None:
        self._shapes: OrderedDict[Any, _Shape | None] = OrderedDict()  # None: it cannot be recorded
        self._lock, self._pool, self._done = threading.Lock(), None, None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images on the network's device, in float32 or its dtype, to its result in theirs.

        Raises:
            TypeError, ValueError: an input that does not fit, named.
        """
        self._check(x)
        if x.numel() == 0 or not is_eager() or _gpu.is_recording():
            return self._run(self.forms[0], x)
        # Not in inference mode: what the graphs keep is written by later calls, which may be outside of it.
        with self._lock, torch.inference_mode(False), torch.no_grad(), _gpu.on(x.device):
            key = x.dtype, x.shape, x.stride()
            if key not in self._shapes:
                self._shapes[key] = self._record_or_warn(x)
                if len(self._shapes) > MOST_SHAPES:
                    if self._done is not None:  # its image may still be read, on another stream than it is of
                        _gpu.finish(self._done)
                    self._shapes.popitem(last=False)
            self._shapes.move_to_end(key)
            shape = self._shapes[key]
            if shape is None:
                return self._run(self.forms[0], x)
            image, output, replay = shape
            # The graphs' memory is one: a call on another stream waits for the one before it.
            if self._done is not None:
                _gpu.wait(self._done)
            image.copy_(x)
            replay()
            result = _each(output, torch.clone)
            self._done = _gpu.event()
        return result

    def _run(self, form: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False), _without_tf32():
            return _each(form(x.to(self.dtype)), lambda result: result.to(x.dtype))

    def _record_or_warn(self, x: Tensor) -> _Shape | None:
        try:
            return self._record(x)
        except Exception as error:  # Triton's, of too few resources, are of no narrower class
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            what = f"deploy: images of shape {tuple(x.shape)} run without a CUDA graph: {reason[0]}"
            warnings.warn(what, stacklevel=3)
            return None

    def _record(self, x: Tensor) -> _Shape:
        image = torch.empty_like(x).copy_(x)
        if self._pool is None:
            self._pool = _gpu.pool()
        found = []
        for form in self.forms:
            try:
                found.append(
                    _Shape(image, *_gpu.record(lambda form=form: self._run(form, image), self._pool))
                )
            except Exception:  # its kernels need more than this device has
                if form is self.forms[0]:
                    raise
        return found[0] if len(found) == 1 else min(found, key=lambda shape: _gpu.time(shape.replay))

    def _check(self, x: Tensor) -> None:
        check_tensor("deploy", "x", x, "B C H W")
        device = next(self.parameters()).device
        if x.dtype not in (torch.float32, self.dtype):
            allowed = " or ".join(str(dtype)[6:] for dtype in dict.fromkeys((torch.float32, self.dtype)))
            raise TypeError(f"deploy: x must be a {allowed} tensor, got {x.dtype}")
        if x.device != device:
            raise ValueError(f"deploy: x must be on the network's device, {device}, got {x.device}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("deploy: x must not require gradients: a deployed network has none")

    def __getstate__(self) -> dict[str, Any]:
        """Graphs cannot be copied or pickled: a copy records its own."""
        hidden = ("_shapes", "_lock", "_pool", "_done")
        return {name: value for name, value in self.__dict__.items() if name not in hidden}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset()

    def _apply(self, fn: Any, recurse: bool = True) -> "Captured":
        """Forget the graphs: moved or cast, the network has parameters that they do not know."""
        self._reset()
        return super()._apply(fn, recurse)  # type: ignore[return-value]


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Have libraries compute float32 in float32.

    By default cuDNN rounds a convolution's inputs to the 10 bits of TF32. Compilers keep their own settings.
    """
    if not is_eager():
        yield
        return
    # Recurrent layers, too: PyTorch's older flag, which others may read meanwhile, has one setting for both.
    cudnn: Any = torch.backends.cudnn
    settings = (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


class _Cuda:
    """PyTorch's graphs; tests have a double of it."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._recording = threading.Lock()

    def is_recording(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def on(self, device: torch.device) -> Any:
        return torch.cuda.device(device)

    def pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def event(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record()
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream().wait_event(event)

    def finish(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def record(self, run: Callable[[], Tensor], pool: Any) -> tuple[Tensor, Callable[[], None]]:
        """Return what `run` returns, and a function that does its work again.

        It runs three times before: libraries choose their kernels and get their memory then, which they
        cannot while they are recorded. One thread at a time: all networks are recorded on the same stream of
        a device.
        """
        with self._recording:
            return self._record(run, pool)

    def _record(self, run: Callable[[], Tensor], pool: Any) -> tuple[Tensor, Callable[[], None]]:
        device = torch.device("cuda", torch.cuda.current_device())
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream()
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        graph = torch.cuda.CUDAGraph()
        # On the same stream, for which all has been made ready; other threads may use the device meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            output = run()
        torch.cuda.current_stream().wait_stream(stream)
        return output, graph.replay

    def time(self, replay: Callable[[], None]) -> float:
        """Milliseconds, the median of some."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(22)]
        replay()
        for event in events:
            event.record()
            replay()
        torch.cuda.current_stream().synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


_gpu: Any = _Cuda()
