"""Scores on planted units, compensation against exact solutions."""

import copy

import pytest
import torch
from conftest import DECODERS, ENCODERS, tiny_model

from sentei import data, importance, masks, structure
from sentei.distill import Distillation
from sentei.importance import compensation
from sentei.methods.one_shot import OneShot
from sentei.train import causal_batch


def blocks(n=8, t=12, seed=0):
    return torch.randint(5, 128, (n, t), generator=torch.Generator().manual_seed(seed))


def loss(model, ids):
    return Distillation()(model, causal_batch(ids))["loss"]


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


SCORES = {
    "magnitude": lambda m, u: importance.magnitude(m, u),
    "wanda": lambda m, u: importance.wanda(m, u, blocks(), 0.3),
    "flap": lambda m, u: importance.flap(m, u, importance.moments(m, blocks(), u.granularity)),
    "taylor": lambda m, u: importance.taylor(m, u, blocks(), loss),
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text"])
def test_useless_units_score_least(family, name):
    model = tiny_model(family)
    row, units = structure.family(model), structure.units(model)
    with torch.no_grad():
        for layer in structure.layers(model):
            for kind in units.granularity:  # unit 1 is useless, in every layer
                size = structure.sizes_of(layer, row)
                reader = structure.reader(layer, row, kind)
                reader.weight[:, structure.columns(size, kind, torch.tensor([1]))] *= 1e-4
                if kind == "channels":
                    for path in row.up:
                        structure.part(layer, path).weight[[1, 41] if row.fused_up else [1]] *= 1e-4
    score = SCORES[name](model, units)
    for number in range(units.num_layers):
        for kind in units.granularity:
            if name == "magnitude" and kind == "heads":
                continue  # its q, k and v are as large as ever
            assert int(score[units.of(number, kind)].argmin()) == 1, (number, kind)


@pytest.mark.parametrize("family", DECODERS + ENCODERS)
def test_replay_is_the_forward_pass(family):
    model = tiny_model(family)
    ids = blocks(5)
    with torch.no_grad():
        output = structure.base_model(model)(input_ids=ids, output_hidden_states=True)
    replay = importance.Replay(model, ids, batch_size=2)
    for number in range(len(replay.layers) - 1):  # the last hidden state is after the final norm
        replay.advance(number)
        torch.testing.assert_close(torch.cat(replay.hidden), output.hidden_states[number + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_calibration_pass_keeps_no_keys_and_values(family):
    model, found = tiny_model(family), []
    look = lambda module, args, output: found.append(output.get("past_key_values"))  # noqa: E731
    structure.base_model(model).register_forward_hook(look)
    importance.moments(model, blocks(), ("heads", "channels"))
    importance.block_influence(model, structure.units(model, "layers"), blocks())
    assert found == [None, None]


def test_block_influence_finds_an_idle_block():
    model = tiny_model("llama")
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.get_submodule(f"model.layers.2.{name}").weight.zero_()
            model.get_submodule(f"model.layers.2.{name}").bias.zero_()
    score = importance.block_influence(model, structure.units(model, "layers"), blocks())
    assert abs(score[2]) < 1e-5 and int(score.argmin()) == 2
    score = importance.block_influence(model, structure.units(model, "sublayers"), blocks())
    assert set(score.argsort()[:2].tolist()) == {4, 5}


def test_wanda_on_hand_numbers():
    model = tiny_model("llama", num_hidden_layers=1)
    ids = blocks(4)
    units = structure.units(model, "channels")
    seen = []
    handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, x: seen.append(x[0].detach()))
    logits(model, ids)
    handle.remove()
    norm = seen[0].square().sum(1).mean(0).sqrt()  # over tokens, then the mean over sequences
    expected = model.model.layers[0].mlp.down_proj.weight.abs().mean(0) * norm
    torch.testing.assert_close(importance.wanda(model, units, ids, 0.3).float(), expected.detach(), rtol=1e-4, atol=0)


def random_keep(units, share=0.7):
    return torch.rand(len(units), generator=torch.Generator().manual_seed(1)) < share


def test_mean_bias_equals_mean_fill(any_model, tokens):
    model = any_model.double()
    units = structure.units(model)
    keep = random_keep(units)
    fill = importance.mean_fill(importance.moments(model, blocks(), units.granularity))
    with masks.masked(model, units, keep, fill):
        expected = logits(model, tokens)
    structure.remove(model, units, keep, importance.mean_bias(model, units, keep, fill))
    torch.testing.assert_close(logits(model, tokens), expected, atol=1e-5, rtol=1e-5)


def linear_of(weight):
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype).requires_grad_(False)
    linear.weight.copy_(weight)
    return linear


def test_solve_matches_direct_least_squares():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator).double()
    x = torch.randn(200, 6, generator=generator).double() @ mixing + 0.5
    weight = torch.randn(3, 6, generator=generator).double()
    kept = torch.tensor([True, True, False, True, True, False])
    linear = linear_of(weight)
    reading = compensation._Reading(linear, torch.tensor([2, 5]), None)
    reading(x)
    shift = reading.solve(0.0, True)
    design = torch.cat([x[:, kept], torch.ones(200, 1).double()], 1)
    expected = torch.linalg.lstsq(design, x @ weight.T).solution.T
    torch.testing.assert_close(linear.weight[:, kept], expected[:, :4], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(shift, expected[:, 4], atol=1e-4, rtol=1e-4)
    assert not linear.weight[:, ~kept].any()
    reading.linear = linear_of(weight)
    mean = reading.solve(1e9, True)  # all pull, no fit: the mean alone
    torch.testing.assert_close(reading.linear.weight[:, kept], weight[:, kept], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mean, weight[:, ~kept] @ x[:, ~kept].mean(0), atol=1e-4, rtol=1e-4)


def test_tokens_of_a_fit_may_have_weights():
    """A weight w is as good as the row and its target scaled by the root of w; with a bias too."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(200, 6, generator=generator).double() + 0.5, torch.rand(200, generator=generator).double()
    old = torch.randn(3, 6, generator=generator).double()
    kept = torch.tensor([True, True, False, True, True, False])
    for with_bias in (False, True):
        linear = linear_of(old)
        streams = iter((weight[:, None].rsqrt() - x @ old.T).split(50))  # their sum with the outputs has norms
        reading = compensation._Reading(linear, torch.tensor([2, 5]), None, lambda streams=streams: next(streams))
        for part in x.split(50):
            reading(part)
        shift = reading.solve(0.0, with_bias)
        design = torch.cat([x[:, kept], torch.full((200, 1), float(with_bias)).double()], 1)
        root = weight.sqrt()[:, None]
        wanted = torch.linalg.lstsq(root * design, root * (x @ old.T), driver="gelsd").solution.T
        torch.testing.assert_close(linear.weight[:, kept], wanted[:, :4], atol=1e-4, rtol=1e-4)
        if with_bias:
            torch.testing.assert_close(shift, wanted[:, 4], atol=1e-4, rtol=1e-4)


def test_a_relative_refit_is_not_taken_by_one_long_token():
    """A channel that is cut made the stream of one word a thousand times as long as the others'."""
    model = tiny_model("llama", num_hidden_layers=2)
    with torch.no_grad():
        words, mlp = model.get_input_embeddings().weight, structure.layers(model)[0].mlp
        words[:, 0] = 0.0
        words[7] = 0.0
        words[7, 0] = 1.0
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight[3] = 0.0
            linear.weight[3, 0] = 20.0
    units = structure.units(model)
    text = torch.randint(8, 128, (32, 16), generator=torch.Generator().manual_seed(1))
    text[:, 0] = 7
    keep = torch.rand(len(units), generator=torch.Generator().manual_seed(2)) < 0.6
    keep[units.kind_U == structure.KINDS.index("heads")] = True
    keep[units.of(0, "channels")[3]] = False
    gaps = {}
    for relative in (False, True):
        small = copy.deepcopy(model)
        importance.refit(small, units, keep, text, relative=relative, with_bias=False, ridge=1e-6)
        structure.remove(small, units, keep)
        gaps[relative] = float((logits(small, text) - logits(model, text))[:, 1:].square().mean())
    assert gaps[True] < 0.8 * gaps[False], gaps


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "bert"])
def test_refit_undoes_a_redundant_cut(family, tokens):
    """Channel 0 copies channel 1, so the fit can move its weight there and lose nothing."""
    model = tiny_model(family)
    row, units = structure.family(model), structure.units(model)
    with torch.no_grad():
        for layer in structure.layers(model):
            for path in row.up:
                linear = structure.part(layer, path)
                pairs = [(0, 1), (40, 41)] if row.fused_up else [(0, 1)]
                for copy, original in pairs:
                    linear.weight[copy] = linear.weight[original]
                    if linear.bias is not None:
                        linear.bias[copy] = linear.bias[original]
    keep = torch.ones(len(units), dtype=torch.bool)
    for number in range(units.num_layers):
        keep[units.of(number, "channels")[0]] = False
    dense = logits(model, tokens)
    with masks.masked(model, units, keep):
        lost = (logits(model, tokens) - dense).abs().max()
    bias = importance.refit(model, units, keep, blocks(64), ridge=1e-5)
    structure.remove(model, units, keep, bias)
    assert (logits(model, tokens) - dense).abs().max() < 0.2 * lost


def test_a_correction_by_least_squares():
    """What is asked for is the output and a share of the error, on the kept inputs and a constant."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=random, dtype=torch.double).float()
    error = (5 * x[:, :1] - x[:, 2:] + 7).expand(200, 2)
    weight = torch.randn(2, 3, generator=random)
    linear = linear_of(weight)
    reading = compensation._Reading(linear, torch.tensor([2]), lambda tokens: 0.5 * error[tokens])
    reading(x[:120])
    reading(x[120:])
    shift = reading.solve(1e-12, True)
    target = x @ weight.T + 0.5 * error
    wanted = torch.linalg.lstsq(torch.cat([x[:, :2], torch.ones(200, 1)], 1), target).solution
    torch.testing.assert_close(linear.weight[:, :2], wanted[:2].T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shift.float(), wanted[2], rtol=1e-4, atol=1e-4)
    assert not linear.weight[:, 2].any()


def test_second_moments_of_a_wide_linear_are_whole():
    x = torch.randn(64, 900, generator=torch.Generator().manual_seed(0))
    seen = compensation.SecondMoments(900)
    seen(x[:40])
    seen(x[40:])
    covariance, _, mean, _ = seen.normal_equations(torch.zeros(1, 900, dtype=torch.double), with_bias=True)
    torch.testing.assert_close(covariance.float(), torch.cov(x.T, correction=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean.float(), x.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.xx.float(), x.T @ x, rtol=1e-4, atol=1e-4)  # folding reads it


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_streams_are_what_sub_layers_add_to(family, tokens):
    model = tiny_model(family)
    seen, layer = {}, structure.layers(model)[1]

    def record(module, args, kwargs, output):
        seen["attention"] = output[0]

    handle = layer.self_attn.register_forward_hook(record, with_kwargs=True)
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
    handle.remove()
    replay = importance.Replay(model, tokens, batch_size=1)
    replay.advance(0)
    found = replay.streams(1)
    torch.testing.assert_close(found["heads"], states[1].flatten(0, 1))
    torch.testing.assert_close(found["channels"], (states[1] + seen["attention"]).flatten(0, 1))
    torch.testing.assert_close(torch.cat(replay.hidden), states[2])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_correction_brings_the_stream_back():
    """On the text of the fit, the last stream of a pruned model comes nearer to the dense one's."""

    def distance(correction, family="llama"):
        model, dense = tiny_model(family), tiny_model(family)
        units = structure.units(model, "channels")
        bias = importance.refit(model, units, units.index_U < 20, blocks(64), correction=correction)
        structure.remove(model, units, units.index_U < 20, bias)
        with torch.no_grad():
            pairs = [structure.base_model(m)(blocks(64)).last_hidden_state for m in (model, dense)]
        return float((pairs[0] - pairs[1]).square().mean())

    assert distance(1.0) < distance(0.3) < distance(0.0)
    assert distance(0.3, "gemma2") == distance(0.0, "gemma2")  # a norm comes between: nothing to add to
    with pytest.raises(ValueError, match="correction is a share from 0 to 1"):
        OneShot(correction=1.5).check()


def test_refit_needs_enough_tokens():
    model = tiny_model("llama")
    units = structure.units(model)
    with pytest.raises(ValueError, match="at least 96 calibration tokens"):
        importance.refit(model, units, random_keep(units), blocks(2))


def test_too_few_tokens_for_the_refit_are_refused_before_the_search():
    method = OneShot(compensate="least-squares", calibration_samples=2, calibration_seq_len=16)
    with pytest.raises(ValueError, match="raise calibration_samples"):
        method.start(tiny_model("llama"), None, data.Text([], [], [], "none", ""))
