"""Files of weights: one lazy reader per format, one atomic streaming writer."""

from polyak.checkpoints.reading.opening import open_checkpoint as open_checkpoint
