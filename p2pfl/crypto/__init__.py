"""Pure functions and small values of cryptography: no protocol state, no I/O, no entropy of their own."""
