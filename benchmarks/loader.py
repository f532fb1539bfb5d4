"""
The loader: CPU milliseconds per pair, compared with plain seeks and augmentation frame by frame.

    python benchmarks/loader.py                                     # 1280x720 H.264, GOP 30 and 250, R = 1, 2, 4, made for it
    python benchmarks/loader.py --videos path/to/videos             # your own videos
    python benchmarks/loader.py --step_pairs_per_second 100         # and the cores that feed such a step
    python benchmarks/loader.py --config street                     # a recipe's own loader, alone and feeding its training step

With --config (and any flag of training/pretrain.py): pairs per second of the loader with its workers, alone and with the step; the share of
the time that the step waits for data; peak memory; and the parts of a pair. Without --config, our loader is compared with plain seeks.

Ours: index, decode (crop before conversion, both frames in one pass, R pairs per opening of a file) and hand over as uint8; augmentation is
done on the device. Plain: for each frame, open the file, seek to the keyframe before the frame, decode up to it, convert the whole picture,
resize it by the frame's scale, crop, and augment photometrically as the reference does. Crops of 512x1024 from 1080x1920 times
U(0.75, 1.25), gaps of U(0.5, 1.5) s (arXiv 2408.11208, section 3). Times are processor times of this one process; both process the same
pairs in turns. Neither includes flow.
"""

import itertools
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import av
import cv2
import numpy as np
import torch
from torchvision.transforms.v2.functional import resize

from benchmarks.common import OurStep, benchmark_parser, medians, memory_bytes, print_table, reset_peak, write_json
from benchmarks.reference import photometric
from training.flow import DisFlow
from training.pair_plans import PairSampling, plan_pairs
from training.recipe import Recipe, parse_recipe
from training.street import Street
from training.street_cameras import street_camera
from training.street_files import street_videos
from training.video_decoding import decode_cuts
from training.video_index import by_index, index_video
from training.video_sources import find_videos
from training.video_stream import PairLoader


def write_clip(
    path: Path, gop: int, seconds: float = 12.0, fps: int = 30, height: int = 720, width: int = 1280
) -> None:
    """Write a clip that pans over street frames, encoded by x264 "veryfast" with a keyframe every `gop` frames."""
    street = Street(0, height // 4, width // 4)
    pictures = [
        cv2.resize(street.frame(t), (width, height + 64), interpolation=cv2.INTER_CUBIC) for t in (0.0, 1.0, 2.0)
    ]
    with av.open(str(path), "w") as container:
        options = {"g": str(gop), "keyint_min": str(gop), "sc_threshold": "0", "preset": "veryfast"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.time_base = width, height, "yuv420p", Fraction(1, fps)
        for number in range(int(seconds * fps)):
            picture = np.roll(pictures[number // 120 % 3], 3 * number, axis=1)[number % 64 : number % 64 + height]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())


def ours(path: str, sampling: PairSampling, number: int) -> tuple[list, dict[str, float]]:
    """Return the pairs of one opening, and the seconds of each part. The video is indexed anew, as if it had never been opened."""
    index_video.cache_clear()
    marks = [time.process_time()]

    def read(index, video):
        pairs = plan_pairs(index, sampling, number, path)
        marks.append(time.process_time())
        decode_cuts(path, index, [cut for pair in pairs for cut in pair], video)
        return pairs

    pairs = by_index(path, read)
    marks.append(time.process_time())
    return pairs, {"index": marks[1] - marks[0], "decode": marks[2] - marks[1]}


def plain(path: str, pairs: list, augment) -> dict[str, float]:
    """Read the same pairs frame by frame, and return the seconds of each part."""
    index = index_video(path)
    seconds = {"decode": 0.0, "augment": 0.0}
    for cut in (cut for pair in pairs for cut in pair):
        began = time.process_time()
        with av.open(path) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            container.seek(index.pts[cut.number], stream=stream, backward=True)
            frame = next(frame for frame in container.decode(stream) if frame.pts >= index.pts[cut.number])
            picture = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
        scale = cut.size[0] / (cut.box[3] - cut.box[1])
        x, y = round(cut.box[0] * scale), round(cut.box[1] * scale)
        picture = resize(picture, [round(picture.shape[1] * scale), round(picture.shape[2] * scale)])
        picture = picture[:, y : y + cut.size[0], x : x + cut.size[1]]
        seconds["decode"] += time.process_time() - began
        began = time.process_time()
        augment(picture)
        seconds["augment"] += time.process_time() - began
    return seconds


def compare(paths: list[str], repeats: int, openings: int, torchvision_blur: bool = False) -> dict[str, float]:
    """Compare both ways: medians over openings, in CPU milliseconds per pair. `ratio` is plain over ours."""
    sampling = PairSampling(
        crop_size=(512, 1024),
        frame_size=(1080, 1920),
        frame_scale=(0.75, 1.25),
        frame_gap_seconds=(0.5, 1.5),
        pairs_per_video=repeats,
    )
    augment, rows = photometric(*sampling.crop_size, torchvision_blur), []
    for number in range(openings + 1):
        path = paths[number % len(paths)]
        pairs, own = ours(path, sampling, number)
        other = plain(path, pairs, augment)
        row = {f"ours_{name}": value for name, value in own.items()} | {f"plain_{k}": v for k, v in other.items()}
        row["ours"], row["plain"] = sum(own.values()), sum(other.values())
        rows.append({name: 1000 * value / repeats for name, value in row.items()})
    result = medians(rows[1:])
    return {**result, "ratio": result["plain"] / result["ours"]}


def videos_of(recipe: Recipe) -> list[str]:
    others = [source for source in recipe.videos if street_camera(source) is None]
    rendered = [street_videos(camera=camera) for camera in map(street_camera, recipe.videos) if camera is not None]
    return [*itertools.chain(*rendered), *(find_videos(others) if others else [])]


def feed(recipe: Recipe, steps: int) -> dict[str, float]:
    """Measure the recipe's loader with its workers, alone and together with the training step that it feeds."""
    paths = videos_of(recipe)
    sampling = PairSampling.of(recipe)
    step = OurStep(recipe)
    parts = medians([opening_parts(paths[n % len(paths)], sampling, n, step.pair_flow) for n in range(min(16, steps))])
    loader = PairLoader(
        paths, sampling, recipe.per_device_train_batch_size, recipe.dataloader_num_workers, pair_flow=step.pair_flow
    )
    batches = iter(loader)
    # Before the clock starts, consume what the workers may hold ready.
    for _ in range(4 * max(1, recipe.dataloader_num_workers) + 1):
        next(batches)
    began = time.perf_counter()
    for _ in range(steps):
        next(batches)
    alone = time.perf_counter() - began
    step(next(batches))
    reset_peak(step.device)
    began, waited = time.perf_counter(), 0.0
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        step(batch)
    if step.device.type == "cuda":
        torch.cuda.synchronize()
    together = time.perf_counter() - began
    loader.close()
    pairs = steps * recipe.per_device_train_batch_size
    return {
        "pairs_per_second_alone": pairs / alone,
        "pairs_per_second_with_step": pairs / together,
        "data_wait": waited / together,
        "peak_gib": memory_bytes(step.device, peak=True) / 2**30,
        **{f"{name}_ms_a_pair": value for name, value in parts.items()},
    }


def opening_parts(path: str, sampling: PairSampling, number: int, pair_flow) -> dict[str, float]:
    """CPU milliseconds per pair of one opening of a video: index, decode, and the flow that a worker computes."""
    pairs, seconds = ours(path, sampling, number)
    pictures, _ = decode_cuts(path, index_video(path), [cut for pair in pairs for cut in pair])
    if any(picture is None for picture in pictures):
        raise SystemExit(f"{path}: its times are estimated, and some frames are not there; give a local file")
    began = time.process_time()
    if isinstance(pair_flow, DisFlow):
        for repeat in range(len(pairs)):
            pair_flow.estimate(np.stack(pictures[2 * repeat : 2 * repeat + 2]))
    seconds["flow"] = time.process_time() - began
    return {name: 1000 * value / len(pairs) for name, value in seconds.items()}


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--config", help="a recipe: measure its own loader, alone and with its step")
    parser.add_argument("--steps", type=int, default=40, help="with --config: steps that count")
    parser.add_argument("--videos", nargs="+", help="files, folders, ...; without it clips are made")
    parser.add_argument(
        "--openings", type=int, default=12, help="openings of a video that count, each row of the table"
    )
    parser.add_argument("--pairs_per_video", type=int, nargs="+", default=[1, 2, 4], help="R, a row each")
    parser.add_argument(
        "--torchvision_blur",
        action="store_true",
        help="plain: torchvision's GaussianBlur, not OpenCV's, which is separable and forty times as fast",
    )
    parser.add_argument(
        "--step_pairs_per_second", type=float, help="rate of a training step, to count the cores that feed it"
    )
    options, flags = parser.parse_known_args()
    if options.config:
        videos = ["--videos", *options.videos] if options.videos else []
        recipe = parse_recipe(["--config", options.config, *videos, *flags])
        result = feed(recipe, options.steps)
        print(f"recipe {options.config}, flow {recipe.flow}, {recipe.dataloader_num_workers} worker(s)")
        for name, value in result.items():
            print(f"  {name:28}{value:10.3f}")
        return write_json(options.json, result)
    if flags:
        parser.error(f"unknown arguments {' '.join(flags)}; flags of a recipe go with --config")
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if options.videos:
            sources = {"videos": find_videos(options.videos)}
        else:
            sources = {f"GOP {gop}": [f"{folder}/gop-{gop}.mp4"] for gop in (30, 250)}
            for (clip,), gop in zip(sources.values(), (30, 250)):
                write_clip(Path(clip), gop)
        for name, paths in sources.items():
            for repeats in options.pairs_per_video:
                row = {
                    "clips": name,
                    "R": repeats,
                    **compare(paths, repeats, options.openings, options.torchvision_blur),
                }
                if options.step_pairs_per_second:
                    row["cores"] = row["ours"] * options.step_pairs_per_second / 1000
                rows.append(row)
    print("CPU milliseconds a pair of 512x1024, one core")
    parts = ("ours_index", "ours_decode", "ours", "plain_decode", "plain_augment", "plain", "ratio", "cores")
    shown = {"clips": "", "R": "", **{name: ".1f" for name in parts if name in rows[0]}}
    print_table(rows, shown)
    write_json(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
