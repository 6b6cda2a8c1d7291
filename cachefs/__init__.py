"""Origin -> store -> readers: everything between object storage and a buffer."""
