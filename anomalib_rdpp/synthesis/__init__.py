"""Synthetic anomalies: what the methods add to normal images while they train."""
