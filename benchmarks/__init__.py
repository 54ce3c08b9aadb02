"""Measurement: latency tables, the quality each latency costs, and their reports."""
