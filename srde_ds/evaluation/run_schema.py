"""What reports read in a run's files. Other fields may be there; those of later versions may be missing."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from srde_ds.utils.schema import Count, Number, Schema

LossWeighting = Literal["token", "document", "domain"]
Names = Annotated[list[str], Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1.001)]  # rounding may exceed 1
Interval = Annotated[list[Number], Field(min_length=2, max_length=2)]
ByDomain = dict[str, Number | None]
_ABSENT: Any = None  # for fields that may be missing, but not be null


def _one_each(values: list[Any], info: ValidationInfo) -> list[Any]:
    if len(values) != info.context:
        raise ValueError(f"has {len(values)} values for {info.context} experts")
    return values


def _known(expert: int, info: ValidationInfo) -> int:
    experts: Any = info.context
    if expert >= experts:
        raise ValueError(f"is {expert}, but there are {experts} experts")
    return expert


def _plain(value: Any) -> Any:
    if not isinstance(value, str | int | float | None):
        raise ValueError("is neither text nor a number")
    return value


PerExpert = Annotated[list[Number | None], AfterValidator(_one_each)]
Plain = Annotated[Any, AfterValidator(_plain)]


class _DataCounts(Schema):
    documents: Count
    too_long: Count
    dropped: Count
    response_tokens: Count


class _WarmStart(Schema):
    method: str


class Experts(Schema):
    """Of a line of `metrics.jsonl`, what tells the number of experts."""

    tokens_per_expert: Annotated[list[Number], Field(min_length=1)]


class Line(Experts):
    """A line of `metrics.jsonl`; the context is the number of experts."""

    step: Count
    tokens: Count
    loss: Number | None
    tokens_per_second: Number
    tokens_per_expert: Annotated[list[Number], AfterValidator(_one_each)]
    phase: str = ""
    unlocked_experts: list[Annotated[Count, AfterValidator(_known)]] = []
    density: Number = 0.0
    learning_rates: dict[str, Number] = {}
    grad_norm: Number | None = None
    expert_gradient_norm: PerExpert = []
    delta_norm: PerExpert = []
    memory_gib: Number = 0.0
    held_out: ByDomain = {}
    held_out_at_start: ByDomain = {}
    warm_start: _WarmStart = _ABSENT
    data: dict[str, dict[str, _DataCounts]] = {}


class _Measured(Schema):
    """Figures that have intervals."""

    loss: Number | None
    loss_interval: Interval | None
    accuracy: Number | None
    accuracy_interval: Interval | None

    @model_validator(mode="after")
    def _both_or_neither(self) -> Self:
        for name in self.__class__.model_fields:
            if f"{name}_interval" in self.__class__.model_fields and (
                (getattr(self, name) is None) != (getattr(self, f"{name}_interval") is None)
            ):
                raise ValueError(f"has only one of '{name}' and '{name}_interval'")
        return self


class _Figures(_Measured):
    items: Count
    scored: Count
    perplexity: Number | None
    perplexity_interval: Interval | None


class _Difference(_Measured):
    mcnemar_p: Number


class _Group(Schema):
    srde: _Figures
    base: _Figures = _ABSENT
    difference: _Difference = _ABSENT


class _Usage(Schema):
    domains: Names
    experts: Names
    share: list[list[Share]]
    share_by_layer: Annotated[list[list[list[Share]]], Field(min_length=1)]

    @model_validator(mode="after")
    def _shapes(self) -> Self:
        for name, table in [("share", self.share), *(("share_by_layer", layer) for layer in self.share_by_layer)]:
            _check_shape(name, table, len(self.domains), len(self.experts))
        return self


class _EachExpert(Schema):
    domains: Names
    experts: Names
    loss: list[list[Number]]

    @model_validator(mode="after")
    def _shape(self) -> Self:
        _check_shape("loss", self.loss, len(self.experts), len(self.domains))
        return self


class _Evaluated(Schema):
    eval_file: str
    dtype: str
    seconds: Number
    environment: dict[str, Any] = {}
    __pydantic_extra__: dict[str, Plain]


class Evaluation(Schema):
    """`evaluation.json`."""

    overall: _Group
    domains: dict[str, _Group]
    sources: dict[str, _Group]
    usage: _Usage
    run: _Evaluated
    each_expert: _EachExpert = _ABSENT

    @model_validator(mode="after")
    def _same_models(self) -> Self:
        for kind in ("domains", "sources"):
            for name, group in getattr(self, kind).items():
                if (group.base is None) != (self.overall.base is None):
                    raise ValueError(f"has the base only in one of overall and {kind}.{name}")
        for name in self.each_expert.domains if self.each_expert else ():
            if name not in self.domains:
                raise ValueError(f"has the domain '{name}' of each_expert not in domains")
        return self


class _Call(Schema):
    function: dict[str, Any]


class _Message(Schema):
    role: str
    content: str
    reasoning_content: str | None = None
    tool_calls: list[_Call] = []


class _Answer(Schema):
    prediction: str | None
    correct: bool | None
    answer_tokens: list[str] = []
    answer_experts: list[list[Count]] = []
    cut: bool = False


class Item(Schema):
    """A line of `evaluation_items.jsonl`; the context says whether the base was run, too; None: not known yet."""

    domain: str
    source: str
    prompt: Annotated[list[_Message], Field(min_length=1)]
    response: str
    answer: str | None
    scoring: str | None
    srde: _Answer
    base: _Answer = _ABSENT

    @model_validator(mode="after")
    def _same_models(self, info: ValidationInfo) -> Self:
        if info.context is not None and (self.base is not None) != info.context:
            raise ValueError(f"{'lacks' if info.context else 'has'} 'base', unlike the items before")
        return self


class Environment(Schema):
    """`environment.json`."""

    machine: str | None = None
    python: str | None = None
    git_revision: str | None = None
    world_size: Count | None = None
    versions: dict[str, str | None] = {}
    command: list[str] = []


class _Options(Schema):
    max_steps: Count = 0
    density: Share = 0.0
    domains: list[str] = []
    loss_weighting: LossWeighting = "token"
    pretokenized_dir: str | None = None


class Settings(Schema):
    """`config.yaml`: options by section."""

    __pydantic_extra__: dict[str, _Options]


def _check_shape(name: str, table: list[list[Any]], rows: int, columns: int) -> None:
    if len(table) != rows or any(len(row) != columns for row in table):
        raise ValueError(f"has '{name}' in another shape than {rows} x {columns}")
