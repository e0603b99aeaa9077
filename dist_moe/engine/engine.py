"""The engine as programs use it: open a model on all ranks, and generate."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np
import numpy.typing as npt

from dist_moe.engine.calls import Calls
from dist_moe.engine.open_model import OpenModel, own_errors
from dist_moe.engine.opening import Shows
from dist_moe.engine.requests.pieces import Piece, Result
from dist_moe.engine.requests.questions import GenerateOptions, Prompt, Wishes, whole_numbers
from dist_moe.engine.several_texts import SeveralTexts
from dist_moe.engine.start.job import Job, finalize_at_exit
from dist_moe.engine.start.settings import Settings
from dist_moe.engine.start.signals import interrupts_wait
from dist_moe.engine.steps.worker import RowSink
from dist_moe.engine.streams import PieceCallback, Sequences
from dist_moe.engine.watch.statistics import EngineStatistics
from dist_moe.model_config import ModelConfig
from dist_moe.parallel.launcher import detect_launcher
from dist_moe.parallel.lifeline import hold_lifeline
from dist_moe.store.models import ModelSource, find_model
from dist_moe.text.messages import Message

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from dist_moe.parallel.world import Intracomm

Made = TypeVar("Made")
Pieces = Generator[Piece, None, None]
DEMO = "demo"


class Engine(SeveralTexts):
    """A model on one or many ranks: `with Engine("model-q4") as engine: ...`.

    A plain `python` is one rank and needs no MPI. Under mpirun all ranks run the same script and make the same calls in
    the same order; rank 0 gets the pieces, the loops of the others end without one. What a loop's body calls is rank
    0's own, as is what `lead` is given. Errors are raised on all ranks alike.
    """

    def __init__(
        self,
        store: str | os.PathLike[str] | None = None,
        comm: Intracomm | None = None,
        *,
        context: int | None = None,
        threads: int | None = None,
        kv: str = "f16",
        experts: str = "auto",
        exchange: str = "auto",
        wire: str = "exact",
        prefill_chunk: int = 256,
        weights: str = "mapped",
        isa: str | None = None,
        check: str = "fast",
        scrub: bool = False,
        bind: str = "auto",
        quant: str | None = None,
        rope_scaling: str | None = None,
        resident: int | None = None,
        stall_timeout_s: float = 60.0,
        start_timeout_s: float = 60.0,
    ) -> None:
        """Find the model and check the options; weights are read by `load`, which `with` calls. Collective.

        Args:
            store: A store, a Hugging Face directory or a GGUF file, the latter two packed once into the cache
                directory; None or "demo" is the bundled demo model. Each host may give its own place.
            comm: An mpi4py communicator whose ranks run the model. None: all ranks of mpirun, or this process alone.
            context: Tokens of a sequence at most, prompt included; None: 8192, or the model's maximum if that is less.
            threads: Of this rank; None: its share of the host's cores.
            kv: Format of the KV cache: f32, f16 or q8.
            experts: How ranks divide the experts, with one result: auto, whole, sliced or shared.
            exchange: What travels between ranks, with one result: auto, allreduce (sums) or alltoall (tokens).
            wire: How sums travel between hosts: exact, or rounded to bf16 or q8, which gives another result.
            prefill_chunk: Prompt tokens of a step at most; the result is the same.
            weights: mapped (files as the system caches them) or copy (into huge pages of each rank).
            isa: Instruction set level of the kernels on this rank; None: the best.
            check: What is verified of a store: fast (sizes, headers) or full (all checksums).
            scrub: Recompute checksums of mapped weights in idle time.
            bind: auto widens a launcher's binding that is too narrow, keep does not.
            quant: Format of the weights when a model is packed: f32, bf16, q8 or q4; None: what suits it.
            rope_scaling: Stretch the context by YaRN, as "yarn:4" or "yarn:4:32768"; changes all numbers.
            resident: Positions of K and V that stay for prompts that begin alike; None: one context's.
            stall_timeout_s: End the job when no rank moves for so long inside a call.
            start_timeout_s: End the job when MPI has not started on all ranks after so long.

        Raises:
            UsageError: An option is wrong, or there is no such model.
            CheckpointError, StoreError: The model's files are damaged or not supported.
            EnvironmentMismatch: MPI is missing, or does not fit the launcher; or ranks differ.
        """
        given = locals()
        settings = Settings(**{field.name: given[field.name] for field in fields(Settings) if field.name in given})
        hold_lifeline(detect_launcher(os.environ), os.environ)
        with own_errors():
            job = Job(threads if isinstance(threads, int) else None, start_timeout_s, lambda _: stall_timeout_s, comm)
            finalize_at_exit()
            name = job.own_or_leaders("" if store in (None, DEMO) else os.fspath(store or ""))
            super().__init__(job, settings, lambda: find_model(name or None, quant, "", "quant="), Shows())

    @classmethod
    def join(cls, job: Job, settings: Settings, find: Callable[[], ModelSource], shows: Shows) -> Engine:
        """An engine on ranks that are a job already, for the command line; collective; see `OpenModel`."""
        engine = cls.__new__(cls)
        OpenModel.__init__(engine, job, settings, find, shows)
        return engine

    # ---- text ----

    def generate(self, prompt: Prompt | Sequence[Prompt], **options: Unpack[GenerateOptions]) -> Pieces:
        """Continue a prompt, or several together in shared steps; collective.

        Leaving the loop, or closing the generator, ends the generation. The ids are the same alone and in a batch.

        Args:
            prompt: Text (special tokens in it are plain characters), token ids, or a list of those.
            **options: See `GenerateOptions`.

        Yields:
            Pieces as they are made, on rank 0.

        Raises:
            UsageError: A prompt or an option does not fit; raised before the first piece.
            CheckpointError: Text is given to or asked of a model whose tokenizer is damaged or missing.
        """
        return self._stream("generate", options, lambda wishes: Sequences.of_prompts(self.text, prompt, wishes))

    def chat(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        *,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        **options: Unpack[GenerateOptions],
    ) -> Pieces:
        """Answer a conversation, framed by the model's own chat template; collective.

        Args:
            messages: Oldest first, as OpenAI writes them: {"role": "user", "content": "..."}. Nobody's text can forge
                special tokens.
            thinking: On, off, or None for what the template does by itself.
            tools: Functions that the model may call, as OpenAI writes them.
            **options: See `GenerateOptions`; stop strings are looked for in the answer, not in the thinking.

        Yields:
            Pieces: `text` is the answer, `reasoning` what is thought before it, `tool_calls` what it calls.

        Raises:
            UsageError: The messages or options do not fit.
            CheckpointError: The model has no chat template.
        """
        return self._stream(
            "chat", options, lambda wishes: Sequences.of_messages(self.text, messages, thinking, tools, wishes)
        )

    @overload
    def complete(
        self, prompt: str | Sequence[int], on_piece: PieceCallback | None = None, **options: Unpack[GenerateOptions]
    ) -> Result: ...

    @overload
    def complete(
        self,
        prompt: list[str] | list[list[int]],
        on_piece: PieceCallback | None = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Result]: ...

    def complete(
        self,
        prompt: Prompt | Sequence[Prompt],
        on_piece: PieceCallback | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Result | list[Result]:
        """Continue a prompt, or several, to their ends; collective. Errors as of `generate`.

        Args:
            prompt: As of `generate`.
            on_piece: Told each piece as it is made, on rank 0.
            **options: See `GenerateOptions`.

        Returns:
            One result, or one per prompt; on all ranks alike, so that a script can decide by it.
        """
        results, is_one = self._together(
            "complete",
            lambda: self._complete(prompt, on_piece, Wishes(**options)),
            lambda made: [[asdict(result) for result in made[0]], made[1]],
            lambda heard: ([Result.of_dict(values) for values in heard[0]], heard[1]),
        )
        return results[0] if is_one else results

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text, in which special tokens are plain characters; on all ranks alike; collective.

        Raises:
            CheckpointError: The model has no tokenizer.
        """
        return self._together("tokenize", lambda: self.text.require_tokenizer().encode(text), list, list)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens left out; on all ranks alike; collective.

        Raises:
            UsageError: They are no whole numbers.
            CheckpointError: The model has no tokenizer.
        """
        return self._together("detokenize", lambda: self.text.require_tokenizer().decode(whole_numbers(ids)), str, str)

    def logits(
        self, prompt: Prompt, sink: RowSink | None = None, interrupted: Callable[[], bool] = lambda: False
    ) -> npt.NDArray[np.float32]:
        """The logits at every position of a text; collective.

        Args:
            prompt: Text or token ids.
            sink: Gets f32 [n, V] for the next n positions, valid only during the call, instead of the result.
            interrupted: Asked after each step whether to give up.

        Returns:
            f32 [T, V] on rank 0; no rows on the others, or if there is a sink.

        Raises:
            Interrupted: `interrupted` said so.
            UsageError: As in `generate`.
            DistMoeError: A NaN or overflow in the model.
        """
        ask = partial(self._logits, prompt, sink, interrupted)
        return self._together("logits", ask, lambda _: None, lambda _: _no_logits(self.config))

    def statistics(self) -> EngineStatistics:
        """Counts and times since the start, over all ranks and on all of them alike; collective."""
        return self._together(
            "statistics", lambda: self.runtime.statistics(), asdict, lambda heard: EngineStatistics(**heard)
        )

    def lead(self, action: Callable[[Engine], Made]) -> Made | None:
        """Let rank 0 alone do something with the engine, whose calls the other ranks need not make; collective.

        Returns:
            What the action returns on rank 0, None on the others.

        Raises:
            DistMoeError: The action raised it; on all ranks.
        """
        return self._together("lead", lambda: action(self), lambda _: None, lambda _: None)

    # ---- calls ----

    def _stream(self, name: str, options: GenerateOptions, prepare: Callable[[Wishes], Sequences]) -> Pieces:
        calls, wishes = self._ready(), Wishes(**options)
        number = calls.number()
        if self.is_leader:
            with calls.lead(number, f"{name} begins"):
                sequences = prepare(wishes)
                sequences.check(self.runtime)
            pieces = self._lead_pieces(calls, number, name, sequences)
        else:
            calls.follow(number, f"{name} begins")
            pieces = self._follow_pieces(calls, number, name)
        self._generations.add(pieces)
        return pieces

    def _lead_pieces(self, calls: Calls, number: int, name: str, sequences: Sequences) -> Pieces:
        with calls.lead(number, f"{name} ends"):
            yield from sequences.pieces(self.runtime)

    @staticmethod
    def _follow_pieces(calls: Calls, number: int, name: str) -> Pieces:
        calls.follow(number, f"{name} ends")
        yield from ()

    def _complete(
        self, prompt: Prompt | Sequence[Prompt], on_piece: PieceCallback | None, wishes: Wishes
    ) -> tuple[list[Result], bool]:
        sequences = Sequences.of_prompts(self.text, prompt, wishes)
        sequences.check(self.runtime)
        return sequences.complete(self.runtime, on_piece), sequences.is_one

    def _logits(self, prompt: Prompt, sink: RowSink | None, interrupted: Callable[[], bool]) -> npt.NDArray[np.float32]:
        ids = self.text.encode(prompt)
        rows: list[npt.NDArray[np.float32]] = [_no_logits(self.config)]
        with interrupts_wait():
            self.runtime.logits(ids, sink or (lambda rows_TV: rows.append(rows_TV.copy())), interrupted)
        return np.concatenate(rows)


def _no_logits(config: ModelConfig) -> npt.NDArray[np.float32]:
    return np.empty((0, config.vocabulary), np.float32)
