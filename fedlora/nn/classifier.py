"""A language model with a new classification head that is zero, so that only A and B travel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedlora.errors import ConfigError

__all__ = ["Classifier"]


class Classifier(nn.Module):
    """The body of a causal language model and a frozen zero Linear on each row's last token.

    The head `zero_head` has no bias and no weight of its own: LoRA on it is the head, so that its
    rank has to be at least the number of classes (``rank_pattern={"zero_head": n}``). Since it is
    not called classifier or head, "all-linear" includes it. The body keeps its paths ("model.…"),
    and the language model's own head is left out.

    The last token is the last one that is not 0. Rows are padded with 0 on the right, and messages
    contain no token 0 where it is the separator, as in the bundled base and in SmolLM2.
    """

    output_path = ""  # no layer is an output that "all-linear" would leave out

    def __init__(self, language_model: nn.Module, num_classes: int) -> None:
        super().__init__()
        body = getattr(language_model, getattr(language_model, "base_model_prefix", "model"), None)
        embeddings = next(
            (m for m in language_model.modules() if isinstance(m, nn.Embedding)), None
        )
        if not isinstance(body, nn.Module) or embeddings is None:
            raise ConfigError(
                "num_classes: expected a language model, whose body is its attribute `model`, "
                f"found {type(language_model).__name__}; a classifier has its head already"
            )
        if num_classes < 2:
            raise ConfigError(f"num_classes: expected a whole number >= 2, found {num_classes!r}")
        self.model = body
        self.zero_head = nn.Linear(embeddings.embedding_dim, num_classes, bias=False)
        nn.init.zeros_(self.zero_head.weight)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map token ids (b, T) int64 to logits (b, num_classes)."""
        states: Any = self.model(input_ids)
        hidden: Tensor = states if isinstance(states, Tensor) else states.last_hidden_state
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (places * (input_ids != 0)).amax(dim=1)
        picked = hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[-1]))
        logits: Tensor = self.zero_head(picked[:, 0])
        return logits
