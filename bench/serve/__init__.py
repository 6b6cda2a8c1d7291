"""Ray Serve on shaped links: how fast replicas start, and what moving them costs."""
