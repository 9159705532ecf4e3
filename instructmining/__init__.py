"""The study of InstructMining that the notebooks run, and the command `instructmining`."""
