"""The sparse container: every layout to the bit, every lie refused."""

import json
import struct
import zlib

import numpy as np
import pyarrow
import pytest
import torch
from conftest import tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForQuestionAnswering, BertForPreTraining, BertModel

from sentei import checkpoint
from sentei.checkpoint import sparse, zeros
from sentei.checkpoint.sparse import decoding, encoding


def random_sparse(shape, dtype, share, *, block=1, seed=0):
    random = torch.Generator().manual_seed(seed)
    if dtype == torch.int8:
        value = torch.randint(1, 128, shape, generator=random).to(dtype)
    else:
        value = torch.randn(shape, generator=random).to(dtype)
    rows = value.reshape(-1, shape[-1] // block, block)
    rows[torch.rand(rows.shape[:2], generator=random) < share] = 0
    return rows.reshape(shape)


def raw(tensor):
    return tensor.contiguous().view(torch.uint8)


CASES = {
    "odd columns": ((5, 13), 1, 0.8),
    "blocks": ((6, 32), 4, 0.7),
    "blocks, odd": ((6, 36), 4, 0.7),
    "all kept": ((4, 8), 1, 0.0),
    "none kept": ((4, 8), 1, 1.1),
    "three axes": ((3, 4, 16), 1, 0.9),
    "one axis": ((9,), 1, 0.5),
    "large": ((64, 256), 1, 0.9),
}


@pytest.mark.parametrize("zstd", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_round_trip_to_the_bit(case, dtype, zstd, tmp_path):
    shape, block, share = CASES[case]
    state = {"a.weight": random_sparse(shape, dtype, share, block=block), "b": torch.ones(3, dtype=dtype)}
    sparse.write(tmp_path / "m", state, zstd=zstd)
    found = sparse.read(tmp_path / "m")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == dtype and torch.equal(raw(found[name]), raw(tensor)), name
    layout = sparse.inspect(tmp_path / "m")["a.weight"].layout
    if case.startswith("blocks"):
        assert layout == "block4"
    if case in ("large", "odd columns") and not zstd:
        assert layout == "bitmask"
    if case in ("all kept", "one axis"):
        assert layout == "dense"


@pytest.mark.parametrize("rows", [True, False])
def test_codes_and_scales(rows, tmp_path):
    codes = random_sparse((6, 32), torch.int8, 0.6)
    scale = torch.rand(6) + 0.01 if rows else torch.tensor(0.03)
    ranges = {"layer.0": {"in_scale": 0.5, "in_zp": 3.0}}
    sparse.write(tmp_path / "m", {"w": codes}, scales={"w": scale}, activations=ranges)
    found, its_scale = sparse.read_codes(tmp_path / "m")["w"]
    assert torch.equal(found, codes) and torch.equal(its_scale, scale)
    wanted = codes.float() * (scale[:, None] if rows else scale)
    assert torch.equal(sparse.read(tmp_path / "m")["w"], wanted)
    assert sparse.read_activations(tmp_path / "m") == ranges


@pytest.mark.parametrize(
    ("shape", "block"), [((64, 96), 1), ((37, 50), 1), ((5, 2000), 1), ((3000, 1), 1), ((64, 96), 4), ((5, 2000), 4)]
)
@pytest.mark.parametrize("share", [0.0, 0.9, 0.999, 1.1])
def test_every_form_of_a_mask_is_exact(shape, share, block, tmp_path, monkeypatch):
    """Bits and gaps, by rows and by columns, each made to be the one that is written."""
    state = {"w": random_sparse(shape, torch.float32, share, block=block)}
    every = encoding._smallest_mask
    for form in sparse.MASKS:

        def chosen(keep, level, zstd, form=form):
            flags = keep.numpy() if form.startswith("row") else np.ascontiguousarray(keep.numpy().T)
            made = encoding._gaps(flags) if form.endswith("gaps") else np.packbits(flags, axis=1, bitorder="little")
            return form, made.size, torch.from_numpy(made), "none"

        monkeypatch.setattr(encoding, "_smallest_mask", chosen)
        sparse.write(tmp_path / "m", state)
        assert torch.equal(sparse.read(tmp_path / "m")["w"], state["w"])
        entry = sparse.inspect(tmp_path / "m")["w"]
        assert entry.layout == "dense" or entry.mask == form
    monkeypatch.setattr(encoding, "_smallest_mask", every)
    least = sparse.write(tmp_path / "m", state)
    assert torch.equal(sparse.read(tmp_path / "m")["w"], state["w"])
    assert least <= sparse.write(tmp_path / "plain", state, zstd=False)


def test_gaps_by_hand():
    flags = torch.zeros(1000, dtype=torch.bool)
    flags[[0, 1, 5, 260, 260 + 256, 999]] = True
    wanted = [0, 0, 3, 254, 255, 0, 255, 227]
    assert encoding._gaps(flags.numpy()).tolist() == wanted
    assert np.array_equal(decoding._unpack_gaps("m", "w", np.array(wanted, dtype=np.uint8), 1000), flags.numpy())


def test_numbers_by_planes_are_smaller(tmp_path):
    """Exponents compress, mantissas do not: scales, biases, and weights of 16 bits."""
    random = torch.Generator().manual_seed(0)
    for dtype, share in ((torch.float32, 0.95), (torch.bfloat16, 0.85)):
        state = {"b": (0.1 * torch.randn(5000, generator=random)).to(dtype)}
        size = sparse.write(tmp_path / "m", state)
        assert sparse.inspect(tmp_path / "m")["b"].codec == {"vals": "planes"}
        assert size < share * sparse.write(tmp_path / "plain", state, zstd=False)
        assert torch.equal(raw(sparse.read(tmp_path / "m")["b"]), raw(state["b"]))


def version_1(path, *, damaged=False):
    """A container as version 1 had it: bits by rows, scales beside codes, the manifest in the metadata."""
    codes = random_sparse((4, 40), torch.int8, 0.8)
    weight = random_sparse((6, 20), torch.float32, 0.7)
    scale = torch.rand(4) + 0.01

    def bits(tensor):
        return torch.from_numpy(np.packbits((tensor != 0).numpy(), axis=1, bitorder="little"))

    frame = pyarrow.Codec("zstd", compression_level=3).compress(codes[codes != 0].numpy().tobytes(), asbytes=True)
    parts = {
        "c::bits": bits(codes), "c::vals": torch.frombuffer(bytearray(frame), dtype=torch.uint8), "c::scale": scale,
        "w::bits": bits(weight), "w::vals": weight[weight != 0], "b": torch.arange(3.0),
        "act/layer.0::in_scale": torch.tensor(0.5),
    }  # fmt: skip
    lines = {
        name: {
            "layout": "dense" if tensor.ndim == 1 else "bitmask", "dtype": dtype, "shape": list(tensor.shape),
            "nnz": int((tensor != 0).sum()), "bits": "nonzero",
            "crc32": zlib.crc32(tensor.numpy().tobytes()), "codec": codec,
        }
        for name, tensor, dtype, codec in (
            ("c", codes, "I8", {"bits": "none", "vals": "zstd"}),
            ("w", weight, "F32", {"bits": "none", "vals": "none"}),
            ("b", parts["b"], "F32", {"vals": "none"}),
        )
    }  # fmt: skip
    lines["c"]["scale"] = "row"
    if damaged:
        lines["w"] |= {"mask": "row gaps", "gaps": 18}
    save_file(parts, path, metadata={"format": "sentei-sparse", "version": "1", "manifest": json.dumps(lines)})
    return {"c": codes, "w": weight, "b": parts["b"]}, scale


def test_version_1_is_still_read(tmp_path):
    wanted, scale = version_1(tmp_path / "m")
    found = sparse.read_codes(tmp_path / "m")
    assert all(torch.equal(found[name][0], tensor) for name, tensor in wanted.items()) and len(found) == 3
    assert torch.equal(found["c"][1], scale)
    assert sparse.read_activations(tmp_path / "m") == {"layer.0": {"in_scale": 0.5}}
    version_1(tmp_path / "m", damaged=True)
    with pytest.raises(ValueError, match="makes no sense"):  # forms of masks came with version 2
        sparse.read(tmp_path / "m")


def test_a_kept_zero_stays_kept_and_no_zero_is_negative(tmp_path):
    weight = torch.tensor([[0.0, -0.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0]] * 3)
    mask = torch.tensor([[True, False, True, True, False, False, False, False]] * 3)
    sparse.write(tmp_path / "m", {"w": weight}, masks={"w": mask})
    entry = sparse.inspect(tmp_path / "m")["w"]
    assert (entry.layout, entry.nnz, entry.bits) == ("bitmask", 9, "mask")
    assert not torch.signbit(sparse.read(tmp_path / "m")["w"]).any()


def test_bytes_of_one_layer(tmp_path):
    """3072 x 768 at 90 %: bits and values as the arithmetic says, and any safetensors reader opens it."""
    codes = torch.randint(1, 128, (3072 * 768,), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    codes[torch.randperm(codes.numel(), generator=torch.Generator().manual_seed(1))[: int(0.9 * codes.numel())]] = 0
    codes = codes.reshape(3072, 768)
    sparse.write(tmp_path / "m", {"w": codes}, scales={"w": torch.ones(())}, zstd=False)
    parts = load_file(tmp_path / "m")
    assert parts["w::bits"].numel() == 294_912 and parts["w::vals"].numel() == 235_930
    assert sparse.inspect(tmp_path / "m")["w"].layout == "bitmask"


def test_byte_table():
    weight = random_sparse((256, 256), torch.float32, 0.9)
    table = sparse.byte_table({"w": weight, "e": torch.randn(64, 256)}, {"w"})
    assert table["fp32"]["matrices"] == pytest.approx(4 * 65536, rel=0.01)
    assert table["fp16"]["whole"] == pytest.approx(2 * 1.25 * 65536, rel=0.01)
    assert table["int8 + zstd -19"]["matrices"] < 0.4 * table["int8"]["matrices"]


def test_bytes_of_nine_tenths_in_codes():
    """Normal weights at 90 %, codes by row: 25 times smaller than fp32 and more, and smaller than int8 + zstd -19."""
    weight = torch.randn(768, 768, generator=torch.Generator().manual_seed(0))
    weight[weight.abs() < weight.abs().flatten().kthvalue(int(0.9 * weight.numel())).values] = 0.0
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().to(torch.int8)
    ours = sparse.size({"w": codes}, scales={"w": scale})
    assert 4 * weight.numel() / ours > 25
    assert ours < sparse.byte_table({"w": weight}, {"w"})["int8 + zstd -19"]["matrices"]


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "m"
    state = {"w": random_sparse((6, 20), torch.float32, 0.7), "c": random_sparse((4, 40), torch.int8, 0.8)}
    sparse.write(path, state, scales={"c": torch.ones(4)}, zstd=False)
    return path


def changed(path, *, manifest=None, parts=None, metadata=None, top=None, about=None):
    """The container with some of its claims or parts replaced; its manifest agrees with its own checksum."""
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    tensors = load_file(path)
    what = json.loads(meta["manifest"])
    text = tensors["::manifest"].numpy().tobytes()
    if what["codec"] == "zstd":
        text = pyarrow.Codec("zstd").decompress(text, decompressed_size=what["bytes"], asbytes=True)
    whole = json.loads(text)
    for name, line in (manifest or {}).items():
        if line is None:
            whole["tensors"].pop(name)
        else:
            whole["tensors"][name] = whole["tensors"].get(name, {}) | line
    text = json.dumps(whole | (top or {})).encode()
    tensors["::manifest"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    what = {"codec": "none", "bytes": len(text), "crc32": zlib.crc32(text)} | (about or {})
    for name, tensor in (parts or {}).items():
        if tensor is None:
            tensors.pop(name)
        else:
            tensors[name] = tensor
    save_file(tensors, path, metadata=meta | {"manifest": json.dumps(what)} | (metadata or {}))


def bits_of(path):
    return load_file(path)["w::bits"].clone()


FAULTS = {
    "format": ({"metadata": {"format": "other"}}, "not a sparse container"),
    "version": ({"metadata": {"version": "3"}}, "version '3'"),
    "another version": ({"metadata": {"version": "1"}}, "no manifest"),
    "manifest": ({"metadata": {"manifest": "[]"}}, "no manifest"),
    "manifest, no JSON": ({"metadata": {"manifest": "{"}}, "no manifest"),
    "manifest, key": ({"top": {"import": "os"}}, "no manifest"),
    "manifest, checksum": ({"about": {"crc32": 1}}, "no manifest"),
    "manifest, huge": ({"about": {"codec": "zstd", "bytes": 1 << 38}}, "no manifest"),
    "manifest, bytes": ({"about": {"bytes": 3}}, "no manifest"),
    "manifest, gone": ({"parts": {"::manifest": None}}, "no manifest"),
    "manifest, empty": ({"top": {"tensors": {}}}, "no manifest"),
    "activations": ({"top": {"activations": {"m": {"run": 1.0}}}}, "no manifest"),
    "activations, NaN": ({"top": {"activations": {"m": {"in_scale": float("nan")}}}}, "no manifest"),
    "activations, text": ({"top": {"activations": {"m": {"in_scale": "os"}}}}, "no manifest"),
    "mask": ({"manifest": {"w": {"mask": "diagonal"}}}, "makes no sense"),
    "gaps below 0": ({"manifest": {"w": {"mask": "row gaps", "gaps": -1}}}, "makes no sense"),
    "gaps, huge": ({"manifest": {"w": {"mask": "row gaps", "gaps": 1 << 39}}}, "makes no sense"),
    "gaps, other": ({"manifest": {"w": {"mask": "row gaps", "gaps": 9}}}, "its manifest says"),
    "mask by columns": ({"manifest": {"w": {"mask": "columns"}}}, "its manifest says"),
    "layout": ({"manifest": {"w": {"layout": "code.py"}}}, "makes no sense"),
    "dtype": ({"manifest": {"w": {"dtype": "pickle"}}}, "makes no sense"),
    "codec": ({"manifest": {"w": {"codec": {"bits": "xz", "vals": "none"}}}}, "makes no sense"),
    "unknown key": ({"manifest": {"w": {"import": "os"}}}, "makes no sense"),
    "negative shape": ({"manifest": {"w": {"shape": [-6, 20]}}}, "makes no sense"),
    "shape": ({"manifest": {"w": {"shape": [6, 36]}}}, "its manifest says"),
    "huge shape": ({"manifest": {"w": {"shape": [1 << 39, 1 << 39]}}}, "max_bytes"),
    "nnz above the shape": ({"manifest": {"w": {"nnz": 1 << 39}}}, "makes no sense"),
    "nnz": ({"manifest": {"w": {"nnz": 3}}}, "its manifest says"),
    "popcount": ({"parts": {"w::bits": torch.zeros(6, 3, dtype=torch.uint8)}}, "by its bits"),
    "missing": ({"parts": {"w::vals": None}}, "missing"),
    "unknown": ({"parts": {"more": torch.ones(2)}}, "not in the manifest"),
    "unknown range": ({"parts": {"act/m::run": torch.tensor(1.0)}}, "not in the manifest"),
    "no scale": ({"parts": {"::scales": None}}, "missing"),
    "scales, number": ({"parts": {"::scales": torch.ones(5)}}, "its manifest says"),
    "scales, codec": ({"top": {"scales": "xz"}}, "no manifest"),
    "scale of all": ({"manifest": {"c": {"scale": "tensor"}}}, "its manifest says"),
    "no codes": ({"manifest": {"c": {"scale": None}}}, "makes no sense"),
    "another scale": ({"parts": {"::scales": torch.full((4,), 2.0)}}, "checksum"),
    "scales without end": (
        {"manifest": {"c": {"layout": "dense", "shape": [1 << 39, 0], "nnz": 0, "codec": {"vals": "zstd"}}},
         "top": {"scales": "zstd"}}, "max_bytes",
    ),
    "crc": ({"manifest": {"w": {"crc32": 1}}}, "checksum"),
    "no frame": ({"manifest": {"w": {"codec": {"bits": "zstd", "vals": "none"}}}}, "no zstd frame"),
    "bad frame": (
        {
            "manifest": {"w": {"codec": {"bits": "zstd", "vals": "none"}}},
            "parts": {"w::bits": torch.arange(18, dtype=torch.uint8)},
        },
        "does not unpack",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused(fault, good):
    change, message = FAULTS[fault]
    changed(good, **change)
    with pytest.raises(ValueError, match=message):
        sparse.read(good)


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf"), -1.0])
def test_a_scale_is_a_positive_number(scale, tmp_path):
    sparse.write(tmp_path / "m", {"c": torch.ones(4, 8, dtype=torch.int8)}, scales={"c": torch.full((4,), scale)})
    with pytest.raises(ValueError, match="positive number"):
        sparse.read(tmp_path / "m")


@pytest.mark.parametrize(
    ("gaps", "message"),
    [
        ([9] * 12, "beyond its last column"),  # 120 places end at 119: one more is too many
        ([0] * 11 + [255], "beyond its last column"),  # goes on and never ends
        ([0] * 11, "11 weights by its bits"),
        ([0] * 13, "13 weights by its bits"),
        ([255] * 12, "beyond its last column"),
    ],
)
def test_gaps_are_checked(gaps, message, tmp_path):
    """A matrix of 119 places, 12 of them kept."""
    weight = torch.zeros(7, 17)
    weight.view(-1)[::10] = 1.0
    sparse.write(tmp_path / "m", {"w": weight}, zstd=False)
    stored = torch.tensor(gaps, dtype=torch.uint8)
    changed(tmp_path / "m", manifest={"w": {"mask": "row gaps", "gaps": len(gaps)}}, parts={"w::bits": stored})
    with pytest.raises(ValueError, match=f"{message}|makes no sense"):
        sparse.read(tmp_path / "m")


def test_padding_is_refused(good):
    bits = bits_of(good)
    bits[0, 2] |= 0b1000_0000
    changed(good, parts={"w::bits": bits})
    with pytest.raises(ValueError, match="beyond its last column"):
        sparse.read(good)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    """A frame that says more than its shape, and a shape that says more than the limit."""
    sparse.write(tmp_path / "m", {"w": random_sparse((64, 4096), torch.float32, 0.99)})
    with pytest.raises(ValueError, match="max_bytes"):
        sparse.read(tmp_path / "m", max_bytes=1 << 10)
    changed(tmp_path / "m", manifest={"w": {"shape": [64, 8192]}})
    with pytest.raises(ValueError, match=r"does not unpack|its manifest says|no zstd|checksum"):
        sparse.read(tmp_path / "m")
    changed(tmp_path / "m", manifest={"w": {"shape": [1 << 20, 1 << 19]}})
    with pytest.raises(ValueError, match=r"max_bytes|its manifest says"):
        sparse.read(tmp_path / "m")


@pytest.mark.parametrize("zstd", [True, False])
def test_fuzzed_files(zstd, good):
    """Bytes changed at random, and every cut: refused, or read as the very same numbers; never another error."""
    state = {
        "w": random_sparse((20, 60), torch.float32, 0.7), "c": random_sparse((30, 80), torch.int8, 0.8),
        "four": random_sparse((16, 64), torch.bfloat16, 0.8, block=4), "b": 0.1 * torch.ones(40),
    }  # fmt: skip
    scale = torch.rand(30, generator=torch.Generator().manual_seed(2)) + 0.01
    sparse.write(good, state, scales={"c": scale}, zstd=zstd, activations={"m": {"in_scale": 0.5}})
    content = bytearray(good.read_bytes())
    wanted = sparse.read_codes(good)
    assert torch.equal(wanted["c"][1], scale)
    random = torch.Generator().manual_seed(0)
    length = struct.unpack("<Q", content[:8])[0]
    for round_ in range(300):
        damaged = bytearray(content)
        end = 8 + length if round_ % 2 else len(content)
        for place in torch.randint(0, end, (1 + round_ % 3,), generator=random).tolist():
            damaged[place] = int(torch.randint(0, 256, (), generator=random))
        good.write_bytes(damaged)
        try:
            found, ranges = sparse.read_codes(good), sparse.read_activations(good)
        except ValueError:
            continue
        assert found.keys() == wanted.keys() and ranges == {"m": {"in_scale": 0.5}}
        for name, (tensor, its_scale) in found.items():
            assert torch.equal(raw(tensor), raw(wanted[name][0])), name
            assert its_scale is None or torch.equal(its_scale, scale)
    for cut in range(0, len(content), 97):
        good.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"header|cut short|safetensors"):
            sparse.read(good)


# --- a checkpoint in the container ----------------------------------------------------------------------------------


@pytest.fixture
def parent(tmp_path, words):
    model = tiny_model("bert")
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            for linear in (layer.intermediate.dense, layer.output.dense):
                linear.weight[linear.weight.abs() < 0.2] = 0.0
    model.save_pretrained(tmp_path / "parent")
    words.save_pretrained(tmp_path / "parent")
    return tmp_path / "parent", model


RECORD = {"method": "m", "fields": {}, "seed": 0, "data": {}, "record": {}}


def test_a_checkpoint_in_the_container(parent, words, tmp_path, tokens):
    folder, model = parent
    checkpoint.save(model, words, tmp_path / "small", parent=folder, record=RECORD, shape="sparse")
    loaded, _ = checkpoint.load(tmp_path / "small")
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert (tmp_path / "small" / sparse.FILE).stat().st_size < (folder / "model.safetensors").stat().st_size
    account = json.loads((tmp_path / "small" / "compression.json").read_text())["result"]
    assert account["shape"] == "sparse" and account["bytes"] == (tmp_path / "small" / sparse.FILE).stat().st_size
    with pytest.raises(OSError, match=r"model.safetensors"):  # never random weights
        type(model).from_pretrained(tmp_path / "small")
    checkpoint.export_dense(tmp_path / "small", tmp_path / "dense")
    dense = type(model).from_pretrained(tmp_path / "dense")
    assert torch.equal(dense.eval()(tokens).logits, model.eval()(tokens).logits)
    with pytest.raises(ValueError, match="nothing to make dense"):
        checkpoint.export_dense(tmp_path / "dense", tmp_path / "more")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermediate_size": 44}, "config.json makes it"),
        ({"num_hidden_layers": 10**9}, "fewer tensors"),
        ({"num_hidden_layers": 2}, "has no tensor"),
        ({"num_hidden_layers": 4}, "lacks"),
        ({"vocab_size": 10**10}, "config.json makes it"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "brings its own Python code"),
    ],
)
def test_a_container_that_is_not_the_model(change, message, parent, words, tmp_path):
    folder, model = parent
    checkpoint.save(model, words, tmp_path / "small", parent=folder, record=RECORD, shape="sparse")
    config = tmp_path / "small" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path / "small")


def test_codes_in_a_checkpoint(parent, words, tmp_path):
    folder, model = parent
    weight = model.bert.encoder.layer[0].output.dense.weight
    name, scale = "bert.encoder.layer.0.output.dense.weight", torch.full((24,), 0.01)
    with torch.no_grad():
        weight.copy_((weight / 0.01).round().clamp(-127, 127) * 0.01)
    checkpoint.save(
        model, words, tmp_path / "small", parent=folder, record=RECORD, shape="sparse", scales={name: scale}
    )
    assert sparse.inspect(tmp_path / "small" / sparse.FILE)[name].dtype == "I8"
    loaded, _ = checkpoint.load(tmp_path / "small")
    assert torch.equal(loaded.state_dict()[name], weight)


def next_sentence_checkpoint(folder, words, parent):
    """BERT's pre-training model, its pooler sparse, in the container."""
    torch.manual_seed(0)
    model = BertForPreTraining(tiny_model("bert").config).eval()
    with torch.no_grad():
        model.bert.pooler.dense.weight[:, ::2] = 0.0
    return checkpoint.save(model, words, folder, parent=parent, record=RECORD, shape="sparse"), model


def test_a_model_with_a_pooler_goes_to_every_task(parent, words, tmp_path):
    """Question answering has no place for the pooler, classification keeps it, and its own class has all."""
    folder, model = next_sentence_checkpoint(tmp_path / "nsp", words, parent[0])
    wanted = model.state_dict()
    answering, _ = checkpoint.load(folder, task="QuestionAnswering")
    labelling, _ = checkpoint.load(folder, task="SequenceClassification", labels=["a", "b"])
    again, _ = checkpoint.load(folder)
    assert type(again) is BertForPreTraining and answering.base_model.pooler is None
    for loaded in (answering, labelling, again):
        for name, tensor in loaded.state_dict().items():
            if name.startswith("bert.") or loaded is again:
                assert torch.equal(tensor, wanted[name]), name


def test_a_model_without_a_head_gets_one(parent, words, tmp_path):
    folder, model = parent[0], BertModel(parent[1].config).eval()
    small = checkpoint.save(model, words, tmp_path / "small", parent=folder, record=RECORD, shape="sparse")
    loaded, _ = checkpoint.load(small, task="SequenceClassification", labels=["a", "b"])
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.bert.state_dict()[name], tensor), name


@pytest.mark.parametrize("task", [None, "QuestionAnswering"])
def test_what_is_not_in_the_file_is_not_made(task, parent, words, tmp_path, monkeypatch):
    """A file without embeddings, and a configuration that has ten thousand million of them: no memory is taken."""
    folder, _ = parent
    small = checkpoint.save(parent[1], words, tmp_path / "small", parent=folder, record=RECORD, shape="sparse")
    state = sparse.read(small / sparse.FILE)
    sparse.write(small / sparse.FILE, {n: t for n, t in state.items() if "word_embeddings" not in n and "cls" not in n})
    config = small / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 10**10}))
    monkeypatch.setattr(sparse, "read", lambda *a, **k: pytest.fail("the file was unpacked"))
    with pytest.raises(ValueError, match=r"lacks bert.embeddings.word_embeddings.weight"):
        checkpoint.load(small, task=task)


def test_a_new_head_has_a_limit(parent, words, tmp_path, monkeypatch):
    folder, model = parent
    small = checkpoint.save(model, words, tmp_path / "small", parent=folder, record=RECORD, shape="sparse")
    source = checkpoint.inspect(small)
    monkeypatch.setattr(sparse, "limit", lambda path: 100)
    monkeypatch.setattr(sparse, "read", lambda *a, **k: pytest.fail("the file was unpacked"))
    with pytest.raises(ValueError, match=r"a head of .* bytes"):
        zeros.build(source, AutoModelForQuestionAnswering, torch.float32, {"pad_token_id": 0})
