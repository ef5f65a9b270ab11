"""Thousands of damaged and hostile files: a typed refusal or a valid adapter, and in time."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedlora.adapter import Adapter
from fedlora.errors import AdapterError, FormatError
from fedlora.formats.packed import decode_packed, encode_packed
from fedlora.formats.peft import decode_peft, encode_peft
from fedlora.formats.tensors import parse_tensors
from fedlora.randomness import rng
from tests.formats.mutants import mutate_packed, mutate_peft, packed_seeds, peft_seeds

KINDS = ("header bytes", "JSON values", "length", "meaning")
RESULTS = {"valid"} | {kind.__name__ for base in (AdapterError, FormatError)
                      for kind in (base, *base.__subclasses__())}  # fmt: skip
SECONDS = 0.1  # of processor time for one file


def read_packed(data: bytes) -> Adapter:
    adapter = decode_packed(parse_tensors(data)).adapter
    encode_packed(adapter)
    return adapter


def read_peft(data: tuple[bytes, bytes]) -> Adapter:
    config, weights = data
    adapter, _ = decode_peft(config, parse_tensors(weights))
    encode_peft(adapter)
    return adapter


FORMATS: dict[str, tuple[Callable[[], list[Any]], Callable[..., Any], Callable[..., Adapter]]] = {
    "packed": (packed_seeds, mutate_packed, read_packed),
    "peft": (peft_seeds, mutate_peft, read_peft),
}


@pytest.mark.parametrize("name", FORMATS)
def test_mutants_are_refused_or_valid(name, capsys):
    _run(name, 2_000, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_many_mutants_are_refused_or_valid(name, capsys):
    _run(name, 10_000, capsys)


def _run(name: str, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    seeds, mutate, read = FORMATS[name]
    sound = seeds()
    found: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    worst = 0.0
    # A collection of garbage that all of the test session left would count as this file's time.
    gc.freeze()
    for number in range(count):
        generator = rng(count, "fuzz", name, number)
        kind = number % len(KINDS)
        mutant = mutate(sound[number // len(KINDS) % len(sound)], kind, generator)
        before = time.thread_time()
        result = _outcome(read, mutant, number)
        seconds = time.thread_time() - before
        assert seconds < SECONDS, f"mutant {number} ({KINDS[kind]}) took {seconds:.3f} s"
        worst = max(worst, seconds)
        found[KINDS[kind]][result] += 1
    gc.unfreeze()
    with capsys.disabled():
        print(f"\n{name}: {count} mutants, the slowest took {1000 * worst:.1f} ms")
        for kind_name, counter in found.items():
            print(f"  {kind_name:<13}", dict(counter.most_common()))
    assert {result for counter in found.values() for result in counter} <= RESULTS
    refused = sum(counter.total() - counter["valid"] for counter in found.values())
    assert refused > 0.6 * count  # most mutants do damage


def _outcome(read: Callable[..., Adapter], mutant: Any, number: int) -> str:
    """Return "valid" or the type of the refusal; anything untyped goes up and fails the test."""
    try:
        adapter = read(mutant)
    except (AdapterError, FormatError) as error:
        message = str(error)
        is_one_line = message.isprintable() and len(message) < 1000
        return type(error).__name__ if is_one_line else f"mutant {number}: {message!r}"
    _check_valid(adapter)
    return "valid"


def _check_valid(adapter: Adapter) -> None:
    assert len(adapter) > 0
    for layer in adapter.layers.values():
        assert np.isfinite(layer.A).all()
        assert np.isfinite(layer.B).all()
        assert np.isfinite(layer.scaling)
    assert len(adapter.fingerprint()) == 64
    repr(adapter)
