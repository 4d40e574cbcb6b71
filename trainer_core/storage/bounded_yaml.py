"""Parse YAML of bounded nesting, with a bounded number of aliases. Only plain values: no tag makes an object."""

from __future__ import annotations

from typing import Any

from .bounded_files import Unusable

MAX_DEPTH, MAX_ALIASES = 20, 20  # no configuration of a tool that is read here has more


def parse_yaml(text: str) -> Any:
    """Return the content of a YAML text.

    Raises:
        Unusable: it is not YAML, is nested too deeply, or the package is missing.
    """
    try:
        import yaml  # comes with transformers and diffusers
    except ImportError as error:
        raise Unusable("can't be read without the package pyyaml; run: pip install pyyaml") from error
    try:
        depth = aliases = 0
        for event in yaml.parse(text, yaml.SafeLoader):  # yaml.load recurses, and merges of aliases can double
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            aliases += isinstance(event, yaml.AliasEvent)
            if depth > MAX_DEPTH or aliases > MAX_ALIASES:
                limits = f"at most {MAX_DEPTH} levels and {MAX_ALIASES} aliases are read"
                raise Unusable(f"is nested too deeply, or has too many aliases; {limits}")
        return yaml.safe_load(text)
    except Unusable:
        raise
    except yaml.YAMLError as error:
        raise Unusable(f"is not valid YAML: {' '.join(str(error).split())[:300]}") from error
    # Its constructors of dates, numbers and booleans raise errors of any kind, such as KeyError for "!!bool x".
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise Unusable("is not valid YAML: a value is no valid date, number or boolean; put it in quotes") from error
