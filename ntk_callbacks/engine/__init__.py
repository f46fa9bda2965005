"""Tensors from a model and its inputs: kernels, Jacobians, spectra."""
