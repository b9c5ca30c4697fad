"""The elements of the page, made with Gradio."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from srde_ds.inference.generate import context_length
from srde_ds.inference.page.html import legend
from srde_ds.inference.page.style import ARROW_KEYS
from srde_ds.inference.page.visit import ChatPage, Settings, Visit
from srde_ds.pages.theme import DARK, LIGHT
from srde_ds.utils.escape import html, one_line

CAPTION = (
    "A token has the colour of the expert with the largest weight. Point at it, tap it, or go to it with the tab and "
    "arrow keys to see all weights."
)
ROUTER = -1
FONTS = ("system-ui", "sans-serif")  # the reader's own, so that none is downloaded
MONOSPACE = ("ui-monospace", "monospace")


def chat_theme() -> gr.themes.Base:
    """Gradio's plain theme in the colours of our pages."""
    places = {
        "background": [
            "button_primary_text_color",
            "body_background_fill",
            "background_fill_primary",
            "block_background_fill",
        ],
        "surface": [
            "background_fill_secondary",
            "input_background_fill",
            "button_secondary_background_fill",
            "checkbox_label_background_fill",
        ],
        "text": ["body_text_color", "block_title_text_color", "block_label_text_color", "button_secondary_text_color"],
        "muted": ["body_text_color_subdued", "block_info_text_color", "input_placeholder_color"],
        "grid": ["border_color_primary", "block_border_color", "input_border_color", "button_secondary_border_color"],
        "accent": ["slider_color", "checkbox_background_color_selected", "button_primary_background_fill"],
    }
    colors = {
        f"{place}{suffix}": theme[name]
        for suffix, theme in (("", LIGHT), ("_dark", DARK))
        for name, everywhere in places.items()
        for place in everywhere
    }
    return gr.themes.Base(font=FONTS, font_mono=MONOSPACE).set(**colors)


def chat_blocks(page: ChatPage, *, title: str) -> gr.Blocks:
    """The page; `title` names the model that answers."""
    names, sampling = page.names, page.sampling
    with gr.Blocks(title="srde-ds chat", analytics_enabled=False) as blocks:
        visit = gr.State()
        gr.HTML(f"<h1>{html(one_line(title))}</h1><p>{CAPTION}</p>", elem_classes="heading")
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                gr.HTML(legend(names))
                with gr.Column(elem_id="conversation"), gr.Column():
                    past = gr.HTML(js_on_load=ARROW_KEYS)
                    latest = gr.HTML(page.shown(page.visit()).latest, js_on_load=ARROW_KEYS)
                message = gr.Textbox(
                    label="Message",
                    placeholder="Enter sends, Shift+Enter begins a line",
                    lines=1,
                    max_lines=8,
                    autofocus=True,
                )
                with gr.Row(elem_classes="actions"):
                    send = gr.Button("Send", variant="primary", min_width=120)
                    stop = gr.Button("Stop", min_width=120)
                    restart = gr.Button("New chat", min_width=120)
                    with gr.Column(min_width=120):
                        export = gr.HTML()
            with gr.Column(scale=1, min_width=260):
                numbered = [(one_line(name), number) for number, name in enumerate(names)]
                experts = gr.CheckboxGroup(numbered, value=list(range(len(names))), label="Experts switched on")
                pinned = gr.Dropdown(
                    [("none: the router chooses", ROUTER), *numbered],
                    value=ROUTER,
                    label="Pin an expert",
                    info="Every token uses only this expert.",
                )
                beside = gr.Checkbox(True, label="Show the base's answer beside")
                layers = gr.Dropdown(
                    [(f"layer {number}", number) for number in range(len(page.model.layers))],
                    value=[],
                    multiselect=True,
                    label="Layers shown",
                    info="The weights are their mean. None chosen: all layers.",
                )
                temperature = gr.Slider(
                    0.0,
                    max(2.0, sampling.temperature),
                    sampling.temperature,
                    step=0.05,
                    label="Temperature",
                    info="0 takes the likeliest token.",
                )
                top_p = gr.Slider(min(0.05, sampling.top_p), 1.0, sampling.top_p, step=0.05, label="Top p")
                longest = gr.Slider(
                    1, context_length(page.model), sampling.max_new_tokens, step=1, label="Longest answer"
                )
                seed = gr.Number(
                    page.seed, precision=0, minimum=0, label="Seed", info="Empty: another answer each time."
                )

        def ask(values: dict[Any, Any]) -> Iterator[dict[Any, Any]]:
            now: Visit = values[visit] or page.visit()
            settings = Settings(
                values[experts],
                None if values[pinned] == ROUTER else values[pinned],
                values[beside],
                values[temperature],
                values[top_p],
                values[longest],
                values[seed],
            )
            once = {visit: now, message: ""}  # the next message may be written meanwhile
            for shown in page.ask(now, values[message], settings):
                yield once | dict(zip(parts, shown, strict=True))
                once = {}

        def choose_layers(now: Visit | None, chosen: list[int]) -> tuple[Any, ...]:
            now = now or page.visit()
            return now, *page.choose_layers(now, chosen)

        def show(now: Visit | None) -> tuple[Any, ...]:
            return tuple(page.shown(now or page.visit()))

        def stop_answer(now: Visit | None) -> tuple[Any, ...]:
            return tuple(page.stop(now or page.visit()))

        def begin_again(chosen: list[int]) -> tuple[Any, ...]:
            return choose_layers(None, chosen)

        parts = [past, latest, export]
        settings_elements = {experts, pinned, beside, temperature, top_p, longest, seed}
        asked = gr.on(
            [message.submit, send.click],
            ask,
            {visit, message} | settings_elements,
            [visit, message, *parts],
            trigger_mode="once",
            concurrency_limit=1,
            concurrency_id="model",
            show_progress="minimal",
            show_progress_on=[latest],
        )
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
        # A stopped answer may still send updates, which may come late.
        asked.then(show, visit, parts, **quick)
        stop.click(stop_answer, visit, parts, cancels=[asked], **quick)
        restart.click(begin_again, layers, [visit, *parts], cancels=[asked], **quick)
        layers.change(choose_layers, [visit, layers], [visit, *parts], **quick)
    return blocks.queue(api_open=False)
