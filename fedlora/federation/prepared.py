"""What a round sends: made once for all clients that get the same.

Clients of one rank and with the same codecs get the same broadcast, so its records are encoded once
and every message has copies of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from flwr.app import ConfigRecord, RecordDict

from fedlora.adapter import Adapter
from fedlora.aggregation import Broadcast, ClientProfile, Method, ServerState
from fedlora.errors import ConfigError, NonFiniteError
from fedlora.federation.codecs import FP32, SERVER, Codec, Codecs, rounding
from fedlora.federation.control import put_control
from fedlora.federation.records import (
    BOTH,
    EncodedAdapter,
    TrainOrder,
    content_bytes,
    encode_adapter,
    to_record,
    train_content,
)
from fedlora.federation.replies import ReplyForm

__all__ = ["PrepareOnce", "Prepared"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A broadcast as records, made once for all the clients that get it."""

    source: Broadcast  # kept alive, so that its adapters' ids stay theirs
    content: Callable[[], RecordDict]  # a message with records of its own
    num_bytes: int
    form: ReplyForm
    fp32_surplus: int  # bytes that the message would have more in fp32


class PrepareOnce:
    """Prepare what clients share once a round: a method's broadcast for a rank, and its records."""

    def __init__(
        self,
        method: Method,
        setup: ConfigRecord,
        order: TrainOrder,
        *,
        dealt: bool,
        measured: bool = True,
    ) -> None:
        self._method, self._setup, self._order = method, setup, order
        self._measured = measured  # whether replies hold metrics
        self._dealt = dealt  # whether the experiment gives clients their ranks
        self._uploaded, self._round = order.uploaded, order.round
        self._orders: dict[Codec, ConfigRecord] = {}  # by upload codec
        self._of_rank: dict[tuple[int | None, Codecs], Prepared] = {}
        self._kept: dict[tuple[int, int, Codecs], Prepared] = {}
        # The last one in each codec, of any rank.
        self._frozen: dict[Codec, tuple[Adapter, EncodedAdapter]] = {}

    def __call__(self, state: ServerState, profile: ClientProfile, codecs: Codecs) -> Prepared:
        """Return the messages for a client; the same value for the same adapters and codecs."""
        if self._method.broadcasts_by_client:
            return self._once(self._method.broadcast(state, profile), codecs)
        key = profile.rank, codecs
        found = self._of_rank.get(key)
        if found is None:
            found = self._once(self._method.broadcast(state, profile), codecs)
            if self._dealt:
                self._require_rank(profile, found.source.trainable)
            self._of_rank[key] = found
        return found

    def _require_rank(self, profile: ClientProfile, sent: Adapter) -> None:
        """Refuse to deal out ranks for a method that does not look at them."""
        if profile.rank is not None and max(sent.ranks) > profile.rank:
            raise ConfigError(
                f"federation.client_ranks: expected a method that sends client "
                f"{profile.client_id!r} an adapter of rank {profile.rank}, found rank "
                f"{max(sent.ranks)} of {self._method.name!r}; use a method for mixed ranks, or "
                "leave the key out"
            )

    def _once(self, broadcast: Broadcast, codecs: Codecs) -> Prepared:
        key = id(broadcast.trainable), id(broadcast.frozen), codecs
        found = self._kept.get(key)
        if found is None:
            if len(self._kept) >= 4:  # those of single clients do not pile up
                self._kept.clear()
            found = self._kept[key] = self._prepared(broadcast, codecs)
        return found

    def _prepared(self, broadcast: Broadcast, codecs: Codecs) -> Prepared:
        trainable = self._encoded(broadcast.trainable, codecs.download, SERVER)
        surplus, frozen = trainable.fp32_surplus, None
        if broadcast.frozen is not None:
            kept = self._frozen.get(codecs.download)
            if kept is None or kept[0] is not broadcast.frozen:
                encoded = self._encoded(broadcast.frozen, codecs.download, f"{SERVER}, frozen")
                kept = self._frozen[codecs.download] = broadcast.frozen, encoded
            frozen = kept[1]
            surplus += frozen.fp32_surplus
        form = ReplyForm.of(
            trainable.sent,
            self._uploaded,
            self._round,
            controlled=broadcast.control is not None,
            codec=codecs.upload,
            own=broadcast.trainable,
            measured=self._measured,
        )
        control = RecordDict()
        if broadcast.control is not None:
            put_control(control, form.buffer, broadcast.control)
        order = self._order_in(codecs.upload)
        surplus += self._order_in(FP32).count_bytes() - order.count_bytes()
        content = partial(train_content, self._setup, order, trainable, frozen, control)
        return Prepared(broadcast, content, content_bytes(content()), form, surplus)

    def _encoded(self, adapter: Adapter, codec: Codec, who: str) -> EncodedAdapter:
        """Return an adapter's records; fp32 where a number is too large for the codec.

        Replies may hold numbers up to 1e6, fp16 ends at 65504: that must not end the run.
        """
        draws = rounding(codec, self._order.seed, who, self._round)
        try:
            return encode_adapter(adapter, BOTH, self._round, codec, draws)
        except NonFiniteError as error:
            _log.warning("round %d: sent as fp32: %s", self._round, error)
            return encode_adapter(adapter, BOTH, self._round)

    def _order_in(self, codec: Codec) -> ConfigRecord:
        if codec not in self._orders:
            order = self._order if codec == FP32 else replace(self._order, upload_codec=codec)
            self._orders[codec] = to_record(order)
        return self._orders[codec]
