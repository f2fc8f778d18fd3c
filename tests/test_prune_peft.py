"""PrunePEFT: its arithmetic, the null test of every criterion and assignment, and whole searches on toys."""

import json
import random
import re
import warnings
from itertools import pairwise

import pytest
import torch
from conftest import tiny_model

from sentei import adapters, checkpoint, recipe
from sentei.adapters import Unit
from sentei.data import examples
from sentei.methods.prune_peft import CRITERIA, PrunePEFT, pages, planning
from sentei.methods.prune_peft import assignment as assigning
from sentei.methods.prune_peft import criteria as scoring
from sentei.methods.prune_peft.criteria import Recorder

SIX = ("weight", "zeros", "threshold", "activation", "sensitivity", "gradient")
CUTS = (0.2, 0.5, 0.8)


def fake_units(num_lora, num_adapters, lora=10, adapter=10):
    found = [Unit(f"lora.L{i}", "lora", i, (f"q{i}", f"v{i}"), ((lora, lora),) * 2, 1) for i in range(num_lora)]
    return found + [
        Unit(f"adapter.L{i}", "adapter", i, (f"m{i}",), ((adapter, adapter),), 1) for i in range(num_adapters)
    ]


class Costs(Unit):
    """A unit of any price."""

    @property
    def parameters(self):
        return self.rank


def priced(*prices):
    return [Costs(f"u{i}", "lora", i, (f"m{i}",), ((1, 1),), price) for i, price in enumerate(prices)]


# --- exact arithmetic -----------------------------------------------------------------------------


def test_depth_blocks():
    def sizes(layers):
        blocks = assigning.depth_blocks(layers, CUTS)
        return [blocks.count(block) for block in range(4)]

    assert sizes(6) == [1, 2, 2, 1] and sizes(12) == [2, 4, 4, 2] and sizes(24) == [5, 7, 7, 5]
    assert sizes(28) == [6, 8, 8, 6] and sizes(32) == [6, 10, 10, 6]


def test_percentiles_and_weights():
    d = [0.1, 0.4, 0.2, 0.3]
    p = scoring.percentiles(d)
    assert p == [0.125, 0.875, 0.375, 0.625]
    assert [round(assigning.weigh(x, 4), 6) for x in p] == [0.005928, 0.833502, 0.100853, 0.456912]
    assert scoring.percentiles([1.0, 1.0, 2.0]) == [1 / 3, 1 / 3, 2.5 / 3]  # equal values share their rank
    terms = [assigning.weigh(x / 100, 4) for x in range(1, 100)]
    assert terms == sorted(terms)


def test_matching():
    sizes = {("lora", 0): 5, ("lora", 1): 7}
    votes = {
        name: dict(zip(sizes, counts, strict=True)) for name, counts in {"A": (5, 2), "B": (1, 3), "C": (4, 1)}.items()
    }
    scored = dict(zip(SIX, votes.values(), strict=False))
    assert assigning.match(scored, sizes) == {("lora", 0): ("weight", "threshold"), ("lora", 1): ("zeros",)}
    rates = {"weight": {("lora", 0): 3, ("lora", 1): 4}, "zeros": {("lora", 0): 9, ("lora", 1): 9}}
    assert "weight" in assigning.match(rates, sizes)["lora", 0]  # 3 of 5 is more than 4 of 7


def test_landing():
    def land(order, prices, budget):
        units = priced(*prices)
        of = {unit.id: unit for unit in units}
        probability = {f"u{i}": 1 - place / 10 for place, i in enumerate(order)}
        judgement = assigning.Judgement({"lora": [f"u{i}" for i in order]}, probability, {}, {})
        gone = assigning.remove(units, judgement, len(order), budget, seed=0)
        left = [unit for unit in units if unit not in gone]
        back = assigning.put_back(left, [gone], budget)
        return sum(unit.parameters for unit in left), [of[u.id].parameters for u in back]

    assert land([2, 0, 1, 3], (5, 5, 3, 3), 11) == (8, [3])  # 3, 5 go; 3 comes back: 11
    assert land([0, 1, 2, 3], (5, 5, 3, 3), 11) == (11, [])
    for seed in range(50):
        draw = random.Random(seed)
        prices, budget = [draw.randint(1, 9) for _ in range(8)], draw.randint(9, 20)
        left, back = land(draw.sample(range(8), 8), prices, budget)
        assert left + sum(back) <= budget


def test_batches_of_opposite_sign_do_not_cancel():
    model, units = injected("bert", kinds=("adapter",))
    recorder = Recorder(model, units, init="zero", threshold=0.05, threshold_mode="relative")
    recorder.scoring = True
    weights = [weight for unit in units for _, weight in adapters.matrices(model, unit)]
    for sign in (1.0, -1.0):
        for weight in weights:
            with torch.no_grad():
                weight.fill_(2.0)
            weight.grad = torch.full_like(weight, sign)
        recorder.gradients()
    assert recorder._gradient[units[0].id] == [2.0, 2.0] and recorder.steps == 2  # mean of 1 and 1
    assert recorder._sensitivity[units[0].id] == [4.0, 4.0]
    found = recorder.scores()
    assert set(found) == set(CRITERIA) and found["gradient"][units[0].id] == pytest.approx(1.0)
    weights[0].grad[0, 0] = float("nan")
    recorder.gradients()
    assert recorder.steps == 2
    with pytest.raises(ValueError, match="not finite in 1 of 3 batches; lower lr or use bf16"):
        recorder.scores()
    recorder.close()


def test_a_role_counts_relative_to_its_kind():
    units = fake_units(2, 0)
    roles = {unit.id: ["A", "B"] for unit in units}
    found = scoring.relative({"lora.L0": [2.5, 0.0], "lora.L1": [7.5, 0.0]}, roles, units)
    assert found == {"lora.L0": 0.5, "lora.L1": 1.5}  # B says nothing
    found = scoring.relative({"lora.L0": [100.0, 3.0], "lora.L1": [100.0, 1.0]}, roles, units)
    assert found == {"lora.L0": 1.25, "lora.L1": 0.75}  # a large A does not drown B


def test_scores_of_weights_by_hand():
    model, units = injected("bert", kinds=("adapter",), init="hub")
    recorder = Recorder(model, units, init="zero", threshold=0.5, threshold_mode="relative")
    recorder.steps = 2
    with torch.no_grad():
        for number, unit in enumerate(units):
            for _, weight in adapters.matrices(model, unit):
                weight.fill_(1.0)
                weight[: weight.shape[0] // 2] = 0.0 if number == 0 else 1.0
    found = recorder.scores()
    assert found["zeros"][units[0].id] == 0.5 and found["zeros"][units[1].id] == 1.0
    assert found["threshold"][units[0].id] == 0.5 and found["threshold"][units[1].id] == 0.0
    # squares are 1/2, 1, 1: divided by their mean
    assert found["weight"][units[0].id] == pytest.approx(0.5 / (2.5 / 3))
    assert scoring.prunability("threshold", 0.5) > scoring.prunability("threshold", 0.0)
    assert scoring.prunability("weight", 0.5) > scoring.prunability("weight", 1.0)
    recorder.close()


def injected(family, init="zero", **options):
    model = tiny_model(family)
    units = adapters.units(model, rank=4, width=8, **options)
    adapters.inject(model, units, init=init)
    return model, units


def test_activation_leaves_out_padding_and_starts_anew(tokens):
    model, units = injected("bert", init="hub")
    model.eval()
    with torch.no_grad():
        for parameter in adapters.parameters(model, units):
            parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[:, 8:] = 0

    def measured(ids):
        recorder = Recorder(model, units, init="hub", threshold=0.05, threshold_mode="relative")
        recorder.scoring, recorder.steps = True, 2
        recorder.begin(mask)
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask)
        found = recorder.scores()["activation"]
        recorder.close()
        return found

    first = measured(tokens)
    other = tokens.clone()
    other[:, 8:] = 7
    assert all(value > 0 for value in first.values())
    assert measured(other) == pytest.approx(first) and measured(tokens) == first


# --- null tests ---------------------------------------------------------------------------------


def noise(units, draw):
    """Correlated criteria; `zeros` is constant, as it is in fp32."""
    scores = {criterion: {} for criterion in CRITERIA}
    for unit in units:
        common = draw.gauss(0, 1)
        for criterion in CRITERIA:
            own = (common + draw.gauss(0, 1)) * (-1 if criterion == "threshold" else 1)
            scores[criterion][unit.id] = 1.0 if criterion == "zeros" else 2.0 ** min(own, 40)
    return scores


def shares(units, assignment_name, draws, k=4, table=None):
    """Removals of each cell over what its share of units would be."""
    layers = 1 + max(unit.layer for unit in units)
    cell_of = assigning.cells(units, layers, CUTS)
    assignment = table or assigning.fixed(assignment_name, cell_of)
    draw, count = random.Random(1), dict.fromkeys(cell_of.values(), 0)
    for number in range(draws):
        judgement = assigning.judge(noise(units, draw), units, cell_of, assignment, slope=4, seed=number)
        for unit in assigning.remove(units, judgement, k, 0, seed=number):
            count[cell_of[unit.id]] += 1
    sizes = {cell: list(cell_of.values()).count(cell) for cell in count}
    assert sum(count.values()) == k * draws
    return {cell: count[cell] / (k * draws * sizes[cell] / len(units)) for cell in count}


@pytest.mark.parametrize("name", [*CRITERIA, "paper", "equal"])
def test_noise_removes_every_cell_in_proportion(name):
    found = shares(fake_units(24, 24), name, 500)
    # A cell of 5 units loses about 210 in 500 draws: 25 % are four standard deviations.
    assert all(0.75 < value < 1.25 for value in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CRITERIA, "paper", "equal", "random table", "uneven kinds"])
def test_noise_removes_every_cell_in_proportion_closely(name):
    units = fake_units(10, 24) if name == "uneven kinds" else fake_units(24, 24)
    draw = random.Random(5)
    cells = set(assigning.cells(units, 24, CUTS).values())
    table = {cell: tuple(draw.sample(CRITERIA, draw.randint(1, 6))) for cell in sorted(cells)}
    found = shares(
        units, name if name in (*CRITERIA, "equal") else "paper", 12_000, table=table if "table" in name else None
    )
    assert all(0.95 < value < 1.05 for value in found.values()), found


def test_scale_and_order_change_nothing():
    units = fake_units(12, 12)
    cell_of = assigning.cells(units, 12, CUTS)
    assignment = assigning.fixed("paper", cell_of)
    scores = noise(units, random.Random(0))
    larger = {c: {n: x * 1e6 if n.startswith("lora") else x for n, x in of.items()} for c, of in scores.items()}

    def gone(scores, units):
        judgement = assigning.judge(scores, units, cell_of, assignment, slope=4, seed=3)
        return [unit.id for unit in assigning.remove(units, judgement, 6, 0, seed=3)]

    assert gone(scores, units) == gone(larger, units) == gone(scores, units[::-1])


def test_ties_are_broken_by_chance_alone():
    units = fake_units(24, 24)
    cell_of = assigning.cells(units, 24, CUTS)
    flat = {criterion: {unit.id: 1.0 for unit in units} for criterion in CRITERIA}
    count = dict.fromkeys(cell_of, 0)
    for number in range(600):
        judgement = assigning.judge(flat, units, cell_of, assigning.fixed("paper", cell_of), slope=4, seed=number)
        assert judgement.abstained == {"adapter": [*CRITERIA], "lora": [*CRITERIA]}
        for unit in assigning.remove(units, judgement, 4, 0, seed=number):
            count[unit.id] += 1
    assert sum(count.values()) == 2400 and max(count.values()) < 90 and min(count.values()) > 20


def test_votes_by_chance_and_a_real_table():
    units = fake_units(24, 24)
    cell_of = assigning.cells(units, 24, CUTS)
    draw = random.Random(0)
    by_chance = assigning.count_votes([noise(units, draw) for _ in range(3)], cell_of, 0.25)
    assert assigning.chance(by_chance, cell_of, seed=0) > 0.02
    first_layers = noise(units, draw)
    for criterion in CRITERIA:
        for unit in units:
            first_layers[criterion][unit.id] = float(unit.layer if criterion != "threshold" else -unit.layer)
    votes = assigning.count_votes([first_layers] * 3, cell_of, 0.25)
    assert assigning.chance(votes, cell_of, seed=0) < 0.01
    assert by_chance["zeros"] == dict.fromkeys(cell_of, 0)  # it abstained


# --- plans ----------------------------------------------------------------------------------------


def test_budgets():
    units = fake_units(4, 4, 10, 10)  # 40 and 31 parameters
    total = sum(unit.parameters for unit in units)
    assert total == 284
    assert planning.budget_parameters(0.5, "supernet", units, 1000, 0) == 142
    assert planning.budget_parameters(0.1, "base", units, 1000, 0) == 100
    assert planning.budget_parameters(90, "supernet", units, 1000, 20) == 70
    for budget, message in (
        (284, r"nothing would be removed; the search space has 284 parameters"),
        (1.0, "nothing would be removed"),
        (30, r"below the cheapest unit, adapter.L0 with 31"),
        (-1, "expected a number of parameters"),
        (10.5, "expected a number of parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            planning.budget_parameters(budget, "supernet", units, 1000, 0)


def planned(**changes):
    settings = {
        "train_rows": 100_000, "search_rows": 90_000, "steps": 20_000, "batch_size": 16, "warmup_steps": 60,
        "assignment": "warmup", "units_per_round": None, "steps_per_round": None, "search_fraction": None,
        "max_ratio": 0.3, "least_rows": 4,
    }  # fmt: skip
    units = fake_units(24, 24)
    return planning.plan(units, sum(unit.parameters for unit in units) // 2, **settings | changes)


def test_plans_keep_to_the_ratio_or_say_so():
    large = planned()
    assert (large.units_per_round, large.rounds, large.assignment, large.notes) == (4, 6, "warmup", ())
    assert large.ratio <= 0.3 and large.rows == 10_000
    middle = planned(steps=600)
    assert middle.ratio <= 0.3 and middle.units_per_round > 4 and "in place of 4" in middle.notes[0]
    small = planned(steps=200, train_rows=1000, search_rows=900)
    assert small.assignment == "paper" and small.ratio <= 0.3 and small.rows <= 900
    tiny = planned(steps=30)
    assert tiny.ratio > 0.3 and "of one training, goal 0.30" in tiny.notes[-1]
    assert planned(steps_per_round=50).round_steps == 50 and planned(search_fraction=0.05).rows == 5000


# --- whole searches on toys ----------------------------------------------------------------------

FAST = {
    "lora_r": 2, "lora_alpha": 4, "adapter_width": 4, "batch_size": 8, "epochs": 1.0, "lr": 5e-3, "seq_len": 16,
    "steps_per_round": 4, "warmup_examples": 40, "warmup_epochs": 1, "warmup_turns": 2, "precision": "fp32",
}  # fmt: skip


@pytest.fixture
def rows(tmp_path):
    draw = random.Random(0)
    lines = ["text\tpair\tlabel\tscore"]
    for _ in range(120):
        text = "".join(draw.choice("abcdefgh") for _ in range(10))
        lines.append(f"{text}\t{text[::-1]}\t{int(text[0] < 'e')}\t{ord(text[0]) / 10}")
    (tmp_path / "rows.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path / "rows.tsv"


def start(family, method, rows, words, tmp_path, **overrides):
    """A model with the method's head, and the rows; the tiny base is on disk."""
    folder = tmp_path / family
    if not folder.exists():
        tiny_model(family, **overrides).save_pretrained(folder)
        words.save_pretrained(folder)
    text = method.read(str(rows), "text")
    model, tokenizer = checkpoint.load(folder, dtype="float32", **method.head(text))
    return model, tokenizer, text


def search(method, *arguments, **keywords):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return method.compress(*arguments, **keywords)


def without_times(record):
    return {key: value for key, value in record.items() if key not in ("seconds", "phases", "search_ratio")}


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("bert", {}),
        ("distilbert", {"pair_field": "pair", "assignment": "equal", "compare": True}),
        ("llama", {"assignment": "paper", "lora_split": True}),
        (
            "qwen3",
            {"label_field": "score", "kinds": ("lora",), "assignment": "gradient", "lora_targets": ("q", "down")},
        ),
        ("llama", {"task": "response", "label_field": "pair", "assignment": "random"}),
    ],
)
def test_searches(family, fields, rows, words, tmp_path):
    method = PrunePEFT(**FAST | fields)
    model, tokenizer, text = start(family, method, rows, words, tmp_path)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    record = search(method, model, tokenizer, text)
    json.dumps(record, allow_nan=False)

    # the budget is met, to within one cheapest removed unit, and masks only shrink
    units = {unit["id"]: unit for unit in record["units"]}
    kept = sum(units[name]["parameters"] for name in record["living"])
    removed = [units[name]["parameters"] for name in units if name not in record["living"]]
    assert kept == record["parameters"]["living"] <= record["parameters"]["budget"]
    assert record["parameters"]["budget"] - kept < min(removed)
    masks = [set(found["living"]) for found in record["rounds"]]
    assert all(later < earlier for earlier, later in pairwise(masks))

    # the model holds the survivors and nothing else
    heads = tuple(f"{name}." for name in adapters.head(model))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    counted = sum(model.get_parameter(name).numel() for name in trained if not name.startswith(heads or ("\0",)))
    assert counted == kept
    with torch.no_grad():
        adapters.unload(model)
    for name, p in model.named_parameters():
        assert name.startswith(heads or ("\0",)) or torch.equal(p, base[name])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    # it can be read
    texts = pages.all_pages(record)
    assert "modules, 0 others" in texts["README.md"] and texts["heat_map.svg"].count("<title>") == len(units)
    check = record["adapter"]["pattern_check"]
    hits = [n for n, _ in model.named_modules() if re.fullmatch(record["adapter"]["pattern"], n)]
    assert len(hits) == check["matched"] == check["expected"]
    if fields.get("compare"):
        assert record["plain_lora"]["parameters"] > 0 and record["search_ratio"]["seconds"] > 0


def test_equal_seeds_equal_results_and_resuming(rows, words, tmp_path):
    method = PrunePEFT(**FAST | {"save_every": 2})
    whole_model, tokenizer, text = start("bert", method, rows, words, tmp_path)
    whole = search(method, whole_model, tokenizer, text)
    assert len(whole["rounds"]) >= 3 and whole["votes"] is not None

    class Killed(Exception):
        pass

    def kill_at(moment):
        seen = []

        def report(event):
            seen.append(event)
            if len(seen) == moment:
                raise Killed

        return report

    for moment in (7, 15, 20, 34):  # in the warm-up, in two rounds, in the final training
        workdir = tmp_path / f"work{moment}"
        model, tokenizer, _ = start("bert", method, rows, words, tmp_path)
        with pytest.raises(Killed):
            search(method, model, tokenizer, text, workdir=workdir, report=kill_at(moment))
        model, tokenizer, _ = start("bert", method, rows, words, tmp_path)
        again = search(method, model, tokenizer, text, workdir=workdir)
        assert without_times(again) == without_times(whole)
        for (name, one), (_, two) in zip(whole_model.named_parameters(), model.named_parameters(), strict=True):
            assert torch.equal(one, two), name
    other = PrunePEFT(**FAST | {"save_every": 2, "lr": 1e-3})
    with pytest.raises(ValueError, match="holds a search with other lr"):
        search(other, *start("bert", method, rows, words, tmp_path), workdir=workdir)
    different = search(PrunePEFT(**FAST | {"seed": 1}), *start("bert", method, rows, words, tmp_path))
    assert without_times(different) != without_times(whole)


def test_a_planted_unit_that_learns_stays_and_useless_ones_go(rows, words, tmp_path, monkeypatch):
    """Only one layer's bottleneck, and one LoRA, receive a gradient."""
    method = PrunePEFT(**FAST | {"assignment": "gradient", "budget": 0.3, "steps_per_round": 6})
    real = Recorder.gradients

    def planted(self):
        for unit in self.living:
            for _, weight in self._matrices[unit.id]:
                if weight.grad is not None and unit.layer != 2:
                    weight.grad.mul_(1e-6)
        real(self)

    monkeypatch.setattr(Recorder, "gradients", planted)
    for seed in range(2):
        model, tokenizer, text = start("bert", method, rows, words, tmp_path, num_hidden_layers=6)
        record = search(PrunePEFT(**vars(method) | {"seed": seed}), model, tokenizer, text)
        assert {"lora.L2", "adapter.L2"} <= set(record["living"])
        assert not {"lora.L2", "adapter.L2"} & {name for found in record["rounds"] for name in found["removed"]}


def test_rolling_back(rows, words, tmp_path, monkeypatch):
    from sentei.methods.prune_peft.training import Bench

    values = iter([0.9, 0.88, 0.5, 0.5, 0.5, 0.5])
    monkeypatch.setattr(Bench, "score", lambda self, rows: next(values, 0.7))
    method = PrunePEFT(**FAST | {"assignment": "paper", "budget": 0.2, "units_per_round": 1, "max_drop": 0.1})
    model, tokenizer, text = start("bert", method, rows, words, tmp_path)
    record = search(method, model, tokenizer, text)
    # rounds 3 and 4 fail: back to the mask of round 2, before the removal that round 3 trained with
    assert record["status"] == "stopped_early" and record["living"] == record["rounds"][1]["living"]
    assert len(record["rounds"]) == 4 and record["parameters"]["living"] > record["parameters"]["budget"]


def test_thresholds_reject_and_warn(rows, words, tmp_path):
    method = PrunePEFT(**FAST | {"assignment": "paper", "min_metric": 1.1})
    record = search(method, *start("bert", method, rows, words, tmp_path))
    assert record["status"] == "rejected" and "below min_metric 1.1" in record["rejected"][0]
    method = PrunePEFT(**FAST | {"assignment": "paper", "max_drop": 0.001})
    with pytest.warns(UserWarning, match="less than 2 standard errors of accuracy"):
        method.compress(*start("bert", method, rows, words, tmp_path))


def test_a_saved_assignment_is_used_again(rows, words, tmp_path):
    table = {"lora": [["gradient"]] * 4, "adapter": [["weight", "zeros"]] * 4}
    (tmp_path / "x.json").write_text(json.dumps(table))
    method = PrunePEFT(**FAST | {"assignment": f"file:{tmp_path / 'x.json'}"})
    record = search(method, *start("bert", method, rows, words, tmp_path, num_hidden_layers=6))
    assert record["assignment"] == {kind: [list(cell) for cell in blocks] for kind, blocks in table.items()}
    (tmp_path / "x.json").write_text('{"lora": []}')
    with pytest.raises(ValueError, match="is no assignment for these units"):
        search(method, *start("bert", method, rows, words, tmp_path))


def test_from_the_command_line_to_a_loaded_adapter(rows, words, tmp_path, capsys):
    from sentei import cli

    tiny_model("bert").save_pretrained(tmp_path / "bert")
    words.save_pretrained(tmp_path / "bert")
    flags = [word for name, value in FAST.items() for word in (f"--{name}", str(value))]
    out = tmp_path / "out"
    command = ["compress", str(tmp_path / "bert"), "--method", "prune_peft", "--data", str(rows), "--out", str(out)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cli.main([*command, *flags, "--assignment", "paper"]) == 0
        assert "parameters" in capsys.readouterr().out
        worse = ["--compare", "true", "--max-drop-vs", "-1"]  # nothing is better by 1
        assert cli.main([*command, *flags, "--assignment", "paper", "--min-metric", "1.1", *worse, "--force"]) == 3
    assert {file.name for file in out.iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "sentei_adapter.json", "prunepeft.json", "report.md",
        "heat_map.svg", "README.md", "recipe.yaml",
    }  # fmt: skip
    checkpoint.load(out, dtype="float32")
    stored = json.loads((out / "prunepeft.json").read_text())
    assert len(stored["record"]["living"]) == len(stored["record"]["adapter"]["units"])
    assert recipe.make_method("prune_peft", stored["fields"]) == PrunePEFT(
        **FAST, assignment="paper", min_metric=1.1, compare=True, max_drop_vs=-1.0
    )
    checkpoint.load(out / "fallback", dtype="float32")  # LoRA everywhere, which was trained to compare with
    assert len(json.loads((out / "fallback" / "sentei_adapter.json").read_text())["units"]) == 3
    assert not list(tmp_path.glob(".out*"))
    assert cli.main(["plan", *command[1:4], "--data", str(rows), *flags]) == 0
    assert "96 to train on" in " ".join(capsys.readouterr().out.replace("rows ", "").split())


def test_a_recipe_prunes_and_then_adapts_the_pruned_model(rows, words, tmp_path):
    """Layers of different width, one without attention: the search runs on what is left and the folder loads."""
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    words.save_pretrained(tmp_path / "llama")
    lines = [f"so it goes, and goes again {i}, until the end of all the words.\n\n" for i in range(400)]
    (tmp_path / "t.txt").write_text("".join(lines))
    cut = {
        "method": "one_shot", "criterion": "magnitude", "sparsity": 0.4, "calibration_samples": 4,
        "calibration_seq_len": 16, "data": str(tmp_path / "t.txt"),
    }  # fmt: skip
    find = {"method": "prune_peft", "data": str(rows), "assignment": "paper", **FAST}
    asked = {"model": str(tmp_path / "llama"), "out": str(tmp_path / "runs"), "report": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = recipe.run(recipe.Recipe(stages=[cut, find], **asked))
    assert result["status"] == "accepted" and result["parameters"]["living"] <= result["parameters"]["budget"]
    model, _ = checkpoint.load(result["checkpoint"], dtype="float32")
    assert type(model).__name__ == "SenteiLlamaForSequenceClassification"
    with pytest.raises(ValueError, match="must be the last"):
        recipe.Recipe(stages=[find, cut], **asked)
    with pytest.raises(ValueError, match="min_metric and max_drop_vs"):
        recipe.Recipe(stages=[find], evaluate={"texts": ["python-docs"]}, **asked)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget_of": "half"}, "budget_of is one of supernet, base"),
        ({"assignment": "vote"}, "assignment is one of warmup, paper"),
        ({"adapter_init": "one"}, "adapter_init is one of"),
        ({"task": "chess"}, "task is one of classification"),
        ({"lr": 0}, "lr must be above 0"),
        ({"depth_cuts": (0.5, 0.2, 0.8)}, "three rising numbers"),
        ({"warmup_examples": 10}, "fewer than 2 batches of 16"),
        ({"max_drop_vs": 0.1}, "compare=true"),
        ({"kind_weights": (1.0,)}, "a number above 0 for each of lora, adapter"),
        ({"score_from": 1.0}, "score_from and dropout"),
        ({"search_fraction": 2.0}, "at most 1"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        PrunePEFT(**fields)


def test_bad_inputs(rows, words, tmp_path):
    def refused(message, family="bert", data=rows, model=None, **fields):
        method = PrunePEFT(**FAST | {"assignment": "paper"} | fields)
        with pytest.raises(ValueError, match=message):
            arguments = start(family, method, data, words, tmp_path)
            search(method, model or arguments[0], *arguments[1:])

    refused("nothing would be removed; the search space has", budget=10_000_000)
    refused("below the cheapest unit", budget=3)
    refused("metric 'spearman' is not for classification", metric="spearman")
    refused("goal 0.30; raise max_search_ratio", strict_search_ratio=True)
    refused("no field 'mark'", label_field="mark")
    model, _ = injected("bert")
    refused("has PEFT modules already", model=model)
    refused("use one process or DDP", model=torch.nn.DataParallel(tiny_model("bert")))
    few = tmp_path / "few.tsv"
    few.write_text("text\tlabel\n" + "".join(f"row {i}\t{i % 2}\n" for i in range(16)))
    refused("fewer than 2 batches of 8", data=few)
    refused("3 steps leave fewer than 2 scored batches; raise steps_per_round", steps_per_round=3)
    one = tmp_path / "one.tsv"
    one.write_text("text\tlabel\n" + "".join(f"row {i}\t1\n" for i in range(60)))
    refused("a classification needs two or more", data=one)
    with pytest.raises(ValueError, match="this method learns from labelled rows"):
        recipe.compress(tmp_path / "bert", method="prune_peft", out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_slices_hold_every_label(rows):
    text = examples.load(rows, text_field="text")
    few = examples.stratified(text.train, 8, seed=0, labels=2)
    assert {row["label"] for row in few} == {0, 1}
