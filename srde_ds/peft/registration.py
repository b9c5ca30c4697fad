"""Adds SRDE to the methods of PEFT, whose list is an enumeration that cannot be extended in a regular way.

Only this file changes anything in PEFT: it adds a member to that list, and it makes `PeftModel.load_adapter` check the
files before it loads SRDE adapters. Tested with PEFT 0.21.0 and 0.21.2.
"""

from __future__ import annotations

import functools
from typing import Any

import peft
from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

from srde_ds.errors import SRDEError
from srde_ds.peft.loading import load_values
from srde_ds.weights.peft_folder import PEFT_TYPE

TRIED = ("0.21.0", "0.21.2")
NEEDED = ("_get_adapter_state_dict", "_remove_adapter_name_from_key", "_remap_adapter_state_dict_for_load")
"""Methods of PEFT's tuners that `SRDETuner` overrides; PEFT 0.20 lacks them"""


def register(config: type[PeftConfig], tuner: type[BaseTuner]) -> None:
    """Let PEFT build and load adapters of this method. A second call changes nothing.

    Raises:
        SRDEError: this version of PEFT does not allow it.
    """
    if PEFT_TYPE in PeftType.__members__:
        return
    lacking = [name for name in NEEDED if not hasattr(BaseTuner, name)]
    try:
        if lacking:
            raise AttributeError(f"BaseTuner has no {lacking[0]}")
        _add_member(PeftType, PEFT_TYPE)
        register_peft_method(name=PEFT_TYPE.lower(), config_cls=config, model_cls=tuner)
        _check_files_before(PeftModel, tuner)
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise SRDEError(
            f"peft {peft.__version__}: SRDE cannot be added to its methods ({error}). Install a version that was "
            f"tested: {', '.join(TRIED)}."
        ) from None


def _add_member(enumeration: Any, name: str) -> None:
    """Add a member whose value is its name to a string enumeration, as its class statement would have done."""
    member = str.__new__(enumeration, name)
    member._name_ = member._value_ = name
    member.__objclass__ = enumeration
    member._sort_order_ = len(enumeration._member_names_)
    type.__setattr__(enumeration, name, member)
    enumeration._member_names_.append(name)
    enumeration._member_map_[name] = enumeration._value2member_map_[name] = member
    if enumeration(name) is not member or name not in enumeration.__members__ or list(enumeration)[-1] is not member:
        raise TypeError(f"no member can be added to {enumeration.__name__}")


def _check_files_before(models: Any, tuner: type[BaseTuner]) -> None:
    """Let `load_adapter` of models with this tuner use `load_values`. Nothing changes for other methods."""
    plain, _ = models.load_adapter, models._split_kwargs  # the latter is what `load_values` calls

    @functools.wraps(plain)
    def load_adapter(self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        load = functools.partial(plain, self, model_id, adapter_name, *args, **kwargs)
        if not isinstance(self.base_model, tuner):
            return load()
        return load_values(self, model_id, adapter_name, load, **kwargs)

    models.load_adapter = load_adapter
