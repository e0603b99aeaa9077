"""`dist-moe chat`: talk with a model. The front end keeps the terminal; the model runs in a job that it starts.

The job runs the same command line again and finds the front end by a variable. Under a bare mpirun rank 0 is the front
end itself, line by line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from dist_moe.chat.answering import Answerer
from dist_moe.chat.backend import LocalBackend, OneInterrupt, RemoteBackend
from dist_moe.chat.commands import parse_thinking
from dist_moe.chat.connection import VARIABLE, Address, LineClosed, call_front_end
from dist_moe.chat.conversation import Conversation, load_conversation
from dist_moe.chat.display import Display
from dist_moe.chat.job import Job, JobEnded
from dist_moe.chat.protocol import Generate, Ready
from dist_moe.chat.reader import LineReader, Reader
from dist_moe.chat.service import Service
from dist_moe.chat.session import Chat, Settings
from dist_moe.cli import config_file
from dist_moe.cli.chat_options import DEFAULT_CONTEXT, ChatOptions, chat_options
from dist_moe.cli.context_options import prompt_cache_options
from dist_moe.cli.job import Setting, run_job
from dist_moe.cli.models import find_model
from dist_moe.cli.options import model_options
from dist_moe.cli.prompt import require_context
from dist_moe.cli.sampling import advised_values
from dist_moe.cli.sampling import sampling_options as chosen_sampling
from dist_moe.cli.sampling_options import sampling_options
from dist_moe.cli.saved_prompt import SavedPrompt, read_saved_prompt
from dist_moe.cli.text_files import read_text
from dist_moe.engine.engine import Engine
from dist_moe.errors import Interrupted, UsageError
from dist_moe.kernels import KvFormat
from dist_moe.parallel.hostfile import read_hostfile
from dist_moe.parallel.launcher import Launcher, detect_launcher
from dist_moe.store.manifest import Manifest
from dist_moe.text.generation_config import read_generation_config
from dist_moe.text.messages import Message
from dist_moe.text.tools import Tool, read_tools

SYSTEMS = ("system", "system_file")


@dataclass(frozen=True)
class ChatTask:
    """What rank 0 leads: `hold` gets the engine, what is known about it, and what answers."""

    context: int
    answerer: Answerer
    facts: Ready
    hold: Callable[[Engine, Answerer, Ready], None]
    saved: SavedPrompt | None = None

    def accept(self, manifest: Manifest, kv: KvFormat) -> None:
        """Refuse a prompt cache of another store."""
        if self.saved is not None:
            self.saved.check(manifest, kv)

    def lead_engine(self, engine: Engine) -> None:
        """Hold the conversation; its end is what the prompt cache keeps."""
        if self.saved is not None:
            self.saved.restore(engine.runtime)
        try:
            self.hold(engine, self.answerer, self.facts)
        except Interrupted:
            self._save(engine)
            raise
        self._save(engine)

    def _save(self, engine: Engine) -> None:
        if self.saved is not None:
            self.saved.save_latest(engine.runtime)


@click.command()
@chat_options
@prompt_cache_options
@model_options
@sampling_options
@click.pass_context
def chat(context: click.Context, /, config: str | None, print_config: bool, **values: Any) -> None:
    """Talk with a model.

    Each option can also be set as DIST_MOE_<NAME> in the environment and in a --config file.
    """
    context.params["thinking"] = parse_thinking(values["thinking"], "--thinking")
    config_file.keep_one(context, SYSTEMS)
    values |= {name: context.params[name] for name in values}
    options, launcher = ChatOptions(**values), detect_launcher(os.environ)
    if print_config:
        advised = read_generation_config(find_model(options).text_directory())
        config_file.print_config(context, advised_values(advised))
    elif (address := Address.from_environment(os.environ)) is not None:
        _serve(options, launcher, address)
    elif launcher.name == "none" or (launcher.name == "slurm" and launcher.size == 1):  # salloc's shell is such a step
        context.exit(_hold_front_end(options))
    else:
        _hold_under_launcher(options, launcher)


def _hold_front_end(options: ChatOptions) -> int:
    """Start the job and hold the conversation with it; returns the exit code."""
    settings, conversation = _read_inputs(options)
    hosts = None if options.hostfile is None else read_hostfile(Path(options.hostfile))
    display = Display(show_thinking=options.show_thinking, environ=os.environ)
    with Job(sys.argv[1:], options.ranks, hosts) as job:
        try:
            if display.is_terminal:
                display.say("loading ...")
            line, facts = job.connect(options.start_timeout)
            Chat(RemoteBackend(line), _reader(line.fileno()), display, facts, settings, conversation).run()
        except LineClosed:
            raise job.ended() from None
        except JobEnded as ended:
            if ended.said:
                return ended.exit_code
            raise
    return 0


def _reader(line_fd: int) -> Reader:
    """An editor where there is a terminal for it, else lines."""

    def ended() -> None:
        raise LineClosed

    if sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        from dist_moe.chat.terminal import TerminalReader, history_file

        return TerminalReader(history_file(os.environ), line_fd, os.environ)
    return LineReader(sys.stdin.fileno(), look_at=line_fd, ended=ended)


def _serve(options: ChatOptions, launcher: Launcher, address: Address) -> None:
    """Be a rank of a job that a front end started."""
    os.environ.pop(VARIABLE)
    service = Service(call_front_end(address)) if launcher.is_first else None

    def hold(engine: Engine, answerer: Answerer, facts: Ready) -> None:
        assert service is not None
        service.serve(facts, lambda request, show, stop: answerer.answer(engine, request, show, stop))

    try:
        # Its front end tells it when to end; what kills it is not to wait for one.
        run_job(options, lambda options, setting: make_task(options, setting, hold), finish=False)
    finally:
        if service is not None:
            service.leave()


def _hold_under_launcher(options: ChatOptions, launcher: Launcher) -> None:
    """Be a rank of a job that the user started: rank 0 reads lines from the stdin that mpirun forwards."""
    if options.ranks is not None or options.hostfile is not None:
        raise UsageError("--ranks and --hostfile start mpirun themselves: leave mpirun out, or these options")
    if launcher.name == "openmpi":
        again = f"dist-moe chat --ranks {max(1, launcher.size)}"
        raise UsageError(f"under Open MPI's mpirun, which never ends stdin, a chat cannot be held: use {again}")

    def make(options: ChatOptions, setting: Setting) -> ChatTask:
        settings, conversation = _read_inputs(options)
        once = OneInterrupt(setting.interrupted, lambda: setting.interrupts.final)

        def hold(engine: Engine, answerer: Answerer, facts: Ready) -> None:
            reader = LineReader(sys.stdin.fileno(), interrupted=once.requested)
            display = Display(show_thinking=options.show_thinking, environ=os.environ)
            display.say(f"line by line under mpirun; with an editor: dist-moe chat --ranks {facts.ranks}")
            Chat(LocalBackend(engine, answerer, once), reader, display, facts, settings, conversation).run()

        return make_task(options, setting, hold)

    run_job(options, make)


def make_task(options: ChatOptions, setting: Setting, hold: Callable[[Engine, Answerer, Ready], None]) -> ChatTask:
    """Check on rank 0, before any weight is read, that the model can chat as the options want it.

    Raises:
        UsageError: An option does not fit the model.
        CheckpointError: The model has no tokenizer or chat template, or one that cannot be used.
    """
    config, text = setting.config, setting.text
    require_context(options.ctx, config.max_positions)
    answerer = Answerer(
        format=text.chat_format,
        sampling=chosen_sampling(options, text.advised, text.tokenizer, config.vocabulary),
        context=options.ctx or min(config.max_positions, DEFAULT_CONTEXT),
        max_tokens=options.max_tokens,
    )
    tools = () if options.tools is None else read_tools(Path(options.tools))
    probe = [Message("user", "x").to_json()]
    answerer.prompt(Generate(probe, [], options.thinking, 0), tools)
    facts = Ready(
        model="the demo model" if options.model is None else str(options.model),
        ranks=max(1, setting.launcher.size),
        context=answerer.context,
        thinking=answerer.format.thinking.value,
        knows_tools=answerer.format.dialect is not None,
        temperature=answerer.sampling.temperature,
    )
    saved = read_saved_prompt(options)
    if saved is not None:
        saved.require_room(answerer.context)
    return ChatTask(answerer.context, answerer, facts, hold, saved)


def _read_inputs(options: ChatOptions) -> tuple[Settings, Conversation]:
    """What the front end reads of the options.

    Raises:
        UsageError: A file cannot be used.
    """
    tools: tuple[Tool, ...] = () if options.tools is None else read_tools(Path(options.tools))
    conversation = Conversation() if options.load is None else load_conversation(Path(options.load), "--load")
    if options.system_file is not None:
        conversation.system = read_text(Path(options.system_file), "--system-file").removesuffix("\n")
    elif options.system is not None:
        conversation.system = options.system
    return Settings(options.thinking, options.seed, tools), conversation
