"""Classification by the nearest neighbours among labelled features."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Similarities that are held at a time: 256 MB of float32.
_MAX_SIMILARITIES = 2**26


def knn_scores(
    queries: Tensor,
    bank: Tensor,
    labels: Tensor,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """Votes of the ``k`` nearest features of the bank, by class.

    A neighbour of cosine similarity ``s`` votes for its class with ``exp(s / temperature)``
    (Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination,
    CVPR 2018, section 3.4).

    Args:
        queries: ``(N, C)`` features, of any scale.
        bank: ``(M, C)`` labelled features, of any scale.
        labels: ``(M,)`` int64, classes of the bank.
        num_classes: How many classes there are.
        k: How many neighbours vote.
        temperature: The lower, the more the nearest count.

    Returns:
        ``(N, num_classes)``: shares of the votes, each row sums to 1.

    Raises:
        ValueError: If ``k`` is not in 1 to M, ``temperature`` is not positive, or a label is none
            of the classes.

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> knn_scores(torch.tensor([[2.0, 0.0]]), bank, torch.tensor([0, 1]), 2, k=1)
        tensor([[1., 0.]])
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f'k={k} must lie between 1 and the {len(bank)} labelled images')
    if not temperature > 0:
        raise ValueError(f'temperature={temperature} must be positive')
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f'labels from {int(labels.min())} to {int(labels.max())} for {num_classes} classes'
        )
    bank = F.normalize(bank, dim=1)
    rows = max(1, _MAX_SIMILARITIES // len(bank))
    scores = [
        _votes(F.normalize(part, dim=1) @ bank.t(), labels, num_classes, k, temperature)
        for part in queries.split(rows)
    ]
    return torch.cat(scores) if scores else queries.new_zeros(0, num_classes)


def _votes(
    similarities: Tensor, labels: Tensor, num_classes: int, k: int, temperature: float
) -> Tensor:
    nearest, index = similarities.topk(k, dim=1)
    # Shares are the same if all similarities are shifted; a softmax does not overflow.
    weights = (nearest / temperature).softmax(dim=1)
    scores = weights.new_zeros(len(weights), num_classes)
    return scores.scatter_add_(1, labels[index], weights)
