"""The methods of PEFT's ``add_weighted_adapter`` in NumPy, one kernel at a time, written from the papers' formulas."""

import numpy as np


def pruned(x, density, mask=None):
    """By magnitude, or with DARE's mask."""
    if mask is not None:
        return x * mask / density
    kept = np.argsort(-np.abs(x).ravel(), kind="stable")[: int(density * x.size)]
    made = np.zeros_like(x).ravel()
    made[kept] = x.ravel()[kept]
    return made.reshape(x.shape)


def mixed(arrays, weights, method, density, majority, masks):
    if method.startswith(("ties", "dare", "magnitude")):
        arrays = [pruned(x, density, mask) for x, mask in zip(arrays, masks, strict=True)]
    if "ties" not in method:
        return sum(w * x for w, x in zip(weights, arrays, strict=True))
    made = np.zeros_like(arrays[0])
    for place in np.ndindex(*made.shape):
        values = np.array([x[place] for x in arrays])
        votes = values.sum() if majority == "total" else np.sign(values).sum()
        agree = np.sign(values) == (1 if votes >= 0 else -1)
        made[place] = (np.array(weights) * values)[agree].sum() / max(agree.sum(), 1)
    return made


def update(pairs, scales, weights, method, density=None, majority="total", rank=None, masks=None):
    """The update that the combined factors stand for, of shape (in, out).

    Args:
      pairs: (A, B) of shapes (in, r) and (r, out).
      masks: for DARE, of A, of B and of whole updates: one array for each pair.
    """
    masks = masks or [[None] * len(pairs)] * 3
    if method == "cat":
        return sum(w * s * a @ b for (a, b), s, w in zip(pairs, scales, weights, strict=True))
    if method.endswith("svd"):
        updates = [s * a @ b for (a, b), s in zip(pairs, scales, strict=True)]
        u, s, vt = np.linalg.svd(mixed(updates, weights, method, density, majority, masks[2]))
        return u[:, :rank] * s[:rank] @ vt[:rank]
    strengths = np.array(weights) * np.array(scales)
    root = np.sqrt(np.abs(strengths))
    signed = np.where(strengths < 0, -root, root)
    a = mixed([a for a, _ in pairs], signed, method, density, majority, masks[0])
    return a @ mixed([b for _, b in pairs], root, method, density, majority, masks[1])
