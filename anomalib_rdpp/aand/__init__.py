"""AAND: Advancing Pre-trained Teacher, Anomaly Amplification and Normality Distillation (Tang et al., TIP 2026)."""
