"""On a device: update → stage → health check → commit or revert → personalize → serve.

`Agent.update` is one turn of it. It fetches what an over-the-air repository offers, tries it beside
what is served, commits or rejects it, and trains the owner's adapter anew on it where there was one
and the new one is better. `Agent.session` serves what is committed, and `Agent.run` does a turn
every few hours. What is served never changes but by a commit, so a device that is switched off at
any instant comes back with a whole, checked adapter.

    STATE/agent/.lock      one agent at a time
    STATE/cache/agent/
      log.jsonl            what the turns did, the newest of it; never sent
      report.json          a report that could not be sent yet
      trained-on           fingerprint of the global adapter that was personalized last

The log has losses on the owner's data, so it is in the cache, which `Store.forget` empties.

Nothing of the owner's data leaves the device. Reports are off unless the owner names a place for
them; then one holds a release's version, whether it was healthy, and one of seven words for how
the held-out loss moved (`fedlora.agent.report`), and nothing else. No torch, no Flower.
"""

from fedlora.agent.agent import Agent, Turn
from fedlora.agent.health import Health, Limits
from fedlora.agent.log import Log

__all__ = ["Agent", "Health", "Limits", "Log", "Turn"]
