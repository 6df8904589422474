"""Figures of quality: Fréchet distances between generated and held-out pictures, in features that anybody can compute again.

``|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))`` for means and covariances of the features (as FID, arXiv 1706.08500), in float64. Lower is
better; the distance of as many training pictures to the held-out ones is the floor that sampling noise sets.
"""

import numpy as np
import torch
import torch.nn.functional as F

import vidkern
from vidkern.errors import import_extra

from ..shared import metrics

FLOOR = 256  # training pictures whose figure is the floor: as many as the runs judge samples


def frechet(a, b):
    """`metrics.frechet` of arrays."""
    return metrics.frechet(torch.as_tensor(np.asarray(a)), torch.as_tensor(np.asarray(b)))


def _flat(pictures):
    return pictures.clamp(-1, 1).flatten(1).double().numpy()


class ClassifierMeasure:
    """Features: the 32 hidden units of a scikit-learn MLPClassifier fitted on the training digits with random_state 0.

    "distance": Fréchet distance to the held-out digits. "agreement": share of samples in which the classifier sees the digit asked for.
    """

    what = ("Fréchet distance to the held-out digits in the 32 hidden units of a small classifier (scikit-learn MLPClassifier, random_state 0, "
            "fitted on the training digits)")

    def __init__(self, train, labels, held_out, held_out_labels):
        network = import_extra("sklearn.neural_network", "the quality figure of the digits").MLPClassifier
        self.classifier = network((32,), random_state=0, max_iter=1000).fit(_flat(train), labels.numpy())
        self.reference = self.features(held_out)
        self.floor = {"distance": frechet(self.features(train[:FLOOR]), self.reference), "agreement": self.agreement(held_out, held_out_labels)}

    def features(self, pictures):
        return np.maximum(_flat(pictures) @ self.classifier.coefs_[0] + self.classifier.intercepts_[0], 0)

    def agreement(self, pictures, labels):
        return float((self.classifier.predict(_flat(pictures)) == labels.numpy()).mean())

    def __call__(self, pictures, labels):
        return {"distance": frechet(self.features(pictures), self.reference), "agreement": self.agreement(pictures, labels)}


class CropMeasure:
    """Features of the layout and of the detail of crops; Fréchet distances to the held-out crops, each and together.

    coarse: the first 32 principal components of the crops at 8x8 pixels, each scaled to variance 1 over the training crops (scikit-learn
    PCA). detail: for every colour, quadrant and each of the two finer pyramid levels the logarithm of the mean square, standardised over
    the training crops: 24 numbers, which see noise and blur that principal components do not. "distance": of all 56 together.
    """

    what = ("Fréchet distance to held-out crops in 32 principal components of the crops at 8x8 pixels (coarse) and 24 logarithms of the energy "
            "of the finer pyramid levels by colour and quadrant (detail), all scaled to unit variance over the training crops")

    def __init__(self, train, held_out):
        components = import_extra("sklearn.decomposition", "the quality figure of the clip").PCA
        layout, energy = self._parts(train)
        self.model = components(32, whiten=True, random_state=0).fit(layout)
        self.mean, self.std = energy.mean(0), energy.std(0)
        self.reference = self.features(held_out)
        self.floor = self(train[:FLOOR])

    def _parts(self, pictures):
        """(8x8 pictures [n, 192], logarithms of energy [n, 24])."""
        layout, *details = vidkern.pyramid_decompose(pictures.clamp(-1, 1), levels=3)
        energy = [torch.log(F.adaptive_avg_pool2d(level.square(), 2) + 1e-4).flatten(1) for level in details]
        return layout.flatten(1).double().numpy(), torch.cat(energy, 1).double().numpy()

    def features(self, pictures):
        """(coarse [n, 32], detail [n, 24])."""
        layout, energy = self._parts(pictures)
        return self.model.transform(layout), (energy - self.mean) / self.std

    def __call__(self, pictures, labels=None):
        found = self.features(pictures)
        coarse, detail = (frechet(a, b) for a, b in zip(found, self.reference))
        return {"distance": frechet(np.hstack(found), np.hstack(self.reference)), "coarse": coarse, "detail": detail}
