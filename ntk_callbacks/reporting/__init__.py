"""Measurement -> loggers, images and tables."""
