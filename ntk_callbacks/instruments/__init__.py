"""Framework-free measurements: a model and a probe in, a `Measurement` out."""
