"""gpu.json: what was found so far, whole after every item; and the same for a person to read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

COLUMNS = ("step", "s a step", "of limit", "launches", "idle", "peak GB", "reserved", "plan GB")


class Results:
    """The file, and what is in it. What an earlier call found of other items stays, each with its date and commit."""

    def __init__(self, path: Path):
        self.path = path
        self.data: dict[str, Any] = {"header": {}, "items": {}}
        try:
            found = json.loads(path.read_text("utf-8"))
            self.data["items"] = {name: entry for name, entry in found["items"].items() if isinstance(entry, dict)}
            self.data["header"] = dict(found["header"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass

    @property
    def items(self) -> dict[str, Any]:
        return self.data["items"]

    @property
    def header(self) -> dict[str, Any]:
        return self.data["header"]

    def add(self, name: str, entry: dict[str, Any]) -> None:
        """Keep an item's entry, and write."""
        self.items[name] = entry
        self.write()

    def write(self) -> None:
        """The file is there whole, or as it was."""
        self._put_forecasts()
        staging = self.path.with_name(f".{self.path.name}.tmp")
        staging.write_text(json.dumps(self.data, indent=2) + "\n", "utf-8")
        os.replace(staging, self.path)

    def _put_forecasts(self) -> None:
        """The plan's figures beside the measured ones of the same settings."""
        for name, forecast in self.items.get("forecasts", {}).get("cases", {}).items():
            step = self.items.get(f"step-{name}", {})
            if "seconds_a_step" in step:
                step["forecast"] = forecast
                if forecast.get("peak_gb") and step.get("peak_vram_gb"):
                    step["forecast_over_measured"] = round(forecast["peak_gb"] / step["peak_vram_gb"], 3)


def line_of(name: str, entry: dict[str, Any]) -> str:
    """One item in one line."""
    told = entry.get("summary") or entry.get("reason", "")
    if entry["status"] == "failed" and entry.get("faults"):
        told = "; ".join([*([told] if told else []), *entry["faults"]])
    return f"{entry['status']:8} {entry.get('seconds', 0.0):6.1f} s  {name}: {told}"[:300]


def table(results: Results, names: list[str]) -> str:
    """Step cases side by side, then whatever is not well."""
    rows = [_row(name, results.items[name]) for name in names if "seconds_a_step" in results.items.get(name, {})]
    lines = []
    if rows:
        width = max(len(row[0]) for row in rows)
        lines = [f"{row[0]:{width}}" + "".join(f"{value:>10}" for value in row[1:]) for row in (COLUMNS, *rows)]
    states = [results.items[name]["status"] for name in names if name in results.items]
    lines.append(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)))
    bad = [name for name in names if results.items.get(name, {}).get("status") in ("failed", "died", "timeout")]
    return "\n".join([*lines, *(line_of(name, results.items[name]) for name in bad)])


def _row(name: str, entry: dict[str, Any]) -> tuple[str, ...]:
    launches = entry.get("launches", {})

    def shown(value: Any, rule: str) -> str:
        return "-" if value is None else format(value, rule)

    return (
        name.removeprefix("step-"), shown(entry["seconds_a_step"], ".3f"), shown(entry.get("share_of_limit"), ".2f"),
        shown(launches.get("count"), "d"), shown(launches.get("idle_share"), ".2f"),
        shown(entry.get("peak_vram_gb"), ".2f"), shown(entry.get("peak_reserved_gb"), ".2f"),
        shown(entry.get("forecast", {}).get("peak_gb"), ".2f"),
    )  # fmt: skip
