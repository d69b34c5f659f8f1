"""What all tests share."""

from hypothesis import settings

# The same examples in every run, and no test may fail because the machine is slow.
settings.register_profile("polyak", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("polyak")
