"""A Hugging Face GPT-2 folder -> one for optimum's ORTModelForCausalLM: export_optimum.py CHECKPOINT TYPE OUTPUT."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from optimum.onnxruntime import AutoQuantizationConfig, ORTModelForCausalLM, ORTQuantizer


def main(checkpoint: Path, kind: str, output: Path) -> None:
    if kind == "fp32":
        ORTModelForCausalLM.from_pretrained(checkpoint, export=True).save_pretrained(output)
        return
    with tempfile.TemporaryDirectory(dir=output.parent) as exported:
        main(checkpoint, "fp32", Path(exported))
        recipe = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
        quantizer = ORTQuantizer.from_pretrained(exported)
        quantizer.quantize(save_dir=output, quantization_config=recipe, use_external_data_format=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
