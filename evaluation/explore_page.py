"""The feature page in Gradio: layout, events and style. Its contents come from [`Explorer`]."""

import html
import os
import time
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

from evaluation.explore_features import enlarged, marked
from evaluation.explore_views import Explorer, Panel, place, short_name

CENTRE = (0.5, 0.5)
NOTHING = ""  # value of the second model if only one is shown
PICTURE = {"interactive": False, "format": "jpeg", "buttons": [], "elem_classes": "point", "min_width": 240}
SAID = "<p class='said'>{}</p>"
HEAD = "<header><h1>Look at features</h1><p>Click a point: what has similar features is bright.</p></header>"
GUIDE = (
    "<div class='guide'><p><b>Similarity</b>: cosine of each cell's features with those at the point.</p><p><b>Features in colour</b>: "
    "the first three principal components of the clicked frame. Each model has colours of its own; a colour means the same in all "
    "frames.</p><p><b>Next frames</b>: the ring is where a frame is most similar to the point.</p></div>"
)
CSS = """
.gradio-container {max-width: 1240px !important; margin: 0 auto !important}
.gradio-container > .main {padding: 12px 16px 32px !important}
.html-container {padding: 0 !important}
header h1 {font-size: 1.5rem; font-weight: 650; letter-spacing: -.01em; margin: 4px 0}
header p {color: var(--body-text-color-subdued); margin: 0}
.side {background: var(--background-fill-primary); border: 1px solid var(--border-color-primary); border-radius: 14px;
  padding: 14px !important; gap: 10px !important}
.side h2 {font-size: 1.05rem; font-weight: 600; margin: 0; overflow-wrap: anywhere}
.side p {margin: 2px 0; color: var(--body-text-color-subdued); font-size: .88rem}
.side .form, .side .block {border: none !important; box-shadow: none !important; background: none !important}
.side .form {gap: 14px !important}
.side .form > .block {padding: 0 0 6px !important}
.side input[role=combobox] {text-overflow: ellipsis; padding-right: 1.6em}
.point {overflow: visible !important; padding: 0 !important}
.point label[data-testid=block-label] {position: static !important; padding: 0 0 4px !important; border: none !important;
  box-shadow: none !important; background: none !important; color: var(--body-text-color-subdued) !important; font-weight: 500}
.point label[data-testid=block-label] svg, .point label[data-testid=block-label] span {display: none}
.point .icon-button-wrapper {display: none}
.point .image-container, .point .image-frame {height: auto !important; width: 100% !important}
.point img {width: 100% !important; height: auto !important; max-height: min(78vh, 760px); object-fit: contain; border-radius: 10px; cursor: crosshair}
.scale {display: flex; flex-wrap: wrap; gap: 6px; align-items: center; font-variant-numeric: tabular-nums}
.scale > i {width: 110px; height: 10px; border-radius: 5px;
  background: linear-gradient(90deg, #000004, #420a68, #932667, #dd513a, #fca50a, #fcffa4)}
.scale .here {color: var(--body-text-color)}
div.strip {display: flex; gap: 8px; overflow-x: auto; scroll-snap-type: x proximity; padding-bottom: 8px}
div.strip figure {flex: 0 0 max(150px, calc(20% - 7px)); margin: 0; scroll-snap-align: start}
div.strip img {width: 100%; display: block; border-radius: 8px; margin-bottom: 4px}
div.strip figcaption {font-size: .8rem; color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums}
.legend {list-style: none; padding: 0; margin: 0; display: flex; flex-wrap: wrap; gap: 6px 14px; font-size: .88rem}
.legend li {margin: 0}
.legend i {display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px}
.legend b {font-weight: 500; color: var(--body-text-color-subdued)}
.said {font-size: .88rem; color: var(--body-text-color-subdued); overflow-wrap: anywhere}
.problem {font-size: .92rem; padding: 10px 12px; border-radius: 10px; border: 1px solid #d9534f; background: #d9534f1f;
  overflow-wrap: anywhere}
.guide {border-top: 1px solid var(--border-color-primary); padding-top: 8px}
.guide b {font-weight: 600; color: var(--body-text-color)}
#segmentation {flex: 0 1 620px}
@media (max-width: 640px) {.guide {display: none}}
footer {display: none !important}
"""
# Fonts of the reader's machine, so that none are fetched.
THEME = gr.themes.Soft(
    primary_hue="teal", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(
    block_title_background_fill="none",
    block_title_padding="0",
    block_title_text_color="*body_text_color_subdued",
    block_title_text_weight="500",
    input_border_width="1px",
    input_shadow="none",
    button_secondary_border_color="*border_color_primary",
    button_border_width="1px",
    button_secondary_shadow="none",
)
LAUNCH = {"share": False, "ssr_mode": False, "max_file_size": "200mb", "css": CSS, "theme": THEME}


def open_page(explorer: Explorer, port: int | None) -> None:
    """
    Serve the page until the process is interrupted: on 127.0.0.1, or on GRADIO_SERVER_NAME, which a Space sets.

    Raises:
        ValueError: the port cannot be opened.
    """
    try:
        build_page(explorer).launch(server_port=port, **LAUNCH)
    except OSError as error:
        raise ValueError(f"port {port or '7860 and above'}: the page cannot be opened there ({error})") from error


def build_page(explorer: Explorer) -> gr.Blocks:
    """Build the page. Most events are answered first for the clicked frame alone, then with the video's next frames too."""
    names = list(explorer.encoders)
    choices = [(short_name(name), name) for name in names]
    with gr.Blocks(title="Look at features", analytics_enabled=False) as page:
        # The file, and the point as shares (x, y) of the picture's size, so that it keeps its place on another picture.
        path, point = gr.State(explorer.media[0][1] if explorer.media else None), gr.State(CENTRE)
        gr.HTML(HEAD)
        with gr.Row():
            with gr.Column(scale=2, min_width=280, elem_classes="side"):
                picked = gr.Dropdown(
                    explorer.media,
                    value=path.value,
                    label="Picture or video",
                    visible=bool(explorer.media),
                    elem_id="picked",
                )
                upload = gr.UploadButton("Upload a picture or a video", size="md", elem_id="upload")
                with gr.Row(visible=len(names) > 1):
                    left = gr.Dropdown(choices, value=names[0], label="Model", min_width=120, elem_id="left")
                    others = [("nothing", NOTHING), *choices]
                    second = names[1] if len(names) > 1 else NOTHING
                    right = gr.Dropdown(others, value=second, label="Compared with", min_width=120, elem_id="right")
                said = gr.HTML(elem_id="said")
                gr.HTML(GUIDE)
            with gr.Column(scale=3, min_width=280, elem_classes="side"):
                frame = gr.Image(label="Click a point", elem_id="frame", **PICTURE)
                with gr.Row():
                    start = gr.Slider(0, 1, 0, step=0.1, label="Second of the video", visible=False, elem_id="start")
                    gap = gr.Slider(0.1, 2, 0.5, step=0.1, label="Step, seconds", visible=False)
        with gr.Row():
            panels = [PanelParts(side) for side in ("left", "right")[: min(len(names), 2)]]
        with gr.Column(elem_classes="side", visible=False) as classes:
            gr.HTML("<h2>Segmentation by the readout</h2>")
            with gr.Row():
                segmentation = gr.Image(show_label=False, elem_id="segmentation", **PICTURE)
                legend = gr.HTML(elem_id="legend", min_width=240)

        shown = [said, frame, *(part for panel in panels for part in panel.outputs), classes, segmentation, legend]

        def answer(path, point, start, gap, left, right, at_once=False):
            """Yield values for `shown`: of the clicked frame, then of all frames (`at_once`: only the latter). An error changes only `said`."""
            began = time.perf_counter()
            if path is None:
                yield [SAID.format("Upload a picture or a video to begin."), *[gr.skip()] * (len(shown) - 1)]
                return
            try:
                clip = explorer.clip(path, start, gap)
                wanted = [left] if right in (NOTHING, left) else [left, right]
                for count in dict.fromkeys((len(clip.frames) if at_once else 1, len(clip.frames))):
                    values = []
                    for index in range(len(panels)):
                        hidden = index >= len(wanted)
                        panel = None if hidden else explorer.panel(wanted[index], path, clip, point, count)
                        values += panels[index].values(panel)
                    tinted, items = explorer.segmentation(path, clip) if explorer.readout else (None, "")
                    values += [gr.update(visible=explorer.readout is not None), tinted, items]
                    when = f" at {clip.times[0]:.1f} s of {clip.duration:.1f} s" if clip.duration else ""
                    x, y = (int(side) for side in place(clip.frames[0], point))
                    took = time.perf_counter() - began
                    text = f"{html.escape(Path(path).name)}{when}, point {x}, {y}: answered in {took:.2f} s"
                    picture = enlarged(clip.frames[0])
                    yield [SAID.format(text), marked(picture, place(picture, point)), *values]
            except ValueError as error:
                yield [problem(error), *[gr.skip()] * (len(shown) - 1)]

        def opened(new, gap, left, right):
            """Yield path, point and sliders for a picked or uploaded file, then values for `shown`. A bad file only changes the message."""
            try:
                duration = explorer.clip(new, 0.0, gap).duration
            except ValueError as error:
                yield [*[gr.skip()] * 4, problem(error), *[gr.skip()] * (len(shown) - 1)]
                return
            seconds = gr.update(visible=duration > 0, value=0, maximum=max(round(duration, 1), 0.1))
            for values in answer(new, CENTRE, 0.0, gap, left, right):
                yield [new, CENTRE, seconds, gr.update(visible=duration > 0), *values]

        def clicked(path, start, gap, left, right, event: gr.SelectData):
            height, width = enlarged(explorer.clip(path, start, gap).frames[0]).shape[:2]
            share = (event.index[0] + 0.5) / width, (event.index[1] + 0.5) / height
            for values in answer(path, share, start, gap, left, right, at_once=True):
                yield [share, *values]

        # Events run one at a time, in the order of the clicks, so that the answer to the last one stays on the page.
        quiet = {
            "show_progress": "hidden",
            "api_visibility": "private",
            "concurrency_id": "all",
            "concurrency_limit": 1,
        }
        for trigger in (start.release, gap.release, left.input, right.input):
            trigger(answer, [path, point, start, gap, left, right], shown, **quiet)
        for picture in (frame, *(part for panel in panels for part in (panel.heat, panel.colours))):
            picture.select(clicked, [path, start, gap, left, right], [point, *shown], **quiet)
        for trigger, source in ((picked.input, picked), (upload.upload, upload)):
            trigger(opened, [source, gap, left, right], [path, point, start, gap, *shown], **quiet)
        if explorer.media:
            page.load(opened, [picked, gap, left, right], [path, point, start, gap, *shown], **quiet)
        else:
            page.load(answer, [path, point, start, gap, left, right], shown, **quiet)
    return page


class PanelParts:
    """The column of a model: title, similarity, colours, and the strip of next frames."""

    def __init__(self, side: str):
        with gr.Column(min_width=280, elem_classes="side") as self.column:
            self.title = gr.HTML(elem_id=f"{side}-title")
            with gr.Row():
                self.heat = gr.Image(label="Similarity", elem_id=f"{side}-heat", **PICTURE)
                self.colours = gr.Image(label="Features in colour", elem_id=f"{side}-colours", **PICTURE)
            self.strip = gr.HTML(elem_id=f"{side}-strip")
        self.outputs = (self.column, self.title, self.heat, self.colours, self.strip)

    def values(self, panel: Panel | None) -> list:
        """Return values for `outputs`; without a panel the column is hidden."""
        if panel is None:
            return [gr.update(visible=False), *[gr.skip()] * 4]
        return [gr.update(visible=True), panel.title, panel.heat, panel.colours, panel.strip]


def problem(error: Exception) -> str:
    return f"<p class='problem' role='alert'>{html.escape(str(error))}</p>"
