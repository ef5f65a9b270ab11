"""One TOML file describes one run: `ExperimentConfig` and how it is read, overridden and written.

Unknown keys are refused with the nearest known one, values are checked against their field's type,
and the parts are checked against each other. Only the server and the command line read the file;
clients get the values that they need in each message.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from fedlora.adapter import LoraConfig
from fedlora.aggregation import (
    Method,
    methods,
    with_control_variates,
    with_rule,
    with_server_optimizer,
)
from fedlora.aggregation import method as find_method
from fedlora.aggregation.robust import fewest_updates
from fedlora.conditions import FaultsConfig, QuorumConfig
from fedlora.data import FederatedData, load_data
from fedlora.data.text import TokenizerLike
from fedlora.errors import ConfigError, MissingExtraError, unknown_name
from fedlora.plain import field_names, from_plain, refuse_unknown, to_plain
from fedlora.privacy import PrivacyConfig, SecureAggregationConfig
from fedlora.training import TrainConfig, require_plain_sgd

__all__ = [
    "BaseConfig",
    "DataConfig",
    "EngineConfig",
    "ExperimentConfig",
    "FederationConfig",
    "PersonalizationConfig",
    "app_root",
    "find_experiment",
    "open_data",
    "parse_override",
    "read_table",
]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BaseConfig:
    """The frozen network."""

    id: str  # registry, a local Hugging Face folder, or "module:function"
    num_classes: int | None = None  # put a new head for so many classes on a text model
    quantize: Literal["nf4", "int8"] | None = None  # keep the frozen linear layers in fewer bits

    def __post_init__(self) -> None:
        _at_least("base.num_classes", self.num_classes, 2)


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Whose data, for what task, and how it is divided."""

    id: str  # registry or "module:function"
    task: str  # next-token | classification | "module:function"
    clients: int | None = None  # None: all; more than there are: resampled with replacement
    held_out_clients: float = 0.0  # share of the clients that is never sampled
    test_share: float = 0.2  # of each client's examples, the last ones
    validation_share: float = 0.0  # of each client's examples, before the test part
    max_length: int = 64  # tokens; longer examples are cut
    partition: str = "natural"  # by person; "iid", "dirichlet:0.3": dealt out anew

    def __post_init__(self) -> None:
        _at_least("data.clients", self.clients, 1)
        _at_least("data.max_length", self.max_length, 2)
        for name in ("held_out_clients", "test_share", "validation_share"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ConfigError(f"data.{name}: expected a share in [0, 1), found {value!r}")
        if self.test_share == 0 or self.test_share + self.validation_share >= 1:
            raise ConfigError(
                "data.test_share must be over 0, and test_share + validation_share under 1; found "
                f"{self.test_share!r} and {self.validation_share!r}"
            )


def open_data(config: DataConfig, tokenizer: TokenizerLike, seed: int) -> FederatedData:
    """Return the people of an experiment's data; see `fedlora.data.load_data`."""
    return load_data(
        config.id,
        task=config.task,
        tokenizer=tokenizer,
        clients=config.clients,
        seed=seed,
        test_share=config.test_share,
        validation_share=config.validation_share,
        max_length=config.max_length,
        partition=config.partition,
    )


@dataclass(frozen=True, slots=True)
class FederationConfig:
    """The rounds. In TOML the keys of `train` stand directly in [federation]."""

    train: TrainConfig
    method: str = "fedit"
    rounds: int = 10
    cohort: int = 10  # clients a round; for poisson sampling their expected number
    sampling: Literal["fixed", "poisson"] = "fixed"
    weights: Literal["examples", "equal"] = "examples"  # of the clients in the mean
    method_options: Mapping[str, Any] = field(default_factory=dict)  # of the method's own
    # The learning rate falls from round to round along half a cosine, to nearly 0 in the last one:
    # the server optimizer's where there is one, and else the clients'.
    schedule: Literal["constant", "cosine"] = "constant"
    client_ranks: tuple[int, ...] = ()  # dealt out in turn over sorted client ids; (): lora.rank
    server_optimizer: str | None = None  # momentum, adam, yogi or adagrad behind the mean
    server_options: Mapping[str, Any] = field(default_factory=dict)
    robust: str | None = None  # median, trimmed-mean, multi-krum, norm-bound or max-share
    robust_options: Mapping[str, Any] = field(default_factory=dict)
    proximal_weight: float = 0.0  # mu of FedProx: holds a client near what it was sent
    control_variates: bool = False  # SCAFFOLD, against the drift of clients; needs plain sgd
    # How factors travel: what a client cannot read or write is sent to it, or by it, as fp32.
    upload_codec: Literal["fp32", "fp16", "int8", "int4"] = "fp32"
    download_codec: Literal["fp32", "fp16", "int8", "int4"] = "fp32"

    def __post_init__(self) -> None:
        _at_least("federation.rounds", self.rounds, 0)
        _at_least("federation.cohort", self.cohort, 1)
        for rank in self.client_ranks:
            _at_least("federation.client_ranks", rank, 1)
        self.build_method()
        if self.robust is not None and self.sampling == "fixed":
            fewest = fewest_updates(self.robust, **self.robust_options)
            if self.cohort < fewest:
                raise ConfigError(
                    f"federation.cohort: expected at least {fewest} for {self.robust} with "
                    f"{dict(self.robust_options)}, found {self.cohort}"
                )

    def train_in(self, round: int) -> TrainConfig:
        """Return what clients are told in `round`, which counts from 1."""
        if self.schedule == "constant" or self.server_optimizer is not None:
            return self.train
        rate = self.train.learning_rate * self._share_in(round)
        return dataclasses.replace(self.train, learning_rate=rate)

    def _share_in(self, round: int) -> float:
        if self.schedule == "constant":
            return 1.0
        return (1 + math.cos(math.pi * (round - 1) / max(self.rounds, round))) / 2

    def build_method(self) -> Method:
        """Return the method with all that this table puts on it.

        The proximal weight and the control variates change what clients do; the robust rule stands
        in front of the method's mean, the server optimizer behind it. Raises `ConfigError`
        for an option that is not theirs, and for those that do not go together.
        """
        built = find_method(self.method, **self.method_options)
        if self.proximal_weight:
            local = dataclasses.replace(built.local, proximal_weight=self.proximal_weight)
            built = dataclasses.replace(built, local=local)
        if self.control_variates:
            try:
                require_plain_sgd(self.train)
                built = with_control_variates(built)
            except ConfigError as error:
                raise ConfigError(f"federation.control_variates: {error}") from None
        for key, name, options_key, options, wrap in (
            ("robust", self.robust, "robust_options", self.robust_options, with_rule),
            (
                "server_optimizer",
                self.server_optimizer,
                "server_options",
                self.server_options,
                functools.partial(with_server_optimizer, share_in=self._share_in),
            ),
        ):
            if name is None and options:
                raise ConfigError(
                    f"federation.{options_key}: expected federation.{key} beside it, found none; "
                    "name one, or remove the options"
                )
            if name is not None:
                try:
                    built = wrap(built, name, **options)
                except ConfigError as error:
                    raise ConfigError(f"federation.{key}: {error}") from None
        return built


@dataclass(frozen=True, slots=True)
class PersonalizationConfig:
    """Training on top of the global adapter, on each client's own data."""

    steps: int = 24
    learning_rate: float | None = None  # None: the federation's
    batch_size: int | None = None  # None: the federation's
    save: bool = True  # keep everyone's personal adapter in the run's folder
    # Whether copies of a person ("u7#2"), who all have the same data, are all evaluated, or one.
    every_copy: bool = True
    cross: int = 0  # clients whose own adapters are also evaluated on one another's data
    # What a person is served: the personal adapter, or its mixture with the global one (FedDPA).
    kind: Literal["personal", "mixed"] = "personal"
    mixing_weight: float = 0.5  # of the personal adapter for the likeliest input; mixed only
    proximal_weight: float = 0.0  # lambda of Ditto: pulls the personal adapter to the global one
    keep_better: bool = False  # who does worse with it on the validation part keeps the global one

    def __post_init__(self) -> None:
        if not 0 <= self.mixing_weight <= 1:
            raise ConfigError(
                "personalization.mixing_weight: expected a share in [0, 1], found "
                f"{self.mixing_weight!r}"
            )
        if not 0 <= self.proximal_weight < math.inf:
            raise ConfigError(
                "personalization.proximal_weight: expected a finite number >= 0, found "
                f"{self.proximal_weight!r}"
            )
        _at_least("personalization.steps", self.steps, 0)
        _at_least("personalization.cross", self.cross, 0)
        _at_least("personalization.batch_size", self.batch_size, 1)
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ConfigError(
                "personalization.learning_rate: expected a finite number > 0, found "
                f"{self.learning_rate!r}"
            )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What runs the virtual clients."""

    # Many clients in one pass, one client a core, or Flower's own simulation (Ray).
    kind: Literal["cohort", "sequential", "flower"] = "cohort"
    # Ray workers for groups of clients: their number, or all processors of a cluster. 0: threads.
    workers: int | Literal["cluster"] = 0
    precision: Literal["fp32", "bf16"] = "fp32"  # of training; bf16 is inexact
    checkpointing: bool = False  # compute each block twice, and keep its input only
    prefix_cache: bool = True  # keep what enters the first adapted block, example by example

    def __post_init__(self) -> None:
        if self.workers != "cluster":
            _at_least("engine.workers", self.workers, 0)
        if self.kind == "cohort":
            return
        if self.workers:
            raise ConfigError(
                "engine.workers is the cohort engine's: set engine.kind = 'cohort', found "
                f"{self.kind!r}, or remove it"
            )
        if self.precision == "bf16":
            raise ConfigError(
                f"engine.precision: expected 'fp32' with engine.kind = {self.kind!r}, found 'bf16';"
                " only the cohort engine trains in bfloat16"
            )


@dataclass(frozen=True, slots=True)
class ExperimentConfig:
    """A whole run; see the tables' own classes."""

    name: str
    base: BaseConfig
    data: DataConfig
    federation: FederationConfig
    lora: LoraConfig = field(default_factory=LoraConfig)
    personalization: PersonalizationConfig = field(default_factory=PersonalizationConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    quorum: QuorumConfig | None = None  # None: a round waits for everyone
    faults: FaultsConfig | None = None  # None: nothing is made to go wrong
    privacy: PrivacyConfig | None = None  # None: no guarantee
    secure_aggregation: SecureAggregationConfig | None = None  # None: the server sees each update
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ConfigError("name: expected a word for this experiment, found an empty text")
        if "/" in self.name or "\\" in self.name or self.name in (".", ".."):
            raise ConfigError(f"name: expected a word and not a path, found {self.name!r}")
        if self.lora.uses_dora:
            raise ConfigError(
                "lora.variant: expected 'lora' or 'rslora' in a federation, found "
                f"{self.lora.variant!r}; {self.federation.method} averages A and B alone"
            )
        if self.personalization.keep_better and not self.data.validation_share:
            raise ConfigError(
                "personalization.keep_better: expected data.validation_share over 0, by whose "
                "examples the better adapter is chosen, found 0; set it, or remove keep_better"
            )
        if any(rank > self.lora.rank for rank in self.federation.client_ranks):
            raise ConfigError(
                f"federation.client_ranks: expected at most lora.rank = {self.lora.rank}, found "
                f"{max(self.federation.client_ranks)}"
            )
        for table in ("privacy", "secure_aggregation"):
            if getattr(self, table) is not None:
                self._require_sums(table)
        secure = self.secure_aggregation
        if secure is not None and secure.clipping_range is None and self.privacy is None:
            raise ConfigError(
                "secure_aggregation.clipping_range: expected a number, as there is no "
                "privacy.clipping_norm to take it from; set it"
            )
        quorum = self.quorum
        if secure is not None and quorum is not None and quorum.share < secure.threshold:
            raise ConfigError(
                "quorum.share: expected at least secure_aggregation.threshold = "
                f"{secure.threshold:g}, found {quorum.share:g}: with fewer clients a round is "
                "given up"
            )
        if secure is not None and self.privacy is not None and self.privacy.mechanism == "local":
            raise ConfigError(
                "privacy.mechanism: expected 'central' with [secure_aggregation], found 'local', "
                "whose noise would not fit into the range of a secure sum; choose one of the two"
            )
        if secure is not None and self.privacy is not None and self.privacy.canaries:
            raise ConfigError(
                "privacy.canaries: expected 0 with [secure_aggregation], found "
                f"{self.privacy.canaries}; canaries are added to what the server itself sums, so "
                "audit a run without secure aggregation, whose noise is the same"
            )

    def _require_sums(self, table: str) -> None:
        """Raise unless equal clients' sum is all that the server uses of a cohort."""
        federation = self.federation
        method = federation.build_method()
        if not method.linear or method.local.correction is not None:
            linear = sorted(name for name, known in methods().items() if known.linear)
            raise ConfigError(
                f"{table}: expected a method of which a sum is enough, without a robust rule or "
                f"control variates, found {method.name}; use one of {', '.join(linear)}"
            )
        over = self.quorum.over_selection if self.quorum is not None else 0.0
        share = self.quorum.share if self.quorum is not None and table == "privacy" else 1.0
        for key, found, wanted in (
            ("federation.weights", federation.weights, "equal"),
            ("federation.client_ranks", federation.client_ranks, ()),
            ("quorum.over_selection", over, 0.0),
            # One client's reply would shut another's out: the sum moves by two, not by one.
            ("quorum.share", share, 1.0),
        ):
            if found != wanted:
                raise ConfigError(f"{key}: expected {wanted!r} with [{table}], found {found!r}")
        if table == "secure_aggregation" and federation.upload_codec != "fp32":
            raise ConfigError(
                "federation.upload_codec: expected 'fp32' with [secure_aggregation], which has "
                f"its own numbers, found {federation.upload_codec!r}"
            )
        if (
            table == "secure_aggregation"
            and self.privacy is not None
            and self.privacy.target_quantile is not None
        ):
            raise ConfigError(
                "privacy.target_quantile: expected none with [secure_aggregation], in which the "
                f"server sees no update's norm, found {self.privacy.target_quantile!r}"
            )

    @property
    def sums_only(self) -> bool:
        """Whether clients tell nothing but what goes into a sum: no metrics, no scores."""
        return self.privacy is not None or self.secure_aggregation is not None

    @property
    def personal_training(self) -> TrainConfig:
        """How each client trains its personal adapter, and with more steps its own."""
        own, federated = self.personalization, self.federation.train
        rate, size = own.learning_rate, own.batch_size
        return dataclasses.replace(
            federated,
            local_steps=own.steps,
            local_epochs=None,
            learning_rate=federated.learning_rate if rate is None else rate,
            batch_size=federated.batch_size if size is None else size,
        )

    @classmethod
    def from_toml(
        cls, path: str | Path, overrides: Mapping[str, Any] | None = None
    ) -> ExperimentConfig:
        """Read a file and apply `overrides` (dotted key to value).

        Raises `ConfigError` with the file's name.
        """
        table = read_table(path)
        try:
            return cls.from_table(table, overrides)
        except ConfigError as error:
            raise ConfigError(f"{Path(path)}: {error}") from None

    @classmethod
    def from_table(
        cls, table: Mapping[str, Any], overrides: Mapping[str, Any] | None = None
    ) -> ExperimentConfig:
        """Build from nested tables as TOML gives them."""
        merged = _merge(table, overrides or {})
        federation = merged.get("federation")
        if isinstance(federation, dict):
            names = [f.name for f in dataclasses.fields(TrainConfig)]
            train = {name: federation.pop(name) for name in names if name in federation}
            refuse_unknown(
                "federation", federation, [*field_names(FederationConfig, without="train"), *names]
            )
            federation["train"] = train
        try:
            return from_plain(cls, merged)
        except ConfigError as error:
            # The keys of `FederationConfig.train` stand in [federation] itself.
            text = re.sub(r"^federation\.train(?=[.:])", "federation", str(error))
            raise ConfigError(text) from None

    def to_table(self) -> dict[str, Any]:
        """Return nested tables of plain values, every default written out, None left out."""
        table = to_plain(self)
        table["federation"] |= table["federation"].pop("train")
        return dict(table)

    def to_toml(self) -> str:
        """Return the resolved experiment; `from_toml` reads it back to an equal one."""
        try:
            import tomli_w
        except ImportError:
            raise MissingExtraError("writing a run folder", "sim") from None
        return tomli_w.dumps(self.to_table())


def app_root() -> Path:
    """Return the folder of clients/, server/ and simulations/: the clone's, or the wheel's copy."""
    package = Path(__file__).resolve().parent
    project = package.parent / "pyproject.toml"
    if project.is_file() and 'name = "fedlora"' in project.read_text(encoding="utf-8"):
        return package.parent
    return package / "_app"


def find_experiment(name: str) -> Path:
    """Return the file for `name`: a path when it looks like one, else a bundled experiment."""
    if name.endswith(".toml") or "/" in name or "\\" in name:
        if not Path(name).is_file():
            raise ConfigError(f"{name}: no such experiment file")
        return Path(name)
    folder = app_root() / "simulations"
    path = folder / f"{name}.toml"
    if not path.is_file():
        raise unknown_name("experiment", name, (file.stem for file in folder.glob("*.toml")))
    return path


def read_table(path: str | Path) -> dict[str, Any]:
    """Return an experiment's file as nested tables, not yet checked.

    Raises `ConfigError` with the file's name.
    """
    file = Path(path)
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from None


def parse_override(text: str) -> tuple[str, Any]:
    """Split ``a.b=value``; the value is read as TOML, or taken as text where it is not TOML.

    >>> parse_override("federation.rounds=5"), parse_override("lora.target_modules=fc")
    (('federation.rounds', 5), ('lora.target_modules', 'fc'))
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text}: expected key=value, such as federation.rounds=5")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def _merge(table: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(table))  # an override may go deeper than one table
    for dotted, value in overrides.items():
        target = merged
        *parents, last = dotted.split(".")
        for part in parents:
            inner = target.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{dotted}: {part!r} is a value, not a table")
            target = inner
        target[last] = value
    return merged


def _at_least(key: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ConfigError(f"{key}: expected a whole number >= {least}, found {value!r}")
