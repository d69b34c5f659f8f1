"""Thin adapters to frameworks; each imports its framework inside its own file only."""
