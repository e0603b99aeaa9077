"""The terminal's line editor: several lines, history, the usual keys. The only place that knows prompt_toolkit."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output.color_depth import ColorDepth
from prompt_toolkit.patch_stdout import patch_stdout

from dist_moe.chat.connection import LineClosed

HISTORY_NAME = "chat_history"


class TerminalReader:
    """Reads messages with an editor: Enter sends, Alt-Enter or a backslash before Enter begins another line."""

    is_interactive = True

    def __init__(self, history: Path | None, look_at: int, environ: Mapping[str, str]) -> None:
        """Prepare the editor.

        Args:
            history: A file that only its owner can read; None keeps the history in memory.
            look_at: A file descriptor that becomes readable when the job has ended.
            environ: NO_COLOR decides about colours.
        """
        kept: History = InMemoryHistory() if history is None else FileHistory(str(history))
        self._look_at = look_at
        self._session: PromptSession[str] = PromptSession(
            history=kept,
            multiline=True,
            key_bindings=_keys(),
            prompt_continuation="... ",
            color_depth=ColorDepth.DEPTH_1_BIT if environ.get("NO_COLOR") else None,
            enable_open_in_editor=False,
        )

    def read(self, mark: str) -> str:
        """See `reader.Reader.read`; Ctrl-C on a line that is not empty only empties it."""
        while True:
            try:
                with patch_stdout(raw=True):
                    text = self._session.prompt(mark, pre_run=self._watch)
            except KeyboardInterrupt:
                if self._session.default_buffer.text:
                    continue
                raise
            finally:
                self._forget()
            return text

    def _watch(self) -> None:
        """Let the editor end when the job does."""
        app = get_app()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._look_at, lambda: app.is_running and app.exit(exception=LineClosed()))

    def _forget(self) -> None:
        loop = getattr(self, "_loop", None)
        if loop is not None and not loop.is_closed():
            loop.remove_reader(self._look_at)


def history_file(environ: Mapping[str, str]) -> Path | None:
    """A file of the user's state directory, made if need be and readable by its owner alone; None if it cannot be."""
    try:
        state = environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
        directory = Path(state) / "dist-moe"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = directory / HISTORY_NAME
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        path.chmod(0o600)
    except (OSError, RuntimeError):
        return None
    return path


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys
