"""Whole networks on one machine: run, measured and drawn."""
