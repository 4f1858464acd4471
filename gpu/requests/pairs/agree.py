"""Compares the first step of the plans of each model and length: losses and gradient norms."""

import collections
import json
import os
import pathlib

rows = [json.loads(path.read_text()) for path in sorted(pathlib.Path(os.environ["OUT"]).glob("row_*.json"))]
same = collections.defaultdict(list)
for row in rows:
    same[row["length"], row["tokens"], row.get("set", "")].append(row)
for (length, tokens, _), group in same.items():
    first = group[0]
    for row in group[1:]:
        loss, norm = (abs(row[key][0] / first[key][0] - 1) for key in ("losses", "norms"))
        verdict = "agree" if loss < 1e-4 and norm < 0.01 else "DIFFER"
        speed = row["tokens_per_second"] / first["tokens_per_second"] - 1
        print(f"{row['label']:40s} {speed:+7.2%}; first step against {first['label']}: loss {loss:.1e} norm {norm:.1e} {verdict}")
