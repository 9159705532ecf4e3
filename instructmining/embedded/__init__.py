"""The world that needs no network: a corpus, defects planted in it, and stand-in models."""
