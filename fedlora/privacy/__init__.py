"""Privacy: clipping and noise, what they guarantee, secure aggregation, and audits. NumPy only.

Nothing here knows of methods, adapters or Flower: it works on rows of numbers, one a client.
`dp-accounting` and `cryptography` come with the extra ``privacy`` and are imported where they are
needed.
"""

from __future__ import annotations

from fedlora.privacy.config import PrivacyConfig, SecureAggregationConfig
from fedlora.privacy.events import PrivacyEvent

__all__ = ["PrivacyConfig", "PrivacyEvent", "SecureAggregationConfig"]
