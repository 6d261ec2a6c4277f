"""Grafana's boards, made by code: `python -m tests.web.boards` writes deploy/monitoring/grafana/boards anew.

A board is a list of rows of panels; a panel is a list of (expression, legend). What is shown and how it is computed stands
here; ids, places and the JSON are the library's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import (
    common,
    dashboard,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as looks
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from tests.source_tree import ROOT

FOLDER = ROOT / "deploy" / "monitoring" / "grafana" / "boards"
SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
WIDTH = 24
ONE = 'run="$run"'


@dataclass(frozen=True)
class Panel:
    """One panel.

    `shape` is `lines`, `stack`, `stat`, `table` or `states`; `marks` are (from value, colour). `columns` of a table are
    (label, or letter of a query; title; unit); the first one is the label by which queries are joined.
    """

    title: str
    queries: Sequence[tuple[str, str]]
    unit: str = "short"
    shape: str = "lines"
    width: int = 8
    height: int = 8
    says: str = ""
    marks: Sequence[tuple[float, str]] = ()
    words: dict[str, tuple[str, str]] = field(default_factory=dict)
    columns: Sequence[tuple[str, str, str]] = ()


@dataclass(frozen=True)
class Board:
    """One board; `variables` are (name, metric, label)."""

    name: str
    title: str
    says: str
    rows: Sequence[tuple[str, Sequence[Panel]]]
    variables: Sequence[tuple[str, str, str]] = ()
    since: str = "now-6h"


def figure(title: str, expression: str, unit: str = "short", **more: Any) -> Panel:
    """A panel of one number."""
    return Panel(title, [(expression, "")], unit, "stat", **{"width": 4, "height": 4} | more)


def of_run(title: str, metric: str, unit: str = "short", legend: str = "", **more: Any) -> Panel:
    """A panel of a metric of the board's run."""
    return Panel(title, [(f"{metric}{{{ONE}}}", legend or title)], unit, **more)


def on_off(title: str, expression: str, good: str = "1", **more: Any) -> Panel:
    """A panel that says yes or no; red where the answer isn't `good`."""
    bad = "0" if good == "1" else "1"
    words = {good: ("yes" if good == "1" else "no", "green"), bad: ("no" if good == "1" else "yes", "red")}
    return figure(title, expression, words=words, **more)


FLEET = Board(
    "fleet", "megaray: fleet", "All runs and nodes of a home.",
    [
        ("Now", [
            on_off("Controller turns", "megaray_controller_up"),
            figure("Runs running", "megaray:runs:running"),
            figure("Runs waiting", "megaray_queue_waiting_runs"),
            figure("Slots taken", "max(megaray:slots:used_ratio)", "percentunit"),
            figure("Time that trained (ETTR)", "megaray:fleet:ettr_ratio", "percentunit",
                   marks=[(0, "red"), (0.9, "orange"), (0.95, "green")],
                       says="Effective training time over wall time without idle, all runs."),
            figure("Alerts firing", 'count(ALERTS{alertname=~"Megaray.+",alertstate="firing"}) or vector(0)', marks=[(0,
                "green"), (1, "red")]),
        ]),
        ("Runs", [
            Panel("Runs", [
                ("megaray_run_state == 1", ""),
                ("megaray:run:progress_ratio", ""),
                ("megaray_run_loss_nats", ""),
                ("megaray_run_tokens_per_second", ""),
                ("megaray_run_mfu_ratio", ""),
                ("megaray_run_ettr_ratio", ""),
                ("megaray_run_expected_end_timestamp_seconds * 1000", ""),
                ("megaray_run_open_incidents", ""),
            ], shape="table", width=24, columns=[
                ("run", "run", ""), ("state", "state", ""), ("B", "done", "percentunit"), ("C", "loss", ""), ("D",
                    "tokens/s", "short"),
                ("E", "MFU", "percentunit"), ("F", "ETTR", "percentunit"), ("G", "done at", "dateTimeAsIso"), ("H",
                    "open incidents", ""),
            ]),
            Panel("State of each run", [('max by (run) (megaray_run_state{state="running"} * 3 or megaray_run_state'
                  '{state=~"recovering|placing|starting"} * 2 or megaray_run_state{state="queued"})', "{{run}}")],
                      shape="states", width=24,
                  words={"0": ("other", "text"), "1": ("queued", "blue"), "2": ("on its way", "orange"), "3": ("running",
                      "green")}),
            Panel("Runs by state", [("megaray_runs > 0", "{{state}}")], shape="stack"),
            Panel("Tokens per second", [("megaray_run_tokens_per_second", "{{run}}")]),
            Panel("Time that doesn't train", [("megaray:run:badput_ratio", "{{run}}")], "percentunit"),
        ]),
        ("Nodes", [
            Panel("Nodes", [
                ("megaray_node_up", ""), ("sum by (node) (megaray_node_free_slots)", ""),
                    ("sum by (node) (megaray_node_slots)", ""),
                ("megaray_node_barred", ""), ("megaray_node_cordoned", ""), ("megaray_node_suspicion", ""),
                    ("megaray_node_faults", ""),
                ("megaray_node_departures", ""),
            ], shape="table", width=24, columns=[
                ("node", "node", ""), ("A", "up", ""), ("B", "free slots", ""), ("C", "slots", ""), ("D", "barred", ""),
                    ("E", "cordoned", ""),
                ("F", "suspicion", ""), ("G", "faults", ""), ("H", "departures", ""),
            ]),
            Panel("Free slots", [("sum by (resource) (megaray_node_free_slots)", "{{resource}}")]),
            Panel("Processors", [("ray_node_cpu_utilization", "{{ip}}")], "percent"),
            Panel("Memory in use", [("ray_node_mem_used / (ray_node_mem_total > 0)", "{{ip}}")], "percentunit"),
        ]),
        ("The dashboard itself", [
            Panel("Age of what it has read", [("time() - megaray_dashboard_read_timestamp_seconds", "seconds")], "s"),
            Panel("Seconds to read", [("megaray_dashboard_turn_seconds", "seconds")], "s"),
            Panel("Lines of logs that can't be read", [("megaray_damaged_lines", "lines")]),
        ]),
    ],
)  # fmt: skip

RUN = Board(
    "run", "megaray: run", "One run: progress, speed, checkpoints and where its time went.",
    [
        ("Now", [
            Panel("State", [(f"megaray_run_state{{{ONE}}} == 1", "{{state}}")], shape="stat", width=4, height=4,
                  words={"1": ("", "blue")}, says="The name of the state is the series' name."),
            figure("Done", f"megaray:run:progress_ratio{{{ONE}}}", "percentunit"),
            figure("Done at", f"megaray_run_expected_end_timestamp_seconds{{{ONE}}} * 1000", "dateTimeAsIso"),
            figure("Time that trained (ETTR)", f"megaray_run_ettr_ratio{{{ONE}}}", "percentunit",
                   marks=[(0, "red"), (0.9, "orange"), (0.95, "green")]),
            figure("Since the newest step", f"megaray:run:since_progress_seconds{{{ONE}}}", "s"),
            figure("Since the newest checkpoint", f"megaray:run:since_checkpoint_seconds{{{ONE}}}", "s"),
        ]),
        ("Training", [
            Panel("Loss (nats per token)", [(f"megaray_run_loss_nats{{{ONE}}}", "training"),
                                            (f"megaray_run_validation_loss_nats{{{ONE}}}", "held out")]),
            of_run("Gradient norm before clipping", "megaray_run_gradient_norm"),
            of_run("Learning rate", "megaray_run_learning_rate", "sci"),
            of_run("Step", "megaray_run_step"),
            on_off("Loss is finite", f"megaray_run_loss_finite{{{ONE}}}", width=8, height=8),
            of_run("Steps in which nothing moved", "megaray_run_skipped_steps"),
        ]),
        ("Speed", [
            of_run("Tokens per second", "megaray_run_tokens_per_second"),
            of_run("MFU", "megaray_run_mfu_ratio", "percentunit"),
            Panel("Seconds per step", [(f"megaray_run_step_seconds{{{ONE}}}", "step"),
                  (f"quantile_over_time(0.5, megaray_run_step_seconds{{{ONE}}}[1h])", "median of an hour")], "s"),
            Panel("Phases of a step, the slowest rank's", [(f"megaray_run_phase_seconds{{{ONE}}}", "{{phase}}")], "s",
                "stack"),
            of_run("Peak memory of any rank", "megaray_run_memory_bytes", "bytes"),
            of_run("Steps per second, counting those trained again", "megaray:run:steps_per_second"),
        ]),
        ("Where its time went", [
            Panel("Parts of the wall time", [(f"megaray:run:part_ratio{{{ONE}}}", "{{part}}")], "percentunit", "stack",
                width=16),
            Panel("Seconds by part", [(f"megaray_run_ledger_seconds{{{ONE}}}", "")], shape="table", columns=[
                ("part", "part", ""), ("A", "time", "s")]),
        ]),
        ("Checkpoints", [
            Panel("Newest checkpoint", [(f"megaray_run_checkpoint_step{{{ONE}}}", "{{tier}}"),
                (f"megaray_run_step{{{ONE}}}", "trained"),
                                        (f"megaray_run_checkpoint_due_step{{{ONE}}}", "due")]),
            Panel("What a save costs", [(f"megaray_run_checkpoint_held_seconds{{{ONE}}}", "training stood still"),
                                        (f"megaray_run_checkpoint_write_seconds{{{ONE}}}", "call to commit")], "s"),
            Panel("Saves", [(f"increase(megaray_run_checkpoints_total{{{ONE}}}[1h])", "committed in an hour"),
                            (f"megaray_run_checkpoint_failed_saves{{{ONE}}}", "failed in a row"),
                            (f"megaray_run_checkpoints_differing_total{{{ONE}}}", "whose copies differed")]),
        ]),
        ("Elsewhere", [
            Panel("Slots", [(f"megaray_run_slots{{{ONE}}}", "of the attempt"), (f"megaray_run_asked_slots{{{ONE}}}",
                "asked for")]),
            of_run("Place in the queue", "megaray_run_queue_position"),
            of_run("What W&B hasn't got", "megaray_run_wandb_behind_bytes", "bytes"),
        ]),
    ],
    [("run", "megaray_run_info", "run")],
)  # fmt: skip

EXPERTS = Board(
    "experts", "megaray: experts",
    "Balance of the experts of a run. The load of each expert over steps is a heat map of megaray's own dashboard: a label "
    "per expert would be more series than Prometheus should hold.",
    [
        ("Now", [
            figure("Balance entropy", f"megaray_run_expert_balance_entropy_ratio{{{ONE}}}", "percentunit", width=8,
                   marks=[(0, "red"), (0.8, "orange"), (0.95, "green")],
                       says="Entropy of the load over its largest; 100 % is even."),
            figure("Fullest expert over the mean", f"megaray_run_expert_load_max_over_mean_ratio{{{ONE}}}", width=8,
                   marks=[(0, "green"), (2, "orange"), (4, "red")]),
            figure("Pairs dropped in the newest step", f"megaray_run_dropped_pairs{{{ONE}}}", width=8, marks=[(0,
                "green"), (1, "orange")]),
        ]),
        ("Over time", [
            of_run("Balance entropy", "megaray_run_expert_balance_entropy_ratio", "percentunit", width=12),
            of_run("Fullest expert over the mean, worst layer", "megaray_run_expert_load_max_over_mean_ratio", width=12),
            of_run("Token-expert pairs dropped for want of capacity", "megaray_run_dropped_pairs", width=12),
            of_run("Auxiliary loss", "megaray_run_auxiliary_loss", width=12),
        ]),
        ("Whether speed follows balance", [
            Panel("Seconds per step", [(f"megaray_run_step_seconds{{{ONE}}}", "step")], "s", width=12),
            Panel("Phases", [(f"megaray_run_phase_seconds{{{ONE}}}", "{{phase}}")], "s", "stack", width=12),
        ]),
        ("All runs", [
            Panel("Balance entropy", [("megaray_run_expert_balance_entropy_ratio", "{{run}}")], "percentunit", width=12),
            Panel("Fullest expert over the mean", [("megaray_run_expert_load_max_over_mean_ratio", "{{run}}")], width=12),
        ]),
    ],
    [("run", "megaray_run_info", "run")],
)  # fmt: skip

INCIDENTS = Board(
    "incidents", "megaray: incidents", "What broke, what it cost, and what is about to.",
    [
        ("Now", [
            figure("Open incidents", "sum(megaray_run_open_incidents)", marks=[(0, "green"), (1, "red")]),
            figure("Runs parked", "sum(megaray_run_parked)", marks=[(0, "green"), (1, "red")],
                   says="The controller met an error of its own at them; their ranks continue."),
            figure("Runs whose state isn't saved", "sum(megaray_run_checkpoint_overdue)", marks=[(0, "green"), (1, "red")]),
            figure("Nodes gone", "count(megaray_node_up == 0) or vector(0)", marks=[(0, "green"), (1, "orange")]),
            figure("Nodes barred", "sum(megaray_node_barred)", marks=[(0, "green"), (1, "orange")]),
            figure("Restarts since a new checkpoint", "max(megaray_run_restarts)", marks=[(0, "green"), (1, "orange"), (3,
                "red")]),
        ]),
        ("Alerts", [
            Panel("Alerts", [('ALERTS{alertname=~"Megaray.+"}', "")], shape="table", width=24, columns=[
                ("alertname", "alert", ""), ("alertstate", "state", ""), ("severity", "severity", ""), ("run", "run", ""),
                    ("node", "node", "")]),
        ]),
        ("Incidents", [
            Panel("Incidents by cause, an hour", [("sum by (cause) (increase(megaray_run_incidents_total[1h]))",
                "{{cause}}")], shape="stack"),
            Panel("Incidents by run", [("sum by (run) (megaray_run_incidents_total)", "{{run}}")]),
            Panel("Attempts", [("megaray_run_attempts_total", "{{run}}")]),
        ]),
        ("What they cost", [
            Panel("Steps trained again", [("megaray_run_lost_steps_total", "{{run}}")]),
            Panel("Time lost to faults",
                [('sum by (part) (megaray_run_ledger_seconds{part=~"lost_work|detection|restart"})', "{{part}}")],
                  "s", "stack"),
            Panel("Time that doesn't train", [("megaray:run:badput_ratio", "{{run}}")], "percentunit", marks=[(0,
                "green"), (0.1, "red")]),
        ]),
        ("What is about to break", [
            Panel("Without a step for",
                [('megaray:run:since_progress_seconds and on (run) megaray_run_state{state="running"} == 1', "{{run}}")],
                  "s"),
            Panel("Saves that failed in a row", [("megaray_run_checkpoint_failed_saves", "{{run}}")]),
            Panel("Slower than an hour's median", [("megaray:run:step_slowdown_ratio", "{{run}}")], marks=[(0, "green"),
                (1.5, "red")]),
            Panel("Suspicion of nodes", [("megaray_node_suspicion > 0", "{{node}}")]),
            Panel("Faults and departures of nodes", [("megaray_node_faults > 0", "{{node}} faults"),
                                                     ("megaray_node_departures > 0", "{{node}} departures")]),
            Panel("Loss is finite", [("megaray_run_loss_finite", "{{run}}")], shape="states",
                  words={"0": ("not finite", "red"), "1": ("finite", "green")}),
            Panel("Copies of the state", [("megaray_run_checkpoint_copies_differ", "{{run}}")], shape="states",
                  words={"0": ("equal", "green"), "1": ("differ", "red")}),
        ]),
    ],
)  # fmt: skip

FABRIC = Board(
    "fabric", "megaray: fabric", "Nodes, network and devices; Ray's own numbers beside megaray's.",
    [
        ("Now", [
            figure("Nodes up", "sum(megaray_node_up)"),
            figure("Nodes cordoned", "sum(megaray_node_cordoned)", marks=[(0, "green"), (1, "orange")]),
            figure("Spare nodes", "sum(megaray_node_spare)"),
            figure("Findings of measurements", "sum(megaray_run_findings)", marks=[(0, "green"), (1, "orange")],
                   says="What collectives runs found slow or wrong; `python -m collectives report RUN` shows them."),
            figure("Sent by all nodes", "sum(ray_node_network_send_speed)", "Bps"),
            figure("Received by all nodes", "sum(ray_node_network_receive_speed)", "Bps"),
        ]),
        ("Network", [
            Panel("Sent by node", [("ray_node_network_send_speed", "{{ip}}")], "Bps", width=12),
            Panel("Received by node", [("ray_node_network_receive_speed", "{{ip}}")], "Bps", width=12),
            Panel("Least over mean of what nodes receive", [
                ("min(ray_node_network_receive_speed) / (avg(ray_node_network_receive_speed) > 0)", "least over mean")],
                    "percentunit", width=12,
                says="Ranks of one run exchange alike: a node far below the others has a slow link, or waits for one."),
            Panel("Steps over an hour's median", [("megaray:run:step_slowdown_ratio", "{{run}}")], width=12),
        ]),
        ("Devices", [
            Panel("GPUs busy", [("ray_node_gpus_utilization", "{{ip}} {{GpuIndex}}")], "percent"),
            Panel("GPU memory", [("ray_node_gram_used * 1024 * 1024", "{{ip}} {{GpuIndex}}")], "bytes"),
            Panel("GPU temperature", [("ray_node_gpu_temperature_celsius", "{{ip}} {{GpuIndex}}")], "celsius"),
            Panel("GPU power", [("ray_node_gpu_power_milliwatts / 1000", "{{ip}} {{GpuIndex}}")], "watt"),
            Panel("Processors", [("ray_node_cpu_utilization", "{{ip}}")], "percent"),
            Panel("Memory in use", [("ray_node_mem_used / (ray_node_mem_total > 0)", "{{ip}}")], "percentunit"),
        ]),
        ("Storage", [
            Panel("Written by node", [("ray_node_disk_io_write_speed", "{{ip}}")], "Bps"),
            Panel("Read by node", [("ray_node_disk_io_read_speed", "{{ip}}")], "Bps"),
            Panel("Seconds from the call to the commit of a save", [("megaray_run_checkpoint_write_seconds", "{{run}}")],
                "s"),
        ]),
        ("Nodes", [
            Panel("Nodes", [("megaray_node_up", ""), ("megaray_node_suspicion", ""), ("megaray_node_faults", ""),
                ("megaray_node_departures", "")],
                  shape="table", width=24, columns=[("node", "node", ""), ("A", "up", ""), ("B", "suspicion", ""), ("C",
                      "faults", ""),
                                                    ("D", "departures", "")]),
        ]),
    ],
)  # fmt: skip

BOARDS = (FLEET, RUN, EXPERTS, INCIDENTS, FABRIC)


def _marked(panel: Panel) -> dashboard.ThresholdsConfig:
    marks = panel.marks or [(0, "blue" if panel.shape == "stat" else "green")]
    steps = [
        model.Threshold(value=None if i == 0 else value, color=colour)
        for i, (value, colour) in enumerate(marks)
    ]
    return dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps)


def _words(words: dict[str, tuple[str, str]]) -> list[model.ValueMap]:
    options = {
        value: model.ValueMappingResult(text=text or None, color=colour, index=i)
        for i, (value, (text, colour)) in enumerate(words.items())
    }
    return [model.ValueMap(options=options)]


def expressions(panel: Panel) -> list[str]:
    """What a panel asks Prometheus. Tables of several queries ask by their labels: names of metrics can't be joined."""
    asked = [expression for expression, _ in panel.queries]
    if panel.shape != "table" or len(asked) == 1:
        return asked
    labels = [name for name, _, _ in panel.columns if len(name) > 1]
    by = [", ".join(labels), *[labels[0]] * (len(asked) - 1)]
    return [f"max by ({of}) ({expression})" for of, expression in zip(by, asked, strict=True)]


def _built(panel: Panel) -> Any:
    makers = {"stat": stat.Panel, "table": table.Panel, "states": statetimeline.Panel}
    made = makers.get(panel.shape, timeseries.Panel)()
    made.title(panel.title).description(panel.says).datasource(SOURCE).unit(panel.unit).height(
        panel.height
    ).span(panel.width)
    made.thresholds(_marked(panel))
    if panel.words:
        made.mappings(_words(panel.words))
    for i, (expression, (_, legend)) in enumerate(zip(expressions(panel), panel.queries, strict=True)):
        query = prometheus.Dataquery().expr(expression).ref_id(chr(ord("A") + i)).datasource(SOURCE)
        if panel.shape == "table":
            query.format(PromQueryFormat.TABLE).instant()
        elif panel.shape == "stat":
            query.instant().legend_format(legend)
        else:
            query.legend_format(legend).range()
        made.with_target(query)
    if panel.shape == "table":
        _columns(made, panel)
    elif panel.shape == "stat":
        name = looks.BigValueTextMode.NAME if panel.queries[0][1] else looks.BigValueTextMode.AUTO
        made.text_mode(name).color_mode(looks.BigValueColorMode.VALUE).graph_mode(
            looks.BigValueGraphMode.NONE
        )
        made.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    elif panel.shape != "states":
        made.legend(_legend()).fill_opacity(30 if panel.shape == "stack" else 0)
        made.tooltip(
            common.VizTooltipOptions().mode(looks.TooltipDisplayMode.MULTI).sort(looks.SortOrder.DESCENDING)
        )
        if panel.shape == "stack":
            made.stacking(common.StackingConfig().mode(looks.StackingMode.NORMAL).group("A"))
        if panel.marks:
            made.thresholds_style(
                common.GraphThresholdsStyleConfig().mode(looks.GraphTresholdsStyleMode.DASHED)
            )
    return made


def _legend() -> common.VizLegendOptions:
    return (
        common.VizLegendOptions()
        .show_legend(True)
        .display_mode(looks.LegendDisplayMode.LIST)
        .placement(looks.LegendPlacement.BOTTOM)
        .calcs([])
    )


def _columns(made: table.Panel, panel: Panel) -> None:
    """One row per value of the first column's label, with the columns named, in their order."""
    several = len(panel.queries) > 1
    fields = {
        f"Value #{name}" if several and len(name) == 1 else "Value" if len(name) == 1 else name: title
        for name, title, _ in panel.columns
    }
    if several:
        options = {"byField": panel.columns[0][0], "mode": "outer"}
        made.with_transformation(model.DataTransformerConfig(id_val="joinByField", options=options))
    made.with_transformation(
        model.DataTransformerConfig(id_val="filterFieldsByName", options={"include": {"names": list(fields)}})
    )
    made.with_transformation(
        model.DataTransformerConfig(
            id_val="organize",
            options={"indexByName": {name: i for i, name in enumerate(fields)}, "renameByName": fields},
        )
    )
    for _, title, unit in panel.columns:
        if unit:
            made.override_by_name(title, [model.DynamicConfigValue(id_val="unit", value=unit)])


def build(board: Board) -> dashboard.Dashboard:
    """A board of the library."""
    made = (
        dashboard.Dashboard(board.title)
        .uid(f"megaray-{board.name}")
        .description(board.says)
        .tags(["megaray"])
        .refresh("10s")
    )
    made.time(board.since, "now").timezone("browser").tooltip(model.DashboardCursorSync.CROSSHAIR).editable()
    made.link(
        dashboard.DashboardLink("megaray")
        .type(model.DashboardLinkType.DASHBOARDS)
        .tags(["megaray"])
        .keep_time(True)
        .include_vars(True)
    )
    made.with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    for name, metric, label in board.variables:
        query = {"query": f"label_values({metric}, {label})", "refId": "A"}
        made.with_variable(
            dashboard.QueryVariable(name).label(name).query(query).datasource(SOURCE).refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(model.VariableSort.ALPHABETICAL_DESC)
        )  # fmt: skip
    made.annotation(
        dashboard.AnnotationQuery().name("Alerts").datasource(SOURCE).enable(True).hide(False).icon_color("red")
        .expr('ALERTS{alertname=~"Megaray.+",alertstate="firing"}')
    )  # fmt: skip
    number = 0
    for title, panels in board.rows:
        made.with_row(dashboard.Row(title).id(number := number + 1))
        for panel in panels:
            made.with_panel(_built(panel).id(number := number + 1))
    return made


def text(board: Board) -> str:
    """A board's JSON, always the same."""
    return str(JSONEncoder(sort_keys=True, indent=1).encode(build(board).build())) + "\n"


def write(folder: Path = FOLDER) -> list[Path]:
    """Write all boards; their files."""
    folder.mkdir(parents=True, exist_ok=True)
    for board in BOARDS:
        (folder / f"{board.name}.json").write_text(text(board))
    return [folder / f"{board.name}.json" for board in BOARDS]


if __name__ == "__main__":
    print("\n".join(str(path.relative_to(ROOT)) for path in write()))
