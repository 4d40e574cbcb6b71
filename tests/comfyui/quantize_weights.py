"""Run by ComfyUI's Python: quantizes a weight with ComfyUI's own package, and decodes it again.

python quantize_weights.py OUT.safetensors: of each form, `FORM.weight` and its scales as in a file, and `FORM.decoded`.
"""

import json
import sys

import torch
from comfy_kitchen.tensor import QuantizedTensor  # pyright: ignore[reportMissingImports]
from safetensors.torch import save_file

ROTATION = {"convrot": True, "convrot_groupsize": 16}
FORMS = {
    "int8_tensorwise": ("TensorWiseINT8Layout", {}, {}),
    "int8_rows": ("TensorWiseINT8Layout", {"per_channel": True}, {}),
    "int8_rotated": ("TensorWiseINT8Layout", {"per_channel": True, **ROTATION}, ROTATION),
    "mxfp8": ("TensorCoreMXFP8Layout", {}, {}),
    "nvfp4": ("TensorCoreNVFP4Layout", {}, {}),
    "convrot_w4a4": ("TensorCoreConvRotW4A4Layout", {"convrot_groupsize": 16}, {"convrot_groupsize": 16}),
}
weight = torch.randn(160, 192, generator=torch.Generator().manual_seed(4))
weight[3] = 0
tensors = {}
for name, (layout, options, description) in FORMS.items():
    quantized = QuantizedTensor.from_float(weight, layout, **options)
    tensors |= {key: tensor.contiguous() for key, tensor in quantized.state_dict(f"{name}.weight").items()}
    text = json.dumps({"format": "int8_tensorwise" if name.startswith("int8") else name, **description})
    tensors[f"{name}.comfy_quant"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    tensors[f"{name}.decoded"] = quantized.dequantize()
save_file(tensors, sys.argv[1])
