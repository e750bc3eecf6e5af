"""Does stock transformers load this folder, all of it, and compute something finite? Run as a script of its own.

``python -P reload_check.py FOLDER [SRC]`` prints one JSON object. It imports moekit only if SRC, the folder that holds
the package, is given: a stock output has to load without. Nothing else of moekit may be imported here.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def check(folder: str) -> dict[str, Any]:
    """Load by ``from_pretrained`` and run eight tokens; what was missing, unexpected or of another shape."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(folder)
    autos = (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText, transformers.AutoModel)
    auto = next(auto for auto in autos if type(config) in auto._model_mapping)
    model, info = auto.from_pretrained(folder, dtype="auto", output_loading_info=True)
    found = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        **{
            key: sorted(map(str, info.get(key) or ())) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        },
    }
    vocabulary = config.get_text_config().vocab_size
    with torch.no_grad():
        output = model.eval()(input_ids=torch.arange(8)[None] % vocabulary, use_cache=False)
    logits = output.logits if getattr(output, "logits", None) is not None else output[0]
    found["finite"] = bool(torch.isfinite(logits).all())
    return found


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        sys.path.insert(0, arguments[1])
        import moekit  # noqa: F401
    try:
        result = check(arguments[0])
    except Exception as error:
        lines = str(error).strip().splitlines()
        result = {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
