"""A conversation in a terminal: the front end with the user, the back end on rank 0, and what passes between them."""
