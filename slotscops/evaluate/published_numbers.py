"""Published scores, shown beside ours if class, number of parts and protocol match. We measured none of them.

Choudhury et al., "Unsupervised Part Discovery from Contrastive Reconstruction" (NeurIPS 2021, arXiv:2111.06349),
Table 4: PASCAL-Part, K = 4, one model for each class, the true object mask given, the part listed first on top. Their
crops and networks differ from ours, so the table shows the state of the field and does not rank methods.
"""

from typing import NamedTuple

SOURCE = "Choudhury et al. 2021, Table 4"
NUM_PARTS = 4
PROTOCOL, ORDER = "mask", "first"
_METHODS = ("DFF", "SCOPS", "Choudhury et al.")
# For each class and method: NMI and ARI, x 100.
_TABLE = {
    "sheep": ((12.2, 21.6), (26.5, 46.3), (35.0, 59.8)),
    "horse": ((14.4, 32.3), (29.4, 55.7), (37.4, 68.9)),
    "cow": ((12.7, 23.3), (28.8, 51.2), (35.3, 59.7)),
    "motorbike": ((19.1, 37.2), (35.4, 59.2), (40.5, 64.7)),
    "aeroplane": ((16.4, 38.3), (35.1, 68.0), (45.1, 79.6)),
    "bus": ((13.5, 28.5), (35.7, 66.0), (38.8, 67.6)),
    "car": ((9.0, 24.1), (33.6, 67.1), (36.8, 72.7)),
    "bicycle": ((17.8, 39.1), (28.9, 52.4), (34.8, 64.7)),
    "dog": ((14.8, 32.3), (30.1, 52.2), (46.6, 73.6)),
    "cat": ((18.0, 37.5), (33.7, 46.6), (47.9, 75.4)),
}


class Published(NamedTuple):
    method: str
    nmi: float  # NMI and ARI as in our scores, not x 100
    ari: float


def published_scores(class_name: str, num_parts: int) -> list[Published]:
    """The published scores for a class and number of parts. Empty if there are none."""
    if num_parts != NUM_PARTS or class_name not in _TABLE:
        return []
    pairs = zip(_METHODS, _TABLE[class_name], strict=True)
    return [Published(method, nmi / 100, ari / 100) for method, (nmi, ari) in pairs]
