"""The drivers of the file system, and the processes behind a mount."""
