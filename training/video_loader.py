"""Build a run's loader from its recipe: expand the sources, check the videos, and make sure that all ranks have the same ones."""

import logging
import os
import shutil
import warnings
from pathlib import Path

from accelerate import Accelerator

from modeling_poodle.cpu import usable_cores
from modeling_poodle.processes import main_first, on_main, same_on_all
from training.addresses import video_name
from training.flow import check_sidecars
from training.flow_files import precomputed_epochs, read_manifest
from training.pair_plans import PairSampling, checksum
from training.run_recipe import RunRecipe
from training.street_cameras import CAMERAS, street_camera
from training.street_files import street_videos
from training.video_checks import check_videos
from training.video_sources import is_elsewhere, merged, videos_by_source
from training.video_stream import PairLoader

logger = logging.getLogger("poodle")


def resolve_videos(accelerator: Accelerator, recipe: RunRecipe) -> list[str]:
    """Return the paths of the videos: expand the sources, render the street if the recipe asks for it, and check a sample of the videos."""
    others = [source for source in recipe.videos if street_camera(source) is None]
    flow_dir = getattr(recipe, "flow_folder", None)  # recipes of train_flow.py have no such field
    pins = Path(flow_dir or recipe.output_dir, "revisions.json")

    def expand() -> dict[str, list[str]]:
        # Precomputed flow belongs to the commits that are noted beside it, so with `flow_dir` these are kept.
        new = recipe.resume_from_checkpoint is None and flow_dir is None
        if new:
            pins.unlink(missing_ok=True)
        elsewhere = recipe.resume_from_checkpoint not in (None, "latest")
        if elsewhere and not (flow_dir or pins.exists()):
            # The run starts from another run's checkpoint and continues its stream, so it uses the same commits.
            origin = Path(recipe.resume_from_checkpoint).resolve().parent.parent / pins.name
            if origin.is_file():
                pins.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(origin, pins)
        return videos_by_source(others, pins)

    # Only the first process asks servers: a remote tar takes one request for each member, and the Hub limits the number of requests.
    expanded = on_main(accelerator, expand) if others else {}

    def find() -> list[str]:
        paths, by_source = [], {}
        for camera in [camera for camera in CAMERAS if camera in map(street_camera, recipe.videos)]:
            by_source[f"street:{camera}"] = street_videos(camera=camera)
            paths += by_source[f"street:{camera}"]
            logger.info("videos: the rendered street (--videos takes your own)")
        if others:
            found = expanded
            # The other processes list local files themselves, because they may be on another machine.
            if not accelerator.is_main_process:
                local = [source for source in others if not is_elsewhere(source)]
                found = {source: expanded.get(source, []) for source in others if is_elsewhere(source)}
                found |= videos_by_source(local) if local else {}
            by_source, paths = {**by_source, **found}, paths + merged(found)
        skipped = check_videos(paths, PairSampling.of(recipe), by_source)
        if skipped:
            shown = "".join(f"\n  {reason}" for reason in skipped[:10])
            logger.warning(
                "%d of the videos looked at first cannot be used and will be skipped:%s", len(skipped), shown
            )
        if getattr(recipe, "flow", None) == "exact":
            check_sidecars(paths)
        return paths

    # Rank 0 goes first and renders the street, so that the others find it complete.
    paths = main_first(accelerator, find)
    names = " ".join(map(video_name, paths))
    same_on_all(accelerator, "videos", f"{len(paths)} videos, checksum {checksum(names):08x}")
    return paths


def build_loader(accelerator: Accelerator, recipe: RunRecipe, paths: list[str], pair_flow) -> PairLoader:
    """Build this rank's loader. `pair_flow` adds the flow to a sample; `None` if the workers compute no flow."""
    workers, here = recipe.dataloader_num_workers, int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    if workers * here > usable_cores():
        logger.warning(
            "dataloader_num_workers %d: %d workers on this machine's %d CPU cores; fewer may be as fast",
            workers,
            workers * here,
            usable_cores(),
        )
    # torch and torchdata give the same warning, at more length.
    warnings.filterwarnings("ignore", message=".*worker processes in total.*")
    loader = PairLoader(
        paths,
        PairSampling.of(recipe),
        batch_size=recipe.per_device_train_batch_size,
        num_workers=recipe.dataloader_num_workers,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        pair_flow=pair_flow,
    )
    if pair_flow is not None:
        loader.epochs = precomputed_epochs(recipe, loader)
        loader.estimator = read_manifest(recipe.flow_folder)["estimator"] if recipe.flow == "precomputed" else None
    return loader
