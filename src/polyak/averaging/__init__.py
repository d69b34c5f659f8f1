"""Everything that lives beside a running model."""
