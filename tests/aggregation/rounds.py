"""Rounds for the laws: a server's state and what clients sent, as a method allows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from hypothesis import strategies as st

from fedlora.adapter import Adapter, LoraConfig, LoraLayer
from fedlora.aggregation import ClientProfile, Method, ServerState, Update
from tests.reference.methods import Products, mean_products

# Every sum here has its rounding to float32 once or twice, in factors and in products of them.
EPS = 4 * float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Round:
    """A state, and the updates of its next round."""

    state: ServerState
    updates: list[Update]

    @property
    def size(self) -> float:
        """What a rounding error is relative to: the factors' norms, not those of their products."""
        adapters = [update.adapter for update in self.updates] + [self.state.trainable]
        adapters += [self.state.frozen] if self.state.frozen else []
        norms = [
            layer.scaling * float(np.linalg.norm(layer.A)) * float(np.linalg.norm(layer.B))
            for adapter in adapters
            for layer in adapter.layers.values()
        ]
        return max(norms, default=0.0) + 1e-30


def random_adapter(
    rng: np.random.Generator, shapes: Sequence[tuple[int, int]], rank: int, *, rslora: bool = False,
    alpha: float = 3.0, zero_b: bool = False,
) -> Adapter:  # fmt: skip
    """A linear layer for each (out, in), the first a convolution if there are more."""
    config = LoraConfig(rank=rank, lora_alpha=alpha, variant="rslora" if rslora else "lora")
    layers = {}
    for number, (out, width) in enumerate(shapes):
        in_shape, kind = (
            ((width,), "linear") if number or len(shapes) == 1 else ((width, 2), "conv")
        )
        layers[f"l{number}"] = LoraLayer(
            rng.normal(size=(rank, *in_shape)),
            rng.normal(size=(out, rank)) * (not zero_b),
            config.scaling_of("l"),
            None,
            kind,  # type: ignore[arg-type]
        )
    return Adapter(layers, config)


def trained(
    method: Method, state: ServerState, profile: ClientProfile, rng: np.random.Generator,
    *, zero: bool = False,
) -> Adapter:  # fmt: skip
    """What a client makes of the broadcast: other values in the factors that it may train."""
    factors, layers = method.trained(state.round + 1), {}
    for path, layer in method.broadcast(state, profile).trainable.layers.items():
        size = 0.0 if zero else 1.0
        layers[path] = replace(
            layer,
            A=rng.normal(size=layer.A.shape) if "A" in factors else layer.A,
            B=size * rng.normal(size=layer.B.shape) if "B" in factors else layer.B,
        )
    return replace(method.broadcast(state, profile).trainable, layers=layers)


@st.composite
def rounds(
    draw: st.DrawFn, method: Method, *, clients: int | None = None, larger: int = 2
) -> Round:
    """Shapes of 1 to 7, ranks beyond them, one client, zero updates, and for methods that allow
    it clients of other ranks (`larger` than the server's by so much) and alphas."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    sizes = st.integers(1, 7)
    shapes = draw(st.lists(st.tuples(sizes, sizes), min_size=1, max_size=3))
    rank, rslora = draw(st.integers(1, 5)), draw(st.booleans())
    start = random_adapter(rng, shapes, rank, rslora=rslora, zero_b=draw(st.booleans()))
    state = ServerState.start(start)
    count = clients or draw(st.integers(1, 5))
    weights = draw(st.lists(st.floats(0.5, 1e4), min_size=count, max_size=count))
    done = draw(st.integers(0, 2))  # rounds before this one: each with a client
    for number in range(done):
        before = trained(method, state, ClientProfile("c0"), rng)
        state = method.aggregate(state, [Update(before, 1.0 + number, "c0")])
    foreign = method.any_rank and draw(st.booleans())
    updates = []
    for number, weight in enumerate(weights):
        profile = ClientProfile(
            f"c{number}", draw(st.integers(1, rank)) if method.any_rank else None
        )
        zero = draw(st.integers(0, 3)) == 0
        mine = trained(method, state, profile, rng, zero=zero)
        if foreign:  # made elsewhere, with an alpha of its own
            high = rank if method.name == "hetlora" else rank + larger
            mine = random_adapter(
                rng, shapes, draw(st.integers(1, high)), alpha=draw(st.floats(0.1, 9)), zero_b=zero
            )
        updates.append(Update(mine, weight, f"c{number}"))
    return Round(state, updates)


def products(adapter: Adapter) -> Products:
    """The delta_weights in float64, flattened to (out, in)."""
    return mean_products([Update(adapter, 1.0, "")])


def assert_products(found: Products, expected: Products, size: float) -> None:
    """Assert equality to float32's rounding of factors whose products have `size`."""
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, rtol=0, atol=EPS * size)
