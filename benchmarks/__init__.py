"""One script per question; each prints one table and writes it with --json."""
