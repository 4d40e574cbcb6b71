"""optimum-quanto: weights in int8, one scale an output row."""

from __future__ import annotations

import importlib.util
from fnmatch import fnmatchcase

from torch import nn


class Int8Quanto:
    """W ~ scale * q with q in int8 and one scale for each row; the products run in the input's precision.

    Layer by layer, so that never more than one layer exists twice.
    """

    extra = ""

    def missing(self) -> str:
        if importlib.util.find_spec("optimum.quanto") is None:
            return "optimum-quanto is not installed; pip install optimum-quanto"
        return ""

    def quantize_(self, transformer: nn.Module, keep: tuple[str, ...]) -> nn.Module:
        from optimum.quanto import qint8
        from optimum.quanto.nn import QLinear

        names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
        for name in names:
            if any(fnmatchcase(name, pattern) for pattern in keep):
                continue
            parent, leaf = transformer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            layer = QLinear.from_module(getattr(parent, leaf), weights=qint8)
            assert layer is not None
            layer.freeze()
            setattr(parent, leaf, layer)
        return transformer.requires_grad_(False)
