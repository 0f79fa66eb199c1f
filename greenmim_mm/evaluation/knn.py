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
    leave_one_out: bool = False,
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
        leave_one_out: Query i is entry i of the bank, which has no vote for itself.

    Returns:
        ``(N, num_classes)``: shares of the votes, each row sums to 1.

    Raises:
        ValueError: If ``k`` is not in 1 to M (M - 1 if one is left out), ``temperature`` is not
            positive, a label is none of the classes, or there is no query for each entry of which
            one is to be left out.

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> knn_scores(torch.tensor([[2.0, 0.0]]), bank, torch.tensor([0, 1]), 2, k=1)
        tensor([[1., 0.]])
    """
    if leave_one_out and len(queries) != len(bank):
        raise ValueError(f'{len(queries)} queries are not the {len(bank)} entries of the bank')
    others = len(bank) - leave_one_out
    if not 1 <= k <= others:
        what = 'other labelled images' if leave_one_out else 'labelled images'
        raise ValueError(f'k={k} must lie between 1 and the {others} {what}')
    if not temperature > 0:
        raise ValueError(f'temperature={temperature} must be positive')
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f'labels from {int(labels.min())} to {int(labels.max())} for {num_classes} classes'
        )
    bank = F.normalize(bank, dim=1)
    rows = max(1, _MAX_SIMILARITIES // len(bank))
    scores = []
    for start in range(0, len(queries), rows):
        similarities = F.normalize(queries[start : start + rows], dim=1) @ bank.t()
        if leave_one_out:
            similarities.diagonal(start).fill_(-torch.inf)
        scores.append(_votes(similarities, labels, num_classes, k, temperature))
    return torch.cat(scores) if scores else queries.new_zeros(0, num_classes)


def _votes(
    similarities: Tensor, labels: Tensor, num_classes: int, k: int, temperature: float
) -> Tensor:
    nearest, index = similarities.topk(k, dim=1)
    # Shares are the same if all similarities are shifted; a softmax does not overflow.
    weights = (nearest / temperature).softmax(dim=1)
    scores = weights.new_zeros(len(weights), num_classes)
    return scores.scatter_add_(1, labels[index], weights)
