"""The text-to-pixel contrastive loss (DCRIS Eq. 6, BarLeRIa Eq. 10)."""

import torch
import torch.nn.functional as F


def text_to_pixel_loss(logits, masks, exact=False):
    """Mean contrastive loss between the sentence and every pixel.

    The logit of pixel i is z_i = F_c^i . F_l + bias: the image's features in the 3x3 around i,
    against a 3x3 kernel made of the sentence (`head.Projector`). The papers pull the object's
    pixels (P) towards the sentence and push all others (N) away:

        L_i = -log sigmoid(z_i)         for i in P
        L_i = -log(1 - sigmoid(z_i))    for i in N,       L = mean of L_i over P and N.

    With y_i = 1 in P and 0 in N both lines are -y_i log sigmoid(z_i) - (1 - y_i) log(1 -
    sigmoid(z_i)), which is binary cross-entropy on the logits; PyTorch's form of it does not
    overflow for large |z|. Masks were resized with their photos, so at the object's edge 0 < y_i <
    1. Such a pixel counts for both lines in proportion.

    logits: (B, 1, s, s). masks: (B, 1, S, S) in [0, 1], resized to s by nearest neighbour as in
    the authors' programs: each logit answers for the upper left pixel of its cell. `exact`: the
    logits are enlarged to S instead, and all pixels count. Returns a scalar.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if exact:
        logits = F.interpolate(logits, masks.shape[-2:], mode="bilinear")
    targets = F.interpolate(masks.to(logits.dtype), logits.shape[-2:], mode="nearest")
    return F.binary_cross_entropy_with_logits(logits, targets)
