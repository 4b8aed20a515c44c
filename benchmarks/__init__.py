"""Measurements that print a table and a line of JSON; a package, lest another of this name be found in its place."""
