"""How the pages look: a green of old bamboo on cool paper, no web fonts, one style sheet, one script."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import matplotlib
from fastapi import FastAPI, Request
from gradio.themes.utils import colors, sizes

from assistant.web.lean_gradio import make_lean

HERE = Path(__file__).parent
MAX_UPLOAD_BYTES = 1024 * 1024
"""No page asks for files; Gradio's upload route exists all the same."""
FONTS = ("Inter", "system-ui", "Hiragino Sans", "Noto Sans JP", "Yu Gothic UI", "Meiryo", "sans-serif")
"""Fonts that machines have; none is fetched, because the pages must work without the internet."""
MONO_FONTS = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
BAMBOO = colors.Color(
    name="oitake",
    c50="#eef7f4",
    c100="#d8ece5",
    c200="#b3dacd",
    c300="#86c2af",
    c400="#5fc4a9",
    c500="#2f8a73",
    c600="#1f6f5c",
    c700="#19594a",
    c800="#15463b",
    c900="#10352d",
    c950="#0b1f19",
)
PAPER = colors.Color(
    name="kami",
    c50="#f3f5f8",
    c100="#eaedf2",
    c200="#d5dae1",
    c300="#bfc6d0",
    c400="#8d97a4",
    c500="#5b6470",
    c600="#48505a",
    c700="#353c45",
    c800="#252b33",
    c900="#1c2127",
    c950="#12161a",
)

LOOK: dict[str, str] = {
    "body_background_fill": "*neutral_50",
    "body_background_fill_dark": "*neutral_950",
    "body_text_color": "#1f2328",
    "body_text_color_dark": "*neutral_100",
    "body_text_color_subdued": "*neutral_500",
    "body_text_color_subdued_dark": "*neutral_400",
    "background_fill_primary": "white",
    "background_fill_primary_dark": "*neutral_900",
    "background_fill_secondary": "*neutral_100",
    "background_fill_secondary_dark": "*neutral_800",
    "block_background_fill": "transparent",
    "block_background_fill_dark": "transparent",
    "block_border_width": "0px",
    "block_shadow": "none",
    "block_padding": "0px",
    "block_label_background_fill": "transparent",
    "block_title_text_weight": "500",
    "block_title_text_color": "*neutral_700",
    "block_title_text_color_dark": "*neutral_300",
    "border_color_primary": "*neutral_200",
    "border_color_primary_dark": "#2f3740",
    "input_background_fill": "white",
    "input_background_fill_dark": "*neutral_900",
    "input_border_width": "1px",
    "input_border_color": "*neutral_300",
    "input_border_color_dark": "#39424d",
    "input_border_color_focus": "*primary_500",
    "input_border_color_focus_dark": "*primary_400",
    "input_shadow_focus": "0 0 0 3px color-mix(in srgb, *primary_400 25%, transparent)",
    "button_primary_background_fill": "*primary_600",
    "button_primary_background_fill_dark": "*primary_500",
    "button_primary_background_fill_hover": "*primary_700",
    "button_primary_background_fill_hover_dark": "*primary_400",
    "button_primary_text_color": "white",
    "button_secondary_background_fill": "white",
    "button_secondary_background_fill_dark": "*neutral_800",
    "button_secondary_background_fill_hover": "*neutral_100",
    "button_secondary_background_fill_hover_dark": "#2f3740",
    "button_secondary_border_color": "*neutral_300",
    "button_secondary_border_color_dark": "#39424d",
    "button_border_width": "1px",
    "button_primary_border_color": "transparent",
    "panel_background_fill": "transparent",
    "panel_background_fill_dark": "transparent",
}
"""Gradio's names of what we set; names that start with * are colours of the two palettes."""


def theme() -> Any:
    """Return Kotae's theme for Gradio."""
    base = gr.themes.Base(
        primary_hue=BAMBOO,
        secondary_hue=BAMBOO,
        neutral_hue=PAPER,
        radius_size=sizes.radius_md,
        font=FONTS,
        font_mono=MONO_FONTS,
    )
    return base.set(**LOOK)


def mount(
    app: FastAPI, blocks: gr.Blocks, *, path: str, auth_dependency: Callable[[Request], Any]
) -> FastAPI:
    """Mount one of the apps with its look; `auth_dependency` returns the id of the person, or None."""
    # Gradio asks which back end it is at each event; where none was named, the first has to load all of pyplot.
    matplotlib.use("agg")
    with warnings.catch_warnings():
        # Gradio 6.31 warns that it turns server-side rendering off for several pages, although it is off.
        warnings.filterwarnings("ignore", message="SSR mode is not supported with multi-page apps")
        mounted: FastAPI = gr.mount_gradio_app(
            app,
            blocks,
            path=path,
            auth_dependency=auth_dependency,
            ssr_mode=False,
            run_history=False,  # else Gradio keeps chat text in the browser's localStorage
            footer_links=[],
            show_error=False,
            max_file_size=MAX_UPLOAD_BYTES,
            app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
            **page_look(),
        )
    make_lean(blocks)
    return mounted


def page_look() -> dict[str, Any]:
    """Return theme, style sheet and script; Gradio 6 takes them when an app is mounted, not when it is built."""
    return {
        "theme": theme(),
        "css": (HERE / "style.css").read_text(encoding="utf-8"),
        "head": f"<script>{(HERE / 'keys.js').read_text(encoding='utf-8')}</script>",
    }
