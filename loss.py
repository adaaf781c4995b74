"""The text-to-pixel contrastive loss (DCRIS Eq. 6, BarLeRIa Eq. 10)."""

import torch.nn.functional as F


def text_to_pixel_loss(logits, masks):
    """Mean contrastive loss between the sentence and every pixel.

    The logit of pixel i is z_i = F_c^i . F_l: its feature against the sentence's. The papers pull
    pixels of the thing meant (P) towards the sentence and push all others (N) away:

        L_i = -log sigmoid(z_i)         for i in P
        L_i = -log(1 - sigmoid(z_i))    for i in N,       L = mean of L_i over P and N.

    With y_i = 1 in P and 0 in N both lines are -y_i log sigmoid(z_i) - (1 - y_i) log(1 -
    sigmoid(z_i)), which is binary cross-entropy on the logits, word for word; PyTorch's form of it
    does not overflow for large |z|. A pixel on the border of the letterboxed mask, 0 < y_i < 1,
    counts for both sides in proportion.

    logits: (B, 1, h, w). masks: (B, 1, H, W) in [0, 1], resized to (h, w) by nearest neighbour.
    Returns a scalar in single precision (or double, for double logits).
    """
    dtype = logits.dtype if logits.dtype.itemsize > 4 else masks.dtype
    targets = F.interpolate(masks.to(dtype), logits.shape[-2:], mode="nearest")
    return F.binary_cross_entropy_with_logits(logits.to(dtype), targets)
