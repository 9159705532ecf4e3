"""Instruction data in and out: any published format becomes one table of conversations."""
