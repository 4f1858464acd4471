"""Evaluation of a trained model: by position, at other lengths, on any text."""
