"""The processes of a training, started by `torchrun`; or the one, started without it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this one is, and its device."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes the files and the messages."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes, on the CPU."""
        if self.count > 1:
            values = values.to(self.device, copy=True)
            dist.all_reduce(values)
        return values.cpu()

    def gather(self, here: Any) -> list[Any]:
        """Return what each process has, in their order."""
        if self.count == 1:
            return [here]
        everybodys = [None] * self.count
        dist.all_gather_object(everybodys, here)
        return everybodys


@contextmanager
def processes() -> Iterator[Processes]:
    """Join the processes that `torchrun` started: with NCCL where there are GPUs, else with gloo."""
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    together = "WORLD_SIZE" in os.environ
    if together:
        store, *_ = next(dist.rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            # `torchrun` keeps the store when it restarts the processes, with the addresses of those before
            # (pytorch #135712). Several machines count restarts differently.
            store = dist.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    try:
        yield Processes(rank, count, device)
    finally:
        if together:
            dist.destroy_process_group()
