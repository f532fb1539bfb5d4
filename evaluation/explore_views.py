"""Back end of the feature page: models, a readout, files, and the pictures and HTML made from them."""

import html
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from evaluation.encoders import Encoder, build, calibrate_batch_norm, resize_up, stage_stride
from evaluation.explore_features import (
    Basis,
    Cache,
    Clip,
    FrameFeatures,
    best_match,
    cell_at,
    enlarged,
    floor_of,
    frame_features,
    heat_picture,
    list_media,
    marked,
    pca_colours,
    principal_basis,
    read_clip,
    similarity,
)
from evaluation.outputs import make_accelerator
from evaluation.report import data_uri, palette
from modeling_poodle import PoodleForSemanticSegmentation
from modeling_poodle.folders import spread
from modeling_poodle.loading_poodle import from_pretrained_whole
from modeling_poodle.preprocessing import statistics

NEXT = 5  # frames of a video that are shown after the clicked one
KEPT_BYTES = 1 << 30  # size of the cache; a ResNet-50's decoder gives 19 MB of features for a frame of 512x288


class Readout:
    """
    A fitted segmentation model, from evaluation/segment.py or any other that transformers loads.

    Raises:
        ValueError: the model or its image processor cannot be loaded.
    """

    def __init__(self, source: str, device: torch.device):
        try:
            # In float32, like the images, even if the checkpoint is stored in a lower precision.
            model = from_pretrained_whole(AutoModelForSemanticSegmentation, source, dtype=torch.float32)
            self.model = model.eval().to(device)
            processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
            mean, std = statistics(processor)
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f"readout {source} cannot be loaded; expected the readout/ folder of an evaluation: {error}"
            ) from error
        linear = isinstance(self.model, PoodleForSemanticSegmentation)
        # As in the evaluation, images are resized to whole cells: by Encoder (which also reads windows if needed), for UperNet by `predict`.
        self.encoder = (
            Encoder(source, self.model, mean, std, whole=linear and _measured_whole(source, self.model)).check()
            if linear
            else None
        )
        backbone = getattr(self.model, "backbone", None)
        self.multiple = 1 if backbone is None else stage_stride(backbone)
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))
        self.classes = [str(self.model.config.id2label[index]) for index in range(self.model.config.num_labels)]

    @torch.inference_mode()
    def predict(self, image: np.ndarray) -> np.ndarray:
        """Segment an image: (H, W, 3) uint8 -> (H, W) class ids."""
        if self.encoder is not None:
            logits = self.model.classifier(self.encoder(self.encoder.normalise(image)))
        else:
            pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255
            pixels = resize_up(((pixels - self.mean) / self.std)[None], self.multiple)
            logits = self.model(pixel_values=pixels.to(self.model.device)).logits
        logits = F.interpolate(logits.float(), size=image.shape[:2], mode="bilinear", align_corners=False)
        return logits[0].argmax(dim=0).cpu().numpy()


def _measured_whole(source: str, model: PoodleForSemanticSegmentation) -> bool:
    """Whether the evaluation read whole images even with a ViT of one image size, by the evaluation.json beside the readout's folder."""
    if model.config.num_decoder_blocks:  # pretrained by PooDLe on its crops, so whole images are read
        return True
    try:
        result = json.loads(Path(source).resolve().with_name("evaluation.json").read_text(encoding="utf-8"))
        return str(result.get("inference")).startswith("whole image")
    except (OSError, ValueError, AttributeError):
        return False


@dataclass(frozen=True)
class Panel:
    """One model's part of the page: two pictures and the HTML around them."""

    title: str
    heat: np.ndarray
    colours: np.ndarray
    strip: str


class Explorer:
    """
    Models, files and the features computed from them. Returns pictures and HTML, independently of the page.

    Raises:
        ValueError: a model, the readout or the files cannot be used.
    """

    def __init__(
        self, models: list[str], images: str | None, readout: str | None, features: str | None, max_side: int
    ):
        self.media, self.max_side = list_media(images), max_side
        self.kept = Cache(KEPT_BYTES)
        clips, wrong = [], None
        for _, path in spread(self.media, 8):
            try:
                clips.append(self.clip(path, 0.0, 0.5))
            except ValueError as error:
                wrong = error
        if self.media and not clips:  # before the models are built, which may have to be downloaded
            raise wrong
        device = make_accelerator().device
        self.encoders = {name: build(name, 1, features=features).to(device) for name in models}
        self.readout = None if readout is None else Readout(readout, device)
        for name in models:
            if name.startswith("random:"):
                if not clips:
                    raise ValueError(f"--model {name} needs --images: its BatchNorm takes its statistics from them")
                calibrate_batch_norm(self.encoders[name], [clip.frames[0] for clip in clips])

    def clip(self, path: str, start: float, gap: float) -> Clip:
        def read() -> Clip:
            return read_clip(path, start, gap, 1 + NEXT, self.max_side)

        return self.kept((path, start, gap), read, lambda clip: sum(frame.nbytes for frame in clip.frames))

    def features(self, name: str, path: str, time: float, image: np.ndarray) -> FrameFeatures:
        return self.kept(
            (name, path, time), lambda: frame_features(self.encoders[name], image), lambda found: found.nbytes
        )

    def colours(
        self, name: str, path: str, clip: Clip, time: float, features: FrameFeatures, basis: Basis
    ) -> np.ndarray:
        """Return a frame's features in colour. They do not depend on the point, so a click finds them in the cache."""
        return self.kept(
            (name, path, clip.times[0], time, "colours"),
            lambda: pca_colours(features, basis),
            lambda picture: picture.nbytes,
        )

    def panel(self, name: str, path: str, clip: Clip, share: tuple[float, float], count: int) -> Panel:
        """
        Return a model's view of the first `count` frames.

        Args:
            share: the point in the first frame, as shares (x, y) of its size.
        """
        found = [self.features(name, path, time, image) for time, image in zip(clip.times[:count], clip.frames)]
        first, image = found[0], clip.frames[0]
        point = place(image, share)
        row, column = cell_at(first, point)
        query = first.unit[:, row, column]
        cosines = [similarity(features, query) for features in found]
        floor = floor_of(cosines[0])
        basis = self.kept(
            (name, path, clip.times[0], "basis"), lambda: principal_basis(first), lambda basis: basis.axes.nbytes
        )
        heat = enlarged(heat_picture(image, cosines[0], floor))
        figures = []
        for time, shown, features, cosine in list(zip(clip.times, clip.frames, found, cosines))[1:]:
            value, where = best_match(cosine, features.size)
            pictures = (
                marked(heat_picture(shown, cosine, floor), where),
                self.colours(name, path, clip, time, features, basis),
            )
            figures.append(figure(pictures, f"+{time - clip.times[0]:.1f} s", f"best {value:.2f}"))
        encoder = self.encoders[name]
        cells = (
            f"{encoder.features_name}, {encoder.channels} channels, {first.unit.shape[2]}x{first.unit.shape[1]} cells"
        )
        title = (
            f"<h2>{html.escape(short_name(name))}</h2><p>{html.escape(cells)}</p><p class='scale'><b>{floor:.2f}</b>"
            f"<i></i><b>1.00</b><span>cosine; <b class='here'>{float(cosines[0][row, column]):.2f}</b> at the point</span></p>"
        )
        colours = enlarged(self.colours(name, path, clip, clip.times[0], first, basis))
        return Panel(title, marked(heat, place(heat, share)), colours, strip(figures, clip, count))

    def segmentation(self, path: str, clip: Clip) -> tuple[np.ndarray, str]:
        """Return the first frame tinted by its classes, and a legend of the classes that occur, the largest first."""
        image = clip.frames[0]
        classes = self.kept(
            (path, clip.times[0], "classes"), lambda: self.readout.predict(image), lambda found: found.nbytes
        )
        colours = palette(len(self.readout.classes))
        counts = np.bincount(classes.flatten(), minlength=len(self.readout.classes))
        items = [
            f"<li><i style='background:rgb{tuple(int(v) for v in colours[index])}'></i>"
            f"{html.escape(self.readout.classes[index])} <b>{100 * counts[index] / classes.size:.1f} %</b></li>"
            for index in np.argsort(-counts, kind="stable")
            if counts[index]
        ]
        # The readout was fitted on images of full size; here it reads the picture as it is shown (at most max_side).
        legend = (
            f"<ul class='legend'>{''.join(items)}</ul><p>Segmented at {image.shape[1]}x{image.shape[0]} pixels</p>"
        )
        return (0.4 * image + 0.6 * colours[classes]).astype(np.uint8), legend


def place(image: np.ndarray, share: tuple[float, float]) -> tuple[float, float]:
    """Convert a point from shares (x, y) of the picture's size to pixels."""
    return share[0] * image.shape[1], share[1] * image.shape[0]


def short_name(name: str) -> str:
    """Shorten the path of a folder on this machine to its last two parts; other names stay as they are."""
    source = name.removeprefix("random:")
    if not Path(source).is_dir():
        return name
    return name[: len(name) - len(source)] + "/".join(Path(source).resolve().parts[-2:])


def figure(pictures: tuple[np.ndarray, ...], title: str, note: str) -> str:
    shown = "".join(f'<img src="{data_uri(Image.fromarray(picture))}" alt="">' for picture in pictures)
    return f"<figure>{shown}<figcaption>{title} <b>{note}</b></figcaption></figure>"


def strip(figures: list[str], clip: Clip, count: int) -> str:
    """Return the next frames side by side as HTML, or a sentence if there are none or they are not computed yet."""
    if clip.duration == 0:
        return ""
    if len(clip.frames) == 1:
        return "<p class='strip'>The video ends here: no next frames.</p>"
    if count == 1:
        return "<p class='strip'>Next frames: computing their features …</p>"
    return (
        f"<p>Next frames, and where each is most similar</p><div class='strip' tabindex='0'>{''.join(figures)}</div>"
    )
