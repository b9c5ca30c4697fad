"""Do the warm start's routers send tokens to their domain's expert? SmolLM2-135M and the quick start's six domains.

    python launch/quickstart_inputs.py runs/quickstart-inputs
    python -m benchmarks.warm_start_quality     # prints the tables, writes benchmarks/results/warm_start_quality.json

Routers are fitted on 512 tokens a domain of the training rows, for several seeds of the draw, and judged on tokens of
held-out rows: "usable" ones, as the warm start samples them, and "all" but padding. No expert is trained: what is
measured is what the base's inputs tell. Variants change one choice of the design each.
"""

import argparse
import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import datasets
import numpy as np
import sklearn
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score

from benchmarks.tables import measured_on
from srde_ds.config import DOMAINS, AdapterConfig
from srde_ds.data.build.from_files import RowsOfFiles, build_dataset
from srde_ds.data.loader import validation_batches
from srde_ds.data.tokenizer import load_tokenizer
from srde_ds.model.adapter import SRDEModel, add_experts
from srde_ds.model.base import load_base
from srde_ds.training.warm_start import clustering
from srde_ds.training.warm_start.routers import capture_inputs
from srde_ds.training.warm_start.token_sample import TokenSample, choose_tokens, special_token_ids

ROOT = Path(__file__).resolve().parents[1]
PER_DOMAIN, LAYERS_SHOWN = 512, 5
Method = Literal["discriminant", "kmeans", "domain_means", "random"]
METHODS: tuple[Method, ...] = ("discriminant", "kmeans", "domain_means", "random")
# name -> method, sample, what replaces a choice of the design
VARIANTS: dict[str, tuple[Method, str, str | None]] = {
    "discriminant": ("discriminant", "usable", None),
    "discriminant, all tokens sampled": ("discriminant", "all", None),
    "kmeans": ("kmeans", "usable", None),
    "kmeans, ten starts by k-means++": ("kmeans", "usable", "starts"),
    "kmeans, all tokens sampled": ("kmeans", "all", None),
    "kmeans, loud dimensions left as they are": ("kmeans", "usable", "scale"),
    "domain_means": ("domain_means", "usable", None),
    "domain_means, all tokens sampled": ("domain_means", "all", None),
    "domain_means, loud dimensions left as they are": ("domain_means", "usable", "scale"),
    "random": ("random", "usable", None),
}


def replaced(choice: str | None) -> AbstractContextManager[object]:
    if choice == "starts":

        def many_starts(points: np.ndarray, means: np.ndarray, experts: int, generator: object) -> np.ndarray:
            return clustering._unit(KMeans(experts, n_init=10, random_state=0).fit(points).cluster_centers_)

        return patch.object(clustering, "_clusters", many_starts)
    if choice == "scale":
        return patch.object(clustering, "_even_points", lambda x: (np.ones(x.shape[1], x.dtype), clustering._unit(x)))
    return nullcontext()


def all_tokens(rows: datasets.Dataset, seed: int) -> TokenSample:
    """PER_DOMAIN tokens of each domain among all but padding, from its first rows in a random order."""
    generator = np.random.default_rng(seed)
    domain, length = (np.asarray(rows[name][:]) for name in ("domain", "length"))
    parts = []
    for index in range(len(DOMAINS)):
        own = generator.permutation(np.flatnonzero(domain == index))[:16]
        tokens = np.array([(row, position) for row in own for position in range(length[row])])
        parts.append(generator.permutation(tokens)[:PER_DOMAIN])
    tokens = np.concatenate(parts)
    tokens = tokens[np.lexsort(tokens.T[::-1])]
    chosen, row = np.unique(tokens[:, 0], return_inverse=True)
    return TokenSample(chosen, row, tokens[:, 1], domain[chosen][row])


def inputs_of(model: SRDEModel, rows: datasets.Dataset, sample: TokenSample) -> np.ndarray:
    """[L, N, D]"""

    def forward(batch: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            model(batch["input_ids"], position_ids=batch["position_ids"], logits_to_keep=1)

    captured = capture_inputs(model, forward, validation_batches(rows.select(sample.rows), 1), sample)
    return torch.stack(captured).float().numpy()


def judge(weights: np.ndarray, inputs: np.ndarray, domain: np.ndarray) -> dict[str, float]:
    order = np.argsort(inputs @ weights.T, axis=1)[:, ::-1]
    return {
        "nmi": float(normalized_mutual_info_score(domain, order[:, 0])),
        "own_first": float((order[:, 0] == domain).mean()),
        "own_among_two": float((order[:, :2] == domain[:, None]).any(1).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=Path, default=ROOT / "runs/quickstart-inputs")
    parser.add_argument("--rows", type=Path, default=ROOT / "runs/warm-start-rows", help="built if it is not there")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/warm_start_quality.json")
    options = parser.parse_args()
    base = options.inputs / "base"
    tokenizer = load_tokenizer(base)
    build_dataset(
        RowsOfFiles(
            options.inputs / "train.jsonl",
            options.inputs / "held_out.jsonl",
            list(DOMAINS),
            max_length=256,
            too_long="drop",
            seed=42,
        ),
        options.rows,
        tokenizer,
    )
    train, held_out = (datasets.load_from_disk(str(options.rows / split)) for split in ("train", "validation"))
    train, held_out = train.with_format("numpy"), held_out.with_format("numpy")
    special = special_token_ids(tokenizer)
    names = list(DOMAINS)
    model = add_experts(
        load_base(base, dtype=torch.float32), AdapterConfig(num_experts=6), expert_names=names, seed=0
    ).eval()

    def usable(rows: datasets.Dataset, seed: int) -> TokenSample:
        return choose_tokens(rows, domains=names, per_domain=PER_DOMAIN, special_ids=special, seed=seed)

    tests = {"usable": usable(held_out, 0), "all": all_tokens(held_out, 0)}
    test_inputs = {name: inputs_of(model, held_out, sample) for name, sample in tests.items()}
    # by variant, kind of held-out token and figure: [seeds][L]
    found: dict[str, dict[str, dict[str, list[list[float]]]]] = {}
    for seed in range(options.seeds):
        fits = {"usable": usable(train, seed), "all": all_tokens(train, seed)}
        fit_inputs = {name: inputs_of(model, train, sample) for name, sample in fits.items()}
        for variant in options.variants:
            method, kind, choice = VARIANTS[variant]
            for layer, inputs in enumerate(fit_inputs[kind]):
                with replaced(choice):
                    fit = clustering.fit_router(
                        inputs, fits[kind].domain, num_experts=6, method=method, seed=seed, layer=layer
                    )
                for test, sample in tests.items():
                    for figure, value in judge(fit.weights, test_inputs[test][layer], sample.domain).items():
                        by_seed = found.setdefault(variant, {}).setdefault(test, {}).setdefault(figure, [])
                        if layer == 0:
                            by_seed.append([])
                        by_seed[-1].append(round(value, 4))
        print(f"seed {seed} done", flush=True)

    def mean(variant: str, test: str, figure: str) -> float:
        return float(np.mean(found[variant][test][figure]))

    print("\n| Router | NMI | own expert first | own among two | own first, all tokens |\n|---|---|---|---|---|")
    for variant in options.variants:
        cells = [mean(variant, "usable", figure) for figure in ("nmi", "own_first", "own_among_two")]
        cells.append(mean(variant, "all", "own_first"))
        print(f"| {variant} | {cells[0]:.3f} | " + " | ".join(f"{value:.1%}" for value in cells[1:]) + " |")
    layers = len(model.layers)
    shown = [round(i * (layers - 1) / LAYERS_SHOWN) for i in range(LAYERS_SHOWN + 1)]
    methods = [method for method in METHODS if method in options.variants]
    titles = " | ".join(f"{method}: NMI, own first" for method in methods)
    print(f"\n| Layer | {titles} |\n|---|" + "---|" * len(methods))
    for layer in shown:
        texts = []
        for method in methods:
            nmi, own = (np.mean(found[method]["usable"][figure], axis=0)[layer] for figure in ("nmi", "own_first"))
            texts.append(f"{nmi:.2f}, {own:.0%}")
        print(f"| {layer + 1} | " + " | ".join(texts) + " |")
    kept = measured_on()
    kept["versions"]["scikit-learn"] = sklearn.__version__
    record = {
        "samples_a_domain": PER_DOMAIN,
        "held_out_tokens": {name: len(sample.domain) for name, sample in tests.items()},
        "seeds": options.seeds,
        "environment": kept,
        "figures": found,
    }
    text = json.dumps(record, indent=1, default=float)
    options.results.write_text(text + "\n")


if __name__ == "__main__":
    main()
