"""Train tiny-chat, the bundled base language model, from nothing on ChitChat.

    python -m simulations.bases.train_tiny_chat --out runs/tiny-chat

Deterministic on one machine and thread: the seed draws the split, the weights, the order and the
dropout. On Linux the allocator's huge pages save a quarter of the time:

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1000000000:\
glibc.malloc.trim_threshold=4000000000:glibc.malloc.top_pad=268435456

The recipe is chosen on validation senders, who are neither in training nor among the 117 clients;
`simulations.bases.bits_per_character` then measures the clients, once a finished candidate.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.nn.llama import TIED, Llama, LlamaConfig
from simulations.bases.bits_per_character import SEPARATOR, encode, score, separator_of
from simulations.bases.chitchat_corpus import (
    CLIENTS_FILE,
    Corpus,
    load_corpus,
    texts_shared_with_clients,
)

UNUSED = -100  # a target that cross_entropy skips


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the weights."""

    seed: int = 0
    validation_share: float = 0.015  # of the senders
    vocab_size: int = 2048
    hidden_size: int = 256
    layers: int = 3
    heads: int = 4
    key_value_heads: int = 4
    intermediate_size: int = 704
    dropout: float = 0.1
    steps: int = 3057  # 7.2 epochs
    join_probability: float = 0.3  # that a message goes on in the row of the sender's last one
    window: int = 96  # positions of a training row; a longer message is cut and goes on in another
    windows: int = 20  # rows of a step: one fixed shape, since oneDNN compiles for each new one
    learning_rate: float = 6e-3
    falling_share: float = 0.4  # of the steps, the last ones: the learning rate falls to zero
    warmup_steps: int = 100
    weight_decay: float = 0.3
    average_decay: float = 0.995  # of the running mean of the weights, which is what is kept
    bf16: bool = True
    compiled: bool = True  # by torch.compile: a fifth faster after a minute, needs a C++ compiler

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0.0 < self.falling_share <= 1.0:
            raise ValueError(
                f"steps is {self.steps} and falling_share {self.falling_share}: expected at least"
                " one step, and a share in (0, 1]."
            )

    def llama(self) -> LlamaConfig:
        """The network's shape."""
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            intermediate_size=self.intermediate_size,
            dropout=self.dropout,
        )


@dataclass(frozen=True, slots=True)
class Packed:
    """One step's texts: int64 tensors of shape (windows, window)."""

    inputs: Tensor
    targets: Tensor  # UNUSED where nothing is predicted
    segments: Tensor  # number of the row within its window; 0 is padding
    epoch: int  # of its last row, 0-based


def train(
    recipe: Recipe, corpus: Corpus, tokenizer: Tokenizer, minutes: float | None = None
) -> tuple[Llama, Recipe]:
    """The averaged model after all steps, and the recipe that gives it again.

    Prints a JSON line about each epoch. The learning rate is constant before it falls, so that the
    number of steps need not be known until then: with `minutes`, time decides it in place of
    `recipe.steps`, and the returned recipe says how many they became.
    """
    torch.manual_seed(recipe.seed)
    model = initialized(recipe.llama())
    average = initialized(recipe.llama())
    average.load_state_dict(model.state_dict())
    optimizers = make_optimizers(model, recipe)
    if recipe.compiled:
        model.compile(dynamic=False)
    senders = [
        encode(tokenizer, [m.text for m in messages]) for messages in corpus.training.values()
    ]
    generator = torch.Generator().manual_seed(recipe.seed)
    steps = recipe.steps if minutes is None else None  # None: not decided yet
    level = 60 * (minutes or 0.0) * (1.0 - recipe.falling_share)  # seconds at the full rate
    start, losses, epoch = time.monotonic(), list[float](), 0
    for step, packed in enumerate(packed_steps(senders, recipe, generator), start=1):
        if steps is None and time.monotonic() - start > level:
            steps = math.ceil(step / (1.0 - recipe.falling_share))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * learning_rate_share(step, steps, recipe)
        losses.append(training_step(model, packed, recipe))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_average(average, model, min(recipe.average_decay, step / (step + 10)))
        if packed.epoch > epoch or step == steps:
            means = _progress(losses, average, tokenizer, corpus)
            line = {"step": step, "steps": steps, "epochs": packed.epoch, **means}
            line["minutes"] = (time.monotonic() - start) / 60
            print(json.dumps(line), flush=True)
            losses, epoch = [], packed.epoch
        if step == steps:
            break
    return average.eval(), replace(recipe, steps=step)


def _progress(
    losses: Sequence[float], average: Llama, tokenizer: Tokenizer, corpus: Corpus
) -> dict[str, float]:
    progress = {"training_nats_per_token": sum(losses) / len(losses)}
    if corpus.validation:
        found = score(average, tokenizer, corpus.validation)
        progress |= {
            "validation_nats_per_token": found.nats_per_token_pooled,
            "validation_bits": found.bits_mean_over_users,
            "validation_bits_pooled": found.bits_pooled,
        }
    return progress


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE; id 0 is the separator, and every text survives encoding unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def initialized(config: LlamaConfig) -> Llama:
    """Normal weights of 0.02; what is added to the residual stream shrinks with depth (GPT-2)."""
    model = Llama(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            last = name.endswith(("o_proj.weight", "down_proj.weight"))
            shrink = math.sqrt(2 * config.num_hidden_layers) if last else 1.0
            nn.init.normal_(parameter, std=0.02 / shrink)
    return model


def make_optimizers(model: Llama, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings and norms; one learning rate for both."""
    matrices: list[nn.Parameter] = []
    embeddings: list[nn.Parameter] = []
    norms: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            norms.append(parameter)
        else:
            (embeddings if "embed_tokens" in name else matrices).append(parameter)
    rate, decay = recipe.learning_rate, recipe.weight_decay
    groups = [
        {"params": embeddings, "weight_decay": decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))]


def learning_rate_share(step: int, steps: int | None, recipe: Recipe) -> float:
    """Linear warm-up, a level, then a line to almost zero at the last step, if that is known."""
    rising = step / recipe.warmup_steps
    if steps is None:
        return min(1.0, rising)
    falling = (steps - step + 1) / (recipe.falling_share * steps)
    return min(1.0, rising, falling)


def training_step(model: Llama, packed: Packed, recipe: Recipe) -> float:
    """Add the gradient of the mean loss over the predicted tokens; returns that mean, in nats."""
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
        logits = model(packed.inputs, segments=packed.segments)
        loss = F.cross_entropy(logits.flatten(0, 1), packed.targets.flatten(), ignore_index=UNUSED)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


@torch.no_grad()
def update_average(average: Llama, model: Llama, decay: float) -> None:
    """average ← decay · average + (1 − decay) · model."""
    pairs = zip(average.parameters(), model.parameters(), strict=True)
    for mean, value in pairs:
        mean.lerp_(value, 1.0 - decay)


def joined_rows(
    senders: Sequence[Sequence[Sequence[int]]], recipe: Recipe, generator: torch.Generator
) -> list[list[int]]:
    """One epoch: each message once, alone or after the same sender's messages before it.

    A base meets both uses: a message that stands alone, and a window over someone's messages.
    """
    rows: list[list[int]] = []
    for messages in senders:
        row: list[int] = []
        joins = torch.rand(len(messages), generator=generator) < recipe.join_probability
        for message, join in zip(messages, joins.tolist(), strict=True):
            if row and join and len(row) + len(message) - 1 <= recipe.window + 1:
                row += message[1:]  # its first separator is the last one's end
                continue
            if row:
                rows += _cut(row, recipe.window)
            row = list(message)
        if row:
            rows += _cut(row, recipe.window)
    return rows


def save_folder(folder: Path, model: Llama, tokenizer: Tokenizer) -> None:
    """Write model.safetensors (fp16, without the tied head), config.json and tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.half().contiguous() for n, t in model.state_dict().items() if n != TIED}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_hugging_face(separator_of(tokenizer))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))


def packed_steps(
    senders: Sequence[Sequence[Sequence[int]]], recipe: Recipe, generator: torch.Generator
) -> Iterator[Packed]:
    """Random rows packed into windows, epoch after epoch, for ever.

    A row goes into the first window with room. One that finds none waits for the next step; with
    16 waiting, the step is full (99 % of its positions predict a token).
    """
    windows: list[list[list[int]]] = [[] for _ in range(recipe.windows)]
    room = [recipe.window] * recipe.windows
    waiting: list[list[int]] = []

    def place(row: list[int]) -> bool:
        for index, free in enumerate(room):
            if len(row) - 1 <= free:
                windows[index].append(row)
                room[index] -= len(row) - 1
                return True
        return False

    for epoch in itertools.count():
        rows = joined_rows(senders, recipe, generator)
        for index in torch.randperm(len(rows), generator=generator).tolist():
            if place(rows[index]):
                continue
            waiting.append(rows[index])
            if len(waiting) == 16:
                yield _packed(windows, recipe.window, epoch)
                windows = [[] for _ in range(recipe.windows)]
                room = [recipe.window] * recipe.windows
                waiting = [row for row in waiting if not place(row)]


def _packed(windows: Sequence[Sequence[Sequence[int]]], window: int, epoch: int) -> Packed:
    inputs = torch.zeros(len(windows), window, dtype=torch.int64)
    targets = torch.full((len(windows), window), UNUSED)
    segments = torch.zeros(len(windows), window, dtype=torch.int64)
    for line, rows in enumerate(windows):
        start = 0
        for number, row in enumerate(rows, start=1):
            stop = start + len(row) - 1
            inputs[line, start:stop] = torch.tensor(row[:-1])
            targets[line, start:stop] = torch.tensor(row[1:])
            segments[line, start:stop] = number
            start = stop
    return Packed(inputs, targets, segments, epoch)


def _cut(row: list[int], longest: int) -> list[list[int]]:
    """Parts that predict at most `longest` tokens each; the last token is the next part's first."""
    return [row[start : start + longest + 1] for start in range(0, len(row) - 1, longest)]


def main() -> None:
    """Train with the default recipe, or with some of its fields changed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="downloads")
    parser.add_argument("--clients", type=Path, default=CLIENTS_FILE)
    parser.add_argument("--minutes", type=float, help="decides the steps")
    for field in fields(Recipe):
        kind = type(field.default) if not isinstance(field.default, bool) else _boolean
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=kind, default=field.default)
    arguments = parser.parse_args()
    recipe = Recipe(**{field.name: getattr(arguments, field.name) for field in fields(Recipe)})

    torch.set_num_threads(1)
    corpus = load_corpus(arguments.cache, arguments.clients, recipe.validation_share, recipe.seed)
    texts = corpus.training_texts()
    tokenizer = train_tokenizer(texts, recipe.vocab_size)
    shared, shared_held_out = texts_shared_with_clients(corpus)
    facts = {
        "training_senders": len(corpus.training),
        "training_messages": len(texts),
        "training_characters": sum(map(len, texts)),
        "training_tokens": sum(len(s) - 1 for s in encode(tokenizer, texts)),
        "validation_senders": len(corpus.validation),
        "validation_messages": sum(map(len, corpus.validation.values())),
        "same_text_as_a_client_message": shared,
        "same_text_as_a_held_out_message": shared_held_out,
    }
    print(json.dumps({"recipe": asdict(recipe), **facts}), flush=True)
    model, done = train(recipe, corpus, tokenizer, arguments.minutes)
    print(json.dumps({"recipe": asdict(done)}))
    save_folder(arguments.out, model, tokenizer)


def _boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither 'true' nor 'false'")
    return text == "true"


if __name__ == "__main__":
    main()
