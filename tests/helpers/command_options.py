"""The options of the commands as they are when nothing is given, for tests that skip the command line."""

from __future__ import annotations

from dist_moe.cli.options import ModelOptions, RunOptions

MODEL = ModelOptions(
    model=None,
    quant=None,
    kv="f16",
    threads=None,
    threads_file=None,
    bind="auto",
    experts="auto",
    prefill_chunk=256,
    check="fast",
    stall_timeout=60,
    start_timeout=60,
    scrub=False,
    weights="mapped",
    verbose=0,
    log_file=None,
    rope_scaling=None,
)
RUN = RunOptions(
    **vars(MODEL),
    prompt=None,
    prompt_file=None,
    prompt_ids=None,
    max_tokens=8,
    temperature=None,
    top_k=None,
    top_p=None,
    min_p=None,
    seed=5,
    ignore_eos=False,
    ctx=None,
    logits=None,
    json=False,
    quiet=False,
    show_tokens=False,
    debug=None,
    routing=None,
    prompt_cache=None,
    prompt_cache_ro=False,
    prompt_cache_all=False,
)
