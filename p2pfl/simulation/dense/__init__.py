"""Thousands of peers as stacked tensors: the mathematics of convergence, without messages.

No module here knows files, clocks or how a scenario is written.
"""
