"""Who a node is, and how it proves to its peers that it knows the cluster's secret.

the secret's file -> ClusterKeys -> the authority that signs every node's certificate (TLS)
                                 -> the key that signs requests where there is no TLS
STORE/node        -> the node's name, which outlives the process
"""

from weightstream.p2p.identity.certificates import PEER_NAME, Credentials
from weightstream.p2p.identity.identity import (
    MOST_ZONE_CHARACTERS,
    Identity,
    instance_of,
    open_identity,
)
from weightstream.p2p.identity.name import is_node_name
from weightstream.p2p.identity.secret import ClusterKeys, read_keys
from weightstream.p2p.identity.signing import Signer

__all__ = [
    "MOST_ZONE_CHARACTERS",
    "PEER_NAME",
    "ClusterKeys",
    "Credentials",
    "Identity",
    "Signer",
    "instance_of",
    "is_node_name",
    "open_identity",
    "read_keys",
]
