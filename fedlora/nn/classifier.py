"""A language model or an encoder with a new head that is zero, so that only A and B travel."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.errors import ConfigError

__all__ = ["NEW_HEAD", "Classifier"]

NEW_HEAD = "zero_head"  # the path of the head


class Classifier(nn.Module):
    """The body of a text model and a frozen zero Linear on one vector a row.

    The head `zero_head` has no bias and no weight of its own: LoRA on it is the head, so that its
    rank has to be at least the number of classes (``rank_pattern={"zero_head": n}``). Since it is
    not called classifier or head, "all-linear" includes it. The body keeps its paths ("model.…"),
    and the model's own head, or an encoder's pooler, is left out.

    A causal body gives the state of the row's last token, which alone has seen the whole row; an
    encoder, where every token sees the whole row, gives the mean over the row's tokens (what the
    sentence encoders were trained for). Which of the two it is, is found by asking it: if another
    second token changes the first state, it is an encoder. The body has to be in evaluation mode.

    Rows are padded with 0 on the right, and a token is whatever is not 0: messages contain no token
    0 where it is the separator or the padding, as in the bundled base, SmolLM2 and BERT. An encoder
    is given the mask of the tokens, and the mean is taken over them, so that padding changes
    nothing but the order of sums.
    """

    output_path = ""  # no layer is an output that "all-linear" would leave out

    def __init__(self, text_model: nn.Module, num_classes: int) -> None:
        """Raises `ConfigError` for what has no body that reads tokens, or cannot be masked."""
        super().__init__()
        body = _body(text_model)
        if body is None:
            raise ConfigError(
                "num_classes: expected a language model, whose body is its attribute `model`, or "
                f"an encoder, found {type(text_model).__name__}; a classifier has its head already"
            )
        if num_classes < 2:
            raise ConfigError(f"num_classes: expected a whole number >= 2, found {num_classes!r}")
        self.model = body
        self.takes_mask = "attention_mask" in inspect.signature(type(body).forward).parameters
        first, second = self._probe()
        self.is_encoder = not torch.equal(first, second)
        if self.is_encoder and not self.takes_mask:
            raise ConfigError(
                f"num_classes: {type(body).__name__} looks at all tokens of a row, the padding "
                "included, and its forward takes no attention_mask; give it one"
            )
        if self.is_encoder and isinstance(getattr(body, "pooler", None), nn.Module):
            body.pooler = None  # type: ignore[assignment]  # reads the first token for a head that is not used
        self.zero_head = nn.Linear(first.shape[-1], num_classes, bias=False)
        nn.init.zeros_(self.zero_head.weight)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map token ids (b, T) int64 to logits (b, num_classes)."""
        used = input_ids != 0
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        if self.is_encoder:
            used = used | (places == 0)  # whatever is there: a mean over no token would be NaN
            hidden = self._states(input_ids, used.long())
            weights = used.to(hidden.dtype)[:, :, None]
            pooled = (hidden * weights).sum(1) / weights.sum(1)
        else:
            hidden = self._states(input_ids, None)
            last = (places * used).amax(dim=1)
            pooled = hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[-1]))[:, 0]
        logits: Tensor = self.zero_head(pooled)
        return logits

    def _states(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """(b, T, width) of the body's last layer."""
        options = {} if mask is None else {"attention_mask": mask}
        states: Any = self.model(input_ids, **options)
        return states if isinstance(states, Tensor) else states.last_hidden_state

    @torch.no_grad()
    def _probe(self) -> tuple[Tensor, Tensor]:
        """Return the first place's state (width,) before one token and before another."""
        device = next(self.model.parameters()).device
        found = []
        for second in (0, 1):  # each alone: rows of one batch may be added up in other orders
            ids = torch.tensor([[0, second]], device=device)
            mask = torch.ones_like(ids) if self.takes_mask else None
            found.append(self._states(ids, mask)[0, 0])
        return found[0], found[1]


def _body(model: nn.Module) -> nn.Module | None:
    """Return the part of a text model that gives states; None where there is none."""
    if not any(isinstance(module, nn.Embedding) for module in model.modules()):
        return None
    # Of Hugging Face's models, a body without a head is its own base_model.
    own_base: object = getattr(model, "base_model", None)
    if own_base is model:
        return model
    body: object = getattr(model, getattr(model, "base_model_prefix", "model"), None)
    return body if isinstance(body, nn.Module) else None
