"""The colors of the page and of notes: texts and marks can be told from the backgrounds of ComfyUI's dark and light themes (WCAG 2.2, 1.4.3 and 1.4.11)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

STYLE = (Path(__file__).resolve().parents[1] / "js" / "style.css").read_text("utf-8")
# ComfyUI 0.33's palettes, read from its page: colors of texts (--input-text), the backgrounds of inputs, menus, PrimeVue's panels, nodes and fields of Nodes 2.0, and
# --p-primary-color. Solarized's own texts
# have a contrast of 4.9 on its menus, so that softer ones can't reach 4.5: they must keep three quarters of it.
THEMES = {
    "dark": ("#dddddd", ("#222222", "#171718", "#303030", "#18181b", "#262729", "#313235"), "#60a5fa"),
    "light": ("#222222", ("#c9c9c9", "#ffffff", "#eeeeee", "#e9e9e9"), "#3b82f6"),
    "arc": ("#dddddd", ("#2b2f38", "#242730", "#18181b", "#262729"), "#60a5fa"),
    "nord": ("#bcc2c8", ("#2e3440", "#161b22", "#18181b", "#262729"), "#60a5fa"),
    "github": ("#bcc2c8", ("#161b22", "#13171d", "#18181b", "#262729"), "#60a5fa"),
    "solarized": ("#93a1a1", ("#002b36", "#073642", "#18181b", "#262729"), "#60a5fa"),
}
TEXTS, MARKS = ("soft", "ink", "warn", "bad"), ("accent", "rate", "good", "held", "clip", "bad")
WORKFLOWS = Path(__file__).resolve().parents[1] / "workflows"
CODE = ("#007aff", "#60a5fa")
Color = tuple[float, ...]


def parse_hex(text: str) -> Color:
    digits = text.lstrip("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    return tuple(int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))


def color_of(name: str, ink: str, background: str, primary: str) -> Color:
    """The color of a variable --ct-NAME on a background, by the forms that style.css uses."""
    if name == "ink":
        return parse_hex(ink)
    value = re.search(rf"--ct-{name}: (.*);", STYLE)
    assert value, name
    mix = re.fullmatch(r"color-mix\(in srgb, (.+) (\d+)%, (.+)\)", value[1])
    assert mix, value[1]
    first, share, second = mix[1], int(mix[2]) / 100, mix[3]
    own = re.fullmatch(r"#[0-9a-f]+", first)
    one = parse_hex(primary if "--p-primary-color" in first else own[0] if own else ink)
    two = parse_hex(background) if second == "transparent" else parse_hex(ink)
    return tuple(share * a + (1 - share) * b for a, b in zip(one, two, strict=True))


def luminance(color: Color) -> float:
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in color]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: Color, two: Color) -> float:
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


def test_the_measure_is_wcags():
    assert contrast(parse_hex("#000"), parse_hex("#fff")) == pytest.approx(21)
    assert contrast(parse_hex("#777777"), parse_hex("#fff")) == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", THEMES)
def test_texts_and_marks_stand_out(theme):
    ink, backgrounds, primary = THEMES[theme]
    faults = []
    for background in backgrounds:
        most = contrast(parse_hex(ink), parse_hex(background))  # of the theme's own texts
        for names, least in ((TEXTS, 4.5), (MARKS, 3.0)):
            for name in names:
                found = contrast(color_of(name, ink, background, primary), parse_hex(background))
                if found < min(least, 0.75 * most):
                    faults.append(f"{name} on {background}: {found:.2f}")
    assert not faults


def test_what_has_the_focus_is_outlined():
    assert not re.search(r"outline: (none|0)", STYLE)
    assert re.search(r"summary\):focus-visible \{ outline: 2px solid", STYLE)


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.json")), ids=lambda path: path.stem)
def test_inline_code_in_a_note_can_be_read(path):
    """Nodes 2.0 of ComfyUI 0.33 draw it in CODE[0] on a fifth of CODE[1]. A note that has no color is brown."""
    text, blue = (parse_hex(color) for color in CODE)
    for node in json.loads(path.read_text("utf-8"))["nodes"]:
        if node["type"] in ("Note", "MarkdownNote"):
            note = parse_hex(node.get("bgcolor", "#653"))
            behind = tuple(0.2 * a + 0.8 * b for a, b in zip(blue, note, strict=True))
            assert "`" not in node["widgets_values"][0] or contrast(text, behind) >= 4.5
