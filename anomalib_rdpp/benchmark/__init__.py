"""Benchmarks: accuracy and latency of any anomalib models on equal terms."""
