"""What a mount shows, whatever the driver: folders, files and their bytes."""
