"""Which optimiser moves which weights of a student: Muon the weight matrices, AdamW all else."""

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
        muon.zeropower_via_newtonschulz = _orthogonalised
        found.append(muon.Muon(matrices, nesterov=True, **settings))
    return found


def _is_matrix(weights):
    """Whether Muon takes it: no vector, no position embedding (1, tokens, channels), no depthwise filters."""
    return weights.ndim > 1 and min(weights.shape[:2]) > 1


def _orthogonalised(matrix, steps, coefficients, eps, safety_factor, scale_eps):
    """timm's Newton-Schulz iteration; in single precision by the matrix's Gram matrix, where that is less work.

    Each step multiplies X by a polynomial of X X^T. These polynomials commute, so that their product can be made of the
    first X X^T, small and square, and X is needed but once more, at the end (J. Zhang et al., *Gram Newton-Schulz*,
    2026). That rounds some hundred times as coarsely as timm's way: too coarsely for half precision, or many steps.

    Args:
        matrix: ``(n, m)``. The others are timm's.
    """
    dtype, is_tall = _precision(matrix.device), matrix.shape[-2] > matrix.shape[-1]
    wide = matrix.mT if is_tall else matrix
    is_wide = matrix.ndim == 2 and wide.shape[-1] >= 2 * wide.shape[-2]
    if dtype != torch.float32 or not is_wide or steps > muon.DEFAULT_NS_STEPS or scale_eps:
        return _NEWTON_SCHULZ(matrix, steps, coefficients, eps, safety_factor, dtype, scale_eps)
    wide = wide.float() / (wide.norm() * safety_factor).clamp(min=eps)
    gram, factor, product = wide @ wide.mT, None, None
    for a, b, c in coefficients[:steps] + coefficients[-1:] * (steps - len(coefficients)):
        gram = gram if product is None else factor @ gram @ factor
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor if product is None else factor @ product
    wide = product @ wide
    return wide.mT if is_tall else wide


def _precision(device):
    """What Muon orthogonalises in; timm's bfloat16 takes a device not made for it two to twenty times as long."""
    if device.type == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_fast = device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16")
    return torch.bfloat16 if is_fast else torch.float32
