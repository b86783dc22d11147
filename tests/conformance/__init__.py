"""A package next to its peers: the same folder, unmodified, opened by other clients, and torch on the checkpoint."""
