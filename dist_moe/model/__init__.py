"""The maths of Qwen3 and Qwen3-MoE, on this rank's share of the weights."""
