"""The tensors of a model by name, what happens to each, and the only in-place arithmetic."""
