"""Predictions and placements of experts."""
