"""The part of Engine that compares texts: samples, beams, log-probabilities."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from dist_moe.engine.open_model import OpenModel
from dist_moe.engine.requests.pieces import Result, Usage
from dist_moe.engine.requests.questions import GenerateOptions, Prompt, TextSide, Wishes
from dist_moe.engine.requests.request import Request, check_prompt
from dist_moe.engine.several import Continuation, Search, continue_several
from dist_moe.engine.start.signals import interrupts_wait
from dist_moe.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SeveralTexts(OpenModel):
    """An open model that can be asked for the best of several texts."""

    def complete_several(
        self,
        prompt: Prompt,
        *,
        samples: int = 1,
        beams: int | None = None,
        length_penalty: float = 0.0,
        **options: Unpack[GenerateOptions],
    ) -> list[Result]:
        """Continue one prompt several times, all together in shared steps; collective.

        Args:
            prompt: Text or token ids.
            samples: Draw so many; the first is what `complete` draws.
            beams: Instead, search with so many beams for the texts of the highest score; nothing is drawn, and of the
                options only max_tokens, ignore_eos and interrupted are looked at.
            length_penalty: A text's score is its log-probability divided by its length to the power of this.
            **options: See `GenerateOptions`; stop strings and on_logits are about a single text.

        Returns:
            Results, always with logprobs, best score first; on all ranks alike.

        Raises:
            UsageError: The prompt or an option does not fit.
            CheckpointError: Text is given to a model without a tokenizer.
        """
        search = Search(samples, beams, length_penalty)
        return self._together(
            "complete_several",
            lambda: self._several(prompt, search, Wishes(**options)),
            lambda made: [asdict(result) for result in made],
            lambda heard: [Result.of_dict(values) for values in heard],
        )

    def _several(self, prompt: Prompt, search: Search, wishes: Wishes) -> list[Result]:
        logprobs = wishes.logprobs or 0
        search.require_valid(logprobs)
        wishes.require_valid()
        for name in ("stop", "on_logits"):
            if getattr(wishes, name):
                raise UsageError(f"{name}: it is about a single text: use generate or complete")
        request = replace(self.text.request(self.text.encode(prompt), wishes), logprobs=logprobs)
        check_prompt(request.prompt_ids, self.runtime.context, self.runtime.config)
        with interrupts_wait():
            found = continue_several(
                self.runtime, request, search, self.text.valid_vocabulary, wishes.interrupted or (lambda: False)
            )
        return [_result(self.text, request, one) for one in found]


def _result(text: TextSide, request: Request, one: Continuation) -> Result:
    done = one.completion
    assert done.finish_reason is not None
    shown = done.ids[:-1] if done.finish_reason == "stop" else done.ids
    return Result(
        text=text.tokenizer.decode(shown) if text.tokenizer else "",
        ids=tuple(done.ids),
        finish_reason=done.finish_reason,
        usage=Usage(len(request.prompt_ids), len(done.ids), done.reused_tokens),
        error=done.error,
        sample=one.sample,
        score=one.score,
        logprobs=tuple(done.logprobs),
    )
