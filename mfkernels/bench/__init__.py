"""The benchmark suite, `mfkernels bench`: our networks against other runtimes and other networks."""

from .run import Entry, bench, profile

__all__ = ["Entry", "bench", "profile"]
