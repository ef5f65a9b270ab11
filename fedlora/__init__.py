"""Federated on-device personalization: share low-rank adapters, never data or full models."""

__version__ = "0.1.0"
