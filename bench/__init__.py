"""Scenarios, peers, shaped links and reports; imported by nobody."""
