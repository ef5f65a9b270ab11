"""Next-token logits of a language model, a few tokens at a time, with or without a cache.

A `Decoder` hides which graph answers: decode.onnx, which keeps keys and values of what it has seen,
or infer.onnx, which reads everything again. Their tokens are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlora.adapter import Array
from fedlora.device.runtime import OpenBundle, run_graph
from fedlora.errors import FormatError

__all__ = ["Decoder", "Read"]

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Read:
    """What was read so far: rows of the same length."""

    ids: Ids  # (rows, time)
    logits: Array  # (rows, vocabulary), of the token after the last one
    cache: Mapping[str, Array]  # past_key_values.I.key and .value; empty without decode.onnx

    def rows(self, chosen: npt.NDArray[np.intp]) -> Read:
        """Return some rows, in that order; one may be taken several times."""
        cache = {name: value[chosen] for name, value in self.cache.items()}
        return Read(self.ids[chosen], self.logits[chosen], cache)


class Decoder:
    """Reads tokens with one adapter, whose factors are `feeds`."""

    def __init__(self, bundle: OpenBundle, feeds: Mapping[str, Array]) -> None:
        name = bundle.manifest.graph_of("decode")
        self.cached = name is not None
        self._session = bundle.session(name or bundle.manifest.graph_of("infer") or "infer.onnx")
        self.feeds = feeds
        self._last: Read | None = None
        self._empty = {
            value.name: _empty(value, str(bundle.folder / (name or "")))
            for value in self._session.get_inputs()
            if value.name.startswith("past_key_values.")
        }

    def start(self, ids: Ids) -> Read:
        """Read the first tokens: (rows, time), time >= 1."""
        cache = {
            name: np.zeros((len(ids), *shape), np.float32) for name, shape in self._empty.items()
        }
        return self._run(ids, ids, cache)

    def resume(self, ids: Ids) -> Read:
        """Read one row, (1, time); what the last call of this read already is not read again.

        Its numbers can differ in the last bit from those of `start`, which reads all at once.
        """
        last = self._last
        if last is None or not last.cache:
            read = self.start(ids)
        else:
            width = min(last.ids.shape[1], ids.shape[1])
            differ = np.flatnonzero(last.ids[0, :width] != ids[0, :width])
            same = int(differ[0]) if len(differ) else width
            if same == ids.shape[1] == last.ids.shape[1]:
                return last
            same = min(same, ids.shape[1] - 1)  # one is read at least: its logits are wanted
            if not same:
                read = self.start(ids)
            else:
                cache = {
                    name: np.ascontiguousarray(value[:, :, :same])
                    for name, value in last.cache.items()
                }
                read = self._run(ids, ids[:, same:], cache)
        self._last = read
        return read

    def more(self, read: Read, ids: Ids) -> Read:
        """Read more tokens of each row: (rows, time), time >= 1."""
        return self._run(np.concatenate([read.ids, ids], axis=1), ids, read.cache)

    def _run(self, ids: Ids, new: Ids, cache: Mapping[str, Array]) -> Read:
        if not self.cached:
            logits = run_graph(self._session, ["logits"], {"inputs": ids, **self.feeds})[0]
            return Read(ids, logits[:, -1], {})
        present = [name.replace("past_key_values", "present") for name in cache]
        feeds: dict[str, Any] = {"inputs": new, **cache, **self.feeds}
        logits, *values = run_graph(self._session, ["logits", *present], feeds)
        return Read(ids, logits, dict(zip(cache, values, strict=True)))


def _empty(value: Any, where: str) -> tuple[int, ...]:
    """Return the shape of an empty cache without its rows: (heads, 0, size)."""
    shape = value.shape
    if len(shape) != 4 or type(shape[1]) is not int or type(shape[3]) is not int:
        raise FormatError(
            f"{where}: {value.name[:80]!r}: expected (rows, heads, past, size) with fixed heads "
            f"and size, found {shape}; export the bundle again"
        )
    return (shape[1], 0, shape[3])
