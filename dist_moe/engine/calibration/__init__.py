"""What texts drive through matrices, and what rounding them does."""
