"""The page of features: files, colours and similarities against closed forms; the page itself in a headless Chromium."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY
from PIL import Image
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetModel, SegformerImageProcessor, ViTConfig, ViTModel

from evaluation.encoders import build
from evaluation.explore import main, parse_explore
from evaluation.explore_features import (
    Cache,
    FrameFeatures,
    best_match,
    cell_at,
    floor_of,
    frame_features,
    heat_picture,
    list_media,
    pca_colours,
    principal_basis,
    read_clip,
    similarity,
)
from evaluation.explore_views import Explorer, short_name
from modeling_poodle import PoodleConfig, PoodleForSemanticSegmentation

HTML = "<b onclick=x>&"  # a name that would break a page that does not escape it


def write_video(path: Path, frames, rate: int = 10, **options) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "5", "threads": "1", "g": "7"})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for number, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def grey(value: int, size=(64, 96)) -> np.ndarray:
    return np.full((*size, 3), value, np.uint8)


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    """3 s; the frame at t seconds is grey of 40 + 60 t."""
    path = tmp_path_factory.mktemp("video") / "levels.mp4"
    write_video(path, [grey(40 + 6 * number) for number in range(30)])
    return path


# --- files ---


@pytest.mark.parametrize(
    "start, gap, count, times", [(0, 0.5, 3, (0, 0.5, 1)), (1.7, 0.3, 2, (1.7, 2)), (2.5, 0.4, 6, (2.5, 2.9))]
)
def test_frames_of_a_video_at_their_times(video, start, gap, count, times):
    clip = read_clip(str(video), start, gap, count, 512)
    assert clip.times == pytest.approx(times) and clip.duration == pytest.approx(3)
    for frame, moment in zip(clip.frames, times):
        assert frame.shape == (64, 96, 3)
        assert frame.mean() == pytest.approx(40 + 60 * moment, abs=3)


def test_pictures_and_videos_are_shrunk_and_upright(tmp_path, video):
    assert read_clip(str(video), 0, 1, 1, 48).frames[0].shape == (32, 48, 3)
    picture = np.zeros((40, 80, 3), np.uint8)
    picture[:, :40] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turned: its left is shown at the top
    Image.fromarray(picture).save(tmp_path / "phone.jpg", exif=exif)
    clip = read_clip(str(tmp_path / "phone.jpg"), 0, 0.5, 6, 40)
    (frame,) = clip.frames
    assert frame.shape == (40, 20, 3) and clip.duration == 0
    assert frame[:18].mean() > 250 and frame[22:].mean() < 5


def test_files_that_cannot_be_read_are_named(tmp_path, video):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "fake.png").write_text("hello")
    (tmp_path / "cut.mp4").write_bytes(video.read_bytes()[:900])
    # A playlist under a video's name must not make FFmpeg open the file that it names.
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{video}\n#EXT-X-ENDLIST\n")
    for name, reason in (
        ("notes.txt", r"expected \.jpg"),
        ("fake.png", ""),
        ("cut.mp4", "Invalid data"),
        ("list.mp4", "Invalid"),
    ):
        with pytest.raises(
            ValueError, match=rf"^{name} is no picture or video that can be read \(.*{reason}"
        ) as caught:
            read_clip(str(tmp_path / name), 0, 0.5, 2, 512)
        assert str(tmp_path) not in str(caught.value)
    with pytest.raises(ValueError, match=r"levels.mp4 .*it has no frame at 9.0 s"):
        read_clip(str(video), 9, 0.5, 2, 512)


def test_media_of_a_folder(tmp_path, video):
    for name in ("b.png", "a/c.JPG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(grey(0)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("")
    assert list_media(str(tmp_path)) == [("a/c.JPG", str(tmp_path / "a/c.JPG")), ("b.png", str(tmp_path / "b.png"))]
    assert list_media(str(video)) == [("levels.mp4", str(video))] and list_media(None) == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no picture or video below it, expected .jpg"):
        list_media(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="no such file or folder"):
        list_media(str(tmp_path / "gone"))


# --- features ---


def features_of(values: torch.Tensor, cell: int = 8) -> FrameFeatures:
    return FrameFeatures(F.normalize(values, dim=0), tuple(cell * side for side in values.shape[1:]))


def test_similarity_is_the_cosine():
    values = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0))
    features = features_of(values)
    row, column = cell_at(features, (41.0, 15.9))
    assert (
        (row, column) == (1, 5) and cell_at(features, (48.0, 32.0)) == (3, 5) and cell_at(features, (0, 0)) == (0, 0)
    )
    found = similarity(features, features.unit[:, row, column])
    for y in range(4):
        for x in range(6):
            assert found[y, x] == pytest.approx(
                float(F.cosine_similarity(values[:, y, x], values[:, 1, 5], dim=0)), abs=1e-6
            )
    assert best_match(found, features.extent) == (pytest.approx(1, abs=1e-6), (44.0, 12.0))


def test_cells_of_padded_pictures_stay_in_place(tmp_path):
    """A ViT of patch 16 pads 40x70 pixels to 48x80: 3x5 cells of 16 pixels, not of 70/5."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=80, patch_size=16
    )
    ViTModel(config).save_pretrained(tmp_path)
    features = frame_features(
        build(str(tmp_path), 1), np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8)
    )
    assert features.extent == (48, 80) and features.unit.shape == (16, 3, 5)
    torch.testing.assert_close(features.unit.norm(dim=0), torch.ones(3, 5))
    assert cell_at(features, (63.9, 39.9)) == (2, 3)  # 63.9 * 5 / 70 would be cell 4
    heat = heat_picture(grey(0, (40, 70)), torch.eye(5)[:3], 0.0, features.extent)
    assert heat.shape == (40, 70, 3) and heat[8, 8].sum() > heat[8, 40].sum()


def test_principal_components_are_those_of_the_exact_decomposition():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(40, 12, 20, generator=generator) + torch.randn(40, 3, generator=generator).mul(
        torch.tensor([6.0, 4.0, 2.5])
    ).matmul(torch.randn(3, 240, generator=generator)).view(40, 12, 20)
    features = features_of(values)
    basis = principal_basis(features)
    samples = features.unit.flatten(1).t()
    exact = torch.linalg.svd(samples - samples.mean(dim=0)).Vh[:3]
    torch.testing.assert_close((basis.axes.t() * exact).sum(dim=1).abs(), torch.ones(3), rtol=0, atol=1e-3)
    assert all(axis[axis.abs().argmax()] > 0 for axis in basis.axes.t())
    again = principal_basis(features)
    assert torch.equal(basis.axes, again.axes)
    # 2 % of the cells lie below no colour and 2 % above full colour.
    scaled = ((samples - basis.mean) @ basis.axes - basis.low) / (basis.high - basis.low)
    assert (
        ((scaled < 0).sum(dim=0) <= 5).all()
        and ((scaled > 1).sum(dim=0) <= 5).all()
        and (scaled.amax(dim=0) > 1).all()
    )


def test_colours_of_two_halves_and_of_nothing():
    values = torch.zeros(4, 4, 8)
    values[0, :, :4], values[1, :, 4:] = 1, 1
    features = features_of(values)
    basis = principal_basis(features)
    shown = pca_colours(features, basis, (32, 64))
    left, right = shown[:, :24], shown[:, 40:]
    assert set(np.unique(left[..., 0])) | set(np.unique(right[..., 0])) == {0, 255} and left[0, 0, 0] != right[0, 0, 0]
    assert (shown[..., 1:] == 128).all()  # nothing varies along the other axes
    # The other frame is seen through this one's basis: where it is like the left half, it has the left half's colour.
    other = features_of(values[:, :, :4].repeat(1, 1, 2))
    assert (pca_colours(other, basis, (32, 64)) == left[0, 0]).all()


def test_heat_is_dark_at_the_floor_and_bright_at_one():
    cosines = torch.tensor([[0.2, 0.2, 1.0, 1.0]]).repeat(4, 1)
    assert floor_of(cosines) == pytest.approx(0.2) and floor_of(torch.full((2, 2), 0.999)) == pytest.approx(0.9)
    heat = heat_picture(grey(100, (32, 32)), cosines, 0.2, (32, 32)).astype(int)
    dark, bright = heat[16, 2], heat[16, 30]
    assert dark.tolist() == [30, 30, 32] and (bright - dark > 100).all()  # 0.3 of the grey, and inferno's first colour


def test_cache_computes_once_and_forgets_what_was_used_longest_ago():
    cache, computed = Cache(limit=25), []

    def get(key):
        return cache(key, lambda: computed.append(key) or key.upper(), lambda value: 10)

    assert [get(key) for key in "abab"] == ["A", "B", "A", "B"] and computed == ["a", "b"]
    get("a")
    get("c")  # 30 bytes: b goes
    get("a")
    get("b")
    assert computed == ["a", "b", "c", "b"] and cache.size == 20
    started = threading.Barrier(4)

    def slow():
        started.wait()
        cache("slow", lambda: time.sleep(0.1) or computed.append("slow") or 1, lambda value: 1)

    threads = [threading.Thread(target=slow) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert computed.count("slow") == 1


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
    """A linear readout that finds its second class, of a nasty name, everywhere."""
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
    """A video whose coloured squares move, and a picture."""
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
    value, (x, y) = best_match(similarity(last, own.unit[:, row, column]), last.extent)
    assert 83 <= x <= 115 and 32 <= y <= 64 and f"+2.5 s <b>best {value:.2f}</b>" in panel.strip
    assert explorer.panel(models[0], path, clip, (0.15, 0.5), 1).strip.endswith("computing their features …</p>")
    still = explorer.clip(explorer.media[1][1], 0.0, 0.5)
    assert explorer.panel(models[0], explorer.media[1][1], still, (0.5, 0.5), 1).strip == ""
    shown = clip.frames[0].copy()
    assert np.array_equal(
        shown, read_clip(path, 0, 0.5, 1, 512).frames[0]
    )  # no mark is left on the frames that are kept
    # Features are computed once: another point needs no forward pass.
    explorer.encoders[models[0]].forward = None
    assert not np.array_equal(explorer.panel(models[0], path, clip, (0.9, 0.9), 6).heat, panel.heat)


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
        ([], "model must be at least one model"),
        (["--model", "a", "--model", "a"], "models that differ"),
        (["--model", "a", "--port", "70000"], "port must be from 1 to 65535, got 70000"),
        (["--model", "a", "--max_side", "8"], "max_side must be from 32 to 2048 pixels"),
        (["--model", "a", "--image", "x"], r"unknown recipe field 'image' \(did you mean 'images'\?\)"),
    ],
)
def test_wrong_flags(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_explore(flags)


def test_wrong_models_files_and_readouts_end_with_a_sentence(models, media, tmp_path):
    pytest.importorskip("gradio", reason="the page needs gradio: pip install 'modeling-poodle[explore]'")
    (tmp_path / "fake.png").write_text("hello")
    for flags, message in (
        (["--model", str(tmp_path)], "the folder holds no model"),
        (["--model", models[0], "--images", str(tmp_path / "gone")], "no such file or folder"),
        (["--model", models[0], "--images", str(tmp_path)], "fake.png is no picture or video"),
        (["--model", models[0], "--readout", models[0]], "readout .* cannot be loaded; expected the readout/ folder"),
        (["--model", models[0], "--features", "stage9"], "--features stage9"),
    ):
        with pytest.raises(ValueError, match=message):
            main(flags)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "evaluation.explore", "--model", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr.startswith("error: --model") and "Traceback" not in done.stderr


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
    needed = (folder / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("torch>=") for line in needed) and not any("extra" in line for line in needed)
    assert (folder / "app.py").read_bytes() == (REPOSITORY / "evaluation/explore.py").read_bytes()
    assert (folder / "images/still.png").is_file()
    with pytest.raises(ValueError, match="must be a new or an empty folder"):
        main(["--model", "org/poodle", "--space", str(folder)])
    # There it runs without flags and from its own files; offline, it gets as far as the model of the Hub.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "POODLE_TRACEBACK": "1"}
    done = subprocess.run(
        [sys.executable, "app.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and "--model org/poodle: no such model" in done.stderr
    assert str(folder / "evaluation") in done.stderr and str(REPOSITORY / "evaluation") not in done.stderr


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
    """Click at shares of an element's picture."""
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

    # Load: both models, the next frames, the readout; the point is the centre.
    page.wait_for_selector("#right-strip figure")
    assert page.locator("#left-strip figure").count() == page.locator("#right-strip figure").count() == 5
    assert page.inner_text("#left-title .here") == page.inner_text("#right-title .here") == "1.00"
    assert "a moving square.mp4 at 0.0 s of 3.0 s" in page.inner_text("#said")
    assert HTML in page.inner_text("#right-title") and page.inner_text("#legend").split("\n")[0].startswith(HTML)
    assert source(page, "left-heat") != source(page, "right-heat")

    # Click on the square: everything answers, and it is found where it has gone.
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
    # A model's own pictures can be clicked, too.
    was = source(page, "left-heat")
    click(page, "right-colours", 0.8, 0.9)
    changed(page, "left-heat", was)

    # Later in the video; then one model alone.
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

    # Uploads: what is no picture is said, and the page stays; a picture is shown without slider and next frames.
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
    assert "32x64 cells" in page.inner_text("#left-title")  # of the 256x512 pixels that max_side leaves, at stride 8

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
    # The strip is scrolled inside the page.
    assert page.evaluate("(s => s.scrollWidth > s.clientWidth)(document.querySelector('#left-strip div.strip'))")
    was = source(page, "left-heat")
    page.locator("#frame img").tap(position={"x": 40, "y": 60})
    changed(page, "left-heat", was)
    width = page.locator("#frame img").bounding_box()["width"]
    x, y = map(int, re.search(r"point (\d+), (\d+):", page.inner_text("#said")).groups())
    assert abs(x - 40 * 160 / width) <= 1 and abs(y - 60 * 160 / width) <= 1
    page.close()
