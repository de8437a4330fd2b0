"""Colours and fonts: Gradio's own bundled ones, so that nothing is fetched."""

from __future__ import annotations

import gradio as gr

from gui.html import ASSETS

# The page's language decides Gradio's own words too (it reads navigator.language); a page of a
# fixed language also tells screen readers and hyphenation.
HEAD = (ASSETS / "head.html").read_text("utf-8")

ACCENT = gr.themes.Color(
    name="ember", c50="#fff4ef", c100="#ffe4d9", c200="#ffc7b2", c300="#ffa182", c400="#f87850",
    c500="#e2573b", c600="#c2412a", c700="#a03322", c800="#812b20", c900="#6b281f", c950="#3a120d")
FONTS = ("system-ui", "-apple-system", "Segoe UI", "PingFang SC", "Microsoft YaHei",
         "Noto Sans CJK SC", "Noto Sans", "sans-serif")


def theme() -> gr.themes.Base:
    return gr.themes.Base(
        primary_hue=ACCENT, secondary_hue=gr.themes.colors.slate,
        neutral_hue=gr.themes.colors.zinc, spacing_size="sm", radius_size="md", text_size="md",
        font=list(FONTS), font_mono=["ui-monospace", "Consolas", "Menlo", "monospace"],
    ).set(
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_700",
        button_primary_text_color="white", body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950", block_background_fill="white",
        block_background_fill_dark="*neutral_900", block_label_text_weight="500")
