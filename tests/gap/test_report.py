"""The page is self-contained, complete and safe; the terminal table shows the same numbers."""

import csv
import dataclasses
import html
import io
import math
import re
import urllib.parse
from html.parser import HTMLParser

import made_up
import pytest
from rich.console import Console

from gvjax.gap import contrasts, figures, report
from gvjax.gap.results import StudyResults


@pytest.fixture(scope="module")
def page() -> str:
    return report.page(made_up.study())


class Outline(HTMLParser):
    """Collects what a browser would fetch, checks that tags close, and keeps the visible text."""

    VOID = ("meta", "link")

    def __init__(self):
        super().__init__()
        self.fetched, self.open, self.tags, self.words = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if (
                name in ("src", "srcset", "data", "action")
                or (name == "href" and tag != "a")
                or (name == "href" and not value.startswith(("#", "data:text/csv")))
            ):
                self.fetched.append(value)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    parser.close()
    return parser


def test_page_is_well_formed_and_fetches_nothing(page):
    parsed = outline(page)
    assert parsed.open == []
    assert parsed.fetched == ["data:,"]
    assert "script" not in parsed.tags
    assert "@import" not in page
    assert not re.search(r"url\(|https?://", page)


def test_verdict_comes_first_and_everything_is_there(page):
    results = contrasts.analyse(made_up.study())
    verdict = contrasts.verdict(results)
    words = html.unescape(page)
    positions = [
        words.index(verdict.headline + "."),
        words.index(verdict.sentences[0]),
        words.index('id="gap"'),
    ]
    assert positions == sorted(positions)
    for sentence in (*verdict.sentences, *verdict.would_change):
        assert sentence in words
    assert results.config_hash in words
    for task in results.tasks:
        for arm in task.arms:
            for seed in arm.seeds:
                assert figures.number(seed.mean_gold, 3) in words
    for version in results.versions.values():
        assert version in words
    assert words.count('class="plot"') == 2 + 4 + 3


def test_text_from_the_study_is_escaped(page):
    assert "<b>4</b>" not in page
    assert "&lt;b&gt;4&lt;/b&gt;" in page


def test_a_scorers_share_of_pairs_in_order_says_whose_order():
    task = made_up.study().tasks[0]

    def shown(gold):
        scorers = [
            dataclasses.replace(
                scorer,
                seeds=tuple(
                    dataclasses.replace(seed, accuracy=0.66, gold_accuracy=gold)
                    for seed in scorer.seeds
                ),
            )
            for scorer in task.scorers
        ]
        return report._scorers(dataclasses.replace(task, scorers=tuple(scorers)))

    both = shown(0.81)
    assert "66% right<" in both.svg and "order of their labels" in both.caption
    assert both.rows[1][3:5] == (0.66, 0.81)
    # As results were that held the second under the first one's name.
    one = shown(None)
    assert "66% right by gold<" in one.svg and "gold rewards" in one.caption
    assert one.rows[1][3:5] == (None, 0.66)


def test_every_figures_data_can_be_downloaded(page):
    links = re.findall(
        r'href="data:text/csv;charset=utf-8,([^"]*)" download="([^"]*)"', page
    )
    assert len(links) == page.count('class="plot"')
    assert len({name for _, name in links}) == len(links)
    tables = {
        name: list(
            csv.DictReader(io.StringIO(urllib.parse.unquote(html.unescape(data))))
        )
        for data, name in links
    }
    rows = tables["gold-against-kl-tour.csv"]
    reported = [row for row in rows if row["reported"] == "1" and row["arm"] == "RLOO"]
    seeds = made_up.study().tasks[0].arm("RLOO").seeds
    assert [float(row["gold"]) for row in reported] == [s.mean_gold for s in seeds]


def test_render_writes_one_file(tmp_path, page):
    report.render(made_up.study(), tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page


def variant(name: str) -> StudyResults:
    study = made_up.study(prompts=6)
    task = study.tasks[0]
    if name == "one seed":
        return made_up.study(seeds=(5,), prompts=6)
    if name == "no curves":
        return made_up.study(prompts=6, curves=False)
    if name == "nothing declared":
        return dataclasses.replace(study, contrasts=())
    if name == "no offline arm":
        arms = tuple(arm for arm in task.arms if arm.road in ("start", "online"))
        task = dataclasses.replace(
            task, arms=arms, scorers=(), samples=(), best_of_n=()
        )
        return dataclasses.replace(study, tasks=(task,), contrasts=())
    if name == "diverged":
        rloo = task.arm("RLOO")
        broken = dataclasses.replace(
            rloo.seeds[0], gold=(math.nan,) * 6, kl=math.inf, length=math.nan
        )
        rloo = dataclasses.replace(rloo, seeds=(broken, *rloo.seeds[1:]))
        arms = tuple(rloo if arm.name == "RLOO" else arm for arm in task.arms)
        task = dataclasses.replace(task, arms=arms)
        return dataclasses.replace(study, tasks=(task, *study.tasks[1:]))
    assert name == "crossed"
    task = dataclasses.replace(task, prompts="crossed")
    return dataclasses.replace(study, tasks=(task, *study.tasks[1:]))


@pytest.mark.parametrize(
    "name",
    [
        "one seed",
        "no curves",
        "nothing declared",
        "no offline arm",
        "diverged",
        "crossed",
    ],
)
def test_every_kind_of_study_gives_a_page_and_a_table(name):
    study = variant(name)
    parsed = outline(report.page(study))
    assert parsed.open == []
    text = " ".join(parsed.words)
    assert not re.search(r"\bnan\b|\bNone\b|\{\{", text)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report.terminal_table(study))
    shown = console.export_text()
    assert "nan" not in shown.split()
    if name == "one seed":
        assert "Inconclusive" in text
        assert "Inconclusive" in shown
        assert "one seed" in shown
    if name == "no offline arm":
        assert "Every arm against its start" in text
        assert "SFT = 0" in text
    if name == "diverged":
        assert "gold is not finite in seed 5" in text


def test_the_best_online_arm_is_named_by_validation_gold():
    task = made_up.study().tasks[0]

    def named(**golds):
        arms = tuple(
            dataclasses.replace(
                arm,
                seeds=tuple(
                    dataclasses.replace(s, extra={"validation_gold": golds[arm.name]})
                    if arm.name in golds
                    else dataclasses.replace(s, extra={})
                    for s in arm.seeds
                ),
            )
            for arm in task.arms
        )
        tiles = report._tiles(dataclasses.replace(task, arms=arms))
        return [label for label, *_ in tiles if label.startswith("best online")]

    assert named(**{"Online DPO": 0.9, "RLOO": 0.1}) == ["best online: Online DPO"]
    # By the test prompts where nothing else is known.
    assert named() == ["best online: RLOO"]


def test_terminal_table_shows_arms_and_contrasts():
    study = made_up.study()
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report.terminal_table(study))
    shown = console.export_text()
    task = study.tasks[0]
    estimate = contrasts.arm_estimate(task, task.arm("RLOO"))
    low, high = estimate.interval()
    line = next(row for row in shown.splitlines() if row.strip().startswith("RLOO  "))
    assert f"{estimate.mean:.3f}" in line
    assert f"[{low:.3f}, {high:.3f}]" in line
    assert "RLOO − best offline" in shown
    assert "gold at matched KL" in shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "—"),
        (999.4, "999"),
        (1000, "1,000"),
        (76_800, "76.8 k"),
        (1.2e6, "1.2 M"),
        (4.3e11, "430 G"),
        (3.14e17, "3.1e17"),
        (1.62, "1.62"),
    ],
)
def test_amounts(value, shown):
    assert report._amount(value) == shown


def test_ticks_are_round_and_inside():
    assert figures.ticks(0.0, 1.0, 6) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert figures.ticks(-0.23, 0.11, 4) == [-0.2, -0.1, 0.0, 0.1]


def test_a_root_scale_gives_small_numbers_room():
    scale = figures.Scale(0.0, 36.0, 0.0, 60.0, root=True)
    assert [scale(value) for value in (0, 1, 4, 9, 36)] == [0, 10, 20, 30, 60]
    below = figures.Scale(-1.0, 1.0, 0.0, 2.0, root=True)
    assert below(-0.25) == 0.5 and below(0.25) == 1.5
    assert figures.root_ticks(44.0) == [0, 1, 5, 10, 20]
    assert figures.root_ticks(0.07, 4) == [0, 0.005, 0.02, 0.05]
    assert figures.root_ticks(9.0) == [0, 0.2, 1, 2, 5]


def test_numbers_have_true_minus_signs_and_no_negative_zero():
    assert figures.number(-0.123, sign=True) == "−0.12"
    assert figures.number(-0.001, sign=True) == "0.00"
    assert figures.number(0.5, sign=True) == "+0.50"
    assert figures.number(math.inf) == "∞"
