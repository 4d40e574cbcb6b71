"""Widget order of each node, to read saved workflows, which store widget values by position."""

from __future__ import annotations

from ..trainer_core.spec import Field
from ..trainer_core.workflow.graph import Schema, Widget
from . import ALL_NODES

TYPES = {bool: "BOOLEAN", int: "INT", float: "FLOAT", str: "STRING"}
# ComfyUI adds a control_after_generate widget to every INT with one of these names.
CONTROLLED = ("seed", "noise_seed")
CORE = {  # ComfyUI's core nodes that a headless run supports (workflow/images.py, workflow/resolve.py)
    "SaveImage": Schema((Widget("filename_prefix", "STRING", "ComfyUI"),), "Save Image"),
    "PreviewImage": Schema((), "Preview Image"),
    "PrimitiveInt": Schema((Widget("value", "INT", 0, control=True),), "Int"),
    "PrimitiveFloat": Schema((Widget("value", "FLOAT", 0.0),), "Float"),
    "PrimitiveString": Schema((Widget("value", "STRING", ""),), "String"),
    "PrimitiveStringMultiline": Schema((Widget("value", "STRING", ""),), "String (Multiline)"),
    "PrimitiveBoolean": Schema((Widget("value", "BOOLEAN", False),), "Boolean"),
}


def schemas() -> dict[str, Schema]:
    """Return a map of node type to its widgets, in the order of `widgets_values`."""
    own = {
        spec.id: Schema(tuple(_widget_of(field) for field in spec.fields() if field.is_widget), spec.title)
        for spec in ALL_NODES.values()
    }
    return {**CORE, **own}


def _widget_of(field: Field) -> Widget:
    combo = field.choice is not None or field.model_file is not None
    control = field.seed or (field.kind is int and field.name in CONTROLLED)
    return Widget(field.name, "COMBO" if combo else TYPES.get(field.kind, "*"), field.default, control)
