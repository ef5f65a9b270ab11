"""`Agent`: one turn, the loop around it, and the session that serves; see `fedlora.agent`."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fedlora.agent.health import Health, Limits, judge, require_sound_base
from fedlora.agent.log import Log
from fedlora.agent.report import check_report_url, keep, report_bytes, send_kept
from fedlora.data import Examples
from fedlora.device.canaries import probe_of, read_canaries
from fedlora.device.owner_data import OwnerData
from fedlora.device.personal import Personalized, personalize
from fedlora.device.runtime import OpenBundle, open_bundle
from fedlora.device.session import Session
from fedlora.device.trainer import Trainer
from fedlora.errors import DownloadError, FedloraError, RunError, StoreError, UsageError
from fedlora.files import lock_file, write_atomic
from fedlora.training import TrainConfig

if TYPE_CHECKING:
    from fedlora.ota import DeviceUpdater, Release
    from fedlora.store import Store

__all__ = ["Agent", "ReadData", "Turn", "log_of"]

FOLDER, LOG, REPORT, LOCK = "agent", "log.jsonl", "report.json", ".lock"
TRAINED_ON = "trained-on"  # fingerprint of the global adapter that was personalized last
TRAINING = TrainConfig(local_steps=24, learning_rate=2e-3, batch_size=8)  # `device personalize`'s
ReadData = Callable[[OpenBundle], OwnerData]


def log_of(store: Store) -> Log:
    """Return the log of a device's agent."""
    return Log(store.path / "cache" / FOLDER / LOG)


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn did.

    outcome: "nothing" new for this device, a release "committed" or "rejected". health: None where
    nothing was tried. personalized: None where no personal adapter was trained.
    """

    outcome: Literal["nothing", "committed", "rejected"]
    release: int | None = None
    digest: str | None = None
    reason: str = ""  # why it was rejected
    health: Health | None = None
    personalized: Personalized | None = None
    requests: int = 0
    received: int = 0  # bytes of bodies


class Agent:
    """Keeps the device of an updater up to date; see `fedlora.agent`.

    data: reads the owner's examples from a bundle that is open; None, or where that fails: releases
    are judged without a loss. training: of personal adapters. personalize: train one even where
    there is none yet. report: where to POST reports; None: nowhere. threads, low_memory: see
    `open_bundle`.
    """

    def __init__(
        self,
        updater: DeviceUpdater,
        *,
        data: ReadData | None = None,
        training: TrainConfig = TRAINING,
        personalize: bool = False,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        report: str | None = None,
        threads: int | None = None,
        low_memory: bool = False,
    ) -> None:
        self.updater = updater
        self.store = updater.store
        self.folder = self.store.path / FOLDER
        self.log = log_of(self.store)
        self._kept = self.log.path.parent
        self.limits = limits
        self._read_data = data
        self._training = training
        self._personalize = personalize
        self._report_url = None if report is None else check_report_url(report)
        self._options: dict[str, Any] = {"threads": threads, "low_memory": low_memory}
        self._bundle: OpenBundle | None = None
        self._session: Session | None = None
        self._served: str | None = None  # fingerprint of what the session serves
        self._is_alone = False

    def update(self) -> Turn:
        """Do one turn.

        Raises what `DeviceUpdater.fetch` does; `FormatError` when the base itself is not sound; and
        `StoreError` when another agent is at work. What was served is then served on, and the next
        turn starts from what is there.
        """
        with self.alone():
            try:
                turn = self._turn()
            except FedloraError as error:
                self._note("failed", error=type(error).__name__, text=str(error))
                self._send_report()
                raise
            if turn.outcome != "nothing" or turn.personalized is not None:
                about = {} if turn.health is None else turn.health.as_dict()
                self._note(turn.outcome, **{"release": turn.release, **about})
            self._send_report()
            self.refresh()
            return turn

    def run(
        self,
        *,
        every: float = 21_600.0,
        stop: threading.Event | None = None,
        on_turn: Callable[[Turn | FedloraError], None] = lambda turn: None,
    ) -> None:
        """Do a turn every so many seconds, give or take a tenth, until `stop` is set.

        The tenth spreads the devices of a fleet that were switched on together. A turn that fails
        is logged, and tried again the next time; wrong usage is raised.
        """
        stop = stop or threading.Event()
        with self.alone():
            while not stop.is_set():
                try:
                    on_turn(self.update())
                except UsageError:
                    raise
                except FedloraError as error:
                    on_turn(error)
                stop.wait(every * random.uniform(0.9, 1.1))

    def session(self) -> Session:
        """Return the session that serves what is committed.

        The same one each time; turns of this agent change its adapter, between two requests.
        """
        if self._session is None:
            self._session = Session(self._open())
            self.refresh()
        return self._session

    def refresh(self) -> None:
        """Serve what is committed now, if another process changed it."""
        if self._session is None:
            return
        status = self.store.status()
        entry = status.personal or status.installed
        fingerprint = None if entry is None else entry.fingerprint
        if fingerprint != self._served or fingerprint is None:
            self._session.swap(self.store.serving())
            self._served = fingerprint

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other agents out. May be nested. Raises `StoreError` at once where there is one."""
        if self._is_alone:
            yield
            return
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StoreError(
                f"{self.folder}: cannot be written: {error.strerror or error}"
            ) from None
        try:
            try:
                lock_file(descriptor)
            except OSError:
                raise StoreError(
                    f"{self.store.path}: another agent keeps this device up to date already; stop "
                    "it first, or let it do its work"
                ) from None
            self._is_alone = True
            yield
        finally:
            self._is_alone = False
            os.close(descriptor)

    def _turn(self) -> Turn:
        release = self.updater.fetch()
        poll = self.updater.last_poll
        assert poll is not None
        counts: dict[str, Any] = {"requests": poll.requests, "received": poll.received}
        if release is None:
            return Turn("nothing", personalized=self._personal(None), **counts)
        data = self._owner_data()
        health = self._try(release, None if data is None else data.held_out, poll.active_halted)
        about: dict[str, Any] = {
            "release": release.version,
            "digest": release.digest,
            "health": health,
            **counts,
        }
        if self._report_url is not None:
            # Kept before the verdict is acted on: what is sent twice at worst is not lost.
            keep(self._kept / REPORT, report_bytes(release.version, health.healthy, health.bucket))
        if not health.healthy:
            if self.store.status().pending is not None:
                self.updater.revert(release)
            return Turn("rejected", reason=health.reason, **about)
        self.updater.commit(release)
        return Turn("committed", personalized=self._personal(data), **about)

    def _try(self, release: Release, held_out: Examples | None, active_halted: bool) -> Health:
        bundle = self._open()
        session = Session(bundle)  # not the one that serves
        canaries = read_canaries(bundle.folder, bundle.manifest)
        require_sound_base(session, canaries, str(bundle.folder))
        status = self.store.status()
        tries = status.tries
        new = self.store.begin_trial()
        if new is None:
            reason = f"{tries} trials of it ended before a verdict: it brings the agent down"
            return Health(False, reason, bucket="broken")
        if status.installed is not None and status.installed.digest == release.digest:
            return Health(True, bucket="same")  # the served adapter as a newer release
        known_good = active_halted or (
            status.previous is not None and status.previous.digest == release.digest
        )
        return judge(
            session,
            self.store.global_adapter(),
            new,
            probe_of(canaries, bundle.manifest),
            held_out,
            self.limits,
            known_good=known_good,
        )

    def _personal(self, data: OwnerData | None) -> Personalized | None:
        """Train the owner's adapter on the installed global one, and keep it if it is better.

        Once for each global adapter, since a training costs more than all else here, and only where
        the owner has one already or asked for it. What goes wrong is logged: the release has been
        committed.
        """
        status = self.store.status()
        on = None if status.installed is None else status.installed.fingerprint
        wanted = status.personal.stale if status.personal is not None else self._personalize
        note = (on or "base").encode()
        path = self._kept / TRAINED_ON
        if not wanted or (path.is_file() and path.read_bytes() == note):
            return None
        data = data or self._owner_data()
        if data is None or not self._open().manifest.buckets():
            return None
        try:
            bundle = self._open()
            done = personalize(self.store, Session(bundle), Trainer(bundle), data, self._training)
        except FedloraError as error:
            self._note("not-personalized", error=type(error).__name__, text=str(error))
            return None
        with contextlib.suppress(RunError):
            write_atomic(path, note, mode=0o600)
        self._note("personalized", kept=done.kept, replaced=done.replaced,
                   loss_before=done.before["loss"], loss_after=done.after["loss"])  # fmt: skip
        return done

    def _owner_data(self) -> OwnerData | None:
        """Return the owner's examples; without any, a new device could never be updated."""
        if self._read_data is None:
            return None
        try:
            return self._read_data(self._open())
        except UsageError:
            raise
        except FedloraError as error:
            self._note("no-data", error=type(error).__name__, text=str(error))
            return None

    def _open(self) -> OpenBundle:
        if self._bundle is None:
            self._bundle = open_bundle(self.store.bundle, **self._options)
        return self._bundle

    def _send_report(self) -> None:
        if self._report_url is None:
            return
        try:
            send_kept(self._report_url, self._kept / REPORT)
        except DownloadError as error:
            self._note("report-not-sent", text=str(error))

    def _note(self, event: str, **about: Any) -> None:
        """Log; a full disk must not undo what was committed."""
        with contextlib.suppress(StoreError, RunError):
            self.log.add(event, **about)
