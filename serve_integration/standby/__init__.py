"""Standby: processes that wait with torch imported, nodes that wait with weights prefetched.

raylets      the private half of Ray: which processes a node has, and to start more
processes    how many to start, and the loop that keeps them
check        what the nodes and the deployments lack to gain from it
schedule     how many steps at which time
capacity     nodes held beyond what is used
"""
