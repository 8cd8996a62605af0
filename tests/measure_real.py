"""Measure on real images what the lessons quote, and write it where they read it.

    python tests/measure_real.py path/to/real/data [shortcuts] [bars] [shift] [nih] [phantom_only] [borrowed]
                                [mined_labels]

The folder holds kaggle/chest_xray, kaggle_full_size/chest_xray, covid_qu_ex_layout,
pneumoniamnist_standin.npz and nih. Only numbers are written (nbs/results/NAME.json), with the date and the
lines of Python that give them; no image leaves the folder.
"""
import json
import sys
from datetime import date
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from cxr_course.core import atomic, cache_dir
from cxr_course.data import shortcuts as shortcuts_module
from cxr_course.data.building import build_store
from cxr_course.data.exploration import image_features
from cxr_course.data.files import image_shape
from cxr_course.data.loading import load_dataset
from cxr_course.data.pipeline import Normalizer
from cxr_course.data.splits import hold_out, split_by_patient
from cxr_course.evaluation.breakdown import evaluate
from cxr_course.evaluation.metrics import auc_by_task
from cxr_course.frame import Task, groups, make_frame
from cxr_course.models.baseline import fit_classical
from cxr_course.stats.intervals import auc_ci

RESULTS = Path(__file__).parent.parent / "nbs" / "results"
read = partial(load_dataset, unknown="image")


def keep(name: str, command: str, rows: list[dict]) -> None:
    with atomic(RESULTS / f"{name}.json") as part:
        part.write_text(json.dumps(dict(date=date.today().isoformat(), command=command, rows=rows),
                                   indent=1) + "\n")
    print(pd.DataFrame(rows).to_string())


def shortcuts(root: Path) -> None:
    "AUC of everything but the lungs, for the lesson on exploration."
    def alone(words, images, target=None):
        found = shortcuts_module.find_shortcuts(images, image_features(images), target=target)
        return dict(data=words,
                    number=len(images)) | {r.shortcut: [round(v, 3) for v in (r.auc, r.low, r.high)]
                                          for r in found.itertuples() if pd.notna(r.auc)}
    kaggle, covid = read(root / "kaggle/chest_xray"), read(root / "covid_qu_ex_layout", classes=2)
    kinds = read(root / "kaggle/chest_xray", classes=3)
    ill = kinds[kinds["label"] != "NORMAL"].reset_index(drop=True)
    ill["label"] = ill["label"].cat.remove_unused_categories()
    normals = covid[covid["label"] == covid["label"].cat.categories[0]].assign(label="adult or unknown")
    children = make_frame(
        [
            dict(path=str(p), label="child", **dict(zip(("height", "width"), image_shape(p))))
            for p in sorted((root / "covid_qu_ex_layout/confound_paediatric_normals").glob("*.png"))
        ],
        unknown="image",
    )
    mixed = make_frame(pd.concat([normals.drop(columns="label").assign(label="adult or unknown"),
                                  children.assign(label="child")]), labels=["adult or unknown", "child"])
    keep("shortcuts", "find_shortcuts(images, image_features(images))", [
        alone("Kermany (Kaggle) at original size: pneumonia", read(root / "kaggle_full_size/chest_xray")),
        alone("Kermany (Kaggle) shrunk to 224 x 224: pneumonia", kaggle),
        alone("of these, those with pneumonia: virus against bacteria", ill),
        alone("COVID-QU-Ex layout, all of one size: COVID-19 against normal", covid),
        alone("normal images of public COVID sets: child", mixed)])


def bars(root: Path) -> None:
    "What a classical machine reaches, for the lessons on networks."
    sets = [("Kaggle (Kermany et al.), 64 x 64", hold_out(read(root / "kaggle/chest_xray"), 0.2), (64, 64)),
            ("PneumoniaMNIST, 28 x 28", read(root / "pneumoniamnist_standin.npz"), (28, 28))]
    rows = []
    for words, images, shape in sets:
        store = build_store(images, shape)
        for kind in ("svm", "logistic"):
            reader = fit_classical(store, kind)
            found = evaluate(reader.predict(store, "test"), reader.threshold).set_index("metric")
            found = found[["value", "low", "high"]].astype(float).round(3)
            rows.append(dict(data=words, taught=int((images["split"] != "test").sum()),
                             tested=int((images["split"] == "test").sum()), machine=f"PCA + {kind}",
                             auc=found.loc["AUC"].tolist(), accuracy=found.loc["accuracy"].tolist()))
    keep("bars", "fit_classical(build_store(images, shape), kind)", rows)


def nih(root: Path) -> None:
    "Fourteen findings on 800 images, plain against weighted loss, for the lesson on class imbalance."
    import tempfile

    from cxr_course.evaluation.rare_findings import judge_findings
    from cxr_course.models.cnn import build_cnn
    from cxr_course.models.losses import undo_weighting, loss_for, initial_bias
    from cxr_course.training.fit import fit
    from cxr_course.training.recipe import basic_augmentation
    images = read(root / "nih")
    # the second list that came with it; 15 patients are in both
    held = images["split"] == "val"
    images = images[held | ~images["patient"].isin(set(images.loc[held, "patient"]))]
    images = images.assign(split=images["split"].replace({"val": "test"})).reset_index(drop=True)
    images = hold_out(images, .2)
    store, names, rows = build_store(images, (64, 64)), list(Task.of(images).names), []
    for kind, seed in ((k, s) for k in ("plain", "weighted") for s in range(3)):
        loss = loss_for(store, kind)
        model = initial_bias(build_cnn("separable", (64, 64, 1), len(names), seed=seed), store, loss)
        with tempfile.TemporaryDirectory() as place:
            run = fit(model, store, run=Path(place, "run"), epochs=25, lr=3e-3, optimizer="adamw",
                      schedule="cosine", patience=25, seed=seed, augment=basic_augmentation((64, 64)),
                      loss=loss)
        p = run.predictions[run.predictions["split"] == "test"].reset_index(drop=True)
        found = judge_findings(p)
        rare = found.index[found["value"].isna()]
        kept = [c for c in names if c not in rare]
        said = lambda q, kept=kept: round(float(q[[f"p_{c}" for c in kept]].to_numpy().mean()), 3)
        macro = auc_by_task(p.drop(columns=[*rare, *(f"p_{c}" for c in rare)])).loc["macro"]
        rows.append(dict(loss=kind, seed=seed, taught=int((images["split"] == "train").sum()), tested=len(p),
                         patients=p["patient"].nunique(), AUC=[round(float(v), 3)
                                                               for v in macro[["value", "low", "high"]]],
                         so=round(float(p[kept].to_numpy().mean()), 3), said=said(p),
                         corrected=said(undo_weighting(p, loss)),
                         findings=[dict(finding=c, patients=int(r.patients), auc=None if c in rare
                                        else round(float(r.value), 3)) for c,
                                   r in zip(found.index, found.itertuples())]))
    keep("nih-losses", "python tests/measure_real.py path/to/real/data nih", rows)


def shift(root: Path) -> None:
    "COVID-19 against normal, with children or adults as the normals, for the lesson on distribution shift."
    from cxr_course.shift.interventions import intervene
    from cxr_course.shift.monitor import monitor
    from cxr_course.shift.trials import intervention_effects, shortcut_trial
    from cxr_course.training.reference import write_reference
    from cxr_course.training.run import load_run
    folder, shape, seeds, words = root / "covid_qu_ex_layout", (96, 96), (0, 1, 2), ["Normal", "COVID-19"]
    adults = read(folder, classes=2, sizes=False)
    paths = [str(p) for p in sorted((folder / "confound_paediatric_normals").glob("*.png"))]
    young = split_by_patient(make_frame([dict(path=p, label="Normal") for p in paths], words,
                                        unknown="image"), {"train": 0.6, "val": 0.15, "test": 0.25})
    ill, normal = (adults[adults["label"] == c] for c in ("COVID-19", "Normal"))
    joined = lambda *parts: make_frame(pd.concat(parts), words)
    test = lambda images: images[images["split"] == "test"]
    with_young = joined(young, ill[ill["split"] == "train"].head(150), ill[ill["split"] == "val"].head(30),
                        test(ill))
    whole = build_store(joined(adults, young), shape)
    tests = {"adults": joined(test(ill), test(normal)), "children as normals, all": joined(test(ill), young),
             "children as normals, held out": joined(test(ill), test(young))}
    trials, monitors = [], []
    with TemporaryDirectory() as place:
        for taught, images, judged_on in (
            ("adults", adults, ("adults", "children as normals, all")),
            ("children", with_young, ("children as normals, held out", "adults")),
        ):
            for view in ("full image", "cropped", "centre blacked out", "border only"):
                seen = whole if view == "full image" else intervene(whole, view)
                t = shortcut_trial(view, seen.using(images), {r: seen.using(tests[r]) for r in judged_on},
                                   Path(place, taught), seeds, "separable", epochs=12, lr=3e-3,
                                   schedule="cosine", patience=99)
                trials += [dict(taught=taught, view=view, tested=r.place, images=len(tests[r.place]),
                                auc=[round(v, 3) for v in (r.value, r.low, r.high)])
                           for r in intervention_effects(t).itertuples()]
            run = load_run(Path(place, taught, "full-image-0"))
            write_reference(run.folder, run.model, whole.using(images), run.card)
            for words_, new in (
                ("adults of the test set", tests["adults"]),
                ("normal adults of the test set", test(normal)),
                ("children", test(young) if taught == "children" else young),
                ("other pneumonia", read(folder, sizes=False).query("label == 'Non-COVID'")),
            ):
                v = monitor(run, whole.using(new) if words_ != "other pneumonia" else build_store(new, shape))
                monitors.append(dict(taught=taught, new=words_, images=len(new),
                                     auc=[round(x, 3) for x in v.apart[:3]], p=round(v.p, 3), shift=v.shift))
    found = dict(date=date.today().isoformat(),
                 command="python tests/measure_real.py path/to/real/data shift",
                 data="layout of COVID-QU-Ex: 450 COVID-19, 450 normal, 90 "
                 "other pneumonia, 78 children passed off as normal adults", shape=shape, seeds=len(seeds),
                 model="separable", trials=trials, monitors=monitors)
    with atomic(RESULTS / "shift.json") as part: part.write_text(json.dumps(found, indent=1) + "\n")
    print(pd.DataFrame(trials).to_string(), pd.DataFrame(monitors).to_string(), sep="\n")


OPACITIES = ("Atelectasis", "Consolidation", "Edema", "Infiltration", "Pneumonia")


def simulated(recipe: str, shape: tuple[int, int]):
    "A network that has seen the phantom only: its run, how ill it calls an image, how ill one truly is."
    from dataclasses import replace

    import keras

    from cxr_course.models.cnn import CNN_SPECS, build_cnn, classifier_head, feature_extractor
    from cxr_course.training.augmentation import Augmentation
    from cxr_course.training.backbones import build_backbone, pretrain_on_phantom, pretraining_images
    from cxr_course.training.fit import fit
    from cxr_course.training.recipe import STRONG_RECIPE
    from cxr_course.training.run import load_run
    from cxr_course.training.run_folder import can_resume
    # the backbone of weights="phantom"
    if recipe.startswith("fourteen"):
        done = load_run(pretrain_on_phantom(shape=shape, patients=2000, epochs=20).parent)
        return (
            done,
            lambda p: 1 - (1 - p[[f"p_{c}" for c in OPACITIES]]).prod(axis=1),
            lambda p: p[list(OPACITIES)].max(axis=1),
        )
    store = pretraining_images(2000, shape, kind="pneumonia")
    augment, model = Augmentation(), build_backbone("compact", (*shape, 1))
    if recipe.endswith("strong augmentation"):
        augment = Augmentation(turn=8, shift=.1, zoom=.2, contrast=.5, brightness=.2)
        plain = build_cnn(replace(CNN_SPECS["separable"], rescale=None), (*shape, 1))
        look = keras.Sequential([keras.Input((*shape, 1)), Normalizer("image").layer(),
                                 *feature_extractor(plain).layers], name="features")
        model = keras.Sequential([keras.Input((*shape, 1)), look, classifier_head(plain)], name="compact")
    run = cache_dir("phantom_only") / f"{recipe.replace(' ', '-').replace(',', '')}-{shape[0]}"
    done = (
        load_run(run)
        if (run / "card.json").exists()
        else fit(model, store, run=run, epochs=20, augment=augment, resume=can_resume(run), **STRONG_RECIPE)
    )
    return done, lambda p: p["p_PNEUMONIA"], lambda p: (p["label"] == "PNEUMONIA").astype(float)


def phantom_only(root: Path) -> None:
    "Networks taught by the phantom alone on real images, which took no part in any choice of the recipes."
    from cxr_course.models.cnn import probabilities
    sets = [("Kaggle (Kermany et al.), test cut by patient", read(root / "kaggle/chest_xray"), (64, 64)),
            ("PneumoniaMNIST stand-in, test", read(root / "pneumoniamnist_standin.npz"), (28, 28))]
    three, rows = lambda e: [round(float(v), 3) for v in e[:3]], []
    for words, images, shape in sets:
        test = images[images["split"] == "test"].reset_index(drop=True)
        store = build_store(test, shape)
        for recipe in (
            "fourteen findings of adults",
            "children, ill or not",
            "children, ill or not, each image scaled by itself, strong augmentation",
        ):
            run, score, truth = simulated(recipe, shape)
            own, names = run.predictions[run.predictions["split"] == "test"], run.card["labels"]
            real = pd.DataFrame(probabilities(run.model.predict(store.array(), verbose=0),
                                              run.card["kind"] == "findings"),
                                columns=[f"p_{c}" for c in names])
            rows.append(dict(real_data=words, number=len(test), size=f"{shape[0]} x {shape[1]}",
                             taught=recipe,
                             phantom_test=three(auc_ci(truth(own), score(own), groups(own))),
                             real_test=three(auc_ci(test["label"] == "PNEUMONIA", score(real),
                                                          groups(test)))))
        # what is done is done
        keep("phantom_only", "python tests/measure_real.py path/to/real/data phantom_only", rows)


def borrowed(root: Path) -> None:
    "What pretraining on the phantom saves on real images, for the lesson on transfer learning."
    from cxr_course.training.augmentation import Augmentation
    from cxr_course.training.learning_curve import learning_curve
    from cxr_course.training.recipe import STRONG_RECIPE
    store = build_store(read(root / "kaggle/chest_xray"), (64, 64))
    recipe = STRONG_RECIPE | dict(augment=Augmentation())
    curve = learning_curve(store, (50, 200, 1000), [("compact", "none"), ("compact", "phantom")], range(3),
                           cache_dir("borrowed-100-epochs"), steps=600, **recipe)
    keep("borrowed", "python tests/measure_real.py path/to/real/data borrowed",
         curve.round(4).to_dict("records"))


def mined_labels(root: Path) -> None:
    "NIH's labels, which a program mined from reports, against the radiologists' of the same images."
    from cxr_course.data.loading import read_relabelled
    from cxr_course.evaluation.mined_labels import MINED_AS, judge_mined_labels
    again = read_relabelled(root / "nih")
    entry = next(p for p in sorted((root / "nih").rglob("Data_Entry_2017*.csv*")))
    judged = judge_mined_labels(read(entry, sizes=False), again, times=2000)
    three = lambda e: [round(float(v), 3) for v in e[:3]]
    rows = [dict(finding=r["finding"], mined_as=list(MINED_AS[r["finding"]]), images=r["images"],
                 patients=r["patients"], mined=round(r["mined"], 4), radiologists=round(r["radiologists"], 4))
            | {c: three(r[c]) for c in ("kappa", "sensitivity", "specificity", "PPV")}
            for r in judged.reset_index().to_dict("records")]
    found = dict(date=date.today().isoformat(),
                 command="python tests/measure_real.py path/to/real/data mined_labels",
                 data=f"NIH ChestX-ray14: {len(again):,} images of {again['patient'].nunique():,} patients "
                 "that radiologists read again (Majkowska et al. 2020), labels of Data_Entry_2017_v2020",
                 intervals="95 %, 2,000 resampled studies by patient", rows=rows)
    with atomic(RESULTS / "mined_labels.json") as part: part.write_text(json.dumps(found, indent=1) + "\n")
    print(pd.DataFrame(rows).to_string())


if __name__ == "__main__":
    if len(sys.argv) < 2: sys.exit(__doc__)
    for what in sys.argv[2:] or ("shortcuts", "bars", "shift", "nih"):
        {"shortcuts": shortcuts, "bars": bars, "shift": shift, "nih": nih, "phantom_only": phantom_only,
         "borrowed": borrowed, "mined_labels": mined_labels}[what](Path(sys.argv[1]))
