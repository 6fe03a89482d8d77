"""Distillation losses: what a prediction may cost, by name, or a sum such as "laplace+0.01*reprojection".

Every loss takes a student's ``Prediction`` and an ``augmentation.Batch`` and returns a scalar, a mean over the labelled
pixels (``ray``: over all that the frame shows). Distances are in metres, reprojection errors in pixels.
"""

import torch
import torch.nn.functional as F

from kdutils.augmentation import world_points

FARTHEST = 50.0  # pixels from which on a reprojection error costs hardly more
NEAREST = 0.1  # metres before the camera; a point behind it has no image


def masked_mse(predicted, points, mask):
    """Mean squared error per coordinate in m², over labelled pixels (the paper's loss and figure).

    Args:
        predicted, points: ``(B, 3, H, W)`` in metres.
        mask: ``(B, 1, H, W)`` bool.
    """
    difference = torch.where(mask, predicted - points, 0)  # not a product, and no later: what is masked may be NaN
    return (difference**2).sum() / (3 * mask.sum().clamp(min=1))


def mse(prediction, batch):
    """The paper's: it asks for the mean of all answers that are possible."""
    return masked_mse(prediction.points, batch.points, batch.mask)


def l1(prediction, batch):
    """Euclidean distance: an outlier counts by its size, not by its square."""
    return _mean(_distance(prediction, batch), batch.mask)


def huber(prediction, batch, threshold=0.1):
    """Squared below ``threshold`` metres, straight above."""
    distance = _distance(prediction, batch)
    near = distance.clamp(max=threshold)
    return _mean(near * (distance - near / 2) / threshold, batch.mask)


def confidence(prediction, batch):
    """Distance, weighted by the teacher's confidence (DUSt3R's, 1 and more)."""
    return _mean(_distance(prediction, batch), torch.where(batch.mask, batch.confidence, 0))


def laplace(prediction, batch):
    """Negative log-likelihood of a Laplace distribution whose scale the student predicts: its uncertainty.

    It joins the plain distance, for alone it would give up the pixels that are hard at first.

    Raises:
        ValueError: the student predicts no uncertainty.
    """
    if prediction.log_scale is None:
        raise ValueError("the loss 'laplace' needs a student that predicts its uncertainty")
    distance, log_scale = _distance(prediction, batch), prediction.log_scale
    likelihood = _mean(distance * torch.exp(-log_scale) + log_scale, batch.mask)
    return 0.2 * likelihood + l1(prediction, batch)


def reprojection(prediction, batch):
    """How far from its pixel a predicted point appears in the image, through the known pose; bounded (DSAC*, ACE).

    It says nothing of the distance along the ray, so it joins another loss. Points behind the camera do not count.
    """
    to_camera = torch.linalg.inv_ex(batch.poses.float())[0]
    seen = torch.einsum("bij,bjhw->bihw", to_camera[:, :3, :3], prediction.points) + to_camera[:, :3, 3, None, None]
    image = torch.einsum("bij,bjhw->bihw", batch.intrinsics, seen)
    in_front = seen[:, 2:] > NEAREST
    pixels = image[:, :2] / torch.where(in_front, seen[:, 2:], 1)
    error = torch.sqrt(((pixels - batch.pixels) ** 2).sum(1, keepdim=True) + 1e-4)
    return _mean(FARTHEST * torch.tanh(error / FARTHEST), batch.mask & in_front)


def ray(prediction, batch):
    """How far a predicted point lies from its pixel's ray, in metres, with a label or without.

    Where the teacher says nothing, the known pose still says in which direction a pixel looks. A point behind the
    camera counts by its distance from where the ray begins, ``NEAREST`` metres before it.
    """
    height, width = batch.images.shape[-2:]
    eye = batch.poses[:, :3, 3, None, None]
    ahead = world_points(batch.pixels, torch.ones_like(batch.confidence), batch.intrinsics, batch.poses) - eye
    direction, offset = F.normalize(ahead, dim=1), prediction.points - eye
    reach = (offset * direction).sum(1, keepdim=True).clamp(min=NEAREST)
    x, y = batch.pixels.split(1, 1)  # of the frame: beyond it an augmented view repeats its border
    return _mean(_length(offset - reach * direction), (x > 0) & (x < width) & (y > 0) & (y < height))


LOSSES = {loss.__name__: loss for loss in (mse, l1, huber, confidence, laplace, reprojection, ray)}


def choose(text):
    """The loss that a setting names: one of ``LOSSES``, or a weighted sum such as ``"l1+0.01*reprojection"``.

    Raises:
        ValueError: there is no loss of this name; the message lists them.
    """
    terms = [term.strip().rpartition("*")[::2] for term in text.split("+")]
    if any(name not in LOSSES for _, name in terms):
        raise ValueError(f"no such loss: {text!r}. Use {', '.join(LOSSES)}, or a sum such as l1+0.01*reprojection")
    weighted = [(float(weight or 1), LOSSES[name]) for weight, name in terms]
    return lambda prediction, batch: sum(weight * loss(prediction, batch) for weight, loss in weighted)


def needs_uncertainty(text):
    """Whether the student has to predict its uncertainty for this loss."""
    return "laplace" in text


def _distance(prediction, batch):
    return _length(torch.where(batch.mask, prediction.points - batch.points, 0))


def _length(vectors):
    return torch.sqrt((vectors**2).sum(1, keepdim=True) + 1e-8)  # smooth at zero


def _mean(values, weights):
    return torch.where(weights > 0, values * weights, 0).sum() / weights.sum().clamp(min=1)
