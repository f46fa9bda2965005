"""Benchmarks of the kernel engine: `make bench`, or `python -m bench` in `tests`."""
