"""The server's part of a secure sum: it passes on what it cannot read, and takes off the masks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedlora.errors import (
    ForgedKeyError,
    PhaseOrderError,
    RevealError,
    SecureSumError,
    ShapeMismatchError,
    ShareError,
    ThresholdError,
)
from fedlora.privacy.secure.agreement import TAG_BYTES
from fedlora.privacy.secure.keys import (
    Advertisement,
    commitment_of,
    mask_seed,
    opened_key,
    public_of,
    require_signed,
    self_mask_seed,
    shared_secret,
)
from fedlora.privacy.secure.masks import apply_masks
from fedlora.privacy.secure.quantize import Ring
from fedlora.privacy.secure.shamir import combine
from fedlora.privacy.secure.shares import (
    KEY,
    SELF,
    digests_in,
    share_digest,
    unpack_revealed,
)
from fedlora.privacy.secure.terms import Terms

__all__ = ["SecureTotal", "ServerSession"]

_PHASES = ("keys", "shares", "masked", "agree", "unmask", "total")
_AT_ONCE = 64  # masks that are taken off in one pass over the vector


@dataclass(frozen=True, slots=True)
class SecureTotal:
    """All that the server learns: the sum over the survivors."""

    sum: npt.NDArray[np.float64]  # (size,), each number off by less than count * quantizer.step
    count: int  # whose vectors are in it, as the sum itself says
    survivors: tuple[int, ...]  # the same clients by name


class ServerSession:
    """One round at the server: add what arrives, in the order of the phases.

    A phase ends when something of the next is asked for or added: `directory`, `shares_for`, the
    first masked vector, the first tags, the first revealed shares. What is late is refused with
    `PhaseOrderError`, as is a second message of a client in a phase. A refused message costs that
    client only: go on with the others. Read `survivors` and `dropouts` once, when no more vectors
    are awaited: one that is added later fits no revealed share.

    known: identities' public keys by client, as clients check them; None: none.
    """

    def __init__(self, terms: Terms, known: Mapping[int, bytes] | None = None) -> None:
        self.terms = terms
        self._known = known
        self._phase = "keys"
        self._directory: dict[int, Advertisement] = {}
        self._shares: dict[int, dict[int, bytes]] = {}
        self._sharing: frozenset[int] = frozenset()
        self._masked: set[int] = set()
        self._ring: Ring = np.zeros(terms.size + 1, terms.quantizer.dtype)
        self._tags: dict[int, dict[int, bytes]] = {}
        self._revealed: dict[int, dict[int, bytes]] = {}

    def add_advertisement(self, index: int, advertisement: Advertisement) -> None:
        """Take a client's keys; raises `ForgedKeyError`, `SecureTermsError`, `PhaseOrderError`."""
        self._require(index, "keys", index in self._directory)
        known = None
        if self._known is not None:
            known = self._known.get(index)
            if known is None:
                raise ForgedKeyError(
                    f"keys of client {index}: expected an identity that is registered, found none"
                )
        require_signed(self.terms, index, advertisement, known)
        new = {advertisement.share_key, advertisement.mask_key}
        for other in self._directory.values():
            if new & {other.share_key, other.mask_key}:
                raise ForgedKeyError(
                    f"keys of client {index}: expected keys of its own, found one of client "
                    f"{other.index}"
                )
        self._directory[index] = advertisement

    def directory(self) -> dict[int, Advertisement]:
        """Return everyone's keys, and end the phase; raises `ThresholdError` for too few."""
        self._require_enough(self._directory, "clients with keys")
        self._begin("shares")
        return dict(self._directory)

    def directory_for(self, index: int) -> dict[int, Advertisement]:
        """Return the keys that one client needs: its own and its neighbors'."""
        everyone = self.directory()
        return {holder: everyone[holder] for holder in self._holders(index) if holder in everyone}

    def add_shares(self, index: int, shares: Mapping[int, bytes]) -> None:
        """Take a client's messages by recipient; raises `ShareError`, `PhaseOrderError`."""
        self._require(index, "shares", index in self._shares)
        if index not in self._directory:
            raise ShareError(f"shares of client {index}: expected keys before, found none")
        expected = {other for other in self._holders(index) if other in self._directory}
        if wrong := expected ^ set(shares):
            raise ShareError(
                f"shares of client {index}: expected one for each of {len(expected)} holders "
                f"with keys, found {'one too many, for' if min(wrong) in shares else 'none for'} "
                f"client {min(wrong)}"
            )
        for recipient, message in shares.items():
            digests_in(index, recipient, message)
        self._shares[index] = {recipient: bytes(message) for recipient, message in shares.items()}

    @property
    def survivors_of_sharing(self) -> tuple[int, ...]:
        """Those between whom masks are put; asking ends the phase.

        A client that has too few holders left among them is not one: the sum could not be opened
        if it were lost later. Raises `ThresholdError` for too few.
        """
        if self._phase == "shares":
            self._require_enough(self._shares, "clients that shared their secrets")
            self._sharing = self._with_enough_holders()
            self._require_enough(self._sharing, "clients with enough holders of their shares")
            self._begin("masked")
        return tuple(sorted(self._sharing))

    def _with_enough_holders(self) -> frozenset[int]:
        left = set(self._shares)
        while True:
            short = {
                client
                for client in left
                if len(left.intersection(self._holders(client))) < self.terms.share_threshold
            }
            if not short:
                return frozenset(left)
            left -= short

    def shares_for(self, index: int) -> dict[int, bytes]:
        """Return the messages to one survivor of sharing, by sender."""
        sharing = self.survivors_of_sharing
        if index not in self._sharing:
            raise ShareError(
                f"shares for client {index}: expected one of the {len(sharing)} clients that "
                "shared their secrets, found one that did not"
            )
        return {
            sender: self._shares[sender][index]
            for sender in self._holders(index)
            if sender in self._sharing
        }

    def add_masked(self, index: int, vector: Ring) -> None:
        """Add a client's masked vector, (size + 1,) uint32 or uint64; the vector is not kept.

        Raises `ShapeMismatchError`, `ShareError` (it did not share before), `PhaseOrderError`.
        """
        self._require(index, "masked", index in self._masked)
        if index not in self._sharing:
            raise ShareError(f"vector of client {index}: expected shares before, found none")
        if (
            not isinstance(vector, np.ndarray)
            or vector.shape != self._ring.shape
            or vector.dtype != self._ring.dtype
        ):
            found = f"{getattr(vector, 'shape', None)} {getattr(vector, 'dtype', type(vector))}"
            raise ShapeMismatchError(
                f"vector of client {index}: expected {self._ring.shape} {self._ring.dtype}, found "
                f"{found}"
            )
        self._ring += vector
        self._masked.add(index)

    @property
    def survivors(self) -> tuple[int, ...]:
        """Whose vectors have arrived."""
        return tuple(sorted(self._masked))

    @property
    def dropouts(self) -> tuple[int, ...]:
        """Who shared secrets, but whose vector has not arrived."""
        return tuple(sorted(self._sharing - self._masked))

    def add_agreement(self, index: int, tags: Mapping[int, bytes]) -> None:
        """Take a survivor's tags by recipient; the first ones end the phase of vectors.

        Raises `RevealError` for tags that are missing, too many or of another length,
        `ThresholdError` when too few vectors have arrived, `PhaseOrderError`.
        """
        if self._phase == "masked":
            self._require_enough(self._masked, "vectors")
            self._begin("agree")
        self._require(index, "agree", index in self._tags)
        if index not in self._masked:
            raise RevealError(f"tags from client {index}: expected its vector before, found none")
        expected = self._masked.intersection(self.terms.neighbors_of(index))
        if wrong := expected ^ set(tags):
            raise RevealError(
                f"tags from client {index}: expected one for each of {len(expected)} neighbors, "
                f"found {'one too many, for' if min(wrong) in tags else 'none for'} client "
                f"{min(wrong)}"
            )
        if any(len(tag) != TAG_BYTES for tag in tags.values()):
            raise RevealError(f"tags from client {index}: expected {TAG_BYTES} bytes each")
        self._tags[index] = {recipient: bytes(tag) for recipient, tag in tags.items()}

    def tags_for(self, index: int) -> dict[int, bytes]:
        """Return the tags for one client, by sender; raises `ThresholdError` for too few."""
        self._require_enough(self._tags, "clients that agreed on who is left")
        neighbors = self.terms.neighbors_of(index)
        return {sender: self._tags[sender][index] for sender in neighbors if sender in self._tags}

    def add_reveal(self, index: int, revealed: Mapping[int, bytes]) -> None:
        """Take what a survivor reveals, by owner; the first one ends the phase of tags.

        Raises `RevealError` when a share is missing, too much, of the wrong secret, or not the one
        that its owner gave; `ThresholdError` when too few have agreed; `PhaseOrderError`.
        """
        self._end_agreement()
        self._require(index, "unmask", index in self._revealed)
        if index not in self._tags:
            raise RevealError(f"shares from client {index}: expected its tags before, found none")
        owners = self._sharing.intersection(self._holders(index))
        if wrong := owners ^ set(revealed):
            raise RevealError(
                f"shares from client {index}: expected one of each of {len(owners)} clients, found "
                f"{'one too many, of' if min(wrong) in revealed else 'none of'} client {min(wrong)}"
            )
        self._revealed[index] = {
            owner: self._checked(index, owner, data) for owner, data in revealed.items()
        }

    def _end_agreement(self) -> None:
        if self._phase == "masked":
            self._require_enough(self._masked, "vectors")
        if self._phase in ("masked", "agree"):
            self._require_enough(self._tags, "clients that agreed on who is left")
            self._begin("unmask")

    def _checked(self, holder: int, owner: int, data: bytes) -> bytes:
        """Return a revealed share that is the one its owner gave to the holder."""
        kind, share = unpack_revealed(owner, data)
        expected = SELF if owner in self._masked else KEY
        names = ("own mask", "pairwise key")
        if kind != expected:
            raise RevealError(
                f"share of client {owner} from {holder}: expected one of its {names[expected]}, "
                f"found one of its {names[kind]}"
            )
        digests = digests_in(owner, holder, self._shares[owner][holder])
        if share_digest(self.terms, owner, holder, kind, share) != digests[kind]:
            raise RevealError(
                f"share of client {owner} from {holder}: expected the one that {owner} gave it, "
                "found another"
            )
        return share

    def total(self) -> SecureTotal:
        """Take off all masks and return the sum.

        Raises `ThresholdError` when too few clients revealed their shares, `SecureSumError` when a
        client shared other secrets than it used, or the sum cannot be right; `PhaseOrderError`.
        """
        self._end_agreement()
        if self._phase != "unmask":
            self._refuse("total")
        self._require_enough(self._revealed, "clients that revealed their shares")
        add: list[bytes] = []
        subtract: list[bytes] = []
        for owner in self.survivors:
            subtract.append(self_mask_seed(self.terms, owner, self._opened(owner, SELF)))
        for owner in self.dropouts:
            self._leftovers(owner, self._opened(owner, KEY), add, subtract)
        # All secrets are open and right: only now the sum changes, so a failed call may be redone.
        ring = self._ring.copy()
        for start in range(0, max(len(add), len(subtract)), _AT_ONCE):
            apply_masks(ring, add[start : start + _AT_ONCE], subtract[start : start + _AT_ONCE])
        count = int(ring[-1])
        if count != len(self._masked):
            raise SecureSumError(
                f"secure sum: expected {len(self._masked)} vectors in it, found {count}; a masked "
                "vector was damaged, or a client used other masks than it agreed to"
            )
        total = self.terms.quantizer.dequantize(ring[:-1], count)
        self._begin("total")
        return SecureTotal(total, count, self.survivors)

    def _opened(self, owner: int, kind: int) -> bytes:
        """Return a client's secret, put together from its holders' shares and checked."""
        shares = {
            holder + 1: self._revealed[holder][owner]
            for holder in self._holders(owner)
            if holder in self._revealed and owner in self._revealed[holder]
        }
        threshold = self.terms.share_threshold
        if len(shares) < threshold:
            raise ThresholdError(
                f"client {owner}: expected {threshold} or more of its shares, found {len(shares)}; "
                "the round is given up"
            )
        advertisement = self._directory[owner]
        try:
            secret = combine(shares, threshold)
        except ShareError:
            secret = b""
        right = len(secret) == 32 and (
            commitment_of(self.terms, owner, secret) == advertisement.commitment
            if kind == SELF
            else public_of(secret) == advertisement.mask_key
        )
        if not right:
            raise SecureSumError(
                f"client {owner}: expected shares of the secret that it advertised, found shares "
                "of another; it is wrong, and its masks cannot be taken off: the round is given up"
            )
        return secret

    def _leftovers(
        self, dropout: int, secret: bytes, add: list[bytes], subtract: list[bytes]
    ) -> None:
        """Add the seeds of the masks that survivors put against a dropout, by how to undo them."""
        own, private = (dropout, self._directory[dropout].mask_key), opened_key(secret)
        for neighbor in self._holders(dropout):
            if neighbor not in self._masked:
                continue
            theirs = neighbor, self._directory[neighbor].mask_key
            shared = shared_secret(private, theirs[1], neighbor)
            seed = mask_seed(self.terms, shared, own, theirs)
            # The lower of the two adds the mask, so the survivor's part is undone the other way.
            (subtract if neighbor < dropout else add).append(seed)

    def _holders(self, index: int) -> tuple[int, ...]:
        return self.terms.holders_of(index)

    def _begin(self, phase: str) -> None:
        if _PHASES.index(phase) > _PHASES.index(self._phase):
            self._phase = phase

    def _require(self, index: int, phase: str, twice: bool) -> None:
        self.terms.require_index(index)
        if self._phase != phase:
            self._refuse(phase)
        if twice:
            raise PhaseOrderError(
                f"client {index}: expected one message in the phase {phase!r}, found a second"
            )

    def _refuse(self, phase: str) -> None:
        raise PhaseOrderError(
            f"secure sum: expected a message of the phase {self._phase!r}, found one of {phase!r}"
        )

    def _require_enough(self, clients: Collection[int], what: str) -> None:
        if len(clients) < self.terms.threshold:
            raise ThresholdError(
                f"{what}: expected {self.terms.threshold} or more of {self.terms.clients}, found "
                f"{len(clients)}; the round is given up, and nothing is revealed"
            )
