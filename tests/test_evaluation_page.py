"""The page and tables: whole, self-contained, escaped, and with the figures of the result."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import pytest

from drafter.errors import UserError
from drafter.evaluation import plots as plots_module
from drafter.evaluation.intervals import RESAMPLES
from drafter.evaluation.markdown import markdown
from drafter.evaluation.page import html_page
from drafter.evaluation.plots import COLOURS, plot_result
from drafter.evaluation.results import FORMAT, read_result, summarise, without_nan
from drafter.evaluation.tables import short_names, table
from tests.test_evaluation_intervals import tallies

SAMPLE = {
    "set_name": "one",
    "prompt_id": 0,
    "prompt": "Ask <b>&me</b>",
    "pieces": [["first", False], [" <accepted> & run", True], [" own", False]],
    "mode": "replay",
}


@pytest.fixture(scope="module")
def result():
    def drafter(name, seed, share):
        rows = [row for s in ("one", "two|x") for row in tallies(9, seed, share=share, set_name=s)]
        return {
            "name": name,
            "fingerprint": name,
            "block_size": 6,
            "responses": {"replay": [row.to_json() for row in rows]},
            "samples": [SAMPLE],
        }

    return without_nan(
        summarise(
            {
                "settings": {
                    "max_new_tokens": 40,
                    "sampling": {"temperature": 0.5, "top_k": 3, "top_p": 0.9},
                    "seed": 0,
                },
                "target": {"path": "some/<target>", "fingerprint": "f"},
                "dtype": "float32",
                "drafters": [drafter("a<b", 1, 0.8), drafter("c", 1, 0.3)],
                "skipped": [
                    {"set_name": "one", "prompt_id": n, "turn": 0, "reason": "too <long>"}
                    for n in range(2)
                ],
                "misfits": ["d is for another target"],
                "overlap": {"c": {"one": {"prompts": 9, "whole": 1, "shared": 2}}},
                "audit": [
                    {
                        "drafter": "c",
                        "responses": 5,
                        "identical": 4,
                        "explained": 0,
                        "unexplained": 1,
                        "divergences": [
                            {
                                "set_name": "one",
                                "prompt_id": 3,
                                "turn": 0,
                                "what": "text",
                                "position": 7,
                                "tokens": [5, 6],
                                "gap": 1.0,
                                "bound": 0.1,
                                "noise_ratio": 1.0,
                                "explained": False,
                                "reproduced": True,
                            }
                        ],
                    }
                ],
                "command": "evaluate.py report",
            }
        )
    )


class Page(HTMLParser):
    """Notes unclosed tags, addresses and text."""

    VOID = {"meta", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.words, self.marked = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.addresses += [v for k, v in attrs if k in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if "mark" in self.open:
            self.marked.append(data)


def test_the_page_needs_nothing_else_and_closes_what_it_opens(result):
    text = html_page([result])
    page = Page(text)
    assert page.open == []
    assert len(page.addresses) == 3
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "<script" not in text
    assert not re.search(r"https?://", text)
    words = "".join(page.words)
    for said in ("a<b", "some/<target>", "too <long>", "d is for another target", "NOT explained"):
        assert said in words
    assert " <accepted> & run" in page.marked


def test_page_and_table_show_the_figures(result):
    found = result["drafters"][0]["figures"]["replay"]["average"]["accepted_length"]
    for text in (html_page([result]), markdown(result), table(result)):
        assert f"{found['value']:.3f}" in text
        assert f"{found['low']:.3f}" in text
    assert "better" in markdown(result)
    lines = [line for line in markdown(result).splitlines() if line.startswith("|")]
    # a bar in a name does not make a column
    assert all(len(re.findall(r"(?<!\\)\|", line)) in (5, 9) for line in lines)


def searched(name, budget, modes, drafted):
    """A drafter with a tree; `drafted` tokens a round, None where there was no round."""
    values = {"accepted_length": 2.0, "tokens_per_second": 9.0, "drafted_per_round": drafted}
    own = {figure: {"value": value, "low": None, "high": None} for figure, value in values.items()}
    return {
        "name": f"{name}, tree of {budget}",
        "fingerprint": name,
        "search": f"tree of {budget}",
        "block_size": 6,
        "figures": {mode: {"sets": {}, "average": own} for mode in modes},
    }


def test_searches_have_a_colour_a_drafter_and_leave_out_what_had_no_round(monkeypatch):
    both, loop = ("replay", "decode"), ("decode",)
    drafters = [
        searched("a", 4, ("replay",), 4.0),
        searched("a", 8, ("replay",), 8.0),
        searched("a", 12, ("replay",), None),  # beside others, None could not be sorted
        *(searched("b", budget, both, float(budget)) for budget in (4, 8)),
        *(searched("c", budget, loop, float(budget)) for budget in (4, 8)),
    ]
    seen = []
    to_png = plots_module.to_png

    def look(plt, fig):
        seen.append(fig.axes)
        return to_png(plt, fig)

    monkeypatch.setattr(plots_module, "to_png", look)
    assert "searches" in plot_result({"drafters": drafters})
    first, second = seen[0]
    assert [list(line.get_xdata()) for line in first.lines] == [[4.0, 8.0], [4.0, 8.0]]
    assert [line.get_color() for line in first.lines] == list(COLOURS[:2])
    assert [line.get_color() for line in second.lines] == list(COLOURS[1:3])
    (legend,) = first.figure.legends
    named = {
        text.get_text(): handle.get_color()
        for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)
    }
    assert named == {"tree": "black", **dict(zip("abc", COLOURS, strict=False))}


def test_plots_are_pictures_and_the_same_each_time(result):
    plots = plot_result(result)
    assert list(plots) == ["accepted_length", "acceptance_by_position", "waste"]
    assert all(png.startswith(b"\x89PNG") and len(png) > 5000 for png in plots.values())
    assert plot_result(result) == plots


def test_more_rows_than_colours_tell_apart_have_a_line_each(result):
    def heights(rows):
        drafters = [{**result["drafters"][i % 2], "name": f"row {i}"} for i in range(rows)]
        plots = plot_result({**result, "drafters": drafters})
        return [plt.imread(io.BytesIO(png)).shape[0] for png in plots.values()]

    few, many, more = heights(len(COLOURS)), heights(len(COLOURS) + 1), heights(24)
    assert few == heights(len(COLOURS) - 1)  # bars stand side by side
    assert all(b > a for a, b in zip(many, more, strict=True))


def test_figures_are_made_of_the_responses_alone(result):
    again = without_nan(summarise(json.loads(json.dumps(result)), RESAMPLES))
    assert again == result


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not a result file"),
        ("[]", "it says None"),
        (json.dumps({"format": FORMAT + 1}), f"it says {FORMAT + 1}"),
    ],
)
def test_another_file_is_refused(tmp_path, content, said):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UserError, match=re.escape(said)):
        read_result(path)
    with pytest.raises(UserError, match="no such file"):
        read_result(tmp_path / "y.json")


def test_names_are_as_short_as_tells_them_apart():
    assert short_names(["runs/a", "runs/b"]) == ["a", "b"]
    assert short_names(["x/runs/a", "y/runs/a"]) == ["x/runs/a", "y/runs/a"]
    assert short_names(["r/a/checkpoints/best.ckpt", "r/a/checkpoints/last.ckpt"]) == [
        "a/best",
        "a/last",
    ]
    assert short_names(["a", "a", "a"]) == ["a", "a (2)", "a (3)"]
