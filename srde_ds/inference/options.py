"""The options of `srde-ds inference`, and those of every verb that runs trained experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from srde_ds.config.values import option, weights_option


@dataclass(frozen=True)
class ModelOptions:
    """Which experts run on which base, in which numbers, and what routes to them."""

    weights: str = weights_option()
    base: str | None = option(None, "folder or Hub id of the base (default: where it was in training)", metavar="BASE")
    allow_download: bool = option(
        False, "download the base that the weights name from the Hub, if it is not on this machine"
    )
    base_quantization: Literal["none", "int8", "nf4", "fp8"] = option(
        "none",
        "how the base's linear maps are stored: in 8 bits, in 4 as in QLoRA, or in fp8 for Hopper GPUs",
    )
    bf16: bool = option(True, "compute in bfloat16; false: in fp32")
    route_by: Literal["token", "prompt"] = option(
        "token",
        "what decides on the experts: each token for itself, or the prompt, which is then read twice: all tokens use "
        "the expert that its tokens choose most, above all the last one",
    )


@dataclass(frozen=True)
class InferenceOptions(ModelOptions):
    """Which prompts are answered, and how."""

    prompt: str | None = option(None, "ask one question", metavar="TEXT")
    prompts_file: str | None = option(
        None,
        "ask many questions: records with prompt or messages, or another file with one question on each line",
        metavar="FILE",
    )
    interactive: bool = option(False, "hold a conversation; /help lists its commands")
    output_file: str | None = option(
        None,
        "JSONL to write the answers to prompts_file to (default: standard output)",
        metavar="FILE",
        aliases=("output",),
    )
    expert: str | None = option(None, "use only this expert", metavar="NAME")
    best_of_n: int = option(1, "number of samples, of which the most frequent answer is given", metavar="N", minimum=1)
    self_refine: int = option(0, "number of rounds in which the model checks its own answer", metavar="N", minimum=0)
    batch_size: int = option(16, "prompts of prompts_file in a batch", metavar="N", minimum=1)
    max_new_tokens: int | None = option(
        None,
        "longest answer, in tokens",
        metavar="TOKENS",
        aliases=("max_tokens",),
        minimum=1,
        derived="256, at most half of the base's context",
    )
    temperature: float = option(0.7, "sampling temperature; 0: always the likeliest token", minimum=0.0)
    top_p: float = option(0.9, "sample from the likeliest tokens that together have this probability", maximum=1.0)
    stream: bool = option(False, "print tokens as they come")
    show_routing: bool = option(False, "print the experts that each token used")
    seed: int = option(42, "sampling seed", metavar="N", minimum=0)
