"""A conversation in the terminal, or with any two streams of lines."""

from __future__ import annotations

import shutil
import textwrap
from itertools import zip_longest
from typing import TextIO

from transformers import PreTrainedTokenizerBase

from srde_ds.errors import SRDEError, nearest
from srde_ds.inference.generate import Sampling, format_routing
from srde_ds.inference.session import AnswerOptions, ChatSession, Turn
from srde_ds.model.adapter import SRDEModel
from srde_ds.utils.escape import terminal
from srde_ds.utils.tables import aligned_table

COMMANDS = {
    "/experts": "show or hide the experts of each token",
    "/expert NAME": "use only this expert; without a name: all again",
    "/base": "show or hide the bare base's answer beside it",
    "/reset": "forget the conversation",
    "/help": "this list",
    "/quit": "end",
}
BLOCK = '"""'
MULTILINE = f"A line that ends in \\ continues on the next one, and so does text between {BLOCK} and {BLOCK}."


class Chat:
    """Reads messages from `source` and writes answers to `target`, see `run`."""

    def __init__(
        self,
        model: SRDEModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        source: TextIO,
        target: TextIO,
        stream: bool,
        show_routing: bool,
    ) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.source, self.target = source, target
        self.stream, self.show_routing, self.compare = stream, show_routing, False
        self.session = ChatSession(model, tokenizer)

    def run(self) -> None:
        """Answer until `/quit` or the end of `source`.

        Ctrl-C stops an answer, which is then forgotten with its question; at the prompt it ends the conversation. A
        question whose answer fails is also forgotten.
        """
        self.say("Type a message, or /help.")
        while (text := self._read()) is not None and text != "/quit":
            if not text:
                continue
            try:
                if text.startswith("/"):
                    self._command(text)
                else:
                    self._answer(text)
            except KeyboardInterrupt:
                self.say("\nStopped; the question is forgotten.")
            except SRDEError as error:
                self.say(f"{error}" if text.startswith("/") else f"{error} (/reset forgets the conversation)")
            except RuntimeError as error:  # from torch, mostly a lack of memory, which a shorter conversation may avoid
                self.say(f"\nThe answer failed ({error}); the question is forgotten. /reset forgets all before it.")

    def say(self, text: str, end: str = "\n") -> None:
        """Print a text, made safe for a terminal."""
        print(terminal(text), end=end, file=self.target, flush=True)

    def _command(self, text: str) -> None:
        name, *rest = text.split(maxsplit=1)
        if name == "/expert":
            self.model.set_active_experts(rest[0].strip() if rest else None)
            self.say(f"From now on: {', '.join(self.model.active_experts)}.")
        elif rest or name not in COMMANDS:
            known = [command.split()[0] for command in COMMANDS]
            self.say(f"Unknown command '{text}'.{nearest(name, known)} /help lists them.")
        elif name == "/reset":
            self.session = ChatSession(self.model, self.tokenizer)
            self.say("The conversation is forgotten.")
        elif name == "/experts":
            self.show_routing = not self.show_routing
            self.say(f"Experts are {'shown' if self.show_routing else 'hidden'} from now on.")
        elif name == "/base":
            self.compare = not self.compare
            self.say(f"The bare base's answer is {'shown beside' if self.compare else 'hidden'} from now on.")
        else:
            self.say(textwrap.indent(f"{aligned_table([*COMMANDS.items()])}\n{MULTILINE}", "  "))

    def _answer(self, text: str) -> None:
        options = AnswerOptions(self.sampling, show_routing=self.show_routing, base_beside=self.compare)
        turn, shown = Turn(text), 0
        for turn in self.session.ask(text, options):
            if self.stream and not self.compare and turn.answer:
                self.say(turn.answer.text[shown:], end="")
                shown = len(turn.answer.text)
        assert turn.answer is not None
        if turn.base:
            titles = ("with experts", "base")
            self.say(side_by_side(terminal(turn.answer.text), terminal(turn.base.text), titles=titles))
        else:
            self.say("" if self.stream else turn.answer.text)
        if self.show_routing:
            self.say(format_routing(turn.answer, self.model.expert_names))

    def _read(self) -> str | None:
        """The next message without surrounding white space; None at the end of `source` or on Ctrl-C."""
        lines: list[str] = []
        in_block = False
        while True:
            print("... " if lines or in_block else "> ", end="", file=self.target, flush=True)
            try:
                line = self.source.readline()
            except KeyboardInterrupt:
                line = ""
            except UnicodeDecodeError as error:
                self.say(f"This is not UTF-8 ({error.reason}); the message is forgotten.")
                return ""
            if not line:
                print(file=self.target)
                return None
            line = line.rstrip("\r\n")
            marks = line.count(BLOCK)
            if marks:
                in_block = in_block != (marks % 2 == 1)
                line = line.replace(BLOCK, "")
            goes_on = in_block or line.endswith("\\")
            lines.append(line[:-1] if goes_on and not in_block else line)
            if not goes_on:
                return "\n".join(lines).strip()


def side_by_side(left: str, right: str, *, titles: tuple[str, str], width: int | None = None) -> str:
    """Two texts as columns; `width` is in characters and defaults to the terminal's."""
    column = ((width or shutil.get_terminal_size().columns) - 3) // 2
    sides = [
        [title, "-" * column, *(part for line in text.splitlines() for part in textwrap.wrap(line, column) or [""])]
        for title, text in zip(titles, (left, right), strict=True)
    ]
    return "\n".join(f"{a:<{column}} | {b}".rstrip() for a, b in zip_longest(*sides, fillvalue=""))
