"""InstructMining: fit a rule that predicts finetuning loss from cheap indicators; select with it.

A core for the notebooks and the command line. Importing it loads nothing heavy; each room
(`instructmining_core.records`, `.indicators`, `.finetune`, `.regression`, ...) is imported by name.
"""

__version__ = "0.1.0"
