"""Sections of a report: training, quality, cost, search, analysis; each is None where its file is not there."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..core.storage import read_json
from ..errors import FileError
from ..evaluation.costs import ORIGINAL, PARTS, Benchmark
from ..evaluation.protocol import group_by_protocol, protocol_differences
from ..search.planner import Survey
from ..training.metrics_log import METRICS_LOG
from .charts import Lines, draw_bars, draw_front, draw_losses, draw_ratios, draw_site_errors
from .run_folder import ANALYSIS, BENCHMARK, GRAFT, SCORES, SURVEY, RunFolder, explained

# Of the measures that a run may have, the one that people quote first.
_FIRST_MEASURES = ("fid", "frechet_distance", "geneval", "denoising_loss")
_MOST_CHOICES = 40


def describe_training(run: RunFolder) -> dict[str, Any] | None:
    """Return the curves of both stages and the error that was left at every site; None without any."""
    with explained(run, METRICS_LOG):
        stage_one = [row for row in run.metrics if row["stage"] == "one" and row.get("sites")]
        stage_two = [row for row in run.metrics if row["stage"] == "two" and "loss" in row]
        charts = {}
        held_out: Lines = {}
        if stage_one:
            held_out = _held_out_by_site(stage_one)
            charts["sites"] = draw_site_errors(_by_site(stage_one), held_out)
        if stage_two:
            losses = [(row["step"], row["loss"]) for row in stage_two]
            charts["losses"] = draw_losses(losses, _distinct(row.get("held_out") for row in stage_two))
    with explained(run, GRAFT):
        sites = _site_errors(run.description.get("history") or [])
    if not charts and not sites:
        return None
    has_held_out = any("held_out" in row for row in stage_two)
    return {
        **charts,
        "errors": sites,
        "has_held_out": has_held_out,
        "has_held_out_sites": any(held_out.values()),
        "costs": _costs(run),
    }


def _by_site(rows: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    errors: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for site, values in row["sites"].items():
            errors.setdefault(site, []).append((row["step"], values["error"]))
    return errors


def _held_out_by_site(rows: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    evaluations: dict[str, list[dict[str, Any] | None]] = {}
    for row in rows:
        for site, values in row["sites"].items():
            evaluations.setdefault(site, []).append(values.get("held_out"))
    return {site: _distinct(values, name="error") for site, values in evaluations.items()}


def _distinct(evaluations: Iterable[dict[str, Any] | None], name: str = "loss") -> list[tuple[float, float]]:
    """Return (step, value) of evaluations: one is repeated in every row until the next."""
    by_step = {one["step"]: one[name] for one in evaluations if one}
    return list(by_step.items())


def _site_errors(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the error that stage one left at every site, with its share of the largest one."""
    errors: dict[str, tuple[float, bool]] = {}
    for stage in history:
        for row in stage.get("sites") or []:
            # what a part has not learned from says more than what it has
            held_out = row.get("held_out_error")
            errors[row["site"]] = (row["relative_error"], False)
            if held_out is not None:
                errors[row["site"]] = (held_out, True)
    largest = max((error for error, _ in errors.values()), default=0) or 1
    rows = []
    for site, (error, is_held_out) in errors.items():
        rows.append({"site": site, "error": error, "share": error / largest, "is_held_out": is_held_out})
    return rows


def _costs(run: RunFolder) -> list[dict[str, Any]]:
    """Return steps, samples and time of each stage, the last run of each."""
    rows = {}
    for stage in run.description.get("history") or []:
        if "stage" in stage:
            names = ("stage", "steps", "samples", "seconds", "hardware")
            rows[stage["stage"]] = {name: stage.get(name) for name in names}
    return list(rows.values())


def describe_scores(run: RunFolder) -> list[dict[str, Any]]:
    """Return a table for all scores of one protocol; scores of different ones are not compared."""
    tables = []
    with explained(run, SCORES):
        groups = group_by_protocol({name: row.get("protocol") or {} for name, row in run.scores.items()})
        for group in groups:
            states = {name: run.scores[name] for name in group}
            # states may have been measured by different metrics
            columns: dict[str, None] = {}
            for row in states.values():
                columns |= dict.fromkeys(row["values"])
            rows = []
            for name, row in states.items():
                values = [_number(row["values"].get(column)) for column in columns]
                rows.append({"name": name, "values": values, "is_original": name == ORIGINAL})
            tables.append({"columns": [column.replace("_", " ") for column in columns], "rows": rows})
    return tables


def describe_protocols(run: RunFolder) -> list[dict[str, Any]]:
    """Return each protocol of the scores with the states that it was measured by, settings under dotted names."""
    protocols: list[dict[str, Any]] = []
    with explained(run, SCORES):
        for name, row in run.scores.items():
            settings = _flatten(row.get("protocol") or {})
            # most states of one run share their protocol, which is shown once
            known = [one for one in protocols if one["settings"] == settings]
            if known:
                known[0]["names"].append(name)
            elif settings:
                protocols.append({"names": [name], "settings": settings})
    return protocols


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat


def describe_costs(run: RunFolder) -> dict[str, Any] | None:
    """Return the table of costs, its break-even in words and the ratios over several sizes; None without any."""
    path = run.find(BENCHMARK)
    if path is None:
        return None
    benchmark = _load_benchmark(path)
    with explained(run, BENCHMARK):
        rows = [_cost_row(row) for row in benchmark]
        ratios: dict[str, list[tuple[float, float, float, float]]] = {}
        for row in benchmark:
            # one line a graft: the smallest batch, run as it stands
            is_plain = row.get("batch_size", 1) == benchmark[0].get("batch_size", 1) and not row.get("compiled")
            if row["name"] != ORIGINAL and is_plain:
                point = (row["tokens"], row["ratio"], row["low"], row["high"])
                ratios.setdefault(row["name"], []).append(point)
        chart = None
        # a single size is a number, and the table has it
        if any(len(points) > 1 for points in ratios.values()):
            chart = draw_ratios(ratios)
        warnings = dict.fromkeys(one.warning for one in benchmark.break_even if one.warning)
        return {
            "rows": rows,
            "break_even": [*map(str, benchmark.break_even), *warnings],
            "chart": chart,
            "pipeline": [_pipeline_row(row) for row in benchmark.pipeline],
            "parts": [name.replace("_", " ") for name in PARTS],
            "protocol": _flatten(benchmark.protocol),
            "has_memory": any(row["memory"] for row in rows),
            "has_batches": len({row["batch_size"] for row in rows}) > 1,
            "has_compiled": len({row["compiled"] for row in rows}) > 1,
        }


def _load_benchmark(path: Path) -> Benchmark:
    """Read a benchmark. Raises `FileError` with the name of a file that is none."""
    try:
        return Benchmark.load(path)
    except FileError as error:
        raise FileError(f"{path} cannot be shown: {error}") from error


def _pipeline_row(row: dict[str, Any]) -> dict[str, Any]:
    parts = [f"{row[name]:.4g}" for name in PARTS]
    return {"name": row["name"], "milliseconds": f"{row['milliseconds']:.4g}", "parts": parts}


def _cost_row(row: dict[str, Any]) -> dict[str, Any]:
    # older rows, and those of a CPU, say nothing of some columns
    memory = ""
    if row.get("peak_memory") is not None:
        memory = f"{row['peak_memory'] / 1e6:,.1f} MB"
    compiled = "eager"
    if row.get("compiled"):
        compiled = "compiled"
    return {
        "tokens": f"{row['tokens']:,}",
        "name": row["name"],
        "is_original": row["name"] == ORIGINAL,
        "batch_size": row.get("batch_size", 1),
        "compiled": compiled,
        "parameters": _count(row["parameters"]),
        "flops": _count(row["flops"]),
        "milliseconds": f"{row['milliseconds']:.4g}",
        "ratio": f"{row['ratio']:.2f}",
        "spread": f"{row['low']:.2f} to {row['high']:.2f}",
        "memory": memory,
    }


def describe_survey(run: RunFolder) -> dict[str, Any] | None:
    """Return the front of harm against each measure, with the plan that was made; None without a survey."""
    path = run.find(SURVEY)
    if path is None:
        return None
    survey = Survey.load(path)
    chosen = _predicted(run, survey)
    figures = None
    if chosen is not None:
        figures = {name: _number(value) for name, value in chosen.items()}
    charts = []
    for measure, words in (("latency", "latency"), ("flops", "FLOPs")):
        choices = [(1 - choice.saved[measure], choice.harm) for choice in survey.choices]
        # a measure that no choice changes has no front
        if all(abs(share - 1) < 1e-9 for share, _ in choices):
            continue
        point = None
        if chosen is not None:
            point = (chosen[measure], chosen["harm"])
        charts.append({"measure": words, "chart": draw_front(survey.front(measure), choices, point, words)})
    table = survey.to_table()
    return {
        "charts": charts,
        "heading": table.heading,
        "rows": table.rows[:_MOST_CHOICES],
        "count": len(table.rows),
        "chosen": figures,
    }


def _predicted(run: RunFolder, survey: Survey) -> dict[str, float] | None:
    """Return what the survey says of the plan that was made, None where that has other edits."""
    by_row = {}
    for number, choice in enumerate(survey.choices):
        by_row[choice.edit.site.path, choice.edit.config.owner.name] = number
    edits = run.plan.get("edits") or []
    chosen = []
    for edit in edits:
        choice = by_row.get((edit["site"]["path"], edit["operator"]))
        if choice is None:
            return None
        chosen.append(choice)
    if not chosen:
        return None
    return survey.predict(chosen)


def describe_analysis(run: RunFolder) -> dict[str, Any] | None:
    """Return charts of locality, of the activations' variance and of what blocks change; None without an analysis."""
    path = run.find(ANALYSIS)
    if path is None:
        return None
    data = read_json(path)
    with explained(run, ANALYSIS):
        charts = []
        localities = data.get("localities") or []
        for name, words in (("band", "a band of the raster order"), ("neighborhood", "a window of the grid")):
            shares = [_mean_of(row[name]) for row in localities]
            if shares:
                caption = f"Share of each attention's mass within {words}. Dashed: if attention were uniform."
                names = [_layer_of(row["site"]) for row in localities]
                uniform = localities[0][f"uniform_{name}"]
                charts.append(
                    {"caption": caption, "chart": draw_bars(shares, names, reference=uniform, label="attention")}
                )
        activations = [row for row in data.get("activations") or [] if any(row["buckets"])]
        # of one kind, since the scales of attentions and feed-forwards differ
        of_kind = [row for row in activations if row["site"].startswith(activations[0]["site"].partition("[")[0])]
        if of_kind:
            variances = []
            for row in of_kind:
                # a bucket of timesteps that no sample fell into is empty
                measured = [bucket["variance"] for bucket in row["buckets"] if bucket]
                variances.append(statistics.fmean(measured))
            names = [_layer_of(row["site"]) for row in of_kind]
            kind = of_kind[0]["site"].partition("[")[0].replace("_", " ")
            chart = draw_bars(variances, names, reference=None, label=kind)
            charts.append({"caption": f"Variance of what each {kind} gives.", "chart": chart})
        blocks = []
        for row in data.get("blocks") or []:
            if any(one is not None for one in row["similarity"]):
                blocks.append(row)
        if blocks:
            changes = [1 - _mean_of(row["similarity"]) for row in blocks]
            chart = draw_bars(changes, list(map(str, range(len(blocks)))), reference=None, label="block")
            charts.append({"caption": "How far each block turns its input: 1 - cosine similarity.", "chart": chart})
        # an analysis of a model without such parts measures nothing
        if not charts:
            return None
        return {"charts": charts}


def _layer_of(site: str) -> str:
    return site.partition("[")[2].rstrip("]")


def _mean_of(values: Any) -> float:
    """Return the mean over timestep buckets, and heads in them, of those that were measured."""
    flat: list[float] = []
    for value in values:
        if isinstance(value, list):
            flat += value
        elif value is not None:
            flat.append(value)
    return statistics.fmean(flat)


def key_figures(run: RunFolder, edits: dict[str, Any] | None) -> list[dict[str, str]]:
    """Return what the report shows in large figures at its top."""
    figures = []
    if edits is not None:
        layers = sum(row["layers"] for row in edits["rows"] if row["replaced"])
        replaced = sum(row["replaced"] for row in edits["rows"])
        kinds = " and ".join(row["kind"] for row in edits["rows"] if row["replaced"])
        figures.append({"value": f"{replaced} of {layers}", "words": f"{kinds} replaced"})
    figures += _quality_figures(run) + _cost_figures(run)
    return figures


def _quality_figures(run: RunFolder) -> list[dict[str, str]]:
    """Return the first measure of the grafted model, beside the original's."""
    with explained(run, SCORES):
        graft_rows = [row for name, row in run.scores.items() if name != ORIGINAL]
        if not graft_rows:
            return []
        original_row = run.scores.get(ORIGINAL, {})
        original = original_row.get("values", {})
        protocols = {ORIGINAL: original_row.get("protocol") or {}, "grafted": graft_rows[-1].get("protocol") or {}}
        if protocol_differences(protocols):
            original = {}
        grafted = [row["values"] for row in graft_rows]
        names = [name for name in (*_FIRST_MEASURES, *grafted[-1]) if name in grafted[-1]]
        if not names:
            return []
        words = names[0].replace("_", " ")
        if names[0] in original:
            words += f", original {_number(original[names[0]])}"
        return [{"value": _number(grafted[-1][names[0]]), "words": words}]


def _cost_figures(run: RunFolder) -> list[dict[str, str]]:
    """Return time and FLOPs of the last graft at the largest size, relative to the original's."""
    path = run.find(BENCHMARK)
    if path is None:
        return []
    rows = _load_benchmark(path)
    with explained(run, BENCHMARK):
        grafted = [row for row in rows if row["name"] != ORIGINAL]
        if not grafted:
            return []
        row = max(grafted, key=lambda one: one["tokens"])
        figures = [{"value": f"{row['ratio']:.2f}×", "words": f"the original's time at {row['tokens']:,} tokens"}]
        originals = [one for one in rows if one["name"] == ORIGINAL and one["tokens"] == row["tokens"]]
        if originals and originals[0]["flops"]:
            figures.append({"value": f"{row['flops'] / originals[0]['flops']:.2f}×", "words": "the original's FLOPs"})
        return figures


def _count(value: float) -> str:
    """Return a large number with the prefix of its size."""
    # four digits and a prefix are read faster than nine digits
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g} {prefix}"
    return f"{value:.4g}"


def _number(value: Any) -> str:
    """Return a cell: four digits of a number, nothing for what was not measured."""
    if value is None:
        return ""
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}"
