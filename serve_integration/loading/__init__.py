"""In the replica: weights that come while everything else is imported, and what a start cost."""
