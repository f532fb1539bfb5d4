"""The two objectives as pure functions."""

import torch
from torch import Tensor
from torch.nn import functional as F


def dense_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """
    Flow-equivariant dense loss (arXiv 2408.11208, section 3; Xiong et al. 2021, FlowE).

    Squared distance of unit vectors, 2 - 2 cos, averaged over the valid points: a masked mean per image, then a mean
    over images. An image without a valid point adds 0 (and no gradient).

    Args:
        prediction: (N, C, h, w) the student's, aligned to the source frame.
        target: (N, C, h, w) the teacher's, aligned to the source frame. No gradient flows into it.
        mask: (N, h, w) bool, True at valid points.

    Returns:
        Scalar, float32.
    """
    distance = 2 - 2 * F.cosine_similarity(prediction.float(), target.detach().float(), dim=1, eps=1e-6)
    # torch.where instead of a product, so that a masked point cannot pass on a NaN.
    total = torch.where(mask, distance, 0.0).sum(dim=(1, 2))
    return (total / mask.sum(dim=(1, 2)).clamp(min=1)).mean()


def pooled_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """
    Pooled loss on flow-matched subcrops (arXiv 2408.11208, section 3; Grill et al. 2020, BYOL): mean of 2 - 2 cos.

    Args:
        prediction: (M, C) the student's.
        target: (M, C) the teacher's. No gradient flows into it.

    Returns:
        Scalar, float32.
    """
    return (2 - 2 * F.cosine_similarity(prediction.float(), target.detach().float(), dim=1, eps=1e-6)).mean()


def feature_std(features: Tensor) -> Tensor:
    """
    Spread of unit feature vectors: standard deviation over samples, averaged over channels, times sqrt(C).

    It is 1 if the directions are uniform on the sphere, and 0 if the features have collapsed to one (Chen & He 2021).

    Args:
        features: (M, C).
    """
    return F.normalize(features.float(), dim=1).std(dim=0, correction=0).mean() * features.shape[1] ** 0.5
