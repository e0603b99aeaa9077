"""Times llama.cpp on a GGUF file: one JSON object per line in (what to time), one per line out (seconds, or logits).

Started by peers.py in a process of its own, so that it is loaded once and sleeps while the other engine runs:

    python benchmarks/llama_worker.py MODEL.gguf --threads 2 --repack yes

Requests: {"test": "prefill"|"decode", "tokens", "batch", "depth", "kv": "f16"|"q8", "flash": true|false, "repeat"} are
answered with {"seconds": [...]}, one per repetition; {"test": "logits", "ids": [...], "output": FILE.npy, ...} with {};
{"test": "weights"} with {"digests": {tensor: blake2b of the float32 values that llama.cpp decodes}} of Q4_0 tensors.
Tokens are random, as in llama-bench, and nothing is drawn from the logits.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader

Q4_0_BYTES = 18  # of a block of 32 values
BATCH_TOKENS = 512
KV_TYPES = {"f16": llama.GGML_TYPE_F16, "q8": llama.GGML_TYPE_Q8_0}
SEED = 7


class Worker:
    """One loaded model, and the context of the last request."""

    def __init__(self, path: Path, threads: int, repack: bool) -> None:
        """Load the model; `repack` lets llama.cpp keep weights in the order of this CPU's instructions."""
        self._path = path
        self.log: list[str] = []
        self._log_callback = llama.llama_log_callback(lambda level, text, data: self.log.append(text.decode()))
        llama.llama_log_set(self._log_callback, ctypes.c_void_p(0))
        llama.llama_backend_init()
        params = llama.llama_model_default_params()
        params.use_extra_bufts = repack
        self._model = llama.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise SystemExit(f"{path}: llama.cpp cannot load it:\n{''.join(self.log[-5:])}")
        self._threads = threads
        self._vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._context: Any = None
        self._key: tuple[Any, ...] = ()
        self._batch = llama.llama_batch_init(BATCH_TOKENS, 0, 1)
        self._random = np.random.default_rng(SEED)

    def facts(self) -> dict[str, str]:
        """What was built and how weights lie, for the report."""
        library = ggml_library()
        library.ggml_commit.restype = ctypes.c_char_p
        buffers = [line.split(":", 1)[-1].strip() for line in self.log if "model buffer size" in line]
        return {
            "ggml": library.ggml_commit().decode(),
            "system": llama.llama_print_system_info().decode(),
            "buffers": "; ".join(" ".join(line.split()) for line in buffers),
        }

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what a line asks for."""
        if request["test"] == "logits":
            return self._logits(request)
        if request["test"] == "weights":
            return {"digests": dict(self._digests())}
        depth, tokens, batch = request["depth"], request["tokens"], request["batch"]
        self._open(request["kv"], request["flash"], batch, depth + tokens, depth)
        time_once = self._time_prefill if request["test"] == "prefill" else self._time_decode
        return {"seconds": [time_once(tokens, batch, depth) for _ in range(request["repeat"])]}

    def _open(self, kv: str, flash: bool, sequences: int, positions: int, depth: int) -> None:
        """A context of these settings with `depth` tokens in its cache; the last one if it fits."""
        positions = -(-positions // 256) * 256
        key = (kv, flash, sequences, positions, depth)
        if key == self._key:
            return
        if self._context:
            llama.llama_free(self._context)
        params = llama.llama_context_default_params()
        # A second sequence of the same cache is where copies of a filled one are made.
        params.kv_unified = depth > 0
        params.n_ctx = (positions + (BATCH_TOKENS if depth else 0)) * sequences
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.n_seq_max = sequences + (depth > 0)
        params.n_threads = params.n_threads_batch = self._threads
        params.type_k = params.type_v = KV_TYPES[kv]
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp makes no context of {request_words(key)}:\n{''.join(self.log[-5:])}")
        self._key, self._memory = key, llama.llama_get_memory(self._context)
        if depth:
            self._fill(depth)
        self._forget(sequences, depth)
        self._time_decode(1, sequences, depth)  # buffers of the first step are allocated in it

    def _fill(self, depth: int) -> None:
        """Bring `depth` tokens into the cache of sequence 0: the first are computed, copies of them moved behind them.

        Attention takes as long on copies as on anything else.
        """
        self._prefill(self._random_ids(min(depth, BATCH_TOKENS)), 0)
        size = llama.llama_state_seq_get_size(self._context, 0)
        piece = (ctypes.c_uint8 * size)()
        llama.llama_state_seq_get_data(self._context, piece, size, 0)
        for start in range(BATCH_TOKENS, depth, BATCH_TOKENS):
            if not llama.llama_state_seq_set_data(self._context, piece, size, 1):
                raise SystemExit(f"llama.cpp does not copy its KV cache:\n{''.join(self.log[-5:])}")
            llama.llama_memory_seq_add(self._memory, 1, 0, -1, start)
            llama.llama_memory_seq_cp(self._memory, 1, 0, -1, -1)
            llama.llama_memory_seq_rm(self._memory, 1, -1, -1)

    def _time_prefill(self, tokens: int, batch: int, depth: int) -> float:
        self._forget(batch, depth)
        ids = self._random_ids(tokens)
        since_s = time.perf_counter()
        self._prefill(ids, depth)
        return time.perf_counter() - since_s

    def _time_decode(self, tokens: int, batch: int, depth: int) -> float:
        self._forget(batch, depth)
        ids = self._random_ids(tokens * batch)
        since_s = time.perf_counter()
        for step in range(tokens):
            now = ids[step * batch : (step + 1) * batch]
            self._run(now, [depth + step] * batch, list(range(batch)), [True] * batch)
        return time.perf_counter() - since_s

    def _prefill(self, ids: list[int], first: int) -> None:
        for start in range(0, len(ids), BATCH_TOKENS):
            part = ids[start : start + BATCH_TOKENS]
            wanted = [start + i == len(ids) - 1 for i in range(len(part))]
            self._run(part, [first + start + i for i in range(len(part))], [0] * len(part), wanted)

    def _run(self, ids: list[int], positions: list[int], sequences: list[int], wanted: list[bool]) -> None:
        batch = self._batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, positions[i], wanted[i]
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequences[i]
        if code := llama.llama_decode(self._context, batch):
            raise SystemExit(f"llama_decode returned {code}:\n{''.join(self.log[-5:])}")
        llama.llama_synchronize(self._context)

    def _forget(self, sequences: int, depth: int) -> None:
        """Leave `depth` positions in the caches."""
        for sequence in range(sequences):
            llama.llama_memory_seq_rm(self._memory, sequence, depth, -1)

    def _random_ids(self, count: int) -> list[int]:
        found: list[int] = self._random.integers(0, self._vocabulary, count).tolist()
        return found

    def _logits(self, request: dict[str, Any]) -> dict[str, Any]:
        """Write the logits at every position of a text, float32 [tokens, V]."""
        ids: list[int] = request["ids"]
        self._open(request["kv"], request["flash"], 1, len(ids), 0)
        self._forget(1, 0)
        rows = np.empty((len(ids), self._vocabulary), np.float32)
        for start in range(0, len(ids), BATCH_TOKENS):
            part = ids[start : start + BATCH_TOKENS]
            self._run(part, list(range(start, start + len(part))), [0] * len(part), [True] * len(part))
            for i in range(len(part)):
                rows[start + i] = np.ctypeslib.as_array(
                    llama.llama_get_logits_ith(self._context, i), (self._vocabulary,)
                )
        np.save(request["output"], rows)
        return {}

    def _digests(self) -> Iterator[tuple[str, str]]:
        """Each Q4_0 tensor's name, and the digest of its values as llama.cpp's own function decodes them."""
        decode = ggml_library().dequantize_row_q4_0
        decode.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        decode.restype = None
        for tensor in GGUFReader(self._path).tensors:
            if tensor.tensor_type != GGMLQuantizationType.Q4_0:
                continue
            digest = hashlib.blake2b()
            for rows in tensor.data.reshape(-1, tensor.data.shape[-1]):
                blocks = np.ascontiguousarray(rows)
                values = np.empty(len(blocks) // Q4_0_BYTES * 32, np.float32)
                decode(blocks.ctypes.data, values.ctypes.data, len(values))
                digest.update(values.data)
            yield tensor.name, digest.hexdigest()


def ggml_library() -> ctypes.CDLL:
    """The library with ggml's quantized types."""
    return ctypes.CDLL(str(Path(llama.__file__).parent / "lib" / "libggml-base.so"))


def request_words(key: tuple[Any, ...]) -> str:
    """The settings of a context in words."""
    return "{} KV, flash attention {}, {} sequences of {} positions".format(*key)


def main() -> None:
    """Load the model, say what it is, and answer line by line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repack", choices=("yes", "no"), default="yes")
    arguments = parser.parse_args()
    worker = Worker(arguments.model, arguments.threads, arguments.repack == "yes")
    print(json.dumps(worker.facts()), flush=True)
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
