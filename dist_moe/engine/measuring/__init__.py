"""Loops that measure a machine without a model."""
