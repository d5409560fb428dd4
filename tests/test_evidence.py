"""benchmarks/evidence.py: which cells are run in which order, and which records are taken for them."""

import json
import lzma
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from references import torch_models

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "passkey-mamba2-4m"

SETTINGS: dict[str, Any] = {
    "train_length": 512,
    "engine": {"dtype": "float32"},
    "start_seconds": 0,
    "texts": {
        "novels": {"digits": [0, 1]},
        "numbers": {"digits": [5, 1000], "piece": {"tokens": 20, "least_digits": 100}},
        "sentences": {"repeat": "All is well. "},
    },
    "shortest_document": 600,
    "documents": 1,
    "ruler_tokens": 8,
    "tables": {"default": {}, "C5": {"clamp_percent": 5}},
    "seeds": {"default": [1]},
    "methods": {
        "plain": {"theta": 1},
        "default": {},
        "paper": {"search": {"table": ["C5"], "theta": [0.001, 0.01]}},
        "A clipped": {"theta": 1, "A_quantile": 1.0},
        "decimamba": {"decimamba": {"layers": [3], "L_base": 512}},
    },
    "search": [
        {"tasks": ["passkey"], "texts": ["sentences"], "lengths": [1024], "questions": 2},
        {"tasks": ["text"], "lengths": [600], "windows": 1},
    ],
    "work": [
        {"search": ["paper"]},
        {
            "methods": ["plain", "default", "paper"],
            "tasks": ["passkey"],
            "texts": ["sentences"],
            "lengths": [512, 1024],
            "questions": 3,
        },
        {"methods": ["plain", "A clipped"], "tasks": ["text"], "lengths": [600], "windows": 2},
        {"methods": ["plain"], "tasks": ["S1"], "lengths": [1024], "questions": 1},
        {"methods": ["decimamba"], "tasks": ["needles"], "texts": ["numbers"], "lengths": [700], "questions": 2},
    ],
}


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def _plan() -> Any:
    from support.evidence_plan import Plan

    return Plan(SETTINGS, ["model"], ["model"])


def _done(unit: Any, found: int = 0, nats: float = 1.0) -> dict[str, Any]:
    result = {"books": {"a": {"nats": nats, "tokens": 1}}} if unit.task == "text" else {"found": found}
    return {"key": unit.key, "unit": {"count": unit.count}, **result}


def test_the_important_cells_come_first_and_a_search_before_what_builds_on_it() -> None:
    units = list(_plan().units({}))
    assert [tier for tier, _ in units] == sorted(tier for tier, _ in units)
    first = [unit for tier, unit in units if tier == 0]
    assert [unit.method for unit in first] == [f"search, paper: table C5, theta {theta}" for theta in (0.001, 0.01)] * 2
    assert [(unit.method, unit.length) for tier, unit in units if tier == 1] == [
        ("plain", 1024), ("default", 1024), ("plain", 512), ("default", 512),
    ]  # fmt: skip
    assert [unit.setting.decimamba != "" for tier, unit in units if tier == 4] == [True]


@pytest.mark.parametrize(
    ("found", "nats", "theta"),
    [((2, 1), (9.0, 1.0), 0.001), ((1, 2), (1.0, 9.0), 0.01), ((2, 2), (2.0, 1.0), 0.01), ((0, 0), (1.0, 2.0), 0.001)],
    ids=["more keys", "more keys, second", "less loss", "no keys"],
)
def test_the_best_of_a_search(found: tuple[int, int], nats: tuple[float, float], theta: float) -> None:
    plan = _plan()
    places = {0.001: 0, 0.01: 1}
    searches = [unit for tier, unit in plan.units({}) if tier == 0]
    records = {
        unit.key: _done(unit, found[places[unit.setting.theta]], nats[places[unit.setting.theta]]) for unit in searches
    }
    incomplete = dict(list(records.items())[1:])
    assert plan.found("model", "paper", incomplete) is None
    assert plan.found("model", "paper", records).theta == theta
    left = [unit for _, unit in plan.units(records)]
    assert not set(searches) & set(left)
    assert [unit.setting.theta for unit in left if unit.method == "paper"] == [theta, theta]


def test_records_of_other_settings_are_not_taken() -> None:
    first = next(unit for _, unit in _plan().units({}))
    from support.evidence_plan import Setting, Unit

    same = Unit(*(getattr(first, name) for name in first.__dataclass_fields__))
    assert same.key == first.key
    other = Unit("model", first.method, Setting(theta=0.5), first.task, first.text, first.length, first.count, True)
    assert other.key != first.key


def test_a_rule_of_pieces_has_keys_of_its_own() -> None:
    from support.evidence_plan import Plan, Setting, Unit

    def keys(rule: dict[str, Any]) -> dict[str, str]:
        cells = {"methods": ["plain"], "tasks": ["passkey"], "texts": ["novels", "numbers"]}
        work = [cells | {"lengths": [9], "questions": 1}]
        settings = SETTINGS | {"work": work, "texts": SETTINGS["texts"] | {"numbers": rule}}
        return {unit.text: unit.key for _, unit in Plan(settings, ["model"]).units({})}

    rules = [{"digits": [5, 1000], **piece} for piece in ({}, *({"piece": {"tokens": n}} for n in (10, 20)))]
    assert len({keys(rule)["numbers"] for rule in rules}) == 3
    assert len({keys(rule)["novels"] for rule in rules}) == 1
    whole = Unit("model", "plain", Setting(theta=1), "passkey", "numbers", 9, 1)
    assert keys(rules[0])["numbers"] == whole.key


def test_records_of_the_page_keep_their_keys() -> None:
    """Those of haystacks that are not pieces are taken for the cells of evidence.json, the others are not."""
    from support.evidence_plan import Plan, Setting, Unit, read_settings

    found: dict[str, list[Any]] = {}
    for file in sorted((ROOT / "benchmarks" / "results" / "evidence").glob("*.jsonl")):
        for record in map(json.loads, file.read_text().splitlines()):
            if "unit" in record:
                unit = Unit(**record["unit"] | {"setting": Setting(**record["unit"]["setting"])})
                assert record["key"] == unit.key
                found.setdefault(unit.model, []).append(unit)
    for model, units in found.items():
        planned = {unit.key for _, unit in Plan(read_settings(), [model]).units({})}
        methods = {"default", "plain"}
        mine = [unit for unit in units if unit.method in methods and unit.task == "passkey" and unit.length > 2048]
        assert {unit.text for unit in mine if unit.key in planned} >= {"novels", "sentences"}
        assert not [unit for unit in mine if unit.text == "numbers" and not unit.pieces and unit.key in planned]


def test_lengths_follow_the_training_length() -> None:
    from support.evidence_plan import for_train_length

    methods = {"decimamba": {"decimamba": {"layers": [3], "L_base": 512}}, "tuned": {"search": {"end": [0, 64]}}}
    scaled = for_train_length(SETTINGS | {"methods": methods}, 2048)
    assert scaled["train_length"] == 2048
    assert scaled["shortest_document"] == 2400
    assert scaled["methods"] == {
        "decimamba": {"decimamba": {"layers": [3], "L_base": 2048}},
        "tuned": {"search": {"end": [0, 256]}},
    }
    assert scaled["search"][0] == SETTINGS["search"][0] | {"lengths": [4096]}
    assert scaled["work"][1] == SETTINGS["work"][1] | {"lengths": [2048, 4096]}
    # what no length is stays, the pieces of a text too
    assert all(scaled[name] == SETTINGS[name] for name in ("engine", "texts", "documents", "tables", "ruler_tokens"))
    assert for_train_length(SETTINGS, 512) == SETTINGS


def test_half_a_line_is_no_record(tmp_path: Path) -> None:
    from support.evidence_plan import Records

    growing = tmp_path / "worker-0.jsonl"
    growing.write_text('{"key": "a", "found": 1}\n{"key": "b", "by_depth": {"0.5": [1')
    (tmp_path / "worker-1.jsonl").write_text('{"key": "c"}\n')
    records = Records(tmp_path)
    assert set(records.all()) == {"a", "c"}
    with growing.open("a") as file:
        file.write('1, 2]}}\n{"key": "d"}\n')
    assert set(records.all()) == {"a", "b", "c", "d"}


def test_values_found_is_rulers_score() -> None:
    from lm_eval.tasks.ruler.common_utils import string_match_all
    from support.evidence_engine import values_found

    for answer in ("1234567, and 7654321.", "1234567", "nothing", ""):
        values = ["1234567", "7654321"]
        assert values_found(answer, values) == string_match_all([answer], [values])


@pytest.mark.parametrize("name", ["passkey-mamba2-4m", "reference-mamba1-4m"])
def test_a_factor_on_dt_is_one_on_the_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker extension on the weights of the torch reference, against the reference with every dt times 0.5."""
    from support.evidence_engine import EvidenceWorkerExtension

    class HalfDt(torch_models.Plain):
        def plan(self, layer: Any, prompt: Any) -> Any:
            return torch_models.LayerPlan(change_dt=lambda dt: 0.5 * dt)

    folder = ROOT / "examples" / name
    prompt = list(range(1, 100))
    plain = torch_models.TorchModel(folder, device="cpu")
    before = plain.last_logprobs(prompt, 50)
    expected = torch_models.TorchModel(folder, HalfDt(), device="cpu").last_logprobs(prompt, 50)
    mixers = []
    for layer in plain.layers:
        weights = layer.mixer.weights
        parts = {"A": layer.mixer.A, "D": weights["D"], "out_proj": SimpleNamespace(weight=weights["out_proj.weight"])}
        mixers.append(SimpleNamespace(**parts, **({"norm": None} if "norm.weight" in weights else {})))
    monkeypatch.setattr("vllm_longmamba.layers.filtered_mixer.filtered_mixers", lambda model: mixers)
    extension = EvidenceWorkerExtension()
    extension.get_model = lambda: None
    extension.change_decay(0.5, 0.0)
    for layer in plain.layers:
        # What the norm adds to a mean square is not scaled along.
        if hasattr(layer.mixer, "eps"):
            layer.mixer.eps /= 0.5**2
    torch.testing.assert_close(plain.last_logprobs(prompt, 50), expected, atol=2e-3, rtol=0)
    assert (expected - before).abs().max() > 0.1
    extension.change_decay(1.0, 0.5)
    sizes = torch.cat([-mixer.A.flatten() for mixer in mixers])
    assert (sizes == sizes.min()).float().mean() >= 0.5
    extension.change_decay(1.0, 0.0)
    for layer in plain.layers:
        if hasattr(layer.mixer, "eps"):
            layer.mixer.eps *= 0.5**2
    torch.testing.assert_close(plain.last_logprobs(prompt, 50), before, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.engine
def test_cells_through_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All cells of the settings above in two engines; then nothing is left to do."""
    import evidence
    from support.evidence_plan import Records

    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    text = "It was late in the evening, and nobody spoke. " * 60
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(f"{text}\n<|doc|>\n" + "In 1066 it rained. " * 100)
    (tmp_path / "ruler").mkdir()
    with lzma.open(tmp_path / "ruler" / "S1-1024.json.xz", "wt") as file:
        json.dump([{"prompt": text[:900], "outputs": ["1234567"]}], file)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    arguments = [
        "evidence.py", EXAMPLE, "--settings", tmp_path / "settings.json", "--text", tmp_path / "text", "--search-text",
        tmp_path / "text", "--ruler", tmp_path / "ruler", "--minutes", 10, "--output", tmp_path / "out",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "evidence.py"), *map(str, arguments[1:])])
    evidence.main()
    records = Records(tmp_path / "out" / "records").all()
    units = {
        (one["unit"]["method"], one["unit"]["task"], one["unit"]["length"]): one
        for one in records.values()
        if "unit" in one
    }
    assert len(units) == 4 + 6 + 2 + 1 + 1
    assert units["default", "passkey", 512]["found"] == units["plain", "passkey", 512]["found"] == 3
    losses = {method: units[method, "text", 600]["books"]["a-0"]["nats"] for method in ("plain", "A clipped")}
    assert losses["plain"] < losses["A clipped"]
    evidence.main()
    assert len(list((tmp_path / "out" / "records").iterdir())) == 1
