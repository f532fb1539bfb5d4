"""
Measure what subcrops show: how often they hit each class, how often a single thing, and whether the teacher's shows the same instance.

    python -m training.subcrop_study --dataset street --json street.json [--config street] [--frames 40] [--draws 24] [--gaps 0.25 0.5 1.0]
    python -m training.subcrop_study --dataset camvid --data_dir path/to/camvid --json camvid.json

A subcrop hits an object if it covers at least 10 % of the object's pixels (the rule of arXiv 2408.11208). The baseline is the chance that a
random pixel lies on the class, which is the class's share of the pixels. Subcrops are drawn as in training (`draw_subcrops`), with the
recipe's settings, on whole frames; street frames have the recipe's crop size. If no try lands inside the other frame, training takes the
teacher's subcrop from the student's own frame. Such pairs are counted separately, because both of their subcrops show the same place.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from modeling_poodle.folders import spread
from modeling_poodle.recipe_files import is_finite, run_script
from training.flow import DisFlow
from training.recipe import Recipe, read_yaml
from training.street import STREET_CLASSES, Street
from training.street_cameras import street_camera
from training.street_labels import held_out_time
from training.subcrop_objects import HIT_SHARE, VOID, Objects, alone, covered, find_objects, hits, same_instance
from training.subcrop_table import MIN_PIXELS, OTHERS, notes, scatter, table
from training.views import draw_subcrops

STREET_THINGS = ("pole", "traffic light", "traffic sign", "person", "rider", "car", "truck", "bus", "bicycle")
CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
CAMVID_THINGS = ("pole", "sign", "car", "pedestrian", "bicyclist")
MEASURES = {
    "pixel_share": "share of all pixels that lie on the class: the chance of a random pixel",
    "hit": "share of subcrops that hit an object of the class",
    "lift": "hit by pixel_share",
    "hit_in_frame, random_pixel_in_frame": "share of sets of a frame's subcrops or of as many random pixels of which one does; of pixels as expected",
    "single": "of subcrops that hit a thing of the class, the share that hits no other thing which takes up this share of the subcrop; the parts of one instance (a rider and his bicycle) are no others",
    "held_of_shown": "of instances hit by a student's subcrop whose teacher's subcrop lies in the other frame, and shown there, the share that the teacher's subcrop hits, by flow and seconds",
    "held_of_shown_same_pairs": "the same over pairs that lie across the frames with every flow of these seconds",
    "held_of_hit": "the same with the instances that the other frame does not show, as not held",
    "own_frame": "share of pairs whose teacher's subcrop lies in the student's own frame, in none of the above",
    "instances_counted": "number of instances that held_of_shown is a share of, where it is least",
}
NO_JITTER = "exact, no jitter"  # measured at the longest gap only
FLOWS = ("exact", "dis", "none", NO_JITTER)  # "none" is zero flow: the teacher's subcrop stays at the student's place


class Tally:
    """Sums over frames. Shares of subcrops refer to all subcrops of all frames, shares of frames to sets of K subcrops of one frame."""

    def __init__(self, classes: tuple[str, ...], things: tuple[str, ...], num_subcrops: int):
        self.classes, self.num_subcrops = classes, num_subcrops
        self.is_thing = np.isin(classes, things)
        n = len(classes)
        self.pixels, self.hit, self.frame_hit, self.frame_random = np.zeros((4, n))
        self.alone = np.zeros((len(OTHERS), n))
        self.num_pixels = self.num_crops = 0
        self.crops_by_things = np.zeros(3)  # number of subcrops that hit no, one, and several things
        # By (flow, gap): (5, n) counts for each class. Rows: objects hit, shown and held in pairs across frames; then shown and held in
        # pairs that lie across frames with every flow.
        self.pairs: dict[tuple[str, str], np.ndarray] = {}
        self.own_frame: dict[tuple[str, str], np.ndarray] = {}  # by (flow, gap): pairs within one frame, all pairs

    def add_frame(self, labels: np.ndarray, objects: Objects, inside: np.ndarray) -> None:
        """Add the subcrops of a frame. `inside` is (sets * K, n + 1), from [`covered`]."""
        n, k, hit = len(self.classes), self.num_subcrops, hits(objects, inside)
        pixels = np.bincount(labels.ravel(), minlength=256)[:n]
        self.pixels += pixels
        self.num_pixels += labels.size
        self.num_crops += len(hit)
        on_class = self._by_class(hit, objects) > 0
        self.hit += on_class.sum(axis=0)
        self.frame_hit += on_class.reshape(-1, k, n).any(axis=1).sum(axis=0)
        self.frame_random += len(hit) / k * (1 - (1 - pixels / labels.size) ** k)
        # Object 0 has class -1, which selects the appended False.
        hit_things = hit & np.append(self.is_thing, False)[objects.classes]
        for row, least in enumerate(OTHERS):
            single = alone(objects, hit_things, inside, least)
            self.alone[row] += (self._by_class(single, objects) > 0).sum(axis=0)
            if least == 0:  # the strictest rule: any other thing counts, however small
                number = hit_things.any(axis=1) * 2 - single.any(axis=1)
                self.crops_by_things += np.bincount(number, minlength=3)

    def add_pairs(
        self, flow: str, gap: str, objects: Objects, hit, shown, held, across: np.ndarray, same: np.ndarray
    ) -> None:
        """
        Add pairs of subcrops.

        Args:
            hit: (N, n + 1), from [`hits`].
            shown, held: (N, n + 1), from [`same_instance`].
            across: (N,) bool, pairs whose subcrops come from different frames.
            same: (N,) bool, pairs that lie across frames with every flow.
        """
        hit = hit & (objects.keys >= 0)
        chosen = [hit & across[:, None], shown & across[:, None], held & across[:, None]]
        chosen += [shown & same[:, None], held & same[:, None]]
        counts = np.stack([self._by_class(each, objects).sum(axis=0) for each in chosen])
        self.pairs[flow, gap] = self.pairs.get((flow, gap), 0) + counts
        fell_back = np.array([(~across).sum(), len(across)])
        self.own_frame[flow, gap] = self.own_frame.get((flow, gap), 0) + fell_back

    def _by_class(self, hit: np.ndarray, objects: Objects) -> np.ndarray:
        """Count the objects of each class that each subcrop hits: (N, n + 1) bool -> (N, classes) int64."""
        return hit[:, 1:].astype(np.int64) @ (objects.classes[1:, None] == np.arange(len(self.classes)))

    def result(self) -> dict:
        """Return shares from 0 to 1 for each class that occurs, most frequent first. A share of nothing is `None`."""
        k, values = self.num_subcrops, {}
        for c in np.argsort(-self.pixels, kind="stable"):
            if not self.pixels[c]:
                continue
            held: dict[str, dict[str, float | None]] = {}
            for (flow, gap), counts in self.pairs.items():
                held.setdefault(flow, {})[gap] = _share(counts[2, c], counts[1, c])
            thing = bool(self.is_thing[c])
            values[self.classes[c]] = {
                "pixel_share": _share(self.pixels[c], self.num_pixels),
                "hit": _share(self.hit[c], self.num_crops),
                "lift": _share(self.hit[c] / self.num_crops, self.pixels[c] / self.num_pixels),
                "hit_in_frame": _share(self.frame_hit[c], self.num_crops / k),
                "random_pixel_in_frame": _share(self.frame_random[c], self.num_crops / k),
                "single": [_share(number, self.hit[c]) for number in self.alone[:, c]] if thing else None,
                "held_of_shown": held if thing and held else None,
                "instances_counted": int(min((counts[1, c] for counts in self.pairs.values()), default=0)),
            }
        none, one, several = (_share(count, self.num_crops) for count in self.crops_by_things)
        pairs: dict[str, dict[str, dict[str, float | None]]] = {}
        for (flow, gap), counts in self.pairs.items():
            hit, shown, held, same_shown, same_held = counts[:, self.is_thing].sum(axis=1)
            pairs.setdefault(flow, {})[gap] = {
                "held_of_shown": _share(held, shown),
                "held_of_shown_same_pairs": _share(same_held, same_shown),
                "held_of_hit": _share(held, hit),
                "own_frame": _share(*self.own_frame[flow, gap]),
            }
        return {
            "num_subcrops": self.num_crops,
            "subcrops_with_things": {"none": none, "one": one, "several": several},
            "all_things": pairs or None,
            "classes": values,
        }


def _share(part: float, whole: float) -> float | None:
    return round(float(part / whole), 5) if whole else None


def study_street(
    recipe: Recipe, camera: str, num_frames: int, draws: int, gaps: list[float], seed: int
) -> tuple[Tally, dict]:
    """Measure one pair of frames for each drive and gap, in both directions and with each flow."""
    height, width = recipe.crop_size
    tally, dis = Tally(STREET_CLASSES, STREET_THINGS, recipe.num_subcrops), DisFlow()
    for number in range(num_frames):
        street, time = Street(seed + number, height, width, camera=camera), held_out_time(number)
        for place, gap in enumerate(gaps):
            times = (time, time + gap)
            frames = np.stack([street.frame(t).transpose(2, 0, 1) for t in times])
            labels = [street.labels(t) for t in times]
            objects = [find_objects(label, street.instances(t)) for label, t in zip(labels, times)]
            exact = np.stack([street.flow(*times)[0], street.flow(*times[::-1])[0]])
            fields = {"exact": exact, "dis": dis.estimate(frames), "none": np.zeros_like(exact)}
            fields |= {NO_JITTER: exact} if gap == max(gaps) else {}
            # All flows use the same seed, so that the student's subcrops are the same.
            first = (seed + number) * len(gaps) + place
            drawn = {
                name: _draw(recipe, field, draws, torch.Generator().manual_seed(first), jittered=name != NO_JITTER)
                for name, field in fields.items()
            }
            source = np.repeat([0, 1], len(drawn["exact"]["student_boxes"]) // 2)
            across = {name: each["teacher_box_frames"] != source for name, each in drawn.items()}
            same = np.all(list(across.values()), axis=0)
            for own in (0, 1):
                mine, other = source == own, objects[1 - own]
                inside = covered(objects[own], drawn["exact"]["student_boxes"][mine])
                tally.add_frame(labels[own], objects[own], inside)
                hit = hits(objects[own], inside)
                for name, each in drawn.items():
                    teacher_hit = hits(other, covered(other, each["teacher_boxes"][mine]))
                    shown, held = same_instance(hit, objects[own], teacher_hit, other)
                    tally.add_pairs(name, str(gap), objects[own], hit, shown, held, across[name][mine], same[mine])
    return tally, {"height": height, "width": width}


def _draw(
    recipe: Recipe, flow: np.ndarray, draws: int, generator: torch.Generator, jittered: bool = True
) -> dict[str, np.ndarray]:
    """
    Draw `draws` sets of subcrops for both frames of a pair with flow (2, 2, H, W).

    Returns the fields of [`draw_subcrops`], each (2 * draws * K, ...), with the subcrops of frame 0 first.
    """
    many = torch.from_numpy(flow).float()[None].expand(draws, -1, -1, -1, -1)
    area, follow = tuple(recipe.subcrop_area), recipe.subcrops_follow_flow
    jitter = recipe.subcrop_jitter if jittered else 0.0
    drawn = draw_subcrops(many, recipe.num_subcrops, generator, area, jitter, follow_flow=follow)
    return {name: value.transpose(0, 1).flatten(0, 2).numpy() for name, value in drawn.items()}


def camvid_labels(data_dir: str | None, num_frames: int) -> list[Path]:
    """Return up to `num_frames` label files of train/ and val/, evenly spread. Raises ValueError if there are none."""
    layout = "Expected: train/ and val/, each with labels/*.png (ids 0 to 10, 11 is void)"
    if data_dir is None:
        raise ValueError(f"--dataset camvid needs --data_dir, the folder that holds it. {layout}")
    paths = sorted(p for split in ("train", "val") for p in Path(data_dir).expanduser().glob(f"{split}/labels/*.png"))
    if not paths:
        raise ValueError(f"--data_dir {data_dir}: no label images found. {layout}")
    return list(spread(paths, num_frames))


def _read_labels(paths: list[Path]) -> Iterator[np.ndarray]:
    for path in paths:
        try:
            with Image.open(path) as image:
                stored = np.asarray(image)
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"label {path} cannot be read: {error}") from error
        if stored.ndim != 2 or stored.dtype != np.uint8:
            raise ValueError(
                f"label {path} must hold one class id a pixel, got {stored.dtype} of shape {stored.shape}"
            )
        yield np.where(stored < len(CAMVID_CLASSES), stored, VOID).astype(np.uint8)


def study_camvid(recipe: Recipe, paths: list[Path], draws: int, seed: int) -> tuple[Tally, dict]:
    """Measure labelled frames, without instances and without pairs of frames."""
    tally = Tally(CAMVID_CLASSES, CAMVID_THINGS, recipe.num_subcrops)
    generator = torch.Generator().manual_seed(seed)
    for labels in _read_labels(paths):
        objects, still = find_objects(labels), np.zeros((2, 2, *labels.shape), np.float32)
        # `_draw` returns sets for both frames of a pair. Here both are this frame, so half of the draws are enough.
        boxes = _draw(recipe, still, -(-draws // 2), generator)["student_boxes"][: draws * recipe.num_subcrops]
        tally.add_frame(labels, objects, covered(objects, boxes))
    height, width = labels.shape
    note = "what the teacher's subcrop holds is not available: these labels have no instances; objects are connected components of a class."
    return tally, {"frames": len(paths), "height": height, "width": width, "held_note": note}


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser("python -m training.subcrop_study", description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", default="street", help="recipe of the subcrops")
    parser.add_argument("--dataset", required=True, help="street, street:CAMERA or camvid")
    parser.add_argument("--data_dir", help="folder of camvid")
    parser.add_argument("--frames", type=int, default=40, help="drives of the street, or images")
    parser.add_argument("--draws", type=int, default=24, help="sets of subcrops a frame")
    parser.add_argument("--gaps", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="seconds; street only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", required=True, help="file for the result")
    options = parser.parse_args(arguments)
    recipe, camera = Recipe(**read_yaml(options.config)), street_camera(options.dataset)
    if camera is None and options.dataset != "camvid":
        raise ValueError(f"--dataset must be street, street:CAMERA or camvid, got {options.dataset!r}")
    if camera is not None and options.data_dir is not None:
        raise ValueError("--data_dir goes with --dataset camvid alone: the street is drawn")
    for name in ("frames", "draws"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")
    if not all(is_finite(gap) and gap > 0 for gap in options.gaps) or len(set(options.gaps)) < len(options.gaps):
        raise ValueError(f"--gaps must be different numbers of seconds above 0, got {options.gaps}")
    if options.seed < 0:
        raise ValueError(f"--seed must not be negative, got {options.seed}")
    if camera is not None:
        tally, facts = study_street(recipe, camera, options.frames, options.draws, options.gaps, options.seed)
    else:
        tally, facts = study_camvid(
            recipe, camvid_labels(options.data_dir, options.frames), options.draws, options.seed
        )
    result = {
        "study": "subcrops",
        "dataset": options.dataset,
        "config": options.config,
        "frames": options.frames,
        "subcrops_a_frame": recipe.num_subcrops,
        "subcrop_area": recipe.subcrop_area,
        "subcrop_jitter": recipe.subcrop_jitter,
        "measures": MEASURES,
        "hit_share": HIT_SHARE,
        "min_pixels": MIN_PIXELS,
        **facts,
        **tally.result(),
    }
    result |= {"table": table(result), "notes": notes(result), "scatter": scatter(result)}
    path = Path(options.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, *cells in result["table"]:
        shown = ["-" if cell is None else cell if isinstance(cell, str) else f"{cell:.2f}" for cell in cells]
        print(f"{name:40}" + "".join(f" {cell:>12}" for cell in shown))
    print(f"\n{result['num_subcrops']} subcrops; things in one: {result['subcrops_with_things']}; written to {path}")
    return result


if __name__ == "__main__":
    run_script(main)
