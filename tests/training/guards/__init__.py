"""Guards of a run: each is triggered once, and lets a sound run pass."""
