"""The network over libp2p: the only package that imports libp2p, trio's sockets and multiaddr.

Its one product is `p2pfl.node.libp2p.host.Libp2pTransport`. What libp2p raises is translated here and never leaves.
"""
