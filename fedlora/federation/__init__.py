"""A LoRA federation over Flower: records, strategy, client handler and server."""

from fedlora.errors import MissingExtraError

try:
    import flwr.app  # noqa: F401
except ImportError:
    raise MissingExtraError("a federation", "sim") from None

from fedlora.federation.checkpoint import (
    Checkpoint,
    ClientRecord,
    Dropped,
    RoundRecord,
    has_checkpoint,
    read_checkpoint,
    read_rounds,
)
from fedlora.federation.client import OpenTrainer, Trainer, handle_query, handle_train
from fedlora.federation.phases import round_words
from fedlora.federation.quorum import QuorumGrid
from fedlora.federation.records import ClientSetup
from fedlora.federation.sampling import draw_cohort, draw_held_out
from fedlora.federation.server import run_federation
from fedlora.federation.strategy import FederatedLora

__all__ = [
    "Checkpoint",
    "ClientRecord",
    "ClientSetup",
    "Dropped",
    "FederatedLora",
    "OpenTrainer",
    "QuorumGrid",
    "RoundRecord",
    "Trainer",
    "draw_cohort",
    "draw_held_out",
    "handle_query",
    "handle_train",
    "has_checkpoint",
    "read_checkpoint",
    "read_rounds",
    "round_words",
    "run_federation",
]
