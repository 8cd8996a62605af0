"""Measure on real films what the chapters quote, and write it where they read it.

    python tests/measure_real.py path/to/real/data [shortcuts] [bars]

The folder holds kaggle/chest_xray, kaggle_full_size/chest_xray, covid_qu_ex_layout and pneumoniamnist_standin.npz.
Only figures are written (nbs/results/NAME.json), with the date and the lines of Python that give them; no picture leaves the folder.
"""
import json
import sys
from datetime import date
from pathlib import Path

import pandas as pd

from cxr_course import classical, data, evaluation, exploration, pipelines, splits
from cxr_course.core import atomic, frame

RESULTS = Path(__file__).parent.parent / "nbs" / "results"


def keep(name: str, command: str, rows: list[dict]) -> None:
    with atomic(RESULTS / f"{name}.json") as part: part.write_text(json.dumps(dict(date=date.today().isoformat(), command=command, rows=rows), indent=1) + "\n")
    print(pd.DataFrame(rows).to_string())


def shortcuts(root: Path) -> None:
    "AUC of everything but the lungs, for chapter 03."
    def alone(words, films, target=None):
        found = exploration.shortcuts(films, exploration.glance(films), target=target, unknown="picture")
        return dict(films=words, number=len(films)) | {r.shortcut: [round(v, 3) for v in (r.auc, r.low, r.high)] for r in found.itertuples() if pd.notna(r.auc)}
    kaggle, covid = data.load(root / "kaggle/chest_xray"), data.load(root / "covid_qu_ex_layout", classes=2)
    kinds = data.load(root / "kaggle/chest_xray", classes=3)
    ill = kinds[kinds["label"] != "NORMAL"].reset_index(drop=True)
    ill["label"] = ill["label"].cat.remove_unused_categories()
    normals = covid[covid["label"] == covid["label"].cat.categories[0]].assign(label="adult or unknown")
    children = frame([dict(path=str(p), label="child", **dict(zip(("height", "width"), data.shape_of(p)))) for p in sorted((root / "covid_qu_ex_layout/confound_paediatric_normals").glob("*.png"))])
    mixed = frame(pd.concat([normals.drop(columns="label").assign(label="adult or unknown"), children.assign(label="child")]), labels=["adult or unknown", "child"])
    keep("shortcuts", 'shortcuts(films, glance(films), unknown="picture")', [
        alone("Kermany (Kaggle) at original size: pneumonia", data.load(root / "kaggle_full_size/chest_xray")),
        alone("Kermany (Kaggle) shrunk to 224 x 224: pneumonia", kaggle),
        alone("of these, those with pneumonia: virus against bacteria", ill),
        alone("COVID-QU-Ex layout, all of one size: COVID-19 against normal", covid),
        alone("normal films of public COVID sets: child", mixed)])


def bars(root: Path) -> None:
    "What a classical machine reaches, for chapter 09."
    sets = [("Kaggle (Kermany et al.), 64 x 64", splits.hold_out(data.load(root / "kaggle/chest_xray"), .2, unknown="picture"), (64, 64)),
            ("PneumoniaMNIST, 28 x 28", data.load(root / "pneumoniamnist_standin.npz"), (28, 28))]
    rows = []
    for words, films, shape in sets:
        store = pipelines.build(films, shape)
        for kind in ("svm", "logistic"):
            reader = classical.fit(store, kind, unknown="picture")
            figures = evaluation.evaluate(reader.predict(store, "test"), reader.threshold, "picture").set_index("metric")
            of = lambda metric: [round(float(v), 3) for v in figures.loc[metric, ["value", "low", "high"]]]
            rows.append(dict(films=words, taught=int((films["split"] != "test").sum()), tested=int((films["split"] == "test").sum()), machine=f"PCA + {kind}", auc=of("AUC"), accuracy=of("accuracy")))
    keep("bars", 'classical.bar(pipelines.build(films, shape), kind, unknown="picture")', rows)


if __name__ == "__main__":
    if len(sys.argv) < 2: sys.exit(__doc__)
    for what in sys.argv[2:] or ("shortcuts", "bars"): {"shortcuts": shortcuts, "bars": bars}[what](Path(sys.argv[1]))
