"""Ways in which a reply can be wrong: a named table, for injected faults and for tests.

Each takes a copy of a right reply to a training message and spoils one thing. Where a check would
hide another, the first is made to pass: numbers are changed together with their digest, so that it
is the numbers that get a client refused. The server has to refuse every one of them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

__all__ = ["CORRUPTIONS", "corrupt", "corruptions_of"]

_Change: TypeAlias = Callable[[Any, np.random.Generator], None]  # of a RecordDict, in place


@dataclass(frozen=True, slots=True)
class _Corruption:
    change: _Change
    needs: tuple[str, str] | None = None  # a record and a key of it, without which it means nothing
    without: str | None = None  # a record with which it means nothing


def corruptions_of(content: RecordDict) -> tuple[str, ...]:
    """Return the names of the corruptions that this reply can have; none: it is no usual reply."""
    if not {"factors", "layout"} <= set(content):
        return ()
    return tuple(name for name, kind in CORRUPTIONS.items() if _fits(kind, content))


def corrupt(content: RecordDict, name: str, generator: np.random.Generator) -> RecordDict:
    """Return a copy of a reply with the corruption `name`; the reply itself stays as it is.

    generator: draws the place. Raises `KeyError` and whatever a reply raises that is not one.
    """
    copy = RecordDict({key: record.copy() for key, record in content.items()})
    CORRUPTIONS[name].change(copy, generator)
    return copy


def _fits(kind: _Corruption, content: RecordDict) -> bool:
    if kind.without is not None and kind.without in content:
        return False
    if kind.needs is None:
        return True
    record: Any = content.get(kind.needs[0])
    return record is not None and kind.needs[1] in record


def _number(content: Any, generator: np.random.Generator, *, record: str, value: float) -> None:
    """Put `value` at a drawn place, and make the digest anew: a client that itself went wrong."""
    array = content[record]["factors"]
    header, body = _parts(array)
    numbers = np.frombuffer(body, "<f4").copy()
    numbers[generator.integers(len(numbers))] = value
    _replace(content, record, array, header + numbers.tobytes())
    layout = content["layout"]
    hashed = hashlib.sha256("\n".join(layout["segments"]).encode() + numbers.tobytes())
    content["layout" if record == "factors" else f"{record}-digest"]["digest"] = hashed.hexdigest()


def _other_shape(content: Any, generator: np.random.Generator) -> None:
    _, body = _parts(content["factors"]["factors"])
    content["factors"]["factors"] = FlowerArray(np.frombuffer(body, np.uint8)[:-4].view("<f4"))


def _other_type(content: Any, generator: np.random.Generator) -> None:
    _, body = _parts(content["factors"]["factors"])
    content["factors"]["factors"] = FlowerArray(np.frombuffer(body, "<f4").astype(np.float64))


def _truncated(content: Any, generator: np.random.Generator) -> None:
    array = content["factors"]["factors"]
    _replace(content, "factors", array, array.data[: int(generator.integers(len(array.data)))])


def _bit(content: Any, generator: np.random.Generator) -> None:
    """Flip one bit on the way: the digest stays."""
    array = content["factors"]["factors"]
    header, body = _parts(array)
    changed = bytearray(body)
    changed[generator.integers(len(changed))] ^= 1 << int(generator.integers(8))
    _replace(content, "factors", array, header + bytes(changed))


def _other_layers(content: Any, generator: np.random.Generator) -> None:
    texts = list(content["layout"]["segments"])
    place = int(generator.integers(len(texts)))
    texts[place] = f"other.{texts[place]}"
    _set(content, generator, record="layout", key="segments", value=texts)


def _other_scaling(content: Any, generator: np.random.Generator) -> None:
    scalings = [2.0 * scaling for scaling in content["layout"]["scalings"]]
    _set(content, generator, record="layout", key="scalings", value=scalings)


def _earlier_round(content: Any, generator: np.random.Generator) -> None:
    content["layout"]["round"] = content["layout"]["round"] - 1


def _unasked_control(content: Any, generator: np.random.Generator) -> None:
    content["control"] = ArrayRecord({"factors": content["factors"]["factors"]})
    content["control-digest"] = ConfigRecord({"digest": content["layout"]["digest"]})


def _without(content: Any, generator: np.random.Generator, *, record: str) -> None:
    del content[record]


def _without_key(content: Any, generator: np.random.Generator, *, record: str, key: str) -> None:
    del content[record][key]


def _set(
    content: Any, generator: np.random.Generator, *, record: str, key: str, value: Any
) -> None:
    content[record][key] = value


def _parts(array: Any) -> tuple[bytes, bytes]:
    """Return the header and the numbers of an array of 4-byte numbers."""
    size = 4 * math.prod(array.shape)
    return array.data[: len(array.data) - size], array.data[len(array.data) - size :]


def _replace(content: Any, record: str, like: Any, data: bytes) -> None:
    content[record]["factors"] = FlowerArray(like.dtype, tuple(like.shape), like.stype, data)


_STEPS = ("metrics", "steps")  # with privacy a reply has no metrics
_EXAMPLES = ("metrics", "num-examples")
_CONTROL = ("control", "factors")

CORRUPTIONS: Mapping[str, _Corruption] = {
    "nan": _Corruption(partial(_number, record="factors", value=math.nan)),
    "infinity": _Corruption(partial(_number, record="factors", value=-math.inf)),
    "1e30": _Corruption(partial(_number, record="factors", value=1e30)),
    "other shape": _Corruption(_other_shape),
    "other type": _Corruption(_other_type),
    "truncated": _Corruption(_truncated),
    "flipped bit": _Corruption(_bit),
    "other digest": _Corruption(partial(_set, record="layout", key="digest", value="0" * 64)),
    "other layers": _Corruption(_other_layers),
    "other scalings": _Corruption(_other_scaling),
    "other base": _Corruption(partial(_set, record="layout", key="base", value="f" * 64)),
    "earlier round": _Corruption(_earlier_round),
    "no factors": _Corruption(partial(_without, record="factors")),
    "no layout": _Corruption(partial(_without, record="layout")),
    "no metrics": _Corruption(partial(_without, record="metrics"), needs=_STEPS),
    "no steps": _Corruption(partial(_without_key, record="metrics", key="steps"), needs=_STEPS),
    "negative steps": _Corruption(
        partial(_set, record="metrics", key="steps", value=-1), needs=_STEPS
    ),
    "infinite loss": _Corruption(
        partial(_set, record="metrics", key="loss", value=math.inf), needs=_STEPS
    ),
    "negative seconds": _Corruption(
        partial(_set, record="metrics", key="seconds", value=-1.0), needs=("metrics", "seconds")
    ),
    # With equal weights there is no such number, and one that is sent all the same is not used.
    "negative examples": _Corruption(
        partial(_set, record="metrics", key="num-examples", value=-50), needs=_EXAMPLES
    ),
    "huge examples": _Corruption(
        partial(_set, record="metrics", key="num-examples", value=10**12), needs=_EXAMPLES
    ),
    "nan in control": _Corruption(
        partial(_number, record="control", value=math.nan), needs=_CONTROL
    ),
    "no control": _Corruption(partial(_without, record="control"), needs=_CONTROL),
    "unasked control": _Corruption(_unasked_control, without="control"),
}
