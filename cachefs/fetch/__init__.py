"""The fetch engine: what to fetch next, from whom, into which buffer."""
