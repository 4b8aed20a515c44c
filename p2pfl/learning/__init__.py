"""What a peer trains: tasks, the model as a vector, local steps and their evaluation.

Importing this package imports nothing else: torch takes seconds to load, and most commands do not train.
"""
