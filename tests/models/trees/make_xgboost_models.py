# SPDX-License-Identifier: Apache-2.0
"""Writes the XGBoost models of this folder and what XGBoost computes for them. Needs xgboost (3.2.0 made those that are here)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xgboost as xgb

FOLDER = Path(__file__).parent


def main() -> None:
    generator = np.random.default_rng(7)
    x = (generator.standard_normal((600, 6)) * [1, 10, 0.01, 1000, 1, 5]).astype(np.float32)
    x[:, 5] = np.round(x[:, 5])  # values that fall on thresholds
    noise = generator.standard_normal(600)
    y = (x[:, 0] + x[:, 1] / 10 + np.sign(x[:, 5]) + noise > 0).astype(int)
    three = np.digitize(x[:, 0] + x[:, 3] / 1000 + 0.3 * noise, [-0.7, 0.7])
    arrays = {"x": x[:400], "y": y[:400], "unseen": x[400:]}
    models = {
        "binary": xgb.XGBClassifier(n_estimators=12, max_depth=3, seed=0).fit(x[:400], y[:400]),
        "three": xgb.XGBClassifier(n_estimators=5, max_depth=2, seed=0).fit(x[:400], three[:400]),
        "counts": xgb.XGBRegressor(n_estimators=5, max_depth=3, objective="count:poisson", seed=0).fit(x[:400], three[:400]),
        "dart": xgb.XGBClassifier(n_estimators=6, max_depth=2, booster="dart", rate_drop=0.5, seed=0).fit(x[:400], y[:400]),
        "stopped": xgb.XGBClassifier(n_estimators=40, max_depth=3, early_stopping_rounds=2, seed=0).fit(
            x[:300], y[:300], eval_set=[(x[300:400], y[300:400])], verbose=False
        ),
    }
    for name, model in models.items():
        model.save_model(FOLDER / f"{name}.ubj")
        arrays[f"{name}/margin"] = model.predict(x, output_margin=True)
        arrays[f"{name}/decision"] = model.predict(x)
    models["binary"].save_model(FOLDER / "binary.json")
    categories = np.column_stack([x[:, 0], generator.integers(0, 5, 600)]).astype(np.float32)
    labels = (categories[:, 1] % 2 == 0).astype(int)
    table = xgb.DMatrix(categories, label=labels, feature_types=["q", "c"], enable_categorical=True)
    xgb.train({"max_depth": 2, "objective": "binary:logistic", "max_cat_to_onehot": 1}, table, 2).save_model(FOLDER / "categorical.ubj")
    xgb.train({"booster": "gblinear", "objective": "binary:logistic"}, xgb.DMatrix(x, label=y), 2).save_model(FOLDER / "linear.ubj")
    np.savez_compressed(FOLDER / "xgboost.npz", **arrays)


if __name__ == "__main__":
    main()
