"""Models opened safely, read in batches, and their loss on an evaluation set."""
