"""`srde-ds convert`: trained experts as files for others to load."""

from __future__ import annotations

from collections.abc import Sequence

from srde_ds.cli.flags import Parser


def convert(arguments: Sequence[str]) -> None:
    parser = Parser(prog="srde-ds convert", description="Trained experts as files for others to load.")
    parser.add_argument("--checkpoint", required=True, help="run folder, checkpoint-<step> or srde_weights.safetensors")
    parser.add_argument(
        "--to",
        choices=["weights", "dense", "moe", "gguf"],
        default="weights",
        help="the adapter in one file; the base with one expert merged; a stock mixture of experts for transformers "
        "and vLLM; the same for llama.cpp",
    )
    parser.add_argument(
        "--output",
        "--output_file",
        metavar="PATH",
        help="file, of dense and moe folder, to write (default: srde_weights.safetensors, dense, moe, model.gguf)",
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="type of the weights (default: float32, or the base's)"
    )
    parser.add_argument("--experts", metavar="NAME,...", help="leave out all other experts")
    parser.add_argument("--expert", metavar="NAME", help="dense: the expert to merge")
    parser.add_argument("--base", help="folder or id of the base, if it is not where it was in training")
    parser.boolean("--allow_download", False, "fetch the base that the weights name from the Hub, if it is not here")
    parser.add_argument("--gguf_converter", metavar="FILE", help="gguf: llama.cpp's convert_hf_to_gguf.py")
    options = vars(parser.parse(arguments))
    experts = options.pop("experts")

    from srde_ds.export.command import convert_command

    print(convert_command(experts=None if experts is None else experts.split(","), **options))
