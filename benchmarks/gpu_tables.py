"""The results of gpu.py as Markdown."""

from __future__ import annotations

from typing import Any

from child import short

Results = dict[str, Any]

CLAIMS = {  # of the scaling study behind code-50m, in its own words
    "perplexity after fine-tuning": "about 2.16 (150M), 2.12 (225M)",
    "syntax": "100% (225M, fine-tuned)",
    "fall of the loss on responses": "44% over three epochs (150M)",
}


def markdown(results: Results) -> str:
    """Return all results as tables."""
    from machine import phrase

    lines = [f"On {phrase(results['machine'])}, {results['seconds']:.0f} s."]
    if results["toy"]:
        lines.append("\n**Toy sizes: this shows that all of it works, and measures nothing.**")
    tables = {"right": right, "fast": fast, "decoding": decoding, "real": real}
    for name, found in results["sections"].items():
        lines += ["", f"## {name}", ""]
        if "failed" in found:
            lines += [f"Failed: {short(found['failed'])}", ""]
        try:
            lines += tables[name](found)
        except (KeyError, TypeError, ValueError) as e:  # only a part of the section was done
            lines.append(f"Incomplete ({type(e).__name__}: {e}).")
    return "\n".join(lines).rstrip() + "\n"


def verdict(found: Results) -> list[str]:
    """Return what failed, a text for each section or part; empty if all passed."""
    bad = [f"{name}: {section['failed']}" for name, section in found.items() if "failed" in section]
    for part, counted in found.get("right", {}).get("parts", {}).items():
        bad += [f"right, {part}: {test}: {why}" for test, why in counted["failures"].items()]
    for shape, measured in found.get("fast", {}).get("shapes", {}).items():
        bad += [f"fast, {shape}: {measured['failed']}"] if "failed" in measured else []
    for run, trained in found.get("real", {}).get("runs", {}).items():
        bad += [f"real, {run}: {trained['failed']}"] if "failed" in trained else []
        if trained.get("evaluation", "done") != "done":
            bad.append(f"real, {run}: evaluation: {trained['evaluation']}")
    return [short(text) for text in bad]


def right(found: Results) -> list[str]:
    """Return the counts of the tests, the failures, and what tests have found out."""
    lines = ["| tests | passed | failed | skipped | s |", "| --- | ---: | ---: | ---: | ---: |"]
    failures, said = [], []
    for part, counted in found["parts"].items():
        lines.append(
            f"| {part} | {counted['passed']} | {counted['failed']} | {counted['skipped']} | {counted['seconds']:.0f} |"
        )
        failures += [f"- **{part}**, {test}: {short(why)}" for test, why in counted["failures"].items()]
        said += [(test, kept) for test, kept in counted["said"].items()]
    worst: dict[str, list[float]] = {}
    resumed = []
    for test, kept in said:
        if "errors" in kept:  # test_...[compiled-bf16-demo]
            how = "-".join(test.partition("[")[2].rstrip("]").split("-")[:2])
            errors = [float(e) for e in kept["errors"].split()]
            worst[how] = [max(pair) for pair in zip(worst.get(how, [0.0] * 3), errors)]
        if "same bits" in kept:
            precision, _, deterministic = test.partition("[")[2].rstrip("]").partition("-")
            how = "deterministic kernels" if deterministic == "True" else "the usual kernels"
            resumed.append(f"| {precision}, {how} | {kept['same bits']} | {kept['loss'].replace(' ', ' and ')} |")
    if worst:
        lines += ["", "Largest errors beside float64 on the CPU, over all shapes:", ""]
        lines += ["| | logits | loss | gradient |", "| --- | ---: | ---: | ---: |"]
        lines += [f"| {how} | {' | '.join(f'{e:.1e}' for e in errors)} |" for how, errors in worst.items()]
    if resumed:
        lines += ["", "Stopped by SIGTERM and resumed, beside a run that was not:", ""]
        lines += ["| | the same bits | last validation losses |", "| --- | --- | --- |", *sorted(resumed)]
    return [*lines, *(["", "Failures:", "", *failures] if failures else [])]


def fast(found: Results) -> list[str]:
    """Return speed, share of the peak and memory of each shape, and what a step spends its time on."""
    lines = [
        "| shape | ours, tokens/s | of the peak | rows | GiB | transformers, tokens/s | rows | GiB | times as fast | idle |"
    ]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    spent, notes, ways = [], [], set()
    for shape, measured in found["shapes"].items():
        sides = measured.get("sides", {})
        for side, way in sides.items():
            if "about" in way:
                about = way["about"]
                if about["smaller_because"]:
                    notes.append(
                        f"- `{shape}`, {side}: {about['rows']} rows, as twice that: {about['smaller_because']}"
                    )
                how = "compiled" if about["compiled"] else "not compiled"
                ways.add(f"{side.partition(',')[0]} in {about['precision']}, {how}")
        if "failed" in measured or "times" not in measured:
            notes.append(f"- `{shape}`: failed: {short(measured.get('failed', 'it was cut off'))}")
            continue
        ours, theirs, profile = sides["ours"], sides["transformers"], measured.get("profile", {})
        idle = profile.get("idle_share")
        lines.append(
            f"| `{shape}` | {ours['tokens_per_s']:,.0f} | {ours['share_of_peak']:.0%} | {ours['rows']} | "
            f"{ours['peak_bytes'] / 2**30:.1f} | {theirs['tokens_per_s']:,.0f} | {theirs['rows']} | "
            f"{theirs['peak_bytes'] / 2**30:.1f} | {measured['times']:.2f} | {'-' if idle is None else f'{idle:.0%}'} |"
        )
        kinds = ", ".join(f"{kind} {share:.0%}" for kind, share in profile.get("kinds", {}).items())
        spent.append(f"- `{shape}`: {kinds or profile.get('failed', 'not known')}")
        whole = sides.get("ours, whole", {})
        if "tokens_per_s" in whole:
            notes.append(
                f"- `{shape}`, compiled as a whole: {whole['tokens_per_s']:,.0f} tokens/s at {whole['rows']} rows"
            )
        peak = measured["peak"]
        notes.append(f"- `{shape}`: peak {peak['flops'] / 1e12:.1f} TFLOP/s at {' x '.join(map(str, peak['sizes']))}")
    return [*lines, "", f"{'; '.join(sorted(ways))}.", "", "Where the time of a step goes:", "", *spent, "", *notes]


def decoding(found: Results) -> list[str]:
    """Return tokens a second of each batch."""
    lines = [f"In {found['precision']}.", "", "| batch | ours, tokens/s | transformers, tokens/s | times as fast |"]
    lines.append("| ---: | ---: | ---: | ---: |")
    for n_rows, measured in found["batches"].items():
        rates = measured["tokens_per_s"]
        lines.append(f"| {n_rows} | {rates['ours']:,.0f} | {rates['transformers']:,.0f} | {measured['times']:.2f} |")
    return lines


def real(found: Results) -> list[str]:
    """Return what the runs have learnt, beside what the study claims."""
    runs = found["runs"]
    compiled = any(run.get("compiled") for run in runs.values())
    how = f"{'compiled' if compiled else 'not compiled'}; code run: {found['sandbox']}"
    lines = [f"Each trained for {found['train_s']:.0f} s by the clock, {how}.", ""]
    lines += ["| | " + " | ".join(f"`{name}`" for name in runs) + " | the study says |"]
    lines += ["| --- | " + "---: | " * len(runs) + "--- |"]
    rows: dict[str, dict[str, str]] = {}
    for name, run in runs.items():
        cells: dict[str, str] = {}
        if "failed" in run:
            cells["failed"] = short(run["failed"]).replace("|", "/")
        for key, label, form in (
            ("tokens", "tokens", "{:,}"),
            ("tokens_per_s", "tokens/s", "{:,.0f}"),
            ("skipped_steps", "steps skipped", "{}"),
            ("perplexity", "perplexity, held-out", "{:.2f}"),
            ("eval_bits_per_byte", "bits per byte, held-out", "{:.3f}"),
        ):
            if key == "perplexity" and "val_loss_before" in run:
                label = "perplexity after fine-tuning"
            if run.get(key) is not None:
                cells[label] = form.format(run[key])
        if "val_loss_before" in run:
            cells["fall of the loss on responses"] = f"{1 - run['val_loss'] / run['val_loss_before']:.0%}"
        if (syntax := run.get("syntax")) and syntax["samples"]:
            cells["syntax"] = f"{syntax['passes'] / syntax['samples']:.0%}"
            cells["syntax, not trivial"] = f"{syntax['non_trivial'] / syntax['samples']:.0%}"
        for benchmark, pass_at in run.get("pass_at", {}).items():
            for k, value in pass_at.items():
                cells[f"pass@{k}, {benchmark}"] = f"{value:.1%}"
        for label, cell in cells.items():
            rows.setdefault(label, {})[name] = cell
    for label, named in rows.items():
        claim = CLAIMS.get(label, "")
        lines.append(f"| {label} | " + " | ".join(named.get(name, "-") for name in runs) + f" | {claim} |")
    return lines
