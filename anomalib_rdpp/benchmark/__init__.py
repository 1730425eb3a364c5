"""Benchmarks: accuracy and latency of any host models on equal terms."""
