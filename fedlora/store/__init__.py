"""A device's state folder: its bundle, the installed global adapter, and the owner's own.

    STATE/                     0700; every file in it 0600
      state.json               what is installed: the one commit point
      bundle/                  a copy of the device bundle, unless it is used where it is
      adapters/DIGEST.safetensors   packed files, each named by its SHA-256
      cache/                   whatever was made of the owner's data and can be made again
      federation/RUN/KIND      what a client keeps to itself from round to round
      .lock

A commit writes the new adapter beside the others, puts it on the disk, and only then renames a new
`state.json` into place; what that no longer names is removed afterwards. So after a crash at any
instant `state.json` names whole files, those of before the commit or those of after it, and the
next process that takes the lock removes what the crash left over. Whoever only reads takes no lock.

Files are unlinked, not overwritten: on flash and on copying file systems overwriting would promise
what they do not do. Where deleted bytes must not be found again, encrypt the disk.

Global adapters have three slots. ``active`` is served. ``pending`` is a release that an updater has
verified and put there, never served: after a health check it is committed, which makes it active
and what was active ``previous``; or it is rejected, and its version remembered. `Store.revert` goes
one step back. ``tries`` counts the trials of a pending release, so that one that brings the process
down again and again is rejected by itself.
"""

from fedlora.store.kept import RunRows
from fedlora.store.status import BundleEntry, GlobalEntry, PersonalEntry, Status
from fedlora.store.store import Store

__all__ = ["BundleEntry", "GlobalEntry", "PersonalEntry", "RunRows", "Status", "Store"]
