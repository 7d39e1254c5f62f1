"""Show the progress of a long job."""

import sys


def show(text: str, *, keep: bool = False) -> None:
    """Print a line on the terminal, overwritten by the next unless `keep` is set.

    A log gets only the lines to keep.
    """
    if sys.stderr.isatty():
        print(f"\r{text:<70}", end="\n" if keep else "\r", file=sys.stderr, flush=True)
    elif keep:
        print(text, file=sys.stderr, flush=True)
