"""Averages across files: what is asked, the plan, the loop, the streaming writers, resuming."""
