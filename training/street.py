"""
The street: a procedural drive with exact labels, instances, flow and visibility. It is the default video.

    python -m training.street --output_dir DIR [--camera walking] [--num_videos N ...] [--labelled N]

The street is straight and runs along +z (x right, y up, metres). It has a road, pavements, grass, facades left and right, traffic,
walkers, cyclists, poles, signs, lights and trees. A pinhole camera sees it from a car, on foot, from a pole or from the air
(street_cameras.py). All surfaces are planes or boxes, so the surface point that a pixel shows is known exactly, and so is that point's
position in any other frame. Pixel (row, column) has its centre at (column + 0.5, row + 0.5).
"""

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from training.street_cameras import CAMERAS, Pose, camera_pose, check_camera
from training.street_objects import Item, bounds, meet, moving_items, paint_item, static_items
from training.street_textures import hashed, noise, texture

FORMAT = "poodle-street-2"  # change this whenever the pictures change
# BDD100K's 19 classes in the order of its train ids. The street draws no "train" and no "motorcycle".
STREET_CLASSES = (
    "road sidewalk building wall fence pole traffic_light traffic_sign vegetation terrain sky person rider car truck bus train "
    "motorcycle bicycle"
).split()
STREET_CLASSES = tuple(name.replace("_", " ") for name in STREET_CLASSES)
CLASS = {name: index for index, name in enumerate(STREET_CLASSES)}

SKY, GROUND, LEFT, RIGHT, FIRST_ITEM = 0, 1, 2, 3, 16  # surface ids; those of items' faces start at FIRST_ITEM
ROAD_HALF_WIDTH, PAVEMENT_END, FACADE = 7.0, 9.2, 11.0  # |x| of each edge, metres
BLOCK = 12.0  # length of a facade's block, metres
VIEW_DISTANCE = 120.0  # items and roofs are drawn up to this distance ahead, metres


@dataclass
class Scene:
    """What one frame shows: for each pixel, surface id, coordinates on the surface, depth, label, instance, and colour."""

    camera: Pose
    items: dict[int, Item]
    surface_id: np.ndarray  # (H, W) int32
    coordinates: np.ndarray  # (H, W, 3) float32
    depth: np.ndarray  # (H, W) float32
    labels: np.ndarray  # (H, W) uint8
    instances: np.ndarray  # (H, W) int32
    colour: np.ndarray  # (H, W, 3) float32, 0 to 1


@dataclass(frozen=True)
class Street:
    """
    One drive. All results depend only on these parameters and on the time, not on the order of calls.

    Camera height, speed, pitch and sway default to the camera's values in `CAMERAS`.

    Args:
        seed: seed of the world and of its look.
        height: height of the frames in pixels.
        width: width of the frames in pixels.
        camera_height: height of the camera above the ground in metres.
        speed: mean speed in metres a second.
        pitch: mean pitch in degrees; positive values look down.
        field_of_view: horizontal field of view in degrees.
        sway: factor on the sway of yaw, pitch, roll, position and speed; 1 for a car, 0 for a tripod.
        camera: driving, walking, static or aerial.
    """

    seed: int = 0
    height: int = 256
    width: int = 512
    camera_height: float | None = None
    speed: float | None = None
    pitch: float | None = None
    field_of_view: float = 70.0
    sway: float | None = None
    camera: str = "driving"

    def __post_init__(self):
        check_camera(self.camera, "Street.camera")
        for name, value in CAMERAS[self.camera].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # the dataclass is frozen
        for name, low in (("height", 16), ("width", 16), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"Street.{name} must be an integer of at least {low}, got {value!r}")
        for name, low, high in (("camera_height", 0.1, 500), ("speed", 0, 60), ("pitch", -89, 89), ("sway", 0, 10)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"Street.{name} must be between {low} and {high}, got {getattr(self, name)!r}")
        if not 10 <= self.field_of_view <= 150:
            raise ValueError(f"Street.field_of_view must be between 10 and 150 degrees, got {self.field_of_view!r}")

    # --- public methods ---

    def frame(self, t: float) -> np.ndarray:
        """Return the RGB picture at time t (seconds), (H, W, 3) uint8."""
        return (self._scene(t).colour * 255 + 0.5).astype(np.uint8)

    def labels(self, t: float) -> np.ndarray:
        """Return the class of each pixel, (H, W) uint8, as an index into `STREET_CLASSES`."""
        return self._scene(t).labels.copy()

    def instances(self, t: float) -> np.ndarray:
        """Return the instance id of each pixel, (H, W) int32; 0 for stuff. An instance has the same id at all times."""
        return self._scene(t).instances.copy()

    def surface(self, t: float) -> tuple[np.ndarray, np.ndarray]:
        """
        Return the surface point that each pixel shows.

        Returns:
            coordinates: (3, H, W) float32, metres. They identify a surface point at all times. Points of items are in the item's own frame,
                all others in world coordinates; for the sky, coordinates are the unit vector of the direction.
            surface ids: (H, W) int32.
        """
        scene = self._scene(t)
        return scene.coordinates.transpose(2, 0, 1).copy(), scene.surface_id.copy()

    def flow(self, t0: float, t1: float) -> tuple[np.ndarray, np.ndarray]:
        """
        Compute the exact optical flow from the frame at t0 to the frame at t1.

        Returns:
            flow: (2, H, W) float32, pixels, x then y.
            visible: (H, W) bool, True if the pixel's point lies inside the other frame and is visible there, that is, if the pixel there
                shows the same surface.
        """
        source, target = self._scene(t0), self._scene(t1)
        points = source.coordinates.astype(np.float64)
        at_infinity = source.surface_id == SKY
        for key in np.unique(source.surface_id[source.surface_id >= FIRST_ITEM] // 8):
            pixels = source.surface_id // 8 == key
            points[pixels] += source.items[int(key)].position(t1)
        offset = np.where(at_infinity[..., None], 0.0, target.camera.position)
        # Multiplying row vectors by `rotation`, which maps camera to world, applies its transpose: from world to camera.
        seen = (points - offset) @ target.camera.rotation
        depth = seen[..., 2]
        ahead = depth > 1e-3
        safe = np.where(ahead, depth, 1.0)
        x = seen[..., 0] / safe * target.camera.focal + self.width / 2
        y = seen[..., 1] / safe * target.camera.focal + self.height / 2
        inside = ahead & (x >= 0) & (x < self.width) & (y >= 0) & (y < self.height)
        column = np.clip(np.floor(np.where(inside, x, 0)), 0, self.width - 1).astype(np.int64)
        row = np.clip(np.floor(np.where(inside, y, 0)), 0, self.height - 1).astype(np.int64)
        visible = inside & (target.surface_id[row, column] == source.surface_id)
        own_x, own_y = np.arange(self.width) + 0.5, np.arange(self.height)[:, None] + 0.5
        limit = 10.0 * self.width  # keeps the flow of points beside or behind the camera large but finite
        flow = np.stack([np.where(ahead, x, own_x + limit) - own_x, np.where(ahead, y, own_y + limit) - own_y])
        return np.clip(flow, -limit, limit).astype(np.float32), visible

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict) -> "Street":
        return cls(**values)

    def pose(self, t: float) -> Pose:
        """Return the camera's pose at time t (seconds)."""
        return camera_pose(self, t)

    # --- drawing ---

    def _scene(self, t: float) -> Scene:
        return _draw(self, round(float(t), 9))

    def look(self) -> dict:
        """Return the light and colours of this drive."""
        rng = np.random.default_rng([self.seed, 2])
        warmth = rng.uniform(-0.08, 0.08)
        zenith = np.array([0.35, 0.5, 0.75]) * rng.uniform(0.7, 1.1) + rng.uniform(-0.08, 0.08)
        return {
            "light": np.clip(rng.uniform(0.75, 1.1) * np.array([1 + warmth, 1.0, 1 - warmth]), 0, 1.2),
            "zenith": np.clip(zenith, 0, 1),
            "horizon": np.clip(np.array([0.82, 0.85, 0.88]) * rng.uniform(0.85, 1.05), 0, 1),
            "asphalt": rng.uniform(0.25, 0.42) + rng.uniform(-0.02, 0.02, 3),
            "pavement": rng.uniform(0.48, 0.65) + rng.uniform(-0.04, 0.04, 3),
            "grass": np.array([0.30, 0.40, 0.18]) * rng.uniform(0.7, 1.2, 3),
            # As in BDD100K, time of day, white balance and weather differ between drives, so that colour alone does not reveal the class.
            "exposure": 2.0 ** rng.uniform(-1.3, 0.2) * rng.uniform(0.88, 1.12, 3),
            "visibility": rng.uniform(80, 400),
            "fog": rng.uniform(0.3, 0.75),
        }


def facade_blocks(seed: int, side: int, block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return class and height (metres) of the facade blocks with the indices `block`, on side 0 (left) or 1 (right)."""
    kind, size = (
        hashed(seed + 11, block, np.full_like(block, side)),
        hashed(seed + 12, block, np.full_like(block, side)),
    )
    label = np.select(
        [kind < 0.52, kind < 0.84, kind < 0.94],
        [CLASS["building"], CLASS["vegetation"], CLASS["fence"]],
        CLASS["wall"],
    )
    height = np.select(
        [kind < 0.52, kind < 0.84, kind < 0.94], [5 + 9 * size, 3.5 + 4 * size, 1.7 + 0.5 * size], 2.2 + size
    )
    return label, height


@lru_cache(maxsize=4)
def _draw(street: Street, t: float) -> Scene:
    height, width, look, camera = street.height, street.width, street.look(), street.pose(t)
    x = (np.arange(width) + 0.5 - width / 2) / camera.focal
    y = (np.arange(height) + 0.5 - height / 2) / camera.focal
    # Each ray advances by 1 in depth, so that a factor on a ray is the depth of the point that it reaches.
    rays = np.stack(np.broadcast_arrays(x[None, :], y[:, None], 1.0), axis=-1) @ camera.rotation.T
    rays = rays.astype(np.float32)
    scene = Scene(
        camera,
        {},
        np.zeros((height, width), np.int32),
        np.zeros((height, width, 3), np.float32),
        np.full((height, width), np.inf, np.float32),
        np.full((height, width), CLASS["sky"], np.uint8),
        np.zeros((height, width), np.int32),
        np.zeros((height, width, 3), np.float32),
    )
    _draw_sky(street, look, rays, scene)
    _draw_ground(street, look, rays, scene)
    for side in (0, 1):
        _draw_facade(street, look, rays, scene, side)
        if street.camera != "driving":  # from a car, the fronts hide roofs and gables
            _draw_blocks(street, look, rays, scene, side)
    behind = 0.0 if street.camera == "driving" else camera.position[1]  # a high camera may see items below itself
    z, distance = camera.position[2] - behind, VIEW_DISTANCE + behind
    for item in static_items(street.seed, z, distance) + moving_items(street, t, z, distance):
        scene.items[item.key] = item
        paint_item(item, t, rays, scene, look)
    haze = np.clip(scene.depth / look["visibility"], 0, look["fog"])[..., None] * np.isfinite(scene.depth)[..., None]
    hazy = scene.colour * (1 - haze) + look["horizon"] * haze
    scene.colour = np.clip(hazy * look["exposure"], 0, 1).astype(np.float32)
    return scene


def _draw_sky(street: Street, look: dict, rays: np.ndarray, scene: Scene) -> None:
    direction = rays / np.linalg.norm(rays, axis=-1, keepdims=True)
    scene.coordinates[:] = direction
    azimuth = np.arctan2(direction[..., 0], direction[..., 2])
    elevation = np.arcsin(np.clip(direction[..., 1], -1, 1))
    up = np.clip(elevation / 0.7, 0, 1)[..., None]
    cloud = 0.6 * noise(street.seed + 20, azimuth * 12, elevation * 30) + 0.4 * noise(
        street.seed + 21, azimuth * 40, elevation * 90
    )
    sky = look["horizon"] * (1 - up) + look["zenith"] * up
    scene.colour[:] = sky + 0.12 * cloud[..., None] * np.clip(1.2 - up, 0, 1)
    # A distant line of trees closes off the street. Like the sky, it lies at infinity.
    ridge = 0.035 + 0.015 * noise(street.seed + 22, azimuth * 25, np.zeros_like(azimuth))
    trees = elevation < ridge
    leaf = noise(street.seed + 23, azimuth * 150, elevation * 150)
    scene.colour[trees] = (np.array([0.36, 0.44, 0.38]) * look["light"] * (1 + 0.25 * leaf[..., None]))[trees]
    scene.labels[trees] = CLASS["vegetation"]


def _draw_ground(street: Street, look: dict, rays: np.ndarray, scene: Scene) -> None:
    down = rays[..., 1] < -1e-4
    depth = np.where(down, -scene.camera.position[1] / np.where(down, rays[..., 1], -1), np.inf)
    hit = down & (depth < 1000)
    rows, columns = np.nonzero(hit)
    d = depth[hit].astype(np.float32)
    points = scene.camera.position + rays[hit] * d[:, None]
    px, pz = points[:, 0], points[:, 2]
    footprint = d / scene.camera.focal * np.maximum(1, d / scene.camera.position[1] * 0.35)
    side = np.abs(px)
    label = np.select(
        [side < ROAD_HALF_WIDTH, side < PAVEMENT_END], [CLASS["road"], CLASS["sidewalk"]], CLASS["terrain"]
    )
    base = np.select(
        [(side < ROAD_HALF_WIDTH)[:, None], (side < PAVEMENT_END)[:, None]],
        [look["asphalt"][None], look["pavement"][None]],
        look["grass"][None],
    )
    grain = texture(street.seed + 30, px, pz, footprint)
    roughness = np.select([side < ROAD_HALF_WIDTH, side < PAVEMENT_END], [0.35, 0.25], 0.6)
    colour = base * (1 + roughness * grain)[:, None]
    clear = np.clip(1.5 - footprint / 0.6, 0, 1)
    line = (np.abs(px) < 0.08) & (np.mod(pz, 6) < 3.5)
    line |= np.abs(side - 3.7) < 0.07
    crossing = (np.mod(pz, 96) < 3) & (np.mod(px, 1.2) < 0.6) & (side < 6.6)
    paint = ((line | crossing) & (side < ROAD_HALF_WIDTH)) * clear
    colour += (0.85 - colour) * (0.8 * paint)[:, None]
    kerb = np.abs(side - ROAD_HALF_WIDTH) < 0.12
    colour[kerb] *= 0.75
    slab = (label == CLASS["sidewalk"]) & ((np.mod(pz, 1.0) < 0.05) | (np.mod(px, 1.0) < 0.05))
    colour *= 1 - 0.3 * (slab * np.clip(1.5 - footprint / 0.1, 0, 1))[:, None]
    scene.depth[rows, columns] = d
    scene.surface_id[rows, columns] = GROUND
    scene.coordinates[rows, columns] = points
    scene.labels[rows, columns] = label
    scene.colour[rows, columns] = colour * look["light"]


def _draw_facade(street: Street, look: dict, rays: np.ndarray, scene: Scene, side: int) -> None:
    plane = FACADE if side else -FACADE
    toward = rays[..., 0] > 1e-4 if side else rays[..., 0] < -1e-4
    depth = np.where(toward, (plane - scene.camera.position[0]) / np.where(toward, rays[..., 0], 1), np.inf)
    hit = toward & (depth > 0) & (depth < scene.depth) & (depth < 1000)
    if not hit.any():
        return
    d = depth[hit].astype(np.float32)
    points = scene.camera.position + rays[hit] * d[:, None]
    py, pz = points[:, 1], points[:, 2]
    block = np.floor(pz / BLOCK).astype(np.int64)
    label, top = facade_blocks(street.seed, side, block)
    green = label == CLASS["vegetation"]
    top = top + green * 0.8 * noise(street.seed + 41, pz, np.zeros_like(pz))
    standing = (py < top) & (py >= 0)
    # A fence is see-through between its bars.
    standing &= ~((label == CLASS["fence"]) & (np.mod(pz, 0.5) > 0.35) & (d < 25) & (np.mod(py, 0.8) > 0.12))
    rows, columns = (index[standing] for index in np.nonzero(hit))
    d, points, py, pz, block, label, green = (a[standing] for a in (d, points, py, pz, block, label, green))
    footprint = d / scene.camera.focal * np.maximum(1, np.abs(rays[rows, columns, 2] / rays[rows, columns, 0]))
    hue = np.stack([hashed(street.seed + 50 + c, block, np.full_like(block, side)) for c in range(3)], axis=-1)
    brick = 0.35 + 0.35 * hashed(street.seed + 54, block, np.full_like(block, side))[:, None] + 0.22 * (hue - 0.5)
    leaf = np.array([0.20, 0.32, 0.12]) * (0.7 + 0.7 * hue)
    colour = np.where(green[:, None], leaf, brick)
    grain = texture(street.seed + 44 + side, pz, py, footprint)
    colour *= (1 + np.where(green, 0.9, 0.3) * grain)[:, None]
    column, floor = np.floor(pz / 2.4).astype(np.int64), np.floor(py / 2.9).astype(np.int64)
    u, v = pz / 2.4 - column, py / 2.9 - floor
    window = (label == CLASS["building"]) & (u > 0.25) & (u < 0.75) & (v > 0.3) & (v < 0.85)
    glass = 0.12 + 0.4 * hashed(street.seed + 60, column, floor, np.full_like(column, side))
    clear = np.clip(1.4 - footprint / 1.2, 0, 1) * window
    colour += (glass[:, None] * np.array([0.8, 0.95, 1.1]) - colour) * clear[:, None]
    scene.depth[rows, columns] = d
    scene.surface_id[rows, columns] = RIGHT if side else LEFT
    scene.coordinates[rows, columns] = points
    scene.labels[rows, columns] = label
    scene.colour[rows, columns] = colour * look["light"] * (0.8 if side else 1.0)


def _draw_blocks(street: Street, look: dict, rays: np.ndarray, scene: Scene, side: int) -> None:
    """Draw the roofs and gables of the buildings and hedges. Their fronts are the facade, which is drawn already."""
    camera = scene.camera
    first, last = (int((camera.position[2] + reach) // BLOCK) for reach in (-camera.position[1], VIEW_DISTANCE))
    blocks = np.arange(first, last + 1)
    for block, label, top in zip(blocks, *facade_blocks(street.seed, side, blocks)):
        if label not in (CLASS["building"], CLASS["vegetation"]):
            continue
        green = label == CLASS["vegetation"]
        # A hedge's front ends at most 0.8 m below its mean height. With the roof at that level, no ray passes between front and roof.
        depth, top = (3.0, top - 0.8) if green else (10.0, top)
        near, far = (FACADE, FACADE + depth) if side else (-FACADE - depth, -FACADE)
        low, high = np.array([near, 0.0, block * BLOCK]), np.array([far, top, (block + 1) * BLOCK])
        corners = np.stack(np.meshgrid(*np.stack([low, high], axis=1)), axis=-1).reshape(-1, 3)
        area = bounds(camera, corners, *scene.depth.shape)
        if area is None:
            continue
        distance, face = meet(camera.position, rays[area].astype(np.float64), low, high)
        shown = (distance < scene.depth[area]) & (face > 0)  # leave out face 0, the front
        d, face = distance[shown].astype(np.float32), face[shown]
        points = (camera.position + rays[area][shown] * d[:, None]).astype(np.float32)
        rows, columns = np.nonzero(shown)
        rows, columns = rows + area[0].start, columns + area[1].start
        hue = np.array([hashed(street.seed + 70 + c, np.array([block]), np.array([side]))[0] for c in range(3)])
        base = np.array([0.20, 0.32, 0.12]) * (0.7 + 0.7 * hue) if green else 0.3 + 0.25 * hue[0] + 0.15 * (hue - 0.5)
        roof = face == 1
        grain = texture(street.seed + 75, points[:, 0], np.where(roof, points[:, 2], points[:, 1]), d / camera.focal)
        colour = base * (1 + (0.9 if green else 0.25) * grain)[:, None] * np.where(roof, 1.0, 0.7)[:, None]
        if not green:  # rows of tiles
            colour[roof & (np.mod(points[:, 0], 0.8) < 0.12)] *= 0.8
        scene.depth[rows, columns] = d
        # Ids 4 to 15, which repeat after six blocks (72 m). No roof hides another one that far away, so the repetition is harmless.
        scene.surface_id[rows, columns] = RIGHT + 2 * (block % 6) + face
        scene.coordinates[rows, columns] = points
        scene.labels[rows, columns] = label
        scene.colour[rows, columns] = colour * look["light"]


if __name__ == "__main__":
    from training.street_files import main  # which imports this module

    main()
