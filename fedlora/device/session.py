"""A session: one base in memory, and any adapter on it, changed between two requests.

    session = Session("bundle/")
    session.load("global.safetensors")            # checked, then active
    session.run(inputs)                           # logits
    session.add("alice", fl.load_adapter("alice/"))
    session.run(inputs, adapter="alice")          # this request alone
    session.swap("alice")                         # from now on; nothing is loaded again
    session.swap(None)                            # the base itself, bit for bit

An adapter is checked before it replaces another: when anything about it is wrong, a typed error is
raised and the old one stays. Its factors are inputs of the graph and are kept as they are fed, so
that changing to one that is loaded is a change of a pointer. Requests may come from several
threads: each takes the adapter that is active when it starts, to its end.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from fedlora.adapter import Adapter, Array
from fedlora.data.text import encode_classes
from fedlora.device.decoding import Decoder
from fedlora.device.fit import check_adapter
from fedlora.device.generate import generate
from fedlora.device.manifest import Manifest, factor_names, factors_of, zero_factors
from fedlora.device.runtime import OpenBundle, open_bundle, run_graph
from fedlora.device.suggest import Suggestion, Words, suggest
from fedlora.errors import (
    ConfigError,
    DataError,
    NonFiniteError,
    unknown_name,
)
from fedlora.formats import load_adapter

__all__ = ["ACTIVE", "Active", "Prediction", "Session", "check_adapter"]


class Active(Enum):
    """Stands for the adapter that `Session.swap` made active."""

    ACTIVE = "active"


ACTIVE: Literal[Active.ACTIVE] = Active.ACTIVE
Which: TypeAlias = str | Literal[Active.ACTIVE] | None  # a name, the active one, the base
MAX_TEXT = 512  # tokens of a text that is classified; longer ones are cut


@dataclass(frozen=True, slots=True)
class Prediction:
    """The most probable class of one example."""

    label: str  # of the bundle's labels, else the class's number
    index: int
    probability: float
    probabilities: npt.NDArray[np.float64]  # (classes,)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """An adapter (None: the base) and what it is as inputs of a graph."""

    adapter: Adapter | None
    feeds: Mapping[str, Array]


class Session:
    """Serves a bundle. See the module's docstring.

    bundle: its folder, or an `OpenBundle` to share its sessions with others. threads and
    low_memory: see `open_bundle`. Raises `FormatError` for a bundle that is not sound.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str] | OpenBundle,
        *,
        adapter: Adapter | None = None,
        threads: int | None = None,
        low_memory: bool = False,
    ) -> None:
        self.bundle = open_bundle(bundle, threads=threads, low_memory=low_memory)
        self._base = _Loaded(None, dict(zero_factors(self.manifest)) if self.manifest.web else {})
        self._active = self._base
        self._named: dict[str, _Loaded] = {}
        self._words: Words | None = None
        self._typing: Decoder | None = None
        name = self.manifest.graph_of("infer") or self.manifest.graph_of("decode")
        if name is not None:
            self.bundle.session(name)  # what is wrong with it is said now
        if adapter is not None:
            self.swap(adapter)

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def adapter(self) -> Adapter | None:
        """The active adapter, None for the base."""
        return self._active.adapter

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters that `add` keeps."""
        return tuple(self._named)

    def swap(self, adapter: Adapter | str | None) -> None:
        """Make an adapter active: a new one, one that was added, by its name, or None, the base.

        Raises `BaseMismatchError`, `LayerMismatchError`, `ShapeMismatchError`, `NonFiniteError`,
        `UnsupportedError` for DoRA, and `UnknownNameError`; the old one then stays active.
        """
        if adapter is None or isinstance(adapter, str):
            self._active = self._loaded(adapter)
        else:
            self._active = self._check(adapter)

    def load(self, path: str | os.PathLike[str], *, sha256: str | None = None) -> Adapter:
        """Read an adapter's file, make it active and return it.

        sha256: of the whole packed file. Raises what `load_adapter` and `swap` raise; the old
        adapter then stays active.
        """
        adapter = load_adapter(path, sha256=sha256)
        self.swap(adapter)
        return adapter

    def add(self, name: str, adapter: Adapter) -> None:
        """Keep an adapter under a name, in place of one that has it; raises as `swap` does."""
        if not isinstance(name, str) or not name:
            raise ConfigError(f"expected a name for the adapter, found {name!r}")
        self._named[name] = self._check(adapter)

    def remove(self, name: str) -> None:
        """Forget the adapter of this name; it stays active if it is. Raises `UnknownNameError`."""
        self._loaded(name)
        del self._named[name]

    def run(self, inputs: npt.ArrayLike, *, adapter: Which = ACTIVE) -> Array:
        """Return the logits: (batch, classes), or (batch, time, vocabulary) of a language model.

        inputs: (batch, time) token ids, or (batch, *shape) float32, as the manifest says. adapter:
        the name of an added one, or None for the base, for this request alone.

        Raises `DataError` for inputs that do not fit, and `UnknownNameError`.
        """
        feeds = self._loaded(adapter).feeds
        array = self._inputs(inputs)
        session = self.bundle.session(self.manifest.graph_of("infer") or "infer.onnx")
        logits: Array = run_graph(session, ["logits"], {"inputs": array, **feeds})[0]
        return logits

    @overload  # a str is also a sequence of them: the first that fits is meant
    def predict(  # type: ignore[overload-overlap]
        self, inputs: str, *, adapter: Which = ...
    ) -> Prediction: ...
    @overload
    def predict(
        self, inputs: npt.ArrayLike | Sequence[str], *, adapter: Which = ...
    ) -> list[Prediction]: ...
    def predict(
        self, inputs: npt.ArrayLike | Sequence[str] | str, *, adapter: Which = ACTIVE
    ) -> Prediction | list[Prediction]:
        """Classify one text, several texts, or a batch as `run` takes it.

        Raises `ConfigError` where the bundle is no classifier, and as `run` does.
        """
        if self.manifest.task != "classification":
            raise ConfigError(
                f"predict: expected a bundle for classification, found {self.manifest.task}; use "
                "generate or suggest"
            )
        texts = [inputs] if isinstance(inputs, str) else inputs
        if isinstance(texts, Sequence) and texts and all(isinstance(text, str) for text in texts):
            if self.manifest.input_dtype != "int64":
                raise DataError(
                    "inputs: expected numbers, found text; this bundle takes float32 of shape "
                    f"(batch, {', '.join(map(str, self.manifest.input_shape))})"
                )
            tokenizer = self.bundle.tokenizer()
            array = encode_classes(texts, [0] * len(texts), tokenizer, MAX_TEXT).inputs
        else:
            array = np.asarray(texts)
        predictions = [self._prediction(row) for row in self.run(array, adapter=adapter)]
        return predictions[0] if isinstance(inputs, str) else predictions

    def generate(
        self,
        prompt: str,
        max_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
        adapter: Which = ACTIVE,
    ) -> Iterator[str]:
        """Continue a message; yield the text piece by piece, as it is made.

        temperature 0 takes the most probable token; above it tokens are drawn, of the `top_k` most
        probable, of the fewest that have `top_p` of the probability together, or of both. The same
        seed draws the same tokens. It ends with the message, before any text of `stop`, or after
        `max_tokens`. An adapter that is swapped meanwhile changes nothing.

        >>> "".join(session.generate("see you"))  # doctest: +SKIP
        ' tomorrow'
        """
        return generate(
            self._decoder(adapter), self.bundle.tokenizer(), prompt, max_tokens,
            temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=stop,
        )  # fmt: skip

    def suggest(self, text: str, k: int = 3, *, adapter: Which = ACTIVE) -> list[Suggestion]:
        """Return the k most probable next words, or completions of a word that is being typed.

        After a space, or at the start of a message, these are next words; otherwise words that
        begin with the last letters of `text`. See `fedlora.device.suggest`.
        """
        decoder = self._typing  # it still knows the text that was there at the last letter
        if decoder is None or decoder.feeds is not self._loaded(adapter).feeds:
            decoder = self._typing = self._decoder(adapter)
        if self._words is None:
            self._words = Words.of(self.bundle.tokenizer(), self.manifest.outputs)
        return suggest(decoder, self.bundle.tokenizer(), self._words, text, k)

    def _decoder(self, which: Which) -> Decoder:
        if self.manifest.task != "next-token":
            raise ConfigError(
                f"expected a bundle of a language model, found one for {self.manifest.task}; use "
                "predict"
            )
        return Decoder(self.bundle, self._loaded(which).feeds)

    def _loaded(self, which: Which) -> _Loaded:
        if which is None:
            return self._base
        if which is ACTIVE:
            return self._active
        if which not in self._named:
            raise unknown_name("adapter", which, self._named)
        return self._named[which]

    def _check(self, adapter: Adapter) -> _Loaded:
        """Check an adapter against the bundle, and make it ready to be fed."""
        check_adapter(adapter, self.manifest)
        # A scaling can take a factor past float32's largest number; that is looked at below.
        with np.errstate(over="ignore", invalid="ignore"):
            feeds = dict(factors_of(adapter))
        for path in adapter.layers:  # A was checked when the adapter was made
            name = factor_names(path)[1]
            flat = feeds[name].reshape(-1)
            # One reduction instead of a mask; where it is not finite, the slow look decides.
            if not math.isfinite(np.vdot(flat, flat)) and not np.isfinite(flat).all():
                raise NonFiniteError(
                    f"{name}: expected finite numbers once the scaling is multiplied in, found NaN "
                    "or infinity; the adapter cannot be served"
                )
        return _Loaded(adapter, {**self._base.feeds, **feeds})

    def _inputs(self, inputs: npt.ArrayLike) -> npt.NDArray[Any]:
        """Return a batch in the graph's type and check its shape."""
        manifest, array = self.manifest, np.asarray(inputs)
        wanted = manifest.input_dtype
        if array.dtype.kind not in ("iu" if wanted == "int64" else "iuf"):
            raise DataError(f"inputs: expected {wanted}, found {array.dtype}")
        shape = manifest.input_shape
        text = "time" if wanted == "int64" and not shape else ", ".join(map(str, shape))
        fits = array.shape[1:] == shape if shape or wanted == "float32" else array.ndim == 2
        if not fits or 0 in array.shape:
            raise DataError(
                f"inputs: expected (batch, {text}), none of them 0, found {array.shape}"
            )
        if wanted == "int64" and array.min() < 0:  # Gather would count from the end
            raise DataError(f"inputs: expected token ids >= 0, found {array.min()}")
        return np.ascontiguousarray(array, wanted)

    def _prediction(self, logits: Array) -> Prediction:
        if not np.isfinite(logits).all():
            raise DataError(
                "the model's logits are not finite: the inputs, the adapter or the bundle is not "
                "sound"
            )
        powers = np.exp(logits.astype(np.float64) - logits.max())
        probabilities = powers / powers.sum()
        index = int(probabilities.argmax())
        labels = self.manifest.labels
        label = labels[index] if labels is not None else str(index)
        return Prediction(label, index, float(probabilities[index]), probabilities)
