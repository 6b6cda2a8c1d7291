"""Ray Serve: replicas that start in seconds, scale by concurrency and move unnoticed."""
