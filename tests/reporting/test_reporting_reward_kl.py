"""The picture of reward against KL: drawn from what PPO recorded, the gold reward beside the learnt one."""

import json
from xml.etree import ElementTree

import pytest

from hf_scratch_gpt.cli import write_stage_page
from hf_scratch_gpt.reporting.charts import path_chart
from hf_scratch_gpt.reporting.reward_kl import draw_reward_kl, reward_kl_charts

SVG = "{http://www.w3.org/2000/svg}"


def write_rollouts(folder, rows):
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rollouts(count, **extra):
    return [
        {"step": 8 * n, "kl": n / 4, "reward": n / 10, **{key: value(n) for key, value in extra.items()}}
        for n in range(count)
    ]


def circles(panel):
    return [
        (float(dot.get("cx")), float(dot.get("cy"))) for dot in panel.iter(f"{SVG}circle") if dot.get("r") == "1.6"
    ]


def test_both_curves_are_drawn_and_over_optimisation_is_seen(tmp_path):
    write_rollouts(tmp_path, rollouts(20, reward_learnt=lambda n: n, reward_gold=lambda n: -((n - 8) ** 2)))
    write_stage_page("ppo", tmp_path)
    root = ElementTree.fromstring((tmp_path / "reward_kl.svg").read_text())
    panels = root.findall(f"{SVG}g")
    assert [panel.find(f"{SVG}text").text for panel in panels] == ["Learnt reward, normalised", "Gold reward"]
    learnt, gold = map(circles, panels)
    assert len(learnt) == len(gold) == 20
    assert [x for x, _ in learnt] == [x for x, _ in gold] == sorted(x for x, _ in gold)
    heights = [-y for _, y in learnt]
    assert heights == sorted(heights)  # the learnt reward rises throughout
    heights = [-y for _, y in gold]
    assert heights.index(max(heights)) == 8  # and the gold one has its top where it had


def test_without_a_gold_reward_there_is_one_curve_and_with_too_few_rollouts_none(tmp_path):
    write_rollouts(tmp_path, rollouts(5))
    assert len(reward_kl_charts(tmp_path, "red")) == 1
    assert draw_reward_kl(tmp_path).read_text().count("<path") == 1
    write_rollouts(tmp_path, rollouts(1))
    assert reward_kl_charts(tmp_path, "red") == []
    assert draw_reward_kl(tmp_path) is None
    assert reward_kl_charts(tmp_path / "none", "red") == []


def test_a_curve_that_turns_back_is_drawn_in_the_order_of_training():
    svg = path_chart([(0.0, 0.0), (2.0, 1.0), (1.0, 2.0)], "turning", "x", "red")
    path = ElementTree.fromstring(svg).find("path").get("d")
    xs = [float(point.split(",")[0].strip("M")) for point in path.split("L")]
    assert xs[0] < xs[2] < xs[1]


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "rollouts.jsonl").write_text('{"kl": 1.0}\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"rollouts\.jsonl, line 2: no rollout with a 'kl'"):
        draw_reward_kl(tmp_path)
