"""What a person sees of evaluations: a table of one report, and one of several."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from contextual_cnn.contracts import by_stage


def report_table(name: str, report: Mapping[str, Any]) -> Table:
    """The figures of one checkpoint; the title has what is unusual about the data.

    Args:
        name: of the model.
    """
    table = Table(title=_title(name, report))
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("top-1", f"{report['top1']:.2f} %")
    table.add_row("its 95 % confidence interval", _spell(report["top1_interval"]))
    table.add_row("top-5", f"{report['top5']:.2f} %")
    for stage, recall in by_stage(report, "recall").items():
        table.add_row(f"true class on the shortlist after stage {stage}", f"{recall:.2f} %")
    if "control" in report:
        contexts = _contexts(report["control"])
        table.add_row(f"top-1 with {contexts}", f"{report['controlled_top1']:.2f} %")
        table.add_row("answers that this changes", f"{report['controlled_answers']:.2f} %")
        table.add_row("change of the logits, share of their spread", f"{report['controlled_logits']:.2f} %")
    if "real_top1" in report:
        table.add_row(f"top-1 by ReaL, {report['real_images']} images with a label", f"{report['real_top1']:.2f} %")
        table.add_row("its 95 % confidence interval", _spell(report["real_top1_interval"]))
    table.add_row("mean F1 of the classes", f"{report['mean_f1']:.2f} %")
    table.add_row("cross-entropy", f"{report['loss']:.4f}")
    table.add_row("calibration error (ECE, 15 bins)", f"{report['calibration_error']:.2f} %")
    table.add_row("classes to choose from", f"{report['classes']}")
    table.add_row("images, each counted once", f"{report['images']}")
    if report["bad_images"]:
        table.add_row("of them bad, counted as wrong", f"{report['bad_images']}")
    table.add_row("images/s", f"{report['images_per_second']:.0f}")
    table.add_row("loader", report["loader"])
    return table


def ranking(reports: Sequence[Mapping[str, Any]]) -> Table:
    """Several checkpoints, the best first."""
    table = Table(title=f"{len(reports)} checkpoints")
    table.add_column("checkpoint", overflow="fold")
    for name in ("weights", "top-1", "95 % interval", "top-5", "step"):
        table.add_column(name, justify="right")
    for report in sorted(reports, key=lambda report: report["top1"], reverse=True):
        scores = (f"{report['top1']:.2f}", _spell(report["top1_interval"]), f"{report['top5']:.2f}")
        checkpoint = escape(report["checkpoint"]) + (" (NOISE)" if report["noise"] else "")
        table.add_row(checkpoint, report["weights"], *scores, f"{report['step']}")
    return table


def _title(name: str, report: Mapping[str, Any]) -> str:
    lines = [f"{name}, {report['weights']} weights of {report['checkpoint']}"]
    if report["noise"]:
        lines.insert(0, "NOISE INSTEAD OF IMAGES")
    if report["differences"]:
        keys = ", ".join(f"data.{key}={value}" for key, value in report["differences"].items())
        lines.append(f"not the run's own val split: {keys}")
    if report.get("views"):
        lines.append(", ".join(f"clip.{key}={value}" for key, value in report["views"].items()))
    return escape("\n".join(lines))


def _contexts(control: Mapping[str, Any]) -> str:
    kind = {"swap": "other images' contexts", "mean": "the mean context", "zero": "no context"}[control["context"]]
    stages = control["stages"]
    return f"{kind} in stage{'s' * (len(stages) > 1)} {', '.join(map(str, stages))}" if stages else kind


def _spell(interval: Sequence[float]) -> str:
    return f"{interval[0]:.2f} .. {interval[1]:.2f} %"
