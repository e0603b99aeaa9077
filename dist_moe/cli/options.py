"""The options of the commands that run a model: their names, ranges and defaults, declared once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from dist_moe.cli.config_file import apply, config_options, flag, option
from dist_moe.cli.context_options import ContextOptions, rope_scaling_option
from dist_moe.cli.debug_options import DebugOptions
from dist_moe.cli.sampling_options import Continuations, SamplingChoices
from dist_moe.cli.values import Number, OneOf, PathName, SomeText, Whole

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

COMMANDS_WITH_CONFIG = ("run", "chat", "logits", "profile", "bench")
DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True)
class ModelOptions:
    """Which model runs, and how; equal for every command. None means: decided later, from the model or the machine."""

    model: str | None
    quant: str | None
    kv: str
    threads: int | None
    threads_file: str | None
    bind: Literal["auto", "keep"]
    experts: str
    exchange: str
    wire: str
    prefill_chunk: int
    check: Literal["fast", "full"]
    stall_timeout: float
    start_timeout: float
    scrub: bool
    weights: Literal["mapped", "copy"]
    verbose: int
    log_file: str | None
    rope_scaling: str | None


@dataclass(frozen=True)
class RunOptions(ModelOptions, SamplingChoices, Continuations, DebugOptions, ContextOptions):
    """`dist-moe run`. At most one prompt is set; `expected` (a reference trace) and `greedy` are of the legacy form."""

    prompt: str | None
    prompt_file: str | None
    prompt_ids: str | None
    max_tokens: int
    ignore_eos: bool
    stop: tuple[str, ...]
    ctx: int | None
    logits: str | None
    json: bool
    quiet: bool
    show_tokens: bool
    greedy: bool = False
    expected: str | None = None


@dataclass(frozen=True)
class LogitsOptions(ModelOptions, DebugOptions):
    """`dist-moe logits`."""

    ids: str
    output: str


@dataclass(frozen=True)
class PerplexityOptions(ModelOptions):
    """`dist-moe perplexity`."""

    text: str
    window: int | None
    stride: int | None
    split: str | None
    kl_base: str | None
    json: bool


@dataclass(frozen=True)
class ProfileOptions(ModelOptions):
    """`dist-moe profile`."""

    texts: tuple[str, ...]
    output: str
    ctx: int


@dataclass(frozen=True)
class BenchOptions(ModelOptions):
    """`dist-moe bench`. Lists are texts such as "256,2048"."""

    synthetic: str | None
    layers: int | None
    synthetic_dir: str | None
    prefill: str
    decode: int
    depth: str | None
    batch: str
    repeat: int
    stats: bool
    format: str
    read_gib: float
    seed: int


def model_options(command: Decorated) -> Decorated:
    """The options that every command with a model takes."""
    decorators = (
        option(
            "-m",
            "--model",
            type=PathName(),
            metavar="PATH",
            show_default="the bundled demo model",
            help="A store made by `dist-moe shard`, or a Hugging Face directory or a GGUF or QW3W file, packed once "
            "into the cache directory ($DIST_MOE_CACHE, else $XDG_CACHE_HOME/dist-moe, else ~/.cache/dist-moe).",
        ),
        option(
            "--quant",
            type=OneOf(["f32", "bf16", "q8", "q4"]),
            show_default="q4 for a Hugging Face directory, what a GGUF file has, q8 for the small demo, as it is for a "
            "store",
            help="Format of the weights when a model is packed.",
        ),
        option("--kv", type=OneOf(["f32", "f16", "q8"]), default="f16", help="Format of the KV cache."),
        option(
            "--threads",
            type=Whole(min=1, max=1024),
            show_default="cores that this process may use / ranks on this host",
            help="Threads of each rank.",
        ),
        option(
            "--threads-file",
            metavar="FILE.toml",
            show_default=False,
            help="Threads of each rank by host, for unequal hosts: lines like node1 = 16. Hosts that are not in it "
            "take --threads. Read by rank 0.",
        ),
        option(
            "--bind",
            type=OneOf(["auto", "keep"]),
            default="auto",
            help="auto: use all cores of the job where the launcher bound a rank to fewer than its fair share (Open "
            "MPI binds a lone rank to one core); keep: stay on the launcher's cores.",
        ),
        option(
            "--experts",
            type=OneOf(["auto", "whole", "sliced", "shared"]),
            default="auto",
            help="How ranks divide the experts; the result is the same.",
        ),
        option(
            "--exchange",
            type=OneOf(["auto", "allreduce", "alltoall"]),
            default="auto",
            help="What travels between ranks: exact sums to all (allreduce), or tokens to their experts and back "
            "(alltoall), which is less for many tokens; auto chooses for each step. The result is the same.",
        ),
        option(
            "--wire",
            type=OneOf(["exact", "bf16", "q8"]),
            default="exact",
            help="How sums travel between hosts: packed without loss; or rounded to bf16 or q8, which takes half or a "
            "quarter of the bytes and gives another result, which depends on how many hosts there are.",
        ),
        option(
            "--prefill-chunk",
            type=Whole(min=1, max=65536),
            default=256,
            help="Prompt tokens of a step at most; the result is the same.",
        ),
        option(
            "--check",
            type=OneOf(["fast", "full"]),
            default="fast",
            help="What is verified of a store: sizes and headers, or all checksums (a host's ranks share the work).",
        ),
        flag(
            "--scrub",
            "Recompute the checksums of the weights, mapped or copied, in idle time (of a chat, say), and at the end "
            "those that no idle time was found for; names a flipped byte's file and unit.",
        ),
        option(
            "--weights",
            type=OneOf(["mapped", "copy"]),
            default="mapped",
            help="mapped: read the store's files where the system caches them, shared by a host's ranks; copy: each "
            "rank copies its part into huge pages of its own first (quicker where the files are cached in small pages; "
            "takes that much more memory and time to start).",
        ),
        option(
            "--stall-timeout",
            metavar="SECONDS",
            type=Number(min=2, max=86400),
            default=60.0,
            help="End the job when for so long no rank moves (while loading, in a step), or one is not heard of.",
        ),
        option(
            "--start-timeout",
            metavar="SECONDS",
            type=Number(min=1, max=86400),
            default=60.0,
            help="End the job when MPI has not started on all ranks after so long.",
        ),
        option(
            "-v",
            "--verbose",
            count=True,
            type=Whole(min=0),
            show_default=False,
            help="Log what happens; -vv logs details.",
        ),
        option(
            "--log-file",
            type=PathName(),
            metavar="FILE",
            show_default=False,
            help="Log there instead of stderr, each line with its rank; %r in the name becomes the rank.",
        ),
        rope_scaling_option(),
        config_options(*COMMANDS_WITH_CONFIG),
    )
    return apply(command, decorators)


def prompt_options(command: Decorated) -> Decorated:
    """What text to continue."""
    decorators = (
        option(
            "-p",
            "--prompt",
            metavar="TEXT",
            show_default=False,
            help="The text to continue, as plain text: <|im_end|> and the like in it are ordinary characters. "
            "- reads stdin (under mpirun better --prompt-file).",
        ),
        option(
            "--prompt-file",
            type=PathName(),
            metavar="FILE",
            show_default=False,
            help="The text to continue, UTF-8; one newline at its end is dropped.",
        ),
        option("--prompt-ids", metavar="1,2,3", show_default=False, help="The tokens to continue; needs no tokenizer."),
        option(
            "-n",
            "--max-tokens",
            "-s",
            "--steps",
            type=Whole(min=1, max=2**31 - 1),
            default=DEFAULT_MAX_TOKENS,
            help="Tokens to generate at most.",
        ),
        option(
            "--ctx",
            type=Whole(min=1, max=2**31 - 1),
            show_default="prompt + max tokens, at most the model's maximum",
            help="Positions of the context; at its end the finish reason is `context`.",
        ),
        flag("--ignore-eos", "Go on past the tokens that end a text."),
        option(
            "--stop",
            type=SomeText(),
            multiple=True,
            metavar="TEXT",
            show_default=False,
            help="End before this text, which is not printed; \\n is a new line. Can be given several times.",
        ),
    )
    return apply(command, decorators)


def output_options(command: Decorated) -> Decorated:
    """What is printed and written."""
    decorators = (
        option(
            "--logits",
            type=PathName(),
            metavar="FILE.npy",
            show_default=False,
            help="Write the logits of each generated token, float32 [generated, vocabulary].",
        ),
        flag("--json", "Print one JSON object at the end: text, ids, finish_reason, usage, timings."),
        flag("--quiet", "Print the generated text alone: neither the prompt before it nor the summary."),
        flag("--show-tokens", 'Print a line [id] -> "piece" for each token of prompt and answer, then the text.'),
    )
    return apply(command, decorators)
