"""That the mutations of `make mutate` can still be made, and are of all kernels."""

import mutate
from cases import modules


def test_mutations_fit_the_sources():
    for file, old, new, _ in mutate.MUTATIONS.values():
        assert mutate.mutated(mutate.ROOT / file, old, new) != (mutate.ROOT / file).read_text()
    names = {op.NAME for op in modules()}
    assert names <= set(mutate.MUTATIONS) and names == set(mutate.TRITON)
