"""Which optimiser moves which weights of a student: Muon the weight matrices, AdamW all else."""

from functools import partial

import torch
from timm.optim import muon

_NEWTON_SCHULZ = muon.zeropower_via_newtonschulz


def choose(student, recipe):
    """The optimisers of a student's weights that learn, each made for its recipe (``settings.Recipe``).

    Muon (K. Jordan et al., 2024; timm's, as torch's takes no convolutions) makes every direction of a matrix's momentum
    count alike, where a gradient is mostly of few; a convolution's weights are a matrix of its outputs by all that each
    sees. Its steps are as long as AdamW's (arXiv 2502.16982, section 2.2), so that both go by one learning rate. What
    is no matrix, and the parts that the recipe's ``adamw`` names, are AdamW's.
    """
    learning = [(name, weights) for name, weights in student.named_parameters() if weights.requires_grad]
    matrices = [weights for name, weights in learning if _is_matrix(weights) and not name.startswith(recipe.adamw)]
    kept = {id(weights) for weights in matrices}
    others = [weights for _, weights in learning if id(weights) not in kept]
    settings = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    found = [torch.optim.AdamW(others, fused=True, **settings)] if others else []
    if matrices:
        muon.zeropower_via_newtonschulz = partial(_NEWTON_SCHULZ, dtype=_precision(matrices[0].device))
        found.append(muon.Muon(matrices, nesterov=True, **settings))
    return found


def _is_matrix(weights):
    """Not a position embedding (1, tokens, channels) either, nor the filters of a depthwise convolution."""
    return weights.ndim > 1 and min(weights.shape[:2]) > 1


def _precision(device):
    """timm's is bfloat16, which a CPU without matrix units for it takes two to twenty times as long for."""
    if device.type == "cpu" and not torch.cpu.get_capabilities().get("amx_bf16"):
        return torch.float32
    return torch.bfloat16
