"""The street's cameras: their position and direction at any time, and the video sources that name them."""

import math
from dataclasses import dataclass

import numpy as np

# Default fields of `Street` for each camera: height in metres, speed in metres a second, pitch in degrees, and the factor on all sway.
CAMERAS = {
    "driving": {"camera_height": 1.5, "speed": 8.0, "pitch": 0.0, "sway": 1.0},
    "walking": {"camera_height": 1.6, "speed": 1.4, "pitch": 3.0, "sway": 1.0},
    "static": {"camera_height": 5.0, "speed": 0.0, "pitch": 14.0, "sway": 0.0},
    "aerial": {"camera_height": 25.0, "speed": 3.0, "pitch": 48.0, "sway": 1.0},
}


@dataclass(frozen=True)
class Pose:
    """
    A camera at one time.

    Args:
        position: (3,) in world coordinates, metres.
        rotation: (3, 3), maps camera coordinates (x right, y down, z forward) to world coordinates.
        focal: focal length in pixels.
    """

    position: np.ndarray
    rotation: np.ndarray
    focal: float


def check_camera(name: str, field: str) -> None:
    """Raise ValueError if there is no camera `name`; the message names `field` and the known cameras."""
    if name not in CAMERAS:
        raise ValueError(f"{field} must be one of {', '.join(CAMERAS)}, got {name!r}")


def street_camera(source: str) -> str | None:
    """
    Return the camera of a video source: "driving" for `street`, NAME for `street:NAME`, `None` for sources other than the street.

    Raises:
        ValueError: there is no such camera; the message names the known ones.
    """
    name, colon, camera = source.partition(":")
    if name != "street":
        return None
    if colon:
        check_camera(camera, f"the camera in {source!r}")
    return camera if colon else "driving"


def camera_pose(street, t: float) -> Pose:
    """Return the pose of the camera of `street` at time t (seconds)."""
    rng = np.random.default_rng([street.seed, 1])
    phase = rng.uniform(0, 2 * math.pi, 5)
    period = rng.uniform(5, 11, 5)
    wave = np.sin(2 * math.pi * t / period + phase) * street.sway
    start = rng.uniform(0, 500)
    # The speed varies by up to a quarter (times sway); `way`, the distance covered, is its integral.
    way = street.speed * (t + 0.25 * period[0] / (2 * math.pi) * wave[0])
    x, lift, yaw, tilt, roll = _PATHS[street.camera](wave, t, street.sway, rng)
    # Keep the camera above the ground. From below, the ground's depth would be negative, and the ground would hide everything.
    position = np.array([x, max(street.camera_height + lift, 0.05), start + way])
    pitch = math.radians(street.pitch) + tilt
    right = np.array([math.cos(yaw), 0, -math.sin(yaw)])
    level = np.array([math.sin(yaw), 0, math.cos(yaw)])
    up = np.array([0.0, 1, 0])
    forward = math.cos(pitch) * level - math.sin(pitch) * up
    down = -math.sin(pitch) * level - math.cos(pitch) * up
    if roll:
        cos, sin = math.cos(roll), math.sin(roll)
        right, down = cos * right + sin * down, cos * down - sin * right
    focal = street.width / 2 / math.tan(math.radians(street.field_of_view) / 2)
    return Pose(position, np.stack([right, down, forward], axis=1), focal)


# Each path returns x and the change in height (metres), then the yaw, the change in pitch, and the roll (radians).


def _driving(wave, t, sway, rng):
    return 1.8 + 0.25 * wave[1], 0.02 * wave[2], 0.05 * wave[3], 0.012 * wave[4], 0.0


def _walking(wave, t, sway, rng):
    """Walk on the right pavement, turned slightly to the road. The head rises with each step and swings from foot to foot."""
    step = 2 * math.pi * rng.uniform(1.8, 2.2) * t + rng.uniform(0, 4 * math.pi)
    bob, swing = sway * math.sin(step), sway * math.sin(step / 2)
    yaw, tilt = -0.18 + 0.2 * wave[3] + 0.01 * swing, 0.06 * wave[4] + 0.008 * bob
    return 7.85 + 0.08 * wave[1] + 0.03 * swing, 0.03 * bob, yaw, tilt, 0.02 * wave[2] + 0.012 * swing


def _static(wave, t, sway, rng):
    """Hang on an arm over the parked cars, turned slightly to the road."""
    return 6.5 + 0.1 * wave[1], 0.02 * wave[2], rng.uniform(-0.35, -0.15) + 0.05 * wave[3], 0.012 * wave[4], 0.0


def _aerial(wave, t, sway, rng):
    """Fly over the road, 20 to 30 m high, drifting to both sides."""
    x, lift = rng.uniform(-3, 3) + 2 * wave[1], rng.uniform(-4, 4) + wave[2]
    return x, lift, 0.25 * wave[3], 0.05 * wave[4], 0.03 * wave[0]


_PATHS = {"driving": _driving, "walking": _walking, "static": _static, "aerial": _aerial}
