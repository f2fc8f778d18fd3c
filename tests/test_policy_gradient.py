"""The paper's maths on hand numbers and by enumeration; the search on planted units; killed and resumed."""

import copy
import itertools
import json
import math

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file

from sentei import data, masks, structure
from sentei.methods.policy_gradient import PAPER, PolicyGradient
from sentei.methods.policy_gradient.estimate import ESTIMATORS, estimate, project, shift, sigmap, uniform
from sentei.methods.policy_gradient.levels import FAR, Allocation, Bits, Drops
from sentei.methods.policy_gradient.search import STATE, Search

WORDS = "the quick brown fox jumps over the lazy dog and runs far away into woods "
TEXT = data.Text([WORDS * 40] * 3, [WORDS * 20], [WORDS], "words", "0")
QUICK = {
    "calibration_samples": 4, "calibration_seq_len": 16, "seq_len": 16, "batch_size": 2, "slope_sweeps": 1,
    "coarse_steps": 4,
    "eval_every": 2, "eval_samples": 4, "save_every": 1,
}  # fmt: skip


def double(*values):
    return torch.tensor(values, dtype=torch.double)


S = double(0.5, 0.8)
BITS = double((1, 0), (0, 1))
LOSSES = double(2, 3)


@pytest.mark.parametrize(
    ("samples", "granularity", "expected"),
    [(5, "heads+channels", "mean"), (6, "heads+channels", "least-squares"), (6, "layers", "none")],
)
def test_compensation_by_the_text_that_is_there(words, samples, granularity, expected):
    """auto: a linear of width 48 is refitted from 96 tokens on."""
    model = tiny_model("llama")
    method = PolicyGradient(
        **QUICK | {"calibration_samples": samples, "granularity": granularity, "steps": 1, "sparsity": 0.25}
    )
    assert method.compress(model, words, TEXT)["compensate"] == expected


@pytest.mark.parametrize(
    ("name", "baseline", "expected"),
    [
        ("moving_average", 2.1, (-1.00, 0.65)),
        ("moving_average", 2.5, (-1.00, 1.25)),  # the first step: d is the mean itself
        ("leave_one_out", 0.0, (-1.80, 2.25)),
        ("antithetic", 0.0, (-0.90, 1.80)),
    ],
)
def test_one_step_on_hand_numbers(name, baseline, expected):
    found = estimate(name, BITS, S, LOSSES, baseline, 5)
    torch.testing.assert_close(found, double(*expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("baseline_window", 0), ("steps", -5), ("coarse_steps", -3), ("slope_sweeps", -1), ("seq_len", 1),
        ("lr", math.nan), ("coarse_lr", math.inf), ("coarse_sigma", -1.0), ("slope_rate", 0.0), ("phi_eps", -1.0),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_meant(field, value):
    with pytest.raises(ValueError, match=f"{field} must be "):
        PolicyGradient(**{field: value}).check()


def loss_of(m):
    return 1 + 0.5 * m[0] - 0.8 * m[1] + 0.3 * m[2] + 0.4 * m[0] * m[2]


@pytest.mark.parametrize("baseline", [0.0, 7.0])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_mean_is_the_exact_gradient(name, baseline):
    """Every pair of masks with its probability: the mean must be 1.8 sqrt(s (1 - s)) dE[L]/ds."""
    s = double(0.3, 0.5, 0.8)
    masks_of = [double(*m) for m in itertools.product((0, 1), repeat=3)]
    total = torch.zeros(3, dtype=torch.double)
    for a, b in itertools.product(masks_of, repeat=2):
        if name == "antithetic":  # u and 1 - u: (1, 0) and (0, 1) each min(s, 1 - s), else both as the likelier bit
            low = torch.minimum(s, 1 - s)
            same = (s > 0.5).double()
            chance = torch.where(a != b, low, torch.where(a == same, 1 - 2 * low, torch.zeros(())))
        else:
            chance = torch.where(a > 0, s, 1 - s) * torch.where(b > 0, s, 1 - s)
        losses = torch.stack([loss_of(a), loss_of(b)])
        d = 0.8 * baseline + 0.2 * float(losses.mean())
        total += chance.prod() * estimate(name, torch.stack([a, b]), s, losses, d, 5)
    torch.testing.assert_close(total, double(0.6763882, -0.72, 0.3024), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("z", "w", "budget", "expected"),
    [
        ((1.2, 0.9, 0.5, 0.2, -0.1), (1, 1, 1, 1, 1), 2, (1, 0.7, 0.3, 0, 0)),
        ((0.9, 0.8, 0.3, 1.1), (4, 1, 1, 2), 4, (0.372727, 0.668182, 0.168182, 0.836364)),
        ((0.2, 1.3), (4, 1), 1, (0, 1)),
        ((0.3, -0.2, 0.4), (1, 1, 1), 1.5, (0.3, 0, 0.4)),
    ],
)
def test_projection_on_hand_numbers(z, w, budget, expected):
    torch.testing.assert_close(project(double(*z), double(*w), budget), double(*expected), atol=1e-6, rtol=0)


def exact_projection(z, w, budget):
    """The piecewise linear h(v) solved between its breakpoints."""

    def h(v):
        return float((w * (z - v * w).clamp(0, 1)).sum())

    if h(0.0) <= budget:
        return z.clamp(0, 1)
    points = sorted({0.0, *(p for p in torch.cat([z / w, (z - 1) / w]).tolist() if p > 0)})
    for a, b in itertools.pairwise(points):
        if h(a) >= budget >= h(b):
            v = a if h(a) == h(b) else a + (h(a) - budget) * (b - a) / (h(a) - h(b))
            return (z - v * w).clamp(0, 1)
    raise AssertionError


def test_projection_equals_an_exact_solver():
    generator = torch.Generator().manual_seed(0)
    for case in range(1000):
        n = int(torch.randint(1, 12, (1,), generator=generator))
        z = torch.randn(n, generator=generator).double() * 0.8 + 0.5
        w = torch.ones(n).double() if case % 2 else torch.rand(n, generator=generator).double() * 5 + 0.1
        budget = float(torch.rand(1, generator=generator)) * float(w.sum())
        found = project(z, w, budget)
        assert float((w * found).sum()) <= budget * (1 + 1e-12)
        torch.testing.assert_close(found, exact_projection(z, w, budget), atol=1e-9, rtol=0)


def test_projection_of_many_equals_bisection():
    """Beyond a few thousand coordinates most are settled early; the outcome is that of plain halving."""
    generator = torch.Generator().manual_seed(0)
    for spread, heavy in ((0.1, False), (0.8, False), (0.3, True)):
        z = torch.randn(20_000, generator=generator).double() * spread + 0.5
        w = torch.ones(len(z)).double()
        w[::300] = 171.0 if heavy else 1.0  # a KV group among channels
        budget = 0.4 * float(w.sum())
        low, high = 0.0, float((z / w).max())
        for _ in range(200):
            middle = 0.5 * (low + high)
            over = float((w * (z - middle * w).clamp(0, 1)).sum()) > budget
            low, high = (middle, high) if over else (low, middle)
        found = project(z, w, budget)
        assert budget * (1 - 1e-12) <= float((w * found).sum()) <= budget * (1 + 1e-12)
        torch.testing.assert_close(found, (z - high * w).clamp(0, 1), atol=1e-9, rtol=0)


def test_projection_above_a_floor():
    z, w = double(0.9, 0.8, 0.3, 1.1, -0.4), double(4, 1, 1, 2, 1)
    found = project(z, w, 4.0, floor=0.05)
    assert float(found.min()) == 0.05 and float((w * found).sum()) == pytest.approx(4, abs=1e-12)
    inside = (found > 0.05) & (found < 1)  # those all moved by the same multiple of their weight
    moved = ((z - found) / w)[inside]
    torch.testing.assert_close(moved, moved[:1].expand_as(moved), atol=1e-12, rtol=0)
    assert torch.equal(project(z, w, 4.0, floor=0.0), project(z, w, 4.0))


def test_shift_keeps_the_order_and_spends_the_budget():
    z, w = double(1.4, 0.9, 0.5, 0.2, -0.1), double(1, 5, 1, 2, 1)
    for budget in (2.0, 6.0):
        found = shift(z, w, budget)
        assert float((w * found).sum()) == pytest.approx(budget, abs=1e-12)
        assert (found[:-1] >= found[1:]).all() and float(found.min()) >= 0 and float(found.max()) <= 1


def test_sigmap_on_hand_numbers():
    metric = double(1, 2, 3, 4)
    found = sigmap(metric, 0.5)
    torch.testing.assert_close(found, double(0.238323, 0.404368, 0.595632, 0.761677), atol=1e-5, rtol=0)
    high, low = sigmap(metric, 0.8), sigmap(metric, 0.2)
    assert high[-1] == 1 and abs(float(high.mean()) - 0.784581) < 1e-5
    assert low[0] == 0 and abs(float(low.mean()) - 0.215419) < 1e-5
    assert torch.equal(sigmap(double(2, 2, 2), 0.7), double(0.7, 0.7, 0.7))  # nothing to tell them apart


def test_uniforms_are_exact():
    u = uniform(0, 1, 2, 10_000)
    assert torch.equal(1 - (1 - u), u) and float(u.min()) > 0 and float(u.max()) < 1
    assert torch.equal(u, uniform(0, 1, 2, 10_000)) and not torch.equal(u, uniform(0, 1, 3, 10_000))


@pytest.mark.parametrize("name", ESTIMATORS[:3])
def test_planted_units_are_found(name):
    """Eight of sixteen units matter; noise common to the masks of a step is as large as their effect."""
    hits = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        s, d = torch.full((16,), 0.5, dtype=torch.double), None
        for step in range(400):
            u = torch.rand(2, 16, generator=generator).double()
            if name == "antithetic":
                u[1] = 1 - u[0]
            bits = (u < s).double()
            losses = (1 - bits[:, :8]).mean(1) + 0.1 * torch.randn(1, generator=generator).double()
            d = float(losses.mean()) if d is None else 0.8 * d + 0.2 * float(losses.mean())
            lr = 0.05 * 0.5 * (1 + math.cos(math.pi * step / 400))
            s = project(s - lr * estimate(name, bits, s, losses, d, 5), torch.ones_like(s), 8.0)
        hits += set(s.argsort(descending=True)[:8].tolist()) == set(range(8))
    assert hits >= 18


@pytest.mark.parametrize("fields", [{"coarse_steps": 60}, {"coarse_steps": 0, "steps": 60, "channel_group": 8}])
def test_a_useless_layer_pays(words, monkeypatch, fields):
    """The loss counts kept channels everywhere but in layer 2, so layer 2 should give up most of its own."""
    model = tiny_model("llama")
    units = structure.units(model, "channels")

    def planted(self, keep_U, step):
        return 3.0 - float(keep_U[units.layer_U != 2].double().mean())

    monkeypatch.setattr(Search, "loss", planted)
    method = PolicyGradient(
        sparsity=0.15, granularity="channels", coarse_sigma=0.1, coarse_lr=0.1, keep_best=False, **QUICK | fields
    )
    method.compress(model, words, TEXT)
    widths = [size.intermediate_size for size in structure.sizes(model)]
    assert widths[2] < 0.6 * min(widths[0], widths[1], widths[3]), widths


def turns_of(monkeypatch):
    """The turns whose forwards run from here on; `Search.loss` itself is left as it is."""
    seen, loss = [], Search.loss

    def noted(self, keep_U, step):
        seen.append(max(step, -1 - step))
        return loss(self, keep_U, step)

    monkeypatch.setattr(Search, "loss", noted)
    return seen


@pytest.mark.parametrize(
    "fields",
    [
        {"steps": 4, "granularity": "heads+channels"},
        {"steps": 6, "granularity": "layers"},
        {"steps": 2, "granularity": "sublayers+channels", "reward_scale": "std"},
    ],
)
def test_killed_and_resumed_equals_never_killed(words, tmp_path, monkeypatch, fields):
    method = PolicyGradient(sparsity=0.3, **QUICK | fields)
    whole = method.compress(tiny_model("llama"), words, TEXT, workdir=tmp_path / "whole")
    total = len(whole["history"])
    for killed_after in (1, 3, 5):
        folder = tmp_path / str(killed_after)
        with monkeypatch.context() as patched:
            save, saves = Search._save, []

            def dies(self, levels, save=save, saves=saves, killed_after=killed_after):
                save(self, levels)
                saves.append(1)
                if len(saves) == killed_after:
                    raise KeyboardInterrupt

            patched.setattr(Search, "_save", dies)
            with pytest.raises(KeyboardInterrupt):
                method.compress(tiny_model("llama"), words, TEXT, workdir=folder)
        with monkeypatch.context() as patched:
            turns = turns_of(patched)
            resumed = method.compress(tiny_model("llama"), words, TEXT, workdir=folder)
        assert set(turns) == set(range(killed_after, total))  # nothing before the kill is made again
        assert resumed["kept"] == whole["kept"]
        assert [x["losses"] for x in resumed["history"]] == [x["losses"] for x in whole["history"]]
        assert_same_state(folder, tmp_path / "whole")
    with pytest.raises(ValueError, match=r"belongs to another run \(seed"):
        PolicyGradient(sparsity=0.3, seed=5, **QUICK | fields).compress(
            tiny_model("llama"), words, TEXT, workdir=folder
        )
    for text, model, differs in (
        (data.Text(TEXT.train, TEXT.validation, TEXT.test, "words", "1"), tiny_model("llama"), "text"),
        (TEXT, tiny_model("llama", seed=1), "weights"),
    ):
        with pytest.raises(ValueError, match=rf"another run \({differs} differs"):
            method.compress(model, words, text, workdir=folder)


def assert_same_state(folder, other):
    """Every tensor of the search, to the bit."""
    ours, theirs = load_file(folder / STATE), load_file(other / STATE)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


@pytest.mark.parametrize("where", ["loss", "_held_loss", "mean"])
def test_stopped_by_hand_before_the_first_save(words, tmp_path, monkeypatch, where):
    """Ctrl-C in the third step, in the middle of whatever it does: the state is that of the step's begin."""
    method = PolicyGradient(sparsity=0.3, **QUICK | {"steps": 2, "save_every": 100})
    method.compress(tiny_model("llama"), words, TEXT, workdir=tmp_path / "whole")
    said, calls = [], []
    with monkeypatch.context() as patched:
        real, climb = getattr(Search, where), Search._step

        def step(self, level, levels, number, offset, total):
            if offset + number == 2:
                patched.setattr(Search, where, stopped)
            return climb(self, level, levels, number, offset, total)

        def stopped(self, *arguments):
            calls.append(where)
            if len(calls) == (2 if where == "mean" else 1):  # the second mean is in the middle of an update
                raise KeyboardInterrupt
            return real(self, *arguments)

        patched.setattr(Search, "_step", step)
        with pytest.raises(KeyboardInterrupt):
            method.compress(tiny_model("llama"), words, TEXT, workdir=tmp_path / "stopped", report=said.append)
    assert any("--finish true" in event["message"] for event in said)
    turns = turns_of(monkeypatch)
    method.compress(tiny_model("llama"), words, TEXT, workdir=tmp_path / "stopped")
    assert min(turns) == 2
    assert_same_state(tmp_path / "stopped", tmp_path / "whole")


def test_forward_only(words, monkeypatch):
    def forbidden(thing, *args, **kwargs):
        if isinstance(thing, torch.nn.Module | torch.Tensor):
            raise AssertionError("no gradient and no copy of the model")
        return deepcopy(thing, *args, **kwargs)

    deepcopy = copy.deepcopy

    monkeypatch.setattr(torch.Tensor, "backward", forbidden)
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: forbidden(model))
    monkeypatch.setattr("copy.deepcopy", forbidden)
    model = tiny_model("qwen3")
    PolicyGradient(sparsity=0.2, **QUICK, steps=2).compress(model, words, TEXT)
    assert all(parameter.requires_grad and not parameter.is_inference() for parameter in model.parameters())


def test_bad_losses_are_dropped_and_counted(words, monkeypatch):
    method = PolicyGradient(sparsity=0.3, **QUICK)
    real, calls = Search.loss, []

    def sometimes(self, keep_U, step):
        calls.append(1)
        return math.nan if len(calls) == 2 else real(self, keep_U, step)

    monkeypatch.setattr(Search, "loss", sometimes)
    assert method.compress(tiny_model("llama"), words, TEXT)["skipped"] == 1
    monkeypatch.setattr(Search, "loss", lambda self, keep_U, step: math.nan)
    with pytest.raises(ValueError, match="try --dtype float32"):
        PolicyGradient(sparsity=0.3, **QUICK | {"coarse_steps": 30}).compress(tiny_model("llama"), words, TEXT)


def test_a_first_step_without_a_finite_loss_makes_valid_json(words, monkeypatch):
    real = Search.loss
    monkeypatch.setattr(Search, "loss", lambda self, keep_U, step: math.nan if not step else real(self, keep_U, step))
    method = PolicyGradient(sparsity=0.3, **QUICK | {"slope_sweeps": 0, "coarse_steps": 0, "steps": 3})
    said = []
    history = method.compress(tiny_model("llama"), words, TEXT, report=said.append)["history"]
    json.dumps(history, allow_nan=False)
    assert history[0]["baseline"] is None and history[0]["loss"] is None and history[1]["baseline"] > 0
    told = [event["message"] for event in said if event["message"].startswith("searching: ")]
    assert "divergence not finite" in told[0] and "2 losses skipped" in told[1]
    assert "baseline" in told[1] and "best held-out" in told[1] and "M parameters" in told[1]


def test_unseen_batches_are_others(words, monkeypatch):
    """The text that judges a sweep is not the sweep's own, whatever the seed; where it never was, nothing changes."""
    same = 0
    for seed in range(12):
        method = PolicyGradient(seed=seed, **QUICK)
        search = Search(method, method.start(tiny_model("llama"), words, TEXT))
        for ranks, turn in ((1, 0), (1, 5), (2, 3)):
            search.ranks = ranks
            batches = list(range(3))
            own, unseen = (search._of_step(batches, step) for step in (turn, -1 - turn))
            first = search._place(-1 - turn, 3)
            assert unseen != own and unseen == (first if first != own else unseen)
            same += first == own
        monkeypatch.undo()
    assert same


def test_preset_and_refusals(words):
    paper = PolicyGradient(preset="paper", batch_size=4)
    assert (paper.steps, paper.lr, paper.budget, paper.batch_size) == (15_000, 2e-3, "family", 4)
    assert all(getattr(paper, name) == value for name, value in PAPER.items() if name != "batch_size")
    given = {
        "coarse_steps": 50,
        "channel_group": 32,
        "score_floor": 0.01,
        "steps": 0,
        "lr": None,
    }  # equal to our defaults
    asked = PolicyGradient(preset="paper", **given)
    assert {name: getattr(asked, name) for name in given} == given and asked.budget == "family"
    for fields, message in (
        ({"samples": 1}, "divides by samples - 1"),
        ({"estimator": "antithetic", "samples": 3}, "even number"),
        ({"granularity": "layers", "init": "wanda"}, "block_influence scores whole blocks"),
        ({"sparsity": 1.2}, r"got 1\.2"),
        ({"budget": "both"}, "global or family"),
        ({"granularity": "sublayers+layers"}, "goes before heads and channels"),
        ({"granularity": "sublayers+channels", "shape": "uniform", "steps": 9}, "shape=uniform"),
        ({"granularity": "layers+channels"}, r"layers\+heads\+channels, or sublayers\+channels"),
        ({"shape": "uniform"}, "leaves no widths to search over: give steps"),
        ({"preset": "other"}, "ours or paper"),
        ({"score_floor": 0.7}, "score_floor is a small probability"),
    ):
        with pytest.raises(ValueError, match=message):
            PolicyGradient(**fields).check()
    short = data.Text(["too short"], ["x"], ["x"], "short", "0")
    with pytest.raises(ValueError, match=r"found 0 blocks of 16 tokens, need 4"):
        PolicyGradient(**QUICK).compress(tiny_model("llama"), words, short)


def test_slopes_find_the_allocation_of_their_model(words, monkeypatch):
    """A loss that is a sum of a_l exp(-rate f_l): one sweep must land on equal slopes per parameter."""
    model = tiny_model("llama")
    units = structure.units(model, "channels")
    size, rate = torch.tensor([1.0, 2.0, 4.0, 3.0]).double(), 4.0

    def planted(self, keep_U, step):
        kept_L = torch.stack([keep_U[units.of(layer, "channels")].double().mean() for layer in range(4)])
        return float((size * torch.exp(-rate * kept_L)).sum())

    monkeypatch.setattr(Search, "loss", planted)
    method = PolicyGradient(
        sparsity=0.3, granularity="channels", keep_best=False, **QUICK | {"slope_sweeps": 1, "coarse_steps": 0}
    )
    record = method.compress(model, words, TEXT)
    kept = torch.tensor([size.intermediate_size / 40 for size in structure.sizes(model)]).double()
    best = size.log() / rate
    best = best + (kept.mean() - best.mean())  # equal layers: the budget is a common shift
    torch.testing.assert_close(kept, best, atol=0.5 / 40 + 0.02, rtol=0)  # a unit is 1/40; slopes are secants
    assert record["forwards"] == 2 + (4 + 3 + 2 + 1) / 4 + 3 + 2  # the last two of the dense model


@pytest.mark.parametrize(
    ("size", "gone"), [((0.01, 2.0, 4.0, 3.0), [0]), ((2.0, 0.01, 4.0, 0.02), [1, 3]), ((1.0, 1.0, 1.0, 1.0), [])]
)
def test_a_useless_sublayer_goes_as_a_whole_and_stays_away(words, monkeypatch, size, gone):
    model = tiny_model("llama")
    units = structure.units(model, "channels")

    def planted(self, keep_U, step):
        kept = [float(keep_U[units.of(layer, "channels")].double().mean()) for layer in range(4)]
        return sum(a * math.exp(-4 * f) for a, f in zip(size, kept, strict=True))

    monkeypatch.setattr(Search, "loss", planted)
    # Later levels and their noise may not bring it back.
    method = PolicyGradient(
        sparsity=0.25,
        granularity="sublayers+channels",
        keep_best=False,
        lr=0.01,
        channel_group=4,
        **QUICK | {"steps": 4},
    )
    record = method.compress(model, words, TEXT)
    assert record["history"][0]["dropped"] == len(gone)
    assert [i for i, size in enumerate(structure.sizes(model)) if not size.intermediate_size] == gone
    assert 0 <= record["removed_of_layers"] - 0.25 < 0.01


def test_a_block_that_goes_as_a_whole_leaves_the_list(words, monkeypatch):
    """Layer 2 is useless: without a compensation nothing of it is left, and the model is one block shorter."""
    model = tiny_model("qwen3")
    units = structure.units(model)

    def planted(self, keep_U, step):
        kept = [float(keep_U[units.layer_U == layer].double().mean()) for layer in range(4)]
        return sum(a * math.exp(-4 * f) for a, f in zip((4.0, 3.0, 0.01, 4.0), kept, strict=True))

    monkeypatch.setattr(Search, "loss", planted)
    fields = QUICK | {"slope_sweeps": 0, "coarse_steps": 0, "steps": 0}
    method = PolicyGradient(
        sparsity=0.26, granularity="layers+heads+channels", compensate="none", keep_best=False, init="wanda", **fields
    )
    told = []
    record = method.compress(model, words, TEXT, report=told.append)
    assert record["history"][0]["dropped"] == 1 and len(structure.layers(model)) == 3
    assert record["kept"]["layers"][2]["channels"]["kept"] == 0 and model.config.num_hidden_layers == 3
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_a_layer_without_which_nothing_is_finite_keeps_its_width(words, monkeypatch):
    model = tiny_model("qwen3")
    units = structure.units(model, "channels")

    def planted(self, keep_U, step):
        kept = [float(keep_U[units.of(layer, "channels")].double().mean()) for layer in range(4)]
        if kept[2] < 0.62:
            return math.nan
        return sum(a * math.exp(-4 * f) for a, f in zip((0.5, 1.0, 4.0, 2.0), kept, strict=True))

    monkeypatch.setattr(Search, "loss", planted)
    method = PolicyGradient(
        sparsity=0.15, granularity="channels", keep_best=False,
        **QUICK | {"slope_sweeps": 1, "coarse_steps": 0, "steps": 0},
    )  # fmt: skip
    record = method.compress(model, words, TEXT)
    assert sum(loss is None for loss in record["history"][0]["losses"]) == 1
    widths = [size.intermediate_size for size in structure.sizes(model)]
    assert record["history"][0]["way"] > 0 and widths[2] == max(widths) > widths[0], (widths, record["history"])


@pytest.mark.parametrize("granularity", ["layers+heads+channels", "sublayers+heads+channels"])
@pytest.mark.parametrize("budget", ["global", "family"])
def test_mixtures_share_one_budget(words, granularity, budget):
    model = tiny_model("qwen3")
    method = PolicyGradient(sparsity=0.5, granularity=granularity, budget=budget, compensate="none", **QUICK)
    record = method.compress(model, words, TEXT)
    assert 0 <= record["removed_of_layers"] - 0.5 < 0.05
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_family_budget_cuts_both_kinds_alike(words):
    model = tiny_model("llama")
    units = structure.units(model)
    method = PolicyGradient(sparsity=0.4, budget="family", **QUICK)
    keep = masks.select(torch.rand(len(units)), units, masks.removal_target(units, 0.4), "family")
    for kind in (0, 1):
        inside = units.kind_U == kind
        removed = int(units.cost_U[inside & ~keep].sum()) / int(units.cost_U[inside].sum())
        assert abs(removed - 0.4) < 0.1
    method.compress(model, words, TEXT)
    assert sum(size.num_kv_heads for size in structure.sizes(model)) == 7  # of 12


@pytest.mark.parametrize("budget", ["global", "family"])
@pytest.mark.parametrize("group", [1, 8])
def test_the_search_over_units_starts_at_the_allocation(words, group, budget):
    """Its hard mask is that of the coarse levels, to the one bit a layer that the border may cut through."""
    for seed in range(5):
        method = PolicyGradient(sparsity=0.4, channel_group=group, budget=budget, **QUICK | {"steps": 4})
        search = Search(method, method.start(tiny_model("llama"), words, TEXT))
        allocation = Allocation(search)
        generator = torch.Generator().manual_seed(seed)
        random_P = torch.rand(len(allocation.pairs), generator=generator).double()
        allocation.fraction_P.copy_(allocation.within_budget(random_P))
        bits = Bits(search, allocation)
        bits.start_from_allocation()
        ours, theirs = bits.hard(), allocation.hard()
        for of in allocation.pairs:
            size = int(bits.bit_U[of].bincount().max())
            assert int((ours[of] != theirs[of]).sum()) <= size, (seed, ours[of], theirs[of])
        for inside, parameters in bits.budgets:
            assert float((bits.s * bits.weight)[inside].sum()) == pytest.approx(parameters)
        decided = ((bits.s == 0) | (bits.s == 1)).double().mean()
        assert group > 1 or decided > 0.6


@pytest.mark.parametrize(("floor", "returns"), [(0.02, True), (0.0, False)])
def test_a_vital_unit_that_starts_at_zero_returns(words, monkeypatch, floor, returns):
    """The initial score is wrong about one channel of each layer: without a floor, 0 is for ever."""
    model = tiny_model("llama")
    units = structure.units(model, "channels")
    vital = torch.stack([units.of(layer, "channels")[7] for layer in range(4)])
    metric_U = torch.linspace(0, 1, len(units)).double()
    metric_U[vital] = -50.0
    monkeypatch.setattr(Search, "_initial_metric", lambda self, init: metric_U)
    monkeypatch.setattr(Search, "loss", lambda self, keep_U, step: 3.0 - float(keep_U[vital].double().mean()))
    method = PolicyGradient(
        sparsity=0.4, granularity="channels", keep_best=False, score_floor=floor, channel_group=1, lr=0.05,
        estimator="leave_one_out", **QUICK | {"slope_sweeps": 0, "coarse_steps": 0, "steps": 300, "eval_every": 300},
    )  # fmt: skip
    said, kept = [], []
    select = PolicyGradient.select
    monkeypatch.setattr(PolicyGradient, "select", lambda self, *a, **k: kept.append(select(self, *a, **k)) or kept[-1])
    record = method.compress(model, words, TEXT, report=said.append)
    assert bool(kept[-1][vital].all()) == returns and bool(kept[-1][vital].any()) == returns
    assert any("cannot rise" in event["message"] for event in said) != returns
    assert record["history"][0]["at_floor"] > 0


@pytest.mark.parametrize(("best", "fails"), [("flap", None), ("wanda", None), ("wanda", "flap")])
def test_the_order_inside_a_layer_is_the_one_that_starts_better(words, monkeypatch, best, fails):
    model = tiny_model("llama")
    units = structure.units(model, "channels")
    up_U = torch.linspace(0, 1, len(units)).double()
    monkeypatch.setattr(Search, "_initial_metric", lambda self, init: up_U if init == best else -up_U)
    last = units.of(0, "channels")[-1]  # the best of its layer only in the best order
    worse = float("nan") if fails else 2.0
    monkeypatch.setattr(Search, "_held_loss", lambda self, keep_U: 1.0 if keep_U[last] else worse)
    method = PolicyGradient(
        sparsity=0.4, granularity="channels", **QUICK | {"slope_sweeps": 0, "coarse_steps": 2, "steps": 0}
    )
    assert method.inits == ("flap", "wanda")
    record = method.compress(model, words, TEXT)
    assert record["init"] == best and record["start_loss"] == 1.0


@pytest.mark.parametrize(
    ("fields", "init"),
    [
        ({"init": "magnitude"}, "magnitude"), ({"compensate": "none"}, "wanda"),
        ({"shape": "uniform", "steps": 1}, "flap"), ({"reward": "a:b"}, "flap"),
        ({"granularity": "layers", "steps": 1}, "block_influence"), ({"preset": "paper"}, "wanda"),
    ],
)  # fmt: skip
def test_where_there_is_one_order(fields, init):
    assert PolicyGradient(sparsity=0.3, **fields).inits == (init,)


def test_uniform_searches_inside_each_layer(words, monkeypatch):
    model = tiny_model("llama")
    units = structure.units(model)
    useful = (units.index_U % 2 == 1) & (units.kind_U == structure.KINDS.index("channels"))
    monkeypatch.setattr(Search, "loss", lambda self, keep_U, step: 3.0 - float(keep_U[useful].double().mean()))
    kept = []
    select = PolicyGradient.select
    monkeypatch.setattr(PolicyGradient, "select", lambda self, *a, **k: kept.append(select(self, *a, **k)) or kept[-1])
    method = PolicyGradient(
        sparsity=0.3, shape="uniform", init="wanda", channel_group=2, keep_best=False, lr=0.02,
        estimator="leave_one_out", **QUICK | {"steps": 150, "eval_every": 150},
    )  # fmt: skip
    record = method.compress(model, words, TEXT)
    assert len({(size.num_kv_heads, size.intermediate_size) for size in structure.sizes(model)}) == 1
    assert float(kept[-1][useful].double().mean()) > float(kept[0][useful].double().mean()) + 0.05
    assert len(record["history"]) == 150


def test_what_cannot_be_afforded_is_no_forward(words):
    """Whole sub-layers beyond the budget are not tried: neither counted as forwards nor as losses that went wrong."""
    method = PolicyGradient(
        sparsity=0.2, granularity="sublayers+heads+channels", **QUICK | {"slope_sweeps": 0, "coarse_steps": 0}
    )
    run = method.start(tiny_model("llama"), words, TEXT)
    search = Search(method, run)
    level = Drops(search, Allocation(search))
    with torch.inference_mode():
        losses = level.measure(0, 0)
    assert all(map(math.isfinite, losses))
    assert level.counts[0] == 0 and len(level.counts) < 5  # of 0, 1, 2, 3, 4, 6
    assert level.forwards == 1 + 2 * (4 + 3 + 2 + 1) / 4 + len(level.counts)
    record = method.compress(tiny_model("llama"), words, TEXT)
    assert record["skipped"] == 0 and record["forwards"] == level.forwards + 2


@pytest.mark.parametrize("reward", ["lm_loss", f"{__name__}:all_alike"])
def test_what_a_sweep_of_slopes_costs(words, reward):
    """Two kinds in four layers: a loss begins at the layer that changes, a reward may do anything and is run whole."""
    fields = QUICK | {"slope_sweeps": 2, "coarse_steps": 0, "reward": reward}
    record = PolicyGradient(sparsity=0.2, granularity="heads+channels", **fields).compress(
        tiny_model("llama"), words, TEXT
    )
    shared = reward == "lm_loss"
    assert record["forwards"] == 2 * (2 + (2 * (4 + 3 + 2 + 1) / 4 if shared else 8) + 2 * len(FAR))


def all_alike(model, batch):
    return 1.0


def test_the_text_is_read_once_for_flap_and_for_the_means(words):
    method = PolicyGradient(
        sparsity=0.2, init="flap", compensate="mean", **QUICK | {"slope_sweeps": 0, "eval_every": 4}
    )
    run = method.start(tiny_model("llama"), words, TEXT)
    read = []
    run.model.model.register_forward_hook(lambda module, inputs, output: read.append(1))
    method.choose(run)
    held = 4 // method.batch_size  # batches: of the dense model, of the mask at the start and at the end
    assert len(read) == (1 + 2) * method.coarse_steps + 3 * held + 1


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "bert"])
@pytest.mark.parametrize("granularity", ["sublayers", "channels", "heads"])
def test_what_is_gone_as_a_whole_is_not_run(family, granularity, tokens):
    """The linears that write a dropped sub-layer's units stay silent, where norms come before it."""
    model = tiny_model(family).double()
    units, row = structure.units(model, granularity), structure.family(model)
    keep = torch.ones(len(units), dtype=torch.bool)
    keep[units.of(1, granularity)] = False
    with torch.no_grad(), masks.masked(model, units, keep):
        expected = model(input_ids=tokens).logits
    ran = []
    paths = {"sublayers": (row.query, *row.up), "channels": row.up, "heads": (row.query,)}[granularity]
    for path in paths:
        linear = structure.part(structure.layers(model)[1], path)
        linear.register_forward_pre_hook(lambda module, inputs: ran.append(module))
    with torch.no_grad(), masks.sliced(model, units, keep):
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, atol=1e-9, rtol=0)
    fused = granularity == "heads" and row.fused_qkv  # goes through masks
    assert bool(ran) == (not row.pre_norm or fused)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])
def test_the_divergence_by_hand(family, words):
    """Of the model's own logits: the likeliest words one by one, all others as one; 0 for the model itself."""
    from sentei.distill import divergence, likeliest

    model = tiny_model(family)
    method = PolicyGradient(sparsity=0.3, **QUICK)
    run = method.start(model, words, TEXT)
    batch = run.batch(run.blocks(2, 16))
    asked = batch["targets"] != -100
    dense = likeliest(model, batch, 8)
    same = divergence(model, batch, dense)
    assert float(same["kl"]) == pytest.approx(0, abs=1e-6)
    assert float(same["ce"]) == pytest.approx(run.loss(model, run.blocks(2, 16)).item(), abs=1e-5)
    units = structure.units(model)
    keep_U = torch.rand(len(units), generator=torch.Generator().manual_seed(0)) < 0.5

    def log_probabilities():
        return model(input_ids=batch["input_ids"]).logits[asked].double().log_softmax(-1)

    with torch.no_grad():
        log_q = log_probabilities()
        with masks.masked(model, units, keep_U):
            log_p, found = log_probabilities(), divergence(model, batch, dense)
            whole = divergence(model, batch, likeliest(tiny_model(family), batch, 10_000))
    top = log_q.topk(8).indices
    q, p = log_q.exp().gather(1, top), log_p.exp().gather(1, top)
    rest_q, rest_p = 1 - q.sum(1), 1 - p.sum(1)
    by_hand = ((q * (q / p).log()).sum(1) + rest_q * (rest_q / rest_p).log()).mean()
    assert float(found["kl"]) == pytest.approx(float(by_hand), abs=1e-5)
    everything = (log_q.exp() * (log_q - log_p)).sum(1).mean()
    assert float(whole["kl"]) == pytest.approx(float(everything), abs=1e-5)
    assert 0 < float(found["kl"]) < float(whole["kl"])


def test_what_a_search_by_divergence_says_of_the_loss(words):
    """Held-out perplexity stands beside the divergence, and is the mask's own."""
    method = PolicyGradient(sparsity=0.3, keep_best=False, **QUICK | {"coarse_steps": 0})
    search = Search(method, method.start(tiny_model("llama"), words, TEXT))
    with torch.inference_mode():
        keep_U = search.best_U()
        account = search.account()
        with masks.sliced(search.run.model, search.units, keep_U, search.fill):
            loss = search.run.mean_loss(search.held, method.batch_size)
    assert account["history"][-1]["held_perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert account["start_perplexity"] > 1 and account["best_loss"] < 1 < account["best_perplexity"]
