"""Measures of models."""
