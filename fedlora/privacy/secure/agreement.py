"""Tags by which clients make sure that the server has told all of them the same.

Before anyone reveals a share, every client tells its neighbors which survivors and dropouts it was
shown, and whose keys it has seen: by HMAC-SHA256 under a key that only the two have. The server
passes the tags on and can make none. So where everyone is everyone's neighbor, two honest clients
that each have seen t = `share_threshold` equal ones, their own included, were told the same:
2 t - n or more of all n have told both so, and where fewer collude one of these is honest. On a
sparse graph a client compares with its neighbors alone, and the keys are not in it.
This is the consistency check of Bonawitz et al. 2017 (round 3), with tags in place of signatures.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from collections.abc import Collection, Mapping

__all__ = ["TAG_BYTES", "digest_of_keys", "digest_of_lists", "is_tag", "tag_of"]

TAG_BYTES = 32


def digest_of_keys(digests: Mapping[int, bytes]) -> bytes:
    """Return the SHA-256 of advertisements' digests by client."""
    parts = (struct.pack("<I", index) + digest for index, digest in sorted(digests.items()))
    return hashlib.sha256(b"fedlora secure aggregation directory 1\n" + b"".join(parts)).digest()


def digest_of_lists(
    survivors: Collection[int], dropouts: Collection[int], directory: bytes
) -> bytes:
    """Return the SHA-256 of what a client was told. directory: `digest_of_keys` of all of them."""
    text = json.dumps([sorted(survivors), sorted(dropouts), directory.hex()])
    return hashlib.sha256(b"fedlora secure aggregation lists 1\n" + text.encode()).digest()


def tag_of(key: bytes, sender: int, recipient: int, lists: bytes) -> bytes:
    """Return the tag (32 bytes) of what `sender` was told, for `recipient`.

    key: `keys.agreement_key` of the two. lists: `digest_of_lists`.
    """
    return hmac.new(key, struct.pack("<II", sender, recipient) + lists, hashlib.sha256).digest()


def is_tag(tag: bytes, key: bytes, sender: int, recipient: int, lists: bytes) -> bool:
    """Whether `tag` says that `sender` was told the same."""
    return hmac.compare_digest(tag, tag_of(key, sender, recipient, lists))
