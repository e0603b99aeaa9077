"""Reads what others wrote: Hugging Face directories, as one ModelConfig and named f32 slices."""
