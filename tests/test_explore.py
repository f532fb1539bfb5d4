"""The page of features: the frames of files, and colours and similarities compared with closed forms."""

import json
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from forked_scripts import forked
from labelled_shapes import RESNET
from PIL import Image
from torch.nn import functional as F
from transformers import SegformerImageProcessor, ViTConfig, ViTModel

from evaluation.encoders import Encoder, build
from evaluation.explore_features import (
    MAX_PIXELS,
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
from evaluation.explore_views import Readout
from evaluation.labelled_images import Example, LabelledImages
from evaluation.readouts import UperNetReadout
from evaluation.recipe import EvaluationRecipe
from modeling_poodle import PoodleConfig, PoodleForSemanticSegmentation

REPOSITORY = Path(__file__).parent.parent


def write_video(path: Path, frames, rate: int = 10, keyframes: int = 7, **options) -> None:
    """Write `frames` as a video. The options are those of the container."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "5", "threads": "1", "g": str(keyframes)})
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
    """A video of 3 s. The frame at t seconds is grey with the value 40 + 60 t."""
    path = tmp_path_factory.mktemp("video") / "levels.mp4"
    write_video(path, [grey(40 + 6 * number) for number in range(30)])
    return path


# --- files ---


@pytest.mark.parametrize(
    "start, gap, count, times",
    [(0, 0.5, 3, (0, 0.5, 1)), (1.7, 0.3, 2, (1.7, 2)), (2.5, 0.4, 6, (2.5, 2.9)), (3, 0.4, 6, (2.9,))],
)
def test_frames_of_a_video_at_their_times(video, start, gap, count, times):
    clip = read_clip(str(video), start, gap, count, 512)
    assert clip.times == pytest.approx(times) and clip.duration == pytest.approx(3)
    for frame, moment in zip(clip.frames, times):
        assert frame.shape == (64, 96, 3)
        assert frame.mean() == pytest.approx(40 + 60 * moment, abs=3)


@pytest.mark.parametrize("keyframes", [7, 100])
def test_frames_of_mpeg_ts_at_their_times(tmp_path, keyframes):
    """
    In MPEG-TS, FFmpeg can only seek by time.

    Decoding used to start at the next keyframe, up to a second late. A recording with a single keyframe had no frame at all.
    """
    write_video(tmp_path / "camera.ts", [grey(40 + 6 * number) for number in range(30)], keyframes=keyframes)
    for start in (0.1, 0.5, 1.3, 2.1, 2.9):
        clip = read_clip(str(tmp_path / "camera.ts"), start, 0.1, 1, 512)
        assert clip.times == pytest.approx((start,)) and clip.frames[0].mean() == pytest.approx(40 + 60 * start, abs=3)


def test_a_recording_that_does_not_say_how_long_it_is_has_a_length(tmp_path):
    """Browsers write such recordings. The length 0 would mean a picture, which has no slider and no next frames."""
    write_video(tmp_path / "live.mkv", [grey(40 + 6 * number) for number in range(30)], live="1")
    with av.open(str(tmp_path / "live.mkv")) as container:
        assert container.duration is None and container.streams.video[0].duration is None
    for start, times in ((0, (0, 0.5)), (1.2, (1.2, 1.7)), (3, (2.9,))):
        clip = read_clip(str(tmp_path / "live.mkv"), start, 0.5, 2, 512)
        assert clip.times == pytest.approx(times) and clip.duration == pytest.approx(3, abs=0.01)


def test_closing_a_video_does_not_wait_for_ever(tmp_path):
    """Frame threads that still decode would block it within a few readings. A process of its own can be ended if it hangs."""
    y, x = np.mgrid[:240, :320]
    frames = [np.stack([x + 3 * number, 2 * y + number, x + y], axis=-1).astype(np.uint8) for number in range(12)]
    write_video(tmp_path / "a.mp4", frames)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; from evaluation.explore_features import read_clip\nfor _ in range(30): read_clip(sys.argv[1], 0, 0.1, 1, 64)"
    )
    assert forked(script, tmp_path / "a.mp4", timeout=120, PYTHONPATH=str(REPOSITORY)).returncode == 0


def test_pictures_and_videos_are_shrunk_and_upright(tmp_path, video):
    assert read_clip(str(video), 0, 1, 1, 48).frames[0].shape == (32, 48, 3)
    picture = np.zeros((40, 80, 3), np.uint8)
    picture[:, :40] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated: the left side is shown at the top
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


def test_frames_beyond_the_limit_are_not_decoded(tmp_path):
    """Uploads to a Space can come from anybody. The limit is the same as for training videos."""
    beyond = (MAX_PIXELS // 8192 + 16) // 16 * 16  # one row of macroblocks too many
    write_video(tmp_path / "large.mp4", [np.zeros((beyond, 8192, 3), np.uint8)])
    with pytest.raises(ValueError, match=r"^large.mp4 is no picture or video that can be read"):
        read_clip(str(tmp_path / "large.mp4"), 0, 0.5, 1, 512)


def test_media_of_a_folder(tmp_path, video):
    for name in ("b.png", "a/c.JPG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(grey(0)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("")
    assert list_media(str(tmp_path)) == [("a/c.JPG", str(tmp_path / "a/c.JPG")), ("b.png", str(tmp_path / "b.png"))]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(tmp_path / "a")
    linked = [("link/c.JPG", str(tmp_path / "elsewhere/link/c.JPG"))]
    assert list_media(str(tmp_path / "elsewhere")) == linked
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
    assert best_match(found, features.size) == (pytest.approx(1, abs=1e-6), (44.0, 12.0))


def test_cells_of_pictures_off_the_patch_cover_the_picture(tmp_path):
    """A ViT with patches of 16 reads 40x70 pixels as 48x80. This gives 3x5 cells, each of 40/3 x 14 pixels of the picture."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=80, patch_size=16
    )
    ViTModel(config).save_pretrained(tmp_path)
    features = frame_features(
        build(str(tmp_path), 1), np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8)
    )
    assert features.size == (40, 70) and features.unit.shape == (16, 3, 5)
    torch.testing.assert_close(features.unit.norm(dim=0), torch.ones(3, 5))
    assert cell_at(features, (55.9, 26.6)) == (1, 3) and cell_at(features, (56.1, 26.7)) == (2, 4)
    assert best_match(torch.eye(5)[:3], features.size)[1] == (7.0, pytest.approx(20 / 3))
    heat = heat_picture(grey(0, (40, 70)), torch.eye(5)[:3], 0.0)
    assert heat.shape == (40, 70, 3) and heat[8, 8].sum() > heat[8, 40].sum()


@pytest.mark.parametrize("blocks, beside", [(1, None), (0, "whole image"), (0, "sliding window of 64")])
def test_a_readout_of_a_vit_is_read_as_it_was_measured(tmp_path, blocks, beside):
    """The whole image for a ViT that PooDLe pretrained on its crops; windows for another ViT, whose position table has one size."""
    torch.manual_seed(0)
    vit = ViTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=64)
    config = PoodleConfig(backbone_config=vit.to_dict(), num_decoder_blocks=blocks, num_labels=3)
    PoodleForSemanticSegmentation(config).save_pretrained(tmp_path / "readout")
    SegformerImageProcessor(do_resize=False).save_pretrained(tmp_path / "readout")
    if beside is not None:
        (tmp_path / "evaluation.json").write_text(json.dumps({"inference": beside}))
    encoder = Readout(str(tmp_path / "readout"), torch.device("cpu")).encoder
    assert encoder.inference.startswith(beside or "whole image")


def test_a_readout_of_a_network_of_one_image_size_is_shown_by_windows(tmp_path):
    hiera = {"model_type": "hiera", "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "image_size": [64, 64]}
    config = PoodleConfig(backbone_config=hiera, num_decoder_blocks=0, num_labels=3)
    PoodleForSemanticSegmentation(config).save_pretrained(tmp_path)
    SegformerImageProcessor(do_resize=False).save_pretrained(tmp_path)
    assert Readout(str(tmp_path), torch.device("cpu")).predict(np.zeros((70, 100, 3), np.uint8)).shape == (70, 100)


def test_upernet_is_shown_as_it_was_measured(tmp_path):
    torch.manual_seed(0)
    config = PoodleConfig(backbone_config={"model_type": "resnet", **RESNET}, num_decoder_blocks=0)
    encoder = Encoder("x", PoodleForSemanticSegmentation(config))
    image = np.random.default_rng(0).integers(0, 255, (61, 100, 3), dtype=np.uint8)
    labelled = Example("a", lambda: image, lambda: image[..., 0] % 3)
    data = LabelledImages("x", ("a", "b", "c"), (labelled,), (labelled,))
    measured = UperNetReadout(encoder, data, EvaluationRecipe(model=["x"], readout="upernet", crop_size=[64, 64]))
    measured.save(tmp_path)
    truth = measured.eval().predict(image)
    assert len(np.unique(truth)) > 1
    assert np.array_equal(Readout(str(tmp_path), torch.device("cpu")).predict(image), truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_readout_in_half_precision_is_shown(tmp_path, dtype):
    config = PoodleConfig(backbone_config={"model_type": "resnet", **RESNET}, num_decoder_blocks=0, num_labels=3)
    PoodleForSemanticSegmentation(config).to(dtype).save_pretrained(tmp_path)
    SegformerImageProcessor(do_resize=False).save_pretrained(tmp_path)
    assert Readout(str(tmp_path), torch.device("cpu")).predict(grey(9)).shape == (64, 96)


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
    # The colour range leaves out 2 % of the cells at either end.
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
    shown = pca_colours(features, basis)
    left, right = shown[:, :24], shown[:, 40:]
    assert set(np.unique(left[..., 0])) | set(np.unique(right[..., 0])) == {0, 255} and left[0, 0, 0] != right[0, 0, 0]
    assert (shown[..., 1:] == 128).all()  # the features vary along the first axis only
    # The other frame is shown in the basis of this one. Features like those of the left half have its colour.
    other = features_of(values[:, :, :4].repeat(1, 1, 2))
    assert (pca_colours(other, basis) == left[0, 0]).all()


def test_heat_is_dark_at_the_floor_and_bright_at_one():
    cosines = torch.tensor([[0.2, 0.2, 1.0, 1.0]]).repeat(4, 1)
    assert floor_of(cosines) == pytest.approx(0.2) and floor_of(torch.full((2, 2), 0.999)) == pytest.approx(0.9)
    heat = heat_picture(grey(100, (32, 32)), cosines, 0.2).astype(int)
    dark, bright = heat[16, 2], heat[16, 30]
    assert dark.tolist() == [30, 30, 32] and (bright - dark > 100).all()  # 0.3 of the grey plus inferno's first colour


def test_cache_computes_once_and_forgets_what_was_used_longest_ago():
    cache, computed = Cache(limit=25), []

    def get(key):
        return cache(key, lambda: computed.append(key) or key.upper(), lambda value: 10)

    assert [get(key) for key in "abab"] == ["A", "B", "A", "B"] and computed == ["a", "b"]
    get("a")
    get("c")  # 30 bytes exceed the limit: b goes
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
