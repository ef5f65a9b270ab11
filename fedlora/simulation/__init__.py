"""Simulated federations: virtual clients on this machine."""
