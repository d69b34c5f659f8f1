"""One lazy reader per format, each giving named tensors as byte spans; no pickle is ever run."""
