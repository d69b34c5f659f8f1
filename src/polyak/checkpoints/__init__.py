"""Files of weights: one lazy reader per format, one atomic streaming writer."""
