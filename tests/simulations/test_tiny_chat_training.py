"""What tiny-chat's training may read, in which form, and how its score is counted."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from fedlora.nn.llama import Llama, LlamaConfig
from simulations.bases.bits_per_character import Cost, encode, message_nats, summarize
from simulations.bases.chitchat_corpus import (
    Corpus,
    Message,
    _check_no_client_message,
    _check_same_messages,
    _sender_of,
    last_fifth,
)
from simulations.bases.train_tiny_chat import (
    UNUSED,
    Packed,
    Recipe,
    joined_rows,
    learning_rate_share,
    packed_steps,
    train,
    train_tokenizer,
)

CLIENT, OTHER = "aaaaaaaa-1", "bbbbbbbb-1"
HELLO = Message("aaaaaaaa", "2018-05-02T19:38:15", "Hello")


def test_a_client_message_in_the_training_text_is_refused() -> None:
    clients = {"aaaaaaaa": [HELLO]}
    _check_no_client_message({OTHER: [Message(OTHER, HELLO.time, HELLO.text)]}, clients)
    with pytest.raises(ValueError, match="1 messages of 0 clients"):
        _check_no_client_message({OTHER: [Message(CLIENT, HELLO.time, HELLO.text)]}, clients)
    with pytest.raises(ValueError, match="0 messages of 1 clients"):
        _check_no_client_message({CLIENT: []}, clients)


def test_a_client_must_be_one_sender_and_all_its_messages_that_senders() -> None:
    senders = {CLIENT: [Message(CLIENT, HELLO.time, "Hello")], OTHER: []}
    assert _sender_of("aaaaaaaa", senders) == CLIENT
    with pytest.raises(ValueError, match="'cccccccc' fits 0 senders"):
        _sender_of("cccccccc", senders)
    _check_same_messages("aaaaaaaa", [HELLO], senders[CLIENT])
    with pytest.raises(ValueError, match="1 of 1 messages are not by the sender"):
        _check_same_messages("aaaaaaaa", [HELLO], senders[OTHER])


@pytest.mark.parametrize(("count", "kept"), [(0, 0), (1, 1), (4, 1), (5, 1), (10, 2), (302, 61)])
def test_the_last_fifth_is_the_end(count: int, kept: int) -> None:
    messages = [Message("a", str(i), "x") for i in range(count)]
    assert last_fifth(messages) == messages[count - kept :]


def test_every_text_survives_the_tokenizer() -> None:
    tokenizer = train_tokenizer(["hello there", "hello you"], vocab_size=270)
    texts = ["hello", " two  spaces ", "naïve 😀\n", "<|endoftext"]
    for text, ids in zip(texts, encode(tokenizer, texts), strict=True):
        assert ids[0] == ids[-1] == 0
        assert tokenizer.decode(ids[1:-1]) == text


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_an_epoch_predicts_every_token_once(probability: float) -> None:
    recipe = Recipe(join_probability=probability, window=8)
    senders = [[[0, 5, 6, 0], [0, 7, 0]], [[0, *range(10, 40), 0]], [[0, 8, 0]]]
    rows = joined_rows(senders, recipe, torch.Generator().manual_seed(0))
    predicted = Counter(token for row in rows for token in row[1:])
    assert predicted == Counter(token for s in senders for m in s for token in m[1:])
    assert max(map(len, rows)) <= recipe.window + 1
    if probability == 1.0:
        assert rows[0] == [0, 5, 6, 0, 7, 0]


def test_a_packed_step_holds_whole_rows_apart() -> None:
    recipe = Recipe(window=8, windows=2)
    senders = [[[0, 5, 6, 0], [0, 7, 0], [0, 9, 9, 9, 0]]]
    step: Packed = next(packed_steps(senders, recipe, torch.Generator().manual_seed(0)))
    assert step.inputs.shape == step.targets.shape == step.segments.shape == (2, 8)
    assert torch.equal(step.targets == UNUSED, step.segments == 0)
    for line in range(2):
        for number in range(1, int(step.segments[line].max()) + 1):
            here = step.segments[line] == number
            assert step.inputs[line][here][0] == 0
            assert torch.equal(step.inputs[line][here][1:], step.targets[line][here][:-1])


def test_a_message_costs_the_same_alone_and_in_a_batch() -> None:
    torch.manual_seed(0)
    model = Llama(LlamaConfig(20, 16, 1, 2, 2, 24)).eval()
    sequences = [[0, 3, 4, 5, 0], [0, 0], [0, *[7] * 12, 0]]
    alone = []
    for sequence in sequences:
        ids = torch.tensor([sequence])
        loss = F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="sum")
        alone.append(loss.item())
    # float32, other orders of summation
    assert message_nats(model, sequences) == pytest.approx(alone, rel=1e-5, abs=1e-5)


def test_a_seed_gives_the_same_weights_again() -> None:
    texts = ["hello there", "hello you", "how are you", "you there"] * 20
    messages = [Message(OTHER, str(i), text) for i, text in enumerate(texts)]
    corpus = Corpus(training={OTHER: messages}, validation={}, clients={})
    tokenizer = train_tokenizer(texts, vocab_size=270)
    recipe = Recipe(
        vocab_size=270,
        hidden_size=16,
        layers=1,
        heads=2,
        key_value_heads=1,
        intermediate_size=24,
        window=16,
        windows=4,
        warmup_steps=2,
        steps=6,
        compiled=False,
    )
    first, again, other = (
        train(r, corpus, tokenizer)[0].state_dict()
        for r in (recipe, recipe, replace(recipe, seed=1))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(first[name], other[name])


def test_users_weigh_alike_in_the_mean_and_by_length_when_pooled() -> None:
    costs = [
        Cost(nats=10 * math.log(2), tokens=4, characters=5, messages=1),
        Cost(nats=15 * math.log(2), tokens=9, characters=15, messages=5),
    ]
    score = summarize(costs)
    assert score.bits_mean_over_users == pytest.approx((2 + 1) / 2)
    assert score.bits_pooled == pytest.approx(25 / 20)
    assert score.bits_mean_over_users_with_end == pytest.approx((10 / 6 + 15 / 20) / 2)
    assert score.bits_pooled_with_end == pytest.approx(25 / 26)
    assert score.nats_per_token_pooled == pytest.approx(25 * math.log(2) / 13)


def test_the_learning_rate_rises_stays_and_falls_to_zero() -> None:
    recipe = Recipe(warmup_steps=10, falling_share=0.5)
    shares = [learning_rate_share(step, 100, recipe) for step in range(1, 101)]
    assert shares[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert shares[9:51] == [1.0] * 42
    assert shares[51:] == pytest.approx([1 - i / 50 for i in range(1, 50)])
