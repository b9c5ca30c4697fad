"""Trained experts as a model of lm-evaluation-harness:

    python -m srde_ds.evaluation.harness run --model srde --model_args weights=RUN,base=BASE --tasks ...

takes the options of `lm_eval`; importing this module registers the model for programs that call lm_eval themselves.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch

from srde_ds.config.values import checked, same_option
from srde_ds.errors import SRDEError, nearest
from srde_ds.export.weights import DTYPES
from srde_ds.inference.load import load_model
from srde_ds.inference.options import ModelOptions
from srde_ds.utils.launcher import launched_world_size

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError:
    raise SRDEError("package 'lm_eval' is missing. Install it: pip install 'srde-ds[lm-eval]'") from None


log = logging.getLogger(__name__)


@register_model("srde")
class SRDEHarnessModel(HFLM):
    """The base with its experts behind the harness's own Hugging Face model.

    Args:
        weights: whatever `load_adapter` takes, such as the folder of a run.
        base: folder or id of the base; default: the one named in the weights.
        dtype: bfloat16 or float32.
        device: default: the GPU if there is one. As in HFLM, cuda means the CPU if there is no GPU.
        allow_download: without `base`, whether the one named in the weights may be downloaded from the Hub.
        base_quantization: none, int8, nf4 or fp8, as in training.
        srde_weights: another name of `weights`.
        options: further options of HFLM, such as batch_size and max_length.

    Raises:
        SRDEError: an option is unknown, there are no such weights or no such base, the dtype is unknown, or there are
            several processes, each of which would do all of the work.
    """

    def __init__(
        self,
        weights: str | None = None,
        base: str | None = None,
        dtype: str = "bfloat16",
        device: str | None = None,
        allow_download: bool = False,
        base_quantization: str = "none",
        srde_weights: str | None = None,
        **options: Any,
    ) -> None:
        place = same_option(weights=weights, srde_weights=srde_weights)
        if place is None:
            raise SRDEError("weights is missing: give weights=PLACE among the model's arguments.")
        if dtype not in DTYPES:
            raise SRDEError(f"dtype={dtype}: must be one of {', '.join(DTYPES)}.")
        _check_options(options)
        if launched_world_size() > 1:
            raise SRDEError("the harness runs in one process: start it without a launcher.")
        stored = checked(ModelOptions, "base_quantization", base_quantization)
        model, tokenizer = load_model(ModelOptions(str(place), base, allow_download, stored, bf16=dtype == "bfloat16"))
        # By default the command line asks for cuda:0, even if there is no GPU.
        if device is not None and (torch.cuda.is_available() or not device.startswith("cuda")):
            model.to(device)
        super().__init__(pretrained=model.base, tokenizer=tokenizer, backend="causal", **options)
        self._template_is_told = not tokenizer.chat_template

    def apply_chat_template(self, *arguments: Any, **options: Any) -> str:
        """As in HFLM. The harness calls it for each item, if the user wants the template."""
        self._template_is_told = True
        return str(super().apply_chat_template(*arguments, **options))

    def _model_call(self, *arguments: Any, **options: Any) -> Any:
        self._tell_template()
        return super()._model_call(*arguments, **options)

    def _model_generate(self, *arguments: Any, **options: Any) -> Any:
        self._tell_template()
        return super()._model_generate(*arguments, **options)

    def _tell_template(self) -> None:
        """The experts were trained on the base's chat template and may answer nothing useful without it."""
        if not self._template_is_told:
            self._template_is_told = True
            log.warning("The experts were trained with the base's chat template: give --apply_chat_template.")


def _check_options(options: dict[str, Any]) -> None:
    """Refuse what HFLM would take for an argument of a base that is loaded already, and ignore."""
    if "route_by" in options:
        raise SRDEError(
            f"route_by={options['route_by']}: in the harness each token is routed for itself. Leave it out, or use "
            "srde-ds evaluate."
        )
    own = ("self", "pretrained", "tokenizer", "backend", "kwargs")
    of_harness = [name for name in inspect.signature(HFLM.__init__).parameters if name not in own]
    known = [*("weights", "base", "dtype", "allow_download", "base_quantization"), *of_harness]
    if unknown := [name for name in options if name not in of_harness]:
        raise SRDEError(
            f"model_args: unknown argument '{unknown[0]}={options[unknown[0]]}'.{nearest(unknown[0], known)} Leave it "
            f"out; known are {', '.join(dict.fromkeys(known))}."
        )


if __name__ == "__main__":
    cli_evaluate()
