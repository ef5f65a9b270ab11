"""Adapters to write and read."""

from __future__ import annotations

import numpy as np

from fedlora.adapter import Adapter, LoraConfig, LoraLayer, Variant


def small_adapter(variant: Variant = "lora", seed: int = 0) -> Adapter:
    """Every kind of layer, ranks 1 to 3, odd sizes."""
    rng = np.random.default_rng(seed)
    shapes = {
        "embed": (2, (7,), 5, "embedding"),
        "conv1": (3, (4, 3), 5, "conv"),
        "conv2": (1, (1, 3, 2), 6, "conv"),
        "h.0.fc": (2, (9,), 4, "linear"),
        "h.1.fc": (2, (1,), 1, "linear"),
    }
    config = LoraConfig(
        rank=2, lora_alpha=3, target_modules=("fc", "embed", "conv1", "conv2"), variant=variant,
        rank_pattern={"conv1": 3, "^conv2": 1}, alpha_pattern={r"h\.\d\.fc": 7},
        lora_dropout=0.1, extra={"task_type": "CAUSAL_LM"},
    )  # fmt: skip
    layers = {}
    for path, (rank, in_shape, out, kind) in shapes.items():
        layers[path] = LoraLayer(
            A=rng.normal(size=(rank, *in_shape)),
            B=rng.normal(size=(out, rank)),
            scaling=config.scaling_of(path),
            magnitude=rng.uniform(0.5, 2, out) if config.uses_dora else None,
            kind=kind,
        )
    return Adapter(layers, config, base="ab" * 32)


def keyboard_adapter() -> Adapter:
    """Rank 8 on q and v of SmolLM2-135M: 30 blocks, 576 to 576 and 576 to 192 features."""
    rng = np.random.default_rng(0)
    layers = {
        f"model.layers.{block}.self_attn.{name}": LoraLayer(
            rng.normal(size=(8, 576)), rng.normal(size=(out, 8)), 2.0
        )
        for block in range(30)
        for name, out in (("q_proj", 576), ("v_proj", 192))
    }
    config = LoraConfig(rank=8, lora_alpha=16, target_modules=("q_proj", "v_proj"))
    return Adapter(layers, config, base="ab" * 32)
