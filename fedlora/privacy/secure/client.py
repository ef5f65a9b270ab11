"""One client's part of a secure sum: what it will tell, and what it will not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fedlora.errors import (
    ForgedKeyError,
    PhaseOrderError,
    RevealError,
    SecureAggregationError,
    SecureTermsError,
    ShapeMismatchError,
    ShareError,
    ThresholdError,
)
from fedlora.privacy.secure.agreement import digest_of_keys, digest_of_lists, is_tag, tag_of
from fedlora.privacy.secure.keys import (
    Advertisement,
    Identity,
    agreement_key,
    channel_key,
    commitment_of,
    mask_seed,
    new_secret,
    opened_key,
    public_of,
    require_signed,
    self_mask_seed,
    shared_secret,
)
from fedlora.privacy.secure.masks import apply_masks
from fedlora.privacy.secure.quantize import Ring
from fedlora.privacy.secure.shamir import SHARE_BYTES, split
from fedlora.privacy.secure.shares import (
    KEY,
    SELF,
    PairOfShares,
    open_shares,
    pack_revealed,
    seal_shares,
)
from fedlora.privacy.secure.terms import Terms

__all__ = ["ClientSession"]

_PHASES = ("keys", "shares", "masked", "agreed", "revealed")


class ClientSession:
    """The secrets of one client in one round, and what it has agreed to so far.

    begin → share → mask → agree → reveal, each once. Secrets are dropped as soon as a later phase
    has no use for them. A call that raises leaves the session as it was, but a client should take
    no further part then.

    Between messages the session is kept as bytes (`to_bytes`). They must be stored *before* what
    the call returned is sent: an older copy would reveal a second time.
    """

    def __init__(self, terms: Terms, index: int, phase: str, state: dict[str, Any]) -> None:
        self.terms = terms
        self.index = index
        self.phase = phase  # the last one that is done
        self._state = state

    @classmethod
    def begin(
        cls, terms: Terms, index: int, identity: Identity | None = None
    ) -> tuple[Self, Advertisement]:
        """Make a round's keys; return the session and what to send to the server."""
        terms.require_index(index)
        share_secret, mask_secret, seed = new_secret(), new_secret(), new_secret()
        advertisement = Advertisement(
            index,
            terms.digest,
            public_of(share_secret),
            public_of(mask_secret),
            commitment_of(terms, index, seed),
        )
        if identity is not None:
            advertisement = identity.signed(advertisement)
        state = {
            "advertisement": advertisement.to_bytes(),
            "share_secret": share_secret,
            "mask_secret": mask_secret,
            "seed": seed,
        }
        return cls(terms, index, "keys", state), advertisement

    def share(
        self,
        directory: Mapping[int, Advertisement],
        known: Mapping[int, bytes] | None = None,
    ) -> dict[int, bytes]:
        """Split the secrets among the neighbors; return a message (158 bytes) by recipient.

        One is for this client itself: so the server knows its digests as well.

        directory: who advertised keys, this client included; those of its neighbors are enough.
        known: identities' public keys by client that this device trusts (DER, PEM or an OpenSSH
        line); every neighbor in the directory must be among them. None: keys are taken as the
        server gives them.

        Raises `ForgedKeyError`, `SecureTermsError` (keys made under other terms), `ThresholdError`
        (too few), `PhaseOrderError`.
        """
        self._require_phase("keys")
        neighbors = self._checked(directory, known)
        terms, state = self.terms, self._state
        holders = sorted((*neighbors, self.index))
        if len(holders) < terms.share_threshold:
            raise ThresholdError(
                f"client {self.index}: expected {terms.share_threshold} or more holders of its "
                f"shares, found {len(holders)} with keys; too few clients are left"
            )
        places = [holder + 1 for holder in holders]
        seeds = split(state["seed"], terms.share_threshold, places)
        keys = split(state["mask_secret"], terms.share_threshold, places)
        own, private = directory[self.index], opened_key(state["share_secret"])
        messages: dict[int, bytes] = {}
        receiving: dict[int, bytes] = {}
        agreement: dict[int, bytes] = {}
        for holder in holders:
            theirs = directory[holder]
            shared = shared_secret(private, theirs.share_key, holder)
            pair = PairOfShares(seeds[holder + 1], keys[holder + 1])
            key = channel_key(terms, shared, own, theirs)
            messages[holder] = seal_shares(terms, key, self.index, holder, pair)
            receiving[holder] = channel_key(terms, shared, theirs, own)
            if holder != self.index:
                agreement[holder] = agreement_key(terms, shared, own, theirs)
        self._state = {
            "mask_secret": state["mask_secret"],
            "seed": state["seed"],
            "receiving": receiving,
            "mask_keys": {neighbor: directory[neighbor].mask_key for neighbor in neighbors},
            "agreement": agreement,
            "directory": {holder: directory[holder].digest for holder in holders},
        }
        self.phase = "shares"
        return messages

    def _checked(
        self, directory: Mapping[int, Advertisement], known: Mapping[int, bytes] | None
    ) -> list[int]:
        """Return the neighbors in a directory whose keys are all in order."""
        terms = self.terms
        if len(directory) > terms.clients:
            raise ForgedKeyError(
                f"directory: expected keys of {terms.clients} clients at most, found "
                f"{len(directory)}"
            )
        own = directory.get(self.index)
        if own is None or own.to_bytes() != self._state["advertisement"]:
            raise ForgedKeyError(
                f"directory: expected the keys that client {self.index} sent, found "
                + ("none" if own is None else "others")
            )
        neighbors = [other for other in terms.neighbors_of(self.index) if other in directory]
        for neighbor in neighbors:
            if known is not None and neighbor not in known:
                raise ForgedKeyError(
                    f"keys of client {neighbor}: expected an identity that this device trusts, "
                    "found none for it"
                )
            public = None if known is None else known[neighbor]
            require_signed(terms, neighbor, directory[neighbor], public)
        everyone = [*neighbors, self.index]
        keys = [key for c in everyone for key in (directory[c].share_key, directory[c].mask_key)]
        if len(set(keys)) != len(keys):
            raise ForgedKeyError("directory: expected keys of its own for every client, found two")
        if known is not None and len({known[c] for c in neighbors}) != len(neighbors):
            raise ForgedKeyError("known: expected an identity for every client, found one twice")
        return neighbors

    def mask(
        self,
        vector: npt.NDArray[np.float64],
        shares: Mapping[int, bytes],
        survivors_of_sharing: Collection[int],
        draws: np.random.Generator,
    ) -> Ring:
        """Return the vector, quantized and masked, with a one at its end: (size + 1,) of the ring.

        vector: (size,) float64. shares: the messages to this client, by sender.
        survivors_of_sharing: everyone whose shares reached the server, this client included; masks
        are put between them. draws: for the rounding only.

        Raises `ShareError` (damaged, replayed, missing), `ThresholdError`, `SecureTermsError`,
        `ShapeMismatchError`, `NonFiniteError`, `PhaseOrderError`.
        """
        self._require_phase("shares")
        terms, state = self.terms, self._state
        vector = np.asarray(vector)
        if vector.shape != (terms.size,) or vector.dtype != np.float64:
            raise ShapeMismatchError(
                f"client {self.index}: expected a vector of ({terms.size},) float64, found "
                f"{vector.shape} {vector.dtype}"
            )
        others = self._others(survivors_of_sharing)
        held = {
            other: open_shares(terms, state["receiving"][other], other, self.index, shares[other])
            for other in self._senders(shares, others)
        }
        private = opened_key(state["mask_secret"])
        own_key = self.index, public_of(state["mask_secret"])
        subtract: list[bytes] = []
        add = [self_mask_seed(terms, self.index, state["seed"])]
        for other in others:
            theirs = other, state["mask_keys"][other]
            shared = shared_secret(private, theirs[1], other)
            seed = mask_seed(terms, shared, own_key, theirs)
            (add if self.index < other else subtract).append(seed)
        masked = np.empty(terms.size + 1, terms.quantizer.dtype)
        masked[:-1] = terms.quantizer.quantize(vector, draws)
        masked[-1] = 1
        apply_masks(masked, add, subtract)
        # On a sparse graph everyone has other neighbors, and no two the same directory.
        seen = {c: state["directory"][c] for c in survivors_of_sharing} if terms.complete else {}
        self._state = {
            "sharing": sorted(survivors_of_sharing),
            "held": {owner: pair.self_mask + pair.mask_key for owner, pair in held.items()},
            "agreement": {other: state["agreement"][other] for other in others},
            "directory": digest_of_keys(seen),
        }
        self.phase = "masked"
        return masked

    def _others(self, survivors: Collection[int]) -> list[int]:
        """Return the neighbors among the survivors of sharing, if those are enough."""
        terms = self.terms
        everyone = _clients(terms, survivors, "survivors of sharing")
        if self.index not in everyone:
            raise SecureTermsError(
                f"survivors of sharing: expected client {self.index} among them, which is asked "
                "for its vector"
            )
        if len(everyone) < terms.threshold:
            raise ThresholdError(
                f"survivors of sharing: expected {terms.threshold} or more, found {len(everyone)}"
            )
        neighbors = [other for other in terms.neighbors_of(self.index) if other in everyone]
        unknown = [other for other in neighbors if other not in self._state["mask_keys"]]
        if unknown:
            raise ForgedKeyError(
                f"survivors of sharing: expected clients whose keys were in the directory, found "
                f"{unknown[0]}"
            )
        if len(neighbors) + 1 < terms.share_threshold:
            raise ThresholdError(
                f"client {self.index}: expected {terms.share_threshold} or more holders of its "
                f"shares, found {len(neighbors) + 1} left"
            )
        return neighbors

    def _senders(self, shares: Mapping[int, bytes], others: list[int]) -> list[int]:
        """Return whose shares this client is to hold, if the messages are exactly theirs."""
        senders = sorted((*others, self.index))
        wrong = sorted(set(senders) ^ set(shares))
        if wrong:
            raise ShareError(
                f"shares for client {self.index}: expected one message from each of "
                f"{len(senders)} clients that shared, found "
                + ("one too many, from" if wrong[0] in shares else "none from")
                + f" client {wrong[0]}"
            )
        return senders

    def agree(self, survivors: Collection[int], dropouts: Collection[int]) -> dict[int, bytes]:
        """Settle on whose vectors are in the sum; return a tag (32 bytes) by surviving neighbor.

        survivors: whose vectors are in the sum. dropouts: who shared but sent no vector. Together
        they are the survivors of sharing that this client put masks against.

        Raises `RevealError` (a client in both or in neither), `ThresholdError`, `SecureTermsError`,
        `PhaseOrderError`.
        """
        self._require_phase("masked")
        left = _clients(self.terms, survivors, "survivors")
        lost = _clients(self.terms, dropouts, "dropouts")
        self._require_lists(left, lost)
        state = self._state
        lists = digest_of_lists(left, lost, state["directory"])
        agreement = {other: key for other, key in state["agreement"].items() if other in left}
        revealed = {}
        for owner, both_shares in state["held"].items():
            kind = SELF if owner in left else KEY
            pair = PairOfShares(both_shares[:SHARE_BYTES], both_shares[SHARE_BYTES:])
            revealed[owner] = pack_revealed(kind, pair.of(kind))
        # The other share of each is forgotten: even a broken check could not reveal it later.
        self._state = {"lists": lists, "agreement": agreement, "revealed": revealed}
        self.phase = "agreed"
        return {other: tag_of(key, self.index, other, lists) for other, key in agreement.items()}

    def _require_lists(self, left: frozenset[int], lost: frozenset[int]) -> None:
        """Raise for survivors and dropouts that would uncover a single vector."""
        if both := left & lost:
            raise RevealError(
                f"client {min(both)}: expected it among survivors or dropouts, found it in both; "
                "both shares of a client would unmask it"
            )
        if wrong := (left | lost) ^ set(self._state["sharing"]):
            raise RevealError(
                f"client {min(wrong)}: expected survivors and dropouts to be the clients that "
                "shared their secrets, all of them, found "
                + ("one more" if min(wrong) in left | lost else "it in neither")
            )
        if self.index not in left:
            raise RevealError(
                f"client {self.index}: expected itself among the survivors, found it dropped; it "
                "has sent its vector"
            )
        if len(left) < self.terms.threshold:
            raise ThresholdError(
                f"survivors: expected {self.terms.threshold} or more, found {len(left)}; nothing "
                "is revealed"
            )

    def reveal(self, tags: Mapping[int, bytes]) -> dict[int, bytes]:
        """Return one share (34 bytes) by owner: of a survivor's own mask, of a dropout's key.

        tags: what neighbors have sent to this client, by sender. A wrong one counts as none.

        Raises `RevealError` when fewer than `Terms.share_threshold` holders, this client included,
        were told what it was told; `PhaseOrderError`.
        """
        self._require_phase("agreed")
        lists, least = self._state["lists"], self.terms.share_threshold
        agreed = 1 + sum(
            is_tag(tags.get(other, b""), key, other, self.index, lists)
            for other, key in self._state["agreement"].items()
        )
        if agreed < least:
            raise RevealError(
                f"client {self.index}: expected {least} or more clients that were told the same "
                f"survivors, dropouts and keys, found {agreed}; the server tells clients "
                "different things, or too few are left, and nothing is revealed"
            )
        revealed: dict[int, bytes] = self._state["revealed"]
        self._state = {}
        self.phase = "revealed"
        return revealed

    def to_bytes(self) -> bytes:
        """Return the session, secrets included: for this device's own storage only."""
        plain = {
            "terms": self.terms.to_plain(),
            "index": self.index,
            "phase": self.phase,
            "state": {name: _to_plain(value) for name, value in self._state.items()},
        }
        text = json.dumps(plain).encode()
        return hashlib.sha256(text).digest() + text

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read `to_bytes`; raises `SecureAggregationError` for damaged bytes."""
        digest, text = data[:32], data[32:]
        if hashlib.sha256(text).digest() != digest:
            raise SecureAggregationError(
                "stored session of a secure sum: expected the bytes that were stored, found "
                "others; this client can take no further part in the round"
            )
        plain = json.loads(text)
        state = {name: _from_plain(value) for name, value in plain["state"].items()}
        return cls(Terms.from_plain(plain["terms"]), plain["index"], plain["phase"], state)

    def _require_phase(self, phase: str) -> None:
        if self.phase != phase:
            raise PhaseOrderError(
                f"client {self.index}: expected to be after the phase {phase!r}, found it after "
                f"{self.phase!r}; the phases are {', '.join(_PHASES)}, each once"
            )


def _clients(terms: Terms, indices: Collection[int], what: str) -> frozenset[int]:
    """Return a list of clients as a set; one that is too long or names others is refused."""
    if len(indices) > terms.clients:
        raise SecureTermsError(
            f"{what}: expected {terms.clients} clients at most, found {len(indices)}"
        )
    everyone = frozenset(indices)
    if len(everyone) != len(indices):
        raise SecureTermsError(f"{what}: expected every client once, found one twice")
    for index in everyone:
        terms.require_index(index)
    return everyone


def _to_plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    return {str(k): v.hex() for k, v in value.items()} if isinstance(value, dict) else value


def _from_plain(value: Any) -> Any:
    if isinstance(value, str):
        return bytes.fromhex(value)
    return (
        {int(k): bytes.fromhex(v) for k, v in value.items()} if isinstance(value, dict) else value
    )
