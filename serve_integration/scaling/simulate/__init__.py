"""Replays traffic through scaling policies without a cluster: a made-up world, real policies."""
