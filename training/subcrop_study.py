"""
What subcrops hold: how often they hit each class, whether alone, and whether the teacher's subcrop holds the same instance.

    python -m training.subcrop_study --dataset street --json street.json [--config street] [--frames 40] [--draws 24] [--gaps 0.25 0.5 1.0]
    python -m training.subcrop_study --dataset camvid --data_dir path/to/camvid --json camvid.json

A subcrop hits an object where it covers at least 10 % of its pixels (arXiv 2408.11208's rule). Beside it, the chance that a random pixel
lies on the class. Subcrops are those of training (`draw_subcrops`) with the recipe's numbers, on whole frames; street frames have the
recipe's crop size.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from modeling_poodle.recipe_files import is_finite, run_script
from training.flow import DisFlow
from training.recipe import Recipe, read_yaml
from training.street import STREET_CLASSES, Street
from training.street_cameras import street_camera
from training.views import draw_subcrops

HIT_SHARE = 0.1
MIN_PIXELS = 10  # of an object: the rule's 10 % is at least a pixel
VOID = 255
STREET_THINGS = ("pole", "traffic light", "traffic sign", "person", "rider", "car", "truck", "bus", "bicycle")
CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
CAMVID_THINGS = ("pole", "sign", "car", "pedestrian", "bicyclist")
MEASURES = {
    "hit": "share of subcrops that hit an object of the class",
    "random_pixel": "share of as many random pixels that lie on the class",
    "hit_in_frame, random_pixel_in_frame": "share of frames, drawn anew with each set, in which one of its subcrops or pixels does",
    "single_object": "of subcrops that hit a thing of the class, the share that hits no other thing",
    "same_instance": "of instances hit by a student's subcrop, the share that the teacher's subcrop hits too, by flow and seconds",
    "instances_hit": "number of these, at the gap with the fewest",
}
FLOWS = ("exact", "dis", "none")  # none: the teacher's subcrop stays where the student's is


@dataclass(frozen=True)
class Objects:
    """
    The objects of one frame.

    Args:
        index: (H, W) int64, the object of each pixel; 0 where there is none.
        classes, sizes: (n + 1,) class and pixels of each object; of object 0, -1 and 0.
        keys: (n + 1,) int64, what an instance is known by in all frames; -1 for objects without such identity.
    """

    index: np.ndarray
    classes: np.ndarray
    sizes: np.ndarray
    keys: np.ndarray


def find_objects(labels: np.ndarray, instances: np.ndarray | None = None) -> Objects:
    """
    An object is the pixels of one class of one instance (a cyclist's are two: rider and bicycle), elsewhere a connected component
    (8 neighbours) of one class. Those of fewer than `MIN_PIXELS` pixels are left out.

    Args:
        labels: (H, W) uint8 classes, 255 for none. instances: (H, W), 0 for stuff; `None`: there are none.
    """
    instances = np.zeros(labels.shape, np.int64) if instances is None else instances.astype(np.int64)
    index, found = np.zeros(labels.shape, np.int64), [(-1, 0, -1)]

    def add(mask: np.ndarray, label: int, key: int) -> None:
        if (size := int(mask.sum())) >= MIN_PIXELS:
            index[mask] = len(found)
            found.append((label, size, key))

    for label in np.setdiff1d(np.unique(labels), [VOID]):
        mask = labels == label
        for instance in np.unique(instances[mask & (instances > 0)]):
            add(mask & (instances == instance), int(label), int(instance) * 256 + int(label))
        count, parts = cv2.connectedComponents((mask & (instances == 0)).astype(np.uint8), connectivity=8)
        for part in range(1, count):
            add(parts == part, int(label), -1)
    return Objects(index, *np.array(found, np.int64).T)


def hits(objects: Objects, boxes: np.ndarray) -> np.ndarray:
    """
    Which objects each box hits: it covers the centres of at least 10 % of the object's pixels.

    Args:
        boxes: (N, 4) xyxy pixels.

    Returns:
        (N, n + 1) bool; column 0, no object, is False.
    """
    inside = np.zeros((len(boxes), len(objects.sizes)), np.int64)
    for row, (x0, y0, x1, y1) in enumerate(np.ceil(np.maximum(boxes, 0) - 0.5).astype(int)):
        inside[row] = np.bincount(objects.index[y0:y1, x0:x1].ravel(), minlength=len(objects.sizes))
    hit = inside >= HIT_SHARE * objects.sizes
    hit[:, 0] = False
    return hit


def same_instance(hit: np.ndarray, objects: Objects, teacher_hit: np.ndarray, teacher_objects: Objects) -> np.ndarray:
    """
    Whether the teacher's subcrop hits the instance that the student's does; one that its frame does not show is not hit.

    Args:
        hit, teacher_hit: (N, n + 1) and (N, m + 1), from [`hits`], of the subcrops of N pairs.

    Returns:
        (N, n + 1) bool: hit by both; False for objects without identity.
    """
    where = {key: column for column, key in enumerate(teacher_objects.keys) if key >= 0}
    columns = np.array([where.get(key, 0) for key in objects.keys])  # column 0 is never hit
    return hit & teacher_hit[:, columns]


class Tally:
    """Adds up frames. Shares of subcrops are over all subcrops of all frames, those of frames over sets of K subcrops of one frame."""

    def __init__(self, classes: tuple[str, ...], things: tuple[str, ...], num_subcrops: int):
        self.classes, self.num_subcrops = classes, num_subcrops
        self.is_thing = np.isin(classes, things)
        n = len(classes)
        self.pixels, self.hit, self.random, self.frame_hit, self.frame_random, self.alone = np.zeros((6, n))
        self.num_pixels = self.num_crops = 0
        self.crops_by_things = np.zeros(3)  # subcrops with no, one and more things
        self.pairs: dict[
            tuple[str, str], np.ndarray
        ] = {}  # (flow, gap): (2, n), instances hit by the student, and by both

    def add_frame(self, labels: np.ndarray, objects: Objects, hit: np.ndarray, rng: np.random.Generator) -> None:
        """hit: (sets * K, n + 1), the subcrops of a frame."""
        n, k = len(self.classes), self.num_subcrops
        self.pixels += np.bincount(labels.ravel(), minlength=256)[:n]
        self.num_pixels += labels.size
        self.num_crops += len(hit)
        by_class = self._by_class(hit, objects)
        drawn = labels.ravel()[rng.integers(labels.size, size=len(hit))]
        on_class = drawn[:, None] == np.arange(n)
        for crops, frames, one in (
            (self.hit, self.frame_hit, by_class > 0),
            (self.random, self.frame_random, on_class),
        ):
            crops += one.sum(axis=0)
            frames += one.reshape(-1, k, n).any(axis=1).sum(axis=0)
        things = by_class[:, self.is_thing].sum(axis=1)
        self.crops_by_things += np.bincount(np.minimum(things, 2), minlength=3)
        self.alone += ((by_class > 0) & (things == 1)[:, None]).sum(axis=0)

    def add_pairs(self, flow: str, gap: str, objects: Objects, hit: np.ndarray, both: np.ndarray) -> None:
        known = hit & (objects.keys >= 0)
        counts = np.stack([self._by_class(known, objects).sum(axis=0), self._by_class(both, objects).sum(axis=0)])
        self.pairs[flow, gap] = self.pairs.get((flow, gap), 0) + counts

    def _by_class(self, hit: np.ndarray, objects: Objects) -> np.ndarray:
        """(N, n + 1) bool -> (N, classes) number of objects hit."""
        return hit[:, 1:].astype(np.int64) @ (objects.classes[1:, None] == np.arange(len(self.classes)))

    def result(self) -> dict:
        """Shares, 0 to 1; `None` where there was nothing to take a share of. Classes that occur, the most frequent first."""
        k, values = self.num_subcrops, {}
        for c in np.argsort(-self.pixels, kind="stable"):
            if not self.pixels[c]:
                continue
            same: dict[str, dict[str, float | None]] = {}
            for (flow, gap), (known, both) in self.pairs.items():
                same.setdefault(flow, {})[gap] = _share(both[c], known[c])
            values[self.classes[c]] = {
                "pixel_share": _share(self.pixels[c], self.num_pixels),
                "hit": _share(self.hit[c], self.num_crops),
                "random_pixel": _share(self.random[c], self.num_crops),
                "hit_in_frame": _share(self.frame_hit[c], self.num_crops / k),
                "random_pixel_in_frame": _share(self.frame_random[c], self.num_crops / k),
                "single_object": _share(self.alone[c], self.hit[c]) if self.is_thing[c] else None,
                "same_instance": same if self.is_thing[c] and self.pairs else None,
                "instances_hit": int(min((known[c] for known, _ in self.pairs.values()), default=0)),
            }
        none, one, several = (_share(count, self.num_crops) for count in self.crops_by_things)
        overall: dict[str, dict[str, float | None]] = {}
        for (flow, gap), (known, both) in self.pairs.items():
            overall.setdefault(flow, {})[gap] = _share(both.sum(), known.sum())
        return {
            "num_subcrops": self.num_crops,
            "subcrops_with_things": {"none": none, "one": one, "several": several},
            "same_instance": overall or None,
            "classes": values,
        }


def _share(part: float, whole: float) -> float | None:
    return round(float(part / whole), 5) if whole else None


def study_street(
    recipe: Recipe, camera: str, num_frames: int, draws: int, gaps: list[float], seed: int
) -> tuple[Tally, dict]:
    """Pairs of frames of as many drives, both directions, with each flow."""
    height, width = recipe.crop_size
    tally, rng, dis = Tally(STREET_CLASSES, STREET_THINGS, recipe.num_subcrops), np.random.default_rng(seed), DisFlow()
    unmatched = {}
    for number in range(num_frames):
        street, time = Street(seed + number, height, width, camera=camera), 1.0 + 0.37 * (number % 20)
        for place, gap in enumerate(gaps):
            times = (time, time + gap)
            frames = np.stack([street.frame(t).transpose(2, 0, 1) for t in times])
            labels = [street.labels(t) for t in times]
            objects = [find_objects(label, street.instances(t)) for label, t in zip(labels, times)]
            exact = np.stack([street.flow(*times)[0], street.flow(*times[::-1])[0]])
            fields = {"exact": exact, "dis": dis.estimate(frames), "none": np.zeros_like(exact)}
            for name in FLOWS:
                # One seed for all flows: they differ in nothing but the flow.
                generator = torch.Generator().manual_seed((seed + number) * len(gaps) + place)
                drawn = _draw(recipe, fields[name], draws, generator)
                source = np.repeat([0, 1], len(drawn["student_boxes"]) // 2)
                for own in (0, 1):
                    mine = source == own
                    hit = hits(objects[own], drawn["student_boxes"][mine])
                    if name == FLOWS[0]:
                        tally.add_frame(labels[own], objects[own], hit, rng)
                    both = np.zeros_like(hit)
                    for other in (0, 1):
                        chosen = drawn["teacher_box_frames"][mine] == other
                        held = hits(objects[other], drawn["teacher_boxes"][mine][chosen])
                        both[chosen] = same_instance(hit[chosen], objects[own], held, objects[other])
                    tally.add_pairs(name, str(gap), objects[own], hit, both)
                counts = unmatched.setdefault(name, {}).setdefault(str(gap), [0, 0])
                counts[0] += int((~drawn["matched"]).sum())
                counts[1] += drawn["matched"].size
    shares = {name: {gap: _share(*c) for gap, c in by_gap.items()} for name, by_gap in unmatched.items()}
    return tally, {"height": height, "width": width, "no_try_landed_inside": shares}


def _draw(recipe: Recipe, flow: np.ndarray, draws: int, generator: torch.Generator) -> dict[str, np.ndarray]:
    """Subcrops of `draws` sets of both frames of a pair with flow (2, 2, H, W): (2 * draws * K, ...), those of the first frame first."""
    many = torch.from_numpy(flow).float()[None].expand(draws, -1, -1, -1, -1)
    area, follow = tuple(recipe.subcrop_area), recipe.subcrops_follow_flow
    drawn = draw_subcrops(many, recipe.num_subcrops, generator, area, recipe.subcrop_jitter, follow_flow=follow)
    return {name: value.transpose(0, 1).flatten(0, 2).numpy() for name, value in drawn.items()}


def camvid_labels(data_dir: str | None, num_frames: int) -> list[Path]:
    """Label files of train/ and val/, evenly spread. Raises ValueError where there are none."""
    layout = "Expected: train/ and val/, each with labels/*.png (ids 0 to 10, 11 is void)"
    if data_dir is None:
        raise ValueError(f"--dataset camvid needs --data_dir, the folder that holds it. {layout}")
    paths = sorted(p for split in ("train", "val") for p in Path(data_dir).expanduser().glob(f"{split}/labels/*.png"))
    if not paths:
        raise ValueError(f"--data_dir {data_dir}: no label images found. {layout}")
    return [
        paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, min(num_frames, len(paths))).round().astype(int))
    ]


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
    """Labelled frames alone: no instances, no pairs."""
    tally, rng = Tally(CAMVID_CLASSES, CAMVID_THINGS, recipe.num_subcrops), np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    for labels in _read_labels(paths):
        objects, still = find_objects(labels), np.zeros((2, 2, *labels.shape), np.float32)
        # Sets come for both frames of a pair; here both are this frame.
        boxes = _draw(recipe, still, -(-draws // 2), generator)["student_boxes"][: draws * recipe.num_subcrops]
        tally.add_frame(labels, objects, hits(objects, boxes), rng)
    height, width = labels.shape
    note = "not available: these frames have neither instances nor neighbours in time; objects are connected components of a class"
    return tally, {"height": height, "width": width, "same_instance_note": note}


def table(result: dict) -> list[list[str | float | None]]:
    """A head, and a line a class; per cent. Of flows and seconds: the share of instances that the teacher's subcrop hits too."""
    same = result["same_instance"] or {}
    columns = [(flow, gap) for flow, by_gap in same.items() for gap in by_gap]
    lines = [["", "pixels", "hit", "random pixel", "single", *(f"{flow} {gap} s" for flow, gap in columns)]]
    for name, values in result["classes"].items():
        shares = [values[key] for key in ("pixel_share", "hit", "random_pixel", "single_object")]
        shares += [values["same_instance"] and values["same_instance"][flow][gap] for flow, gap in columns]
        lines.append([name, *(None if share is None else round(100 * share, 2) for share in shares)])
    return lines


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
    result["table"] = table(result)
    path = Path(options.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    for name, *cells in result["table"]:
        shown = ["-" if cell is None else cell if isinstance(cell, str) else f"{cell:.2f}" for cell in cells]
        print(f"{name:15}" + "".join(f"{cell:>13}" for cell in shown))
    print(f"\n{result['num_subcrops']} subcrops; things in one: {result['subcrops_with_things']}; written to {path}")
    return result


if __name__ == "__main__":
    run_script(main)
