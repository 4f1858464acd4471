"""Measures of models and texts."""
