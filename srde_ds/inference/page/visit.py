"""What the page does with what a visitor asks and sets; no element of it is made here."""

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
BETWEEN_UPDATES = 0.05  # seconds: more often than this nobody can read
NOTHING_YET = "Nothing was said yet. The model with its experts answers, and the bare base beside it."
STOPPED = "Stopped; the question is forgotten."


@dataclass(frozen=True)
class Settings:
    """What a visitor has set. Experts are numbers, in the order of their names.

    Attributes:
        experts: those that are switched on.
        pinned: every token goes to this one alone; None: the router chooses.
        seed: of the sampling; None: another answer each time.
    """

    experts: Sequence[int]
    pinned: int | None
    base_beside: bool
    temperature: float
    top_p: float
    max_tokens: int
    seed: int | None


@dataclass
class Visit:
    """What one visitor's page shows.

    Attributes:
        layers: whose weights are shown; none: all.
        unfinished: the turn that is being answered, or that failed.
        note: why it failed.
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
    """What happens on the page; `sampling` and `seed` are what its settings begin with."""

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
        """Answer; what is shown as the answers grow. An error is shown, too, and the next question is answered."""
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
        except (SRDEError, RuntimeError) as error:  # torch's RuntimeError: above all a lack of memory
            visit.note = f"{error} The question is forgotten."
        yield self.shown(visit)

    def stop(self, visit: Visit) -> Shown:
        """Say that the answer was stopped; the iterator of `ask` has to be closed beside."""
        visit.note = visit.note or (STOPPED if visit.unfinished else "")
        return self.shown(visit)

    def choose_layers(self, visit: Visit, layers: Sequence[int]) -> Shown:
        """Show the weights of these layers."""
        visit.layers = layers
        return self.shown(visit, growing=bool(visit.unfinished and not visit.note))

    def shown(self, visit: Visit, *, growing: bool = False) -> Shown:
        """The page's parts. The latest turn is apart from the others, which do not change while it grows."""
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
        """Raises SRDEError if no expert is left."""
        chosen = settings.experts if settings.pinned is None else [settings.pinned]
        if not chosen:
            raise SRDEError("All experts are switched off: switch at least one on.")
        names = [self.names[number] for number in sorted(chosen)]
        return AnswerOptions(
            Sampling(settings.max_tokens, settings.temperature, settings.top_p),
            show_routing=True,
            base_beside=settings.base_beside,
            experts=None if len(names) == len(self.names) else names,
            seed=settings.seed,
        )
