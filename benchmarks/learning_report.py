"""Table (docs/learning.md) and chart (docs/images/learning.png) of benchmarks/results/learning.json. Pillow only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from chroma_trainer.trainer_core.plots.canvas import AMBER, BLUE, PAPER, RULE, SOFT_INK, TEAL, shapes, write
from PIL import Image, ImageDraw

PROJECT = Path(__file__).resolve().parents[1]
PAGE, CHART = PROJECT / "docs" / "learning.md", PROJECT / "docs" / "images" / "learning.png"
BEGIN, END = "<!-- begin: benchmarks/learning.py -->", "<!-- end -->"
GROUPS = {
    "density": "sigma density", "rank": "rank", "rate": "learning rate", "quantization": "base in",
    "optimizer": "optimizer", "adapter": "adapter", "rollout": "rollout", "routing": "routed share",
    "loss": "loss", "noise choice": "noise choice", "preservation": "preservation",
}  # fmt: skip
BASELINE = {
    "density": "chroma",
    "rank": "16",
    "rate": "0.003",
    "quantization": "none",
    "optimizer": "adamw",
    "adapter": "lora",
    "rollout": "none",
    "routing": "0",
    "loss": "mse",
    "noise choice": "1",
    "preservation": "0",
}
FIGURES = ("lora", "without_trigger", "eval_after")
NORMAL_95 = 1.96


@dataclass(frozen=True)
class Line:
    """One setting, over its training seeds. noise: half of the 95 % interval of the score of n pictures."""

    group: str
    name: str
    seeds: int
    steps: int
    rate: float
    before: float
    after: float
    base: float
    lora: float
    noise: float
    plain: float
    pictures: int
    seconds: float
    by_seed: Mapping[int, Mapping[str, float]]

    @property
    def has_diverged(self) -> bool:
        return any(row["eval_after"] > row["eval_before"] for row in self.by_seed.values())


def write_report(result: Mapping[str, Any]) -> None:
    """Between the marks of the page; what a person wrote around them stays."""
    found = lines_of(result["runs"].values())
    deviation = difference_deviation(found)
    text = "\n".join([BEGIN, *_told(result, deviation), "", *_table(found, deviation), END])
    page = PAGE.read_text("utf-8") if PAGE.is_file() else f"# What a setting changes\n\n{BEGIN}\n{END}\n"
    head, rest = page.split(BEGIN)
    PAGE.write_text(head + text + rest.split(END)[1], encoding="utf-8")
    draw_chart(found).save(CHART)


def lines_of(rows: Any) -> list[Line]:
    """A line for each setting; the baseline stands in every group that has others."""
    by_setting: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = ("baseline", "") if BASELINE.get(row["group"]) == row["name"] else (row["group"], row["name"])
        by_setting.setdefault(key, []).append(row)
    lines = []
    for group in GROUPS:
        own = {name: part for (g, name), part in by_setting.items() if g == group}
        if own and ("baseline", "") in by_setting:
            own = {BASELINE[group]: by_setting["baseline", ""], **own}
        ordered = sorted(own, key=_place) if group in ("rank", "rate") else list(own)
        lines += [_line(group, name, own[name]) for name in ordered]
    return lines


def _place(name: str) -> float:
    return float(name)


def _line(group: str, name: str, rows: Sequence[Mapping[str, Any]]) -> Line:
    pictures = sum(row["pictures"] for row in rows)
    lora = mean(row["lora"] for row in rows)
    p = (lora * pictures + 2) / (pictures + 4)  # Agresti and Coull 1998: sound at 0 and 1 as well
    return Line(
        group, name, len(rows), rows[0]["steps"], rows[0]["learning_rate"], mean(row["eval_before"] for row in rows),
        mean(row["eval_after"] for row in rows), mean(row["base"] for row in rows), lora,
        NORMAL_95 * math.sqrt(p * (1 - p) / (pictures + 4)), mean(row["without_trigger"] for row in rows),
        pictures, min(row["cpu_seconds_per_step"] for row in rows), {row["seed"]: row for row in rows},
    )  # fmt: skip


def differences(line: Line, reference: Line, name: str) -> list[float]:
    """Differences from the baseline of the same training seed: what a seed does to all settings cancels out."""
    shared = sorted(line.by_seed.keys() & reference.by_seed.keys())
    return [line.by_seed[seed][name] - reference.by_seed[seed][name] for seed in shared]


def difference_deviation(lines: Sequence[Line]) -> dict[str, float]:
    """Standard deviation between seeds of the difference from the baseline, pooled over the settings, by figure.

    Settings with a run that diverged are left out: their differences are of another kind.
    """
    pairs = [(line, _reference(lines, line)) for line in lines if not line.has_diverged]
    pairs = [(line, reference) for line, reference in pairs if line.name != reference.name]
    found: dict[str, float] = {}
    for name in FIGURES:
        several = [part for part in (differences(*pair, name) for pair in pairs) if len(part) > 1]
        freedom = sum(len(part) - 1 for part in several)
        squares = sum((value - mean(part)) ** 2 for part in several for value in part)
        found[name] = math.sqrt(squares / freedom) if freedom else math.nan
        found |= {"settings": float(len(several)), "freedom": float(freedom)}
    return found


def _reference(lines: Sequence[Line], line: Line) -> Line:
    return next(each for each in lines if each.group == line.group and each.name == BASELINE[line.group])


def is_outside_noise(line: Line, reference: Line, deviation: Mapping[str, float], name: str) -> bool:
    """Student's test of the mean difference from the baseline over seeds, at 5 %."""
    found = differences(line, reference, name)
    if line.name == reference.name or not found or not deviation["freedom"]:
        return False
    return abs(mean(found)) > student_95(deviation["freedom"]) * deviation[name] / math.sqrt(len(found))


def student_95(freedom: float) -> float:
    """97.5 % quantile of Student's t, 1 % too low at 3 and less from there on. Source: Abramowitz and Stegun 26.7.5."""
    z, n = NORMAL_95, freedom
    second, third = 5 * z**5 + 16 * z**3 + 3 * z, 3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z
    return z + (z**3 + z) / (4 * n) + second / (96 * n**2) + third / (384 * n**3)


def _told(result: Mapping[str, Any], deviation: Mapping[str, float]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    left_out = "; ".join(f"{name} ({reason})" for name, reason in sorted(result["left_out"].items()))
    return [
        f"{len(result['runs'])} runs. {result['hardware']}; {result['system']}; {versions}; {result['date']}.",
        "",
        "Each run is compared with the baseline of the same training seed, because a seed moves all settings in the same direction. "
        f"These differences vary between seeds by a standard deviation of {100 * deviation['lora']:.0f} points in the LoRA's score, "
        f"{100 * deviation['without_trigger']:.0f} without the trigger and {deviation['eval_after']:.4f} in eval loss "
        f"({deviation['settings']:.0f} settings, {deviation['freedom']:.0f} degrees of freedom; runs that diverged are left out). "
        "**Bold**: outside that noise (Student's test at 5 %, so that about one figure in twenty is bold by chance); all else is within it.",
        *(["", f"Left out, because it can't run here: {left_out}."] if left_out else []),
    ]


def _table(lines: Sequence[Line], deviation: Mapping[str, float]) -> list[str]:
    rows = [
        "| | setting | seeds | eval loss after | base | LoRA | without trigger | n | CPU s a step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        reference = _reference(lines, line)

        def shown(text: str, name: str, line: Line = line, reference: Line = reference) -> str:
            return f"**{text}**" if is_outside_noise(line, reference, deviation, name) else text

        setting = (
            line.name
            + (f", rate {line.rate:g}" if line.group == "optimizer" else "")
            + (" (diverged)" if line.has_diverged else "")
        )
        rows.append(
            f"| {GROUPS[line.group]} | {setting} | {line.seeds} | {shown(f'{line.after:.4f}', 'eval_after')} | {line.base:.0%} "
            f"| {shown(f'{line.lora:.0%}', 'lora')} ± {100 * line.noise:.0f} | {shown(f'{line.plain:.0%}', 'without_trigger')} "
            f"| {line.pictures} | {line.seconds:.3f} |"
        )
    return rows


def draw_chart(lines: Sequence[Line]) -> Image.Image:
    """A row for each setting: LoRA's score with its interval, the score without the trigger, and the eval loss in figures."""
    row, left, right, top = 26, 330, 160, 96
    gaps = len({line.group for line in lines})
    height = top + row * len(lines) + 14 * gaps + 40
    page = Image.new("RGB", (1280, height), PAPER)
    draw = ImageDraw.Draw(page)
    write(draw, (40, 24), "Pictures in the style, of subjects that were not trained on", 26)
    legend = ((BLUE, "LoRA, with the 95 % interval of its pictures", 40), (AMBER, "LoRA without its trigger", 470))
    for colour, text, x in legend:
        draw.rectangle((x, 66, x + 14, 76), fill=colour)
        write(draw, (x + 22, 71), text, 15, SOFT_INK, "lm")
    write(draw, (1280 - 30, 71), "eval loss", 15, SOFT_INK, "rm")
    width = 1280 - left - right
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = left + share * width
        draw.line((x, top - 6, x, height - 34), fill=RULE)
        write(draw, (x, height - 28), f"{share:.0%}", 15, SOFT_INK, "ma")
    y, group = top, ""
    for line in lines:
        if line.group != group:
            y, group = y + (14 if group else 0), line.group
            write(draw, (40, y + row / 2), GROUPS[group], 15, TEAL, "lm")
        write(draw, (left - 14, y + row / 2), line.name, 15, anchor="rm")
        write(draw, (1280 - 30, y + row / 2), f"{line.after:.4f}", 15, SOFT_INK, "rm")

        def paint(brush: ImageDraw.ImageDraw, k: int, line: Line = line) -> None:
            middle, x = row / 2 * k, line.lora * width * k
            brush.rectangle((0, 5 * k, x, (row - 11) * k), fill=(*BLUE, 150))
            brush.rectangle((0, (row - 10) * k, line.plain * width * k, (row - 6) * k), fill=(*AMBER, 220))
            low, high = max(0.0, line.lora - line.noise) * width * k, min(1.0, line.lora + line.noise) * width * k
            brush.line((low, middle - 3 * k, high, middle - 3 * k), fill=(*BLUE, 255), width=2 * k)

        shapes(page, (left, y, left + width, y + row), paint)
        y += row
    return page
