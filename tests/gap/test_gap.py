"""`gvjax gap` at toy size, end to end: every stage, every judge, and no work done twice."""

import csv
import dataclasses
import functools
import http.server
import json
import math
import re
import threading

import jax
import pytest
import yaml

from gvjax import config, sharding
from gvjax.__main__ import main
from gvjax.gap import measurement
from gvjax.gap.findings import GapFindings
from gvjax.tasks.tour import Tour

DPO = {"recipe": "dpo", "steps": 2, "evaluate_every": 1, "batch_size": 8, "beta": 0.1}
RLOO = {
    "recipe": "policy_gradient",
    "steps": 2,
    "prompts_per_step": 4,
    "samples_per_prompt": 4,
    "evaluate_every": 1,
    "optimizer": {"learning_rate": 0.05},
}
TOY = {
    "gap": "toy",
    "run_dir": "run",
    "seeds": [1, 2],
    "task": {
        "name": "tour",
        "options": {"num_nodes": 6, "horizon": 4, "num_goals": 2},
    },
    "model": {
        "embed_dim": 16,
        "num_layers": 1,
        "num_heads": 2,
        "mlp_dim": 32,
        "mlp_gated": False,
        "norm": "layer",
        "learned_positions": 16,
    },
    "sft": {"steps": 10, "batch_size": 16},
    "pairs": {"count": 16, "heldout": 16},
    "evaluation": {"test_prompts": 16, "validation_prompts": 16},
    "scorers": {
        "learning_rates": [0.01],
        "steps": 2,
        "batch_size": 8,
        "evaluate_every": 1,
        "fractions": [0.5, 1.0],
        "also": ["shuffled reward model"],
    },
    "samples": {
        "prompts": 8,
        "validation_prompts": 8,
        "per_prompt": 8,
        "opponents": 2,
        "best_of_n": [1, 2, 4],
    },
    "pilot": {
        "online": "RLOO",
        "arms": {
            "DPO": {"road": "offline", "select": "best", "settings": DPO},
            "DPO, relabelled": {
                "road": "offline",
                "select": "best",
                "data": "relabelled",
                "settings": DPO,
            },
            "RLOO": {"road": "online", "settings": RLOO},
        },
    },
    "sizes": [{"embed_dim": 8}],
    "workers": 1,
}
# A seed: SFT, pairs, five scorers, the verifier's choice, gold and nulls, samples, a smaller network, three arms.
STAGES = 2 * (1 + 1 + 5 + 1 + 1 + 1 + 2 + 3)


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """A directory to work in, on one device as on a laptop."""
    path = tmp_path_factory.mktemp("gaps")
    patch = pytest.MonkeyPatch()
    make, one = sharding.make_mesh, jax.devices()[:1]
    patch.setattr(
        sharding, "make_mesh", lambda **axes: make(**{**axes, "devices": one})
    )
    patch.chdir(path)
    # Set here, the command leaves it alone; and it is put back for the tests that follow in this process.
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(path / "compiled"))
    yield path
    jax.config.update("jax_compilation_cache_dir", before)
    patch.undo()


def gap(where, data, capsys=None) -> tuple[int, str]:
    (where / "toy.yaml").write_text(yaml.safe_dump(data))
    code = main(["gap", "toy.yaml"])
    return code, capsys.readouterr().out if capsys else ""


@pytest.fixture(scope="module")
def measured(where) -> GapFindings:
    assert gap(where, TOY)[0] == 0
    return findings(where)


def findings(where) -> GapFindings:
    return GapFindings.from_json((where / "run" / "gap.json").read_text())


@pytest.mark.slow
def test_everything_that_was_asked_for_is_in_json_and_page(where, measured):
    (task,) = measured.tasks
    assert measured.config_hash == config.config_hash(config.load(where / "toy.yaml"))
    for quantity in task.quantities:
        assert list(quantity.seeds) == ["1", "2"], quantity.name
    keys = {quantity.key for quantity in task.quantities}
    assert keys == {"Q1", "Q3", "Q4", "Q5", "Q6", "Q9", "Q10"}
    assert {s.name for s in task.scorers} == {
        "gold",
        "own log-probability",
        "local reward model",
        "DPO implicit reward",
        "shuffled reward model",
    }
    assert {(c.name, c.pairs) for c in task.curves} == {
        (name, pairs)
        for name in ("local reward model", "DPO implicit reward")
        for pairs in (8, 16)
    }
    # Q1 is the difference of the two likelihoods.
    by_name = {scorer.name: scorer for scorer in task.scorers}
    lead = task.quantity("verifier's lead in likelihood")
    for seed, value in lead.seeds.items():
        a = by_name["local reward model"].log_likelihood[seed]
        b = by_name["DPO implicit reward"].log_likelihood[seed]
        assert value == pytest.approx(a - b)
    # Gold chooses best: no scorer wins more at the largest n.
    ends = {c.scorer: sum(row[-1] for row in c.winrate) for c in task.choices}
    assert max(ends, key=ends.get) == "gold"
    roads = {arm.name: arm.road for arm in task.pilot.tasks[0].arms}
    assert roads["DPO, relabelled"] == "relabelled"
    for point in task.pilot.tasks[0].arm("RLOO").seeds[0].curve:
        assert 0 <= point.winrate <= 1 and math.isfinite(point.proxy)
    page = (where / "run" / "gap.html").read_text()
    for text in (
        measured.config_hash,
        "What the gap is not evidence of",
        "winrate 0.03",
        "Best of n, tour",
        "DPO, relabelled",
    ):
        assert text in page
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", page)
    assert page.count('download="') >= 8


@pytest.mark.slow
def test_a_rerun_repeats_nothing_and_another_judge_redoes_no_stage(
    where, measured, capsys
):
    before = (where / "run" / "gap.json").read_bytes()
    code, shown = gap(where, TOY, capsys)
    assert code == 0 and f"{STAGES} of {STAGES} stages were done before" in shown
    assert (where / "run" / "gap.json").read_bytes() == before


@pytest.mark.exhaustive
def test_seeds_that_are_done_together_measure_what_each_does_alone(where, measured):
    """`jax.vmap` adds up in another order, and training carries that on."""
    assert gap(where, {**TOY, "run_dir": "lanes", "seeds_together": 2})[0] == 0

    def measures(run_dir):
        found = GapFindings.from_json((where / run_dir / "gap.json").read_text())
        (task,) = found.tasks
        yield from (
            (f"{quantity.key} {quantity.name} {seed}", value)
            for quantity in task.quantities
            for seed, value in quantity.seeds.items()
        )
        for scorer in task.scorers:
            for seed, value in scorer.log_likelihood.items():
                yield f"{scorer.name} {seed}", value

    alone, together = dict(measures("run")), dict(measures("lanes"))
    assert set(together) == set(alone)
    for name, value in alone.items():
        assert together[name] == pytest.approx(value, abs=1e-3), name


@pytest.mark.slow
def test_people_judge_through_a_sheet(where, measured, capsys):
    data = {**TOY, "judge": {"kind": "human", "directory": "sheets"}}
    code, shown = gap(where, {**data, "judged_prompts": 3}, capsys)
    sheet = where / "sheets" / "tour.csv"
    assert code == 85 and "fill in its column" in shown
    # Not filled in: asked for again, nothing lost.
    assert gap(where, {**data, "judged_prompts": 3})[0] == 85
    with sheet.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 3 * 2
    for row in rows:
        row["preferred"] = "first"
    with sheet.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    code, shown = gap(where, {**data, "judged_prompts": 3}, capsys)
    assert code == 0 and f"{STAGES} of {STAGES}" in shown
    judge = findings(where).tasks[0].judge
    assert judge.kind == "human" and judge.comparisons == 18
    assert judge.measures["prefers what is shown first"][0] == 1


class _Longest(http.server.BaseHTTPRequestHandler):
    """A judge that likes the answer shown first, once it has failed."""

    failures = 1

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if _Longest.failures:
            _Longest.failures -= 1
            self.send_error(500)
            return
        choice = {
            "message": {"content": "Fine.\nPreferred: A"},
            "finish_reason": "stop",
        }
        body = json.dumps(
            {"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_a_model_behind_an_endpoint_judges_and_its_bias_is_told(where, measured):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Longest)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/v1"
        judge = {"kind": "llm", "base_url": address, "model": "m"}
        assert gap(where, {**TOY, "judge": judge, "judged_prompts": 4})[0] == 0
    finally:
        server.shutdown()
    found = findings(where)
    judge = found.tasks[0].judge
    # Whatever is shown first: no answer is the same in both orders.
    assert judge.measures["answers the same in both orders"][0] == 0
    assert judge.measures["prefers what is shown first"][0] == 1
    assert any("both orders" in line for line in found.advice.not_evidence_of)
    assert "without a usable answer: none" in judge.notes[0]
    assert found.tasks[0].quantity(
        "online policy's lead over the best offline one"
    ).seeds == {"1": 0.0, "2": 0.0}


@dataclasses.dataclass(frozen=True)
class NoGold(Tour):
    """Tour's prompts and pairs, and nobody who could judge a sample."""

    reward_range = None

    def reward(self, prompts, completions):
        if len(prompts) < 16:
            raise AssertionError("a sample was judged, and there is no gold reward")
        return super().reward(prompts, completions)


@pytest.mark.slow
def test_without_a_gold_reward_scorers_alone_are_measured(where):
    task = {**TOY["task"], "name": f"{__name__}:NoGold"}
    fields = {"run_dir": "bare", "task": task, "pilot": None, "sizes": []}
    assert gap(where, {**TOY, **fields})[0] == 0
    found = GapFindings.from_json((where / "bare" / "gap.json").read_text())
    assert {q.key for q in found.tasks[0].quantities} == {"Q1", "Q3"}
    assert "gold" not in {s.name for s in found.tasks[0].scorers}
    assert found.tasks[0].choices == () and found.advice.basis == "predicted"
    assert "Best of n" not in (where / "bare" / "gap.html").read_text()


def run_of(where, name, **fields) -> int:
    data = {"run_dir": name, "task": TOY["task"], "model": TOY["model"], **fields}
    (where / f"{name}.yaml").write_text(yaml.safe_dump(data))
    return main(["run", f"{name}.yaml"])


@pytest.mark.slow
def test_a_reward_model_of_another_run_judges(where, measured, capsys):
    sft = {"recipe": "sft", "steps": 1, "batch_size": 8}
    assert run_of(where, "sft", settings=sft) == 0
    settings = {"recipe": "reward", "steps": 1, "batch_size": 8}
    pairs = {"count": 8, "heldout": 8}
    assert run_of(where, "judge", start="sft", pairs=pairs, settings=settings) == 0
    judge = {"kind": "reward_model", "run_dir": "judge"}
    data = {**TOY, "judge": judge, "judged_prompts": 4}
    assert gap(where, data)[0] == 0
    found = findings(where).tasks[0].judge
    assert found.kind == "reward_model" and found.comparisons == 4 * 3 * 2
    assert 0 <= found.measures["agrees with the gold reward"][0] <= 1
    wider = {**TOY["model"], "mlp_dim": 64}
    capsys.readouterr()
    (where / "toy.yaml").write_text(yaml.safe_dump({**data, "model": wider}))
    assert main(["gap", "toy.yaml"]) == 64
    assert "has another network" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [1, 1]}, "repeat"),
        ({"scorers": {"fractions": [0.5]}}, "end with 1.0"),
        ({"scorers": {"fractions": [0.01, 1.0]}}, "less than one of 16 pairs"),
        ({"scorers": {"also": ["a reward model"]}}, "scorers.also"),
        ({"samples": {"best_of_n": [1, 64]}}, "draw at least as many"),
        ({"samples": {"best_of_n": [1]}}, "the largest at least 2"),
        ({"pilot": {**TOY["pilot"], "online": "RLO"}}, "did you mean 'RLOO'"),
        ({"pilot": {**TOY["pilot"], "online": "DPO"}}, "name an online one"),
        (
            {"pilot": {"online": "RLOO", "arms": {"RLOO": TOY["pilot"]["arms"]["RLOO"]}}},
            "needs an opponent",
        ),
        ({"judged_prompts": 4}, "gold rewards judge every prompt"),
        (
            {"pilot": None, "judge": {"kind": "human", "directory": "x"}},
            "no policies to compare",
        ),
        (
            {"judged_prompts": 99, "judge": {"kind": "human", "directory": "x"}},
            "more than the 16 test prompts",
        ),
        ({"margins": {"winrate": 0.7}}, "margins.winrate is 0.7"),
        ({"margin": 1}, "did you mean margins"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(tmp_path, change, message):
    path = tmp_path / "gap.yaml"
    path.write_text(yaml.safe_dump({**TOY, **change}))
    with pytest.raises(config.ConfigError, match=re.escape(message)):
        config.load(path)


def kinds_by_key(where, **changes) -> dict[str, str]:
    (where / "plan.yaml").write_text(yaml.safe_dump({**TOY, **changes}))
    plan = measurement.plan_of(config.load(where / "plan.yaml"), "code")
    return {stage.key: stage.kind for stage in plan.stages}


def test_other_code_behind_the_task_redoes_everything(where, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    code = "from gvjax.tasks.tour import Tour as Mine\n"
    (tmp_path / "a_task.py").write_text(code)
    task = {**TOY["task"], "name": "a_task:Mine"}
    before = kinds_by_key(where, task=task)
    (tmp_path / "a_task.py").write_text(code + "# Another.\n")
    after = kinds_by_key(where, task=task)
    assert len(before) == len(after) == STAGES
    assert not set(before) & set(after)


def test_an_edit_redoes_what_it_touches_alone(where):
    keys = functools.partial(kinds_by_key, where)
    before = keys()
    assert len(before) == STAGES
    assert keys(margins={"winrate": 0.05}) == before
    assert keys(judge={"kind": "human", "directory": "x"}) == before
    only = keys(pilot=None)
    assert set(only) < set(before)
    assert "trial" not in only.values()
    more = keys(scorers={**TOY["scorers"], "fractions": [0.25, 0.5, 1.0]})
    assert set(before) < set(more)
    assert {more[key] for key in set(more) - set(before)} == {"scorer"}
    sizes = keys(samples={**TOY["samples"], "best_of_n": [2, 4]})
    # What a network of another size gains is kept for each n.
    assert {sizes[key] for key in set(sizes) - set(before)} == {"resized"}
    assert len(set(sizes) - set(before)) == 2
    both = keys(controls=[{"task": {"name": "hidden_goals", "options": TOY["task"]["options"]}, "pilot": False}])  # fmt: skip
    assert set(before) < set(both)
