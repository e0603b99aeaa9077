"""dist-moe: Qwen3 mixture-of-experts models on CPUs across MPI ranks, the same bits on any number of them."""

__version__ = "0.1.0"
