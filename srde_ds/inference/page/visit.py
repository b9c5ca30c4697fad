"""The page's behaviour when a visitor asks or changes settings, without its elements."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from srde_ds.errors import SRDEError
from srde_ds.inference.generate import Sampling
from srde_ds.inference.page.html import View, conversation, download, prompt_html, turn_html
from srde_ds.inference.session import AnswerOptions, ChatSession, Turn
from srde_ds.model.adapter import SRDEModel

EXPORT = "conversation.json"
BETWEEN_UPDATES = 0.05  # seconds; nobody can read faster
NOTHING_YET = "No messages yet. The model with its experts will answer, and the bare base beside it."
STOPPED = "Stopped; the question is forgotten."


@dataclass(frozen=True)
class Settings:
    """A visitor's settings. Experts are numbers, in the order of their names.

    Attributes:
        experts: the experts that are switched on.
        pinned: the only expert that tokens use; None: the router chooses.
        seed: sampling seed; None: another answer each time.
    """

    experts: Sequence[int]
    pinned: int | None
    base_beside: bool
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int | None


@dataclass
class Visit:
    """The state of one visitor's page.

    Attributes:
        layers: layers whose weights are shown; empty: all.
        unfinished: the turn that is being answered, or that failed.
        note: the error, if it failed.
    """

    session: ChatSession
    layers: Sequence[int] = ()
    unfinished: Turn | None = None
    note: str = ""


class Shown(NamedTuple):
    """The parts of the page that change, as HTML."""

    past: str
    latest: str
    export: str


class ChatPage:
    """The page's actions; `sampling` and `seed` are the initial settings."""

    def __init__(
        self, model: SRDEModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, *, seed: int | None = None
    ) -> None:
        self.model, self.tokenizer, self.sampling, self.seed = model, tokenizer, sampling, seed
        self.names = model.expert_names
        self._lock = threading.Lock()

    def visit(self) -> Visit:
        """A new conversation."""
        return Visit(ChatSession(self.model, self.tokenizer, self._lock))

    def ask(self, visit: Visit, question: str, settings: Settings) -> Iterator[Shown]:
        """Answer, and yield what to show as the answers grow. Errors are shown; the next question works again."""
        visit.unfinished, visit.note = Turn(question, base_beside=settings.base_beside), ""
        yield self.shown(visit, growing=True)
        try:
            options = self._options(settings)
            last = time.monotonic()
            for turn in visit.session.ask(question, options):
                visit.unfinished = turn
                if time.monotonic() - last >= BETWEEN_UPDATES:
                    yield self.shown(visit, growing=True)
                    last = time.monotonic()
            visit.unfinished = None
        except (SRDEError, RuntimeError) as error:  # torch's RuntimeError, mostly a lack of memory
            visit.note = f"{error} The question is forgotten."
        yield self.shown(visit)

    def stop(self, visit: Visit) -> Shown:
        """Show that the answer was stopped. The iterator of `ask` must be closed separately."""
        visit.note = visit.note or (STOPPED if visit.unfinished else "")
        return self.shown(visit)

    def choose_layers(self, visit: Visit, layers: Sequence[int]) -> Shown:
        """Show the weights of these layers."""
        visit.layers = layers
        return self.shown(visit, growing=bool(visit.unfinished and not visit.note))

    def shown(self, visit: Visit, *, growing: bool = False) -> Shown:
        """The page's parts. The latest turn is separate, since the others do not change while it grows."""
        view, turns = View(self.names, visit.layers), visit.session.turns
        if visit.unfinished is not None:
            latest = turn_html(visit.unfinished, view, growing=growing, note=visit.note)
        elif turns:
            turns, newest = turns[:-1], turns[-1]
            latest = turn_html(newest, view) + prompt_html(newest, view)
        else:
            latest = f'<p class="hint">{NOTHING_YET}</p>'
        export = download(EXPORT, visit.session.export()) if visit.session.turns else ""
        return Shown(conversation(turns, view), latest, export)

    def _options(self, settings: Settings) -> AnswerOptions:
        """The options for an answer; raises an SRDEError if no expert is left."""
        chosen = settings.experts if settings.pinned is None else [settings.pinned]
        if not chosen:
            raise SRDEError("All experts are switched off: switch at least one on.")
        names = [self.names[number] for number in sorted(chosen)]
        return AnswerOptions(
            Sampling(settings.max_new_tokens, settings.temperature, settings.top_p),
            show_routing=True,
            base_beside=settings.base_beside,
            experts=None if len(names) == len(self.names) else names,
            seed=settings.seed,
        )
