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
    is no matrix, and the parts that the recipe's ``adamw`` names, are AdamW's. (timm's Muon in turn leaves matrices of
    fewer than four rows to NAdamW: the three of the pixel-shuffle head's last layer.)
    """
    learning = [(name, weights) for name, weights in student.named_parameters() if weights.requires_grad]
    matrices = [weights for name, weights in learning if _is_matrix(weights) and not name.startswith(recipe.adamw)]
    kept = {id(weights) for weights in matrices}
    others = [weights for _, weights in learning if id(weights) not in kept]
    settings = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    found = [torch.optim.AdamW(others, fused=True, **settings)] if others else []
    if matrices:
        # A setting that timm leaves to this function alone: it holds for all of the process's Muons.
        muon.zeropower_via_newtonschulz = partial(_NEWTON_SCHULZ, dtype=_precision(matrices[0].device))
        found.append(muon.Muon(matrices, nesterov=True, **settings))
    return found


def _is_matrix(weights):
    """Whether Muon takes it: no vector, no position embedding (1, tokens, channels), no depthwise filters."""
    return weights.ndim > 1 and min(weights.shape[:2]) > 1


def _precision(device):
    """What Muon orthogonalises in; timm's bfloat16 takes a device not made for it two to twenty times as long."""
    if device.type == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_fast = device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16")
    return torch.bfloat16 if is_fast else torch.float32
