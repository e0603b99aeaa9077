"""How a job starts: what it needs, what its ranks agree on, what it loads."""
