"""The studio's page: a tab for each thing that the given runs can do. No font, script or request from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from diptych.pipelines.studio_actions import MOST_SAMPLES, Actions, PaintForm, said
from diptych.pipelines.studio_models import Engine, PainterFacts, StudioSpec
from diptych.trainers.decoding import STRATEGIES

_CSS = ".gradio-container { max-width: 76rem !important; margin: 0 auto; } footer { display: none !important; }"
_MOST_GUIDANCE = 15.0


def theme() -> Any:
    """Gradio's plain theme with the machine's own fonts: the default one asks a font server."""
    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def build(spec: StudioSpec, engine: Engine, folder: Path, concurrency: int = 1) -> Any:
    """The app as `gr.Blocks`; pictures go to `folder`. `concurrency`: calls that the engine serves at a time, others wait in the queue."""
    facts = engine.facts()
    actions = Actions(engine, facts, folder, spec.painter.name if spec.painter else "")
    with gr.Blocks(title="Diptych studio", analytics_enabled=False) as app:
        gr.Markdown("# Diptych studio\n" + _lead(spec))
        with gr.Tabs():
            if spec.writer:
                with gr.Tab("Keywords"):
                    _keywords(actions, facts)
            if facts is not None:
                for mode, title, fill in (
                    ("text", "Dream", _dream),
                    ("variation", "Variation", _variation),
                    ("inpaint", "Inpaint", _inpaint),
                ):
                    if mode in facts.modes:
                        with gr.Tab(title):
                            fill(actions, facts)
            if spec.captioner or spec.prompter:
                with gr.Tab("Prompt from picture"):
                    _prompt_from_picture(actions, spec)
            if facts is not None:
                with gr.Tab("Gallery") as tab:
                    _gallery(actions, tab)
    return app.queue(default_concurrency_limit=concurrency, api_open=False)


def launch(app: Any, host: str, port: int, users: list[tuple[str, str]], folder: Path, *, block: bool = True) -> str:
    """Serve `app`; returns its address. `port` of 0 takes the first free one from 7860 on."""
    _, address, _ = app.launch(
        server_name=host, server_port=port or None, auth=users or None, prevent_thread_lock=not block, quiet=True, show_error=True,
        allowed_paths=[str(folder)], footer_links=[], theme=theme(), css=_CSS, ssr_mode=False, share=False, inbrowser=False, run_history=False,
        max_file_size="20mb",
    )  # fmt: skip
    return address


def _lead(spec: StudioSpec) -> str:
    named = {
        "pictures": spec.painter.name if spec.painter else "",
        "prompts": spec.writer,
        "captions": spec.captioner,
        "nearest prompts": spec.prompter,
    }
    return " · ".join(f"{what}: `{Path(run).name}`" for what, run in named.items() if run)


def _settings(name: str, facts: PainterFacts, *, samples: int, strength: bool = False) -> dict[str, Any]:
    """The fields of `PaintForm`, laid out; by name."""
    fields: dict[str, Any] = {}
    with gr.Row():
        fields["samples"] = gr.Slider(1, MOST_SAMPLES, samples, step=1, label="Pictures of each")
        fields["seed"] = gr.Number(-1, precision=0, label="Seed (-1: a new one each time)", elem_id=f"{name}-seed")
    with gr.Accordion("More settings", open=False):
        with gr.Row():
            fields["steps"] = gr.Slider(0, 150, 0, step=1, label="Steps (0: the model's own)")
            fields["sampler"] = gr.Textbox("", label="Sampler (empty: the model's own)", elem_id=f"{name}-sampler")
        if strength:
            fields["strength"] = gr.Slider(0.05, 1, 0.8, step=0.05, label="Strength (1: nothing of the picture is left)")
    with gr.Row():
        for number, (stage, own) in enumerate(zip(facts.stages, facts.guidance, strict=True)):
            fields[f"guidance{number}"] = gr.Slider(
                min(0.5, own), max(_MOST_GUIDANCE, own), own, step=0.5, label=f"Guidance: {stage} (1: none)"
            )
    return fields


def _form(values: dict[Any, Any], fields: dict[str, Any]) -> PaintForm:
    found = {name: values[field] for name, field in fields.items()}
    guidance = tuple(float(value) for name, value in found.items() if name.startswith("guidance"))
    seed = -1 if found["seed"] is None else int(found["seed"])
    return PaintForm(
        int(found["samples"]), int(found["steps"]), found["sampler"].strip(), seed, guidance, float(found.get("strength", 0.8))
    )


def _buttons(name: str, label: str) -> tuple[Any, Any]:
    """Start and cancel, side by side."""
    with gr.Row():
        start = gr.Button(label, variant="primary", elem_id=f"{name}-start", scale=3)
        cancel = gr.Button("Cancel", variant="stop", elem_id=f"{name}-cancel", scale=1)
    return start, cancel


def _results(name: str, buttons: tuple[Any, Any], action: Any, inputs: set[Any]) -> None:
    """A start and a cancel button's work, with the pictures and a line of progress below."""
    status = gr.Markdown("", elem_id=f"{name}-status")
    pictures = gr.Gallery(
        label="Pictures", elem_id=f"{name}-pictures", columns=4, height="auto", object_fit="contain", buttons=["download", "fullscreen"]
    )
    start, cancel = buttons
    event = start.click(
        said(action), inputs, [pictures, status], concurrency_id="models", show_progress="minimal", show_progress_on=[pictures]
    )
    cancel.click(lambda: "Cancelled. What was made is kept, here and in the gallery.", None, status, cancels=[event], queue=False)


def _dream(actions: Actions, facts: PainterFacts) -> None:
    prompts = gr.Textbox(
        elem_id="dream-prompts",
        label="Prompts, one a line (at most 8)",
        lines=3,
        info="Example: a red circle above a blue star on a grey background",
    )
    fields = _settings("dream", facts, samples=2)
    buttons = _buttons("dream", "Dream")

    def dream(values: dict[Any, Any]) -> Iterator[Any]:
        yield from actions.dream(values[prompts], _form(values, fields))

    _results("dream", buttons, dream, {prompts, *fields.values()})


def _variation(actions: Actions, facts: PainterFacts) -> None:
    with gr.Row():
        picture = _picture("vary-picture", 280)
        with gr.Column():
            prompt = gr.Textbox(label="What it shows (may be empty)", lines=2, elem_id="vary-prompt")
            fields = _settings("vary", facts, samples=2, strength=True)
            buttons = _buttons("vary", "Vary")

    def vary(values: dict[Any, Any]) -> Iterator[Any]:
        yield from actions.vary(_bytes(values[picture]), values[prompt], _form(values, fields))

    _results("vary", buttons, vary, {picture, prompt, *fields.values()})


def _inpaint(actions: Actions, facts: PainterFacts) -> None:
    gr.Markdown("Draw over what is to be painted anew. Every other pixel stays as it is.")
    with gr.Row():
        drawn = gr.ImageEditor(
            type="numpy", image_mode="RGBA", elem_id="inpaint-drawn", label="Picture and mask", sources=["upload", "clipboard"], transforms=(), layers=False, height=420,
            brush=gr.Brush(default_size=24, colors=["#d03030"], color_mode="fixed"), eraser=gr.Eraser(default_size=24),
        )  # fmt: skip
        with gr.Column():
            prompt = gr.Textbox(label="What it shows", lines=2, elem_id="inpaint-prompt")
            fields = _settings("inpaint", facts, samples=2)
            buttons = _buttons("inpaint", "Paint")

    def inpaint(values: dict[Any, Any]) -> Iterator[Any]:
        yield from actions.inpaint(values[drawn], values[prompt], _form(values, fields))

    _results("inpaint", buttons, inpaint, {drawn, prompt, *fields.values()})


def _keywords(actions: Actions, facts: PainterFacts | None) -> None:
    prompt = gr.Textbox(label="Beginning", elem_id="complete-prompt", lines=2, info="Example: a castle on a hill,")
    with gr.Row():
        keywords = gr.Slider(1, 20, 8, step=1, label="Keywords in all")
        strategy = gr.Dropdown(list(STRATEGIES), value="top-k 50", label="Strategy")
        seed = gr.Number(-1, precision=0, label="Seed (-1: a new one each time)")
    start = gr.Button("Complete", variant="primary", elem_id="complete-start")
    text, status = (
        gr.Textbox(label="Completed prompt", elem_id="complete-text", lines=3, interactive=True, buttons=["copy"]),
        gr.Markdown("", elem_id="complete-status"),
    )
    start.click(said(actions.write), [prompt, keywords, strategy, seed], [text, status], concurrency_id="models")
    if facts is not None and "text" in facts.modes:
        gr.Markdown("### A picture of it")
        fields = _settings("keywords", facts, samples=1)
        buttons = _buttons("keywords", "Paint it")

        def painted(values: dict[Any, Any]) -> Iterator[Any]:
            yield from actions.dream(" ".join(values[text].split()), _form(values, fields))

        _results("keywords", buttons, painted, {text, *fields.values()})


def _prompt_from_picture(actions: Actions, spec: StudioSpec) -> None:
    with gr.Row():
        picture = _picture("read-picture", 320)
        with gr.Column():
            caption = gr.Textbox(
                label=f"Caption by {Path(spec.captioner).name}",
                lines=3,
                visible=bool(spec.captioner),
                buttons=["copy"],
                elem_id="read-caption",
            )
            count = gr.Slider(1, 20, 5, step=1, label="Nearest prompts", visible=bool(spec.prompter))
            rows = gr.Dataframe(
                headers=["prompt", "cosine"], label=f"Nearest prompts by {Path(spec.prompter).name}", visible=bool(spec.prompter),
                elem_id="read-prompts", wrap=True, column_widths=["75%", "25%"],
            )  # fmt: skip
            start = gr.Button("Read", variant="primary", elem_id="read-start")

    def read(path: str | None, most: int) -> Iterator[Any]:
        yield from actions.read(_bytes(path), most, bool(spec.captioner), bool(spec.prompter))

    start.click(said(read), [picture, count], [caption, rows], concurrency_id="models")


def _gallery(actions: Actions, tab: Any) -> None:
    pictures = gr.Gallery(
        label="Newest first", elem_id="gallery-pictures", columns=5, height="auto", object_fit="contain", buttons=["download", "fullscreen"]
    )
    with gr.Row():
        about = gr.JSON(label="Settings of the chosen picture", elem_id="gallery-about")
        with gr.Column():
            single = gr.DownloadButton("Download this picture", visible=False, elem_id="gallery-one")
            every = gr.DownloadButton("Download all as a zip", elem_id="gallery-all")
    tab.select(actions.shown, None, pictures, queue=False)

    def choose(event: gr.SelectData) -> tuple[dict[str, Any], Any]:
        path = event.value["image"]["path"]
        return actions.about(path), gr.DownloadButton("Download this picture", value=path, visible=True)

    pictures.select(choose, None, [about, single], queue=False)
    every.click(actions.archive, None, every, queue=False)


def _picture(identifier: str, height: int) -> Any:
    """A field for a picture, which hands on the file as it came: what is no picture is then told in our words, not by a traceback."""
    field = gr.Image(type="filepath", label="Picture", sources=["upload", "clipboard"], height=height, elem_id=identifier)
    field.preprocess = lambda payload: payload.path if payload is not None else None
    return field


def _bytes(path: str | None) -> bytes:
    return Path(path).read_bytes() if path else b""
