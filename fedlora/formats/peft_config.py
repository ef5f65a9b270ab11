"""PEFT's ``adapter_config.json`` (LoraConfig of PEFT 0.21) to `fedlora.LoraConfig` and back.

Every key of PEFT is in one of the tables below. A key that changes what the adapter computes in a
way that fedlora does not have is refused by its name when it is set; one that changes nothing for
given factors is kept in `LoraConfig.extra` and written back; an unknown one is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fedlora.adapter import Adapter, LoraConfig
from fedlora.errors import (
    FormatError,
    LayerMismatchError,
    UnsupportedError,
    nearest,
)
from fedlora.formats.stranger_config import build_config, is_cheap
from fedlora.formats.strict_json import parse_json, shown
from fedlora.patterns import literal_pattern, suffixes

__all__ = ["MAX_CONFIG_BYTES", "parse_config", "peft_keys"]

MAX_CONFIG_BYTES = 1 << 18

_PEFT_DEFAULTS: dict[str, Any] = {
    "r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": None, "use_rslora": False,
    "use_dora": False, "fan_in_fan_out": False, "layers_to_transform": None,
    "layers_pattern": None, "rank_pattern": {}, "alpha_pattern": {},
}  # fmt: skip
_KEPT = frozenset(
    {
        "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
        "peft_version", "exclude_modules", "init_lora_weights", "megatron_core",
        "qalora_group_size",
        # PEFT ignores these unless init_lora_weights names them, and those are refused below.
        "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    }
)  # fmt: skip
_DROPPED = frozenset({"runtime_config", "merge_weights"})  # PEFT ignores them as well
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "modules_to_save": (None, []),
    "megatron_config": (None,),
    "trainable_token_indices": (None,),
    "velora_config": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False,),
    "monteclora_config": (None,),
    "layer_replication": (None,),
    "lora_bias": (False,),
    "target_parameters": (None, []),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "ensure_weight_tying": (False,),
    "enable_lora": (None,),  # of PEFT before 0.3
}
# The others (pissa, olora, corda, loftq, lora_ga, mica) change the base, or what is trained.
_HARMLESS_INIT = (True, False, "gaussian", "orthogonal", "eva")
_KNOWN = {"peft_type", *_PEFT_DEFAULTS, *_KEPT, *_DROPPED, *_NEUTRAL}


def parse_config(data: bytes, where: str, paths: Iterable[str]) -> LoraConfig:
    """Return the config of an adapter that has layers at `paths`.

    Absent keys take PEFT's defaults. Raises `FormatError` for what is malformed or unknown,
    `UnsupportedError` for what fedlora does not compute, and `LayerMismatchError` when
    target_modules and `paths` disagree.
    """
    value = parse_json(data, where)
    if not isinstance(value, dict):
        raise FormatError(f"{where}: expected an object, found {type(value).__name__}")
    _check_keys(value, where)
    keys = {**_PEFT_DEFAULTS, **{k: v for k, v in value.items() if k in _PEFT_DEFAULTS}}
    for key in ("use_rslora", "use_dora"):
        if not isinstance(keys[key], bool):
            raise FormatError(f"{where}: {key}: expected true or false, found {shown(keys[key])}")
    paths = sorted(paths)
    values = {
        "rank": keys["r"],
        "lora_alpha": keys["lora_alpha"],
        "target_modules": _targets(keys["target_modules"], paths),
        "variant": ("rs" if keys["use_rslora"] else "") + ("dora" if keys["use_dora"] else "lora"),
        "lora_dropout": keys["lora_dropout"],
        "layers": None,
        "layers_to_transform": _as_list(keys["layers_to_transform"]) or None,
        "layers_pattern": _as_list(keys["layers_pattern"]) or [],
        "rank_pattern": {} if keys["rank_pattern"] is None else keys["rank_pattern"],
        "alpha_pattern": {} if keys["alpha_pattern"] is None else keys["alpha_pattern"],
        "fan_in_fan_out": keys["fan_in_fan_out"],
        "extra": {key: value[key] for key in sorted(value) if key in _KEPT},
    }
    config = build_config(values, where, paths, names={"rank": "r"})
    _check_targets(config, paths, where)
    return config


def peft_keys(adapter: Adapter) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the keys of adapter_config.json, and scalings that these keys only give rounded.

    PEFT computes each layer's rank and scaling from the keys. Where the adapter's differ from its
    config (after a stack, say), rank_pattern and alpha_pattern name the layers one by one.
    """
    config = adapter.config
    kept = {key: value for key, value in config.extra.items() if key in _KEPT}
    if not _is_one_of(kept.get("init_lora_weights", True), _HARMLESS_INIT):
        kept.pop("init_lora_weights")
    keys: dict[str, Any] = {
        **kept,
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": _number(config.lora_alpha),
        "lora_dropout": config.lora_dropout,
        "fan_in_fan_out": config.fan_in_fan_out,
        "bias": "none",
        "use_rslora": config.uses_rslora,
        "use_dora": config.uses_dora,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    if _selects(config, adapter):
        targets = config.target_modules
        keys["target_modules"] = targets if isinstance(targets, str) else list(targets)
        if config.layers_to_transform is not None:
            keys["layers_to_transform"] = list(config.layers_to_transform)
            keys["layers_pattern"] = list(config.layers_pattern) or None
    else:
        keys["target_modules"] = list(adapter)
        keys.pop("exclude_modules", None)
    patterns, rounded = _patterns(adapter)
    return {**keys, **patterns}, rounded


def _patterns(adapter: Adapter) -> tuple[dict[str, Any], dict[str, float]]:
    config, layers = adapter.config, adapter.layers
    ranks = {path: layer.rank for path, layer in layers.items()}
    scalings = {path: layer.scaling for path, layer in layers.items()}
    if config.resolve(layers) == {path: (ranks[path], scalings[path]) for path in layers}:
        return {
            "rank_pattern": dict(config.rank_pattern),
            "alpha_pattern": {key: _number(a) for key, a in config.alpha_pattern.items()},
        }, {}
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, Any] = {}
    rounded: dict[str, float] = {}
    for path in layers:
        divisor = math.sqrt(ranks[path]) if config.uses_rslora else ranks[path]
        if ranks[path] != config.rank:
            rank_pattern[literal_pattern(path)] = ranks[path]
        if config.lora_alpha / divisor != scalings[path]:
            alpha = _alpha(scalings[path], divisor)
            alpha_pattern[literal_pattern(path)] = _number(alpha)
            if alpha / divisor != scalings[path]:
                rounded[path] = scalings[path]
    return {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}, rounded


def _alpha(scaling: float, divisor: float) -> float:
    """Return the alpha for which ``alpha / divisor`` is `scaling`, or as near as float64 has it."""
    alpha = scaling * divisor
    around = (alpha, math.nextafter(alpha, 0.0), math.nextafter(alpha, math.inf))
    return min(around, key=lambda a: abs(a / divisor - scaling))


def _selects(config: LoraConfig, paths: Iterable[str]) -> bool:
    """Whether PEFT, given the config's own target_modules, finds every layer of the adapter."""
    if config.layers is not None or config.target_modules == "all-linear":
        return False
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        return False  # PEFT refuses the two together
    paths = list(paths)
    return is_cheap(config, paths) and all(map(_peft_selector(config), paths))


def _check_targets(config: LoraConfig, paths: list[str], where: str) -> None:
    """Raise when layers of the file are not targets, or names in target_modules have no layer."""
    targets = config.target_modules
    if targets != "all-linear" and is_cheap(config, paths):
        selects = _peft_selector(config)
        strangers = [path for path in paths if not selects(path)]
        if strangers:
            raise LayerMismatchError(
                f"{where}: {len(strangers)} layer(s) of the file are not in target_modules, "
                f"the first is {strangers[0]!r}"
            )
    if not isinstance(targets, str):
        present = {part for path in paths for part in suffixes(path)}
        absent = [name for name in targets if name not in present]
        if absent:
            raise LayerMismatchError(
                f"{where}: target_modules names {absent[0]!r}, of which the file has no layer"
            )


def _peft_selector(config: LoraConfig) -> Callable[[str], bool]:
    """Return PEFT's check_target_module_exists as a function of the path."""
    targets = config.target_modules
    excluded = config.extra.get("exclude_modules") or ()
    wanted = frozenset(config.layers_to_transform or ())
    names = frozenset() if isinstance(targets, str) else frozenset(targets)
    excluded_names = frozenset() if isinstance(excluded, str) else frozenset(excluded)
    blocks = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in config.layers_pattern]
    blocks = blocks or [r".*?\.[^.]*\.(\d+)\."]

    def selects(path: str) -> bool:
        if isinstance(excluded, str) and re.fullmatch(excluded, path):
            return False
        if not excluded_names.isdisjoint(suffixes(path)):
            return False
        if isinstance(targets, str):
            return re.fullmatch(targets, path) is not None
        if path in names:  # a whole path is a target in any block
            return True
        if names.isdisjoint(suffixes(path)):
            return False
        found = next((match for block in blocks if (match := re.match(block, path))), None)
        return not wanted or (found is not None and int(found[1]) in wanted)

    return selects


def _check_keys(value: Mapping[str, Any], where: str) -> None:
    for key in sorted(value.keys() - _KNOWN):
        raise FormatError(f"{where}: unknown key {key[:80]!r}{nearest(key[:80], _KNOWN)}")
    if value.get("peft_type") != "LORA":
        raise UnsupportedError(
            f"{where}: peft_type: expected 'LORA', found {shown(value.get('peft_type'))}"
        )
    for key, neutral in _NEUTRAL.items():
        if key in value and not _is_one_of(value[key], neutral):
            raise UnsupportedError(
                f"{where}: {key}: expected {neutral[0]!r}, found {shown(value[key])}; fedlora "
                "has adapters of A, B and a DoRA magnitude only"
            )
    init = value.get("init_lora_weights", True)
    if not _is_one_of(init, _HARMLESS_INIT):
        raise UnsupportedError(
            f"{where}: init_lora_weights: expected one of {_HARMLESS_INIT}, found {shown(init)}, "
            "which changes the base or what is trained; convert the adapter to plain LoRA with PEFT"
        )


def _targets(value: Any, paths: list[str]) -> Any:
    if value is None:  # PEFT looks the names up by the architecture; the layers are the same
        return paths
    return "all-linear" if isinstance(value, str) and value.lower() == "all-linear" else value


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else None if value in (None, "") else [value]


def _number(value: float) -> int | float:
    """Write whole alphas as PEFT does, without a point."""
    return int(value) if float(value).is_integer() and abs(value) < 2**53 else value


def _is_one_of(value: Any, choices: tuple[Any, ...]) -> bool:
    return any(type(value) is type(choice) and value == choice for choice in choices)
