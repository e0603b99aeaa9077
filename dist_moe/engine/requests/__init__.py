"""What a sequence asks for, and how its next token is found."""
