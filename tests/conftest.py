"""What holds for every test."""

import os

# Read when numpy and torch are loaded: many threads on few cores make small arithmetic slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
