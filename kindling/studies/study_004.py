"""Study 004: a Llama trained in four stages, and after each one every measure: what a stage brought, and what it took."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from config import Config, SourceConfig, TokenizerConfig
from kindling.config_io import to_yaml
from kindling.data.ledger import Ledger
from kindling.evaluation import harness_data
from kindling.files import write_atomic
from kindling.plots.html_report import Picture
from kindling.runs.checkpoint import RunDirectory
from kindling.studies import held_out, measures
from kindling.studies.inputs import FOLDER, Inputs
from kindling.studies.measures import Measure
from kindling.studies.report import Study
from kindling.studies.run_results import Run
from kindling.studies.shared_steps import (
    FEWEST_FOR_EXAMPLES,
    FULL_NEW_TOKENS,
    NEW_TOKENS,
    bytes_for,
    bytes_for_examples,
    bytes_read,
    data_step,
    described,
    evaluation_step,
    on_local,
    read_at_most,
    tokens_of_examples,
    training_step,
)
from kindling.studies.sizes import flags_of, shrink, size_text
from kindling.studies.speed import Clock
from kindling.studies.steps import Step, StudyError
from kindling.tables import Section
from presets import preset

TITLE = "Four stages, and what each one brought and took"
STAGES = {1: "language", 2: "code", 3: "mathematics", 4: "instructions"}
LAST = len(STAGES)
MATHEMATICS, KNOWLEDGE = (
    65,
    35,
)  # shares of stage 3: its three sources of mathematics together, and the one of knowledge
BENCHMARKS = {"problems": 5, "humaneval": 1, "mbpp": 1}
FULL_BENCHMARKS = {**BENCHMARKS, "mbpp-3shot": 1}  # as the project asks MBPP: its examples need a context of its size
TOKENIZER = "runs/stage-1/tokenizer.json"  # of all stages, where none is fetched
TASKS = tuple(harness_data.TASKS)
QUESTIONS = 200  # of each task, at less than full size
FILES = "runs/stage-*/eval.json"
LOSSES = {1: "10.87 to 2.58", 2: "5.00 to 1.25", 3: "2.77 to 1.55", 4: "1.73 to 0.70"}

_TEXTS = {"prose": "prose", "python": "Python", "mathematics": "mathematics", "questions": "questions",
          "instructions": "instructions"}  # fmt: skip
_TASKS = {
    "wikitext": ("Wikitext", "word perplexity", {3: "35.4", 4: "167.6"}),
    "gsm8k": ("GSM8K", "exact match", {4: "0.0455"}),
    "arc_easy": ("ARC Easy", "acc_norm", {4: "0.346"}),
    "arc_challenge": ("ARC Challenge", "acc_norm", {4: "0.228"}),
    "hellaswag": ("HellaSwag", "acc_norm", {4: "0.283"}),
}
_SHARE: dict[str, Any] = {"lower": False, "relative": False}
MEASURES = [
    *(Measure(label, "bits per byte", "texts", f"{name}.jsonl") for name, label in _TEXTS.items()),
    *(Measure(f"gold {label}", "bits per byte", "gold", name)
      for name, label in (("problems", "problems/"), ("humaneval", "HumanEval"), ("mbpp", "MBPP"))),
    *(Measure(f"pass@{k} problems/", "share", "functional", "problems", k, **_SHARE) for k in "15"),
    Measure("pass@1 HumanEval", "share", "functional", "humaneval", "1", **_SHARE, claims={4: "27.4%"}),
    Measure("pass@1 MBPP", "share", "functional", "mbpp", "1", **_SHARE),
    Measure("pass@1 MBPP, 3 examples", "share", "functional", "mbpp-3shot", "1", **_SHARE, claims={4: "31.0%"}),
    *(Measure(label, unit, "harness", name, lower=name == "wikitext", relative=name == "wikitext", claims=claims)
      for name, (label, unit, claims) in _TASKS.items()),
]  # fmt: skip
UNITS = (
    "prose to instructions: bits per byte of the held-out texts; gold: of the benchmark's reference solutions; Wikitext: word "
    "perplexity; of these less is better. GSM8K: exact match; ARC, HellaSwag: acc_norm; of these and of pass@k more is better"
)


def local_sources(stage: int, tokens: float, first_tokens: float, inputs: Inputs) -> tuple[SourceConfig, ...]:
    """Return the local sources of a stage that reads so many tokens; prose is read by the first stage and the third."""
    prose = inputs.prose_source(bytes_for(first_tokens)).source
    if stage == 1:
        return (prose,)
    if stage == 2:
        return (inputs.code_source(bytes_for(tokens)).source,)
    if stage == 3:
        sums = inputs.mathematics_source(bytes_for(tokens * MATHEMATICS / 100)).source
        return replace(sums, weight=MATHEMATICS), replace(prose, weight=KNOWLEDGE)
    return (inputs.instructions_source(bytes_for_examples(tokens)).source,)


def configs(scale: float, inputs: Inputs) -> dict[int, Config]:
    """Return the configs of the four stages. Their builds drop what the held-out texts are from."""
    made = {stage: shrink(preset(f"smallcoder-{stage}"), scale) for stage in STAGES}
    found, read = {}, held_out.trained(inputs)
    for stage, cfg in made.items():
        if not inputs.preset:
            sources = local_sources(stage, cfg.tokens, made[1].tokens, read)
            cfg = on_local(cfg, sources[0])
            cfg = replace(cfg, data=replace(cfg.data, sources=sources))
            if stage == LAST:  # of instructions there are few
                cfg = read_at_most(cfg, tokens_of_examples(sources[0]))
        if stage > 1 and cfg.tokenizer.kind != "pretrained":  # it is trained on the prose of the first stage
            cfg = replace(cfg, tokenizer=TokenizerConfig(kind="pretrained", path=TOKENIZER))
        data = replace(cfg.data, decontaminate=(*cfg.data.decontaminate, *held_out.FILES))
        before = f"runs/stage-{stage - 1}" if stage > 1 else None
        lr = (
            made[1].train.lr * preset(cfg.preset).train.lr / preset("smallcoder-1").train.lr
        )  # in the stages' own ratio
        train = replace(cfg.train, init_from=before, lr=float(f"{lr:.2g}"))
        found[stage] = replace(cfg, name=f"stage-{stage}", data=data, train=train)
    return found


def sources_file(stage: int) -> str:
    """Return the file of a stage's local sources, for --config: a flag cannot change how many there are."""
    return f"{FOLDER}/stage-{stage}.yaml"


def tasks(inputs: Inputs) -> list[str]:
    """Return the harness's tasks whose data are there. Raises StudyError for a folder that is none."""
    folder = inputs.harness_data
    if folder is None:
        return list(TASKS) if inputs.preset and inputs.harness else []
    if not folder.is_dir():
        raise StudyError(
            f"--harness-data must be a folder with the tasks' data, but {folder} is none; correct the path"
        )
    return [task for task in TASKS if harness_data.find(folder, task) is not None]


def plan(scale: float, clock: Clock, inputs: Inputs) -> list[Step]:
    """Return the steps at a scale."""
    steps: list[Step] = []
    new_tokens, benchmarks = (FULL_NEW_TOKENS, FULL_BENCHMARKS) if scale == 1 else (NEW_TOKENS, BENCHMARKS)
    for stage, cfg in configs(scale, inputs).items():
        run, file = f"stage-{stage}", None if inputs.preset else sources_file(stage)
        before = (f"stage-{stage - 1}",) if stage > 1 else ()
        if stage < LAST:
            steps.append(
                data_step(replace(cfg, name=None), clock, bytes_read(cfg, inputs), f"data-{stage}", before, file)
            )
            steps.append(training_step(cfg, run, clock, (f"data-{stage}", *before), file))
        else:
            steps.append(fine_tuning_step(cfg, run, clock, before, file, inputs))
        texts = ("--text", *held_out.FILES)
        n_texts = len(held_out.FILES) * held_out.BYTES / 2
        evaluated = evaluation_step(
            run, cfg, clock, inputs.sandbox, texts,
            held_out=0.3e6 + n_texts, benchmarks=benchmarks, new_tokens=new_tokens,
        )  # fmt: skip
        steps.append(evaluated)
        if asked := tasks(inputs):
            steps.append(harness_step(run, cfg, clock, asked, inputs.harness_data, scale))
    return steps


def fine_tuning_step(
    cfg: Config, run: str, clock: Clock, before: tuple[str, ...], file: str | None, inputs: Inputs
) -> Step:
    """Return the last stage. It has model and tokenizer of the run before it, so these are no flags."""
    seed = preset(cfg.preset)
    init = replace(cfg.train, init_from=seed.train.init_from)
    flags = flags_of(replace(cfg, model=seed.model, tokenizer=seed.tokenizer, train=init), file)
    read = bytes_read(cfg, inputs) if inputs.preset else cfg.data.sources[0].max_bytes or FEWEST_FOR_EXAMPLES
    seconds = clock.training(cfg) + clock.generation(cfg, 10, cfg.model.block_size) + clock.building(read)
    done = f"runs/{run}/answers.jsonl"
    return Step(run, "sft_train.py", (f"runs/{before[0]}", *flags), done, before, seconds, size_text(cfg))


def harness_step(run: str, cfg: Config, clock: Clock, asked: list[str], folder: Path | None, scale: float) -> Step:
    """Return the step that adds the harness's tasks to a run's results. A failure stops nothing else."""
    data = () if folder is None else ("--harness-data", str(folder.resolve()))
    limit = () if scale == 1 else ("--harness-limit", str(QUESTIONS))
    questions = len(asked) * (QUESTIONS if limit else 3000)
    flags = ("--eval.benchmarks", "none", "--eval.signatures", "0", "--harness", ",".join(asked), *data, *limit)
    seconds = 2 * clock.start_s + clock.reading(cfg, 0.3e6 + 400 * questions)
    if "gsm8k" in asked:
        seconds += clock.generation(cfg, -(-questions // len(asked) // 16), 256)
    name, about = f"harness-{run}", f"{len(asked)} tasks of lm-eval"
    return Step(name, "evaluate.py", (f"runs/{run}", *flags), f"runs/{run}/eval.json", (run,), seconds, about)


def prepare(scale: float, inputs: Inputs) -> None:
    """Write the held-out texts, then the stand-ins, which do not have them, and the files of the sources."""
    try:
        held_out.write_held_out(inputs)
        if inputs.preset:
            return
        read = held_out.trained(inputs)
        for stage, cfg in configs(scale, inputs).items():
            for source in cfg.data.sources:
                read.write(source)
            write_sources(stage, cfg, inputs.folder)
    except OSError as e:
        raise StudyError(f"{inputs.folder} must be writable, but is not ({e.strerror}); free some space") from None


def write_sources(stage: int, cfg: Config, folder: Path) -> None:
    """Write the file of a stage's sources, unless it is there."""
    path = folder / sources_file(stage)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, sources_yaml(cfg))


def sources_yaml(cfg: Config) -> str:
    """Return the sources of a config, as --config takes them."""
    import yaml

    sources = yaml.safe_load(to_yaml(cfg))["data"]["sources"]
    return yaml.safe_dump({"data": {"sources": sources}}, sort_keys=False)


def sources(scale: float, inputs: Inputs) -> str:
    """Return the line on the data."""
    made = (inputs.prose_source, inputs.code_source, inputs.mathematics_source, inputs.instructions_source)
    said = [source(1_000_000).said.split(",")[0] for source in made]
    kinds = f"3: {said[2]} {MATHEMATICS}%, {said[0]} {KNOWLEDGE}%"
    return described(inputs, f"stage 1: {said[0]}", f"2: {said[1]}", kinds, f"4: {said[3]}")


def _runs(folder: Path) -> list[Run]:
    return [Run(folder, f"stage-{stage}") for stage in STAGES]


def _columns() -> list[str]:
    return [f"{stage}: {name}" for stage, name in STAGES.items()]


def sections(folder: Path) -> list[Section]:
    """Return the tables."""
    runs = _runs(folder)
    notes = [UNITS]
    if missing := measures.absent(runs, MEASURES):
        notes.append(f"not there: {', '.join(missing)}")
    if any(measure.part == "harness" for measure in MEASURES if measure.label in missing):
        notes.append(
            "Wikitext, GSM8K, ARC and HellaSwag need lm-eval (requirements-harness.txt) and --harness-data, or --hub"
        )
    notes += [f"{run.name}, {name}: {why}" for run in runs for name, why in run.skipped().items()]
    said = [
        "*: the 95% interval excludes 0. Bits per byte are paired by document, or by problem; pass@k by problem, in points",
        "without brackets: no document or problem differs; the harness's questions are not paired",
    ]
    steps = [f"{stage - 1} to {stage}: {STAGES[stage]}" for stage in STAGES if stage > 1]
    return [
        Section("What was measured after each stage", ["after stage", *_columns(), "file"],
                measures.matrix(runs, MEASURES, "the project", FILES), notes),
        Section("What each stage brought and took", ["from stage", *steps, "file"],
                measures.differences(runs, MEASURES, FILES), said),
        _own(runs),
        _texts(folder),
        _dropped(runs),
    ]  # fmt: skip


def _own(runs: list[Run]) -> Section:
    """Return the loss of each stage on the held-out part of its own data."""
    rows = [
        [f"{run.name}, {name}", run.parameters(), run.tokens(), run.passes(), run.val("val_loss", 0), run.val("val_loss"),
         LOSSES[stage], run.file("metrics.jsonl")]
        for run, (stage, name) in zip(runs, STAGES.items())
    ]  # fmt: skip
    columns = ["stage", "parameters", "tokens", "passes", "first", "last", "the project", "file"]
    notes = ["validation loss in nats a token of each stage's own data; that of stage 4 is of responses",
             "passes: how often a stage read its data; its later tokens are not new ones (of stage 4 with padding, so about)",
             "the project's losses are of training, and of other data: 0.70 is its lowest"]  # fmt: skip
    return Section("Loss of each stage on its own data", columns, rows, notes)


def _texts(folder: Path) -> Section:
    """Return which texts were held out, and how."""
    rows = [
        [_TEXTS[domain], known["from"], known["kept_out"], f"{known['documents']:,}", f"{known['bytes'] / 1e3:.1f}",
         f"{held_out.FOLDER}/{domain}.jsonl"]
        for domain, known in held_out.read_about(folder).items()
    ]  # fmt: skip
    columns = ["domain", "from", "why no stage trains on it", "documents", "kB", "file"]
    notes = ["all five were written before the first step; besides, every build drops what has 13 words in a row in common "
             "with one of them (data.decontaminate)"]  # fmt: skip
    return Section("Texts that were held out of all stages", columns, rows, notes, names=3)


def _dropped(runs: list[Run]) -> Section:
    """Return how many documents the builds dropped, as they had words of a held-out text or of a benchmark."""
    rows = []
    for run in runs:
        data = RunDirectory(run.path).data
        try:
            found = list(Ledger.read(data).rows.values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        read, dropped = (sum(row["read"][0] for row in found),
                         sum(row["dropped"].get("benchmark", [0])[0] for row in found))  # fmt: skip
        rows.append([run.name, f"{read:,}", f"{dropped:,}", run.file(f"{data.name}/ledger.json")])
    return Section("Documents that were dropped for words of a held-out text or a benchmark",
                   ["run", "read", "dropped", "file"], rows)  # fmt: skip


def pictures(folder: Path) -> list[Picture]:
    """Return the heat map."""
    title = f"Study 004: {TITLE[0].lower()}{TITLE[1:]}"
    stages = [(f"after {stage},", name) for stage, name in STAGES.items()]
    found = measures.heat_map(_runs(folder), MEASURES, stages, title, FILES)
    return [] if found is None else [found]


def runs_by_plot(folder: Path) -> dict[str, list[str]]:
    """Return the runs whose curves are drawn together, by the name of the plot."""
    return {"the stages": [f"stage-{stage}" for stage in STAGES]}


STUDY = Study("004", TITLE, plan, sources, sections, runs_by_plot, pictures=pictures, prepare=prepare)
