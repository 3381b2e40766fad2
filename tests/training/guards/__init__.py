"""What stops a run before it trains on nonsense: each guard is provoked once, and lets a sound run pass."""
