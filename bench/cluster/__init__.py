"""Clusters of nodes on shaped links, in network namespaces of one machine."""
