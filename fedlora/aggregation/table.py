"""The table of methods for documents, made from the methods themselves.

    python -m fedlora.aggregation.table docs/methods.md README.md

writes it between the lines ``<!-- methods -->`` and ``<!-- /methods -->`` of each file. What goes
up and down is counted: five clients of one rank play two rounds of each method on a small layer.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fedlora.adapter import Adapter, LoraConfig, LoraLayer
from fedlora.aggregation import ClientProfile, Method, ServerState, Update, methods
from fedlora.errors import FormatError
from fedlora.files import write_atomic
from fedlora.flat import segments_of
from fedlora.randomness import rng
from fedlora.targets import initial_A
from fedlora.training import Factor

__all__ = ["BEGIN", "END", "methods_table", "traffic", "with_table"]

BEGIN, END = "<!-- methods -->", "<!-- /methods -->"
_CLIENTS, _WIDTH, _RANK = 5, 256, 8
_HEAD = """\
| method | exact | linear | client ranks | up | down | use it for | paper |
|---|---|---|---|---|---|---|---|
"""
_FOOT = """
*exact*: the result is the mean of the clients' products, Σ p s B A. *linear*: a sum of the
clients' vectors is all that the server needs, as secure aggregation and central differential
privacy ask for. *up*, *down*: parameters a client and round; P is both factors of the adapter, A or
B one of them. A frozen part comes on top: the figure is after the first round of {clients} clients
of one rank, and grows from round to round, up to min(out, in) directions a layer or the method's
option `rank` or `energy`.
"""


def methods_table(of: Mapping[str, Method] | None = None) -> str:
    """Return the Markdown table of `of`, or of all methods with their default options."""
    rows = (_row(method) for method in (methods() if of is None else of).values())
    return _HEAD + "".join(rows) + _FOOT.format(clients=_CLIENTS)


def traffic(method: Method) -> tuple[tuple[float, float], ...]:
    """Return (up, down) of rounds 1 and 2, in adapters (P) per client."""
    state = ServerState.start(_start())
    per_adapter = state.trainable.num_parameters
    counted = []
    for number in (1, 2):
        sent = method.broadcast(state, ClientProfile("c0"))
        down = sent.trainable.num_parameters
        down += 0 if sent.frozen is None else sent.frozen.num_parameters
        up = sum(s.size for s in segments_of(sent.trainable, method.uploaded(number)))
        counted.append((up / per_adapter, down / per_adapter))
        state = method.aggregate(
            state, [_update(sent.trainable, method, number, k) for k in range(_CLIENTS)]
        )
    return tuple(counted)


def with_table(text: str, table: str) -> str:
    """Return `text` with `table` between its two marks. Raises `FormatError` without them."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise FormatError(f"expected one {BEGIN} and one {END} after it, found other marks")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table}{END}{rest.split(END)[1]}"


def _row(method: Method) -> str:
    (_, first), (_, second) = traffic(method)
    frozen = second - first
    down = _adapters(first) + (f" + {_adapters(frozen)} frozen" if frozen else "")
    cells = (
        f"`{method.name}`",
        "yes" if method.exact else "no",
        "yes" if method.linear else "no",
        "any" if method.any_rank else "equal",
        ", then ".join(dict.fromkeys(_factors(method.uploaded(round)) for round in (1, 2))),
        down,
        method.summary or "–",
        f"[{method.paper}](https://arxiv.org/abs/{method.paper})" if method.paper else "–",
    )
    return f"| {' | '.join(cells)} |\n"


def _factors(uploaded: frozenset[Factor]) -> str:
    return "P" if {"A", "B"} <= uploaded else " ".join(sorted(uploaded))


def _adapters(number: float) -> str:
    return "P" if number == 1 else f"{number:g} P"


def _start() -> Adapter:
    config = LoraConfig(rank=_RANK)
    A = initial_A("layer", _RANK, (_WIDTH,), 0)
    B = np.zeros((_WIDTH, _RANK), np.float32)
    return Adapter({"layer": LoraLayer(A, B, config.scaling_of("layer"))}, config)


def _update(sent: Adapter, method: Method, round: int, client: int) -> Update:
    """A client that gives every factor that it may train other values."""
    layer, draw = sent["layer"], rng(0, "table", round, client)
    A, B = (draw.normal(size=shape).astype(np.float32) for shape in (layer.A.shape, layer.B.shape))
    trained = method.trained(round)
    changed = LoraLayer(
        A if "A" in trained else layer.A, B if "B" in trained else layer.B, layer.scaling
    )
    return Update(Adapter({"layer": changed}, sent.config), 1.0, f"c{client}")


def _main(paths: list[str]) -> None:
    table = methods_table()
    for name in paths:
        path = Path(name)
        write_atomic(path, with_table(path.read_text(encoding="utf-8"), table).encode())
    if not paths:
        sys.stdout.write(table)


if __name__ == "__main__":
    _main(sys.argv[1:])
