"""The ledger of a run, ``OUT/privacy.jsonl``: a line for each release of people's data.

    {"round": 3, "mechanism": "central", "sampling": "poisson", "sampling_probability": 0.01,
     "cohort": null, "population": null, "count": 1, "noise_multiplier": 0.8,
     "neighboring_relation": "add-or-remove-one", "clipping_norm": 0.5, "noise_std": 0.4,
     "notes": []}

A line is on the disk before anything of its round is: a release that the ledger forgot would be
worse than one that it counts and nobody saw. What is newer than the checkpoint was never released,
so `drop_after` takes it out on resume, and the round done again is charged once.

The noise multiplier of a line is that of its release alone. Where a round releases two things of
one cohort (``central`` and the noised bit of adaptive clipping, ``count``), they are one Gaussian
of a larger vector for the accountant: drawn once, and with μ² added up (`released_together`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from fedlora.errors import ConfigError, RunError
from fedlora.files import sync_folder, write_atomic
from fedlora.privacy.accounting import epsilon_of, grouped
from fedlora.privacy.events import PrivacyEvent

__all__ = ["LEDGER", "Ledger", "LedgerLine", "Mechanism", "released_together"]

LEDGER = "privacy.jsonl"

# central: noise on the sum, at the server; local: on each update, on its device; count: on the
# number of updates below the clipping norm, for adaptive clipping
Mechanism = Literal["central", "local", "count"]


@dataclass(frozen=True, slots=True)
class LedgerLine:
    """One release. Raises `ConfigError` for values that make no sense together."""

    round: int  # 1-based
    event: PrivacyEvent
    clipping_norm: float  # that each client's part was clipped to; of a bit, half its range: 0.5
    noise_std: float  # of each number that was released: noise_multiplier times clipping_norm
    mechanism: Mechanism = "central"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.round < 1:
            raise ConfigError(f"round: expected a whole number >= 1, found {self.round!r}")
        if self.mechanism not in get_args(Mechanism):
            raise ConfigError(
                f"mechanism: expected one of {', '.join(get_args(Mechanism))}, found "
                f"{self.mechanism!r}"
            )
        if self.event.count < 1:
            raise ConfigError(f"count: expected a whole number >= 1, found {self.event.count!r}")
        if not 0 < self.clipping_norm < math.inf:
            raise ConfigError(
                f"clipping_norm: expected a finite number > 0, found {self.clipping_norm!r}"
            )
        expected = self.event.noise_multiplier * self.clipping_norm
        # 1e-6: whoever took the product in another order is right as well
        if not math.isclose(self.noise_std, expected, rel_tol=1e-6) or math.isinf(expected):
            raise ConfigError(
                "noise_std: expected noise_multiplier times clipping_norm, a finite "
                f"{expected!r}, found {self.noise_std!r}"
            )


@dataclass(frozen=True, slots=True)
class Ledger:
    """The lines of a run so far, in the order of their rounds, and the file that holds them."""

    path: Path
    lines: tuple[LedgerLine, ...] = ()

    @classmethod
    def read(cls, out: str | os.PathLike[str]) -> Ledger:
        """Read the ledger of the run folder `out`; a missing one is empty.

        A last line without its end was never finished, and is left out. Raises `RunError` with the
        file and the line's number for any other line that is not one.
        """
        path = Path(out) / LEDGER
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return cls(path)
        except OSError as error:
            raise RunError(f"{path}: cannot be read: {error.strerror or error}") from None
        ledger = cls(path)
        lines: list[LedgerLine] = []
        for number, line in enumerate(data.split(b"\n")[:-1], start=1):
            try:
                found = _line(line)
                _require_next(lines, found)
            except (ValueError, ConfigError, RecursionError) as error:
                raise RunError(
                    f"{path}, line {number}: not a release: {' '.join(str(error).split())[:300]}; "
                    "the file was changed or damaged: restore it, or start a new run"
                ) from None
            lines.append(found)
        return dataclasses.replace(ledger, lines=tuple(lines))

    def append(self, line: LedgerLine) -> Ledger:
        """Return the ledger with one more line, which is on the disk by then.

        Raises `RunError` for a second line of a round and mechanism, one of an earlier round, and
        when the file system refuses.
        """
        try:
            _require_next(self.lines, line)
        except ConfigError as error:
            raise RunError(f"{self.path}: {error}") from None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as file:
                _cut_torn_line(file)
                file.write(_bytes(line))
                file.flush()
                os.fsync(file.fileno())
            if not self.lines:
                sync_folder(self.path.parent)  # the file itself is new in it
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot be written: {error.strerror or error}; nothing of round "
                f"{line.round} is released"
            ) from None
        return dataclasses.replace(self, lines=(*self.lines, line))

    def charge(self, line: LedgerLine) -> Ledger:
        """Return the ledger with one more release of a local round, on the disk by then.

        What devices have sent cannot be taken back: where the round was begun before and cut off,
        its line gets the count of both, in one replacement of the file. Else as `append`.
        """
        last = self.lines[-1] if self.lines else None
        if last is None or last.round != line.round or line.mechanism != "local":
            return self.append(line)
        if dataclasses.replace(last, event=line.event) != line:
            raise RunError(f"{self.path}: expected the same noise in round {line.round} again")
        event = dataclasses.replace(line.event, count=last.event.count + line.event.count)
        lines = (*self.lines[:-1], dataclasses.replace(line, event=event))
        write_atomic(self.path, b"".join(map(_bytes, lines)))
        return dataclasses.replace(self, lines=lines)

    def drop_after(self, round: int) -> Ledger:
        """Return the ledger without the rounds after `round`, and replace the file by it at once.

        For resuming from the checkpoint of `round`: what came after it was never released.
        """
        kept = tuple(line for line in self.lines if line.round <= round)
        if self.path.exists():
            write_atomic(self.path, b"".join(map(_bytes, kept)))
        return dataclasses.replace(self, lines=kept)

    def events(self) -> tuple[PrivacyEvent, ...]:
        """Return what the accountant composes: one event a round, equal ones grouped."""
        rounds = groupby(self.lines, key=lambda line: line.round)
        together = (released_together([line.event for line in lines]) for _, lines in rounds)
        return grouped(together)

    def spent(self, delta: float, accountant: str = "pld") -> float:
        """Return ε of everything so far at `delta`. Raises `ConfigError` as `epsilon_of` does."""
        return epsilon_of(self.events(), delta, accountant)


def released_together(events: Sequence[PrivacyEvent]) -> PrivacyEvent:
    """Return the one event of several Gaussian releases about the same drawn cohort.

    The μ² of independent Gaussians on one vector add up, so 1/z² = Σ 1/z_i² (arXiv:1905.03871,
    Theorem 1). Raises `ConfigError` unless they agree in all but the noise.
    """
    first = events[0]
    shapes = {dataclasses.replace(event, noise_multiplier=1.0) for event in events}
    if len(shapes) > 1:
        raise ConfigError(
            "events: expected releases of one round to be of one cohort (sampling, probability, "
            f"sizes, count), found {len(shapes)} different ones"
        )
    if len(events) == 1 or any(event.noise_multiplier == 0 for event in events):
        return min(events, key=lambda event: event.noise_multiplier)
    precision = math.fsum(event.noise_multiplier**-2 for event in events)
    return dataclasses.replace(first, noise_multiplier=precision**-0.5 if precision else math.inf)


_KINDS: Mapping[str, tuple[type, ...]] = {
    "round": (int,),
    "mechanism": (str,),
    "sampling": (str,),
    "sampling_probability": (int, float),
    "cohort": (int, type(None)),
    "population": (int, type(None)),
    "count": (int,),
    "noise_multiplier": (int, float),
    "neighboring_relation": (str,),
    "clipping_norm": (int, float),
    "noise_std": (int, float),
    "notes": (list,),
}
_EVENT = tuple(field.name for field in dataclasses.fields(PrivacyEvent))


def _bytes(line: LedgerLine) -> bytes:
    values = {name: getattr(line.event, name) for name in _EVENT}
    values |= {
        "neighboring_relation": line.event.neighboring_relation,
        "round": line.round,
        "mechanism": line.mechanism,
        "clipping_norm": line.clipping_norm,
        "noise_std": line.noise_std,
        "notes": list(line.notes),
    }
    return json.dumps({name: values[name] for name in _KINDS}, allow_nan=False).encode() + b"\n"


def _line(data: bytes) -> LedgerLine:
    table = json.loads(data, object_pairs_hook=_once, parse_constant=_no_constant)
    if not isinstance(table, dict):
        raise ValueError(f"expected an object, found {table!r}")
    if missing := [name for name in _KINDS if name not in table]:
        raise ValueError(f"expected the key {missing[0]!r}, found none")
    if unknown := [name for name in table if name not in _KINDS]:
        raise ValueError(f"expected no key {unknown[0]!r}")
    for name, kinds in _KINDS.items():
        if type(table[name]) not in kinds:
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ValueError(f"{name}: expected {wanted}, found {table[name]!r}")
    if not all(isinstance(note, str) for note in table["notes"]):
        raise ValueError(f"notes: expected texts, found {table['notes']!r}")
    if table["sampling"] not in ("poisson", "fixed", "all"):
        raise ValueError(f"sampling: expected poisson, fixed or all, found {table['sampling']!r}")
    try:
        event = PrivacyEvent(**{name: table[name] for name in _EVENT})
        line = LedgerLine(
            table["round"],
            event,
            table["clipping_norm"],
            table["noise_std"],
            table["mechanism"],
            tuple(table["notes"]),
        )
    except OverflowError as error:
        raise ValueError(f"a number is too large: {error}") from None
    if table["neighboring_relation"] != event.neighboring_relation:
        raise ValueError(
            f"neighboring_relation: expected {event.neighboring_relation} of sampling "
            f"{event.sampling}, found {table['neighboring_relation']!r}"
        )
    return line


def _require_next(lines: Sequence[LedgerLine], line: LedgerLine) -> None:
    """Raise `ConfigError` unless `line` may come after `lines`."""
    for before in reversed(lines):
        if before.round < line.round:
            return
        if before.round > line.round:
            raise ConfigError(
                f"round: expected {before.round} or later, found {line.round} after it"
            )
        if before.mechanism == line.mechanism:
            raise ConfigError(
                f"round: expected one {line.mechanism} line of round {line.round}, found a second "
                "one; a release is charged once"
            )


def _cut_torn_line(file: BinaryIO) -> None:
    """Cut off what stands after the last line's end: a line that a crash left unfinished."""
    size = end = file.seek(0, os.SEEK_END)
    while end:
        start = file.seek(max(0, end - 4096))
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end != size:
        file.truncate(end)
    file.seek(end)


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"expected the key {name!r} once, found it twice")
        table[name] = value
    return table


def _no_constant(name: str) -> float:
    raise ValueError(f"expected finite numbers, found {name}")
