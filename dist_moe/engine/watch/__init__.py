"""Times, bytes and health of ranks."""
