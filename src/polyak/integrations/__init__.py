"""Averages inside the frameworks that train: one file per framework, made of the public API."""
