"""A secure sum: the server learns what a cohort's vectors add up to, and no vector of one client.

After Bonawitz et al. 2017 (doi:10.1145/3133956.3133982), with the sparse graph of Bell et al. 2020
(arXiv:2007.06210). Five phases, a message to and from every client in each:

    keys     every client advertises two public keys and a commitment (`ClientSession.begin`)
    shares   every client splits its two secrets among its neighbors (`share`)
    masked   every client sends its vector under a mask of its own and one a neighbor (`mask`)
    agree    who is left tells its neighbors, by tags, who it was told is left (`agree`)
    unmask   who is left reveals one share a neighbor (`reveal`): of the own mask of a survivor, or
             of the key behind the pairwise masks of a dropout, and never of both

A client that is lost in any phase costs its own vector only, as long as `Terms.threshold` clients
are left to the end. Below it nothing is revealed.

**What is promised.** n clients, threshold t, c of them on the server's side, c < 2 t - n. Complete
graph: the server opens sums of t - c honest clients or more only, whatever it tells whom. (Two
honest clients that reveal have each seen t equal tags; 2 t - n > c of those who made them are the
same, one of them is honest and has made one, so both were told the same lists and keys. So no
client's two secrets are both opened. Those t - c or more honest clients that agreed have masks with
one another, of which none is opened: their vectors come in one sum. One that was told of other
sharers has masks with t - 1 others at least, and only n - t + c - 1 can be opened or colluding: it
is tied to that sum.) Sparse graph: see `graph`. There a client compares with its neighbors alone:
the server is taken to tell all the same lists, and not to choose who sits where on the ring.
In both, without identities (`known`) the server is taken to pass on the clients' own keys: one that
invents clients learns what it wants to. The sum itself is exact, and public to the server: what it
tells about a person is the concern of noise, not of masks.

Everything here is NumPy and `cryptography` (extra ``privacy``), and knows nothing of messages.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedlora.errors import MissingExtraError

if TYPE_CHECKING:
    from fedlora.privacy.secure.client import ClientSession
    from fedlora.privacy.secure.keys import Advertisement, Identity
    from fedlora.privacy.secure.quantize import Quantizer
    from fedlora.privacy.secure.server import SecureTotal, ServerSession
    from fedlora.privacy.secure.terms import Terms

__all__ = [
    "Advertisement",
    "ClientSession",
    "Identity",
    "Quantizer",
    "SecureTotal",
    "ServerSession",
    "Terms",
]

_WHERE = {
    "Advertisement": "keys",
    "ClientSession": "client",
    "Identity": "keys",
    "Quantizer": "quantize",
    "SecureTotal": "server",
    "ServerSession": "server",
    "Terms": "terms",
}


def __getattr__(name: str) -> Any:
    """Import a public name. Raises `MissingExtraError` without `cryptography`."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "cryptography":
            raise
        raise MissingExtraError("secure aggregation", "privacy") from None
