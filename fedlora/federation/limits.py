"""What a device's owner allows: when the device may train, and from how much data on.

The owner's node config says it, and no message can change it:

    min-battery=30         percent of charge, on battery and on the cable alike
    on-power="true"        only while it is on external power
    unmetered="true"       only while the network is not paid for by volume
    metered-file="PATH"    a file that says whether it is (yes or no), instead of NetworkManager
    hours="22-7"           only in these hours of local time; "22:30-6:15"; may pass midnight
    min-examples=20        only with so many training examples
    min-noise-multiplier=1 only with local noise, and never with less
    max-clipping-norm=0.5  only with local noise, clipped to no more

A device that may not train declines: it answers with one of five fixed words and nothing else, and
the server counts that neither as a failure nor against the device. It is decided before a base or
data is opened, except for the number of examples.

**What cannot be read is not allowed.** A limit is the owner's promise to a person, so a battery, a
cable or a network that is limited and cannot be asked means that the device declines; its log says
why. A machine with no battery, in a system that says which batteries there are, is on power.

This module needs Flower's records and NumPy and nothing else, so that declining is cheap.
"""

from __future__ import annotations

import contextlib
import logging
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, time
from pathlib import Path

from flwr.app import ConfigRecord, RecordDict

from fedlora.errors import ConfigError
from fedlora.privacy.local import NO_LIMITS, NoiseLimits

__all__ = [
    "DECLINED",
    "REASONS",
    "Limits",
    "Power",
    "declined_content",
    "is_metered",
    "owners_limits",
    "read_declined",
    "read_power",
    "reason_to_decline",
    "tells_nothing",
]

REASONS = ("battery", "power", "metered", "hours", "examples")  # all that a device tells
DECLINED = "declined: "  # before the word, in the reasons of rounds.jsonl
POWER_SUPPLY = Path("/sys/class/power_supply")
_RECORD = "declined"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """An owner's limits; the defaults allow everything."""

    min_battery: float = 0.0  # percent
    on_power: bool = False
    unmetered: bool = False
    metered_file: Path | None = None
    hours: tuple[time, time] | None = None  # local time, from and until
    min_examples: int = 0
    noise: NoiseLimits = NO_LIMITS  # without it a round is refused with the reason, not declined


@dataclass(frozen=True, slots=True)
class Power:
    """A device's power; None: it cannot be read."""

    battery: float | None  # percent, the mean where there are several; 100 without one
    external: bool | None  # on a cable or a dock; True without a battery


def owners_limits(node_config: Mapping[str, object]) -> Limits:
    """Read the limits. Raises `ConfigError` for a value that makes no sense: none is ignored."""
    path = node_config.get("metered-file")
    return Limits(
        min_battery=_number(node_config, "min-battery", 100),
        on_power=_flag(node_config, "on-power"),
        unmetered=_flag(node_config, "unmetered"),
        metered_file=Path(str(path)) if path else None,
        hours=_hours(node_config.get("hours")),
        min_examples=int(_number(node_config, "min-examples", 2**53)),
        noise=_noise(node_config),
    )


def reason_to_decline(
    limits: Limits, *, now: datetime | None = None, power_supply: Path = POWER_SUPPLY
) -> str | None:
    """Return the word for why this device may not train now; None: it may.

    The number of examples is not looked at. now: local time, that of the clock by default.
    """
    if limits.hours is not None and not _within(limits.hours, (now or datetime.now()).time()):
        return "hours"
    if limits.on_power or limits.min_battery > 0:
        power = read_power(power_supply)
        if limits.on_power and not power.external:
            _say_unread("on-power", power.external, f"in {power_supply}")
            return "power"
        if limits.min_battery > 0 and not (power.battery or 0.0) >= limits.min_battery:
            _say_unread("min-battery", power.battery, f"in {power_supply}")
            return "battery"
    if limits.unmetered:
        metered = is_metered(limits.metered_file)
        if metered is not False:
            where = limits.metered_file or "from NetworkManager; name a metered-file"
            _say_unread("unmetered", metered, str(where))
            return "metered"
    return None


def tells_nothing(node_config: Mapping[str, object]) -> bool:
    """Whether the owner lets nothing of this device alone leave it: neither counts nor scores.

    So it is with trusted-keys, and with a demand for local noise. Raises `ConfigError` as
    `owners_limits` does.
    """
    return bool(node_config.get("trusted-keys")) or owners_limits(node_config).noise != NO_LIMITS


def declined_content(reason: str) -> RecordDict:
    """Return what a device that declines sends. Raises `ValueError` for a word of its own."""
    if reason not in REASONS:
        raise ValueError(f"expected one of {', '.join(REASONS)}, found {reason!r}")
    return RecordDict({_RECORD: ConfigRecord({"reason": reason})})


def read_declined(content: RecordDict) -> str | None:
    """Return the word of a reply that declines; None: it is none, or one with more in it."""
    record = content.get(_RECORD)
    if len(content) != 1 or not isinstance(record, ConfigRecord) or set(record) != {"reason"}:
        return None
    reason = record["reason"]
    return reason if isinstance(reason, str) and reason in REASONS else None


def read_power(folder: Path = POWER_SUPPLY) -> Power:
    """Read Linux's power supplies; batteries of a mouse or a keyboard do not count."""
    try:
        supplies = sorted(folder.iterdir())
    except OSError:  # not Linux: nothing is known
        return Power(None, None)
    charges: list[float | None] = []
    states: list[str] = []
    cables: list[bool] = []
    for supply in supplies:
        kind = _word(supply / "type")
        if _word(supply / "scope") == "Device" or _word(supply / "present") == "0":
            continue
        if kind == "Battery":
            charges.append(_percent(supply / "capacity"))
            states.append(_word(supply / "status"))
        elif kind != "UPS":  # mains, USB, wireless
            cables.append(_word(supply / "online") not in ("", "0"))
    if not charges:
        return Power(100.0, True)
    known = [charge for charge in charges if charge is not None]
    battery = sum(known) / len(known) if len(known) == len(charges) else None
    return Power(battery, _external(cables, states))


def is_metered(file: Path | None = None) -> bool | None:
    """Whether the network is paid for by volume: by the owner's file, or else by NetworkManager.

    None: unknown. What NetworkManager guesses counts as what it knows.
    """
    if file is not None:
        return {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}.get(
            _word(file).lower()
        )
    name = "org.freedesktop.NetworkManager"
    command = ["busctl", "get-property", name, f"/{name.replace('.', '/')}", name, "Metered"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    # NMMetered: 0 unknown, 1 yes, 2 no, 3 guessed yes, 4 guessed no.
    told = {"u 1": True, "u 3": True, "u 2": False, "u 4": False}
    return told.get(done.stdout.strip()) if done.returncode == 0 else None


def _external(cables: list[bool], states: list[str]) -> bool | None:
    """Whether there is power from outside; where no cable is listed, by what the batteries do."""
    if cables:
        return any(cables)
    if "Discharging" in states:
        return False
    return True if any(s in ("Charging", "Full", "Not charging") for s in states) else None


def _within(hours: tuple[time, time], now: time) -> bool:
    """Whether `now` lies in the hours, their end excluded."""
    start, end = hours
    if start < end:
        return start <= now < end
    return now >= start or now < end  # past midnight


def _say_unread(key: str, found: object, where: str) -> None:
    if found is None:
        _log.warning("node config %s: declined, since it cannot be read %s", key, where)


def _word(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()[:100]
    except OSError:
        return ""


def _percent(path: Path) -> float | None:
    word = _word(path)
    return min(float(word), 100.0) if word.isascii() and word.isdigit() else None


def _number(node_config: Mapping[str, object], key: str, most: int) -> float:
    found = node_config.get(key, 0)
    try:
        number = float(str(found))
    except ValueError:
        number = -1.0
    if isinstance(found, bool) or not 0 <= number <= most:
        raise ConfigError(f"node config {key}: expected a number from 0 to {most}, found {found!r}")
    return number


def _noise(node_config: Mapping[str, object]) -> NoiseLimits:
    most = _number(node_config, "max-clipping-norm", 10**6)
    if "max-clipping-norm" in node_config and not most:
        raise ConfigError("node config max-clipping-norm: expected a number over 0, found 0")
    return NoiseLimits(_number(node_config, "min-noise-multiplier", 10**6), most or None)


def _flag(node_config: Mapping[str, object], key: str) -> bool:
    word = node_config.get(key, False)
    known = {"true": True, "false": False}
    if str(word).lower() not in known:
        raise ConfigError(f"node config {key}: expected true or false, found {word!r}")
    return known[str(word).lower()]


def _hours(found: object) -> tuple[time, time] | None:
    if found is None:
        return None
    match = re.fullmatch(r"(\d\d?)(?::(\d\d))?-(\d\d?)(?::(\d\d))?", str(found), re.ASCII)
    if match is not None:
        with contextlib.suppress(ValueError):
            start, end = _time(match[1], match[2]), _time(match[3], match[4])
            if start != end:
                return start, end
    raise ConfigError(
        f"node config hours: expected two times as in '22-7' or '8:30-17', found {found!r}"
    )


def _time(hour: str, minute: str | None) -> time:
    """Raises `ValueError` for no time of a day; 24 is midnight."""
    return time(0 if hour == "24" and not int(minute or 0) else int(hour), int(minute or 0))
