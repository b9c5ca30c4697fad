"""Folders of runs and summaries of builds as training, evaluation and building leave them, made without doing these."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from srde_ds.config import resolve
from srde_ds.data.build.options import BuildSummary

DOMAINS = ("math", "logic", "code")
HOSTILE = (
    "<img src=x onerror=\"document.title='x'\"></script><script>document.title='x'</script> "
    "\x1b[31m \u202e \u2028 $x$ %{y}"
)


def write_run(
    folder: Path,
    *,
    steps: int = 12,
    finished: bool = True,
    items: Sequence[dict[str, Any]] | None = (),
    domains: Sequence[str] = DOMAINS,
    options: dict[str, str] | None = None,
) -> Path:
    """A run's folder.

    Args:
        items: lines of its evaluation; none: three a domain; None: it was not evaluated.
    """
    folder.mkdir(parents=True)
    given = {"num_experts": str(len(domains)), "max_steps": "12", "model_name": "a/base"}
    config = resolve({}, given | (options or {}))
    written = config.to_dict()
    written["data"]["domains"] = list(domains)
    (folder / "config.yaml").write_text(yaml.safe_dump(written, sort_keys=False))
    lines = [_line(step, domains) for step in range(1, steps + 1)]
    counts = {"documents": 1500, "too_long": 0, "dropped": 0, "response_tokens": 9000}
    lines[0] |= {"data": {"train": dict.fromkeys(domains, counts)}, "held_out_at_start": dict.fromkeys(domains, 4.0)}
    if steps > 4:
        lines[4]["warm_start"] = {"method": "domain_means"}
    if finished:
        lines[-1]["held_out"] = {name: 1.0 + number for number, name in enumerate(domains)}
        (folder / "completed.json").write_text(json.dumps({"step": steps}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    environment: dict[str, Any] = {"machine": "a box", "python": "3.11", "git_revision": None, "world_size": 2}
    environment |= {"versions": {"torch": "2.13"}, "command": ["train.py", "--bf16"]}
    (folder / "environment.json").write_text(json.dumps(environment))
    if items is not None:
        chosen = list(items) or [item(domain, number) for domain in domains for number in range(3)]
        (folder / "evaluation.json").write_text(json.dumps(evaluation(chosen, domains)))
        (folder / "evaluation_items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in chosen))
    return folder


def item(domain: str, number: int, *, text: str = "What is it", experts: int = len(DOMAINS)) -> dict[str, Any]:
    """A line of evaluation_items.jsonl: experts are right on every second item, the base on every third."""
    tokens = ["It", " is", f" {number}", "."]
    shares = [[round(100 / experts)] * experts for _ in tokens]
    shares[1] = [100] + [0] * (experts - 1)
    srde = {"loss": 1.0, "tokens": 4, "prediction": "".join(tokens), "correct": number % 2 == 0}
    srde |= {"answer_tokens": tokens, "answer_experts": shares[:-1]}
    base = {"loss": 3.0, "tokens": 4, "prediction": f"no idea about {number}", "correct": number % 3 == 0}
    prompt = [{"role": "user", "content": f"{text} {number}?"}]
    return {
        "domain": domain, "source": "made", "prompt": prompt, "response": str(number), "answer": str(number),
        "scoring": "math", "srde": srde, "base": base,
    }  # fmt: skip


def evaluation(items: Sequence[dict[str, Any]], domains: Sequence[str]) -> dict[str, Any]:
    """What evaluation.json says of them."""

    def figures(chosen: Sequence[dict[str, Any]]) -> dict[str, Any]:
        of = {}
        for name, loss in (("srde", 1.0), ("base", 3.0)):
            right = sum(line[name]["correct"] for line in chosen) / len(chosen)
            of[name] = {
                "items": len(chosen), "tokens": 4 * len(chosen), "scored": len(chosen),
                "loss": loss, "loss_interval": [loss - 0.1, loss + 0.1],
                "perplexity": math.exp(loss), "perplexity_interval": [2.0, 30.0],
                "accuracy": right, "accuracy_interval": [right / 2, (1 + right) / 2],
            }  # fmt: skip
        difference = {"loss": -2.0, "loss_interval": [-2.1, -1.9], "accuracy": 0.2, "accuracy_interval": [0.1, 0.3]}
        return of | {"difference": difference | {"only_srde_right": 3, "only_base_right": 1, "mcnemar_p": 0.04}}

    by_domain = {name: [line for line in items if line["domain"] == name] for name in domains}
    share = [
        [2 / (len(domains) + 1) if d == e else 1 / (len(domains) + 1) for e in range(len(domains))]
        for d in range(len(domains))
    ]
    return {
        "overall": figures(items),
        "domains": {name: figures(lines) for name, lines in by_domain.items() if lines},
        "sources": {"made": figures(items)},
        "usage": {
            "domains": [*domains], "experts": [*domains], "share": share, "share_by_layer": [share, share],
        },
        "run": {"eval_file": "held_out.jsonl", "dtype": "float32", "seconds": 3.0, "environment": {}},
    }  # fmt: skip


def summary(**changes: Any) -> BuildSummary:
    """A build of two sources in two domains."""
    counts = {"read": 120, "normalised": 110, "broken": 10, "near duplicate": 5, "chosen": 50}
    source = {"kind": "hf", "config": "", "revision": "0123456789abcdef", "license": "mit", "redistributable": "yes"}
    sources: list[dict[str, Any]] = [
        {"name": "sums", "domain": "math", "location": "a/sums", "counts": counts, "reasons": {"no text": 10}},
        {"name": "puzzles", "domain": "logic", "location": "a/puzzles", "counts": {"read": 60, "chosen": 50}},
    ]
    sources = [{"reasons": {}, **source, **of} for of in sources]
    said = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    domains = {
        of["domain"]: {
            "documents": 50, "by_split": {"train": 48, "validation": 1, "test": 1}, "by_source": {of["name"]: 50},
            "missing": 0, "tokens": 5000, "lengths": {"edges": [8.0, 64.0, 512.0], "counts": [40, 10]},
            "example": {"source": of["name"], "messages": [dict(message) for message in said]},
        }
        for of in sources
    }  # fmt: skip
    passes = {"read": {"wall_seconds": 1.0, "cpu_seconds": 1.0, "artifacts_made": 2}}
    build = BuildSummary("f", {"examples_per_domain": 50}, sources, {}, domains, passes=passes, wall_seconds=2.0)
    vars(build).update(changes)
    return build


def _line(step: int, domains: Sequence[str]) -> dict[str, Any]:
    line = {
        "step": step, "phase": "pretraining" if step < 5 else "routed", "unlocked_experts": [*range(len(domains))],
        "density": 0.01, "loss": 4.0 / step, "grad_norm": 2.0 / step,
        "tokens": 1000 * step, "tokens_per_second": 90.0 + step,
        "tokens_per_expert": [100.0 + number for number in range(len(domains))],
        "expert_gradient_norm": [1.0 / step] * len(domains), "memory_gib": 1.5,
    }  # fmt: skip
    return line | ({"delta_norm": [float(step)] * len(domains)} if step % 4 == 0 else {})
