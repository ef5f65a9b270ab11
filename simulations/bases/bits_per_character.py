"""How well a base predicts the chat of the 117 clients, in bits per character.

Each message of a client's held-out last fifth is scored alone. Its tokens are
`[separator] + tokens(message) + [separator]`; every token after the first is predicted, the end of
the message included. A message costs the sum of those negative log-likelihoods. Characters are
Unicode code points of the message, and, in the "with end" figures, one more for its end.

    python -m simulations.bases.bits_per_character fedlora/bases/files/tiny-chat
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F

from fedlora.nn.llama import Llama, load_llama
from simulations.bases.chitchat_corpus import CLIENTS_FILE, Message, last_fifth, read_clients

SEPARATOR = "<|endoftext|>"
BATCH = 64  # messages a forward; sorted by length, so that little of a batch is padding


@dataclass(frozen=True, slots=True)
class Cost:
    """What some messages cost a model, and how long they are."""

    nats: float
    tokens: int  # predicted ones: those of the text and one end a message
    characters: int
    messages: int


@dataclass(frozen=True, slots=True)
class Score:
    """Bits per character in four conventions, and nats per predicted token in two."""

    users: int
    messages: int
    characters: int
    tokens: int
    bits_mean_over_users: float
    bits_mean_over_users_with_end: float
    bits_pooled: float
    bits_pooled_with_end: float
    nats_per_token_mean_over_users: float
    nats_per_token_pooled: float


def separator_of(tokenizer: Tokenizer) -> int:
    """Id of the token that stands before, between and after messages."""
    found: int | None = tokenizer.token_to_id(SEPARATOR)
    if found is None:
        raise ValueError(f"tokenizer.json has no token {SEPARATOR}; it is not of this base.")
    return found


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """`[separator] + tokens + [separator]` for every text."""
    separator = separator_of(tokenizer)
    return [[separator, *e.ids, separator] for e in tokenizer.encode_batch(list(texts))]


@torch.no_grad()
def message_nats(model: Llama, sequences: Sequence[Sequence[int]]) -> list[float]:
    """Sum of negative log-likelihoods of all but the first token, for each sequence."""
    model.eval()
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    nats = [0.0] * len(sequences)
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        time = len(sequences[rows[-1]])
        ids = torch.zeros(len(rows), time, dtype=torch.int64)
        counted = torch.zeros(len(rows), time - 1)
        for row, index in enumerate(rows):
            length = len(sequences[index])
            ids[row, :length] = torch.tensor(sequences[index])
            counted[row, : length - 1] = 1.0
        logits = model(ids[:, :-1])
        each = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        for index, value in zip(rows, (each * counted).double().sum(1).tolist(), strict=True):
            nats[index] = value
    return nats


def score(model: Llama, tokenizer: Tokenizer, users: dict[str, list[Message]]) -> Score:
    """Score all given messages, each alone; `users` maps an id to its messages."""
    texts = [m.text for messages in users.values() for m in messages]
    sequences = encode(tokenizer, texts)
    nats = message_nats(model, sequences)
    costs: list[Cost] = []
    start = 0
    for messages in users.values():
        stop = start + len(messages)
        costs.append(
            Cost(
                nats=math.fsum(nats[start:stop]),
                tokens=sum(len(s) - 1 for s in sequences[start:stop]),
                characters=sum(len(t) for t in texts[start:stop]),
                messages=len(messages),
            )
        )
        start = stop
    return summarize(costs)


def summarize(costs: Sequence[Cost]) -> Score:
    """Users' costs to one score: "mean over users" weighs each user alike, "pooled" by length."""
    whole = Cost(
        nats=math.fsum(c.nats for c in costs),
        tokens=sum(c.tokens for c in costs),
        characters=sum(c.characters for c in costs),
        messages=sum(c.messages for c in costs),
    )
    return Score(
        users=len(costs),
        messages=whole.messages,
        characters=whole.characters,
        tokens=whole.tokens,
        bits_mean_over_users=_mean([_bits(c, end=False) for c in costs]),
        bits_mean_over_users_with_end=_mean([_bits(c, end=True) for c in costs]),
        bits_pooled=_bits(whole, end=False),
        bits_pooled_with_end=_bits(whole, end=True),
        nats_per_token_mean_over_users=_mean([c.nats / c.tokens for c in costs]),
        nats_per_token_pooled=whole.nats / whole.tokens,
    )


def _bits(cost: Cost, end: bool) -> float:
    return cost.nats / math.log(2) / (cost.characters + (cost.messages if end else 0))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def main() -> None:
    """Print the score of a folder with config.json, model.safetensors and tokenizer.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clients", type=Path, default=CLIENTS_FILE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    users = {u: last_fifth(m) for u, m in read_clients(arguments.clients).items()}
    tokenizer = Tokenizer.from_file(str(arguments.folder / "tokenizer.json"))
    print(json.dumps(asdict(score(load_llama(arguments.folder), tokenizer, users)), indent=1))


if __name__ == "__main__":
    main()
