"""What an alignment says of itself, as JSON can hold it."""

import numpy as np

EDGES = (0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # of the residuals' histogram, as shares of the depth


def report(aligned, world, state, borrowed, drift):
    """JSON-able report of an ``Alignment``.

    Args:
        aligned: the ``Alignment``.
        world: its ``Worlds``.
        state: its joint ``State``.
        borrowed: images whose focal is that of the others.
        drift: ``(N,)`` degrees by which the spanning tree alone was off, or None with known poses.
    """
    used = np.isfinite(aligned.pair_scales)
    residuals = aligned.pair_residuals[used]
    lost = np.flatnonzero(~aligned.valid.any(axis=(1, 2)))
    return {
        "images": len(aligned.depth),
        "images_without_labels": lost.tolist(),
        "rejected_images": {str(k): world.outside.get(int(k), "no pixel on which its predictions agree") for k in lost},
        "pairs": len(aligned.pair_scales),
        "pairs_used": int(used.sum()),
        "rejected_pairs": {str(k): reason for k, reason in aligned.rejected_pairs.items()},
        "world": world.frame,
        "world_error": world.world_error,
        "pieces": [np.flatnonzero(world.piece == k).tolist() for k in range(world.piece.max(initial=-1) + 1)],
        "focals_of_other_images": borrowed,
        "valid_share": float(aligned.valid.mean()),
        "depth_noise": float(state.depth_noise),
        "ray_noise": float(state.ray_noise),
        "residual_median": float(np.median(residuals)) if used.any() else None,
        "residual_histogram": {"edges": list(EDGES), "pairs": np.histogram(residuals, [*EDGES, np.inf])[0].tolist()},
        "drift": _drift(world, drift),
    }


def _drift(world, tree_degrees):
    """How far the images are from what is known of each alone: their scales by their own pairs' rays, and, where poses
    were estimated, the rotations by which the spanning tree was off before the loops were closed."""
    scale = np.abs(world.scale_drift())
    degrees = np.full(1, np.nan) if tree_degrees is None else tree_degrees[world.piece >= 0]
    return {"scale_median": _told(np.median, scale), "scale_max": _told(np.max, scale),
            "tree_degrees_median": _told(np.median, degrees), "tree_degrees_max": _told(np.max, degrees)}  # fmt: skip


def _told(statistic, values):
    values = values[np.isfinite(values)]
    return float(statistic(values)) if len(values) else None
