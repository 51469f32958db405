"""The studies of configs/study: every run composes, words are equal, operations as the paper's; scales and mistakes."""

import json
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
import yaml
from tiny_training import call

from moe_lm.analysis.cost import operations_per_timestep, parameters_without_embedding_and_softmax
from moe_lm.cli import sweep
from moe_lm.cli.config import composed, resolved
from moe_lm.cli.machine import build_model
from moe_lm.cli.sweep import jobs_of, study_of
from moe_lm.config_files import choices, folder
from moe_lm.errors import UserError
from moe_lm.report.paper import TABLE_6, TABLE_7, same_architecture


def scales_of(study):
    return list(yaml.safe_load((folder() / "study" / f"{study}.yaml").read_text()).get("scales", [None]))


STUDIES = [(study, scale) for study in choices("study") for scale in scales_of(study)]
SCALED = [(study, scale) for study, scale in STUDIES if scale]


def arguments_of(study, scale):
    return [f"study={study}"] + ([f"scale={scale}"] if scale else [])


@pytest.fixture(scope="module")
def configs():
    """The configuration of every run of a study, by the run's name; composed once."""
    known = {}

    def of(study, scale):
        if (study, scale) not in known:
            jobs = jobs_of(arguments_of(study, scale))
            known[study, scale] = {job.folder.name: resolved(composed("train", list(job.arguments))) for job in jobs}
        return known[study, scale]

    return of


def sizes(config):
    """Operations and parameters without embedding and softmax, in millions."""
    with torch.device("meta"):
        model = build_model(config, vocabulary_size=100)
    return operations_per_timestep(model) / 1e6, parameters_without_embedding_and_softmax(model) / 1e6


@pytest.mark.parametrize(("study", "scale"), STUDIES)
def test_every_run_composes_and_reads_the_same_words(configs, study, scale):
    runs = configs(study, scale).values()
    assert len(runs) == len(study_of(study, scale).runs) >= 6
    for key in ("batch", "training", "corpus", "vocabulary", "softmax", "schedule", "seed"):
        alike = [{k: v for k, v in c[key].items() if k != "micro_words"} if key == "batch" else c[key] for c in runs]
        assert all(value == alike[0] for value in alike), key
    assert len({config["optimizer"]["learning_rate"] for config in runs}) == 1


@pytest.mark.parametrize(("study", "scale"), SCALED)
def test_a_study_tells_what_it_reproduces(study, scale):
    text = (folder() / "study" / f"{study}.yaml").read_text()
    header = text[: text.index("scale: small")]
    assert f"moe-lm sweep study={study} scale=paper" in header
    assert f"runs=runs/{study}-small" in header
    assert str(study_of(study, scale).folder) == f"runs/{study}-{scale}"
    assert len(study_of(study, scale).notes) >= 1


def test_headers_state_the_printed_figures():
    for study in ("capacity", "budget"):
        header = " ".join((folder() / "study" / f"{study}.yaml").read_text().split("scale: small")[0].split())
        for line in study_of(study, "paper").runs:
            row = TABLE_7[re.match(r"model=(\w+)", line)[1]]
            assert f"{row.name} {row.perplexity or row.later_perplexity}" in header
    rows = (folder() / "study/balance.yaml").read_text().split("scale: small")[0]
    found = [tuple(map(float, line[1:].split())) for line in rows.splitlines() if re.match(r"#( +[\d.]+){6}$", line)]
    assert found == [tuple(vars(row).values()) for row in TABLE_6]


@pytest.mark.parametrize("study", ["capacity", "budget"])
def test_the_paper_scale_has_the_printed_sizes(configs, study):
    for name, config in configs(study, "paper").items():
        operations, parameters = sizes(config)
        row = TABLE_7[name]
        assert operations == pytest.approx(float(row.operations), abs=0.055), name
        assert parameters == pytest.approx(float(row.parameters), abs=0.055), name
        assert config["model"]["dropout"] == row.dropout
        assert config["optimizer"]["experts"] == ("factored" if parameters > 1000 else "adam")
        assert config["training"]["num_words"] == 27_000 * 300_000
        assert config["batch"]["words"] == 300_000


@pytest.mark.parametrize(("words", "experts", "said"), [(2048, 64, "1.2 times"), (300_000, 256, "1.04 times")])
def test_what_chance_alone_makes_of_balance_is_as_the_notes_say(words, experts, said):
    """Four different experts a word, all as likely: each one's tokens are binomial, of this many nearly normal."""
    p = 4 / experts
    deviation = np.sqrt((1 - p) / (words * p))
    peak = 1 + deviation * np.random.default_rng(0).standard_normal((1000, experts)).max(axis=1).mean()
    told = said.split()[0]
    assert f"{peak:.{len(told) - 2}f}" == told
    assert said in str(study_of("balance", "small").notes)


def test_capacity_is_nearly_equal_operations(configs):
    """At the paper's sizes within 7 %; an eighth as wide, but for the gates, which shrink less."""
    paper = [sizes(config)[0] for config in configs("capacity", "paper").values()]
    assert max(paper) / min(paper) < 1.07
    gates = {}
    for name, config in configs("capacity", "small").items():
        model = config["model"]
        mixture = config["model"]["layers"].get("middle", {}).get("_target_", "").rpartition(".")[2]
        a, n = model["num_groups"], model["num_experts"]
        # Matrices of the gate and of its noise; in a hierarchy the primary gate's and those of two groups.
        gates[name] = {"MoE": 2 * 64 * n, "HierarchicalMoE": 2 * 64 * a + 2 * 2 * 64 * n // a}.get(mixture, 0)
        # Two LSTM layers and four experts, or what stands in their place.
        assert sizes(config)[0] * 1e6 == 2 * 8 * 64**2 + 4 * 2 * 64 * 128 + gates[name], name
    few = [gates[name] for name in ("moe_4", "moe_16", "moe_64", "moe_256_h")]
    assert max(few) / 131_072 < 0.07
    # As the study's notes say.
    assert (gates["moe_256"], gates["moe_4096_h"]) == (163_840 - 131_072, 198_656 - 131_072)
    assert all(figure in str(study_of("capacity", "small").notes) for figure in ("163,840", "198,656"))


def test_capacity_rises_in_parameters_alone(configs):
    small = {name: sizes(config)[1] for name, config in configs("capacity", "small").items()}
    flat = [small[name] for name in ("moe_4", "moe_16", "moe_64", "moe_256")]
    hierarchical = [small[name] for name in ("moe_256_h", "moe_1024_h", "moe_4096_h")]
    assert all(2 < b / a < 4 for a, b in pairwise(flat))
    assert all(3.9 < b / a < 4.1 for a, b in pairwise(hierarchical))


def test_budget_keeps_the_papers_proportions(configs):
    """Every width an eighth: LSTMs shrink by 64, mixtures by less, for their gates."""
    pairs = zip(configs("budget", "paper").values(), configs("budget", "small").values(), strict=True)
    for paper, small in pairs:
        for key in ("width", "lstm_units", "expert_hidden"):
            read = f"'{key.removeprefix('lstm_').removeprefix('expert_')}'" in str(paper["model"]["layers"])
            assert not read or small["model"][key] == paper["model"][key] / 8
        assert small["model"]["num_experts"] == paper["model"]["num_experts"]
        assert small["model"]["num_groups"] == paper["model"]["num_groups"]
        ratio = sizes(paper)[0] / sizes(small)[0]
        assert 44 < ratio < 64 if small["model"]["num_experts"] > 1 else ratio == 64
    mixtures = [sizes(config)[0] for name, config in configs("budget", "small").items() if name.startswith("moe")]
    assert [round(operations / mixtures[0], 1) for operations in mixtures] == [1, 2.8, 11.3]


@pytest.mark.parametrize(("study", "between"), [("capacity", {"moe_16", "moe_64"}), ("budget", set())])
def test_small_models_imitate_their_presets(configs, study, between):
    """The report finds the paper's model behind each, but for the sizes between."""
    lines = [dict(part.split("=", 1) for part in line.split()) for line in study_of(study, "small").runs]
    presets = {line["name"]: resolved(composed("train", [f"model={line['model']}"])) for line in lines}
    runs = configs(study, "small")
    assert {name for name in runs if not same_architecture(runs[name], presets[name])} == between


@pytest.mark.parametrize("scale", ["paper", "small"])
def test_routing_tries_gates_at_equal_operations(configs, scale):
    """Gates of configs/gate, as many experts, and operations within 4 % (a gate has one matrix or two)."""
    runs = configs("routing", scale)
    mixtures = {name: config["model"] for name, config in runs.items() if name != "dense"}
    tried = {model["layers"]["middle"]["gate"]["_target_"].split(".")[-2] for model in mixtures.values()}
    assert len(tried) >= 8
    assert tried <= set(choices("gate"))
    assert len({model["num_experts"] for model in mixtures.values()}) == 1
    operations = [sizes(config)[0] for config in runs.values()]
    assert max(operations) / min(operations) < 1.04
    assert study_of("routing", scale).audit
    assert not study_of("balance", scale).audit


@pytest.mark.parametrize("scale", ["paper", "small"])
def test_balance_tries_the_papers_weights(configs, scale):
    runs = configs("balance", scale)
    pairs = [tuple(c["balance"][loss]["weight"] for loss in ("importance", "load")) for c in runs.values()]
    assert pairs == [(row.w_importance, row.w_load) for row in TABLE_6]
    for name, pair in zip(runs, pairs, strict=True):
        assert name == f"importance={pair[0]:g},load={pair[1]:g}"
    assert len({str(config["model"]) for config in runs.values()}) == 1


def test_small_scale_is_the_default_and_the_command_line_wins():
    own = ["training.num_words=20_000_000", "corpus=text", "corpus.train=[a.txt]", "seed=1,2"]
    jobs = jobs_of(["study=capacity", *own])
    assert len(jobs) == 20
    assert jobs[0].folder.as_posix() == "runs/capacity-small/lstm_4x64,seed=1"
    for job in jobs:
        config = resolved(composed("train", list(job.arguments)))
        assert config["training"]["num_words"] == 20_000_000
        assert config["corpus"]["train"] == ["a.txt"]
    assert {job.folder for job in jobs_of(["study=budget"])} == {j.folder for j in jobs_of(["study=budget", "scale="])}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["study=capacity", "scale=tiny"], "scale=tiny: study=capacity has scale=paper and scale=small"),
        (["study=capacity", "scale=paper,small"], "scale=paper,small: study=capacity has"),
        (["study=quickstart", "scale=small"], "scale=small: study=quickstart has one size only: omit scale"),
        (["model=moe_4,moe_32", "scale=small"], "scale=small: a study has a scale"),
        (["study=capcity"], "study=capcity: no such study; there are balance, budget, capacity"),
    ],
    ids=str,
)
def test_a_wrong_scale_is_one_line(arguments, words, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        jobs_of(arguments)
    assert call("sweep", *arguments) == 2
    error = capfd.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_scaled_study_trains_and_reports(workspace, capfd, monkeypatch, jobs_in_this_process):
    """Two runs of the balance study, very small, then the report with its name, scale and tables."""
    monkeypatch.setattr(sweep, "jobs_of", lambda given: jobs_of(given)[:2])
    own = [f"corpus.{split}=text/{split}.txt" for split in ("train", "valid", "test")] + ["corpus=text"]
    own += [
        "model.width=8",
        "model.expert_hidden=8",
        "model.num_experts=8",
        "batch.words=200",
        "softmax.num_sampled=16",
    ]
    own += ["training.num_words=600", "training.log_every=1", "vocabulary.min_count=1", "machine.device=cpu"]
    assert call("sweep", "study=balance", *own) == 0
    runs = workspace / "runs/balance-small"
    results = [json.loads(path.read_text()) for path in sorted(runs.glob("*/result.json"))]
    assert [(result["preset"], result["model"]["width"]) for result in results] == [("moe_256", 8)] * 2
    assert yaml.safe_load((runs / "study.yaml").read_text())["scale"] == "small"
    capfd.readouterr()
    assert call("report", f"runs={runs}") == 0
    out = capfd.readouterr().out
    assert "## Weights of the balance losses" in out
    assert re.search(r"17\.80 \|\n.* 1\.47 \|\n", out)
    page = (runs / "report/index.html").read_text()
    assert "2 finished runs; study balance, scale small" in page
    # What its notes say is of the study as it is.
    given = " ".join(a for a in own if not a.startswith("machine."))
    told = f"These runs were made with {given}: what is said below is of the study without."
    assert page.index(told) < page.index("MoE-256 with every width an eighth")
    # Runs that refuse other values keep what they were made with.
    assert call("sweep", "study=balance", *[a for a in own if "num_words" not in a], "training.num_words=400") == 1
    study = yaml.safe_load((runs / "study.yaml").read_text())
    assert study["given"] == own
    for value, code in ((None, 0), ("abc", 2), (["++machine.threads=2"], 0)):
        changed = study | {"given": value} if value is not None else {k: v for k, v in study.items() if k != "given"}
        (runs / "study.yaml").write_text(yaml.safe_dump(changed))
        assert call("report", f"runs={runs}") == code
        assert code or "These runs were made with" not in (runs / "report/index.html").read_text()
