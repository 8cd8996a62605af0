"""How long do honest intervals take? 25,000 images, 14 findings, 1,000 studies resampled by patient, against a plain loop over scikit-learn.

Run it with `python tests/bench_evaluation.py`; `make bench` collects the last line. The plain loop is run for a few resamples and scaled.
"""
from __future__ import annotations

import json
import time

import numpy as np
from sklearn.metrics import roc_auc_score

from cxr_course.core import rng
from cxr_course.stats.bootstrap import bootstrap_counts, bootstrap_auc


def bench(
    images: int = 25_000, patients: int = 3_000, findings: int = 14, times: int = 1_000, loop: int = 6
) -> dict:
    "Seconds of both ways on the same data, their ratio, and the largest difference between their figures."
    g = rng(0, "bench.evaluation")
    keys = g.integers(0, patients, images)
    rate = g.uniform(.005, .2, findings)
    truth = (g.random((findings, images)) < rate[:, None]).astype(float)
    score = g.normal(size=(findings, images)) + truth
    start = time.perf_counter()
    codes, counts = bootstrap_counts(keys, times)
    ours = np.stack([bootstrap_auc(y, s, codes, counts) for y, s in zip(truth, score)])
    vectorised = time.perf_counter() - start
    start = time.perf_counter()
    rows = [np.flatnonzero(codes == c) for c in range(len(counts))]
    plain = np.empty((findings, loop))
    for j in range(loop):
        drawn = np.concatenate([rows[c] for c in np.repeat(np.arange(len(counts)), counts[:, j])])
        for f in range(findings): plain[f, j] = roc_auc_score(truth[f, drawn], score[f, drawn])
    scaled = (time.perf_counter() - start) * times / loop
    return dict(name=f"AUC intervals, {images} images x {findings} findings x {times} resamples by patient",
                seconds=round(vectorised, 2), peer="loop over scikit-learn, scaled",
                peer_seconds=round(scaled, 1), ratio=round(scaled / vectorised, 1),
                largest_difference=float(np.abs(ours[:, :loop] - plain).max()))


if __name__ == "__main__":
    result = bench()
    assert result["largest_difference"] < 1e-12
    print(json.dumps(result))
