"""Files of weights out: the layouts of safetensors and torch archives, streamed or at once."""
