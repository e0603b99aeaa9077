"""The goldens as a user's tool: kernels, parts of layers and whole models against definitions, bit for bit or close."""
