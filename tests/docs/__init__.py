"""Tests of what docs/ is made with."""
