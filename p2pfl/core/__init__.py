"""Words and contracts every layer shares; imports nothing of ours."""
