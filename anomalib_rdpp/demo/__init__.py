"""Demo: a data set of our own, RD++ trained on it, heat maps, OpenVINO."""
