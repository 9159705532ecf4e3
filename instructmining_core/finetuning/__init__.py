"""A training set becomes a model; many sets become a ledger of runs."""
