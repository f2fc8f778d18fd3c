"""What the report draws of a folded model, from its record alone."""

from __future__ import annotations

import re

from sentei.report import depth

HISTORY = [
    {"step": step, "loss": 2.0, "kept": 1 - 0.1 * step, "budget": 1 - 0.09 * step, "gates": [1 - 0.3 * step, 0.99]}
    for step in range(1, 4)
]
SINGLES = [{"members": [i, i + 1], "kl": 0.1 * (i + 1)} for i in range(1, 4)]
RECORD = {
    "gates": HISTORY, "gates_polarised": 1.0, "stored_of_model": 0.8, "outside_of_model": 0.21,
    "kv_bytes_per_token": {"dense": 23040, "now": 18432},
    "fold": {"singles": SINGLES, "origin": [0, 1, 3, 4, 5], "owner": [0, 1, 1, 3, 4]},
}  # fmt: skip


def test_gates_windows_and_cache():
    gates = depth._gates(RECORD)
    assert gates.count("<polyline") == 4 and "100% of the gates" in gates  # two gates, what is kept and the budget
    assert len(set(re.findall(r'polyline class="curve (c\d)', gates))) == 2
    windows = depth._windows(RECORD)
    assert windows.count("<circle") == 3 and "window 3: 0.3" in windows  # the number in the dense model
    said = depth._cache(RECORD)
    assert "18.4 kB" in said and "23.0 kB" in said and "21.0 %" in said and "80.0 %" in said


def test_records_that_lack_them():
    for record in (
        None,
        {},
        {"gates": 3, "fold": []},
        {"gates": [{"gates": 1}], "fold": {"singles": [{"members": 2}]}},
    ):
        assert depth._gates(record) + depth._windows(record) + depth._cache(record) == ""
    assert depth._gates({"gates": [{"step": 1, "gates": ["x", None]}]}) == ""
    assert depth._windows({"fold": {"singles": [{"members": [7], "kl": 0.1}], "origin": [None] * 9}}) == ""
