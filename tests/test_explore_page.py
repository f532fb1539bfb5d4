"""The page of features: its requests, its flags, the Space, and the page itself in a headless Chromium."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY
from PIL import Image
from test_explore import write_video
from transformers import ResNetConfig, ResNetModel, SegformerImageProcessor

from evaluation.explore import main, parse_explore
from evaluation.explore_features import (
    best_match,
    cell_at,
    floor_of,
    read_clip,
    similarity,
)
from evaluation.explore_views import Explorer, short_name
from modeling_poodle import PoodleConfig, PoodleForSemanticSegmentation

HTML = "<b onclick=x>&"  # this name would break a page that does not escape names


# --- what the page asks for ---


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    config = ResNetConfig(layer_type="basic", depths=[1, 1, 1, 1], hidden_sizes=[16, 16, 24, 32], embedding_size=16)
    for seed, name in enumerate(("first", HTML)):
        torch.manual_seed(seed)
        ResNetModel(config).save_pretrained(folder / name)
    return [str(folder / "first"), str(folder / HTML)]


@pytest.fixture(scope="module")
def readout(tmp_path_factory) -> str:
    """A linear readout that predicts its second class everywhere. The class has the name above."""
    folder = tmp_path_factory.mktemp("readout")
    encoder = ResNetConfig(layer_type="basic", depths=[1, 1, 1, 1], hidden_sizes=[16, 16, 24, 32], embedding_size=16)
    labels = {0: "road", 1: HTML, 2: "sky"}
    model = PoodleForSemanticSegmentation(PoodleConfig(backbone_config=encoder, num_decoder_blocks=0, id2label=labels))
    torch.nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data = torch.tensor([0.0, 1.0, 0.0])
    model.save_pretrained(folder)
    SegformerImageProcessor(do_resize=False).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """A folder with a video of a moving coloured square, and a picture."""
    folder, rng = tmp_path_factory.mktemp("media"), np.random.default_rng(0)
    ground = rng.integers(60, 120, (96, 160, 3), dtype=np.uint8)
    frames = []
    for number in range(30):
        frame = ground.copy()
        frame[32:64, 8 + 3 * number : 40 + 3 * number] = (220, 40, 40)
        frames.append(frame)
    write_video(folder / "a moving square.mp4", frames)
    Image.fromarray(frames[0]).save(folder / "still.png")
    return folder


def test_panels_are_those_of_the_features(models, media, readout):
    explorer = Explorer(models, str(media), readout, "stage2", 512)
    path = explorer.media[0][1]
    clip = explorer.clip(path, 0.0, 0.5)
    assert len(clip.frames) == 6 and clip.times[-1] == pytest.approx(2.5)
    panel = explorer.panel(models[0], path, clip, (0.15, 0.5), 6)
    assert panel.heat.shape == panel.colours.shape == (480, 800, 3) and panel.strip.count("<figure>") == 5
    own = explorer.features(models[0], path, clip.times[0], clip.frames[0])
    row, column = cell_at(own, (24, 48))
    cosines = similarity(own, own.unit[:, row, column])
    assert f"<b>{floor_of(cosines):.2f}</b>" in panel.title and "<b class='here'>1.00</b>" in panel.title
    assert "stage2, 16 channels, 20x12 cells" in panel.title
    # The square is found again in the last frame, 75 pixels to the right.
    last = explorer.features(models[0], path, clip.times[-1], clip.frames[-1])
    value, (x, y) = best_match(similarity(last, own.unit[:, row, column]), last.size)
    assert 83 <= x <= 115 and 32 <= y <= 64 and f"+2.5 s <b>best {value:.2f}</b>" in panel.strip
    assert explorer.panel(models[0], path, clip, (0.15, 0.5), 1).strip.endswith("computing their features …</p>")
    still = explorer.clip(explorer.media[1][1], 0.0, 0.5)
    assert explorer.panel(models[0], explorer.media[1][1], still, (0.5, 0.5), 1).strip == ""
    shown = clip.frames[0].copy()
    assert np.array_equal(shown, read_clip(path, 0, 0.5, 1, 512).frames[0])  # the cached frames stay without marks
    # Features are computed once. Another point needs no forward pass.
    explorer.encoders[models[0]].forward = None
    assert not np.array_equal(explorer.panel(models[0], path, clip, (0.9, 0.9), 6).heat, panel.heat)


def test_a_model_may_be_called_readout_too(readout, media, tmp_path, monkeypatch):
    """In the folder of an evaluation, `readout` is a model too. Its features were once mistaken for the readout's classes."""
    monkeypatch.chdir(shutil.copytree(readout, tmp_path / "readout").parent)
    explorer = Explorer(["readout"], str(media), "readout", None, 512)
    path = explorer.media[0][1]
    clip = explorer.clip(path, 0.0, 0.5)
    explorer.panel("readout", path, clip, (0.5, 0.5), 1)
    assert "100.0 %" in explorer.segmentation(path, clip)[1]


def test_an_untrained_twin_has_the_statistics_of_the_images(models, media):
    name = f"random:{models[0]}"
    explorer = Explorer([name], str(media), None, "stage1", 512)
    frames = [explorer.clip(path, 0.0, 0.5).frames[0] for _, path in explorer.media]
    encoder = explorer.encoders[name]
    embedder = encoder.model.poodle.encoder.embedder.embedder
    seen = [embedder.convolution(encoder.normalise(frame)) for frame in frames]
    mean = torch.stack([maps.mean(dim=(0, 2, 3)) for maps in seen]).mean(dim=0)
    torch.testing.assert_close(embedder.normalization.running_mean, mean, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="needs --images: its BatchNorm"):
        Explorer([name], None, None, None, 512)


def test_names_are_escaped(models, media, readout):
    explorer = Explorer(models, str(media), readout, None, 512)
    path = explorer.media[0][1]
    clip = explorer.clip(path, 0.0, 0.5)
    title = explorer.panel(models[1], path, clip, (0.5, 0.5), 1).title
    tinted, legend = explorer.segmentation(path, clip)
    for text in (title, legend):
        assert "&lt;b onclick=x&gt;&amp;" in text and "onclick=x>" not in text
    assert "100.0 %" in legend and legend.count("<li>") == 1 and tinted.shape == (96, 160, 3)
    assert short_name(models[0]).endswith("/first") and short_name(f"random:{models[0]}").startswith("random:")
    assert short_name("org/name") == "org/name"


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "model must be a list of one or more models"),
        (["--model", "a", "--model", "a"], "a list that names each model once"),
        (["--model", "a", "--port", "70000"], "port must be from 1 to 65535, got 70000"),
        (
            ["--model", "a", "--model", "random:a"],
            "images must be given for random:MODEL: its BatchNorm needs them, got None",
        ),
        (["--model", "a", "--max_side", "8"], "max_side must be from 32 to 2048 pixels"),
        (["--model", "a", "--image", "x"], r"unknown recipe field 'image' \(did you mean 'images'\?\)"),
    ],
)
def test_wrong_flags(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_explore(flags)


def test_wrong_models_files_and_readouts_end_with_a_sentence(models, media, tmp_path, as_script):
    pytest.importorskip("gradio", reason="the page needs gradio: pip install 'modeling-poodle[explore]'")
    (tmp_path / "fake.png").write_text("hello")
    for flags, message in (
        (["--model", str(tmp_path)], "the folder holds no model"),
        (["--model", models[0], "--images", str(tmp_path / "gone")], "no such file or folder"),
        (["--model", models[0], "--images", str(tmp_path)], "fake.png is no picture or video"),
        (
            ["--model", str(tmp_path), "--images", str(tmp_path)],
            "fake.png is no picture or video",
        ),  # checked before the models
        (["--model", models[0], "--readout", models[0]], "readout .* cannot be loaded; expected the readout/ folder"),
        (["--model", models[0], "--features", "stage9"], "--features stage9"),
    ):
        with pytest.raises(ValueError, match=message):
            main(flags)
    assert as_script("evaluation/explore.py", "--model", str(tmp_path)).startswith("error: --model")


def test_space_is_whole(models, media, tmp_path):
    pytest.importorskip("gradio", reason="the page needs gradio: pip install 'modeling-poodle[explore]'")
    folder = tmp_path / "space"
    with pytest.raises(ValueError, match="lies on this machine, where a Space cannot see it; publish it"):
        main(["--model", models[0], "--space", str(folder)])
    assert not folder.exists()
    main(
        [
            "--model",
            "org/poodle",
            "random:org/poodle",
            "--images",
            str(media),
            "--features",
            "stage3",
            "--space",
            str(folder),
        ]
    )
    head = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert head["sdk"] == "gradio" and head["app_file"] == "app.py" and head["models"] == ["org/poodle"]
    assert "\nFeatures of org/poodle, random:org/poodle, to be" in (folder / "README.md").read_text()
    needed = (folder / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("torch>=") for line in needed) and not any("extra" in line for line in needed)
    assert (folder / "app.py").read_bytes() == (REPOSITORY / "evaluation/explore.py").read_bytes()
    assert (folder / "images/still.png").is_file()
    with pytest.raises(ValueError, match="must be a new or an empty folder"):
        main(["--model", "org/poodle", "--space", str(folder)])
    # A Space runs without flags and from its own files. Offline, it fails only at the model from the Hub.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "POODLE_TRACEBACK": "1"}
    done = subprocess.run(
        [sys.executable, "app.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and "--model org/poodle: no such model" in done.stderr
    assert str(folder / "evaluation") in done.stderr and str(REPOSITORY / "evaluation") not in done.stderr


def test_a_space_without_gradio_is_refused_before_it_is_begun(tmp_path, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(
        ValueError, match=r"a Space names its version of gradio: pip install 'modeling-poodle\[explore\]'"
    ):
        main(["--model", "org/poodle", "--space", str(tmp_path / "space")])
    assert not (tmp_path / "space").exists()


# --- the page ---


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="the page's test needs playwright: pip install playwright"
    )
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("the page's test needs a Chromium (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(models, media, readout):
    pytest.importorskip("gradio", reason="the page needs gradio: pip install 'modeling-poodle[explore]'")
    from evaluation.explore_page import LAUNCH, build_page

    page = build_page(Explorer(models, str(media), readout, "stage2", 512))
    page.launch(prevent_thread_lock=True, quiet=True, **LAUNCH)
    yield page.local_url
    page.close()


def source(page, element: str) -> str:
    return page.get_attribute(f"#{element} img", "src")


def changed(page, element: str, old: str) -> None:
    page.wait_for_function(
        "([element, old]) => { const image = document.querySelector(`#${element} img`);"
        " return image && image.getAttribute('src') !== old }",
        arg=[element, old],
    )


def click(page, element: str, x: float, y: float) -> None:
    """Click on an element's picture; x and y are shares of its width and height."""
    picture = page.locator(f"#{element} img")
    picture.scroll_into_view_if_needed()
    box = picture.bounding_box()
    picture.click(position={"x": x * box["width"], "y": y * box["height"]})


def test_page_in_a_browser(browser, address, tmp_path):
    page, asked, wrong = browser.new_page(viewport={"width": 1280, "height": 900}), [], []
    page.set_default_timeout(60_000)
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(address, wait_until="domcontentloaded")

    # Once loaded, the page shows both models, the next frames and the readout. The point is the centre.
    page.wait_for_selector("#right-strip figure")
    assert page.locator("#left-strip figure").count() == page.locator("#right-strip figure").count() == 5
    assert page.inner_text("#left-title .here") == page.inner_text("#right-title .here") == "1.00"
    assert "a moving square.mp4 at 0.0 s of 3.0 s" in page.inner_text("#said")
    assert HTML in page.inner_text("#right-title") and page.inner_text("#legend").split("\n")[0].startswith(HTML)
    assert source(page, "left-heat") != source(page, "right-heat")

    # After a click on the square, all panels change and the square is found again in the next frames.
    old = {element: source(page, element) for element in ("frame", "left-heat", "right-heat")}
    strip = page.inner_html("#left-strip")
    click(page, "frame", 24 / 160, 48 / 96)
    for element, was in old.items():
        changed(page, element, was)
    page.wait_for_function("old => document.querySelector('#left-strip').innerHTML !== old", arg=strip)
    assert page.inner_text("#left-title .here") == "1.00"
    assert re.search(r"point (23|24|25), (47|48|49):", page.inner_text("#said"))
    best = [float(text) for text in re.findall(r"best (\d\.\d\d)", page.inner_text("#left-strip"))]
    assert len(best) == 5 and min(best) > 0.9
    # The pictures of a model can be clicked too.
    was = source(page, "left-heat")
    click(page, "right-colours", 0.8, 0.9)
    changed(page, "left-heat", was)

    # Move to a later frame, then show only one model.
    was = source(page, "frame")
    number = page.locator("#start input[type=number]")
    number.fill("1.5")
    number.press("Enter")
    number.blur()
    page.locator("#start input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    changed(page, "frame", was)
    page.locator("#right input").click()
    page.get_by_role("option", name="nothing").click()
    page.wait_for_selector("#right-heat", state="hidden")
    assert page.is_visible("#left-heat")

    # An upload that is no picture gives a message and changes nothing else. A picture has no slider and no next frames.
    (tmp_path / f"{HTML}.png").write_text("hello")
    was = source(page, "frame")
    page.set_input_files("input[type=file]", str(tmp_path / f"{HTML}.png"))
    page.wait_for_selector("#said .problem")
    assert "is no picture or video that can be read" in page.inner_text("#said") and source(page, "frame") == was
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 300, 3), dtype=np.uint8)).save(
        tmp_path / "mine.png"
    )
    page.set_input_files("input[type=file]", str(tmp_path / "mine.png"))
    changed(page, "frame", was)
    page.wait_for_selector("#start", state="hidden")
    assert (
        "mine.png, point 128, 256: answered in" in page.inner_text("#said")
        and page.inner_text("#left-strip").strip() == ""
    )
    assert "32x64 cells" in page.inner_text(
        "#left-title"
    )  # max_side reduces the picture to 256x512, and the stride is 8

    assert wrong == [] and all(url.startswith((address, "data:", "blob:")) for url in asked)
    page.close()


def test_page_on_a_phone(browser, address):
    page = browser.new_page(viewport={"width": 375, "height": 700}, has_touch=True, is_mobile=True)
    page.set_default_timeout(60_000)
    page.goto(address, wait_until="domcontentloaded")
    page.wait_for_selector("#right-strip figure")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    for element in ("frame", "left-heat", "right-heat", "segmentation"):
        box = page.locator(f"#{element} img").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 375 and box["width"] > 280
    # The strip scrolls inside the page.
    assert page.evaluate("(s => s.scrollWidth > s.clientWidth)(document.querySelector('#left-strip div.strip'))")
    was = source(page, "left-heat")
    page.locator("#frame img").tap(position={"x": 40, "y": 60})
    changed(page, "left-heat", was)
    width = page.locator("#frame img").bounding_box()["width"]
    x, y = map(int, re.search(r"point (\d+), (\d+):", page.inner_text("#said")).groups())
    assert abs(x - 40 * 160 / width) <= 1 and abs(y - 60 * 160 / width) <= 1
    page.close()
