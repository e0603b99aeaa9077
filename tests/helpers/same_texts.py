"""Draw with every sampler on the ranks that mpirun started: alone, in a batch, with reuse; rank 0 prints the ids.

mpirun -n N python same_texts.py STORE
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from dist_moe.engine.requests.beams import BeamOptions
from dist_moe.engine.requests.request import Completion, Request, SamplingOptions
from dist_moe.engine.runtime import Runtime
from dist_moe.engine.start.options import EngineOptions
from dist_moe.kernels import isa_levels
from dist_moe.parallel.launcher import detect_launcher
from dist_moe.parallel.world import World
from dist_moe.store.reader import Store
from helpers.tiny_model import random_ids

BATCH = 16
TOKENS = 24
VALID = 290  # of 300
PROMPT = random_ids(70, 60) * 2  # repeats itself, and crosses blocks of 64 positions

SAMPLERS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "hot": {"temperature": 20.0},
    "top_k": {"temperature": 1.0, "top_k": 20},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "min_p": {"temperature": 1.5, "min_p": 0.1},
    "typical_p": {"temperature": 1.0, "typical_p": 0.5},
    "repetition": {"temperature": 1.0, "repetition_penalty": 1.5, "repeat_last_n": 40},
    "presence": {"temperature": 1.0, "top_k": 40, "presence_penalty": 0.7},
    "frequency": {"frequency_penalty": 0.5},
    "dry": {"temperature": 0.7, "dry_multiplier": 2.0, "dry_breakers": frozenset({(3,)})},
    "bias": {"temperature": 1.0, "logit_bias": ((7, 3.0), (8, -math.inf), (299, 9.0))},
    "all": {
        "temperature": 1.2,
        "top_k": 50,
        "top_p": 0.95,
        "min_p": 0.01,
        "typical_p": 0.9,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.1,
        "dry_multiplier": 0.8,
    },
}


def requests() -> dict[str, Request]:
    """One per sampler, and further samples of one until there are BATCH."""
    made = {
        name: Request(PROMPT[: 100 + number], TOKENS, SamplingOptions(**how, seed=number), logprobs=number % 4)
        for number, (name, how) in enumerate(SAMPLERS.items())
    }
    for sample in range(1, BATCH - len(made) + 1):
        how = SamplingOptions(**SAMPLERS["temperature"], seed=1)
        made[f"temperature, sample {sample}"] = Request(PROMPT[:101], TOKENS, how, sample=sample)
    return made


def facts(completion: Completion) -> Any:
    """Ids, and the bits of the log-probabilities."""
    return [completion.ids, [[token.logprob.hex(), token.best] for token in completion.logprobs]]


def lead(engine: Runtime) -> dict[str, dict[str, Any]]:
    """{sampler: {how it was computed: facts}}."""
    wanted = requests()
    found: dict[str, dict[str, Any]] = {name: {} for name in [*wanted, "beams"]}
    for name, request in wanted.items():
        if not request.sample:
            [alone] = engine.generate([request], valid_vocabulary=VALID)
            found[name]["alone"] = facts(alone)
    for name, completion in zip(wanted, engine.generate([*wanted.values()], valid_vocabulary=VALID), strict=True):
        found[name]["in a batch"] = facts(completion)
    texts = engine.beam_search(wanted["greedy"], BeamOptions(5, 1.0), VALID)
    found["beams"]["alone"] = [facts(completion) for completion in texts]
    return found


def main() -> None:
    """Print {sampler: {combination: facts}} as JSON on rank 0."""
    world = World.start(detect_launcher(os.environ))
    store, levels = Store.open(Path(sys.argv[1])), isa_levels()
    texts: dict[str, dict[str, Any]] = {}
    for mixed in (False, True):
        isa = levels[world.rank % len(levels)] if mixed else None
        for resident in (None, 0):
            engine = Runtime(store, world, EngineOptions(context=200, prefill_chunk=33, isa=isa, resident=resident))
            if not world.is_leader:
                engine.serve()
                continue
            how = f"{'mixed levels' if mixed else 'best level'}, {'no ' if resident == 0 else ''}reuse"
            for name, found in lead(engine).items():
                for combination, fact in found.items():
                    texts.setdefault(name, {})[f"{how}, {combination}"] = fact
            engine.stop()
    if world.is_leader:
        print(json.dumps(texts))
    world.finalize()


if __name__ == "__main__":
    main()
