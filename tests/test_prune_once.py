"""Prune Once for All: schedule, learning-rate rewinding, masks, locks; numbers of the specification by hand."""

import pytest
import torch
from conftest import tiny_model
from torch import nn

from sentei.methods.prune_once import lock, pattern
from sentei.methods.prune_once.schedule import Schedule, linear

PAPER = {"warmup": 0.01, "start": 0.0, "end": 0.5, "freeze": 0.8, "every": 0.01}
M = torch.tensor([[0.1, -0.4, 0.3, -0.2, 0.9, 0.05, -0.06, 0.8], [0.5, 0.5, 0.5, 0.5, 0.01, 0.02, 0.03, 0.04]])


def bits(mask):
    return ["".join(str(int(bit)) for bit in row) for row in mask]


# --- schedule -------------------------------------------------------------------------------------------------------


def test_sparsity_values():
    paper = Schedule.of(100_000, **PAPER)
    values = {
        1000: 0.0529, 5000: 0.2439, 10_000: 0.4392, 20_000: 0.7056, 25_000: 0.7875, 40_000: 0.8928, 50_000: 0.9,
        90_000: 0.9,
    }  # fmt: skip
    for t, wanted in values.items():
        assert paper.sparsity(t, 0.9) == pytest.approx(wanted, abs=5e-5)
    assert Schedule.of(1000, **PAPER).sparsity(250, 0.9) == pytest.approx(0.7875)
    assert paper.sparsity(0, 0.9) == 0 and (paper.end, paper.freeze, paper.every) == (50_000, 80_000, 1000)


def test_rate_values():
    paper = Schedule.of(100_000, **PAPER)
    values = {
        500: 0.5, 1000: 1.0204, 1999: 1.0, 2000: 1.0204, 49_999: 1.0, 50_000: 1.0204, 60_000: 0.8163, 75_000: 0.5102,
        100_000: 0.0,
    }  # fmt: skip
    for t, wanted in values.items():
        assert paper.rate(t) == pytest.approx(wanted, abs=5e-5)
    late = Schedule(1000, 10, 200, 700, 1000, 10)
    values = {199: 0.6143, 200: 0.6122, 209: 0.5939, 210: 0.6122, 700: 0.6122, 999: 0.0020}
    for t, wanted in values.items():
        assert late.rate(t) == pytest.approx(wanted, abs=5e-5)
    assert [linear(10, 2, t) for t in (0, 1, 2, 6)] == [0, 0.5, 1, 0.5]


def test_masks_are_due():
    schedule = Schedule.of(1000, **PAPER | {"start": 0.1, "end": 0.505})
    due = [t for t in range(1, 1001) if schedule.due(t)]
    assert due[:2] == [100, 110] and due[-1] == 800 and 505 in due and len(due) == 72


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 99}, "at least 100 steps"),
        ({"end": 0.9}, "in this order"),
        ({"start": 0.5}, "in this order"),
        ({"every": 1.5}, "fractions of the run"),
        ({"warmup": 0.2, "end": 0.9, "freeze": 0.9}, "no step in which the learning rate falls"),
    ],
)
def test_schedule_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        Schedule.of(**{"steps": 1000, **PAPER, **change})


# --- patterns -------------------------------------------------------------------------------------------------------


def test_patterns_by_hand():
    def mask(kind):
        return bits(pattern.masks({"w": M}, 0.5, pattern=kind)["w"])

    assert mask("unstructured") == ["01101001", "11110000"]
    assert mask("1x4") == ["00001111", "11110000"]
    assert mask("2:4") == ["01101001", "00110011"]


def test_ties():
    ones = torch.ones(4, 4)
    assert bits(pattern.masks({"w": ones}, 0.5)["w"]) == ["0000", "0000", "1111", "1111"]
    assert not pattern.masks({"w": ones}, 0.5, ties="paper")["w"].any()
    assert pattern.masks({"w": ones}, 0.0, ties="paper")["w"].all()  # k = 0 removes nothing


def test_smallest_is_what_a_stable_sort_says():
    random = torch.Generator().manual_seed(0)
    for case in range(1000):
        n = int(torch.randint(1, 200, (), generator=random))
        score = torch.randn(n, generator=random).abs()
        if case % 3 == 0:
            score = (score * 4).round() / 4  # ties and zeros
        if case % 7 == 0:
            score *= 1e-42  # denormal
        k = int(torch.randint(0, n + 1, (), generator=random))
        wanted = torch.zeros(n, dtype=torch.bool)
        wanted[score.sort(stable=True).indices[:k]] = True
        assert torch.equal(pattern.smallest(score, k), wanted)


@pytest.mark.parametrize("kind", ["unstructured", "1x4"])
def test_every_matrix_meets_its_sparsity(kind):
    random = torch.Generator().manual_seed(1)
    weights = {f"{n}": torch.randn(n, 12, generator=random) for n in (3, 7, 10)}
    for sparsity in (0.1, 0.5, 0.85, 0.9):
        for name, mask in pattern.masks(weights, sparsity, pattern=kind).items():
            size = 1 if kind == "unstructured" else 4
            n = weights[name].numel() // size
            assert int((~mask).sum()) == int(sparsity * n) * size


def test_two_of_four_moves_group_by_group():
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(2))
    half = pattern.masks({"w": weight}, 0.25, pattern="2:4")["w"].reshape(-1, 4).sum(1)
    assert sorted(half.tolist()) == [2] * 16 + [4] * 16
    cheap = weight.abs().reshape(-1, 4).sort(1).values[:, :2].sum(1)
    assert cheap[half == 2].max() <= cheap[half == 4].min()
    assert set(pattern.masks({"w": weight}, 0.5, pattern="2:4")["w"].reshape(-1, 4).sum(1).tolist()) == {2}


def test_global_threshold_and_cap():
    random = torch.Generator().manual_seed(3)
    weights = {"small": torch.randn(20, 20, generator=random) * 0.01, "large": torch.randn(30, 20, generator=random)}
    mask = pattern.masks(weights, 0.6, scope="global", max_matrix_sparsity=0.9)
    gone = {name: int((~m).sum()) for name, m in mask.items()}
    assert sum(gone.values()) == 600 and gone["small"] == 360
    free = pattern.masks(weights, 0.3, scope="global", max_matrix_sparsity=0.9)
    both = torch.cat([w.abs().flatten() for w in weights.values()])
    kept = torch.cat([free[name].flatten() for name in weights])
    assert both[~kept].max() <= both[kept].min() and int((~kept).sum()) == 300
    with pytest.raises(ValueError, match="leaves no room"):
        pattern.masks(weights, 0.95, scope="global", max_matrix_sparsity=0.9)


@pytest.mark.parametrize(
    ("kind", "target", "inputs", "message"),
    [
        ("3x3", 0.5, 8, "pattern is one of"),
        ("unstructured", 1.0, 8, "between 0 and 1"),
        ("2:4", 0.9, 8, "exactly half"),
        ("1x4", 0.9, 6, "6 inputs, not a multiple of 4"),
    ],
)
def test_pattern_refusals(kind, target, inputs, message):
    with pytest.raises(ValueError, match=message):
        pattern.check(kind, target, {"layer.weight": (4, inputs)})


# --- locks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "llama", "qwen3"])
def test_prunable_matrices(family):
    model = tiny_model(family)
    found = lock.prunable(model)
    per_layer = 7 if family in ("llama", "qwen3") else 6
    assert len(found) == per_layer * model.config.num_hidden_layers
    embedding = model.get_input_embeddings().weight
    assert all(p is not embedding and p.ndim == 2 and "cls" not in name for name, p in found.items())


def test_prunable_by_expression():
    model = tiny_model("bert")
    assert all("query" in name for name in lock.prunable(model, include="query"))
    assert not any("query" in name for name in lock.prunable(model, exclude="query"))
    with pytest.raises(ValueError, match="no weight is left"):
        lock.prunable(model, include="nothing")
    with pytest.raises(ValueError, match="no regular expression"):
        lock.prunable(model, include="(")
    with pytest.raises(ValueError, match=r"tied to .*word_embeddings"):
        lock.prunable(model, include="decoder")


def toy():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def matrices(model):
    return {name: p for name, p in model.named_parameters() if p.ndim == 2}


def step(model, optimizer, seed=0):
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
    model(x).square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in matrices(model).items()}
    optimizer.step()
    optimizer.zero_grad()
    return gradients


def test_locked_zeros_get_no_gradient_and_no_moment():
    model = toy()
    with torch.no_grad():
        for p in matrices(model).values():
            p[p.abs() < 0.2] = 0.0
    masks = {name: p.detach() != 0 for name, p in matrices(model).items()}
    with lock.Lock.on_zeros(matrices(model)) as held:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for seed in range(3):
            for name, gradient in step(model, optimizer, seed).items():
                assert not gradient[~masks[name]].any() and gradient[masks[name]].any()
            held.apply()
        again = torch.optim.AdamW(model.parameters(), lr=0.1)  # the lock survives a new optimiser
        again.load_state_dict(optimizer.state_dict())
        step(model, again)
        held.apply()
    for name, p in matrices(model).items():
        assert torch.equal(p != 0, masks[name])
        for moment in ("exp_avg", "exp_avg_sq"):
            assert not again.state[p][moment][~masks[name]].any()
        assert not torch.signbit(p[~masks[name]]).any()  # no -0.0
        assert not p._backward_hooks


def test_a_dense_model_cannot_be_locked():
    with pytest.raises(ValueError, match="nothing to lock"):
        lock.Lock.on_zeros(matrices(toy()), "folder")


def test_a_returning_weight_has_its_old_value():
    model = toy()
    before = {name: p.detach().clone() for name, p in matrices(model).items()}
    with lock.Lock(matrices(model)) as held:
        held.move(pattern.masks(held.whole(), 0.5))
        assert held.sparsity == 0.5 and lock.zeros(matrices(model)) == 0.5
        for name, value in held.whole().items():
            assert torch.equal(value, before[name])
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        step(model, optimizer)
        held.apply()
        trained = {name: p.detach().clone() for name, p in matrices(model).items()}
        first = dict(held.masks)
        everything = {name: torch.ones_like(mask) for name, mask in first.items()}
        held.move(everything)
        for name, p in matrices(model).items():
            assert torch.equal(p, torch.where(first[name], trained[name], before[name]))


def test_without_regrowth_masks_only_shrink():
    model = toy()
    with lock.Lock(matrices(model), regrow=False) as held:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        last = held.masks
        for number, sparsity in enumerate((0.2, 0.5, 0.8)):
            held.move(pattern.masks(held.whole(), sparsity))
            assert all(not (held.masks[name] & ~last[name]).any() for name in last)
            last = held.masks
            step(model, optimizer, number)
            held.apply()


def test_masks_and_dormant_values_survive_a_checkpoint():
    model = toy()
    with lock.Lock(matrices(model)) as held:
        held.move(pattern.masks(held.whole(), 0.6))
        saved, whole, checksum = held.state(), held.whole(), held.checksum()
    with lock.Lock(matrices(model)) as fresh:
        fresh.restore(saved)
        assert fresh.checksum() == checksum
        assert all(torch.equal(value, whole[name]) for name, value in fresh.whole().items())
    mask = torch.rand(3, 7) > 0.5
    assert torch.equal(lock.unpack(lock.pack(mask), 21).reshape(3, 7), mask)
