"""Local training on a device, in ONNX Runtime: what `fedlora.nn.train_local` does in torch.

A train graph gives the loss and the gradients of the factors; everything else of a step is here,
over one flat row of all trained factors (`fedlora.flat`). The sessions read the factors from that
row and write their gradients into another, in place: ONNX Runtime is given views of both.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fedlora.adapter import Adapter, Array
from fedlora.device.buckets import Batch, Piece, pieces_of
from fedlora.device.manifest import Manifest, factor_names, factors_of, zero_factors
from fedlora.device.optimizers import add_proximal, clip, optimizer_of
from fedlora.device.runtime import OpenBundle, one_line, open_bundle, ort
from fedlora.device.session import check_adapter
from fedlora.errors import AdapterError, ConfigError, DataError, ShapeMismatchError
from fedlora.flat import RowForm, pack
from fedlora.targets import initial_adapter
from fedlora.training import (
    LocalRule,
    TrainConfig,
    TrainResult,
    not_finite,
    require_correction,
)

__all__ = ["Progress", "Trainer"]

Progress = Callable[[int, float], None]  # called after each step with its number and its loss


class Trainer:
    """Trains adapters on the train graphs of a bundle; sessions are opened when first used.

    bundle: its folder; or an open one, which then says threads and low_memory, and whose weights
    are mapped once for this and for a `Session`. threads, low_memory: see `open_bundle`. Several
    threads may call `fit` at once.

    Raises `FormatError` and `DigestMismatchError` for a bundle that is not as its manifest says.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str] | OpenBundle,
        *,
        threads: int | None = None,
        low_memory: bool = False,
    ) -> None:
        self.bundle = open_bundle(bundle, threads=threads, low_memory=low_memory)

    @property
    def manifest(self) -> Manifest:
        """What the bundle says."""
        return self.bundle.manifest

    def fit(
        self,
        batches: Iterable[Batch],
        config: TrainConfig = TrainConfig(local_epochs=1),  # noqa: B008 - frozen
        *,
        init: Adapter | None = None,
        frozen: Adapter | None = None,
        rule: LocalRule = LocalRule(),  # noqa: B008 - frozen
        correction: Array | None = None,
        seed: int = 0,
        num_examples: int | None = None,
        progress: Progress | None = None,
    ) -> TrainResult:
        """Train an adapter from `init` on, one optimizer step a batch; `init` stays as it is.

        Everything is as in `fedlora.nn.train_local`, but for LoRA's own dropout, which no train
        graph has; without a `config`, one AdamW step of 1e-3 for each batch. init: of any ranks, on
        any of the bundle's layers; None: as the manifest says, drawn from `seed`. frozen: an
        adapter that is added to the base and not trained. The same call gives the same bytes as
        long as `threads` is the same.

        Raises `BaseMismatchError`, `LayerMismatchError`, `ShapeMismatchError` and
        `UnsupportedError` (DoRA) for an adapter that does not fit, and `BaseMismatchError` where
        one is merged into the bundle; `ConfigError` when there is nothing to train, no graph holds
        a row, or a correction is missing, not asked for or not for plain SGD; `DataError` for a
        batch that is not of the base's kind; and `NonFiniteError` with the step when a loss is not
        finite.
        """
        if init is None:
            about = self.manifest
            init = initial_adapter(about.layers, about.lora, seed, about.base)
        _require_fitting(init, self.manifest, "the adapter to train")
        if frozen is not None:
            _require_fitting(frozen, self.manifest, "the frozen adapter")
        require_correction("Trainer.fit", rule, config, correction)
        state = _State.of(self.manifest, init, frozen, rule)
        shift = None if correction is None else _shift(correction, state.form)
        start = state.row.copy() if rule.proximal_weight else None
        optimizer = optimizer_of(config, state.row.size)
        bound: dict[str, _Bound] = {}
        losses: list[float] = []
        seen = 0
        for batch in batches:
            seen += len(batch["inputs"])
            losses.append(self._gradient(batch, state, bound))
            if not math.isfinite(losses[-1]):
                raise not_finite("Trainer.fit", losses[-1], len(losses))
            gradient = state.gradient
            if start is not None:
                add_proximal(gradient, state.row, start, rule.proximal_weight)
            if config.max_grad_norm is not None:
                clip(gradient, config.max_grad_norm)
            if shift is not None:
                gradient += shift
            optimizer.step(state.row, gradient)
            state.fold()
            if progress is not None:
                progress(len(losses), losses[-1])
        return TrainResult(
            adapter=state.form.read(state.row.tobytes()),
            num_examples=seen if num_examples is None else num_examples,
            loss=math.fsum(losses) / len(losses) if losses else math.nan,
            steps=len(losses),
        )

    def _gradient(self, batch: Batch, state: _State, bound: dict[str, _Bound]) -> float:
        """Return the batch's loss, and leave its gradient in `state`."""
        pieces = pieces_of(batch, self.manifest)
        if not pieces:
            state.gradient[:] = 0
            return 0.0
        loss, gradient = 0.0, state.gradient
        total = np.zeros_like(gradient) if len(pieces) > 1 else gradient
        for piece in pieces:
            if piece.graph not in bound:
                session = self.bundle.session(piece.graph, {"loss", *state.outputs})
                bound[piece.graph] = _Bound.of(session, state)
            loss += piece.weight * bound[piece.graph].run(piece)
            if total is not gradient:  # each piece overwrites it
                gradient *= np.float32(piece.weight)
                total += gradient
        gradient[:] = total
        state.unfold()
        return loss


@dataclass(frozen=True, slots=True, eq=False)
class _State:
    """The rows of one training, and what a session reads and writes of them."""

    form: RowForm
    row: Array  # (n,): the trained factors
    gradient: Array  # (n,): of the mean loss, by the factors; before `unfold` by the fed ones
    inputs: Mapping[str, ort.OrtValue]  # every factor that is fed
    outputs: Mapping[str, ort.OrtValue]  # views of `gradient`
    # Of each trained B with a scaling: its part of the row and of the gradient, what is fed for it,
    # and the scaling.
    folded: list[tuple[Array, Array, Array, np.float32]] = field(default_factory=list)

    @classmethod
    def of(
        cls, manifest: Manifest, init: Adapter, frozen: Adapter | None, rule: LocalRule
    ) -> _State:
        form = RowForm.of(init, rule.trained)
        if not form.segments:
            raise ConfigError("Trainer.fit: the rule trains magnitude only, and there is none")
        row = pack(init, form.segments)
        gradient = np.zeros_like(row)
        fed: dict[str, Array] = {}
        if manifest.web:
            fed |= {**dict(zero_factors(manifest)), **dict(zero_factors(manifest, frozen=True))}
        fed |= dict(factors_of(init))
        if frozen is not None:
            fed |= dict(factors_of(frozen, frozen=True))
        outputs, folded = {}, []
        stop = 0
        for segment in form.segments:
            start, stop = stop, stop + segment.size
            name = factor_names(segment.path)[segment.factor == "B"]
            value, slope = (whole[start:stop].reshape(segment.shape) for whole in (row, gradient))
            outputs[name.removesuffix("weight") + "grad"] = ort.OrtValue.ortvalue_from_numpy(slope)
            scaling = np.float32(init[segment.path].scaling)
            if segment.factor == "B" and scaling != 1:
                fed[name] = value * scaling
                folded.append((value, slope, fed[name], scaling))
            else:
                fed[name] = value
        inputs = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in fed.items()}
        return cls(form, row, gradient, inputs, outputs, folded)

    def fold(self) -> None:
        """Bring what is fed up to date with the row."""
        for value, _, fed, scaling in self.folded:
            np.multiply(value, scaling, out=fed)

    def unfold(self) -> None:
        """Turn the gradient by what is fed for B into that by B: times the scaling."""
        for _, slope, _, scaling in self.folded:
            slope *= scaling


@dataclass(frozen=True, slots=True, eq=False)
class _Bound:
    """A session that reads and writes one training's rows."""

    session: ort.InferenceSession
    binding: ort.IOBinding
    loss: Array  # ()

    @classmethod
    def of(cls, session: ort.InferenceSession, state: _State) -> _Bound:
        binding, loss = session.io_binding(), np.zeros((), np.float32)
        for name, value in state.inputs.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output("loss", ort.OrtValue.ortvalue_from_numpy(loss))
        for name, value in state.outputs.items():
            binding.bind_ortvalue_output(name, value)
        return cls(session, binding, loss)

    def run(self, piece: Piece) -> float:
        """Write the piece's gradient where it belongs, and return its loss."""
        self.binding.bind_cpu_input("inputs", piece.inputs)
        self.binding.bind_cpu_input("targets", piece.targets)
        try:
            self.session.run_with_iobinding(self.binding)
        except Exception as error:  # ONNX Runtime's own classes have no root but this one
            raise DataError(
                f"a batch: ONNX Runtime cannot run {piece.graph} on it: {one_line(error)}"
            ) from None
        return float(self.loss)


def _require_fitting(adapter: Adapter, manifest: Manifest, who: str) -> None:
    try:
        check_adapter(adapter, manifest)
    except AdapterError as error:
        raise type(error)(f"{who}: {error}") from None


def _shift(correction: npt.ArrayLike, form: RowForm) -> Array:
    shift = np.array(correction, np.float32)
    if shift.shape != (form.size,):
        raise ShapeMismatchError(
            f"Trainer.fit: expected a correction of ({form.size},), found {shift.shape}"
        )
    return shift
