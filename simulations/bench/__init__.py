"""Benchmarks: both sides interleaved in one run, ratios with their spread, JSON and a table."""
