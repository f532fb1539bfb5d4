"""Configuration of the optical flow network that is trained without labels."""

from typing import Any

from transformers import PreTrainedConfig

from .config_checks import is_int, refuse_unknown
from .configuration_poodle import ChecksOverrides


class PoodleFlowConfig(ChecksOverrides, PreTrainedConfig):
    r"""
    Configuration of [`PoodleFlowModel`].

    Args:
        num_levels (`int`, defaults to 5):
            The pyramid's strides run from 4 to `2**num_levels`; small frames have fewer levels. The sides of the frames must be multiples
            of `2**num_levels`.
        stem_size (`int`, defaults to 16):
            Channels at stride 2.
        hidden_size (`int`, defaults to 32):
            Channels at stride 4, of each level's features, and of the context that the decoder passes on to the next finer level.
        decoder_sizes (`list[int]`, defaults to `[128, 96, 64]`):
            Channels of the decoder's convolutions; one decoder serves all levels.
        correlation_radius (`int`, defaults to 4):
            The decoder reads the correlations with the `(2 * correlation_radius + 1) ** 2` cells around each match.

    Raises:
        ValueError: a field is unknown, misspelt or out of range; the message names it.
    """

    model_type = "poodle_flow"

    num_levels: int = 5
    stem_size: int = 16
    hidden_size: int = 32
    decoder_sizes: list[int] | tuple[int, ...] = (128, 96, 64)
    correlation_radius: int = 4

    def __post_init__(self, **kwargs):
        refuse_unknown(self, kwargs)
        self._check_values()
        self.decoder_sizes = list(self.decoder_sizes)
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        made, before = "transformers_version" in vars(self), getattr(self, name, None)
        super().__setattr__(name, value)
        if made and name in PoodleFlowConfig.__annotations__:
            try:
                self._check_values()
            except ValueError:
                super().__setattr__(name, before)
                raise

    def _check_values(self) -> None:
        def within(value: Any, low: int, high: int) -> bool:
            return is_int(value) and low <= value <= high

        limits = {
            "num_levels": (2, 8),
            "stem_size": (1, 1024),
            "hidden_size": (1, 1024),
            "correlation_radius": (1, 16),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not within(value, low, high):
                raise ValueError(f"PoodleFlowConfig.{name} must be an integer between {low} and {high}, got {value!r}")
        sizes = self.decoder_sizes
        if not isinstance(sizes, (list, tuple)) or not sizes or not all(within(size, 1, 1024) for size in sizes):
            raise ValueError(
                f"PoodleFlowConfig.decoder_sizes must be a list of integers between 1 and 1024, got {sizes!r}"
            )

    @property
    def stride(self) -> int:
        """Stride of the coarsest level. The sides of the frames must be multiples of it."""
        return 2**self.num_levels


__all__ = ["PoodleFlowConfig"]
