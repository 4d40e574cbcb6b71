"""Strengths by block with a name, in the syntax of block_lr of AdapterSettings. Needs no torch."""

from __future__ import annotations

DOUBLE, SINGLE = "transformer_blocks.*", "single_transformer_blocks.*"
PRESETS: dict[str, str] = {
    "all": "",
    "double blocks": f"*=0; {DOUBLE}=1",
    "single blocks": f"*=0; {SINGLE}=1",
    "attention": "*=0; *.attn.*=1",
    "mlp": "*=0; *.ff.*=1; *.ff_context.*=1; *.proj_mlp=1; single_transformer_blocks.*.proj_out=1",
    "without text layers": "*.attn.add_*=0; *.attn.to_add_out=0; *.ff_context.*=0; *.norm1_context.*=0; "
    "context_embedder=0",
    "without edge blocks": "transformer_blocks.0-1=0; transformer_blocks.17-18=0",
    "first half": "transformer_blocks.10-18=0; single_transformer_blocks.19-37=0",
    "second half": "transformer_blocks.0-9=0; single_transformer_blocks.0-18=0",
}
