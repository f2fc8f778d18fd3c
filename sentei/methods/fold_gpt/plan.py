"""Which neighbours share weights, whose weights they are, and what every other member starts from.

Each question is answered by a measurement: KL(dense || folded) on calibration text, never by how alike blocks look.

1. Whose weights a window uses and what its members start from: the best of what was tried        `Folder.fold`
2. Cost of a window: KL with only this window folded; the layers before it run once               `Folder.single`
3. dp: disjoint windows of least total cost. greedy: take the cheapest, measure it again with the
   folds made so far, and put it back if another is cheaper now, for costs do not add.
   auto: both, the lower KL wins                                                                  `choose`
"""

from __future__ import annotations

from sentei.methods.fold_gpt.folder import Folder, Group


def choose(folder: Folder, plan: str, need: int) -> list[Group]:
    """Fold windows until `need` parameters are saved; the model is left folded.

    Args:
        plan: "dp", "greedy", "auto", or "all": every free layer in order, and no less.
    Raises:
        ValueError: not so much can be saved.
    """
    if plan == "all":
        windows: list[list[int]] = []
        for window in folder.windows:
            if not windows or window[0] > windows[-1][-1]:
                windows.append(window)
        if need > (saved := sum(map(folder.saving, windows))):
            raise ValueError(f"folding all free layers saves {saved:,} parameters, {need:,} are to go")
        return _in_turn(folder, windows)
    if need > folder.reach():
        raise ValueError(f"folding can save {folder.reach():,} parameters here, {need:,} are to go")
    base = folder.judge.kl(folder.model)
    costs = {tuple(group["members"]): group["kl"] - base for group in folder.single()}
    plans: list[list[Group]] = []
    if plan in ("greedy", "auto"):
        plans.append(_greedy(folder, costs, base, need))
        _undo(folder, plans[-1])
    if plan in ("dp", "auto") or not plans[-1]:
        windows = cheapest([(list(window), cost, folder.saving(list(window))) for window, cost in costs.items()], need)
        plans.append(_in_turn(folder, _trimmed(folder, windows, need)))
        _undo(folder, plans[-1])
    plans = [groups for groups in plans if groups]
    best = min(plans, key=lambda groups: groups[-1]["kl"])
    for group in best:
        folder.apply(group)
    return best


def _undo(folder: Folder, groups: list[Group]) -> None:
    for group in groups:
        folder.undo(group["members"])


def cheapest(windows: list[tuple[list[int], float, int]], need: int) -> list[list[int]]:
    """Disjoint windows (members, cost, saving) of least total cost that save at least `need`: exact if costs add."""
    fronts: list[tuple[int, list[tuple[int, float, list[list[int]]]]]] = [(-1, [(0, 0.0, [])])]  # (last layer, plans)
    for members, cost, saving in sorted(windows, key=lambda window: window[0][-1]):
        before = next(plans for end, plans in reversed(fronts) if end < members[0])
        more = [(min(need, saved + saving), total + cost, chosen + [members]) for saved, total, chosen in before]
        fronts.append((members[-1], _pareto(fronts[-1][1] + more)))
    enough = [plan for plan in fronts[-1][1] if plan[0] >= need]
    assert enough, "reach was checked"
    return min(enough, key=lambda plan: plan[1])[2]


def _pareto(plans: list[tuple[int, float, list[list[int]]]]) -> list[tuple[int, float, list[list[int]]]]:
    """Plans that no other one beats in saving and in cost."""
    kept: list[tuple[int, float, list[list[int]]]] = []
    for plan in sorted(plans, key=lambda plan: (-plan[0], plan[1])):
        if not kept or plan[1] < kept[-1][1]:
            kept.append(plan)
    return kept


def _trimmed(folder: Folder, windows: list[list[int]], need: int) -> list[list[int]]:
    """The last window is made smaller if that is enough."""
    saved = sum(folder.saving(window) for window in windows[:-1])
    last = windows[-1]
    while len(last) > 2 and saved + folder.saving(last[:-1]) >= need:
        last = last[:-1]
    return [*windows[:-1], last]


def _in_turn(folder: Folder, windows: list[list[int]]) -> list[Group]:
    made: list[Group] = []
    for window in windows:
        made.append(folder.again(made, window))
        folder.apply(made[-1])
    return made


def _greedy(folder: Folder, costs: dict[tuple[int, ...], float], base: float, need: int) -> list[Group]:
    """Args: costs: window -> rise in KL when it is folded alone. base: KL before anything is folded."""
    made: list[Group] = []
    costs, saved, kl = dict(costs), 0, base
    fresh = {window: folder.again([], list(window)) for window in costs}  # measured on top of what is folded now
    while saved < need:
        if not costs:  # what was taken blocks what is left: the exact plan for costs that add
            _undo(folder, made)
            return []
        window = min(costs, key=lambda window: (costs[window], window))
        if window not in fresh:
            fresh[window] = folder.again(made, list(window))
            costs[window] = fresh[window]["kl"] - kl
            continue  # the cheapest still? otherwise it waits
        group = fresh[window]
        rest = _trimmed(folder, [list(window)], need - saved)[0]
        if len(rest) < len(window):
            group = folder.again(made, rest)
        folder.apply(group)
        made.append(group)
        saved, kl, fresh = saved + folder.saving(group["members"]), group["kl"], {}
        costs = {other: cost for other, cost in costs.items() if not set(other) & set(window)}
    return made
