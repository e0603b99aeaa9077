"""Text beside the engine: tokenizer, incremental decoding, chat templates, a model's own generation settings."""
