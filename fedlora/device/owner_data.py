"""What a device's owner has, as examples: to train on, and held out to judge by. NumPy only.

    messages.txt      UTF-8, one message a line; blank lines count for nothing
    messages.jsonl    one JSON object a line, with "text"
    windows.npz       arrays "inputs" (n, *shape) and "targets" (n,) or (n, time)
    chitchat          a data set by name, and one of its clients: for trials

The held-out part is the end: the last fifth of the messages, or of each class's rows, so that none
of what is trained on was written later than what it is judged by.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlora.data import Examples, load_data
from fedlora.data.text import TokenizerLike, encode_messages, load_tokenizer
from fedlora.device.buckets import require_targets
from fedlora.device.manifest import Manifest
from fedlora.errors import ConfigError, DataError
from fedlora.imports import is_function

__all__ = ["OwnerData", "read_inputs", "read_messages", "read_owner_data"]

LONGEST = 64  # tokens of a message, where no train graph says how many it takes


@dataclass(frozen=True, slots=True)
class OwnerData:
    """An owner's examples in two parts; none is in both."""

    train: Examples
    held_out: Examples


def read_owner_data(
    source: str,
    tokenizer: TokenizerLike,
    manifest: Manifest,
    *,
    client: str | None = None,
    held_out_share: float = 0.2,
) -> OwnerData:
    """Read a file, or one client of a data set that `fedlora data list` names.

    tokenizer: the bundle's, as `load_data` takes it; None where the bundle has none. A message is
    cut to the longest row of a train graph.

    Raises `DataError` for data that cannot be read, is not of the bundle's kind or too little to
    hold some of it out; `ConfigError` for options that do not go together; `UnknownNameError`.
    """
    if not 0 < held_out_share < 1:
        raise ConfigError(f"held-out share: expected a share in (0, 1), found {held_out_share}")
    path = Path(source)
    is_file = path.exists() or (not is_function(source) and bool(path.suffix or path.parts[1:]))
    if client is None and is_file and not path.exists():
        raise DataError(f"{source}: expected a file, found none")
    if client is not None or not is_file:
        data = _of_client(source, client, tokenizer, manifest, held_out_share)
    elif path.suffix == ".npz":
        data = _halves(_read_arrays(path, manifest), held_out_share)
    else:
        data = _of_messages(read_messages(path), tokenizer, manifest, held_out_share, source)
    for part, word in ((data.train, "train on"), (data.held_out, "hold out")):
        if len(part) == 0:
            raise DataError(f"{source}: expected examples to {word}, found none; give more data")
    return data


def read_messages(path: Path) -> list[str]:
    """Return the messages of a text file, or of JSON lines. Raises `DataError`."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected UTF-8 text, found byte {error.object[error.start]:#04x} at "
            f"{error.start}; save it as UTF-8, or give numbers as .npz"
        ) from None
    lines = [line.strip() for line in text.split("\n")]
    if path.suffix not in (".jsonl", ".ndjson", ".json"):
        return [line for line in lines if line]
    return [_text_of(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line]


def read_inputs(path: Path, manifest: Manifest) -> npt.NDArray[Any]:
    """Return the features of an .npy file, or "inputs" of an .npz file, (n, *shape) float32.

    Raises `DataError`.
    """
    found = _load(path)
    inputs = found if isinstance(found, np.ndarray) else found.get("inputs")
    if inputs is None:
        raise DataError(f"{path}: expected an array named 'inputs', found {_names(found)}")
    return _checked_inputs(inputs, manifest, path)


def _of_client(
    source: str,
    client: str | None,
    tokenizer: TokenizerLike,
    manifest: Manifest,
    held_out_share: float,
) -> OwnerData:
    data = load_data(
        source,
        task=manifest.task,
        tokenizer=tokenizer,
        test_share=held_out_share,
        max_length=_longest(manifest),
    )
    if client is None:
        ids = ", ".join(data.client_ids[:3])
        raise ConfigError(
            f"{source}: expected one of its {len(data)} clients, named by --client, such as {ids}"
        )
    found = data.client(client)
    return OwnerData(found.train, found.test)


def _of_messages(
    messages: Sequence[str],
    tokenizer: TokenizerLike,
    manifest: Manifest,
    held_out_share: float,
    source: str,
) -> OwnerData:
    if manifest.task != "next-token":
        raise DataError(
            f"{source}: this bundle's task is {manifest.task}: expected a .npz file with inputs "
            "and targets, found text"
        )
    loaded = load_tokenizer(tokenizer)
    middle = int(round((1 - held_out_share) * len(messages), 6))
    train, held_out = (
        encode_messages(part, loaded, _longest(manifest))
        for part in (messages[:middle], messages[middle:])
    )
    return OwnerData(train, held_out)


def _halves(examples: Examples, held_out_share: float) -> OwnerData:
    """Hold out the last rows, of each class its own: rows may be sorted by class."""
    classes = examples.targets if examples.targets.ndim == 1 else np.zeros(len(examples), np.int64)
    held_out = np.zeros(len(examples), bool)
    for value in np.unique(classes):
        rows = np.flatnonzero(classes == value)
        held_out[rows[len(rows) - math.floor(held_out_share * len(rows) + 1e-9) :]] = True
    return OwnerData(
        examples.take(np.flatnonzero(~held_out)), examples.take(np.flatnonzero(held_out))
    )


def _read_arrays(path: Path, manifest: Manifest) -> Examples:
    found = _load(path)
    if isinstance(found, np.ndarray) or not {"inputs", "targets"} <= found.keys():
        raise DataError(f"{path}: expected arrays 'inputs' and 'targets', found {_names(found)}")
    targets = found["targets"]
    if targets.dtype.kind not in "iu":
        raise DataError(f"{path}: targets: expected whole numbers, found {targets.dtype}")
    require_targets(targets, manifest, f"{path}: targets")
    inputs = _checked_inputs(found["inputs"], manifest, path)
    try:
        return Examples(inputs, targets)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _load(path: Path) -> Any:
    """Return the array of an .npy file, or those of an .npz file by name; never a pickle."""
    try:
        with open(path, "rb") as file:  # NumPy leaves it open when it is not what it expected
            found = np.load(file, allow_pickle=False)
            if isinstance(found, np.ndarray):
                return found
            with found:
                return {name: found[name] for name in found.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        text = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: expected NumPy's arrays, found {text}") from None


def _checked_inputs(inputs: npt.NDArray[Any], manifest: Manifest, path: Path) -> npt.NDArray[Any]:
    """Return inputs in the bundle's dtype. Raises `DataError` where they are not of its kind."""
    shape = manifest.input_shape if manifest.input_dtype == "float32" else ("time",)
    fits = len(inputs.shape) == 1 + len(shape) and (
        manifest.input_dtype == "int64" or inputs.shape[1:] == shape
    )
    kinds = "iu" if manifest.input_dtype == "int64" else "fiu"
    if not fits or inputs.dtype.kind not in kinds:
        wanted = ", ".join(["n", *map(str, shape)])
        raise DataError(
            f"{path}: inputs: expected ({wanted}) {manifest.input_dtype}, found "
            f"{inputs.shape} {inputs.dtype}"
        )
    return inputs.astype(manifest.input_dtype)


def _text_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError(f"{where}: expected a JSON object, found {line[:40]!r}") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise DataError(f'{where}: expected an object with "text", found {line[:40]!r}')
    return text


def _longest(manifest: Manifest) -> int:
    """Return the tokens of the longest row that a train graph takes."""
    return max((graph.positions or 0 for _, graph in manifest.buckets()), default=0) or LONGEST


def _names(found: Any) -> str:
    return "one array" if isinstance(found, np.ndarray) else ", ".join(sorted(found)) or "none"
