"""What `benchmarks/fuzz.py` sends, what it expects, and the clients that do it."""
