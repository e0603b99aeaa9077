"""Quantizes a GGUF file with llama.cpp's own quantizer, as its program llama-quantize does.

    python benchmarks/llama_quantize.py MODEL-bf16.gguf MODEL-q4_k_m.gguf Q4_K_M

Started by quality.py with the Python that has llama-cpp-python. The embedding keeps its values (`--embedding` names
another type), because ours does; the other tensors get what the type says, or with `--pure` all the same type.
"""

from __future__ import annotations

import argparse
import ctypes

import llama_cpp.llama_cpp as llama
from gguf import GGMLQuantizationType


def main() -> None:
    """Parse and quantize."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("output")
    parser.add_argument("type", help="such as Q4_0, Q4_K_M, Q8_0, IQ4_NL")
    parser.add_argument("--embedding", default="BF16", help="type of the embedding")
    parser.add_argument("--pure", action="store_true", help="lm_head, too, has that type")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    log: list[str] = []
    callback = llama.llama_log_callback(lambda level, text, data: log.append(text.decode()))
    llama.llama_log_set(callback, ctypes.c_void_p(0))
    llama.llama_backend_init()
    params = llama.llama_model_quantize_default_params()
    params.nthread, params.pure = arguments.threads, arguments.pure
    params.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{arguments.type}")
    params.token_embedding_type = GGMLQuantizationType[arguments.embedding].value
    code = llama.llama_model_quantize(arguments.source.encode(), arguments.output.encode(), ctypes.byref(params))
    if code:
        raise SystemExit(f"{arguments.source}: llama.cpp cannot make {arguments.type} of it:\n{''.join(log[-5:])}")


if __name__ == "__main__":
    main()
