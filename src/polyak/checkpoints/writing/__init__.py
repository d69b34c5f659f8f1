"""Weights to files: the layouts of safetensors and torch archives, written in pieces or at once."""
