"""Closed-form answers beside the measured ones: infinite width, mean field, random matrices."""
