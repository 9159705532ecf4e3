"""From the ledger to a rule and its card: fits, tests, intervals, and how many runs they need."""
