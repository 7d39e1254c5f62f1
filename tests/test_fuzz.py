"""The fuzzer finds what it looks for; a few of its calls."""

import os
import signal
import time

import fuzz
import pytest
import torch
from threads import threads


def hunt(call, count):
    return fuzz.hunt(range(count), call, lambda number: f"call {number}", time.time() + 100)


def test_calls_that_kill_are_told():
    def call(number):
        if number in (3, 5):
            os.kill(os.getpid(), signal.SIGSEGV)
        if number == 6:
            raise AssertionError("wrong\nnumbers")
        return "a result"

    ends, findings = hunt(call, 8)
    assert ends == {"a result": 5, "finding": 3}
    assert findings[0] == "case 3 killed the process (SIGSEGV): call 3"
    assert findings[1] == "case 5 killed the process (SIGSEGV): call 5"
    assert findings[2] == "case 6: wrong\nnumbers"


def test_results_that_should_not_be_are_told(monkeypatch):
    networks = fuzz.small_networks()
    cases = [fuzz.Case(0, number, networks) for number in range(200)]
    changed = next(c for c in cases if c.network and c.broken and c.arguments[2] is not c.network[0].plan)
    with monkeypatch.context() as patch:
        patch.setattr(fuzz, "OPERATORS", _Anything())
        with pytest.raises(AssertionError, match="a plan that was changed is taken"):
            changed.call()
        on_meta = next(
            c for c in cases if any(isinstance(a, torch.Tensor) and a.is_meta for a in c.arguments)
        )
        with pytest.raises(AssertionError, match="a result on the CPU, an argument on meta"):
            on_meta.call()


class _Anything:
    """Operators that take everything."""

    def __getattr__(self, name):
        return lambda *arguments: torch.ones(1)


def test_calls():
    networks = fuzz.small_networks()
    with threads(1):  # those of this process are not in its children
        ends, findings = hunt(lambda number: fuzz.Case(1, number, networks).call(), 300)
    assert not findings and sum(ends.values()) == 300 and ends["a result"] > 50, (ends, findings)
