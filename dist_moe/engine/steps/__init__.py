"""What rank 0 orders, and what the ranks that follow do."""
