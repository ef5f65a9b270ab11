"""A whole federation on the server: meet the clients, go on from a checkpoint, run the rounds.

The server needs no torch: the starting adapter is drawn from the base's card.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedlora.adapter import Adapter
from fedlora.aggregation import Method, ServerState
from fedlora.aggregation.control_variates import without_control
from fedlora.errors import ConfigError, FederationError, FedloraError
from fedlora.experiment import ExperimentConfig
from fedlora.federation.checkpoint import (
    Checkpoint,
    ClientRecord,
    Dropped,
    RoundRecord,
    append_round,
    has_checkpoint,
    resume_run,
    write_checkpoint,
)
from fedlora.federation.client import one_line
from fedlora.federation.folder import EXPERIMENT
from fedlora.federation.population import named_run, with_answers
from fedlora.federation.private_sum import BudgetSpent, PrivateRounds
from fedlora.federation.quorum import QuorumGrid, Wait
from fedlora.federation.records import (
    ClientAnswer,
    ClientSetup,
    to_record,
)
from fedlora.federation.roster import Roster, query_messages, read_answer
from fedlora.federation.sampling import draw_held_out
from fedlora.federation.secure.round import require_terms
from fedlora.federation.stage import OnClient, evaluate_devices, require_stage
from fedlora.federation.strategy import FederatedLora
from fedlora.federation.summed import sent_row
from fedlora.files import write_atomic
from fedlora.targets import initial_adapter

__all__ = ["run_federation"]

_log = logging.getLogger(__name__)

# Once enough clients have answered at the start, the others get this many seconds, or as long
# again as it took so far. Who answers later still joins the run.
ANSWER_GRACE = 30.0


def run_federation(
    grid: Grid,
    config: ExperimentConfig,
    out: Path,
    *,
    initial: Adapter | None = None,
    method: Method | None = None,
    min_clients: int = 1,
    timeout: float = 3600.0,
    clients_remember: bool = False,
    on_round: Callable[[RoundRecord], None] | None = None,
    evaluate: bool = False,
    on_client: OnClient | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> ServerState:
    """Run, or go on with, the federation that `config` describes; return its last state.

    `out` gets ``rounds.jsonl`` and ``checkpoint/`` after every round; where a checkpoint is already
    there, the run goes on from it. `initial` is the starting adapter (None: drawn from the card of
    the base), `method` overrides the config's by a value of one's own. The run starts once
    `min_clients` nodes are connected. `clients_remember`: whether clients of a resumed run still
    have what they kept in it. Flower's do not: a state belongs to one of its runs, and a resumed
    run is a new one; devices with a state folder do. Where not all of them remember, control
    variates begin at zero on both sides. `timeout` (seconds) limits the wait for nodes, and each
    round's. `evaluate`: whether all clients personalize and evaluate the global adapter at the end
    (`fedlora.federation.stage`), each of which is told to `on_client`. `pause` waits so many
    seconds before a round that its devices declined is tried again.

    Through a `QuorumGrid` clients also come and go: a node that is gone is not asked, one that
    returns is, and a new one joins the population at a round's start. Through any other grid the
    population stays as it was, and who is not there at the start or on resume never comes.

    With ``[privacy]`` the run ends early, and well, before the round that would pass its
    `max_epsilon`; `out` also gets the ledger (`fedlora.federation.private_sum`).

    Raises `RunError` for another experiment's checkpoint, `FederationError` when no client answers
    or several rounds in a row bring no update, `ConfigError` for a cohort larger than the
    population.
    """
    method = method or config.federation.build_method()
    if evaluate:
        require_stage(config)
    resumed = resume_run(out, config) if has_checkpoint(out) else None
    run = resumed.run if resumed is not None and resumed.run else secrets.token_hex(16)
    setup = to_record(ClientSetup.of(config, named_run(run, config, method)))
    needs_examples = config.federation.weights == "examples"
    answers, left_out = _meet_clients(grid, setup, needs_examples, min_clients, timeout)
    remembered = clients_remember or all(answer.remembers for _, answer in answers.values())
    if resumed is not None and method.local.correction is not None and not remembered:
        _log.warning("resumed: control variates begin at zero, clients have theirs no longer")
        resumed = replace(resumed, state=without_control(resumed.state))
        run = secrets.token_hex(16)  # so that those of clients that remember begin there too
        setup = to_record(ClientSetup.of(config, run))
    checkpoint = resumed or _start(config, initial, answers, tuple(left_out.values()))
    said = {client_id: answer for client_id, (_, answer) in answers.items()}
    checkpoint = replace(with_answers(checkpoint, said), run=run)
    private = None
    if config.privacy is not None:
        private = PrivateRounds.open(config, out, checkpoint)
        checkpoint = replace(checkpoint, privacy=private.state)
    if evaluate:
        write_atomic(out / EXPERIMENT, config.to_toml().encode())
    if resumed is None:
        write_checkpoint(out, checkpoint, config)

    def save(checkpoint: Checkpoint, record: RoundRecord) -> None:
        append_round(out, record)
        write_checkpoint(out, checkpoint, config)
        if on_round is not None:
            on_round(record)

    nodes = {client_id: node for client_id, (node, _) in answers.items()}
    codecs = {client_id: answer.codecs for client_id, (_, answer) in answers.items()}
    roster = None
    if isinstance(grid, QuorumGrid):
        roster = Roster(
            grid,
            setup,
            dict(answers.values()),
            left_out,
            needs_examples=needs_examples,
            min_clients=min_clients,
            timeout=timeout,
        )
    if config.secure_aggregation is not None:
        require_terms(config, len(sent_row(method, checkpoint.state)))
    strategy = FederatedLora(
        config, method, checkpoint, nodes, save, roster, codecs,
        pause=pause, private=private, timeout=timeout,
    )  # fmt: skip
    try:
        # More than once when devices declined a round: it was tried again, and one is left over.
        while (rounds := config.federation.rounds - strategy.checkpoint.state.round) > 0:
            strategy.start(grid, ArrayRecord(), num_rounds=rounds, timeout=timeout)
    except BudgetSpent as spent:
        _log.info("the run ends here: %s", spent)
    if evaluate:
        evaluate_devices(
            grid, config, method, strategy.checkpoint, strategy.connected(), out,
            timeout=timeout, on_client=on_client,
        )  # fmt: skip
    return strategy.checkpoint.state


def _start(
    config: ExperimentConfig,
    initial: Adapter | None,
    answers: dict[str, tuple[int, ClientAnswer]],
    left_out: tuple[Dropped, ...],
) -> Checkpoint:
    if initial is None:
        from fedlora.bases import load_card

        card = load_card(config.base.id, config.base.num_classes)
        initial = initial_adapter(card.layers, config.lora, config.seed, card.fingerprint)
    held_out = frozenset(draw_held_out(answers, config.data.held_out_clients, config.seed))
    clients = tuple(
        ClientRecord(client_id, held_out=client_id in held_out) for client_id in sorted(answers)
    )
    # Clients that did not answer count here: a lost device must not end a run of all devices.
    most = len(clients) + len(left_out) - len(held_out)
    if config.federation.cohort > most:
        raise ConfigError(
            f"federation.cohort: expected at most {most}, the clients that are not held out, "
            f"found {config.federation.cohort}"
        )
    return Checkpoint(ServerState.start(initial), clients, left_out=left_out)


def _meet_clients(
    grid: Grid, setup: ConfigRecord, needs_examples: bool, min_clients: int, timeout: float
) -> tuple[dict[str, tuple[int, ClientAnswer]], dict[int, Dropped]]:
    """Ask every node who it is.

    Return (node id, answer) by client id, and who was left out by node id.
    """
    nodes = _wait_for_nodes(grid, min_clients, timeout)
    messages = query_messages(setup, nodes)
    asked = frozenset(nodes)
    answers: dict[str, tuple[int, ClientAnswer]] = {}
    left_out: dict[int, Dropped] = {}
    seen: set[int] = set()
    replies: Iterable[Message]
    if isinstance(grid, QuorumGrid):  # a node that is gone must not stop a run for an hour
        wait = Wait(max(min_clients, 1), ANSWER_GRACE, grace_share=1.0, deadline=timeout)
        replies = grid.exchange(messages, wait)
    else:
        replies = grid.send_and_receive(messages, timeout=timeout)
    for reply in replies:
        node = reply.metadata.src_node_id
        if node not in asked or node in seen:
            continue
        seen.add(node)
        try:
            answer = read_answer(reply, f"node {node}", needs_examples)
            if answer.client_id in answers:
                raise FederationError(
                    f"node {node}: client id {answer.client_id!r} is already taken by node "
                    f"{answers[answer.client_id][0]}; give each device its own"
                )
            answers[answer.client_id] = (node, answer)
        except FedloraError as error:
            left_out[node] = Dropped(f"node {node}", one_line(str(error)))
        except Exception as error:  # what a stranger sent must not end everyone's run
            reason = f"node {node}: an answer that cannot be read ({type(error).__name__})"
            left_out[node] = Dropped(f"node {node}", reason)
    for node in nodes:
        if node not in seen:
            left_out[node] = Dropped(f"node {node}", "no answer in time")
    for dropped in left_out.values():
        _log.warning("left out %s: %s", dropped.client, dropped.reason)
    if not answers:
        reasons = [dropped.reason for dropped in left_out.values()]
        raise FederationError(
            f"none of {len(nodes)} clients can take part: {reasons[0] if reasons else 'no node'}"
        )
    return answers, {node: left_out[node] for node in nodes if node in left_out}


def _wait_for_nodes(grid: Grid, min_clients: int, timeout: float) -> list[int]:
    end = time.monotonic() + timeout
    while True:
        nodes = sorted(grid.get_node_ids())
        if len(nodes) >= max(min_clients, 1):
            return nodes
        if time.monotonic() >= end:
            raise FederationError(
                f"expected at least {max(min_clients, 1)} connected clients within {timeout:g} s, "
                f"found {len(nodes)}; start them, or lower min-clients"
            )
        time.sleep(min(0.5, timeout))
