"""Textures of the street's surfaces. They depend only on a seed and the surface point, so a point looks the same in all frames."""

from functools import lru_cache

import cv2
import numpy as np


@lru_cache(maxsize=8)
def _noise_tile(seed: int) -> np.ndarray:
    tile = np.random.default_rng([seed, 3]).random((256, 256)).astype(np.float32)
    return np.pad(tile, ((0, 1), (0, 1)), mode="wrap")


def noise(seed: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return smooth noise in [-1, 1] at (u, v): random values on an integer lattice, interpolated bilinearly, with period 256."""
    # cv2.remap takes at most 32767 columns, so the points are arranged as a picture of 1024 columns, padded with zeros.
    count = u.size
    rows = -(-count // 1024)
    where = np.zeros((2, rows * 1024), np.float32)
    where[0, :count], where[1, :count] = np.mod(u, 256).ravel(), np.mod(v, 256).ravel()
    x, y = where.reshape(2, rows, 1024)
    value = cv2.remap(_noise_tile(seed), x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return (value.ravel()[:count] * 2 - 1).reshape(u.shape)


def texture(seed: int, u: np.ndarray, v: np.ndarray, footprint: np.ndarray) -> np.ndarray:
    """
    Return the sum of three octaves of noise.

    Args:
        u, v: coordinates on the surface in metres.
        footprint: width of a pixel on the surface in metres. An octave fades out as a pixel grows from 0.5 to 1.5 of its cells.
    """
    total = np.zeros_like(u)
    for octave, (cell, weight) in enumerate(((0.12, 0.35), (0.5, 0.35), (2.5, 0.3))):
        fade = np.clip(1.5 - footprint / cell, 0, 1)
        if fade.any():
            total += weight * fade * noise(seed + octave, u / cell, v / cell)
    return total


def hashed(seed: int, *keys: np.ndarray) -> np.ndarray:
    """Hash a seed and integer arrays to float64 numbers, uniform in [0, 1)."""
    with np.errstate(over="ignore"):  # the hash relies on unsigned integers wrapping around
        value = np.full(
            np.shape(keys[0]), (seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64
        )
        for key in keys:
            value ^= np.asarray(key).astype(np.int64).astype(np.uint64) * np.uint64(0xBF58476D1CE4E5B9)
            value ^= value >> np.uint64(31)
            value *= np.uint64(0x94D049BB133111EB)
            value ^= value >> np.uint64(29)
    return (value >> np.uint64(40)).astype(np.float64) / 2**24
