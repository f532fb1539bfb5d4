"""Standing and moving objects of the street: where each is at a given time, and how it is painted into a frame."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

POLE, LIGHT, SIGN, TREE, PERSON, CYCLIST, CAR, TRUCK, BUS = range(9)
# Half width (x), height (y) and half length (z) in metres. Items of length 0 are flat and face along the street.
SIZES = {
    POLE: (0.09, 6.0, 0.0),
    LIGHT: (0.2, 0.95, 0.0),
    SIGN: (0.38, 0.76, 0.0),
    TREE: (2.2, 6.0, 0.0),
    PERSON: (0.3, 1.75, 0.0),
    CYCLIST: (0.35, 1.8, 0.0),
    CAR: (0.9, 1.5, 2.1),
    TRUCK: (1.2, 3.1, 3.6),
    BUS: (1.25, 3.0, 5.0),
}
# Train ids of BDD100K.
LABELS = {POLE: 5, LIGHT: 6, SIGN: 7, TREE: 8, PERSON: 11, CYCLIST: 12, CAR: 13, TRUCK: 14, BUS: 15}
BICYCLE = 18


@dataclass(frozen=True)
class Item:
    """
    One object. Its instance id is its key, and its surface ids are key * 8 + face.

    Args:
        key: at least 2, so that its surface ids start at `FIRST_ITEM` or above; the same at all times.
        kind: one of the keys of `SIZES`.
        origin: position at t = 0 of the item's own coordinate origin, the middle of its foot; metres.
        velocity: velocity along z in metres a second.
        style: six random numbers in [0, 1) for colours and shape.
        camera_way: only for an item that moves ahead of the camera: maps a time to an offset along z, metres.
    """

    key: int
    kind: int
    origin: tuple[float, float, float]
    velocity: float
    style: tuple[float, ...]
    camera_way: Callable[[float], float] | None = None

    def position(self, t: float) -> np.ndarray:
        x, y, z = self.origin
        return np.array([x, y, z + self.velocity * t + (self.camera_way(t) if self.camera_way else 0.0)])


def _style(rng: np.random.Generator) -> tuple[float, ...]:
    return tuple(rng.random(6))


def _key(lane: int, number: int) -> int:
    """Return a stable key, unique for lanes below 32 and numbers from -2^20 to 2^20 (some 10,000 km of street)."""
    return 2 + ((number + 2**20) * 32 + lane) % (2**27)


def static_items(seed: int, z: float, distance: float) -> list[Item]:
    """
    Return the standing items from a little behind z to `distance` metres ahead of z.

    Each cell of 12 m has its own random numbers, so that an item is the same from wherever the camera sees it.
    """
    items = []
    for cell in range(math.floor((z - 6) / 12), math.floor((z + distance) / 12) + 1):
        for side in (-1, 1):
            rng = np.random.default_rng([seed, 4, cell + 2**20, side + 1])
            lane = 0 if side < 0 else 8
            here = cell * 12.0

            def add(offset, kind, x, y, dz, rng=rng, here=here, lane=lane, cell=cell):
                items.append(Item(_key(lane + offset, cell), kind, (x, y, here + dz), 0.0, _style(rng)))

            if cell % 2 == (side > 0):
                add(0, POLE, side * 7.4, 0.0, 6.0)
                what = rng.random()
                if what < 0.45:
                    add(1, LIGHT, side * 7.35, 3.3 + rng.uniform(0, 1.2), 5.9)
                elif what < 0.85:
                    add(1, SIGN, side * 7.35, 2.1 + rng.uniform(0, 0.8), 5.9)
            if rng.random() < 0.45:
                add(2, TREE, side * rng.uniform(9.4, 10.4), 0.0, rng.uniform(0, 12))
            for slot in (0, 1):
                if rng.random() < 0.55:
                    what = rng.random()
                    kind = CAR if what < 0.92 else (TRUCK if what < 0.97 else BUS)
                    if kind == CAR or slot == 0:
                        add(3 + slot, kind, side * 5.7, 0.0, 3.0 + 6 * slot + rng.uniform(-0.4, 0.4))
    return items


def moving_items(street, t: float, z: float, distance: float) -> list[Item]:
    """
    Return traffic, walkers and cyclists at time t, from a little behind z to `distance` metres ahead of z.

    All items of a lane have the same velocity, so that none runs into another.
    """
    items = []
    # lane number, kind, x (m), velocity (m/s), spacing (m), share of places that are taken
    lanes = (
        (16, CAR, -1.9, -8.0, 26.0, 0.6),
        (17, PERSON, 8.0, 1.2, 9.0, 0.5),
        (18, PERSON, -8.1, -1.3, 8.0, 0.5),
        (19, PERSON, 8.8, -1.1, 14.0, 0.5),
        (20, CYCLIST, 4.1, 3.5, 45.0, 0.8),
        (21, CYCLIST, -4.1, -4.0, 50.0, 0.8),
        (22, PERSON, -8.8, 1.0, 13.0, 0.5),
    )
    if street.camera == "walking":
        lanes = tuple(lane for lane in lanes if lane[0] != 17)  # the camera walks there
    if street.camera != "driving":
        lanes += ((24, CAR, 1.9, 8.0, 30.0, 0.6),)  # the lane that a driving camera uses
    for lane, kind, x, velocity, spacing, share in lanes:
        first = math.floor((z - 8 - velocity * t) / spacing)
        last = math.floor((z + distance - velocity * t) / spacing) + 1
        for number in range(first, last + 1):
            rng = np.random.default_rng([street.seed, 5, lane, number + 2**20])
            if rng.random() >= share:
                continue
            what = rng.random() if kind == CAR else 0.0
            own = kind if what < 0.9 else (TRUCK if what < 0.96 else BUS)
            place = number * spacing + rng.uniform(-0.2, 0.2) * spacing
            origin = (x + rng.uniform(-0.3, 0.3), 0.0, place)
            items.append(Item(_key(lane, number), own, origin, velocity, _style(rng)))
    if street.speed > 0 and street.camera_height < 3 and street.camera in ("driving", "walking"):
        rng = np.random.default_rng([street.seed, 6])
        if rng.random() < 0.6:  # a car or walker ahead of the camera
            gap, phase = rng.uniform(11, 22), rng.uniform(0, 6.28)
            kind, x, share = (PERSON, 7.9, 0.3) if street.camera == "walking" else (CAR, 1.9, 1.0)

            def way(time, gap=gap * share, phase=phase, swing=2.0 * share):
                return street.pose(time).position[2] + gap + swing * math.sin(0.5 * time + phase)

            items.append(Item(_key(23, 0), kind, (x, 0.0, 0.0), 0.0, _style(rng), way))
    return items


def bounds(camera, corners: np.ndarray, height: int, width: int) -> tuple[slice, slice] | None:
    """
    Return the rows and columns that may show a convex body, or `None` if it is behind the camera or outside the frame.

    Args:
        camera: a `Pose`.
        corners: (N, 3) corners of the body in world coordinates.
        height: height of the frame in pixels.
        width: width of the frame in pixels.
    """
    seen = (corners - camera.position) @ camera.rotation
    if (seen[:, 2] <= 0.05).all():
        return None
    if (seen[:, 2] <= 0.05).any():  # partly behind the camera: the whole frame may show it
        return slice(0, height), slice(0, width)
    x = seen[:, 0] / seen[:, 2] * camera.focal + width / 2
    y = seen[:, 1] / seen[:, 2] * camera.focal + height / 2
    x0, x1 = max(math.floor(x.min()), 0), min(math.ceil(x.max()) + 1, width)
    y0, y1 = max(math.floor(y.min()), 0), min(math.ceil(y.max()) + 1, height)
    return (slice(y0, y1), slice(x0, x1)) if x0 < x1 and y0 < y1 else None


def paint_item(item: Item, t: float, rays: np.ndarray, scene, look: dict) -> None:
    """Draw an item into the scene, in the pixels at which it is nearer than what is drawn already."""
    half_width, height, half_length = SIZES[item.kind]
    place = item.position(t)
    signs = np.array([[a, b, c] for a in (-1, 1) for b in (0, 1) for c in (-1, 1)], dtype=np.float64)
    area = bounds(scene.camera, place + signs * (half_width, height, half_length), *scene.depth.shape)
    if area is None:
        return
    local_rays = rays[area].astype(np.float64)
    eye = scene.camera.position - place
    boxes = _boxes(item) if half_length else [((-half_width, 0.0, 0.0), (half_width, height, 0.0))]
    for part, (low, high) in enumerate(boxes):
        depth, face = meet(eye, local_rays, np.array(low), np.array(high))
        shown = depth < scene.depth[area]
        if not shown.any():
            continue
        points = eye + local_rays[shown] * depth[shown][:, None]
        colour, opaque, labels = _PAINTERS[item.kind](item, points, face[shown], part)
        rows, columns = (index[opaque] for index in np.nonzero(shown))
        rows, columns = rows + area[0].start, columns + area[1].start
        scene.depth[rows, columns] = depth[shown][opaque]
        # Faces 0 to 2 belong to the body, 3 to 5 to the cabin. Each is one plane.
        scene.surface_id[rows, columns] = item.key * 8 + face[shown][opaque] + 3 * part
        scene.coordinates[rows, columns] = points[opaque]
        scene.labels[rows, columns] = labels[opaque]
        scene.instances[rows, columns] = item.key
        shade = np.array([0.75, 1.05, 0.9])[face[shown][opaque]] if half_length else 1.0
        scene.colour[rows, columns] = colour[opaque] * look["light"] * np.reshape(shade, (-1, 1))


def _boxes(item: Item):
    if item.kind == CAR:
        roof = 1.35 + 0.3 * item.style[4]
        return [((-0.9, 0.12, -2.1), (0.9, 0.92, 2.1)), ((-0.78, 0.92, -1.5), (0.78, roof, 0.9))]
    half_width, height, half_length = SIZES[item.kind]
    return [((-half_width, 0.15, -half_length), (half_width, height, half_length))]


def meet(eye: np.ndarray, rays: np.ndarray, low: np.ndarray, high: np.ndarray):
    """
    Intersect rays with the axis-aligned box from `low` to `high`. A box of length 0 along z is a rectangle that rays cross.

    Returns:
        The depth at which each ray enters the box, or inf if it misses, and the axis (0 to 2) of the face that the ray enters.
    """
    safe = np.where(np.abs(rays) < 1e-9, 1e-9, rays)
    a, b = (low - eye) / safe, (high - eye) / safe
    near, far = np.minimum(a, b), np.maximum(a, b)
    face = near.argmax(axis=-1)
    enter, leave = near.max(axis=-1), far.min(axis=-1)
    if low[2] == high[2]:
        leave = leave + 1e-9
        face = np.full_like(face, 2)
        enter = near[..., 2]
        leave = np.where((near[..., :2].max(-1) <= enter) & (far[..., :2].min(-1) >= enter), np.inf, -np.inf)
    return np.where((enter <= leave) & (enter > 0.05), enter, np.inf), face


def _flat(item: Item, count: int) -> np.ndarray:
    return np.full(count, LABELS[item.kind], dtype=np.uint8)


# Each painter maps N points `p` in the item's own frame, their faces and the box's index to (colour (N, 3), opaque (N,) bool, labels (N,)).


def _paint_pole(item, p, face, part):
    grey = 0.3 + 0.3 * item.style[0]
    colour = (
        np.full((len(p), 3), grey) * (1 - 0.5 * np.abs(p[:, :1]) / 0.09) * (0.9 + 0.1 * (np.mod(p[:, 1:2], 1) < 0.5))
    )
    return colour, np.ones(len(p), bool), _flat(item, len(p))


def _paint_light(item, p, face, part):
    colour = np.full((len(p), 3), 0.08)
    lamps = np.array([[0.2, 0.9, 0.5], [0.95, 0.75, 0.15], [0.95, 0.15, 0.1]])
    on = int(item.style[0] * 3)
    for index, lamp in enumerate(lamps):
        disc = p[:, 0] ** 2 + (p[:, 1] - 0.18 - 0.3 * index) ** 2 < 0.13**2
        colour[disc] = lamp * (1.0 if index == on else 0.3)
    return colour, np.ones(len(p), bool), _flat(item, len(p))


def _paint_sign(item, p, face, part):
    x, y = p[:, 0], p[:, 1] - 0.38
    shape = int(item.style[0] * 3)
    if shape == 0:
        distance = np.hypot(x, y) / 0.38
        ground, rim = np.array([0.95, 0.95, 0.95]), np.array([0.85, 0.1, 0.1])
    elif shape == 1:
        distance = np.maximum(np.abs(x), np.abs(y)) / 0.38
        ground, rim = np.array([0.1, 0.3, 0.75]), np.array([0.95, 0.95, 0.95])
    else:
        distance = np.abs(x) / 0.38 + (y + 0.38) / 0.76
        distance = np.maximum(distance, -y / 0.38)
        ground, rim = np.array([0.95, 0.8, 0.15]), np.array([0.1, 0.1, 0.1])
    colour = np.where((distance > 0.78)[:, None], rim, ground)
    figure = (np.abs(x) < 0.1 + 0.1 * item.style[1]) & (np.abs(y) < 0.16) & (np.mod(y + 1, 0.16) < 0.1)
    colour = np.where(figure[:, None], 1 - ground * 0.9, colour)
    return colour, distance <= 1, _flat(item, len(p))


def _paint_tree(item, p, face, part):
    x, y = p[:, 0], p[:, 1]
    radius = 1.6 + 0.5 * item.style[0]
    angle = np.arctan2(y - 4.0, x)
    edge = 1 + 0.12 * np.sin(7 * angle + 6 * item.style[1]) + 0.08 * np.sin(17 * angle + 9 * item.style[2])
    crown = np.hypot(x, (y - 4.0) * (1.6 / 1.9)) < radius * edge * 0.95
    trunk = (np.abs(x) < 0.16) & (y < 3.2)
    green = np.array([0.16 + 0.12 * item.style[3], 0.30 + 0.14 * item.style[4], 0.10])
    leaves = 0.75 + 0.3 * np.sin(9 * x + 5 * np.sin(7 * y)) * np.sin(8 * y + 4 * np.sin(6 * x)) + 0.12 * (y - 4)
    colour = np.where(
        crown[:, None], green * leaves[:, None], np.array([0.3, 0.22, 0.15]) * (1 - 2 * np.abs(x))[:, None]
    )
    return colour, crown | trunk, _flat(item, len(p))


def _clothes(item):
    return np.array([item.style[0], item.style[1], item.style[2]]) * 0.8 + 0.08


def _paint_person(item, p, face, part):
    x, y = p[:, 0], p[:, 1]
    head = np.hypot(x, (y - 1.6) * 0.85) < 0.12
    torso = (np.abs(x) < 0.2 + 0.06 * (y - 1.1)) & (y > 0.85) & (y < 1.46)
    arms = (np.abs(np.abs(x) - 0.255) < 0.045) & (y > 0.8) & (y < 1.42)
    legs = (np.abs(np.abs(x) - 0.095) < 0.075) & (y <= 0.88)
    colour = np.tile(_clothes(item), (len(p), 1))
    colour[legs] = np.array([0.12, 0.13, 0.2]) + 0.3 * item.style[3]
    colour[head] = np.array([0.85, 0.65, 0.52]) * (0.45 + 0.55 * item.style[4])
    colour[head & (y > 1.64)] = 0.1 + 0.3 * item.style[5]
    colour[legs & (y < 0.1)] = 0.08
    return colour, head | torso | arms | legs, _flat(item, len(p))


def _paint_cyclist(item, p, face, part):
    x, y = p[:, 0], p[:, 1]
    head = np.hypot(x, y - 1.65) < 0.13
    torso = (np.abs(x) < 0.21) & (y > 1.0) & (y < 1.53)
    legs = (np.abs(np.abs(x) - 0.12) < 0.07) & (y > 0.42) & (y <= 1.02)
    wheel = (np.abs(x) < 0.035) & (y < 0.68)
    bar = (np.abs(y - 0.98) < 0.03) & (np.abs(x) < 0.33)
    frame = (np.abs(x) < 0.05 + 0.12 * (np.mod(y, 0.2) < 0.05)) & (y >= 0.3) & (y < 0.95)
    rider = head | torso | legs
    colour = np.tile(np.array([0.1, 0.1, 0.12]), (len(p), 1))
    colour[torso] = _clothes(item)
    colour[legs] = 0.15 + 0.2 * item.style[3]
    colour[head] = np.array([item.style[5], 0.3, 1 - item.style[5]]) * 0.8
    labels = np.where(rider, LABELS[CYCLIST], BICYCLE).astype(np.uint8)
    return colour, rider | wheel | bar | frame, labels


def _paint_car(item, p, face, part):
    bright = 0.12 + 0.8 * item.style[3]
    paint = bright * (0.35 + 0.65 * np.array(item.style[:3])) if item.style[4] < 0.55 else np.full(3, bright)
    colour = np.tile(paint, (len(p), 1))
    x, y, z = p.T
    if part == 1:  # the cabin: glass between pillars
        glass = (face != 1) & (y > 0.98) & (y < 1.3)
        glass &= np.where(face == 0, (np.abs(z + 0.3) < 1.08) & (np.abs(z + 0.25) > 0.05), np.abs(x) < 0.68)
        colour[glass] = np.array([0.10, 0.13, 0.16]) + 0.1 * (y[glass] - 0.9)[:, None]
    else:
        wheels = (face == 0) & (np.hypot(np.abs(z) - 1.3, y - 0.33) < 0.33)
        colour[wheels] = 0.06
        colour[(face == 0) & (np.hypot(np.abs(z) - 1.3, y - 0.33) < 0.16)] = 0.5
        colour[(face != 1) & (y < 0.24)] *= 0.4
        lamps = (face == 2) & (np.abs(np.abs(x) - 0.7) < 0.15) & (np.abs(y - 0.68) < 0.09)
        # The camera sees the rear lamps of cars that drive in its direction, and the head lamps of oncoming ones.
        colour[lamps] = np.array([0.85, 0.08, 0.06]) if item.velocity >= 0 else np.array([0.98, 0.97, 0.85])
        plate = (face == 2) & (np.abs(x) < 0.27) & (np.abs(y - 0.48) < 0.07)
        colour[plate] = 0.9
        door = (face == 0) & ((np.abs(z - 0.75) < 0.02) | (np.abs(z + 0.3) < 0.02)) & (y > 0.3)
        colour[door] *= 0.55
    return colour, np.ones(len(p), bool), _flat(item, len(p))


def _paint_large(item, p, face, part):
    x, y, z = p.T
    paint = 0.25 + 0.65 * np.array(item.style[:3])
    colour = np.tile(paint, (len(p), 1))
    half_width, height, half_length = SIZES[item.kind]
    if item.kind == BUS:
        glass = (face == 0) & (y > 1.3) & (y < 2.4) & (np.mod(z, 1.4) > 0.15)
    else:
        glass = (face == 0) & (z < -half_length + 1.2) & (y > 1.5) & (y < 2.4)
        colour[(face == 0) & (np.mod(z, 0.9) < 0.06)] *= 0.7
    glass |= (face == 2) & (np.abs(x) < half_width - 0.2) & (y > 1.5) & (y < 2.5)
    colour[glass] = np.array([0.1, 0.12, 0.15])
    colour[(face == 2) & (np.abs(np.abs(x) - half_width + 0.25) < 0.12) & (np.abs(y - 0.8) < 0.12)] = (
        np.array([0.85, 0.1, 0.08]) if item.velocity >= 0 else np.array([0.97, 0.95, 0.8])
    )
    colour[(face == 0) & (np.hypot(np.abs(z) - half_length * 0.62, y - 0.5) < 0.48)] = 0.06
    colour[(y < 0.45) & (face != 1)] *= 0.5
    return colour, np.ones(len(p), bool), _flat(item, len(p))


_PAINTERS = {
    POLE: _paint_pole,
    LIGHT: _paint_light,
    SIGN: _paint_sign,
    TREE: _paint_tree,
    PERSON: _paint_person,
    CYCLIST: _paint_cyclist,
    CAR: _paint_car,
    TRUCK: _paint_large,
    BUS: _paint_large,
}
