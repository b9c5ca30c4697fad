"""The dataset builder from end to end, beside plain `datasets.map` with the same tokenizer on the same documents.

    python -m benchmarks.data_build --model_name BASE --work_dir /tmp/build    # 6 x 20,000, results/data_build.json

The sources are files that this script makes (JSONL, Parquet, `datasets` folders; reasoning-gym items with planted
duplicates and broken rows), reasoning-gym tasks, and the package's own tasks to fill up. The build's time is CPU time
of all processes, which a shared machine stretches less than wall time; it includes the making of reasoning-gym items
(build records). The comparison is made in turn, in one process, on 6,000 of the documents.
"""

import argparse
import json
import os
import random
import shutil
import time
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import pyarrow as pa
import reasoning_gym
import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from srde_ds.data.build.artifacts import slices
from srde_ds.data.build.from_sources import build_from_sources
from srde_ds.data.build.options import BuildOptions
from srde_ds.data.build.report import write_report
from srde_ds.data.build.tables import write_table
from srde_ds.data.build.tokens import DOCUMENTS_A_FILE, set_tokenizer, tokenize_records
from srde_ds.data.manifest import load_manifest
from srde_ds.data.sources.registry import load_sources
from srde_ds.data.synthetic.tasks import generate
from srde_ds.utils.environment import environment

ROUNDS = 5
LOCAL = {  # domain -> (kind of file, reasoning-gym task, whether its items differ enough to look for duplicates)
    "math": ("jsonl", "leg_counting", True),
    "logic": ("parquet", "circuit_logic", False),
    "code": ("folder", "emoji_mystery", False),
    "science": ("jsonl", None, True),
    "planning": ("parquet", "boxnet", False),
    "abstract": ("folder", "needle_haystack", True),
}
LIVE = {
    "math": "time_intervals",
    "logic": "propositional_logic",
    "code": "string_insertion",
    "planning": "course_schedule",
    "abstract": "spiral_matrix",
}


def local_rows(domain: str, task: str | None, count: int) -> list[dict[str, str]]:
    """Items of a task, with one in 20 repeated, one in 20 repeated with a word changed, and a few without an answer."""
    generator = random.Random(domain)
    if task is None:
        rows = [{"question": item["prompt"], "reply": item["response"]} for item in generate(domain, count, seed=7)]
    else:
        items = reasoning_gym.create_dataset(task, size=count, seed=7)
        rows = [{"question": items[i]["question"], "reply": str(items[i]["answer"])} for i in range(count)]
    for row in generator.sample(rows, count // 20):
        words = row["question"].split(" ")
        words[generator.randrange(len(words))] = "indeed"
        rows += [dict(row), row | {"question": " ".join(words)}]
    rows += [{"question": "What is missing here?", "reply": ""} for _ in range(count // 100)]
    return rows


def make_sources(folder: Path, count: int) -> Path:
    """Write the local files and the sources file, once."""
    path = folder / f"sources-{count}.yaml"
    if path.exists():
        return path
    domains: dict[str, list[dict[str, Any]]] = {}
    for domain, (kind, task, near) in LOCAL.items():
        rows = local_rows(domain, task, count)
        place = folder / f"{domain}-{count}"
        if kind == "jsonl":
            place.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif kind == "parquet":
            datasets.Dataset.from_list(rows).to_parquet(str(place))
        else:
            datasets.Dataset.from_list(rows).save_to_disk(str(place))
        own: dict[str, Any] = {"name": f"{domain}_local", kind: str(place), "formatter": "prompt_response"}
        own |= {"columns": {"prompt": "question", "response": "reply"}, "near_duplicates": near}
        domains[domain] = [own]
        if domain in LIVE:
            domains[domain].append({"name": LIVE[domain], "reasoning_gym": LIVE[domain], "near_duplicates": False})
        domains[domain].append({"name": f"{domain}_tasks", "tasks": domain, "near_duplicates": False, "weight": 0})
    path.write_text(yaml.safe_dump(domains, sort_keys=False))
    return path


def side_by_side(tokenizer: PreTrainedTokenizerBase, data: Path, folder: Path, count: int = 6000) -> dict[str, Any]:
    """The builder's tokenising and `datasets.map` in turn, in this process, on the same documents of all domains.

    The builder reads records, renders, tokenises, labels the responses and writes Arrow; map renders, tokenises and
    writes Arrow.
    """
    lines = data.read_text().splitlines()
    lines = lines[:: max(1, len(lines) // count)]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_table(folder / "records.arrow", pa.table({"line": pa.array(lines, pa.large_string())}))
    rows = datasets.Dataset.from_dict({"messages": [json.loads(line)["messages"] for line in lines]})
    set_tokenizer(tokenizer)

    def ours() -> None:
        for start, stop in slices(len(lines), DOCUMENTS_A_FILE):
            index_of = list(range(start, stop))
            path = folder / "tokens.arrow"
            tokens = tokenize_records(
                path, parts=[str(folder / "records.arrow")], part_of=[0] * len(index_of), index_of=index_of
            )["tokens"]
            found.append(tokens)

    def encode(batch: dict[str, Any]) -> Any:
        texts = tokenizer.apply_chat_template(batch["messages"], tokenize=False)
        return tokenizer(texts, add_special_tokens=False)

    def plain() -> None:
        rows.map(encode, batched=True, remove_columns=["messages"], cache_file_name=str(folder / "map.arrow"),
                 load_from_cache_file=False)  # fmt: skip

    seconds: dict[str, list[float]] = {"builder": [], "plain_map": []}
    for _ in range(ROUNDS):
        for name, work in (("builder", ours), ("plain_map", plain)):
            found: list[int] = []
            started = time.process_time()
            work()
            seconds[name].append(time.process_time() - started)
            if name == "builder":
                tokens = sum(found)
    ratios = [m / b for b, m in zip(seconds["builder"], seconds["plain_map"], strict=True)]
    return {
        "documents": len(lines),
        "tokens": tokens,
        "cpu_seconds": seconds,
        "tokens_per_second_and_core": {name: tokens / min(values) for name, values in seconds.items()},
        "builder_over_plain_map": {"median": median(ratios), "all": ratios},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name", required=True, help="base whose tokenizer is used")
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--examples_per_domain", type=int, default=20_000)
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--num_processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "data_build.json")
    given = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    datasets.disable_progress_bars()
    given.work_dir.mkdir(parents=True, exist_ok=True)
    sources = make_sources(given.work_dir, given.examples_per_domain // 3)
    tokenizer = AutoTokenizer.from_pretrained(given.model_name, trust_remote_code=False)
    options = BuildOptions(load_sources(sources), given.examples_per_domain, given.max_length, "drop", 0)
    data = given.work_dir / "data"
    shutil.rmtree(data, ignore_errors=True)
    build = build_from_sources(options, work_dir=data, tokenizer=tokenizer, num_processes=given.num_processes)
    manifest = load_manifest(data / "tokenized")
    write_report(data, build, manifest)
    compared = side_by_side(tokenizer, data / "data.jsonl", given.work_dir / "compared")

    documents = sum(figures["documents"] for figures in build.domains.values())
    tokens = sum(figures["tokens"] for figures in build.domains.values())
    cpu = {name: figures["cpu_seconds"] for name, figures in build.passes.items()}
    total = sum(cpu.values())
    result = {
        "documents": documents,
        "tokens": tokens,
        "wall_seconds": build.wall_seconds,
        "passes": build.passes,
        "documents_per_second_and_core": documents / total,
        "tokens_per_second_and_core": tokens / total,
        "documents_per_second_and_core_without_making_items": documents / (total - cpu["records"]),
        "packing_share": cpu["rows"] / total,
        "tokenising_side_by_side": compared,
        "fill_rate": {split: entry.fill_rate for split, entry in manifest.splits.items()},
        "fill_rate_of_training_domains": {
            name: round(counts.tokens / (counts.rows * manifest.max_length), 4)
            for name, counts in manifest.splits["train"].domains.items()
        },
        "sources": {source["name"]: source["counts"] for source in build.sources},
        "num_processes": given.num_processes,
        "environment": environment(),
    }
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key not in ("sources", "environment")}, indent=1))


if __name__ == "__main__":
    main()
