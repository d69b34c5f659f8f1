"""Profiles, schedules and pieces: floats in, floats out, no torch."""
