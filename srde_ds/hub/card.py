"""The README.md of shared weights: what they are, how to use them, their training data and results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, try_to_load_from_cache

from srde_ds.config.granularity import PLURALS
from srde_ds.config.values import load_yaml
from srde_ds.errors import SRDEError
from srde_ds.optim.groups import unused_rates
from srde_ds.utils.escape import markdown, markdown_code
from srde_ds.utils.json_files import read_growing_lines, read_json
from srde_ds.utils.pretrained import HUB_ID
from srde_ds.utils.tables import markdown_table
from srde_ds.utils.yaml_files import parse_yaml
from srde_ds.weights.file import AdapterMetadata
from srde_ds.weights.locate import METRICS, RUN_CONFIG, is_run, rows_folder

CARD = "README.md"
_REMEDY = "train again, or leave run out"
# The options of config.yaml that matter to a reader, by section.
_SETTINGS = {
    "model": ["bf16"],
    "optimizer": ["use_muon", "muon_lr", "learning_rate", "router_lr", "lr_schedule", "warmup_steps"],
    "training": ["max_steps", "batch_size", "gradient_accumulation_steps", "seed"],
    "data": ["max_length"],
}


def model_card(metadata: AdapterMetadata, *, repo: str | None, run: Path | None) -> str:
    """The page, in Markdown with the Hub's YAML header.

    Args:
        repo: name of the Hub repository; None: the weights are in a local folder.
        run: folder of the training run; None: the card says nothing about training, data and results.

    Raises:
        SRDEError: `run` is not a run's folder, or one of its files is damaged.
    """
    if run is not None and not is_run(run):
        raise SRDEError(
            f"run='{run}': not the folder of a run (no config.yaml or metrics.jsonl). Give one, or leave it out."
        )
    sources = _sources(run) if run is not None else []
    sections = [
        _header(metadata, sources),
        f"# {repo.rpartition('/')[2] if repo else 'Sparse Routed Delta Experts'}",
        _summary(metadata),
        _usage(metadata, repo),
    ]
    if run is not None:
        sections += [_training(run), _data(run, sources), _results(run)]
    sections.append(_licence(metadata, sources))
    return "\n\n".join(section for section in sections if section) + "\n"


def base_license(base: str, revision: str | None = None) -> str | None:
    """The licence in the YAML header of the base's README.md, if that is on this machine; else None."""
    path = Path(base) / CARD
    if not Path(base).is_dir():
        try:
            cached = try_to_load_from_cache(base, CARD, revision=revision)
        except ValueError:  # neither an existing folder nor a repository's name
            return None
        if not isinstance(cached, str):
            return None
        path = Path(cached)
    if not path.is_file():
        return None
    parts = path.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        header = parse_yaml(parts[1], f"'{path}'")
    except SRDEError:  # somebody else's page: what it does not say is unknown
        return None
    license = header.get("license") if isinstance(header, dict) else None
    return str(license) if license else None


def _header(metadata: AdapterMetadata, sources: Sequence[dict[str, Any]]) -> str:
    datasets = sorted({str(source["location"]) for source in sources if _of_the_hub(source)})
    header = ModelCardData(
        library_name="srde_ds",
        pipeline_tag="text-generation",
        tags=["srde", "adapter", "mixture-of-experts"],
        base_model=metadata.model_name if _on_the_hub(metadata.model_name) else None,
        license=base_license(metadata.model_name, metadata.model_revision or None),
        datasets=datasets or None,
    )
    return f"---\n{header.to_yaml()}\n---"


def _of_the_hub(source: dict[str, Any]) -> bool:
    """Whether it is a repository; older manifests do not tell."""
    return bool(source["kind"] == "hub") if "kind" in source else _on_the_hub(str(source["location"]))


def _on_the_hub(name: str) -> bool:
    return "/" in name and HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _summary(metadata: AdapterMetadata) -> str:
    config, base = metadata.config, metadata.base
    what = PLURALS[config.granularity]
    if config.neuron_parts > 1:
        what += f", 1/{config.neuron_parts} of each"
    scope = "the same for all experts" if config.support_scope == "shared" else "its own for each expert"
    form = "free values" if config.num_atoms == 0 else f"{config.num_atoms} shared atoms, {config.atom_mixing} mixing"
    shared = f"a shared expert that changes {config.shared_expert_density:.2%} of these weights"
    rows = [
        ["experts", ", ".join(metadata.expert_names)],
        ["experts of a token", str(config.top_k)],
        ["an expert changes", f"{config.density:.2%} of the feed-forward weights: {what}, {scope}"],
        ["its values", form],
        *([["every token also uses", shared]] if config.shared_expert_density else []),
        ["base", f"{_shown(metadata.model_name)}, {base['architecture']}, hash {str(base['hash'])[:12]}"],
    ]
    return (
        f"Experts for {markdown_code(_shown(metadata.model_name))}, which stays as it is: each expert is a sparse "
        "change of its feed-forward weights, and in every layer a router picks the experts of each token.\n\n"
        f"{markdown_table([['', ''], *rows])}"
    )


def _shown(model_name: str) -> str:
    """A Hub id unchanged; of a folder, whose path means nothing elsewhere, only the last part."""
    return model_name if _on_the_hub(model_name) else Path(model_name).name


def _usage(metadata: AdapterMetadata, repo: str | None) -> str:
    expert, base = metadata.expert_names[0], _shown(metadata.model_name)
    if not _on_the_hub(metadata.model_name):
        place = (
            f"\n\n{markdown_code(base)} was a local folder during training: give your own folder of this base. Another "
            "model is refused by its hash."
        )
    else:
        place = ""
    load, of = f"{base!r}, {repo or '.'!r}", ""
    if metadata.model_revision and not place:  # a base that is named is loaded as it is now
        load, of = f"None, {repo or '.'!r}, allow_download=True", f", revision={metadata.model_revision!r}"
    return f"""## How to use{place}

```python
from transformers import AutoTokenizer
from srde_ds import SRDEModel

model = SRDEModel.from_pretrained({load})
tokenizer = AutoTokenizer.from_pretrained({base!r}{of})
question = [{{"role": "user", "content": "What is 17 * 3?"}}]
inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))

model.set_active_experts([{expert!r}])            # only these experts; None: all again
plain = model.merge_and_unload(expert={expert!r})  # an ordinary transformers model
```

`srde-ds convert --to moe` turns it into a mixture of experts that stock transformers and vLLM load."""


def _training(run: Path) -> str:
    config, metrics = load_yaml(run / RUN_CONFIG), read_growing_lines(run / METRICS, _REMEDY)
    last = metrics[-1]
    known = ((key, (config.get(section) or {}).get(key)) for section, keys in _SETTINGS.items() for key in keys)
    rows = [[key, str(value)] for key, value in known if value is not None and key not in unused_rates(last)]
    text = f"{last['step']} steps, {last['tokens']:,} tokens; last training loss {_number(last['loss'])}."
    if (run / "environment.json").is_file():
        environment = read_json(run / "environment.json", _REMEDY)
        versions = ", ".join(f"{name} {number}" for name, number in (environment.get("versions") or {}).items())
        if "world_size" in environment and "machine" in environment:
            machine = markdown(f"{environment['machine']}; {versions}".removesuffix("; "))
            text += f" {environment['world_size']} processes on {machine}."
    return f"## Training\n\n{text}\n\n{markdown_table([['setting', 'value'], *rows])}"


def _sources(run: Path) -> list[dict[str, Any]]:
    manifest = _manifest(run)
    return [] if manifest is None else list(manifest.sources)


def _manifest(run: Path) -> Any:
    """The manifest of the training rows, if they are still in place."""
    from srde_ds.data.manifest import FILE_NAME, load_manifest  # late: it loads the datasets library

    folder = rows_folder(run, (load_yaml(run / RUN_CONFIG).get("data") or {}).get("pretokenized_dir"))
    return load_manifest(folder) if (folder / FILE_NAME).is_file() else None


def _data(run: Path, sources: Sequence[dict[str, Any]]) -> str:
    manifest = _manifest(run)
    if manifest is None or "train" not in manifest.splits:
        return ""
    split = manifest.splits["train"]
    rows = [
        [name, f"{counts.documents:,}", f"{counts.rows:,}", f"{counts.tokens:,}", f"{counts.response_tokens:,}"]
        for name, counts in split.domains.items()
    ]
    parts = [
        f"## Data\n\n{split.rows:,} rows of {manifest.max_length} tokens; loss on the response tokens only.",
        markdown_table([["domain", "documents", "rows", "tokens", "response tokens"], *rows]),
    ]
    if sources:
        keys = ["name", "domain", "location", "license", "redistributable"]
        parts.append(markdown_table([keys, *([str(source[key]) for key in keys] for source in sources)]))
    return "\n\n".join(parts)


def _results(run: Path) -> str:
    if (run / "evaluation.json").is_file():
        result = read_json(run / "evaluation.json", "evaluate again")
        rows = [_result_row(name, group) for name, group in [*result["domains"].items(), ("all", result["overall"])]]
        items = result["overall"]["srde"]["items"]
        header = ["domain", "loss of the base", "loss", "accuracy of the base", "accuracy"]
        return (
            f"## Results\n\nOn {items} held-out items: loss of the response tokens in nats, accuracy of greedy answers."
            f"\n\n{markdown_table([header, *rows])}"
        )
    metrics = read_growing_lines(run / METRICS, _REMEDY)
    end = next((line["held_out"] for line in reversed(metrics) if "held_out" in line), None)
    if end is None:
        return ""
    start = metrics[0].get("held_out_at_start", {})
    rows = [[name, _number(start.get(name)), _number(loss)] for name, loss in end.items()]
    started = (load_yaml(run / RUN_CONFIG).get("training") or {}).get("start_from")
    before = "before training" if started else "before training (the base)"
    table = markdown_table([["domain", before, "after"], *rows])
    return f"## Results\n\nHeld-out loss in nats.\n\n{table}"


def _result_row(name: str, group: dict[str, Any]) -> list[str]:
    base, ours = group.get("base", {}), group["srde"]
    return [
        name,
        _number(base.get("loss")),
        _number(ours["loss"]),
        _share(base.get("accuracy")),
        _share(ours["accuracy"]),
    ]


def _licence(metadata: AdapterMetadata, sources: Sequence[dict[str, Any]]) -> str:
    base = base_license(metadata.model_name, metadata.model_revision or None) or "not known here: see the base's page"
    lines = [f"## Licence\n\nThe base's licence ({markdown(base)}) also applies to what is derived from it."]
    closed = sorted({str(source["name"]) for source in sources if source["redistributable"] != "yes"})
    if closed:
        lines.append(
            f"Of the training data, {', '.join(map(markdown, closed))} may not be passed on, or it is not known that "
            "they may."
        )
    return " ".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
