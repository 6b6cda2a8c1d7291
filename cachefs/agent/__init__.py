"""The node agent: one process of a node that fetches for everybody on it, and its client."""
