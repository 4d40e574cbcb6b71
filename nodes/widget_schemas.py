"""Widget orders of our nodes, for reading workflows that the editor saved by position."""

from __future__ import annotations

from ..trainer_core.spec import Field
from ..trainer_core.workflow.graph import Schema, Widget
from . import ALL_NODES

TYPES = {bool: "BOOLEAN", int: "INT", float: "FLOAT", str: "STRING"}
CONTROLLED = (
    "seed",
    "noise_seed",
)  # ComfyUI gives an INT of these names a control, whether or not the node asks for one
CORE = {  # ComfyUI's own nodes that a headless run understands (workflow/images.py, workflow/resolve.py)
    "SaveImage": Schema((Widget("filename_prefix", "STRING", "ComfyUI"),), "Save Image"),
    "PreviewImage": Schema((), "Preview Image"),
    "PrimitiveInt": Schema((Widget("value", "INT", 0, control=True),), "Int"),
    "PrimitiveFloat": Schema((Widget("value", "FLOAT", 0.0),), "Float"),
    "PrimitiveString": Schema((Widget("value", "STRING", ""),), "String"),
    "PrimitiveStringMultiline": Schema((Widget("value", "STRING", ""),), "String (Multiline)"),
    "PrimitiveBoolean": Schema((Widget("value", "BOOLEAN", False),), "Boolean"),
}


def schemas() -> dict[str, Schema]:
    """Node type -> its widgets in the order of `widgets_values`."""
    ours = {
        spec.id: Schema(tuple(_widget(field) for field in spec.fields() if field.is_widget), spec.title)
        for spec in ALL_NODES.values()
    }
    return {**CORE, **ours}


def _widget(field: Field) -> Widget:
    combo = field.choice is not None or field.model_file is not None
    control = field.seed or (field.kind is int and field.name in CONTROLLED)
    return Widget(field.name, "COMBO" if combo else TYPES.get(field.kind, "*"), field.default, control)
