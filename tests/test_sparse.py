"""The sparse container: every layout to the bit, every lie refused."""

import json
import struct

import pytest
import torch
from conftest import tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sentei import checkpoint
from sentei.checkpoint import sparse


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


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "m"
    state = {"w": random_sparse((6, 20), torch.float32, 0.7), "c": random_sparse((4, 40), torch.int8, 0.8)}
    sparse.write(path, state, scales={"c": torch.ones(4)}, zstd=False)
    return path


def changed(path, *, manifest=None, parts=None, metadata=None):
    """The container with some of its claims or parts replaced."""
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    lines, tensors = json.loads(meta["manifest"]), load_file(path)
    for name, line in (manifest or {}).items():
        if line is None:
            lines.pop(name)
        else:
            lines[name] = lines.get(name, {}) | line
    for name, tensor in (parts or {}).items():
        if tensor is None:
            tensors.pop(name)
        else:
            tensors[name] = tensor
    save_file(tensors, path, metadata=meta | {"manifest": json.dumps(lines)} | (metadata or {}))


def bits_of(path):
    return load_file(path)["w::bits"].clone()


FAULTS = {
    "format": ({"metadata": {"format": "other"}}, "not a sparse container"),
    "version": ({"metadata": {"version": "2"}}, "version '2'"),
    "manifest": ({"metadata": {"manifest": "[]"}}, "no manifest"),
    "manifest, no JSON": ({"metadata": {"manifest": "{"}}, "no manifest"),
    "layout": ({"manifest": {"w": {"layout": "code.py"}}}, "makes no sense"),
    "dtype": ({"manifest": {"w": {"dtype": "pickle"}}}, "makes no sense"),
    "codec": ({"manifest": {"w": {"codec": {"bits": "xz", "vals": "none"}}}}, "makes no sense"),
    "unknown key": ({"manifest": {"w": {"import": "os"}}}, "makes no sense"),
    "negative shape": ({"manifest": {"w": {"shape": [-6, 20]}}}, "makes no sense"),
    "shape": ({"manifest": {"w": {"shape": [6, 36]}}}, "its manifest says"),
    "huge shape": ({"manifest": {"w": {"shape": [1 << 39, 1 << 39]}}}, "its manifest says"),
    "nnz above the shape": ({"manifest": {"w": {"nnz": 1 << 39}}}, "makes no sense"),
    "nnz": ({"manifest": {"w": {"nnz": 3}}}, "its manifest says"),
    "popcount": ({"parts": {"w::bits": torch.zeros(6, 3, dtype=torch.uint8)}}, "by its bits"),
    "missing": ({"parts": {"w::vals": None}}, "missing"),
    "unknown": ({"parts": {"more": torch.ones(2)}}, "not in the manifest"),
    "unknown range": ({"parts": {"act/m::run": torch.tensor(1.0)}}, "not in the manifest"),
    "no scale": ({"parts": {"c::scale": None}}, "missing"),
    "NaN scale": ({"parts": {"c::scale": torch.full((4,), float("nan"))}}, "positive number"),
    "zero scale": ({"parts": {"c::scale": torch.zeros(4)}}, "positive number"),
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


def test_padding_is_refused(good):
    bits = bits_of(good)
    bits[0, 2] |= 0b1000_0000
    changed(good, parts={"w::bits": bits})
    with pytest.raises(ValueError, match="beyond its last column"):
        sparse.read(good)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    """A frame that says more than its shape, and a shape that says more than the limit."""
    sparse.write(tmp_path / "m", {"w": torch.zeros(64, 4096)})
    with pytest.raises(ValueError, match="max_bytes"):
        sparse.read(tmp_path / "m", max_bytes=1 << 10)
    changed(tmp_path / "m", manifest={"w": {"shape": [64, 8192]}})
    with pytest.raises(ValueError, match=r"does not unpack|its manifest says|no zstd"):
        sparse.read(tmp_path / "m")
    changed(tmp_path / "m", manifest={"w": {"shape": [1 << 20, 1 << 19]}})
    with pytest.raises(ValueError, match=r"max_bytes|its manifest says"):
        sparse.read(tmp_path / "m")


def test_fuzzed_files(good):
    """Bytes changed at random, and every cut: refused, or read as the very same numbers; never another error."""
    content = bytearray(good.read_bytes())
    wanted = sparse.read(good)
    random = torch.Generator().manual_seed(0)
    length = struct.unpack("<Q", content[:8])[0]
    for round_ in range(300):
        damaged = bytearray(content)
        end = 8 + length if round_ % 2 else len(content)
        for place in torch.randint(0, end, (1 + round_ % 3,), generator=random).tolist():
            damaged[place] = int(torch.randint(0, 256, (), generator=random))
        good.write_bytes(damaged)
        try:
            found = sparse.read(good)
        except ValueError:
            continue
        for name, tensor in found.items():
            if name == "w" and "w" in wanted:
                assert torch.equal(tensor, wanted["w"])
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
