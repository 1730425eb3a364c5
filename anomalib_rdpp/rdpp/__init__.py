"""RD++: Revisiting Reverse Distillation for Anomaly Detection (Tien et al., CVPR 2023)."""
