"""Checks the content of other people's JSON and YAML; the first fault becomes one line that names its field."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from srde_ds.errors import SRDEError

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Number = Annotated[float, Field(ge=-1e300, le=1e300)]
"""also a whole number; the limits leave room for sums and for the margins of plots"""


class Schema(BaseModel):
    """The fields of an object. They are not converted; what the schema does not name may be there, too."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


def check_schema(schema: type[Schema], content: Any, place: str, remedy: str, *, context: Any = None) -> None:
    """Check what was read from a file.

    Args:
        place: the beginning of the error message, such as "'run/metrics.jsonl': the line of step 3".
        remedy: its end, without the full stop.
        context: for the schema's validators.

    Raises:
        SRDEError: a field is missing, or its value is of another type or out of range.
    """
    with one_fault(place, remedy):
        schema.model_validate(content, context=context)


@contextmanager
def one_fault(place: str, remedy: str) -> Iterator[None]:
    """Report the first of pydantic's faults as an SRDEError; for the arguments see `check_schema`."""
    try:
        yield
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        path, wanted = fault["loc"], fault["msg"].replace("Input should", "should")
        if fault["type"] in ("model_type", "dict_type"):
            wanted = "should be an object"
        reason = f"is {reprlib.repr(fault['input'])}, but {wanted}"
        if fault["type"] == "missing":
            path, reason = path[:-1], f"lacks '{path[-1]}'"
        elif fault["type"] == "value_error":
            reason = str(fault["ctx"]["error"])
        field = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")
        raise SRDEError(f"{place}: {field or 'it'} {reason}: {remedy}.") from None
