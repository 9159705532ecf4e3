"""Simulated studies: what the designs can see, and whether the inference keeps its word."""
