"""report: JSON files of checkpoints -> one HTML page and a Markdown table, without torch."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from sentei import report

HOSTILE = "<script>alert(1)</script>\"'><img src=http://evil.example/x onerror=alert(1)>|`_*&"


def compression(removed=0.25, **changes):
    layers = [{"layer": i, "heads": entry(3, 3 - i % 2), "channels": entry(64, 48)} for i in range(4)]
    return {
        "sentei": "0.1.0",
        "stages": [
            {
                "method": "one_shot",
                "fields": {"sparsity": removed, "score": "wanda", "targets": None},
                "seed": 0,
                "data": {"name": "python-docs", "sha256": "da7a" * 16},
                "record": {"seconds": 12.5, "history": [{"step": i, "loss": 4 - i / 10} for i in range(5)]},
            }
        ],
        "parent": {"path": "/models/Dense-1M", "sha256": "9a7e" * 16, **sizes(1_000_000, 800_000)},
        "result": {"shape": "heterogeneous", **sizes(1_000_000 - 800_000 * removed, 800_000 * (1 - removed))},
        "kept": {"granularity": "heads+channels", "layers": layers},
        "versions": {"torch": "2.13.0"},
    } | changes


def entry(of, kept):
    return {"of": of, "kept": kept, "units": f"0-{kept - 1}"}


def sizes(parameters, layer_parameters):
    return {"parameters": int(parameters), "layer_parameters": int(layer_parameters), "bytes": int(2 * parameters)}


def perplexity(value, context=128, **changes):
    row = {"metric": "perplexity", "dataset": "wikitext-2", "value": value, "context": context, "blocks": 10}
    return row | {"tokens": 1270, "stride": None, "bos": False} | changes


def accuracy(task, value, limit=100):
    return {"metric": "acc", "dataset": task, "value": value, "stderr": 0.05, "limit": limit}


def bench(speedup=1.2, ideal=1.25):
    spread = {"median": speedup, "min": speedup - 0.1, "max": speedup + 0.1, "rounds": [speedup] * 3}
    memory = {"imports_bytes": 10**8, "loaded_bytes": 2 * 10**8, "peak_bytes": 3 * 10**8, "cuda_peak_bytes": None}
    speed = {"median": 100.0, "min": 90.0, "max": 110.0, "rounds": [100.0]}
    side = {"parameters": 10**6, "memory": memory, "attention_share": 0.1, "first_token_seconds": speed}
    side |= {"prefill_tokens_per_second": speed, "decode_tokens_per_second": speed}
    return {
        "speedup_prefill": speedup,
        "speedup_of_ideal": speedup / ideal,
        "ideal": {"speedup": ideal, "speedup_first_token": ideal + 0.1},
        "speedups": {"prefill": spread, "decode": spread, "first_token": spread},
        "ratios": {"peak_memory": 0.9, "loaded_memory": 0.8},
        "parent": side,
        "child": side,
        "settings": {"rounds": 3},
        "machine": {"cpu": "A Processor", "cores": 2, "load_average_before": 1.9},
        "notes": ["the parent ran hot"],
    }


def folder(path, **files):
    path.mkdir(parents=True)
    for name, content in files.items():
        file = "log.jsonl" if name == "log" else f"{name}.json"
        (path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture
def full(tmp_path):
    rows = [perplexity(60.0), accuracy("piqa", 0.6), accuracy("arc_easy", 0.5)]
    dense = [perplexity(50.0), accuracy("piqa", 0.65), accuracy("arc_easy", 0.55)]
    steps = [{"stage": "heal", "step": i, "loss": 3 - i / 50, "lr": 1e-4} for i in range(50)]
    steps += [{"stage": "heal", "step": i, "validation_loss": 3.1 - i / 60} for i in (0, 25, 49)]
    return folder(
        tmp_path / "small",
        compression=compression(),
        eval={"measurements": rows, "parent_measurements": dense, "machine": {"cpu": "A Processor"}},
        bench=bench(),
        log="\n".join(map(json.dumps, steps)) + '\n{"stage": "heal", "st',
        generation=[{"prompt": "Once", "parent": "upon a time", "child": "there was"}],
    )


def page(parent, children, tmp_path):
    out = report.write(parent, children, tmp_path / "report.html")
    return out.read_text(encoding="utf-8")


def words(html):
    """The text of a page, without tags and style."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html[html.index("<body>") :]))


class Page(HTMLParser):
    """Every tag is closed, and attributes and tags are collected."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes = [], set(), []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_sound(html):
    parsed = Page(html)
    assert parsed.open == []
    assert not parsed.tags & {"script", "img", "link", "iframe", "object", "embed", "a", "base", "form"}
    assert not [name for name, _ in parsed.attributes if name.startswith("on") or name in ("src", "href")]
    assert "url(" not in html and "@import" not in html


def test_the_whole_story_of_one_child(full, tmp_path):
    html = page("/models/Dense-1M", full, tmp_path)
    check_sound(html)
    assert "http" not in html.replace("http-equiv", "")
    said = words(html)
    for fact in (
        "Dense-1M \N{RIGHTWARDS ARROW} small",
        "25.0 %",  # of the layers
        "20.0 % of the whole",
        "1.0 M \N{RIGHTWARDS ARROW} 800,000",
        "wikitext-2 perplexity",
        "50.00 \N{RIGHTWARDS ARROW} 60.00",
        "1.20\N{MULTIPLICATION SIGN}",
        "60.0 \N{PLUS-MINUS SIGN} 5.0",
        "\N{MINUS SIGN}5.0 points",
        "mean accuracy of 2 tasks",
        "prefill reaches 0.96 of the ideal",
        "1.10 to 1.30",
        "\N{MINUS SIGN}10.0 %",  # memory
        "layer 1, heads: 1 of 3 removed; kept: 0-1",
        "loss and validation loss (dashed)",
        "upon a time",
        "there was",
        "da7a" * 16,
        "9a7e" * 16,
        "first 100 questions",
        "the machine was busy",
        "the parent ran hot",
        "score wanda",
    ):
        assert fact in said, fact


def test_a_slow_child_is_not_hidden(full, tmp_path):
    (full / "bench.json").write_text(json.dumps(bench(1.0, 1.25)))
    assert "0.80 of the ideal speed-up, below the bar of 0.85" in words(page(None, full, tmp_path))


def test_several_children_are_compared(tmp_path):
    children = [
        folder(
            tmp_path / f"small-{i}",
            compression=compression(i / 10),
            eval={"measurements": [perplexity(50.0 * i), accuracy("piqa", 0.6), accuracy("boolq", 0.6)]},
            bench=bench(),
        )
        for i in range(1, 6)
    ]
    html = page("/models/Dense-1M", children, tmp_path)
    check_sound(html)
    assert "At a glance" in html and "Quality against size" in html and "5 smaller models" in html
    assert html.count('<svg class="heat"') == 5
    lines = report.markdown("/models/Dense-1M", children).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:8]] == ["dense parent", *(f"small-{i}" for i in range(1, 6))]
    assert len({line.count("|") for line in lines[:8]}) == 1


def test_same_folder_names_are_told_apart(tmp_path):
    children = [folder(tmp_path / name / "out", compression=compression()) for name in ("a", "b")]
    table = report.markdown(None, children)
    assert "| a/out |" in table and "| b/out |" in table


@pytest.mark.parametrize("missing", ["compression.json", "eval.json", "bench.json", "log.jsonl", "generation.json"])
def test_what_is_missing_is_said(full, tmp_path, missing):
    (full / missing).unlink()
    html = page("/models/Dense 1M", full, tmp_path)
    check_sound(html)
    expected = {
        "compression.json": "nothing is known about how it was made",
        "eval.json": f"sentei eval {full} --data TEXT --context 128",
        "bench.json": f"sentei bench {full} --against &#x27;/models/Dense 1M&#x27;",
        "log.jsonl": "loss",  # drawn from the stage's own history
        "generation.json": "no generation.json",
    }[missing]
    assert expected in html


@pytest.mark.parametrize("name", ["compression", "eval", "bench", "log", "generation"])
def test_one_file_alone_makes_a_page(full, tmp_path, name):
    for file in full.iterdir():
        if not file.name.startswith(name):
            file.unlink()
    check_sound(page(None, full, tmp_path))


def test_measurements_taken_differently_are_not_compared(full, tmp_path):
    content = {"measurements": [perplexity(60.0, blocks=20)], "parent_measurements": [perplexity(50.0)]}
    (full / "eval.json").write_text(json.dumps(content))
    said = words(page(None, full, tmp_path))
    assert "20 blocks" in said and "10 blocks" in said and "\N{RIGHTWARDS ARROW} 60.00" not in said


def test_a_plain_list_of_measurements_and_a_parent_folder_that_is_only_measured(full, tmp_path):
    (full / "eval.json").write_text(json.dumps([perplexity(60.0, dataset="/data/wiki.txt")]))
    parent = folder(tmp_path / "parent", eval=[perplexity(50.0, dataset="texts/wiki.txt")])
    said = words(page(parent, full, tmp_path))
    assert "Dense-1M \N{RIGHTWARDS ARROW} small" in said  # the folder's name is not the model's
    assert "wiki.txt perplexity" in said and "50.00 \N{RIGHTWARDS ARROW} 60.00" in said


def hostile(content):
    """Every string, key and name replaced by markup; the structure stays."""
    if isinstance(content, dict):
        return {key: hostile(value) for key, value in content.items()} | {HOSTILE: HOSTILE, HOSTILE + "n": 3}
    if isinstance(content, list):
        return [hostile(item) for item in content] + [HOSTILE]
    return HOSTILE if isinstance(content, str) else content


def test_hostile_text_stays_text(full, tmp_path):
    for file in full.glob("*.json"):
        file.write_text(json.dumps(hostile(json.loads(file.read_text()))))
    (full / "log.jsonl").write_text("\n".join(json.dumps({"stage": HOSTILE, "step": i, HOSTILE: i}) for i in range(9)))
    other = full.with_name("x<b onload=alert(1)>")
    full.rename(other)
    again = folder(tmp_path / "y", compression=compression())
    for children in ([other], [other, again]):
        html = page(HOSTILE, children, tmp_path)
        check_sound(html)
        assert "&lt;script&gt;" in html
        table = report.markdown(HOSTILE, children)
        assert "<" not in table and len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()[:3]}) == 1


JUNK = {"none": None, "text": "text", "negative": -1, "huge": 1e308, "tiny": 1e-300, "nan": math.nan}
JUNK |= {"integer": 10**400, "list": [[]], "object": {"a": {}}}


@pytest.mark.parametrize("kind", JUNK)
def test_values_of_wrong_types_never_break_the_page(full, tmp_path, kind):
    junk = JUNK[kind]

    def spoil(content, path):
        if isinstance(content, dict):
            for key in content:
                yield from spoil(content[key], (*path, key))
        elif isinstance(content, list) and content:
            yield from spoil(content[0], (*path, 0))
        yield path

    (full / "log.jsonl").unlink()
    for file in sorted(full.glob("*.json")):
        original = file.read_text()
        for path in spoil(json.loads(original), ()):
            content = json.loads(original)
            if path:
                place = content
                for key in path[:-1]:
                    place = place[key]
                place[path[-1]] = junk
            else:
                content = junk
            file.write_text(json.dumps(content))
            assert report.write(None, full, tmp_path / "report.html").stat().st_size > 10_000
        file.write_text(original)


def test_broken_json_names_the_file(full, tmp_path):
    (full / "bench.json").write_text('{"speedup')
    with pytest.raises(ValueError, match=r"bench\.json is not JSON .*measure again") as caught:
        report.write(None, full, tmp_path / "report.html")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_wrong_arguments(full, tmp_path):
    (tmp_path / "empty").mkdir()
    for children, out, said in (
        ([], "r.html", "no compressed checkpoint"),
        ([tmp_path / "nowhere"], "r.html", "no folder at"),
        ([tmp_path / "empty"], "r.html", "nothing to report in"),
        ([full], "r.md", "give the page's name"),
    ):
        with pytest.raises(ValueError, match=said):
            report.write(None, children, tmp_path / out)


def test_page_and_table_are_written_side_by_side(full, tmp_path):
    out = report.write(None, full, tmp_path / "new" / "page.html")
    assert out == tmp_path / "new" / "page.html"
    assert sorted(file.name for file in out.parent.iterdir()) == ["page.html", "page.md"]
    assert (out.parent / "page.md").read_text(encoding="utf-8") == report.markdown(None, full)
    assert report.write(None, full, full).name == "report.html"


def test_long_logs_stay_small(full, tmp_path):
    lines = (json.dumps({"stage": "heal", "step": i, "loss": (i * 7919 % 1000) / 300}) for i in range(20_000))
    (full / "log.jsonl").write_text("\n".join(lines))
    assert len(page(None, full, tmp_path)) < 100_000


def test_torch_is_not_imported(full):
    code = "import sys; from sentei import report; report.markdown(None, sys.argv[1]); print(sorted(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code, str(full)], capture_output=True, text=True, check=True)
    for heavy in ("torch", "transformers", "numpy", "matplotlib"):
        assert f"'{heavy}'" not in result.stdout


def test_whole_blocks(tmp_path):
    """How alike blocks are, which went by which score, and who shares with whom; nonsense is left out."""
    (tmp_path / "child").mkdir()
    record = {
        "similarity": {"outputs": [[1.0, 0.5], [0.5, 1.0]], "updates": [[1.0, HOSTILE], [0.1, 1.0]]},
        "scores": [{"score": "gates", "dropped": "3, " + HOSTILE, "held_loss": 3.25, "overlap": 1.0, "tokens": 4096}],
        "fold": {"owner": [0, 1, 1], "origin": [0, 4, 6]},
    }
    content = compression()
    content["stages"][0]["record"] |= record
    (tmp_path / "child" / "compression.json").write_text(json.dumps(content))
    page = report.write(None, [tmp_path / "child"], tmp_path / "r.html").read_text()
    assert "0 and 1: 0.500" in page and "what blocks put out" in page and "add to the residual" not in page
    assert "<td>gates</td>" in page and "3.25" in page and "4* 6" in page and "2 of 3 blocks are stored" in page
    assert "<script>" not in page
    for nonsense in ({"similarity": 3, "scores": "x", "fold": {"owner": [7]}}, {"fold": {"owner": "01"}}):
        content["stages"][0]["record"] = nonsense
        (tmp_path / "child" / "compression.json").write_text(json.dumps(content))
        assert "Whole blocks" not in report.write(None, [tmp_path / "child"], tmp_path / "r.html").read_text()
