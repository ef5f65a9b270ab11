"""Over the air: signed releases of the global adapter, on The Update Framework (python-tuf).

`Publisher` makes a repository of plain files that any web server can serve. `DeviceUpdater` polls
it, and verifies and stages a release on a device; nothing is served before it is committed. Neither
needs torch or Flower. The names below are imported when they are asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedlora.errors import MissingExtraError

if TYPE_CHECKING:
    from fedlora.ota.keys import Keys
    from fedlora.ota.limits import Limits
    from fedlora.ota.publisher import Publisher
    from fedlora.ota.releases import Device, Release, Rollout, Stage
    from fedlora.ota.updater import DeviceUpdater, Poll

__all__ = [
    "Device",
    "DeviceUpdater",
    "Keys",
    "Limits",
    "Poll",
    "Publisher",
    "Release",
    "Rollout",
    "Stage",
]

_WHERE = {
    "Device": "releases",
    "DeviceUpdater": "updater",
    "Keys": "keys",
    "Limits": "limits",
    "Poll": "updater",
    "Publisher": "publisher",
    "Release": "releases",
    "Rollout": "releases",
    "Stage": "releases",
}


def __getattr__(name: str) -> Any:
    """Import a public name. Raises `MissingExtraError` without python-tuf."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("tuf", "securesystemslib", "cryptography"):
            raise
        raise MissingExtraError("over-the-air updating", "ota") from None
