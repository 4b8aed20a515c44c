"""Protocols as machines without I/O, and the graph theory under them."""
