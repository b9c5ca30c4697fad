"""A conversation with a model, as the terminal and the page hold it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from srde_ds.data.conversation import Message, check_text
from srde_ds.inference.generate import Generation, Sampling, generate
from srde_ds.model.adapter import SRDEModel
from srde_ds.model.policy import RoutingPolicy

Value = TypeVar("Value")


@dataclass(frozen=True)
class AnswerOptions:
    """How a question is answered.

    Attributes:
        show_routing: record the experts of each token.
        base_beside: let the bare base answer the same conversation, after the model with experts.
        experts: names of those that tokens may be routed to; None: the active ones of the model.
        seed: of the sampling, the same for both answers; None: torch's own state of the random numbers.
    """

    sampling: Sampling
    show_routing: bool = False
    base_beside: bool = False
    experts: Sequence[str] | None = None
    seed: int | None = None


@dataclass
class Turn:
    """A question and what came of it.

    Attributes:
        experts: those that the question was put to; None: all that are active.
        base_beside: whether the bare base was asked, too.
        answer: of the model with experts; None: there is none yet.
        base: of the bare base; None: there is none yet, or it was not asked.
    """

    question: str
    experts: Sequence[str] | None = None
    base_beside: bool = False
    answer: Generation | None = None
    base: Generation | None = None


class ChatSession:
    """A conversation.

    Args:
        lock: held while the model answers, by one of all the sessions that share the model.

    Attributes:
        turns: those that were answered in full, the oldest first.
    """

    def __init__(
        self, model: SRDEModel, tokenizer: PreTrainedTokenizerBase, lock: threading.Lock | None = None
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.lock = lock or threading.Lock()
        self.turns: list[Turn] = []

    def ask(self, question: str, options: AnswerOptions) -> Iterator[Turn]:
        """The turn as it grows: always the same object, after each token of an answer.

        It is kept when the iterator has come to its end. A turn that failed, or whose iterator was closed before, is
        forgotten.

        Raises:
            SRDEError: no question, a value out of range, or a conversation that is longer than the base's context.
            RuntimeError: torch's, above all a lack of memory.
        """
        turn = Turn(check_text(question, "question", "chat"), options.experts, options.base_beside)
        messages = [*self.messages(), {"role": "user", "content": turn.question}]
        with_experts = RoutingPolicy(allowed_experts=self.model.allowed_experts(options.experts))
        for turn.answer in self._generations(messages, options, with_experts):
            yield turn
        if options.base_beside:
            for turn.base in self._generations(messages, options, RoutingPolicy(active=False)):
                yield turn
        self.turns.append(turn)

    def messages(self) -> list[Message]:
        """What was said, in the one form of `data.conversation`; of the answers those of the model with experts."""
        said: list[Message] = []
        for turn in self.turns:
            said.append({"role": "user", "content": turn.question})
            said.append({"role": "assistant", "content": turn.answer.text if turn.answer else ""})
        return said

    def export(self) -> str:
        """The conversation as JSON: a list of one record with `messages`, which all verbs that read data read."""
        return json.dumps([{"messages": self.messages()}], ensure_ascii=False, indent=2) + "\n"

    def _generations(
        self, messages: list[Message], options: AnswerOptions, policy: RoutingPolicy
    ) -> Iterator[Generation]:
        def answer(emit: Callable[[Generation], None]) -> None:
            with self.lock:
                if options.seed is not None:
                    torch.manual_seed(options.seed)
                generate(
                    self.model,
                    self.tokenizer,
                    messages,
                    options.sampling,
                    stream=emit,
                    show_routing=options.show_routing and policy.active,
                    policy=policy,
                )

        return iterated(answer)


def iterated(produce: Callable[[Callable[[Value], None]], None]) -> Iterator[Value]:
    """What `produce` hands to its argument, as it comes; `produce` runs in a thread of its own.

    When the iterator is closed, `produce` ends at its next value. What `produce` raises is raised here.
    """
    values: SimpleQueue[Value | Future[None]] = SimpleQueue()
    closed = threading.Event()

    def emit(value: Value) -> None:
        if closed.is_set():
            raise CancelledError
        values.put(value)

    executor = ThreadPoolExecutor(1)
    done = executor.submit(produce, emit)
    executor.shutdown(wait=False)  # the thread ends with its work
    done.add_done_callback(values.put)
    try:
        while not isinstance(value := values.get(), Future):
            yield value
        value.result()
    finally:
        closed.set()
