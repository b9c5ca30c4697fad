"""A conversation with a model, for the terminal and the page."""

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
        experts: names of experts that tokens may be routed to; None: the active ones of the model.
        seed: sampling seed, the same for both answers; None: use torch's current random state.
    """

    sampling: Sampling
    show_routing: bool = False
    base_beside: bool = False
    experts: Sequence[str] | None = None
    seed: int | None = None


@dataclass
class Turn:
    """A question and its answers.

    Attributes:
        experts: experts allowed for the answer; None: all active ones.
        base_beside: whether the bare base was also asked.
        answer: answer of the model with experts; None: there is none yet.
        base: answer of the bare base; None: there is none yet, or it was not asked.
    """

    question: str
    experts: Sequence[str] | None = None
    base_beside: bool = False
    answer: Generation | None = None
    base: Generation | None = None


class ChatSession:
    """A conversation.

    Args:
        lock: held while the model answers; sessions that share a model share the lock.

    Attributes:
        turns: the completely answered turns, oldest first.
    """

    def __init__(
        self, model: SRDEModel, tokenizer: PreTrainedTokenizerBase, lock: threading.Lock | None = None
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.lock = lock or threading.Lock()
        self.turns: list[Turn] = []

    def ask(self, question: str, options: AnswerOptions) -> Iterator[Turn]:
        """Yields the growing turn, always the same object, after each token of an answer.

        The turn is kept once the iterator is exhausted. A turn that failed, or whose iterator was closed early, is
        forgotten.

        Raises:
            SRDEError: there is no question, a value is out of range, or the conversation exceeds the base's context.
            RuntimeError: from torch, mostly a lack of memory.
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
        """The conversation in the form of `data.conversation`, with the answers of the model with experts."""
        said: list[Message] = []
        for turn in self.turns:
            said.append({"role": "user", "content": turn.question})
            said.append({"role": "assistant", "content": turn.answer.text if turn.answer else ""})
        return said

    def export(self) -> str:
        """The conversation as JSON: a list with one record of `messages`, which all verbs that read data accept."""
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
    """Yields the values that `produce`, which runs in a thread, passes to its argument.

    When the iterator is closed, `produce` ends at its next value. Its exceptions are raised here.
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
