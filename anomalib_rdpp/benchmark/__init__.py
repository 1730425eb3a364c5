"""Benchmarks: accuracy of any host models on equal terms."""
